"""The records of metrics.jsonl: gradient norms of terms, which change nothing in the training, and learning rates."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from softcache.stages.training import loop as training
from softcache.stages.training.step import ActiveTraining
from tests.helpers.commands import Stages

COMMON = ("--epochs", 2, "--batch-size", 60, "--learning-rate", 0.05)
KD = ("--loss", "kd:temperature=4,weight=0.9", "--loss", "hard:weight=0.1")
HINT = ("--loss", "hint:teacher=flatten,student=hidden1,weight=0.1")
OWN_ARCHS = """
from torch import nn
from torch.utils.checkpoint import checkpoint
def dropping(*, classes, channels, size):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 24), nn.Dropout(0.3), nn.Linear(24, classes))
def frozen(*, classes, channels, size):
    net = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 12), nn.ReLU(), nn.Linear(12, classes))
    net[1].requires_grad_(False)
    return net
class Checkpointed(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=True) if x.requires_grad else layer(x)
        return x
def checkpointed(*, classes, channels, size):
    i = channels * size * size
    return Checkpointed(nn.Flatten(), nn.Linear(i, 12), nn.ReLU(), nn.Linear(12, classes))
"""


@pytest.fixture
def own_archs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owned.py").write_text(OWN_ARCHS)
    monkeypatch.syspath_prepend(str(tmp_path))


def lines_of(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


class Before:
    """The batch, weights and loss parts before each measured step of a student, in float64."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.steps: list[tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor], float]] = []
        step = training.train_step

        def noting(active: ActiveTraining, batch: Any, measure_gradients: bool) -> torch.Tensor:
            if measure_gradients:
                parts = {name: p for part in active.state.parts.values() for name, p in part.named_parameters()}
                rate = active.state.learning_rate
                network = dict(active.run.model.network.named_parameters())
                self.steps.append((batch, self._doubled(network), self._doubled(parts), rate))
            return step(active, batch, measure_gradients)

        patch.setattr(training, "train_step", noting)

    @staticmethod
    def _doubled(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: w.detach().double().requires_grad_() for name, w in weights.items()}


def norm(term: torch.Tensor, weights: list[torch.Tensor]) -> float:
    found = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
    return sum(float((g**2).sum()) for g in found if g is not None) ** 0.5


def test_the_gradient_norm_of_each_term_agrees_with_float64(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the last step of each epoch, over all trained weights including the hint's regressor, before clipping."""
    before = Before(monkeypatch)
    stages(
        "student",
        *COMMON,
        "--cache",
        tiny / "cache",
        "--arch",
        "mlp:16",
        *KD,
        *HINT,
        "--clip-norm",
        0.01,
        "--out",
        "r",
    )
    lines = lines_of("r")
    input_spec = json.loads(Path("r/result.json").read_text())["student"]["preparation"]
    mean, std = (torch.tensor(input_spec[name], dtype=torch.float64).view(1, -1, 1, 1) for name in ("mean", "std"))
    assert len(before.steps) == len(lines) == 2
    for line, (batch, network, own, rate) in zip(lines, before.steps, strict=True):
        first, last = ([network[f"{name}.{kind}"] for kind in ("weight", "bias")] for name in ("hidden1", "linear"))
        x = ((batch.views.double() / 255 - mean) / std).flatten(1)
        hidden = F.linear(x, *first)
        logits = F.linear(hidden.relu(), *last)
        log_student, teacher = (logits / 4).log_softmax(1), (batch.logits.double() / 4).softmax(1)
        regressed = F.linear(hidden, *own.values())
        terms = {
            "kd": 0.9 * 16 * F.kl_div(log_student, teacher, reduction="batchmean"),
            "hard": 0.1 * F.cross_entropy(logits, batch.labels),
            "hint": 0.1 * F.mse_loss(regressed, batch.features["flatten"].double()),
        }
        weights = [*network.values(), *own.values()]
        for name, term in terms.items():
            assert line[f"gradient_{name}"] == pytest.approx(norm(term, weights), rel=1e-4), name
        assert line["learning_rate"] == rate
        assert all(line[f"gradient_{name}"] > 0.011 for name in terms)  # and what is clipped would be less


@pytest.mark.parametrize(
    "options",
    [
        ("--arch", "mlp:16", *KD, *HINT, "--baseline"),
        ("--arch", "owned:dropping", *KD),
        ("--arch", "cnn", *KD, "--loss", "crd:teacher=flatten,student=flatten,negatives=50", "--clip-norm", 1),
        ("--arch", "cnn", "--loss", "ctkd", "--loss", "hard", "--optimizer", "adamw", "--ema", 0.9),
        ("--arch", "resnet8", *KD, "--loss", "similarity:teacher=pool1,student=layer1", "--precision", "bfloat16"),
        ("--arch", "mlp:16", "--seed", 0, "--seed", 1, "--losses", "kd hard:weight=0.1", "--vectorize"),
    ],
)
def test_measuring_gradient_norms_changes_no_bit_of_a_weight(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, own_archs: None, options: tuple[Any, ...]
) -> None:
    import softcache.stages.training.vectorized as stacked

    command = ("student", *COMMON, "--cache", tiny / "cache", *options)
    stages(*command, "--out", "measured")
    for module, name in ((training, "train_step"), (stacked, "_step")):
        step = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, step=step: step(*given[:-1]))
    stages(*command, "--out", "plain")
    weights = sorted(path.relative_to("plain") for path in Path("plain").rglob("*.pt"))
    assert weights
    for path in weights:
        assert Path("measured", path).read_bytes() == Path("plain", path).read_bytes(), path


def test_a_single_term_needs_no_additional_pass(tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("a second pass"))
    taken, step = [], training.train_step

    def noting(active: ActiveTraining, *rest: Any) -> torch.Tensor:
        terms = step(active, *rest)
        gradients = [w.grad.double() for w in active.state.weights if w.grad is not None]
        taken.append(sum(float((g**2).sum()) for g in gradients) ** 0.5)
        return terms

    monkeypatch.setattr(training, "train_step", noting)
    stages("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:16", "--loss", "kd", "--out", "r")
    assert [line["gradient_kd"] for line in lines_of("r")] == pytest.approx([taken[4], taken[9]], rel=1e-5)


def test_a_term_without_trained_weights_has_a_zero_gradient_norm(tiny: Path, stages: Stages, own_archs: None) -> None:
    more = ("--loss", "kd", "--loss", "similarity:teacher=flatten,student=1,weight=1e-6")
    stages("student", *COMMON, "--cache", tiny / "cache", "--arch", "owned:frozen", *more, "--out", "r")
    assert [line["gradient_similarity"] for line in lines_of("r")] == [0, 0]
    assert all(line["gradient_kd"] > 0 for line in lines_of("r"))


def test_a_network_that_refuses_the_pass_of_a_term_is_trained_without_norms(
    tiny: Path, stages: Stages, own_archs: None
) -> None:
    """PyTorch's reentrant checkpoints refuse it."""
    command = ("student", *COMMON, "--cache", tiny / "cache", "--arch", "owned:checkpointed")
    stages(*command, *KD, "--out", "r")
    assert [line["epoch"] for line in lines_of("r")] == [1, 2]
    assert not [name for line in lines_of("r") for name in line if name.startswith("gradient")]
    stages(*command, "--loss", "kd", "--out", "one")
    assert all(line["gradient_kd"] > 0 for line in lines_of("one"))


def test_a_term_with_weight_0_has_a_zero_gradient_norm(tiny: Path, stages: Stages) -> None:
    more = ("--loss", "kd", "--loss", "hard:weight=1->0")
    stages("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:16", *more, "--out", "r")
    first, last = lines_of("r")
    assert first["gradient_hard"] > 0
    assert last["gradient_hard"] == last["loss_hard"] == 0


def test_the_learning_rate_of_an_epoch_is_that_of_its_last_step(tiny: Path, stages: Stages) -> None:
    more = ("--cache", tiny / "cache", "--arch", "mlp:8", "--loss", "kd", "--epochs", 4, "--warmup", 0)
    for schedule in ("constant", "step"):
        stages("student", *COMMON, *more, "--schedule", schedule, "--milestones", "0.4", "--out", schedule)
    assert [line["learning_rate"] for line in lines_of("constant")] == [0.05] * 4
    assert [line["learning_rate"] for line in lines_of("step")] == pytest.approx([0.05, 0.005, 0.005, 0.005])
