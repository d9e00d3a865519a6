"""The images on which student and teacher differ most, where the data and caches of a run are available."""

import base64
import io
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from softcache.base.errors import CacheError, UsageError
from softcache.base.threads import take_first
from softcache.data.sources import is_user_dataset
from softcache.data.transfer_set import TransferSet
from softcache.data.views.policy import ViewPolicy
from softcache.pipeline.loading.rendering import render_batches
from softcache.stages.cli.configs import ReportConfig
from softcache.stages.student.teachers import load_shared_data, open_caches

from .differences import Bar, describe_label, format_distance, make_bars, rank_rows
from .load import LoadedRun

_SIDE = 96  # pixels to which larger images are reduced
TransferSets = dict[tuple[object, ...], tuple[TransferSet, ViewPolicy] | str]


@dataclass(frozen=True)
class Disagreement:
    """An image on which student and teacher differ.

    Attributes:
        url: The image as a data URL.
        row: Its row in the split.
        label_kind: What its hard target is called: "true class".
        label: Its hard target, such as the name of its true class; None where it has none.
        distance: How far teacher and student differ, with its unit.
        bars: The outputs of both for the most probable classes, or the labels or numbers that differ most.
    """

    url: str
    row: int
    label_kind: str
    label: str | None
    distance: str
    bars: list[Bar]


def collect_disagreements(
    run: LoadedRun, split: str, config: ReportConfig, transfer_sets: TransferSets
) -> list[Disagreement] | str:
    """Collect the largest disagreements of a run's first seed.

    Args:
        run: The run.
        split: Whose images are shown.
        config: With the number of images, and where the data are.
        transfer_sets: Those that are open already, or the errors of those that cannot be opened; added to.

    Returns:
        The disagreements, the largest first; a str says why there are none.
    """
    if not run.logits["student"] or not run.logits["teacher"]:
        return "the run is not finished" if run.result is None else "the run has no files of logits"
    data = _open_transfer_set(run, config, transfer_sets)
    if isinstance(data, str):
        return data
    transfer_set, views = data
    if transfer_set.shape:
        return f"the data are rows of numbers {list(transfer_set.shape)}, which have no pictures"
    student, teacher = run.logits["student"][0][split], run.logits["teacher"][0][split]
    if student.logits.shape != teacher.logits.shape:
        return "the outputs of student and teacher differ in width"
    images = transfer_set.splits[split]
    if images.content != student.content:
        return f"the images of the {split} split have changed since the run was measured on them"
    ranked = rank_rows(run.task, student, teacher, config.show)
    batch = np.array([row for row, _ in ranked])
    rendered = take_first(render_batches(images.images, views.without_augmentation(), 0, [batch], 0, 0))
    disagreements = []
    for view, (row, difference) in zip(rendered, ranked, strict=True):
        label_kind, label = describe_label(run.task, student, row)
        disagreements.append(
            Disagreement(
                url=_encode_image(view),
                row=row,
                label_kind=label_kind,
                label=label,
                distance=format_distance(run.task, difference),
                bars=make_bars(run.task, student, teacher, row),
            )
        )
    return disagreements


def _open_transfer_set(
    run: LoadedRun, config: ReportConfig, transfer_sets: TransferSets
) -> tuple[TransferSet, ViewPolicy] | str:
    """Open a run's transfer set and the policy of its views, or return why they are not available."""
    if is_user_dataset(run.config.data) and not config.data:
        return "a report does not import code that a run names: name the data with --data"
    run_config = replace(
        run.config,
        data=config.data or run.config.data,
        data_root=config.data_root or run.config.data_root,
        index=config.index or run.config.index,
        rehash=config.rehash,
    )
    key = (run_config.cache, run_config.data, run_config.data_root)
    if key not in transfer_sets:
        try:
            caches = open_caches(run_config.cache)
            transfer_sets[key] = (load_shared_data(caches, run_config), caches[0].views)
        except (CacheError, UsageError) as error:
            transfer_sets[key] = str(error).splitlines()[0]
    return transfer_sets[key]


def _encode_image(view: torch.Tensor) -> str:
    """Encode a view uint8 [C, S, S] as a PNG in a data URL, reduced where it is large."""
    pixels = view.numpy().transpose(1, 2, 0)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
