"""Trials: running a teacher in several ways on some of its own views, to compare their speed and their logits."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.data.transfer_set import TransferSet
from softcache.data.views.policy import ViewPolicy
from softcache.data.views.render import render
from softcache.pipeline.cache.codecs import measure_fidelity
from softcache.pipeline.cache.manifest import PrecisionRecord
from softcache.pipeline.cache.rows import make_row_order
from softcache.stages.cli.configs import CacheConfig

from .inference import TeacherInference

_MAX_VIEWS, _MIN_BATCHES = 512, 2
_MAX_TURNS = 3  # over all views
_QUICK_TURN = 1.0  # seconds; after a turn that took longer there is no other
_MIN_SPEEDUP = 1.05  # over plain float32, which is preferred otherwise: its outputs are the teacher's to the last bit


@dataclass(frozen=True)
class TrialViews:
    """The views of a trial: those of the first draw that are written first, 512 or as many as there are.

    Args:
        transfer_set: Its images.
        views: The view policy.
        config: Options of the command.
    """

    transfer_set: TransferSet
    views: ViewPolicy
    config: CacheConfig

    @property
    def batch_rows(self) -> int:
        """Size of the largest batch that stage one runs."""
        rows = max(len(split) for split in self.transfer_set.splits.values())
        return min(self.config.batch_size, self.config.shard_rows or rows, rows)

    def render(self) -> list[torch.Tensor]:
        """Render the views as batches uint8 [B, C, S, S], at least two: the first one also warms everything up."""
        train = self.transfer_set.splits["train"]
        index = make_row_order(self.config.seed, "train", len(train))[:_MAX_VIEWS].astype(np.int64)
        size = min(self.batch_rows, -(-len(index) // _MIN_BATCHES))
        batches = [index[i : i + size] for i in range(0, len(index), size)]
        return [render(train.images, self.views, self.config.seed, batch, 0) for batch in batches]


@dataclass
class Trial:
    """One way to run the teacher, and what came out.

    Attributes:
        inference: The teacher and the way in which it is run.
        logits: float32 [B, K] of each batch.
        seconds: Time of a view in the fastest batch; infinite before the first one.
        failure: First line of the error that running it raised; empty where there was none.
    """

    inference: TeacherInference
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    seconds: float = float("inf")
    failure: str = ""

    @property
    def rate(self) -> float:
        """Images a second."""
        return 1 / self.seconds

    @property
    def problem(self) -> str:
        """Why this way cannot be used; empty where it can."""
        is_finite = all(np.isfinite(logits).all() for logits in self.logits)
        return self.failure or ("" if is_finite else "its logits are not finite")

    def run_batch(self, views: torch.Tensor, store_logits: bool) -> None:
        """Run one batch and time it; nothing after a failure.

        Args:
            views: uint8 [B, C, S, S].
            store_logits: Whether to append the logits to `logits`.

        Raises:
            RuntimeError, TypeError, ValueError: The plain teacher raised it. Where another way raises one of these,
                it is recorded in `failure`.
        """
        if self.failure:
            return
        try:
            logits, seconds = time_inference(self.inference, views)
        except (RuntimeError, TypeError, ValueError) as error:  # a network may be a user's code
            if self.inference.is_plain:
                raise
            self.failure = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            return
        self.seconds = min(self.seconds, seconds / len(views))
        if store_logits:
            self.logits.append(logits)

    def make_record(self, plain: "Trial") -> PrecisionRecord:
        """Make the record of this way, and of what it costs against plain float32, for the manifest.

        It has been run without a problem.
        """
        sums = measure_fidelity(np.concatenate(plain.logits), np.concatenate(self.logits), self.inference.task)
        names = set(sums) & set(PrecisionRecord.__dataclass_fields__) - {"rows"}
        return PrecisionRecord(
            folded=self.inference.is_folded,
            compiled=self.inference.is_compiled,
            rows=sum(map(len, self.logits)),
            **{name: sums[name] / sums["rows"] for name in names},
        )

    def is_preferable(self, plain: "Trial", tolerance: float) -> bool:
        """Whether this is usable, clearly faster than plain float32, and what it costs within a tolerance."""
        is_faster = self.seconds * _MIN_SPEEDUP < plain.seconds
        return is_faster and not self.problem and self.make_record(plain).cost <= tolerance


def run_trials(trials: list[Trial], batches: list[torch.Tensor]) -> None:
    """Run every trial on every batch, in turns, so that a moment in which the machine is busy slows all of them.

    Args:
        trials: Changed in place.
        batches: uint8 [B, C, S, S] each. They are run up to three times, while that is quick.
    """
    for turn in range(_MAX_TURNS):
        start = time.monotonic()
        for views in batches:
            for trial in trials:
                trial.run_batch(views, store_logits=turn == 0)
        if time.monotonic() - start > _QUICK_TURN:
            return


def time_inference(inference: TeacherInference, views: torch.Tensor) -> tuple[NDArray[np.float32], float]:
    """Run one batch of views, and return its logits float32 [B, K] and the seconds that it took."""
    with inference.open() as infer:
        start = time.perf_counter()
        logits = infer(views.to(inference.device))[0].cpu()
        return logits.numpy(), time.perf_counter() - start
