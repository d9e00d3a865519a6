"""The progress of a training: one line that is redrawn on a terminal, a line for each epoch elsewhere."""

import itertools
import json
import os
import pty
import re
import shutil
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fcntl import ioctl
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tqdm import tqdm

from softcache.stages.cli.console import Console, LongWorkNotice, format_clock
from softcache.stages.training import progress as progress_module
from tests.helpers.commands import Stages

COMMON = ("--log-every", 1, "--epochs", 3, "--batch-size", 60, "--learning-rate", 0.05)
KD = ("--loss", "kd:weight=0.9", "--loss", "hard:weight=0.1")
NUMBER = r"[\d.,e+-]+"


def test_an_epoch_has_the_time_in_which_its_steps_run_on_a_device(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is given steps faster than it runs them: what is left at the end of an epoch is waited for, and counts."""
    devices = []

    def take_long(device: torch.device) -> None:
        devices.append(device)
        time.sleep(0.3)

    monkeypatch.setattr("softcache.stages.training.loop.wait_for_device", take_long)
    stages("student", "--cache", tiny / "cache", "--arch", "mlp:8", *COMMON, "--out", "run")
    seconds = [line["seconds"] for line in lines_of("run")]
    assert devices == [torch.device("cpu")] * 3
    assert min(seconds) >= 0.3


def lines_of(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


@dataclass
class Terminal:
    """The text that was written to a terminal."""

    text: str = ""

    def drawn(self) -> list[str]:
        lines = (line.replace("\x1b[A", "").rstrip() for line in re.split(r"[\r\n]", self.text))
        return [line for line in lines if line]


@contextmanager
def terminal(patch: pytest.MonkeyPatch, columns: int) -> Iterator[Terminal]:
    """A pseudo-terminal as standard error, on which every step is drawn without a delay."""
    patch.setattr(progress_module, "_DELAY", 0.0)
    patch.setattr(progress_module, "_INTERVAL", 0.0)
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    seen, pieces = Terminal(), []

    def read() -> None:
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the other end is closed
                return
            if not piece:
                return
            pieces.append(piece)

    reader = threading.Thread(target=read)
    with patch.context() as context, open(theirs, "w", encoding="utf-8") as file:
        context.setattr(sys, "stderr", file)
        reader.start()
        yield seen
    reader.join()
    os.close(ours)
    seen.text = b"".join(pieces).decode()


# A pipe


def test_a_pipe_gets_a_line_of_each_epoch_with_the_saved_metrics(tiny: Path, stages: Stages) -> None:
    command = (
        "student",
        *COMMON,
        "--cache",
        tiny / "cache",
        "--arch",
        "mlp:8",
        *KD,
        "--seed",
        3,
        "--baseline",
        "--out",
        "r",
    )
    code, out, err = stages.call(*command, "--json")
    assert code == 0
    assert json.loads(out)["student"]
    epoch_lines = [line for line in err.splitlines() if ", epoch " in line]
    assert len(epoch_lines) == 6
    for i, (line, kept) in enumerate(zip(epoch_lines[:3], lines_of("r"), strict=True), 1):
        found = re.fullmatch(
            rf"student, seed 3, epoch {i}/3: loss ({NUMBER}) \(kd ({NUMBER}), hard ({NUMBER})\),"
            rf" val accuracy ({NUMBER}), F1 ({NUMBER}), {NUMBER} images/s(, .* left)?",
            line,
        )
        assert found, line
        figures = [kept[name] for name in ("loss", "loss_kd", "loss_hard", "val_accuracy", "val_f1_macro")]
        assert [float(x) for x in found.groups()[:5]] == pytest.approx(figures, rel=5e-3)
        assert bool(found[6]) == (i < 3)
    assert all(re.match(rf"baseline, seed 3, epoch {i}/3: loss {NUMBER}, val", epoch_lines[2 + i]) for i in (1, 2, 3))
    assert "it/s" not in err
    assert "|" not in err  # no bar


def test_several_students_share_a_line_that_names_the_best(tiny: Path, stages: Stages) -> None:
    command = ("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:8", "--arch", "cnn", "--out", "all")
    _, _, err = stages.call(*command)
    epoch_lines = [line for line in err.splitlines() if ", epoch " in line]
    kept = {name: lines_of(f"all/{name}") for name in ("mlp-8", "cnn")}
    assert len(epoch_lines) == 3
    for i, line in enumerate(epoch_lines):
        best = max(kept, key=lambda name: kept[name][i]["val_accuracy"])
        assert line.startswith(f"2 students, best {best}, epoch {i + 1}/3: loss {kept[best][i]['loss']:.4g}, val")


def test_vectorised_students_share_a_line(tiny: Path, stages: Stages) -> None:
    command = ("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:8", "--seed", 0, "--seed", 1)
    _, _, err = stages.call(*command, "--vectorize", "--baseline", "--out", "all")
    epoch_lines = [line for line in err.splitlines() if ", epoch " in line]
    assert [line.partition(",")[0] for line in epoch_lines] == ["2 students"] * 3 + ["2 baselines"] * 3
    assert all(re.search(r"best seed-[01], epoch \d/3: loss", line) for line in epoch_lines)


def test_commands_that_print_other_lines_omit_those_of_epochs(tiny: Path, stages: Stages) -> None:
    common = (*COMMON, "--cache", tiny / "cache", "--arch", "mlp:8")
    code, out, err = stages.call("tune", *common, "--search", "momentum=0.8|0.9", "--grid", "--out", "t")
    assert (code, len(re.findall(r"^trial \d", out, re.MULTILINE))) == (0, 2), (out, err)
    assert "epoch 1/3" not in out + err
    common = (*common[:-1], "cnn")
    code, out, err = stages.call("methods", *common, "--only", "kd", "--time-steps", 1, "--out", "m")
    assert code == 0, err
    assert "epoch 1/3" not in out + err


@pytest.mark.parametrize(("epochs", "seconds", "most"), [(30, 5, 1), (30, 3000, 31), (400, 4000, 41), (1000, 250, 26)])
def test_a_log_has_at_most_40_lines_of_a_training_and_the_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], epochs: int, seconds: float, most: int
) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    progress = make_progress([FakeJob(epochs=epochs)])
    times = []
    for epoch in range(1, epochs + 1):
        clock[0] += seconds / epochs
        progress.step(64)
        progress.epoch([{"epoch": epoch, "loss": 0.2}])
        if text := capsys.readouterr().err:
            assert f"epoch {epoch}/{epochs}: " in text
            times.append(clock[0])
    assert max(1, most // 2) <= len(times) <= most
    assert times[-1] == clock[0]
    assert all(later - earlier > 9.99 for earlier, later in itertools.pairwise(times[:-1]))


def test_log_every_sets_the_epochs_of_a_log_and_may_change_on_resume(tiny: Path, stages: Stages) -> None:
    command = (
        "student",
        "--cache",
        tiny / "cache",
        "--arch",
        "mlp:8",
        "--epochs",
        7,
        "--batch-size",
        60,
        "--out",
        "r",
    )
    for more, expected in ((("--log-every", 3), [3, 6, 7]), ((), [7])):
        code, _, err = stages.call(*command, *more)
        assert code == 0
        assert [int(epoch) for epoch in re.findall(r", epoch (\d+)/7: ", err)] == expected
        assert len(lines_of("r")) == 7
        shutil.rmtree("r")
    stages.call(*command)
    Path("r/result.json").unlink()
    code, _, err = stages.call("student", "--resume", "--out", "r", "--log-every", 2)
    assert code == 0, err


# A terminal


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_gets_one_line_that_fits_and_is_removed(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    with terminal(monkeypatch, columns) as seen:
        stages("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:8", *KD, "--out", "r")
    drawn = seen.drawn()
    assert max(map(len, drawn)) < columns
    assert not [line for line in drawn if ", epoch " in line]
    words = ("/3 epochs", "val accuracy", " images/s") if columns == 120 else ("/3", "acc", "/s")
    kept = lines_of("r")[1]
    later = [line for line in drawn if f" % 2{words[0]}," in line]
    assert later, drawn
    for line in later:
        assert re.fullmatch(
            rf"student, seed 0: \d+ % 2{words[0]}, loss {NUMBER}, {words[1]} {kept['val_accuracy']:.3f},"
            rf" F1 {kept['val_f1_macro']:.3f}, [\d,]+k?{words[2]}, 0:00 left",
            line,
        ), line
    assert re.match(r"student, seed 0: 6 % 0/3", drawn[0]), drawn[0]
    assert seen.text.rstrip("\r").endswith(" ")  # overwritten with blanks


def test_the_printed_loss_is_the_mean_of_the_epoch_so_far(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(monkeypatch, 120) as seen:
        stages("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:8", *KD, "--out", "r")
    ends = [re.search(rf" (?:33|66|100) % ./3 epochs, loss ({NUMBER}),", line) for line in seen.drawn()]
    losses = [float(found[1]) for found in ends if found]  # at the last step of each epoch
    assert losses == pytest.approx([line["loss"] for line in lines_of("r")], rel=5e-3)


def test_a_message_is_printed_above_the_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        terminal(monkeypatch, 80) as seen,
        progress_module.show_progress([job()], 0, lambda _: torch.ones(1), "it", Console(True)) as s,
    ):
        s.step(10)
        Console(True).print("a message")
        s.step(10)
    assert "a message" in seen.drawn()


class LockInterrupted:
    """A lock whose acquire is interrupted by Ctrl-C; it cannot be released then."""

    def acquire(self) -> None:
        raise KeyboardInterrupt

    def release(self) -> None:
        raise RuntimeError("cannot release un-acquired lock")

    __enter__ = acquire

    def __exit__(self, *_: object) -> None:
        self.release()


@pytest.mark.parametrize("print_it", [Console(True).print, Console(False).print, Console(True).note])
def test_an_interrupt_while_a_line_is_printed_is_raised(print_it: Callable[[str], None]) -> None:
    whole = tqdm.get_lock()
    tqdm.set_lock(LockInterrupted())
    try:
        with pytest.raises(KeyboardInterrupt):
            print_it("a line")
    finally:
        tqdm.set_lock(whole)


# The line itself


@dataclass
class FakeJob:
    name: str = "student"
    epochs: int = 30
    steps: int = 100
    interrupt_advice: str = ""
    folder: Path = Path("runs/all/some-student")
    config: Any = field(default_factory=lambda: SimpleNamespace(seed=0, log_every=0))


def job() -> Any:
    return FakeJob()


def make_progress(
    jobs: list[Any], sums: Any = lambda _: torch.tensor([10.0, 2.0])
) -> progress_module.TrainingProgress:
    return progress_module.TrainingProgress(jobs, 0, sums, LongWorkNotice(Console(True), "", 1, ""))


@pytest.mark.parametrize("students", [1, 12])
def test_the_line_fits_every_terminal_with_the_most_important_parts_first(students: int) -> None:
    progress = make_progress([job()] * students)
    line = {"epoch": 12, "loss": 0.2, "val_accuracy": 0.98123, "val_f1_macro": 0.97987}
    for number in range(1, 1243):
        progress.step(64)
        if number % 100 == 0:
            progress.epoch([line] + [None] * (students - 1))
    widths = {columns: progress.format_line(columns) for columns in range(20, 200)}
    assert all(len(text) < columns for columns, text in widths.items())
    assert re.search(
        r": 41 % 12/30 epochs, loss 0.286, val accuracy 0.981, F1 0.980, [\d,]+ images/s, 0:0\d left$", widths[199]
    ), widths[199]
    assert "41 % 12/30, loss 0.286, acc 0.981, " in widths[80]
    assert widths[80].endswith(" left")
    assert students > 1 or "acc 0.981, F1 0.980, " in widths[80]
    assert "41 % 12/30, loss 0.286" in widths[70]


def test_the_loss_is_not_read_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it would synchronise with a GPU."""
    reads = []

    def sums(_: int) -> torch.Tensor:
        reads.append(1)
        return torch.ones(1)

    monkeypatch.setattr(progress_module, "_DELAY", 0.1)
    monkeypatch.setattr(progress_module, "_INTERVAL", 0.1)
    with terminal(monkeypatch, 80):
        monkeypatch.setattr(progress_module, "_DELAY", 0.1)
        monkeypatch.setattr(progress_module, "_INTERVAL", 0.1)
        progress = make_progress([job()], sums)
        start = progress_module.time.monotonic()
        while progress_module.time.monotonic() - start < 0.55:
            progress.step(64)
        progress.close()
    assert progress.steps_done > 1000
    assert 1 <= len(reads) <= 5


def test_only_rank_0_prints_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"epoch": 1, "loss": 0.2}
    for module in ("softcache.stages.training.progress", "softcache.stages.cli.console"):
        monkeypatch.setattr(f"{module}.is_first", lambda: False)
    make_progress([job()]).epoch([line])
    assert capsys.readouterr() == ("", "")
    with terminal(monkeypatch, 80) as seen:
        progress = make_progress([job()])
        for _ in range(20):
            progress.step(1)
        progress.close()
    assert seen.text == ""


def test_format_clock_writes_hours() -> None:
    assert [format_clock(s) for s in (0, 12.4, 59.6, 725, 7800)] == ["0:00", "0:12", "1:00", "12:05", "2:10:00"]
