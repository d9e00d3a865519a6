"""What data files hold is recorded once: unchanged files are not read again, changed ones are, no record is forged."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softcache
from softcache.base.errors import CacheError, UsageError
from softcache.data import content_index
from softcache.data.content_index import ContentIndex, open_index
from softcache.data.transfer_set import TransferSet, load_transfer_set
from tests.helpers.commands import Stages
from tests.helpers.data_files import make_splits, write_folder, write_parquet, write_shards
from tests.helpers.paths import ROOT


def list_notes(data: TransferSet) -> list[str]:
    """Return what is printed of the data, but for how a folder was read."""
    return [note for note in data.notes if not note.startswith("folder '")]


class Files:
    """A folder of images and an index; counts the files that are read."""

    def __init__(self, root: Path):
        self.root, self.index = root, root / "index"
        self.data = write_folder(root / "pets", make_splits())
        self.read: list[str] = []

    def load(self, data: str = "", rehash: bool = False, index: Path | str | None = None) -> TransferSet:
        """Load the data; `read` has the texts of progress, one for each item."""
        self.read.clear()

        def progress(items: Any, total: int, text: str) -> Iterator[Any]:
            for item in items:
                self.read.append(text)
                yield item

        records = open_index(self.index if index is None else index, rehash)
        return load_transfer_set(data or self.data, Path(), val_fraction=0.2, index=records, progress=progress)

    def records(self) -> list[Path]:
        """The records in the index."""
        return sorted(path for path in self.index.iterdir() if path.name != "key")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setattr(content_index, "RACY_NS", -(10**12))  # as if the files were older
    return Files(tmp_path)


def test_unchanged_files_are_not_read_again(files: Files) -> None:
    first = files.load()
    assert files.read.count("reading images") == 42
    second = files.load()
    assert files.read == []
    assert first.identity() == second.identity()
    assert list_notes(second) == []


def test_a_changed_file_is_read_again_and_found(files: Files) -> None:
    identity = files.load().identity()
    path = files.root / "pets/train/bee/0001.jpg"
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # size and time of change are the old ones
    changed = files.load()
    assert files.read == ["reading images"]
    assert changed.identity() != identity
    assert changed.identity() == files.load(index="none").identity()


def test_new_renamed_and_removed_files_are_seen(files: Files) -> None:
    files.load()
    folder = files.root / "pets/train/ant"
    shutil.copy(folder / "0000.jpg", folder / "new.jpg")
    (folder / "0001.jpg").rename(folder / "renamed.jpg")
    (folder / "0002.jpg").unlink()
    loaded = files.load()
    assert len(files.read) == 2
    assert loaded.identity() == files.load(index="none").identity()
    files.load()
    assert files.read == []


def test_another_folder_of_the_same_name_is_read(files: Files) -> None:
    files.load()
    shutil.copytree(files.root / "pets", files.root / "copy")
    shutil.rmtree(files.root / "pets")
    (files.root / "copy").rename(files.root / "pets")
    files.load()
    assert len(files.read) == 42


def test_rehash_reads_everything_and_records_it_anew(files: Files) -> None:
    identity = files.load().identity()
    assert files.load(rehash=True).identity() == identity
    assert len(files.read) == 42
    files.load()
    assert files.read == []


def test_no_records_are_kept_where_none_are_wanted(files: Files) -> None:
    for _ in range(2):
        files.load(index="none")
        assert len(files.read) == 42
    assert not files.index.exists()


@pytest.mark.parametrize("damage", ["flipped byte", "cut off", "empty", "another key", "no key", "another record"])
def test_a_record_that_is_damaged_or_forged_is_not_believed(files: Files, damage: str) -> None:
    identity = files.load().identity()
    (record,) = files.records()
    content = bytearray(record.read_bytes())
    if damage == "flipped byte":
        content[-3] ^= 1  # of a recorded digest or stamp
        record.write_bytes(content)
    elif damage in ("cut off", "empty"):
        record.write_bytes(content[:-40] if damage == "cut off" else b"")
    elif damage == "another key":
        (files.index / "key").write_bytes(bytes(32))
    elif damage == "no key":
        (files.index / "key").unlink()
    else:
        shutil.copytree(files.root / "pets", files.root / "other")
        files.load(f"folder:{files.root}/other")
        other = next(path for path in files.records() if path != record)
        record.write_bytes(other.read_bytes())
    loaded = files.load()
    assert len(files.read) == 42
    assert loaded.identity() == identity
    assert len(list_notes(loaded)) == 1
    assert "is damaged or was made with another key: everything is read again" in list_notes(loaded)[0]
    assert list_notes(files.load()) == []
    assert files.read == []


def test_the_key_is_private_and_one_that_others_can_write_is_replaced(files: Files) -> None:
    files.load()
    key = files.index / "key"
    assert key.stat().st_mode & 0o777 == 0o600
    old = key.read_bytes()
    key.chmod(0o666)
    files.load(rehash=True)
    assert key.read_bytes() != old
    assert key.stat().st_mode & 0o777 == 0o600


def test_files_that_changed_just_now_are_not_recorded(tmp_path: Path) -> None:
    files = Files(tmp_path)  # without the older clock
    for _ in range(2):
        files.load()
        assert len(files.read) == 42
    assert not files.index.exists()


def test_a_place_that_cannot_be_written_is_a_note_or_an_error(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    (files.root / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(files.root / "file"))
    loaded = files.load(index="")
    assert len(list_notes(loaded)) == 1
    assert "cannot be recorded in" in list_notes(loaded)[0]
    assert "--index FOLDER names another place" in list_notes(loaded)[0]
    with pytest.raises(CacheError, match="--index: what the data hold cannot be recorded in"):
        files.load(index=files.root / "file/index")
    with pytest.raises(UsageError, match="is a file: name a folder, or none"):
        open_index(files.root / "file")


@pytest.mark.parametrize(("cache_home", "folder"), [("/x/cache", "/x/cache/softcache"), ("", "~"), ("relative", "~")])
def test_the_default_place(monkeypatch: pytest.MonkeyPatch, cache_home: str, folder: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
    monkeypatch.setenv("HOME", "/home/u")
    expected = "/home/u/.cache/softcache" if folder == "~" else folder
    assert open_index().folder == Path(expected)


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_data_files_are_listed_once(files: Files, form: str) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    write_files = write_shards if form == "webdataset" else write_parquet
    data = write_files(files.root / "files", make_splits())
    first = files.load(data)
    assert len(files.records()) == (3 if form == "webdataset" else 6)  # parquet: and the copies
    for path in sorted((files.root / "files").iterdir()):
        path.chmod(0)  # a file without permission cannot be read, but by root
    if os.geteuid():
        assert files.load(data).identity() == first.identity()
    for path in sorted((files.root / "files").iterdir()):
        path.chmod(0o644)
    again = files.load(data)
    assert again.identity() == first.identity()
    write_files(files.root / "files", {split: images[::-1] for split, images in make_splits().items()})
    assert files.load(data).identity() != first.identity()


def test_a_missing_copy_is_made_again(files: Files) -> None:
    pytest.importorskip("pyarrow")
    data = write_parquet(files.root / "files", make_splits())
    identity = files.load(data).identity()
    copy = next(path for path in files.records() if path.name.endswith("-copy"))
    copy.unlink()
    loaded = files.load(data)
    assert loaded.identity() == identity
    assert "1 parquet files are compressed" in list_notes(loaded)[0]
    content = bytearray(copy.read_bytes())
    content[7] ^= 1
    copy.write_bytes(content)
    with pytest.raises(CacheError, match=r"in the copy .*, has other bytes than when .* start again with --rehash"):
        files.load(data)  # looks at all of so few images
    assert files.load(data, rehash=True).identity() == identity


def test_compressed_parquet_needs_a_place_for_its_copy(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    data = write_parquet(files.root / "files", make_splits())
    with pytest.raises(UsageError, match="--index none leaves no place for them"):
        files.load(data, index="none")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(CacheError, match=r"takes up to 0.0 GB beside the index: .* has 0.0 GB left"):
        files.load(data)


def test_two_writers_at_once_leave_one_record_that_is_believed(tmp_path: Path) -> None:
    first, second = ContentIndex(tmp_path / "i"), ContentIndex(tmp_path / "i")
    for number in range(20):
        for index in (first, second):
            index.write("folder", tmp_path, {"number": number}, {"x": np.arange(number)})
    record = ContentIndex(tmp_path / "i").read("folder", tmp_path)
    assert record is not None
    assert record[0] == {"number": 19}
    assert (record[1]["x"] == np.arange(19)).all()
    assert sorted(path.name[-6:] for path in (tmp_path / "i").iterdir()) == ["folder", "key"]


def test_the_commands_and_the_library_take_both(files: Files, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ("--data", files.data, "--index", files.index)
    stages("teacher-cache", *data, "--teacher", "mlp:8", "--views", "none", "--draws", "1", "--out", "c")
    stages("student", "--cache", "c", *data, "--arch", "mlp:4", "--epochs", "1", "--out", "s")
    stages("evaluate", "s", *data, "--rehash")
    stages("check-cache", "c", "--deep", *data)
    (record,) = files.records()
    record.write_bytes(b"")
    _, _, err = stages.call("check-cache", "c", "--deep", *data)
    assert "is damaged or was made with another key" in err
    seen: list[str] = []

    def count(text: str, *_: int) -> None:
        seen.append(text)

    softcache.Cache("c", data=files.data, index=files.index, progress=count)
    assert "reading images" not in seen
    softcache.Cache("c", data=files.data, index=files.index, rehash=True, progress=count)
    assert seen.count("reading images") == 42
    with pytest.raises(UsageError, match="rehash='yes' is a str"):
        softcache.Cache("c", data=files.data, rehash="yes")  # type: ignore[arg-type]
    manifest = softcache.Cache("c", data=files.data).reader.manifest
    assert not {"index", "rehash"} & set(manifest.settings)


def test_two_processes_that_copy_the_same_file_wait_for_each_other(files: Files, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    data = write_parquet(files.root / "files", make_splits())
    script = (
        "import sys; from pathlib import Path; from softcache.data.transfer_set import load_transfer_set as load;"
        " from softcache.data.content_index import open_index;"
        f" print(load({data!r}, Path(), val_fraction=0.2, index=open_index({str(files.index)!r})).identity())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=-1, text=True) for _ in "ab"]
    first, second = (process.communicate(timeout=120)[0] for process in started)
    assert first == second != ""
