"""The rows of the bench: what is measured, and what it is to reach."""

from collections.abc import Callable
from dataclasses import dataclass

from . import baselines, footprint, reads, several_students, student, targets, teacher
from .interleaved import Found, Given


@dataclass(frozen=True)
class Row:
    """name; goal, to be reached from below (at_least) or not to be passed, None: reported alone; measure; words: what
    the number is; missed: why it is known to be missed, where it is."""

    name: str
    goal: float | None
    at_least: bool
    measure: Callable[[Given], Found]
    words: str
    missed: str = ""

    def reached(self, median: float) -> bool | None:
        if self.goal is None:
            return None
        return median >= self.goal if self.at_least else median <= self.goal


def most(name: str, goal: float | None, measure: Callable[[Given], Found], words: str, missed: str = "") -> Row:
    return Row(name, goal, False, measure, words, missed)


def least(name: str, goal: float | None, measure: Callable[[Given], Found], words: str, missed: str = "") -> Row:
    return Row(name, goal, True, measure, words, missed)


# fmt: off
ROWS: tuple[Row, ...] = (
    most("cached-resnet8", 1.02, lambda g: student.cached_over_hard(g, "resnet8"), "epoch from the cache / hard"),
    most("cached-cnn", 1.02, lambda g: student.cached_over_hard(g, "cnn"), "epoch from the cache / hard"),
    most("read-8kB-resnet8", 1.10, lambda g: student.cached_over_hard(g, "resnet8", "read"), "with 8 kB a row read / hard"),
    most("hint-8kB-resnet8", 1.10, lambda g: student.cached_over_hard(g, "resnet8", "hint"), "with 8 kB a row as a hint / hard"),
    most("read-8kB-cnn", 1.10, lambda g: student.cached_over_hard(g, "cnn", "read"), "with 8 kB a row read / hard"),
    least("live-of-the-sum", 0.95, lambda g: student.live_over_cached(g, "float32", True), "live / cached, of (teacher + student) / student"),
    most("hard-over-bare-resnet8", 1.04, lambda g: student.hard_over_bare(g, "resnet8"), "hard targets / bare loop over views in memory"),
    most("hard-over-bare-cnn", 1.04, lambda g: student.hard_over_bare(g, "cnn"), "hard targets / bare loop over views in memory"),
    least("usual-bfloat16", 6.2, lambda g: baselines.usual_over_ours(g, "bfloat16"), "ImageFolder, live ResNet-56, float32 / ours in bfloat16"),
    least("usual-compiled", 8.0, lambda g: baselines.usual_over_ours(g, "compiled"), "the same / ours, compiled"),
    least("usual-float32", 4.2, lambda g: baselines.usual_over_ours(g, "float32"), "the same / ours in float32"),
    least("torchdistill", 5.7, lambda g: baselines.torchdistill_over_ours(g, "bfloat16"), "torchdistill, data in memory / ours in bfloat16", "a step of resnet8 itself is all but all of ours, see hard-over-bare-resnet8"),
    least("torchdistill-compiled", 7.0, lambda g: baselines.torchdistill_over_ours(g, "compiled"), "the same / ours, compiled", "a step of resnet8 itself is all but all of ours, see hard-over-bare-resnet8"),
    least("live-bfloat16", 2.1, lambda g: student.live_over_cached(g, "bfloat16"), "our loop with the live teacher / cached"),
    least("live-float32", 2.8, lambda g: student.live_over_cached(g, "float32"), "our loop with the live teacher / cached"),
    most("cached-mlp64", 1.08, lambda g: student.cached_over_hard(g, "mlp:64", steps=469), "60,000 x 28 x 28: epoch from the cache / hard"),
    most("hard-over-bare-mlp64", 1.4, lambda g: student.hard_over_bare(g, "mlp:64", steps=469), "60,000 x 28 x 28: hard targets / bare loop"),
    least("usual-hard", 2.3, lambda g: baselines.hard_over_ours(g, "bfloat16"), "PIL, transforms, hard targets, float32 / our cached epoch in bfloat16", "a step of resnet8 itself is all but all of ours, see hard-over-bare-resnet8"),
    least("usual-hard-compiled", 2.3, lambda g: baselines.hard_over_ours(g, "compiled"), "the same / ours, compiled"),
    least("to-target-mnist-1", None, lambda g: targets.mnist(g, 1), "seconds to the live student's accuracy: live / cached with stage one"),
    least("to-target-mnist-5", 3.0, lambda g: targets.mnist(g, 5), "the same, stage one shared by 5 students", "mlp:1200,1200 is a cheap teacher beside cnn"),
    least("to-target-cifar-1", None, lambda g: targets.cifar(g, 1), "seconds to the live student's accuracy: live / cached with stage one"),
    least("to-target-cifar-5", 3.0, lambda g: targets.cifar(g, 5), "the same, stage one shared by 5 students"),
    least("draws-of-a-decode", 1.15, student.many_views_of_a_decode, "224 px JPEGs: one view a decode, hard / 4 draws a decode, cached"),
    least("stage-one-float32", 0.95, lambda g: teacher.over_bare_inference(g, "float32"), "stage one / bare inference, images per second"),
    least("stage-one-bfloat16", 0.95, lambda g: teacher.over_bare_inference(g, "bfloat16"), "stage one / bare inference, images per second"),
    least("naive-stage-one-bfloat16", 5.0, lambda g: teacher.naive_over_ours(g, "bfloat16"), "naive float32 stage one / ours in bfloat16, seconds", "compiled it would be 1.2 times as fast, after 5 s of compiling"),
    least("naive-stage-one-float32", 1.25, lambda g: teacher.naive_over_ours(g, "float32"), "naive float32 stage one / ours in float32, seconds"),
    least("reads-warm", 0.45, lambda g: reads.against_raw(g, False), "rows of 2 kB in shuffled blocks / raw reads, per second"),
    least("reads-cold", 0.5, lambda g: reads.against_raw(g, True), "the same, out of the page cache"),
    least("reads-files", 30.0, lambda g: reads.others(g, "files"), "reads: torch.load of a file per row / ours"),
    least("reads-hdf5", 10.0, lambda g: reads.others(g, "hdf5"), "reads: HDF5 row by row in a DataLoader / ours"),
    least("reads-lmdb", 1.5, lambda g: reads.others(g, "lmdb"), "reads: LMDB / ours"),
    least("reads-webdataset", 8.0, lambda g: reads.others(g, "webdataset"), "reads: webdataset / ours"),
    most("bytes-10", 36.0, lambda g: footprint.bytes_per_view(g, 10), "bytes a view, every file, 10 classes"),
    most("bytes-100", 212.0, lambda g: footprint.bytes_per_view(g, 100), "bytes a view, every file, 100 classes", "the rows alone are 212"),
    most("bytes-1000-sqrt8", 1020.0, lambda g: footprint.bytes_per_view(g, 1000, "sqrt8"), "bytes a view, every file, 1,000 classes in sqrt8"),
    most("overhead", 2.0, footprint.overhead, "per cent of container over rows"),
    most("index-memory", 10.0, footprint.index_memory, "MiB of an open cache of 1.28 million rows"),
    most("one-stream-files", 0.6, lambda g: several_students.one_stream(g, True, several_students.LIGHT), "4 students of one stream / 4 runs, 224 px JPEGs to 64 px", "steps of resnet8 at 64 px are the rest"),
    most("one-stream-files-cnn", 1.02, lambda g: several_students.one_stream(g, True), "the same with cnn in place of mlp:512"),
    most("one-stream-memory", 1.02, lambda g: several_students.one_stream(g, False), "4 students of one stream / 4 runs, in memory"
    ),
    most("vectorised-32", 0.15, lambda g: several_students.vectorised(g, "mlp:32", 32, True), "32 of mlp:32 on digits as one network / 32 runs"),
    most("vectorised-8", 0.6, lambda g: several_students.vectorised(g, "mlp:800,800", 8, False), "8 of mlp:800,800 as one network / 8 runs", "products of this size fill the processor by themselves"),
    most("memory", 1024.0, lambda g: footprint.memory(g, 10 if g.named else 2), "MiB above model and images over 10 GB on disk (2 GB where all rows are run)"),
    least("two-ranks", None, teacher.two_ranks, "stage one in one process / in two ranks, seconds; the same payloads"),
)
# fmt: on
