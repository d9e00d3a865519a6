"""`python -m bench`: measure every row, or those of --row; print a table and write bench/results.json."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from softcache.stages.cli.malloc import keep_large_blocks
from softcache.stages.runs.environment import select_device

from .interleaved import Given, Missing, machine, versions
from .targets_table import ROWS, Row

RESULTS = Path(__file__).resolve().parent / "results.json"


def measured(row: Row, given: Given) -> dict[str, Any]:
    """A row of results.json. What cannot be measured here stands there without a number, with the reason."""
    record: dict[str, Any] = {"name": row.name, "goal": row.goal, "median": None, "spread": None, "samples": 0}
    begun = time.perf_counter()
    try:
        found = row.measure(given)
    except Missing as missing:
        return {**record, "reached": None, "why": str(missing), "words": row.words}
    except Exception as error:  # one row's mistake must not take the others with it; it is said, and it fails
        return {**record, "reached": False, "why": f"{type(error).__name__}: {error}"[:300], "words": row.words}
    median, reached = found.median, None if given.quick else row.reached(found.median)
    why = found.why
    if reached is False:
        bound = "at least" if row.at_least else "at most"
        why = f"missed: {median:.4g} instead of {bound} {row.goal:g}{f', {row.missed}' if row.missed else ''}; {why}"
    record |= {"median": median, "spread": [min(found.values), max(found.values)], "samples": len(found.values)}
    return {
        **record,
        "reached": reached,
        "why": why,
        "words": row.words,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    goal = "" if row["goal"] is None else f"{row['goal']:g}"
    mark = {True: "yes", False: "NO", None: "-"}[row["reached"]]
    number = "-" if row["median"] is None else f"{row['median']:.4g}"
    spread = "" if row["spread"] is None else f"{row['spread'][0]:.4g} … {row['spread'][1]:.4g}"
    figures = f"{row['name']:26} {goal:>6} {number:>8} {spread:>17} {row['samples']:>3} {mark:>4}"
    return f"{figures}  {row['words']}: {row['why']}"


def select_rows(names: str) -> list[Row]:
    """Return the rows of these names, joined by commas; all for none."""
    wanted = [name for name in names.replace(",", " ").split() if name]
    if unknown := sorted(set(wanted) - {row.name for row in ROWS}):
        raise SystemExit(f"Error: no row {', '.join(unknown)}: there are {', '.join(row.name for row in ROWS)}")
    return [row for row in ROWS if not wanted or row.name in wanted]


def publish(rows: list[dict[str, Any]], given: Given, path: Path) -> None:
    """Write results.json: these rows, and those of before that were not measured now, in the order of ROWS."""
    try:
        before = {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    except (OSError, ValueError, KeyError):
        before = {}
    found = before | {row["name"]: row for row in rows}
    record = {
        "machine": machine(given.device),
        "versions": versions(),
        "rows": [found[row.name] for row in ROWS if row.name in found],
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """0 when every row that could be measured reached its goal, else 1."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--row", default="", help="names of rows, joined by commas; all when not given")
    parser.add_argument("--data-root", default="", help="MNIST, as torchvision lays it out")
    parser.add_argument("--cifar", default="", help="a folder with train/<class>/*.jpg and test/<class>/*.jpg, 32 px")
    parser.add_argument("--weights", default="", help="of a ResNet-56 for those images")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", default=str(RESULTS), help="where the results go")
    parser.add_argument("--quick", action="store_true", help="scaled down: shows that rows run, not what they say")
    asked = parser.parse_args(arguments)
    keep_large_blocks()  # as `stages` does; what it is measured against has it too
    rows = []
    with tempfile.TemporaryDirectory(prefix="softcache-bench-") as folder:
        given = Given(
            Path(folder),
            select_device(asked.device),
            asked.data_root,
            asked.cifar,
            asked.weights,
            asked.quick,
            bool(asked.row),
        )
        print(f"{'row':26} {'goal':>6} {'median':>8} {'spread':>17} {'n':>3} {'ok':>4}", flush=True)
        for row in select_rows(asked.row):
            rows.append(measured(row, given))
            print(line(rows[-1]), flush=True)
            publish(rows, given, Path(asked.out))  # after each: what is measured stays, whatever comes then
    return int(any(row["reached"] is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
