"""`embed`, and relational losses on embeddings: their formulas in float64, gradients, widths and several teachers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from softcache.base.errors import UsageError
from softcache.data.tasks import CLASSES, EMBEDDING, TASKS
from softcache.pipeline.batch import Batch, LossContext, ModelOutputs
from softcache.pipeline.losses import LOSSES, Loss, check_task, parse_losses
from softcache.pipeline.losses.distillation_loss import DistillationLoss
from softcache.pipeline.losses.embedding import KINDS, STANDARDIZE, Embed
from softcache.pipeline.losses.multi_teacher import wrap_loss
from softcache.pipeline.losses.relational import CC, PKT, RKD, Similarity
from tests.helpers.tensors import draw_normal, make_batch

B, D = 7, 6
RELATIONAL: list[Loss] = [RKD(), Similarity(), PKT(), CC()]


def make_context(D: int = D, seed: int = 3) -> LossContext:
    axes, _ = torch.linalg.qr(draw_normal(D, D, seed=seed))
    mean, std, axis_std = (draw_normal(D, seed=seed + k) for k in (1, 2, 3))
    return LossContext(mean=mean, std=std.abs() + 0.5, axes=axes, axis_std=axis_std.abs() + 0.5)


def compute(loss: Loss, student: torch.Tensor, teacher: torch.Tensor, context: LossContext) -> torch.Tensor:
    batch, outputs = make_batch(len(student), teacher), ModelOutputs(student)
    part = loss.build_part(outputs, batch, context)
    return loss(outputs, batch, part.double() if part is not None else None)


def distance(kind: str, a: np.ndarray, b: np.ndarray) -> float:
    """The formula of the documentation, row by row."""
    if kind == "cosine":
        return float(np.mean([1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]))
    if kind == "mse":
        return float(((a - b) ** 2).mean())
    if kind == "l2":
        return float(np.mean([np.linalg.norm(x - y) for x, y in zip(a, b, strict=True)]))
    d = np.abs(a - b)
    return float(np.where(d < 1, d**2 / 2, d - 0.5).mean())


def standardized(how: str, rows: np.ndarray, context: LossContext) -> np.ndarray:
    mean, std, axes, axis_std = (x.numpy() for x in (context.mean, context.std, context.axes, context.axis_std))
    if how == "none":
        return rows
    if how == "axes":
        return (rows - mean) @ axes / axis_std
    return (rows - mean) / (std if how == "std" else 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", STANDARDIZE)
def test_embed_is_its_formula(kind: str, how: str) -> None:
    student, teacher, context = draw_normal(B, D, seed=1), draw_normal(B, D, seed=2), make_context()
    value = compute(Embed(kind=kind, standardize=how), student, teacher, context)
    a, b = (standardized(how, x.numpy(), context) for x in (student, teacher))
    assert float(value) == pytest.approx(distance(kind, a, b), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projection", ["auto", "linear", "mlp"])
def test_a_student_of_another_width_is_projected_and_the_teacher_standardised(kind: str, projection: str) -> None:
    loss = Embed(kind=kind, standardize="std", projection=projection)
    student, teacher, context = draw_normal(B, 4, seed=1), draw_normal(B, D, seed=2), make_context()
    batch, outputs = make_batch(B, teacher), ModelOutputs(student)
    part = loss.build_part(outputs, batch, context)
    assert part is not None
    part = part.double()
    value = loss(outputs, batch, part).detach()
    state = {name: p.detach().numpy() for name, p in part.named_parameters()}
    a = student.numpy()
    if projection == "mlp":
        hidden = a @ state["projection.0.weight"].T + state["projection.0.bias"]
        hidden = torch.nn.functional.gelu(torch.from_numpy(hidden)).numpy()
        a = hidden @ state["projection.2.weight"].T + state["projection.2.bias"]
        assert hidden.shape == (B, D)
    else:
        a = a @ state["projection.weight"].T + state["projection.bias"]
    b = standardized("std", teacher.numpy(), context)
    assert float(value) == pytest.approx(distance(kind, a, b), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [4, D])
def test_the_gradient_of_embed_is_that_of_its_formula(kind: str, width: int) -> None:
    loss = Embed(kind=kind, standardize="axes", projection="mlp" if width == 4 else "auto")
    student, teacher = draw_normal(3, width, seed=1).requires_grad_(), draw_normal(3, D, seed=2)
    batch, outputs = make_batch(3, teacher), ModelOutputs(student)
    part = loss.build_part(outputs, batch, make_context())
    assert part is not None
    part = part.double()
    leaves = [student, *part.parameters()]

    def value(*_: torch.Tensor) -> torch.Tensor:
        return loss(ModelOutputs(student), batch, part)

    assert torch.autograd.gradcheck(value, leaves)


@pytest.mark.parametrize("loss", [*(Embed(kind=kind) for kind in KINDS), *RELATIONAL], ids=lambda loss: str(loss)[:24])
@pytest.mark.parametrize("rows", [1, 5])
def test_one_row_and_rows_of_zeros_have_finite_values_and_gradients(loss: Loss, rows: int) -> None:
    for student, teacher in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0)):
        z = (student * draw_normal(rows, D)).requires_grad_()
        value = compute(loss, z, teacher * draw_normal(rows, D, seed=2), make_context())
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(z.grad).all()


# Relational losses


@pytest.mark.parametrize("loss", RELATIONAL, ids=lambda loss: loss.name)
@pytest.mark.parametrize("width", [D, 4])
def test_a_relational_loss_without_layers_is_that_of_the_outputs_as_features(loss: Loss, width: int) -> None:
    student, teacher = draw_normal(B, width, seed=1).requires_grad_(), draw_normal(B, D, seed=2)
    of_layer = replace(loss, teacher="layer1", student="layer1")  # type: ignore[type-var]
    tap = of_layer.teacher_taps()[0]
    expected = of_layer(ModelOutputs(student, {tap: student}), make_batch(B, features={tap: teacher}), None).detach()
    value = compute(loss, student, teacher, LossContext()).detach()
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert (loss.needs_logits, loss.teacher_taps(), loss.student_taps()) == (True, (), ())
    assert (of_layer.needs_logits, of_layer.teacher_taps()) == (False, (tap,))
    assert torch.autograd.gradcheck(lambda z: compute(loss, z, teacher, LossContext()), student)


@pytest.mark.parametrize("name", ["rkd", "similarity", "pkt", "cc"])
@pytest.mark.parametrize("task", [task for task in TASKS if task != EMBEDDING])
def test_without_layers_a_relational_loss_is_for_embeddings_alone(name: str, task: str) -> None:
    message = f"loss '{name}' needs layers: --loss {name}:teacher=layer3,student=layer3"
    with pytest.raises(UsageError, match=message):
        check_task(parse_losses([name]), task)
    check_task(parse_losses([name]), EMBEDDING)
    with pytest.raises(UsageError, match=message):
        parse_losses([f"{name}:student=layer1"])[0].teacher_taps()


def test_the_other_losses_of_layers_need_them_for_embeddings_too() -> None:
    for name in ("hint", "attention", "nst", "vid", "crd"):
        with pytest.raises(UsageError, match="needs layers"):
            LOSSES[name].teacher_taps()


# Several teachers


def pad(teachers: list[torch.Tensor]) -> torch.Tensor:
    width = max(z.shape[1] for z in teachers)
    return torch.stack([nn.functional.pad(z, (0, width - z.shape[1])) for z in teachers], 1)


@pytest.mark.parametrize("how", STANDARDIZE)
@pytest.mark.parametrize("kind", KINDS)
def test_embed_of_several_teachers_is_the_mean_with_a_projection_each(kind: str, how: str) -> None:
    loss, widths = Embed(kind=kind, standardize=how), (6, 3, 4)
    student = draw_normal(B, 4, seed=1)
    teachers = [draw_normal(B, width, seed=width) for width in widths]
    contexts = tuple(make_context(width, seed=width) for width in widths)
    outputs, batch = ModelOutputs(student), make_batch(B, pad(teachers))
    part = loss.build_part(outputs, batch, LossContext(members=contexts))
    assert isinstance(part, nn.ModuleList)
    part = part.double()
    assert [p.projection is not None for p in part] == [True, True, False]
    value = wrap_loss(loss, "per_teacher")(outputs, batch, part).detach()
    each = []
    for teacher, own, context in zip(teachers, part, contexts, strict=True):
        b = standardized(how, teacher.numpy(), context)
        if own.projection is None:
            a = standardized(how, student.numpy(), context)
        else:
            a = student.numpy() @ own.projection.weight.detach().numpy().T + own.projection.bias.detach().numpy()
        each.append(distance(kind, a, b))
    assert float(value) == pytest.approx(np.mean(each), rel=1e-9)


@pytest.mark.parametrize("loss", RELATIONAL, ids=lambda loss: loss.name)
def test_relations_to_several_teachers_do_not_see_the_zeros_behind_a_narrow_one(loss: Loss) -> None:
    student, teachers = draw_normal(B, 4, seed=1), [draw_normal(B, width, seed=width) for width in (6, 3)]
    value = wrap_loss(loss, "per_teacher")(ModelOutputs(student), make_batch(B, pad(teachers)), None)
    each = [float(compute(loss, student, teacher, LossContext())) for teacher in teachers]
    assert float(value) == pytest.approx(np.mean(each), rel=1e-9)


# The criterion


class Source:
    """What batches of a task have in common."""

    fingerprint, codec = "", ("float16", "dense")

    def __init__(self, task: str):
        self.task = task

    def prepare_input(self, views: torch.Tensor) -> torch.Tensor:
        return views.float()

    def make_context(self, losses: object) -> LossContext:
        return LossContext()


def make_source_batch(task: str | None, width: int = D) -> Batch:
    return replace(make_batch(4, draw_normal(4, width).float()), source=Source(task) if task else None)


@pytest.mark.parametrize(("texts", "task"), [(("embed",), None), (("rkd",), None), (("embed", "rkd"), EMBEDDING)])
def test_a_network_of_any_width_learns_an_embedding_in_a_loop_of_ones_own(texts: list[str], task: str | None) -> None:
    network, batch = nn.Sequential(nn.Flatten(), nn.Linear(4, 5)), make_source_batch(task)
    batch = replace(batch, source=batch.source or Source(EMBEDDING))
    criterion = DistillationLoss(*texts)
    criterion.attach(network, example=batch)
    loss = criterion(network(batch.images), batch if task else replace(batch, source=None))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in criterion.parameters())
    assert len(list(criterion.parameters())) == (2 if "embed" in texts else 0)


def test_classes_keep_their_checks() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(UsageError, match="loss 'rkd' needs layers"):
        DistillationLoss("rkd").attach(network, example=make_source_batch(CLASSES, width=5))
    with pytest.raises(UsageError, match="the student has 5 classes, the cache 6"):
        DistillationLoss("kd").attach(network, example=make_source_batch(CLASSES))
    with pytest.raises(UsageError, match="the student has 5 classes, the cache 6"):
        DistillationLoss("kd")(torch.zeros(4, 5), make_source_batch(None))
