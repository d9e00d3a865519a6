"""Wrong names, paths and options are refused before an image is read or a teacher trained."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from softcache.data.sources import SOURCES, Source
from softcache.data.sources.source_data import SourceData
from tests.helpers.caches import PETS_CACHE_COMMAND, save_pets, save_pets_teacher
from tests.helpers.commands import Stages

STUDENT = "student --data folder:pets --cache c --epochs 1"
TUNE = "tune --data folder:pets --cache c --epochs 1 --loss kd --trials 1"
METHODS = "methods --data folder:pets --cache c --epochs 1 --arch mlp:4"
CHAIN = "born-again --data folder:pets --cache c --epochs 1"
STAGE_ONE = "teacher-cache --data folder:pets --out new"
WRONG = [
    ("teacher --data folder:pets --arch rsnet8", 2, "no arch 'rsnet8'"),
    ("teacher --data folder:pets --arch mlp:x", 2, "expected widths"),
    ("teacher --data folder:pets --arch cnn:3", 2, "takes no argument"),
    ("teacher --data folder:pets --arch torchvision:resnt18", 2, "no torchvision model 'resnt18'"),
    ("teacher --data folder:pets --arch nowhere:net", 2, "cannot be imported"),
    ("teacher --data folder:pets --views crp", 2, "no view policy 'crp'"),
    ("teacher --data folder:pets --device gpu", 2, "--device gpu: there are auto, cpu, cuda and cuda:N"),
    ("teacher --data folder:pets --device meta", 2, "--device meta"),
    ("teacher --data folder:pets --imbalance 1", 2, "--imbalance 1"),
    ("teacher --data folder:pets --milestones 2", 2, "--milestones 2"),
    ("teacher --data folder:pets --out file/below", 2, "file' is a file"),
    (f"{STAGE_ONE} --teacher rsnet8", 2, "no arch 'rsnet8'"),
    (f"{STAGE_ONE} --teacher torchvision:nope --weights DEFAULT", 2, "no torchvision model 'nope'"),
    (f"{STAGE_ONE} --teacher mlp:4 --weights DEFAULT", 2, "needs --teacher torchvision:NAME"),
    (f"{STAGE_ONE} --teacher mlp:4 --weights none.pt", 2, "there are no weights at 'none.pt'"),
    (f"{STAGE_ONE} --weights pets.pt", 2, "does not record its arch"),
    (f"{STAGE_ONE} --teacher mlp:4 --weights pets.pt --taps hiden1", 2, "no tap 'hiden1'"),
    (f"{STAGE_ONE} --teacher cnn --taps layer3", 2, "no tap 'layer3'"),
    (f"{STAGE_ONE} --teacher cnn --codec float8", 2, "no codec 'float8'"),
    (f"{STAGE_ONE} --teacher cnn --views crp", 2, "no view policy 'crp'"),
    (f"{STAGE_ONE} --teacher cnn --device gpu", 2, "--device gpu"),
    ("teacher-cache --data folder:pets --teacher cnn --out file", 2, "'file' is a file"),
    (f"{STUDENT} --arch rsnet8", 2, "no arch 'rsnet8'"),
    (f"{STUDENT} --loss kdd", 2, "no loss 'kdd'"),
    (f"{STUDENT} --loss kd,hard", 2, "one --loss for each term, such as --loss kd --loss hard"),
    (f"{STUDENT} --arch mlp:4 --loss hint:teacher=layer3,student=hidden1", 1, "does not contain layer3"),
    (f"{STUDENT} --arch mlp:4 --loss hint:teacher=hidden1,student=hiden1", 2, "no tap 'hiden1'"),
    (f"{STUDENT} --arch mlp:4 --combine geometrc", 2, "no way to combine 'geometrc'"),
    (f"{STUDENT} --arch mlp:4 --combine geometric", 2, "is for several caches"),
    (f"{STUDENT} --arch mlp:4 --map temprature", 2, "no map 'temprature'"),
    (f"{STUDENT} --arch mlp:4 --recipe dkkd", 2, "no recipe 'dkkd'"),
    (f"{STUDENT} --arch mlp:4 --draws 9", 1, "has 2"),
    (f"{STUDENT} --arch mlp:4 --device gpu", 2, "--device gpu"),
    (f"{STUDENT} --arch mlp:4 --milestones 2", 2, "--milestones 2"),
    (f"{STUDENT} --arch mlp:4 --out file", 2, "'file' is a file"),
    (f"{STUDENT} --arch mlp:4 --out {'x' * 300}", 2, "more than 255 bytes"),
    (f"{STUDENT} --arch mlp:4 --cache none", 1, "there is no cache at 'none'"),
    (f"{STUDENT} --arch mlp:4 --arch rsnet8", 2, "no arch 'rsnet8'"),
    (f"{STUDENT} --arch mlp:4 --losses kd --losses kdd", 2, "no loss 'kdd'"),
    ("student --data nope", 2, "no data set 'nope'"),
    (f"{TUNE} --arch mlp:4 --search kdd.temperature=1..2", 2, "kdd"),
    (f"{TUNE} --search arch=mlp:4|rsnet8", 2, "no arch 'rsnet8'"),
    (f"{TUNE} --arch mlp:4 --search kd.temperature=1..2 --out file", 2, "'file' is a file"),
    (f"{METHODS} --only kdd", 2, "no method 'kdd'"),
    (f"{METHODS} --only hint --layers layer3", 1, "does not contain layer3"),
    (f"{METHODS} --only hint --student-layers hiden1", 2, "no layer 'hiden1'"),
    (f"{METHODS} --out file", 2, "'file' is a file"),
    (f"{CHAIN} --archs mlp:4+rsnet8", 2, "no arch 'rsnet8'"),
    (f"{CHAIN} --arch mlp:4 --out file", 2, "'file' is a file"),
    ("blend --cache c --cache c --combine geometrc", 2, "no way to combine 'geometrc'"),
    ("inspect c --out file", 2, "'file' is a file"),
    ("report r --data nope --out page", 2, "no data set 'nope'"),
    ("report r --data folder:pets --out file", 2, "'file' is a file"),
    ("export r --data nope", 2, "no data set 'nope'"),
    ("evaluate r --data folder:pets --device gpu", 2, "--device gpu"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, save_image: Callable[..., object]) -> Path:
    """A folder with images, a cache of them (c), a run from it (r) and a file."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("early")
    save_pets(folder / "pets", save_image)
    save_pets_teacher(folder / "pets.pt")
    (folder / "file").write_text("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*PETS_CACHE_COMMAND, "--out", "c"])
        main([*STUDENT.split(), "--arch", "mlp:4", "--loss", "kd", "--out", "r"])
    return folder


@pytest.mark.parametrize(("command", "code", "message"), WRONG)
def test_a_wrong_name_is_refused_before_an_image_is_read(
    made: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, command: str, code: int, message: str
) -> None:
    reads: list[str] = []

    def count(path: str, *_: object) -> SourceData:
        reads.append(path)
        raise AssertionError("an image was read")

    for path in made.iterdir():
        (Path.cwd() / path.name).symlink_to(path)
    before = sorted(path.name for path in Path.cwd().iterdir())
    monkeypatch.setitem(SOURCES, "folder", Source(count, "PATH"))
    assert message in stages.fails(code, *command.split())
    assert reads == []
    assert sorted(path.name for path in Path.cwd().iterdir()) == before


def test_a_data_set_that_does_not_exist_is_refused_with_each_name_once(stages: Stages) -> None:
    error = stages.fails(2, "teacher", "--data", "nope")
    assert error.count("folder") == 1


def test_a_complete_cache_is_used_where_nothing_can_be_written(
    made: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made, Path.cwd(), dirs_exist_ok=True)
    monkeypatch.setattr("os.access", lambda *_: False)
    code, _, err = stages.call(*PETS_CACHE_COMMAND, "--out", "c")
    assert code == 0, err
    assert "cannot be written into" in stages.fails(1, *PETS_CACHE_COMMAND, "--out", "new")
