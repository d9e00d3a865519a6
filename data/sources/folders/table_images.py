"""The image that a row of a table names.

No path of a table is opened: each is looked up among the images that are in the folder of the table.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

# What a row may name an image by: its path, its path without the ending, its name, its name without the ending.
_KEYS: tuple[Callable[[str], str], ...] = (
    lambda path: path,
    lambda path: os.path.splitext(path)[0],
    os.path.basename,
    lambda path: os.path.splitext(os.path.basename(path))[0],
)


class ImageFinder:
    """Finds the image that a row names: by its path, with or without its ending, or by its name where that is unique.

    Args:
        folder: To which the names are relative.
        images: The images in it and below, relative to `root`.
        root: The folder, or one above it.
    """

    def __init__(self, folder: Path, images: Sequence[str], root: Path):
        start = 0 if folder == root else len(f"{folder.relative_to(root).as_posix()}/")
        self._images, self._paths = images, [image[start:] for image in images]  # paths relative to the folder
        self._root = root
        self._real_folder = os.path.realpath(folder)
        self._is_inside: dict[str, bool] = {}  # of the folders of images
        self._indexes: list[dict[str, str | None]] = []  # of _KEYS, each made when the ones before lack a name

    def find(self, text: str) -> str | None:
        """Return the image of a name; None where there is none, or several.

        Raises:
            ValueError: The name leads out of the folder.
        """
        name = _normalize(text)
        index = self._find_index(name)
        image = index[name] if index is not None else None
        if image is not None and self._leads_out(image):
            raise ValueError("is a link that leads out of the folder: copy the file there")
        return image

    def is_ambiguous(self, text: str) -> bool:
        """Return whether several images have a name."""
        return self._find_index(_normalize(text)) is not None and self.find(text) is None

    def _find_index(self, name: str) -> dict[str, str | None] | None:
        """Return the first index that has a name."""
        for k, key in enumerate(_KEYS):
            if k == len(self._indexes):
                index: dict[str, str | None] = {}
                for image, path in zip(self._images, self._paths, strict=True):
                    value = key(path)
                    index[value] = None if value in index else image
                self._indexes.append(index)
            if name in self._indexes[k]:
                return self._indexes[k]
        return None

    def _leads_out(self, image: str) -> bool:
        path = os.path.join(self._root, image)
        parent = os.path.dirname(path)
        if parent not in self._is_inside:
            self._is_inside[parent] = self._contains(parent)
        return not self._is_inside[parent] or (os.path.islink(path) and not self._contains(path))

    def _contains(self, path: str) -> bool:
        return os.path.commonpath([os.path.realpath(path), self._real_folder]) == self._real_folder


def _normalize(name: str) -> str:
    """Write a name with slashes and without `./`.

    Raises:
        ValueError: It is absolute or has `..`.
    """
    path = name.replace("\\", "/")
    if path.startswith("/") or re.match("[A-Za-z]:/", path):
        raise ValueError("is an absolute path: write it relative to the table")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError("leads out of the folder of the table by '..'")
    return "/".join(parts)
