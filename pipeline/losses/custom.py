"""Losses of a user's own: any callable (outputs, batch) -> scalar as a term of a DistillationLoss."""

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from softcache.base.arguments import check_text
from softcache.base.errors import UsageError
from softcache.base.user_code import locate_definition, user_code
from softcache.base.user_modules import keep_global_state, name_type
from softcache.data.tasks import TASKS
from softcache.pipeline.batch import Batch, LossContext, ModelOutputs
from softcache.pipeline.cache.codecs import SAMPLE, TOP
from softcache.pipeline.taps.statistics import parse_tap

from .base import Loss, Ramp

LossFunction = Callable[[ModelOutputs, Batch], torch.Tensor]


@dataclass(frozen=True)
class Custom(Loss):
    """A loss of a user's own.

    `function(outputs, batch)` gets the student's `ModelOutputs` (logits float32 [B, K] and the features of
    `student_taps`) and the `Batch` of the same B rows (labels int64 [B], the teacher's logits float32 [B, K] and the
    features of `teacher_taps`), and returns a scalar tensor. These attributes of it are read, where it has them:

        teacher_taps: names of the cached features that it reads, such as `("layer3:pool",)`; default none.
        student_taps: names of the student's layers that it reads; default none.
        needs_labels: whether it needs hard targets, default False. Without it, a label may be -1.
        needs_logits: whether it reads the teacher's logits, default True. With several teachers that are not combined
            it is called with the logits of each, and its mean is taken.
        needs_single_label: whether it is undefined for a mixed view, which has two labels; default False.
        sparse_codecs: some of ("top", "sample"), whose logits it may read; default none.

    A torch.nn.Module is trained where it has parameters: they get the learning rate of the student, are saved in
    checkpoints, and are not part of the student that comes out. Lazy layers get their shapes from the first batch.

    Args:
        function: the callable.
        weight: factor of the term in the sum of losses; may be a `Ramp`.
        name: name of the term in metrics; by default that of the function, or of the class of the object.
        create: makes a new `function` for each training of the commands, as a class or a factory does; None to copy
            `function`.
    """

    function: LossFunction
    weight: float | Ramp = 1.0
    name: str = ""  # type: ignore[misc]
    create: Callable[[], LossFunction] | None = field(default=None, repr=False, compare=False)
    tasks: ClassVar[tuple[str, ...]] = TASKS
    repeatable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise UsageError(f"a loss is a callable (outputs, batch) -> scalar tensor, not {name_type(self.function)}")
        if isinstance(self.function, type):
            called = f"{self.function.__name__}()"
            raise UsageError(f"a loss is a callable (outputs, batch) -> scalar tensor: give an object, {called}")
        check_text("Custom: name", self.name)
        name = self.name or getattr(self.function, "__name__", "") or type(self.function).__name__
        name = re.sub(r"\W+", "_", name).strip("_") or "loss"  # a term's name is a key of a ModuleDict, without dots
        object.__setattr__(self, "name", f"{name}_loss" if hasattr(nn.ModuleDict, name) else name)
        super().__post_init__()
        for tap in (*self.teacher_taps(), *self.student_taps()):
            parse_tap(tap)

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Whether it needs hard targets."""
        return self._read_flag("needs_labels", default=False)

    @property
    def needs_logits(self) -> bool:  # type: ignore[override]
        """Whether it reads the teacher's logits."""
        return self._read_flag("needs_logits", default=True)

    @property
    def sparse_codecs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Kinds of sparse codecs whose logits it may read, `top` or `sample`."""
        kinds = getattr(self.function, "sparse_codecs", ())
        if not isinstance(kinds, tuple | list) or not set(kinds) <= {TOP, SAMPLE}:
            raise UsageError(f"loss '{self.name}': sparse_codecs is {kinds!r}, not some of ('{TOP}', '{SAMPLE}')")
        return tuple(kinds)

    @property
    def needs_single_label(self) -> bool:  # type: ignore[override]
        """Whether it is undefined for a mixed view, which has two labels."""
        return self._read_flag("needs_single_label", default=False)

    def teacher_taps(self) -> tuple[str, ...]:
        """Return the names of the cached features that the loss reads."""
        return self._read_taps("teacher_taps")

    def student_taps(self) -> tuple[str, ...]:
        """Return the names of the student's layers that the loss reads."""
        return self._read_taps("student_taps")

    def copy_for_training(self) -> "Custom":
        """Return the loss with a function of its own for one training, as one with parameters needs.

        A class or a factory is called again, so that initial weights are drawn from the current random state.

        Raises:
            UsageError: where the user's code fails, or the object cannot be copied.
        """
        if self.create is not None:
            with keep_global_state():
                return replace(self, function=self.create())
        with user_code(f"loss '{self.name}' cannot be copied for a training", self._location):
            return replace(self, function=copy.deepcopy(self.function))

    def build_part(self, student: ModelOutputs, batch: Batch, context: LossContext) -> nn.Module | None:
        """Return the user's module itself where it has parameters or buffers, with the shapes of its lazy layers."""
        module = self.function
        if not isinstance(module, nn.Module):
            return None
        tensors = [*module.parameters(), *module.buffers()]
        if any(map(is_lazy, tensors)):
            with torch.no_grad():
                self(student, batch, module.to(batch.views.device))
        return module if tensors else None

    def __call__(self, student: ModelOutputs, batch: Batch, part: nn.Module | None) -> torch.Tensor:
        """Compute the term, a scalar.

        Raises:
            UsageError: where the user's code raises, with its file and line, or returns no scalar tensor.
        """
        try:
            value = self.function(student, batch) if part is None else part(student, batch)
        except (Exception, SystemExit):
            # The location is looked up for an error alone: that takes as long as a small loss.
            with user_code(f"loss '{self.name}' failed", self._location):
                raise
        return self._check_scalar(value, student.logits.device)

    def _check_scalar(self, value: Any, device: torch.device) -> torch.Tensor:
        """Check the kind, shape and device of what the function returned, without waiting for a GPU."""
        advice = "return a scalar, such as .mean()"
        if not isinstance(value, torch.Tensor):
            raise UsageError(f"loss '{self.name}' returned {name_type(value)}, not a tensor: {advice}")
        if value.numel() != 1 or not value.is_floating_point():
            kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            raise UsageError(f"loss '{self.name}' returned a tensor {kind}, not one floating-point number: {advice}")
        if value.device != device:
            raise UsageError(f"loss '{self.name}' returned a tensor on {value.device}, and the student is on {device}")
        return value.reshape(()) if value.ndim else value

    @property
    def _location(self) -> str:
        return locate_definition(self.function) or locate_definition(type(self.function).__call__)

    def _read_flag(self, attribute: str, default: bool) -> bool:
        value = getattr(self.function, attribute, default)
        if not isinstance(value, bool):
            raise UsageError(f"loss '{self.name}': its {attribute} is {value!r}, neither True nor False")
        return value

    def _read_taps(self, attribute: str) -> tuple[str, ...]:
        value = getattr(self.function, attribute, ())
        if isinstance(value, str):
            return (value,)
        taps = tuple(value) if isinstance(value, Iterable) else (None,)
        if not all(isinstance(tap, str) and tap for tap in taps):
            raise UsageError(f"loss '{self.name}': its {attribute} is {value!r}, not a sequence of layers' names")
        return taps


def copy_for_training(loss: Loss) -> Loss:
    """Return a loss for one training: of a user's own, one that shares no state with other trainings."""
    return loss.copy_for_training() if isinstance(loss, Custom) else loss
