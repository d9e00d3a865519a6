"""Losses on unusual batches: a finite and correct term and gradient, or an error."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.batch import LinearHead, LossContext
from softcache.pipeline.losses import LOSSES
from tests.helpers.class_losses import CLASS_LOSSES
from tests.helpers.formulas import FORMULAS
from tests.helpers.one_step import run_teacher, take_one_step
from tests.helpers.tensors import PAIRS, Case, Shape, draw_labels, draw_normal, make_case

CRD = "crd:negatives=12,width=4"
SPECS = [CRD if name == "crd" else name for name in CLASS_LOSSES]
MORE = [*SPECS, "output:kind=soft_ce", "output:kind=mse", "kd:standardize=true", "dkd:standardize=true"]
MORE += ["soft_f1:average=weighted", "soft_f1:average=micro"]
BETWEEN_LAYERS = [s for s in SPECS if hasattr(LOSSES[s.partition(":")[0]], "teacher")]
ON_LOGITS = [s for s in MORE if s not in BETWEEN_LAYERS]
Pairs = tuple[tuple[Shape, Shape], ...]
VECTORS = (((6,), (4,)), ((3,), (5,)))


def finite(example: Case) -> float:
    """Return the term and assert that it and every gradient are finite."""
    leaves = [*example.leaves(), *example.weights]
    term = example.value()
    assert term.isfinite(), term
    for gradient in torch.autograd.grad(term, leaves, allow_unused=True):
        assert gradient is None or gradient.isfinite().all()
    return float(term.detach())


def agrees(example: Case, rel: float = 1e-9) -> None:
    expected = FORMULAS[example.loss.name](example)
    assert finite(example) == pytest.approx(expected, rel=rel, abs=1e-12)


# bfloat16


@pytest.mark.parametrize("spec", SPECS)
def test_a_step_in_bfloat16_is_nearly_the_step_in_float32(spec: str) -> None:
    full, half = (take_one_step(spec, precision=p) for p in ("float32", "bfloat16"))
    assert half.terms.dtype == torch.float32
    assert float(half.terms) == pytest.approx(float(full.terms), rel=0.05)
    assert (float(half.terms) != float(full.terms)) or spec == "tf_kd"
    for name, p in half.student.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name


# One row, a few rows


@pytest.mark.parametrize("spec", MORE)
def test_one_row_is_enough(spec: str) -> None:
    agrees(make_case(spec, 1, 4))


@pytest.mark.parametrize("spec", ["hint", "concat_hint", "vid", "srrl", "simkd", CRD])
def test_one_row_of_vectors_is_enough_without_batch_norm(spec: str) -> None:
    agrees(make_case(spec, 1, 4, VECTORS))


@pytest.mark.parametrize(
    ("spec", "pairs"),
    [
        ("review_kd", VECTORS),
        ("review_kd", (((3, 2, 2), (4, 1, 1)),) * 2),
        ("review_kd", (((3, 1, 1), (4, 2, 2)),) * 2),
        ("hint", (((3, 2, 2), (4, 1, 1)),) * 2),
    ],
)
def test_batch_norm_over_one_vector_raises_an_error(spec: str, pairs: Pairs) -> None:
    example = make_case(spec, 1, 4, pairs)
    with pytest.raises(UsageError, match="has batch norm: it needs a --batch-size of 2 or more"):
        example.value()
    finite(make_case(spec, 2, 4, pairs))


@pytest.mark.parametrize("spec", ["rkd", "pkt", "cc", "similarity", "dist:between=0"])
def test_one_row_has_no_relations(spec: str) -> None:
    """cc and similarity compare a row with itself, which is the same in both; dist's second part is then constant."""
    example = make_case(spec, 1, 4)
    leaves = example.leaves()
    constant = 16.0 if spec.startswith("dist") else 0.0  # T²
    assert float(example.value().detach()) == pytest.approx(constant, abs=1e-9)
    for gradient in torch.autograd.grad(example.value(), leaves):
        assert float(gradient.abs().max()) <= 1e-9


@pytest.mark.parametrize("spec", MORE)
def test_equal_rows_give_a_finite_term_and_gradient(spec: str) -> None:
    """Three of six rows are equal, in the student and in the teacher; then all are."""
    for same in ([0, 1, 1, 1, 4, 5], [2] * 6):
        example = make_case(spec, 6, 4)
        assert example.target.logits is not None
        example.logits = example.logits[same]
        example.student_layers = {name: x[same] for name, x in example.student_layers.items()}
        example.teacher_layers = {name: x[same] for name, x in example.teacher_layers.items()}
        features = {tap: x[same] for tap, x in example.target.features.items()}
        example.target = replace(example.target, logits=example.target.logits[same], features=features)
        agrees(example, rel=1e-7)


def test_angles_of_equal_student_rows_have_no_gradient() -> None:
    """The direction between equal rows is undefined. Without the special case its gradient was 1e11."""
    example = make_case("rkd:teacher=layer1:pool", 6, 4)
    example.student_layers = {
        name: x[[0, 1, 1, 3, 4, 5]].detach().requires_grad_() for name, x in example.student_layers.items()
    }
    example.value().backward()
    assert all(float(x.grad.abs().max()) < 1e3 for x in example.student_layers.values() if x.grad is not None)
    assert any(x.grad is not None for x in example.student_layers.values())


@pytest.mark.parametrize("spec", BETWEEN_LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("whose", ["student", "teacher", "both", "one row", "one channel"])
def test_zero_features_give_a_finite_term_and_gradient(spec: str, dtype: torch.dtype, whose: str) -> None:
    example = make_case(spec, 4, 4, dtype=dtype)
    if whose in ("student", "both"):
        example.student_layers = {name: torch.zeros_like(x) for name, x in example.student_layers.items()}
    if whose in ("teacher", "both"):
        example.target = replace(
            example.target, features={tap: torch.zeros_like(x) for tap, x in example.target.features.items()}
        )
    for x in example.student_layers.values():
        if whose == "one row":
            x[1] = 0
        if whose == "one channel":
            x[:, 0] = 0
    finite(example)


@pytest.mark.parametrize("spec", BETWEEN_LAYERS)
def test_a_student_with_dead_layers_takes_a_finite_step(spec: str) -> None:
    """Batch norms shift all values below zero, so that each ReLU outputs zeros."""

    def kill(network: nn.Module) -> None:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 0.0)
                nn.init.constant_(module.bias, -1.0)

    for precision in ("float32", "bfloat16"):
        done = take_one_step(spec, change=kill, precision=precision)
        assert done.terms.isfinite().all()
        for name, p in [*done.student.named_parameters(), *done.loss_parameters.items()]:
            assert p.isfinite().all(), name
            assert p.grad is None or p.grad.isfinite().all(), name
            assert p.grad is None or float(p.grad.abs().max()) < 1e6, name


# Classes


@pytest.mark.parametrize("spec", ON_LOGITS)
def test_two_classes_and_a_thousand(spec: str) -> None:
    agrees(make_case(spec, 4, 2))
    agrees(make_case(spec, 3, 1000))
    in_single = finite(make_case(spec, 3, 1000, dtype=torch.float32))
    # logarithms of about -log K, rounded, times T²
    T = getattr(LOSSES[spec.partition(":")[0]], "temperature", 4.0)
    assert in_single == pytest.approx(finite(make_case(spec, 3, 1000)), rel=1e-5, abs=T**2 * 2**-23 * math.log(1000))


@pytest.mark.parametrize("part", ["target", "nontarget"])
def test_the_nontarget_part_of_two_classes_is_zero(part: str) -> None:
    example = make_case(f"dkd:{part}=0", 4, 2)
    leaves = example.leaves()
    gradient = torch.autograd.grad(example.value(), leaves)[0]
    assert (float(gradient.abs().max()) == 0) is (part == "target")


@pytest.mark.parametrize("spec", SPECS)
def test_classes_that_are_absent_from_the_batch_follow_the_formula(spec: str) -> None:
    agrees(make_case(spec, 6, 10, labels=torch.full((6,), 7)))


# Labels that are hidden


@pytest.mark.parametrize("spec", SPECS)
def test_rows_without_labels_have_a_gradient_only_in_losses_without_labels(spec: str) -> None:
    loss = LOSSES[spec.partition(":")[0]]
    for labels in ([-1, 3, -1, 0, 2], [-1] * 5):
        example = make_case(spec, 5, 4, labels=torch.tensor(labels))
        agrees(example)
        known = example.target.labels >= 0
        leaves = example.leaves()
        gradient = torch.autograd.grad(example.value(), leaves)[0].flatten(1).abs().sum(1)
        assert (gradient[~known] > 0).all() == (not loss.needs_labels)
        assert (gradient[known] > 0).all()
    if loss.needs_labels:
        assert float(example.value().detach()) == 0


@pytest.mark.parametrize("spec", ["dkd", "nkd"])
def test_a_hidden_label_is_replaced_by_the_teachers_class(spec: str) -> None:
    hidden = make_case(spec, 5, 4, labels=torch.full((5,), -1))
    assert hidden.target.logits is not None
    labelled = make_case(spec, 5, 4, labels=hidden.target.logits.argmax(1))
    assert float(hidden.value()) == float(labelled.value())
    assert float(hidden.value()) != float(
        make_case(spec, 5, 4, labels=(hidden.target.logits.argmax(1) + 1) % 4).value()
    )


# Mixup


def test_losses_that_need_a_single_label() -> None:
    assert {name for name, loss in LOSSES.items() if loss.needs_single_label} == {"tf_kd", "dkd", "nkd", "crd"}


@pytest.mark.parametrize("spec", [s for s in SPECS if not LOSSES[s.partition(":")[0]].needs_single_label])
def test_mixup_views_train_every_loss_that_does_not_need_a_single_label(spec: str) -> None:
    plain = run_teacher(6, 10)[0]
    share = torch.tensor([0.0, 0.2, 0.5, 0.6, 0.9, 1.0])
    mixed = replace(plain, partner=draw_labels(6, 10, seed=9), share=share)
    terms = [float(take_one_step(spec, batch=b).terms) for b in (plain, mixed)]
    assert math.isfinite(terms[1])
    assert (terms[0] != terms[1]) == (spec in ("hard", "wsld", "soft_f1", "logit_adjusted", "balanced_softmax"))


def test_weighted_soft_labels_of_a_mixup_view_use_both_labels() -> None:
    example = make_case("wsld", 5, 4, labels=torch.tensor([0, 1, 2, -1, 3]))
    partner, share = torch.tensor([3, 3, -1, 0, 1]), draw_normal(5, seed=4).sigmoid()
    example.target = replace(example.target, partner=partner, share=share)
    terms = []
    for i in (0, 1, 4):  # both halves have a label
        s, t = example.logits[i], example.target.logits[i]  # type: ignore[index]
        own, other, part = int(example.target.labels[i]), int(partner[i]), float(share[i])
        ce = [-(part * z.log_softmax(0)[own] + (1 - part) * z.log_softmax(0)[other]) for z in (s, t)]
        cross = -((t / 4).softmax(0) * (s / 4).log_softmax(0)).sum()
        terms.append(float((1 - torch.exp(-ce[0] / (ce[1] + 1e-7))) * 16 * cross))
    assert finite(example) == pytest.approx(sum(terms) / 3, rel=1e-9)


# Saturated and constant logits


@pytest.mark.parametrize("spec", ON_LOGITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("whose", ["teacher", "student", "both", "opposite"])
def test_saturated_logits_give_a_finite_term_and_gradient(spec: str, dtype: torch.dtype, whose: str) -> None:
    sure = torch.full((4, 5), -1e4, dtype=dtype)
    sure[torch.arange(4), torch.tensor([0, 1, 1, 4])] = 1e4
    for labels in ([0, 1, 1, 4], [3, 2, 0, 0], [-1, -1, 0, 4]):
        example = make_case(spec, 4, 5, labels=torch.tensor(labels), dtype=dtype)
        if whose != "teacher":
            example.logits = sure.clone()
        if whose != "student":
            example.target = replace(example.target, logits=sure.roll(1, 1) if whose == "opposite" else sure.clone())
        assert finite(example) >= -1e-3


@pytest.mark.parametrize("spec", ON_LOGITS)
def test_constant_logits_give_a_finite_term_and_gradient(spec: str) -> None:
    for whose in ("logits", "teacher"):
        example = make_case(spec, 4, 5, dtype=torch.float32)
        flat = torch.full((4, 5), 0.1)
        if whose == "logits":
            example.logits = flat
        else:
            example.target = replace(example.target, logits=flat)
        finite(example)


# Layers that do not fit


@pytest.mark.parametrize("name", ["attention", "nst", "cat_kd"])
@pytest.mark.parametrize("kind", ["map", "pool", "attention", "gram", "grid2", "grid4"])
def test_a_loss_of_one_statistic_takes_no_other(name: str, kind: str) -> None:
    spec = f"{name}:teacher=layer1:{kind}"
    if kind == LOSSES[name].statistic:  # type: ignore[attr-defined]
        agrees(make_case(spec, 4, 3, PAIRS))
        return
    for wrong in (spec, f"{name}:teacher=layer1,student=layer1:{kind}"):
        message = f"loss '{name}' reads .*, not {kind}: name the layer alone, 'layer1'"
        with pytest.raises(UsageError, match=message):
            make_case(wrong)


@pytest.mark.parametrize("spec", ["vid", "review_kd", "simkd"])
@pytest.mark.parametrize("pairs", [(((7, 6), (7, 6)),) * 2, (((7, 6), (7, 4)),) * 2])
def test_tokens_raise_an_error_in_losses_of_maps(spec: str, pairs: Pairs) -> None:
    with pytest.raises(UsageError, match=r"features of 7x\d are neither a map CxHxW nor a vector"):
        make_case(spec, 4, 3, pairs).value()


def test_gram_matrices_of_different_sizes_raise_an_error() -> None:
    with pytest.raises(UsageError, match="'nst': the student's 16x16 and the teacher's 4x4: choose layers whose maps"):
        make_case("nst", 4, 3, (((3, 4, 4), (5, 2, 2)),) * 2).value()


@pytest.mark.parametrize("spec", ["srrl", "cat_kd"])
def test_a_last_layer_that_does_not_read_the_tap_raises_an_error(spec: str) -> None:
    example = make_case(spec, 4, 3)
    narrow = LinearHead(example.teacher_head.weight[:, :-1], example.teacher_head.bias)
    for known, why in ((LossContext(), "it has none"), (LossContext(narrow), "its last linear layer takes 4 values")):
        with pytest.raises(UsageError, match=f"loss '{spec}' needs the last linear layer of the cache's.*{why}"):
            example.loss.build_part(example.outputs, example.target, known)
    if spec == "cat_kd":
        for head in (None, LinearHead(example.head.weight[:, :-1], example.head.bias)):
            with pytest.raises(UsageError, match="the student's last linear layer does not read that map"):
                example.loss.build_part(replace(example.outputs, head=head), example.target, example.context)
