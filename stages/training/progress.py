"""The progress of a training: one line that is redrawn on a terminal, lines for some of the epochs elsewhere."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from softcache.pipeline.metrics.tasks import LOWER_IS_BETTER, TASK_FIGURES
from softcache.stages.cli.console import (
    CallbackBar,
    Console,
    LongWorkNotice,
    format_clock,
    format_duration,
    is_shown,
)
from softcache.stages.distributed.ranks import is_first
from softcache.stages.runs.figures import TITLES

from .run import TrainingRun

# Seconds before the line is first drawn, and between two drawings. Only drawings synchronise with a GPU, for the loss.
_DELAY, _INTERVAL = 1.0, 0.2
# Where standard error is no terminal: most lines of a training without --log-every, and seconds between two of them.
_MAX_LINES, _LINE_INTERVAL = 40, 10.0
_MAIN_FIGURES = [figures.main for figures in TASK_FIGURES.values()]
Line = dict[str, Any]


@contextmanager
def show_progress(
    runs: Sequence[TrainingRun], first: int, sums: Callable[[int], torch.Tensor], title: str, console: Console
) -> Iterator["TrainingProgress"]:
    """Show the progress of a training, or of several from one stream.

    Args:
        runs: the trainings.
        first: the epoch, from 0, with which they start.
        sums: i -> the terms of training i, summed over the steps of the epoch so far.
        title: the trainings, such as `the student`.
        console: where lines are printed.
    """
    total = runs[0].epochs * runs[0].steps
    notice = LongWorkNotice(console, f"Training {title}", total, runs[0].interrupt_advice)
    progress = TrainingProgress(runs, first, sums, notice)
    try:
        yield progress
    finally:
        progress.close()


class TrainingProgress:
    """The progress of one training, or of several from one stream.

    Of several trainings the line has the metrics of the one with the best validation accuracy, or main figure of
    another task, in the last epoch; in the first epoch, those of the first training. Only rank 0 prints.

    Args:
        runs: the trainings.
        first: the epoch, from 0, with which they start.
        sums: i -> the terms of training i, summed over the steps of the epoch so far.
        long_work: the notice of a long training.
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
        self.best, self.line = 0, Line()  # the training whose metrics are printed, and its last epoch
        # The pace is measured from the end of the first step, which also compiles, allocates and warms up.
        self.pace_start, self.pace_first_step, self.images = 0.0, 0, 0
        self.is_terminal = is_first() and is_shown() and sys.stderr.isatty()
        self.epochs_bar = None if is_shown() else CallbackBar(self.epochs, f"training the {runs[0].name}", first)
        self.bar: tqdm[Any] | None = None
        self.next_drawing = time.monotonic() + _DELAY
        self.next_notice = 0.0
        self.next_line = time.monotonic() + _LINE_INTERVAL

    def step(self, images: int) -> None:
        """Count a step of all trainings on a batch of `images` images."""
        self.steps_done, self.steps_of_epoch = self.steps_done + 1, self.steps_of_epoch + 1
        now = time.monotonic()
        if not self.pace_first_step:
            self.pace_start, self.pace_first_step = now, self.steps_done
            self.long_work.update(self.steps_done)
        else:
            self.images += images
        if self.is_terminal and now > self.next_drawing:
            self._draw()
            self.next_drawing = time.monotonic() + _INTERVAL
        if now > self.next_notice:
            self.next_notice = now + _INTERVAL
            self.long_work.update(self.steps_done)

    def epoch(self, lines: Sequence[Line | None]) -> None:
        """Count an epoch.

        Args:
            lines: the record of each training; None for one that has ended, or resumes at a later epoch.
        """
        self.steps_of_epoch, self.epochs_done = 0, self.epochs_done + 1
        if self.epochs_bar is not None:
            self.epochs_bar.update()
        current = {i: line for i, line in enumerate(lines) if line is not None}
        if not current:
            return
        self.best = max(current, key=lambda i: (_rate(current[i]), -i))
        self.line = current[self.best]
        if not self.is_terminal and self.console.epoch_lines and self._is_line_due(self.line["epoch"]):
            self.console.note(self._format_epoch())
            self.next_line = time.monotonic() + _LINE_INTERVAL

    def _is_line_due(self, epoch: int) -> bool:
        """Return whether a log gets a line of an epoch, from 1: --log-every decides, the last one always does."""
        if epoch == self.epochs:
            return True
        if every := self.runs[0].config.log_every:
            return epoch % every == 0
        return epoch % -(-self.epochs // _MAX_LINES) == 0 and time.monotonic() >= self.next_line

    def close(self) -> None:
        """Remove the line from the terminal."""
        if self.bar is not None:
            self.bar.close()

    def _draw(self) -> None:
        if self.bar is None:
            self.bar = tqdm(bar_format="{desc}", dynamic_ncols=True, leave=False)
        self.bar.set_description_str(self.format_line(self.bar.format_dict["ncols"] or 80))

    def format_line(self, columns: int) -> str:
        """Format the line of a terminal, shortened to fit into its columns.

        `student, seed 0: 43 % 12/30 epochs, loss 0.213, val accuracy 0.981, F1 0.980, 41,200 images/s, 0:12 left`

        Args:
            columns: width of the terminal in characters.
        """
        sums, (pace, left) = self.sums(self.best), self._pace()
        epochs = f"{self.epochs_done}/{self.epochs}"
        # A training that resumes at a later epoch than the others has no sums yet.
        has_sums = len(sums) and self.steps_of_epoch
        loss = _format_part("loss {:.3g}", float(sums.sum()) / self.steps_of_epoch if has_sums else None)
        f1 = _format_part("F1 {:.3f}", self.line.get("val_f1_macro"))
        time_left = f"{format_clock(left)} left" if left is not None else ""
        long = [
            f"{epochs} epochs",
            loss,
            _format_main(self.line, "val {name} {value:.3f}", "val {name} {value:.4g}"),
            f1,
            _format_part("{:,.0f} images/s", pace),
            time_left,
        ]
        short_pace = f"{pace / 1000:.0f}k/s" if pace and pace >= 10_000 else _format_part("{:.0f}/s", pace)
        short = [
            epochs,
            loss,
            _format_main(self.line, "{short} {value:.3f}", "{short} {value:.3g}"),
            f1,
            short_pace,
            time_left,
        ]
        head = f"{self._name()}: {100 * self.steps_done // (self.epochs * self.steps)} % "
        variants = (long, short, [*short[:4], time_left], [*short[:3], time_left])
        texts = [head + ", ".join(filter(None, parts)) for parts in variants]
        return next((text for text in texts if len(text) < columns), texts[-1][: columns - 1])

    def _format_epoch(self) -> str:
        """Format the line of an epoch.

        `student, seed 0, epoch 12/30: loss 0.2131 (kd 0.18, hard 0.03), val accuracy 0.9812, F1 0.9805,
        41,200 images/s, 12 s left`, on one line.
        """
        line, (pace, left) = self.line, self._pace()
        terms = {name[5:]: value for name, value in line.items() if name.startswith("loss_")}
        term_texts = ", ".join(f"{name} {value:.3g}" for name, value in terms.items())
        parts = [
            f"loss {line['loss']:.4g}" + (f" ({term_texts})" if len(terms) > 1 else ""),
            _format_main(line, "val {name} {value:.4f}", "val {name} {value:.4g}"),
            _format_part("F1 {:.4f}", line.get("val_f1_macro")),
            _format_part("{:,.0f} images/s", pace),
            f"{format_duration(left)} left" if left else "",
        ]
        return f"{self._name()}, epoch {line['epoch']}/{self.epochs}: {', '.join(filter(None, parts))}"

    def _name(self) -> str:
        """Name the training, or the number of trainings and the best of them."""
        run = self.runs[self.best]
        if len(self.runs) == 1:
            return f"{run.name}, seed {run.config.seed}"
        plural = run.name if run.name == "distilled" else f"{run.name}s"
        folder = run.folder if run.name == "student" else run.folder.parent
        return f"{len(self.runs)} {plural}, {'best' if _find_main(self.line) else 'first'} {folder.name}"

    def _pace(self) -> tuple[float | None, float | None]:
        """Return images per second and the remaining seconds; None before the second step."""
        seconds, steps = time.monotonic() - self.pace_start, self.steps_done - self.pace_first_step
        if not self.pace_first_step or not steps or not seconds:
            return None, None
        return self.images / seconds, (self.epochs * self.steps - self.steps_done) * seconds / steps


def _format_part(template: str, value: float | None) -> str:
    return "" if value is None else template.format(value)


def _find_main(line: Line) -> str:
    """Return the main figure that the record of an epoch has of its task; "" where there is none."""
    return next((name for name in _MAIN_FIGURES if f"val_{name}" in line), "")


def _rate(line: Line) -> float:
    """Return a number by which the records of several trainings are compared, larger for better ones."""
    main = _find_main(line)
    if not main:
        return -math.inf
    value: float = line[f"val_{main}"]
    return -value if main in LOWER_IS_BETTER else value


def _format_main(line: Line, share: str, number: str) -> str:
    """Format the main figure of an epoch. share, number: templates for shares and for figures in units of the data."""
    main = _find_main(line)
    if not main:
        return ""
    template = number if main in LOWER_IS_BETTER else share
    short = "acc" if main == "accuracy" else TITLES[main]
    return template.format(name=TITLES[main], short=short, value=line[f"val_{main}"])
