"""Checks of a network before anything is written: two random views forwards, and for a training also backwards."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from softcache.base.errors import UsageError
from softcache.base.user_code import describe_error, user_code

from .class_map import MAP_ADVICE
from .custom_networks import describe_input
from .outputs import LogitsSelector, find_selector
from .precision import autocast
from .prepared_model import InputSpec, PreparedModel

_ROWS = 2


@dataclass(frozen=True)
class TrainingCheck:
    """What a network is checked against before it is trained.

    Attributes:
        arch: The network's arch, for messages.
        classes: K, the number of classes; 0 for any number of outputs.
        input_spec: How a view becomes the network's input.
        device: Where it is trained.
        precision: Numeric precision of the forward pass.
        least_rows: Rows of the smallest batch of the training.
        batch_size: The option of the batch size, for messages.
    """

    arch: str
    classes: int
    input_spec: InputSpec
    device: torch.device
    precision: str
    least_rows: int
    batch_size: int


def check_teacher(teacher: PreparedModel, arch: str, classes: int) -> list[str]:
    """Run a teacher of a user's own on two random views.

    Args:
        teacher: In eval mode, on its device.
        arch: Its arch.
        classes: The number of classes of the data; 0 where the data have none, or the teacher's are mapped to them.

    Returns:
        Notes on the network, one line each; none for a built-in arch.

    Raises:
        UsageError: Its forward pass fails, or does not return logits of these classes.
    """
    selector = find_selector(teacher.network)
    if selector is None:
        return []
    raw_outputs: list[object] = []
    with _capture_output(teacher.network, raw_outputs), torch.random.fork_rng(_list_gpus(teacher.scale.device)):
        logits = _run(teacher, arch, _ROWS, selector)
    _check_key(selector, raw_outputs)
    if classes and logits.ndim == 2 and logits.shape[1] != classes:
        raise UsageError(f"the teacher outputs {logits.shape[1]} classes, the data have {classes}: {MAP_ADVICE}")
    _check_logits(arch, logits, _ROWS, logits.shape[-1] if logits.ndim else 1)
    return list(selector.notes)


def check_trainable(network: nn.Module, check: TrainingCheck) -> list[str]:
    """Run a copy of a network forwards in eval mode, then forwards and backwards in training mode.

    A built-in arch is only run where the smallest batch has one row: batch norm may be left without a variance. A
    TorchScript module is not run: it takes no hooks.

    Args:
        network: With its initial weights. It is not changed.
        check: What it is checked against.

    Returns:
        Notes on the network, one line each.

    Raises:
        UsageError: It has nothing to train, one of the passes fails, or the output is not logits of these classes.
    """
    arch, selector = check.arch, find_selector(network)
    if not any(p.requires_grad for p in network.parameters()):
        raise UsageError(f"arch '{arch}' has no trainable parameters: there is nothing to train")
    if (selector is None and check.least_rows > 1) or isinstance(network, torch.jit.ScriptModule):
        return []
    location = selector.location if selector else ""
    with user_code(f"arch '{arch}' cannot be copied", location):
        network = copy.deepcopy(network)
    model = PreparedModel(network, check.input_spec).to(check.device)
    raw_outputs: list[object] = []
    with _capture_output(network, raw_outputs), torch.random.fork_rng(_list_gpus(check.device)):
        logits = _run(model.eval(), arch, _ROWS, selector, check.precision)
        _check_logits(arch, logits, _ROWS, check.classes)
        if not torch.isfinite(logits).any():
            raise UsageError(f"arch '{arch}' outputs no finite number with its initial weights")
        if selector:
            _check_stable(model, check, selector, logits)
        _train(model.train(), check, _ROWS, selector)
        if selector:
            _check_key(selector, raw_outputs)
        if check.least_rows == 1:
            try:
                _train(model, check, 1, selector)
            except UsageError as error:
                problem = describe_error(error.__cause__) if error.__cause__ else str(error)
                raise UsageError(
                    f"--batch-size {check.batch_size} makes a batch of one row, on which arch '{arch}' cannot be"
                    f" trained: {problem}: choose another --batch-size"
                ) from error
    notes = list(selector.notes) if selector else []
    if selector and _are_probabilities(logits):
        notes.append(
            f"arch '{arch}' outputs rows that sum to 1, as after a softmax, and they are trained as logits: let it end"
            " before the softmax"
        )
    if selector and selector.is_shared:
        notes.append(f"arch '{arch}' is one module, not a new one each time: every seed starts from its weights")
    if not isinstance(raw_outputs[-1], torch.Tensor) and isinstance(raw_outputs[0], torch.Tensor):
        kind = type(raw_outputs[-1]).__name__
        notes.append(f"arch '{arch}' returns a {kind} in training: its logits are trained, its other outputs are not")
    return notes


def _run(
    model: PreparedModel, arch: str, rows: int, selector: LogitsSelector | None, precision: str = "float32"
) -> torch.Tensor:
    """Run a model on random views and return what its network returns; in training mode with gradients."""
    spec, device = model.input_spec, model.scale.device
    views = spec.make_views(rows).to(device)
    task = f"the forward pass of arch '{arch}' failed{' in training mode' if model.training else ''}"
    with (
        user_code(task, selector.location if selector else "", lambda error: describe_input(error, spec.input_shape)),
        torch.set_grad_enabled(model.training),
        autocast(device, precision),
    ):
        output: torch.Tensor = model.network(model.prepare_input(views))
    return output


def _check_stable(model: PreparedModel, check: TrainingCheck, selector: LogitsSelector, logits: torch.Tensor) -> None:
    """Check that the logits in eval mode are no random numbers: they would be measured and exported."""
    again = _run(model, check.arch, _ROWS, selector, check.precision)
    spread = max(float(logits.max() - logits.min()), 1e-6)
    if not torch.allclose(logits, again, rtol=0, atol=1e-3 * spread, equal_nan=True):
        raise UsageError(
            f"arch '{check.arch}' outputs random numbers in eval mode: two runs on the same views differ. Use"
            " F.dropout(x, training=self.training), or nn.Dropout"
        )


def _are_probabilities(logits: torch.Tensor) -> bool:
    rows = logits.detach().float()
    return rows.shape[1] > 1 and bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() <= 1e-3).all())


def _train(model: PreparedModel, check: TrainingCheck, rows: int, selector: LogitsSelector | None) -> None:
    """Run a model forwards and backwards in training mode."""
    logits = _run(model, check.arch, rows, selector, check.precision)
    _check_logits(check.arch, logits, rows, check.classes)
    if not logits.requires_grad:
        raise UsageError(f"arch '{check.arch}' cannot be trained: its output in training mode has no gradient")
    with user_code(f"the backward pass of arch '{check.arch}' failed", selector.location if selector else ""):
        logits.float().square().sum().backward()  # type: ignore[no-untyped-call]


def _check_logits(arch: str, logits: torch.Tensor, rows: int, classes: int) -> None:
    """Check that an output is floating-point [rows, classes]; with 0 classes, of any width."""
    if not classes and logits.ndim == 2:
        classes = logits.shape[1]
    if list(logits.shape) != [rows, classes]:
        raise UsageError(
            f"arch '{arch}' outputs {list(logits.shape)} for {rows} images, not logits {[rows, classes]}:"
            f" {_explain_shape(logits, rows, classes)}"
        )
    if not logits.is_floating_point():
        raise UsageError(
            f"arch '{arch}' outputs {str(logits.dtype).removeprefix('torch.')}, not floating-point logits"
        )


def _explain_shape(logits: torch.Tensor, rows: int, classes: int) -> str:
    if logits.ndim == 2 and logits.shape[0] == rows:
        return f"it has {logits.shape[1]} classes, the data have {classes}"
    if logits.ndim > 2 and logits.numel() == rows * classes:
        return "flatten it at the end of its forward pass"
    return "one row for each image, one column for each class"


def _check_key(selector: LogitsSelector, raw_outputs: list[object]) -> None:
    """Check that --output was needed."""
    if selector.key and all(isinstance(output, torch.Tensor) for output in raw_outputs):
        raise UsageError(f"--output {selector.key}, but arch '{selector.arch}' returns one tensor: leave it out")


@contextmanager
def _capture_output(network: nn.Module, outputs: list[object]) -> Iterator[None]:
    """Append what a network returns to a list, before its logits are selected."""

    def append(module: nn.Module, inputs: object, output: object) -> None:
        outputs.append(output)

    handle = network.register_forward_hook(append, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _list_gpus(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
