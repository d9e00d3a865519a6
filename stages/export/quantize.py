"""The int8 file of `softcache export --int8`: static quantisation, its calibration, its accuracy, size and latency.

Weights are int8 with one scale per output channel; activations are uint8 with one scale per tensor (Jacob et al. 2018,
arXiv 1712.05877). Logits stay float32: 256 levels would be visible in the probabilities.
"""

import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

from softcache import __version__
from softcache.base.errors import CacheError
from softcache.data.tasks import NUMBERS
from softcache.data.views.render import render
from softcache.pipeline.loading.view_checks import ViewChecks
from softcache.stages.cli.console import progress
from softcache.stages.student.setup import DistillationSetup

from .int8_loss import measure_int8_loss
from .metadata import INT8, ONNX, ExportMetadata
from .onnx_model import Images, OnnxStudent, serialize_onnx, strip_onnx
from .output_comparison import Logits, OutputComparison
from .parity import run_in_batches, take_first_images, to_unit_range

_CALIBRATION_VIEWS, _CALIBRATION_BATCH = 512, 64
_LATENCY_BATCH_SIZES = (1, 64)
_WEIGHT_OPERATORS = ("Conv", "Gemm", "MatMul")
_QUANTIZED_OPERATORS = [*_WEIGHT_OPERATORS, "Add", "Relu", "MaxPool", "AveragePool"]


def make_int8_file(
    setup: DistillationSetup,
    metadata: ExportMetadata,
    model: bytes,
    float32_student: OnnxStudent,
    split: str,
    expected: Logits,
    comparison: OutputComparison,
    most_drop: float,
) -> tuple[bytes, dict[str, Any]]:
    """Quantise an ONNX file, and measure what this costs, such as accuracy, and saves in size and time.

    Args:
        setup: The run's cache, transfer set and held-out splits.
        metadata: Of the student; written into the file.
        model: The float32 ONNX file.
        float32_student: The same file, loaded in ONNX Runtime.
        split: The held-out split on which the loss is measured.
        expected: float32 [N, K], PyTorch's logits of that split.
        comparison: How outputs are compared.
        most_drop: Largest loss that is accepted (0 … 1), see `int8_loss.Int8Loss.drop`: of accuracy as a share of the
            rows.

    Returns:
        The int8 ONNX file, and the value of `int8` in export.json.

    Raises:
        CacheError: The student loses more than `most_drop`.
    """
    held_out = setup.held_out[split]
    batches = progress(_calibration_batches(setup), -(-_CALIBRATION_VIEWS // _CALIBRATION_BATCH), "calibrating")
    content = quantize_onnx(model, batches, metadata.to_dict(), __version__)
    int8_student = OnnxStudent.from_bytes(content, torch.get_num_threads())
    logits = run_in_batches(
        held_out, lambda views: int8_student.compute_logits(to_unit_range(views)), f"checking {INT8}"
    )
    before, after = (setup.compute_metrics({split: z})[split] for z in (expected, logits))
    loss = measure_int8_loss(
        comparison,
        outputs=logits,
        expected=expected,
        labels=held_out.labels,
        teacher=setup.teacher_logits[split].numpy(),
        before=before,
        after=after,
    )
    if not loss.drop <= most_drop:
        raise CacheError(
            f"{INT8} {loss.text} on {split}, more than the {loss.describe_limit(most_drop)}: nothing was written."
            " Raise it, or leave out --int8"
        )
    students = {ONNX: float32_student, INT8: int8_student}
    return content, {
        "split": split,
        **loss.to_json(metadata.task),
        "most_drop": most_drop,
        **({} if loss.changes is None else {"flips": loss.changes}),
        "rows": len(expected),
        "figures": after,
        "calibration_rows": _count_calibration_views(setup),
        "bytes": len(content),
        "size_ratio": len(content) / len(model),
        "milliseconds": {
            str(size): measure_latencies(students, take_first_images(held_out, size)) for size in _LATENCY_BATCH_SIZES
        },
        "threads": torch.get_num_threads(),
    }


def _count_calibration_views(setup: DistillationSetup) -> int:
    """512, or all cached training views where there are fewer."""
    return min(_CALIBRATION_VIEWS, len(setup.cache.row_order("train")) * setup.cache.manifest.draws)


def _calibration_batches(setup: DistillationSetup) -> Iterator[Images]:
    """Yield cached training views, float32 [B, C, S, S], of as many images and draws as possible.

    Cached rows are in a random order, so the first images are a random sample of the split.
    """
    cache, order = setup.cache, setup.cache.row_order("train")
    images, N = setup.transfer_set.splits["train"].images, len(order)
    checks = ViewChecks(setup.teachers, "train", images)
    place = np.arange(_count_calibration_views(setup))
    index, draw = order[place % N], (place // N + place % N) % cache.manifest.draws
    for start in range(0, len(place), _CALIBRATION_BATCH):
        batch = slice(start, start + _CALIBRATION_BATCH)
        views = render(images, cache.views, cache.seed, index[batch], draw[batch])
        checks.compare_views(views, index[batch], draw[batch])
        yield to_unit_range(views)


class _CalibrationReader:
    """Calibration batches with the interface of ONNX Runtime's CalibrationDataReader."""

    def __init__(self, input_name: str, batches: Iterator[Images]):
        self.input_name, self.batches = input_name, batches

    def get_next(self) -> dict[str, Images] | None:
        """Return the next batch, None after the last."""
        batch = next(self.batches, None)
        return None if batch is None else {self.input_name: batch}


def quantize_onnx(model: bytes, calibration: Iterator[Images], metadata: dict[str, str], version: str) -> bytes:
    """Quantise an ONNX file to int8 weights and uint8 activations.

    Weights use 7 of the 8 bits: processors with AVX2 or AVX-512 but without VNNI add two products of 8 x 8 bits in
    16 bits, which overflows with full-range weights, and the measured accuracy would not hold on them.

    Args:
        model: The float32 file.
        calibration: Batches float32 [B, C, S, S] of values 0 … 1, from which the ranges of activations are taken.
        metadata: Key-value pairs for the file.
        version: Version of softcache, for the file.

    Returns:
        The quantised file.
    """
    float32_model = onnx.load_from_string(model)
    reader = _CalibrationReader(float32_model.graph.input[0].name, calibration)
    with TemporaryDirectory() as folder, _without_advice():
        float32_path, int8_path = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        float32_path.write_bytes(model)
        quantize_static(
            float32_path,
            int8_path,
            reader,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_QUANTIZED_OPERATORS,
            nodes_to_exclude=[
                *_find_normalization_nodes(float32_model),
                *_find_output_scale_nodes(float32_model, metadata.get("task", "")),
            ],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
        int8_model = onnx.load(int8_path)
    strip_onnx(int8_model, metadata, version)
    _shorten_names(int8_model)
    return serialize_onnx(int8_model)


def _find_normalization_nodes(model: Any) -> list[str]:
    """Name the nodes before the first with weights: quantising them would round the image twice."""
    names = []
    for node in model.graph.node:
        if node.op_type in _WEIGHT_OPERATORS:
            break
        names.append(node.name)
    return names


def _find_output_scale_nodes(model: Any, task: str) -> list[str]:
    """Name the last two nodes of a network of numbers, which scale its output: 256 levels would be visible in it."""
    return [node.name for node in model.graph.node[-2:]] if task == NUMBERS else []


def _shorten_names(model: Any) -> None:
    """Rename the inner values of a graph to hexadecimal numbers, and remove the names of its nodes.

    The long names that quantisation makes are 3 to 8 % of the file (resnet8: 80,527 bytes without them, 87,435 with).
    Neither onnx nor ONNX Runtime has a function for it: `onnx.compose.add_prefix` renames, but only to longer names.
    """
    graph = model.graph
    if any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute):
        return  # a nested graph may use values of this one by their names
    unchanged = {"", *(value.name for value in (*graph.input, *graph.output))}
    short_names: dict[str, str] = {}

    def shorten(name: str) -> str:
        return name if name in unchanged else short_names.setdefault(name, f"{len(short_names):x}")

    for tensor in graph.initializer:
        tensor.name = shorten(tensor.name)
    for node in graph.node:
        node.name = ""
        node.input[:] = map(shorten, node.input)
        node.output[:] = map(shorten, node.output)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence quantize_static's advice to prepare the model first: the exporter has done that."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def measure_latencies(students: dict[str, OnnxStudent], images: Images, seconds: float = 1.0) -> dict[str, float]:
    """Measure the time of one call, the students in turn so that all share the machine's load.

    Args:
        students: The networks, by file name.
        images: The batch of each call, float32 [B, C, S, S].
        seconds: Rounds are repeated until so much time has passed; at least 5 rounds, at most 1,000.

    Returns:
        {file name: median milliseconds of a call}.
    """
    for student in students.values():
        student.compute_logits(images)
    milliseconds: dict[str, list[float]] = {name: [] for name in students}
    start, rounds = time.perf_counter(), 0
    while rounds < 5 or (rounds < 1000 and time.perf_counter() - start < seconds):
        for name, student in students.items():
            call_start = time.perf_counter()
            student.compute_logits(images)
            milliseconds[name].append(1000 * (time.perf_counter() - call_start))
        rounds += 1
    return {name: statistics.median(values) for name, values in milliseconds.items()}
