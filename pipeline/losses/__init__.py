"""Losses: one frozen dataclass each, rows of one table. A loss sees tensors, never models.

`--loss kd:temperature=4,weight=0.9` names a row and sets its knobs. Any numeric knob may be a ramp,
`temperature=8->1`: linear over the training, which is what temperature annealing and teacher annealing are;
`weight=0->1@20` reaches its end in epoch 20 and stays there.

May import base, pipeline.batch, pipeline.taps and pipeline.teachers. Begin with `kd.py`; a new loss is a dataclass in
the file of its family and a row of LOSSES.
"""

from collections.abc import Sequence
from dataclasses import fields, replace

from softcache.base.errors import UsageError, unknown_name_error
from softcache.base.spec import check_parameters, parse_number, parse_spec

from .base import Loss, Ramp
from .classifier import SRRL, CatKD, SimKD
from .crd import CRD
from .decoupled import DIST, DKD, NKD, MultiTemperature
from .hard import Hard, TfKD
from .hint import VID, ConcatHint, Hint
from .kd import CTKD, KD, WSLD, LogitMSE, Output
from .long_tail import BalancedKD, BalancedSoftmax, DiVE, LogitAdjusted, SoftF1
from .relational import CC, NST, PKT, RKD, Attention, Similarity
from .review_kd import ReviewKD

__all__ = ["LOSSES", "Loss", "parse_losses", "resolve_ramps"]

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Hard(),
        TfKD(),
        Output(),
        KD(),
        LogitMSE(),
        DKD(),
        NKD(),
        DIST(),
        WSLD(),
        CTKD(),
        MultiTemperature(),
        LogitAdjusted(),
        BalancedSoftmax(),
        BalancedKD(),
        DiVE(),
        SoftF1(),
        Hint(),
        ConcatHint(),
        VID(),
        Attention(),
        NST(),
        Similarity(),
        RKD(),
        PKT(),
        CC(),
        SRRL(),
        CatKD(),
        SimKD(),
        CRD(),
        ReviewKD(),
    )
}


def parse_losses(specs: Sequence[str]) -> tuple[Loss, ...]:
    """`("kd:temperature=4", "hard:weight=0.1")` -> losses. Raises UsageError for what does not exist."""
    losses = tuple(_parse_one(spec) for spec in specs)
    names = [loss.name for loss in losses]
    for loss in losses:
        if names.count(loss.name) > 1 and not loss.repeatable:
            raise UsageError(f"loss '{loss.name}' is given twice: one --loss with one weight each")
    if not losses:
        raise UsageError("no loss: name at least one, such as --loss kd:temperature=4")
    if "simkd" in names and len(names) > 1:
        raise UsageError("loss 'simkd' goes alone: its student answers through the teacher's own last layer")
    if "output" in names:  # the two halves of one cost function, 0.5 each unless said
        unsaid = [spec.partition(":")[0] == "hint" and "weight" not in parse_spec(spec, "loss")[1] for spec in specs]
        losses = tuple(
            replace(loss, weight=0.5) if half else loss  # type: ignore[type-var]
            for loss, half in zip(losses, unsaid, strict=True)
        )
    return losses


def _parse_one(spec: str) -> Loss:
    name, given = parse_spec(spec, "loss")
    if name not in LOSSES:
        raise unknown_name_error("loss", name, LOSSES)
    loss = LOSSES[name]
    kinds = {f.name: f.type for f in fields(loss)}  # type: ignore[arg-type]
    check_parameters(spec, "loss", given, kinds)
    values = {k: _value(spec, k, text, kinds[k]) for k, text in given.items()}
    return replace(loss, **values)  # type: ignore[type-var]


def _value(spec: str, knob: str, text: str, kind: object) -> str | bool | float | Ramp:
    if kind is str:
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise UsageError(f"loss '{spec}': {knob}={text} is neither true nor false")
        return text == "true"
    value = _numeric(spec, knob, text)
    if kind is int:
        if not isinstance(value, float) or value != int(value) or value < 1:
            raise UsageError(f"loss '{spec}': {knob}={text} is not a whole number from 1 on")
        return int(value)
    if kind is float and isinstance(value, Ramp):
        raise UsageError(f"loss '{spec}': {knob}={text}: {knob} cannot change during training")
    return value


def _numeric(spec: str, knob: str, text: str) -> float | Ramp:
    start, arrow, rest = text.partition("->")
    end, mark, epochs = rest.partition("@")
    low = 1e-3 if knob in ("temperature", "power") else 0.0
    values = [parse_number(spec, "loss", knob, part) for part in ((start, end) if arrow else (start,))]
    if min(values) < low:
        raise UsageError(f"loss '{spec}': {knob}={text} is below {low:g}")
    if knob in ("smoothing", "correct", "reversal") and max(values) > 1:
        raise UsageError(f"loss '{spec}': {knob}={text} is above 1")
    if knob == "beta" and max(values) >= 1:
        raise UsageError(f"loss '{spec}': {knob}={text} is not below 1")
    if mark and not (epochs.isdecimal() and 0 < int(epochs) <= 1_000_000):
        raise UsageError(f"loss '{spec}': {knob}={text}: after @ comes the epoch in which {end} is reached")
    return Ramp(values[0], values[1], int(epochs or 0)) if arrow else values[0]


def resolve_ramps(loss: Loss, epoch: int, epochs: int) -> Loss:
    """The loss with every ramp at its value for an epoch, 0 … epochs - 1, of the training."""
    ramps = {f.name: getattr(loss, f.name) for f in fields(loss)}  # type: ignore[arg-type]
    now = {k: v.value_at(epoch, epochs) for k, v in ramps.items() if isinstance(v, Ramp)}
    return replace(loss, **now) if now else loss  # type: ignore[type-var]
