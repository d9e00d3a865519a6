"""A power cut loses what was not synced. At no time does it leave a manifest without the files that it names."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import xxhash

from tests.helpers import processes
from tests.helpers.processes import (
    KILLED,
    ONE_DRAW,
    TWO_DRAWS,
    Event,
    Forks,
    make_cache_command,
    make_resume_command,
    make_student_command,
    read_events,
    select_points,
)

forks = processes.forks
Dose = Callable[[int, int], int]


@dataclass
class Disk:
    """A model of what survives a power cut: synced bytes, and names whose folder was synced after they were made.

    Attributes:
        cache: folder of the cache.
        names: {path: inode} of all names.
        durable: {path: inode} of the names that survive.
        bytes: {inode: digest of the bytes that were synced last}.
    """

    cache: str
    names: dict[str, int] = field(default_factory=dict)
    durable: dict[str, int] = field(default_factory=dict)
    bytes: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def of(cache: Path) -> "Disk":
        """Return the state of a cache all of which is durable."""
        disk = Disk(str(cache))
        for path in (cache, *cache.rglob("*")):
            inode = disk.names[str(path)] = path.stat().st_ino
            if path.is_file():
                disk.bytes[inode] = xxhash.xxh3_128_hexdigest(path.read_bytes())
        disk.durable = dict(disk.names)
        return disk

    def replay(self, log: list[Event]) -> "Disk":
        """Apply the logged events. Raises AssertionError at the first one that makes a power cut harmful."""
        for event in log:
            step = getattr(self, f"_{event['when']}_{event['call']}", None)
            if step is not None:
                step(event)
        return self

    def assert_all_durable(self, within: str = "/") -> None:
        """Check that every name survives a power cut."""
        names, durable = (
            {name: inode for name, inode in inodes.items() if name.startswith(within)}
            for inodes in (self.names, self.durable)
        )
        assert names == durable, sorted(names.keys() ^ durable.keys())

    def _after_open(self, event: Event) -> None:
        self.names[event["path"]] = event["inode"]
        self.bytes.pop(event["inode"], None)

    def _after_mkdir(self, event: Event) -> None:
        self.names[event["path"]] = event["inode"]

    def _before_unlink(self, event: Event) -> None:
        if event["path"] == f"{self.cache}/unfinished.json" and f"{self.cache}/manifest.json" in self.names:
            assert f"{self.cache}/manifest.json" in self.durable, (
                "unfinished.json goes before the manifest's name is safe"
            )

    def _after_unlink(self, event: Event) -> None:
        self.names.pop(event["path"], None)
        self.durable.pop(event["path"], None)

    def _after_fsync(self, event: Event) -> None:
        if "digest" in event:
            self.bytes[event["inode"]] = event["digest"]
            return
        elsewhere = {n: inode for n, inode in self.durable.items() if os.path.dirname(n) != event["path"]}
        self.durable = elsewhere | {n: i for n, i in self.names.items() if os.path.dirname(n) == event["path"]}

    def _before_replace(self, event: Event) -> None:
        """From here on the new name may survive, so its bytes must be durable, and all files that a manifest names."""
        assert self.bytes.get(event["inode"]) == event["digest"], f"{event['to']} before its bytes are safe"
        if event["to"] == f"{self.cache}/manifest.json":
            manifest = json.loads(event["text"])
            for record in [*manifest["shards"], *filter(None, [manifest["head"]])]:
                self._check_named(f"{self.cache}/{record['path']}", record["checksum"])

    def _after_replace(self, event: Event) -> None:
        self.names[event["to"]] = self.names.pop(event["path"])
        for name in (event["path"], event["to"]):
            self.durable.pop(name, None)

    def _check_named(self, path: str, checksum: str) -> None:
        assert path in self.durable, f"the manifest before the name of {path} is safe"
        assert self.bytes.get(self.durable[path]) == checksum, f"the manifest before the bytes of {path} are safe"
        folder = os.path.dirname(path)
        assert folder == self.cache or folder in self.durable, f"the manifest before the folder {folder} is safe"


def test_a_new_cache_is_named_when_all_of_it_outlives_a_power_cut(tiny: Path, forks: Forks, tmp_path: Path) -> None:
    """Each kind of sync is necessary: without it the model reports an error."""
    log, cache = tmp_path / "log", tmp_path / "new/folders/cache"
    forks.succeeds(*make_cache_command(tiny, cache, *ONE_DRAW), trap={"log": str(log)})
    happened = read_events(log)
    disk = Disk(str(cache)).replay(happened)
    disk.assert_all_durable()
    assert {str(tmp_path / "new"), str(tmp_path / "new/folders"), str(cache), f"{cache}/draw-000"} < set(disk.durable)
    needed: list[Callable[[Event], bool]] = [
        lambda e: e["path"].endswith(".tmp"),
        lambda e: e["path"] == str(cache),
        lambda e: e["path"] == f"{cache}/draw-000",
        lambda e: ".manifest.json." in e["path"],
    ]
    for dropped in needed:
        with pytest.raises(AssertionError):
            Disk(str(cache)).replay([e for e in happened if e["call"] != "fsync" or not dropped(e)])


def test_a_cache_grows_under_its_name_when_all_of_it_outlives_a_power_cut(
    tiny: Path, forks: Forks, tmp_path: Path
) -> None:
    log, cache = tmp_path / "log", tmp_path / "cache"
    forks.succeeds(*make_cache_command(tiny, cache, *ONE_DRAW))
    disk = Disk.of(cache)
    forks.succeeds(*make_cache_command(tiny, cache, *TWO_DRAWS), trap={"log": str(log)})
    disk.replay(read_events(log)).assert_all_durable()


@pytest.mark.parametrize("grows", [False, True])
def test_a_killed_writer_leaves_nothing_unsynced_to_the_one_that_goes_on(
    tiny: Path, forks: Forks, tmp_path: Path, dose: Dose, grows: bool
) -> None:
    """Names that a killed process made but did not sync are synced before a manifest names them."""
    one, cache, log = tmp_path / "one/cache", tmp_path / "killed/cache", tmp_path / "log"
    command = make_cache_command(tiny, cache, *(TWO_DRAWS if grows else ONE_DRAW))
    if grows:
        forks.succeeds(*make_cache_command(tiny, one, *ONE_DRAW))
        (one / "README.md").write_text("mine")  # then it is not written anew, which would sync the folder
        shutil.copytree(one, cache)
    forks.succeeds(*command, trap={"log": str(log)})
    for point in (points := select_points(log, dose(2, 10**6))):
        shutil.rmtree(cache.parent)
        if grows:
            shutil.copytree(one, cache)
        disk, parts = Disk.of(cache) if grows else Disk(str(cache)), (tmp_path / "first", tmp_path / "second")
        for part in parts:
            part.unlink(missing_ok=True)
        assert forks.run(*command, trap={"at": point, "log": str(parts[0])}).code == KILLED
        forks.succeeds(*command, trap={"log": str(parts[1])})
        disk.replay(read_events(parts[0]) + read_events(parts[1])).assert_all_durable(within=f"{cache}/")
    print(
        f"\npower cuts after a kill at {len(points)} of {len(read_events(log))} points:"
        " the manifest names durable files only"
    )


def test_a_runs_files_are_named_when_their_bytes_outlive_a_power_cut(
    tiny: Path, forks: Forks, tmp_path: Path, dose: Dose
) -> None:
    log, run, first, second = (tmp_path / name for name in ("log", "run", "first", "second"))
    command = make_student_command(tiny / "cache", run, 2, "--baseline")
    forks.succeeds(*command, trap={"log": str(log)})
    Disk(str(run)).replay(read_events(log)).assert_all_durable()
    for point in select_points(log, dose(1, 20)):
        shutil.rmtree(run)
        assert forks.run(*command, trap={"at": point, "log": str(first)}).code == KILLED
        forks.succeeds(*make_resume_command(run, command), trap={"log": str(second)})
        Disk(str(run)).replay(read_events(first) + read_events(second))
        first.unlink()
        second.unlink()
