"""The parts of a model card that depend on the task, and on whether the inputs are images or rows of numbers."""

from collections.abc import Iterator
from typing import Any

from softcache.base.text import escape_markdown
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS
from softcache.pipeline.metrics.tasks import TASK_FIGURES
from softcache.stages.runs.figures import TITLES, get_task

from .metadata import INPUT, ONNX

_LISTED_NAMES = 20  # with their names, and with their figures
NAME = 80  # characters of a name
_CLASS_TITLES = {
    "accuracy": "accuracy",
    "top5": "top-5 accuracy",
    "precision_macro": "precision, macro",
    "recall_macro": "recall, macro",
    "f1_macro": "F1, macro",
    "auroc_macro": "AUROC, macro",
    "nll": "NLL, nats",
    "ece": "ECE",
    "agreement": "agreement with the teacher",
}
_KINDS = {  # of images, of rows
    CLASSES: ("an image classifier", "a classifier of rows of numbers"),
    LABELS: ("a multi-label image classifier", "a multi-label classifier of rows of numbers"),
    NUMBERS: ("a regression network for images", "a regression network for rows of numbers"),
    EMBEDDING: ("an image encoder", "an encoder of rows of numbers"),
}
_HEAD = """\
import json, numpy as np, onnxruntime
from PIL import Image

student, image = onnxruntime.InferenceSession("{file}"), Image.open("picture.png").convert("{mode}")
image = image.resize([max(round(side * ({resize} / min(image.size))), {size}) for side in image.size], Image.BILINEAR)
image = image.crop([(side + step) // 2 for step in (-{size}, {size}) for side in image.size])
inputs = {{"{input}": np.array(image, np.float32).reshape(1, {size}, {size}, {channels}).transpose(0, 3, 1, 2) / 255}}
"""
_ROWS_HEAD = """\
import json, numpy as np, onnxruntime

student, rows = onnxruntime.InferenceSession("{file}"), np.load("rows.npy")
inputs = {{"rows": rows.astype(np.float32).reshape(-1, {shape})[:1]}}  # the first row
"""
_METADATA = "metadata = {name: json.loads(student.get_modelmeta().custom_metadata_map[name]) for name in %s}\n"
_TAILS = {
    CLASSES: 'print(json.loads(student.get_modelmeta().custom_metadata_map["classes"])'
    "[np.argmax(student.run(None, inputs))])\n",
    LABELS: _METADATA % '("names", "thresholds")'
    + "probabilities = 1 / (1 + np.exp(-student.run(None, inputs)[0][0]))\n"
    + 'print([name for name, p, t in zip(metadata["names"], probabilities, metadata["thresholds"]) if p > t])\n',
    NUMBERS: _METADATA % '("names",)'
    + 'print(dict(zip(metadata["names"], student.run(None, inputs)[0][0].tolist())))\n',
    EMBEDDING: "print(student.run(None, inputs)[0][0])\n",
}


def is_of_rows(record: dict[str, Any]) -> bool:
    """Whether the student takes rows of numbers, by export.json."""
    return "shape" in record["preprocessing"]


def name_row(record: dict[str, Any]) -> str:
    """Return what one input is called: "image" or "row"."""
    return "row" if is_of_rows(record) else "image"


def describe_kind(record: dict[str, Any]) -> str:
    """Return what the network is, such as "an image classifier"."""
    return _KINDS[get_task(record)][is_of_rows(record)]


def format_names_row(record: dict[str, Any]) -> str:
    """Return the row of the card's table that states what the outputs are."""
    task = get_task(record)
    if task == EMBEDDING:
        return f"| embedding | {record['width']} numbers, without names |"
    names = record["classes" if task == CLASSES else "names"]
    shown = [escape_markdown(name, NAME) for name in names[:_LISTED_NAMES]]
    if task == LABELS:
        thresholds = record["thresholds"][:_LISTED_NAMES]
        shown = [f"{name} ({threshold:.3g})" for name, threshold in zip(shown, thresholds, strict=True)]
    more = f" and {len(names) - _LISTED_NAMES} more" if len(names) > _LISTED_NAMES else ""
    title = "labels (and the threshold of each)" if task == LABELS else task
    return f"| {title} | {len(names)}: {', '.join(shown)}{more} |"


def describe_input(preprocessing: dict[str, Any]) -> str:
    """Describe the input: name, dtype, shape and preparation.

    Args:
        preprocessing: See `ExportMetadata.preprocessing`.
    """
    if "shape" in preprocessing:
        return f"`rows`, {preprocessing['layout']}, in the units of the data; normalisation is inside the network"
    kind = "a grey" if preprocessing["channels"] == 1 else "an RGB"
    size, resize, channels = preprocessing["size"], preprocessing["resize"], preprocessing["channels"]
    return (
        f"`{INPUT}`, float32 [B, {channels}, {size}, {size}], values 0 … 1."
        f" Decode as {kind} image, resize the shorter side to {resize} px with Pillow's bilinear filter, cut out the"
        f" central {size} × {size} px, divide by 255; normalisation is inside the network"
    )


def get_metric_titles(record: dict[str, Any]) -> dict[str, str]:
    """Return {figure: title} of the figures of the card, in their order."""
    main = TASK_FIGURES[get_task(record)].main
    return _CLASS_TITLES if get_task(record) == CLASSES else {main: TITLES[main]} | TITLES


def name_packages(record: dict[str, Any]) -> str:
    """Return the packages that the example needs."""
    return "onnxruntime numpy" if is_of_rows(record) else "onnxruntime pillow numpy"


def format_example(record: dict[str, Any]) -> str:
    """Return Python code that prints what is predicted for an image, or for the first row of a file."""
    preprocessing, task = record["preprocessing"], get_task(record)
    if is_of_rows(record):
        return _ROWS_HEAD.format(file=ONNX, shape=", ".join(map(str, preprocessing["shape"]))) + _TAILS[task]
    numbers = {name: preprocessing[name] for name in ("mode", "channels", "size", "resize")}
    return _HEAD.format(file=ONNX, input=INPUT, **numbers) + _TAILS[task]


def describe_command_line(record: dict[str, Any]) -> str:
    """Return the paragraph on `softcache predict`."""
    what = {CLASSES: "probabilities", LABELS: "labels and their probabilities", NUMBERS: "the numbers"}
    return (
        f"\nOr `python -m softcache predict {ONNX} {'rows.npy' if is_of_rows(record) else 'image.png'}`, which prints"
        f" {what.get(get_task(record), 'the embedding')}.\n"
    )


def list_limits(record: dict[str, Any], data: str) -> Iterator[str]:
    """Yield what a user has to know of the figures and the input.

    Args:
        record: export.json.
        data: Name of the data, escaped.
    """
    task, row = get_task(record), name_row(record)
    if row == "image":
        first = (
            f"The metrics were measured on held-out images of {data}. They may not hold for other images: another"
            " camera, place or\n  time."
        )
    else:
        first = f"The metrics were measured on held-out rows of {data}. They may not hold for rows of another origin."
    if task == CLASSES:
        article = "An image" if row == "image" else "A row"
        first += f" {article} of none of the {len(record['classes'])} classes is assigned to one of them all the same."
    yield first
    yield "The student was trained on a teacher's soft targets, so it repeats mistakes of the teacher."
    if task == CLASSES:
        yield f"The probabilities are calibrated as the ECE above states, on those {row}s."
    if row == "image":
        outputs = {NUMBERS: "numbers", EMBEDDING: "embedding"}.get(task, "logits")
        yield (
            f"Images must be prepared as described under input: another filter, size or range of values changes the"
            f" {outputs}."
        )


def format_output_table(record: dict[str, Any]) -> Iterator[str]:
    """Yield the table of the student's figures of each class, label or number; of many classes the lowest."""
    task, split = get_task(record), record["check"]["split"]
    metrics = record["figures"]["student"][split]
    if task == CLASSES and "per_class" in metrics:
        yield from _format_recall_table(metrics["per_class"], record["classes"], split, name_row(record))
    elif task == LABELS and "per_label" in metrics:
        figures = ("average_precision", "f1", "auroc", "support")
        titles = ("average precision", "F1", "AUROC", f"positive {name_row(record)}s")
        yield from _format_table("label", figures, titles, metrics["per_label"], record["names"], split)
    elif task == NUMBERS and "per_output" in metrics:
        figures = ("mae", "rmse", "r2", "spearman")
        yield from _format_table(
            "number", figures, tuple(TITLES[x] for x in figures), metrics["per_output"], record["names"], split
        )


def _format_recall_table(per_class: dict[str, Any], names: list[str], split: str, row: str) -> Iterator[str]:
    rows = [
        (recall, name, support)
        for recall, name, support in zip(per_class["recall"], names, per_class["support"], strict=True)
        if recall is not None
    ]
    title = f"Recall of the student by class, {split}"
    if len(rows) > _LISTED_NAMES // 2:
        rows.sort(key=lambda row: row[0])
        title += ", the lowest first"
    if len(rows) > _LISTED_NAMES:
        title += f" ({len(rows) - _LISTED_NAMES} higher ones are left out)"
    yield f"{title}:\n"
    yield f"| class | recall | {row}s |\n|---|---|---|"
    for recall, name, support in rows[:_LISTED_NAMES]:
        yield f"| {escape_markdown(name, NAME)} | {recall:.4f} | {int(support):,} |"
    yield ""


def _format_table(
    what: str,
    figures: tuple[str, ...],
    titles: tuple[str, ...],
    values: dict[str, Any],
    names: list[str],
    split: str,
) -> Iterator[str]:
    """Yield a table with one line for each of the first names."""
    more = f" (the first {_LISTED_NAMES} of {len(names)})" if len(names) > _LISTED_NAMES else ""
    yield f"The student by {what}, {split}{more}:\n"
    yield f"| {what} | {' | '.join(titles)} |\n|---|{'---|' * len(titles)}"
    for k, name in enumerate(names[:_LISTED_NAMES]):
        row = [values[figure][k] for figure in figures]
        texts = ["-" if value is None else f"{value:,}" if type(value) is int else f"{value:.4g}" for value in row]
        yield f"| {escape_markdown(name, NAME)} | {' | '.join(texts)} |"
    yield ""
