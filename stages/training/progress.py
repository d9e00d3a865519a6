"""What a person sees of a training: one line, drawn again and again, on a terminal; a line an epoch elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from softcache.stages.cli.console import Console, LongWorkNotice, format_clock, format_duration
from softcache.stages.distributed.ranks import is_first

from .run import TrainingRun

_DELAY, _EVERY = 1.0, 0.2  # seconds before the first drawing, and between two: only they ask a GPU for the loss
Line = dict[str, Any]


@contextmanager
def show_progress(
    runs: Sequence[TrainingRun], first: int, sums: Callable[[int], torch.Tensor], what: str, console: Console
) -> Iterator["TrainingProgress"]:
    """Show the progress of a training, or of several from one stream.

    Args:
        runs: the trainings.
        first: the epoch that they begin with.
        sums: i -> the terms of training i, summed over the steps of the epoch so far.
        what: the training in a sentence: `the student`.
        console: where lines go.
    """
    total = runs[0].epochs * runs[0].steps
    notice = LongWorkNotice(console, f"Training {what}", total, runs[0].interrupt_advice)
    progress = TrainingProgress(runs, first, sums, notice)
    try:
        yield progress
    finally:
        progress.close()


class TrainingProgress:
    """How far a training is.

    Of several trainings the figures are those of the best on validation, by accuracy, in the last epoch; of the first
    before there are any. Of several ranks the first alone shows something.
    """

    def __init__(
        self,
        runs: Sequence[TrainingRun],
        first: int,
        sums: Callable[[int], torch.Tensor],
        long_work: LongWorkNotice,
    ):
        self.runs, self.sums, self.long_work, self.console = runs, sums, long_work, long_work.console
        self.epochs, self.steps = runs[0].epochs, runs[0].steps
        self.steps_done, self.steps_of_epoch, self.epochs_done = first * self.steps, 0, first
        self.best, self.line = 0, Line()  # whose figures are shown, and those of its last epoch
        # The pace is that since the end of the first step, which also compiles, allocates and warms up.
        self.pace_start, self.pace_first_step, self.images = 0.0, 0, 0
        self.is_terminal = is_first() and sys.stderr.isatty()
        self.bar: tqdm[Any] | None = None
        self.next_drawing = time.monotonic() + _DELAY
        self.next_look = 0.0

    def step(self, images: int) -> None:
        """Count a step of all trainings, on so many images."""
        self.steps_done, self.steps_of_epoch = self.steps_done + 1, self.steps_of_epoch + 1
        now = time.monotonic()
        if not self.pace_first_step:
            self.pace_start, self.pace_first_step = now, self.steps_done
            self.long_work.update(self.steps_done)
        else:
            self.images += images
        if self.is_terminal and now > self.next_drawing:
            self._draw()
            self.next_drawing = time.monotonic() + _EVERY
        if now > self.next_look:
            self.next_look = now + _EVERY
            self.long_work.update(self.steps_done)

    def epoch(self, lines: Sequence[Line | None]) -> None:
        """Count an epoch. lines: of each training, None of one that is over or already further."""
        self.steps_of_epoch, self.epochs_done = 0, self.epochs_done + 1
        current = {i: line for i, line in enumerate(lines) if line is not None}
        if not current:
            return
        self.best = max(current, key=lambda i: (current[i].get("val_accuracy", -1.0), -i))
        self.line = current[self.best]
        if not self.is_terminal and self.console.epoch_lines:
            self.console.note(self._format_epoch())

    def close(self) -> None:
        """Take the line from the terminal."""
        if self.bar is not None:
            self.bar.close()

    def _draw(self) -> None:
        if self.bar is None:
            self.bar = tqdm(bar_format="{desc}", dynamic_ncols=True, leave=False)
        self.bar.set_description_str(self.format_line(self.bar.format_dict["ncols"] or 80))

    def format_line(self, columns: int) -> str:
        """Format the line of a terminal, shorter or with less where all would not fit into so many columns.

        `student, seed 0: 43 % 12/30 epochs, loss 0.213, val accuracy 0.981, F1 0.980, 41,200 images/s, 0:12 left`
        """
        sums, (pace, left) = self.sums(self.best), self._pace()
        epochs, accuracy = f"{self.epochs_done}/{self.epochs}", self.line.get("val_accuracy")
        # Of one that is further than the others, as a stop can leave it, there are no sums yet.
        has_sums = len(sums) and self.steps_of_epoch
        loss = _format_part("loss {:.3g}", float(sums.sum()) / self.steps_of_epoch if has_sums else None)
        f1 = _format_part("F1 {:.3f}", self.line.get("val_f1_macro"))
        rest = f"{format_clock(left)} left" if left is not None else ""
        long = [
            f"{epochs} epochs",
            loss,
            _format_part("val accuracy {:.3f}", accuracy),
            f1,
            _format_part("{:,.0f} images/s", pace),
            rest,
        ]
        short_pace = f"{pace / 1000:.0f}k/s" if pace and pace >= 10_000 else _format_part("{:.0f}/s", pace)
        short = [epochs, loss, _format_part("acc {:.3f}", accuracy), f1, short_pace, rest]
        head = f"{self._name()}: {100 * self.steps_done // (self.epochs * self.steps)} % "
        choices = [head + ", ".join(filter(None, p)) for p in (long, short, [*short[:4], rest], [*short[:3], rest])]
        return next((text for text in choices if len(text) < columns), choices[-1][: columns - 1])

    def _format_epoch(self) -> str:
        """Format the line of an epoch.

        `student, seed 0, epoch 12/30: loss 0.2131 (kd 0.18, hard 0.03), val accuracy 0.9812, F1 0.9805,
        41,200 images/s, 12 s left`, on one line.
        """
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
        return f"{self._name()}, epoch {line['epoch']}/{self.epochs}: {', '.join(filter(None, parts))}"

    def _name(self) -> str:
        run = self.runs[self.best]
        if len(self.runs) == 1:
            return f"{run.name}, seed {run.config.seed}"
        several = run.name if run.name == "distilled" else f"{run.name}s"
        folder = run.folder if run.name == "student" else run.folder.parent
        return f"{len(self.runs)} {several}, {'best' if 'val_accuracy' in self.line else 'first'} {folder.name}"

    def _pace(self) -> tuple[float | None, float | None]:
        """Return images a second and the seconds that are left; None while only one step has been taken."""
        seconds, steps = time.monotonic() - self.pace_start, self.steps_done - self.pace_first_step
        if not self.pace_first_step or not steps or not seconds:
            return None, None
        return self.images / seconds, (self.epochs * self.steps - self.steps_done) * seconds / steps


def _format_part(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)
