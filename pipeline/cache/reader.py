"""Reading a complete cache: open it, compare it with a transfer set, read targets by position.

    cache = CacheReader(folder)                                 # reads the manifest, no shard
    transfer_set = cache.load_transfer_set("", root, progress)  # refused where the data are not the teacher's
    positions = np.arange(128)                                  # in the row order of the split
    index = cache.index_at("train", positions)                  # which images these are
    logits, features = cache.read_targets("train", 2, positions, taps=("pool",))
    logits, _ = cache.read_targets("val", 0, np.arange(cache.manifest.splits["val"]))

Shards are opened by `rows.py`, which verifies each of them before its first row is used.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base.errors import CacheError, CacheMismatchError, UsageError, make_printable
from softcache.base.progress import Progress
from softcache.data.content_index import ContentIndex
from softcache.data.images.dataset_items import Data
from softcache.data.long_tail import parse_imbalance
from softcache.data.sources import (
    DATASET,
    NAME_DATASET,
    SOURCES,
    format_placeholder,
    has_argument,
    is_user_dataset,
    make_named_dataset,
)
from softcache.data.sources.dataset import find_class_names
from softcache.data.tasks import EMBEDDING
from softcache.data.transfer_set import TransferSet, load_transfer_set
from softcache.data.views.policy import ViewPolicy, check_policy, read_views
from softcache.pipeline.batch import LinearHead
from softcache.pipeline.models.prepared_model import InputSpec

from .codec_choice import find_codec
from .folder import IN_PROGRESS_FILE, MANIFEST_FILE, list_shard_files
from .identity import FORMAT, format_differences
from .manifest import ROW_KEYS, Manifest, ShardRecord, count_row_bytes
from .manifest_reader import read_manifest
from .rows import Positions, RowReader
from .shards import Shard

RESIDENT_BYTES = 512 << 20  # a draw up to this size is kept in memory; a larger one is read by blocks
MAX_VIEW_PIXELS = 4096  # of a view's side


class CacheReader:
    """The targets of one teacher for every view of a transfer set.

    Opening reads the manifest alone; a shard is opened and verified when its first row is read. Several threads may
    read one cache. A pickled cache has neither open files nor rows: another process opens and verifies its own.

    Rows are stored in a random order, see `row_order`. The training split has `manifest.draws` views of each image;
    a held-out split has one plain view of each, its draw 0.

    Args:
        folder: Of a complete cache.

    Attributes:
        folder: The cache's folder.
        manifest: What the cache holds.
        unlisted_files: Shards of an addition that is not complete; they are not read.
        classes: K, the width of the logits.
        task: What the hard targets and the logits are, see data/tasks.py.
        codec, codec_name: Of the logits.
        views: How training images became views.
        seed: Of the views and of the row order.
        data: Name of the data set.
        cut: Options with which its training and validation rows were chosen, see `load_transfer_set`.
        teacher: Arch of the teacher.
        input_spec: How a view becomes the teacher's input.

    Raises:
        CacheError: There is no complete cache, its manifest is invalid, or shards are there that it does not list.
    """

    # Opening

    def __init__(self, folder: Path):
        self.folder = folder
        # Both before the manifest is read: a listed file is then in the manifest, or of an addition in progress, also
        # when a writer ends an addition meanwhile.
        files, is_growing = list_shard_files(folder), (folder / IN_PROGRESS_FILE).is_file()
        self.manifest: Manifest = read_manifest(folder)
        self.unlisted_files = sorted(files - {record.path for record in self.manifest.shards})
        if self.unlisted_files and not is_growing:
            raise CacheError(
                f"'{folder}' holds {self.unlisted_files[0]}, which {MANIFEST_FILE} does not list"
                f" ({len(self.unlisted_files)} such files):"
                f" an older {MANIFEST_FILE}, or files of another cache. Put the newer one back, or move them away"
            )
        try:
            self._parse_identity()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, UsageError) as error:
            raise CacheError(
                f"'{folder}': the identity in its manifest is invalid ({make_printable(error)})"
            ) from None
        self._prepare_reading()

    def _parse_identity(self) -> None:
        """Set the attributes that describe the rows, from an identity of any content.

        Where it is not that of a cache, this raises KeyError, TypeError, ValueError, AttributeError, IndexError,
        OverflowError or UsageError.
        """
        identity = self.manifest.identity
        views, transfer_set, cut = identity["views"], identity["transfer_set"], identity["transfer_set"]["cut"]
        is_rows = "shape" in identity["teacher"]
        for name, value, smallest, largest in (
            ("format", identity["format"], FORMAT, FORMAT),
            ("val_fraction", cut["val_fraction"], 0, 1),
            ("test_fraction", cut.get("test_fraction", 0.0), 0, 1),
            ("seed", views["seed"], 0, 2**31),
            ("cut.seed", cut["seed"], 0, 2**31),
            ("size", views["size"], *((0, 0) if is_rows else (1, MAX_VIEW_PIXELS))),
            ("resize", views["resize"], 0, 0 if is_rows else MAX_VIEW_PIXELS),
        ):
            if not smallest <= value <= largest:
                raise ValueError(f"{name} {value} is not between {smallest} and {largest}")
        if type(views["seed"]) is not int or type(views["size"]) is not int or isinstance(views["policy"], float):
            raise ValueError("seed and size of the views are no integers, or the policy is no name")
        self.views: ViewPolicy = read_views(views)
        self.seed = int(views["seed"])
        self.codec_name = str(identity["codec"])
        self.codec = find_codec(self.codec_name)
        self.classes = self.manifest.classes
        if self.classes < self.codec.min_classes:
            raise ValueError(f"codec {identity['codec']} of {self.classes} classes")
        self.task = self.manifest.task
        if self.task not in self.codec.tasks:
            raise ValueError(f"codec {identity['codec']} of the task {self.task}")
        self.data = str(transfer_set["name"])
        self.cut: dict[str, Any] = dict(cut)
        if "imbalance" in cut:
            parse_imbalance(cut["imbalance"])
        self.teacher = str(identity["teacher"]["arch"])
        self.input_spec = InputSpec.from_json(identity["teacher"])
        check_policy(self.views, self.input_spec.shape)

    def _prepare_reading(self) -> None:
        self._rows = RowReader(self.folder, self.manifest, self.seed, self.codec)
        # {(split, draw): {dataset: all rows}}, the draw that was read last at the end
        self._resident: dict[tuple[str, int], dict[str, NDArray[np.generic]]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {
            "folder": self.folder,
            "manifest": self.manifest,
            "unlisted_files": self.unlisted_files,
            "labels": self._rows.labels,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder, self.manifest, self.unlisted_files = state["folder"], state["manifest"], state["unlisted_files"]
        self._parse_identity()
        self._prepare_reading()
        self._rows.labels = state["labels"]

    # The transfer set

    def load_transfer_set(
        self, data: Data, root: Path, progress: Progress, index: ContentIndex | None = None
    ) -> TransferSet:
        """Load the data that the cache was made from, with the same training and validation rows.

        Args:
            data: As in `--data`, or a dataset or one of each split; empty for the name in the manifest. The path of a
                folder of images, or code of the user, is never taken from a manifest.
            root: Folder of the data sets that have a name.
            progress: Shows how far reading the images is.
            index: Where it is recorded what the files hold; None for the folder in the user's cache folder.

        Raises:
            UsageError: The cache is of a folder of images or of a dataset, and `data` is empty; or a dataset raises an
                exception, or returns what is no image, see `load_transfer_set`.
            CacheError: These are other data than those of the cache.
        """
        is_dataset = not isinstance(data, str) or is_user_dataset(data)
        name = DATASET if is_dataset else str(data).partition(":")[0]
        if name and name != self.data:
            text = data if isinstance(data, str) else "a dataset of your own"
            raise CacheError(
                f"the cache '{self.folder}' is of {self.data}, not of {text}: name its data with --data"
                f" {format_placeholder(self.data)}, or make a cache of these"
            )
        if self.data == DATASET and not is_dataset:
            raise UsageError(f"the cache '{self.folder}' is of a dataset of your own: {NAME_DATASET}")
        if has_argument(self.data) and not name:
            raise UsageError(
                f"the cache '{self.folder}' is of data of yours: name them with --data {format_placeholder(self.data)}"
            )
        data = make_named_dataset(data, root)
        classes, cut = self.manifest.identity["transfer_set"]["classes"], self.cut
        if isinstance(data, str):
            takes_classes = self.data in SOURCES and "classes" in SOURCES[self.data].options
            classes = classes if takes_classes else ""
            if self.data in SOURCES and "layout" in SOURCES[self.data].options:
                cut = {"layout": "basic", **cut}  # a cache that records no layout is of files that basic reads
        elif find_class_names(data):  # compared with those of the cache below
            classes = ()
        transfer_set = load_transfer_set(
            self.data if isinstance(data, str) and not data else data,
            root,
            **cut,
            task=self.task,
            classes=classes,
            index=index,
            progress=progress,
        )
        self.check_transfer_set(transfer_set)
        return transfer_set

    def check_transfer_set(self, transfer_set: TransferSet) -> None:
        """Check that a transfer set is the one of the cache. Shards that are opened later must have its labels.

        Raises:
            CacheMismatchError: Its images, classes or splits are others. The message lists the fields that differ.
            CacheError: The cache has another number of classes or rows than its identity says.
        """
        cached, loaded = self.manifest.identity["transfer_set"], transfer_set.identity()
        if cached != loaded:
            fields = format_differences(loaded, cached, ("in the data", "in the cache"))
            raise CacheMismatchError(f"the cache '{self.folder}' was made from other data:{fields}")
        if transfer_set.classes and len(transfer_set.classes) != self.classes and self.task != EMBEDDING:
            raise CacheError(
                f"the cache '{self.folder}' has {self.classes} classes, the data have {len(transfer_set.classes)}"
            )
        rows = {split: len(part) for split, part in transfer_set.splits.items()}
        if self.manifest.splits != rows:
            raise CacheError(f"the cache '{self.folder}' has rows {self.manifest.splits}, the data {rows}")
        self._rows.labels = {split: part.labels for split, part in transfer_set.splits.items()}

    # Targets

    def read_targets(
        self, split: str, draw: int, positions: Positions, taps: tuple[str, ...] = (), together: int = 1
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Read logits and features of the rows at these positions.

        A draw that fits in memory is read whole and kept there until twice `together` other draws have been read.

        Args:
            split: `train`, `val` or `test`.
            draw: Draw of the views; 0 for a held-out split.
            positions: [n], in any order.
            taps: Whose features are read.
            together: How many draws are read in turns.

        Returns:
            logits: float32 [n, K].
            features: {tap: float16 [n, …]}.

        Raises:
            CacheError: A shard is missing or damaged.
        """
        if not self.fits_in_memory(split, draw, taps, together):
            return self.read_stored(split, draw, positions, taps)
        names = self._list_target_datasets(taps)
        return self._decode(self._read_resident(split, draw, names, positions, together), taps)

    def read_checksums(
        self, split: str, draw: int, positions: Positions, together: int = 1, in_memory: bool = True
    ) -> NDArray[np.uint32]:
        """Read the CRC-32 of the views at these positions, uint32 [n].

        Args:
            split, draw, positions, together: As in `read_targets`.
            in_memory: Whether those of a whole draw may be read and kept, where its logits are.
        """
        if in_memory and self.fits_in_memory(split, draw, (), together):
            rows = self._read_resident(split, draw, ["view_crc32"], positions, together)["view_crc32"]
        else:
            rows = self.read_rows(split, draw, "view_crc32", positions)
        return rows.astype(np.uint32)

    def _read_resident(
        self, split: str, draw: int, names: list[str], positions: Positions, together: int
    ) -> dict[str, NDArray[np.generic]]:
        """Read rows of a draw that is kept in memory, {dataset: [n, …]}."""
        columns = self._resident[split, draw] = self._resident.pop((split, draw), {})
        for unused in list(self._resident)[: -2 * together]:
            self._resident.pop(unused, None)
        rows = {}
        for name in names:
            if name not in columns:
                columns[name] = self.read_column(split, draw, name)
            rows[name] = columns[name].take(positions, axis=0)  # 5 us for 2,709 rows of 10 logits; [positions]: 21
        return rows

    def read_stored(
        self, split: str, draw: int, positions: Positions, taps: tuple[str, ...] = ()
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Read the same as `read_targets` from disk, and from those shards alone that hold these rows."""
        names = self._list_target_datasets(taps)
        return self._decode({name: self.read_rows(split, draw, name, positions) for name in names}, taps)

    def _list_target_datasets(self, taps: tuple[str, ...]) -> list[str]:
        return [*self.codec.datasets(self.classes), *(f"features/{tap}" for tap in taps)]

    def _decode(
        self, rows: dict[str, NDArray[np.generic]], taps: tuple[str, ...]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = torch.from_numpy(self.codec.decode(rows, self.classes))
        return logits, {tap: torch.from_numpy(rows[f"features/{tap}"]) for tap in taps}

    def fits_in_memory(self, split: str, draw: int, taps: tuple[str, ...] = (), together: int = 1) -> bool:
        """Return whether as many draws as are read in turns are small enough to be kept in memory.

        This does not depend on what else the cache holds: a student's order of rows must not change when the cache
        grows.
        """
        names = [*self._list_target_datasets(taps), *ROW_KEYS]
        row_bytes = count_row_bytes({name: self.manifest.datasets[name] for name in names})
        return together * row_bytes * self.manifest.splits[split] <= RESIDENT_BYTES

    def list_used_shards(self, draws: int, taps: tuple[str, ...]) -> dict[str, str]:
        """List {path: digest of the datasets} of the shards that a student reads.

        Args:
            draws: The student uses the first ones.
            taps: That it learns from.
        """
        names = {"logits", *(f"features/{tap}" for tap in taps)}
        return {
            record.path: record.payload
            for record in self.manifest.shards
            if names & set(record.datasets) and (record.split != "train" or record.draw < draws)
        }

    def read_head(self) -> LinearHead | None:
        """Read the teacher's last linear layer; None where it has none, and for an embedding.

        Raises:
            CacheError: Its file is missing or damaged, or has values that are not finite.
        """
        if self.manifest.head is None or self.task == EMBEDDING:
            return None
        arrays = self.read_head_arrays()
        return LinearHead(arrays["weight"], arrays["bias"])

    def read_head_arrays(self) -> dict[str, torch.Tensor]:
        """Read what the file of the head holds: the last linear layer, or the statistics of an embedding.

        Returns:
            `weight` float32 [K, D] and `bias` [K]; or `mean` and `std` float32 [D] of the training rows, and `axes`
            [D, D] and `axis_std` [D] where principal axes are kept. Empty where there is no such file.

        Raises:
            CacheError: The file is missing or damaged, or has values that are not finite.
        """
        if not (head := self.manifest.head):
            return {}
        layout = self.manifest.get_head_layout()
        with closing(Shard(self.folder, head.path, layout, head.bytes, head.checksum)) as file:
            arrays = {name: torch.from_numpy(file.read(name)) for name in layout}
        if not all(values.isfinite().all() for values in arrays.values()):
            raise CacheError(f"{self.folder / head.path}: the teacher's last layer is not finite")
        return arrays

    # Rows by position

    def row_order(self, split: str) -> Positions:
        """Return the index of the image at each position of a split, int64 [rows]."""
        return self._rows.get_order(split).astype(np.int64)

    def index_at(self, split: str, positions: Positions) -> Positions:
        """Return the index of the images at positions [n], int64 [n], without a copy of the whole order."""
        return self._rows.get_order(split)[positions].astype(np.int64)

    def read_rows(self, split: str, draw: int, name: str, positions: Positions) -> NDArray[np.generic]:
        """Read the rows of a dataset, such as `label` or `features/pool`, at positions [n]: [n, …] as stored."""
        return self._rows.read_rows(split, draw, name, positions)

    def read_column(self, split: str, draw: int, name: str) -> NDArray[np.generic]:
        """Read all rows of a dataset of a draw, such as `label` or `view_crc32`, in row order: [rows, …] as stored."""
        return self._rows.read_column(split, draw, name)

    def list_records(self, split: str, draw: int, name: str) -> list[ShardRecord]:
        """List the shards of which a dataset of a draw is read, in row order.

        `index`, `label` and `view_crc32`, which every shard has, are read of the shards of the logits.
        """
        return self._rows.list_records(split, draw, name)

    def open_shard(self, record: ShardRecord) -> Shard:
        """Open a shard and verify it, even if this process has verified it before. The caller closes it.

        Raises:
            CacheError: The file is missing or damaged, or its rows are not those of this place of this cache.
        """
        return self._rows.open_shard(record)
