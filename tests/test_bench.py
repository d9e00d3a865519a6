"""`python -m bench`: every row stands in results.json in one form, and what cannot be measured says why."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT

FIELDS = {"name", "goal", "median", "spread", "samples", "reached", "why"}


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """In a process of its own: it adds data sets to the table of them."""
    command = [sys.executable, "-m", "bench", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def test_rows_are_measured_and_kept_beside_those_of_before(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    done = bench("--quick", "--out", str(out), "--row", "hard-over-bare-mlp64,bytes-10,to-target-mnist-5")
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text(encoding="utf-8"))
    assert set(record) == {"machine", "versions", "rows"}
    assert record["versions"]["torch"]
    first = rows(out)
    assert list(first) == ["hard-over-bare-mlp64", "to-target-mnist-5", "bytes-10"]
    assert all(set(row) >= FIELDS for row in first.values())
    measured = first["hard-over-bare-mlp64"]
    least, most = measured["spread"]
    assert 0 < least <= measured["median"] <= most
    assert measured["samples"] == 1
    assert first["bytes-10"]["median"] > 32  # 10 float16 logits, index, label and checksum, and what is around them
    absent = first["to-target-mnist-5"]
    assert absent["median"] is None
    assert absent["reached"] is None
    assert "DATA_ROOT" in absent["why"]
    assert all(name in done.stdout for name in first)

    again = bench("--quick", "--out", str(out), "--row", "bytes-100")
    assert again.returncode == 0, again.stderr
    assert {name: row for name, row in rows(out).items() if name != "bytes-100"} == first
    assert rows(out)["bytes-100"]["median"] > 212


def test_a_row_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = bench("--out", str(tmp_path / "r.json"), "--row", "bytes-10,fastest")
    assert done.returncode != 0
    assert "no row fastest: there are " in done.stderr
    assert not (tmp_path / "r.json").exists()


def test_a_ratio_is_of_turns_of_one_round() -> None:
    from bench.interleaved import Found, interleaved, over

    turns: list[str] = []
    speed = iter(range(1, 100))

    def side(name: str, factor: float) -> Any:
        def turn() -> float:
            turns.append(name)
            return factor * (1 + next(speed) // 2)

        return turn

    found = interleaved({"a": side("a", 3.0), "b": side("b", 1.0)}, rounds=3)
    assert turns == ["a", "b", "b", "a", "a", "b", "b", "a"]  # the first round warms up
    assert [len(seconds) for seconds in found.values()] == [3, 3]
    assert over([6.0, 9.0, 3.0], [2.0, 3.0, 3.0]) == [3.0, 3.0, 1.0]
    assert Found([3.0, 1.0, 2.0]).median == 2.0


@pytest.mark.parametrize(
    ("at_least", "median", "reached"), [(True, 2.0, True), (True, 1.9, False), (False, 2.1, False)]
)
def test_a_goal_has_a_direction(at_least: bool, median: float, reached: bool) -> None:
    from bench.__main__ import Row
    from bench.interleaved import Found

    row = Row("r", 2.0, at_least, lambda given: Found([median]), "")
    assert row.reached(median) is reached


def test_a_missed_goal_says_by_how_much(tmp_path: Path) -> None:
    import torch

    from bench.__main__ import Row, measured
    from bench.interleaved import Found, Given

    given = Given(tmp_path, torch.device("cpu"))
    missed = measured(Row("r", 2.0, True, lambda given: Found([1.5, 1.0, 1.9], "parts"), "words", "a reason"), given)
    assert missed["reached"] is False
    assert missed["why"] == "missed: 1.5 instead of at least 2, a reason; parts"

    def broken(given: Given) -> Found:
        raise ValueError("out of order")

    failed = measured(Row("r", 2.0, True, broken, ""), given)
    assert (failed["median"], failed["reached"], failed["why"]) == (None, False, "ValueError: out of order")
