"""The table of rows: every claim about speed, disk and memory, with its goal and the function that measures it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from . import (
    baselines,
    busy,
    data_files,
    engines,
    footprint,
    opening,
    own_loop,
    patience,
    read_speed,
    several_students,
    student,
    teacher,
    time_to_accuracy,
)
from .measurement import BenchOptions, Measurement


@dataclass(frozen=True)
class Row:
    """One claim.

    Attributes:
        name: value of --row, and name of the record in results.json.
        goal: bound of the median; None for a number that is reported without a goal.
        at_least: the goal is a lower bound, else an upper bound.
        measure: measures the row. Raises NotMeasurable where something that it needs is missing.
        description: what the number is. `A / B` is a ratio, of seconds where it does not say otherwise.
        miss_reason: why the goal is missed, where the reason is known.
    """

    name: str
    goal: float | None
    at_least: bool
    measure: Callable[[BenchOptions], Measurement]
    description: str
    miss_reason: str = ""

    def is_reached(self, median: float) -> bool | None:
        """Compare a median with the goal; None where there is no goal."""
        if self.goal is None:
            return None
        return median >= self.goal if self.at_least else median <= self.goal


def at_most(
    name: str, goal: float | None, description: str, measure: Callable[[BenchOptions], Measurement], reason: str = ""
) -> Row:
    """Return a row whose goal is an upper bound."""
    return Row(name, goal, at_least=False, measure=measure, description=description, miss_reason=reason)


def at_least(
    name: str, goal: float | None, description: str, measure: Callable[[BenchOptions], Measurement], reason: str = ""
) -> Row:
    """Return a row whose goal is a lower bound."""
    return Row(name, goal, at_least=True, measure=measure, description=description, miss_reason=reason)


def augmented(name: str, views: str) -> Row:
    """Return a row about the epochs of a student of augmented views."""
    description = f"epoch from the cache / from hard targets, `resnet8`, `--views {views}`"
    return at_most(name, 1.02, description, partial(student.compare_cached_with_hard, arch="resnet8", views=views))


STEP_DOMINATES = "nearly all of our time is the step of resnet8 itself, see hard-over-bare-resnet8"

# Each row: name, goal, description; then the function that measures it, and the known reason of a miss.
# fmt: off
ROWS: tuple[Row, ...] = (
    at_most("cached-resnet8", 1.02, "epoch from the cache / epoch from hard targets",
            lambda options: student.compare_cached_with_hard(options, "resnet8")),
    at_most("cached-cnn", 1.02, "epoch from the cache / epoch from hard targets",
            lambda options: student.compare_cached_with_hard(options, "cnn")),
    augmented("cached-cutmix", "crop-flip:cutmix=1"),
    augmented("cached-randaugment", "crop-flip:randaugment=2x9"),
    augmented("cached-jitter", "crop-flip:jitter=0.4,hue=0.1,gray=0.2"),
    augmented("cached-erasing", "crop-flip:erasing=0.25"),
    augmented("cached-multi-crop", "multi-crop:global=1,local=1"),
    at_most("read-8kB-resnet8", 1.10, "epoch that also reads 8 kB of features a row / epoch from hard targets",
            lambda options: student.compare_cached_with_hard(options, "resnet8", "read")),
    at_most("hint-8kB-resnet8", 1.10, "epoch with a hint loss on 8 kB of features a row / epoch from hard targets",
            lambda options: student.compare_cached_with_hard(options, "resnet8", "hint")),
    at_most("read-8kB-cnn", 1.10, "epoch that also reads 8 kB of features a row / epoch from hard targets",
            lambda options: student.compare_cached_with_hard(options, "cnn", "read")),
    at_most("own-loop-resnet8", 1.05, "epoch of a loop of one's own over the public loader / of the trainer",
            lambda options: own_loop.compare_own_loop_with_trainer(options, "resnet8")),
    at_most("own-loop-mlp64", 1.05, "epoch of a loop of one's own over the public loader / of the trainer",
            lambda options: own_loop.compare_own_loop_with_trainer(options, "mlp:64"),
            "a step of the classes of torch.optim takes 30 us longer than the trainer's functions of it"),
    at_least("loader-28px", 5, "images a second of the public loader / of a DataLoader over tensors, 28 px grey",
             lambda options: own_loop.compare_loader_with_data_loader(options, 28)),
    at_least("loader-32px", None, "the same, 32 px RGB; here the public loader crops and flips as well",
             lambda options: own_loop.compare_loader_with_data_loader(options, 32)),
    at_most("checked-resnet8", 1.01, "epoch whose views are all compared with their checksums / epoch without",
            lambda options: student.compare_checked_with_unchecked(options, "resnet8", rounds=45)),
    at_most("checked-mlp64", 1.03, "epoch whose views are all compared with their checksums / epoch without",
            lambda options: student.compare_checked_with_unchecked(options, "mlp:64", steps=469)),
    at_least("live-of-the-sum", 0.95, "measured gain live / cached, as a share of (teacher + student) / student",
             lambda options: student.compare_live_with_cached(options, "float32", relative_to_sum=True)),
    at_most("hard-over-bare-resnet8", 1.04, "hard targets / bare loop over views in memory",
            lambda options: student.compare_hard_with_bare(options, "resnet8")),
    at_most("hard-over-bare-cnn", 1.04, "hard targets / bare loop over views in memory",
            lambda options: student.compare_hard_with_bare(options, "cnn")),
    at_least("usual-bfloat16", 6.2, "ImageFolder, live ResNet-56, float32 / cached epoch in bfloat16",
             lambda options: baselines.compare_usual_loop(options, "bfloat16")),
    at_least("usual-compiled", 8.0, "ImageFolder, live ResNet-56, float32 / cached epoch in bfloat16, compiled",
             lambda options: baselines.compare_usual_loop(options, "compiled")),
    at_least("usual-float32", 4.2, "ImageFolder, live ResNet-56, float32 / cached epoch in float32",
             lambda options: baselines.compare_usual_loop(options, "float32")),
    at_least("torchdistill", 5.7, "torchdistill, images in memory / cached epoch in bfloat16",
             lambda options: baselines.compare_torchdistill(options, "bfloat16"), STEP_DOMINATES),
    at_least("torchdistill-compiled", 7.0, "torchdistill, images in memory / cached epoch in bfloat16, compiled",
             lambda options: baselines.compare_torchdistill(options, "compiled"), STEP_DOMINATES),
    at_least("live-bfloat16", 2.1, "softcache's loop with the live teacher / with the cache",
             lambda options: student.compare_live_with_cached(options, "bfloat16")),
    at_least("live-float32", 2.8, "softcache's loop with the live teacher / with the cache",
             lambda options: student.compare_live_with_cached(options, "float32")),
    at_most("cached-mlp64", 1.08, "60,000 x 28 x 28: epoch from the cache / epoch from hard targets",
            lambda options: student.compare_cached_with_hard(options, "mlp:64", steps=469)),
    at_most("hard-over-bare-mlp64", 1.1, "60,000 x 28 x 28: hard targets / bare loop over views in memory",
            lambda options: student.compare_hard_with_bare(options, "mlp:64", steps=469),
            "a step is as long as a bare one; rendering a view takes 0.9 us of 9, and a thread hides half of it"),
    at_least("usual-hard", 2.3, "PIL, transforms, hard targets, float32 / cached epoch in bfloat16",
             lambda options: baselines.compare_hard_loop(options, "bfloat16"), STEP_DOMINATES),
    at_least("usual-hard-compiled", 2.3, "PIL, transforms, hard targets, float32 / cached epoch in bfloat16, compiled",
             lambda options: baselines.compare_hard_loop(options, "compiled")),
    at_least("to-target-mnist-1", None, "to the live student's accuracy: live teacher / cached with stage one",
             lambda options: time_to_accuracy.compare_on_mnist(options, students=1)),
    at_least("to-target-mnist-5", 3.0, "the same for 5 students, which share one stage one",
             lambda options: time_to_accuracy.compare_on_mnist(options, students=5),
             "mlp:1200,1200 is a cheap teacher beside cnn"),
    at_least("to-target-cifar-1", None, "to the live student's accuracy: live teacher / cached with stage one",
             lambda options: time_to_accuracy.compare_on_cifar(options, students=1)),
    at_least("to-target-cifar-5", 3.0, "the same for 5 students, which share one stage one",
             lambda options: time_to_accuracy.compare_on_cifar(options, students=5)),
    at_most("to-accuracy-mlp256", 0.4, "Fashion-MNIST, to the final accuracy of hard targets: cache / hard targets",
            lambda options: patience.compare_time_to_accuracy(options, "mlp:256", epochs=60)),
    at_most("to-accuracy-cnn", 0.4, "the same, cnn",
            lambda options: patience.compare_time_to_accuracy(options, "cnn", epochs=30)),
    at_least("draws-of-a-decode", 1.15, "224 px JPEGs: hard targets, one view a decode / cached, 4 draws a decode",
             student.compare_draws_per_decode),
    *(at_most(f"threads-{name}-beside-{others}", {0: 1.1, 2: 1.2}.get(others),
              f"{work} {arch} beside {others} busy processes: chosen waiting of threads / the best fixed choice",
              partial(busy.compare_with_fixed_choices, work=work, arch=arch, busy=others),
              "a network of many small layers: its threads meet often" if arch == "resnet56" else "")
      for name, work, arch in busy.WORKS for others in busy.BUSY),
    at_most("parquet-over-folder", 1.0, "epoch of mlp:64 over 10,000 JPEGs: in parquet files / in a folder",
            lambda options: data_files.compare_with_folder(options, "parquet")),
    at_most("tar-over-folder", 1.0, "the same, in tar shards",
            lambda options: data_files.compare_with_folder(options, "webdataset")),
    at_least("stage-one-float32", 0.95, "images per second: stage one / bare inference",
             lambda options: teacher.compare_with_bare_inference(options, "float32")),
    at_least("stage-one-bfloat16", 0.95, "images per second: stage one / bare inference",
             lambda options: teacher.compare_with_bare_inference(options, "bfloat16")),
    at_least("stage-one-two-sizes", 0.95, "images per second: 64 px views, 224 px teacher / bare inference, JPEGs",
             teacher.compare_teacher_size_with_bare_inference),
    at_least("naive-stage-one-bfloat16", 5.0, "naive loop in float32 / stage one in bfloat16",
             lambda options: teacher.compare_with_naive_loop(options, "bfloat16"),
             "compiled it would be 1.2 times as fast, after 5 s of compiling"),
    at_least("naive-stage-one-float32", 1.25, "naive loop in float32 / stage one in float32",
             lambda options: teacher.compare_with_naive_loop(options, "float32")),
    at_most("plan-time", 1.15, "seconds of stage one as plan predicts them / as measured, or the inverse",
            teacher.compare_with_plan),
    at_least("stage-one-over-onnxruntime", 0.95, "images a second: stage one / ONNX Runtime's bare inference, float32",
             lambda options: engines.compare_with_engine(options, "onnxruntime")),
    at_least("stage-one-over-openvino", 0.95, "images a second: stage one / OpenVINO's bare inference, float32",
             lambda options: engines.compare_with_engine(options, "openvino")),
    at_most("compile-again", 2.0, "seconds until a second process has a compiled ResNet-56 and its first batch",
            engines.measure_compiling_again),
    at_least("reads-warm", 0.45, "per second: rows of 2 kB in shuffled blocks / raw reads",
             lambda options: read_speed.compare_with_raw_reads(options, drop_page_cache=False)),
    at_least("reads-cold", 0.5, "per second: rows of 2 kB in shuffled blocks / raw reads, without the page cache",
             lambda options: read_speed.compare_with_raw_reads(options, drop_page_cache=True)),
    at_least("reads-files", 30.0, "reading: torch.load of a file per row / the cache",
             lambda options: read_speed.compare_with_container(options, "files")),
    at_least("reads-hdf5", 10.0, "reading: HDF5 row by row in a DataLoader / the cache",
             lambda options: read_speed.compare_with_container(options, "hdf5")),
    at_least("reads-lmdb", 1.5, "reading: LMDB / the cache",
             lambda options: read_speed.compare_with_container(options, "lmdb")),
    at_least("reads-webdataset", 8.0, "reading: webdataset / the cache",
             lambda options: read_speed.compare_with_container(options, "webdataset")),
    at_most("bytes-10", 36.0, "bytes per view, every file, 10 classes",
            lambda options: footprint.measure_bytes_per_view(options, classes=10)),
    at_most("bytes-100", 212.0, "bytes per view, every file, 100 classes",
            lambda options: footprint.measure_bytes_per_view(options, classes=100), "the rows alone are 212"),
    at_most("bytes-1000-sqrt8", 1020.0, "bytes per view, every file, 1,000 classes in sqrt8",
            lambda options: footprint.measure_bytes_per_view(options, classes=1000, codec="sqrt8")),
    at_most("bytes-1000-top20", 97.0, "bytes per view, every file, 1,000 classes in top:20",
            lambda options: footprint.measure_bytes_per_view(options, classes=1000, codec="top:20")),
    at_most("bytes-21841-top100", 433.0, "bytes per view, every file, 21,841 classes in top:100",
            lambda options: footprint.measure_bytes_per_view(options, classes=21_841, codec="top:100", rows=30_000)),
    at_most("overhead", 2.0, "bytes that are no rows, in per cent of the rows", footprint.measure_overhead),
    at_most("index-memory", 10.0, "MiB of an open cache of 1.28 million rows", footprint.measure_index_memory),
    at_most("open-1.28m", 2.0, "seconds to open a cache of 1.28 million rows x 90 draws",
            lambda options: opening.measure_opening(options, 1_281_167, "open")),
    at_most("open-14m", 10.0, "seconds to open a cache of 14 million rows x 90 draws",
            lambda options: opening.measure_opening(options, 14_000_000, "open")),
    at_most("open-14m-first", 5.0, "seconds from there to its first batch",
            lambda options: opening.measure_opening(options, 14_000_000, "first")),
    at_most("open-14m-memory", 200.0, "MiB above the imports until it is open",
            lambda options: opening.measure_opening(options, 14_000_000, "memory")),
    at_most("one-stream-files", 0.6, "4 students of one loader / 4 runs, 224 px JPEGs to 64 px",
            lambda options: several_students.compare_one_loader(
                options, from_files=True, archs=several_students.LIGHT),
            "the rest are the steps of resnet8 at 64 px"),
    at_most("one-stream-files-cnn", 1.02, "the same with cnn in place of mlp:512",
            lambda options: several_students.compare_one_loader(options, from_files=True)),
    at_most("one-stream-memory", 1.02, "4 students of one loader / 4 runs, images in memory",
            lambda options: several_students.compare_one_loader(options, from_files=False)),
    at_most("vectorised-32", 0.15, "32 of mlp:32 on digits as one model / 32 runs",
            lambda options: several_students.compare_vectorized(options, "mlp:32", students=32, on_digits=True)),
    at_most("vectorised-8", 0.6, "8 of mlp:800,800 as one model / 8 runs",
            lambda options: several_students.compare_vectorized(options, "mlp:800,800", students=8, on_digits=False),
            "products of this size keep the processor busy by themselves"),
    at_most("memory", 1024.0, "MiB above model and images over 10 GB on disk (2 GB where all rows are measured)",
            lambda options: footprint.measure_peak_memory(options, gigabytes=10 if options.is_selection else 2)),
    at_least("two-ranks", None, "stage one in one process / in two ranks; the same payloads",
             teacher.compare_two_ranks),
)
# fmt: on
