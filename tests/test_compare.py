"""stages compare: finished runs side by side."""

import json
from pathlib import Path

import pytest
from commands import Stages

STUDENT = ("--arch", "mlp:8", "--epochs", 2)


def test_runs_stand_side_by_side_with_their_teachers_once(tiny: Path, stages: Stages) -> None:
    cache = ("student", "--cache", tiny / "cache", *STUDENT)
    one = stages(*cache, "--loss", "hard", "--seeds", 2, "--baseline", "--out", "a")
    other = stages(*cache, "--loss", "kd", "--out", "b")
    mapped = stages(*cache, "--loss", "kd", "--map", "temperature", "--out", "c")
    _, out, _ = stages.call("compare", "a", "b", "c", "--json")
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["teacher cnn", "a, hard targets only", "a", "b", "teacher cnn, temperature", "c"]
    for name, result in (("a", one), ("b", other), ("c", mapped)):
        assert rows[name]["mean"]["f1_macro"] == result["student"]["test"]["f1_macro"]
    assert rows["a"]["spread"]["accuracy"] == one["spread"]["student"]["test"]["accuracy"]
    assert rows["a, hard targets only"]["mean"]["accuracy"] == one["baseline"]["test"]["accuracy"]
    assert rows["teacher cnn"]["mean"]["accuracy"] == one["teacher"]["test"]["accuracy"]
    code, out, _ = stages.call("compare", "a", "b")
    assert code == 0
    assert f"{one['student']['test']['accuracy']:.4f} ± {one['spread']['student']['test']['accuracy']:.4f}" in out
    (line,) = (line for line in out.splitlines() if line.startswith("b "))
    assert "±" not in line  # one seed has no spread
    assert "n/a" in out  # of balanced data there is no tail


@pytest.mark.parametrize(
    ("text", "code", "wrong"),
    [(None, 2, "'r' is no run: it has no result.json"), ("{", 1, "'r/result.json' is damaged"),
     ('{"teacher": {}}', 1, "'r/result.json' is not of a student's run")],
)  # fmt: skip
def test_what_is_no_run_is_refused(stages: Stages, text: str | None, code: int, wrong: str) -> None:
    Path("r").mkdir()
    if text is not None:
        Path("r/result.json").write_text(text)
    assert wrong in stages.fails(code, "compare", "r")


def test_figures_that_are_no_numbers_are_refused_and_the_split_is_named(tiny: Path, stages: Stages) -> None:
    result = stages("student", "--cache", tiny / "cache", *STUDENT, "--out", "r")
    code, out, _ = stages.call("compare", "r")
    assert code == 0
    assert out.startswith("test split ")
    for part in (result["student"], result["spread"]["student"]):
        part["test"]["accuracy"], right = "high", part["test"]["accuracy"]
        Path("r/result.json").write_text(json.dumps(result))
        assert "'r/result.json' is not of a student's run" in stages.fails(1, "compare", "r")
        part["test"]["accuracy"] = right
