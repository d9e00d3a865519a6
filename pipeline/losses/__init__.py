"""Distillation losses: one frozen dataclass each, listed in the table LOSSES. A loss reads tensors, never models.

`--loss kd:temperature=4,weight=0.9` selects a loss by its name and sets its parameters. A numeric parameter may be a
ramp: `temperature=8->1` changes it linearly over the training (temperature annealing, teacher annealing), and
`weight=0->1@20` reaches the end value in epoch 20 and keeps it.

`--loss my_module:MyLoss:weight=0.5` is a loss of a user's own, see custom.py. A name of LOSSES wins over a module.

May import base, pipeline.batch, pipeline.cache, pipeline.taps and pipeline.teachers. Begin with `kd.py`. A new loss is
a dataclass in the file of its family and an entry of LOSSES.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import fields, replace

from softcache.base.errors import UsageError, unknown_name_error
from softcache.base.spec import check_parameters, parse_number, parse_spec
from softcache.base.user_modules import file_name_error
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS
from softcache.pipeline.cache.codecs import DENSE, SAMPLE

from .base import MAX_RAMP_EPOCHS, Loss, Ramp, check_parameter, to_float
from .classifier import SRRL, CatKD, SimKD
from .crd import CRD
from .custom import Custom, copy_for_training
from .custom_specs import import_own_loss, is_own_loss, split_own_spec
from .decoupled import DIST, DKD, NKD, MultiTemperature
from .embedding import Embed
from .feature_base import RelationalLoss
from .hard import Hard, TfKD
from .hint import VID, ConcatHint, Hint
from .kd import CTKD, KD, WSLD, LogitMSE, Output
from .long_tail import BalancedKD, BalancedSoftmax, DiVE, LogitAdjusted, SoftF1
from .regression import KDMSE, MSE, Bounded, Huber
from .relational import CC, NST, PKT, RKD, Attention, Similarity
from .review_kd import ReviewKD
from .several_labels import BCE, MLKD, Asymmetric, KDSigmoid

__all__ = [
    "HARD_LOSSES",
    "LOSSES",
    "Custom",
    "Loss",
    "ZeroLossError",
    "check_codec",
    "check_loss_trains",
    "check_task",
    "copy_for_training",
    "format_loss",
    "is_custom_loss",
    "parse_losses",
    "remove_custom_losses",
    "resolve_ramps",
    "split_loss_spec",
]

_LIVE = "custom("  # begins the text of a loss that a caller in Python passed as an object

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
        BCE(),
        KDSigmoid(),
        MLKD(),
        Asymmetric(),
        MSE(),
        Huber(),
        KDMSE(),
        Bounded(),
        Embed(),
    )
}
# The loss of the teacher's outputs alone, of each task.
_SOFT_LOSSES = {CLASSES: "kd", LABELS: "kd_sigmoid", NUMBERS: "kd_mse", EMBEDDING: "embed"}
# The loss of hard targets alone, of each task that has one.
HARD_LOSSES: dict[str, Loss] = {CLASSES: Hard(), LABELS: BCE(), NUMBERS: MSE()}


def parse_losses(specs: Sequence[str]) -> tuple[Loss, ...]:
    """Parse the losses of a training.

    Args:
        specs: one for each loss, such as `("kd:temperature=4", "hard:weight=0.1")`. One of a user's own,
            `my_module:MyLoss`, is imported and made here.

    Returns:
        The losses in the order of specs. Beside `output`, a `hint` without a weight has the weight 0.5.

    Raises:
        UsageError: for no loss, an unknown name or parameter, a value out of range, a loss that occurs twice, `simkd`
            beside another loss, or where a user's own code fails.
    """
    losses = tuple(_parse_loss(spec) for spec in specs)
    names = [split_loss_spec(spec)[0] for spec in specs]
    for name, loss in zip(names, losses, strict=True):
        if names.count(name) > 1 and not loss.repeatable:
            raise UsageError(f"loss '{loss.name}' is given twice: one --loss with one weight each")
    if not losses:
        raise UsageError("no loss: name at least one, such as --loss kd:temperature=4")
    if "simkd" in names and len(names) > 1:
        raise UsageError("loss 'simkd' takes no other loss: its student uses the teacher's last layer as its own")
    if "output" in names:  # output and hint are the two halves of one cost function: 0.5 each by default
        is_half = [spec.partition(":")[0] == "hint" and "weight" not in split_loss_spec(spec)[1] for spec in specs]
        losses = tuple(
            replace(loss, weight=0.5) if half else loss  # type: ignore[type-var]
            for loss, half in zip(losses, is_half, strict=True)
        )
    return losses


def format_loss(loss: Loss) -> str:
    """Format a loss as the text that `parse_losses` reads, with the parameters that are not at their defaults.

    Of an object of a user's own the text has the name and the weight, and cannot be parsed.
    """
    if isinstance(loss, Custom):
        return f"{_LIVE}{loss.name}):weight={_format_value(loss.weight)}"
    default = LOSSES.get(loss.name)
    parameters = [
        f"{f.name}={_format_value(getattr(loss, f.name))}"
        for f in fields(loss)  # type: ignore[arg-type]
        if default is None or getattr(loss, f.name) != getattr(default, f.name)
    ]
    return f"{loss.name}:{','.join(parameters)}" if parameters else loss.name


def _format_value(value: object) -> str:
    if isinstance(value, Ramp):
        return f"{value.start!r}->{value.end!r}{f'@{value.epochs}' if value.epochs else ''}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_custom_loss(spec: str) -> bool:
    """Return whether the text of a loss names code of a user's own, which is imported when it is parsed."""
    return spec.startswith(_LIVE) or (spec.partition(":")[0] not in LOSSES and is_own_loss(spec))


def remove_custom_losses(specs: Sequence[str], task: str) -> tuple[str, ...]:
    """Remove the losses that name code of a user's own, for a use of a student in which no loss is computed.

    Args:
        specs: the losses.
        task: of the student, see data/tasks.py.

    Returns:
        The others; where there are no others, the first loss of the task that reads the teacher's outputs alone, as a
        student has at least one loss.
    """
    return tuple(spec for spec in specs if not is_custom_loss(spec)) or (_SOFT_LOSSES[task],)


def split_loss_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split the text of a loss: `kd:weight=1` into ("kd", {"weight": "1"}), `my_module:MyLoss` into (itself, {}).

    Raises:
        UsageError: a parameter has no value, or is given twice.
    """
    if not is_custom_loss(spec):
        return parse_spec(spec, "loss")
    module, attribute, parameters = split_own_spec(spec)
    return f"{module}:{attribute}", parameters


def _parse_loss(spec: str) -> Loss:
    if spec.startswith(_LIVE):
        raise UsageError(
            f"loss '{spec}' was passed to softcache in Python, and can be computed there alone: a command takes"
            " my_module:MyLoss"
        )
    if spec.partition(":")[0] not in LOSSES and (error := file_name_error("loss", spec)):
        raise error
    name, parameters = split_loss_spec(spec)
    if is_custom_loss(spec):
        weight = _parse_value(spec, "weight", parameters.get("weight", "1"), float | Ramp)
        return import_own_loss(spec, weight)  # type: ignore[arg-type]
    if name not in LOSSES:
        first, *others = name.replace("+", ",").replace(" ", ",").split(",")
        if others and first in LOSSES:
            raise UsageError(f"loss '{spec}': one --loss for each term, such as --loss {first} --loss {others[0]}")
        raise unknown_name_error("loss", name, [*LOSSES, "my_module:MyLoss"])
    loss = LOSSES[name]
    kinds = {f.name: f.type for f in fields(loss)}  # type: ignore[arg-type]
    check_parameters(spec, "loss", parameters, kinds)
    values = {key: _parse_value(spec, key, text, kinds[key]) for key, text in parameters.items()}
    return replace(loss, **values)  # type: ignore[type-var]


def _parse_value(spec: str, parameter: str, text: str, kind: object) -> str | bool | float | Ramp:
    """Parse the value of a parameter whose field has the type `kind`, and check it."""
    value: str | bool | float | Ramp = text
    if kind is bool:
        if text not in ("true", "false"):
            raise UsageError(f"loss '{spec}': {parameter}={text} is neither true nor false")
        value = text == "true"
    elif kind is not str:
        value = _parse_number_or_ramp(spec, parameter, text)
    checked: str | bool | float | Ramp = check_parameter(spec, parameter, kind, value, text)
    return checked


def _parse_number_or_ramp(spec: str, parameter: str, text: str) -> float | Ramp:
    start, arrow, rest = text.partition("->")
    end, mark, epochs = rest.partition("@")
    values = [parse_number(spec, "loss", parameter, number) for number in ((start, end) if arrow else (start,))]
    if mark and not (epochs.isdecimal() and 0 < int(epochs) <= MAX_RAMP_EPOCHS):
        raise UsageError(f"loss '{spec}': {parameter}={text}: after @ comes the epoch in which {end} is reached")
    return Ramp(values[0], values[1], int(epochs or 0)) if arrow else values[0]


def check_task(losses: Sequence[Loss], task: str) -> None:
    """Check that losses are defined for a task.

    Args:
        losses: the terms.
        task: see data/tasks.py.

    Raises:
        UsageError: one of them is not, where the message names those that are; or it needs layers for this task.
    """
    for loss in losses:
        is_own = not type(loss).__module__.startswith("softcache.")  # whose author knows what it is for
        if task not in loss.tasks and not is_own:
            names = ", ".join(name for name, other in LOSSES.items() if task in other.tasks)
            raise UsageError(
                f"loss '{loss.name}' is for {' and '.join(loss.tasks)}, and the task here is {task}: {names}"
            )
        if task != EMBEDDING and isinstance(loss, RelationalLoss) and loss.reads_outputs:
            raise loss.layers_error()


def check_codec(losses: Sequence[Loss], codec: str, kind: str) -> None:
    """Check that losses can be computed from logits that are stored by a codec.

    Args:
        losses: the terms.
        codec: name of the codec, for messages.
        kind: of the codec, see pipeline/cache/codecs.py.

    Raises:
        UsageError: one of them cannot, with what can.
    """
    for loss in losses:
        if kind != DENSE and (reason := loss.refuse_codec(kind)):
            example = "kd:temperature=1" if kind == SAMPLE else "kd"
            raise UsageError(
                f"loss '{loss.name}' {reason}, and the cache has the codec {codec}: {example}, or a cache with the"
                " codec float16 or sqrt8"
            )


class ZeroLossError(UsageError):
    """The sum of losses is 0 in every batch: a student would learn nothing."""


def check_loss_trains(losses: Sequence[Loss], classes: int, epochs: int) -> None:
    """Check that a student learns something from the sum of losses.

    Args:
        losses: the terms.
        classes: K, the number of classes.
        epochs: the epochs of the training.

    Raises:
        ZeroLossError: when every term is 0 in every epoch.
        UsageError: when a parameter does not work with so few classes.
    """
    # A ramp is linear: it is 0 throughout where it is 0 at both ends.
    resolved = [resolve_ramps(loss, epoch, epochs) for epoch in (0, epochs - 1) for loss in losses]
    is_zero = [loss.is_zero(classes) or to_float(loss.weight) == 0 for loss in resolved]
    if all(is_zero):
        names = ", ".join(loss.name for loss in losses)
        during = "" if all(to_float(loss.weight) == 0 for loss in resolved) else f" with {classes} classes"
        raise ZeroLossError(
            f"the loss is 0 in every batch of the {epochs} epochs{during}, so the student would learn nothing: give"
            f" one term ({names}) a weight above 0, or leave the weight out"
        )


def resolve_ramps(loss: Loss, epoch: int, epochs: int) -> Loss:
    """Replace every ramp of a loss by its value in an epoch.

    Args:
        loss: the loss.
        epoch: 0 to epochs - 1.
        epochs: the epochs of the training.

    Returns:
        A copy whose parameters are numbers; the loss itself where it has no ramp.
    """
    values = {f.name: getattr(loss, f.name) for f in fields(loss)}  # type: ignore[arg-type]
    resolved = {key: value.value_at(epoch, epochs) for key, value in values.items() if isinstance(value, Ramp)}
    if not resolved:
        return loss
    current = copy(loss)  # not `replace`, which checks again: a ramp to 0.001 ends at 0.00099…, by rounding
    for key, value in resolved.items():
        object.__setattr__(current, key, value)
    return current
