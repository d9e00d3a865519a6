"""Every command that a message, a README or a page prints can be run as it is, with labels and without.

The sources are searched for whatever builds a command: a new place fails the first test until a scenario runs it.
"""

import ast
import html
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from softcache.pipeline.models import build
from softcache.stages.main import main
from tests.helpers.caches import interrupt_after_shards, save_pets
from tests.helpers.commands import Stages
from tests.helpers.damage import flip_bit
from tests.helpers.paths import ROOT
from tests.helpers.stopping import stop_at

BUILDERS = {
    "format_command",
    "format_remake_command",
    "format_repair_command",
    "format_resume_command",
    "format_continue_command",
    "format_typed_command",
    "program_name",
}
COMMAND_TEXT = re.compile(
    r"(?:softcache|python -m softcache|make) (?:teacher|student|check-cache|cache-|evaluate|export|compare|report"
    r"|predict|tune|inspect|methods|blend|born-again|losses|recipes)|same (?:teacher-cache )?command|next: "
)
# The functions of these files build commands for the places below.
BUILDING_FILES = {"stages/cli/copied_commands.py", "stages/cli/typed_command.py"}
NAMED_CODE = "run by tests/stages/runs/test_named_code.py"
# {place: the scenarios below that make it print its command}; a str says why there is none to run.
PLACES: dict[str, tuple[str, ...] | str] = {
    "pipeline/cache/archive.py:_format_check_command": ("damaged",),
    "pipeline/cache/manifest_reader.py:": ("stage_one_interrupted",),
    "pipeline/cache/manifest_reader.py:read_manifest": ("stage_one_interrupted", "no_cache"),
    "stages/check_cache/archive.py:run_pack": ("packed",),
    "stages/check_cache/command.py:_print_report": ("damaged",),
    "stages/cli/configs.py:": "help texts that name `softcache losses` and `softcache recipes`",
    "stages/compare/significance.py:_read_predictions": ("logits_missing",),
    "stages/distributed/ranks.py:_check_same_command": "an option that two ranks have with other values",
    "stages/distributed/rendezvous.py:": "torchrun's command, which is not softcache's",
    "stages/export/command.py:run": NAMED_CODE,
    "stages/export/metadata.py:": "the name of a format",
    "stages/export/metadata.py:from_dict": "names the program that writes a file",
    "stages/export/card_of_task.py:describe_command_line": ("exported",),
    "stages/export/model_card.py:_format_training_command": ("exported",),
    "stages/export/select_student.py:select_student": ("unfinished_run",),
    "stages/head_cache/command.py:_print_report": "run by tests/stages/head_cache/test_head_cache.py",
    "stages/inspect/command.py:_inspect_taps": ("growth",),
    "stages/inspect/suggestion.py:suggest_student": ("inspected",),
    "stages/cli/run_command.py:_format_disk_error": "typed again by tests/robustness/test_full_disk_of_commands.py",
    "stages/report/command.py:run": ("reported",),
    "stages/report/sections.py:make_run_section": ("reported",),
    "stages/runs/data.py:load_cache_data": ("other_images",),
    "stages/runs/folder.py:_describe_existing_run": ("existing_run",),
    "stages/runs/folder.py:_resume_config": NAMED_CODE,
    "stages/student/blend.py:run": ("blended",),
    "stages/student/born_again.py:run": ("chain_interrupted",),
    "stages/student/born_again.py:_report": ("chain_interrupted",),
    "stages/student/command.py:_prepare": ("student_interrupted",),
    "stages/student/command.py:_report": ("student_next",),
    "stages/student/defaults.py:fill_defaults": ("no_cache",),
    "stages/student/evaluate.py:_evaluate_student": ("unfinished_run",),
    "stages/student/evaluate.py:run": NAMED_CODE,
    "stages/student/methods.py:run": ("methods_interrupted",),
    "stages/student/requirements.py:_format_growth": ("growth",),
    "stages/student/several_students.py:run": ("several_interrupted",),
    "stages/student/several_students.py:_check_options": ("several_interrupted",),
    "stages/teacher/command.py:run": ("teacher_next",),
    "stages/teacher/command.py:_format_cache_command": ("teacher_next",),
    "stages/teacher_cache/cache_readme.py:": ("cache_next",),
    "stages/teacher_cache/command.py:_print_report": ("cache_next",),
    "stages/teacher_cache/preparation.py:_format_unfinished_command": ("other_teacher_while_unfinished",),
    "stages/teacher_cache/preparation.py:suggest_other_command": ("other_teacher",),
    "stages/teacher_cache/teachers/recorded_run.py:read_run": NAMED_CODE,
    "stages/teacher_cache/teachers/cache_teacher.py:load_cache_teacher": "by tests/stages/check_cache/test_repair.py",
    "stages/teacher_cache/writing.py:write_cache": "two processes at once: the command that was typed",
    "stages/teacher_cache/writing.py:_write_share": ("stage_one_interrupted",),
    "stages/training/loop.py:train": (
        "student_interrupted",
        "teacher_interrupted",
        "teacher_of_stage_one_interrupted",
    ),
    "stages/tune/command.py:run": ("tune_interrupted",),
    "stages/tune/summary.py:write_report": ("tune_interrupted",),
    "stages/tune/summary.py:print_rows": "the command that was typed, once matplotlib is installed",
}
LABELLED_ONLY = {
    "logits_missing",
    "teacher_next",
    "teacher_interrupted",
    "teacher_of_stage_one_interrupted",
    "no_cache",
    "inspected",
    "blended",
    "methods_interrupted",
    "tune_interrupted",
}
SLOW_TO_LABEL = {"exported", "reported"}  # run without labels alone: it takes 5 s, and labels change no command
LABELS_MATTER = {"cache_next", "student_next", "growth", "chain_interrupted"}  # the others: one kind, both in torture
TEACHER = ("--teacher", "mlp:4", "--normalize", "none", "--views", "crop:pad=1", "--draws", "2", "--shard-rows", "12")
SHORT = ("--epochs", "1", "--batch-size", "8", "--arch", "mlp:4")


class Scene:
    """A folder with images of one kind, caches and a run of them; `call` runs commands, `run_printed` printed ones.

    Args:
        stages: calls the commands.
        patch: undone after each scenario.
        data: folder of the images: `pets`, or `bare` without labels.
    """

    def __init__(self, stages: Stages, patch: pytest.MonkeyPatch, data: str):
        self.stages, self.patch, self.images = stages, patch, data
        self.data = ("--data", f"folder:{data}")
        self.cache = ("teacher-cache", *self.data, *TEACHER, "--weights", "w.pt")
        self.student = ("student", *self.data, "--cache", "caches/c", *SHORT)

    def call(self, *command: object, code: int = 0) -> str:
        """Run a command that must end with this exit code; return all that it printed."""
        exit_code, out, err = self.stages.call(*command)
        assert exit_code == code, (command, out, err)
        return out + err

    def interrupted(self, *command: object, step: int = 2) -> str:
        """Interrupt a command in a step of a training; return what it printed."""
        with self.patch.context() as patch:
            stop_at(patch, step)
            return self.call(*command, code=130)

    def run_printed(self, text: str, *more: str, code: int = 0) -> list[list[str]]:
        """Run every command in a text, with placeholders replaced and `more` options, at least one; return them."""
        commands = [self.fill(arguments) for arguments in find_commands(text)]
        assert commands, text
        for command in commands:
            extra = [*more]
            if command[0] == "student" and "--resume" not in command:
                extra += [word for k in (0, 2, 4) if SHORT[k] not in command for word in SHORT[k : k + 2]]
            self.call(*command, *extra, code=code)
        return commands

    def fill(self, arguments: list[str]) -> list[str]:
        """Replace the documented placeholders."""
        names = {"folder:PATH": f"folder:{self.images}", "PATH/TO/WEIGHTS": "w.pt", "image.png": "bare/train/0.png"}
        return [names.get(word, word.replace("PATH/TO/", "")) for word in arguments]


def find_commands(text: str) -> list[list[str]]:
    """Return the arguments of each command of softcache in a text, from the name of the program to the line's end."""
    names = "teacher|student|check-cache|cache-|evaluate|report|predict|tune|methods|born-again"
    lines = re.findall(rf"(?:-m softcache|\bsoftcache) ((?:{names})[^\n`<]*)", html.unescape(text))
    return [words for line in lines if (words := shlex.split(line.split("`")[0].rstrip(" .)")))]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, save_image: Callable[..., object]) -> Path:
    """A folder with both kinds of images, weights, and for each kind a folder with two caches and a run (r)."""
    folder = tmp_path_factory.mktemp("printed")
    save_pets(folder / "pets", save_image)
    for k in range(20):
        save_image(folder / f"bare/train/{k}.png", k=k)
        save_image(folder / f"other/train/{k}.png", k=50 + k)
    for seed, name in enumerate(("w.pt", "w2.pt")):
        torch.manual_seed(seed)
        torch.save(build("mlp:4", 2, 3, 8).state_dict(), folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for data in ("pets", "bare"):
            command = ["teacher-cache", "--data", f"folder:{data}", *TEACHER, "--taps", "hidden1"]
            main([*command, "--weights", "w.pt", "--out", f"made-{data}/caches/c"])
            main([*command, "--weights", "w2.pt", "--out", f"made-{data}/caches/d"])
            patch.chdir(folder / f"made-{data}")
            Path(data).symlink_to(folder / data)
            main(["student", "--data", f"folder:{data}", "--cache", "caches/c", *SHORT, "--out", "r"])
            Path(data).unlink()
            patch.chdir(folder)
    return folder


@pytest.fixture
def scene(made: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Scene:
    for name in ("pets", "bare", "other", "w.pt", "w2.pt"):
        Path(name).symlink_to(made / name)
    shutil.copytree(made / f"made-{request.param}", Path.cwd(), dirs_exist_ok=True)
    return Scene(stages, monkeypatch, request.param)


def teacher_next(scene: Scene) -> None:
    scene.run_printed(scene.call("teacher", *scene.data, *SHORT, "--seed", "3", "--out", "t"), "--draws", "1")


def cache_next(scene: Scene) -> None:
    scene.run_printed(scene.call(*scene.cache, "--out", "caches/new"))
    scene.patch.chdir("caches")
    scene.images = f"../{scene.images}"
    scene.run_printed(Path("new/README.md").read_text())


def student_next(scene: Scene) -> None:
    scene.run_printed(scene.call(*scene.student))
    for combine in ("geometric", "ca_mkd"):
        scene.run_printed(scene.call(*scene.student, "--cache", "caches/d", "--loss", "kd", "--combine", combine))


def student_interrupted(scene: Scene) -> None:
    command = (*scene.student, "--epochs", "2")
    printed = scene.interrupted(*command, step=4)
    assert "continue it with" in scene.interrupted(*command, "--seed", "0", step=4)
    (resumed,) = scene.run_printed(printed)
    assert "--resume" in resumed


def existing_run(scene: Scene) -> None:
    scene.run_printed(scene.call(*scene.student, "--epochs", "3", "--out", "r", code=2))


def unfinished_run(scene: Scene) -> None:
    scene.interrupted(*scene.student, "--out", "a b")
    evaluated, exported = scene.call("evaluate", "a b", *scene.data, code=1), scene.call("export", "a b", code=1)
    scene.run_printed(evaluated)
    scene.run_printed(exported)


def logits_missing(scene: Scene) -> None:
    shutil.copytree("r", "s")
    Path("s/logits.safetensors").unlink()
    scene.run_printed(scene.call("compare", "r", "s"))
    assert "--resume" not in scene.call("compare", "r", "s")


def several_interrupted(scene: Scene) -> None:
    (command,) = scene.run_printed(scene.interrupted(*scene.student, "--arch", "mlp:8", step=3))
    scene.call(*command)  # once more, with the folder that it names


def teacher_interrupted(scene: Scene) -> None:
    scene.run_printed(scene.interrupted("teacher", *scene.data, *SHORT))


def teacher_of_stage_one_interrupted(scene: Scene) -> None:
    command = ("teacher-cache", "--train-size", "60", "--teacher", "mlp:4")
    (printed,) = scene.run_printed(scene.interrupted(*command, step=4))
    assert printed == list(command)


def no_cache(scene: Scene) -> None:
    small = ("--teacher", "mlp:4", "--train-size", "60", "--draws", "1")
    scene.run_printed(scene.call("student", "--cache", "new", code=1), *small)
    scene.run_printed(scene.call("check-cache", "new-2", code=1), *small)


def stage_one_interrupted(scene: Scene) -> None:
    with scene.patch.context() as patch:
        interrupt_after_shards(1, patch)
        printed = scene.call(*scene.cache, "--out", "caches/new", code=130)
    assert "run the same teacher-cache command again" in scene.call("check-cache", "caches/new", code=1)
    scene.run_printed(printed)
    scene.call("check-cache", "caches/new")


def damaged(scene: Scene) -> None:
    path = sorted(Path("caches/c").rglob("shard-*.h5"))[0]
    flip_bit(path, 8 * (path.stat().st_size // 2))
    packed = scene.call("cache-pack", "caches/c", "c.tar", code=1)
    scene.run_printed(packed, code=1)
    scene.run_printed(scene.call("check-cache", "caches/c", code=1))
    scene.call("check-cache", "caches/c")


def packed(scene: Scene) -> None:
    Path("tars").mkdir()
    scene.run_printed(scene.call("cache-pack", "caches/c", "tars/c.tar"))
    scene.call("check-cache", "caches/c-2")


def growth(scene: Scene) -> None:
    scene.run_printed(scene.call(*scene.student, "--draws", "3", code=1))
    scene.run_printed(scene.call(*scene.student, "--loss", "hint:teacher=linear,student=linear", code=1))
    scene.call(*scene.student, "--draws", "3", "--loss", "hint:teacher=linear,student=linear", "--loss", "kd")


def other_images(scene: Scene) -> None:
    command = list(scene.student)
    shutil.copytree(scene.images, "changed")
    next(iter(sorted(Path("changed/train").rglob("*.png")))).write_bytes(Path("other/train/1.png").read_bytes())
    command[command.index(f"folder:{scene.images}")] = "folder:changed"
    scene.run_printed(scene.call(*command, code=1))


def other_teacher(scene: Scene) -> None:
    scene.run_printed(scene.call(*scene.cache[:-1], "w2.pt", "--out", "caches/c", code=1))


def other_teacher_while_unfinished(scene: Scene) -> None:
    with scene.patch.context() as patch:
        interrupt_after_shards(1, patch)
        scene.call(*scene.cache, "--out", "caches/new", code=130)
    printed = scene.call(*scene.cache[:-1], "w2.pt", "--out", "caches/new", code=1)
    assert len(scene.run_printed(printed)) == 2
    scene.call("check-cache", "caches/new")


def blended(scene: Scene) -> None:
    scene.run_printed(scene.call("blend", "--cache", "caches/c", "--cache", "caches/d"))


def inspected(scene: Scene) -> None:
    scene.run_printed(scene.call("inspect", "caches/c", "--out", "i"))


def methods_interrupted(scene: Scene) -> None:
    command = ("methods", *scene.data, "--cache", "caches/c", *SHORT, "--only", "kd", "--time-steps", "1")
    scene.run_printed(scene.interrupted(*command))


def chain_interrupted(scene: Scene) -> None:
    command = ("born-again", *scene.data, "--cache", "caches/c", *SHORT, "--generations", "2")
    (again,) = scene.run_printed(scene.interrupted(*command, step=4))
    scene.run_printed(scene.call(*again))


def tune_interrupted(scene: Scene) -> None:
    pytest.importorskip("optuna")
    search = ("--search", "kd.temperature=1|2", "--loss", "kd", "--grid")
    command = ("tune", *scene.data, "--cache", "caches/c", *SHORT, *search)
    (again,) = scene.run_printed(scene.interrupted(*command))
    scene.run_printed(scene.call(*again))
    scene.interrupted(*command)
    scene.run_printed(scene.call(*command))  # the search that was stopped, and the best student of this one


def exported(scene: Scene) -> None:
    scene.call("export", "r", *scene.data)
    scene.patch.chdir("r")
    for name in ("caches", "bare", "pets"):
        Path(name).symlink_to(Path("..") / name)
    scene.run_printed(Path("MODEL_CARD.md").read_text())


def reported(scene: Scene) -> None:
    scene.call("report", "r", *scene.data, "--no-latency", "--out", "page")
    scene.run_printed(Path("page/report.md").read_text())
    training = [c for c in find_commands(Path("page/report.html").read_text()) if c[0] == "student"]
    assert len(training) == 1
    scene.call(*scene.fill(training[0]))


SCENARIOS = [
    pytest.param(name, data, id=f"{name}-{data}")
    for name in sorted({name for names in PLACES.values() if isinstance(names, tuple) for name in names})
    for data in ("pets", "bare")
    if not (data == "bare" and name in LABELLED_ONLY) and not (data == "pets" and name in SLOW_TO_LABEL)
]


@pytest.mark.parametrize(("name", "scene"), SCENARIOS, indirect=["scene"])
def test_a_printed_command_runs(name: str, scene: Scene, dose: Callable[[int, int], int]) -> None:
    if scene.images == "pets" and name not in LABELLED_ONLY | LABELS_MATTER and not dose(0, 1):
        pytest.skip("with --torture")
    globals()[name](scene)


def test_every_place_that_builds_a_command_has_a_scenario() -> None:
    assert find_places() == set(PLACES)


def find_places() -> set[str]:
    """Return `file:function` of whatever builds a command, or names one in a text that is no docstring."""
    places: set[str] = set()

    def visit(node: ast.AST, function: str) -> None:
        body = getattr(node, "body", None)
        if isinstance(node, ast.FunctionDef):
            function = node.name
        called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if called in BUILDERS or COMMAND_TEXT.search(text):
            places.add(f"{path.relative_to(ROOT)}:{function}")
        for child in ast.iter_child_nodes(node):
            is_docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if not (is_docstring and isinstance(body, list) and child in body):
                visit(child, function)

    for folder in ("softcache/base", "data", "pipeline", "stages"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if str(path.relative_to(ROOT)) not in BUILDING_FILES:
                visit(ast.parse(path.read_text()), "")
    return places
