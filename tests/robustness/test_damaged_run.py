"""Damaged weights, checkpoints or records of a run are one error line; no code runs, no metric changes unnoticed."""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.commands import Stages
from tests.helpers.damage import flip_bit
from tests.helpers.mutations import BIG, DEEP, mutate
from tests.helpers.trial import MEMORY, Outcome, attempt, check_output, run_command

Dose = Callable[[int, int], int]
SECONDS = 10.0
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]
LOSSES = ("--loss", "kd", "--loss", "hint:teacher=flatten,student=relu1")  # the second has trainable weights


def interrupt_after_steps(steps: int) -> None:
    """Interrupt every training of this process after `steps` steps from now on."""
    from softcache.stages.training import loop as training

    step, done = training.train_step, [0]

    def counted(*arguments: Any) -> Any:
        if done[0] == steps:
            raise KeyboardInterrupt
        done[0] += 1
        return step(*arguments)

    training.train_step = counted  # type: ignore[assignment]


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run `done` and a run `half` that was stopped after two of four epochs."""
    folder = tmp_path_factory.mktemp("runs")
    case = ("student", "--cache", tiny / "cache", "--arch", "mlp:8", *LOSSES, "--ema", 0.9, "--batch-size", 100)

    def half() -> Any:
        interrupt_after_steps(7)
        return run_command(*case, "--epochs", 4, "--out", folder / "half")

    assert attempt(lambda: run_command(*case, "--epochs", 1, "--out", folder / "done"), 60).value[0] == 0
    assert attempt(half, 60).value[0] == 130
    assert sorted(path.name for path in (folder / "half").iterdir()) == [
        "cache.json",
        "checkpoint.pt",
        "metrics.jsonl",
        "settings.json",
        "teacher-logits.safetensors",
    ]
    return folder


@pytest.fixture
def done(runs: Path, tmp_path: Path, stages: Stages) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(runs / "done", tmp_path / "done"))


@pytest.fixture
def half(runs: Path, tmp_path: Path, stages: Stages) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(runs / "half", tmp_path / "half"))


def check_outcome(found: Outcome) -> tuple[int, str]:
    """Check the outcome of a command: no crash, few seconds and little memory. Returns its exit code and error."""
    assert not found.failure, found.failure
    assert found.seconds < SECONDS
    assert found.extra_memory < MEMORY, f"{found.extra_memory / 1e6:.0f} MB"
    code, out, err = found.value
    if code == 130:  # the test stops a training before its first step
        return 130, err
    return check_output((code, out, err)), err


# Weights


def evaluate_run(done: Path) -> Any:
    code, out, err = run_command("evaluate", done, "--json")
    return code, json.loads(out) if code == 0 else "", err


def resume_run(half: Path) -> Any:
    """Resume a stopped run and return its final weights."""
    code, _, err = run_command("student", "--resume", "--out", half)
    if code:
        return code, "", err
    state = torch.load(half / "student.pt", weights_only=True)
    return code, {name: weights.tolist() for name, weights in state.items()}, err


@pytest.mark.parametrize(("name", "use"), [("student.pt", evaluate_run), ("checkpoint.pt", resume_run)])
def test_a_flipped_bit_in_weights_is_refused_or_changes_nothing(
    runs: Path, tmp_path: Path, dose: Dose, name: str, use: Callable[[Path], Any]
) -> None:
    """A metric computed from damaged weights would look like a valid one."""
    draw, trials, counts = random.Random(11), dose(8, 100), Counter[str]()
    home, folder = runs / ("done" if name == "student.pt" else "half"), tmp_path / "run"

    def fresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(home, folder)

    fresh()
    expected = attempt(lambda: use(folder), 60).value
    assert expected[0] == 0
    for _ in range(trials):
        fresh()
        bit = draw.randrange(8 * (folder / name).stat().st_size)
        flip_bit(folder / name, bit)
        outcome = attempt(lambda: use(folder), 60)
        assert not outcome.failure, (bit, outcome.failure)
        assert outcome.extra_memory < MEMORY
        code, value, err = outcome.value
        if code == 0:
            assert value == expected[1], (name, bit)
            counts["without effect"] += 1
        else:
            assert code in (1, 2), code
            assert len(err.splitlines()) == 1, err
            assert name in err
            counts["refused"] += 1
    print(f"flipped bits of {name}: {trials} trials, " + ", ".join(f"{n} {what}" for what, n in counts.items()))


class Trap:
    """An object that makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize(
    "case",
    [
        ("half", "checkpoint.pt", "student --resume --out half"),
        ("done", "student.pt", "evaluate done"),
        ("done", "student.pt", "student --resume --out done"),
        ("done", "student.pt", "teacher-cache --weights done --views none --draws 1 --out c"),
    ],
)
def test_no_code_in_weights_is_run(done: Path, half: Path, stages: Stages, case: tuple[str, str, str]) -> None:
    run, name, line = case
    state = torch.load(Path(run, name), weights_only=True)
    for evil in (Trap(), {**state, "more": Trap()}):
        torch.save(evil, Path(run, name))
        assert name in stages.fails(1, *line.split()) or "done" in line
        assert not Path("sprung").exists()


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_weights_that_were_cut_are_one_line(done: Path, half: Path, stages: Stages, size: int) -> None:
    for name, line in (("done/student.pt", "evaluate done"), ("half/checkpoint.pt", "student --resume --out half")):
        os.truncate(name, size if size >= 0 else Path(name).stat().st_size + size)
        assert name in stages.fails(1, *line.split())


def test_a_checkpoint_without_its_lines_or_of_other_kinds_is_one_line(half: Path, stages: Stages, dose: Dose) -> None:
    original = torch.load(half / "checkpoint.pt", weights_only=True)
    wrong: dict[str, list[Any]] = {
        "epoch": [-1, 10**6, "2", 1.5, None],
        "lines": ["[]", "5", "[1, 2]", "[" * 5000, "", None],
        "modules": [{}],
        "random": [torch.zeros(3), "x"],
        "model": [{}, None],
        "average": [{}, 3],
        "optimizer": [{}, []],
        "schedule": ["x", None],
    }
    for key, others in wrong.items():
        for value in others[: dose(1, len(others))]:
            torch.save({**original, key: value}, half / "checkpoint.pt")
            line = stages.fails(1, "student", "--resume", "--out", half)
            assert "checkpoint.pt" in line, (key, value)


# Records

WRONG: dict[str, list[Any]] = {
    "epochs": ["4", None, 1.5, -1, True, [4]],
    "batch_size": [-3, "x", None, 1.0],
    "seeds": [-1, 0, 10**9, "x"],
    "seed": [-1, 2**70, 0.5, None],
    "arch": [None, 7, ["mlp:8"]],
    "loss": ["kd", [1], [["kd"]], None, {"kd": 1}],
    "optimizer": ["x", None, 3],
    "schedule": ["x", None],
    "precision": ["x", None],
    "learning_rate": ["x", -1.0, None],
    "momentum": [5.0, "x"],
    "weight_decay": [-7.0, "x"],
    "warmup": [3.0, "x"],
    "ema": [2.0, "x"],
    "clip_norm": [-1.0, "x"],
    "labelled": [-1, "x", 2.5],
    "draws": [-1, "x", 0.5],
    "workers": [-1, 10**9, "x"],
    "device": [None, 3],
    "cache": [None, 3, ["c"]],
    "data": [None, 3],
    "data_root": [None, 3],
    "baseline": [1, "x", None],
    "nesterov": ["x", None],
    "json": ["x", 1],
    "resume": ["x", 1],
    "out": [3, None],
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_setting_of_a_run_that_no_command_could_have_given_is_named(
    half: Path, done: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, dose: Dose, name: str
) -> None:
    """As the range of an option is checked on the command line, before anything is started with it."""
    from softcache.pipeline.loading import prefetch as ahead
    from softcache.stages.training import loop as training

    monkeypatch.setattr(training, "train_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(ahead, "DataLoader", None)  # a billion workers are not to be started by a test
    for value in WRONG[name][: dose(2, 9)]:
        for run, line in ((half, "student --resume --out half"), (done, "evaluate done")):
            kept = json.loads((run / "settings.json").read_text())
            (run / "settings.json").write_text(json.dumps({**kept, name: value}))
            found = stages.fails(1, *line.split())
            assert "settings.json" in found
            assert name in found
            (run / "settings.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("half/settings.json", "student --resume --out half"),
        ("half/cache.json", "student --resume --out half"),
        ("done/settings.json", "evaluate done"),
        ("done/metrics.jsonl", "student --resume --out done"),
        ("done/result.json", "teacher-cache --weights done --views none --draws 1 --out c"),
    ],
)
def test_a_record_of_a_run_that_is_no_record_is_one_line(
    done: Path, half: Path, stages: Stages, dose: Dose, name: str, line: str
) -> None:
    for text in ("[" * 100_000, "null", "{", "[]", "7", "\0", "{}", '{"epochs": ' + "9" * 5000 + "}")[: dose(3, 8)]:
        Path(name).write_text(text)
        code, _, err = stages.call(*line.split())
        assert code in (1, 2)
        assert len(err.splitlines()) == 1 or "was trained from other shards" in err
        assert name.partition("/")[0] in err
        assert "Traceback" not in err


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "0", "-1e300", '"1"', "null", "[]", "1e999"])
def test_seconds_that_are_no_number_are_one_line(done: Path, stages: Stages, value: str) -> None:
    """The result of a finished run is written again from its lines."""
    (done / "result.json").unlink()
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    text = json.dumps({**lines[0], "seconds": 0.125}).replace("0.125", value)
    (done / "metrics.jsonl").write_text(text + "\n")
    assert "metrics.jsonl" in stages.fails(1, "student", "--resume", "--out", done)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "7"])
def test_a_new_run_is_not_begun_in_the_folder_of_a_damaged_one(
    half: Path, tiny: Path, stages: Stages, text: str
) -> None:
    (half / "settings.json").write_text(text)
    line = stages.fails(2, "student", "--cache", tiny / "cache", "--arch", "mlp:8", "--out", half)
    assert "exists" in line
    assert len(line) < 2000


def test_a_run_that_says_that_it_was_begun_with_other_shards_does_not_go_on(half: Path, stages: Stages) -> None:
    record = json.loads((half / "cache.json").read_text())
    record["shards"]["draw-001/shard-00001.h5"] = "0" * 32
    (half / "cache.json").write_text(json.dumps(record))
    line = stages.fails(1, "student", "--resume", "--out", half)
    assert "shards.draw-001/shard-00001.h5" in line
    assert not (half / "student.pt").exists()


def test_a_damaged_run_does_not_stop_another_one(runs: Path, tiny: Path, stages: Stages) -> None:
    """Both are in the same folder, where a new run looks for a stopped one."""
    case = ("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 1)
    for i, text in enumerate(("{", "[]", "[" * 100_000), 1):
        Path(f"runs/digits-mlp-8-{i}").mkdir(parents=True)
        Path(f"runs/digits-mlp-8-{i}/settings.json").write_text(text)
    stages(*case)
    assert Path("runs/digits-mlp-8-4/student.pt").exists()


def test_any_record_of_a_run_is_used_or_refused_in_one_line(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dose: Dose
) -> None:
    """Records are mutated anywhere; a training that starts is stopped before its first step."""
    monkeypatch.chdir(tmp_path)
    counts = Counter[str]()
    report = "report half done --no-latency --show 0 --out o"
    works = [
        ("half/settings.json", "student --resume --out half"),
        ("half/cache.json", "student --resume --out half"),
        ("done/settings.json", "evaluate done"),
        ("done/metrics.jsonl", "student --resume --out done"),
        ("done/result.json", "teacher-cache --weights done --views none --draws 1 --out c"),
        ("half/settings.json", report),
        ("done/cache.json", report),
        ("done/metrics.jsonl", report),
        ("done/result.json", report),
        ("done/result.json", "compare done"),
    ]

    def one(data: st.DataObject) -> None:
        name, line = data.draw(st.sampled_from(works))
        for folder in ("half", "done", "c", "o"):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in ("half", "done"):
            shutil.copytree(runs / folder, folder)
        record = json.loads(Path(name).read_text())
        for _ in range(data.draw(st.integers(1, 2))):
            mutate(record, data.draw)
        if "settings" in name and isinstance(record.get("workers"), int) and record["workers"] > 256:
            record["workers"] = 0  # see the test of settings
        text = json.dumps(record).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
        Path(name).write_text(text.replace(json.dumps(BIG), "9" * 5000) + "\n")

        def work() -> Any:
            interrupt_after_steps(0)
            return run_command(*line.split())

        code, _ = check_outcome(attempt(work, limit=60))
        counts[{0: "used", 130: "used"}.get(code, "refused")] += 1

    examples = dose(6, 300)
    run = settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=QUIET)
    run(given(st.data())(lambda data: one(data)))()
    print(f"mutated records of runs: {counts.total()} trials, {counts['used']} used, {counts['refused']} refused")
