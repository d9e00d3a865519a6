"""Held-out splits: what a model says about their plain views."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from softcache.base.errors import UsageError
from softcache.data.transfer_set import Split, TransferSet
from softcache.data.views import ViewPolicy
from softcache.pipeline.loading.rendering import render_batches
from softcache.pipeline.models.precision import autocast
from softcache.stages.cli.configs import StudentConfig, TeacherConfig

Trained = TeacherConfig | StudentConfig


class HeldOutSplit:
    """A held-out split: its plain views, kept in memory where they are small, and what a model says about them."""

    _KEEP_BYTES = 256 << 20

    def __init__(self, split: Split, views: ViewPolicy, device: torch.device, config: Trained):
        self.split, self.views, self.device = split, views.without_augmentation(), device
        self.precision, self.workers = config.precision, config.workers
        self.labels, self.batch_size = split.labels, 512
        self._kept: list[torch.Tensor] = []

    def logits(self, model: nn.Module) -> NDArray[np.float32]:
        """float32 [N, K], in row order of the split, with the model in eval mode."""
        was_training = model.training
        model.eval()
        with torch.inference_mode(), autocast(self.device, self.precision):
            said = [model(views.to(self.device)).float().cpu() for views in self.batches()]
        model.train(was_training)
        logits: NDArray[np.float32] = torch.cat(said).numpy()
        return logits

    def batches(self) -> Iterator[torch.Tensor]:
        """The plain views uint8 [B, C, S, S], batch_size of them at a time, in row order of the split."""
        if self._kept:
            yield from self._kept
            return
        rows = np.arange(len(self.split))
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        kept, size = [], 0
        for views in render_batches(self.split.images, self.views, 0, batches, 0, self.workers):
            size += views.numel()
            if size <= self._KEEP_BYTES:
                kept.append(views)
            yield views
        if size <= self._KEEP_BYTES:
            self._kept = kept


def check_select(config: TeacherConfig | StudentConfig, transfer_set: TransferSet) -> None:
    if config.select != "last" and not (transfer_set.splits["val"].labels >= 0).any():
        raise UsageError(
            f"--select {config.select} needs labels to validate on, and these images have none: leave it out"
        )
