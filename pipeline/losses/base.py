"""The interface of a loss, the rules of its parameters, and parameters that change during training."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from softcache.base.arguments import check_integer, type_error
from softcache.base.errors import UsageError
from softcache.data.tasks import CLASSES
from softcache.pipeline.batch import Batch, LossContext, ModelOutputs
from softcache.pipeline.taps.hooks import list_layers
from softcache.pipeline.taps.statistics import parse_tap

# The range of a parameter by its name, in texts and in objects. Any other number is from 0 on, without a highest one.
_LOWEST = {"temperature": 1e-3, "power": 1e-3, "delta": 1e-3}
_HIGHEST = {"smoothing": 1.0, "correct": 1.0, "reversal": 1.0}
_BELOW = {"beta": 1.0, "clip": 1.0}
_LARGEST_NUMBER = 1e30
MAX_RAMP_EPOCHS = 1_000_000


@dataclass(frozen=True)
class Ramp:
    """A numeric parameter that changes linearly from start to end, over the training or over its first epochs.

    Args:
        start: value in the first epoch; with `epochs`, the value before the first epoch.
        end: value in the last epoch; with `epochs`, from epoch number `epochs` on, counted from 1. So `0->1@20` is
            the warm-up min(epoch / 20, 1).
        epochs: length of the ramp in epochs; 0 for the whole training.

    Raises:
        UsageError: start or end is not a finite number, or epochs is not a whole number.
    """

    start: float
    end: float
    epochs: int = 0

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            object.__setattr__(self, name, _check_number("Ramp", name, getattr(self, name)))
        epochs = check_integer("Ramp: epochs", self.epochs, least=0, most=MAX_RAMP_EPOCHS)
        object.__setattr__(self, "epochs", epochs)

    def value_at(self, epoch: int, epochs: int) -> float:
        """Return the value in an epoch.

        Args:
            epoch: 0 to epochs - 1.
            epochs: the epochs of the training.

        Raises:
            UsageError: there is no such epoch.
        """
        check_progress(epoch, epochs)
        progress = min((epoch + 1) / self.epochs, 1.0) if self.epochs else epoch / max(epochs - 1, 1)
        return self.start + (self.end - self.start) * progress


def check_progress(epoch: int, epochs: int) -> None:
    """Check the number of an epoch.

    Args:
        epoch: 0 to epochs - 1.
        epochs: the epochs of the training.

    Raises:
        UsageError: a number is not a whole one, or there is no such epoch.
    """
    last = check_integer("epochs", epochs, least=1) - 1
    number = check_integer("epoch", epoch)
    if not 0 <= number <= last:
        raise UsageError(f"epoch {number} is not between 0 and {last}: epochs are counted from 0")


def check_parameter(owner: str, name: str, kind: object, value: Any, text: str = "") -> Any:
    """Check the value of a parameter, of a text of --loss or of an object.

    Args:
        owner: the loss, for messages: its text or its name.
        name: name of the parameter, which decides its range.
        kind: type of the field: str, bool, int, float or float | Ramp.
        value: the value.
        text: the value as a user wrote it, for messages; "" for the value itself.

    Returns:
        The value; a number of NumPy as a Python number.

    Raises:
        UsageError: it is of another type, not finite or out of range.
    """
    subject, shown = f"loss '{owner}'", f"{name}={text or value}"
    if kind is str or kind is bool:
        if not isinstance(value, kind):
            advice = ": join several by +" if isinstance(value, list | tuple) else ""
            raise type_error(f"{subject}: {name}", value, "a str" + advice if kind is str else "True or False")
        return value
    if isinstance(value, Ramp):
        if kind is int:
            raise UsageError(f"{subject}: {shown} is not a whole number from 1 on")
        if kind is float:
            raise UsageError(f"{subject}: {shown}: {name} cannot change during training")
        lowest, highest = min(value.start, value.end), max(value.start, value.end)
    else:
        value = _check_number(subject, name, value)
        lowest = highest = value
    if kind is int and (value != int(value) or value < 1):
        raise UsageError(f"{subject}: {shown} is not a whole number from 1 on")
    if lowest < (low := _LOWEST.get(name, 0.0)):
        raise UsageError(f"{subject}: {shown} is below {low:g}")
    if highest > (high := _HIGHEST.get(name, _LARGEST_NUMBER)):
        raise UsageError(f"{subject}: {shown} is above {high:g}")
    if name in _BELOW and highest >= _BELOW[name]:
        raise UsageError(f"{subject}: {shown} is not below {_BELOW[name]:g}")
    return int(value) if kind is int else value


def _check_number(subject: str, name: str, value: Any) -> float:
    """Return a finite number, an int or a float; one of NumPy as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise type_error(f"{subject}: {name}", value, "a number")
    number: float = value if isinstance(value, int) else float(value)
    if not -_LARGEST_NUMBER < number < _LARGEST_NUMBER:
        raise UsageError(f"{subject}: {name}={number} is not finite")
    return number


def find_missing_layer(network: nn.Module, losses: Sequence["Loss"]) -> tuple["Loss", str, list[str]] | None:
    """Find a layer that a loss reads and a student does not have.

    Args:
        network: the student.
        losses: the terms of the loss.

    Returns:
        The loss, the layer and the layers that there are; None where none is missing.
    """
    layers = list_layers(network)
    for loss in losses:
        for tap in loss.student_taps():
            if (layer := parse_tap(tap)[0]) not in layers:
                return loss, layer, layers
    return None


def check_is_object(loss: object) -> None:
    """Raise UsageError for the class of a loss, which has to be called first."""
    if isinstance(loss, type):
        raise UsageError(f"a loss is an object, not the class {loss.__name__}: give {loss.__name__}()")


def to_float(parameter: float | Ramp) -> float:
    """Return the value of a parameter after `resolve_ramps`.

    Raises:
        TypeError: for a ramp, which is a programming error.
    """
    if isinstance(parameter, Ramp):
        raise TypeError(f"ramp {parameter} was not resolved for this epoch")
    return parameter


_KINDS = (str, bool, int, float, float | Ramp)  # the types of parameters


class Loss(Protocol):
    """A term of the function that a student minimises.

    Attributes:
        name: name of the loss in --loss.
        tasks: for which it is defined, see data/tasks.py.
        weight: factor of the term in the sum of losses.
        needs_labels: whether it needs hard targets.
        needs_logits: whether it reads the teacher's logits.
        needs_head: whether it needs the teacher's last linear layer.
        needs_counts: whether it needs a labelled training row of every class.
        needs_single_label: whether it is undefined for a mixed view, which has two labels.
        repeatable: whether --loss may name it more than once.
        is_row_mean: whether it is a mean over rows, each of which can be weighted by Batch.row_weights.
        sparse_codecs: kinds of sparse codecs whose logits it may read, "top" or "sample": see `refuse_codec`.
    """

    name: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]] = (CLASSES,)
    needs_labels: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = True
    needs_head: ClassVar[bool] = False
    needs_counts: ClassVar[bool] = False
    needs_single_label: ClassVar[bool] = False
    repeatable: ClassVar[bool] = False
    is_row_mean: ClassVar[bool] = False
    sparse_codecs: ClassVar[tuple[str, ...]] = ()

    @property
    def weight(self) -> float | Ramp: ...

    def __post_init__(self) -> None:
        """Check the parameters of a dataclass, as those of a text are checked.

        Of a class of a user's own only the weight is checked: its other parameters have a meaning of their own.
        """
        is_own = not type(self).__module__.startswith("softcache.")
        for parameter in fields(self):  # type: ignore[arg-type]
            if parameter.type in _KINDS and not (is_own and parameter.name != "weight"):
                value = check_parameter(self.name, parameter.name, parameter.type, getattr(self, parameter.name))
                object.__setattr__(self, parameter.name, value)

    def teacher_taps(self) -> tuple[str, ...]:
        """Return the names of the cached features that the loss reads."""
        return ()

    def student_taps(self) -> tuple[str, ...]:
        """Return the names of the student's layers that the loss reads."""
        return ()

    def refuse_codec(self, kind: str) -> str:
        """Return why the loss cannot be trained from the logits of a sparse codec, as a clause; empty where it can.

        Args:
            kind: "top", where the classes that are not stored are decoded as equally likely; or "sample", where those
                that were not drawn have the probability 0.
        """
        is_accepted = kind in self.sparse_codecs or not self.needs_logits
        return "" if is_accepted else "needs the teacher's logits of all classes"

    def is_zero(self, classes: int) -> bool:
        """Return whether the term is the same in every batch, so that nothing is learned from it.

        Args:
            classes: K, the number of classes.

        Raises:
            UsageError: for a parameter that does not work with so few classes.
        """
        return False

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        """Build the module that belongs to the loss, such as a regressor.

        Args:
            student: the student's outputs for the batch.
            batch: an example, with the shapes of the batches in training.
            context: the teacher's head, its memory bank and the class counts.

        Returns:
            The module, whose parameters are trained with the student's; None for a loss without one.

        Raises:
            UsageError: for layers that do not fit together, or a context that lacks what the loss needs.
        """
        return None

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        """Compute the unweighted term.

        Args:
            student: the student's outputs, logits [B, K].
            batch: labels, cached targets and features of the same B rows.
            part: what `build_part` returned.

        Returns:
            A scalar in the dtype of the student's outputs.
        """
        ...


def require_logits(batch: Batch, reader: str) -> torch.Tensor:
    """Return the teacher's logits of a batch.

    Args:
        batch: the batch.
        reader: what reads them, for messages, such as "loss 'kd'".

    Raises:
        UsageError: the batch has none.
    """
    if batch.logits is None:
        raise UsageError(f"{reader} reads the teacher's logits, and this batch has none (targets=False)")
    return batch.logits


def list_teacher_taps(losses: Sequence[Loss]) -> tuple[str, ...]:
    """List the cached features that losses read, each once."""
    return tuple(dict.fromkeys(tap for loss in losses for tap in loss.teacher_taps()))


def list_student_taps(losses: Sequence[Loss]) -> tuple[str, ...]:
    """List the student's layers that losses read, each once."""
    return tuple(dict.fromkeys(tap for loss in losses for tap in loss.student_taps()))
