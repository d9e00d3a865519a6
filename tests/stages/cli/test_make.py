"""make: its targets, and its variables as options of the commands."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

TARGETS = [
    "help",
    "install",
    "teacher",
    "teacher-cache",
    "student",
    "students",
    "born-again",
    "methods",
    "tune",
    "compare",
    "check-cache",
    "inspect",
    "export",
    "predict",
    "lint",
    "test",
    "check",
    "clean",
]


def make(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """From a shell of its own: these tests may themselves have been started by make."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=outside, capture_output=True, text=True, timeout=60)


def test_make_alone_prints_every_target_with_one_line() -> None:
    lines = make().stdout.splitlines()
    named = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert set(named) >= set(TARGETS)
    assert all(named.values())


def asked_for(*arguments: str) -> list[str]:
    """The stages commands that make would run, joined over line ends."""
    said = make("-n", *arguments, f"VENV={sys.executable}").stdout.replace("\\\n", " ")
    return [line.split("-m softcache ")[1] for line in said.splitlines() if "-m softcache " in line]


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (
            "student DATA=mnist ARCH=mlp:800,800 LABELLED=100 EPOCHS=3 LEARNING_RATE=0.1 SEED=4 RESUME=1 OUT=runs/r",
            "student --data mnist --cache caches/mnist --arch mlp:800,800 --labelled 100 --baseline --seeds 1"
            " --out runs/r --epochs 3 --learning-rate 0.1 --seed 4 --resume",
        ),
        (
            "teacher-cache DATA=folder:/a/b/ TEACHER=resnet56 WEIGHTS=w.th NORMALIZE=imagenet VIEWS=crop:pad=2"
            " DRAWS=3 TAPS=layer1,layer2 CODEC=sqrt8 PRECISION=bfloat16",
            "teacher-cache --data folder:/a/b/ --out caches/b --teacher resnet56 --weights w.th --normalize imagenet"
            " --views crop:pad=2 --draws 3 --taps layer1,layer2 --codec sqrt8 --precision bfloat16",
        ),
        ("teacher DATA=cifar10 ARCH=cnn EPOCHS=2", "teacher --data cifar10 --arch cnn --epochs 2"),
        ("check-cache CACHE=c DEEP=1", "check-cache c --data digits --deep"),
        (
            "born-again ARCHS=cnn+mlp:8 BASELINE=0 RECIPE=dkd FINETUNE_EPOCHS=2 OUT=r",
            "born-again --data digits --cache caches/digits --archs cnn+mlp:8 --recipe dkd --finetune-epochs 2"
            " --out r",
        ),
        (
            "born-again GENERATIONS=2 KEEP_EVERY=5 MILESTONES=0.5",
            "born-again --data digits --cache caches/digits --generations 2 --baseline --milestones 0.5"
            " --keep-every 5",
        ),
        (
            "methods ARCH=resnet8 ONLY=kd,hint LAYERS=layer2+layer3 CLIP_NORM=2",
            "methods --data digits --cache caches/digits --only kd,hint --layers layer2+layer3 --arch resnet8"
            " --clip-norm 2",
        ),
        (
            "inspect CACHE=c ROWS=500 REPEATS=3 TEMPERATURE=2 SEED=1 OUT=o",
            "inspect c --rows 500 --repeats 3 --temperature 2 --seed 1 --out o",
        ),
        (
            "tune ARCH=mlp:64 LOSS='kd:weight=0.9 hard' SEARCH='kd.temperature=1..20:log ema=0|0.9' TRIALS=40"
            " SELECT=f1_macro PRUNE=0 STORAGE=sqlite:///s.db OUT=runs/t",
            "tune --data digits --cache caches/digits --loss kd:weight=0.9 --loss hard"
            " --search kd.temperature=1..20:log --search 'ema=0|0.9' --no-prune --trials 40 --storage sqlite:///s.db"
            " --arch mlp:64 --out runs/t --select f1_macro",
        ),
        ("tune SEARCH=ema=0|0.9 GRID=1", "tune --data digits --cache caches/digits --search 'ema=0|0.9' --grid"),
        ("compare RUNS='runs/a runs/b' JSON=1", "compare runs/a runs/b --json"),
        (
            "export RUN=runs/r INT8=1 TOLERANCE=1e-5 MOST_DROP=0.02",
            "export runs/r --int8 --tolerance 1e-5 --most-drop 0.02",
        ),
        (
            "export RUN=runs/r DATA=folder:/a/b CACHES='c d' DATA_ROOT=e",
            "export runs/r --data folder:/a/b --data-root e --cache c --cache d",
        ),
        ("predict MODEL=m.onnx PICTURES='a.png b.png' TOP=2", "predict m.onnx a.png b.png --top 2"),
        (
            "student BASELINE=0 SEEDS=1 TENSORBOARD=1 RESUME=1 OUT=r",
            "student --data digits --cache caches/digits --seeds 1 --out r --tensorboard --resume",
        ),
        ("student BASELINE=0 SEEDS=2", "student --data digits --cache caches/digits --seeds 2"),
    ],
)
def test_variables_map_one_to_one_to_options(arguments: str, command: str) -> None:
    assert shlex.split(asked_for(*shlex.split(arguments))[-1]) == shlex.split(command)


def test_each_loss_of_the_variable_is_one_option() -> None:
    said = asked_for("student", "LOSS=kd:temperature=4,weight=0.9 hard:weight=0.1")[-1]
    assert "--loss 'kd:temperature=4,weight=0.9' --loss 'hard:weight=0.1'" in said


def test_the_cache_is_made_when_there_is_none_and_compared_when_something_of_it_is_asked_for() -> None:
    said = make("-n", "student", "CACHE=caches/none", f"VENV={sys.executable}").stdout
    assert "test -f 'caches/none/manifest.json' ||" in said
    said = make("-n", "student", "CACHE=caches/none", "VIEWS=crop", f"VENV={sys.executable}").stdout
    assert "manifest.json" not in said
    assert "teacher-cache --data 'digits' --out 'caches/none' --views 'crop'" in " ".join(said.split())


def test_json_is_alone_on_standard_output(tmp_path: Path) -> None:
    """An interpreter that only says which stage it was called for stands in for the real one."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ntest $1 = -c || echo stage $3\n")
    python.chmod(0o755)
    assert make("student", "JSON=1", "CACHE=caches/none", f"VENV={python}").stdout == "stage student\n"
    said = make("student", "CACHE=caches/none", f"VENV={python}").stdout.splitlines()
    assert [line for line in said if line.startswith("stage ")] == ["stage teacher-cache", "stage student"]


def test_a_variable_that_nothing_reads_is_a_slip() -> None:
    failed = make("-n", "student", "LABELED=100")
    assert failed.returncode == 2
    assert "no variable LABELED: there are ARCH" in failed.stderr


def test_an_interpreter_without_the_packages_is_refused_and_nothing_installed(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    failed = make("student", f"VENV={python}")
    assert failed.returncode != 0
    assert f"Error: {python} lacks one of: torch" in failed.stderr
