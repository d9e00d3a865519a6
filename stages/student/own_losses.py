"""The check of a user's own losses before anything is written: one step without an update."""

from pathlib import Path

import torch

from softcache.base.errors import UsageError
from softcache.base.threads import take_first
from softcache.base.user_code import user_code
from softcache.pipeline.losses import Custom
from softcache.pipeline.models.precision import autocast
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.training.step import attach_criterion

from .phases import first_phase, make_training_run
from .requirements import hide_labels
from .setup import DistillationSetup


def check_own_losses(config: StudentConfig, setup: DistillationSetup) -> None:
    """Compute the loss of the first batch forwards and backwards, where a term is a user's own. Nothing is kept of it.

    Args:
        config: the options of the student.
        setup: what it is trained from.

    Raises:
        UsageError: a loss of the user's own fails, returns no scalar, or no term depends on the student.
    """
    names = [loss.name for loss in setup.losses if isinstance(loss, Custom)]
    if not names:
        return
    with torch.random.fork_rng([setup.device] if setup.device.type == "cuda" else []):
        network = setup.build_student(config, setup.losses)
        labels = hide_labels(config, setup.transfer_set.splits["train"].labels)
        run = make_training_run(
            first_phase(config), config, setup, network=network, losses=setup.losses, labels=labels, folder=Path()
        )
        attach_criterion(run)
        batch = take_first(run.stream.batches(0, 1)).to(run.device)
        run.model.train()
        with autocast(run.device, config.precision):
            logits = run.model(batch.views)
        loss = run.criterion(logits, batch)
        run.criterion.detach()
        if not loss.requires_grad:
            raise UsageError(
                f"loss '{names[0]}' has no gradient: what it returns does not depend on outputs, the student's logits"
                " and features"
            )
        with user_code(f"the backward pass of loss '{names[0]}' failed"):
            loss.backward()
