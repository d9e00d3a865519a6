"""The state of a training, saved as a checkpoint after every epoch, so that it can be stopped and resumed."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from softcache.base.errors import CacheError, find_disk_error, is_interrupt
from softcache.base.files import publish, publish_text, read_input_file
from softcache.pipeline.metrics.tasks import LOWER_IS_BETTER
from softcache.pipeline.models.checkpoint_files import verify_zip
from softcache.stages.cli.option_groups import TrainingOptions
from softcache.stages.distributed.ranks import is_first

from .optimizer import Optimizer, build_optimizer

CHECKPOINT_FILE, METRICS_FILE = "checkpoint.pt", "metrics.jsonl"
VECTORIZED_FOLDER = "stack"  # subfolder of the first student's folder, for students that train as one model


@dataclass
class TrainState:
    """Everything that changes while a training runs.

    Attributes:
        model: the model.
        parts: the losses' own trainable parts, by the name of their term.
        optimizer: of all trained weights.
        schedule: step -> the learning rate as a share of its highest.
        peak_learning_rate: the highest learning rate.
        weights: all trained weights, in the order of the optimiser.
        averaged_model: the moving average of the weights, with --ema.
        steps: how many steps are done.
        epoch_lines: the records in metrics.jsonl, one for each finished epoch.
        best_weights: of the best epoch so far, with --select.
        json_lines: the records as JSON. Encoding 150 of them again after each epoch would take 2 ms, an eighth of an
            epoch of `mlp:64` on digits.
    """

    model: nn.Module
    parts: nn.ModuleDict
    optimizer: Optimizer
    schedule: Callable[[int], float]
    peak_learning_rate: float
    weights: list[nn.Parameter]
    averaged_model: AveragedModel | None
    steps: int = 0
    epoch_lines: list[dict[str, Any]] = field(default_factory=list)
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    json_lines: list[str] = field(default_factory=list)

    @staticmethod
    def create(
        model: nn.Module, parts: nn.ModuleDict, config: TrainingOptions, schedule: Callable[[int], float]
    ) -> "TrainState":
        """Create the state before the first step.

        Args:
            model: the model.
            parts: the losses' own trainable parts.
            config: the optimiser and its settings.
            schedule: step -> the learning rate as a share of its highest.
        """
        weights = [p for m in (model, *parts.values()) for p in m.parameters() if p.requires_grad]
        average = None
        if config.ema:
            mean = get_ema_multi_avg_fn(config.ema)  # type: ignore[no-untyped-call]
            average = AveragedModel(model, multi_avg_fn=mean, use_buffers=True)
        optimizer = build_optimizer(config, weights)
        return TrainState(model, parts, optimizer, schedule, config.learning_rate, weights, average)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self.peak_learning_rate * self.schedule(self.steps)

    def update_weights(self) -> None:
        """Let the optimiser take a step with the gradients of the weights."""
        self.optimizer.step(self.learning_rate)
        self.steps += 1

    @property
    def result_model(self) -> nn.Module:
        """The model to evaluate and save: with --ema the averaged one."""
        return self.model if self.averaged_model is None else self.averaged_model.module

    def save(self, folder: Path, line: dict[str, Any], select: str) -> None:
        """Publish the state after an epoch, then metrics.jsonl with its line.

        Args:
            folder: of the training.
            line: the record of the epoch.
            select: which epoch's weights are kept, as in --select.
        """
        self.epoch_lines.append(line)
        self.json_lines.append(json.dumps(line))
        if select != "last" and select_epoch(self.epoch_lines, select) == line["epoch"]:
            self.best_weights = {
                name: value.detach().clone() for name, value in self.result_model.state_dict().items()
            }
        record = {
            "epoch": line["epoch"],
            "model": self.model.state_dict(),
            "modules": {name: part.state_dict() for name, part in self.parts.items()},
            "average": self.averaged_model.state_dict() if self.averaged_model is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.steps,
            "best": self.best_weights,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "lines": f"[{', '.join(self.json_lines)}]",
        }
        if is_first():
            save_tensors(folder / CHECKPOINT_FILE, record)
            self._publish_lines(folder)

    def _publish_lines(self, folder: Path) -> None:
        publish_text(folder / METRICS_FILE, "".join(f"{text}\n" for text in self.json_lines))

    def restore(self, folder: Path, device: torch.device) -> int:
        """Restore the state of the checkpoint, where there is one.

        Args:
            folder: of the training.
            device: where the model is.

        Returns:
            The number of finished epochs; 0 without a checkpoint.

        Raises:
            CacheError: for a damaged checkpoint.
        """
        if not (folder / CHECKPOINT_FILE).is_file():
            return 0
        path = folder / CHECKPOINT_FILE
        try:
            verify_zip(path)
            epoch = self._restore(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # a damaged file can raise anything: errors of pickle, zip, keys, shapes …
            if isinstance(error, OSError) and error.filename:
                raise
            if (disk_error := find_disk_error(error)) is not None:
                raise OSError(disk_error.errno, disk_error.strerror, str(path)) from None
            reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
            raise CacheError(
                f"'{path}' is damaged ({reason}): put it back from a copy, or delete it to train from the first epoch"
            ) from None
        if is_first():
            self._publish_lines(folder)  # a stop between the two writes left metrics.jsonl one epoch behind
        return epoch

    def _restore(self, record: dict[str, Any]) -> int:
        self.model.load_state_dict(record["model"])
        for name, part in self.parts.items():
            part.load_state_dict(record["modules"][name])
        if self.averaged_model is not None:
            self.averaged_model.load_state_dict(record["average"])
        self.optimizer.load_state_dict(record["optimizer"])
        if type(record["schedule"]) is not int:
            raise ValueError("the step of its schedule is no integer")
        self.steps = record["schedule"]
        torch.set_rng_state(record["random"].cpu())
        if len(record["random_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([state.cpu() for state in record["random_cuda"]])
        self.best_weights = record["best"]
        self.epoch_lines, epoch = json.loads(record["lines"]), record["epoch"]
        if not all(isinstance(line, dict) for line in self.epoch_lines) or len(self.epoch_lines) != epoch:
            raise ValueError(f"{len(self.epoch_lines)} lines for {epoch} epochs")
        self.json_lines = [json.dumps(line) for line in self.epoch_lines]
        return int(epoch)


class RngState:
    """The states of PyTorch's random generators for one training, as a context manager.

    Inside `with`, the generators continue from where the training left them, so other random numbers in the process,
    such as those of another training, do not change it. The first state is that of the generators when the object is
    created. The context may be nested.
    """

    def __init__(self) -> None:
        self._cpu, self._cuda, self._depth = torch.get_rng_state(), self._get_cuda_states(), 0

    @staticmethod
    def _get_cuda_states() -> list[torch.Tensor]:
        return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def __enter__(self) -> None:
        if self._depth == 0:
            torch.set_rng_state(self._cpu)
            if self._cuda:
                torch.cuda.set_rng_state_all(self._cuda)
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._cpu, self._cuda = torch.get_rng_state(), self._get_cuda_states()


def save_tensors(path: Path, record: dict[str, Any]) -> None:
    """Publish a file of torch.save. Equal content gives equal bytes.

    torch.save gets an open file, because it writes the name of a path into the file, here a temporary one.

    Args:
        path: the file.
        record: tensors and plain values.
    """

    def write(temporary: Path) -> None:
        try:
            with open(temporary, "wb") as file:
                torch.save(record, file)
        except RuntimeError as error:  # PyTorch raises it for an interrupt while it writes its zip file
            if is_interrupt(error):
                raise KeyboardInterrupt from None
            raise

    publish(path, write)


def select_epoch(lines: list[dict[str, Any]], select: str) -> int:
    """Return the epoch, from 1, whose weights are kept.

    Args:
        lines: the records of the epochs.
        select: `last`, or a metric on the validation split, of which the first best epoch is taken.
    """
    if select == "last":
        return len(lines)
    sign = -1 if select in LOWER_IS_BETTER else 1
    return 1 + max(range(len(lines)), key=lambda i: (sign * lines[i][f"val_{select}"], -i))


@dataclass(frozen=True)
class FinishedTraining:
    """A finished training.

    Attributes:
        seconds: how long it took.
        epoch: the epoch, from 1, whose weights were kept.
    """

    seconds: float
    epoch: int


def format_epoch_lines(lines: Sequence[dict[str, Any]]) -> str:
    """Format the records of epochs as the text of metrics.jsonl."""
    return "".join(json.dumps(line) + "\n" for line in lines)


def read_epoch_lines(folder: Path) -> list[dict[str, Any]]:
    """Read the records of the finished epochs from metrics.jsonl.

    Raises:
        CacheError: for a damaged file.
    """
    try:
        return [json.loads(line) for line in read_input_file(folder / METRICS_FILE).decode().splitlines()]
    except (ValueError, RecursionError):
        raise _damaged_error(folder) from None


def _damaged_error(folder: Path) -> CacheError:
    return CacheError(f"'{folder / METRICS_FILE}' is damaged: it is not a record of epochs")


def read_finished(folder: Path, select: str) -> FinishedTraining:
    """Read the time and the selected epoch of a finished training from metrics.jsonl.

    Args:
        folder: of the training.
        select: as in --select.

    Raises:
        CacheError: for a damaged file.
    """
    lines = read_epoch_lines(folder)
    try:
        seconds = float(sum(line["seconds"] for line in lines))
        if not 0 < seconds < math.inf:
            raise ValueError(f"{seconds} seconds")
        return FinishedTraining(seconds, select_epoch(lines, select))
    except (ValueError, TypeError, KeyError, OverflowError):
        raise _damaged_error(folder) from None
