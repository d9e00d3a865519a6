"""`python -m bench.gpu_check`: the tests marked gpu, then the rows of on_gpu.py, on a device; writes gpu-check.json.

Nothing is downloaded. The exit status is 1 where a test fails or a row cannot be run. A goal that is missed is printed
and recorded, and is no failure: what a GPU reaches depends on the processor beside it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from softcache.base.errors import UsageError
from softcache.stages.cli.malloc import keep_large_blocks
from softcache.stages.runs import environment

from . import on_gpu
from .__main__ import describe_machine, find_versions
from .measurement import BenchOptions, NotMeasurable
from .rows import Row, at_least, at_most

ROOT = Path(__file__).resolve().parent.parent
# Seconds that the tests may take, and after which no further row begins: on a GPU the check is to end in 8 minutes.
TEST_SECONDS = {"cuda": 240.0, "cpu": 900.0}
LAST_START = {"cuda": 390.0, "cpu": 1500.0}


def make_rows() -> tuple[Row, ...]:
    """Return the rows: of the small pair at 32 px, then of the large one at 224 px."""
    rows: list[Row] = []
    for name, title in (("small", "resnet56 -> resnet20, 32 px"), ("large", "ResNet-50 -> ResNet-18, 224 px")):
        for contender in ("live", "cached", "hard"):
            words = {"live": "live teacher", "cached": "cache", "hard": "hard targets"}[contender]
            rows.append(
                at_least(
                    f"{contender}-{name}",
                    None,
                    f"images a second of training, {words}: {title}",
                    partial(on_gpu.measure_rate, name=name, contender=contender),
                )
            )
        rows.append(
            at_least(
                f"gain-{name}",
                None,
                f"epoch with the live teacher / from the cache: {title}",
                partial(on_gpu.measure_gain, name=name),
            )
        )
        kinds = ("cached", "copied") if name == "small" else ("cached", "copied", "files")
        for kind in kinds:
            words = {
                "cached": "images and targets kept on the device",
                "copied": "batches made by a thread",
                "files": "JPEGs decoded by worker processes",
            }[kind]
            rows.append(
                at_most(
                    f"waiting-{kind}-{name}",
                    0.03,
                    f"share of an epoch that waits for data, {words}: {title}",
                    partial(on_gpu.measure_waiting, name=name, contender=kind),
                )
            )
        rows.append(
            at_least(
                f"stage-one-{name}",
                0.95,
                f"images a second: stage one / bare inference of {title.partition(' ->')[0]}",
                partial(on_gpu.compare_stage_one_with_bare_inference, name=name),
            )
        )
        rows.append(
            at_most(
                f"memory-{name}",
                None,
                f"MiB of the device at most while training from the cache: {title}",
                partial(on_gpu.measure_memory, name=name),
            )
        )
    return tuple(rows)


def run_tests(device: str) -> dict[str, Any]:
    """Run the tests marked gpu in a process of their own, whose output is shown.

    Returns:
        {"passed", "failed", "skipped": numbers; "failures": names; "seconds"}. Where pytest itself fails or takes too
        long, that is a failure named `pytest`.
    """
    with tempfile.TemporaryDirectory(prefix="softcache-gpu-") as folder:
        report, start = Path(folder, "report.xml"), time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "--device", device]
        command += ["-p", "no:cacheprovider", f"--basetemp={folder}/tests", f"--junitxml={report}"]
        limit = TEST_SECONDS["cuda" if device.startswith("cuda") else "cpu"]
        with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = -1
            finally:
                with suppress(ProcessLookupError):  # what a test has started, too
                    os.killpg(process.pid, signal.SIGKILL)
        tests = read_report(report)
        tests["seconds"] = round(time.monotonic() - start, 1)
    if code and not tests["failures"]:
        tests["failed"] += 1
        what = f"took more than {limit:.0f} s" if code == -1 else f"ended with status {code}"
        tests["failures"] = [f"pytest {what}"]
    return tests


def read_report(path: Path) -> dict[str, Any]:
    """Count the tests of a JUnit report; none where there is no file."""
    tests: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    if not path.is_file():
        return tests
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            tests["failed"] += 1
            tests["failures"].append(f"{case.get('classname')}::{case.get('name')}")
        else:
            tests["skipped" if case.find("skipped") is not None else "passed"] += 1
    return tests


def measure_row(row: Row, options: BenchOptions) -> dict[str, Any]:
    """Measure a row; an error of it is recorded, in one line, and does not stop the others.

    Returns:
        Its record: `values` one for each round, `median`, `goal` and `goal_is` at_least or at_most, `reached` (None
        without a goal and on a CPU), `details`, `seconds`, and where it was not run `error`, or where it cannot be
        measured on this device `not_measurable`.
    """
    record: dict[str, Any] = {
        "name": row.name,
        "words": row.description,
        "values": [],
        "median": None,
        "goal": row.goal,
        "goal_is": "at_least" if row.at_least else "at_most",
        "reached": None,
    }
    start = time.perf_counter()
    try:
        measurement = row.measure(options)
        record |= {"values": list(measurement.values), "median": measurement.median, "details": measurement.details}
        record["reached"] = None if options.quick else row.is_reached(measurement.median)
    except NotMeasurable as error:
        record["not_measurable"] = str(error)
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return {**record, "seconds": round(time.perf_counter() - start, 1)}


def format_record(record: dict[str, Any]) -> str:
    """Return the line of a row."""
    if problem := record.get("error") or record.get("not_measurable"):
        return f"{record['name']:21} {'ERROR' if 'error' in record else '-':>10}  {record['words']}: {problem}"
    goal = ""
    if record["goal"] is not None:
        bound = "at least" if record["goal_is"] == "at_least" else "at most"
        goal = f"; goal {bound} {record['goal']:g}" + {True: " reached", False: " MISSED", None: ""}[record["reached"]]
    details = f" ({record['details']})" if record["details"] else ""
    return f"{record['name']:21} {record['median']:>10.4g}  {record['words']}{details}{goal}"


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write the JSON file."""
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def check(device: torch.device, out: Path, rows: Sequence[Row], tests: dict[str, Any] | None) -> int:
    """Measure the rows, and write and print all results.

    Args:
        device: where rows are measured.
        out: the JSON file, written after each row: an interruption loses no other.
        rows: what is measured.
        tests: the results of the tests; None where none were run.

    Returns:
        The exit status: 0 where no test failed and every row was run, 1 else.
    """
    start, is_gpu = time.monotonic(), device.type == "cuda"
    last_start = LAST_START["cuda" if is_gpu else "cpu"] - (tests["seconds"] if tests else 0)
    versions = find_versions()
    if is_gpu:
        cudnn: Any = torch.backends.cudnn
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(cudnn.version())}
    results: dict[str, Any] = {
        "machine": describe_machine(device),
        "versions": versions,
        "device": str(device),
        "tests": tests,
        "rows": [],
    }
    write_results(results, out)
    with tempfile.TemporaryDirectory(prefix="softcache-gpu-") as folder:
        options = BenchOptions(Path(folder), device, quick=not is_gpu)
        for row in rows:
            print(f"{row.name} …", file=sys.stderr, flush=True)
            if time.monotonic() - start > last_start:
                record = measure_row(_make_late(row), options)
            else:
                record = measure_row(row, options)
            results["rows"].append(record)
            print(format_record(record), flush=True)
            write_results(results, out)
    return _summarize(results, out)


def _make_late(row: Row) -> Row:
    """Return a row whose measurement is an error that says why it was not begun."""

    def fail(options: BenchOptions) -> Any:
        raise TimeoutError("not begun: the check has taken too long already")

    return Row(row.name, row.goal, row.at_least, fail, row.description)


def _summarize(results: dict[str, Any], out: Path) -> int:
    """Print which goals hold and what failed; return the exit status."""
    rows, tests = results["rows"], results["tests"]
    for reached, words in ((True, "goals reached"), (False, "goals MISSED (no failure)")):
        if names := [row["name"] for row in rows if row["reached"] is reached]:
            print(f"{words}: {', '.join(names)}")
    if not results["device"].startswith("cuda"):
        print("no GPU: everything was small, the numbers mean nothing, and no goal is compared")
    if crashed := [row["name"] for row in rows if "error" in row]:
        print(f"rows that were not run: {', '.join(crashed)}")
    if tests is not None:
        print(f"tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped")
        for name in tests["failures"]:
            print(f"  failed: {name}")
    print(f"written: {out}")
    return int(bool(crashed) or bool(tests and tests["failed"]))


def main(arguments: list[str] | None = None) -> int:
    """Run the check. Returns 0 where every test passes and every row runs, 1 else, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", default="gpu-check.json", help="file for the results")
    parser.add_argument("--row", default="", help="names of rows, joined by commas, and no tests; all by default")
    parsed = parser.parse_args(arguments)
    rows = make_rows()
    names = parsed.row.replace(",", " ").split()
    try:
        device = environment.select_device(parsed.device)
        if unknown := set(names) - {row.name for row in rows}:
            raise UsageError(f"no row {', '.join(sorted(unknown))}: there are {', '.join(row.name for row in rows)}")
    except UsageError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    keep_large_blocks()
    if device.type == "cpu":
        torch.set_num_threads(1)  # of small steps: on a busy machine two wait for each other longer than they save
    tests = None if names else run_tests(str(device))
    return check(device, Path(parsed.out), [row for row in rows if not names or row.name in names], tests)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Stopped.")
