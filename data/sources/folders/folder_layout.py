"""How a folder of images is laid out: which of its folders are splits, and which file holds its labels."""

import os
from pathlib import Path
from typing import NamedTuple

from softcache.base.errors import UsageError, make_printable
from softcache.base.text import shorten_names
from softcache.data.sources.split_names import SPLIT_NAMES, map_to_splits

from .folder_listing import is_image_name, list_folders

# Values of --layout, in that of the command line: see ReadingOptions.
ANY, BASIC, UNLABELLED = "any", "basic", "unlabelled"
SPLIT_OF_NAME = map_to_splits(SPLIT_NAMES)  # of folders, and in the column of a table of labels
TABLE_NAMES = ("labels.csv", "labels.tsv")


class Layout(NamedTuple):
    """The layout of a folder.

    Attributes:
        root: The folder.
        kind: ANY, BASIC or UNLABELLED.
        folders: {split: its folder}, always with "train", which is `root` where there is no folder for it.
        table: The table of labels in `root`; None where there is none.
    """

    root: Path
    kind: str
    folders: dict[str, Path]
    table: Path | None

    @property
    def has_split_folders(self) -> bool:
        """Whether the training split is a folder of its own."""
        return self.folders["train"] != self.root

    @property
    def has_basic_names(self) -> bool:
        """Whether each folder of a split has the name of the split, in lower case."""
        return all(folder in (self.root, self.root / split) for split, folder in self.folders.items())


def find_layout(root: Path, kind: str) -> Layout:
    """Find the folders of the splits, and the table of labels beside them.

    Args:
        root: The folder.
        kind: BASIC knows the names train, val and test alone and no table, UNLABELLED no table.

    Raises:
        UsageError: There are two folders of one split, folders of held-out splits without one for training, a folder
            train/ that may be a class, or two tables.
    """
    names = list_folders(root)
    table = find_table(root) if kind == ANY else None
    by_split: dict[str, list[str]] = {}
    for name in names:
        split = SPLIT_OF_NAME.get(name.lower())
        if split is not None and (kind != BASIC or name == split):
            by_split.setdefault(split, []).append(name)
    for split, same in by_split.items():
        if len(same) > 1:
            raise UsageError(
                f"'{make_printable(root)}' has {len(same)} folders for the split {split}: {', '.join(same)}. Put them"
                " together, or move one away; --layout basic reads train, val and test alone"
            )
    if by_split and "train" not in by_split and table is None:
        held_out = by_split.get("test") or by_split["val"]
        raise UsageError(
            f"'{make_printable(root)}' has no train/ folder beside {held_out[0]}/: expected train/<class>/… and"
            " test/<class>/…, or class folders alone, of which none has the name of a split"
        )
    folders = {split: root / by_split[split][0] for split in SPLIT_NAMES if split in by_split}
    if "train" not in folders:
        return Layout(root, kind, {"train": root, **folders}, table)
    if kind == ANY and table is None and len(folders) == 1:
        _refuse_class_named_train(folders["train"], [name for name in names if name not in by_split["train"]])
    return Layout(root, kind, folders, table)


def find_table(folder: Path) -> Path | None:
    """Return the table of labels in a folder; None where there is none.

    Raises:
        UsageError: There are two.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.lower() in TABLE_NAMES and entry.is_file())
    if len(names) > 1:
        raise UsageError(f"'{make_printable(folder)}' has {' and '.join(names)}: only one table of labels is read")
    return folder / names[0] if names else None


def _refuse_class_named_train(train: Path, others: list[str]) -> None:
    """Refuse train/ with images alone beside other folders of images: it may be a split, or the class of trains."""
    if list_folders(train) or find_table(train):
        return
    with_images = [name for name in others if any(is_image_name(file) for file in os.listdir(train.parent / name))]
    if with_images:
        raise UsageError(
            f"'{make_printable(train)}' may be the training split or a class: beside it are folders of images"
            f" ({shorten_names(with_images)}). If all are classes, put them into a folder train/; if not, move the"
            " others away, or leave them out with --layout basic"
        )
