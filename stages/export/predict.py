"""`softcache predict`: what an exported student says of images. Needs neither cache nor data, and no PyTorch."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.data.decoding import center_crop, open_image
from softcache.stages.cli.configs import PredictConfig
from softcache.stages.cli.console import Console, progress
from softcache.stages.cli.extras import require_extra

from .metadata import ExportMetadata
from .onnx_model import Images, OnnxStudent, open_onnx_student


def run(model: str, images: tuple[str, ...], config: PredictConfig) -> None:
    """The likeliest classes of each image. Every image is looked for before the first is asked about."""
    console = Console(config.json)
    require_extra("predict needs", "export", "onnx", "onnxruntime")
    if missing := [name for name in images if not Path(name).is_file()]:
        raise UsageError(f"there is no image '{missing[0]}'")
    runner, about = open_onnx_student(Path(model))
    shown = progress(images, len(images), "pictures")
    found = [{"picture": name, "top": _top(runner, about, Path(name), config.top)} for name in shown]
    if config.json:
        return console.print_json(json.dumps({"model": model, "pictures": found}))
    width = max(len(name) for name in images)
    for one in found:
        said = ", ".join(f"{make_printable(best['class'], 60)} {best['probability']:.4f}" for best in one["top"])
        console.print(f"{one['picture']:<{width}}  {said}")


def load_input(path: Path, about: ExportMetadata) -> Images:
    """float32 [1, C, S, S], 0 … 1: the plain view of a image, as held-out images are seen."""
    with open_image(path) as image:
        pixels = center_crop(image.convert(about.mode), about.size, about.resize)
    return pixels[None].astype(np.float32) / np.float32(255)


def _top(runner: OnnxStudent, about: ExportMetadata, path: Path, count: int) -> list[dict[str, Any]]:
    """The likeliest classes of a image and their probabilities."""
    view = load_input(path, about)
    try:
        logits = runner.logits(view)[0].astype(np.float64)
    except Exception as error:  # of ONNX Runtime, on a file from anyone
        raise CacheError(f"the model fails on '{path}': {make_printable(str(error).strip())}") from None
    if logits.shape != (len(about.classes),) or not np.isfinite(logits).all():
        raise CacheError(f"the model gives no logits of its {len(about.classes)} classes for '{path}'")
    odds = np.exp(logits - logits.max())
    probabilities = odds / odds.sum()
    best = np.argsort(-probabilities, kind="stable")[:count]
    return [{"class": about.classes[c], "probability": float(probabilities[c])} for c in best]
