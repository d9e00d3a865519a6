"""`--data my_module:factory`: a dataset that code of the user makes, in every command."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import softcache
from softcache.base.errors import UsageError
from softcache.data.sources import load_source
from softcache.data.transfer_set import load_transfer_set
from tests.helpers.commands import Stages

MODULE = """
import numpy as np
from sklearn.datasets import load_digits

digits = load_digits()


class Digits:
    classes = [f"digit {k}" for k in range(10)]

    def __init__(self, start, stop):
        self.start, self.stop = start, stop

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, row):
        if not 0 <= row < len(self):
            raise IndexError(row)
        pixels = np.rint(digits.images[self.start + row] * 255 / 16).astype(np.uint8)
        return pixels, int(digits.target[self.start + row])


def splits():
    print("reading digits")
    return {"train": Digits(0, 240), "test": Digits(240, 340)}


def at_root(root):
    with open(f"{root}/count.txt") as file:
        return {"train": Digits(0, int(file.read())), "test": Digits(240, 340)}


def needs_more(path, *, year): ...
def fails(): raise RuntimeError("no disk")
def nothing(): return None
def a_list(): return [1, 2]
def other_key(): return {"training": Digits(0, 10)}
def loader():
    from torch.utils.data import DataLoader
    return DataLoader(Digits(0, 10))
def item(): return {"train": ["text"] * 3}
def bad_label():
    class Bad(Digits):
        def __getitem__(self, row):
            return super().__getitem__(row)[0], "seven"
    return Bad(0, 10)

ready = splits()
number = 7
"""


@pytest.fixture
def module(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_digits.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("own_digits", None)


def test_a_factory_makes_the_same_transfer_set_as_the_dataset_in_python(module: Path) -> None:
    by_name = load_transfer_set("own_digits:splits", Path(), val_fraction=0.2)
    by_object = load_transfer_set(sys.modules["own_digits"].splits(), Path(), val_fraction=0.2)
    ready = load_transfer_set("own_digits:ready", Path(), val_fraction=0.2)
    assert by_name.identity() == by_object.identity() == ready.identity()
    assert by_name.name == "dataset"


def test_a_factory_gets_the_root_where_it_takes_one(module: Path) -> None:
    (module / "files").mkdir()
    (module / "files/count.txt").write_text("123")
    loaded = load_transfer_set("own_digits:at_root", module / "files", val_fraction=0.2)
    assert sum(len(loaded.splits[split]) for split in ("train", "val")) == 123


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("own_digits:", "no data set 'own_digits'"),
        ("own_digits:split", "has no attribute 'split'. Did you mean 'own_digits:splits'?"),
        ("my_pictures:splits", "No module named 'my_pictures'"),
        ("diggits:train", "no data set 'diggits'. Did you mean 'digits'?"),
        ("own_digits.py:splits", "names a file: name the module, as Python imports it: 'own_digits:splits'"),
        ("own_digits:needs_more", "needs the arguments path, year: it is called without any"),
        ("own_digits:fails", "failed: RuntimeError: no disk (own_digits.py:"),
        ("own_digits:nothing", "is None: expected a map-style dataset"),
        ("own_digits:a_list", "train row 0 of the dataset is a value of type int"),
        ("own_digits:number", "is a int: expected a map-style dataset"),
        ("own_digits:other_key", "data has the key 'training'"),
        ("own_digits:loader", "is a DataLoader: give its dataset"),
        ("own_digits:item", "train row 0 of the dataset is a value of type str"),
        ("own_digits:bad_label", "train row 0 of the dataset has a value of type str as its label"),
        ("folder", "--data folder needs what it reads after a colon"),
    ],
)
def test_what_is_no_dataset_is_refused_in_one_line(module: Path, stages: Stages, data: str, message: str) -> None:
    error = stages.fails(2, "teacher", "--data", data, "--arch", "mlp:8", "--out", "t")
    assert message in error
    assert len(error.splitlines()) == 1


def test_options_of_a_folder_are_refused(module: Path) -> None:
    with pytest.raises(UsageError, match=r"--exif is for --data folder:PATH.*not for a dataset"):
        load_transfer_set("own_digits:splits", Path(), val_fraction=0.2, exif="transpose")


def test_the_commands_take_it_from_teacher_to_export(module: Path, stages: Stages) -> None:
    data = ("--data", "own_digits:splits")
    made = stages("teacher-cache", *data, "--teacher", "mlp:16", "--draws", "2", "--out", "c")
    assert made["settings"]["data"] == "own_digits:splits"
    cache = softcache.Cache("c", data=sys.modules["own_digits"].splits())
    assert cache.classes[3] == "digit 3"
    assert cache.reader.manifest.settings["data"] == "dataset"  # as softcache.build_cache records it

    student = ("student", "--cache", "c", "--arch", "mlp:8", "--epochs", "2", "--out", "s")
    assert "--data my_module:factory, or open the cache from Python" in stages.fails(2, *student)
    code, out, err = stages.call(*student, *data)
    assert code == 0, err
    assert "reading digits" in err
    assert "next:  " in out
    assert "--data own_digits:splits" in out
    assert set(stages("check-cache", "c", "--deep", *data)["shards"].values()) == {"good"}
    assert stages("evaluate", "s", *data)["0"]["test"]["accuracy"] > 0


def test_a_run_alone_imports_nothing(module: Path, stages: Stages) -> None:
    data = ("--data", "own_digits:splits")
    stages("teacher-cache", *data, "--teacher", "mlp:16", "--draws", "2", "--out", "c")
    stages("student", "--cache", "c", "--arch", "mlp:8", "--epochs", "1", "--out", "s", *data)
    (module / "own_digits.py").write_text("raise SystemExit('imported')")
    for command in (("evaluate", "s"), ("student", "--resume", "--out", "s")):
        error = stages.fails(2, *command)
        assert "names code to be imported, 'own_digits:splits'" in error
        assert "--data own_digits:splits" in error


def test_the_pixels_are_those_of_the_source_of_the_same_images(module: Path) -> None:
    from softcache.data.views.policy import parse_views
    from softcache.data.views.render import render

    index = np.arange(240)
    images = load_source("own_digits:splits").splits["train"].images
    again = load_source("own_digits:ready").splits["train"].images
    policy = parse_views("crop-flip:pad=1")
    assert (render(images, policy, 3, index, 1) == render(again, policy, 3, index, 1)).all()
