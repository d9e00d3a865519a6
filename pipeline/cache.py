"""A finished cache, open for reading: rows by (split, draw, position), each checked before it is used."""

import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data import counter
from data.errors import Refused, WrongCommand
from data.folder import Progress
from data.transfer_set import Labels, TransferSet, load
from data.views import ViewPolicy, parse_views, render

from .codec import CODECS
from .identity import describe
from .manifest import Manifest, ShardRecord, read_manifest
from .models.prepared import Preparation
from .shards import Shard

RESIDENT_BYTES = 512 << 20  # a draw up to this size is kept in memory; a larger one is read by blocks
OPEN_SHARDS = 256
SPLITS = ("train", "val", "test")
Positions = NDArray[np.int64]


def row_order(seed: int, split: str, rows: int) -> Positions:
    """index [rows] of each position: the order in which rows are stored.

    Random, because blocks of rows of a set that is sorted by class make poor batches: chi-squared of
    class counts 168 instead of 9 at 16 blocks of 256 rows.
    """
    return counter.permutation((seed, 30 + SPLITS.index(split)), rows)


class Cache:
    """The targets of one teacher. Opening reads the manifest alone; shards are opened and checked on first use."""

    def __init__(self, folder: Path):
        """Raises Refused when there is no finished cache, or its manifest does not hold together."""
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        try:
            self._read_identity()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, WrongCommand) as error:
            raise Refused(f"'{folder}': the manifest's identity does not hold together ({error})") from None
        self._by_draw: dict[tuple[str, int], list[ShardRecord]] = {}
        for record in sorted(self.manifest.shards, key=lambda s: s.start):
            self._by_draw.setdefault((record.split, record.draw), []).append(record)
        self._labels: dict[str, Labels] = {}
        self._orders: dict[str, Positions] = {}
        self._shards: dict[str, Shard] = {}
        self._resident: dict[tuple[str, int], dict[str, NDArray[np.generic]]] = {}  # {draw: {dataset: rows}}

    def _read_identity(self) -> None:
        """What a reader needs to know before it opens a shard, in the types that it must have."""
        identity = self.manifest.identity
        views, data, cut = identity["views"], identity["transfer_set"], identity["transfer_set"]["cut"]
        knobs = ",".join(f"{k}={v}" for k, v in views.items() if k not in ("policy", "seed"))
        self.views: ViewPolicy = parse_views(f"{views['policy']}:{knobs}")
        self.seed = int(views["seed"])
        self.codec = CODECS[identity["codec"]]
        self.classes = int(self.manifest.shards[0].datasets["logits"][0][0])
        self.data = str(data["name"])
        self.cut = (float(cut["val_fraction"]), int(cut["seed"]), int(cut["train_size"]))
        self.teacher = str(identity["teacher"]["arch"])
        self.preparation = Preparation.from_json(identity["teacher"])

    def transfer_set(self, data: str, root: Path, progress: Progress) -> TransferSet:
        """The data that the cache was made from, cut as they were then, from where they lie here; see bind.

        data: as on the command line, or empty for the name in the manifest. A manifest's word is never taken for
        where a folder of pictures is. Raises WrongCommand, or Refused when these are other data.
        """
        if data and data.partition(":")[0] != self.data:
            raise Refused(f"the cache '{self.folder}' is of {self.data}, not of {data}")
        if self.data == "folder" and not data:
            raise WrongCommand(
                f"the cache '{self.folder}' is of a folder of pictures: say where it is with --data folder:PATH"
            )
        fraction, seed, size = self.cut
        found = load(data or self.data, root, val_fraction=fraction, seed=seed, train_size=size, progress=progress)
        self.bind(found)
        return found

    def order(self, split: str) -> Positions:
        """index [rows] of each position of a split, made once its files are seen to be large enough to hold it."""
        if split not in self._orders:
            for record in self._records(split, 0):
                path = self.folder / record.path
                if path.is_file() and path.stat().st_size < record.row_bytes * record.rows:
                    raise Refused(f"{path}: too small for the {record.rows} rows that the manifest gives it")
            self._orders[split] = row_order(self.seed, split, self.manifest.splits[split])
        return self._orders[split]

    def bind(self, transfer_set: TransferSet) -> None:
        """Refuse a transfer set that is not the one the teacher saw; from now on labels are compared too."""
        mine, theirs = self.manifest.identity["transfer_set"], transfer_set.identity()
        if mine != theirs:
            fields = describe(theirs, mine, ("here", "in the cache"))
            raise Refused(f"the cache '{self.folder}' was made from other data: {fields}")
        self._labels = {split: rows.labels for split, rows in transfer_set.splits.items()}

    def targets(
        self, split: str, draw: int, positions: Positions, taps: tuple[str, ...] = ()
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """logits float32 [n, K] and features {tap: float16 [n, …]} of the rows at positions [n]."""
        names = [*self.codec.datasets(self.classes), *(f"features/{tap}" for tap in taps)]
        rows = {name: self._rows(split, draw, name, positions) for name in names}
        logits = torch.from_numpy(self.codec.decode(rows))
        return logits, {tap: torch.from_numpy(rows[f"features/{tap}"]) for tap in taps}

    def resident(self, split: str, draw: int) -> bool:
        """Whether that draw is small enough to be kept in memory."""
        return sum(s.bytes for s in self._records(split, draw)) <= RESIDENT_BYTES

    def column(self, split: str, draw: int, name: str) -> NDArray[np.generic]:
        """One whole dataset of a draw, such as `label` or `view_crc32`, in row order."""
        parts = [self._shard(r).read(name) for r in self._records(split, draw) if name in r.datasets]
        return np.concatenate(parts)

    def _records(self, split: str, draw: int) -> list[ShardRecord]:
        return self._by_draw[split, draw]

    def _rows(self, split: str, draw: int, name: str, positions: Positions) -> NDArray[np.generic]:
        if self.resident(split, draw):
            return self._in_memory(split, draw, name)[positions]
        return self._from_disk(split, draw, name, positions)

    def _in_memory(self, split: str, draw: int, name: str) -> NDArray[np.generic]:
        """A whole dataset of a draw, kept until two other draws have been asked for."""
        kept = self._resident.setdefault((split, draw), {})
        if name not in kept:
            kept[name] = self.column(split, draw, name)
        while len(self._resident) > 2:  # this epoch's draw and the next one's
            self._resident.pop(next(iter(self._resident)))
        return kept[name]

    def _from_disk(self, split: str, draw: int, name: str, positions: Positions) -> NDArray[np.generic]:
        """Rows gathered by runs of neighbours: one read per run, each row to its place."""
        records = self._records(split, draw)
        shape, dtype = records[0].datasets[name]
        rows = np.empty((len(positions), *shape), dtype)
        order = np.argsort(positions, kind="stable")
        wanted = positions[order]
        starts = np.array([r.start for r in records])
        home = np.searchsorted(starts, wanted, side="right") - 1
        breaks = np.flatnonzero((np.diff(wanted) != 1) | (np.diff(home) != 0)) + 1
        for run in np.split(np.arange(len(wanted)), breaks):
            record = records[home[run[0]]]
            first = int(wanted[run[0]]) - record.start
            rows[order[run]] = self._shard(record).read(name, first, len(run))
        return rows

    def _shard(self, record: ShardRecord) -> Shard:
        """The shard, checked when it is opened. Few stay open: a process may have 1,024 files."""
        if record.path not in self._shards:
            shard = Shard(self.folder / record.path, record.layout(), record.bytes, record.checksum)
            self._check_shard(shard, record)
            if len(self._shards) >= OPEN_SHARDS:
                self._shards.pop(next(iter(self._shards))).close()
            self._shards[record.path] = shard
        return self._shards[record.path]

    def _check_shard(self, shard: Shard, record: ShardRecord) -> None:
        """The rows are those of this cache, in this order, with these labels, and hit as many of them."""
        claims = {"fingerprint": self.manifest.fingerprint}
        claims |= {key: getattr(record, key) for key in ("split", "draw", "start")}
        for key, claim in claims.items():
            if (found := shard.attributes.get(key)) != claim:
                raise Refused(f"{shard.path}: its {key} is {found} instead of {claim}: a shard of another place")
        expected = self.order(record.split)[record.start : record.start + record.rows]
        index, label = shard.read("index"), shard.read("label")
        if not np.array_equal(index, expected):
            raise Refused(
                f"{shard.path}: its rows are not in the order of this cache: targets would go to other pictures"
            )
        if record.split in self._labels:
            wrong = np.flatnonzero(label != self._labels[record.split][expected])
            if len(wrong):
                raise Refused(
                    f"{shard.path}: {len(wrong)} labels are not those of the data,"
                    f" the first at index {expected[wrong[0]]}"
                )
        stored = {name: shard.read(name) for name in self.codec.datasets(self.classes)}
        logits = self.codec.decode(stored)
        if not np.isfinite(logits).all():
            raise Refused(f"{shard.path}: logits that are not finite")
        if (hits := int((logits.argmax(1) == label).sum())) != record.correct:
            raise Refused(
                f"{shard.path}: its logits hit {hits} labels instead of {record.correct}:"
                " rows and logits do not belong together"
            )

    def verify(self, record: ShardRecord) -> None:
        """Everything that can be known of one shard without its pictures. Raises Refused."""
        shard = self._shard(record)
        if shard.checked_payload() != record.payload:
            raise Refused(f"{shard.path}: its payload is not the one in the manifest")

    def probe(self, transfer_set: TransferSet, views: int = 256) -> None:
        """Render so many views again and compare them with what the teacher saw. Raises Refused where one differs."""
        draws = min(self.manifest.draws, 8)
        places = [("train", d * self.manifest.draws // draws) for d in range(draws)]
        places += [(split, 0) for split in self.manifest.splits if split != "train"]
        for split, draw in places:
            n = self.manifest.splits[split]
            count = min(n, -(-views // len(places)))
            self.compare_views(transfer_set, split, draw, np.arange(count) * n // count)

    def compare_views(self, transfer_set: TransferSet, split: str, draw: int, positions: Positions) -> None:
        """Render the views at positions [n] and compare their checksums. Raises Refused, naming the first."""
        index = self.order(split)[positions]
        policy = self.views if split == "train" else self.views.plain()
        views = render(transfer_set.splits[split].pictures, policy, self.seed, index, draw)
        wrong = np.flatnonzero(crc32(views) != self._from_disk(split, draw, "view_crc32", positions))
        if len(wrong):
            raise Refused(
                f"{len(wrong)} of {len(positions)} views of '{self.folder}' come out differently here, the first is"
                f" {split} index {index[wrong[0]]}, draw {draw}: a picture, the decoder or a library changed."
                f" The cache was written with {_versions(self.manifest.versions)}"
            )


def crc32(views: torch.Tensor) -> NDArray[np.uint32]:
    """CRC-32 [B] of the bytes of uint8 views [B, C, H, W]."""
    return np.array([zlib.crc32(view) for view in views.contiguous().numpy()], np.uint32)


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
