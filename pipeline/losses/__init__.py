"""Losses: one frozen dataclass each, rows of one table. A loss sees tensors, never models.

`--loss kd:temperature=4,weight=0.9` names a row and sets its knobs. Any numeric knob may be a ramp,
`temperature=8->1`: linear over the training, which is what temperature annealing and teacher annealing are.
"""

from collections.abc import Sequence
from dataclasses import fields, replace

from data.errors import WrongCommand, unknown
from data.spec import check_knobs, number, parse

from .hard import Hard
from .hint import Hint
from .loss import Loss, Ramp
from .soft import KD, LogitMSE

__all__ = ["LOSSES", "Loss", "at", "parse_losses"]

LOSSES: dict[str, Loss] = {loss.name: loss for loss in (Hard(), KD(), LogitMSE(), Hint())}


def parse_losses(specs: Sequence[str]) -> tuple[Loss, ...]:
    """`("kd:temperature=4", "hard:weight=0.1")` -> losses. Raises WrongCommand for what does not exist."""
    losses = tuple(_parse_one(spec) for spec in specs)
    names = [loss.name for loss in losses]
    for name in names:
        if names.count(name) > 1 and name != "hint":
            raise WrongCommand(f"loss '{name}' is given twice: one --loss with one weight each")
    if not losses:
        raise WrongCommand("no loss: name at least one, such as --loss kd:temperature=4")
    return losses


def _parse_one(spec: str) -> Loss:
    name, given = parse(spec, "loss")
    if name not in LOSSES:
        raise unknown("loss", name, LOSSES)
    loss = LOSSES[name]
    kinds = {f.name: f.type for f in fields(loss)}  # type: ignore[arg-type]
    check_knobs(spec, "loss", given, kinds)
    values = {k: text if kinds[k] is str else _numeric(spec, k, text) for k, text in given.items()}
    return replace(loss, **values)  # type: ignore[type-var]


def _numeric(spec: str, knob: str, text: str) -> float | Ramp:
    start, arrow, end = text.partition("->")
    low = 1e-3 if knob == "temperature" else 0.0
    values = [number(spec, "loss", knob, part) for part in ((start, end) if arrow else (start,))]
    if min(values) < low:
        raise WrongCommand(f"loss '{spec}': {knob}={text} is below {low:g}")
    if knob == "smoothing" and max(values) > 1:
        raise WrongCommand(f"loss '{spec}': {knob}={text} is above 1")
    return Ramp(*values) if arrow else values[0]


def at(loss: Loss, progress: float) -> Loss:
    """The loss with every ramp at its value for progress 0 … 1 of the training."""
    ramps = {f.name: getattr(loss, f.name) for f in fields(loss)}  # type: ignore[arg-type]
    now = {k: v.at(progress) for k, v in ramps.items() if isinstance(v, Ramp)}
    return replace(loss, **now) if now else loss  # type: ignore[type-var]
