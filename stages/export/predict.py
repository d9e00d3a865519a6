"""`softcache predict`: what an exported student predicts for images. Needs no cache, no data and no PyTorch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.packages import require_extra
from softcache.data.images.decoding import apply_orientation, center_crop, open_image
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS
from softcache.stages.cli.configs import PredictConfig
from softcache.stages.cli.console import Console, progress

from .metadata import ExportMetadata
from .onnx_model import Images, OnnxStudent, open_onnx_student

_ROWS_AT_ONCE = 256
_SHOWN_DIMENSIONS = 4  # of an embedding
_NAME = 60  # characters of a name
Outputs = NDArray[np.float64]


def run(model: str, images: tuple[str, ...], config: PredictConfig, explicit_options: set[str]) -> None:
    """Print the most probable classes of each image, its labels, its numbers or its embedding.

    Args:
        model: Path of an exported ONNX file.
        images: Paths of the images; all must exist before the first is decoded. Of a student of rows of numbers:
            of .npy files.
        config: Options of the command.
        explicit_options: Names of the options that were given on the command line.

    Raises:
        UsageError: A file does not exist, or --top is given for a student that predicts no names.
        CacheError: The model or an image cannot be used.
    """
    console = Console(config.json)
    require_extra("predict needs", "export", "onnx", "onnxruntime")
    if missing := [name for name in images if not Path(name).exists()]:
        raise UsageError(f"there is no image '{missing[0]}'")
    onnx_student, metadata = open_onnx_student(Path(model))
    has_top = "top" in explicit_options
    if has_top and metadata.task not in (CLASSES, LABELS):
        raise UsageError(
            f"--top {config.top} is for students of classes or labels, and '{model}' is one of the task"
            f" {metadata.task}: leave it out"
        )
    count = None if metadata.task == LABELS and not has_top else config.top
    predictions = []
    for name in progress(images, len(images), "images"):
        if metadata.shape:
            for k, outputs in enumerate(_compute_rows(onnx_student, metadata, Path(name))):
                predictions.append({"file": name, "row": k, **_describe_outputs(outputs, metadata, count)})
        else:
            outputs = _compute_outputs(onnx_student, metadata, load_input(Path(name), metadata), name)[0]
            predictions.append({"picture": name, **_describe_outputs(outputs, metadata, count)})
    if config.json:
        key = "rows" if metadata.shape else "pictures"
        return console.print_json(json.dumps({"model": model, key: predictions}))
    titles = [f"{p['file']}[{p['row']}]" if metadata.shape else p["picture"] for p in predictions]
    width = max(map(len, titles), default=0)
    for title, prediction in zip(titles, predictions, strict=True):
        console.print(f"{title:<{width}}  {_format_prediction(prediction, has_top)}")


def load_input(path: Path, metadata: ExportMetadata) -> Images:
    """Decode an image into the network's input, float32 [1, C, S, S] of values 0 … 1.

    The pixels are those of the plain view in which the student was validated.
    """
    with open_image(path) as image:
        upright = apply_orientation(image) if metadata.is_transposed else image
        pixels = center_crop(upright.convert(metadata.mode), metadata.size, metadata.resize)
    return pixels[None].astype(np.float32) / np.float32(255)


def _compute_rows(onnx_student: OnnxStudent, metadata: ExportMetadata, path: Path) -> Iterator[Outputs]:
    """Yield the outputs [K] of each row of a .npy file, an array [N, *shape] or one row [*shape]."""
    try:
        rows = np.load(path, mmap_mode="r")  # objects are refused by NumPy
    except (OSError, ValueError, EOFError):
        rows = None
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "iufb":
        raise CacheError(f"'{path}' is no .npy file of numbers, or is damaged: the model takes rows of numbers")
    if rows.shape == metadata.shape:
        rows = rows[None]
    if rows.shape[1:] != metadata.shape:
        raise CacheError(f"'{path}' has the shape {list(rows.shape)}, the model takes rows {list(metadata.shape)}")
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        batch = np.ascontiguousarray(rows[start : start + _ROWS_AT_ONCE], np.float32)
        yield from _compute_outputs(onnx_student, metadata, batch, str(path))


def _compute_outputs(onnx_student: OnnxStudent, metadata: ExportMetadata, inputs: Images, name: str) -> Outputs:
    """Run the network, and check that it returns finite outputs [B, K]."""
    try:
        outputs = onnx_student.compute_logits(inputs).astype(np.float64)
    except Exception as error:  # any of ONNX Runtime's: the file may come from anyone
        raise CacheError(f"the model fails on '{name}': {make_printable(str(error).strip())}") from None
    if outputs.shape != (len(inputs), metadata.outputs) or not np.isfinite(outputs).all():
        noun = "logits" if metadata.task in (CLASSES, LABELS) else "numbers"
        raise CacheError(f"the model does not compute {metadata.outputs} finite {noun} for '{name}'")
    return outputs


def _describe_outputs(outputs: Outputs, metadata: ExportMetadata, count: int | None) -> dict[str, Any]:
    """Return what outputs [K] mean, as plain JSON values.

    Args:
        outputs: Logits, numbers or an embedding.
        metadata: Of the student.
        count: The number of classes or labels that are listed, the most probable first; None for the labels above
            their thresholds.
    """
    names = metadata.classes
    if metadata.task == EMBEDDING:
        return {"embedding": outputs.tolist()}
    if metadata.task == LABELS:
        probabilities = np.exp(-np.logaddexp(0, -outputs))
        is_predicted = probabilities > np.array(metadata.thresholds)
        order = np.argsort(-probabilities, kind="stable")
        listed = order[is_predicted[order]] if count is None else order[:count]
        return {
            "labels": [
                {
                    "label": names[k],
                    "probability": float(probabilities[k]),
                    "threshold": metadata.thresholds[k],
                    "predicted": bool(is_predicted[k]),
                }
                for k in listed
            ]
        }
    if metadata.task != CLASSES:
        values = zip(names, outputs.tolist(), strict=True)
        return {"numbers": [{"name": name, "value": value} for name, value in values]}
    exponentials = np.exp(outputs - outputs.max())
    probabilities = exponentials / exponentials.sum()
    order = np.argsort(-probabilities, kind="stable")[:count]
    return {"top": [{"class": names[c], "probability": float(probabilities[c])} for c in order]}


def _format_prediction(prediction: dict[str, Any], has_top: bool) -> str:
    """Format a prediction in one line. Labels of --top that are above their thresholds are marked."""
    if "top" in prediction:
        return ", ".join(f"{make_printable(c['class'], _NAME)} {c['probability']:.4f}" for c in prediction["top"])
    if "numbers" in prediction:
        return ", ".join(f"{make_printable(n['name'], _NAME)} {n['value']:.6g}" for n in prediction["numbers"])
    if "embedding" in prediction:
        embedding = np.array(prediction["embedding"])
        shown = ", ".join(f"{value:.4f}" for value in embedding[:_SHOWN_DIMENSIONS])
        more = ", …" if len(embedding) > _SHOWN_DIMENSIONS else ""
        return f"{shown}{more} ({len(embedding)} numbers, norm {np.linalg.norm(embedding):.4f})"
    labels = [
        f"{make_printable(label['label'], _NAME)} {label['probability']:.4f}"
        f"{' (predicted)' if has_top and label['predicted'] else ''}"
        for label in prediction["labels"]
    ]
    return ", ".join(labels) or "no label is above its threshold"
