"""Rows about stage one against other engines, and about the compiled teacher that is kept for a second process.

An engine gets what is best for it: its own process, images that lie ready as normalised float32, batches of one size
that it was told beforehand, as many threads as stage one has. It computes the logits, and no more.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.stages.cli.configs import CacheConfig
from softcache.stages.teacher_cache.inference import TeacherInference

from . import fixtures
from .measurement import BenchOptions, Measurement, NotMeasurable
from .other_process import start_in_other_process
from .teacher import StageOne
from .timing import Contender, divide, format_medians, make_contender, take_fastest, time_in_turns

Images = NDArray[np.float32]
InferAll = Callable[[list[Images]], None]  # computes the logits of every batch


def compare_with_engine(options: BenchOptions, engine: str) -> Measurement:
    """Images per second of stage one / of the bare inference of an engine, ResNet-56 in float32.

    Stage one renders, computes, checks, encodes and writes. It folds batch norms and is compiled where that is faster,
    within a KL of 1e-9. Of an engine's ways to use its threads the fastest counts.

    Args:
        options: of the benchmark.
        engine: one of ENGINES.

    Raises:
        NotMeasurable: where the engine is not installed, or the rows are measured on a GPU.
    """
    if options.device.type != "cpu":
        raise NotMeasurable("the engines are measured on a CPU")
    data = fixtures.add_data_set(options.scale(3072, 150))
    stage_one = StageOne(options, data, precision="auto", tolerance=1e-9, compile=not options.quick)
    threads = torch.get_num_threads()
    factories = {name: (make_engine, (options, engine, name, threads)) for name in ENGINES[engine]}
    with _keep_programs_in(options.folder / "user"), start_in_other_process(factories) as engines:
        seconds = time_in_turns({**engines, "stage one": stage_one}, options.scale(5, 1))
    fastest = take_fastest(*(seconds[name] for name in engines))
    return Measurement(divide(fastest, seconds["stage one"]), format_medians(seconds))


def make_engine(options: BenchOptions, engine: str, variant: str, threads: int) -> Contender:
    """Return a contender: the bare inference of an engine, in the process that runs it.

    Raises:
        NotMeasurable: where the engine, or what PyTorch exports with, is not installed.
    """
    rows, batches = CacheConfig.batch_size if not options.quick else 50, options.scale(12, 2)
    images = (fixtures.make_images(rows * batches, 3, 32).float() / 255 - 0.48) / 0.25
    try:
        infer_all = ENGINES[engine][variant](_export(images[:rows]), threads)
    except ImportError as error:
        raise NotMeasurable(f"{error}: make bench installs it") from None
    parts = [part.numpy() for part in torch.split(images, rows)]

    def infer() -> int:
        infer_all(parts)
        return len(images)

    return make_contender(infer)


def load_in_onnxruntime(model: bytes, threads: int) -> InferAll:
    """Load a network into ONNX Runtime, each batch on all threads."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])

    def infer_all(batches: list[Images]) -> None:
        for images in batches:
            session.run(None, {"images": images})

    return infer_all


def load_in_openvino(model: bytes, threads: int) -> InferAll:
    """Load a network into OpenVINO, each batch on all threads."""
    compiled = _compile_in_openvino(model, threads, "LATENCY")

    def infer_all(batches: list[Images]) -> None:
        for images in batches:
            compiled([images])

    return infer_all


def load_in_openvino_streams(model: bytes, threads: int) -> InferAll:
    """Load a network into OpenVINO, as many batches at once as it chooses for the most images a second."""
    import openvino

    compiled = _compile_in_openvino(model, threads, "THROUGHPUT")
    queue = openvino.AsyncInferQueue(compiled)

    def infer_all(batches: list[Images]) -> None:
        for images in batches:
            queue.start_async([images])
        queue.wait_all()

    return infer_all


# {engine: {a way to use its threads: loads a network}}
ENGINES: dict[str, dict[str, Callable[[bytes, int], InferAll]]] = {
    "onnxruntime": {"onnxruntime": load_in_onnxruntime},
    "openvino": {"openvino": load_in_openvino, "openvino, streams": load_in_openvino_streams},
}


def measure_compiling_again(options: BenchOptions) -> Measurement:
    """Seconds until a later process has a compiled ResNet-56, its first batch included."""
    if options.device.type != "cpu":
        raise NotMeasurable("what is compiled is kept on a CPU alone")
    arch = "resnet8" if options.quick else "resnet56"
    seconds = []
    with _keep_programs_in(options.folder / "user"):
        for _ in range(options.scale(6, 2)):
            with start_in_other_process({"compile": (make_compiling, (options, arch))}) as contenders:
                seconds.append(contenders["compile"]())
    first, *later = seconds
    return Measurement(later, f"the first process takes {first:.3g} s")


def make_compiling(options: BenchOptions, arch: str) -> Contender:
    """Return a contender: a teacher is compiled as by stage one, or what was compiled is loaded, and runs a batch."""
    rows = CacheConfig.batch_size if not options.quick else 8
    inference = TeacherInference(fixtures.make_teacher(arch), (), fold=True)
    views = fixtures.make_images(rows, 3, 32)

    def take_turn() -> float:
        start = time.perf_counter()
        inference.compile(views, rows)
        return time.perf_counter() - start

    return take_turn


@contextmanager
def _keep_programs_in(folder: Path) -> Iterator[None]:
    """Keep compiled teachers in this folder while the context is open, also those of processes that are started."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


def _export(images: torch.Tensor) -> bytes:
    """Return a bare ResNet-56 as an ONNX model for batches of the shape of `images`."""
    network = fixtures.make_plain_teacher(torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, for its developers
        program = torch.onnx.export(
            network, (images,), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
        )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def _compile_in_openvino(model: bytes, threads: int, hint: str) -> Any:
    """Return a network compiled by OpenVINO, in float32 also where the processor has faster arithmetic."""
    import openvino

    settings = {"PERFORMANCE_HINT": hint, "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    return core.compile_model(core.read_model(model), "CPU", settings)
