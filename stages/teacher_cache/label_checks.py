"""A teacher's accuracy on labelled rows: near chance, with its classes in another order, with another normalisation.

Nothing here ends a command: labels may be wrong, and a poor teacher may be meant. What is found is printed.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base.errors import make_printable
from softcache.data.sources.class_order import SORTED_ORDERS, sort_classes
from softcache.data.tasks import CLASSES
from softcache.data.transfer_set import TransferSet
from softcache.data.views.policy import ViewPolicy
from softcache.data.views.render import render
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.rows import make_row_order
from softcache.pipeline.models.prepared_model import NORMALIZATIONS, PreparedModel
from softcache.stages.cli.console import Console
from softcache.stages.teacher.data import make_input_spec

from .targets import TargetGenerator

_SAMPLE_ROWS, _SAMPLE_SECONDS, _CHUNK = 512, 2.0, 32  # of a first look, before the first shard
_MIN_VIEWS = 2048  # of a cache that is worth a first look; a smaller one is complete soon
_CACHE_ROWS, _CACHE_BYTES = 16_384, 64 << 20  # that are read of a complete cache
_MIN_ROWS = 20  # labelled rows below which nothing is concluded
_MAX_CLASSES = 2048  # up to which the best assignment of classes is searched: 0.3 s
_MIN_DEVIATIONS, _MIN_GAIN = 5.0, 0.01  # of another order of the classes, in standard deviations and as accuracy
_MIN_NORMALIZE_DEVIATIONS, _MIN_NORMALIZE_GAIN = 3.0, 0.03

Labels = NDArray[np.int64]


def describe_label_fit(labels: Labels, predictions: Labels, classes: tuple[str, ...]) -> list[str]:
    """Describe what is wrong between a teacher and the labels of its data.

    Args:
        labels: int64 [n], class of each row.
        predictions: int64 [n], top-1 class of the teacher for each row.
        classes: K names, in the order of the labels.

    Returns:
        A line where another order of the classes explains the labels significantly better, or else where the teacher
        is hardly better than chance; empty where neither is so or there are fewer than 20 rows.
    """
    n, K = len(labels), len(classes)
    if n < _MIN_ROWS or K < 2 or predictions.max(initial=0) >= K:
        return []
    is_correct = predictions == labels
    accuracy = float(is_correct.mean())
    chance = max(1 / K, float(np.bincount(labels, minlength=K).max() / n))
    for order in SORTED_ORDERS:
        ordered = sort_classes(classes, order)
        if ordered is None or ordered == classes:
            continue
        assignment = np.array([classes.index(name) for name in ordered])
        is_correct_then = assignment[predictions] == labels
        if _is_better(is_correct_then, is_correct) and is_correct_then.mean() > chance + _MIN_GAIN:
            return [
                f"warning: the teacher's classes seem to be in another order than those of the data: on {n:,} labelled"
                f" views its accuracy is {accuracy:.4f}, and {is_correct_then.mean():.4f} if its classes are"
                f" {_list_names(ordered)}, not {_list_names(classes)} (the order of the names as text): add --classes"
                f" {order}"
            ]
    if K <= _MAX_CLASSES and (fit := _fit_assignment(labels, predictions, K)):
        assignment, is_correct_then = fit
        if _is_better(is_correct_then, is_correct) and is_correct_then.mean() > (1 + chance) / 2:
            moved = [i for i in range(K) if assignment[i] != i]
            examples = ", ".join(f"output {i} fits '{make_printable(classes[assignment[i]], 40)}'" for i in moved[:5])
            more = f" and {len(moved) - 5} more" if len(moved) > 5 else ""
            return [
                f"warning: the teacher's classes seem to be in another order than those of the data: on {n:,} labelled"
                f" views its accuracy is {accuracy:.4f}, and {is_correct_then.mean():.4f} with its classes permuted:"
                f" {examples}{more}. Give its order, one name a line, with --classes FILE,"
                " where these are its weights"
            ]
    if int(is_correct.sum()) <= n * chance + max(3 * np.sqrt(n * chance * (1 - chance)), 0.02 * n):
        return [
            f"warning: the teacher's accuracy on {n:,} labelled views is {accuracy:.4f}, hardly better than chance"
            f" ({chance:.4f}): are these its weights, its --normalize, and its order of classes (--classes)?"
        ]
    return []


def print_first_look(generator: TargetGenerator, rows_to_write: int, console: Console) -> None:
    """Print what is wrong between teacher and labels, by up to 512 views that are run before the first shard.

    Nothing is run where the cache is small, since `print_final_look` follows soon.
    """
    transfer_set = generator.transfer_set
    if rows_to_write < _MIN_VIEWS or not transfer_set.classes:
        return
    split = _find_labelled_split(transfer_set, generator.views.mixes_images)
    if split is None:
        return
    rows = transfer_set.splits[split]
    order = make_row_order(generator.config.seed, split, len(rows)).astype(np.int64)
    index = order[rows.labels[order] >= 0][:_SAMPLE_ROWS]
    views = generator.teacher_views.of_split(split)
    labels, predictions = [], []
    with generator.inference.open() as infer:
        for chunk in _chunks_in_time(index):
            rendered = render(rows.images, views, generator.config.seed, chunk, 0).to(generator.inference.device)
            predictions.append(infer(rendered)[0].argmax(1).cpu().numpy())
            labels.append(rows.labels[chunk])
    for line in describe_label_fit(np.concatenate(labels), np.concatenate(predictions), transfer_set.classes):
        console.print(line)


def print_final_look(folder: Path, transfer_set: TransferSet, console: Console) -> None:
    """Print what is wrong between the outputs in a complete cache and the labels of its data."""
    cache = CacheReader(folder)
    has_mixed_views = cache.views.mixes_images
    splits = [split for split in transfer_set.splits if split != "train" or not has_mixed_views]
    splits = [split for split in splits if (transfer_set.splits[split].labels >= 0).any()]
    if not splits:
        return
    most = min(_CACHE_ROWS, _CACHE_BYTES // (4 * cache.classes)) // len(splits)
    parts = []
    for split in splits:
        positions = np.arange(min(most, cache.manifest.splits[split]))
        logits = cache.read_stored(split, 0, positions)[0]
        labels = transfer_set.splits[split].labels[cache.index_at(split, positions)]
        parts.append(np.stack([labels, logits.argmax(1).numpy()])[:, labels >= 0])
    all_labels, predictions = np.concatenate(parts, axis=1)
    for line in describe_label_fit(all_labels, predictions, transfer_set.classes):
        console.print(line)


def print_normalize_comparison(
    teacher: PreparedModel, transfer_set: TransferSet, views: ViewPolicy, console: Console
) -> None:
    """Print that --normalize was not given, and the accuracy on some labelled training images with each choice.

    Args:
        teacher: With the mean and standard deviation of the data, in eval mode, on its device.
        transfer_set: The data.
        views: The view policy, with a size.
        console: Prints one line.
    """
    spec = teacher.input_spec
    numbers = f"mean {_list_numbers(spec.mean)}, std {_list_numbers(spec.std)}"
    kind, others = ("rows", "none") if spec.shape else ("images", "imagenet, none,")
    line = (
        f"--normalize not given: using the mean and standard deviation of these {kind} ({numbers}). A teacher trained"
        f" elsewhere mostly needs its own: --normalize {others} or mean=…,std=…"
    )
    train = transfer_set.splits["train"]
    has_classes = bool(transfer_set.classes) and transfer_set.task == CLASSES
    is_correct = _measure_normalizations(teacher, transfer_set, views) if has_classes else {}
    if is_correct:
        n = len(is_correct["data"])
        accuracies = ", ".join(f"{name} {values.mean():.4f}" for name, values in is_correct.items())
        line += f". Accuracy on {n} of the {len(train):,} training {kind}: {accuracies}"
        best = max(is_correct, key=lambda name: float(is_correct[name].mean()))
        if _is_better(is_correct[best], is_correct["data"], _MIN_NORMALIZE_DEVIATIONS, gain=_MIN_NORMALIZE_GAIN):
            line += f". --normalize {best} fits this teacher better"
    console.print(line)


def _measure_normalizations(
    teacher: PreparedModel, transfer_set: TransferSet, views: ViewPolicy
) -> dict[str, NDArray[np.bool_]]:
    """Return {named normalisation: whether the teacher is right, [n]} for some labelled training images."""
    train, device = transfer_set.splits["train"], teacher.scale.device
    names = [name for name in NORMALIZATIONS if name != "data" and not (transfer_set.shape and name == "imagenet")]
    specs = {name: make_input_spec(name, transfer_set, views) for name in names}
    specs = {"data": teacher.input_spec, **specs}
    channels = teacher.input_spec.channels
    models = {
        name: PreparedModel(teacher.network, spec).to(device).eval()
        for name, spec in specs.items()
        if spec.channels == channels
    }
    order = make_row_order(0, "train", len(train)).astype(np.int64)
    index = order[train.labels[order] >= 0][:_SAMPLE_ROWS]
    if len(index) < _MIN_ROWS:
        return {}
    is_correct: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in models}
    with torch.inference_mode():
        for chunk in _chunks_in_time(index):
            rendered = render(train.images, views.without_augmentation(), 0, chunk, 0).to(device)
            for name, model in models.items():
                is_correct[name].append(
                    teacher.map_classes(model(rendered)).argmax(1).cpu().numpy() == train.labels[chunk]
                )
    return {name: np.concatenate(values) for name, values in is_correct.items()}


def _find_labelled_split(transfer_set: TransferSet, has_mixed_views: bool) -> str | None:
    """Return the first split with at least 20 labels; not the training split where its views mix two images."""
    splits = [split for split in transfer_set.splits if split != "train" or not has_mixed_views]
    return next((s for s in splits if (transfer_set.splits[s].labels >= 0).sum() >= _MIN_ROWS), None)


def _chunks_in_time(index: Labels) -> Iterator[Labels]:
    """Yield parts of an index until two seconds have passed; the first part always."""
    start = time.monotonic()
    for i in range(0, len(index), _CHUNK):
        yield index[i : i + _CHUNK]
        if time.monotonic() - start > _SAMPLE_SECONDS:
            return


def _fit_assignment(labels: Labels, predictions: Labels, K: int) -> tuple[Labels, NDArray[np.bool_]] | None:
    """Fit the best assignment of outputs to classes.

    Returns:
        The class of each output, int64 [K], fitted to all rows; and whether each row is right under the assignment
        that is fitted to the other half of the rows, bool [n], so that chance is not fitted.
    """
    from scipy.optimize import linear_sum_assignment  # not at the top: it takes 0.1 s to import

    def fit(rows: NDArray[np.bool_]) -> Labels:
        counts = 0.5 * np.eye(K)  # an output without evidence keeps its class
        np.add.at(counts, (predictions[rows], labels[rows]), 1)
        return np.asarray(linear_sum_assignment(counts, maximize=True)[1], np.int64)

    is_even = np.arange(len(labels)) % 2 == 0
    is_correct = np.empty(len(labels), np.bool_)
    for rows in (is_even, ~is_even):
        is_correct[~rows] = fit(rows)[predictions[~rows]] == labels[~rows]
    return fit(np.ones(len(labels), np.bool_)), is_correct


def _is_better(
    first: NDArray[np.bool_], second: NDArray[np.bool_], deviations: float = _MIN_DEVIATIONS, gain: float = _MIN_GAIN
) -> bool:
    """Whether more rows are right by the first than by the second, significantly (McNemar) and by some accuracy."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    difference = only_first - only_second
    return difference > deviations * np.sqrt(only_first + only_second) and difference >= gain * len(first)


def _list_numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values[:8]) + (", …" if len(values) > 8 else "")


def _list_names(names: tuple[str, ...]) -> str:
    return ", ".join(make_printable(name, 40) for name in names[:5]) + (", …" if len(names) > 5 else "")
