"""The criterion in a loop of a user's own: which forward pass it reads, its parts, and what it refuses."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from softcache import Batch, Cache, DistillationLoss, ModelOutputs, UsageError, losses

SPECS = ("kd:temperature=4,weight=0.5", "hint:teacher=flatten,student=2,weight=0.1")


class Student(nn.Sequential):
    def __init__(self, width: int = 16, classes: int = 10):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, classes))


@pytest.fixture(scope="module")
def batch(tiny: Path) -> Batch:
    return next(iter(Cache(tiny / "cache").loader(batch_size=16, taps=["flatten"])))


@pytest.fixture
def student() -> Student:
    torch.manual_seed(0)
    return Student()


def make_criterion(student: nn.Module, batch: Batch) -> DistillationLoss:
    criterion = DistillationLoss(*SPECS)
    torch.manual_seed(1)
    criterion.attach(student, batch)
    return criterion


def compute_by_hand(student: Student, criterion: DistillationLoss, batch: Batch) -> torch.Tensor:
    """Both terms from their formulas."""
    assert batch.logits is not None
    z, t = student(batch.images) / 4, batch.logits / 4
    kd = 16 * (t.softmax(1) * (t.log_softmax(1) - z.log_softmax(1))).sum(1).mean()
    hidden = torch.tanh(student[1](batch.images.flatten(1)))
    (regressor,) = criterion.parts["hint"]  # type: ignore[misc]
    return 0.5 * kd + 0.1 * (regressor(hidden) - batch.features["flatten"]).square().mean()


def test_terms_add_up_to_the_loss_of_the_formulas(student: Student, batch: Batch) -> None:
    criterion = make_criterion(student, batch)
    expected = compute_by_hand(student, criterion, batch)
    loss = criterion(student(batch.images), batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert list(criterion.terms) == ["kd", "hint"]
    torch.testing.assert_close(sum(criterion.terms.values()), loss.detach())
    assert not any(term.requires_grad for term in criterion.terms.values())
    assert [tuple(p.shape) for p in criterion.parameters()] == [(512, 16), (512,)]


def test_attaching_draws_from_no_gpu_that_the_student_is_not_on(
    student: Student, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several GPUs PyTorch would warn, and warnings are errors here."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert list(make_criterion(student, batch).parts) == ["hint"]


@pytest.mark.parametrize("between", ["copy", "evaluation", "other rows", "another pass with gradients"])
def test_a_pass_in_between_changes_nothing(student: Student, batch: Batch, between: str) -> None:
    criterion = make_criterion(student, batch)
    expected = torch.autograd.grad(criterion(student(batch.images), batch), list(student.parameters()))
    average = copy.deepcopy(student)
    with torch.no_grad():
        average[1].weight.mul_(3.0)
    logits = student(batch.images)
    if between == "copy":
        average(batch.images)
    elif between == "another pass with gradients":
        student(2 * batch.images)
    else:
        with torch.no_grad():
            student(batch.images[:5] if between == "other rows" else 2 * batch.images)
    gradients = torch.autograd.grad(criterion(logits, batch), list(student.parameters()))
    for gradient, other in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, other)


def test_logits_that_something_made_again_are_those_of_the_last_pass(student: Student, batch: Batch) -> None:
    criterion = make_criterion(student, batch)
    expected = criterion(student(batch.images), batch)
    logits = student(batch.images) + 0.0  # as mixed precision and DistributedDataParallel may do
    with torch.no_grad():
        student(2 * batch.images)
    assert torch.equal(criterion(logits, batch), expected)


def test_gradients_accumulate_over_two_batches(student: Student, batch: Batch) -> None:
    criterion = make_criterion(student, batch)
    halves = [batch.slice(0, 8), batch.slice(8, 16)]
    for half in halves:
        (criterion(student(half.images), half) / 2).backward()
    accumulated = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    criterion(student(batch.images), batch).backward()
    whole = [p.grad for p in student.parameters() if p.grad is not None]
    for a, b in zip(accumulated, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_objects_with_logits_do_as_well(student: Student, batch: Batch) -> None:
    criterion = DistillationLoss("kd")
    logits = student(batch.images)
    expected = criterion(logits, batch)
    assert torch.equal(criterion({"logits": logits, "aux": None}, batch), expected)
    assert torch.equal(criterion(ModelOutputs(logits), batch), expected)
    with pytest.raises(UsageError, match=r"returned a tuple, not logits \[B, K\]"):
        criterion((logits,), batch)


def test_a_copy_has_the_parts_and_is_attached_to_nothing(student: Student, batch: Batch) -> None:
    criterion = make_criterion(student, batch)
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        with pytest.raises(UsageError, match=r"call criterion\.attach"):
            other(student(batch.images), batch)
        other.attach(student, batch)
        for a, b in zip(other.parameters(), criterion.parameters(), strict=True):
            assert torch.equal(a, b)
        other.detach()
    criterion.detach()
    assert not student._forward_hooks
    assert not student[2]._forward_hooks


def test_what_does_not_fit_is_refused_in_one_line(student: Student, batch: Batch) -> None:
    with pytest.raises(UsageError, match=r"the loss reads 2 of the student: call\s+criterion.attach"):
        DistillationLoss(*SPECS)(student(batch.images), batch)
    with pytest.raises(UsageError, match="no layer 'block' of the student"):
        DistillationLoss("hint:teacher=flatten,student=block").attach(student, batch)
    with pytest.raises(UsageError, match="the student has 7 classes, the cache 10"):
        DistillationLoss("kd")(Student(classes=7)(batch.images), batch)
    with pytest.raises(UsageError, match="the student has 7 classes, the cache 10"):
        DistillationLoss("kd").attach(Student(classes=7), batch)
    with pytest.raises(UsageError, match=r"student = loss\.extend"):
        DistillationLoss("simkd:teacher=pool1,student=2").attach(student, batch)
    with pytest.raises(UsageError, match=r"the loss reads the teacher's pool1.*it has: flatten.*taps=\['pool1'\]"):
        DistillationLoss("hint:teacher=pool1,student=2").attach(student, batch)
    criterion = make_criterion(student, batch)
    student(batch.images[:5])
    with pytest.raises(UsageError, match=r"these logits \[16, 10\] are of no forward pass .* returned \[5, 10\]"):
        criterion(torch.zeros(16, 10, requires_grad=True), batch)


def test_a_ramp_is_set_for_an_epoch(student: Student, batch: Batch) -> None:
    ramp, fixed = DistillationLoss(losses.KD(weight=losses.Ramp(1.0, 0.0))), DistillationLoss("kd:weight=0.25")
    ramp.set_progress(3, 5)
    logits = student(batch.images)
    torch.testing.assert_close(ramp(logits, batch), fixed(logits, batch))
