"""Signed records of what data files hold, kept outside the data, so that unchanged files are not read again.

The folder of the records holds a random key, and every record is signed with it (HMAC-SHA256 over its name and its
content): a record that is damaged, was made elsewhere or was renamed is not believed.
"""

import hmac
import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.files import publish, read_regular_file
from softcache.base.user_cache import KEY, KEY_BYTES, find_user_folder, load_key, sign

NO_INDEX = "none"  # the value of --index that turns the records off
RACY_NS = 2_000_000_000  # a file that changed so shortly before may change again within the clock's resolution
_MAGIC = b"softcache index1"
_MAX_BYTES = 1 << 32  # of a record
Columns = dict[str, NDArray[Any]]


class ContentIndex:
    """A folder of signed records.

    Args:
        folder: The folder, which is made when the first record is written; None keeps no records.
        is_required: Whether an error is raised where the folder cannot be used; else one note says so.
        rehash: Whether records are written, but not read.

    Attributes:
        folder: The folder, or None.
        notes: Lines for the user about records that were not believed or cannot be written.
    """

    def __init__(self, folder: Path | None, is_required: bool = False, rehash: bool = False):
        self.folder, self.is_required, self.rehash = folder, is_required, rehash
        self.notes: list[str] = []

    def read(self, kind: str, path: Path) -> tuple[dict[str, Any], Columns] | None:
        """Read the record of a path.

        Args:
            kind: What is recorded, a word that is part of the record's file name.
            path: The file or folder that it is about.

        Returns:
            What was written, or None where there is no record, it is not believed, or everything is to be read again.
        """
        if self.folder is None or self.rehash:
            return None
        name = _name_record(kind, path)
        if not os.path.lexists(self.folder / name):
            return None
        try:
            key = read_regular_file(self.folder, KEY, KEY_BYTES)
            content = memoryview(read_regular_file(self.folder, name, _MAX_BYTES))
            signature, payload = content[len(_MAGIC) : len(_MAGIC) + 32], content[len(_MAGIC) + 32 :]
            if content[: len(_MAGIC)] != _MAGIC or not hmac.compare_digest(
                signature, sign(key, _MAGIC, name, payload)
            ):
                raise CacheError(f"{self.folder / name}: its signature is wrong")
            return _decode(payload)
        except (CacheError, OSError, ValueError, KeyError, TypeError):
            self._note(
                f"the record of '{make_printable(path)}' in '{make_printable(self.folder)}' is damaged or was made"
                " with another key: everything is read again"
            )
            return None

    def write(self, kind: str, path: Path, header: Mapping[str, Any], columns: Columns) -> None:
        """Write the record of a path, in the place of an older one.

        Args:
            kind, path: As in `read`.
            header: What JSON can express.
            columns: Arrays of numbers.

        Raises:
            CacheError: The folder was named by the user, and cannot be written.
        """
        if self.folder is None:
            return
        name = _name_record(kind, path)
        payload = _encode(header, columns)
        try:
            signature = sign(load_key(self.folder), _MAGIC, name, payload)

            def write(temporary: Path) -> None:
                with open(temporary, "wb") as file:
                    file.writelines((_MAGIC, signature, payload))

            publish(self.folder / name, write)
        except (OSError, CacheError) as error:
            self.refuse_folder(error)

    def name_copy(self, kind: str, path: Path) -> str:
        """Return the name in the folder of a copy of what a file holds."""
        return f"{_name_record(kind, path)}-copy"

    def refuse_folder(self, error: Exception) -> None:
        """Raise CacheError where the user named the folder, else note once that nothing can be recorded in it."""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        text = f"what the data hold cannot be recorded in '{make_printable(self.folder)}' ({make_printable(reason)})"
        if self.is_required:
            raise CacheError(f"--index: {text}: name another folder, or --index none") from None
        self._note(f"{text}: the next command reads all of it again; --index FOLDER names another place")

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)


def open_index(index: str | Path = "", rehash: bool = False) -> ContentIndex:
    """Open the folder that --index names.

    Args:
        index: A folder; "" for `softcache` in the user's cache folder ($XDG_CACHE_HOME, or ~/.cache); "none" to keep
            no records.
        rehash: Whether everything is to be read again, and recorded again.

    Raises:
        UsageError: It is a file.
    """
    if str(index) == NO_INDEX:
        return ContentIndex(None)
    if not str(index):
        return ContentIndex(find_user_folder(), rehash=rehash)
    if Path(index).exists() and not Path(index).is_dir():
        raise UsageError(f"--index '{make_printable(index)}' is a file: name a folder, or none to keep no records")
    return ContentIndex(Path(index).absolute(), is_required=True, rehash=rehash)


def is_racy(stamps: NDArray[np.int64], now_ns: int) -> NDArray[np.bool_]:
    """Return which files may change once more without another stamp, bool [N].

    Args:
        stamps: int64 [N, 4], see file_records.Stamp.
        now_ns: The time before the files were read.
    """
    racy: NDArray[np.bool_] = stamps[:, 2:4].max(1, initial=0) > now_ns - RACY_NS
    return racy


def _name_record(kind: str, path: Path) -> str:
    return f"{sha256(os.fsencode(path.absolute())).hexdigest()[:32]}.{kind}"


def _encode(header: Mapping[str, Any], columns: Columns) -> bytes:
    arrays = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    shapes = {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()}
    text = json.dumps({"header": header, "columns": shapes}).encode()
    return b"".join((len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in arrays.values())))


def _decode(payload: memoryview) -> tuple[dict[str, Any], Columns]:
    """Decode a record; raise ValueError, KeyError or TypeError where it has another form."""
    start = 8 + int.from_bytes(payload[:8], "little")
    record = json.loads(bytes(payload[8:start]))
    columns: Columns = {}
    for name, (dtype, shape) in record["columns"].items():
        count = int(np.prod(shape, dtype=np.int64))
        columns[name] = np.frombuffer(payload, np.dtype(dtype), count, start).reshape(shape)
        start += columns[name].nbytes
    if start != len(payload):
        raise ValueError("a record of another length")
    return dict(record["header"]), columns
