"""Folders of images: their layout, decoding, identity, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from softcache.base.errors import CacheError, UsageError
from softcache.data.images import image_sample
from softcache.data.images.image_arrays import ImageArrays
from softcache.data.images.image_folder import ImageFolder
from softcache.data.transfer_set import Split, TransferSet, load_transfer_set
from softcache.data.views.policy import parse_views
from softcache.data.views.render import render

Save = Callable[..., Image.Image]


def load_folder(root: Path, val_fraction: float = 0.25, **cut: int) -> TransferSet:
    return load_transfer_set(f"folder:{root}", Path("unused"), val_fraction=val_fraction, **cut)


def files_of(split: Split) -> list[str]:
    assert isinstance(split.images, ImageFolder)
    return list(split.images.names)


def pixels_of(split: Split, spec: str = "none") -> torch.Tensor:
    return render(split.images, parse_views(spec), 0, np.arange(len(split)), 0)


def decode(path: Path, mode: str = "RGB") -> torch.Tensor:
    """Decode an image with Pillow alone, uint8 [C, H, W]."""
    with Image.open(path) as image:
        pixels = np.array(image.convert(mode))
    return torch.from_numpy(pixels[None] if mode == "L" else pixels.transpose(2, 0, 1).copy())


@pytest.fixture
def pets(tmp_path: Path, save_image: Save) -> Path:
    """train/ and test/ with the classes cat and dog, square RGB images of 8 pixels."""
    root = tmp_path / "pets"
    for split, n in (("train", 8), ("test", 3)):
        for c, name in enumerate(("cat", "dog")):
            for k in range(n):
                save_image(root / split / name / f"{k}.png", k=10 * n + 5 * k + c)
    return root


# --- layout -------------------------------------------------------------------------------------------------------


def test_class_folders_give_splits_labels_and_classes(pets: Path) -> None:
    transfer_set = load_folder(pets)
    assert (transfer_set.name, transfer_set.classes) == ("folder", ("cat", "dog"))
    assert (transfer_set.channels, transfer_set.size) == (3, 8)
    assert {split: len(rows) for split, rows in transfer_set.splits.items()} == {"train": 12, "val": 4, "test": 6}
    for split, rows in transfer_set.splits.items():
        folder = "test" if split == "test" else "train"
        assert [name.split("/")[:2] for name in files_of(rows)] == [
            [folder, transfer_set.classes[label]] for label in rows.labels
        ]
    assert files_of(transfer_set.splits["test"]) == [
        f"test/{name}/{k}.png" for name in ("cat", "dog") for k in range(3)
    ]
    names = files_of(transfer_set.splits["train"]) + files_of(transfer_set.splits["val"])
    assert sorted(names) == [f"train/{name}/{k}.png" for name in ("cat", "dog") for k in range(8)]
    assert np.bincount(transfer_set.splits["val"].labels).tolist() == [2, 2]


def test_a_val_folder_alone_is_the_test_split(pets: Path) -> None:
    with_test = load_folder(pets)
    (pets / "test").rename(pets / "val")
    transfer_set = load_folder(pets)
    assert {split: len(rows) for split, rows in transfer_set.splits.items()} == {"train": 12, "val": 4, "test": 6}
    assert files_of(transfer_set.splits["test"]) == [
        name.replace("test/", "val/") for name in files_of(with_test.splits["test"])
    ]
    assert all(name.startswith("train/") for name in files_of(transfer_set.splits["val"]))


def test_with_val_and_test_folders_all_training_images_are_for_training(pets: Path, save_image: Save) -> None:
    for name in ("cat", "dog"):
        save_image(pets / "val" / name / "one.png", k=99)
    transfer_set = load_folder(pets, val_fraction=0.5)
    assert {split: len(rows) for split, rows in transfer_set.splits.items()} == {"train": 16, "val": 2, "test": 6}
    assert files_of(transfer_set.splits["val"]) == ["val/cat/one.png", "val/dog/one.png"]


@pytest.mark.parametrize("split", ["train", ""])
def test_images_without_class_folders_are_unlabelled(tmp_path: Path, save_image: Save, split: str) -> None:
    for k in range(8):
        save_image(tmp_path / split / f"{k}.png", k=k)
    transfer_set = load_folder(tmp_path)
    assert transfer_set.classes == ()
    assert {split: len(rows) for split, rows in transfer_set.splits.items()} == {"train": 6, "val": 2}
    assert all((rows.labels == -1).all() for rows in transfer_set.splits.values())


def test_unlabelled_training_images_with_a_labelled_test_split(pets: Path, save_image: Save) -> None:
    shutil.rmtree(pets / "train")
    for k in range(4):
        save_image(pets / "train" / f"{k}.png", k=k)
    transfer_set = load_folder(pets)
    assert transfer_set.classes == ("cat", "dog")
    assert transfer_set.splits["train"].labels.tolist() == [-1, -1, -1]
    assert transfer_set.splits["test"].labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_images_in_folders_below_a_class_folder_belong_to_the_class(pets: Path, save_image: Save) -> None:
    save_image(pets / "test" / "dog" / "big" / "old" / "rex.png")
    test = load_folder(pets).splits["test"]
    assert files_of(test)[-1] == "test/dog/big/old/rex.png"
    assert test.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_names_with_spaces_and_unicode(tmp_path: Path, save_image: Save) -> None:
    classes = ("Große Katze", "mon chien", "犬 №5")
    for c, name in enumerate(classes):
        for split, n in (("train", 4), ("test", 1)):
            for k in range(n):
                save_image(tmp_path / "a b" / split / name / f"bild ä {k}.png", k=10 * c + k)
    transfer_set = load_folder(tmp_path / "a b")
    assert transfer_set.classes == classes
    assert files_of(transfer_set.splits["test"]) == [f"test/{name}/bild ä 0.png" for name in classes]
    assert torch.equal(
        pixels_of(transfer_set.splits["test"])[2], decode(tmp_path / "a b" / "test" / "犬 №5" / "bild ä 0.png")
    )


def test_hidden_files_and_folders_and_other_files_are_ignored(pets: Path, save_image: Save) -> None:
    before = load_folder(pets).identity()
    # Files of file managers, notebooks and archives of other systems.
    (pets / "train" / ".DS_Store").write_bytes(b"\0")
    (pets / "train" / "cat" / "Thumbs.db").write_bytes(b"\0")
    (pets / "train" / "cat" / "readme.txt").write_text("cats")
    (pets / "train" / "cat" / "._0.png").write_bytes(b"\0\5\x16\7")
    save_image(pets / "train" / ".ipynb_checkpoints" / "0.png")
    save_image(pets / "test" / "dog" / ".ipynb_checkpoints" / "0-checkpoint.png")
    assert load_folder(pets).identity() == before


def test_a_folder_below_a_hidden_one_is_read(tmp_path: Path, pets: Path) -> None:
    (tmp_path / ".cache").mkdir()
    pets.rename(tmp_path / ".cache" / "pets")
    assert len(load_folder(tmp_path / ".cache" / "pets").splits["test"]) == 6


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "png", "bmp", "webp", "tif", "TIFF", "ppm"])
def test_every_usual_image_format_is_listed_and_decoded(pets: Path, save_image: Save, ending: str) -> None:
    path = pets / "test" / "dog" / f"z.{ending}"
    save_image(path, k=77)
    test = load_folder(pets).splits["test"]
    assert files_of(test)[-1] == f"test/dog/z.{ending}"
    assert torch.equal(pixels_of(test)[-1], decode(path))


def test_train_size_is_drawn_by_class(pets: Path) -> None:
    train = load_folder(pets, train_size=4).splits["train"]
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert set(files_of(train)) < set(files_of(load_folder(pets).splits["train"]))


# --- pixels -------------------------------------------------------------------------------------------------------


def test_pixels_are_those_that_pillow_decodes(pets: Path) -> None:
    for split in load_folder(pets).splits.values():
        pixels = pixels_of(split)
        assert pixels.shape == (len(split), 3, 8, 8)
        assert pixels.dtype == torch.uint8
        for view, name in zip(pixels, files_of(split), strict=True):
            assert torch.equal(view, decode(pets / name))


@pytest.mark.parametrize("mode", ["L", "1"])
def test_a_grey_folder_has_one_channel(tmp_path: Path, save_image: Save, mode: str) -> None:
    for k in range(8):
        save_image(tmp_path / f"{k}.png", k=k, mode=mode)
    transfer_set = load_folder(tmp_path)
    assert transfer_set.channels == 1
    for view, name in zip(
        pixels_of(transfer_set.splits["train"]), files_of(transfer_set.splits["train"]), strict=True
    ):
        assert view.shape == (1, 8, 8)
        assert torch.equal(view, decode(tmp_path / name, "L"))


def test_one_colour_image_makes_the_folder_rgb(tmp_path: Path, save_image: Save) -> None:
    for k in range(8):
        save_image(tmp_path / f"{k}.png", k=k, mode="RGB" if k == 5 else "L")
    transfer_set = load_folder(tmp_path)
    assert transfer_set.channels == 3
    for split in transfer_set.splits.values():
        for view, name in zip(pixels_of(split), files_of(split), strict=True):
            assert torch.equal(view, decode(tmp_path / name))
            assert (view[0] == view[1]).all() == (name != "5.png")


def test_palettes_and_transparency_are_read_as_rgb(tmp_path: Path, save_image: Save) -> None:
    for k, mode in enumerate(("P", "RGBA", "LA", "RGB")):
        save_image(tmp_path / f"{k}.png", k=k, mode=mode)
    transfer_set = load_folder(tmp_path)
    assert transfer_set.channels == 3
    assert torch.equal(
        torch.cat([pixels_of(split) for split in transfer_set.splits.values()]),
        torch.stack([decode(tmp_path / name) for split in transfer_set.splits.values() for name in files_of(split)]),
    )


def test_images_of_several_sizes_are_resized_to_the_size_of_the_views(tmp_path: Path, save_image: Save) -> None:
    sizes = [(8, 8), (20, 10), (10, 30), (7, 40), (100, 9), (64, 64)]
    for k, (width, height) in enumerate(sizes):
        save_image(tmp_path / f"{k}.png", width, height, k)
    transfer_set = load_folder(tmp_path)
    assert transfer_set.size == 0
    for spec in ("none:size=12", "none:size=12,resize=16", "crop-flip:size=12", "resized-crop-flip:size=12"):
        assert pixels_of(transfer_set.splits["train"], spec).shape == (len(transfer_set.splits["train"]), 3, 12, 12)


def test_an_image_of_the_size_of_the_views_is_not_resampled(tmp_path: Path, save_image: Save) -> None:
    for k, (width, height) in enumerate([(12, 12), (12, 20), (31, 12), (9, 9)]):
        save_image(tmp_path / f"{k}.png", width, height, k)
    images = ImageFolder(tmp_path, ("0.png", "1.png", "2.png"), "RGB", 0)
    square, tall, wide = render(images, parse_views("none:size=12"), 0, np.arange(3), 0)
    assert torch.equal(square, decode(tmp_path / "0.png"))
    assert torch.equal(tall, decode(tmp_path / "1.png")[:, 4:16])
    assert torch.equal(wide, decode(tmp_path / "2.png")[:, :, 9:21])


def test_images_that_are_not_square_have_no_common_size(tmp_path: Path, save_image: Save) -> None:
    for k in range(4):
        save_image(tmp_path / f"{k}.png", 8, 6, k)
    assert load_folder(tmp_path).size == 0


def test_views_of_a_folder_are_those_of_the_same_images_in_memory(pets: Path) -> None:
    train = load_folder(pets).splits["train"]
    in_memory = ImageArrays(torch.stack([decode(pets / name) for name in files_of(train)]))
    for spec in ("crop-flip:pad=2,mixup=0.2", "resized-crop-flip", "none:size=6,resize=9"):
        index = np.array([5, 0, 11, 5])
        assert torch.equal(
            render(train.images, parse_views(spec), 3, index, 2), render(in_memory, parse_views(spec), 3, index, 2)
        )


# --- errors -------------------------------------------------------------------------------------------------------


def test_a_truncated_image_is_named_when_it_is_decoded(pets: Path) -> None:
    path = pets / "test" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:-60])
    split = load_folder(pets).splits["test"]
    assert pixels_of(Split(split.images.take(np.array([0, 3])), split.labels[[0, 3]], "")).shape == (2, 3, 8, 8)
    with pytest.raises(CacheError, match=r"the image .*/test/dog/1\.png cannot be decoded: ") as raised:
        pixels_of(split)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "webp", "ppm"])
def test_an_image_cut_in_half_never_becomes_a_view(tmp_path: Path, save_image: Save, ending: str) -> None:
    for k in range(3):
        save_image(tmp_path / f"{k}.{ending}", 24, 24, k)
    path = tmp_path / f"1.{ending}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CacheError, match=rf"the image .*1\.{ending} cannot be decoded: "):
        [pixels_of(split) for split in load_folder(tmp_path).splits.values()]


@pytest.mark.parametrize("content", [b"not an image\n", b""])
def test_a_file_that_is_not_an_image_is_named(pets: Path, content: bytes) -> None:
    (pets / "train" / "cat" / "3.png").write_bytes(content)
    with pytest.raises(CacheError, match=r"the image .*/train/cat/3\.png cannot be decoded: ") as raised:
        load_folder(pets)
    assert "\n" not in str(raised.value)


def test_a_deleted_file_is_named(pets: Path) -> None:
    split = load_folder(pets).splits["test"]
    (pets / "test" / "cat" / "2.png").unlink()
    with pytest.raises(CacheError, match=r"the image .*/test/cat/2\.png, has changed .* cannot be read: No such"):
        pixels_of(split)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no folder '.*/nowhere'"):
        load_folder(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path, save_image: Save) -> None:
    save_image(tmp_path / "one.png")
    with pytest.raises(UsageError, match=r"there is no folder '.*one\.png'"):
        load_folder(tmp_path / "one.png")


def test_an_empty_folder_is_refused_with_the_extensions_of_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no image in '.*' \(looked for \.bmp \.jpeg \.jpg .*\.webp\)"):
        load_folder(tmp_path)


def test_an_empty_train_folder_is_refused(pets: Path) -> None:
    shutil.rmtree(pets / "train")
    shutil.rmtree(pets / "test")
    (pets / "train").mkdir()
    with pytest.raises(UsageError, match=r"there is no image in '.*/train/?'"):
        load_folder(pets)


def test_an_empty_class_is_named(pets: Path) -> None:
    for path in (pets / "train" / "dog").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match=r"there is no image in '.*/train/dog'"):
        load_folder(pets)


def test_a_single_class_is_refused_by_name(pets: Path) -> None:
    for split in ("train", "test"):
        shutil.rmtree(pets / split / "dog")
    with pytest.raises(UsageError, match=r"'.*/train' has one class, 'cat': at least two are needed"):
        load_folder(pets)


@pytest.mark.parametrize("split", ["test", "val"])
def test_different_classes_of_splits_are_refused_with_the_difference(pets: Path, save_image: Save, split: str) -> None:
    if split == "val":
        shutil.copytree(pets / "test", pets / "val")
    (pets / split / "dog").rename(pets / split / "hamster")
    difference = "which has no hamster"
    with pytest.raises(UsageError, match=rf"the classes of '.*/{split}' .*are not those .*{difference}"):
        load_folder(pets)


def test_a_test_folder_without_a_train_folder_is_refused(pets: Path) -> None:
    (pets / "train").rename(pets / "images")
    with pytest.raises(UsageError, match=r"has no train/ folder beside test/: expected train/<class>/… and test/<"):
        load_folder(pets)


def test_a_single_image_cannot_be_split_into_train_and_val(tmp_path: Path, save_image: Save) -> None:
    save_image(tmp_path / "only.png")
    with pytest.raises(UsageError, match=r"--val-fraction 0\.25 of 1 training rows leaves none to train on"):
        load_folder(tmp_path)


# --- identity -----------------------------------------------------------------------------------------------------


def test_the_identity_does_not_depend_on_the_folders_path(pets: Path, tmp_path: Path) -> None:
    before = load_folder(pets).identity()
    shutil.copytree(pets, tmp_path / "moved")
    assert load_folder(tmp_path / "moved").identity() == before
    assert load_folder(Path(f"{pets}/")).identity() == before


def change_pixels(root: Path) -> None:
    with Image.open(root / "test" / "cat" / "1.png") as image:
        changed = image.copy()
    changed.putpixel((3, 3), (1, 2, 3))
    changed.save(root / "test" / "cat" / "1.png")


def change_label(root: Path) -> None:
    (root / "test" / "cat" / "1.png").rename(root / "test" / "dog" / "9.png")


def change_name(root: Path) -> None:
    (root / "test" / "cat" / "1.png").rename(root / "test" / "cat" / "1b.png")


def change_class_name(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / "hound")


def remove_image(root: Path) -> None:
    (root / "test" / "cat" / "2.png").unlink()


@pytest.mark.parametrize("change", [change_pixels, change_label, change_name, change_class_name, remove_image])
def test_the_identity_changes_with_the_files(pets: Path, change: Callable[[Path], None]) -> None:
    before = load_folder(pets)
    change(pets)
    after = load_folder(pets)
    assert after.splits["test"].content != before.splits["test"].content
    assert after.identity() != before.identity()


def test_only_the_split_of_a_changed_file_changes(pets: Path) -> None:
    before = load_folder(pets).splits
    change_pixels(pets)
    after = load_folder(pets).splits
    assert {split for split in before if after[split].content != before[split].content} == {"test"}


def test_progress_is_shown_for_the_images_of_every_split(pets: Path) -> None:
    calls: list[tuple[int, str]] = []

    def progress(items, total, text):  # type: ignore[no-untyped-def]
        calls.append((total, text))
        return items

    load_transfer_set(f"folder:{pets}", Path(), val_fraction=0.25, progress=progress)
    assert calls == [(12, "reading images"), (4, "reading images"), (6, "reading images")]


def test_an_image_of_16_bits_is_refused_rather_than_clipped_to_white(pets: Path) -> None:
    name = next((pets / "train").rglob("*.png"))
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(name)
    with pytest.raises(CacheError, match="more than 8 bits a channel"):
        load_folder(pets)


def test_a_colour_image_among_grey_ones_is_refused_rather_than_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_sample, "_SAMPLED_IMAGES", 1)  # the first image of each split
    grey = Image.new("L", (8, 8), 7)
    for name in ("train/a/0", "train/a/1", "train/b/0", "train/b/1", "test/a/0", "test/b/0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        grey.save(tmp_path / f"{name}.png")
    Image.new("RGB", (8, 8), (200, 3, 4)).save(tmp_path / "test/b/0.png")
    rows = load_folder(tmp_path).splits["test"]
    with pytest.raises(CacheError, match=r"test/b/0\.png is in colour \(RGB\)"):
        pixels_of(rows)
