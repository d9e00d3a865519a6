"""Losses of a user's own: any callable (outputs, batch) -> scalar is a term of a DistillationLoss."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.batch import Batch, LossContext, ModelOutputs
from softcache.pipeline.losses import Custom
from softcache.pipeline.losses.base import Ramp
from softcache.pipeline.losses.distillation_loss import DistillationLoss
from softcache.pipeline.losses.kd import KD
from tests.helpers.tensors import make_batch


def make_example() -> tuple[ModelOutputs, Batch]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 5, generator=generator) for _ in range(2))
    return ModelOutputs(student.requires_grad_()), make_batch(6, logits=3 * teacher, labels=torch.arange(6) % 5)


def own_kd(outputs: ModelOutputs, batch: Batch) -> torch.Tensor:
    assert batch.logits is not None
    log_p, log_q = (F.log_softmax(z / 4.0, 1) for z in (outputs.logits, batch.logits))
    return 16 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


class Regressor(nn.Module):
    """A loss with trained weights, whose shape is that of the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.LazyLinear(5)

    def forward(self, outputs: ModelOutputs, batch: Batch) -> torch.Tensor:
        return F.mse_loss(self.map(outputs.logits), batch.logits)


# Numbers


def test_a_function_is_the_built_in_loss_of_the_same_formula() -> None:
    outputs, batch = make_example()
    assert batch.logits is not None
    criterion = DistillationLoss([Custom(own_kd, weight=0.7)])
    loss = criterion(outputs, batch)
    (gradient,) = torch.autograd.grad(loss, outputs.logits)
    z, t = outputs.logits.detach().double(), batch.logits.double()
    p, q = (torch.softmax(x / 4, 1) for x in (t, z))
    expected = 0.7 * 16 * float((p * (p / q).log()).sum(1).mean())
    assert math.isclose(float(loss.detach()), expected, rel_tol=1e-6)
    assert torch.allclose(gradient.double(), 0.7 * 4 * (q - p) / len(z), atol=1e-6)
    assert torch.allclose(loss, DistillationLoss([KD(temperature=4.0, weight=0.7)])(outputs, batch), rtol=1e-6)


def test_a_weight_may_be_a_ramp() -> None:
    outputs, batch = make_example()
    criterion = DistillationLoss([Custom(own_kd, weight=Ramp(1.0, 0.0)), Custom(own_kd, weight=2.0)])
    assert criterion.names == ["own_kd-0", "own_kd-1"]
    criterion.set_progress(1, 5)
    once, twice = (float(term.detach()) for term in criterion.weighted_terms(outputs, batch))
    assert criterion.weights == [0.75, 2.0]
    assert math.isclose(once / twice, 0.375, rel_tol=1e-6)


def test_each_of_several_teachers_is_passed_to_it_and_missing_rows_use_labels() -> None:
    outputs, batch = make_example()
    assert batch.logits is not None
    several = replace(batch, logits=torch.stack([batch.logits, -batch.logits], 1))
    mean = DistillationLoss([Custom(own_kd)], "per_teacher")(outputs, several)
    each = [own_kd(outputs, replace(batch, logits=z)) for z in (batch.logits, -batch.logits)]
    assert torch.allclose(mean, sum(each) / 2)
    missing = replace(batch, logits=batch.logits.index_fill(0, torch.tensor([1]), torch.nan))
    assert DistillationLoss([Custom(own_kd)], missing_to_labels=True)(outputs, missing).isfinite()


def test_a_module_is_trained_itself_with_the_shapes_of_the_batch() -> None:
    outputs, batch = make_example()
    module = Regressor()
    criterion = DistillationLoss([Custom(module)])
    assert list(criterion.parameters()) == []
    criterion.build_parts(outputs, batch, LossContext())
    assert criterion.parts["Regressor"] is module
    assert module.map.weight.shape == (5, 5)
    criterion(outputs, batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in criterion.parameters())


def test_a_module_without_parameters_is_no_part() -> None:
    class Plain(nn.Module):
        def forward(self, outputs: ModelOutputs, batch: Batch) -> torch.Tensor:
            return own_kd(outputs, batch)

    outputs, batch = make_example()
    criterion = DistillationLoss([Custom(Plain())])
    criterion.build_parts(outputs, batch, LossContext())
    assert len(criterion.parts) == 0
    assert float(criterion(outputs, batch).detach()) == float(own_kd(outputs, batch).detach())


# What it is


def test_attributes_say_what_it_reads() -> None:
    class Reads:
        teacher_taps: ClassVar[list[str]] = ["layer3:pool", "layer2"]
        student_taps = "layer1"
        needs_labels = needs_single_label = True
        needs_logits = False

        def __call__(self, outputs: ModelOutputs, batch: Batch) -> torch.Tensor:
            return outputs.features["layer1"].mean()

    loss, plain = Custom(Reads()), Custom(own_kd)
    assert (loss.teacher_taps(), loss.student_taps()) == (("layer3:pool", "layer2"), ("layer1",))
    assert (loss.needs_labels, loss.needs_single_label, loss.needs_logits) == (True, True, False)
    assert (plain.teacher_taps(), plain.student_taps()) == ((), ())
    assert (plain.needs_labels, plain.needs_single_label, plain.needs_logits, plain.repeatable) == (
        False,
        False,
        True,
        True,
    )


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (own_kd, "own_kd"),
        (lambda outputs, batch: outputs.logits.mean(), "lambda"),
        (partial(own_kd), "partial"),
        (Regressor(), "Regressor"),
        (type("keys", (Regressor,), {})(), "keys_loss"),  # a ModuleDict has a method of this name
    ],
)
def test_it_has_the_name_of_its_function_or_class(function: Callable[..., Any], name: str) -> None:
    assert Custom(function).name == name
    assert Custom(function, name="a.b").name == "a_b"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (3, "not a int"),
        (Regressor, r"give an object, Regressor\(\)"),
        (type("X", (), {"teacher_taps": 3, "__call__": own_kd})(), "its teacher_taps is 3"),
        (type("X", (), {"student_taps": [""], "__call__": own_kd})(), "its student_taps"),
        (type("X", (), {"student_taps": ["a:pol"], "__call__": own_kd})(), "Did you mean 'pool'"),
    ],
)
def test_what_is_no_loss_is_refused(function: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Custom(function)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda o, b: o.logits, r"loss 'lambda' returned a tensor float32 \[6, 5\].*return a scalar, such as .mean"),
        (lambda o, b: 3.0, "returned a float, not a tensor"),
        (lambda o, b: None, "returned None, not a tensor"),
        (lambda o, b: b.labels.sum(), r"int64 \[\], not one floating-point number"),
        (lambda o, b: o.logits.mean().to("meta"), "on meta, and the student is on cpu"),
    ],
)
def test_what_is_no_scalar_is_refused(function: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DistillationLoss([Custom(function)])(*make_example())


def test_one_element_is_a_scalar() -> None:
    assert DistillationLoss([Custom(lambda o, b: o.logits.mean().view(1, 1))])(*make_example()).shape == ()


def test_an_error_inside_it_keeps_its_traceback_and_names_its_line() -> None:
    def crashes(outputs: ModelOutputs, batch: Batch) -> torch.Tensor:
        return outputs.features["layer9"]

    with pytest.raises(UsageError, match=r"loss 'crashes' failed: KeyError: 'layer9' \(.*\.py:\d+, in crashes\)") as e:
        DistillationLoss([Custom(crashes)])(*make_example())
    assert isinstance(e.value.__cause__, KeyError)
    assert e.value.__cause__.__traceback__ is not None
