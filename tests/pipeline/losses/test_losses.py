"""Losses agree with their formulas to nine digits; gradients, rows without labels, parsing and ramps."""

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.batch import Batch, LossContext, ModelOutputs
from softcache.pipeline.losses import LOSSES, Custom, Loss, parse_losses, resolve_ramps
from softcache.pipeline.losses.base import Ramp
from softcache.pipeline.losses.feature_base import FeatureLoss, RelationalLoss
from softcache.pipeline.losses.hard import Hard
from softcache.pipeline.losses.hint import Hint, build_regressor
from softcache.pipeline.losses.kd import KD, LogitMSE
from softcache.pipeline.losses.long_tail import ClassCountLoss
from softcache.pipeline.losses.regression import NumberLoss
from tests.helpers.tensors import draw_labels, draw_normal, make_batch

SHAPES = [(5, 10), (1, 10), (6, 2), (1, 2), (3, 1000)]
TEMPERATURES = [0.5, 1.0, 4.0, 20.0]


def term(loss: Loss, student: torch.Tensor, target: Batch) -> torch.Tensor:
    return loss(ModelOutputs(student), target, None)


# The formulas in plain Python, row by row and class by class


def log_softmax_by_hand(row: list[float]) -> list[float]:
    top = max(row)
    total = math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - top - total for x in row]


def kd_by_hand(z_s: torch.Tensor, z_t: torch.Tensor, T: float) -> float:
    rows = []
    for s, t in zip(z_s.tolist(), z_t.tolist(), strict=True):
        log_p, log_q = log_softmax_by_hand([x / T for x in t]), log_softmax_by_hand([x / T for x in s])
        rows.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True)))
    return T * T * math.fsum(rows) / len(rows)


def cross_entropy_by_hand(row: list[float], label: int, smoothing: float) -> float:
    K, log_q = len(row), log_softmax_by_hand(row)
    wanted = [(1 - smoothing) * (c == label) + smoothing / K for c in range(K)]
    return -math.fsum(w * x for w, x in zip(wanted, log_q, strict=True))


def hard_by_hand(
    z: torch.Tensor,
    labels: torch.Tensor,
    smoothing: float = 0.0,
    partner: torch.Tensor | None = None,
    share: torch.Tensor | None = None,
) -> float:
    rows = []
    for i, row in enumerate(z.tolist()):
        if partner is None or share is None:
            if labels[i] >= 0:
                rows.append(cross_entropy_by_hand(row, int(labels[i]), smoothing))
        elif labels[i] >= 0 and partner[i] >= 0:
            first = cross_entropy_by_hand(row, int(labels[i]), smoothing)
            other = cross_entropy_by_hand(row, int(partner[i]), smoothing)
            rows.append(float(share[i]) * first + (1 - float(share[i])) * other)
    return math.fsum(rows) / len(rows) if rows else 0.0


def mean_square_by_hand(one: torch.Tensor, other: torch.Tensor) -> float:
    pairs = list(zip(one.flatten().tolist(), other.flatten().tolist(), strict=True))
    return math.fsum((a - b) ** 2 for a, b in pairs) / len(pairs)


# Agreement with the formulas


@pytest.mark.parametrize("T", TEMPERATURES)
@pytest.mark.parametrize(("B", "K"), SHAPES)
def test_kd_is_the_formula(B: int, K: int, T: float) -> None:
    z_s, z_t = draw_normal(B, K, seed=1), draw_normal(B, K, seed=2)
    result = term(KD(temperature=T), z_s, make_batch(B, z_t))
    assert result.shape == ()
    assert float(result.detach()) == pytest.approx(kd_by_hand(z_s, z_t, T), rel=1e-9)


@pytest.mark.parametrize(("B", "K"), SHAPES)
def test_logit_mse_is_the_formula(B: int, K: int) -> None:
    z_s, z_t = draw_normal(B, K, seed=1), draw_normal(B, K, seed=2)
    result = term(LogitMSE(), z_s, make_batch(B, z_t))
    assert result.shape == ()
    assert float(result.detach()) == pytest.approx(mean_square_by_hand(z_s, z_t), rel=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize(("B", "K"), SHAPES)
def test_hard_is_the_formula(B: int, K: int, smoothing: float) -> None:
    z, labels = draw_normal(B, K), draw_labels(B, K)
    result = term(Hard(smoothing=smoothing), z, make_batch(B, labels=labels))
    assert result.shape == ()
    assert float(result.detach()) == pytest.approx(hard_by_hand(z, labels, smoothing), rel=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_weights_the_two_labels_of_a_mixup_view_by_their_shares(smoothing: float) -> None:
    z, labels, partner = draw_normal(6, 4), draw_labels(6, 4), draw_labels(6, 4, seed=8)
    share = torch.tensor([0.0, 0.25, 0.5, 0.7, 0.99, 1.0], dtype=torch.float64)
    result = term(Hard(smoothing=smoothing), z, make_batch(6, labels=labels, partner=partner, share=share))
    assert float(result.detach()) == pytest.approx(hard_by_hand(z, labels, smoothing, partner, share), rel=1e-9)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_mixup_view_with_a_share_of_0_or_1_equals_a_single_image(share: float) -> None:
    z, labels, partner = draw_normal(4, 3), draw_labels(4, 3), draw_labels(4, 3, seed=8)
    shares = torch.full((4,), share, dtype=torch.float64)
    mixed = term(Hard(), z, make_batch(4, labels=labels, partner=partner, share=shares))
    alone = term(Hard(), z, make_batch(4, labels=labels if share else partner))
    assert float(mixed) == pytest.approx(float(alone.detach()), rel=1e-12)


@pytest.mark.parametrize("shape", [(4, 6), (1, 6), (3, 2, 4, 4)])
def test_hint_is_the_formula(shape: tuple[int, ...]) -> None:
    f_s, f_t = draw_normal(*shape, seed=1), draw_normal(*shape, seed=2)
    target = make_batch(shape[0], features={"layer3": f_t, "other": f_t + 1})
    student = ModelOutputs(draw_normal(shape[0], 2), {"relu2": f_s, "other": f_s + 2})
    result = Hint(teacher="layer3", student="relu2")(student, target, None)
    assert result.shape == ()
    assert float(result.detach()) == pytest.approx(mean_square_by_hand(f_s, f_t), rel=1e-9)


def test_hint_applies_the_regressor_to_the_students_features() -> None:
    torch.manual_seed(0)
    f_s, f_t = draw_normal(4, 3, seed=1), draw_normal(4, 5, seed=2)
    loss = Hint(teacher="t", student="s")
    student, target = ModelOutputs(draw_normal(4, 2), {"s": f_s}), make_batch(4, features={"t": f_t})
    module = loss.build_part(student, target, LossContext())
    assert module is not None
    module.double()
    weight, bias = (p.tolist() for p in module.parameters())
    guess = [[math.fsum(map(operator.mul, w, f)) + b for w, b in zip(weight, bias, strict=True)] for f in f_s.tolist()]
    expected = mean_square_by_hand(torch.tensor(guess, dtype=torch.float64), f_t)
    assert float(loss(student, target, module).detach()) == pytest.approx(expected, rel=1e-9)


def test_hint_compares_float16_features_from_a_cache_in_the_students_precision() -> None:
    f_s = torch.full((1, 2), 2049.0)  # between two float16 numbers
    loss = Hint(teacher="t", student="s")
    target = make_batch(1, features={"t": torch.full((1, 2), 2048.0, dtype=torch.float16)})
    result = loss(ModelOutputs(torch.zeros(1, 2), {"s": f_s}), target, None)
    assert result.dtype == torch.float32
    assert float(result.detach()) == 1.0


@pytest.mark.parametrize("loss", [KD(temperature=4.0), LogitMSE(), Hard()], ids=lambda loss: loss.name)
def test_a_term_of_float32_logits_is_a_float32_number(loss: Loss) -> None:
    z_s, z_t = draw_normal(4, 3, seed=1).float(), draw_normal(4, 3, seed=2).float()
    result = term(loss, z_s, make_batch(4, z_t, draw_labels(4, 3)))
    assert (result.shape, result.dtype) == ((), torch.float32)


# Gradients


GRADED: dict[str, tuple[Loss, dict[str, Any]]] = {
    "kd": (KD(temperature=1.0), {}),
    "kd at 4": (KD(temperature=4.0), {}),
    "logit_mse": (LogitMSE(), {}),
    "hard": (Hard(), {"labels": torch.tensor([0, 2, -1])}),
    "hard smoothed": (Hard(smoothing=0.1), {"labels": torch.tensor([0, 2, 1])}),
    "hard mixed": (
        Hard(),
        {
            "labels": torch.tensor([0, 2, 1]),
            "partner": torch.tensor([1, 2, 0]),
            "share": torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64),
        },
    ),
}


@pytest.mark.parametrize("name", GRADED)
def test_the_gradient_of_a_term_passes_gradcheck(name: str) -> None:
    loss, more = GRADED[name]
    z_s = draw_normal(3, 4, seed=1).requires_grad_()
    target = make_batch(3, draw_normal(3, 4, seed=2), **more)
    assert torch.autograd.gradcheck(lambda z: term(loss, z, target), (z_s,))
    (gradient,) = torch.autograd.grad(term(loss, z_s, target), z_s)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("student_shape", "teacher_shape"), [((3,), (3,)), ((3,), (5,)), ((2, 3, 3), (4, 2, 2)), ((2, 2, 2), (3, 4, 4))]
)
def test_the_gradient_of_a_hint_passes_gradcheck_for_student_and_regressor(
    student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]
) -> None:
    loss = Hint(teacher="t", student="s")
    f_s = draw_normal(4, *student_shape, seed=1).requires_grad_()
    target = make_batch(4, features={"t": draw_normal(4, *teacher_shape, seed=2)})
    made = loss.build_part(ModelOutputs(torch.zeros(4, 2), {"s": f_s}), target, LossContext())
    module = made.double().train() if made is not None else None
    weights = list(module.parameters()) if module is not None else []
    assert bool(weights) is (student_shape != teacher_shape)

    def value(f: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return loss(ModelOutputs(torch.zeros(4, 2), {"s": f}), target, module)

    assert torch.autograd.gradcheck(value, (f_s, *weights))
    for gradient in torch.autograd.grad(value(f_s), [f_s, *weights]):
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", GRADED)
def test_a_term_changes_nothing_in_the_batch(name: str) -> None:
    """Batches stay in memory and are used again in the next epoch."""
    loss, more = GRADED[name]
    target = make_batch(3, draw_normal(3, 4, seed=2), **more)
    before = {key: value.clone() for key, value in vars(target).items() if isinstance(value, torch.Tensor)}
    term(loss, draw_normal(3, 4, seed=1).requires_grad_(), target).backward()
    assert {"index", "labels", "logits", "views"} <= set(before)
    assert all(torch.equal(getattr(target, key), value) for key, value in before.items())


def test_a_hint_changes_neither_cached_features_nor_their_dtype() -> None:
    f_t, f_s = draw_normal(3, 4, seed=2).half(), draw_normal(3, 4).float().requires_grad_()
    before = f_t.clone()
    target = make_batch(3, features={"t": f_t})
    Hint(teacher="t", student="s")(ModelOutputs(torch.zeros(3, 2), {"s": f_s}), target, None).backward()
    assert f_s.grad is not None
    assert target.features["t"] is f_t
    assert torch.equal(f_t, before)


# Properties of kd


@pytest.mark.parametrize("T", TEMPERATURES)
def test_kd_of_the_teacher_with_itself_is_zero_with_a_zero_gradient(T: float) -> None:
    z = draw_normal(4, 7).requires_grad_()
    result = term(KD(temperature=T), z, make_batch(4, z.detach()))
    (gradient,) = torch.autograd.grad(result, z)
    assert abs(float(result.detach())) <= 1e-12
    assert float(gradient.abs().max()) <= 1e-12


def test_kd_is_never_negative_and_invariant_to_a_constant_added_to_a_row() -> None:
    for seed in range(20):
        z_s, z_t = draw_normal(3, 5, seed=seed), draw_normal(3, 5, seed=seed + 100)
        result = float(term(KD(), z_s, make_batch(3, z_t)))
        assert result > 0
        moved = term(KD(), z_s + draw_normal(3, 1, seed=seed), make_batch(3, z_t - draw_normal(3, 1, seed=seed + 7)))
        assert float(moved) == pytest.approx(result, rel=1e-9)


def test_kd_puts_the_teacher_first() -> None:
    """KL(teacher || student) is not KL(student || teacher)."""
    z_s, z_t = draw_normal(4, 5, seed=1), draw_normal(4, 5, seed=2)
    assert kd_by_hand(z_s, z_t, 1.0) != pytest.approx(kd_by_hand(z_t, z_s, 1.0), rel=0.01)
    assert float(term(KD(temperature=1.0), z_s, make_batch(4, z_t))) == pytest.approx(
        kd_by_hand(z_s, z_t, 1.0), rel=1e-9
    )


def test_kd_at_a_large_temperature_is_the_square_distance_of_centred_logits() -> None:
    """T² KL -> (1 / 2K) sum of squares of the centred differences as T grows (Hinton et al. 2015, section 2.1)."""
    z_s, z_t = draw_normal(4, 10, seed=1, scale=1.0), draw_normal(4, 10, seed=2, scale=1.0)
    d = (z_s - z_s.mean(1, keepdim=True)) - (z_t - z_t.mean(1, keepdim=True))
    limit = float((d**2).sum(1).mean() / 20)
    errors = [abs(float(term(KD(temperature=T), z_s, make_batch(4, z_t))) - limit) / limit for T in (1e2, 1e3)]
    assert errors[0] < 0.05
    assert errors[1] < errors[0] / 5


def test_t_squared_keeps_the_size_of_the_gradient() -> None:
    z_t = draw_normal(64, 100, seed=2)

    def size(T: float) -> float:
        z_s = draw_normal(64, 100, seed=1).requires_grad_()
        (gradient,) = torch.autograd.grad(term(KD(temperature=T), z_s, make_batch(64, z_t)), z_s)
        return float(gradient.norm())

    sizes = [size(T) for T in (1.0, 4.0, 20.0)]
    assert max(sizes) / min(sizes) < 4, "without T² the last is a hundredth of the first"


def test_the_gradient_of_kd_is_t_times_the_difference_of_the_softened_probabilities() -> None:
    T, B = 4.0, 5
    z_s, z_t = draw_normal(B, 6, seed=1).requires_grad_(), draw_normal(B, 6, seed=2)
    (gradient,) = torch.autograd.grad(term(KD(temperature=T), z_s, make_batch(B, z_t)), z_s)
    expected = T * ((z_s / T).softmax(1) - (z_t / T).softmax(1)) / B
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_classes_with_probability_zero_do_not_change_kd(T: float) -> None:
    """Logits of -1000 in both give a probability of zero, whose logarithm must not be taken."""
    z_s, z_t, labels = draw_normal(4, 3, seed=1), draw_normal(4, 3, seed=2), draw_labels(4, 3)
    improbable = torch.full((4, 5), -1000.0, dtype=torch.float64)
    wide_s, wide_t = torch.cat([z_s, improbable], 1), torch.cat([z_t, improbable], 1)
    for loss in (KD(temperature=T), Hard()):
        narrow = term(loss, z_s, make_batch(4, z_t, labels))
        wide = term(loss, wide_s, make_batch(4, wide_t, labels))
        assert float(wide) == pytest.approx(float(narrow), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opposite_saturated_logits_give_a_large_finite_term(dtype: torch.dtype) -> None:
    z_s = torch.tensor([[1000.0, -1000.0, 0.0]], dtype=dtype).requires_grad_()
    z_t = torch.tensor([[-1000.0, 1000.0, 0.0]], dtype=dtype)
    for loss, expected in ((KD(temperature=1.0), 2000.0), (KD(temperature=4.0), 8000.0), (Hard(), 2000.0)):
        result = term(loss, z_s, make_batch(1, z_t, torch.tensor([1])))
        (gradient,) = torch.autograd.grad(result, z_s)
        assert float(result.detach()) == pytest.approx(expected, rel=1e-6)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("loss", [KD(temperature=4.0), LogitMSE(), Hard(smoothing=0.1)], ids=lambda loss: loss.name)
def test_a_term_is_a_mean_over_rows_and_does_not_scale_with_the_batch_size(loss: Loss) -> None:
    z_s, z_t, labels = draw_normal(6, 4, seed=1), draw_normal(6, 4, seed=2), draw_labels(6, 4)
    full = float(term(loss, z_s, make_batch(6, z_t, labels)))
    single = [float(term(loss, z_s[i : i + 1], make_batch(1, z_t[i : i + 1], labels[i : i + 1]))) for i in range(6)]
    assert full == pytest.approx(sum(single) / 6, rel=1e-12)


# Rows without labels


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_rows_without_a_label_are_left_out(smoothing: float) -> None:
    z, labels = draw_normal(6, 4).requires_grad_(), torch.tensor([1, -1, 3, -1, -1, 0])
    result = term(Hard(smoothing=smoothing), z, make_batch(6, labels=labels))
    alone = term(Hard(smoothing=smoothing), z[labels >= 0], make_batch(3, labels=labels[labels >= 0]))
    assert float(result.detach()) == pytest.approx(float(alone.detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(result, z)
    assert (gradient[labels < 0] == 0).all()
    assert (gradient[labels >= 0] != 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_batch_without_any_label_gives_zero_and_a_finite_gradient(smoothing: float, mixed: bool) -> None:
    z, none = draw_normal(3, 4).requires_grad_(), torch.full((3,), -1)
    more = {"partner": none, "share": torch.full((3,), 0.5, dtype=torch.float64)} if mixed else {}
    result = term(Hard(smoothing=smoothing), z, make_batch(3, labels=none, **more))
    result.backward()
    assert float(result.detach()) == 0
    assert z.grad is not None
    assert (z.grad == 0).all()


def test_a_mixup_view_with_one_hidden_label_is_left_out() -> None:
    z, labels, partner = draw_normal(4, 3), torch.tensor([0, -1, 2, -1]), torch.tensor([1, 2, -1, -1])
    share = torch.full((4,), 0.75, dtype=torch.float64)
    result = term(Hard(), z, make_batch(4, labels=labels, partner=partner, share=share))
    assert float(result.detach()) == pytest.approx(hard_by_hand(z, labels, 0.0, partner, share), rel=1e-12)
    assert labels.tolist() == [0, -1, 2, -1]


def test_soft_targets_need_no_labels() -> None:
    z_s, z_t = draw_normal(4, 3, seed=1), draw_normal(4, 3, seed=2)
    for loss in (KD(), LogitMSE()):
        assert not loss.needs_labels
        assert float(term(loss, z_s, make_batch(4, z_t))) == float(
            term(loss, z_s, make_batch(4, z_t, draw_labels(4, 3)))
        )


# Regressors


def shape_after(module: nn.Module | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    assert module is not None
    return tuple(module(torch.randn(4, *shape)).shape[1:])


@pytest.mark.parametrize("shape", [(8,), (3, 4, 5), (2, 3)])
def test_equal_shapes_need_no_regressor(shape: tuple[int, ...]) -> None:
    assert build_regressor(torch.Size((2, *shape)), torch.Size((7, *shape))) is None


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((8,), (5,)),
        ((3, 8, 8), (5, 8, 8)),
        ((3, 8, 8), (3, 4, 4)),
        ((3, 9, 6), (4, 4, 6)),
        ((3, 4, 4), (5, 8, 8)),
        ((3, 4, 2), (3, 8, 4)),
        ((2, 1, 1), (6, 1, 1)),
    ],
)
def test_a_regressor_maps_the_students_shape_to_the_teachers(
    student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    module = build_regressor(torch.Size((2, *student)), torch.Size((2, *teacher)))
    assert shape_after(module, student) == teacher


def test_a_regressor_for_maps_is_a_valid_convolution_with_batch_norm_or_a_transposed_one() -> None:
    down = build_regressor(torch.Size((2, 3, 8, 8)), torch.Size((2, 5, 6, 7)))
    up = build_regressor(torch.Size((2, 3, 4, 4)), torch.Size((2, 5, 8, 8)))
    assert isinstance(down, nn.Sequential)
    assert isinstance(up, nn.Sequential)
    assert (type(down[0]), down[0].kernel_size, down[0].padding) == (nn.Conv2d, (3, 2), (0, 0))
    assert (type(up[0]), type(down[1]), type(up[1])) == (nn.ConvTranspose2d, nn.BatchNorm2d, nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((3, 4, 4), (3, 6, 6)), ((3, 4, 4), (3, 16, 16)), ((3, 4, 8), (3, 8, 8)), ((8,), (3, 2, 2)), ((3, 2), (3, 4))],
)
def test_shapes_without_a_regressor_raise_an_error_with_both_shapes(
    student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    with pytest.raises(UsageError) as error:
        build_regressor(torch.Size((2, *student)), torch.Size((2, *teacher)))
    text = str(error.value)
    assert "x".join(map(str, student)) in text
    assert "x".join(map(str, teacher)) in text


def test_a_hint_needs_layers_and_the_students_default_to_the_teachers_names() -> None:
    loss = Hint(teacher="layer3", student="relu1")
    assert (loss.teacher_taps(), loss.student_taps()) == (("layer3",), ("relu1",))
    assert Hint(teacher="layer3").student_taps() == ("layer3",)
    for half in (Hint(), Hint(student="relu1")):
        with pytest.raises(UsageError, match="needs layers"):
            half.teacher_taps()


# Parsing


def test_the_table_has_every_loss_under_its_name() -> None:
    bases = (Loss, FeatureLoss, RelationalLoss, ClassCountLoss, NumberLoss)
    kinds = {kind for base in bases for kind in base.__subclasses__()} - {*bases, Custom}
    assert {name: type(loss) for name, loss in LOSSES.items()} == {kind.name: kind for kind in kinds}
    assert all(loss.name == name for name, loss in LOSSES.items())


@pytest.mark.parametrize(
    ("spec", "loss"),
    [
        ("hard", Hard()),
        ("hard:smoothing=0.1,weight=0", Hard(smoothing=0.1, weight=0.0)),
        ("kd", KD(temperature=4.0, weight=1.0)),
        ("kd:temperature=8->1,weight=0.9", KD(temperature=Ramp(8.0, 1.0), weight=0.9)),
        ("kd:weight=0.9->0", KD(weight=Ramp(0.9, 0.0))),
        ("logit_mse:weight=1e-2", LogitMSE(weight=0.01)),
        ("hint:teacher=layer3,student=relu1", Hint(teacher="layer3", student="relu1")),
        ("hint:teacher=layer3.0.bn2,student=8->1", Hint(teacher="layer3.0.bn2", student="8->1")),
    ],
)
def test_parse_a_loss_of_the_command_line(spec: str, loss: Loss) -> None:
    assert parse_losses((spec,)) == (loss,)


def test_losses_keep_the_order_of_the_command_line() -> None:
    assert [loss.name for loss in parse_losses(("hard", "kd:weight=2", "logit_mse"))] == ["hard", "kd", "logit_mse"]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ((), "no loss: name at least one, such as --loss kd:temperature=4"),
        (
            ("kdd",),
            "no loss 'kdd'. Did you mean 'kd'? There are: asymmetric, attention, balanced_kd, balanced_softmax,",
        ),
        (("kd:temprature=4",), "no parameter 'temprature' of loss 'kd'. Did you mean 'temperature'?"),
        (("hard:temperature=4",), "no parameter 'temperature' of loss 'hard'"),
        (("kd:name=x",), "no parameter 'name' of loss 'kd'"),
        (("kd:temperature=warm",), "temperature=warm is not a number"),
        (("kd:temperature=8->",), "loss 'kd:temperature=8->': temperature= is not a number"),
        (("kd:temperature=->1",), "is not a number"),
        (("kd:temperature=8->4->1",), "is not a number"),
        (("kd:temperature=nan",), "temperature=nan is not finite"),
        (("kd:temperature=inf",), "temperature=inf is not finite"),
        (("kd:temperature=0",), "temperature=0 is below 0.001"),
        (("kd:temperature=4->0",), "temperature=4->0 is below 0.001"),
        (("kd:weight=-1",), "weight=-1 is below 0"),
        (("kd:weight=1->-1",), "weight=1->-1 is below 0"),
        (("hard:smoothing=1.5",), "smoothing=1.5 is above 1"),
        (("kd:weight=0->1@",), "after @ comes the epoch in which 1 is reached"),
        (("kd:weight=0->1@0",), "after @ comes the epoch"),
        (("kd:weight=0->1@2.5",), "after @ comes the epoch"),
        (("kd:weight=1@5",), "weight=1@5 is not a number"),
        (("kd:standardize=1",), "standardize=1 is neither true nor false"),
        (("crd:negatives=0.5",), "negatives=0.5 is not a whole number from 1 on"),
        (("crd:negatives=4->8",), "negatives=4->8 is not a whole number from 1 on"),
        (("ctkd:span=4->8",), "span cannot change during training"),
        (("output:kind=l1",), "kind=l1 is none of kl, mse, soft_ce"),
        (("multi_temperature:temperatures=2+x",), "temperatures=2+x is no list of numbers such as 2+3+4"),
        (("simkd:teacher=layer3", "kd"), "'simkd' takes no other loss"),
        (("soft_f1:average=samples",), "average=samples is none of macro, weighted, micro"),
        (("balanced_kd:beta=1",), "beta=1 is not below 1"),
        (("balanced_kd:beta=0->1",), "beta=0->1 is not below 1"),
        (("balanced_kd:beta=-0.1",), "beta=-0.1 is below 0"),
        (("dive:power=0",), "power=0 is below 0.001"),
        (("dive:power=1->0",), "power=1->0 is below 0.001"),
        (("logit_adjusted:tau=-1",), "tau=-1 is below 0"),
        (("hard:smoothing=0->1.5",), "smoothing=0->1.5 is above 1"),
        (("kd:temperature",), "'temperature' is not parameter=value"),
        (("kd:temperature=4,temperature=5",), "'temperature' is given twice"),
        (("kd", "hard", "kd:weight=2"), "loss 'kd' is given twice"),
    ],
)
def test_an_invalid_loss_raises_a_usage_error_of_one_line(specs: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_losses(specs)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hint_may_be_given_for_several_pairs_of_layers() -> None:
    specs = ("hint:teacher=layer2,student=relu1", "hint:teacher=layer3,student=relu2")
    assert [loss.teacher_taps() for loss in parse_losses(specs)] == [("layer2",), ("layer3",)]


# Ramps


@pytest.mark.parametrize(("progress", "T"), [(0.0, 8.0), (0.25, 6.25), (0.5, 4.5), (1.0, 1.0)])
def test_a_ramp_is_linear_from_start_to_end(progress: float, T: float) -> None:
    (loss,) = parse_losses(("kd:temperature=8->1,weight=0->1",))
    now = resolve_ramps(loss, round(4 * progress), 5)
    assert now == KD(temperature=T, weight=progress)


def test_a_ramp_changes_the_term() -> None:
    z_s, z_t = draw_normal(4, 3, seed=1), draw_normal(4, 3, seed=2)
    (loss,) = parse_losses(("kd:temperature=8->1",))
    for epoch, T in ((0, 8.0), (6, 1.0)):
        result = term(resolve_ramps(loss, epoch, 7), z_s, make_batch(4, z_t))
        assert float(result.detach()) == pytest.approx(kd_by_hand(z_s, z_t, T), rel=1e-9)


def test_resolve_ramps_returns_a_loss_without_ramps_unchanged() -> None:
    for loss in LOSSES.values():
        if loss.name != "ctkd":  # its gradient reversal rises
            assert resolve_ramps(loss, 3, 10) is loss


@pytest.mark.parametrize(("epoch", "weight"), [(0, 0.05), (1, 0.1), (9, 0.5), (19, 1.0), (20, 1.0), (99, 1.0)])
def test_a_warm_up_reaches_its_end_in_its_epoch_and_stays_there(epoch: int, weight: float) -> None:
    """min(epoch / 20, 1), epochs counted from 1."""
    (loss,) = parse_losses(("kd:weight=0->1@20",))
    resolved = resolve_ramps(loss, epoch, 100)
    assert isinstance(resolved, KD)
    assert resolved == KD(weight=resolved.weight)
    assert resolved.weight == pytest.approx(weight)


@pytest.mark.parametrize("spec", ["kd:temperature=8->1", "hard:smoothing=0.1->0"])
def test_a_ramp_that_is_not_resolved_raises_a_type_error(spec: str) -> None:
    (loss,) = parse_losses((spec,))
    with pytest.raises(TypeError, match="was not resolved"):
        term(loss, draw_normal(2, 3), make_batch(2, draw_normal(2, 3), draw_labels(2, 3)))


@pytest.mark.parametrize(
    ("make", "knob"),
    [(lambda s: f"kd:temperature={s}", "temperature"), (lambda s: f"hard:smoothing={s}", "smoothing")],
)
def test_every_parameter_of_a_formula_changes_its_value(make: Callable[[str], str], knob: str) -> None:
    z_s, z_t, labels = draw_normal(4, 3, seed=1), draw_normal(4, 3, seed=2), draw_labels(4, 3)
    values = {float(term(parse_losses((make(s),))[0], z_s, make_batch(4, z_t, labels))) for s in ("0.1", "0.2", "0.4")}
    assert len(values) == 3


def test_a_loss_is_immutable() -> None:
    for loss in LOSSES.values():
        with pytest.raises(AttributeError):
            loss.weight = 2.0  # type: ignore[misc]


def test_slice_and_select_take_the_same_rows_of_every_field() -> None:
    share = torch.rand(5)
    full = make_batch(
        5, draw_normal(5, 3), draw_labels(5, 3), {"t": draw_normal(5, 2)}, draw_labels(5, 3, seed=9), share
    )
    part = full.slice(1, 3)
    assert part.index.tolist() == [1, 2]
    for name in ("labels", "logits", "partner", "share", "views"):
        assert np.array_equal(getattr(part, name), getattr(full, name)[1:3])
    assert torch.equal(part.features["t"], full.features["t"][1:3])
    bare = make_batch(5).slice(0, 2)
    assert (bare.logits, bare.partner, bare.share, bare.features) == (None, None, None, {})
