"""Another teacher, image, class, crop, normalisation, tap, precision, codec or split is refused, in both stages.

Each time the message lists the fields that differ, requested values beside those of the cache, and its last line is
the command that makes the right cache. The data are a folder of images, so that everything about them can be changed.
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
from softcache.pipeline.cache.reader import CacheReader
from tests.helpers.caches import PETS_CACHE_COMMAND, parse_printed_command, save_pets, save_pets_teacher, stat_files
from tests.helpers.commands import Stages

STUDENT = ("student", "--data", "folder:pets", "--cache", "p", "--arch", "mlp:4", "--epochs", "1")
Change = Callable[[], None]


@pytest.fixture(scope="module")
def pets_home(tmp_path_factory: pytest.TempPathFactory, save_image: Any) -> Path:
    """A folder with images (pets), a teacher's weights (pets.pt) and their cache `p`: 2 draws, the tap hidden1."""
    import contextlib

    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("home")
    save_pets(folder / "pets", save_image)
    save_pets_teacher(folder / "pets.pt")
    with contextlib.chdir(folder):
        main([*PETS_CACHE_COMMAND, "--out", "p"])
    return folder


@pytest.fixture
def home(pets_home: Path, tmp_path: Path, stages: Stages) -> Path:
    """A copy of that folder, which is the working directory of the test."""
    shutil.copytree(pets_home, tmp_path, dirs_exist_ok=True)
    return tmp_path


def parse_differences(error: str, first: str, second: str) -> dict[str, tuple[str, str]]:
    """{field: (value in the column first, value in the column second)} of a message."""
    lines = error.splitlines()
    heading = next(i for i, line in enumerate(lines) if line.split() == [*first.split(), *second.split()])
    start, middle = lines[heading].index(first), lines[heading].rindex(second)
    rows = lines[heading + 1 : -1]
    return {row[:start].strip(): (row[start:middle].strip(), row[middle:].strip()) for row in rows}


def change_nothing() -> None:
    """The options of the command are what differs."""


def change_weights() -> None:
    save_pets_teacher(Path("pets.pt"), seed=1)


def define_arch() -> None:
    """Define an arch of another name with the same layers, which takes the same weights."""
    Path("my_mlp.py").write_text(
        "from softcache.pipeline.models.archs.mlp import mlp\nmake = lambda **shape: mlp('4', **shape)\n"
    )


def change_image() -> None:
    """Change one level of one colour of one pixel."""
    with Image.open("pets/test/cat/1.png") as image:
        changed = image.copy()
    red, green, blue = changed.getpixel((3, 3))  # type: ignore[misc]
    changed.putpixel((3, 3), (red ^ 1, green, blue))
    changed.save("pets/test/cat/1.png")


def swap_classes() -> None:
    """Exchange the folders of cats and dogs: the same images, the same names of classes."""
    for split in ("train", "test"):
        Path("pets", split, "cat").rename("aside")
        Path("pets", split, "dog").rename(f"pets/{split}/cat")
        Path("aside").rename(f"pets/{split}/dog")


def rename_class() -> None:
    for split in ("train", "test"):
        Path("pets", split, "dog").rename(f"pets/{split}/hound")


def remove_image() -> None:
    Path("pets/train/dog/7.png").unlink()


CONTENT = tuple(f"transfer_set.content.{split}" for split in ("train", "val", "test"))
# {case: (what changes on disk, options of the command, fields that then differ)}
CASES: dict[str, tuple[Change, tuple[str, ...], tuple[str, ...]]] = {
    "other weights": (change_weights, (), ("teacher.weights",)),
    "another arch": (define_arch, ("--teacher", "my_mlp:make"), ("teacher.arch",)),
    "one changed image": (change_image, (), CONTENT[2:]),
    "one image less": (remove_image, (), CONTENT[:1]),
    "swapped classes": (swap_classes, (), CONTENT),
    "a renamed class": (rename_class, (), ("transfer_set.classes", *CONTENT)),
    "another crop padding": (change_nothing, ("--views", "crop:pad=2"), ("views.pad",)),
    "another view policy": (change_nothing, ("--views", "none"), ("views.policy", "views.pad")),
    "another normalisation": (change_nothing, ("--normalize", "imagenet"), ("teacher.mean", "teacher.std")),
    "another precision": (change_nothing, ("--precision", "bfloat16"), ("precision",)),
    "another codec": (change_nothing, ("--codec", "sqrt8"), ("codec",)),
    "another split seed": (
        change_nothing,
        ("--seed", "1"),
        (*CONTENT[:2], "transfer_set.cut.seed", "views.seed"),
    ),
    "another share to validate on": (
        change_nothing,
        ("--val-fraction", "0.25"),
        (*CONTENT[:2], "transfer_set.cut.val_fraction"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_stage_one_refuses_another_identity_and_prints_the_command_for_a_cache_of_it(
    home: Path, stages: Stages, case: str
) -> None:
    """The printed command is run: it makes the requested cache in a new folder."""
    change, options, fields = CASES[case]
    change()
    before, existing = stat_files(Path("p")), CacheReader(Path("p")).manifest.identity
    error = stages.fails(1, *PETS_CACHE_COMMAND, *options, "--out", "p")
    assert "'p' holds another cache:" in error
    differences = parse_differences(error, "requested", "in the cache")
    assert set(differences) == set(fields)
    assert stat_files(Path("p")) == before

    arguments = parse_printed_command(error)
    assert arguments[arguments.index("--out") + 1] == "p-2"
    result = stages(*arguments)
    requested = CacheReader(Path("p-2")).manifest.identity
    assert requested != existing
    for field in fields:
        values = [get_field(identity, field) for identity in (requested, existing)]
        assert [format_value(value) for value in values] == list(differences[field])
    assert (result["draws"], list(CacheReader(Path("p-2")).manifest.taps)) == (2, ["hidden1"])
    code, out, err = stages.call(*PETS_CACHE_COMMAND, *options, "--out", "p-2")
    assert code == 0, err
    assert "is complete" in out


def get_field(identity: Any, field: str) -> Any:
    for part in field.split("."):
        identity = identity.get(part)
    return identity


def format_value(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"


@pytest.mark.parametrize("case", ["one changed image", "one image less", "swapped classes", "a renamed class"])
@pytest.mark.parametrize("command", ["student", "evaluate", "check-cache"])
def test_stage_two_refuses_other_images_and_prints_the_command_for_a_cache_of_them(
    home: Path, stages: Stages, case: str, command: str
) -> None:
    if command == "evaluate":
        stages(*STUDENT, "--out", "r")
    change, _, fields = CASES[case]
    change()
    commands: dict[str, tuple[str, ...]] = {
        "student": (*STUDENT, "--out", "new"),
        "evaluate": ("evaluate", "r", "--data", "folder:pets"),
        "check-cache": ("check-cache", "p", "--deep", "--data", "folder:pets"),
    }
    error = stages.fails(1, *commands[command])
    assert "the cache 'p' was made from other data:" in error
    differences = parse_differences(error, "in the data", "in the cache")
    assert set(differences) == {field.removeprefix("transfer_set.") for field in fields}
    loaded = load_transfer_set("folder:pets", Path(), val_fraction=0.1).identity()
    cached = CacheReader(Path("p")).manifest.identity["transfer_set"]
    for field, values in differences.items():
        assert [format_value(get_field(identity, field)) for identity in (loaded, cached)] == list(values)
    assert not Path("new").exists()

    stages(*parse_printed_command(error))
    student = ["p-2" if word == "p" else word for word in STUDENT]
    assert stages(*student, "--out", "new")["cache"]["draws"] == 2
    assert list(CacheReader(Path("p-2")).manifest.taps) == ["hidden1"]


def test_stage_two_refuses_a_tap_that_the_cache_does_not_hold(home: Path, stages: Stages) -> None:
    """The message lists those that it holds; the printed command adds the missing one."""
    command = (*STUDENT, "--loss", "hint:teacher=relu1,student=relu1", "--out", "r")
    error = stages.fails(1, *command)
    assert "does not contain relu1 (it has: hidden1)" in error
    arguments = [word.replace("folder:PATH", "folder:pets") for word in parse_printed_command(error)]
    stages(*arguments)
    assert list(CacheReader(Path("p")).manifest.taps) == ["hidden1", "relu1"]
    stages(*command)


def test_stage_two_takes_everything_else_from_the_cache_itself(
    home: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crop and split are no options of a student: they are those of the cache, as its normalisation is by default."""
    for option in ("--views", "--val-fraction", "--codec", "--train-size"):
        code, _, err = stages.call(*STUDENT, option, "1")
        assert code == 2
        assert "No such option" in err
    input_spec = stages(*STUDENT, "--out", "r")["student"]["preparation"]
    teacher = CacheReader(Path("p")).manifest.identity["teacher"]
    assert (input_spec["mean"], input_spec["std"]) == (teacher["mean"], teacher["std"])


def test_the_printed_command_has_the_first_folder_that_does_not_exist(home: Path, stages: Stages) -> None:
    Path("p-2").mkdir()
    Path("p-3").write_text("mine")
    change_weights()
    arguments = parse_printed_command(stages.fails(1, *PETS_CACHE_COMMAND, "--out", "p"))
    assert arguments[arguments.index("--out") + 1] == "p-4"


def test_names_with_spaces_and_quotes_are_quoted_in_the_printed_command(home: Path, stages: Stages) -> None:
    """A shell reads the same arguments back."""
    Path("p").rename("tom's cache")
    Path("pets").rename("tom's pets & more")
    Path("pets.pt").rename("a teacher.pt")
    Image.new("RGB", (8, 8), (1, 2, 3)).save("tom's pets & more/test/cat/1.png")
    command = list(PETS_CACHE_COMMAND)
    command[command.index("folder:pets")] = "folder:tom's pets & more"
    command[command.index("pets.pt")] = "a teacher.pt"
    arguments = parse_printed_command(stages.fails(1, *command, "--out", "tom's cache"))
    assert arguments[arguments.index("--out") + 1] == "tom's cache-2"
    stages(*arguments)


def test_weights_that_differ_in_one_bit_are_other_weights(home: Path, stages: Stages) -> None:
    state = torch.load("pets.pt", weights_only=True)
    state["hidden1.weight"].view(torch.int32)[0, 0] ^= 1
    torch.save(state, "pets.pt")
    error = stages.fails(1, *PETS_CACHE_COMMAND, "--out", "p")
    assert set(parse_differences(error, "requested", "in the cache")) == {"teacher.weights"}
