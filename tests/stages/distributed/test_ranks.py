"""Several ranks on one host: the same cache and student as one process, and errors.

Three tests start torchrun. In the others, forked processes have its environment variables: a fresh interpreter takes
5 s of a CPU to load PyTorch.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from softcache.data.transfer_set import load_transfer_set
from softcache.data.views.policy import parse_views
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.loading.groups import get_rank_rows
from softcache.pipeline.loading.stream import BatchStream
from softcache.stages.distributed.ranks import Ranks, read_ranks
from tests.helpers import processes
from tests.helpers.commands import Stages
from tests.helpers.paths import ROOT
from tests.helpers.processes import (
    Forks,
    assert_done,
    list_files,
    make_cache_command,
    read_metric_lines,
    read_payloads,
)

forks = processes.forks

PLAIN = """
from collections import OrderedDict
from torch import nn

def net(classes, channels, size):
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(channels, 6, 3, padding=1), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(6, 8, 3, padding=1), relu2=nn.ReLU(), average=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(), linear=nn.Linear(8, classes),
    ))
"""
OWN_LOSS = """
import torch
from torch import nn

class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(10, 10)
        if int(__import__("os").environ.get("RANK", 0)):
            nn.init.zeros_(self.map.weight)

    def forward(self, outputs, batch):
        return nn.functional.mse_loss(self.map(outputs.logits), batch.logits)
"""
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
STUDENT = ("--arch", "mlp:16", "--batch-size", 53, "--learning-rate", 0.05)
EVERYTHING = (
    *STUDENT,
    "--loss",
    "kd",
    "--loss",
    "hint:teacher=flatten,student=hidden1,weight=1",
    "--epochs",
    3,
    "--finetune-epochs",
    2,
    "--baseline",
    "--ema",
    0.9,
    "--clip-norm",
    1,
    "--select",
    "nll",
    "--seeds",
    2,
)
# One loss for each kind of input: logits alone; relations between rows; labels by class; hidden layers alone, so that
# the last layer has no gradient; random negatives; the student's last layer.
SOME = ("kd", "similarity", "soft_f1", "hint:teacher=relu2,student=relu2", "crd", "cat_kd")
DIFFERING_RANK = ROOT / "tests/helpers/differing_rank.py"
DYING_RANK = ROOT / "tests/helpers/dying_rank.py"


def torchrun(count: int, *arguments: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """python -m torch.distributed.run … in a folder; arguments: a script's, or those of `-m softcache`."""
    program = [] if str(arguments[0]).endswith(".py") else ["-m", "softcache"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *program]
    environment = {**os.environ, "PYTHONPATH": f"{cwd}:{ROOT}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def succeeds(done: "subprocess.CompletedProcess[str]") -> str:
    """Assert that the ranks succeeded, and return what they printed."""
    assert done.returncode == 0, done.stderr
    return done.stdout


def error(done: "subprocess.CompletedProcess[str]") -> str:
    """Return the error line of the ranks, which must be printed once. torchrun adds its own report."""
    assert done.returncode != 0
    error_lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ") or line == "Stopped."]
    assert len(error_lines) == 1, done.stderr
    assert "[rank" not in done.stderr  # the traceback of a rank
    return error_lines[0]


def furthest(run: Path, expected: Path) -> float:
    """Return the largest difference of the weights of two runs."""
    one, other = torch.load(run, weights_only=True), torch.load(expected, weights_only=True)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# Stage one


def test_any_number_of_ranks_writes_the_same_cache_also_after_a_kill(
    tiny: Path, stages: Stages, forks: Forks, tmp_path: Path, dose: Callable[[int, int], int]
) -> None:
    """Killed with 2 ranks and finished with 3; under --torture also grown with 2: the same payloads."""
    smaller = ("--draws", 2, "--shard-rows", 60, "--taps", "pool1")
    larger = ("--draws", 3, "--shard-rows", 60, "--taps", "pool1,flatten")
    one, many = tmp_path / "one", tmp_path / "many"
    stages(*make_cache_command(tiny, one, *smaller))
    error(forks.run_ranks(2, DYING_RANK, 1, "write_shard", 3, *make_cache_command(tiny, many, *smaller), cwd=tmp_path))
    there = len(list(many.glob("*/shard-*.h5")))
    assert 0 < there < len(read_payloads(one))
    assert not (many / "manifest.json").exists()
    output = succeeds(forks.run_ranks(3, *make_cache_command(tiny, many, *smaller), cwd=tmp_path))
    assert output.count("next:") == 1
    assert f"continued: {there} of {len(read_payloads(one))} shards were there and intact" in output
    assert_same_rows(many, one)
    if dose(0, 1):
        stages(*make_cache_command(tiny, one, *larger))
        succeeds(forks.run_ranks(2, *make_cache_command(tiny, many, *larger), cwd=tmp_path))
        assert_same_rows(many, one)
        # What the growth added, which nothing interrupted, stands in the same order too.
        assert list(read_payloads(many))[-12:] == list(read_payloads(one))[-12:]
    stages("check-cache", many)


def assert_same_rows(cache: Path, expected: Path) -> None:
    """Assert equal shards, correct predictions, heads and file names."""
    one, other = (json.loads((folder / "manifest.json").read_text()) for folder in (cache, expected))
    assert read_payloads(cache) == read_payloads(expected)
    assert {s["path"]: s["correct"] for s in one["shards"]} == {s["path"]: s["correct"] for s in other["shards"]}
    assert one["head"]["checksum"] == other["head"]["checksum"]
    assert one["fidelity"] == pytest.approx(other["fidelity"], rel=1e-12)
    assert list_files(cache) == list_files(expected)
    assert_done(cache)


@pytest.mark.parametrize("count", [2, 3])
def test_a_missing_teacher_is_trained_by_one_rank(
    stages: Stages, tmp_path: Path, count: int, dose: Callable[[int, int], int]
) -> None:
    if count > dose(2, 3):
        pytest.skip("under --torture")
    command = ("teacher-cache", "--train-size", 200, "--views", "crop:pad=1", "--shard-rows", 50, "--teacher", "mlp:8")
    stages(*command, "--out", "one")
    succeeds(torchrun(count, *command, "--out", "many", cwd=tmp_path))
    assert read_payloads(tmp_path / "many") == read_payloads(tmp_path / "one")
    assert list_files(tmp_path / "many-teacher") == list_files(tmp_path / "one-teacher")


# Stage two


def test_ranks_render_the_views_of_their_rows_and_read_the_targets_of_all(tiny: Path) -> None:
    cache = CacheReader(tiny / "cache")
    rows = load_transfer_set("digits", Path(), **cache.cut).splits["train"]
    whole = BatchStream(
        rows,
        parse_views("crop:pad=1"),
        cache.seed,
        5,
        53,
        rows.labels,
        np.arange(len(rows)),
        draws=3,
        cache=cache,
        taps=("pool1",),
    )
    streams = [replace(whole, rank=rank, world=3).batches(4, 16) for rank in range(3)]
    for batch, *parts in zip(whole.batches(4, 16), *streams, strict=True):
        assert [len(p.views) for p in parts] == [
            b - a for a, b in (get_rank_rows(len(batch.index), r, 3) for r in range(3))
        ]
        assert torch.equal(torch.cat([p.views for p in parts]), batch.views)
        for p in parts:
            assert p.logits is not None
            assert batch.logits is not None
            assert torch.equal(p.index, batch.index)
            assert torch.equal(p.logits, batch.logits)
            assert torch.equal(p.features["pool1"], batch.features["pool1"])


def test_a_student_of_several_ranks_equals_that_of_one_process_for_every_kind_of_loss(
    stages: Stages, forks: Forks, tmp_path: Path, dose: Callable[[int, int], int]
) -> None:
    """Batches of 20 rows: 7, 6 and 7 for 3 ranks. Under --torture every method, and 2 and 4 ranks too."""
    (tmp_path / "plain.py").write_text(PLAIN)
    sys.path.insert(0, str(tmp_path))
    try:
        import plain  # type: ignore[import-not-found]

        torch.manual_seed(1)
        torch.save(plain.net(10, 1, 8).state_dict(), "plain.pt")
        stages(
            "teacher-cache",
            "--train-size",
            60,
            "--views",
            "crop:pad=1",
            "--draws",
            2,
            "--taps",
            "relu1,relu2",
            "--teacher",
            "plain:net",
            "--weights",
            "plain.pt",
            "--out",
            "c",
        )
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("plain", None)
    for count in (3, 2, 4)[: dose(1, 3)]:
        methods = SOME if dose(0, 1) == 0 else ()
        script = ROOT / "tests/helpers/compare_ranks.py"
        out = succeeds(forks.run_ranks(count, script, "c", "plain:net", 23, *methods, cwd=tmp_path))
        found = json.loads(out)
        found.pop("simkd", None)  # its projector has batch norm, which on a CPU is each rank's own
        assert len(found) >= len(SOME)
        assert {name: apart for name, (apart, _) in found.items() if apart > 1e-6} == {}
        assert {name: moved for name, (_, moved) in found.items() if moved < 1e-3} == {}
        for folder in tmp_path.glob("*-together"):
            name = folder.name.removesuffix("-together")
            for here, there in zip(
                *(read_metric_lines(tmp_path / f / "metrics.jsonl") for f in (folder, f"{name}-alone-0")), strict=True
            ):
                for key in (key for key in there if key.startswith("gradient") and name != "simkd"):
                    assert here[key] == pytest.approx(there[key], rel=1e-3), (name, key)
            (folder / "metrics.jsonl").unlink()
            (folder / "student.pt").unlink()


SKIPPING = """
import torch
from torch import nn

class Skipping(nn.Module):
    def __init__(self, classes, channels, size):
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(n, m) for n, m in
            ((channels * size * size, 16), (16, 16), (16, classes)))

    def forward(self, x):
        x = self.first(x.flatten(1)).relu()
        if not self.training or torch.rand(()) < 0.5:
            x = x + self.middle(x).relu()
        return self.last(x)
"""


def test_ranks_may_skip_different_layers_of_a_network(tiny: Path, forks: Forks, tmp_path: Path) -> None:
    """Then a weight has a gradient on some ranks only; on the others it counts as zero."""
    (tmp_path / "skipping.py").write_text(SKIPPING)
    command = ("student", "--cache", tiny / "cache", "--arch", "skipping:Skipping", "--epochs", 2, "--batch-size", 60)
    succeeds(forks.run_ranks(2, *command, "--device", "cpu", "--clip-norm", 1, "--out", "r", cwd=tmp_path))
    assert (tmp_path / "r/student.pt").is_file()


def test_ranks_train_the_same_parts_of_a_users_own_loss(
    tiny: Path, stages: Stages, forks: Forks, tmp_path: Path
) -> None:
    """Each rank draws its initial weights from another state: those of the first are used."""
    (tmp_path / "lossy.py").write_text(OWN_LOSS)
    command = ("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 2, "--device", "cpu")
    losses = ("--loss", "lossy:Projected:weight=0.1", "--loss", "kd")
    for count in (1, 2):
        succeeds(forks.run_ranks(count, *command, *losses, "--out", f"r{count}", cwd=tmp_path))
    one, two = ([line["loss"] for line in read_metric_lines(tmp_path / f"r{n}/metrics.jsonl")] for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-5)


def test_a_student_is_resumed_by_another_number_of_ranks(
    tiny: Path, stages: Stages, forks: Forks, tmp_path: Path
) -> None:
    """A run with two seeds, fine-tuning, a baseline, averaged weights and a selected epoch."""
    command = ("student", "--cache", tiny / "cache", *EVERYTHING)
    expected = stages(*command, "--out", "one")
    died = error(torchrun(2, DYING_RANK, 1, "train_step", 10, *command, "--out", "many", cwd=tmp_path))
    assert "has ended" in died or "stopped" in died
    assert len(read_metric_lines(tmp_path / "many/seed-0/distilled/metrics.jsonl")) == 1
    done = forks.run_ranks(
        3, "student", "--resume", "--tensorboard", "--log-every", 1, "--out", "many", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    epoch_lines = [line for line in done.stderr.splitlines() if ", epoch " in line]
    assert epoch_lines[-1].startswith("baseline, seed 1, epoch 5/5: loss ")
    assert len(epoch_lines) == len(set(epoch_lines)) == 2 * (3 + 2 + 5) - 1  # by the first rank alone
    for folder in list((tmp_path / "many").rglob("tensorboard")):
        assert len(list(folder.iterdir())) == 1
        shutil.rmtree(folder)
    assert list_files(tmp_path / "many") == list_files(tmp_path / "one")
    assert_done(tmp_path / "many")
    for name in list_files(tmp_path / "one"):
        if name.endswith(".pt"):
            assert furthest(tmp_path / "many" / name, tmp_path / "one" / name) < 1e-5, name
        if name.endswith("metrics.jsonl"):
            there, here = read_metric_lines(tmp_path / "one" / name), read_metric_lines(tmp_path / "many" / name)
            assert [line["epoch"] for line in here] == [line["epoch"] for line in there], name
            assert [line.keys() for line in here] == [line.keys() for line in there], name
            for key in (key for key in here[0] if key.startswith(("loss", "gradient", "learning_rate"))):
                assert [line[key] for line in here] == pytest.approx([line[key] for line in there], rel=1e-4), name
    assert found["student"]["test"]["nll"] == pytest.approx(expected["student"]["test"]["nll"], rel=1e-4)
    assert found["baseline"]["test"]["accuracy"] == expected["baseline"]["test"]["accuracy"]
    assert [seed["student"]["epoch"] for seed in found["seeds"]] == [s["student"]["epoch"] for s in expected["seeds"]]


# Errors


def test_an_error_in_all_ranks_is_printed_once(tiny: Path, tmp_path: Path) -> None:
    command = ("student", "--cache", tiny / "cache", "--arch", "cnn", "--batch-size", 3, "--out", "r")
    line = error(torchrun(2, *command, cwd=tmp_path))
    assert line == (
        "Error: 2 ranks share batches of 3 rows, and each needs 2 of one: a larger --batch-size, or fewer ranks"
    )


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (("--epochs", "4", "--out", "r"), "rank 1 has --epochs 4, rank 0 has 2: start the same command on every host"),
        (("--epochs", "2", "--out", "s"), "rank 1 has --out s, rank 0 has r: start the same command on every host"),
    ],
)
def test_ranks_with_other_options_end_before_anything_is_written(
    tiny: Path, tmp_path: Path, other: tuple[str, ...], line: str
) -> None:
    command = ["student", "--cache", str(tiny / "cache"), "--arch", "mlp:8"]
    commands = [[*command, "--epochs", "2", "--out", "r"], [*command, *other]]
    assert error(torchrun(2, DIFFERING_RANK, json.dumps(commands), cwd=tmp_path)) == f"Error: {line}"
    assert list(tmp_path.iterdir()) == []


def test_ranks_with_other_commands_end_at_once(tiny: Path, tmp_path: Path) -> None:
    commands = [["student", "--cache", str(tiny / "cache"), "--out", "r"], ["teacher-cache", "--out", "c"]]
    line = error(torchrun(2, DIFFERING_RANK, json.dumps(commands), cwd=tmp_path))
    assert (
        line == "Error: rank 1 has the command teacher-cache, rank 0 has student: start the same command on every host"
    )


def test_commands_for_one_process_raise_an_error_under_torchrun(tmp_path: Path) -> None:
    line = "Error: torchrun is for teacher-cache and student: run `tune` without it, in one process"
    for rank, message in (("0", line), ("1", "")):
        environment = {**os.environ, **ONE_RANK, "RANK": rank, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "softcache", "tune"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr.strip(), done.stdout) == (2, message, "")
    assert list(tmp_path.iterdir()) == []


def test_read_ranks_needs_all_variables_of_torchrun() -> None:
    assert read_ranks({}) == read_ranks({"RANK": "1", "WORLD_SIZE": "4"}) == Ranks()
    assert read_ranks({**ONE_RANK, "LOCAL_WORLD_SIZE": "1"}) == Ranks(0, 2, 0, 1)
