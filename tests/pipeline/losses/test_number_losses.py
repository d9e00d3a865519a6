"""Losses on numbers: equal to their formulas in float64, with unknown numbers, mixtures of two rows, and one row."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from softcache import losses
from softcache.base.errors import UsageError
from softcache.pipeline.batch import Batch, LossContext, ModelOutputs
from softcache.pipeline.losses import LOSSES, Loss, parse_losses, resolve_ramps
from tests.helpers.tensors import draw_normal, make_batch

Floats = NDArray[np.float64]
B, D = 7, 3
STD = torch.tensor([0.5, 1e6, 3.0], dtype=torch.float64)


def make_numbers(rows: int = B, unknown: str = "some", mixed: bool = False) -> tuple[torch.Tensor, Batch]:
    """Return a student's numbers and a batch, in the units of STD; unknown: "none", "some" or "all" hard numbers."""
    outputs, targets, of_teacher, partner = (draw_normal(rows, D, seed=seed) * STD for seed in range(4))
    if unknown == "some":
        targets[0, 1] = targets[rows // 2, 0] = float("nan")
        targets[-1] = float("nan")
    elif unknown == "all":
        targets[:] = float("nan")
    batch = make_batch(rows, of_teacher, targets)
    if mixed:
        partner[rows // 3, 2] = float("nan")
        batch = replace(batch, partner=partner, share=torch.linspace(0, 1, rows, dtype=torch.float64))
    return outputs, batch


def compute(loss: Loss, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    student = ModelOutputs(outputs)
    part = loss.build_part(student, batch, LossContext(mean=torch.zeros(D), std=STD))
    return resolve_ramps(loss, 0, 1)(student, batch, part)


def mix(batch: Batch) -> Floats:
    """Return the hard numbers, mixed by their shares; NaN where one of both is unknown."""
    if batch.partner is None or batch.share is None:
        return np.asarray(batch.labels.numpy())
    share = batch.share.numpy()[:, None]
    return np.asarray(share * batch.labels.numpy() + (1 - share) * batch.partner.numpy())


def mse_by_hand(z: Floats, y: Floats, t: Floats) -> float:
    return float(np.nan_to_num(np.nanmean(((z - y) / STD.numpy()) ** 2)))


def huber_by_hand(z: Floats, y: Floats, t: Floats, delta: float = 1.0) -> float:
    d = np.abs((z - y) / STD.numpy())
    return float(np.nan_to_num(np.nanmean(np.where(d <= delta, d**2 / 2, delta * (d - delta / 2)) + 0 * d)))


def kd_mse_by_hand(z: Floats, y: Floats, t: Floats) -> float:
    return float((((z - t) / STD.numpy()) ** 2).mean())


def bounded_by_hand(z: Floats, y: Floats, t: Floats, margin: float = 0.0) -> float:
    terms = []
    for row in range(len(y)):
        known = ~np.isnan(y[row])
        if known.any():
            e_s, e_t = (np.mean(((x[row] - y[row]) / STD.numpy())[known] ** 2) for x in (z, t))
            terms.append(e_s if e_s + margin > e_t else 0.0)
    return float(np.mean(terms)) if terms else 0.0


FORMULAS: dict[str, Callable[..., float]] = {
    "mse": mse_by_hand,
    "huber": huber_by_hand,
    "huber:delta=0.3": lambda *x: huber_by_hand(*x, delta=0.3),
    "huber:delta=4": lambda *x: huber_by_hand(*x, delta=4),
    "kd_mse": kd_mse_by_hand,
    "bounded": bounded_by_hand,
    "bounded:margin=8": lambda *x: bounded_by_hand(*x, margin=8),
}


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
@pytest.mark.parametrize("unknown", ["none", "some", "all"])
@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("spec", FORMULAS)
def test_a_loss_is_its_formula(spec: str, rows: int, unknown: str, mixed: bool) -> None:
    (loss,) = parse_losses([spec])
    outputs, batch = make_numbers(rows, unknown, mixed)
    assert batch.logits is not None
    expected = FORMULAS[spec](outputs.numpy(), mix(batch), batch.logits.numpy())
    result = compute(loss, outputs, batch)
    assert result.shape == ()
    assert float(result) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
@pytest.mark.parametrize("unknown", ["some", "all"])
@pytest.mark.parametrize("spec", FORMULAS)
def test_the_gradient_is_that_of_the_formula(spec: str, unknown: str, mixed: bool) -> None:
    (loss,) = parse_losses([spec])
    outputs, batch = make_numbers(B, unknown, mixed)

    def function(standardized: torch.Tensor) -> torch.Tensor:
        return compute(loss, standardized * STD, batch)

    assert torch.autograd.gradcheck(function, [(outputs / STD).requires_grad_()], eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("spec", FORMULAS)
def test_without_a_known_number_hard_losses_are_0_and_so_is_their_gradient(spec: str) -> None:
    outputs, batch = make_numbers(unknown="all")
    outputs.requires_grad_()
    result = compute(parse_losses([spec])[0], outputs, batch)
    result.backward()  # type: ignore[no-untyped-call]
    assert outputs.grad is not None
    assert bool(result == 0) == bool((outputs.grad == 0).all()) == (spec != "kd_mse")


def test_a_student_that_is_better_than_its_teacher_by_the_margin_has_no_bounded_loss() -> None:
    _, batch = make_numbers(unknown="none")
    assert batch.logits is not None
    near = batch.labels + 0.1 * STD
    far = replace(batch, logits=batch.labels + 2 * STD)
    assert float(compute(losses.Bounded(), near, far)) == 0
    assert float(compute(losses.Bounded(margin=3.98), near, far)) == 0
    assert float(compute(losses.Bounded(margin=4.0), near, far)) == pytest.approx(0.01)


def test_outputs_of_different_units_count_alike() -> None:
    _, batch = make_numbers(unknown="none")
    for name in ("mse", "huber", "kd_mse"):
        losses_of_columns = []
        for column in range(D):
            baseline = batch.labels if name != "kd_mse" else batch.logits
            assert baseline is not None
            moved = baseline.clone()
            moved[:, column] += 5 * STD[column]
            losses_of_columns.append(float(compute(LOSSES[name], moved, batch)))
        assert losses_of_columns == pytest.approx([losses_of_columns[0]] * D, rel=1e-9)


WRONG: list[tuple[Any, str]] = [
    ("huber:delta=0", "delta=0 is below 0.001"),
    ("huber:delta=-1", "delta=-1 is below 0.001"),
    ("huber:delta=inf", "delta"),
    ("bounded:margin=-1", "margin=-1 is below 0"),
    ("bounded:margin=x", "margin=x"),
    ("bounded:delta=1", "delta"),
]


@pytest.mark.parametrize(("spec", "words"), WRONG)
def test_a_parameter_out_of_range_is_refused(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_losses([spec])
