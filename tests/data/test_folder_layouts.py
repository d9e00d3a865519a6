"""The layouts of folders that people have: names of splits, class folders alone, unlabelled images beside them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softcache.data.images.image_folder import ImageFolder
from softcache.data.transfer_set import TransferSet, load_transfer_set
from tests.helpers.commands import Stages

Save = Callable[..., Image.Image]


def load_folder(root: Path, **options: float | str) -> TransferSet:
    arguments = {"val_fraction": 0.25, **options}
    return load_transfer_set(f"folder:{root}", Path("unused"), **arguments)  # type: ignore[arg-type]


def list_labels(transfer_set: TransferSet, split: str) -> dict[str, str]:
    """Return {name of an image: name of its class, or ""} of a split."""
    rows = transfer_set.splits[split]
    assert isinstance(rows.images, ImageFolder)
    return {
        name: transfer_set.classes[label] if label >= 0 else ""
        for name, label in zip(rows.images.names, rows.labels.tolist(), strict=True)
    }


@pytest.fixture
def pets(tmp_path: Path, save_image: Save) -> Path:
    """train/ with 4 and test/ with 2 images of each of the classes cat and dog."""
    for split, count in (("train", 4), ("test", 2)):
        for c, name in enumerate(("cat", "dog")):
            for k in range(count):
                save_image(tmp_path / "pets" / split / name / f"{k}.png", k=10 * count + 5 * k + c)
    return tmp_path / "pets"


# --- names of the splits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["Train", "TRAIN", "training", "Training"])
@pytest.mark.parametrize("held_out", ["Test", "testing", "Val", "valid", "validation", "dev"])
def test_splits_have_the_names_that_people_give_them(pets: Path, train: str, held_out: str) -> None:
    (pets / "train").rename(pets / train)
    (pets / "test").rename(pets / held_out)
    transfer_set = load_folder(pets)
    assert {split: len(rows) for split, rows in transfer_set.splits.items()} == {"train": 6, "val": 2, "test": 4}
    assert set(list_labels(transfer_set, "test")) == {
        f"{held_out}/{c}/{k}.png" for c in ("cat", "dog") for k in (0, 1)
    }
    assert transfer_set.cut["layout"] == "any"
    assert transfer_set.notes[0].startswith(
        f"folder 'pets': train ({train}/) 8, test ({held_out}/) 4 images; 2 classes"
    )


def test_classes_that_differ_in_case_alone_are_named(tmp_path: Path, save_image: Callable[..., object]) -> None:
    for name in ("Cat", "cat", "dog"):
        for k in range(3):
            save_image(tmp_path / f"pets/train/{name}/{k}.png", 8, 8, k)
    loaded = load_transfer_set(f"folder:{tmp_path / 'pets'}", Path(), val_fraction=0.3, test_fraction=0.2)
    assert "the classes Cat and cat differ in case alone" in loaded.notes
    assert "'pets': train 5, val 2, test 2 rows; 3 classes (Cat, cat, dog)" in loaded.notes


def test_val_and_test_are_both_taken_as_they_are(pets: Path) -> None:
    shutil.copytree(pets / "test", pets / "valid")
    transfer_set = load_folder(pets)
    assert {split: len(rows) for split, rows in transfer_set.splits.items()} == {"train": 8, "val": 4, "test": 4}


def test_a_plain_folder_is_recorded_as_it_always_was(pets: Path) -> None:
    transfer_set = load_folder(pets)
    assert transfer_set.cut == {"val_fraction": 0.25, "seed": 0, "train_size": 0}
    assert transfer_set.identity() == load_folder(pets, layout="basic").identity()
    assert transfer_set.notes == ("folder 'pets': train 8, test 4 images; 2 classes (cat, dog)",)


@pytest.mark.parametrize(
    ("classes", "train", "test"),
    [
        ("", "19611f1c2e3aaf62", "4d66c0d13782a79c"),
        ("natural", "b4a128f5f71505cb", "0d7e327acd0991ce"),
    ],
)
def test_basic_gives_the_rows_of_the_first_caches(tmp_path: Path, classes: str, train: str, test: str) -> None:
    """Digests of the version that knew no other layout; the files are the same on every machine."""
    for split, count in (("train", 3), ("test", 1), ("val", 1)):
        for c, name in enumerate(("b2", "b10")):
            for k in range(count):
                path = tmp_path / split / name / f"{k}.pgm"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"P5 2 2 255\n" + bytes((c, k, count, 0)))
    digests = {split: rows.content[:16] for split, rows in load_folder(tmp_path, classes=classes).splits.items()}
    assert (digests["train"], digests["test"]) == (train, test)
    (tmp_path / "train/loose.pgm").write_bytes(b"P5 2 2 255\n" + bytes(4))
    basic = load_folder(tmp_path, classes=classes, layout="basic").splits
    assert {split: rows.content[:16] for split, rows in basic.items()} == digests


# --- class folders alone ------------------------------------------------------------------------------------------


def test_class_folders_alone_are_training_images(pets: Path) -> None:
    transfer_set = load_folder(pets / "train")
    assert {split: len(rows) for split, rows in transfer_set.splits.items()} == {"train": 6, "val": 2}
    assert all(name.startswith(label) for name, label in list_labels(transfer_set, "train").items())
    assert "layout" not in transfer_set.cut
    assert "there is no test split: --test-fraction 0.1 cuts one from" in transfer_set.notes[-1]


def test_they_are_cut_by_class_and_the_seed(pets: Path) -> None:
    transfer_set = load_folder(pets / "train", test_fraction=0.25)
    counts = {split: np.bincount(rows.labels).tolist() for split, rows in transfer_set.splits.items()}
    assert counts == {"train": [2, 2], "val": [1, 1], "test": [1, 1]}
    assert not any("test split" in note for note in transfer_set.notes)
    assert load_folder(pets / "train", test_fraction=0.25, seed=5).identity() != transfer_set.identity()


def test_a_train_folder_without_held_out_folders_is_cut_as_well(pets: Path) -> None:
    shutil.rmtree(pets / "test")
    assert set(load_folder(pets).splits) == {"train", "val"}
    assert set(load_folder(pets, test_fraction=0.25).splits) == {"train", "val", "test"}


def test_unlabelled_reads_folders_of_images_without_labels(pets: Path) -> None:
    transfer_set = load_folder(pets, layout="unlabelled")
    assert transfer_set.classes == ()
    assert {split: len(rows) for split, rows in transfer_set.splits.items()} == {"train": 6, "val": 2, "test": 4}
    assert transfer_set.cut["layout"] == "unlabelled"
    assert load_folder(pets / "train", layout="unlabelled").classes == ()
    assert not any("test split" in note for note in load_folder(pets / "train", layout="unlabelled").notes)


# --- held-out splits that lack classes ----------------------------------------------------------------------------


@pytest.mark.parametrize("is_empty", [False, True])
def test_held_out_images_are_aligned_by_the_names_of_their_classes(pets: Path, is_empty: bool) -> None:
    shutil.rmtree(pets / "test/cat")
    if is_empty:
        (pets / "test/cat").mkdir()
    transfer_set = load_folder(pets)
    assert transfer_set.splits["test"].labels.tolist() == [1, 1]
    assert "the split test has no image of 1 of 2 classes: cat" in transfer_set.notes
    assert "layout" not in transfer_set.cut


# --- images beside the class folders ------------------------------------------------------------------------------


def test_loose_images_are_unlabelled_rows(pets: Path, save_image: Save) -> None:
    for k in range(2):
        save_image(pets / f"train/loose{k}.png", k=90 + k)
    save_image(pets / "test/loose.png", k=99)
    (pets / "train/readme.txt").write_text("pets")
    transfer_set = load_folder(pets)
    rows = list_labels(transfer_set, "train") | list_labels(transfer_set, "val")
    assert len(rows) == 10
    assert {name for name, label in rows.items() if not label} == {"train/loose0.png", "train/loose1.png"}
    assert transfer_set.notes[0].endswith("2 classes (cat, dog); 2 unlabelled")
    assert "1 beside the class folders: test/loose.png" in transfer_set.left_out
    assert "1 not named as images (.txt): train/readme.txt" in transfer_set.left_out
    assert transfer_set.cut["layout"] == "any"
    basic = load_folder(pets, layout="basic")
    assert "3 beside the class folders: " in basic.left_out
    assert "layout" not in basic.cut


def test_a_cache_from_before_loose_images_were_rows_is_opened(stages: Stages, pets: Path, save_image: Save) -> None:
    """A cache that records no layout is read as the version that wrote it read the folder."""
    save_image(pets / "train/loose.png", k=91)
    shutil.copytree(pets / "test", pets / "validation")
    data, views = ("--data", f"folder:{pets}"), ("--views", "none")
    stages("teacher", *data, *views, "--layout", "basic", "--arch", "mlp:2", "--epochs", 1, "--out", "t")
    cache = ("teacher-cache", *data, *views, "--weights", "t", "--draws", 1)
    stages(*cache, "--layout", "basic", "--out", "old")
    stages(*cache, "--out", "new")
    cuts, rows = {}, {}
    for name in ("old", "new"):
        manifest = json.loads((Path(name) / "manifest.json").read_text())
        cuts[name] = manifest["identity"]["transfer_set"]["cut"].get("layout")
        rows[name] = manifest["splits"]
        student = ("student", *data, "--cache", name, "--arch", "mlp:2", "--epochs", 1, "--out", f"s-{name}")
        assert stages(*student)["student"]["test"]["rows"] == 4
    assert cuts == {"old": None, "new": "any"}
    assert sum(rows["old"].values()) == 12
    assert rows["new"] == {"train": 9, "val": 4, "test": 4}
    (pets / "train/loose.png").unlink()
    assert "made from other data" in stages.fails(1, "check-cache", "new", *data, "--deep")


def test_teacher_student_and_baseline_learn_from_partly_labelled_images(
    stages: Stages, pets: Path, save_image: Save
) -> None:
    for k in range(6):
        save_image(pets / f"train/loose{k}.png", k=90 + k)
    data, views = ("--data", f"folder:{pets}"), ("--views", "none")
    code, out, _ = stages.call("teacher", *data, *views, "--arch", "mlp:2", "--epochs", 1, "--out", "t")
    assert code == 0
    assert "the teacher is trained on the " in out
    stages("teacher-cache", *data, *views, "--weights", "t", "--draws", 1, "--out", "c")
    student = ("student", *data, "--cache", "c", "--arch", "mlp:2", "--epochs", 1)
    code, out, _ = stages.call(*student, "--baseline", "--out", "s")
    assert code == 0
    assert "labels; the student from the teacher's logits on all 13 images" in out
    stages(*student, "--labelled", 2, "--out", "two")
    assert "--sampler needs the labels of all training images" in stages.fails(
        2, *student, "--sampler", "balanced", "--out", "none"
    )


# --- what is refused ----------------------------------------------------------------------------------------------


def move_all(pets: Path, save_image: Save) -> None:
    (pets / "train").rename(pets / "images")


def two_of_one_split(pets: Path, save_image: Save) -> None:
    shutil.copytree(pets / "train", pets / "Training")


def two_test_folders(pets: Path, save_image: Save) -> None:
    shutil.copytree(pets / "test", pets / "Testing")


def unknown_class(pets: Path, save_image: Save) -> None:
    save_image(pets / "test/fox/0.png")


def empty_class(pets: Path, save_image: Save) -> None:
    (pets / "train/fox").mkdir()


def empty_test(pets: Path, save_image: Save) -> None:
    shutil.rmtree(pets / "test")
    (pets / "test").mkdir()


def one_class(pets: Path, save_image: Save) -> None:
    shutil.rmtree(pets / "train/dog")
    shutil.rmtree(pets / "test/dog")


def class_named_train(pets: Path, save_image: Save) -> None:
    shutil.rmtree(pets)
    for name in ("bus", "car", "train"):
        save_image(pets / name / "0.png")


def no_image(pets: Path, save_image: Save) -> None:
    shutil.rmtree(pets)
    (pets / "train").mkdir(parents=True)


def one_folder_of_images(pets: Path, save_image: Save) -> None:
    shutil.rmtree(pets)
    save_image(pets / "images/0.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (move_all, "has no train/ folder beside test/: expected train/<class>/… and test/<class>/…"),
        (two_of_one_split, "has 2 folders for the split train: Training, train. Put them together, or move one away"),
        (two_test_folders, "has 2 folders for the split test: Testing, test. Put them together"),
        (unknown_class, "are not those of the training split, which has no fox: move them away, or add images"),
        (empty_class, "train/fox' (looked for .bmp"),
        (empty_test, "there is no image in '"),
        (one_class, "train' has one class, 'cat': at least two are needed"),
        (class_named_train, "train' may be the training split or a class: beside it are folders of images (bus, car)"),
        (no_image, "there is no image in '"),
        (one_folder_of_images, "has one class, 'images': at least two are needed. Images without labels are read as"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused_in_one_line(
    stages: Stages, pets: Path, save_image: Save, change: Callable[[Path, Save], None], message: str
) -> None:
    change(pets, save_image)
    error = stages.fails(2, "teacher", "--data", f"folder:{pets}", "--arch", "mlp:2", "--out", "none")
    assert message in error
    assert error.isprintable()
    assert not Path("none").exists()
