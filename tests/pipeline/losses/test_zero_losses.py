"""A loss from which nothing is learned is refused before a training; so are parameters that do not fit the classes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from softcache.base.errors import UsageError
from softcache.pipeline.batch import LossContext, ModelOutputs
from softcache.pipeline.losses import LOSSES, ZeroLossError, check_loss_trains, parse_losses
from softcache.pipeline.losses.distillation_loss import DistillationLoss
from tests.helpers.commands import Stages
from tests.helpers.tensors import draw_normal, make_batch, make_case


@pytest.mark.parametrize(
    ("specs", "classes", "epochs"),
    [
        (("kd:weight=0",), 10, 5),
        (("kd:weight=0", "hard:weight=0.0"), 10, 5),
        (("kd:weight=0->0", "hard:weight=0->0@3"), 10, 5),
        (("kd:weight=0->1",), 10, 1),
        (("dkd:target=0,nontarget=0",), 10, 5),
        (("dkd:target=0",), 2, 5),
        (("nkd:target=0,nontarget=0->0",), 10, 5),
        (("nkd:target=0",), 2, 5),
        (("dist:between=0,within=0", "hard:weight=0"), 10, 5),
        (("rkd:distance=0,angle=0,teacher=a,student=a",), 10, 5),
        (("srrl:features=0,outputs=0,teacher=a,student=a",), 10, 5),
        (("cc:gamma=0,teacher=a,student=a",), 10, 5),
        (("simkd:weight=0,teacher=a,student=a",), 10, 5),
    ],
)
def test_a_loss_that_is_always_0_is_refused(specs: tuple[str, ...], classes: int, epochs: int) -> None:
    with pytest.raises(ZeroLossError, match="the student would learn nothing: give one term") as error:
        check_loss_trains(parse_losses(specs), classes, epochs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("specs", "classes", "epochs"),
    [
        (("kd:weight=0", "hard"), 10, 5),
        (("kd:weight=0->1",), 10, 2),
        (("kd:weight=1->0",), 10, 1),
        (("kd:weight=0->1@20",), 10, 1),
        (("dkd:target=0",), 3, 5),
        (("dkd:nontarget=0",), 2, 5),
        (("dist:within=0",), 10, 5),
    ],
)
def test_a_loss_that_is_0_in_part_is_not(specs: tuple[str, ...], classes: int, epochs: int) -> None:
    check_loss_trains(parse_losses(specs), classes, epochs)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_by_default_and_not_with_a_weight_of_0(name: str) -> None:
    layers = ",teacher=a,student=a" if hasattr(LOSSES[name], "statistic") else ""
    check_loss_trains(parse_losses((f"{name}:weight=1{layers}",)), 10, 1)
    with pytest.raises(ZeroLossError):
        check_loss_trains(parse_losses((f"{name}:weight=0{layers}",)), 10, 1)


def test_a_criterion_of_zeros_is_refused_when_its_parts_are_built() -> None:
    outputs, batch = ModelOutputs(torch.randn(4, 5)), make_batch(4, torch.randn(4, 5))
    for specs in (("kd:weight=0",), ("kd:weight=0", "hard:weight=0->0")):
        with pytest.raises(ZeroLossError):
            DistillationLoss(*specs).build_parts(outputs, batch, LossContext())
    DistillationLoss("kd:weight=0->1").build_parts(outputs, batch, LossContext())


@pytest.mark.parametrize("spec", ["kd", "dkd", "multi_temperature"])
def test_two_standardised_classes_are_refused_with_the_reason(spec: str) -> None:
    (loss,) = parse_losses((f"{spec}:standardize=true",))
    with pytest.raises(UsageError, match=r"standardize=true needs three classes or more, not 2: .* no gradient"):
        check_loss_trains((loss,), 2, 5)
    outputs, batch = ModelOutputs(torch.randn(4, 2)), make_batch(4, torch.randn(4, 2))
    with pytest.raises(UsageError, match="three classes or more"):
        DistillationLoss(loss).build_parts(outputs, batch, LossContext())
    check_loss_trains((loss,), 3, 5)


def test_multi_temperature_standardises_the_divergence_alone() -> None:
    """Value and gradient: the KL divergence of z-scores, and the two Gram differences of the logits as they are."""
    example = make_case("multi_temperature:standardize=true", 7, 9)
    assert example.target.logits is not None
    z_s, z_t = example.logits.detach().clone().requires_grad_(), example.target.logits

    def z_score(z: torch.Tensor) -> torch.Tensor:
        deviation = ((z - z.mean(1, keepdim=True)) ** 2).sum(1, keepdim=True).div(8).sqrt()
        return (z - z.mean(1, keepdim=True)) / (deviation + 1e-7)

    expected = z_s.new_zeros(())
    for T in (2, 3, 4, 5, 6):
        q, p = F.softmax(z_score(z_s) / T, 1), F.softmax(z_score(z_t) / T, 1)
        expected = expected + T * T * (p * (p / q).log()).sum() / 7
        a, b = F.softmax(z_s / T, 1), F.softmax(z_t / T, 1)
        expected = expected + ((a @ a.T - b @ b.T) ** 2).sum() / 7 + ((a.T @ a - b.T @ b) ** 2).sum() / 9
    (gradient,) = torch.autograd.grad(expected, z_s)
    example.logits.requires_grad_()
    value = example.value()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(value, example.logits)[0], gradient, rtol=1e-9, atol=1e-12)
    scaled = make_case("multi_temperature:standardize=true", 7, 9)
    scaled.logits = scaled.logits * 2 + draw_normal(7, 1)
    assert float(scaled.value()) != pytest.approx(float(value.detach()), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--loss", "kd:weight=0"), "the loss is 0 in every batch of the 2 epochs"),
        (("--loss", "kd:weight=0", "--loss", "hard:weight=0"), "give one term (kd, hard) a weight above 0"),
        (("--loss", "dist:between=0,within=0"), "the loss is 0 in every batch"),
        (("--arch", "mlp:4", "--loss", "kd:weight=0"), "the loss is 0 in every batch"),
        (("--learning-rate", "nan"), "--learning-rate nan is not a finite number"),
        (("--learning-rate", "inf"), "--learning-rate inf is not a finite number"),
        (("--learning-rate", "-inf"), "--learning-rate -inf is not a finite number"),
        (("--weight-decay", "nan"), "--weight-decay nan is not a finite number"),
        (("--clip-norm", "inf"), "--clip-norm inf is not a finite number"),
        (("--loss", "kd:weight=nan"), "weight=nan is not finite"),
        (("--loss", "kd:weight=inf"), "weight=inf is not finite"),
        (("--loss", "kd:temperature=nan"), "temperature=nan is not finite"),
        (("--loss", "kd:temperature=8->nan"), "temperature=nan is not finite"),
        (("--loss", "multi_temperature:temperatures=2+nan"), "is no list of numbers"),
        (("--loss", "multi_temperature:temperatures=2+inf"), "is no list of numbers"),
    ],
)
def test_a_student_is_refused_before_its_folder_is_made(
    tiny: Path, stages: Stages, options: tuple[str, ...], message: str
) -> None:
    command = ("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 2, *options, "--out", "r")
    error = stages.fails(2, *command)
    assert message in error
    assert "\n" not in error
    assert not Path("r").exists()
