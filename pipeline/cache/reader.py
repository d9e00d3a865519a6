"""A finished cache, open for reading: rows by (split, draw, position), each checked before it is used."""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base.errors import CacheError, CacheMismatchError, UsageError, make_printable
from softcache.base.files import list_shard_files
from softcache.base.progress import Progress
from softcache.data.long_tail import parse_imbalance
from softcache.data.transfer_set import Labels, TransferSet, load_transfer_set
from softcache.data.views import ViewPolicy, parse_views
from softcache.pipeline.batch import LinearHead
from softcache.pipeline.models.prepared_model import InputSpec

from .codecs import CODECS
from .identity import FORMAT, format_differences
from .manifest import IN_PROGRESS_FILE, MANIFEST_FILE, ROW_KEYS, Manifest, ShardRecord, count_row_bytes
from .manifest_reader import read_manifest
from .rows import Positions, check_logits, check_rows, find_runs, make_row_order
from .shards import Shard, Stamp

RESIDENT_BYTES = 512 << 20  # a draw up to this size is kept in memory; a larger one is read by blocks
OPEN_SHARDS = 256
_PIECE_BYTES = 1 << 20  # of rows that are read at once
LARGEST = 4096  # pixels of a view's side
_ON_ITS_WORD = 1 << 22  # rows that a manifest is believed to have: their order takes 100 MB while it is made
Fetch = Callable[[str, int, str, Positions], NDArray[np.generic]]


class Cache:
    """The targets of one teacher. Opening reads the manifest alone; shards are opened and checked on first use."""

    def __init__(self, folder: Path):
        """Raises CacheError when there is no finished cache, or its manifest does not hold together."""
        self.folder = folder
        # The order matters: what is seen first, with no addition under way, is in a manifest that is read later.
        files, growing = list_shard_files(folder), (folder / IN_PROGRESS_FILE).is_file()
        self.manifest: Manifest = read_manifest(folder)
        self.unlisted_files = sorted(files - {record.path for record in self.manifest.shards})
        if self.unlisted_files and not growing:
            raise CacheError(
                f"'{folder}' holds {self.unlisted_files[0]}, which {MANIFEST_FILE} does not know"
                f" ({len(self.unlisted_files)} such files):"
                f" an older {MANIFEST_FILE}, or files of another cache. Put the newer one back, or move them away"
            )
        try:
            self._read_identity()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, UsageError) as error:
            raise CacheError(
                f"'{folder}': the manifest's identity does not hold together ({make_printable(error)})"
            ) from None
        self._prepare()

    def _prepare(self) -> None:
        """What is looked up, and what is kept: nothing yet."""
        self._by_draw: dict[tuple[str, int, str], list[ShardRecord]] = {}  # {(split, draw, dataset): in row order}
        for record in sorted(self.manifest.shards, key=lambda s: s.start):
            for name in record.datasets:
                if name not in ROW_KEYS or record.correct is not None:  # keys are taken from where the logits are
                    self._by_draw.setdefault((record.split, record.draw, name), []).append(record)
        self._labels: dict[str, Labels] = {}
        self._orders: dict[str, NDArray[np.uint32]] = {}
        self._shards: dict[str, Shard] = {}
        self._stamps: dict[str, Stamp] = {}  # of the shards that this process has verified
        self._resident: dict[tuple[str, int], dict[str, NDArray[np.generic]]] = {}  # {draw: {dataset: rows}}

    def __getstate__(self) -> dict[str, object]:
        """What travels to another process: no file, no rows; it opens and verifies its own."""
        return {
            "folder": self.folder,
            "manifest": self.manifest,
            "unlisted": self.unlisted_files,
            "labels": self._labels,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder, self.manifest, self.unlisted_files = state["folder"], state["manifest"], state["unlisted"]
        self._read_identity()
        self._prepare()
        self._labels = state["labels"]

    def _read_identity(self) -> None:
        """What a reader needs to know before it opens a shard, in the types that it must have."""
        identity = self.manifest.identity
        views, data, cut = identity["views"], identity["transfer_set"], identity["transfer_set"]["cut"]
        bounds = [("format", identity["format"], FORMAT, FORMAT), ("val_fraction", cut["val_fraction"], 0, 1)]
        bounds += [("seed", views["seed"], 0, 2**31), ("cut.seed", cut["seed"], 0, 2**31)]
        bounds += [("size", views["size"], 1, LARGEST), ("resize", views["resize"], 0, LARGEST)]
        for name, value, least, most in bounds:
            if not least <= value <= most:
                raise ValueError(f"{name} {value} is not between {least} and {most}")
        if type(views["seed"]) is not int or type(views["size"]) is not int or isinstance(views["policy"], float):
            raise ValueError("views are not of whole numbers")
        knobs = ",".join(f"{k}={v}" for k, v in views.items() if k not in ("policy", "seed"))
        self.views: ViewPolicy = parse_views(f"{views['policy']}:{knobs}")
        self.seed = int(views["seed"])
        self.codec = CODECS[identity["codec"]]
        self.classes = self.manifest.classes
        self.data = str(data["name"])
        self.cut: dict[str, Any] = dict(cut)
        if "imbalance" in cut:
            parse_imbalance(cut["imbalance"])
        self.teacher = str(identity["teacher"]["arch"])
        self.input_spec = InputSpec.from_json(identity["teacher"])

    def load_transfer_set(self, data: str, root: Path, progress: Progress) -> TransferSet:
        """The data that the cache was made from, cut as they were then, from where they lie here; see bind.

        data: as on the command line, or empty for the name in the manifest. A manifest's word is never taken for
        where a folder of images is. Raises UsageError, or CacheError when these are other data.
        """
        if data and data.partition(":")[0] != self.data:
            raise CacheError(f"the cache '{self.folder}' is of {self.data}, not of {data}")
        if self.data == "folder" and not data:
            raise UsageError(
                f"the cache '{self.folder}' is of a folder of images: say where it is with --data folder:PATH"
            )
        found = load_transfer_set(data or self.data, root, **self.cut, progress=progress)
        self.check_transfer_set(found)
        return found

    def row_order(self, split: str) -> Positions:
        """index [rows] of each position of a split."""
        return self._order(split).astype(np.int64)

    def index_at(self, split: str, positions: Positions) -> Positions:
        """index [n] of positions [n], without a copy of the whole order."""
        return self._order(split)[positions].astype(np.int64)

    def _order(self, split: str) -> NDArray[np.uint32]:
        """The order as it is kept: 4 bytes a row. Made once its files are seen to hold so many, if they are many."""
        if split not in self._orders:
            for record in self._records(split, 0, "index"):
                path = self.folder / record.path
                size = path.stat().st_size if path.is_file() else 0
                if size != record.bytes and self.manifest.splits[split] > _ON_ITS_WORD:
                    raise CacheError(f"{path}: {size} bytes instead of {record.bytes}: cut, appended to or missing")
            self._orders[split] = make_row_order(self.seed, split, self.manifest.splits[split]).astype(np.uint32)
        return self._orders[split]

    def check_transfer_set(self, transfer_set: TransferSet) -> None:
        """Refuse a transfer set that is not the one the teacher saw; from now on labels are compared too."""
        mine, theirs = self.manifest.identity["transfer_set"], transfer_set.identity()
        if mine != theirs:
            fields = format_differences(theirs, mine, ("here", "in the cache"))
            raise CacheMismatchError(f"the cache '{self.folder}' was made from other data:{fields}")
        if transfer_set.classes and len(transfer_set.classes) != self.classes:
            raise CacheError(
                f"the cache '{self.folder}' has {self.classes} classes, the data have {len(transfer_set.classes)}"
            )
        if self.manifest.splits != (here := {split: len(rows) for split, rows in transfer_set.splits.items()}):
            raise CacheError(f"the cache '{self.folder}' has rows {self.manifest.splits}, the data {here}")
        self._labels = {split: rows.labels for split, rows in transfer_set.splits.items()}

    def read_targets(
        self, split: str, draw: int, positions: Positions, taps: tuple[str, ...] = (), together: int = 1
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """logits float32 [n, K] and features {tap: float16 [n, …]} of the rows at positions [n].

        together: so many draws are asked for in turns, and kept in memory together.
        """
        kept = self.fits_in_memory(split, draw, taps, together)
        fetch = partial(self._read_from_memory, together) if kept else self.read_rows
        return self._fetch(fetch, split, draw, positions, taps)

    def read_stored(
        self, split: str, draw: int, positions: Positions, taps: tuple[str, ...] = ()
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The same as targets, from those shards alone that hold these rows."""
        return self._fetch(self.read_rows, split, draw, positions, taps)

    def _fetch(
        self, fetch: Fetch, split: str, draw: int, positions: Positions, taps: tuple[str, ...]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        names = [*self.codec.datasets(self.classes), *(f"features/{tap}" for tap in taps)]
        rows = {name: fetch(split, draw, name, positions) for name in names}
        logits = torch.from_numpy(self.codec.decode(rows))
        return logits, {tap: torch.from_numpy(rows[f"features/{tap}"]) for tap in taps}

    def fits_in_memory(self, split: str, draw: int, taps: tuple[str, ...] = (), together: int = 1) -> bool:
        """Whether what is read of that draw, and of so many together, is small enough to be kept in memory.

        It does not depend on what else the cache holds: a student's order of rows must not change when taps are added.
        """
        names = [*self.codec.datasets(self.classes), *(f"features/{tap}" for tap in taps), *ROW_KEYS]
        size = count_row_bytes({name: self.manifest.datasets[name] for name in names})
        return together * size * self.manifest.splits[split] <= RESIDENT_BYTES

    def read_column(self, split: str, draw: int, name: str) -> NDArray[np.generic]:
        """One whole dataset of a draw, such as `label` or `view_crc32`, in row order."""
        return np.concatenate([self._get_shard(r).read(name) for r in self._records(split, draw, name)])

    def list_used_shards(self, draws: int, taps: tuple[str, ...]) -> dict[str, str]:
        """{path: payload} of the shards that hold the logits and taps of the first draws and the held-out splits."""
        names = {"logits", *(f"features/{tap}" for tap in taps)}
        return {
            record.path: record.payload
            for record in self.manifest.shards
            if names & set(record.datasets) and (record.split != "train" or record.draw < draws)
        }

    def _records(self, split: str, draw: int, name: str) -> list[ShardRecord]:
        return self._by_draw[split, draw, name]

    def _read_from_memory(
        self, together: int, split: str, draw: int, name: str, positions: Positions
    ) -> NDArray[np.generic]:
        """Rows of a dataset that is kept whole until twice as many other draws as go together have been asked for."""
        kept = self._resident[split, draw] = self._resident.pop((split, draw), {})  # the last one is the latest asked
        column = kept.get(name)
        if column is None:
            column = kept[name] = self.read_column(split, draw, name)
        for old in list(self._resident)[: -2 * together]:  # all but these draws and the next ones
            self._resident.pop(old, None)
        return column.take(positions, axis=0)  # 5 us for 2,709 rows of 10 logits; column[positions]: 21

    def read_rows(self, split: str, draw: int, name: str, positions: Positions) -> NDArray[np.generic]:
        """Rows of a dataset from disk at positions [n]: one read per run of neighbours, in the order of the file.

        Each goes through a piece of memory that stays in the processor's cache: 0.44 us a row of 2 kB, 0.52 where all
        are read and then gathered. A disk that is told of all of them beforehand is 1.6 times as fast.
        """
        shape, dtype = self.manifest.datasets[name]
        size = count_row_bytes({name: (shape, dtype)})
        order = np.argsort(positions, kind="stable")
        runs = find_runs(self._records(split, draw, name), positions[order])
        for record, first, a, b in runs:
            self._get_shard(record).advise_read(name, first, b - a)
        found = np.empty((len(positions), *shape), dtype)
        places, piece = found.reshape(-1).view(f"V{size}"), np.empty(max(1, _PIECE_BYTES // size), f"V{size}")
        room = piece.view(np.uint8).data
        for record, first, a, b in runs:
            for at in range(a, b, len(piece)):
                n = min(len(piece), b - at)
                self._get_shard(record).read_into(name, first + at - a, room[: n * size])
                places[order[at : at + n]] = piece[:n]
        return found

    def _get_shard(self, record: ShardRecord) -> Shard:
        """The shard, verified once per process. Few stay open: a process may have 1,024 files."""
        shard = self._shards.get(record.path)
        if shard is None:
            shard = self._open_shard(record, self._stamps.get(record.path))
            self._stamps[record.path] = shard.stamp
            for old in list(self._shards)[: max(0, len(self._shards) + 1 - OPEN_SHARDS)]:
                self._shards.pop(old, None)  # closed with its last user: another thread may be reading it
            self._shards[record.path] = shard
        return shard

    def _open_shard(self, record: ShardRecord, stamp: Stamp | None = None) -> Shard:
        shard = Shard(
            self.folder, record.path, self.manifest.layout(record), record.bytes, record.checksum, known=stamp
        )
        if not shard.is_verified:
            expected = self.index_at(record.split, np.arange(record.start, record.start + record.rows))
            check_rows(shard, record, self.manifest.fingerprint, expected, self._labels.get(record.split))
            if record.correct is not None:
                check_logits(shard, record, self.codec, self.classes)
        return shard

    def verify_shard(self, record: ShardRecord) -> NDArray[np.generic]:
        """Everything that can be known of one shard without its images; returns its view_crc32 [rows].

        Raises CacheError. May be called from several threads.
        """
        with closing(self._open_shard(record)) as shard:
            if shard.verify_payload() != record.payload:
                raise CacheError(f"{shard.path}: its payload is not the one in the manifest")
            for name in record.datasets:
                if name.startswith("features/") and not np.isfinite(shard.read(name)).all():
                    raise CacheError(f"{shard.path}: {name} has values that are not finite")
            if record.correct is None:
                self._check_views(shard, record)
            return shard.read("view_crc32")

    def _check_views(self, shard: Shard, record: ShardRecord) -> None:
        """Features that were added later are of the views that the logits are of. A bad shard is named by itself."""
        mine = shard.read("view_crc32")
        for other in self._records(record.split, record.draw, "view_crc32"):
            first = max(other.start, record.start)
            stop = min(other.start + other.rows, record.start + record.rows)
            if first < stop:
                layout = self.manifest.layout(other)
                try:
                    with closing(Shard(self.folder, other.path, layout, other.bytes, other.checksum)) as logits:
                        theirs = logits.read("view_crc32", first - other.start, stop - first)
                except CacheError:
                    continue
                if not np.array_equal(mine[first - record.start : stop - record.start], theirs):
                    raise CacheError(f"{shard.path}: its features are of other views than the logits of {other.path}")

    def read_head(self) -> LinearHead | None:
        """The teacher's last linear layer, where it has one. Raises CacheError when its file is not what it was."""
        if not (head := self.manifest.head):
            return None
        with closing(Shard(self.folder, head.path, self.manifest.head_layout(), head.bytes, head.checksum)) as file:
            weight, bias = (torch.from_numpy(file.read(name)) for name in ("weight", "bias"))
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise CacheError(f"{self.folder / head.path}: the teacher's last layer is not finite")
        return LinearHead(weight, bias)
