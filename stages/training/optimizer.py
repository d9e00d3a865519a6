"""Momentum SGD and AdamW by the functions of torch.optim, with the state dict of its classes.

An object of torch.optim loads PyTorch's compiler when it is made and in every step, 1.3 s of a student's start, and
its step spends as long on hooks as a small network on its forward pass. The arithmetic is the same, to the bit.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from softcache.stages.cli.option_groups import TrainingOptions

BETAS, EPSILON = (0.9, 0.999), 1e-8


class Optimizer(Protocol):
    """An optimiser of a training."""

    def step(self, learning_rate: float) -> None:
        """Update the weights that have a gradient, in place."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch.optim's class of that name does."""

    def load_state_dict(self, record: Mapping[str, Any]) -> None:
        """Restore a state. Raises ValueError where it is one of other weights."""


def build_optimizer(config: TrainingOptions, weights: Sequence[nn.Parameter]) -> Optimizer:
    """Build the optimiser of the options.

    Args:
        config: optimiser, momentum, nesterov and weight decay.
        weights: what it updates.
    """
    if config.optimizer == "adamw":
        return AdamW(weights, config.weight_decay)
    nesterov = config.nesterov and config.momentum > 0
    return SGD(weights, config.momentum, nesterov, config.weight_decay)


class SGD:
    """torch.optim.SGD(weights, momentum=…, nesterov=…, weight_decay=…, fused=True); the rate is given to each step.

    Args:
        weights: what it updates.
        momentum: 0 or more, below 1.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: of all weights.
    """

    def __init__(self, weights: Sequence[nn.Parameter], momentum: float, nesterov: bool, weight_decay: float):
        self.weights = list(weights)
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.buffers: list[torch.Tensor | None] = [None] * len(self.weights)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the weights that have a gradient, in place."""
        places, weights, gradients = _find_gradients(self.weights)
        buffers: list[torch.Tensor | None] = [None] * len(places)
        if self.momentum:
            # From zero, momentum * 0 + gradient is the first buffer, also for a weight whose first gradient comes
            # late, where the fused function of PyTorch would fail.
            for i, weight in zip(places, weights, strict=True):
                if self.buffers[i] is None:
                    self.buffers[i] = torch.zeros_like(weight)
            buffers = [self.buffers[i] for i in places]
        sgd(
            weights,
            gradients,
            buffers,
            fused=True,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=learning_rate,
            dampening=0,
            nesterov=self.nesterov,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch.optim.SGD does."""
        state = {i: {"momentum_buffer": buffer} for i, buffer in enumerate(self.buffers) if buffer is not None}
        options = {"momentum": self.momentum, "dampening": 0, "nesterov": self.nesterov}
        return {"state": state, "param_groups": [_make_group(options, self.weight_decay, self.weights)]}

    def load_state_dict(self, record: Mapping[str, Any]) -> None:
        """Restore a state. Raises ValueError where it is one of other weights."""
        self.buffers = [values.get("momentum_buffer") for values in _read_state(record, self.weights)]


class AdamW:
    """torch.optim.AdamW(weights, weight_decay=…, fused=True); the rate is given to each step.

    Args:
        weights: what it updates.
        weight_decay: of all weights.
    """

    def __init__(self, weights: Sequence[nn.Parameter], weight_decay: float):
        self.weights = list(weights)
        self.weight_decay = weight_decay
        self.state: list[dict[str, torch.Tensor]] = [{} for _ in self.weights]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the weights that have a gradient, in place."""
        places, weights, gradients = _find_gradients(self.weights)
        for i, weight in zip(places, weights, strict=True):
            if not self.state[i]:
                self.state[i] = {
                    "step": torch.zeros((), device=weight.device),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }
        adamw(
            weights,
            gradients,
            [self.state[i]["exp_avg"] for i in places],
            [self.state[i]["exp_avg_sq"] for i in places],
            max_exp_avg_sqs=[],
            state_steps=[self.state[i]["step"] for i in places],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=learning_rate,
            weight_decay=self.weight_decay,
            eps=EPSILON,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch.optim.AdamW does."""
        options = {
            "betas": BETAS,
            "eps": EPSILON,
            "amsgrad": False,
            "capturable": False,
            "decoupled_weight_decay": True,
        }
        group = _make_group(options, self.weight_decay, self.weights)
        return {"state": {i: dict(values) for i, values in enumerate(self.state) if values}, "param_groups": [group]}

    def load_state_dict(self, record: Mapping[str, Any]) -> None:
        """Restore a state. Raises ValueError where it is one of other weights."""
        self.state = _read_state(record, self.weights)


def _find_gradients(weights: Sequence[nn.Parameter]) -> tuple[list[int], list[torch.Tensor], list[torch.Tensor]]:
    """Return the places, the weights and the gradients of those weights that have one."""
    places = [i for i, weight in enumerate(weights) if weight.grad is not None]
    return places, [weights[i] for i in places], [weights[i].grad for i in places]  # type: ignore[misc]


def _make_group(options: dict[str, Any], weight_decay: float, weights: Sequence[nn.Parameter]) -> dict[str, Any]:
    common = {"maximize": False, "foreach": None, "differentiable": False, "fused": True}
    return {**options, **common, "weight_decay": weight_decay, "params": list(range(len(weights)))}


def _read_state(record: Mapping[str, Any], weights: Sequence[nn.Parameter]) -> list[dict[str, torch.Tensor]]:
    """Return the values of each weight, on its device."""
    (group,) = record["param_groups"]
    if len(group["params"]) != len(weights):
        raise ValueError(f"an optimiser of {len(group['params'])} weights, not {len(weights)}")
    state: list[dict[str, torch.Tensor]] = []
    for i, weight in enumerate(weights):
        values = {name: value for name, value in record["state"].get(i, {}).items() if value is not None}
        for name, value in values.items():
            if name != "step" and value.shape != weight.shape:
                raise ValueError(f"{name} of weight {i} is {list(value.shape)}, not {list(weight.shape)}")
        # In the memory layout of the file, which is that of the weight when it was saved.
        state.append({name: value.to(weight.device) for name, value in values.items()})
    return state
