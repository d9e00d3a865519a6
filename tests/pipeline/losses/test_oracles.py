"""Properties of the losses beside their formulas: identities, limits, invariances and zeros."""

import math

import pytest
import torch

import tests.helpers.formulas_of_layers as by_hand
from softcache.pipeline.models import build, find_head
from softcache.pipeline.taps.hooks import capture_features
from softcache.pipeline.taps.statistics import compute_statistic
from tests.helpers.class_losses import CLASS_LOSSES
from tests.helpers.tensors import PAIRS, Case, compute_features, draw_normal, make_case

SAME = (((3, 4, 4), (3, 4, 4)), ((5, 2, 2), (5, 2, 2)))
TEMPERATURES = [0.5, 1.0, 4.0, 20.0]
DIVERGENCES = [
    "kd",
    "kd:standardize=true",
    "output",
    "dkd",
    "dkd:target=0",
    "dkd:nontarget=0",
    "dkd:standardize=true",
    "ctkd",
    "multi_temperature",
    "multi_temperature:standardize=true",
    "balanced_kd:beta=0",
    "dive:power=1",
]
RARE = [
    "logit_adjusted",
    "balanced_softmax",
    "balanced_kd",
    "dive",
    "soft_f1",
    "soft_f1:average=weighted",
    "soft_f1:average=micro",
]
DISTANCES = ["logit_mse", "output:kind=mse", "dist", "dist:between=0", "dist:within=0"]
BETWEEN_LAYERS = ["hint", "attention", "nst", "similarity", "rkd", "rkd:distance=0", "rkd:angle=0", "pkt", "cc"]
LAYERS_AND_SIMKD = [*BETWEEN_LAYERS, "simkd"]


def value(example: Case) -> float:
    return float(example.value().detach())


# Zero for equal outputs, positive for others


@pytest.mark.parametrize("spec", [*DIVERGENCES, *DISTANCES])
def test_equal_logits_give_a_zero_term_and_gradient(spec: str) -> None:
    example = make_case(spec)
    assert example.target.logits is not None
    example.logits = example.target.logits.clone()
    leaves = example.leaves()
    assert abs(value(example)) <= 1e-12
    (gradient,) = torch.autograd.grad(example.value(), leaves)
    assert float(gradient.abs().max()) <= 1e-12


@pytest.mark.parametrize("spec", LAYERS_AND_SIMKD)
def test_equal_features_give_a_zero_term_and_gradient(spec: str) -> None:
    example = make_case(spec, pairs=SAME)
    example.student_layers = {
        name: theirs.clone()
        for name, theirs in zip(example.student_layers, example.teacher_layers.values(), strict=False)
    }
    leaves = example.leaves()
    assert abs(value(example)) <= 1e-12
    for gradient in torch.autograd.grad(example.value(), leaves):
        # pkt adds 1e-7 inside its logarithm, to the student's half alone where the gradient goes
        assert float(gradient.abs().max()) <= (1e-8 if spec == "pkt" else 1e-10)


@pytest.mark.parametrize("spec", [*DIVERGENCES, *DISTANCES, *LAYERS_AND_SIMKD])
def test_different_outputs_give_a_positive_term(spec: str) -> None:
    for seed in range(10):
        assert value(make_case(spec, pairs=SAME, seed=seed)) > 1e-6


# One loss in terms of another


@pytest.mark.parametrize("T", TEMPERATURES)
def test_kd_is_the_target_part_plus_the_weighted_nontarget_part(T: float) -> None:
    """KD = TCKD + (1 - p_t[y]) NCKD in every row (Zhao et al. 2022, equation 6)."""
    rows, classes = 6, 5
    for seed in range(rows):
        kd = make_case(f"kd:temperature={T}", 1, classes, seed=seed)
        y = kd.target.labels
        assert kd.target.logits is not None
        left = 1 - float((kd.target.logits / T).softmax(1)[0, int(y)])
        of_target = value(make_case(f"dkd:temperature={T},nontarget=0", 1, classes, seed=seed, labels=y))
        rest = value(make_case(f"dkd:temperature={T},target=0,nontarget=1", 1, classes, seed=seed, labels=y))
        assert value(kd) == pytest.approx(of_target + left * rest, rel=1e-9)


@pytest.mark.parametrize("T", TEMPERATURES)
def test_output_is_kd_and_logit_mse_and_its_cross_entropy_has_the_gradient_of_kd(T: float) -> None:
    example = {kind: make_case(f"output:kind={kind},temperature={T}") for kind in ("kl", "mse", "soft_ce")}
    assert value(example["kl"]) == value(make_case(f"kd:temperature={T}"))
    assert value(example["mse"]) == value(make_case("logit_mse"))
    assert value(example["soft_ce"]) > value(example["kl"])
    leaves = {kind: m.leaves() for kind, m in example.items()}
    kl, soft_ce = (torch.autograd.grad(example[kind].value(), leaves[kind])[0] for kind in ("kl", "soft_ce"))
    torch.testing.assert_close(kl, soft_ce, rtol=1e-9, atol=1e-13)


def test_the_learned_temperature_gives_kd_at_that_temperature() -> None:
    example = make_case("ctkd")
    T = 1 + 20 / (1 + math.exp(-1))
    assert value(example) == pytest.approx(value(make_case(f"kd:temperature={T}")), rel=1e-12)


def test_several_temperatures_are_the_sum_of_kd_at_each() -> None:
    example = make_case("multi_temperature:temperatures=1+2.5+7,batch=0,classes=0")
    assert value(example) == pytest.approx(
        sum(value(make_case(f"kd:temperature={T}")) for T in (1, 2.5, 7)), rel=1e-12
    )


@pytest.mark.parametrize("spec", ["kd:temperature=1000", "output:temperature=1000", "ctkd:start=1000,span=0"])
def test_t_squared_kl_becomes_half_the_mean_square_of_centred_logits(spec: str) -> None:
    example = make_case(spec, 6, 10, scale=0.5)
    assert example.target.logits is not None
    z_s, z_t = (z - z.mean(1, keepdim=True) for z in (example.logits, example.target.logits))
    limit = float((z_s - z_t).square().sum(1).mean()) / (2 * 10)
    assert value(example) == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("kind", ["kl", "soft_ce"])
def test_t_squared_keeps_the_size_of_the_gradient_whatever_the_temperature(kind: str) -> None:
    sizes = []
    for T in (1.0, 4.0, 20.0, 100.0):
        example = make_case(f"output:kind={kind},temperature={T}", 32, 50)
        leaves = example.leaves()
        sizes.append(float(torch.autograd.grad(example.value(), leaves)[0].norm()))
    assert max(sizes) / min(sizes) < 5, "without T² the last is a thousandth of the first"


# Invariances


KL_ALONE = "multi_temperature:batch=0,classes=0,standardize=true"


@pytest.mark.parametrize("spec", ["kd:standardize=true", "dkd:standardize=true", KL_ALONE])
def test_standardised_losses_are_invariant_to_scale_and_shift_of_each_row(spec: str) -> None:
    example = make_case(spec)
    before = value(example)
    example.logits = example.logits * draw_normal(5, 1, seed=7).abs() + draw_normal(5, 1, seed=8)
    assert value(example) == pytest.approx(before, rel=1e-6)  # 1e-7 beside the standard deviation
    plain = make_case(spec.partition(":")[0])
    assert value(plain) != pytest.approx(before, rel=1e-3)


def test_classes_with_probability_zero_change_no_divergence() -> None:
    """Sums over the classes, not means: a mean of 15 classes would be a third of that of 5."""
    plain = [spec for spec in DIVERGENCES if "standardize" not in spec and spec != "multi_temperature"]
    for spec in (*plain, "multi_temperature:classes=0", "output:kind=soft_ce", "hard", "nkd", "wsld", *RARE):
        example = make_case(spec, 5, 5)
        before = value(example)
        assert example.target.logits is not None
        nobody = torch.full((5, 10), -1e4, dtype=torch.float64)
        example.logits = torch.cat([example.logits, nobody], 1)
        wide = make_case(spec, 5, 15, labels=example.target.labels)
        wide.logits = example.logits
        assert wide.target.logits is not None
        wide.target.logits.copy_(torch.cat([example.target.logits, nobody], 1))
        assert value(wide) == pytest.approx(before, rel=1e-9), spec


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rotate x [B, D] at random and scale it by 3."""
    basis = torch.linalg.qr(draw_normal(x.shape[1], x.shape[1], seed=9))[0]
    return 3 * x @ basis


@pytest.mark.parametrize("spec", ["rkd", "rkd:distance=0", "rkd:angle=0", "similarity", "pkt", "cc"])
def test_relations_are_invariant_to_rotation_and_scale(spec: str) -> None:
    example = make_case(spec, pairs=(((6,), (4,)), ((3,), (5,))))
    before = value(example)
    example.student_layers = {name: turned(x) for name, x in example.student_layers.items()}
    assert value(example) == pytest.approx(before, rel=1e-9)
    example.student_layers = {
        name: x * torch.arange(1.0, x.shape[1] + 1) for name, x in example.student_layers.items()
    }
    assert value(example) != pytest.approx(before, rel=1e-3)


def test_distances_and_angles_are_invariant_to_translation() -> None:
    example = make_case("rkd")
    before = value(example)
    example.student_layers = {name: x + 10 for name, x in example.student_layers.items()}
    assert value(example) == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize(
    ("spec", "sees"),
    [("attention", False), ("pkt", False), ("cc", False), ("nst", False), ("similarity", True), ("rkd", True)],
)
def test_invariance_to_a_scale_of_each_row(spec: str, sees: bool) -> None:
    example = make_case(spec)
    before = value(example)
    scales = torch.tensor([0.5, 1.0, 2.0, 7.0, 3.0], dtype=torch.float64)[:, None, None, None]
    example.student_layers = {name: x * scales for name, x in example.student_layers.items()}
    assert (value(example) == pytest.approx(before, rel=1e-9)) is not sees


def test_selectivity_is_invariant_to_scale_and_order_of_channels() -> None:
    example = make_case("nst")
    before = value(example)
    example.student_layers = {
        name: (x * draw_normal(1, x.shape[1], 1, 1).abs()).flip(1) for name, x in example.student_layers.items()
    }
    assert value(example) == pytest.approx(before, rel=1e-9)


def test_a_gram_of_unit_channels_gives_the_maximum_mean_discrepancy_of_the_polynomial_kernel() -> None:
    """Explicit pairs of channels of one row: mean over (i, i') plus (j, j') minus twice the mean over (i, j)."""
    example = make_case("nst", 1)
    s, t = example.student_layers["layer1"][0].flatten(1), example.teacher_layers["layer1"][0].flatten(1)
    s, t = s / s.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True)
    total = sum(float(a @ b) ** 2 for a in s for b in s) / 9 + sum(float(a @ b) ** 2 for a in t for b in t) / 25
    total -= 2 * sum(float(a @ b) ** 2 for a in s for b in t) / 15
    g_s, g_t = (
        compute_features({"layer1": x}, ("layer1:gram",))["layer1:gram"]
        for x in (example.student_layers["layer1"], example.teacher_layers["layer1"])
    )
    assert float((g_s - g_t).square().sum()) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize(
    "spec",
    [
        "kd",
        "logit_mse",
        "dkd",
        "nkd",
        "hard",
        "tf_kd",
        "wsld",
        "output",
        "ctkd",
        "logit_adjusted",
        "balanced_softmax",
        "balanced_kd",
        "dive",
        "soft_f1:average=micro",
    ],
)
def test_a_term_on_logits_is_the_mean_of_its_rows(spec: str) -> None:
    whole = make_case(spec, 6, 4)
    single = []
    for i in range(6):
        row = make_case(spec, 1, 4, labels=whole.target.labels[i : i + 1])
        row.logits = whole.logits[i : i + 1]
        assert row.target.logits is not None
        assert whole.target.logits is not None
        row.target.logits.copy_(whole.target.logits[i : i + 1])
        single.append(value(row))
    assert value(whole) == pytest.approx(sum(single) / 6, rel=1e-12)


@pytest.mark.parametrize("spec", BETWEEN_LAYERS)
def test_two_pairs_of_layers_are_the_sum_of_each_alone(spec: str) -> None:
    knobs = spec + ("," if ":" in spec else ":")
    whole = make_case(spec, pairs=SAME)
    alone = [value(make_case(f"{knobs}teacher={name}", pairs=SAME)) for name in ("layer1", "layer2")]
    assert value(whole) == pytest.approx(sum(alone), rel=1e-12)


def test_every_loss_without_a_trained_part_is_tested_or_reads_labels_alone() -> None:
    here = {spec.partition(":")[0] for spec in (*DIVERGENCES, *DISTANCES, *LAYERS_AND_SIMKD)}
    modules = {"concat_hint", "vid", "srrl", "cat_kd", "crd", "review_kd"}
    with_labels = {"hard", "tf_kd", "nkd", "wsld", "logit_adjusted", "balanced_softmax", "soft_f1"}
    assert here | modules | with_labels == set(CLASS_LOSSES)


# Real networks


@pytest.mark.parametrize("arch", ["resnet8", "resnet8x4", "wrn_16_1"])
def test_the_cells_of_a_class_activation_map_and_the_linear_layer_of_the_pooled_map_give_the_logits(arch: str) -> None:
    torch.manual_seed(0)
    network = build(arch, 7, 1, 16).eval()
    layer = find_head(network, 7)
    assert layer is not None
    last = "last" if arch.startswith("wrn") else "layer3"
    with torch.no_grad(), capture_features(network, (last, f"{last}:grid2", f"{last}:pool")) as kept:
        logits = network(torch.rand(4, 1, 16, 16))
    torch.testing.assert_close(layer(kept[f"{last}:pool"]), logits, rtol=1e-5, atol=1e-5)
    cam = torch.einsum("kc,bchw->bkhw", layer.weight, kept[f"{last}:grid2"])
    assert cam.shape == (4, 7, 2, 2)
    torch.testing.assert_close(cam.mean((2, 3)) + layer.bias, logits, rtol=1e-5, atol=1e-5)


def test_cells_that_do_not_divide_the_map_match_the_reference() -> None:
    x = draw_normal(2, 3, 5, 7)
    for kind, n in (("grid1", 1), ("grid2", 2), ("grid4", 4)):
        torch.testing.assert_close(compute_statistic(x, kind), torch.from_numpy(by_hand.cells(x.numpy(), n, n)))
    assert [s[1] for pair in PAIRS for s in pair] == [4, 4, 2, 2]
