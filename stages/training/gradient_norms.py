"""The gradient norm of each term, measured on the graph of one step.

Each line of metrics.jsonl has the L2 norm of the gradient of each weighted term alone, with respect to all trained
weights, at the epoch's last step and before clipping. It shows which term dominates.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn


class GradientNorms:
    """The gradient norms of the terms of a step. Create it before the step's backward pass, `complete` it afterwards.

    It changes no bit of a weight: gradients of single terms are computed on the graph of the step, beside its backward
    pass. The gradient of the largest term is the step's gradient minus those of the other terms, which is correct up
    to rounding and saves a pass through the network. A single term needs no additional pass.

    Args:
        terms: the weighted terms, scalars.
        weights: all trained weights.
        average: returns the mean over ranks of a flat gradient.
        sizes: the absolute values of the terms, the same on every rank.

    Source: Chen et al. 2018, "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
        Networks", section 3.
    """

    def __init__(
        self,
        terms: Sequence[torch.Tensor],
        weights: Sequence[nn.Parameter],
        average: Callable[[torch.Tensor], torch.Tensor] = lambda flat: flat,
        sizes: Sequence[float] = (),
    ):
        self._weights, self._count = weights, len(terms)
        self._largest = max(range(len(terms)), key=lambda i: sizes[i]) if sizes else 0
        self._others = {
            i: average(flatten_gradients(_term_gradient(term, weights), weights))
            for i, term in enumerate(terms)
            if i != self._largest
        }

    def complete(self) -> torch.Tensor:
        """Return the norms, float32 [terms], after the step's backward pass and before its gradients are clipped."""
        step_gradient = flatten_gradients([weight.grad for weight in self._weights], self._weights)
        gradients = self._others | {self._largest: step_gradient - sum(self._others.values())}
        return torch.stack([gradients[i].norm() for i in range(self._count)])


def _term_gradient(term: torch.Tensor, weights: Sequence[nn.Parameter]) -> Sequence[torch.Tensor | None]:
    """Return the gradient of a single term; NaN where the network's code does not allow this pass."""
    if not term.requires_grad:  # a term of frozen layers
        return [None] * len(weights)
    try:
        return torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "checkpoint is incompatible with .grad()" not in str(error):  # raised by reentrant torch.utils.checkpoint
            raise
        return [torch.full_like(weight, torch.nan) for weight in weights]


def flatten_gradients(
    gradients: Sequence[torch.Tensor | None], weights: Sequence[torch.Tensor], keep: int = 0
) -> torch.Tensor:
    """Return gradients as one vector, zeros where a weight has none.

    Args:
        gradients: one for each weight, or None.
        weights: the weights.
        keep: number of leading dimensions that are not flattened, 1 for the students of a vectorised model.
    """
    filled = [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, weights, strict=True)]
    return torch.cat([g.reshape(*g.shape[:keep], -1) for g in filled], keep)
