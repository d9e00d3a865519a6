"""`softcache losses`: every loss with its knobs, their defaults, and what it reads."""

import json
from dataclasses import fields
from typing import Any

from softcache.pipeline.losses import LOSSES, Loss
from softcache.pipeline.losses.base import Ramp
from softcache.pipeline.losses.feature_base import FeatureLoss
from softcache.stages.cli.configs import ListConfig
from softcache.stages.cli.console import Console


def run(config: ListConfig) -> None:
    """One line per loss, and one of its knobs."""
    console = Console(config.json)
    if config.json:
        return console.print_json(json.dumps({name: _record(loss) for name, loss in LOSSES.items()}))
    for name, loss in LOSSES.items():
        record = _record(loss)
        console.print(f"{name}: {record['what']}")
        console.print("    " + ", ".join(f"{k}={v}" for k, v in record["knobs"].items()))
        console.print(f"    reads {', '.join(record['reads'])}")


def _record(loss: Loss) -> dict[str, Any]:
    knobs = {f.name: _format_value(getattr(loss, f.name)) for f in fields(loss)}  # type: ignore[arg-type]
    reads = ["labels"] * loss.needs_labels + ["logits"] * loss.needs_logits
    if isinstance(loss, FeatureLoss):
        reads.append(f"taps ({loss.statistic})")
    reads += ["the teacher's last layer"] * loss.needs_head + ["counts of the classes"] * loss.needs_counts
    return {"what": (loss.__doc__ or "").splitlines()[0], "knobs": knobs, "reads": reads}


def _format_value(value: Any) -> Any:
    if isinstance(value, Ramp):
        return f"{value.start:g}->{value.end:g}" + (f"@{value.epochs}" if value.epochs else "")
    return value if not isinstance(value, bool) else str(value).lower()
