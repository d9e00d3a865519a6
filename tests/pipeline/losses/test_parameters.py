"""The parameters of losses as objects obey the rules of their texts, and a loss without logits is one line."""

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch

from softcache import Batch, DistillationLoss, UsageError, losses
from softcache.pipeline.losses import LOSSES, format_loss, resolve_ramps
from softcache.pipeline.losses.base import Ramp, check_is_object, check_progress

Make = Callable[[], object]


def negated(outputs: object, batch: object) -> torch.Tensor:
    return torch.zeros(())


REFUSED: list[tuple[Make, str]] = [
    (lambda: losses.KD(temperature=0), "loss 'kd': temperature=0 is below 0.001"),
    (lambda: losses.KD(weight=-1), "loss 'kd': weight=-1 is below 0"),
    (lambda: losses.KD(weight=float("nan")), "weight=nan is not finite"),
    (lambda: losses.KD(weight="4"), "weight='4' is a str, not a number"),  # type: ignore[arg-type]
    (lambda: losses.KD(weight=True), "weight=True is a bool, not a number"),
    (lambda: losses.KD(weight=None), "weight is None, not a number"),  # type: ignore[arg-type]
    (lambda: losses.KD(temperature=Ramp(4, 0)), "is below 0.001"),
    (lambda: losses.CTKD(start=Ramp(1, 2)), "start cannot change during training"),  # type: ignore[arg-type]
    (lambda: losses.Hard(smoothing=2), "smoothing=2 is above 1"),
    (lambda: losses.BalancedKD(beta=1), "beta=1 is not below 1"),
    (lambda: losses.DKD(standardize="no"), "standardize='no' is a str, not True or False"),  # type: ignore[arg-type]
    (lambda: losses.CRD(negatives=-1), "negatives=-1 is not a whole number from 1 on"),
    (lambda: losses.CRD(negatives=2.5), "negatives=2.5 is not a whole number"),  # type: ignore[arg-type]
    (lambda: losses.Hint(teacher=["1"]), r"teacher=\['1'\] is a list, not a str: join several by \+"),  # type: ignore[arg-type]
    (lambda: losses.Output(kind=3), "kind=3 is an int, not a str"),  # type: ignore[arg-type]
    (lambda: losses.Custom(negated, weight=-1), "loss 'negated': weight=-1 is below 0"),
    (lambda: losses.Custom(negated, name=3), "Custom: name=3 is an int"),  # type: ignore[arg-type]
    (lambda: Ramp("a", 1), "Ramp: start='a' is a str, not a number"),  # type: ignore[arg-type]
    (lambda: Ramp(0, float("inf")), "Ramp: end=inf is not finite"),
    (lambda: Ramp(0, 1, -1), "Ramp: epochs -1 is not between 0 and 1000000"),
    (lambda: Ramp(0, 1, 2.5), "Ramp: epochs=2.5 is a float"),  # type: ignore[arg-type]
    (lambda: Ramp(0, 1).value_at(3, 3), "epoch 3 is not between 0 and 2: epochs are counted from 0"),
    (lambda: check_progress(-1, 3), "epoch -1 is not between 0 and 2"),
    (lambda: check_progress(0, 0), "epochs 0 is below 1"),
    (lambda: check_progress(0, "3"), "epochs='3' is a str"),  # type: ignore[arg-type]
    (lambda: check_is_object(losses.KD), r"not the class KD: give KD\(\)"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_a_parameter_of_an_object_is_refused_in_one_line(make: Make, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.0005, 1.0, 1.5, 2.0])
def test_a_text_and_an_object_are_refused_for_the_same_numbers(value: float) -> None:
    for loss in LOSSES.values():
        for parameter in fields(loss):  # type: ignore[arg-type]
            if parameter.type in (str, bool):
                continue
            messages = []
            for make in (
                lambda: losses.parse_losses([f"{loss.name}:{parameter.name}={value}"]),  # noqa: B023
                lambda: type(loss)(**{parameter.name: value}),  # noqa: B023
            ):
                try:
                    make()
                    messages.append("")
                except UsageError as error:
                    messages.append(str(error).partition("': ")[2])
            assert messages[0] == messages[1]


def test_numbers_of_numpy_become_plain_ones() -> None:
    loss = losses.KD(temperature=np.float32(0.5), weight=Ramp(np.float64(1), np.int64(0)))  # type: ignore[arg-type]
    assert format_loss(loss) == "kd:weight=1.0->0.0,temperature=0.5"
    assert type(losses.CRD(negatives=np.int64(5)).negatives) is int  # type: ignore[arg-type]


def test_a_ramp_may_end_a_rounding_error_below_the_lowest_value() -> None:
    loss = losses.KD(temperature=Ramp(4.0, 0.001))
    current = resolve_ramps(loss, 1, 2)
    assert isinstance(current, losses.KD)
    assert current.temperature == 4.0 + (0.001 - 4.0)
    assert isinstance(loss.temperature, Ramp)


@pytest.mark.parametrize("spec", ["kd", "dkd", "logit_mse", "dive"])
def test_a_batch_without_targets_is_named(spec: str) -> None:
    rows = torch.arange(4)
    batch = Batch(index=rows, draw=0, views=torch.zeros(4, 1, 2, 2, dtype=torch.uint8), labels=rows)
    message = f"loss '{spec}' reads the teacher's logits, and this batch has none"
    with pytest.raises(UsageError, match=message):
        DistillationLoss(spec)(torch.zeros(4, 5), batch)
    with pytest.raises(UsageError, match="reads the teacher's logits, and this batch has none"):
        DistillationLoss(spec, missing_to_labels=True)(torch.zeros(4, 5), batch)
