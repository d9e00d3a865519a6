"""Another teacher, image, class, crop, normalisation, tap, precision, codec or split is refused, in both stages.

Each time the fields are named, what is asked beside what is there, and the last line is the command that makes the
right cache. Images are a folder's, so that everything about them can be changed.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from softcache.data.transfer_set import load_transfer_set
from softcache.pipeline.cache.reader import Cache
from tests.helpers.caches import PETS, files, printed_command, save_pets, save_pets_teacher
from tests.helpers.commands import Stages

STUDENT = ("student", "--data", "folder:pets", "--cache", "p", "--arch", "mlp:4", "--epochs", "1")
Change = Callable[[], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, save_image: Any) -> Path:
    """A folder with images (pets), a teacher's weights (pets.pt) and their cache `p`: 2 draws, the tap hidden1."""
    import contextlib

    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("made")
    save_pets(folder / "pets", save_image)
    save_pets_teacher(folder / "pets.pt")
    with contextlib.chdir(folder):
        main([*PETS, "--out", "p"])
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path, stages: Stages) -> Path:
    """A copy of that folder, where the test is."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def side_by_side(error: str, one: str, other: str) -> dict[str, tuple[str, str]]:
    """{field: (value under one, value under other)} of a message, cut where the columns of its heading are."""
    lines = error.splitlines()
    heading = next(i for i, line in enumerate(lines) if line.split() == [*one.split(), *other.split()])
    first, second = lines[heading].index(one), lines[heading].rindex(other)
    rows = lines[heading + 1 : -1]
    return {row[:first].strip(): (row[first:second].strip(), row[second:].strip()) for row in rows}


def unchanged() -> None:
    """The command alone asks for something else."""


def other_weights() -> None:
    save_pets_teacher(Path("pets.pt"), seed=1)


def another_arch() -> None:
    """The same layers, and weights, under another name."""
    Path("my_mlp.py").write_text(
        "from softcache.pipeline.models.archs.mlp import mlp\nmake = lambda **shape: mlp('4', **shape)\n"
    )


def one_changed_picture() -> None:
    """One level of one colour of one pixel."""
    with Image.open("pets/test/cat/1.png") as image:
        changed = image.copy()
    red, green, blue = changed.getpixel((3, 3))  # type: ignore[misc]
    changed.putpixel((3, 3), (red ^ 1, green, blue))
    changed.save("pets/test/cat/1.png")


def swapped_classes() -> None:
    """The cats are now in the dogs' folder: the same images, the same names of classes."""
    for split in ("train", "test"):
        Path("pets", split, "cat").rename("aside")
        Path("pets", split, "dog").rename(f"pets/{split}/cat")
        Path("aside").rename(f"pets/{split}/dog")


def renamed_class() -> None:
    for split in ("train", "test"):
        Path("pets", split, "dog").rename(f"pets/{split}/hound")


def one_picture_less() -> None:
    Path("pets/train/dog/7.png").unlink()


CONTENT = tuple(f"transfer_set.content.{split}" for split in ("train", "val", "test"))
ASKED: dict[str, tuple[Change, tuple[str, ...], tuple[str, ...]]] = {
    "other weights": (other_weights, (), ("teacher.weights",)),
    "another arch": (another_arch, ("--teacher", "my_mlp:make"), ("teacher.arch",)),
    "one changed image": (one_changed_picture, (), CONTENT[2:]),
    "one image less": (one_picture_less, (), CONTENT[:1]),
    "swapped classes": (swapped_classes, (), CONTENT),
    "a renamed class": (renamed_class, (), ("transfer_set.classes", *CONTENT)),
    "another crop padding": (unchanged, ("--views", "crop:pad=2"), ("views.pad",)),
    "another view policy": (unchanged, ("--views", "none"), ("views.policy", "views.pad")),
    "another normalisation": (unchanged, ("--normalize", "imagenet"), ("teacher.mean", "teacher.std")),
    "another precision": (unchanged, ("--precision", "bfloat16"), ("precision",)),
    "another codec": (unchanged, ("--codec", "sqrt8"), ("codec",)),
    "another split seed": (
        unchanged,
        ("--seed", "1"),
        (*CONTENT[:2], "transfer_set.cut.seed", "views.seed"),
    ),
    "another share to validate on": (
        unchanged,
        ("--val-fraction", "0.25"),
        (*CONTENT[:2], "transfer_set.cut.val_fraction"),
    ),
}


@pytest.mark.parametrize("case", ASKED)
def test_stage_one_refuses_what_a_cache_is_not_and_prints_the_command_that_makes_it(
    home: Path, stages: Stages, case: str
) -> None:
    """The command is run: it makes a cache in a new folder, which is the one that was asked for."""
    change, options, fields = ASKED[case]
    change()
    before, there = files(Path("p")), Cache(Path("p")).manifest.identity
    error = stages.fails(1, *PETS, *options, "--out", "p")
    assert "'p' holds another cache:" in error
    found = side_by_side(error, "asked", "there")
    assert set(found) == set(fields)
    assert files(Path("p")) == before

    arguments = printed_command(error)
    assert arguments[arguments.index("--out") + 1] == "p-2"
    made = stages(*arguments)
    asked = Cache(Path("p-2")).manifest.identity
    assert asked != there
    for field in fields:
        values = [value_of(identity, field) for identity in (asked, there)]
        assert [shown(value) for value in values] == list(found[field])
    assert (made["draws"], list(Cache(Path("p-2")).manifest.taps)) == (2, ["hidden1"])
    code, out, err = stages.call(*PETS, *options, "--out", "p-2")
    assert code == 0, err
    assert "whole already" in out


def value_of(identity: Any, field: str) -> Any:
    for part in field.split("."):
        identity = identity.get(part)
    return identity


def shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"


@pytest.mark.parametrize("case", ["one changed image", "one image less", "swapped classes", "a renamed class"])
@pytest.mark.parametrize("command", ["student", "evaluate", "check-cache"])
def test_stage_two_refuses_other_pictures_and_prints_the_command_for_a_cache_of_them(
    home: Path, stages: Stages, case: str, command: str
) -> None:
    if command == "evaluate":
        stages(*STUDENT, "--out", "r")
    change, _, fields = ASKED[case]
    change()
    asked: dict[str, tuple[str, ...]] = {
        "student": (*STUDENT, "--out", "new"),
        "evaluate": ("evaluate", "r", "--data", "folder:pets"),
        "check-cache": ("check-cache", "p", "--deep", "--data", "folder:pets"),
    }
    error = stages.fails(1, *asked[command])
    assert "the cache 'p' was made from other data:" in error
    found = side_by_side(error, "here", "in the cache")
    assert set(found) == {field.removeprefix("transfer_set.") for field in fields}
    here, there = (
        load_transfer_set("folder:pets", Path(), val_fraction=0.1).identity(),
        Cache(Path("p")).manifest.identity,
    )
    for field, values in found.items():
        assert [shown(value_of(it, field)) for it in (here, there["transfer_set"])] == list(values)
    assert not Path("new").exists()

    stages(*printed_command(error))
    of_these = ["p-2" if word == "p" else word for word in STUDENT]
    assert stages(*of_these, "--out", "new")["cache"]["draws"] == 2
    assert list(Cache(Path("p-2")).manifest.taps) == ["hidden1"]


def test_stage_two_refuses_a_tap_that_is_not_there(home: Path, stages: Stages) -> None:
    """With the taps that are; the command adds the one that is wanted."""
    asked = (*STUDENT, "--loss", "hint:teacher=relu1,student=relu1", "--out", "r")
    error = stages.fails(1, *asked)
    assert "does not contain relu1 (it has: hidden1)" in error
    arguments = [word.replace("folder:PATH", "folder:pets") for word in printed_command(error)]
    stages(*arguments)
    assert list(Cache(Path("p")).manifest.taps) == ["hidden1", "relu1"]
    stages(*asked)


def test_stage_two_takes_everything_else_from_the_cache_itself(
    home: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crop, normalisation, split and draws are no options of a student: what it sees is what the cache says."""
    for option in ("--views", "--normalize", "--val-fraction", "--codec", "--train-size"):
        code, _, err = stages.call(*STUDENT, option, "1")
        assert code == 2
        assert "No such option" in err
    normalised = stages(*STUDENT, "--out", "r")["student"]["preparation"]
    identity = Cache(Path("p")).manifest.identity["teacher"]
    assert (normalised["mean"], normalised["std"]) == (identity["mean"], identity["std"])


def test_the_folder_of_the_command_is_the_first_that_is_free(home: Path, stages: Stages) -> None:
    Path("p-2").mkdir()
    Path("p-3").write_text("mine")
    other_weights()
    arguments = printed_command(stages.fails(1, *PETS, "--out", "p"))
    assert arguments[arguments.index("--out") + 1] == "p-4"


def test_names_with_spaces_and_quotes_come_back_from_the_command(home: Path, stages: Stages) -> None:
    """What is printed is what a shell reads back as the same arguments."""
    Path("p").rename("tom's cache")
    Path("pets").rename("tom's pets & more")
    Path("pets.pt").rename("a teacher.pt")
    one_changed_picture_in("tom's pets & more")
    asked = list(PETS)
    asked[asked.index("folder:pets")] = "folder:tom's pets & more"
    asked[asked.index("pets.pt")] = "a teacher.pt"
    arguments = printed_command(stages.fails(1, *asked, "--out", "tom's cache"))
    assert arguments[arguments.index("--out") + 1] == "tom's cache-2"
    stages(*arguments)


def one_changed_picture_in(root: str) -> None:
    Image.new("RGB", (8, 8), (1, 2, 3)).save(Path(root, "test/cat/1.png"))


def test_weights_that_differ_in_one_bit_are_other_weights(home: Path, stages: Stages) -> None:
    state = torch.load("pets.pt", weights_only=True)
    state["hidden1.weight"].view(torch.int32)[0, 0] ^= 1
    torch.save(state, "pets.pt")
    assert set(side_by_side(stages.fails(1, *PETS, "--out", "p"), "asked", "there")) == {"teacher.weights"}
