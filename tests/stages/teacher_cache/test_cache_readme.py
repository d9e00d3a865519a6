"""README.md in a cache says what it is, to those who have nothing but the folder; no path of this machine is in it."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.caches import (
    CACHE_COMMAND,
    PETS_CACHE_COMMAND,
    make_folder_with_cache,
    save_pets,
    save_pets_teacher,
)
from tests.helpers.commands import Stages

LITTLE = ("--draws", "2", "--taps", "flatten")


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the teacher and, as `c`, a cache of 2 draws and the tap flatten."""
    return make_folder_with_cache(tiny, tmp_path_factory.mktemp("made"), *LITTLE)


@pytest.fixture
def small(made: Path, tmp_path: Path, stages: Stages) -> Path:
    """The cache `c` in the folder where a test is."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "c"


def table(card: str) -> dict[str, str]:
    """The rows of the card's table."""
    return dict(re.findall(r"^\| ([^|]+?) \| (.+) \|$", card, re.MULTILINE))


def commands(card: str) -> list[list[str]]:
    """The commands that the card names, as a shell would split them."""
    block = re.search(r"```sh\n(.*?)```", card, re.DOTALL)
    assert block
    lines = [shlex.split(line) for line in block[1].splitlines()]
    assert all(line[:3] == ["python", "-m", "softcache"] for line in lines)
    return [line[3:] for line in lines]


def test_the_card_says_what_the_manifest_says(small: Path) -> None:
    card, record = (small / "README.md").read_text(), json.loads((small / "manifest.json").read_text())
    rows = table(card)
    assert "`cnn`" in rows["teacher"]
    assert record["identity"]["teacher"]["weights"] in rows["teacher"]
    assert "float32" in rows["teacher"]
    assert "1 × 8 × 8" in rows["input"]
    assert rows["data"] == "digits: train 200, val 180, test 360; 10 classes"
    assert rows["views"].startswith("`crop` (pad 1, ")
    assert "seed 0); 2 of each training image" in rows["views"]
    for split, found in record["teacher"].items():
        assert f"{split} {found['accuracy']:.4f}" in rows["teacher's accuracy"]
    assert rows["kept"] == "logits; features `flatten` [512]"
    assert "float16" in rows["codec"]
    size = sum(path.stat().st_size for path in small.glob("*/*.h5"))
    assert rows["size"] == f"{size / 1e6:.1f} MB in {len(record['shards'])} files"
    assert record["fingerprint"] in rows["fingerprint"]
    assert all(f"{name} {version}" in rows["made with"] for name, version in record["versions"].items())
    assert rows["licence"].startswith("not stated")
    assert "It holds no images." in card


def test_a_licence_is_stated_where_it_was_given(small: Path, stages: Stages) -> None:
    stages(*CACHE_COMMAND, *LITTLE, "--license", "CC-BY-4.0", "--out", "licensed")
    assert table(Path("licensed/README.md").read_text())["licence"] == "CC-BY-4.0"
    stages(*CACHE_COMMAND, "--draws", "3", "--out", "licensed")
    assert table(Path("licensed/README.md").read_text())["licence"] == "CC-BY-4.0"


@pytest.mark.parametrize("name", ["c", "what my teacher's head said"])
def test_the_commands_that_the_card_names_work_where_the_cache_lies(small: Path, stages: Stages, name: str) -> None:
    if name != "c":
        stages(*CACHE_COMMAND, *LITTLE, "--out", name)
    check, student = commands(Path(name, "README.md").read_text())
    assert (check[0], student[0]) == ("check-cache", "student")
    stages(*check)
    assert stages(*student, "--epochs", "1")["student"]["arch"] == "resnet8"


def test_the_card_of_a_folder_of_pictures_says_where_to_put_their_path(
    stages: Stages, tmp_path: Path, save_image: Any
) -> None:
    save_pets(tmp_path / "pets", save_image)
    save_pets_teacher(tmp_path / "pets.pt")
    stages(*PETS_CACHE_COMMAND, "--out", "p")
    for command in commands((tmp_path / "p/README.md").read_text()):
        assert "folder:PATH" in command
        more = ("--epochs", "1") if command[0] == "student" else ()
        stages(*(word.replace("PATH", "pets") for word in command), *more)


@pytest.mark.parametrize("moved", [False, True])
def test_the_card_grows_with_the_cache(small: Path, stages: Stages, moved: bool) -> None:
    """Also when the folder was given another name in between: the card was edited by nobody."""
    out = "c"
    if moved:
        small.rename(out := "moved")
    stages(*CACHE_COMMAND, "--draws", "3", "--taps", "pool2", "--out", out)
    card = Path(out, "README.md").read_text()
    assert "; 3 of each training image" in table(card)["views"]
    assert "`pool2`" in table(card)["kept"]
    assert [command[2 if command[0] == "student" else 1] for command in commands(card)] == [out, out]


def test_a_card_that_someone_edited_is_theirs(small: Path, stages: Stages) -> None:
    mine = (small / "README.md").read_text().replace("not stated: ask whoever gave it to you", "CC0")
    (small / "README.md").write_text(mine)
    stages(*CACHE_COMMAND, "--draws", "3", "--out", "c")
    assert (small / "README.md").read_text() == mine


def test_no_path_of_this_machine_is_in_a_cache(stages: Stages, tmp_path: Path, save_image: Any) -> None:
    """With every path given whole: data, weights, the cache itself."""
    here = tmp_path / "private-place"
    save_pets(here / "pets", save_image)
    save_pets_teacher(here / "pets.pt")
    absolute = [word.replace("folder:pets", f"folder:{here}/pets") for word in PETS_CACHE_COMMAND]
    absolute[absolute.index("pets.pt")] = f"{here}/pets.pt"
    asked = (*absolute, "--data-root", here / "root", "--out", here / "c")
    stages(*asked)
    stages(*asked, "--draws", "3")
    for path in sorted((here / "c").rglob("*")):
        if path.is_file():
            assert b"private-place" not in path.read_bytes(), path
            assert str(tmp_path).encode() not in path.read_bytes(), path
    stages("cache-pack", here / "c", here / "c.tar")
    assert b"private-place" not in (here / "c.tar").read_bytes()
