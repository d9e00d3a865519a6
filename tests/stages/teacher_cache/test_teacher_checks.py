"""Before its first output is stored, a teacher outputs logits, always the same ones, in any batch; also on resume."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models import build
from softcache.pipeline.models.prepared_model import InputSpec
from tests.helpers import processes
from tests.helpers.caches import interrupt_after_shards, save_scaled_teacher
from tests.helpers.colours import save_colour_teacher, save_colours
from tests.helpers.commands import Stages
from tests.helpers.processes import Forks

forks = processes.forks
NAMES = ["ant", "bee", "cow"]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """The options of stage one in tmp_path but for the teacher, over images of three classes."""
    save_colours(tmp_path / "d", NAMES)
    return [
        "teacher-cache",
        "--data",
        "folder:d",
        "--views",
        "none",
        "--draws",
        "1",
        "--normalize",
        "none",
        "--out",
        "c",
    ]


def name_teacher(folder: Path, module: str, form: str) -> list[str]:
    save_colour_teacher(folder, module, [0, 1, 2])
    return ["--teacher", f"{module}:{form}", "--weights", "no-statistics.pt" if form == "no_statistics" else "w.pt"]


# The same each time, in any batch


@pytest.mark.parametrize("form", ["dropout", "noise", "random_tap"])
def test_random_outputs_are_refused_before_anything_is_written(
    command: list[str], stages: Stages, tmp_path: Path, form: str
) -> None:
    more = ["--taps", "hidden"] if form == "random_tap" else []
    error = stages.fails(2, *command, *name_teacher(tmp_path, "nets_random", form), *more)
    name = "tap 'hidden'" if form == "random_tap" else "logits"
    assert f"the teacher's {name} are random" in error
    assert "F.dropout(x, training=self.training)" in error
    assert "\n" not in error
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("form", "layer"),
    [
        ("batch_norm", ""),
        ("train_mode", "(BatchNorm1d 'norm' is in train mode)"),
        ("no_statistics", "(BatchNorm1d 'norm' has no running statistics)"),
    ],
)
def test_outputs_that_depend_on_the_batch_are_refused(
    command: list[str], stages: Stages, tmp_path: Path, form: str, layer: str
) -> None:
    error = stages.fails(2, *command, *name_teacher(tmp_path, "nets_batch", form))
    assert "depend on the other views of its batch" in error
    assert layer in error
    assert "random" not in error
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("arch", "tap", "precision"),
    [
        ("cnn", "pool1", "float32"),
        ("resnet8", "layer1", "bfloat16"),
        ("resnet8", "layer3:pool", "auto"),
        ("torchvision:mobilenet_v3_small", "features.3", "float32"),
    ],
)
def test_a_teacher_with_random_weights_is_not_refused(
    stages: Stages, tmp_path: Path, arch: str, tap: str, precision: str
) -> None:
    torch.manual_seed(1)
    torch.save(build(arch, 10, 3, 8).state_dict(), tmp_path / "w.pt")
    more = ("--taps", tap, "--precision", precision, "--normalize", "mean=0.5,0.5,0.5,std=0.3", "--out", "c")
    stages("teacher-cache", "--train-size", 40, "--teacher", arch, "--weights", "w.pt", *more)
    assert CacheReader(tmp_path / "c").input_spec == InputSpec(3, 8, (0.5,) * 3, (0.3,) * 3)


# Logits or probabilities


@pytest.mark.parametrize("form", ["softmax", "log_softmax", "certain"])
@pytest.mark.parametrize("codec", ["float16", "sqrt8"])
def test_probabilities_are_refused_or_stored_as_logarithms(
    command: list[str], stages: Stages, tmp_path: Path, form: str, codec: str
) -> None:
    teacher = [*name_teacher(tmp_path, "nets_soft", form), "--codec", codec]
    error = stages.fails(2, *command, *teacher)
    assert "--outputs probabilities" in error
    assert "softmax" in error
    stages(*command, *teacher, "--outputs", "probabilities")
    cache = CacheReader(tmp_path / "c")
    assert cache.manifest.identity["teacher"]["outputs"] == "probabilities"
    logits = cache.read_targets("train", 0, np.arange(30))[0]
    assert logits.isfinite().all()
    assert float(logits.logsumexp(1).abs().max()) < 0.05
    labels = cache.read_column("train", 0, "label")[:30]
    assert (logits.argmax(1).numpy() == labels).all()
    weights = ("--weights", "w.pt", "--teacher", f"nets_soft:{form}", "--data", "folder:d")
    stages("check-cache", "c", "--deep", *weights)
    stages(*command[:-1], "c", *teacher, "--outputs", "probabilities", "--draws", "2")
    path = tmp_path / "c" / cache.manifest.shards[0].path
    path.unlink()
    assert "the same rows as before" in stages.call("check-cache", "c", "--repair", *weights)[1]


def test_a_cache_of_logits_does_not_record_what_its_teacher_outputs(
    command: list[str], stages: Stages, tmp_path: Path
) -> None:
    """Identity and settings stay those of earlier versions."""
    teacher = name_teacher(tmp_path, "nets_plain", "plain")
    stages(*command, *teacher)
    manifest = CacheReader(tmp_path / "c").manifest
    assert "outputs" not in manifest.identity["teacher"]
    assert "outputs" not in manifest.settings
    error = stages.fails(2, *command[:-1], "e", *teacher, "--outputs", "probabilities")
    assert "these are no probabilities" in error


def test_a_later_row_that_is_no_distribution_is_named(command: list[str], stages: Stages, tmp_path: Path) -> None:
    save_colour_teacher(tmp_path, "nets_late", [0, 1, 2])
    source = (tmp_path / "nets_late.py").read_text()
    late = "z = z.softmax(1) * (2 if len(CALLS) > 12 else 1); CALLS.append(0)"
    (tmp_path / "nets_late.py").write_text("CALLS = []\n" + source.replace("z = z.softmax(1)", late, 1))
    more = ("--teacher", "nets_late:softmax", "--weights", "w.pt", "--outputs", "probabilities", "--batch-size", "2")
    assert "is no distribution: it sums to 2" in stages.fails(1, *command, *more)


def test_outputs_of_a_sigmoid_are_noted_and_not_refused(command: list[str], stages: Stages, tmp_path: Path) -> None:
    code, out, _ = stages.call(*command, *name_teacher(tmp_path, "nets_sigmoid", "sigmoid"))
    assert code == 0
    assert "as after a sigmoid" in out


# Resuming, and several ranks


@pytest.fixture
def interrupted(tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The command of a cache of a user's network that was stopped after two shards."""
    save_scaled_teacher(tmp_path, "net_resumed")
    more = ("--teacher", "net_resumed:make", "--weights", "w.pt", "--normalize", "none", "--shard-rows", 20)
    command: list[object] = ["teacher-cache", "--train-size", 80, *more, "--out", "c"]
    with monkeypatch.context() as patch:
        interrupt_after_shards(2, patch)
        stages.fails(130, *command)
    return command


def edit_record(folder: Path, **changes: Any) -> None:
    path = folder / "c/unfinished.json"
    record = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


def test_a_teacher_whose_code_changed_does_not_finish_a_cache(
    interrupted: list[object], stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import net_resumed  # type: ignore[import-not-found]

    monkeypatch.setattr(net_resumed, "VOLUME", 1.2)
    error = stages.fails(1, *interrupted)
    assert "the teacher's outputs are not those of the unfinished cache in 'c'" in error
    assert re.search(r"differ by up to [0-9.]+, [0-9.]+% of their range", error)
    assert not (tmp_path / "c/manifest.json").exists()
    monkeypatch.setattr(net_resumed, "VOLUME", 1.0 + 1e-5)  # as another processor rounds
    assert "continued: 2 of" in stages.call(*interrupted)[1]
    assert not (tmp_path / "c/unfinished.json").exists()


def test_an_unfinished_cache_of_an_earlier_version_is_finished(
    interrupted: list[object], stages: Stages, tmp_path: Path
) -> None:
    edit_record(tmp_path, reference_outputs=None, options=None)
    assert "continued: 2 of" in stages.call(*interrupted)[1]


@pytest.mark.parametrize(
    "record", [3, "x", [1], {"logits": 3}, {"logits": [[1]]}, {"logits": [[None] * 10] * 8}, {"other": [[1.0]]}]
)
def test_a_damaged_record_of_outputs_is_one_line(
    interrupted: list[object], stages: Stages, tmp_path: Path, record: Any
) -> None:
    edit_record(tmp_path, reference_outputs=record)
    assert "\n" not in stages.fails(1, *interrupted)


def test_the_command_of_the_unfinished_cache_is_printed(
    interrupted: list[object], stages: Stages, tmp_path: Path
) -> None:
    error = stages.fails(1, *interrupted, "--codec", "float32")
    line = next(line for line in error.splitlines() if line.startswith("Finish the unfinished one with  "))
    arguments = line.partition(" -m softcache ")[2].split()
    stages(*arguments)
    assert (tmp_path / "c/manifest.json").exists()


def test_an_unfinished_record_stays_small(interrupted: list[object], tmp_path: Path) -> None:
    record = json.loads((tmp_path / "c/unfinished.json").read_text())["reference_outputs"]
    assert [len(row) for row in record["logits"]] == [10] * 8


def test_a_rank_with_another_teacher_ends_the_command(command: list[str], forks: Forks, tmp_path: Path) -> None:
    done = forks.run_ranks(2, *command, *name_teacher(tmp_path, "nets_ranks", "by_rank"), cwd=tmp_path)
    assert done.returncode != 0
    assert "the teacher's outputs are not those of rank 0" in done.stderr
    assert not (tmp_path / "c/manifest.json").exists()


@pytest.mark.parametrize("rows", [1, 3])
def test_ranks_of_a_few_views_compare_the_same_ones(
    rows: int, forks: Forks, tmp_path: Path, save_image: Callable[..., Any]
) -> None:
    """Images without labels: one or three rows of training."""
    for k in range(rows + 1):
        save_image(tmp_path / f"d/{k}.png", k=k, width=4, height=4)
    command = ["teacher-cache", "--data", "folder:d", "--views", "none", "--draws", "1", "--out", "c"]
    done = forks.run_ranks(2, *command, *name_teacher(tmp_path, "nets_few", "plain"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "chance" not in done.stdout


# Before a teacher is trained


def test_another_cache_in_the_folder_is_found_before_a_teacher_is_trained(
    command: list[str], stages: Stages, tmp_path: Path
) -> None:
    stages(*command, *name_teacher(tmp_path, "nets_first", "plain"))
    without = [*command[: command.index("--normalize")], "--out", "c"]
    assert "teacher.arch" in stages.fails(1, *without)
    assert "views.policy" in stages.fails(1, *without, "--views", "crop:pad=1")
    assert "name it with --weights" in stages.fails(1, *without, "--teacher", "nets_first:plain")
    assert not (tmp_path / "c-teacher").exists()
