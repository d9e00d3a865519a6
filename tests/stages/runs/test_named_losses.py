"""The losses of a run are data: code that its files name is imported only where the command line names it."""

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from softcache.stages.export.select_student import select_student
from tests.helpers.commands import Stages
from tests.helpers.stopping import stop_at

STRANGER = "strangers_loss:term:weight=0.5"
CODE = """
from pathlib import Path

Path("IMPORTED").touch()

def term(outputs, batch):
    return (outputs.logits - batch.logits).square().mean()
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, a finished run, one that was stopped, students of one stream, a chain and a search of one trial."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        student = ["--cache", "c", "--arch", "mlp:4", "--epochs", "2", "--loss", "kd:weight=0.5"]
        main(["teacher", "--data", "digits", "--train-size", "100", "--arch", "mlp:4", "--epochs", "1", "--out", "t"])
        data = ["--data", "digits", "--train-size", "100", "--views", "none", "--draws", "1"]
        main(["teacher-cache", *data, "--weights", "t", "--out", "c"])
        main(["student", *student, "--baseline", "--out", "s"])
        main(["student", *student, "--seed", "0", "--seed", "1", "--out", "several"])
        main(["born-again", *student, "--generations", "2", "--out", "chain"])
        main(["tune", *student, "--search", "kd.temperature=1|2", "--grid", "--out", "search"])
        with pytest.MonkeyPatch.context() as stopped:
            stop_at(stopped, 2)
            with pytest.raises(SystemExit):
                main(["student", *student, "--batch-size", "50", "--out", "stopped"])
    return folder


@pytest.fixture
def hostile(finished: Path, stages: Stages, tmp_path: Path) -> Iterator[Path]:
    """A copy of these, in which every record of the losses names a module that lies in the current folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    Path("strangers_loss.py").write_text(CODE)
    changed = 0
    for path in (*Path().rglob("settings.json"), *Path().rglob("result.json"), *Path().rglob("search.json")):
        text = path.read_text()
        changed += "kd:weight=0.5" in text
        path.write_text(text.replace("kd:weight=0.5", STRANGER))
    assert changed > 8
    yield tmp_path
    sys.modules.pop("strangers_loss", None)


def test_a_stopped_run_is_resumed_where_the_command_names_its_losses(hostile: Path, stages: Stages) -> None:
    error = stages.fails(2, "student", "--resume", "--out", "stopped")
    assert f"names code to be imported, '{STRANGER}', and a file alone does not run code" in error
    other = stages.fails(2, "student", "--resume", "--out", "stopped", "--loss", "kd")
    assert "was started with another --loss" in other
    assert not Path("IMPORTED").exists()
    printed = shlex.split(error.partition("name it with  ")[2])
    assert printed[-2:] == ["--loss", STRANGER]
    stages(*printed[printed.index("softcache") + 1 :])
    assert Path("IMPORTED").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "s"),
        ("evaluate", "several/seed-1"),
        ("export", "s"),
        ("compare", "s", "several/seed-0"),
        ("report", "s", "stopped", "--show", 0, "--no-latency", "--out", "r"),
        ("teacher-cache", "--data", "digits", "--train-size", 100, "--views", "none", "--weights", "s", "--out", "n"),
        ("check-cache", "c"),
    ],
    ids=lambda command: "-".join(map(str, command[:2])),
)
def test_commands_that_read_a_run_import_nothing(
    hostile: Path, stages: Stages, dose: Callable[[int, int], int], command: tuple[object, ...]
) -> None:
    if command[0] == "export":
        assert select_student(Path("s")).config.loss == ("kd",)
        if not dose(0, 1):  # which takes long
            return
    code, _, err = stages.call(*command)
    assert code == 0, err
    assert not Path("IMPORTED").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("student", "--out", "s"),
        ("student", "--out", "stopped"),
        ("student", "--seed", 0, "--seed", 1, "--out", "several"),
        ("born-again", "--generations", 2, "--out", "chain"),
        ("tune", "--search", "kd.temperature=1|2", "--grid", "--out", "search"),
        ("methods", "--only", "kd", "--out", "s"),
    ],
    ids=lambda command: f"{command[0]}-{command[-1]}",
)
def test_a_folder_to_continue_in_does_not_name_code(
    hostile: Path, stages: Stages, command: tuple[object, ...]
) -> None:
    losses = () if command[0] == "methods" else ("--loss", "kd:weight=0.5")
    code, _, err = stages.call(*command, "--cache", "c", "--arch", "mlp:4", "--epochs", 2, *losses)
    assert command[0] == "methods" or code in (1, 2), err
    assert not Path("IMPORTED").exists()


def test_a_stopped_run_of_the_same_settings_is_found_without_an_import(hostile: Path, stages: Stages) -> None:
    Path("runs").mkdir()
    shutil.copytree("stopped", "runs/digits-mlp-4-1")
    student = ("student", "--cache", "c", "--arch", "mlp:4", "--epochs", 2, "--batch-size", 50)
    assert stages.call(*student, "--loss", "kd:weight=0.5")[0] == 0
    assert not Path("IMPORTED").exists()
    code, out, err = stages.call(*student, "--loss", STRANGER)
    assert code == 0, err
    assert f"--resume --out runs/digits-mlp-4-1 --loss {STRANGER}" in out


def test_the_printed_command_of_an_unfinished_run_names_every_loss(hostile: Path, stages: Stages) -> None:
    settings = json.loads(Path("stopped/settings.json").read_text())
    Path("stopped/settings.json").write_text(json.dumps(settings | {"loss": ["hard", STRANGER]}))
    for command in (("student", "--resume", "--out", "stopped"), ("evaluate", "stopped"), ("export", "stopped")):
        assert f"--resume --out stopped --loss hard --loss {STRANGER}" in stages.call(*command)[2]
    assert not Path("IMPORTED").exists()
