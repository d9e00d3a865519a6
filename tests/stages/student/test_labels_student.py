"""Students of several labels an image: thresholds, evaluation, steps from the cache and live, losses of layers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import softcache
from softcache.pipeline.metrics.labels import evaluate_labels
from softcache.pipeline.metrics.thresholds import choose_thresholds, evaluate_at_thresholds
from softcache.pipeline.models import build
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from softcache.stages.runs.logits import read_logits
from tests.helpers.commands import Stages

K, ROWS = 3, 400


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """table.npz: 400 rows of 6 numbers with 3 labels, some of them unknown; classes have names."""
    folder = tmp_path_factory.mktemp("several-labels")
    random = np.random.default_rng(0)
    x = random.normal(size=(ROWS, 6)).astype(np.float32)
    y = (x @ random.normal(size=(6, K)) + random.normal(size=(ROWS, K)) > [0, 1, 2]).astype(np.int8)
    y[random.random((ROWS, K)) < 0.05] = -1
    np.savez(folder / "table.npz", x=x, y=y, classes=np.array(["wet", "cold", "dark"]))
    return folder


def make_cache(stages: Stages, table: Path, codec: str = "float16") -> Path:
    folder, teacher = table / f"cache-{codec}", table / "teacher"
    data = ("--data", f"arrays:{table / 'table.npz'}", "--test-fraction", 0.25, "--val-fraction", 0.25)
    if not teacher.exists():
        stages("teacher", *data, "--arch", "mlp:32", "--epochs", 5, "--out", teacher)
    if not folder.exists():
        views = ("--views", "noise:std=0.2", "--draws", 2, "--taps", "hidden1")
        stages("teacher-cache", *data, "--weights", teacher, *views, "--codec", codec, "--out", folder)
    return folder


def train(stages: Stages, table: Path, out: Path, *more: object) -> dict[str, Any]:
    command = ("student", "--data", f"arrays:{table / 'table.npz'}", "--cache", make_cache(stages, table))
    return stages(*command, "--arch", "mlp:16", "--epochs", 3, "--out", out, *more)


def test_thresholds_of_validation_are_kept_with_student_baseline_and_teacher(
    table: Path, stages: Stages, tmp_path: Path
) -> None:
    result = train(stages, table, tmp_path / "run", "--baseline")
    files = {"student": "logits", "baseline": "baseline/logits", "teacher": "teacher-logits"}
    for model, name in files.items():
        figures, splits = result[model], read_logits(tmp_path / f"run/{name}.safetensors")
        thresholds = choose_thresholds(splits["val"].logits, splits["val"].labels)
        assert figures["thresholds"] == thresholds.tolist()
        for split, rows in splits.items():
            assert figures[split]["at_thresholds"] == evaluate_at_thresholds(rows.logits, rows.labels, thresholds)
            assert figures[split]["f1_macro"] == evaluate_labels(rows.logits, rows.labels)["f1_macro"]
        assert figures["val"]["at_thresholds"]["f1_macro"] >= figures["val"]["f1_macro"]


def test_thresholds_do_not_depend_on_the_test_rows(table: Path, stages: Stages, tmp_path: Path) -> None:
    thresholds = []
    for flipped in (False, True):
        with np.load(table / "table.npz") as file:
            parts = {f"{name}_{split}": rows for name in ("x", "y") for split, rows in split_rows(file[name]).items()}
        if flipped:
            parts["y_test"] = np.where(parts["y_test"] < 0, parts["y_test"], 1 - parts["y_test"])
        np.savez(tmp_path / "parts.npz", **parts)
        data = ("--data", f"arrays:{tmp_path / 'parts.npz'}", "--epochs", 2)
        result = stages("teacher", *data, "--arch", "mlp:8", "--out", tmp_path / f"run-{flipped}")
        thresholds.append((result["teacher"]["thresholds"], result["teacher"]["val"]["at_thresholds"]))
        assert result["task"] == "labels"
    assert thresholds[0] == thresholds[1]


def split_rows(rows: Any) -> dict[str, Any]:
    return {"train": rows[:200], "val": rows[200:300], "test": rows[300:]}


def test_each_seed_has_thresholds_of_its_own_and_their_mean_is_of_no_student(
    table: Path, stages: Stages, tmp_path: Path
) -> None:
    result = train(stages, table, tmp_path / "run", "--seeds", 2)
    assert "thresholds" not in result["student"]
    assert "thresholds" not in result["spread"]["student"]
    of_seeds = [seed["student"]["thresholds"] for seed in result["seeds"]]
    assert of_seeds[0] != of_seeds[1]
    for seed, thresholds in enumerate(of_seeds):
        own = json.loads((tmp_path / f"run/seed-{seed}/result.json").read_text())
        assert own["student"]["thresholds"] == thresholds
    tuned = [seed["student"]["test"]["at_thresholds"]["f1_macro"] for seed in result["seeds"]]
    assert result["student"]["test"]["at_thresholds"]["f1_macro"] == pytest.approx(np.mean(tuned))


def test_evaluate_computes_the_same_thresholds_and_figures_from_the_weights(
    table: Path, stages: Stages, tmp_path: Path
) -> None:
    result = train(stages, table, tmp_path / "run")
    data = ("--data", f"arrays:{table / 'table.npz'}")
    again = stages("evaluate", tmp_path / "run", *data)["0"]
    assert again["thresholds"] == result["student"]["thresholds"]
    assert again["test"] == result["student"]["test"]
    code, out, err = stages.call("evaluate", tmp_path / "run", *data)
    assert code == 0, err
    assert "seed 0, test, at thresholds: f1_macro" in out
    assert "seed 0, thresholds: wet 0." in out


def test_the_table_of_a_run_shows_f1_at_thresholds(table: Path, stages: Stages, tmp_path: Path) -> None:
    command = ("student", "--data", f"arrays:{table / 'table.npz'}", "--cache", make_cache(stages, table))
    code, out, err = stages.call(*command, "--arch", "mlp:16", "--epochs", 2, "--out", tmp_path / "run")
    assert code == 0, err
    (header,) = [line for line in out.splitlines() if "F1 tuned" in line]
    assert header.split("mAP")[1].split()[:4] == ["macro", "F1", "F1", "tuned"]
    figures = json.loads((tmp_path / "run/result.json").read_text())["student"]["test"]
    (row,) = [line for line in out.splitlines() if line.startswith("mlp:16, from the cache")]
    expected = [figures["map"], figures["f1_macro"], figures["at_thresholds"]["f1_macro"]]
    assert row.split()[4:7] == [f"{value:.4f}" for value in expected]


def test_losses_of_layers_train_with_several_labels(table: Path, stages: Stages, tmp_path: Path) -> None:
    losses = (
        "hint:teacher=hidden1,student=hidden1",
        "asymmetric",
        "soft_f1",
        "logit_mse:weight=0.1",
        "mlkd:weight=0.1",
    )
    result = train(stages, table, tmp_path / "run", *(x for loss in losses for x in ("--loss", loss)))
    assert result["student"]["test"]["map"] > 0.3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--loss", "kd"), "loss 'kd' is for classes, and the task here is labels"),
        (("--loss", "crd:teacher=hidden1,student=hidden1"), "loss 'crd' is for classes"),
        (("--loss", "bce", "--sampler", "balanced"), "--sampler balanced is for one class an image"),
    ],
)
def test_what_needs_one_class_an_image_is_refused(
    table: Path, stages: Stages, tmp_path: Path, more: tuple[str, ...], words: str
) -> None:
    command = ("student", "--data", f"arrays:{table / 'table.npz'}", "--cache", make_cache(stages, table))
    assert words in stages.fails(2, *command, "--arch", "mlp:16", "--out", tmp_path / "run", *more)


# From the cache and live


def load_teacher(run: Path) -> PreparedModel:
    record = json.loads((run / "result.json").read_text())["teacher"]
    spec = InputSpec.from_json(record["preparation"])
    network = build(record["arch"], K, spec.channels, spec.size, shape=spec.shape)
    network.load_state_dict(torch.load(run / "teacher.pt", weights_only=True))
    return PreparedModel(network, spec).eval()


def train_by_hand(cache: softcache.Cache, teacher: nn.Module, live: bool) -> list[tuple[float, float]]:
    """Take 30 steps on bce, kd_sigmoid and mlkd, with cached targets, or with those of the live teacher.

    Returns:
        At each step the loss that is minimised, and that of the same student with the other targets.
    """
    torch.manual_seed(3)
    student = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, K))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    criterion = softcache.DistillationLoss("kd_sigmoid:temperature=2", "bce:weight=0.1", "mlkd:weight=0.1")
    history: list[tuple[float, float]] = []
    while len(history) < 30:
        for batch in cache.loader("train", batch_size=32, draws=2):
            with torch.no_grad():
                live_batch = replace(batch, logits=teacher(batch.views))
            losses = [criterion(student(batch.images), b) for b in (batch, live_batch)]
            optimizer.zero_grad()
            losses[live].backward()
            optimizer.step()
            history.append((float(losses[live].detach()), float(losses[not live].detach())))
    return history[:30]


@pytest.mark.parametrize(("codec", "tolerance"), [("float32", 1e-6), ("float16", 1e-3)])
def test_thirty_steps_from_the_cache_equal_thirty_steps_with_the_live_teacher(
    table: Path, stages: Stages, codec: str, tolerance: float
) -> None:
    folder = make_cache(stages, table, codec)
    cache = softcache.Cache(folder, data=f"arrays:{table / 'table.npz'}")
    teacher = load_teacher(table / "teacher")
    cached, live = (train_by_hand(cache, teacher, live=live) for live in (False, True))
    worst = max(abs(a - b) / b for (a, _), (b, _) in zip(cached, live, strict=True))
    print(f"{codec}: largest relative difference of 30 losses {worst:.1e}")
    assert worst <= tolerance
