"""What a person sees of a training: a line that is drawn again and again on a terminal, a line an epoch elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from softcache.stages.cli.console import Console, LongWorkNotice, format_clock, format_duration
from softcache.stages.distributed.ranks import is_first

from .step import TrainingRun

_DELAY, _EVERY = 1.0, 0.2  # seconds before the first drawing, and between two: only they ask a GPU for the loss
Line = dict[str, Any]


@contextmanager
def show_progress(
    jobs: Sequence[TrainingRun], first: int, sums: Callable[[int], torch.Tensor], what: str, console: Console
) -> Iterator["TrainingProgress"]:
    """A training, or several from one stream, from its first epoch that is left; what: it is called in a sentence.

    sums(i): the terms of student i, summed over the steps of the epoch so far.
    """
    seen = TrainingProgress(
        jobs,
        first,
        sums,
        LongWorkNotice(console, f"Training {what}", jobs[0].epochs * jobs[0].steps, jobs[0].interrupt_advice),
    )
    try:
        yield seen
    finally:
        seen.close()


class TrainingProgress:
    """Where a training is. Of several students the figures are those of the best on validation, by accuracy, in the
    last epoch; of the first before there are any. Of several ranks the first alone shows something."""

    def __init__(
        self, jobs: Sequence[TrainingRun], first: int, sums: Callable[[int], torch.Tensor], long_work: LongWorkNotice
    ):
        self.jobs, self.sums, self.long_work, self.console = jobs, sums, long_work, long_work.console
        self.epochs, self.steps = jobs[0].epochs, jobs[0].steps
        self.done, self.taken, self.kept = first * self.steps, 0, first  # steps; those of this epoch; epochs
        self.shown, self.line = 0, Line()  # whose figures, and those of the last epoch
        # The pace is that since the end of the first step, which also compiles, allocates and warms up.
        self.begun, self.since, self.images = 0.0, 0, 0
        self.terminal = is_first() and sys.stderr.isatty()
        self.bar: tqdm[Any] | None = None
        self.next_drawing = time.monotonic() + _DELAY

    def step(self, images: int) -> None:
        """A step of all has been taken, on so many images."""
        now = time.monotonic()
        self.done, self.taken = self.done + 1, self.taken + 1
        if not self.since:
            self.begun, self.since = now, self.done
        else:
            self.images += images
        if self.terminal and now > self.next_drawing:
            self._draw()
            self.next_drawing = time.monotonic() + _EVERY
        self.long_work.update(self.done)

    def epoch(self, lines: Sequence[Line | None]) -> None:
        """An epoch is kept. lines: of each student, None of one that is over or already further."""
        self.taken, self.kept = 0, self.kept + 1
        there = {i: line for i, line in enumerate(lines) if line is not None}
        if not there:
            return
        self.shown = max(there, key=lambda i: (there[i].get("val_accuracy", -1.0), -i))
        self.line = there[self.shown]
        if not self.terminal and self.console.epoch_lines:
            self.console.note(self._sentence())

    def close(self) -> None:
        """Take the line from the terminal."""
        if self.bar is not None:
            self.bar.close()

    def _draw(self) -> None:
        if self.bar is None:
            self.bar = tqdm(bar_format="{desc}", dynamic_ncols=True, leave=False)
        self.bar.set_description_str(self.drawn(self.bar.format_dict["ncols"] or 80))

    def drawn(self, columns: int) -> str:
        """`student, seed 0: 43 % 12/30 epochs, loss 0.213, val accuracy 0.981, F1 0.980, 41,200 images/s, 0:12
        left`, in shorter words, or with less, where that would not fit."""
        sums, (pace, left) = self.sums(self.shown), self._pace()
        at, accuracy = f"{self.kept}/{self.epochs}", self.line.get("val_accuracy")
        # Of one that is further than the others, as a stop can leave it, there are no sums yet.
        loss = _format_part("loss {:.3g}", float(sums.sum()) / self.taken if len(sums) else None)
        f1 = _format_part("F1 {:.3f}", self.line.get("val_f1_macro"))
        rest = f"{format_clock(left)} left" if left is not None else ""
        long = [
            f"{at} epochs",
            loss,
            _format_part("val accuracy {:.3f}", accuracy),
            f1,
            _format_part("{:,.0f} images/s", pace),
            rest,
        ]
        quick = f"{pace / 1000:.0f}k/s" if pace and pace >= 10_000 else _format_part("{:.0f}/s", pace)
        short = [at, loss, _format_part("acc {:.3f}", accuracy), f1, quick, rest]
        head = f"{self._who()}: {100 * self.done // (self.epochs * self.steps)} % "
        wordings = [head + ", ".join(filter(None, p)) for p in (long, short, [*short[:4], rest], [*short[:3], rest])]
        return next((text for text in wordings if len(text) < columns), wordings[-1][: columns - 1])

    def _sentence(self) -> str:
        """`student, seed 0, epoch 12/30: loss 0.2131 (kd 0.18, hard 0.03), val accuracy 0.9812, F1 0.9805,
        41,200 images/s, 12 s left`, on one line."""
        line, (pace, left) = self.line, self._pace()
        terms = {name[5:]: value for name, value in line.items() if name.startswith("loss_")}
        each = f" ({', '.join(f'{name} {value:.3g}' for name, value in terms.items())})" if len(terms) > 1 else ""
        parts = [
            f"loss {line['loss']:.4g}{each}",
            _format_part("val accuracy {:.4f}", line.get("val_accuracy")),
            _format_part("F1 {:.4f}", line.get("val_f1_macro")),
            _format_part("{:,.0f} images/s", pace),
            f"{format_duration(left)} left" if left else "",
        ]
        return f"{self._who()}, epoch {line['epoch']}/{self.epochs}: {', '.join(filter(None, parts))}"

    def _who(self) -> str:
        job = self.jobs[self.shown]
        if len(self.jobs) == 1:
            return f"{job.name}, seed {job.config.seed}"
        several = job.name if job.name == "distilled" else f"{job.name}s"
        folder = job.folder if job.name == "student" else job.folder.parent
        return f"{len(self.jobs)} {several}, {'best' if 'val_accuracy' in self.line else 'first'} {folder.name}"

    def _pace(self) -> tuple[float | None, float | None]:
        """Images a second, and the seconds that are left; None while only one step has been taken."""
        seconds, steps = time.monotonic() - self.begun, self.done - self.since
        if not self.since or not steps or not seconds:
            return None, None
        return self.images / seconds, (self.epochs * self.steps - self.done) * seconds / steps


def _format_part(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)
