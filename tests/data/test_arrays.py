"""Arrays: the rows, labels, classes and splits of .npz files, folders of .npy files and single .npy files."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from softcache.base.errors import CacheError, UsageError
from softcache.data.images.image_arrays import ImageArrays
from softcache.data.images.row_arrays import RowArrays
from softcache.data.transfer_set import TransferSet, load_transfer_set

N = 30
X: NDArray[np.float32] = np.arange(N * 4, dtype=np.float32).reshape(N, 4) / 7
Y: NDArray[np.int64] = np.arange(N) % 3
Arrays = dict[str, Any]


def save(folder: Path, **arrays: Any) -> str:
    """Save arrays in a .npz file, and return the data that name it."""
    np.savez(folder / "table.npz", **arrays)
    return f"arrays:{folder / 'table.npz'}"


def load(data: str, **options: Any) -> TransferSet:
    return load_transfer_set(data, Path(), **{"val_fraction": 0.2, **options})


def read(transfer_set: TransferSet, split: str) -> NDArray[np.float32]:
    images = transfer_set.splits[split].images
    return images.load_plain(np.arange(len(images)), 0, 0).numpy()


def test_floats_come_out_as_they_are_and_are_cut_into_splits(tmp_path: Path) -> None:
    rows = load(save(tmp_path, x=X, y=Y), test_fraction=0.2)
    assert {split: len(part) for split, part in rows.splits.items()} == {"train": 19, "val": 5, "test": 6}
    assert (rows.shape, rows.channels, rows.size, rows.classes) == ((4,), 4, 0, ("0", "1", "2"))
    for split, part in rows.splits.items():
        assert part.source_rows is not None
        np.testing.assert_array_equal(read(rows, split), X[part.source_rows])
        np.testing.assert_array_equal(part.labels, Y[part.source_rows])
    assert rows.notes == ("'table': train 19, val 5, test 6 rows; 3 classes (0, 1, 2)",)


@pytest.mark.parametrize("dtype", ["float64", "float16", ">f4", "int32", "uint8", "bool"])
def test_views_are_float32_whatever_is_stored(tmp_path: Path, dtype: str) -> None:
    x = (X * 3).astype(dtype)
    rows = load(save(tmp_path, x=x, y=Y))
    assert read(rows, "train").dtype == np.float32
    np.testing.assert_array_equal(read(rows, "train"), x[rows.splits["train"].source_rows].astype(np.float32))
    assert any("float64" in note for note in rows.notes) == (dtype == "float64")


@pytest.mark.parametrize(
    ("shape", "channels", "size"),
    [((8, 8), 1, 8), ((8, 8, 1), 1, 8), ((8, 8, 3), 3, 8), ((1, 8, 8), 1, 8), ((3, 8, 8), 3, 8), ((3, 3, 3), 3, 3)],
)
def test_square_bytes_of_one_or_three_channels_are_images(
    tmp_path: Path, shape: tuple[int, ...], channels: int, size: int
) -> None:
    x = np.random.default_rng(0).integers(0, 256, (N, *shape), np.uint8)
    images = load(save(tmp_path, x=x, y=Y))
    assert isinstance(images.splits["train"].images, ImageArrays)
    assert (images.shape, images.channels, images.size) == ((), channels, size)
    is_last = shape[0] not in (1, 3)
    expected = np.moveaxis(x.reshape(N, 8, 8, -1), 3, 1) if is_last else x
    np.testing.assert_array_equal(read(images, "train"), expected[images.splits["train"].source_rows])


@pytest.mark.parametrize("shape", [(8, 9), (2, 8, 8), (4, 4, 4, 4), (64,), ()])
def test_other_bytes_are_rows_of_numbers(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rows = load(save(tmp_path, x=np.ones((N, *shape), np.uint8), y=Y), test_fraction=0.2)
    assert isinstance(rows.splits["train"].images, RowArrays)
    assert rows.shape == (shape or (1,))
    assert len(rows.notes) == 1 + (len(shape) > 1)


def test_a_folder_and_a_file_give_the_same_rows(tmp_path: Path) -> None:
    arrays = {"x_train": X, "y_train": Y, "X_test": X[:9], "y_test": Y[:9], "x_valid": X[9:], "y_valid": Y[9:]}
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    (folder / "readme.txt").write_text("text")
    np.save(folder / "weights.npy", X)
    in_file, in_folder = load(save(tmp_path, **arrays)), load(f"arrays:{folder}")
    assert in_file.identity() == in_folder.identity()
    assert {split: len(part) for split, part in in_file.splits.items()} == {"train": 30, "val": 21, "test": 9}
    images = in_folder.splits["train"].images
    assert isinstance(images, RowArrays)
    assert isinstance(images.values, np.memmap)
    assert in_file.left_out == ""
    assert in_folder.left_out.endswith("2 arrays are left out: weights, readme.txt")


def test_one_npy_file_is_rows_without_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    rows = load(f"arrays:{tmp_path / 'x.npy'}")
    assert rows.classes == ()
    assert rows.count_labelled() == {"train": 0, "val": 0}


@pytest.mark.parametrize(
    "split",
    [np.array(["train", "VAL", "test"])[Y], np.array([b"training", b"dev", b"test"])[Y], Y, Y.astype(np.uint8)],
)
def test_an_array_divides_the_rows(tmp_path: Path, split: NDArray[Any]) -> None:
    rows = load(save(tmp_path, x=X, y=(Y + 1) % 2, split=split))
    for number, name in enumerate(("train", "val", "test")):
        np.testing.assert_array_equal(read(rows, name), X[number == Y])
        np.testing.assert_array_equal(rows.splits[name].labels, ((Y + 1) % 2)[number == Y])


NAMES = np.array(["pear", "apple", "plum"])


@pytest.mark.parametrize(
    ("y", "more", "classes", "first"),
    [
        (Y, {}, ("0", "1", "2"), [0, 1, 2]),
        (Y.astype(np.float64), {}, ("0", "1", "2"), [0, 1, 2]),
        (Y[:, None], {}, ("0", "1", "2"), [0, 1, 2]),
        (Y == 1, {}, ("0", "1"), [0, 1, 0]),
        (Y - 1, {}, ("0", "1"), [-1, 0, 1]),
        (np.where(Y == 1, np.nan, Y), {}, ("0", "1", "2"), [0, -1, 2]),
        (NAMES[Y], {}, ("apple", "pear", "plum"), [1, 0, 2]),
        (NAMES[Y].astype("S"), {}, ("apple", "pear", "plum"), [1, 0, 2]),
        (np.where(Y == 2, "", NAMES[Y]), {}, ("apple", "pear"), [1, 0, -1]),
        (
            NAMES[Y],
            {"classes": np.array(["plum", "fig", "pear", "apple"])},
            ("plum", "fig", "pear", "apple"),
            [2, 3, 0],
        ),
        (Y, {"classes": NAMES}, ("pear", "apple", "plum"), [0, 1, 2]),
        (np.full(N, -1), {}, (), [-1, -1, -1]),
    ],
)
def test_labels_are_numbers_or_text(
    tmp_path: Path, y: NDArray[Any], more: Arrays, classes: tuple[str, ...], first: list[int]
) -> None:
    rows = load(save(tmp_path, x_train=X, y_train=y, x_val=X, y_val=y, **more))
    assert rows.classes == classes
    assert rows.splits["val"].labels[:3].tolist() == first


def test_content_tells_values_dtype_shape_and_labels_apart(tmp_path: Path) -> None:
    def content(x: NDArray[Any], y: NDArray[Any] = Y) -> str:
        return load(save(tmp_path, x=x, y=y)).splits["train"].content

    changed = X.copy()
    changed[0, 3] += 1e-6
    contents = [
        content(X),
        content(changed),
        content(X.astype(np.float64)),
        content(X.reshape(N, 2, 2)),
        content(X, Y[::-1]),
    ]
    assert len(set(contents)) == 5
    assert content(np.asfortranarray(X)) == content(X.astype(">f4")) == contents[0]


class HasCode:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("ran"),)  # type: ignore[return-value]


WRONG: dict[str, tuple[Arrays, str]] = {
    "no-x": ({"images": X, "y": Y}, "has no array x: it has images, y; expected x and y"),
    "objects": ({"x": np.array([HasCode()] * 3, object)}, "holds Python objects"),
    "text": ({"x": X.astype(str), "y": Y}, "convert text to numbers"),
    "complex": ({"x": X.astype(complex), "y": Y}, "'x' is complex128"),
    "dates": ({"x": X.astype("M8[s]"), "y": Y}, "'x' is datetime64"),
    "empty": ({"x": X[:0], "y": Y[:0]}, "it has no rows"),
    "no-entries": ({"x": X[:, :0], "y": Y}, "a row has 0 numbers"),
    "scalar": ({"x": np.float32(1)}, "it has no rows"),
    "lengths": ({"x": X, "y": Y[:-1]}, "'x' has 30 rows, and 'y' has 29 labels"),
    "one-hot": ({"x": X, "y": np.eye(3)[Y]}, "save y.argmax(1)"),
    "text-and-columns": ({"x": X, "y": NAMES[np.stack([Y, Y], 1)]}, "expected one label for each row, [N]"),
    "infinite-label": ({"x": X, "y": np.where(Y == 1, np.inf, Y)}, "'y' has the value inf in row 1"),
    "negative-label": ({"x": X, "y": Y - 7}, "'y' has the label -7 in row"),
    "labels-from-1": ({"x": X, "y": Y + 1}, "they begin at 0; save y - 1"),
    "large-label": ({"x": X, "y": Y * 10**9}, "the largest is 1,048,575"),
    "one-class": ({"x": X, "y": Y * 0}, "all labels are of one class (0)"),
    "few-names": ({"x": X, "y": Y, "classes": NAMES[:2]}, "'y' has the label 2, but 'classes' has 2 names"),
    "unknown-name": ({"x": X, "y": NAMES[Y], "classes": NAMES[:2]}, "has the label 'plum', which 'classes'"),
    "equal-names": ({"x": X, "y": Y, "classes": np.array(["a", "a", "b"])}, "the name 'a' more than once"),
    "numbers-as-names": ({"x": X, "y": Y, "classes": np.arange(3)}, "expected the names of the classes"),
    "control": ({"x": X, "y": np.array(["a\n", "b\x1b", "c"])[Y]}, "cannot be printed"),
    "no-train": ({"x_test": X, "y_test": Y}, "there are no training rows"),
    "x-twice": ({"x": X, "x_train": X}, "there are both 'x' and 'x_train'"),
    "x-in-two-cases": ({"x": X, "X": X}, "are the same: leave out one"),
    "y-alone": ({"x_train": X, "y": Y}, "there is 'y', but no rows for it"),
    "split-twice": ({"x": X, "y": Y, "split": Y, "x_test": X}, "there are both 'split' and 'x_test'"),
    "split-length": ({"x": X, "y": Y, "split": Y[1:]}, "'split' has the shape [29]"),
    "split-text": ({"x": X, "y": Y, "split": NAMES[Y]}, "'split' has 'apple': expected train"),
    "split-number": ({"x": X, "y": Y, "split": Y + 1}, "'split' has 3: expected train"),
    "split-floats": ({"x": X, "y": Y, "split": Y / 2}, "'split' is float64"),
    "split-no-train": ({"x": X, "y": Y, "split": Y * 0 + 1}, "'split' has no row of train"),
    "shapes": ({"x_train": X, "x_test": X[:, :3]}, "'x_train' has rows of numbers [4], and 'x_test'"),
    "image-and-row": ({"x": np.ones((N, 8, 8), np.uint8), "x_test": np.ones((N, 8, 8))}, "has images [1, 8, 8], and"),
    "kinds": ({"x": X, "y": Y, "x_test": X, "y_test": NAMES[Y]}, "some labels are text and others are numbers"),
    "fields": ({"x": np.zeros(N, [("a", "f4")])}, "has named fields"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arrays_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arrays, words = WRONG[case]
    with pytest.raises(UsageError) as error:
        load(save(tmp_path, **arrays))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.nan, "2 of 24 rows of 'x' have values"),
        (np.inf, "is inf in row 5, place [1]"),
        (1e300, "is 1e+300 in row 5"),
    ],
)
def test_values_that_are_not_finite_are_counted_and_named(tmp_path: Path, value: float, words: str) -> None:
    x = X.astype(np.float64)
    x[[5, 6], [1, 2]] = value
    with pytest.raises(CacheError) as error:
        load(save(tmp_path, x=x, y=Y), seed=1)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def zip_with(folder: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> str:
    with zipfile.ZipFile(folder / "table.npz", "w", compression) as archive:
        archive.writestr("x.npy", content)
    return f"arrays:{folder / 'table.npz'}"


def to_npy(values: NDArray[Any], shape: str = "") -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue().replace(str(values.shape).encode(), shape.encode()) if shape else file.getvalue()


@pytest.mark.parametrize(
    ("write", "error", "words"),
    [
        (lambda folder: f"arrays:{folder / 'none.npz'}", UsageError, "there is no file or folder"),
        (lambda folder: f"arrays:{folder}", UsageError, "has no .npy files"),
        (lambda folder: "arrays:", UsageError, "needs what it reads after a colon: --data arrays:FILE.npz"),
        (lambda folder: f"arrays:{__file__}", UsageError, "is no .npz or .npy file"),
        (lambda folder: zip_with(folder, b"no array"), CacheError, "the array 'x' of"),
        (lambda folder: zip_with(folder, to_npy(X)[:-8]), CacheError, "480 bytes, and the file holds 472"),
        (lambda folder: zip_with(folder, to_npy(X, "(99999999999, 4)"[:7] + ")")), CacheError, "table.npz'"),
        (lambda folder: zip_with(folder, to_npy(X)[:40]), CacheError, "the array 'x' of"),
    ],
)
def test_files_that_are_no_arrays_are_refused_in_one_line(
    tmp_path: Path, write: Callable[[Path], str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as raised:
        load(write(tmp_path))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_unpacks_to_far_more_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softcache.data.sources.array_files._ANY_RATIO_BYTES", 1 << 20)
    data = zip_with(tmp_path, to_npy(np.zeros((1 << 19, 4))), zipfile.ZIP_DEFLATED)
    with pytest.raises(CacheError, match=r"unpacks to 0\.0 GB from 0\.000 GB, more than"):
        load(data)


@pytest.mark.parametrize("cut", [10, 60, 130, -5])
def test_damaged_files_are_refused(tmp_path: Path, cut: int) -> None:
    path = Path(save(tmp_path, x=X, y=Y).partition(":")[2])
    path.write_bytes(path.read_bytes()[:cut])
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:cut])
    for file in ("table.npz", "x.npy"):
        with pytest.raises(CacheError):
            load(f"arrays:{tmp_path / file}")
