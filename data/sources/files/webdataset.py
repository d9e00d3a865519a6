"""WebDataset shards: tar files in which the files of a sample follow each other, named KEY.jpg, KEY.cls, KEY.json.

A shard is read once, header by header; from then on each image is read by its offset.
"""

import json
import re
import tarfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.files import open_input_file
from softcache.base.progress import Progress
from softcache.data.sources.source_data import ReadingOptions, SourceData

from .encoded_rows import EncodedSource, load_encoded_rows
from .file_rows import FileRows, RowCollector

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm")
_MAX_LABEL_BYTES = 1 << 20  # of a .cls or .json file
_LABEL_KEYS = ("label", "cls")  # of a .json file
_COMPRESSIONS = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
SPECIAL, OTHER_FILES, NO_IMAGE = "links, sparse files or devices", "files of other endings", "samples without an image"


class _Member(NamedTuple):
    name: str
    key: str
    ending: str
    offset: int
    size: int


def load_webdataset(argument: str, options: ReadingOptions, progress: Progress) -> SourceData:
    """Load tar shards.

    Args:
        argument: A path, pattern, braces or folder, see `data_files.list_data_files`.
        options: The names of the classes, the EXIF orientation, images that cannot be decoded, and the index.
        progress: Shows how many megabytes are read.

    Raises:
        UsageError: There is no such file, a shard is compressed, or labels do not fit together.
        CacheError: A shard is damaged or cut off, or an image cannot be decoded.
    """
    return load_encoded_rows(argument, EncodedSource("webdataset", (".tar",), _read_shard), options, progress)


def _read_shard(path: Path) -> Generator[int, None, FileRows]:
    """List the samples of a shard that have an image; see RowReader."""
    rows = RowCollector(f"'{make_printable(path, None)}'")
    with open_input_file(path) as file:
        _refuse_compressed(file, path)
        for key, sample in _group_samples(_list_members(file, path, rows)):
            image = _choose_image(sample, path, key)
            if image is None:
                rows.leave_out(NO_IMAGE)
                continue
            label, used = _read_label(file, sample, path)
            rows.add(image.offset, _read_member(file, image), label, image.name)
            rows.leave_out(OTHER_FILES, len(sample) - 1 - used)
            yield image.size
    return rows.finish()


def _refuse_compressed(file: BinaryIO, path: Path) -> None:
    start = file.read(8)
    for magic, (name, command) in _COMPRESSIONS.items():
        if start.startswith(magic):
            raise UsageError(
                f"'{make_printable(path, None)}' is compressed by {name}, and its images cannot be read one by one:"
                f" uncompress it first ({command})"
            )
    file.seek(0)


def _list_members(file: BinaryIO, path: Path, rows: RowCollector) -> Iterator[_Member]:
    """Yield the plain files of a tar file that have a key and an ending.

    Raises:
        CacheError: It is no tar file, or is damaged or cut off.
    """
    file_bytes = file.seek(0, 2)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps them all
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    rows.leave_out(SPECIAL)
                    continue
                if info.offset_data + info.size > file_bytes:
                    raise tarfile.ReadError("unexpected end of data")
                if match := re.match(r"((?:.*/|)[^./]+)[.]([^/]*)$", info.name, re.DOTALL):
                    yield _Member(info.name, match[1], match[2].lower(), info.offset_data, info.size)
                else:
                    rows.leave_out(OTHER_FILES)
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise CacheError(f"'{make_printable(path, None)}' is no tar file, or is damaged: {error}") from None
    _check_end(file, end, file_bytes, path)


def _check_end(file: BinaryIO, end: int, file_bytes: int, path: Path) -> None:
    """Check that nothing but zeros follows the last member: a file that is cut off has no end mark."""
    if end + 512 > file_bytes:
        raise CacheError(f"'{make_printable(path, None)}' is cut off: it has no end mark. Copy it again")
    file.seek(end)
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise CacheError(
                f"'{make_printable(path, None)}' has data behind its end mark: several tar files in one are not read"
            )


def _group_samples(members: Iterator[_Member]) -> Iterator[tuple[str, list[_Member]]]:
    """Yield the members of each sample, which follow each other."""
    sample: list[_Member] = []
    for member in members:
        if sample and member.key != sample[0].key:
            yield sample[0].key, sample
            sample = []
        sample.append(member)
    if sample:
        yield sample[0].key, sample


def _choose_image(sample: list[_Member], path: Path, key: str) -> _Member | None:
    """Return the image of a sample; None where it has none.

    Raises:
        CacheError: It has several.
    """
    images = [member for member in sample if member.ending in IMAGE_ENDINGS]
    if len(images) > 1:
        raise CacheError(
            f"'{make_printable(path, None)}', sample '{make_printable(key)}' has {len(images)} images"
            f" ({', '.join(make_printable(image.name) for image in images[:5])}): one is expected"
        )
    return images[0] if images else None


def _read_member(file: BinaryIO, member: _Member) -> bytes:
    position = file.tell()  # tarfile goes on from there
    file.seek(member.offset)
    content = file.read(member.size)
    file.seek(position)
    return content


def _read_label(file: BinaryIO, sample: list[_Member], path: Path) -> tuple[Any, int]:
    """Read the label of a sample, of its .cls or else of its .json file.

    Returns:
        A number, a text or None, and how many members were read.

    Raises:
        CacheError: The file is too large, or cannot be read as what it is named.
    """
    by_ending = {member.ending: member for member in sample}
    member = by_ending.get("cls") or by_ending.get("json")
    if member is None:
        return None, 0
    place = f"'{make_printable(path, None)}', {make_printable(member.name)}"
    if member.size > _MAX_LABEL_BYTES:
        raise CacheError(f"{place} has {member.size:,} bytes, more than a label's file may have")
    try:
        text = _read_member(file, member).decode()
        if member.ending == "cls":
            text = text.strip()
            is_number = re.fullmatch(r"[+-]?\d{1,18}(\.0*)?", text)
            return (int(text.partition(".")[0]) if is_number else text or None), 1
        record = json.loads(text)
    except (ValueError, RecursionError):
        kind = "text" if member.ending == "cls" else "JSON"
        raise CacheError(f"{place} is no {kind}") from None
    if not isinstance(record, dict):
        return None, 1
    return next((record[key] for key in _LABEL_KEYS if key in record), None), 1
