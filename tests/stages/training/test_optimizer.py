"""The optimisers of a training: the numbers and the state of torch.optim's, to the bit."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from softcache.stages.cli.configs import StudentConfig
from softcache.stages.training.optimizer import Optimizer, build_optimizer

CONFIG = StudentConfig(optimizer="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4, learning_rate=0.05)
KINDS = {
    "momentum": replace(CONFIG, nesterov=False),
    "nesterov": CONFIG,
    "no momentum": replace(CONFIG, momentum=0.0),
    "no weight decay": replace(CONFIG, weight_decay=0.0),
    "adamw": replace(CONFIG, optimizer="adamw", weight_decay=0.1),
}


def build_reference(config: StudentConfig, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(weights, weight_decay=config.weight_decay, fused=True)
    nesterov = config.nesterov and config.momentum > 0
    options: dict[str, Any] = {"momentum": config.momentum, "nesterov": nesterov, "weight_decay": config.weight_decay}
    return torch.optim.SGD(weights, lr=0.1, fused=True, **options)


def make_weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(7, 5), (5,), (3, 4, 3, 3), ()]]
    weights[2].data = weights[2].data.contiguous(memory_format=torch.channels_last)
    return weights


def set_gradients(weights: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)


def take_steps(optimizer: Optimizer | torch.optim.Optimizer, weights: list[nn.Parameter], steps: range) -> None:
    """Steps with gradients that follow from the number of the step."""
    for step in steps:
        set_gradients(weights, step)
        rate = 0.05 / (1 + step)
        if isinstance(optimizer, torch.optim.Optimizer):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        else:
            optimizer.step(rate)


def assert_equal(weights: list[nn.Parameter], expected: list[nn.Parameter]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_those_of_torch_optim_to_the_bit(kind: str) -> None:
    weights, expected = make_weights(), make_weights()
    take_steps(build_optimizer(KINDS[kind], weights), weights, range(8))
    take_steps(build_reference(KINDS[kind], expected), expected, range(8))
    assert_equal(weights, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_whose_first_gradient_comes_late_begins_then(kind: str) -> None:
    weights, expected = make_weights(), make_weights()
    ours = build_optimizer(KINDS[kind], weights)
    take_steps(ours, weights[:3], range(3))  # the last weight has no gradient
    for step in range(3, 8):
        set_gradients(weights[:3], step)
        set_gradients(weights[3:], step)
        ours.step(0.05 / (1 + step))
    take_steps(build_reference(KINDS[kind], expected[:3]), expected[:3], range(8))
    take_steps(build_reference(KINDS[kind], expected[3:]), expected[3:], range(3, 8))
    assert_equal(weights, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stopped_at", [0, 2, 5])
def test_checkpoints_of_torch_optim_go_on_and_those_of_ours_go_on_there(kind: str, stopped_at: int) -> None:
    weights, expected = make_weights(), make_weights()
    ours, reference = build_optimizer(KINDS[kind], weights), build_reference(KINDS[kind], expected)
    take_steps(ours, weights, range(stopped_at))
    take_steps(reference, expected, range(stopped_at))
    resumed, resumed_reference = build_optimizer(KINDS[kind], weights), build_reference(KINDS[kind], expected)
    resumed.load_state_dict(copy.deepcopy(reference.state_dict()))
    # torch.optim keeps the rate in its state, where it was for the last step.
    group = {"lr": 0.1, **ours.state_dict()["param_groups"][0]}
    resumed_reference.load_state_dict(copy.deepcopy({**ours.state_dict(), "param_groups": [group]}))
    take_steps(resumed, weights, range(stopped_at, 8))
    take_steps(resumed_reference, expected, range(stopped_at, 8))
    assert_equal(weights, expected)


def test_the_state_of_other_weights_is_refused() -> None:
    weights = make_weights()
    ours = build_optimizer(CONFIG, weights)
    take_steps(ours, weights, range(4))
    with pytest.raises(ValueError, match="4 weights, not 3"):
        build_optimizer(CONFIG, weights[:3]).load_state_dict(ours.state_dict())
    with pytest.raises(ValueError, match=r"weight 0 is \[7, 5\], not \[5\]"):
        build_optimizer(CONFIG, weights[::-1][2:] + weights[2:]).load_state_dict(ours.state_dict())
