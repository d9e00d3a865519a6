"""A teacher as it is asked: its arithmetic, the layers that are tapped, compiled or not."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from softcache.base.errors import CacheError
from softcache.pipeline.models.bn_folding import fold_batch_norm
from softcache.pipeline.models.precision import autocast
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.pipeline.taps.hooks import capture_features
from softcache.pipeline.taps.statistics import parse_tap

TeacherOutputs = tuple[torch.Tensor, dict[str, torch.Tensor]]
InferFunction = Callable[[torch.Tensor], TeacherOutputs]

_MAX_DIFFERENCE = 1e-3  # of the largest value: rounding of float32 is a thousandth of it


class TeacherInference:
    """What answers: the teacher itself, or a copy of it with batch norm folded, in float32 or bfloat16.

    teacher: in eval mode, on its device, and never changed. In float32 and not folded the answers are the teacher's
    own to the last bit. folded: whether something was folded.
    """

    def __init__(self, teacher: PreparedModel, taps: tuple[str, ...], precision: str = "float32", fold: bool = False):
        self.teacher, self.taps, self.precision = teacher, taps, precision
        self._model = fold_batch_norm(teacher, [parse_tap(tap)[0] for tap in taps]) if fold else teacher
        self._compiled: InferFunction | None = None
        self.differs_when_folded = self.folded and not self._matches_when_folded()
        if self.differs_when_folded:
            self._model = teacher

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.teacher.scale.device

    @property
    def folded(self) -> bool:
        """Whether batch norm was folded, at one place or more."""
        return self._model is not self.teacher

    @property
    def is_plain(self) -> bool:
        """Whether it is the teacher as it is."""
        return self.precision == "float32" and not self.folded and not self.compiled

    @property
    def compiled(self) -> bool:
        """Whether it was compiled."""
        return self._compiled is not None

    @contextmanager
    def open(self) -> Iterator[InferFunction]:
        """A function uint8 [B, C, S, S] on its device -> logits float32 [B, K] and {tap: [B, …]}, for the time of a
        with statement; the features are overwritten by the next call's."""
        if self._compiled is not None:
            yield self._compiled
            return
        asked = self._model
        # autocast once and not for each batch: it keeps the weights that it has cast
        with (
            torch.inference_mode(),
            autocast(self.device, self.precision),
            capture_features(asked.network, self.taps) as kept,
        ):
            yield lambda views: (asked(views), kept)

    def compile(self, views: torch.Tensor, rows: int) -> None:
        """Compile it for batches of so many rows, by asking about some views. Raises whatever the compiler does, and
        is then as it was before.

        A smaller batch is padded with its own views: another shape would be compiled again, and rows of a network
        in eval mode do not see each other.
        """
        torch.compiler.reset()  # what is compiled is known by its code, which all of these share, eight times at most
        own = copy.deepcopy(self._model)
        hooks = ExitStack()
        kept = hooks.enter_context(capture_features(own.network, self.taps))

        def ask(views: torch.Tensor) -> TeacherOutputs:
            with autocast(self.device, self.precision):
                logits = own(views)
            return logits, dict(kept)

        # freezing: weights become constants, cast and packed once; of use on CPUs
        options: dict[str, Any] = {"freezing": True} if self.device.type == "cpu" else {}
        compiled = torch.compile(ask, fullgraph=True, dynamic=False, options=options)

        def padded(views: torch.Tensor) -> TeacherOutputs:
            kept.clear()  # guarded: with the last batch's in it the function would be compiled again
            n = len(views)
            with torch.no_grad():  # inference mode would be another guard
                if n < rows:
                    views = views[torch.arange(rows, device=views.device) % n]
                logits, features = compiled(views)
            return logits[:n], {tap: x[:n] for tap, x in features.items()}

        padded(views.to(self.device))
        self._compiled, self._hooks = padded, hooks  # the hooks of the copy stay for as long as this lives

    def _matches_when_folded(self) -> bool:
        """A trace may have seen another way through a network than a batch takes: asked about a few views, in float32.

        They are noise: what is folded is affine, and wrong anywhere if it is wrong.
        """
        channels, size = self.teacher.input_spec.channels, self.teacher.input_spec.size
        noise = torch.Generator().manual_seed(0)
        views = torch.randint(0, 256, (4, channels, size, size), dtype=torch.uint8, generator=noise).to(self.device)
        said, cudnn = [], torch.backends.cudnn
        for asked in (self.teacher, self._model):
            exact = cudnn.flags(enabled=cudnn.enabled, allow_tf32=False)  # TF32 rounds by more than what is looked for
            with exact, torch.inference_mode(), capture_features(asked.network, self.taps) as kept:
                said.append([asked(views), *(kept[tap] for tap in self.taps)])
        return all(
            bool((a - b).abs().max() <= _MAX_DIFFERENCE * a.abs().max().clamp(min=1e-6))
            for a, b in zip(*said, strict=True)
        )


def restore_inference(teacher: PreparedModel, taps: tuple[str, ...], precision: str, fold: bool) -> TeacherInference:
    """What answers as a cache was begun. Raises CacheError where its batch norm was folded and cannot be here."""
    answering = TeacherInference(teacher, taps, precision, fold)
    if answering.differs_when_folded:
        raise CacheError(
            "the cache was begun with batch norm folded, and that says something else than the teacher here: go on"
            " with the versions that it was begun with, or make a new one"
        )
    return answering
