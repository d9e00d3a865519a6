"""Files that are whole or absent: temporary file, fsync, rename, fsync of the folder."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Let write make a temporary file beside path, make it durable, and give it its name.

    Whatever happens in between, path is the old file or the new one. Raises what write raises and OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def publish_json(path: Path, content: Any) -> None:
    """Publish content as indented JSON; NaN and infinity are refused, for they are not JSON."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    publish(path, write)
