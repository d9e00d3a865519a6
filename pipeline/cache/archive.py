"""A cache as one tar file, and back: a plain ustar that `tar` reads too, its manifest first."""

import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import xxhash

from softcache.base.errors import CacheError
from softcache.base.files import make_folder, open_regular_file, publish, remove_stale_files
from softcache.base.lock import LOCK, hold_lock

from .folder import HEAD_FILE, MANIFEST_FILE, README_FILE
from .manifest import MAX_MANIFEST_BYTES, Manifest
from .manifest_reader import parse_manifest, read_manifest
from .shards import hash_file

_CARD_MOST = 1 << 20
_ROOT_MOST = 60  # bytes: with the rest of a shard's name they fit a tar header
_BLOCK, _PIECE = 512, 1 << 22
OnProgress = Callable[[int], None]  # called with the bytes that are done


def pack_cache(folder: Path, manifest: Manifest, file: Path, shown: OnProgress) -> None:
    """Publish a tar of a cache. Raises CacheError when a file is not what the manifest says.

    Equal caches in folders of one name give equal tar files: no times, no owners.
    """
    root = folder.resolve().name
    if not 0 < len(root.encode(errors="replace")) <= _ROOT_MOST or not root.isprintable():
        root = "cache"

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, size, checksum in [(MANIFEST_FILE, -1, ""), (README_FILE, -1, ""), *_files(manifest)]:
                if name == README_FILE and not (folder / README_FILE).exists():
                    continue
                _add(tar, folder, f"{root}/{name}", name, size, checksum, shown)

    publish(file, write)


def _files(manifest: Manifest) -> list[tuple[str, int, str]]:
    """(name, bytes, checksum) of every file that the manifest vouches for."""
    head = [(HEAD_FILE, manifest.head.bytes, manifest.head.checksum)] if manifest.head else []
    return head + [(record.path, record.bytes, record.checksum) for record in manifest.shards]


def _add(
    tar: tarfile.TarFile, folder: Path, member: str, name: str, size: int, checksum: str, shown: OnProgress
) -> None:
    with os.fdopen(open_regular_file(folder, name), "rb") as file:
        info = tarfile.TarInfo(member)
        info.size, info.mode = os.fstat(file.fileno()).st_size, 0o644
        if size >= 0 and info.size != size:
            raise CacheError(f"{folder / name}: {info.size} bytes instead of {size}: check-cache tells more")
        hashed = _Hashed(file, shown)
        try:
            tar.addfile(info, hashed)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno is not None:
                raise
            raise CacheError(f"{folder / name}: cut while it was read ({error})") from None
    if checksum and hashed.digest.hexdigest() != checksum:
        raise CacheError(f"{folder / name}: damaged, its checksum is not the manifest's: check-cache tells more")


class _Hashed:
    """A file that hashes what is read from it."""

    def __init__(self, file: BinaryIO, shown: OnProgress):
        self.file, self.shown, self.digest = file, shown, xxhash.xxh3_128()

    def read(self, count: int) -> bytes:
        block = self.file.read(count)
        self.digest.update(block)
        self.shown(len(block))
        return block


def unpack_cache(file: Path, folder: Path, begun: Callable[[Manifest], OnProgress]) -> Manifest:
    """Take a cache out of a tar that pack has made, its manifest last. Stopped, the same call goes on.

    Nothing in the tar is trusted: only regular members that its manifest names are taken, each under that name,
    and each is published when its size and checksum are right. begun: told the manifest, gives what to tell the
    bytes that are done. Raises CacheError.
    """
    with open(file, "rb") as tar:
        members = _members(tar, file)
        root, size = next(members, ("", 0))
        root, _, name = root.partition("/")
        if name != MANIFEST_FILE or size > MAX_MANIFEST_BYTES:
            raise CacheError(f"'{file}' is no packed cache: it does not begin with {MANIFEST_FILE}")
        text = tar.read(size)
        manifest = parse_manifest(text, file)
        make_folder(folder)
        with hold_lock(folder):
            _check_destination(folder, manifest, file)
            shown = begun(manifest)
            wanted = {name: (size, checksum) for name, size, checksum in _files(manifest)}
            for member, size in members:
                _extract_member(tar, folder, member.removeprefix(f"{root}/"), size, wanted, shown, file)
            if wanted:
                raise CacheError(f"'{file}' ends without {next(iter(wanted))} ({len(wanted)} files): it was cut")
            if not (folder / MANIFEST_FILE).exists():
                publish(folder / MANIFEST_FILE, lambda path: _write(path, text))
    return read_manifest(folder)


def _members(tar: BinaryIO, file: Path) -> Iterator[tuple[str, int]]:
    """(name, bytes) of each member, the file standing at its first byte; whatever is not read of it is passed over."""
    while block := tar.read(_BLOCK):
        if block == bytes(_BLOCK):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise CacheError(f"'{file}' is no tar file, or is damaged ({str(error)[:80]})") from None
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise CacheError(f"'{file}' holds {ascii(info.name)[:80]}, which is no plain file: not made by cache-pack")
        if info.size < 0:
            raise CacheError(f"'{file}' holds {ascii(info.name)[:80]} of {info.size} bytes: it is damaged")
        begin = tar.tell()
        yield info.name, info.size
        tar.seek(begin + -(-info.size // _BLOCK) * _BLOCK)
    raise CacheError(f"'{file}' ends in the middle: it was cut")


def _check_destination(folder: Path, manifest: Manifest, file: Path) -> None:
    """The folder is empty, or holds the beginning of this very cache; there is space for it."""
    if (folder / MANIFEST_FILE).exists() and read_manifest(folder).digest != manifest.digest:
        raise CacheError(f"'{folder}' holds another cache than '{file}': choose another folder")
    names = {name for name, _, _ in _files(manifest)}
    places = {"": [MANIFEST_FILE, README_FILE]}
    for name in names:
        inner, _, last = name.rpartition("/")
        places.setdefault(inner, []).append(last)
    for inner, last_names in places.items():
        if (folder / inner).is_dir() and not (folder / inner).is_symlink():
            remove_stale_files(folder / inner, last_names)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    if strange := sorted(there - names - {MANIFEST_FILE, README_FILE, LOCK}):
        raise CacheError(f"'{folder}' holds {strange[0]}, which is not of '{file}': choose another folder")
    if links := [path for path in folder.rglob("*") if path.is_symlink()]:
        raise CacheError(f"'{links[0]}' is a link: remove it, or choose another folder")
    need = sum(size for name, size, _ in _files(manifest) if not (folder / name).exists())
    if need > (free := shutil.disk_usage(folder).free):
        raise CacheError(f"'{file}' needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free at '{folder}'")


def _extract_member(
    tar: BinaryIO,
    folder: Path,
    name: str,
    size: int,
    wanted: dict[str, tuple[int, str]],
    shown: OnProgress,
    file: Path,
) -> None:
    """Publish the member that the tar stands at."""
    if name == README_FILE and size <= _CARD_MOST:
        if (text := tar.read(size)) and not (folder / README_FILE).exists():  # one that is there may have been edited
            publish(folder / README_FILE, lambda path: _write(path, text))
        return
    if name not in wanted:
        raise CacheError(
            f"'{file}' holds {ascii(name)[:80]}, which its manifest does not name: nothing of it was taken"
        )
    if size != wanted[name][0]:
        raise CacheError(f"'{file}': {name} has {size} bytes instead of {wanted[name][0]}")
    checksum = wanted.pop(name)[1]
    path = folder / name
    if path.exists() and _checksum(folder, name) == checksum:
        return shown(size)
    make_folder(path.parent)
    publish(path, lambda temporary: _copy(tar, temporary, name, size, checksum, shown, file))


def _copy(tar: BinaryIO, path: Path, name: str, size: int, checksum: str, shown: OnProgress, file: Path) -> None:
    digest = xxhash.xxh3_128()
    with open(path, "wb") as out:
        while size:
            block = tar.read(min(size, _PIECE))
            if not block:
                raise CacheError(f"'{file}' ends inside {name}: it was cut")
            digest.update(block)
            out.write(block)
            size -= len(block)
            shown(len(block))
    if digest.hexdigest() != checksum:
        raise CacheError(f"'{file}': {name} is damaged: its checksum is not the manifest's")


def _checksum(folder: Path, name: str) -> str:
    fd = open_regular_file(folder, name)
    try:
        return hash_file(fd)
    finally:
        os.close(fd)


def _write(path: Path, text: bytes) -> None:
    path.write_bytes(text)
