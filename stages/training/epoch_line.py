"""The record of an epoch, one line of metrics.jsonl."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .run import TrainingRun


def make_epoch_line(
    run: TrainingRun, epoch: int, means: Sequence[float], norms: Sequence[float], validation: Mapping[str, float]
) -> dict[str, Any]:
    """Make the record of an epoch, without its seconds.

    Args:
        run: the training.
        epoch: counted from 0.
        means: each weighted term, averaged over the steps.
        norms: the L2 norm of each weighted term's own gradient with respect to all trained weights, at the epoch's
            last step and before clipping.
        validation: metrics on the validation split.

    Returns:
        `epoch` (from 1), `loss`, `loss_TERM`, `gradient_TERM` where it is finite, `learning_rate` of the last step,
        `val_METRIC`.

    Source: the gradient norms: Chen et al. 2018, "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
        Multitask Networks", section 3, where they balance the terms.
    """
    names = run.criterion.names
    gradients = {name: norm for name, norm in zip(names, norms, strict=True) if math.isfinite(norm)}
    return {
        "epoch": epoch + 1,
        "loss": sum(means),
        **{f"loss_{name}": mean for name, mean in zip(names, means, strict=True)},
        **{f"gradient_{name}": norm for name, norm in gradients.items()},
        "learning_rate": run.config.learning_rate * run.schedule((epoch + 1) * run.steps - 1),
        **{f"val_{name}": value for name, value in validation.items()},
    }
