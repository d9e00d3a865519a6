"""Losses on several labels an image: float64 formulas written as loops, gradients, unknown labels, mixup views."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from softcache.base.errors import UsageError
from softcache.data.tasks import LABELS
from softcache.pipeline.batch import Batch, LossContext, ModelOutputs
from softcache.pipeline.losses import LOSSES, check_task, parse_losses
from softcache.pipeline.losses.distillation_loss import DistillationLoss
from softcache.pipeline.losses.feature_base import FeatureLoss
from tests.helpers.tensors import draw_normal, make_batch

B, K = 6, 4
SPECS = (
    "bce",
    "kd_sigmoid",
    "kd_sigmoid:temperature=3",
    "mlkd",
    "asymmetric",
    "asymmetric:gamma_neg=2,gamma_pos=0.5,clip=0",
    "asymmetric:gamma_neg=0.5,gamma_pos=0,clip=0.2",
    "soft_f1",
    "soft_f1:average=weighted",
    "soft_f1:average=micro",
    "logit_mse",
)
HARD = [spec for spec in SPECS if LOSSES[spec.partition(":")[0]].needs_labels]
SOFT = [spec for spec in SPECS if spec not in HARD]
Parameters = dict[str, Any]


def draw_several(rows: int = B, classes: int = K, seed: int = 3, unknown: float = 0.3) -> torch.Tensor:
    """Draw labels int8 [rows, classes] of 0, 1 and -1."""
    random = np.random.default_rng(seed)
    labels = (random.random((rows, classes)) < 0.4).astype(np.int8)
    labels[random.random((rows, classes)) < unknown] = -1
    return torch.from_numpy(labels)


def make(labels: torch.Tensor | None = None, seed: int = 0, mixed: bool = False) -> tuple[torch.Tensor, Batch]:
    """Make logits of a student float64 [B, K], and a batch with labels and a teacher's logits."""
    labels = draw_several() if labels is None else labels
    rows, classes = labels.shape
    partner, share = None, None
    if mixed:
        partner = draw_several(rows, classes, seed=17, unknown=0.1)
        share = torch.linspace(0, 1, rows, dtype=torch.float64)
    logits = draw_normal(rows, classes, seed=seed + 1)
    return draw_normal(rows, classes, seed=seed), make_batch(rows, logits, labels, partner=partner, share=share)


def compute(spec: str, logits: torch.Tensor, batch: Batch, context: LossContext | None = None) -> torch.Tensor:
    (loss,) = parse_losses((spec,))
    outputs = ModelOutputs(logits)
    part = loss.build_part(outputs, batch, context or LossContext())
    return loss(outputs, batch, part)


# Independent formulas, one number at a time


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def binary_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def list_known(batch: Batch) -> list[tuple[int, int, float]]:
    """List (row, label, share of the label) of those that are known in both images of a view."""
    listed = []
    for i, k in np.ndindex(*batch.labels.shape):
        y, share = int(batch.labels[i, k]), 1.0
        other = y
        if batch.partner is not None and batch.share is not None:
            other, share = int(batch.partner[i, k]), float(batch.share[i])
        if y >= 0 and other >= 0:
            listed.append((i, k, share * y + (1 - share) * other))
    return listed


def formula_of_asymmetric(p: float, y: float, gamma_neg: float, gamma_pos: float, clip: float) -> float:
    m = max(p - clip, 0.0)
    of_negative = -(m**gamma_neg) * math.log(1 - m) if m else 0.0
    return -y * (1 - p) ** gamma_pos * math.log(p) + (1 - y) * of_negative


def formula(spec: str, logits: torch.Tensor, batch: Batch) -> float:
    name, _, text = spec.partition(":")
    parameters: Parameters = dict(pair.split("=") for pair in text.split(",") if pair)
    z, known = logits.tolist(), list_known(batch)
    teacher = batch.logits.tolist() if batch.logits is not None else []
    cells = list(np.ndindex(*logits.shape))
    if name in ("kd_sigmoid", "mlkd"):
        T = float(parameters.get("temperature", 1))
        total = sum(binary_kl(sigmoid(teacher[i][k] / T), sigmoid(z[i][k] / T)) for i, k in cells)
        return total * T**2 / len(z) / (1 if name == "mlkd" else len(z[0]))
    if name == "logit_mse":
        return sum((z[i][k] - teacher[i][k]) ** 2 for i, k in cells) / len(cells)
    if name == "soft_f1":
        return formula_of_soft_f1(parameters.get("average", "macro"), z, known)
    if name == "bce":
        options = (0.0, 0.0, 0.0)
    else:
        options = tuple(float(parameters.get(key, value)) for key, value in DEFAULTS.items())
    return sum(formula_of_asymmetric(sigmoid(z[i][k]), y, *options) for i, k, y in known) / max(len(known), 1)


DEFAULTS = {"gamma_neg": 4, "gamma_pos": 1, "clip": 0.05}


def formula_of_soft_f1(average: str, z: list[list[float]], known: list[tuple[int, int, float]]) -> float:
    labels = range(len(z[0]))
    hits = [sum(sigmoid(z[i][k]) * y for i, k, y in known if k == label) for label in labels]
    claims = [sum(sigmoid(z[i][k]) for i, k, _ in known if k == label) for label in labels]
    n = [sum(y for _, k, y in known if k == label) for label in labels]
    if not sum(n):
        return 0.0
    if average == "micro":
        return 1 - 2 * sum(hits) / (sum(claims) + sum(n) + 1e-8)
    weights = [n[k] if average == "weighted" else float(n[k] > 0) for k in labels]
    f1 = [2 * hits[k] / (claims[k] + n[k] + 1e-8) for k in labels]
    return sum(weights[k] * (1 - f1[k]) for k in labels) / max(sum(weights), 1)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_a_loss_equals_its_formula(spec: str, mixed: bool) -> None:
    for seed in range(3):
        logits, batch = make(seed=10 * seed, mixed=mixed)
        assert float(compute(spec, logits, batch)) == pytest.approx(formula(spec, logits, batch), rel=1e-9)
    logits, batch = make(draw_several(1, unknown=0.2), mixed=mixed)
    assert float(compute(spec, logits, batch)) == pytest.approx(formula(spec, logits, batch), rel=1e-9), "one row"


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_the_gradient_of_a_loss_passes_gradcheck(spec: str, mixed: bool) -> None:
    logits, batch = make(mixed=mixed)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: compute(spec, z, batch), logits)
    (gradient,) = torch.autograd.grad(compute(spec, logits, batch), logits)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("spec", HARD)
def test_an_unknown_label_changes_neither_value_nor_gradient(spec: str) -> None:
    logits, batch = make()
    unknown = batch.labels < 0
    assert 0 < unknown.sum() < unknown.numel()
    other = torch.where(unknown, logits + 5, logits)
    leaves = [logits.requires_grad_(), other.requires_grad_()]
    values = [compute(spec, leaf, batch) for leaf in leaves]
    assert values[0].item() == values[1].item()
    for value, leaf in zip(values, leaves, strict=True):
        (gradient,) = torch.autograd.grad(value, leaf)
        assert (gradient[unknown] == 0).all()


@pytest.mark.parametrize("spec", HARD)
def test_a_batch_in_which_nothing_is_known_gives_zero(spec: str) -> None:
    logits, batch = make(torch.full((B, K), -1, dtype=torch.int8))
    logits.requires_grad_()
    value = compute(spec, logits, batch)
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("spec", ["soft_f1", "soft_f1:average=weighted", "soft_f1:average=micro"])
def test_soft_f1_without_a_positive_label_is_zero(spec: str) -> None:
    logits, batch = make(torch.zeros(B, K, dtype=torch.int8))
    assert float(compute(spec, logits, batch)) == 0


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", [30.0, 200.0, 3e4])
def test_large_logits_in_float32_give_finite_values_and_gradients(spec: str, size: float) -> None:
    logits, batch = make(seed=4)
    leaf = (logits.sign() * size).float().requires_grad_()
    value = compute(spec, leaf, replace(batch, logits=(-logits.sign() * size).float()))
    (gradient,) = torch.autograd.grad(value, leaf)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("spec", SPECS)
def test_a_student_in_half_precision_has_its_loss_computed_in_float32(spec: str) -> None:
    logits, batch = make()
    half = logits.to(torch.bfloat16)
    loss = DistillationLoss(spec)(half, replace(batch, logits=batch.logits.float()))  # type: ignore[union-attr]
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(formula(spec, half.double(), batch), rel=1e-5)


# Relations between losses


def test_mlkd_is_kd_sigmoid_summed_over_the_labels() -> None:
    logits, batch = make()
    assert float(compute("mlkd", logits, batch)) == pytest.approx(K * float(compute("kd_sigmoid", logits, batch)))


def test_asymmetric_without_focus_and_margin_is_bce() -> None:
    logits, batch = make(mixed=True)
    plain = compute("asymmetric:gamma_neg=0,gamma_pos=0,clip=0", logits, batch)
    assert float(plain) == pytest.approx(float(compute("bce", logits, batch)), rel=1e-12)


def test_asymmetric_ignores_negative_labels_within_the_margin() -> None:
    logits = torch.logit(torch.tensor([[0.04, 0.06, 0.5]], dtype=torch.float64)).requires_grad_()
    _, batch = make(torch.zeros(1, 3, dtype=torch.int8))
    (gradient,) = torch.autograd.grad(compute("asymmetric", logits, batch), logits)
    assert gradient[0, 0] == 0
    assert 0 < gradient[0, 1] < gradient[0, 2]


@pytest.mark.parametrize("spec", ["kd_sigmoid", "kd_sigmoid:temperature=3", "mlkd", "logit_mse"])
def test_equal_logits_give_a_zero_loss_and_gradient(spec: str) -> None:
    logits, batch = make()
    leaf = logits.requires_grad_()
    value = compute(spec, leaf, replace(batch, logits=logits.detach().clone()))
    (gradient,) = torch.autograd.grad(value, leaf)
    assert abs(value.item()) < 1e-12
    assert float(gradient.abs().max()) < 1e-12


@pytest.mark.parametrize("spec", SOFT)
def test_a_loss_of_soft_targets_reads_no_label_and_weights_rows(spec: str) -> None:
    logits, batch = make()
    hidden = replace(batch, labels=torch.full((B, K), -1, dtype=torch.int8))
    assert float(compute(spec, logits, batch)) == float(compute(spec, logits, hidden))
    weights = torch.tensor([2.0, 0, 0, 0, 0, 0])
    of_first = compute(spec, logits[:1], batch.slice(0, 1))
    assert float(compute(spec, logits, replace(batch, row_weights=weights))) == pytest.approx(2 * float(of_first) / B)


# The weight of positive labels


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_balance_weights_positive_labels_by_the_counts_of_the_training_rows(balance: float) -> None:
    logits, batch = make()
    counts, known = torch.tensor([3, 0, 40, 50]), torch.tensor([10, 20, 60, 50])
    weights = [(max(n - c, 1) / max(c, 1)) ** balance for c, n in zip([3, 1, 40, 50], known.tolist(), strict=True)]
    total = 0.0
    for i, k, y in list_known(batch):
        p = sigmoid(float(logits[i, k]))
        total -= weights[k] * y * math.log(p) + (1 - y) * math.log(1 - p)
    network = nn.Flatten()
    criterion = DistillationLoss(f"bce:balance={balance}")
    views = logits[:, None, None, :].float()
    example = replace(batch, views=views, logits=None, source=_Source())  # type: ignore[arg-type]
    criterion.attach(network, example, LossContext(counts=counts, known=known))
    loss = criterion(logits, batch)
    assert float(loss) == pytest.approx(total / len(list_known(batch)), rel=1e-6 if balance else 1e-9)


class _Source:
    """Views that are a student's input as they are."""

    fingerprint = ""
    codec = ("float16", "dense")
    task = LABELS

    def prepare_input(self, views: torch.Tensor) -> torch.Tensor:
        return views


# Which losses there are


def test_the_losses_of_several_labels_are_these_and_those_between_layers() -> None:
    own = {name for name, loss in LOSSES.items() if LABELS in loss.tasks and not isinstance(loss, FeatureLoss)}
    assert own == {spec.partition(":")[0] for spec in SPECS}


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if LABELS not in loss.tasks])
def test_any_other_loss_is_refused_in_one_line_with_the_names_of_those_that_there_are(name: str) -> None:
    with pytest.raises(UsageError, match=f"loss '{name}' is for .*, and the task here is labels: ") as error:
        check_task([LOSSES[name]], LABELS)
    assert "\n" not in str(error.value)
    assert all(spec.partition(":")[0] in str(error.value) for spec in SPECS)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("asymmetric:clip=1", "clip=1 is not below 1"),
        ("asymmetric:gamma_neg=-1", "gamma_neg=-1 is below 0"),
        ("soft_f1:average=samples", "average=samples is none of macro, weighted, micro"),
        ("mlkd:temperature=2", "temperature"),
    ],
)
def test_wrong_parameters_are_refused(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_losses((spec,))
