"""Several students at once, against the same ones one after another."""

import time
from collections.abc import Sequence

from stages.material import Material
from stages.settings import StudentSettings
from stages.training import _begin_epoch, _step_of_each

from . import material
from .rounds import Found, Given, Missing, interleaved, over, parts
from .student import Ours, job

FOUR = ("resnet8", "cnn", "mlp:64", "mlp:128")


class Together:
    """Several trainings on one stream, as fit_together takes their steps; seconds of a picture."""

    def __init__(self, alone: Sequence[Ours]):
        self.first, self.courses = alone[0], [one.course for one in alone]

    def __call__(self) -> float:
        first, pictures, begun = self.first, 0, time.perf_counter()
        for course in self.courses:
            _begin_epoch(course, 0)
        for batch in first.job.stream.batches(first.at, first.at + first.count):
            _step_of_each(self.courses, batch.to(first.job.device))
            pictures += len(batch.views)
        for course in self.courses:
            course.sums.tolist()
        first.at += first.count
        return (time.perf_counter() - begun) / pictures


def _trainings(given: Given, settings: StudentSettings, opened: Material, archs: Sequence[str], steps: int) -> list[Ours]:
    from dataclasses import replace

    return [Ours(job(given, replace(settings, arch=arch), opened, False, f"s{i}"), steps) for i, arch in enumerate(archs)]


def one_stream(given: Given, from_files: bool) -> Found:
    """Four students from one stream, as a share of the time of four runs. from_files: 224 px JPEGs, views of 64 px."""
    if from_files:
        data = material.jpegs(given.folder / "jpegs-224", given.few(384, 40), 224)
        cache = material.fake_cache(given.folder / "jpegs-224-cache", data, "resized-crop-flip:size=64", draws=4)
        archs, steps, batch = ("cnn", *FOUR[1:]), given.few(8, 1), 32
    else:
        data = material.in_memory(given.few(6400, 300))
        cache = material.fake_cache(given.folder / "cifar", data, draws=2)
        archs, steps, batch = FOUR, given.few(20, 2), 128
    settings, opened = material.opened(cache, data, archs[0], batch_size=batch, precision="bfloat16")
    alone = _trainings(given, settings, opened, archs, steps)
    together = Together(_trainings(given, settings, opened, archs, steps))
    found = interleaved({"one stream": together, "four runs": lambda: sum(one() for one in alone)}, given.few(5, 1))
    return Found(over(found["one stream"], found["four runs"]), f"{', '.join(archs)}: {parts(found)}")


def vectorised(given: Given, arch: str, students: int) -> Found:
    """Students of one arch as one batched network, as a share of the time of as many runs."""
    if "vectorize" not in StudentSettings.__dataclass_fields__:
        raise Missing("not there yet: students of one arch as one network, --vectorize")
    raise Missing(f"not measured yet: {students} of {arch}")
