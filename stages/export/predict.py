"""`softcache predict`: the classes an exported student predicts for images. Needs no cache, no data and no PyTorch."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.packages import require_extra
from softcache.data.images.decoding import apply_orientation, center_crop, open_image
from softcache.stages.cli.configs import PredictConfig
from softcache.stages.cli.console import Console, progress

from .metadata import ExportMetadata
from .onnx_model import Images, OnnxStudent, open_onnx_student


def run(model: str, images: tuple[str, ...], config: PredictConfig) -> None:
    """Print the most probable classes of each image.

    Args:
        model: Path of an exported ONNX file.
        images: Paths of the images; all must exist before the first is decoded.
        config: Options of the command.

    Raises:
        UsageError: A file does not exist.
        CacheError: The model or an image cannot be used.
    """
    console = Console(config.json)
    require_extra("predict needs", "export", "onnx", "onnxruntime")
    if missing := [name for name in images if not Path(name).exists()]:
        raise UsageError(f"there is no image '{missing[0]}'")
    onnx_student, metadata = open_onnx_student(Path(model))
    predictions = [
        {"picture": name, "top": _predict_top(onnx_student, metadata, Path(name), config.top)}
        for name in progress(images, len(images), "images")
    ]
    if config.json:
        return console.print_json(json.dumps({"model": model, "pictures": predictions}))
    width = max(len(name) for name in images)
    for prediction in predictions:
        classes = ", ".join(f"{make_printable(c['class'], 60)} {c['probability']:.4f}" for c in prediction["top"])
        console.print(f"{prediction['picture']:<{width}}  {classes}")


def load_input(path: Path, metadata: ExportMetadata) -> Images:
    """Decode an image into the network's input, float32 [1, C, S, S] of values 0 … 1.

    The pixels are those of the plain view in which the student was validated.
    """
    with open_image(path) as image:
        upright = apply_orientation(image) if metadata.is_transposed else image
        pixels = center_crop(upright.convert(metadata.mode), metadata.size, metadata.resize)
    return pixels[None].astype(np.float32) / np.float32(255)


def _predict_top(onnx_student: OnnxStudent, metadata: ExportMetadata, path: Path, count: int) -> list[dict[str, Any]]:
    """Return the `count` most probable classes of an image, with their probabilities."""
    images = load_input(path, metadata)
    try:
        logits = onnx_student.compute_logits(images)[0].astype(np.float64)
    except Exception as error:  # any of ONNX Runtime's: the file may come from anyone
        raise CacheError(f"the model fails on '{path}': {make_printable(str(error).strip())}") from None
    if logits.shape != (len(metadata.classes),) or not np.isfinite(logits).all():
        raise CacheError(f"the model does not compute {len(metadata.classes)} finite logits for '{path}'")
    exponentials = np.exp(logits - logits.max())
    probabilities = exponentials / exponentials.sum()
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [{"class": metadata.classes[c], "probability": float(probabilities[c])} for c in order]
