"""`python -m bench`: every row has a record of the same form in results.json, also one that cannot be measured."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT

FIELDS = {"name", "goal", "median", "spread", "samples", "reached", "why"}


def run_bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the benchmark in a process of its own, because it adds data sets to the table of transfer sets."""
    command = [sys.executable, "-m", "bench", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Return {name of a row: its record} of a results.json."""
    return {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def test_rows_are_measured_and_earlier_records_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    process = run_bench("--quick", "--out", str(out), "--row", "hard-over-bare-mlp64,bytes-10,to-target-mnist-5")
    assert process.returncode == 0, process.stderr
    results = json.loads(out.read_text(encoding="utf-8"))
    assert set(results) == {"machine", "versions", "rows"}
    assert results["versions"]["torch"]
    records = read_records(out)
    assert list(records) == ["hard-over-bare-mlp64", "to-target-mnist-5", "bytes-10"]
    assert all(set(record) >= FIELDS for record in records.values())
    ratio = records["hard-over-bare-mlp64"]
    least, most = ratio["spread"]
    assert 0 < least <= ratio["median"] <= most
    assert ratio["samples"] == 1
    assert records["bytes-10"]["median"] > 32  # 10 float16 logits, index, label and checksum, and the container
    not_measurable = records["to-target-mnist-5"]
    assert not_measurable["median"] is None
    assert not_measurable["reached"] is None
    assert "DATA_ROOT" in not_measurable["why"]
    assert all(name in process.stdout for name in records)

    process = run_bench("--quick", "--out", str(out), "--row", "bytes-100")
    assert process.returncode == 0, process.stderr
    assert {name: record for name, record in read_records(out).items() if name != "bytes-100"} == records
    assert read_records(out)["bytes-100"]["median"] > 212


def test_a_row_about_reading_is_measured(tmp_path: Path) -> None:
    process = run_bench("--quick", "--out", str(tmp_path / "r.json"), "--row", "reads-warm")
    assert process.returncode == 0, process.stdout
    assert read_records(tmp_path / "r.json")["reads-warm"]["median"] > 0


def test_an_unknown_row_is_an_error_that_names_it(tmp_path: Path) -> None:
    process = run_bench("--out", str(tmp_path / "r.json"), "--row", "bytes-10,fastest")
    assert process.returncode != 0
    assert "no row fastest: there are " in process.stderr
    assert not (tmp_path / "r.json").exists()


def test_a_ratio_is_of_turns_of_one_round() -> None:
    from bench.measurement import Measurement
    from bench.timing import Contender, divide, time_in_turns

    turns: list[str] = []
    clock = iter(range(1, 100))

    def make_contender(name: str, factor: float) -> Contender:
        def take_turn() -> float:
            turns.append(name)
            return factor * (1 + next(clock) // 2)

        return take_turn

    seconds = time_in_turns({"a": make_contender("a", 3.0), "b": make_contender("b", 1.0)}, rounds=3)
    assert turns == ["a", "b", "b", "a", "a", "b", "b", "a"]  # the first round warms up
    assert [len(times) for times in seconds.values()] == [3, 3]
    assert divide([6.0, 9.0, 3.0], [2.0, 3.0, 3.0]) == [3.0, 3.0, 1.0]
    assert Measurement([3.0, 1.0, 2.0]).median == 2.0


@pytest.mark.parametrize(
    ("at_least", "median", "is_reached"), [(True, 2.0, True), (True, 1.9, False), (False, 2.1, False)]
)
def test_a_goal_has_a_direction(at_least: bool, median: float, is_reached: bool) -> None:
    from bench.measurement import Measurement
    from bench.rows import Row

    row = Row("r", 2.0, at_least, lambda options: Measurement([median]), "")
    assert row.is_reached(median) is is_reached


def test_a_missed_goal_names_the_difference(tmp_path: Path) -> None:
    import torch

    from bench.__main__ import measure_row
    from bench.measurement import BenchOptions, Measurement
    from bench.rows import Row

    options = BenchOptions(tmp_path, torch.device("cpu"))
    slow = Row("r", 2.0, True, lambda options: Measurement([1.5, 1.0, 1.9], "parts"), "a description", "a reason")
    record = measure_row(slow, options)
    assert record["reached"] is False
    assert record["why"] == "missed: 1.5 instead of at least 2, a reason; parts"

    def fail(options: BenchOptions) -> Measurement:
        raise ValueError("out of order")

    record = measure_row(Row("r", 2.0, True, fail, ""), options)
    assert (record["median"], record["reached"], record["why"]) == (None, False, "ValueError: out of order")
