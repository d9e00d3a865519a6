"""The training criterion of a student: a weighted sum of losses."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from softcache.base.errors import UsageError, unknown_name_error
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS
from softcache.pipeline.batch import Batch, LinearHead, LossContext, ModelOutputs
from softcache.pipeline.models import find_head
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.pipeline.taps.hooks import capture_features
from softcache.pipeline.taps.statistics import derive_features
from softcache.pipeline.teachers.combine import PER_TEACHER

from . import check_codec, check_loss_trains, check_task, parse_losses, resolve_ramps
from .base import (
    Loss,
    check_is_object,
    check_progress,
    find_missing_layer,
    list_student_taps,
    list_teacher_taps,
    to_float,
)
from .classifier import SimKD
from .custom import Custom, LossFunction
from .embedding import Embed
from .feature_base import RelationalLoss
from .multi_teacher import Term, wrap_loss
from .several_labels import BCE

LossLike = str | Loss | LossFunction
Features = dict[str, torch.Tensor]
_MAX_PASSES = 4  # forward passes without a loss whose features are kept
_EXAMPLE_ROWS = 2  # on which a student is run to learn the shapes of its layers


class DistillationLoss(nn.Module):
    """A weighted sum of losses: sum over i of weight_i * loss_i(student, batch).

        criterion = DistillationLoss("kd:temperature=4,weight=0.9", "hard:weight=0.1")
        criterion.attach(student, example=batch)  # where a loss reads layers or has trainable parts; else not needed
        loss = criterion(student(batch.images), batch)

    Its parameters are those of the losses' own trainable parts, such as the regressor of a hint: give them to the
    optimiser beside the student's. They exist after `attach`.

    Args:
        losses: One for each term: its text as in `--loss`, an object of `softcache.losses`, or a callable of your own,
            (outputs: ModelOutputs, batch: Batch) -> scalar, see `losses.Custom`.
        combination: How the losses learn from the logits [B, M, K] of each of M teachers: "per_teacher", the mean of
            a loss over the teachers, or "ca_mkd", weighted by their confidence in the label.
        missing_to_labels: Use the cross entropy with the label for rows whose targets are missing (NaN).

    Attributes:
        losses: The losses as objects.
        names: A name for each term: `kd`, or `hint-0`, `hint-1` where there are several of a kind.
        terms: {name: weighted term} of the last call, scalars without gradients. They add up to the loss.
        teacher_taps: The teacher's features that the losses read: the `taps` of the loader.
        student_taps: The student's layers that the losses read.

    Raises:
        UsageError: A text or an object is no loss, or there is none.
    """

    def __init__(self, *losses: LossLike, combination: str = "per_teacher", missing_to_labels: bool = False):
        super().__init__()
        if combination not in PER_TEACHER:
            raise unknown_name_error("combination", str(combination), PER_TEACHER)
        self.losses = resolve_losses(losses)
        self.names = term_names(self.losses)
        self.terms: dict[str, torch.Tensor] = {}
        self.teacher_taps = list_teacher_taps(self.losses)
        self.student_taps = list_student_taps(self.losses)
        self.parts = nn.ModuleDict()
        self._combination, self._missing_to_labels = combination, missing_to_labels
        self._needs_head = any(loss.needs_head for loss in self.losses)
        self._of_outputs = [loss for loss in self.losses if isinstance(loss, RelationalLoss) and loss.reads_outputs]
        self._is_of_embeddings = bool(self._of_outputs) or any(loss.tasks == (EMBEDDING,) for loss in self.losses)
        self._hooks: ExitStack | None = None
        self._features: Features = {}  # of the last forward pass
        self._passes: deque[tuple[torch.Tensor, Features]] = deque(maxlen=_MAX_PASSES)  # since the last loss
        self._is_loss_computed = False
        self._head: LinearHead | None = None
        self.set_progress(0, 1)

    def set_progress(self, epoch: int, epochs: int) -> None:
        """Set every parameter that is a ramp, such as `weight=0->1@20`, to its value in an epoch.

        Args:
            epoch: 0 to epochs - 1.
            epochs: The epochs of the training.

        Raises:
            UsageError: There is no such epoch.
        """
        check_progress(epoch, epochs)
        current = [resolve_ramps(loss, epoch, epochs) for loss in self.losses]
        self.functions = [wrap_loss(loss, "", self._missing_to_labels) for loss in current]
        self._functions_of_several = [wrap_loss(loss, self._combination, self._missing_to_labels) for loss in current]
        self.weights = [to_float(loss.weight) for loss in current]

    def attach(self, student: nn.Module, example: Batch, context: LossContext | None = None) -> None:
        """Read the student's layers from now on, and build the losses' trainable parts.

        The student is run once, on two rows of the example, in eval mode and without gradients. Forward hooks on its
        layers then capture what the losses read, in each forward pass, until `detach`. Parts that exist are kept.

        Args:
            student: The network that is trained: images float32 [B, C, H, W] -> logits [B, K], or an embedding of any
                width where the cache is of embeddings. Of one that is wrapped
                in DistributedDataParallel or compiled, layers have the names that they have inside.
            example: A batch of the loader that is used in training, on the student's device.
            context: The teacher's last layer, its memory bank and the class counts, for losses that need them; those
                of the example's loader if None.

        Raises:
            UsageError: The student has no such layer, its layers do not fit those of the teacher, it has another
                number of classes, or nothing is learned from the losses.
        """
        self.detach()
        _check_tasks(self.losses, example)
        network = _unwrap(student)
        _check_layers(network, self.losses)
        batch = example.slice(0, _EXAMPLE_ROWS)
        was_training = student.training
        student.eval()
        try:
            with torch.no_grad(), capture_features(network, self.student_taps) as features:
                output = student(batch.views if isinstance(student, PreparedModel) else batch.images)
                logits = select_logits(output)
        finally:
            student.train(was_training)
        self._check_outputs(logits, batch)
        if self._needs_head:
            self._head = _find_trained_head(network, logits.shape[-1])
        if context is None:
            context = batch.source.make_context(self.losses) if batch.source else LossContext()
        with torch.random.fork_rng([logits.device] if logits.is_cuda else []):  # PyTorch warns of more GPUs than one
            self.build_parts(ModelOutputs(logits, dict(features), self._head), batch, context)
        self._hooks = ExitStack()
        self._features = self._hooks.enter_context(capture_features(network, self.student_taps))
        if self.student_taps and not isinstance(network, torch.jit.ScriptModule):
            self._hooks.callback(network.register_forward_hook(self._make_pass_hook(network)).remove)

    def _make_pass_hook(self, network: nn.Module) -> Callable[[nn.Module, object, object], None]:
        """Make a hook that remembers each forward pass since the last loss: its output and its features."""

        def remember(module: nn.Module, inputs: object, output: object) -> None:
            if module is not network or torch.compiler.is_compiling():
                return
            if self._is_loss_computed:
                self._passes.clear()
                self._is_loss_computed = False
            self._passes.append((select_logits(output), dict(self._features)))

        return remember

    def _find_features(self, logits: torch.Tensor) -> Features:
        """Return the features of the forward pass that gave these logits.

        Between a student and its loss something may have made other tensors of its logits (DistributedDataParallel,
        mixed precision): then it is the last pass of as many rows, with gradients if they have some.
        """
        self._is_loss_computed = True
        passes = list(self._passes)
        for output, features in reversed(passes):
            if output is logits:
                return features
        if not passes or any(x is not passes[-1][1].get(tap) for tap, x in self._features.items()):
            return dict(self._features)  # of a compiled student, whose passes run no hook of ours
        for output, features in reversed(passes):
            if output.shape == logits.shape and output.requires_grad == logits.requires_grad:
                return features
        raise UsageError(
            f"these logits {list(logits.shape)} are of no forward pass of the student that is attached since the last"
            f" loss: the last one returned {list(passes[-1][0].shape)}"
        )

    def detach(self) -> None:
        """Remove the hooks from the student. The trainable parts stay."""
        if self._hooks is not None:
            self._hooks.close()
        self._hooks, self._features, self._head = None, {}, None
        self._passes.clear()

    def build_parts(self, student: ModelOutputs, batch: Batch, context: LossContext) -> None:
        """Build the losses' own trainable parts from an example.

        Args:
            student: The student's outputs for the batch.
            batch: A batch with the shapes of those in training, of two rows or more.
            context: The teacher's head, its memory bank and the class counts.

        Raises:
            UsageError: Layers do not fit together, or nothing is learned from the losses.
        """
        check_loss_trains(self.losses, classes=student.logits.shape[-1], epochs=2)  # two: both ends of each ramp
        batch = self._with_teacher_taps(batch)
        for name, loss in zip(self.names, self.losses, strict=True):
            if name not in self.parts and (part := loss.build_part(student, batch, context)) is not None:
                self.parts[name] = part.to(student.logits.device)

    def collect_outputs(self, output: Any) -> ModelOutputs:
        """Return what the losses read of a forward pass: its logits, the captured features, the last layer.

        Args:
            output: What the student returned: logits float [B, K], or an object or a mapping with `logits`; or
                ModelOutputs, which are returned as they are.

        Raises:
            UsageError: There are no logits, or the losses read layers and the student was not attached.
        """
        if isinstance(output, ModelOutputs):
            return output
        if self.student_taps and self._hooks is None:
            raise UsageError(
                f"the loss reads {', '.join(self.student_taps)} of the student: call"
                " criterion.attach(student, example=batch) before the first step"
            )
        logits = select_logits(output)
        features = self._find_features(logits) if self.student_taps else {}
        if len(features) < len(self.student_taps):
            raise UsageError(
                "the student that is attached was not run before its loss was computed; one that is compiled is"
                " attached before it first runs"
            )
        return ModelOutputs(_to_float32(logits), {tap: _to_float32(x) for tap, x in features.items()}, self._head)

    def weighted_terms(self, student: Any, batch: Batch) -> list[torch.Tensor]:
        """Compute each weighted term.

        Args:
            student, batch: As in `forward`.

        Returns:
            One scalar for each of `names`; they add up to the loss.

        Raises:
            UsageError: As `forward`.
        """
        outputs, batch = self.collect_outputs(student), self._with_teacher_taps(batch)
        self._check_outputs(outputs.logits, batch)
        has_several = batch.logits is not None and batch.logits.ndim == 3
        functions: list[Term] = self._functions_of_several if has_several else self.functions
        terms = []
        for name, weight, function in zip(self.names, self.weights, functions, strict=True):
            value = function(outputs, batch, self.parts[name] if name in self.parts else None)  # noqa: SIM401 (no `get`)
            terms.append(value if weight == 1 else weight * value)  # a product costs time forward and backward
        return terms

    def forward(self, student: Any, batch: Batch) -> torch.Tensor:
        """Compute the loss of a batch, and set `terms`.

        Args:
            student: What the student returned for `batch.images`: logits float [B, K], or an object or a mapping with
                `logits`; or ModelOutputs of a student that is not attached.
            batch: A batch of the loader, with the features of `teacher_taps`, or those from which they follow.

        Returns:
            A scalar.

        Raises:
            UsageError: The batch lacks what a loss reads, a loss is for another task than that of the batch, or the
                student is not attached.
        """
        _check_tasks(self.losses, batch)
        for name, loss in zip(self.names, self.losses, strict=True):
            if name not in self.parts:
                _check_needs_no_part(loss, student, batch)
        terms = self.weighted_terms(student, batch)
        self.terms = {name: term.detach() for name, term in zip(self.names, terms, strict=True)}
        return sum_terms(terms)

    def _check_outputs(self, logits: torch.Tensor, batch: Batch) -> None:
        """Check that a student has as many outputs as the teacher, where a batch has them; embeddings may differ."""
        task = batch.source.task if batch.source is not None else None
        if self._of_outputs and task not in (None, EMBEDDING):
            raise self._of_outputs[0].layers_error()
        if task == EMBEDDING or (task is None and self._is_of_embeddings):
            return
        if batch.logits is not None and batch.logits.shape[-1] != logits.shape[-1]:
            raise UsageError(
                f"the student has {logits.shape[-1]} {task or CLASSES}, the cache {batch.logits.shape[-1]}"
            )

    def _with_teacher_taps(self, batch: Batch) -> Batch:
        """Return the batch with the teacher's features that the losses read, float32, derived from the cached ones."""
        if not self.teacher_taps:
            return batch
        try:
            return replace(batch, features=derive_features(batch.features, self.teacher_taps))
        except KeyError as error:
            raise UsageError(
                f"the loss reads the teacher's {error.args[0]}, which the batch does not have (it has:"
                f" {', '.join(batch.features) or 'none'}): cache.loader(…, taps={list(self.teacher_taps)})"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        """A copy and a pickle have the parts, and are attached to no student."""
        passes: deque[Any] = deque(maxlen=_MAX_PASSES)
        return {**self.__dict__, "_hooks": None, "_features": {}, "_head": None, "_passes": passes, "terms": {}}


def resolve_losses(losses: Sequence[LossLike]) -> tuple[Loss, ...]:
    """Return losses as objects, those that are texts parsed together, as `parse_losses` does.

    A callable that is no loss yet becomes a `Custom`.

    Raises:
        UsageError: A text is no loss, or there is no loss.
    """
    texts = [loss for loss in losses if isinstance(loss, str)]
    parsed = iter(parse_losses(texts) if texts or not losses else ())
    return tuple(next(parsed) if isinstance(loss, str) else _to_loss(loss) for loss in losses)


Losses = Sequence[LossLike] | LossLike | DistillationLoss


def list_losses(losses: Losses) -> tuple[LossLike, ...]:
    """Return the terms of an argument `losses`: of one term, of several, or those of a criterion."""
    if isinstance(losses, DistillationLoss):
        return losses.losses
    if isinstance(losses, str) or not isinstance(losses, Sequence):
        return (losses,)
    return tuple(losses)


def _to_loss(loss: Loss | LossFunction) -> Loss:
    check_is_object(loss)
    is_loss = callable(getattr(loss, "build_part", None)) and not isinstance(loss, nn.Module)
    return loss if is_loss else Custom(loss)  # type: ignore[return-value, arg-type]


def _unwrap(student: nn.Module) -> nn.Module:
    """Return the network whose layers have the names that a user knows."""
    if isinstance(student, PreparedModel):
        return student.network
    while isinstance(inner := getattr(student, "_orig_mod", None), nn.Module) or (
        isinstance(student, nn.parallel.DistributedDataParallel) and isinstance(inner := student.module, nn.Module)
    ):
        student = inner
    return student


def _check_layers(network: nn.Module, losses: Sequence[Loss]) -> None:
    if missing := find_missing_layer(network, losses):
        loss, layer, layers = missing
        if isinstance(loss, SimKD):
            raise UsageError(
                "loss 'simkd' trains a projector as a part of the student: student = loss.extend(student, batch)"
            )
        raise unknown_name_error("layer", layer, layers, owner="the student")


def _check_tasks(losses: Sequence[Loss], batch: Batch) -> None:
    """Check that losses are for the task of a batch: that of its cache, else one that has the form of its labels."""
    if batch.source is not None:
        check_task(losses, batch.source.task)
        check_codec(losses, *batch.source.codec)
    elif batch.labels.ndim == 2:
        check_task(losses, NUMBERS if batch.labels.is_floating_point() else LABELS)
    elif not all(EMBEDDING in loss.tasks for loss in losses):
        check_task(losses, CLASSES)


def _check_needs_no_part(loss: Loss, student: Any, batch: Batch) -> None:
    """Check that a loss which has no part is the one that its parameters describe.

    Raises:
        UsageError: It lacks statistics of the training rows, or a projection.
    """
    what = ""
    if isinstance(loss, BCE) and loss.balance:
        what = f"balance={loss.balance}"
    elif isinstance(loss, Embed) and loss.standardize != "none":
        what = f"standardize={loss.standardize}"
    elif isinstance(loss, Embed) and (
        loss.projection != "auto"
        or (batch.logits is not None and batch.logits.shape[-1] != select_logits(student).shape[-1])
    ):
        what = "a projection"
    if what:
        raise UsageError(
            f"loss '{loss.name}': {what} is made of a batch of the cache's loader: call"
            " criterion.attach(student, example=batch) before the first step"
        )


def select_logits(output: Any) -> torch.Tensor:
    """Return the logits of what a student returned, see `DistillationLoss.collect_outputs`."""
    if isinstance(output, ModelOutputs | torch.Tensor):
        return output if isinstance(output, torch.Tensor) else output.logits
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise UsageError(f"the student returned a {type(output).__name__}, not logits [B, K] or an object with logits")
    return logits


def _to_float32(x: torch.Tensor) -> torch.Tensor:
    """Losses are computed in float32 also where a network runs in half precision; float64 stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _find_trained_head(network: nn.Module, classes: int) -> LinearHead | None:
    """Return the network's last linear layer, sharing its parameters; with a bias of zeros where it has none."""
    layer = find_head(network, classes)
    if layer is None:
        return None
    return LinearHead(layer.weight, layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias)


def sum_terms(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add the terms of a loss. A single term is returned as it is: a stack and a sum would cost time in each step."""
    return terms[0] if len(terms) == 1 else torch.stack(list(terms)).sum()


def term_names(losses: Sequence[Loss]) -> list[str]:
    """Name each term: `kd`, and `hint-0`, `hint-1` where there are several of a kind."""
    kinds = [loss.name for loss in losses]
    return [kind if kinds.count(kind) == 1 else f"{kind}-{kinds[:i].count(kind)}" for i, kind in enumerate(kinds)]
