"""The file in 8 bits of `softcache export --int8`: calibrated on views of the cache, and what it costs and saves."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from softcache import __version__
from softcache.base.errors import CacheError
from softcache.data.views import render
from softcache.pipeline.metrics.classification import evaluate
from softcache.stages.cli.console import progress
from softcache.stages.student.setup import DistillationSetup

from .metadata import INT8, ONNX, ExportMetadata
from .onnx_model import Images, OnnxStudent
from .parity import Logits, first_rows, run_in_batches, to_unit_range
from .quantize import measure_latencies, quantize_onnx

_CALIBRATION, _BLOCK = 512, 64  # views that it is calibrated on, and how many at once
_LATENCY = (1, 64)  # sizes of batches that are timed


def make_quantized_file(
    setup: DistillationSetup,
    about: ExportMetadata,
    model: bytes,
    runner: OnnxStudent,
    split: str,
    said: Logits,
    most_drop: float,
) -> tuple[bytes, dict[str, Any]]:
    """The file in 8 bits, and what it costs and saves. Raises CacheError where it costs too much."""
    rows, calibration = setup.held_out[split], _calibration(setup)
    views = progress(calibration, -(-_CALIBRATION // _BLOCK), "calibrating")
    content = quantize_onnx(model, views, about.to_metadata(), __version__)
    small = OnnxStudent.from_session(content, torch.get_num_threads())
    found = run_in_batches(rows, lambda views: small.logits(to_unit_range(views)), f"checking {INT8}")
    teacher = setup.teacher_logits[split].numpy()
    before, after = (evaluate(logits, rows.labels, teacher, setup.class_counts) for logits in (said, found))
    flips = int((found.argmax(1) != said.argmax(1)).sum())
    # Without labels, what changes its first class is the most that can have been lost.
    drop = before["accuracy"] - after["accuracy"] if "accuracy" in before else flips / len(said)
    if not drop <= most_drop:
        raise CacheError(
            f"{INT8} loses {100 * drop:.2f} points of accuracy on {split}, more than the"
            f" {100 * most_drop:g} of --most-drop {most_drop:g}: nothing was written. Raise it, or"
            " leave out --int8"
        )
    both = {ONNX: runner, INT8: small}
    return content, {
        "split": split,
        "accuracy_before": before.get("accuracy"),
        "accuracy_after": after.get("accuracy"),
        "drop": drop,
        "most_drop": most_drop,
        "flips": flips,
        "rows": len(said),
        "figures": after,
        "calibration_rows": _rows_of(setup),
        "bytes": len(content),
        "size_ratio": len(content) / len(model),
        "milliseconds": {str(size): measure_latencies(both, first_rows(rows, size)) for size in _LATENCY},
        "threads": torch.get_num_threads(),
    }


def _rows_of(setup: DistillationSetup) -> int:
    """How many views there are to calibrate on, as many as are wanted at most."""
    return min(_CALIBRATION, len(setup.cache.row_order("train")) * setup.cache.manifest.draws)


def _calibration(setup: DistillationSetup) -> Iterator[Images]:
    """Views that the teacher was asked about, of as many images and draws as may be: rows lie in a mixed order."""
    cache, order = setup.cache, setup.cache.row_order("train")
    images, N = setup.transfer_set.splits["train"].images, len(order)
    at = np.arange(_rows_of(setup))
    index, draw = order[at % N], (at // N + at % N) % cache.manifest.draws
    for block in range(0, len(at), _BLOCK):
        some = slice(block, block + _BLOCK)
        yield to_unit_range(render(images, cache.views, cache.seed, index[some], draw[some]))
