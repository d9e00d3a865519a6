"""Held-out splits: the logits of a model on their views without augmentation."""

from collections.abc import Generator
from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from softcache.base.errors import UsageError
from softcache.data.tasks import CLASSES, EMBEDDING, find_known
from softcache.data.transfer_set import Split, TransferSet
from softcache.data.views.policy import ViewPolicy
from softcache.pipeline.loading.rendering import render_batches
from softcache.pipeline.loading.view_checks import ViewChecks
from softcache.pipeline.metrics.embeddings import mean_cosine
from softcache.pipeline.metrics.tasks import TASK_FIGURES
from softcache.pipeline.models.precision import autocast
from softcache.stages.cli.configs import StudentConfig, TeacherConfig


class HeldOutSplit:
    """A held-out split, on which models are evaluated. Its views stay in memory where they are small.

    Args:
        split: the split.
        views: the view policy, of which only the part without augmentation is used.
        device: where models are.
        config: precision of the forward pass, and workers that render views.
        checks: compares the views with those that the teacher saw; None without a teacher.
        task: what the hard targets are, see data/tasks.py.
        teacher_outputs: float32 [N, K] of the teacher, by index; None without a teacher.
    """

    _MAX_CACHED_BYTES = 256 << 20

    def __init__(
        self,
        split: Split,
        views: ViewPolicy,
        device: torch.device,
        config: TeacherConfig | StudentConfig,
        checks: ViewChecks | None = None,
        task: str = CLASSES,
        teacher_outputs: NDArray[np.float32] | None = None,
    ):
        self.split, self.views, self.device = split, views.without_augmentation(), device
        self._checks, self._task, self._teacher_outputs = checks, task, teacher_outputs
        self.precision, self.workers = config.precision, config.workers
        self.labels, self.batch_size = split.labels, 512
        self._cached_batches: list[torch.Tensor] = []

    def logits(self, model: nn.Module) -> NDArray[np.float32]:
        """Compute the logits of a model in eval mode, float32 [N, K], in row order of the split."""
        was_training = model.training
        model.eval()
        with torch.inference_mode(), autocast(self.device, self.precision), closing(self.batches()) as batches:
            outputs = [model(views.to(self.device)).float().cpu() for views in batches]
        model.train(was_training)
        logits: NDArray[np.float32] = torch.cat(outputs).numpy()
        return logits

    def summarize(self, logits: NDArray[np.float32]) -> dict[str, float]:
        """Compute the figures that are shown after an epoch from the logits of a model, float32 [N, K].

        Those of TASK_FIGURES; of an embedding its cosine to the teacher's, where both have one width.
        """
        if self._task != EMBEDDING:
            return TASK_FIGURES[self._task].summarize(logits, self.labels)
        if self._teacher_outputs is None:
            return {}
        cosine = mean_cosine(logits.astype(np.float64), self._teacher_outputs.astype(np.float64))
        return {} if cosine is None else {"cosine": cosine}

    def batches(self) -> Generator[torch.Tensor, None, None]:
        """Yield the views, uint8 [B, C, S, S] with B up to batch_size, in row order of the split. The caller closes
        it."""
        if self._cached_batches:
            yield from self._cached_batches
            return
        rows = np.arange(len(self.split))
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        rendered, size = [], 0
        with closing(render_batches(self.split.images, self.views, 0, batches, 0, self.workers)) as all_views:
            for index, views in zip(batches, all_views, strict=True):
                if self._checks is not None:
                    self._checks.compare_views(views, index, 0)
                size += views.numel()
                if size <= self._MAX_CACHED_BYTES:
                    rendered.append(views)
                yield views
        if size <= self._MAX_CACHED_BYTES:
            self._cached_batches = rendered


def check_select(config: TeacherConfig | StudentConfig, transfer_set: TransferSet) -> None:
    """Raise UsageError for --select with a metric of another task, or where the validation split has no labels."""
    if config.select == "last":
        return
    figures = TASK_FIGURES[transfer_set.task].select
    if config.select not in figures:
        names = ", ".join(("last", *figures))
        raise UsageError(f"--select {config.select} is no figure of the task {transfer_set.task}, which has {names}")
    if transfer_set.task == EMBEDDING:
        return
    labels = transfer_set.splits["val"].labels
    if not find_known(labels).any():
        raise select_error(config.select)
    if labels.ndim == 1:
        return
    if config.select not in TASK_FIGURES[transfer_set.task].summarize(np.zeros(labels.shape), labels):
        raise UsageError(
            f"--select {config.select} is not defined on these {len(labels):,} validation rows, in which no label is"
            " positive or no number varies: leave it out, and the weights of the last epoch are kept"
        )


def select_error(figure: str) -> UsageError:
    """Make the error for --select with a metric where the validation split has no labels."""
    return UsageError(
        f"--select {figure} needs labels to validate on, and these images have none: leave it out, and the weights of"
        " the last epoch are kept"
    )
