"""A run, a cache and a search are data: what their files name is imported only where the command line names it."""

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from softcache.base.errors import UsageError
from softcache.pipeline.models import build, is_custom_arch
from softcache.stages.runs.named_code import require_named_code
from tests.helpers.commands import Stages
from tests.helpers.stopping import stop_at

STRANGER = "strangers_code:make"
CODE = """
from pathlib import Path
from softcache.pipeline.models.archs.mlp import mlp

Path("IMPORTED").touch()

def make(*, classes, channels, size):
    return mlp("4", classes, channels, size)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's run, a cache, a student's run, and a run of each that was stopped; all of `mlp:4`."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small = ["--arch", "mlp:4", "--epochs", "2"]
        data = ["--data", "digits", "--train-size", "100"]
        main(["teacher", *data, *small, "--out", "t"])
        main(["teacher-cache", *data, "--weights", "t", "--views", "none", "--draws", "1", "--out", "c"])
        main(["student", "--cache", "c", *small, "--out", "s"])
        for command in (["teacher", *data, *small], ["student", "--cache", "c", *small]):
            with pytest.MonkeyPatch.context() as stopped:
                stop_at(stopped, 2)
                with pytest.raises(SystemExit):
                    main([*command, "--batch-size", "50", "--out", f"stopped-{command[0]}"])
    return folder


@pytest.fixture
def hostile(finished: Path, stages: Stages, tmp_path: Path) -> Iterator[Path]:
    """A copy of these, whose files name a module that lies in the current folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    Path("strangers_code.py").write_text(CODE)

    def edit(path: str, change: Callable[[Any], object]) -> None:
        record = json.loads(Path(path).read_text())
        change(record)
        Path(path).write_text(json.dumps(record))

    for path in ("s/settings.json", "stopped-teacher/settings.json", "stopped-student/settings.json"):
        edit(path, lambda record: record.update(arch=STRANGER))
    edit("t/result.json", lambda record: record["teacher"].update(arch=STRANGER))
    edit("s/result.json", lambda record: record["student"].update(arch=STRANGER))
    yield tmp_path
    sys.modules.pop("strangers_code", None)


CACHE = ("teacher-cache", "--data", "digits", "--train-size", 100, "--views", "none", "--draws", 1, "--out", "new")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("evaluate", "s"), "--arch"),
        (("export", "s"), "--arch"),
        (("student", "--resume", "--out", "stopped-student"), "--arch"),
        (("teacher", "--resume", "--out", "stopped-teacher"), "--arch"),
        ((*CACHE, "--weights", "t"), "--teacher"),
        ((*CACHE, "--weights", "s"), "--teacher"),
    ],
    ids=lambda value: "-".join(map(str, value[:2])) if isinstance(value, tuple) else value,
)
def test_code_that_a_file_names_is_imported_only_when_the_command_names_it(
    hostile: Path, stages: Stages, dose: Callable[[int, int], int], command: tuple[object, ...], option: str
) -> None:
    error = stages.fails(2, *command)
    assert not Path("IMPORTED").exists()
    assert f"names code to be imported, '{STRANGER}'" in error
    assert option in stages.fails(2, *command, option, "another:make")
    printed = shlex.split(error.partition("name it with  ")[2])
    assert printed[-2:] == [option, STRANGER] or f"{option} {STRANGER}" in " ".join(printed)
    assert not Path("IMPORTED").exists()
    if command[0] != "export" or dose(0, 1):  # which takes long; evaluate builds the network in the same way
        stages(*printed[printed.index("softcache") + 1 :])
        assert Path("IMPORTED").exists()


def test_a_report_and_a_comparison_import_nothing(hostile: Path, stages: Stages) -> None:
    code, out, err = stages.call("report", "s", "--show", 0, "--out", "r")
    assert code == 0, err
    assert f"no latency of {STRANGER}: a report does not import code that a run names" in out
    stages("compare", "s")
    assert not Path("IMPORTED").exists()


def test_a_database_of_a_search_gives_no_arch_that_the_command_does_not_name(hostile: Path, stages: Stages) -> None:
    import sqlite3

    search = ("tune", "--cache", "c", "--search", "arch=mlp:4|mlp:5", "--grid", "--epochs", 1, "--out", "search")
    stages(*search)
    with sqlite3.connect("search/study.db") as database:
        changed = database.execute(
            "UPDATE trial_params SET distribution_json = replace(distribution_json, 'mlp:5', ?)", (STRANGER,)
        )
        assert changed.rowcount > 0
    assert "trials of another search" in stages.fails(1, *search)
    assert not Path("IMPORTED").exists()


def test_a_chain_of_a_users_own_code_names_it_at_each_step(hostile: Path, stages: Stages) -> None:
    chain = ("born-again", "--cache", "c", "--arch", STRANGER, "--epochs", 1, "--generations", 2, "--out", "chain")
    code, out, err = stages.call(*chain)
    assert code == 0, err
    stages(*shlex.split(out.rpartition("next:  ")[2].partition("softcache ")[2]))


def test_archs_of_the_program_need_not_be_named() -> None:
    for arch in ("mlp:4", "cnn", "torchvision:resnet18", "simkd(mlp:4;linear;8)", "simkd(broken"):
        assert not is_custom_arch(arch)
        require_named_code(arch, "", "the run 'r'", "--arch", "")
    for arch in (STRANGER, f"simkd({STRANGER};layer;8)", "a.b:c"):
        assert is_custom_arch(arch)
        with pytest.raises(UsageError, match="names code to be imported"):
            require_named_code(arch, "", "the run 'r'", "--arch", "")
        require_named_code(arch, arch, "the run 'r'", "--arch", "")


def test_the_command_that_makes_a_cache_again_shows_that_the_folder_of_the_weights_is_not_known(
    stages: Stages,
) -> None:
    Path("far").mkdir()
    torch.save(build("mlp:4", 10, 1, 8).state_dict(), "far/w.pt")
    weights = ("--weights", "far/w.pt", "--teacher", "mlp:4", "--train-size", 100)
    stages("teacher-cache", *weights, "--views", "none", "--draws", 1, "--out", "c")
    error = stages.fails(1, "student", "--cache", "c", "--loss", "hint:teacher=linear,student=linear")
    assert "--weights PATH/TO/w.pt" in error
