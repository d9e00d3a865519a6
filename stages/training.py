"""The one training loop: a teacher, a baseline and a student differ in their stream and losses alone."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data.errors import Interrupted, Refused, WrongCommand
from data.transfer_set import Split
from data.views import ViewPolicy
from pipeline.losses import Loss, at
from pipeline.metrics import summary
from pipeline.models.prepared import Prepared
from pipeline.models.weights import load_state, read_state
from pipeline.publish import publish
from pipeline.records import Outputs, TargetBatch
from pipeline.stream import Stream, render_in_order
from pipeline.taps import tapped

from .console import Console, LongWork, bar
from .runs import this_program
from .settings import Machine, Training

_CHECKPOINT, _LINES = "checkpoint.pt", "metrics.jsonl"


@dataclass(frozen=True)
class Job:
    """What is trained. name: teacher, baseline or student; epochs of steps steps each; folder: where it is kept."""

    name: str
    model: Prepared
    losses: tuple[Loss, ...]
    stream: Stream
    epochs: int
    steps: int
    settings: Training
    device: torch.device
    precision: str
    folder: Path
    advice: str = ""


def fit(job: Job, held_out: "HeldOut | None", console: Console) -> float:
    """Train job.model in place and return the seconds it took, those before an interruption included.

    After every epoch the state is published as checkpoint.pt and a line added to metrics.jsonl; a later call
    goes on from there and ends with the same weights. At the end the weights are published as NAME.pt.
    Raises Refused when a loss is no longer finite, Interrupted on Ctrl-C.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    if (finished := job.folder / f"{job.name}.pt").is_file():
        load_state(job.model.network, read_state(finished), str(finished))
        lines = (job.folder / _LINES).read_text(encoding="utf-8").splitlines()
        return float(sum(json.loads(line)["seconds"] for line in lines))
    taps = tuple(dict.fromkeys(tap for loss in job.losses for tap in loss.student_taps()))
    modules = _loss_modules(job, taps)
    trainer = _Trainer(job, modules, taps)
    first = trainer.restore()
    total = job.epochs * job.steps
    long_work = LongWork(console, f"Training the {job.name}", total, job.advice)
    try:
        with bar(total, job.name, "step") as shown, tapped(job.model.network, taps) as kept:
            shown.update(first * job.steps)

            def done(steps: int) -> None:
                shown.update()
                long_work.at(steps)

            batches = job.stream.batches(first * job.steps, total)
            for epoch in range(first, job.epochs):
                begun = time.monotonic()
                terms = trainer.epoch(epoch, batches, kept, done)
                line = {"epoch": epoch + 1, **terms}
                if held_out is not None:
                    line |= {
                        f"val_{k}": v for k, v in summary(held_out.logits(trainer.result()), held_out.labels).items()
                    }
                line["seconds"] = round(time.monotonic() - begun, 4)
                shown.set_postfix({k: f"{v:.4g}" for k, v in line.items() if k != "epoch"}, refresh=False)
                trainer.keep(line)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; go on with  {this_program()} {_command(job)}") from None
    if trainer.average is not None:
        job.model.load_state_dict(trainer.average.module.state_dict())
    state = {k: v.detach().cpu() for k, v in job.model.network.state_dict().items()}
    publish(finished, lambda path: torch.save(state, path))
    (job.folder / _CHECKPOINT).unlink(missing_ok=True)
    return float(sum(line["seconds"] for line in trainer.lines))


def _command(job: Job) -> str:
    out = job.settings.out
    return f"teacher --resume --out {out}" if job.name == "teacher" else f"student --resume --out {out}"


def _loss_modules(job: Job, taps: tuple[str, ...]) -> dict[str, nn.Module]:
    """The losses' own trainable parts, made from the shapes of one batch."""
    batch = next(job.stream.batches(0, 1)).rows(0, 2).to(job.device)
    job.model.eval()
    with torch.no_grad(), tapped(job.model.network, taps) as kept:
        outputs = Outputs(job.model(batch.views), dict(kept))
    job.model.train()
    if batch.logits is not None and batch.logits.shape[1:] != outputs.logits.shape[1:]:
        raise WrongCommand(f"the student has {outputs.logits.shape[1]} classes, the cache {batch.logits.shape[1]}")
    made = {f"{i}-{loss.name}": loss.module(outputs, batch) for i, loss in enumerate(job.losses)}
    return {name: module.to(job.device) for name, module in made.items() if module is not None}


class _Trainer:
    """Everything that a checkpoint has to hold: weights, optimiser, schedule, average, random state."""

    def __init__(self, job: Job, modules: dict[str, nn.Module], taps: tuple[str, ...]):
        self.job, self.modules, self.taps = job, modules, taps
        self.weights = [p for m in (job.model, *modules.values()) for p in m.parameters() if p.requires_grad]
        self.optimizer = _optimizer(job.settings, self.weights)
        total = job.epochs * job.steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_share(job.settings, step, total)
        )
        decay = job.settings.ema
        self.average = (
            AveragedModel(
                job.model,
                multi_avg_fn=get_ema_multi_avg_fn(decay),  # type: ignore[no-untyped-call]
                use_buffers=True,
            )
            if decay
            else None
        )
        self.lines: list[dict[str, Any]] = []

    def epoch(
        self, epoch: int, batches: Iterator[TargetBatch], kept: dict[str, torch.Tensor], done: Callable[[int], None]
    ) -> dict[str, float]:
        """One epoch of steps; the mean of each weighted term and of their sum."""
        job = self.job
        losses = [at(loss, epoch / max(job.epochs - 1, 1)) for loss in job.losses]
        sums = torch.zeros(len(losses), device=job.device)
        job.model.train()
        for step in range(epoch * job.steps, (epoch + 1) * job.steps):
            sums += self._step(next(batches).to(job.device), losses, kept)
            done(step + 1)
        means = (sums / job.steps).tolist()  # the one synchronisation of an epoch
        names = [
            loss.name if [x.name for x in losses].count(loss.name) == 1 else f"{loss.name}{i}"
            for i, loss in enumerate(losses)
        ]
        for name, mean in zip(names, means, strict=True):
            if not np.isfinite(mean):
                raise Refused(
                    f"training the {job.name} diverged: the term '{name}' is {mean} in epoch {epoch + 1}."
                    f" Lower --learning-rate (now {job.settings.learning_rate:g}), or set --clip-norm 1"
                )
        return {"loss": sum(means), **{f"loss_{n}": m for n, m in zip(names, means, strict=True)}}

    def _step(self, batch: TargetBatch, losses: list[Loss], kept: dict[str, torch.Tensor]) -> torch.Tensor:
        job = self.job
        with autocast(job.device, job.precision):
            logits = job.model(batch.views)
        outputs = Outputs(logits.float(), {tap: kept[tap].float() for tap in self.taps})
        terms = [
            loss.weight * loss(outputs, batch, self.modules.get(f"{i}-{loss.name}"))  # type: ignore[operator]
            for i, loss in enumerate(losses)
        ]
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
        if job.settings.clip_norm:
            nn.utils.clip_grad_norm_(self.weights, job.settings.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(job.model)
        return torch.stack([term.detach() for term in terms])

    def result(self) -> nn.Module:
        """The model as it would be kept now."""
        return self.job.model if self.average is None else self.average.module

    def keep(self, line: dict[str, Any]) -> None:
        """Publish the state after an epoch, then its line."""
        self.lines.append(line)
        state = {
            "epoch": line["epoch"],
            "model": self.job.model.state_dict(),
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "average": self.average.state_dict() if self.average is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "lines": json.dumps(self.lines),
        }
        publish(self.job.folder / _CHECKPOINT, lambda path: torch.save(state, path))
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        publish(self.job.folder / _LINES, lambda path: _write(path, text))

    def restore(self) -> int:
        """Go back to the checkpoint, if there is one; the number of epochs that are done."""
        path = self.job.folder / _CHECKPOINT
        if not path.is_file():
            return 0
        state = torch.load(path, map_location=self.job.device, weights_only=True)
        self.job.model.load_state_dict(state["model"])
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        torch.set_rng_state(state["random"].cpu())
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all([s.cpu() for s in state["random_cuda"]])
        self.lines = json.loads(state["lines"])
        return int(state["epoch"])


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _optimizer(settings: Training, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=rate, weight_decay=decay)
    nesterov = settings.nesterov and settings.momentum > 0
    return torch.optim.SGD(weights, lr=rate, momentum=settings.momentum, nesterov=nesterov, weight_decay=decay)


def learning_rate_share(settings: Training, step: int, total: int) -> float:
    """The learning rate of a step as a share of its highest: warm-up, then the schedule."""
    warm = int(settings.warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = (step - warm) / max(total - warm, 1)
    if settings.schedule == "cosine":
        return 0.5 * (1 + float(np.cos(np.pi * progress)))
    if settings.schedule == "step":
        return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    return 1.0


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bfloat16 where it is asked for; float32 otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


class HeldOut:
    """A held-out split: its plain views, kept in memory where they are small, and what a model says about them."""

    _KEEP_BYTES = 256 << 20

    def __init__(self, split: Split, views: ViewPolicy, device: torch.device, settings: Machine):
        self.split, self.views, self.device = split, views.plain(), device
        self.precision, self.workers = settings.precision, settings.workers
        self.labels, self.batch_size = split.labels, 512
        self._kept: list[torch.Tensor] = []

    def logits(self, model: nn.Module) -> NDArray[np.float32]:
        """float32 [N, K], in row order of the split, with the model in eval mode."""
        was_training = model.training
        model.eval()
        with torch.inference_mode(), autocast(self.device, self.precision):
            said = [model(views.to(self.device)).float().cpu() for views in self._views()]
        model.train(was_training)
        logits: NDArray[np.float32] = torch.cat(said).numpy()
        return logits

    def _views(self) -> Iterator[torch.Tensor]:
        if self._kept:
            yield from self._kept
            return
        rows = np.arange(len(self.split))
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        kept, size = [], 0
        for views in render_in_order(self.split.pictures, self.views, 0, batches, 0, self.workers):
            size += views.numel()
            if size <= self._KEEP_BYTES:
                kept.append(views)
            yield views
        if size <= self._KEEP_BYTES:
            self._kept = kept
