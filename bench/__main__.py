"""`python -m bench`: measure every row, or those of --row; print a table and write bench/results.json."""

import argparse
import json
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from softcache.stages.cli.malloc import keep_large_blocks
from softcache.stages.runs import environment

from .measurement import BenchOptions, NotMeasurable
from .rows import ROWS, Row

RESULTS = Path(__file__).resolve().parent / "results.json"
OPTIONAL_LIBRARIES = ("torchdistill", "lmdb", "webdataset", "onnxruntime", "openvino")  # what is measured against


def measure_row(row: Row, options: BenchOptions) -> dict[str, Any]:
    """Measure a row.

    Returns:
        Its record in results.json. A row that cannot be measured here has no number; `why` is the reason. A row whose
        function fails counts as one that missed its goal, so that its error does not stop the other rows.
    """
    record: dict[str, Any] = {"name": row.name, "goal": row.goal, "median": None, "spread": None, "samples": 0}
    start = time.perf_counter()
    try:
        measurement = row.measure(options)
    except NotMeasurable as error:
        return {**record, "reached": None, "why": str(error), "words": row.description}
    except Exception as error:
        why = f"{type(error).__name__}: {error}"[:300]
        return {**record, "reached": False, "why": why, "words": row.description}
    median, values = measurement.median, measurement.values
    is_reached = None if options.quick else row.is_reached(median)
    why = measurement.details
    if is_reached is False:
        bound = "at least" if row.at_least else "at most"
        reason = f", {row.miss_reason}" if row.miss_reason else ""
        why = f"missed: {median:.4g} instead of {bound} {row.goal:g}{reason}; {why}"
    record |= {"median": median, "spread": [min(values), max(values)], "samples": len(values)}
    return {
        **record,
        "reached": is_reached,
        "why": why,
        "words": row.description,
        "seconds": round(time.perf_counter() - start, 1),
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }


def format_record(record: dict[str, Any]) -> str:
    """Return a line of the printed table."""
    goal = "" if record["goal"] is None else f"{record['goal']:g}"
    mark = {True: "yes", False: "NO", None: "-"}[record["reached"]]
    median = "-" if record["median"] is None else f"{record['median']:.4g}"
    spread = "" if record["spread"] is None else f"{record['spread'][0]:.4g} … {record['spread'][1]:.4g}"
    numbers = f"{record['name']:26} {goal:>6} {median:>8} {spread:>17} {record['samples']:>3} {mark:>4}"
    return f"{numbers}  {record['words']}: {record['why']}"


def select_rows(names: str) -> list[Row]:
    """Return the rows of these names, joined by commas; all rows for an empty text."""
    selected = [name for name in names.replace(",", " ").split() if name]
    if names and not selected:
        raise SystemExit(f"Error: --row {names!r} names no row: leave it out for all rows")
    if unknown := sorted(set(selected) - {row.name for row in ROWS}):
        raise SystemExit(f"Error: no row {', '.join(unknown)}: there are {', '.join(row.name for row in ROWS)}")
    return [row for row in ROWS if not selected or row.name in selected]


def write_results(records: list[dict[str, Any]], device: torch.device, path: Path) -> None:
    """Write results.json: these records, and the earlier ones of rows not measured now, in the order of ROWS."""
    try:
        earlier = {record["name"]: record for record in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    except (OSError, ValueError, KeyError):
        earlier = {}
    by_name = earlier | {record["name"]: record for record in records}
    results = {
        "machine": describe_machine(device),
        "versions": find_versions(),
        "rows": [by_name[row.name] for row in ROWS if row.name in by_name],
    }
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return device, threads, system, and the model and number of CPU cores."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {**environment.describe_machine(device), "cpu": models[0] if models else "", "cpus": len(models)}


def find_versions() -> dict[str, str]:
    """Return {library: version} of softcache's dependencies and of the libraries it is compared with."""
    versions = environment.library_versions()
    for name in OPTIONAL_LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark. Returns 0 when every row that could be measured reached its goal, else 1."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--row", default="", help="names of rows, joined by commas; all rows by default")
    parser.add_argument("--data-root", default="", help="folder with MNIST, as torchvision lays it out")
    parser.add_argument("--cifar", default="", help="folder with train/<class>/*.jpg and test/<class>/*.jpg, 32 px")
    parser.add_argument("--weights", default="", help="state dict of a ResNet-56 for the images of --cifar")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", default=str(RESULTS), help="file for the results")
    parser.add_argument("--quick", action="store_true", help="scaled down: shows that rows run; numbers mean nothing")
    parsed = parser.parse_args(arguments)
    keep_large_blocks()  # as the commands of softcache do; contenders of other_process.py run without it
    records = []
    with tempfile.TemporaryDirectory(prefix="softcache-bench-") as folder:
        options = BenchOptions(
            folder=Path(folder),
            device=environment.select_device(parsed.device),
            data_root=parsed.data_root,
            cifar=parsed.cifar,
            weights=parsed.weights,
            quick=parsed.quick,
            is_selection=bool(parsed.row),
        )
        print(f"{'row':26} {'goal':>6} {'median':>8} {'spread':>17} {'n':>3} {'ok':>4}", flush=True)
        for row in select_rows(parsed.row):
            records.append(measure_row(row, options))
            print(format_record(records[-1]), flush=True)
            write_results(records, options.device, Path(parsed.out))  # after each row: an interruption loses no other
    return int(any(record["reached"] is False for record in records))


if __name__ == "__main__":
    sys.exit(main())
