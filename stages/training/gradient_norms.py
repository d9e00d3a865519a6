"""The size of each term's gradient, measured on the graph of one step.

Each epoch's line in metrics.jsonl has the L2 norm of the gradient of each weighted term alone, with respect to all
trained weights, at the epoch's last step and before clipping: which term leads (GradNorm, Chen et al. 2018, section
3).
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn


class GradientNorms:
    """Gradient norms of the terms of a step. Make it before the step's backward pass, `complete` it afterwards.

    It changes no bit of a weight: gradients of single terms are taken beside the step's own, on the same graph. The
    largest term's is what the others leave of the step's, which is right but for rounding and saves a pass through
    the network; one term alone costs no pass.

    Args:
        terms: the weighted terms, scalars.
        weights: all trained weights.
        average: the mean over ranks of a flat gradient, where there are several.
        sizes: the absolute values of the terms, the same on every rank.
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
        """Return the norms, float32 [terms], from the gradients that the step's backward pass has left."""
        whole = flatten_gradients([weight.grad for weight in self._weights], self._weights)
        gradients = self._others | {self._largest: whole - sum(self._others.values())}
        return torch.stack([gradients[i].norm() for i in range(self._count)])


def _term_gradient(term: torch.Tensor, weights: Sequence[nn.Parameter]) -> Sequence[torch.Tensor | None]:
    """Return the gradient of a term alone; NaN where the network's own code refuses this pass."""
    if not term.requires_grad:  # of a layer that is not trained
        return [None] * len(weights)
    try:
        return torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "checkpoint is incompatible with .grad()" not in str(error):  # a reentrant one of torch.utils.checkpoint
            raise
        return [torch.full_like(weight, torch.nan) for weight in weights]


def flatten_gradients(
    gradients: Sequence[torch.Tensor | None], weights: Sequence[torch.Tensor], keep: int = 0
) -> torch.Tensor:
    """Return gradients as one vector, zeros where a weight has none.

    Args:
        gradients: one for each weight, or None.
        weights: the weights.
        keep: leading dimensions of the weights that stay, such as 1 for the students of a vectorised model.
    """
    each = [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, weights, strict=True)]
    return torch.cat([g.reshape(*g.shape[:keep], -1) for g in each], keep)
