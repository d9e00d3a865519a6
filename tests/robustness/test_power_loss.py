"""A power cut takes what was not synced. At no moment does it leave a manifest without what the manifest names."""

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
    cache_command,
    events,
    going_on,
    student_command,
    sweep,
)

forks = processes.forks
Dose = Callable[[int, int], int]


@dataclass
class Disk:
    """What surely outlives a power cut: bytes that were synced; names whose folder was synced since they are there.

    cache: the folder of one; names: {path: inode} as they are now; kept: those that outlive; bytes: {inode: digest}
    of what was synced last.
    """

    cache: str
    names: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    bytes: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def of(cache: Path) -> "Disk":
        """A cache that has been there for long."""
        disk = Disk(str(cache))
        for path in (cache, *cache.rglob("*")):
            inode = disk.names[str(path)] = path.stat().st_ino
            if path.is_file():
                disk.bytes[inode] = xxhash.xxh3_128_hexdigest(path.read_bytes())
        disk.kept = dict(disk.names)
        return disk

    def play(self, log: list[Event]) -> "Disk":
        """Go through what happened. AssertionError at the first thing that a power cut could spoil."""
        for event in log:
            step = getattr(self, f"_{event['when']}_{event['call']}", None)
            if step is not None:
                step(event)
        return self

    def whole(self, within: str = "/") -> None:
        """After success: all that is there outlives a power cut, but for the lock."""
        names, kept = ({n: i for n, i in found.items() if n.startswith(within)} for found in (self.names, self.kept))
        assert names == kept, sorted(names.keys() ^ kept.keys())

    def _after_open(self, event: Event) -> None:
        self.names[event["path"]] = event["inode"]
        self.bytes.pop(event["inode"], None)

    def _after_mkdir(self, event: Event) -> None:
        self.names[event["path"]] = event["inode"]

    def _before_unlink(self, event: Event) -> None:
        if event["path"] == f"{self.cache}/unfinished.json" and f"{self.cache}/manifest.json" in self.names:
            assert f"{self.cache}/manifest.json" in self.kept, (
                "unfinished.json goes before the manifest's name is safe"
            )

    def _after_unlink(self, event: Event) -> None:
        self.names.pop(event["path"], None)
        self.kept.pop(event["path"], None)

    def _after_fsync(self, event: Event) -> None:
        if "digest" in event:
            self.bytes[event["inode"]] = event["digest"]
            return
        elsewhere = {n: inode for n, inode in self.kept.items() if os.path.dirname(n) != event["path"]}
        self.kept = elsewhere | {n: i for n, i in self.names.items() if os.path.dirname(n) == event["path"]}

    def _before_replace(self, event: Event) -> None:
        """From here on the new name may outlive: so its bytes must, and all that a manifest names."""
        assert self.bytes.get(event["inode"]) == event["digest"], f"{event['to']} before its bytes are safe"
        if event["to"] == f"{self.cache}/manifest.json":
            manifest = json.loads(event["text"])
            for record in [*manifest["shards"], *filter(None, [manifest["head"]])]:
                self._named(f"{self.cache}/{record['path']}", record["checksum"])

    def _after_replace(self, event: Event) -> None:
        self.names[event["to"]] = self.names.pop(event["path"])
        for name in (event["path"], event["to"]):
            self.kept.pop(name, None)

    def _named(self, path: str, checksum: str) -> None:
        assert path in self.kept, f"the manifest before the name of {path} is safe"
        assert self.bytes.get(self.kept[path]) == checksum, f"the manifest before the bytes of {path} are safe"
        folder = os.path.dirname(path)
        assert folder == self.cache or folder in self.kept, f"the manifest before the folder {folder} is safe"


def test_a_new_cache_is_named_when_all_of_it_outlives_a_power_cut(tiny: Path, forks: Forks, tmp_path: Path) -> None:
    """And each kind of sync that makes it so is needed: without it the model of the disk objects."""
    log, cache = tmp_path / "log", tmp_path / "new/folders/cache"
    forks.succeeds(*cache_command(tiny, cache, *ONE_DRAW), trap={"log": str(log)})
    happened = events(log)
    disk = Disk(str(cache)).play(happened)
    disk.whole()
    assert {str(tmp_path / "new"), str(tmp_path / "new/folders"), str(cache), f"{cache}/draw-000"} < set(disk.kept)
    needed: list[Callable[[Event], bool]] = [
        lambda e: e["path"].endswith(".tmp"),
        lambda e: e["path"] == str(cache),
        lambda e: e["path"] == f"{cache}/draw-000",
        lambda e: ".manifest.json." in e["path"],
    ]
    for dropped in needed:
        with pytest.raises(AssertionError):
            Disk(str(cache)).play([e for e in happened if e["call"] != "fsync" or not dropped(e)])


def test_a_cache_grows_under_its_name_when_all_of_it_outlives_a_power_cut(
    tiny: Path, forks: Forks, tmp_path: Path
) -> None:
    log, cache = tmp_path / "log", tmp_path / "cache"
    forks.succeeds(*cache_command(tiny, cache, *ONE_DRAW))
    disk = Disk.of(cache)
    forks.succeeds(*cache_command(tiny, cache, *TWO_DRAWS), trap={"log": str(log)})
    disk.play(events(log)).whole()


@pytest.mark.parametrize("grows", [False, True])
def test_a_killed_writer_leaves_nothing_unsynced_to_the_one_that_goes_on(
    tiny: Path, forks: Forks, tmp_path: Path, dose: Dose, grows: bool
) -> None:
    """What a killed process had named but not synced is synced before a manifest names it; then the power goes."""
    one, cache, log = tmp_path / "one/cache", tmp_path / "killed/cache", tmp_path / "log"
    command = cache_command(tiny, cache, *(TWO_DRAWS if grows else ONE_DRAW))
    if grows:
        forks.succeeds(*cache_command(tiny, one, *ONE_DRAW))
        (one / "README.md").write_text("mine")  # then it is not written anew, which would sync the folder
        shutil.copytree(one, cache)
    forks.succeeds(*command, trap={"log": str(log)})
    for at in (points := sweep(log, dose(2, 10**6))):
        shutil.rmtree(cache.parent)
        if grows:
            shutil.copytree(one, cache)
        disk, parts = Disk.of(cache) if grows else Disk(str(cache)), (tmp_path / "first", tmp_path / "second")
        for part in parts:
            part.unlink(missing_ok=True)
        assert forks.run(*command, trap={"at": at, "log": str(parts[0])}).code == KILLED
        forks.succeeds(*command, trap={"log": str(parts[1])})
        disk.play(events(parts[0]) + events(parts[1])).whole(within=f"{cache}/")
    print(f"\npower cuts after a kill at {len(points)} of {len(events(log))} points: the manifest names what is safe")


def test_a_runs_files_are_named_when_their_bytes_outlive_a_power_cut(
    tiny: Path, forks: Forks, tmp_path: Path, dose: Dose
) -> None:
    log, run, first, second = (tmp_path / name for name in ("log", "run", "first", "second"))
    command = student_command(tiny / "cache", run, 2, "--baseline")
    forks.succeeds(*command, trap={"log": str(log)})
    Disk(str(run)).play(events(log)).whole()
    for at in sweep(log, dose(1, 20)):
        shutil.rmtree(run)
        assert forks.run(*command, trap={"at": at, "log": str(first)}).code == KILLED
        forks.succeeds(*going_on(run, command), trap={"log": str(second)})
        Disk(str(run)).play(events(first) + events(second))
        first.unlink()
        second.unlink()
