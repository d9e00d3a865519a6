"""Running a teacher: its numeric precision, its taps, batch norm folded or not, compiled or not."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base.errors import CacheError
from softcache.data.tasks import CLASSES, LABELS
from softcache.pipeline.models.bn_folding import fold_batch_norm
from softcache.pipeline.models.other_frameworks.file_network import StoredTargets
from softcache.pipeline.models.precision import autocast
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.pipeline.taps.hooks import capture_features
from softcache.pipeline.taps.statistics import parse_tap

from .compilation import make_program

TeacherOutputs = tuple[torch.Tensor, dict[str, torch.Tensor]]  # logits float32 [B, K], features {tap: [B, …]}
InferFunction = Callable[[torch.Tensor], TeacherOutputs]

LOGITS, PROBABILITIES = "logits", "probabilities"  # what a network outputs: the choices of --outputs
# The smallest probability whose logarithm is stored, -87.3: the smallest normal number of float32. A probability that
# a network has rounded to 0 counts as this one.
MIN_PROBABILITY = torch.finfo(torch.float32).tiny
_MAX_DIFFERENCE = 1e-3  # as a share of the largest value; float32 rounds to a thousandth of this


class TeacherInference:
    """A teacher and the way in which it is run.

    In float32, neither folded nor compiled, the outputs are the teacher's own to the last bit.

    Args:
        teacher: In eval mode, on its device. It is never changed.
        taps: Layers whose outputs are read.
        precision: "float32" or "bfloat16".
        fold: Fold batch norm into convolutions, where that is possible and gives the same outputs.
        outputs: "logits", or "probabilities" for a network that outputs these or their logarithms, which are turned
            into logarithms.
        maps_classes: Whether a class map of the teacher is applied to its logits.
        task: What the teacher predicts, see data/tasks.py: of several labels, probabilities become log-odds.

    Attributes:
        teacher, taps, precision, outputs, task: As given.
        differs_when_folded: Whether the teacher was not folded because its outputs would have changed.
    """

    def __init__(
        self,
        teacher: PreparedModel,
        taps: tuple[str, ...],
        precision: str = "float32",
        fold: bool = False,
        outputs: str = LOGITS,
        maps_classes: bool = True,
        task: str = CLASSES,
    ):
        self.teacher, self.taps, self.precision, self.outputs = teacher, taps, precision, outputs
        self._maps_classes, self.task = maps_classes, task
        self._model = fold_batch_norm(teacher, [parse_tap(tap)[0] for tap in taps]) if fold else teacher
        self._compiled: InferFunction | None = None
        self.differs_when_folded = self.is_folded and not self._matches_when_folded()
        if self.differs_when_folded:
            self._model = teacher

    @property
    def device(self) -> torch.device:
        """Device of the teacher."""
        return self.teacher.scale.device

    @property
    def is_folded(self) -> bool:
        """Whether at least one batch norm was folded."""
        return self._model is not self.teacher

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` succeeded."""
        return self._compiled is not None

    @property
    def is_plain(self) -> bool:
        """Whether the outputs are the teacher's own to the last bit: float32, neither folded nor compiled."""
        return self.precision == "float32" and not self.is_folded and not self.is_compiled

    @contextmanager
    def open(self) -> Iterator[InferFunction]:
        """Prepare to run the teacher on many batches.

        Yields:
            A function of uint8 views [B, C, S, S] on `device` that returns logits float32 [B, K] and features
            {tap: [B, …]}. The next call overwrites the features.
        """
        if self._compiled is not None:
            yield self._compiled
            return
        model = self._model
        # One autocast for all batches: it caches the weights that it has cast.
        with (
            torch.inference_mode(),
            autocast(self.device, self.precision),
            capture_features(model.network, self.taps) as features,
        ):
            yield lambda views: (self._to_logits(model(views)), features)

    @contextmanager
    def open_rows(self, split: str, batches: Iterable[NDArray[np.int64]]) -> Iterator[InferFunction]:
        """As `open`, for the views of some rows of a split: targets that were made elsewhere are looked up by row.

        Args:
            split: `train`, `val` or `test`.
            batches: int64 [B] each, the rows whose views the function is called with, in this order.
        """
        network = self.teacher.network
        if not isinstance(network, StoredTargets):
            with self.open() as infer:
                yield infer
            return
        remaining = iter(batches)
        yield lambda views: (self._to_logits(network.look_up(split, next(remaining))), {})

    def compile(self, views: torch.Tensor, rows: int, tell: Callable[[str], object] = lambda line: None) -> None:
        """Compile the teacher for batches of one size, or load what was compiled before, and run it once.

        A smaller batch is padded with its own views: another shape would be compiled again. Padding changes no
        output, because the rows of a network in eval mode do not depend on each other.

        Args:
            views: uint8 [B, C, S, S], for the first run.
            rows: Size of the largest batch.
            tell: Called with a line for the user that says which of the two is done, before it is.

        Raises:
            Exception: Whatever the compiler raises; the teacher then runs as before.
        """
        model = copy.deepcopy(self._model)
        hooks = ExitStack()
        features = hooks.enter_context(capture_features(model.network, self.taps))

        def infer(views: torch.Tensor) -> list[torch.Tensor]:
            with autocast(self.device, self.precision):
                logits = self._to_logits(model(views))
            return [logits, *(features[tap] for tap in self.taps)]

        def pad(views: torch.Tensor) -> torch.Tensor:
            n = len(views)
            return (views if n == rows else views[torch.arange(rows, device=views.device) % n]).contiguous()

        program = make_program(infer, model, pad(views.to(self.device)), tell)

        def infer_padded(views: torch.Tensor) -> TeacherOutputs:
            features.clear()  # a guard of the compiled code: with the features of the last batch it is compiled again
            with torch.no_grad():  # inference mode would be another guard
                outputs = program(pad(views))
            logits, *padded_features = (output[: len(views)] for output in outputs)
            return logits, dict(zip(self.taps, padded_features, strict=True))

        infer_padded(views.to(self.device))
        self._compiled, self._hooks = infer_padded, hooks  # the copy's hooks are needed as long as the compiled code

    def _to_logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the logits of outputs [B, K]: probabilities become logarithms, then the classes are mapped.

        Those of several labels become log-odds.
        """
        if outputs.ndim != 2:
            return outputs
        if self.task == LABELS:
            return outputs if self.outputs == LOGITS else _to_log_odds(outputs)
        logits = outputs if self.outputs == LOGITS else _to_logarithms(outputs)
        return self.teacher.map_classes(logits) if self._maps_classes else logits

    def _matches_when_folded(self) -> bool:
        """Compare the folded model with the teacher on four views, in float32.

        A network may take another path through its code when it is traced than with a batch. The views are noise:
        folding is affine, so where it is wrong, it is wrong for any input.
        """
        views = self.teacher.input_spec.make_views(4).to(self.device)
        cudnn = torch.backends.cudnn
        outputs = []
        for model in (self.teacher, self._model):
            without_tf32 = cudnn.flags(enabled=cudnn.enabled, allow_tf32=False)  # TF32 rounds more than the tolerance
            with without_tf32, torch.inference_mode(), capture_features(model.network, self.taps) as features:
                outputs.append([model(views), *(features[tap] for tap in self.taps)])
        for expected, folded in zip(*outputs, strict=True):
            tolerance = _MAX_DIFFERENCE * expected.abs().max().clamp(min=1e-6)
            if not (expected - folded).abs().max() <= tolerance:  # NaN is a difference, too
                return False
        return True


def _to_logarithms(outputs: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of probabilities [B, K]; rows that are logarithms already are limited alone.

    A row of probabilities has a positive value, a row of their logarithms has none.
    """
    logarithms = outputs.clamp(min=MIN_PROBABILITY).log()
    is_probability = outputs.amax(1, keepdim=True) > 1e-6  # log_softmax rounds 0 to no more than this
    return torch.where(is_probability, logarithms, outputs.clamp(min=math.log(MIN_PROBABILITY), max=0.0))


def _to_log_odds(outputs: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) of probabilities [B, K], -87.3 to 87.3; NaN outside 0 to 1."""
    positive, negative = outputs.clamp(min=MIN_PROBABILITY).log(), (1 - outputs).clamp(min=MIN_PROBABILITY).log()
    is_probability = (outputs >= 0) & (outputs <= 1)
    return torch.where(is_probability, positive - negative, torch.nan)


def restore_inference(
    teacher: PreparedModel,
    taps: tuple[str, ...],
    precision: str,
    fold: bool,
    outputs: str = LOGITS,
    task: str = CLASSES,
) -> TeacherInference:
    """Make the inference that an existing cache was written with.

    Raises:
        CacheError: Batch norm was folded then, and cannot be folded now without changing the outputs.
    """
    inference = TeacherInference(teacher, taps, precision, fold, outputs, task=task)
    if inference.differs_when_folded:
        raise CacheError(
            "the cache was started with batch norm folded, and here that changes the teacher's outputs: continue with"
            " the library versions that it was started with, or make a new cache"
        )
    return inference
