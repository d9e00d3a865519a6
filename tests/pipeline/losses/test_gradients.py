"""Gradients of every loss pass gradcheck; they reach the student and the loss's part and nothing else."""

import dataclasses
import math

import pytest
import torch

from softcache.pipeline.losses import LOSSES
from softcache.pipeline.taps.statistics import derive_features
from tests.helpers.class_losses import CLASS_LOSSES
from tests.helpers.one_step import run_teacher, take_one_step
from tests.helpers.tensors import make_case

CRD = "crd:negatives=12,width=4"
PAIRS = (((2, 3, 3), (3, 3, 3)), ((3, 2, 2), (2, 2, 2)))
OTHER_SIZES = (((2, 4, 4), (3, 2, 2)), ((3, 3, 3), (2, 2, 2)))
VECTORS = (((4,), (3,)), ((2,), (5,)))
# Every term alone, with the weights of the others 0.
TERMS = [
    "hard",
    "hard:smoothing=0.1",
    "tf_kd",
    "output",
    "output:kind=mse",
    "output:kind=soft_ce",
    "kd",
    "kd:standardize=true",
    "logit_mse",
    "dkd",
    "dkd:target=0",
    "dkd:nontarget=0",
    "dkd:standardize=true",
    "nkd",
    "nkd:target=0",
    "nkd:nontarget=0",
    "dist",
    "dist:between=0",
    "dist:within=0",
    "wsld",
    "ctkd",
    "multi_temperature",
    "multi_temperature:batch=0,classes=0",
    "multi_temperature:standardize=true",
    "logit_adjusted",
    "balanced_softmax",
    "balanced_kd",
    "dive",
    "soft_f1",
    "soft_f1:average=weighted",
    "soft_f1:average=micro",
    "hint",
    "concat_hint",
    "vid",
    "attention",
    "nst",
    "similarity",
    "rkd",
    "rkd:distance=0",
    "rkd:angle=0",
    "pkt",
    "cc",
    "srrl",
    "srrl:features=0",
    "srrl:outputs=0",
    "cat_kd",
    "simkd",
    CRD,
    "review_kd",
]
# Losses whose gradient differs from that of the value by design: a constant weight, a reversed gradient.
NOT_OF_ITS_VALUE = {"wsld"}
WITH_A_TRAINED_PART = {"ctkd", "hint", "concat_hint", "vid", "srrl", "crd", "review_kd"}


def name_of(spec: str) -> str:
    return spec.partition(":")[0]


def test_every_loss_of_the_table_is_tested() -> None:
    assert {name_of(spec) for spec in TERMS} == set(CLASS_LOSSES)


def checked(spec: str, *shapes: object) -> None:
    example = make_case(spec, 4, 4, *shapes, scale=1.0)  # type: ignore[arg-type]
    example.value()  # crd keeps the constant of its first batch
    leaves = [*example.leaves(), *(example.weights if example.loss.name != "ctkd" else [])]
    assert torch.autograd.gradcheck(lambda *_: example.value(), leaves)
    for gradient in torch.autograd.grad(example.value(), leaves):
        assert gradient is not None
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("spec", [s for s in TERMS if name_of(s) not in NOT_OF_ITS_VALUE])
def test_the_gradient_of_a_loss_passes_gradcheck(spec: str) -> None:
    checked(spec, PAIRS)


@pytest.mark.parametrize("spec", ["attention", "vid", "simkd", "cat_kd", "review_kd", "hint"])
def test_the_gradient_between_maps_of_different_sizes_passes_gradcheck(spec: str) -> None:
    checked(spec, OTHER_SIZES)


@pytest.mark.parametrize("spec", ["hint", "vid", "similarity", "rkd", "pkt", "cc", "srrl", "simkd", CRD])
def test_the_gradient_between_vectors_passes_gradcheck(spec: str) -> None:
    checked(spec, VECTORS)


def test_the_gradient_of_weighted_soft_labels_has_constant_weights() -> None:
    """T w (softmax(z_s / T) - softmax(z_t / T)) / labelled rows, without a gradient of w."""
    example = make_case("wsld:temperature=2", 4, 5, labels=torch.tensor([0, 3, -1, 4]))
    leaves = example.leaves()
    (gradient,) = torch.autograd.grad(example.value(), leaves)
    assert example.target.logits is not None
    for i, y in enumerate(example.target.labels.tolist()):
        s, t = example.logits[i].detach(), example.target.logits[i]
        w = 1 - math.exp(-float(-s.log_softmax(0)[y] / (-t.log_softmax(0)[y] + 1e-7))) if y >= 0 else 0.0
        expected = 2 * w * ((s / 2).softmax(0) - (t / 2).softmax(0)) / 3
        torch.testing.assert_close(gradient[i], expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("reversal", "strength"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (1 / 3, 0.25)])
def test_the_gradient_of_the_learned_temperature_is_reversed_and_scaled(reversal: float, strength: float) -> None:
    example = make_case(f"ctkd:start=1.5,span=5,reversal={reversal}")
    theta = example.part.theta
    (found,) = torch.autograd.grad(example.value(), theta)
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            theta += step
            values.append(float(example.value()))
    slope = (values[0] - values[1]) / 2e-6
    assert abs(slope) > 1e-3
    assert float(found) == pytest.approx(-strength * slope, rel=1e-6, abs=1e-12)


def test_the_reversal_of_the_learned_temperature_rises_over_ten_epochs_as_a_cosine() -> None:
    from softcache.pipeline.losses import resolve_ramps

    loss = LOSSES["ctkd"]
    found = [resolve_ramps(loss, epoch, 240).reversal for epoch in (0, 4, 9, 200)]  # type: ignore[attr-defined]
    assert found == pytest.approx([0.1, 0.5, 1.0, 1.0])


@pytest.mark.parametrize("spec", TERMS)
def test_gradients_reach_the_student_and_the_part_and_cached_values_stay(spec: str) -> None:
    batch, head, rows = run_teacher(6, 10)
    cached = {"logits": batch.logits, "labels": batch.labels, "views": batch.views, **batch.features}
    cached |= {f"bank {tap}": x for tap, x in rows.items()} | {"weight": head.weight, "bias": head.bias}
    before = {name: x.clone() for name, x in cached.items() if x is not None}
    done = take_one_step(spec)
    assert done.terms.isfinite().all()
    reads_logits = not hasattr(LOSSES[name_of(spec)], "teacher")
    for name, p in done.student.network.named_parameters():
        if name.startswith(("linear", "backbone.linear")) and not reads_logits:
            wanted = name == "linear.weight" and spec == "cat_kd"
            assert (p.grad is not None and p.grad.abs().sum() > 0) == wanted, name
        else:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.abs().sum() > 0, name
    assert bool(done.loss_parameters) == (name_of(spec) in WITH_A_TRAINED_PART)
    for name, p in done.loss_parameters.items():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
        assert any(p is w for w in done.state.weights), f"{name} is not trained"
    for name, x in before.items():
        now = cached[name]
        assert now is not None
        assert not now.requires_grad, name
        assert now.grad is None, name
        assert now.dtype == x.dtype, name
        assert torch.equal(now, x), name


@pytest.mark.parametrize("spec", ["srrl", "cat_kd", CRD])
def test_the_teachers_values_in_a_part_are_not_trained(spec: str) -> None:
    done = take_one_step(spec)
    (module,) = done.state.parts.values()
    buffers = dict(module.named_buffers())
    assert set(buffers) == {"srrl": {"weight", "bias"}, "cat_kd": {"weight"}}.get(
        spec, {"features", "index", "labels", "log_z"}
    )
    assert not any(b.requires_grad for b in buffers.values())
    if spec != CRD:
        assert torch.equal(buffers["weight"], done.head.weight)
        assert buffers["weight"] is not done.head.weight


def test_a_simkd_student_does_not_train_the_teachers_last_layer() -> None:
    done = take_one_step("simkd:teacher=layer3,student=layer3")
    network = done.student.network
    assert torch.equal(network.linear.weight, done.head.weight)  # type: ignore[union-attr,arg-type]
    assert torch.equal(network.linear.bias, done.head.bias)  # type: ignore[union-attr,arg-type]
    trained = [p for p in network.parameters() if p.requires_grad]
    assert len(trained) == len(done.state.weights) == len(list(network.parameters())) - 2


def test_losses_use_float32_statistics_of_cached_float16_maps() -> None:
    batch, _, _ = run_teacher(6, 10)
    example = derive_features(batch.features, ("layer3:pool", "layer3", "layer2:attention"))
    assert all(x.dtype == torch.float32 for x in example.values())
    assert torch.equal(example["layer3"].half(), batch.features["layer3"])
    assert dataclasses.replace(batch, features=example).features["layer3:pool"].shape == (6, 256)
