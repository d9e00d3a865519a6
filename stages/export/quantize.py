"""A student in 8 bits: static quantisation, calibrated on views of the cache, and what it costs and saves.

Weights are int8, one scale per output channel; activations uint8, one scale per tensor (Jacob et al. 2018,
arXiv 1712.05877). Logits stay float32: their 256 steps would be seen in probabilities.
"""

import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

from .onnx_model import Images, OnnxStudent, serialize_onnx, strip_onnx

_HEAVY = ("Conv", "Gemm", "MatMul")
_QUANTISED = [*_HEAVY, "Add", "Relu", "MaxPool", "AveragePool"]


class _CalibrationReader:
    """Calibration batches, as ONNX Runtime asks for them."""

    def __init__(self, name: str, batches: Iterator[Images]):
        self.name, self.batches = name, batches

    def get_next(self) -> dict[str, Images] | None:
        """The next batch, None after the last."""
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch}


def quantize_onnx(model: bytes, calibration: Iterator[Images], metadata: dict[str, str], version: str) -> bytes:
    """The ONNX file in 8 bits. calibration: batches float32 [B, C, S, S] of values 0 … 1.

    Weights take 7 of the 8 bits: processors with AVX2 or AVX-512 but without VNNI add two products of 8 x 8 bits in
    16, which then overflow, and the accuracy that is measured here would not be had there.
    """
    whole = onnx.load_from_string(model)
    reader = _CalibrationReader(whole.graph.input[0].name, calibration)
    with TemporaryDirectory() as folder, _quiet():
        before, after = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        before.write_bytes(model)
        quantize_static(
            before,
            after,
            reader,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_QUANTISED,
            nodes_to_exclude=_normalization_nodes(whole),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
        made = onnx.load(after)
    strip_onnx(made, metadata, version)
    _shorten_names(made)
    return serialize_onnx(made)


def _normalization_nodes(model: Any) -> list[str]:
    """The names of the nodes before the first with weights: in 8 bits they would round the image twice."""
    names = []
    for node in model.graph.node:
        if node.op_type in _HEAVY:
            break
        names.append(node.name)
    return names


def _shorten_names(model: Any) -> None:
    """Give values names of one or two letters, and nodes none: of a `resnet8` in 8 bits they are a tenth."""
    graph = model.graph
    if any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute):
        return  # values of a graph within are known outside of it
    kept = {"", *(value.name for value in (*graph.input, *graph.output))}
    names: dict[str, str] = {}

    def short(name: str) -> str:
        return name if name in kept else names.setdefault(name, f"{len(names):x}")

    for tensor in graph.initializer:
        tensor.name = short(tensor.name)
    for node in graph.node:
        node.name = ""
        node.input[:] = map(short, node.input)
        node.output[:] = map(short, node.output)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that quantize_static logs: to prepare a model that the exporter has prepared."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def measure_latencies(runners: dict[str, OnnxStudent], images: Images, seconds: float = 1.0) -> dict[str, float]:
    """{name: median milliseconds of a call}, measured in turns; at least 5 each, then until seconds have passed."""
    for runner in runners.values():
        runner.logits(images)
    took: dict[str, list[float]] = {name: [] for name in runners}
    begun, turns = time.perf_counter(), 0
    while turns < 5 or (turns < 1000 and time.perf_counter() - begun < seconds):
        for name, runner in runners.items():
            start = time.perf_counter()
            runner.logits(images)
            took[name].append(1000 * (time.perf_counter() - start))
        turns += 1
    return {name: statistics.median(values) for name, values in took.items()}
