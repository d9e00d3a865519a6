"""make: its targets, and its variables as options of the commands."""

import json
import os
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
    "lint",
    "test",
    "browser",
    "hosts",
    "slow",
    "torture",
    "bench",
    "gpu-check",
    "docs",
    "check",
    "clean",
]

# In place of an interpreter: prints the command line as JSON instead of running it.
PRINTING = f"""#!{sys.executable}
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from softcache.stages.make_variables import to_arguments
module, *words = sys.argv[2:]
assert module == "softcache.stages.make_variables", module
if words[0] == "--typed":
    assert words[1] == "make", words
    words = words[words.index("--") + 1:]
if words[0] != "--check":
    print(json.dumps(to_arguments(words[0], words[1:])))
"""


def make(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run make from a shell of its own: these tests may themselves have been started by make."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PY"))}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def printing(tmp_path: Path) -> str:
    python = tmp_path / "python"
    python.write_text(PRINTING)
    python.chmod(0o755)
    return f"PY={python}"


def test_make_alone_prints_every_target_with_one_line() -> None:
    lines = make().stdout.splitlines()
    targets = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert list(targets) == TARGETS
    assert all(targets.values())


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (
            ["student", "DATA=mnist", "ARCH=mlp:800,800", "LABELLED=100", "LEARNING_RATE=0.1", "SEED=4", "RESUME=1"],
            "--data mnist --arch mlp:800,800 --labelled 100 --learning-rate 0.1 --seed 4 --resume",
        ),
        (
            ["teacher-cache", "DATA=folder:/a/b/", "WEIGHTS=w.th", "VIEWS=crop:pad=2", "TAPS=layer1,layer2"],
            "--data folder:/a/b/ --weights w.th --views crop:pad=2 --taps layer1,layer2",
        ),
        (["teacher-cache", "LICENSE=CC BY 4.0"], "--license|CC BY 4.0"),
        (["teacher", "DATA=cifar10", "EPOCHS=1", "NESTEROV=0"], "--data cifar10 --epochs 1 --no-nesterov"),
        (
            ["student", "LOSS=kd:temperature=4,weight=0.9 hard:weight=0.1", "CACHE=a b", "BASELINE=0", "SEEDS=2"],
            "--loss kd:temperature=4,weight=0.9 --loss hard:weight=0.1 --cache a --cache b --seeds 2",
        ),
        (["student", "CACHE=c", "OUT=it's"], "--cache c --out it's --baseline --seeds 5"),
        (["student"], "--baseline --seeds 5"),
        (["students", "SEED=0 1"], "--baseline --arch mlp:32 --arch mlp:64 --arch cnn --seed 0 --seed 1"),
        (["students", "DATA=cifar10", "ARCH=cnn resnet8"], "--data cifar10 --baseline --arch cnn --arch resnet8"),
    ],
)
def test_a_variable_becomes_the_option_of_that_name(printing: str, arguments: list[str], command: str) -> None:
    words = json.loads(make(*arguments, printing).stdout.splitlines()[-1])
    assert words[0] == arguments[0].replace("students", "student")
    assert options(words[1:]) == options(command.split("|" if "|" in command else None))


def options(words: list[str]) -> list[list[str]]:
    """[[option, its value], …], in any order."""
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    return sorted(words[a:b] for a, b in zip(starts, [*starts[1:], len(words)], strict=True))


def test_a_cache_that_is_there_is_used_and_one_that_is_not_is_made(printing: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    lines = make("student", "DATA=mnist", f"CACHE={cache}", "ARCH=cnn", printing).stdout.splitlines()
    made, trained = map(json.loads, lines)
    assert options(made[1:]) == options(["--data", "mnist", "--out", str(cache)])
    assert trained[0] == "student"
    cache.mkdir()
    (cache / "manifest.json").touch()
    lines = make("student", "DATA=mnist", f"CACHE={cache}", printing).stdout.splitlines()
    assert [json.loads(line)[0] for line in lines] == ["student"]


def test_with_json_the_result_is_alone_on_standard_output(printing: str) -> None:
    done = make("student", "JSON=1", "CACHE=caches/none", printing)
    (line,) = done.stdout.splitlines()
    assert json.loads(line)[0] == "student"
    assert json.loads(done.stderr.splitlines()[-1])[0] == "teacher-cache"


@pytest.mark.parametrize(
    ("target", "name", "nearest"),
    [
        ("student", "LABELED", "--labelled"),
        ("students", "EPOCH", "--epochs"),
        ("teacher", "EPOCH", "--epochs"),
        ("teacher-cache", "DRAW", "--draws"),
    ],
)
def test_an_unknown_variable_gets_the_nearest_option_before_anything_is_made(
    target: str, name: str, nearest: str, tmp_path: Path
) -> None:
    failed = make(target, f"{name}=100", f"DATA=folder:{tmp_path / 'images'}", f"PY={sys.executable}")
    assert failed.returncode == 2
    assert f"No such option '--{name.lower()}'. (Did you mean" in failed.stderr
    assert nearest in failed.stderr
    assert "there is no" not in failed.stderr  # images, or a cache


def test_an_interpreter_without_the_packages_is_refused_and_nothing_installed(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named torch' >&2\nexit 1\n")
    python.chmod(0o755)
    failed = make("student", f"PY={python}", f"VENV={tmp_path / 'venv'}")
    assert failed.returncode != 0
    assert "No module named torch" in failed.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("variable", "message"),
    [("BASELINE=yes", "BASELINE=yes: BASELINE is 1 or 0"), ("LOSS=kd 'hard", "LOSS=kd 'hard: No closing quotation")],
)
def test_a_wrong_value_is_one_line(variable: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "softcache.stages.make_variables", "--check", "student", variable],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"Error: {message}"
