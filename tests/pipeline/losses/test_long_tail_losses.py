"""Losses for imbalanced data: compared with other losses and scikit-learn's F1, and data that they do not accept."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score

import softcache.stages.training.loop as training
from softcache.base.errors import UsageError
from softcache.data.transfer_set import count_classes, load_transfer_set
from softcache.pipeline.batch import LossContext
from softcache.pipeline.losses import LOSSES
from softcache.pipeline.losses.long_tail import require_counts
from tests.helpers.commands import Stages
from tests.helpers.formulas_of_logits import soft_f1
from tests.helpers.tensors import Case, draw_labels, draw_normal, make_case, make_class_counts

COUNTING = ["logit_adjusted", "balanced_softmax", "balanced_kd"]
SPECS = [*COUNTING, "dive", "soft_f1", "soft_f1:average=weighted", "soft_f1:average=micro"]
STUDENT = ("--arch", "mlp:8", "--epochs", 1, "--batch-size", 50)


def value(example: Case) -> float:
    return float(example.value().detach())


def with_counts(example: Case, counts: torch.Tensor) -> Case:
    example.context = LossContext(counts=counts)
    example.part = example.loss.build_part(example.outputs, example.target, example.context)
    return example


# F1


@pytest.mark.parametrize("average", ["macro", "weighted", "micro"])
@pytest.mark.parametrize(("K", "labels_from"), [(2, 2), (5, 5), (10, 6), (10, 1), (100, 40)])
def test_soft_f1_of_one_hot_predictions_is_that_of_scikit_learn(average: str, K: int, labels_from: int) -> None:
    """Some classes are predicted but have no row, and some have neither predictions nor rows."""
    seen = set()
    for seed in range(5):
        labels, guess = (
            draw_labels(40, labels_from, seed),
            draw_labels(40, max(2, K // 2), seed + 50) + K - max(2, K // 2),
        )
        guess = torch.where(torch.rand(40, generator=torch.Generator().manual_seed(seed)) < 0.5, labels, guess)
        example = make_case(f"soft_f1:average={average}", 40, K, labels=labels)
        example.logits = 1e4 * torch.nn.functional.one_hot(guess, K).double()
        present = np.unique(labels) if average == "macro" else None
        expected = 1 - f1_score(labels, guess, labels=present, average=average, zero_division=0)
        assert value(example) == pytest.approx(expected, abs=2e-8)  # 1e-8 beside at least one row
        seen.add(round(expected, 6))
    assert len(seen) > 1


def test_micro_f1_is_the_mean_probability_of_the_labels() -> None:
    example = make_case("soft_f1:average=micro", 7, 5)
    p = example.logits.softmax(1)[torch.arange(7), example.target.labels]
    assert value(example) == pytest.approx(1 - float(p.mean()), rel=1e-12)


def test_the_f1_of_a_batch_is_not_the_mean_of_its_rows() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    whole = make_case("soft_f1", 4, 3, labels=labels)
    single = []
    for i in range(4):
        row = make_case("soft_f1", 1, 3, labels=labels[i : i + 1])
        row.logits = whole.logits[i : i + 1]
        single.append(value(row))
    assert abs(value(whole) - sum(single) / 4) > 1e-3


@pytest.mark.parametrize("average", ["macro", "weighted", "micro"])
def test_f1_of_mixup_views_counts_both_labels_by_their_shares(average: str) -> None:
    example = make_case(f"soft_f1:average={average}", 6, 5, labels=torch.tensor([0, 1, 2, -1, 3, 4]))
    share = torch.tensor([0.0, 0.2, 0.5, 0.6, 1.0, 0.9], dtype=torch.float64)
    example.target = replace(example.target, partner=torch.tensor([3, 3, 2, 0, 1, -1]), share=share)
    assert value(example) == pytest.approx(soft_f1(example), rel=1e-9)
    leaves = example.leaves()
    (gradient,) = torch.autograd.grad(example.value(), leaves)
    assert (gradient[[3, 5]] == 0).all(), "half of the view has no label"
    assert (gradient[[0, 1, 2, 4]].abs().sum(1) > 0).all()


@pytest.mark.parametrize("average", ["macro", "weighted", "micro"])
def test_a_better_student_has_a_smaller_f1_term_and_a_perfect_one_zero(average: str) -> None:
    example = make_case(f"soft_f1:average={average}", 30, 10)
    right = torch.nn.functional.one_hot(example.target.labels, 10).double()
    found = []
    for sure in (0.0, 1.0, 3.0, 10.0, 100.0):
        example.logits = sure * right
        found.append(value(example))
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.7
    assert found[-1] == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("spec", ["soft_f1", "soft_f1:average=weighted", "soft_f1:average=micro"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_f1_of_logits_in_half_precision_is_that_of_the_same_numbers_in_double(spec: str, dtype: torch.dtype) -> None:
    """In bfloat16, a sum over the 512 rows would have two correct digits."""
    labels = draw_labels(512, 10)
    labels[::5] = -1
    example = make_case(spec, 512, 10, labels=labels, dtype=dtype)
    exact = make_case(spec, 512, 10, labels=labels)
    exact.logits = example.logits.double()
    assert value(example) == pytest.approx(value(exact), rel=1e-5)


# Adjusted cross entropy


def test_balanced_softmax_is_logit_adjustment_at_tau_1() -> None:
    for seed in range(5):
        one, other = (make_case(spec, seed=seed) for spec in ("balanced_softmax", "logit_adjusted"))
        assert value(one) == pytest.approx(value(other), rel=1e-12)
        leaves = one.leaves() + other.leaves()
        gradients = torch.autograd.grad(one.value() + other.value(), leaves)
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("labels", [None, [3, -1, 0, -1, 9]])
def test_with_equal_counts_or_tau_0_logit_adjustment_is_cross_entropy(labels: list[int] | None) -> None:
    kept = None if labels is None else torch.tensor(labels)
    hard = value(make_case("hard", labels=kept))
    assert value(make_case("logit_adjusted:tau=0", labels=kept)) == pytest.approx(hard, rel=1e-12)
    for spec in ("logit_adjusted:tau=3", "balanced_softmax"):
        even = with_counts(make_case(spec, labels=kept), torch.full((10,), 70))
        assert value(even) == pytest.approx(hard, rel=1e-12)
        assert value(make_case(spec, labels=kept)) != pytest.approx(hard, rel=1e-3)


@pytest.mark.parametrize(("spec", "balanced"), [("balanced_softmax", True), ("logit_adjusted", True), ("hard", False)])
def test_balanced_losses_give_no_gradient_for_uninformative_images(spec: str, balanced: bool) -> None:
    """All logits are equal and labels are as frequent as their classes: the gradients of each class sum to 0."""
    counts = torch.tensor([100, 10, 1])
    example = make_case(spec, 111, 3, labels=torch.repeat_interleave(torch.arange(3), counts))
    example.logits = torch.zeros(111, 3, dtype=torch.float64)
    example = with_counts(example, counts)
    leaves = example.leaves()
    pull = torch.autograd.grad(example.value(), leaves)[0].sum(0).abs().max()
    assert (float(pull) < 1e-12) is balanced


@pytest.mark.parametrize("spec", ["logit_adjusted", "balanced_softmax"])
def test_a_mixup_view_is_weighted_between_its_two_labels(spec: str) -> None:
    share = draw_normal(5, seed=4).sigmoid()
    partner, own = torch.tensor([3, 3, 0, 7, 1]), torch.tensor([0, 1, 2, 9, 3])
    example = make_case(spec, labels=own)
    example.target = replace(example.target, partner=partner, share=share)
    expected = 0.0
    for i in range(5):
        for label, part in ((own[i], share[i]), (partner[i], 1 - share[i])):
            row = make_case(spec, 1, 10, labels=label[None])
            row.logits = example.logits[i : i + 1]
            expected += float(part) * value(row) / 5
    assert value(example) == pytest.approx(expected, rel=1e-12)


# Balanced teachers


@pytest.mark.parametrize("T", [0.5, 2.0, 20.0])
def test_balanced_kd_and_dive_without_reweighting_are_kd(T: float) -> None:
    plain = value(make_case(f"kd:temperature={T}"))
    for spec in (f"balanced_kd:beta=0,temperature={T}", f"dive:power=1,temperature={T}"):
        assert value(make_case(spec)) == pytest.approx(plain, rel=1e-12)
    even = with_counts(make_case(f"balanced_kd:temperature={T}"), torch.full((10,), 70))
    assert value(even) == pytest.approx(plain, rel=1e-12)
    assert value(make_case(f"balanced_kd:temperature={T}")) != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("power", [0.25, 0.5, 2.0])
def test_dive_is_kd_with_scaled_teacher_logits(power: float) -> None:
    example, plain = make_case(f"dive:power={power}"), make_case("kd:temperature=2")
    assert plain.target.logits is not None
    plain.target = replace(plain.target, logits=power * plain.target.logits)
    assert value(example) == pytest.approx(value(plain), rel=1e-12)


def test_with_beta_near_1_class_weights_are_inverse_counts() -> None:
    example, plain = make_case("balanced_kd:beta=0.999999999999"), make_case("kd:temperature=2")
    assert plain.target.logits is not None
    plain.target = replace(plain.target, logits=plain.target.logits - 2 * make_class_counts(10).log())
    assert value(example) == pytest.approx(value(plain), rel=1e-6)


# Extreme counts


@pytest.mark.parametrize("spec", [*COUNTING, "balanced_kd:beta=0.9999999999999999", "balanced_kd:beta=1e-300"])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 2e-1)])
def test_counts_from_one_to_a_hundred_million_keep_the_precision_of_the_logits(
    spec: str, dtype: torch.dtype, rel: float
) -> None:
    counts = torch.tensor([1, 2, 10**8, 70_000])
    example = with_counts(make_case(spec, 6, 4, dtype=dtype), counts)
    exact = with_counts(make_case(spec, 6, 4), counts)
    leaves = example.leaves()
    assert torch.autograd.grad(example.value(), leaves)[0].isfinite().all()
    assert value(example) == pytest.approx(value(exact), rel=rel)


# Which labels are counted


def test_counts_are_of_visible_labels() -> None:
    counts = count_classes(np.array([2, -1, 0, 2, -1]), 4)
    assert (counts.dtype, counts.tolist()) == (np.int64, [1, 0, 2, 0])


@pytest.mark.parametrize("name", COUNTING)
def test_a_class_without_a_row_raises_an_error_with_its_name(name: str) -> None:
    example = make_case(name, K=4)
    for counts, classes, message in (
        ([5, 0, 2, 1], (), "class 1 has no labelled training row: leave the loss out, or keep labels of every class"),
        ([5, 0, 2, 0], (), "class 1 has no labelled training row (2 of 4 classes have none): leave the loss out"),
        ([5, 0, 2, 1], ("cat", "dog", "emu", "fox"), "class 'dog' has no labelled training row: leave"),
    ):
        with pytest.raises(UsageError) as error:
            require_counts(LOSSES[name], torch.tensor(counts), classes)
        assert f"loss '{name}': {message}" in str(error.value)
        with pytest.raises(UsageError, match="has no labelled training row"):
            example.loss.build_part(example.outputs, example.target, LossContext(counts=torch.tensor(counts)))
    missing = f"loss '{name}' needs the number of labels of each class, and these images have none: leave it out"
    with pytest.raises(UsageError, match=missing):
        example.loss.build_part(example.outputs, example.target, LossContext())


def test_class_counts_are_a_part_that_is_not_saved_in_checkpoints() -> None:
    assert {name for name, loss in LOSSES.items() if loss.needs_counts} == set(COUNTING)
    for spec in SPECS:
        module = make_case(spec).part
        assert (module is not None) == (spec in COUNTING)
        assert module is None or (module.counts.tolist() == make_class_counts(10).tolist() and not module.state_dict())


# Training a student


@pytest.mark.parametrize("spec", SPECS)
def test_a_student_trains(spec: str, tiny: Path, stages: Stages) -> None:
    command = ("student", "--cache", tiny / "cache", *STUDENT, "--loss", spec, "--out", "r")
    stages(*command, "--epochs", 5, "--learning-rate", 0.2)
    epochs = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert 0 <= epochs[-1]["loss"] < epochs[0]["loss"]
    assert math.isfinite(epochs[-1]["val_f1_macro"])


def test_a_student_with_few_labels_counts_only_these(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[int]] = {}
    step = training.train_step

    def noted(active, *rest):  # type: ignore[no-untyped-def]
        seen.update({name: part.counts.tolist() for name, part in active.state.parts.items()})
        return step(active, *rest)

    monkeypatch.setattr(training, "train_step", noted)
    losses = ("--loss", "balanced_kd", "--loss", "balanced_softmax")
    student = ("student", "--cache", tiny / "cache", *STUDENT, *losses)
    stages(*student, "--labelled", 20)
    assert seen == dict.fromkeys(("balanced_kd", "balanced_softmax"), [2] * 10)
    stages(*student)
    digits = load_transfer_set("digits", Path("none"), val_fraction=0.125, train_size=300).splits["train"]
    assert seen["balanced_kd"] == np.bincount(digits.labels).tolist()


def test_a_class_without_visible_labels_raises_an_error_before_a_folder_is_made(
    tmp_path: Path, stages: Stages
) -> None:
    """40 images of one digit and 3 of another: of 4 labels drawn by class none is of the second digit."""
    digits = load_transfer_set("digits", Path("none"), val_fraction=0.125).splits["train"]
    for name, digit, n in (("common", 0, 40), ("rare", 1, 3)):
        for split, some in (("train", n), ("val", 2)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in np.flatnonzero(digits.labels == digit)[:some]:
                path = tmp_path / "data" / split / name / f"{i}.png"
                Image.fromarray(digits.images.pixels[i, 0].numpy()).save(path)  # type: ignore[attr-defined]
    data = ("--data", f"folder:{tmp_path / 'data'}")
    stages("teacher", *data, "--arch", "mlp:8", "--epochs", 1, "--out", "t")
    stages("teacher-cache", *data, "--weights", "t", "--draws", 1, "--out", "c")
    student = ("student", *data, "--cache", "c", *STUDENT, "--loss", "kd", "--loss")
    for name in COUNTING:
        line = stages.fails(2, *student, name, "--labelled", 4, "--out", "r")
        assert f"loss '{name}': class 'rare' has no labelled training row: leave the loss out" in line
    assert not Path("r").exists()
    for name in COUNTING:
        stages(*student, name)


@pytest.mark.parametrize("name", [*COUNTING, "soft_f1"])
def test_images_without_labels_raise_an_error(name: str, tmp_path: Path, stages: Stages) -> None:
    digits = load_transfer_set("digits", Path("none"), val_fraction=0.125, train_size=30).splits["train"]
    (tmp_path / "images").mkdir()
    for i in range(30):
        Image.fromarray(digits.images.pixels[i, 0].numpy()).save(  # type: ignore[attr-defined]
            tmp_path / f"images/{i:02d}.png"
        )
    stages("teacher", "--train-size", 100, "--arch", "mlp:8", "--epochs", 1, "--out", "t")
    data = ("--data", f"folder:{tmp_path / 'images'}")
    stages("teacher-cache", *data, "--weights", "t", "--draws", 1, "--out", "c")
    line = stages.fails(2, "student", *data, "--cache", "c", *STUDENT, "--loss", "kd", "--loss", name, "--out", "r")
    assert f"loss '{name}'" in line
    assert "and these images have none: leave it out" in line
    assert not Path("r").exists()
