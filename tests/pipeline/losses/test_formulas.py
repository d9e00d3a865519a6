"""Every loss of the table agrees with its formula to nine digits, at several shapes and parameters."""

import pytest
import torch

from softcache.pipeline.losses import LOSSES
from tests.helpers.class_losses import CLASS_LOSSES
from tests.helpers.formulas import FORMULAS
from tests.helpers.tensors import PAIRS, Case, make_case

# Each loss with its defaults, and with every parameter of its formula at another value.
SPECS = [
    "hard",
    "hard:smoothing=0.1",
    "tf_kd",
    "tf_kd:temperature=2,correct=0.8",
    "output",
    "output:temperature=2",
    "output:kind=mse",
    "output:kind=soft_ce",
    "output:kind=soft_ce,temperature=1",
    "kd",
    "kd:temperature=0.5",
    "kd:standardize=true,temperature=2",
    "logit_mse",
    "dkd",
    "dkd:temperature=1,target=2,nontarget=0.5",
    "dkd:target=0",
    "dkd:nontarget=0",
    "dkd:standardize=true,temperature=2",
    "nkd",
    "nkd:temperature=1,target=0.5,nontarget=1.5",
    "nkd:target=0",
    "nkd:nontarget=0",
    "dist",
    "dist:temperature=1,between=2,within=0.5",
    "dist:between=0",
    "dist:within=0",
    "wsld",
    "wsld:temperature=2",
    "ctkd",
    "ctkd:start=2,span=3,reversal=1",
    "multi_temperature",
    "multi_temperature:temperatures=1,batch=3,classes=0.5",
    "multi_temperature:batch=0",
    "multi_temperature:classes=0",
    "multi_temperature:standardize=true",
    "logit_adjusted",
    "logit_adjusted:tau=0",
    "logit_adjusted:tau=2.5",
    "balanced_softmax",
    "balanced_kd",
    "balanced_kd:temperature=1,beta=0.9",
    "balanced_kd:beta=0",
    "balanced_kd:beta=0.999999999",
    "dive",
    "dive:temperature=1,power=0.1",
    "dive:power=1.5",
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
    "rkd:distance=1,angle=0",
    "rkd:distance=0,angle=2",
    "pkt",
    "cc",
    "cc:gamma=1.5",
    "srrl",
    "srrl:features=0.5,outputs=3",
    "cat_kd",
    "simkd",
    "crd:negatives=30,width=6",
    "crd:negatives=7,width=4,temperature=0.5",
    "review_kd",
]
OF_LOGITS = [s for s in SPECS if not hasattr(LOSSES[s.partition(":")[0]], "teacher")]
OF_LAYERS = [s for s in SPECS if s not in OF_LOGITS]
VECTORS = (((6,), (4,)), ((3,), (5,)))
SAME = (((3, 4, 4), (3, 4, 4)), ((6,), (6,)))
SMALLER = (((3, 8, 8), (5, 4, 4)), ((4, 4, 4), (6, 2, 2)))  # the student's map is the larger
LARGER = (((3, 4, 4), (5, 8, 8)), ((4, 2, 2), (6, 4, 4)))
ODD = (((3, 7, 7), (5, 5, 5)), ((4, 5, 5), (6, 2, 2)))
LAST_POOLED = (((3, 8, 8), (5, 8, 8)), ((4, 4, 4), (6, 4, 4)), ((4,), (6,)))


def agrees(example: Case) -> None:
    name = example.loss.name
    expected = FORMULAS[name](example)
    found = example.value()
    assert (found.shape, found.dtype) == ((), torch.float64)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_every_row_of_the_table_has_a_formula_here_and_is_compared_with_it() -> None:
    assert set(FORMULAS) == set(CLASS_LOSSES) == {spec.partition(":")[0] for spec in SPECS}


@pytest.mark.parametrize(("B", "K"), [(5, 10), (6, 2), (1, 10), (2, 3), (3, 100)])
@pytest.mark.parametrize("spec", OF_LOGITS)
def test_a_loss_on_logits_is_its_formula(spec: str, B: int, K: int) -> None:
    agrees(make_case(spec, B, K))


@pytest.mark.parametrize("spec", OF_LOGITS)
def test_a_loss_on_logits_is_its_formula_where_some_labels_are_hidden(spec: str) -> None:
    agrees(make_case(spec, labels=torch.tensor([3, -1, 0, -1, 9])))


@pytest.mark.parametrize("B", [5, 2])
@pytest.mark.parametrize("spec", OF_LAYERS)
def test_a_loss_between_layers_is_its_formula(spec: str, B: int) -> None:
    agrees(make_case(spec, B, 4, PAIRS))


@pytest.mark.parametrize("spec", [s for s in OF_LAYERS if s not in ("nst", "review_kd")])
def test_a_loss_between_maps_of_different_sizes_is_its_formula(spec: str) -> None:
    for pairs in (SMALLER, LARGER, ODD):
        if spec != "hint" or pairs is not ODD:
            agrees(make_case(spec, 4, 3, pairs))


def test_review_of_maps_of_different_sizes_and_a_pooled_last_layer_is_its_formula() -> None:
    for pairs in (SMALLER, LARGER, LAST_POOLED, (((3, 9, 9), (4, 6, 6)), ((5, 4, 4), (3, 3, 3)))):
        names = "+".join(f"layer{i}" for i in range(1, len(pairs) + 1))
        agrees(make_case(f"review_kd:teacher={names}", 4, 3, pairs))


@pytest.mark.parametrize(
    "spec",
    ["hint", "concat_hint", "vid", "similarity", "rkd", "pkt", "cc", "srrl", "simkd", "crd:negatives=9,width=5"],
)
def test_a_loss_between_vectors_is_its_formula(spec: str) -> None:
    agrees(make_case(spec, 4, 3, VECTORS))


@pytest.mark.parametrize("pairs", [SAME, (((4, 5, 6), (7, 3, 2)),) * 2, (((2, 3), (2, 3)),) * 2])
def test_a_hint_is_its_formula_with_some_regressors_or_none(pairs: tuple[tuple[tuple[int, ...], ...], ...]) -> None:
    agrees(make_case("hint", 4, 3, pairs))


@pytest.mark.parametrize("hidden", [[0, 2], [0, 1, 2, 3, 4]])
def test_contrast_leaves_out_rows_of_the_same_class_or_where_labels_are_hidden_the_same_picture(
    hidden: list[int],
) -> None:
    """Z is computed from the first batch and stays constant."""
    labels = torch.arange(5) % 3
    labels[hidden] = -1
    example = make_case("crd:negatives=35,width=6", 5, 3, labels=labels)
    agrees(example)
    kept = example.part.log_z.clone()
    assert kept.isfinite()
    for x in example.student_layers.values():
        x.mul_(-1.5)
    agrees(example)
    assert torch.equal(example.part.log_z, kept)
