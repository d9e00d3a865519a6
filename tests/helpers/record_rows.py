"""`torchrun … record_rows.py FOLDER PROGRAM …` runs a Python program, and writes which rows its loaders yielded.

Each rank writes FOLDER/rows-RANK.json: the passes over loaders, as of `record_passes`.
"""

import json
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softcache import Batch, CacheLoader


def record_passes() -> tuple[Any, list[dict[str, Any]]]:
    """Make an `__iter__` of CacheLoader that records each pass.

    Returns:
        The method, and the list to which it adds {"split", "draws": [of each batch], "rows": [of all batches]}.
    """
    original, passes = CacheLoader.__iter__, []

    def iterate(loader: CacheLoader) -> Iterator[Batch]:
        record: dict[str, Any] = {"split": loader.stream.name, "draws": [], "rows": []}
        passes.append(record)
        for batch in original(loader):
            record["draws"].append(batch.draw)
            record["rows"].extend(batch.index.tolist())
            yield batch

    return iterate, passes


def main(folder: str, program: str, *arguments: str) -> None:
    """Run the program as __main__, and write its passes."""
    CacheLoader.__iter__, passes = record_passes()  # type: ignore[method-assign]
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
    Path(folder, f"rows-{os.environ['RANK']}.json").write_text(json.dumps(passes), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
