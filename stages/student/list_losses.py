"""`softcache losses`: list every loss with its parameters, their defaults, and what it reads."""

import json
from dataclasses import fields
from typing import Any

from softcache.pipeline.losses import LOSSES, Loss
from softcache.pipeline.losses.base import Ramp
from softcache.pipeline.losses.feature_base import FeatureLoss, RelationalLoss
from softcache.stages.cli.configs import ListConfig
from softcache.stages.cli.console import Console


def run(config: ListConfig) -> None:
    """Print each loss: its first line of documentation, its parameters, and what it reads."""
    console = Console(config.json)
    if config.json:
        return console.print_json(json.dumps({name: describe_loss(loss) for name, loss in LOSSES.items()}))
    for name, loss in LOSSES.items():
        description = describe_loss(loss)
        console.print(f"{name}: {description['what']}")
        console.print("    " + ", ".join(f"{parameter}={value}" for parameter, value in description["knobs"].items()))
        console.print(f"    reads {', '.join(description['reads'])}")


def describe_loss(loss: Loss) -> dict[str, Any]:
    """Describe a loss as plain values.

    Returns:
        what: the first line of its documentation; knobs: {parameter: default, as --loss takes it}; reads: what it
        needs of labels and teacher.
    """
    parameters = {f.name: _format_default(getattr(loss, f.name)) for f in fields(loss)}  # type: ignore[arg-type]
    reads = []
    if loss.needs_labels:
        reads.append("labels")
    if loss.needs_logits and not isinstance(loss, RelationalLoss):
        reads.append("logits")
    if isinstance(loss, FeatureLoss):
        embedding = " or an embedding" if isinstance(loss, RelationalLoss) else ""
        reads.append(f"taps ({loss.statistic}){embedding}")
    if loss.needs_head:
        reads.append("the teacher's last layer")
    if loss.needs_counts:
        reads.append("counts of the classes")
    return {"what": (loss.__doc__ or "").splitlines()[0], "knobs": parameters, "reads": reads}


def _format_default(value: Any) -> Any:
    if isinstance(value, Ramp):
        return f"{value.start:g}->{value.end:g}" + (f"@{value.epochs}" if value.epochs else "")
    return str(value).lower() if isinstance(value, bool) else value
