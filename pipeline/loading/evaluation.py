"""Running a student over a split."""

from contextlib import closing

import torch
from torch import nn

from softcache.pipeline.losses.distillation_loss import select_logits

from .stream import BatchStream


def run_student(student: nn.Module, stream: BatchStream) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a student in eval mode, without gradients, over an epoch of a stream; on every rank over the whole split.

    Args:
        student: images float32 [B, C, H, W] -> logits [B, K], on the device of the stream.
        stream: Batches with targets.

    Returns:
        The student's logits and the teacher's, float32 [N, K] each ([N, M, K] of M teachers), on the CPU.

    Raises:
        UsageError: The student returns no logits.
    """
    was_training, logits, teacher_logits = student.training, [], []
    student.eval()
    try:
        with torch.no_grad(), closing(stream.batches(0, stream.steps_per_epoch)) as batches:
            for batch in batches:
                assert batch.logits is not None
                logits.append(select_logits(student(batch.images)).float().cpu())
                teacher_logits.append(batch.logits.cpu())
    finally:
        student.train(was_training)
    return torch.cat(logits), torch.cat(teacher_logits)
