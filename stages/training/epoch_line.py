"""A line of metrics.jsonl: what an epoch came to."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .step import TrainingRun, term_names


def make_epoch_line(
    job: TrainingRun, epoch: int, means: Sequence[float], norms: Sequence[float], seen: Mapping[str, float]
) -> dict[str, Any]:
    """The line of an epoch, counted from 0, without its seconds. seen: the figures of validation.

    loss and loss_TERM are means over the steps, weighted as they go backward (means: one for each term).
    gradient_TERM is the L2 norm of that weighted term's own gradient with respect to all trained weights, on the
    epoch's last step, before clipping (norms; GradNorm, Chen et al. 2018, section 3, balances terms by it); one that
    is no finite number is left out. learning_rate is that of the last step.
    """
    called = term_names(job.losses)
    gradients = {name: norm for name, norm in zip(called, norms, strict=True) if math.isfinite(norm)}
    return {
        "epoch": epoch + 1,
        "loss": sum(means),
        **{f"loss_{name}": mean for name, mean in zip(called, means, strict=True)},
        **{f"gradient_{name}": norm for name, norm in gradients.items()},
        "learning_rate": job.config.learning_rate * job.learning_rate_factor((epoch + 1) * job.steps - 1),
        **{f"val_{name}": value for name, value in seen.items()},
    }
