"""What a training says while it runs: metrics.jsonl, event files, a line on a terminal, a line an epoch elsewhere."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Stages
from conftest import ROOT, Run

from pipeline.losses.loss import fixed
from pipeline.records import Outputs
from pipeline.statistic import derived
from stages import training
from stages.checkpoint import State
from stages.job import names

TERMS = (
    "--loss", "kd:temperature=4", "--loss", "hint:teacher=flatten,student=hidden1,weight=0.1",
    "--loss", "hard:weight=0.3",
)  # fmt: skip
COMMON = ("--arch", "mlp:8", "--epochs", 2, "--batch-size", 100)


def lines_of(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


# metrics.jsonl


def alone(job: Any, state: State, batch: Any, losses: Any, kept: Any) -> dict[str, float]:
    """{term: L2 norm of its gradient}: each on a graph of its own, led back by itself, summed in float64."""
    found = {}
    for name, loss in zip(names(losses), losses, strict=True):
        logits = job.model(batch.views)
        own = replace(batch, features=derived(batch.features, ("flatten",)))
        outputs = Outputs(logits, {tap: x.float() for tap, x in kept.items()})
        term = fixed(loss.weight) * job.term(loss, outputs, own, state.modules.get(name))
        gradients = torch.autograd.grad(term, state.weights, allow_unused=True)
        found[name] = sum(float((g.double() ** 2).sum()) for g in gradients if g is not None) ** 0.5
    return found


def test_gradients_are_those_of_each_term_on_the_last_batch(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, expected = training.step, []

    def watched(job: Any, state: State, batch: Any, losses: Any, kept: Any, norms: Any = None) -> torch.Tensor:
        if norms is not None:
            expected.append(alone(job, state, batch, losses, kept))
        return step(job, state, batch, losses, kept, norms)

    monkeypatch.setattr(training, "step", watched)
    stages("student", "--cache", tiny / "cache", *COMMON, *TERMS, "--clip-norm", 0.01, "--out", "r")
    lines = lines_of("r")
    assert len(lines) == len(expected) == 2
    for line, norms in zip(lines, expected, strict=True):
        assert {name for name in line if name.startswith("gradient_")} == {f"gradient_{name}" for name in norms}
        for name, norm in norms.items():
            assert line[f"gradient_{name}"] == pytest.approx(norm, rel=1e-4), name


def test_measuring_them_leaves_no_trace_in_the_weights(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`crd` keeps a memory of its own, and `cnn` has several layers."""
    losses = ("--loss", "kd", "--loss", "crd:teacher=flatten,student=flatten,weight=0.1", "--loss", "hard")
    asked = ("student", "--cache", tiny / "cache", "--arch", "cnn", "--epochs", 2, "--batch-size", 60, *losses)
    stages(*asked, "--out", "measured")
    step = training.step
    monkeypatch.setattr(training, "step", lambda *arguments: step(*arguments[:5]))
    stages(*asked, "--out", "not")
    assert lines_of("not")[0]["gradient_kd"] == 0 < lines_of("measured")[0]["gradient_kd"]
    assert Path("measured/student.pt").read_bytes() == Path("not/student.pt").read_bytes()


def test_one_term_has_the_gradient_of_the_step_and_the_rate_is_that_of_the_last_step(
    tiny: Path, stages: Stages
) -> None:
    stages("student", "--cache", tiny / "cache", *COMMON, "--loss", "kd", "--schedule", "constant", "--warmup", 0,
           "--learning-rate", 0.03, "--out", "r")  # fmt: skip
    for line in lines_of("r"):
        assert line["gradient_kd"] > 0
        assert line["learning_rate"] == 0.03


# Elsewhere than on a terminal


def test_through_a_pipe_each_epoch_is_one_line_and_no_bar(tiny: Path, tmp_path: Path, stages_process: Run) -> None:
    asked = ("student", "--cache", tiny / "cache", *COMMON, *TERMS, "--seeds", 2, "--baseline", "--out", "r", "--json")
    done = stages_process(*asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    trainings = [f"{model}, seed {seed}" for seed in (0, 1) for model in ("student", "baseline")]
    heads = [f"{training}, epoch {epoch}/2: " for training in trainings for epoch in (1, 2)]
    assert [next(h for h in heads if line.startswith(h)) for line in said] == heads
    first = lines_of(str(tmp_path / "r/seed-0"))[0]
    terms = ", ".join(f"{name} {first[f'loss_{name}']:.3g}" for name in ("kd", "hint", "hard"))
    assert f"loss {first['loss']:.4g} ({terms}), val accuracy {first['val_accuracy']:.4f}" in said[0]
    assert re.search(r", [\d,]+ pictures/s, [\d.]+ (ms|s) left$", said[0])
    assert "\r" not in done.stderr
    assert json.loads(done.stdout)["student"]


def test_a_search_and_a_comparison_of_methods_say_their_own_lines_alone(
    tiny: Path, tmp_path: Path, stages_process: Run
) -> None:
    more = ("--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 2, "--batch-size", 100)
    methods = ("methods", *more, "--only", "kd", "--layers", "flatten", "--student-layers", "hidden1")
    for asked in ((*methods, "--time-steps", 1), ("tune", *more, "--search", "ema=0|0.5", "--grid")):
        done = stages_process(*asked, "--out", asked[0], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "epoch 1/2" not in done.stderr + done.stdout


# On a terminal


def drawn(folder: Path, columns: int, *arguments: object) -> list[str]:
    """What a command shows on a terminal of so many columns, each drawing a line."""
    terminal, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, "-m", "stages", *map(str, arguments)]
    where = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, cwd=folder, env=where, stdin=its_end, stdout=its_end, stderr=its_end)
    os.close(its_end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # as Linux says that the other end is gone
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    assert child.wait(60) == 0, shown.decode()
    return [line.rstrip() for line in re.split(r"[\r\n]+", shown.decode()) if line.strip()]


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_one_line_says_where_a_training_is(tiny: Path, tmp_path: Path, columns: int) -> None:
    asked = ("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--batch-size", 10, "--epochs", 100)
    every = drawn(tmp_path, columns, *asked, "--out", "r")
    lines = [line for line in every if re.match(r"student, seed 0: \d+ %", line)]
    assert len(lines) > 2
    last = lines[-1]
    assert max(map(len, lines)) < columns
    assert re.search(r"\d+/100( epochs)?, loss [\d.]+(e-\d+)?, (val accuracy|acc) [01]\.\d{3}, F1 [01]\.\d{3}, ", last)
    assert re.search(r"\d:\d\d left$", last)
    if columns == 120:
        assert re.search(r", [\d,]+ pictures/s, ", last)


# TensorBoard


def events_of(folder: str) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} of the event files in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(f"{folder}/tensorboard")
    read.Reload()
    found = {tag: [(one.step, one.value) for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert all(len(dict(values)) == len(values) for values in found.values())  # no step twice
    return {tag: dict(values) for tag, values in found.items()}


def same_events(folder: str) -> None:
    lines, events = lines_of(folder), events_of(folder)
    tags = {name: re.sub("^(loss|gradient|val)_", r"\1/", name) for name in lines[0] if name != "epoch"}
    assert set(events) == set(tags.values())
    for name, tag in tags.items():
        expected = {line["epoch"]: line[name] for line in lines}
        assert events[tag] == pytest.approx(expected, rel=1e-6), tag


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_event_files_have_every_number_of_every_epoch_once_though_stopped(tiny: Path, stages: Stages) -> None:
    from stopping import stop_at

    asked = ("student", "--cache", tiny / "cache", *COMMON, *TERMS)
    plain = stages(*asked, "--out", "plain")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5)
        code, *_ = stages.call(*asked, "--tensorboard", "--baseline", "--out", "r")
    assert code == 130
    same_events("r")
    stages("student", "--resume", "--out", "r")
    same_events("r")
    same_events("r/baseline")
    assert Path("r/student.pt").read_bytes() == Path("plain/student.pt").read_bytes()
    assert not Path("plain/tensorboard").exists()
    assert plain["student"]
    stages("student", "--resume", "--tensorboard", "--out", "plain")  # asked for when all is over
    same_events("plain")


def test_without_tensorboard_it_is_one_line_before_anything_is_done(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages import runs

    found = runs.find_spec
    monkeypatch.setattr(runs, "find_spec", lambda name: None if name == "tensorboard" else found(name))
    said = stages.fails(2, "student", "--cache", tiny / "cache", *COMMON, "--tensorboard", "--out", "r")
    assert said.endswith("pip install 'softcache[tensorboard]'")
    assert not Path("r").exists()
