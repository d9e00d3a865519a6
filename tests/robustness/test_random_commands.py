"""Random command lines over all commands: each ends in time, with an exit code of its own and without a traceback.

The options are those that the commands declare; their values are valid, at a boundary, wrong or hostile. Each command
line runs in a process of its own, in a folder with a cache, a run, an exported model and images.
"""

import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch

from softcache.pipeline.models import build
from softcache.stages.main import commands
from tests.helpers import processes
from tests.helpers.caches import save_pets
from tests.helpers.processes import Child, Forks

forks = processes.forks
SEED, PARTS = 16, 20
LIMIT_S = 90.0  # of one command, on a busy machine
HOSTILE = (
    "", " ", "-1", "0", "nan", "inf", "-inf", "1e309", "99999999999999999999", "é", "\u202etxt", "\x1b[31m", "a\nb",
    "../..", "/", "/dev/null", "/proc/self/mem", "%s%n", "$(id)", "'", '"', "--help", "=", ":", ",", "|", "..", "+",
    "x" * 300, "x" * 5000, "os:system", "os.path:join", "builtins:exec", "nope", "kd:", "kd:temperature=", "a:b:c",
    "{0}", "*", "folder:", "folder:/dev", "NaN,1", "1..2", "~", "-", "@", "0x10", "1_000", "٣",
)  # fmt: skip
VALUES: dict[str, tuple[str, ...]] = {
    "data": ("digits", "folder:pets", "folder:bare", "mnist", "folder:c"),
    "arch": (
        "mlp:4",
        "cnn",
        "mlp:0",
        "mlp:4,4",
        "resnet8",
        "torchvision:resnet18",
        "torchvision:nope",
        "mlp:a",
        "cnn:3",
    ),
    "teacher": ("mlp:8", "mlp:4", "cnn", "mlp"),
    "archs": ("mlp:4+mlp:4", "+", "mlp:4 mlp:8"),
    "loss": (
        "kd",
        "hard",
        "dist",
        "kd:temperature=0",
        "hint:teacher=hidden1,student=hidden1",
        "simkd",
        "output",
        "rkd",
    ),
    "losses": ("kd", "kd hard:weight=0.1", "hard hard", "dist"),
    "cache": ("c", "d", "bare-c", "r", "none", "pets"),
    "weights": ("t", "t/teacher.pt", "r", "DEFAULT", "c", "none", "pets/train/cat/0.png"),
    "views": ("none", "crop", "crop:pad=1", "crop:pad=-1", "crop-flip:mixup=1", "resized-crop-flip", "crop:size=0"),
    "taps": ("hidden1", "hidden1:pool", "nope", "hidden1,,hidden1", "hidden1:gram", ","),
    "codec": ("float16", "float32", "sqrt8", "int4"),
    "combine": ("mean_logit", "weighted:0.5,0.5", "weighted:1", "learned", "ca_mkd", "vote"),
    "map": ("temperature", "prior", "prior:tau=9", "matrix", "prior:tau=-1"),
    "recipe": ("dkd", "crd", "patient", "f1", "none"),
    "search": (
        "kd.temperature=1|2",
        "batch_size=8|16",
        "kd.temperature=2..1",
        "epochs=1..2",
        "arch=mlp:4|mlp:8",
        "x=1|2",
    ),
    "storage": ("sqlite:///s.db", "sqlite://", "x://", "postgresql://h/d"),
    "only": ("kd", "kd,dist", "hint", "nope", ","),
    "layers": ("hidden1", "hidden1+nope"),
    "device": ("cpu", "auto", "cuda", "cuda:7", "gpu", "meta", "cpu:1", "mps"),
    "milestones": ("0.5", "0.5,0.75", "2", "a"),
    "imbalance": ("10", "10:step", "1", "2:x"),
    "out": ("new-{n}", "r", "c", "t", "pets", "file", "file/below", "/proc/x", "/dev/null", "new-{n}/a/b"),
    "data_root": ("datasets", "file"),
    "study": ("s", "a/b"),
}
NUMBERS = ("0", "1", "2", "3", "0.5", "1e-3", "1e9", "-1", "4294967296", "0.999")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "run": ("r", "t", "c", "none", "file", "."),
    "runs": ("r", "t", "none", ".", "r/"),
    "cache": ("c", "d", "r", "none", "new-{n}", "file"),
    "file": ("new-{n}.tar", "c.tar", "file", "none/x.tar", "/dev/null"),
    "model": ("r/student.onnx", "r/student.pt2", "r", "none", "file", "r/student.safetensors"),
    "images": ("pets/test/cat/0.png", "file", "pets", "none", "r/student.onnx"),
}
# Options that keep a valid command short; a later one of the same name replaces them.
SHORT = {
    "teacher": ("--train-size", "60", "--epochs", "1", "--arch", "mlp:4"),
    "teacher-cache": ("--train-size", "60", "--teacher", "mlp:4", "--draws", "1"),
    "student": ("--epochs", "1", "--arch", "mlp:4", "--cache", "c"),
    "born-again": ("--epochs", "1", "--arch", "mlp:4", "--cache", "c", "--generations", "2"),
    "tune": ("--epochs", "1", "--arch", "mlp:4", "--cache", "c", "--trials", "2"),
    "methods": ("--epochs", "1", "--arch", "mlp:4", "--cache", "c", "--only", "kd", "--time-steps", "1"),
    "report": ("--no-latency",),
}
# A whole number above these would be a valid command that takes minutes.
LARGE = {"epochs", "seeds", "draws", "trials", "generations", "time_steps", "repeats", "finetune_epochs", "workers"}


@pytest.fixture(scope="module")
def folder(forks: Forks, tmp_path_factory: pytest.TempPathFactory, save_image: Callable[..., object]) -> Path:
    """A folder with two caches (c, d), one of images without labels (bare-c), runs (t, r), a model and images."""
    folder = tmp_path_factory.mktemp("random")
    save_pets(folder / "pets", save_image)
    for k in range(12):
        save_image(folder / f"bare/train/{k}.png", k=k)
    (folder / "file").write_text("text")
    torch.manual_seed(0)
    torch.save(build("mlp:4", 2, 3, 8).state_dict(), folder / "w.pt")
    digits = ("--train-size", "60", "--views", "none", "--draws", "1", "--taps", "hidden1")
    student = ("student", "--cache", "c", "--arch", "mlp:4", "--epochs", "1", "--loss", "kd")
    for command in (
        ("teacher", "--train-size", "60", "--arch", "mlp:8", "--epochs", "1", "--out", "t"),
        ("teacher-cache", *digits, "--weights", "t", "--out", "c"),
        ("teacher-cache", *digits, "--weights", "t", "--codec", "float32", "--out", "d"),
        ("teacher-cache", "--data", "folder:bare", "--teacher", "mlp:4", "--weights", "w.pt", "--normalize", "none",
         "--views", "none", "--draws", "1", "--out", "bare-c"),
        (*student, "--out", "r"),
        ("export", "r"),
        ("cache-pack", "c", "c.tar"),
    ):  # fmt: skip
        forks.succeeds(*command, cwd=folder)
    return folder


@pytest.mark.parametrize("part", range(PARTS))
def test_a_random_command_line_ends_without_a_traceback(
    forks: Forks, folder: Path, dose: Callable[[int, int], int], part: int
) -> None:
    rng = random.Random(1000 * SEED + part)
    lines = [make_command_line(rng, n) for n in range(dose(20, 1000) // PARTS)]
    faults: list[str] = []
    for n, line in enumerate(lines):
        place = folder.parent / f"random-{os.getpid()}-{n % 2}"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder, place, symlinks=True)
        child = forks.start(*line, cwd=place)
        code = wait(child)
        if "Traceback" in child.output or code not in (0, 1, 2):
            faults.append(f"{code}: {line!r}\n{child.output[-1500:]}")
        elif code and "Error" not in child.output:
            faults.append(f"{code} without a message: {line!r}\n{child.output[-500:]}")
    assert not faults, f"{len(faults)} of {len(lines)}\n" + "\n\n".join(faults)


def wait(child: Child) -> int | None:
    """Wait for the end of a process; one that hangs is killed, which gives -9."""
    timer = threading.Timer(LIMIT_S, os.kill, (child.pid, signal.SIGKILL))
    timer.start()
    try:
        return child.wait()
    finally:
        timer.cancel()


def make_command_line(rng: random.Random, n: int) -> list[str]:
    """Make a command line: a command, its arguments and up to five of its options, with n in the names of outputs."""
    name = rng.choice(sorted(commands.commands))
    command = commands.commands[name]
    words: list[str] = [name]
    options = [p for p in command.params if isinstance(p, click.Option) and p.name != "traceback"]
    for argument in command.params:
        if isinstance(argument, click.Argument):
            count = rng.choice((0, 1, 1, 2)) if argument.nargs == -1 else rng.choice((1, 1, 1, 1, 1, 1, 1, 0))
            words += [choose(rng, ARGUMENTS[str(argument.name)]).format(n=n) for _ in range(count)]
    words += SHORT.get(name, ())
    for option in rng.sample(options, min(len(options), rng.randrange(5))):
        words.append(rng.choice([*option.opts, *option.secondary_opts]))
        if not option.is_flag:
            words.append(choose_value(rng, option).replace("{n}", str(n)))
    return [word.replace("\x00", "") for word in words]


def choose_value(rng: random.Random, option: click.Option) -> str:
    """Choose the value of an option: mostly one that fits it, now and then a hostile one."""
    if rng.random() < 0.2:
        return rng.choice(HOSTILE)
    if isinstance(option.type, click.Choice):
        return rng.choice([*map(str, option.type.choices), "nope"])
    if option.name in VALUES:
        return rng.choice(VALUES[str(option.name)])
    return rng.choice(NUMBERS[:3] if option.name in LARGE else NUMBERS)


def choose(rng: random.Random, values: tuple[str, ...]) -> str:
    return rng.choice(HOSTILE).replace("{", "").replace("}", "") if rng.random() < 0.1 else rng.choice(values)
