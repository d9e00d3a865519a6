"""`python -m bench`: every row has a record of the same form in results.json, also one that cannot be measured."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT

GPU_FIELDS = {"name", "words", "values", "median", "goal", "goal_is", "reached", "seconds"}
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


def test_a_row_about_opening_large_caches_is_measured(tmp_path: Path) -> None:
    process = run_bench("--quick", "--out", str(tmp_path / "r.json"), "--row", "open-14m,open-14m-memory")
    assert process.returncode == 0, process.stdout
    records = read_records(tmp_path / "r.json")
    assert records["open-14m"]["median"] > 0, records
    assert records["open-14m-memory"]["median"] > 1, records
    assert "shards" in records["open-14m"]["why"]


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


# make gpu-check


def test_the_file_of_a_gpu_check_has_the_tests_and_a_record_of_each_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from bench.gpu_check import check
    from bench.measurement import BenchOptions, Measurement, NotMeasurable
    from bench.rows import Row

    def fail(options: BenchOptions) -> Measurement:
        raise ValueError("two\nlines")

    def refuse(options: BenchOptions) -> Measurement:
        raise NotMeasurable("no such memory")

    rows = [
        Row("fast", 0.95, True, lambda options: Measurement([0.9, 1.0, 0.97], "parts"), "a rate"),
        Row("broken", 0.03, False, fail, "a share"),
        Row("unknown", None, False, refuse, "a size"),
    ]
    tests = {"passed": 3, "failed": 0, "skipped": 1, "failures": [], "seconds": 2.0}
    out = tmp_path / "gpu-check.json"
    assert check(torch.device("cpu"), out, rows, tests) == 1
    results = json.loads(out.read_text(encoding="utf-8"))
    assert set(results) == {"machine", "versions", "device", "tests", "rows"}
    assert (results["device"], results["tests"]) == ("cpu", tests)
    assert torch.__version__.startswith(results["versions"]["torch"])
    fast, broken, unknown = results["rows"]
    assert all(set(record) >= GPU_FIELDS for record in results["rows"])
    assert (fast["values"], fast["median"]) == ([0.9, 1.0, 0.97], 0.97)
    assert (fast["goal"], fast["goal_is"]) == (0.95, "at_least")
    assert fast["reached"] is None  # of a CPU
    assert (broken["error"], broken["median"], broken["values"]) == ("ValueError: two lines", None, [])
    assert unknown["not_measurable"] == "no such memory"
    assert "error" not in unknown
    out_text = capsys.readouterr().out
    assert "rows that were not run: broken" in out_text
    assert all(any(line.startswith(row.name) for line in out_text.splitlines()) for row in rows)
    assert check(torch.device("cpu"), out, rows[::2], tests) == 0
    assert check(torch.device("cpu"), out, rows[::2], {**tests, "failed": 1, "failures": ["a::b"]}) == 1
    assert "  failed: a::b" in capsys.readouterr().out


def test_a_goal_that_is_missed_on_a_gpu_is_said_and_is_no_failure(tmp_path: Path) -> None:
    import torch

    from bench.gpu_check import format_record, measure_row
    from bench.measurement import BenchOptions, Measurement
    from bench.rows import Row

    options = BenchOptions(tmp_path, torch.device("cuda"))
    lines = [
        format_record(measure_row(Row("r", 0.03, False, lambda _, x=x: Measurement([x]), "a share"), options))
        for x in (0.02, 0.04)
    ]
    assert [line.rpartition("; ")[2] for line in lines] == ["goal at most 0.03 reached", "goal at most 0.03 MISSED"]


def test_the_report_of_the_tests_is_counted(tmp_path: Path) -> None:
    from bench.gpu_check import read_report

    (tmp_path / "report.xml").write_text(
        '<testsuites><testsuite><testcase classname="t" name="a"/>'
        '<testcase classname="t" name="b"><skipped/></testcase>'
        '<testcase classname="t" name="c"><failure>no</failure></testcase>'
        '<testcase classname="t" name="d"><error>no</error></testcase></testsuite></testsuites>'
    )
    counts = {"passed": 1, "failed": 2, "skipped": 1, "failures": ["t::c", "t::d"]}
    assert read_report(tmp_path / "report.xml") == counts
    assert read_report(tmp_path / "none.xml") == {"passed": 0, "failed": 0, "skipped": 0, "failures": []}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "gpu"), "there are auto, cpu, cuda and cuda:N"),
        (("--row", "fastest"), "no row fastest: there are"),
    ],
)
def test_a_wrong_argument_of_a_gpu_check_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    from bench.gpu_check import main

    assert main([*arguments, "--out", str(tmp_path / "r.json")]) == 2
    line = capsys.readouterr().err
    assert line.startswith("Error: ")
    assert line.count("\n") == 1
    assert words in line
    assert not (tmp_path / "r.json").exists()


def test_a_row_of_a_gpu_check_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bench.gpu_check",
        "--device",
        "cpu",
        "--row",
        "waiting-copied-small,memory-small",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    out = tmp_path / "r.json"
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text(encoding="utf-8"))
    assert results["tests"] is None
    waiting, memory = results["rows"]
    assert len(waiting["values"]) == 1
    assert waiting["values"][0] < 1
    assert "GPU" in memory["not_measurable"]
