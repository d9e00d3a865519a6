"""--compile: the same student up to rounding, and an error of one line without a compiler."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from softcache.pipeline.models.state_dicts import read_state_dict
from tests.helpers.commands import Stages

STUDENT = ("--arch", "mlp:8", "--epochs", 2, "--batch-size", 100, "--learning-rate", 0.02)
LOSSES = ("--loss", "kd", "--loss", "hint:teacher=flatten,student=linear,weight=0.01")


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_student_equals_the_uncompiled_one_up_to_rounding(tiny: Path, stages: Stages) -> None:
    command = ("student", "--cache", tiny / "cache", *STUDENT, *LOSSES)
    stages(*command, "--out", "plain")
    stages(*command, "--compile", "--out", "compiled")
    ours, theirs = (read_state_dict(Path(run, "student.pt")) for run in ("compiled", "plain"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)
    lines = [
        [json.loads(x) for x in Path(run, "metrics.jsonl").read_text().splitlines()] for run in ("compiled", "plain")
    ]
    for mine, his in zip(*lines, strict=True):
        # Of several terms a compiled network measures none: to do so changed its steps.
        assert {name for name in his if name not in mine} == {"gradient_kd", "gradient_hint"}
    stages("student", "--cache", tiny / "cache", *STUDENT, "--loss", "kd", "--compile", "--out", "one")
    assert all(json.loads(line)["gradient_kd"] > 0 for line in Path("one/metrics.jsonl").read_text().splitlines())


def test_a_network_that_cannot_be_compiled_gives_an_error_of_one_line(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.exc import Unsupported

    def failing(*_: object, **__: object) -> None:
        raise Unsupported("no such compiler")

    monkeypatch.setattr(torch, "compile", failing)
    line = stages.fails(1, "student", "--cache", tiny / "cache", *STUDENT, "--compile", "--out", "r")
    assert "--compile: the network cannot be compiled here (no such compiler): leave it out" in line
