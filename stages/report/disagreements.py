"""The images on which student and teacher differ most, where data and caches are at hand."""

import base64
import io
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from scipy.special import softmax

from softcache.base.errors import CacheError, UsageError
from softcache.data.transfer_set import TransferSet
from softcache.data.views import ViewPolicy
from softcache.pipeline.loading.rendering import render_batches
from softcache.stages.cli.configs import ReportConfig
from softcache.stages.student.teachers import load_shared_data, open_caches

from .load import LoadedRun
from .summary import largest_disagreements

_SIDE = 96  # pixels at which a image is kept in the page
_BARS, _LEAST = 3, 0.005  # classes of each distribution that have a bar, and what one has at least
Loaded = dict[tuple[object, ...], tuple[TransferSet, ViewPolicy] | str]


@dataclass(frozen=True)
class Disagreement:
    """A image as a data URL, its row and true class (None where it has no label), the divergence of the two
    distributions in bits, and of some classes (name, teacher's, student's probability)."""

    url: str
    row: int
    label: str | None
    divergence: float
    bars: list[tuple[str, float, float]]


def disagreements(run: LoadedRun, split: str, config: ReportConfig, loaded: Loaded) -> list[Disagreement] | str:
    """Those of the run's first seed; or why there are none. loaded: transfer sets that are open already."""
    if not run.logits["student"] or not run.logits["teacher"]:
        return "the run is not finished" if run.result is None else "the run has kept no logits"
    opened = _opened(run, config, loaded)
    if isinstance(opened, str):
        return opened
    transfer_set, views = opened
    kept, teacher = run.logits["student"][0][split], run.logits["teacher"][0][split]
    rows = transfer_set.splits[split]
    if rows.content != kept.content:
        return f"the {split} split has other images now than the run was measured on"
    chosen = largest_disagreements(kept.logits, teacher.logits, config.show)
    batch = np.array([row for row, _ in chosen])
    seen = next(iter(render_batches(rows.images, views.without_augmentation(), 0, [batch], 0, 0)))
    found = []
    for view, (row, divergence) in zip(seen, chosen, strict=True):
        p, q = softmax(teacher.logits[row]), softmax(kept.logits[row])
        first = dict.fromkeys([*np.argsort(-p)[:_BARS].tolist(), *np.argsort(-q)[:_BARS].tolist()])
        bars = [(kept.class_names[c], float(p[c]), float(q[c])) for c in first if max(p[c], q[c]) >= _LEAST]
        label = kept.class_names[kept.labels[row]] if kept.labels[row] >= 0 else None
        found.append(Disagreement(_url(view), row, label, divergence, bars))
    return found


def _opened(run: LoadedRun, config: ReportConfig, loaded: Loaded) -> tuple[TransferSet, ViewPolicy] | str:
    """The run's transfer set and the policy of its views, or why they cannot be had."""
    own = run.config
    here = replace(own, data=config.data or own.data, data_root=config.data_root or own.data_root)
    key = (here.cache, here.data, here.data_root)
    if key not in loaded:
        try:
            caches = open_caches(here.cache)
            loaded[key] = (load_shared_data(caches, here), caches[0].views)
        except (CacheError, UsageError) as error:
            loaded[key] = str(error).splitlines()[0]
    return loaded[key]


def _url(view: torch.Tensor) -> str:
    """uint8 [C, S, S] as a PNG in a URL; large ones made smaller."""
    pixels = view.numpy().transpose(1, 2, 0)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
