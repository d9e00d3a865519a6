"""Data sets whose files torchvision reads, and downloads where they are missing."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.base.errors import CacheError
from softcache.base.files import refuse_special_file, refuse_special_files
from softcache.data.images.image_arrays import ImageArrays

from .source_data import LabelledImages, SourceData


def load_torchvision(dataset: Any, root: Path, folder: str) -> SourceData:
    """Load the training and the test split of a data set of torchvision.

    Args:
        dataset: A class such as torchvision.datasets.MNIST, whose instances have `data`, `targets` and `classes`.
        root: Folder of the data sets that torchvision reads.
        folder: Where in `root` torchvision keeps the files of this data set; named in messages.

    Returns:
        Images uint8 [N, C, H, W], C being 1 where the files have no channels.

    Raises:
        CacheError: Files are missing and cannot be downloaded, they are damaged or no regular files, or the numbers of
            images and labels differ.
    """
    refuse_special_files(root / folder)
    refuse_special_file(root / getattr(dataset, "filename", folder))  # the archive that torchvision would unpack
    splits = {}
    for split in ("train", "test"):
        loaded = _read_or_download(dataset, root, folder, is_train=split == "train")
        pixels = torch.as_tensor(loaded.data)
        images = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        labels = np.asarray(loaded.targets, np.int64)
        if len(labels) != len(images):
            raise CacheError(
                f"the files of {dataset.__name__} in '{root / folder}' hold {len(images)} images, {len(labels)} labels"
            )
        splits[split] = LabelledImages(ImageArrays(images), labels)
    return SourceData(splits, tuple(loaded.classes))


def _read_or_download(dataset: Any, root: Path, folder: str, is_train: bool) -> Any:
    name = dataset.__name__
    try:
        return dataset(root, train=is_train, download=False)
    except (AssertionError, ValueError, TypeError, EOFError) as error:
        raise CacheError(f"the files of {name} in '{root / folder}' are damaged ({error})") from None
    except RuntimeError:  # torchvision's error for files that are missing or have another checksum
        pass
    try:
        return dataset(root, train=is_train, download=True)
    except Exception as error:  # urllib, sockets, checksums: whatever a download can raise
        reason = " ".join(str(error).split())  # torchvision's own messages have several lines
        raise CacheError(
            f"{name} is not under '{root}' and cannot be downloaded ({reason}): put its files into '{root / folder}',"
            " or name their folder with --data-root"
        ) from None
