"""`python -m bench.document`: the tables of bench/results.json, written into the documents that show them.

A document marks the place of a table with `<!-- bench: begin NAME -->` and `<!-- bench: end NAME -->`. With --check
nothing is written, and the exit code is 1 where a document is out of date.
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .__main__ import RESULTS
from .rows import ROWS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
Results = dict[str, Any]

_VECTORS = "AVX512"  # of the processors on which most rows were measured; a row from another one is marked
_PLACE = re.compile(r"(<!-- bench: begin (\w+) -->\n).*?(<!-- bench: end \2 -->)", re.DOTALL)
_VALUE = re.compile(r"\{([a-z0-9-]+)(?::([^}]*))?\}", re.IGNORECASE)

# Text and figures of a line; {row} is the median of a row, with a format where it is not .2f.
_SHORT = (
    ("epoch from the cache / the same with hard targets only (`resnet8`)", "{cached-resnet8}"),
    (
        "epoch with ResNet-56 in the loop / from the cache",
        "{live-float32:.1f} in float32, {live-bfloat16:.1f} in bfloat16",
    ),
    ("usual loop (`ImageFolder`, `DataLoader`, live ResNet-56, float32) / from the cache", "{usual-float32:.1f}"),
    ("stage one / the teacher's bare inference, images a second", "{stage-one-float32} in float32"),
    ("bytes of a view, everything included", "{bytes-10:.1f} with 10 classes, {bytes-100:.1f} with 100"),
)
_SUMMARY = (
    (
        "epoch from the cache / the same with hard targets only",
        "{cached-resnet8} (`cnn` {cached-cnn}; with 8 kB of features a row {read-8kB-resnet8})",
    ),
    ("our hard-target epoch / a bare loop over views that lie ready in memory", "{hard-over-bare-resnet8}"),
    (
        "live teacher in our own loop / cached",
        "{live-float32:.1f} in float32, {live-bfloat16:.1f} in bfloat16",
    ),
    (
        "usual loop (`ImageFolder`, `DataLoader`, torchvision, live teacher, float32) / cached",
        "{usual-float32:.1f}; ours in bfloat16 {usual-bfloat16:.1f}, compiled {usual-compiled:.1f}",
    ),
    (
        "torchdistill, images in memory, float32 / cached in bfloat16",
        "{torchdistill:.1f}, compiled {torchdistill-compiled:.1f}",
    ),
    (
        "usual loop, hard targets only, no teacher, float32 / cached in bfloat16",
        "{usual-hard:.1f}, compiled {usual-hard-compiled:.1f}",
    ),
    (
        "`mlp:64`, 60,000 images of 28 x 28: cached / hard targets; hard targets / bare loop",
        "{cached-mlp64}; {hard-over-bare-mlp64}",
    ),
    (
        "224 px JPEGs at 64 px: hard targets, one view a decode / cached, four draws a decode",
        "{draws-of-a-decode:.1f}",
    ),
    (
        "stage one / the teacher's bare inference, images a second",
        "{stage-one-float32} in float32, {stage-one-bfloat16} in bfloat16",
    ),
    (
        "plain float32 loop over 50,000 images / stage one, seconds",
        "{naive-stage-one-float32:.1f} in float32, {naive-stage-one-bfloat16:.1f} in bfloat16",
    ),
    (
        "four students from one stream / four runs",
        "{one-stream-files} from 224 px JPEGs, {one-stream-memory} in memory",
    ),
    (
        "32 students `mlp:32` as one model / 32 runs; 8 of `mlp:800,800`",
        "{vectorised-32}; {vectorised-8}",
    ),
    (
        "bytes of a view, everything included: 10 classes; 100; 1,000 in `sqrt8`",
        "{bytes-10:.1f}; {bytes-100:.1f}; {bytes-1000-sqrt8:,.0f}",
    ),
    (
        "rows of 2 kB in shuffled blocks / reading the file from end to end",
        "{reads-warm} warm, {reads-cold} cold",
    ),
    (
        "one file a row; HDF5 row by row; LMDB; webdataset / ours, reading",
        "{reads-files:.0f}; {reads-hdf5:.0f}; {reads-lmdb:.1f}; {reads-webdataset:.0f}",
    ),
)


def update(text: str, results: Results) -> str:
    """A document with the tables of these results in their places. Raises KeyError for a table there is none of."""
    return _PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]](results)}\n{place[3]}", text)


def make_results_table(results: Results) -> str:
    """A line of each row: its goal, the median, least and most, and what is measured."""
    definitions = {row.name: row for row in ROWS}
    lines = ["| row | goal | median (least to most) | what it is |", "|---|---|---|---|"]
    for row in results["rows"]:
        definition = definitions[row["name"]]
        goal = "" if row["goal"] is None else f"{'≥' if definition.at_least else '≤'} {row['goal']:g}"
        lines.append(f"| `{row['name']}` | {goal} | {_format_result(row)} | {definition.description} |")
    return "\n".join(lines)


def make_machine_line(results: Results) -> str:
    """Where the results were measured, and with what."""
    machine, versions = results["machine"], results["versions"]
    names = {"python": "Python", "torch": "PyTorch", "numpy": "NumPy", "pillow": "Pillow", "lmdb": "LMDB"}
    parts = ", ".join(f"{names.get(name, name)} {version}" for name, version in versions.items())
    text = f"{machine['cpus']} CPU cores ({machine['cpu']}), {machine['threads']} threads; {parts}."
    return "\n".join(textwrap.wrap(text, 120))


def _make_lines(results: Results, lines: tuple[tuple[str, str], ...]) -> str:
    medians = {row["name"]: row["median"] for row in results["rows"]}

    def format_median(place: re.Match[str]) -> str:
        median = medians[place[1]]
        return "not measured" if median is None else format(median, place[2] or ".2f")

    machine = results["machine"]
    device = "no GPU" if machine["device"].startswith("cpu") else machine["device"]
    head = f"| {machine['cpus']} CPU cores, {device}, PyTorch {results['versions']['torch']} | |"
    return "\n".join([head, "|---|---|", *(f"| {text} | {_VALUE.sub(format_median, line)} |" for text, line in lines)])


TABLES: dict[str, Callable[[Results], str]] = {
    "results": make_results_table,
    "machine": make_machine_line,
    "summary": lambda results: _make_lines(results, _SUMMARY),
    "short": lambda results: _make_lines(results, _SHORT),
}


def _format_result(row: dict[str, Any]) -> str:
    if row["median"] is None:
        return f"not measured: {row['why']}"
    least, most = row["spread"]
    text = _format_value(row["median"])
    if least != most:
        text += f" ({_format_value(least)} to {_format_value(most)})"
    if row.get("vectors", _VECTORS) != _VECTORS:
        text += f" {row['vectors']}"
    return f"**{text}, missed**" if row["reached"] is False else text


def _format_value(value: float) -> str:
    """Three digits; one decimal from 100 on, none from 1,000 on."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:#.3g}"


def main(arguments: list[str] | None = None) -> int:
    """0 when every document is current, or has been written; 1 with --check where one is not."""
    parser = argparse.ArgumentParser(prog="bench.document", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where a document is not current"
    )
    is_check = parser.parse_args(arguments).check
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    stale = 0
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        if (new := update(text, results)) == text:
            continue
        stale += 1
        if is_check:
            print(f"{path.relative_to(ROOT)} is out of date: run  make docs", file=sys.stderr)
        else:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return int(is_check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
