"""Images that cannot be decoded: all of a set are looked for at once."""

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from softcache.base.errors import CacheError, UnreadableImageError, make_printable
from softcache.base.progress import Progress
from softcache.base.threads import map_in_threads

from .decoding import open_image
from .encoded_images import EncodedImages
from .image_folder import ImageFolder

MAX_SKIPPED = 10_000  # images that --unreadable skip leaves out: their names are kept in the identity of a cache
_THREADS = 8
_SHOWN = 5  # files that a message names


def find_unreadable(paths: Iterable[Path], total: int, progress: Progress) -> dict[Path, str]:
    """Decode images, and return {path: what is wrong} of those that cannot be decoded.

    Args:
        paths: The images.
        total: Their number.
        progress: Shows how many are decoded.
    """
    unreadable = {}
    with closing(map_in_threads(_check_image, paths, _THREADS)) as errors:
        for error in progress(errors, total, "decoding images"):
            if error is not None:
                unreadable[Path(str(error.path))] = error.reason
    return unreadable


def find_unreadable_rows(images: EncodedImages, progress: Progress) -> dict[int, str]:
    """Decode images inside of files, and return {row of `images`: what is wrong} of those that cannot be decoded."""
    with closing(map_in_threads(images.find_error, range(len(images)), _THREADS)) as errors:
        shown = progress(errors, len(images), "decoding images")
        return {row: error.reason for row, error in enumerate(shown) if error is not None}


def make_unreadable_error(unreadable: dict[Path, str], total: int, root: Path) -> CacheError:
    """Make the error that counts the images that cannot be decoded, and names the first five.

    Args:
        unreadable: {path: what is wrong}, at least one.
        total: Number of images that were decoded.
        root: Folder to which the names are relative.
    """
    if len(unreadable) == 1:
        path, reason = next(iter(unreadable.items()))
        return CacheError(
            f"the image {make_printable(path, None)} {reason}. It is the only one of {total:,} that cannot be used:"
            " mend or remove it, or leave it out with --unreadable skip"
        )
    return CacheError(
        f"{len(unreadable):,} of {total:,} images in '{make_printable(root)}' cannot be used:"
        f" {describe_unreadable(unreadable, root)}. Mend or remove them, or leave them out with --unreadable skip"
    )


def find_all_unreadable(splits: Iterable[object], error: UnreadableImageError, progress: Progress) -> CacheError:
    """Make the error of all images of some splits that cannot be decoded, where one of them could not.

    Args:
        splits: The images of each split, in memory or in files.
        error: Of the image that could not be decoded. It is returned where all can be decoded now.
        progress: Shows how many are decoded.
    """
    images_of_splits = list(splits)
    encoded = [images for images in images_of_splits if isinstance(images, EncodedImages)]
    if encoded:
        found: dict[Path, str] = {}
        for images in encoded:
            rows = find_unreadable_rows(images, progress)
            found |= {Path(images.describe(row)): reason for row, reason in rows.items()}
        root = encoded[0].files.files[0].origin.parent
        return make_unreadable_error(found, sum(map(len, encoded)), root) if found else error
    folders = [images for images in images_of_splits if isinstance(images, ImageFolder)]
    total = sum(map(len, folders))
    unreadable = find_unreadable((images.root / name for images in folders for name in images.names), total, progress)
    return make_unreadable_error(unreadable, total, folders[0].root) if unreadable else error


def describe_unreadable(unreadable: dict[Path, str], root: Path) -> str:
    """Describe the first five images that cannot be decoded, relative to `root`."""
    shown = [
        f"{make_printable(path.relative_to(root) if path.is_relative_to(root) else path, 120)} {reason}"
        for path, reason in list(unreadable.items())[:_SHOWN]
    ]
    return "; ".join(shown) + ("; …" if len(unreadable) > _SHOWN else "")


def _check_image(path: Path) -> UnreadableImageError | None:
    try:
        with open_image(path) as image:
            image.load()
    except UnreadableImageError as error:
        return error
    return None
