"""Stage two trains on exactly the cached outputs, without the teacher, and can be stopped at any time."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import softcache.stages.training.loop as training
from softcache.data.transfer_set import load_transfer_set
from softcache.pipeline.batch import Batch, ModelOutputs
from softcache.pipeline.cache import reader as cache_module
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.loading.stream import BatchStream
from softcache.pipeline.losses import parse_losses
from softcache.pipeline.models import build
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from tests.helpers.commands import Stages, tiny_cache_command
from tests.helpers.stopping import stop_at

SHORT = ("--epochs", 2, "--batch-size", 50)


def load_teacher(tiny: Path) -> PreparedModel:
    record = json.loads((tiny / "runs/teacher/result.json").read_text())["teacher"]
    network = build("cnn", 10, 1, 8)
    network.load_state_dict(torch.load(tiny / "runs/teacher/teacher.pt", weights_only=True))
    return PreparedModel(network, InputSpec.from_json(record["preparation"])).eval()


def list_numbers(record: dict[str, Any]) -> list[float]:
    """Every number of a nested record, in order."""
    numbers: list[float] = []
    for value in record.values():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            numbers += list_numbers(value)
        elif value is not None:
            numbers.append(value)
    return numbers


def make_stream(folder: Path, **changes: Any) -> BatchStream:
    cache, transfer_set = (
        CacheReader(folder),
        load_transfer_set("digits", Path("none"), val_fraction=0.125, train_size=300),
    )
    cache.check_transfer_set(transfer_set)
    split = transfer_set.splits["train"]
    options: dict[str, Any] = {"order_seed": 5, "batch_size": 32, "labels": split.labels, "rows": np.arange(300)}
    options |= {"draws": 3, "cache": cache, "split": split, "views": cache.views, "view_seed": cache.seed}
    return BatchStream(**(options | changes))


def train_by_hand(batches: list[Batch], tiny: Path, arch: str, live: bool) -> list[tuple[float, float]]:
    """Take SGD steps on kd + hard, with cached targets, or with those of the live teacher on the same views.

    Returns:
        At each step the loss that is minimised, and that of the same student with the other targets.
    """
    torch.manual_seed(3)
    teacher = load_teacher(tiny)
    student = PreparedModel(build(arch, 10, 1, 8), teacher.input_spec)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    kd, hard = parse_losses(("kd:temperature=4,weight=0.9", "hard:weight=0.1"))
    history = []
    for batch in batches:
        with torch.no_grad():
            logits = teacher(batch.views)
        live_batch = Batch(batch.index, batch.draw, batch.views, batch.labels, logits)
        outputs = ModelOutputs(student(batch.views))
        losses = [0.9 * kd(outputs, b, None) + 0.1 * hard(outputs, b, None) for b in (batch, live_batch)]
        optimizer.zero_grad()
        losses[live].backward()
        optimizer.step()
        history.append((float(losses[live].detach()), float(losses[not live].detach())))
    return history


@pytest.mark.parametrize(
    ("arch", "codec", "tolerance"),
    [("mlp:64", "float32", 1e-6), ("resnet8", "float32", 1e-6), ("mlp:64", "float16", 1e-3)],
)
def test_thirty_steps_from_the_cache_equal_thirty_steps_with_the_live_teacher(
    tiny: Path, stages: Stages, tmp_path: Path, arch: str, codec: str, tolerance: float
) -> None:
    stages(*tiny_cache_command(tiny)[:-1], tmp_path / "c", "--codec", codec)
    batches = list(make_stream(tmp_path / "c", batch_size=64).batches(0, 30))
    cached, live = (train_by_hand(batches, tiny, arch, live=live) for live in (False, True))
    worst = max(abs(a - b) / b for (a, _), (b, _) in zip(cached, live, strict=True))
    print(f"{arch}, {codec}: largest relative difference of 30 losses {worst:.1e}")
    assert worst <= tolerance


def test_half_precision_changes_a_loss_by_less_than_a_thousandth_at_the_same_weights(tiny: Path) -> None:
    """For a student with batch norm, which amplifies any rounding from step to step, also that of its own weights."""
    batches = list(make_stream(tiny / "cache", batch_size=64).batches(0, 30))
    worst = max(abs(a - b) / b for a, b in train_by_hand(batches, tiny, "resnet8", live=False))
    print(f"resnet8, float16: largest relative difference at equal weights {worst:.1e}")
    assert 0 < worst <= 1e-3


def test_an_epoch_shows_every_row_once_and_every_draw_comes_once_before_one_repeats(tiny: Path) -> None:
    stream = make_stream(tiny / "cache")
    steps = stream.steps_per_epoch
    for cycle in range(2):
        draws = []
        for epoch in range(3 * cycle, 3 * cycle + 3):
            batches = list(stream.batches(epoch * steps, (epoch + 1) * steps))
            assert sorted(torch.cat([b.index for b in batches]).tolist()) == list(range(300))
            assert len({len(b.index) for b in batches}) <= 2
            draws.append(batches[0].draw)
            assert len({b.draw for b in batches}) == 1
        assert sorted(draws) == [0, 1, 2]


def test_batches_depend_only_on_the_seed_and_the_step(tiny: Path) -> None:
    batches = list(make_stream(tiny / "cache").batches(0, 25))
    for a, b in zip(batches[13:], make_stream(tiny / "cache").batches(13, 25), strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.views, b.views)
        assert torch.equal(a.logits, b.logits)
    other_seed = next(make_stream(tiny / "cache", order_seed=6).batches(0, 1))
    assert not torch.equal(other_seed.index, batches[0].index)


@pytest.mark.parametrize("resident", [True, False])
def test_each_row_gets_its_own_targets_from_memory_and_from_disk(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    """Compared with the teacher itself, row by row; from disk the order is by shuffled blocks, with every row once."""
    if not resident:
        monkeypatch.setattr(cache_module, "RESIDENT_BYTES", 0)
    teacher, index = load_teacher(tiny), []
    for batch in make_stream(tiny / "cache", taps=("flatten",)).batches(0, 10):
        with torch.no_grad():
            expected = teacher(batch.views)
        assert batch.logits is not None
        torch.testing.assert_close(batch.logits, expected, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            logits = torch.nn.functional.linear(
                batch.features["flatten"].float(), teacher.network.linear.weight, teacher.network.linear.bias
            )
        torch.testing.assert_close(logits, expected, rtol=1e-2, atol=2e-2)
        index += batch.index.tolist()
    assert sorted(index) == list(range(300))


def test_students_of_other_archs_train_after_the_teacher_was_deleted(
    stages: Stages, tmp_path: Path, stages_process: Any
) -> None:
    """The teacher is a class of the user's; its weights are deleted and its module can no longer be imported."""
    (tmp_path / "elsewhere.py").write_text(
        "import torch\n"
        "def make(classes, channels, size):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * size * size, classes))\n"
    )
    options = ("--train-size", 200, "--epochs", 20, "--arch", "elsewhere:make", "--out", "runs/t")
    assert stages_process("teacher", *options, cwd=tmp_path).returncode == 0
    weights = ("--weights", "runs/t", "--teacher", "elsewhere:make")
    caching = stages_process("teacher-cache", "--train-size", 200, *weights, "--out", "c", cwd=tmp_path)
    assert caching.returncode == 0, caching.stderr
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "elsewhere.py").write_text("raise ImportError('the teacher is not on this machine')\n")
    for arch in ("mlp:16", "cnn"):
        student = stages_process("student", "--cache", "c", "--arch", arch, "--epochs", 15, "--json", cwd=tmp_path)
        assert student.returncode == 0, student.stderr
        result = json.loads(student.stdout)
        assert result["student"]["arch"] == arch
        assert result["teacher"]["arch"] == "elsewhere:make"
        assert result["student"]["test"]["agreement"] > 0.5


CASES = {
    "plain": ("--arch", "mlp:16", "--loss", "kd:temperature=8->1", "--loss", "hard:weight=0->1"),
    "everything": (
        "--arch",
        "torchvision:mobilenet_v3_small",
        "--optimizer",
        "adamw",
        "--ema",
        "0.9",
        "--clip-norm",
        "1",
        "--loss",
        "kd",
        "--loss",
        "hint:teacher=pool1,student=features.1,weight=1",
        "--schedule",
        "step",
        "--learning-rate",
        "0.001",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_continues_to_the_same_weights(
    tiny: Path, stages: Stages, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the third of four epochs: dropout, moving average, regressor and schedule continue as they were."""
    command = ("student", "--cache", tiny / "cache", *CASES[case], "--epochs", 4, "--batch-size", 60, "--seed", 7)
    stages(*command, "--out", "uninterrupted")

    with monkeypatch.context() as patch:
        stop_at(patch, 13)
        line = stages.fails(130, *command, "--out", "stopped")
    assert "student --resume --out stopped" in line
    assert not Path("stopped/result.json").exists()
    stages("student", "--resume", "--out", "stopped")

    uninterrupted, stopped = (
        torch.load(f"{run}/student.pt", weights_only=True) for run in ("uninterrupted", "stopped")
    )
    assert uninterrupted.keys() == stopped.keys()
    assert all(torch.equal(uninterrupted[name], stopped[name]) for name in uninterrupted)
    lines = [
        [json.loads(x) for x in Path(f"{r}/metrics.jsonl").read_text().splitlines()]
        for r in ("uninterrupted", "stopped")
    ]
    assert [x["epoch"] for x in lines[1]] == [1, 2, 3, 4]
    for a, b in zip(*lines, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_the_result_is_complete_and_evaluate_computes_the_same_figures(tiny: Path, stages: Stages) -> None:
    result = stages("student", "--cache", tiny / "cache", "--arch", "mlp:16", *SHORT, "--baseline", "--out", "r")
    assert result == json.loads(Path("r/result.json").read_text())
    figures = {"accuracy", "top5", "nll", "brier", "ece", "precision_macro", "recall_macro", "f1_macro"}
    figures |= {"f1_weighted", "auroc_macro", "per_class"}
    for split in ("val", "test"):
        assert figures <= result["teacher"][split].keys()
        for model in ("student", "baseline"):
            assert figures | {"agreement", "kl_to_teacher"} <= result[model][split].keys()
    assert {"settings", "cache", "spread", "seeds", "seconds", "images_per_second", "peak_memory"} <= result.keys()
    assert result["cache"]["fingerprint"] == CacheReader(tiny / "cache").manifest.fingerprint
    assert result["student"]["parameters"] == 64 * 16 + 16 + 16 * 10 + 10
    assert result["student"]["multiply_adds"] == 64 * 16 + 16 * 10
    assert result["student"]["test"] != result["baseline"]["test"]
    manifest = CacheReader(tiny / "cache").manifest
    assert result["teacher"]["test"]["accuracy"] == pytest.approx(manifest.teacher["test"]["accuracy"], abs=1e-12)
    again = stages("evaluate", "r")
    assert stages.fails(1, "evaluate", "r", "--cache", "nowhere")
    assert list_numbers(again["0"]["test"]) == pytest.approx(list_numbers(result["student"]["test"]), abs=1e-9)


def test_seeds_give_mean_and_spread_and_each_is_a_run_of_its_own(tiny: Path, stages: Stages) -> None:
    command = ("student", "--cache", tiny / "cache", "--arch", "mlp:8", *SHORT)
    result = stages(*command, "--seeds", 3, "--seed", 4, "--out", "three")
    single = [stages(*command, "--seed", s, "--out", f"one-{s}")["student"]["test"]["accuracy"] for s in (4, 5, 6)]
    assert [s["student"]["test"]["accuracy"] for s in result["seeds"]] == single
    assert result["student"]["test"]["accuracy"] == pytest.approx(np.mean(single), abs=1e-12)
    assert result["spread"]["student"]["test"]["accuracy"] == pytest.approx(np.std(single, ddof=1), abs=1e-12)
    assert "such as --weights three/seed-4" in stages.fails(2, "teacher-cache", "--weights", "three", "--out", "c")
    next_generation = stages("teacher-cache", "--train-size", 50, "--weights", "three/seed-5", "--out", "c")
    assert next_generation["teacher"]["test"]["accuracy"] == pytest.approx(single[1], abs=1e-9)


def test_hidden_labels_are_never_used(tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    """--labelled 20: 20 rows keep their labels, by class; the baseline sees only these rows, for as many steps."""
    batches: dict[str, list[Batch]] = {"student": [], "baseline": []}
    train_step = training.train_step

    def record_batch(active, batch, *rest):  # type: ignore[no-untyped-def]
        batches[active.run.name].append(batch)
        return train_step(active, batch, *rest)

    monkeypatch.setattr(training, "train_step", record_batch)
    losses = ("--loss", "kd", "--loss", "hard:weight=0.1")
    stages("student", "--cache", tiny / "cache", "--arch", "mlp:8", *SHORT, *losses, "--labelled", 20, "--baseline")
    assert len(batches["student"]) == len(batches["baseline"])
    index, labels = (torch.cat([getattr(b, k) for b in batches["student"]]) for k in ("index", "labels"))
    labelled = {(i, y) for i, y in zip(index.tolist(), labels.tolist(), strict=True) if y >= 0}
    assert len(labelled) == 20
    assert sorted(np.bincount([y for _, y in labelled], minlength=10)) == [2] * 10
    assert set(index.tolist()) == set(range(300))
    baseline = {(i, y) for b in batches["baseline"] for i, y in zip(b.index.tolist(), b.labels.tolist(), strict=True)}
    assert baseline == labelled


def test_mixup_views_carry_both_labels_and_their_shares(tiny: Path, stages: Stages, tmp_path: Path) -> None:
    stages(*tiny_cache_command(tiny)[:-1], tmp_path / "c", "--views", "none:mixup=1")
    stream = make_stream(tmp_path / "c")
    batch = next(stream.batches(0, 1))
    assert batch.partner is not None
    assert batch.share is not None
    pixels = stream.split.images.pixels
    teacher = load_teacher(tiny)
    with torch.no_grad():
        torch.testing.assert_close(batch.logits, teacher(batch.views), rtol=1e-3, atol=1e-3)
    mixtures = 0
    for view, label, partner, share, i in zip(
        batch.views, batch.labels, batch.partner, batch.share, batch.index, strict=True
    ):
        partners = torch.from_numpy(np.flatnonzero(stream.labels == int(partner)))
        mixed = share * pixels[i].float() + (1 - share) * pixels[partners].float()
        mixtures += bool(((mixed - view.float()).abs().flatten(1).max(1).values <= 0.51).any())
        assert int(label) == stream.labels[int(i)]
    assert mixtures == len(batch.views)
    command = ("student", "--cache", tmp_path / "c", "--arch", "mlp:8", *SHORT)
    stages(*command, "--loss", "hard", "--loss", "kd")
    for name in ("dkd", "nkd", "tf_kd"):
        line = stages.fails(2, *command, "--loss", name, "--out", "r")
        assert f"loss '{name}' needs one label per view, and the cache's views are mixtures of two images" in line
    assert not Path("r").exists()
    stages(*command, "--loss", "wsld:weight=0.1", "--out", "r")


@pytest.mark.parametrize("loss", ["logit_mse:weight=0.01", "hint:teacher=pool1,student=pool1", "hard:smoothing=0.1"])
def test_each_loss_trains(tiny: Path, stages: Stages, loss: str) -> None:
    command = ("student", "--cache", tiny / "cache", "--arch", "cnn", "--epochs", 4, "--learning-rate", 0.01)
    stages(*command, "--loss", loss, "--out", "r")
    lines = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]


def test_a_student_that_diverges_stops_with_epoch_term_and_a_suggestion(tiny: Path, stages: Stages) -> None:
    line = stages.fails(
        1,
        "student",
        "--cache",
        tiny / "cache",
        "--arch",
        "mlp:16",
        "--loss",
        "logit_mse",
        "--epochs",
        3,
        "--learning-rate",
        1e6,
        "--warmup",
        0,
        "--out",
        "r",
    )
    assert "the term 'logit_mse'" in line
    assert "in epoch " in line
    assert "Lower --learning-rate (now 1e+06)" in line
    assert not Path("r/student.pt").exists()


def test_a_last_step_that_was_too_large_is_found_in_the_logits(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every term is finite, and the weights are no longer: neither figures nor weights are written."""
    train_step = training.train_step

    def break_weights(active, *rest):  # type: ignore[no-untyped-def]
        terms = train_step(active, *rest)
        with torch.no_grad():
            next(active.run.model.parameters()).mul_(torch.nan)
        return terms

    monkeypatch.setattr(training, "train_step", break_weights)
    command = ("student", "--cache", tiny / "cache", "--arch", "mlp:16", "--epochs", 1, "--batch-size", 300)
    line = stages.fails(1, *command, "--out", "r")
    assert "training the student diverged: its logits are no longer finite after epoch 1. Lower --learning" in line
    assert not Path("r/student.pt").exists()


def test_bfloat16_trains_nearly_as_float32_does(tiny: Path, stages: Stages) -> None:
    command = ("student", "--cache", tiny / "cache", "--arch", "cnn", "--epochs", 10, "--learning-rate", 0.02)
    float32, bfloat16 = (stages(*command, "--precision", p)["student"]["test"] for p in ("float32", "bfloat16"))
    assert float32["nll"] != bfloat16["nll"]
    assert float32["accuracy"] > 0.8
    assert abs(float32["accuracy"] - bfloat16["accuracy"]) < 0.05


def test_images_without_classes_have_soft_targets_only(stages: Stages, tmp_path: Path) -> None:
    """A folder without class folders: kd trains, losses and options that need labels are refused."""
    digits = load_transfer_set("digits", Path("none"), val_fraction=0.125, train_size=60).splits["train"]
    (tmp_path / "images").mkdir()
    for i in range(60):
        Image.fromarray(digits.images.pixels[i, 0].numpy()).save(tmp_path / f"images/{i:02d}.png")
    stages("teacher", "--train-size", 100, "--arch", "mlp:16", "--epochs", 3, "--out", "t")
    data = ("--data", f"folder:{tmp_path / 'images'}")
    cache = stages("teacher-cache", *data, "--weights", "t", "--views", "crop:pad=1", "--draws", 2, "--out", "c")
    assert cache["teacher"]["train"]["accuracy"] is None
    command = ("student", *data, "--cache", "c", "--arch", "mlp:8", "--epochs", 2)
    result = stages(*command, "--loss", "kd", "--out", "r")
    assert 0 <= result["student"]["val"]["agreement"] <= 1
    assert "accuracy" not in result["student"]["val"]
    assert "loss 'hard' needs labels" in stages.fails(2, *command, "--loss", "kd", "--loss", "hard", "--out", "s")
    assert "--baseline needs labels" in stages.fails(2, *command, "--loss", "kd", "--baseline", "--out", "s")
    assert not math.isnan(result["student"]["val"]["kl_to_teacher"])
