"""The README.md of a cache: what the cache is, for people who have nothing but its folder; no path of this machine."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from softcache.pipeline.cache.manifest import Manifest, PrecisionRecord, ShardRecord
from softcache.stages.teacher_cache.cache_readme import format_readme, write_readme
from tests.helpers.caches import (
    CACHE_COMMAND,
    PETS_CACHE_COMMAND,
    make_folder_with_cache,
    save_pets,
    save_pets_teacher,
)
from tests.helpers.commands import Stages

OPTIONS = ("--draws", "2", "--taps", "flatten")


@pytest.fixture(scope="module")
def home(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the teacher and, as `c`, a cache of 2 draws and the tap flatten."""
    return make_folder_with_cache(tiny, tmp_path_factory.mktemp("home"), *OPTIONS)


@pytest.fixture
def small(home: Path, tmp_path: Path, stages: Stages) -> Path:
    """A copy of the cache `c` in the folder of the test."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    return tmp_path / "c"


def parse_table(readme: str) -> dict[str, str]:
    """The rows of the table of a README."""
    return dict(re.findall(r"^\| ([^|]+?) \| (.+) \|$", readme, re.MULTILINE))


def parse_commands(readme: str) -> list[list[str]]:
    """The arguments of the commands in a README, as a shell splits them."""
    block = re.search(r"```sh\n(.*?)```", readme, re.DOTALL)
    assert block
    lines = [shlex.split(line) for line in block[1].splitlines()]
    assert all(line[0] == "softcache" for line in lines)
    return [line[1:] for line in lines]


def test_the_readme_has_the_facts_of_the_manifest(small: Path) -> None:
    readme, record = (small / "README.md").read_text(), json.loads((small / "manifest.json").read_text())
    rows = parse_table(readme)
    assert "`cnn`" in rows["teacher"]
    assert record["identity"]["teacher"]["weights"] in rows["teacher"]
    assert "float32" in rows["teacher"]
    assert "1 × 8 × 8" in rows["input"]
    assert rows["data"] == "digits: train 200, val 180, test 360; 10 classes"
    assert rows["views"].startswith("`crop` (pad 1, ")
    assert "seed 0); 2 of each training image" in rows["views"]
    for split, figures in record["teacher"].items():
        assert f"{split} {figures['accuracy']:.4f}" in rows["teacher's accuracy"]
    assert rows["contents"] == "logits; features `flatten` [512]"
    assert "float16" in rows["codec"]
    size = sum(path.stat().st_size for path in small.glob("*/*.h5"))
    assert rows["size"] == f"{size / 1e6:.1f} MB in {len(record['shards'])} files"
    assert record["fingerprint"] in rows["fingerprint"]
    assert all(f"{name} {version}" in rows["made with"] for name, version in record["versions"].items())
    assert rows["licence"].startswith("not stated")
    assert "It holds no images." in readme


def test_the_licence_is_the_one_of_the_command_that_made_the_cache(small: Path, stages: Stages) -> None:
    stages(*CACHE_COMMAND, *OPTIONS, "--license", "CC-BY-4.0", "--out", "licensed")
    assert parse_table(Path("licensed/README.md").read_text())["licence"] == "CC-BY-4.0"
    stages(*CACHE_COMMAND, "--draws", "3", "--out", "licensed")
    assert parse_table(Path("licensed/README.md").read_text())["licence"] == "CC-BY-4.0"


@pytest.mark.parametrize("name", ["c", "the cache of my teacher's logits"])
def test_the_commands_in_the_readme_work_in_the_folder_above_the_cache(small: Path, stages: Stages, name: str) -> None:
    if name != "c":
        stages(*CACHE_COMMAND, *OPTIONS, "--out", name)
    check, student = parse_commands(Path(name, "README.md").read_text())
    assert (check[0], student[0]) == ("check-cache", "student")
    stages(*check)
    assert stages(*student, "--epochs", "1")["student"]["arch"] == "resnet8"


def test_the_commands_for_a_folder_of_images_have_a_place_for_its_path(
    stages: Stages, tmp_path: Path, save_image: Any
) -> None:
    save_pets(tmp_path / "pets", save_image)
    save_pets_teacher(tmp_path / "pets.pt")
    stages(*PETS_CACHE_COMMAND, "--out", "p")
    for command in parse_commands((tmp_path / "p/README.md").read_text()):
        assert "folder:PATH" in command
        more = ("--epochs", "1") if command[0] == "student" else ()
        stages(*(word.replace("PATH", "pets") for word in command), *more)


@pytest.mark.parametrize("moved", [False, True])
def test_the_readme_is_refreshed_when_the_cache_grows(small: Path, stages: Stages, moved: bool) -> None:
    """Also when the folder has got another name: nobody has edited the text."""
    out = "c"
    if moved:
        small.rename(out := "moved")
    stages(*CACHE_COMMAND, "--draws", "3", "--taps", "pool2", "--out", out)
    readme = Path(out, "README.md").read_text()
    assert "; 3 of each training image" in parse_table(readme)["views"]
    assert "`pool2`" in parse_table(readme)["contents"]
    assert [command[2 if command[0] == "student" else 1] for command in parse_commands(readme)] == [out, out]


def test_a_readme_that_someone_edited_is_left(small: Path, stages: Stages) -> None:
    edited = (small / "README.md").read_text().replace("not stated: ask whoever gave it to you", "CC0")
    (small / "README.md").write_text(edited)
    stages(*CACHE_COMMAND, "--draws", "3", "--out", "c")
    assert (small / "README.md").read_text() == edited


# What the first versions of this program wrote beside two caches of digits.
FEATURES_README = """\
# A cache of what a teacher said

Made by softcache, format 1. It holds the logits and some layers' features of a teacher network for every view \
of a transfer
set, so that any number of students can be trained without the teacher. It holds no pictures.

| | |
|---|---|
| teacher | `cnn`, weights SHA-256 `aee2bea74f33fdc63d2f2f2fb3f8ba4ab875e96f63958c82b7c985c5254d78cb`, float32 \
arithmetic |
| input | 1 × 8 × 8, mean [0.3055], standard deviation [0.3765] of values 0 … 1 |
| data | digits: train 300, val 180, test 360; 10 classes |
| views | `crop` (pad 1, mixup 0.0, size 8, resize 0, seed 0); 3 of each training picture, one plain view of \
each held-out one |
| teacher's accuracy | train 0.8556, val 0.9000, test 0.9139 |
| kept | logits; features `pool1` [64, 4, 4], `flatten` [512] |
| codec | float16: KL 4.5e-09 nats at temperature 4, 0.0000% of rows change their first class |
| size | 4.5 MB in 14 files |
| fingerprint | `bb54b7cf1ce1ba6e06611c98f6c332a8f974810f411b77427f59fce6eedc621d` |
| made with | python 3.11.7, torch 2.14.1, torchvision 0.29.1, numpy 2.4.6, pillow 13.0.0, h5py 3.16.0 |
| licence | not stated: ask whoever gave it to you |

Check it, then train a student from it:

```sh
python -m stages check-cache tiny --deep
python -m stages student --cache tiny --arch resnet8
```

Pixels come from your own copy of the data; a copy that differs in one pixel is refused. `manifest.json` says the
same for programs, with a checksum of every file.
"""
PRECISION_README = """\
# A cache of what a teacher said

Made by softcache, format 1. It holds the logits of a teacher network for every view of a transfer
set, so that any number of students can be trained without the teacher. It holds no pictures.

| | |
|---|---|
| teacher | `cnn`, weights SHA-256 `aee2bea74f33fdc63d2f2f2fb3f8ba4ab875e96f63958c82b7c985c5254d78cb`, bfloat16 \
arithmetic, batch norm folded: KL 7.7e-06 to plain float32 at T=1, 8.4e-07 at T=4, 0.33% of 300 views change \
their first class |
| input | 1 × 8 × 8, mean [0.3055], standard deviation [0.3765] of values 0 … 1 |
| data | digits: train 300, val 180, test 360; 10 classes |
| views | `crop` (pad 1, mixup 0.0, size 8, resize 0, seed 0); 3 of each training picture, one plain view of \
each held-out one |
| teacher's accuracy | train 0.8578, val 0.9000, test 0.9139 |
| kept | logits |
| codec | sqrt8: KL 1.9e-06 nats at temperature 4, 0.0000% of rows change their first class |
| size | 0.0 MB in 5 files |
| fingerprint | `b138e32089aa412f51c37c176c58bf048b883d9b0bd17fa4eb477be11124a9af` |
| made with | python 3.11.7, torch 2.14.1, torchvision 0.29.1, numpy 2.4.6, pillow 13.0.0, h5py 3.16.0 |
| licence | not stated: ask whoever gave it to you |

Check it, then train a student from it:

```sh
python -m stages check-cache tiny-sqrt8 --deep
python -m stages student --cache tiny-sqrt8 --arch resnet8
```

Pixels come from your own copy of the data; a copy that differs in one pixel is refused. `manifest.json` says the
same for programs, with a checksum of every file.
"""


def digits_manifest(
    codec: str, precision: str, taps: dict[str, list[int]], accuracy: float, kl: float, sizes: list[int]
) -> Manifest:
    """The manifest of these caches, as far as a README.md shows it. sizes: bytes of each shard."""
    content = {
        "train": "0cb56fd108aeaa69cac7352613a42dcb40ad7b097778d4ffe9fa3d09d792df95",
        "val": "ed70df0eb9e6f9a26f2aca0e04b3c0311a17f225d8ab40b0e503aa1d937d4ffd",
        "test": "38453adaa0f8e18bf00dc7d8741f0d5c58c97a9e541ba8a28604fb4bf94a68e4",
    }
    weights = "aee2bea74f33fdc63d2f2f2fb3f8ba4ab875e96f63958c82b7c985c5254d78cb"
    identity = {
        "format": 1,
        "transfer_set": {
            "name": "digits",
            "classes": [str(c) for c in range(10)],
            "content": content,
            "cut": {"val_fraction": 0.125, "seed": 0, "train_size": 300},
        },
        "views": {"policy": "crop", "pad": 1, "mixup": 0.0, "size": 8, "resize": 0, "seed": 0},
        "teacher": {
            "arch": "cnn",
            "weights": weights,
            "channels": 1,
            "size": 8,
            "mean": [0.3055],
            "std": [0.3765],
        },
        "codec": codec,
        "precision": precision,
    }
    shards = [
        ShardRecord(
            path=f"draw-000/shard-{i:05d}.h5",
            split="train",
            draw=0,
            start=0,
            rows=1,
            bytes=size,
            checksum="",
            payload="",
            correct=0,
            datasets=[],
        )
        for i, size in enumerate(sizes)
    ]
    versions = {
        "python": "3.11.7",
        "torch": "2.14.1",
        "torchvision": "0.29.1",
        "numpy": "2.4.6",
        "pillow": "13.0.0",
        "h5py": "3.16.0",
    }
    return Manifest(
        identity=identity,
        classes=10,
        draws=3,
        splits={"train": 300, "val": 180, "test": 360},
        taps=taps,
        shards=tuple(shards),
        head=None,
        teacher={"train": {"accuracy": accuracy}, "val": {"accuracy": 0.9}, "test": {"accuracy": 0.9138888888888889}},
        fidelity={"rows": 1440, "flips": 0.0, "kl_1": 0.0, "kl_2": 0.0, "kl_4": kl, "kl_8": 0.0},
        seconds=1.0,
        versions=versions,
        arithmetic=None
        if precision == "float32"
        else PrecisionRecord(
            folded=True,
            compiled=False,
            rows=300,
            kl_1=7.720277991745745e-06,
            kl_4=8.36526091549463e-07,
            flips=0.0033333333333333335,
        ),
    )


FEATURES = digits_manifest(
    "float16", "float32", {"pool1": [64, 4, 4], "flatten": [512]}, 0.8555555555555555, 4.524e-09, [321_000] * 14
)
PRECISION = digits_manifest("sqrt8", "bfloat16", {}, 0.8577777777777778, 1.9155e-06, [9_936] * 5)


@pytest.mark.parametrize(
    ("text", "previous"), [(FEATURES_README, FEATURES), (PRECISION_README, PRECISION)], ids=["features", "precision"]
)
def test_the_text_of_the_first_versions_is_replaced_when_the_cache_grows(
    tmp_path: Path, text: str, previous: Manifest
) -> None:
    """Nobody has edited it. The folder may have had another name, which is in its commands."""
    (tmp_path / "README.md").write_text(text)
    grown = replace(previous, draws=4)
    write_readme(tmp_path, previous, grown)
    assert (tmp_path / "README.md").read_text() == format_readme(tmp_path.name, grown)
    assert parse_commands((tmp_path / "README.md").read_text())[0] == ["check-cache", tmp_path.name, "--deep"]


@pytest.mark.parametrize(
    ("text", "previous"),
    [
        (FEATURES_README.replace("not stated: ask whoever gave it to you", "CC0"), FEATURES),
        (FEATURES_README + "Ask Ann about the teacher.\n", FEATURES),
        (PRECISION_README.replace("first class", "top-1 class"), PRECISION),
        (FEATURES_README, PRECISION),
        (FEATURES_README, None),
    ],
    ids=["another licence", "a line more", "another word", "the text of another cache", "no manifest before"],
)
def test_a_text_of_the_first_versions_that_someone_edited_is_left(
    tmp_path: Path, text: str, previous: Manifest | None
) -> None:
    (tmp_path / "README.md").write_text(text)
    write_readme(tmp_path, previous, replace(FEATURES, draws=4))
    assert (tmp_path / "README.md").read_text() == text


def test_no_path_of_this_machine_is_in_a_cache(stages: Stages, tmp_path: Path, save_image: Any) -> None:
    """Data, weights and the cache itself are given by absolute paths."""
    folder = tmp_path / "private-place"
    save_pets(folder / "pets", save_image)
    save_pets_teacher(folder / "pets.pt")
    absolute = [word.replace("folder:pets", f"folder:{folder}/pets") for word in PETS_CACHE_COMMAND]
    absolute[absolute.index("pets.pt")] = f"{folder}/pets.pt"
    command = (*absolute, "--data-root", folder / "root", "--out", folder / "c")
    stages(*command)
    stages(*command, "--draws", "3")
    for path in sorted((folder / "c").rglob("*")):
        if path.is_file():
            assert b"private-place" not in path.read_bytes(), path
            assert str(tmp_path).encode() not in path.read_bytes(), path
    stages("cache-pack", folder / "c", folder / "c.tar")
    assert b"private-place" not in (folder / "c.tar").read_bytes()
