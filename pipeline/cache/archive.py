"""A cache as one tar file, and back: a plain ustar that `tar` reads too, with the manifest as its first member.

Nothing in a tar is trusted. It is read block by block and not by `tarfile`, which reads a pax or GNU header of any
size into memory before it can be refused.
"""

import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import BinaryIO, NamedTuple

import xxhash

from softcache.base.errors import CacheError, make_printable
from softcache.base.files import make_folder, open_regular_file, publish, remove_stale_files
from softcache.base.lock import LOCK, hold_lock

from .folder import HEAD_FILE, MANIFEST_FILE, README_FILE
from .manifest import MAX_MANIFEST_BYTES, Manifest
from .manifest_reader import parse_manifest, read_manifest
from .shards import hash_file

_MAX_README_BYTES = 1 << 20
_MAX_ROOT_BYTES = 60  # with the rest of a shard's path they fit into a tar header
_BLOCK_BYTES = 512  # of a tar
_COPY_BYTES = 1 << 22  # that are copied at once
OnProgress = Callable[[int], None]  # called with a number of bytes that are done


class _ListedFile(NamedTuple):
    """A file of a cache that its manifest lists."""

    path: str
    size: int
    checksum: str


def _list_files(manifest: Manifest) -> list[_ListedFile]:
    head = [_ListedFile(HEAD_FILE, manifest.head.bytes, manifest.head.checksum)] if manifest.head else []
    return head + [_ListedFile(record.path, record.bytes, record.checksum) for record in manifest.shards]


# Packing


def pack_cache(folder: Path, manifest: Manifest, file: Path, progress: OnProgress) -> None:
    """Publish a cache as a tar file.

    Equal caches in folders of the same name give equal tar files: they contain no times and no owners.

    Args:
        folder: Of the cache.
        manifest: Of the cache.
        file: Of the tar.
        progress: Called with the bytes of each block that was packed.

    Raises:
        CacheError: A file is missing, or is not the one that the manifest lists.
    """
    root = folder.resolve().name
    if not 0 < len(root.encode(errors="replace")) <= _MAX_ROOT_BYTES or not root.isprintable():
        root = "cache"

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            _add_file(tar, root, folder, MANIFEST_FILE, progress)
            if (folder / README_FILE).exists():
                _add_file(tar, root, folder, README_FILE, progress)
            for listed in _list_files(manifest):
                _add_file(tar, root, folder, listed.path, progress, listed)

    publish(file, write)


def _add_file(
    tar: tarfile.TarFile,
    root: str,
    folder: Path,
    path: str,
    progress: OnProgress,
    listed: _ListedFile | None = None,
) -> None:
    """Add folder/path to a tar as root/path; where it is listed, its size and checksum must be those of the list."""
    with os.fdopen(open_regular_file(folder, path), "rb") as content:
        info = tarfile.TarInfo(f"{root}/{path}")
        info.size, info.mode = os.fstat(content.fileno()).st_size, 0o644
        if listed and info.size != listed.size:
            raise CacheError(
                f"{folder / path}: {info.size} bytes instead of {listed.size}: for the details"
                f"  {_format_check_command(folder)}"
            )
        reader = _HashingReader(content, progress)
        try:
            tar.addfile(info, reader)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno is not None:
                raise
            raise CacheError(f"{folder / path}: cut while it was read ({error})") from None
    if listed and reader.digest.hexdigest() != listed.checksum:
        raise CacheError(
            f"{folder / path}: damaged, its checksum is {reader.digest.hexdigest()} instead of {listed.checksum}:"
            f" for the details  {_format_check_command(folder)}"
        )


def _format_check_command(folder: Path) -> str:
    return f"softcache check-cache {quote(make_printable(folder, None))}"


class _HashingReader:
    """A file that hashes what is read from it, and reports how much that is."""

    def __init__(self, file: BinaryIO, progress: OnProgress):
        self.file, self.progress, self.digest = file, progress, xxhash.xxh3_128()

    def read(self, count: int) -> bytes:
        block = self.file.read(count)
        self.digest.update(block)
        self.progress(len(block))
        return block


# Unpacking


def unpack_cache(file: Path, folder: Path, start_progress: Callable[[Manifest], OnProgress]) -> Manifest:
    """Unpack a cache from a tar file that `pack_cache` made. When it was stopped, the same call goes on.

    Only regular members that the manifest of the tar lists are unpacked, each under the name in the list, and each is
    published when its size and checksum are right. The manifest is published last.

    Args:
        file: The tar.
        folder: Of the cache to be.
        start_progress: Called with the manifest; what it returns is called with the bytes of each block that is done.

    Returns:
        The manifest of the cache.

    Raises:
        CacheError: The tar is damaged or no packed cache, the folder holds something else, or there is too little
            space.
    """
    with open(file, "rb") as tar:
        members = _read_members(tar, file)
        path, size = next(members, ("", 0))
        root, _, name = path.partition("/")
        if name != MANIFEST_FILE or size > MAX_MANIFEST_BYTES:
            raise CacheError(f"'{file}' is no packed cache: it does not begin with {MANIFEST_FILE}")
        text = tar.read(size)
        manifest = parse_manifest(text, file)
        make_folder(folder)
        with hold_lock(folder):
            _check_destination(folder, manifest, file)
            missing = {listed.path: listed for listed in _list_files(manifest)}
            unpacker = _Unpacker(tar, file, folder, missing, start_progress(manifest))
            for path, size in members:
                unpacker.extract(path.removeprefix(f"{root}/"), size)
            if missing:
                raise CacheError(f"'{file}' ends without {next(iter(missing))} ({len(missing)} files): it was cut")
            if not (folder / MANIFEST_FILE).exists():
                _publish_bytes(folder / MANIFEST_FILE, text)
    return read_manifest(folder)


def _read_members(tar: BinaryIO, file: Path) -> Iterator[tuple[str, int]]:
    """Iterate over (path, bytes) of the members of a tar.

    The tar is then at the first byte of the member's content; what is not read of it is skipped.
    """
    while block := tar.read(_BLOCK_BYTES):
        if block == bytes(_BLOCK_BYTES):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise CacheError(f"'{file}' is no tar file, or is damaged ({str(error)[:80]})") from None
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise CacheError(f"'{file}' holds {ascii(info.name)[:80]}, which is no plain file: not made by cache-pack")
        if info.size < 0:
            raise CacheError(f"'{file}' holds {ascii(info.name)[:80]} of {info.size} bytes: it is damaged")
        start = tar.tell()
        yield info.name, info.size
        tar.seek(start + -(-info.size // _BLOCK_BYTES) * _BLOCK_BYTES)
    raise CacheError(f"'{file}' ends in the middle: it was cut")


def _check_destination(folder: Path, manifest: Manifest, file: Path) -> None:
    """Check that a folder is empty or holds a part of this very cache, and that there is space for the rest.

    Temporary files of a killed process are removed.
    """
    if (folder / MANIFEST_FILE).exists() and read_manifest(folder).digest != manifest.digest:
        raise CacheError(f"'{folder}' holds another cache than '{file}': choose another folder")
    listed = _list_files(manifest)
    names_by_folder = {"": [MANIFEST_FILE, README_FILE]}
    for path, _, _ in listed:
        inner, _, name = path.rpartition("/")
        names_by_folder.setdefault(inner, []).append(name)
    for inner, names in names_by_folder.items():
        if (folder / inner).is_dir() and not (folder / inner).is_symlink():
            remove_stale_files(folder / inner, names)
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    expected = {MANIFEST_FILE, README_FILE, LOCK, *(path for path, _, _ in listed)}
    if foreign := sorted(present - expected):
        raise CacheError(f"'{folder}' holds {foreign[0]}, which is not of '{file}': choose another folder")
    if links := [path for path in folder.rglob("*") if path.is_symlink()]:
        raise CacheError(f"'{links[0]}' is a link: remove it, or choose another folder")
    needed = sum(size for path, size, _ in listed if not (folder / path).exists())
    if needed > (free := shutil.disk_usage(folder).free):
        raise CacheError(f"'{file}' needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free at '{folder}'")


@dataclass
class _Unpacker:
    """Unpacks the members that follow the manifest.

    Attributes:
        tar: The open tar, at the first byte of a member's content.
        file: Path of the tar, for messages.
        folder: Of the cache to be.
        missing: {path: file of the manifest that has not come yet}.
        progress: Called with the bytes that are done.
    """

    tar: BinaryIO
    file: Path
    folder: Path
    missing: dict[str, _ListedFile]
    progress: OnProgress

    def extract(self, path: str, size: int) -> None:
        """Publish the member of this path and size, unless the folder has it already."""
        if path == README_FILE and size <= _MAX_README_BYTES:
            text = self.tar.read(size)
            if text and not (self.folder / README_FILE).exists():  # the user may have edited the one that is there
                _publish_bytes(self.folder / README_FILE, text)
            return
        if path not in self.missing:
            raise CacheError(f"'{self.file}' holds {ascii(path)[:80]}, which its manifest does not list")
        listed = self.missing[path]
        if size != listed.size:
            raise CacheError(f"'{self.file}': {path} has {size} bytes instead of {listed.size}")
        del self.missing[path]
        target = self.folder / path
        if target.exists() and _hash_regular_file(self.folder, path) == listed.checksum:
            return self.progress(size)
        make_folder(target.parent)
        publish(target, lambda temporary: self._copy(temporary, listed))

    def _copy(self, target: Path, listed: _ListedFile) -> None:
        """Copy the member to a file, and check its checksum."""
        digest, remaining = xxhash.xxh3_128(), listed.size
        with open(target, "wb") as out:
            while remaining:
                block = self.tar.read(min(remaining, _COPY_BYTES))
                if not block:
                    raise CacheError(f"'{self.file}' ends inside {listed.path}: it was cut")
                digest.update(block)
                out.write(block)
                remaining -= len(block)
                self.progress(len(block))
        if digest.hexdigest() != listed.checksum:
            raise CacheError(
                f"'{self.file}': {listed.path} is damaged: its checksum is {digest.hexdigest()} instead of"
                f" {listed.checksum}"
            )


def _hash_regular_file(folder: Path, path: str) -> str:
    fd = open_regular_file(folder, path)
    try:
        return hash_file(fd)
    finally:
        os.close(fd)


def _publish_bytes(path: Path, content: bytes) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    publish(path, write)
