"""Teachers that are no networks: an estimator, as of scikit-learn, or a function of a batch.

They come from a user's own code, `my_package.module:factory`, or from a caller in Python. A function gets a batch of
views as a NumPy array, uint8 [B, C, S, S] or float32 [B, *shape], and returns logits [B, K] as an array or a tensor.
`predict_proba` of a classifier, and `predict` of a regressor, which is for the task "numbers", get the same numbers as
float32 [B, D]. With a normalisation that is named, all get normalised views.
"""

import inspect
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from softcache.base.errors import UsageError, make_printable
from softcache.base.user_code import locate_definition, user_code
from softcache.base.user_modules import import_attribute, keep_global_state, name_type
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS
from softcache.pipeline.models.custom_networks import call_factory
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel

_FACTORY_ARGUMENTS = {"classes", "channels", "size", "shape"}


class CallableNetwork(nn.Module):
    """A function or an estimator as a network without parameters: views [B, …] -> logits or probabilities [B, K].

    An estimator of several labels returns the probability of each label [B, K], or as scikit-learn's forests a list of
    K arrays [B, 2], of the absence and of the presence of a label.
    A regressor returns numbers [B, D], or [B] where there is one.

    Its state dict is a digest of what it is called, not of what it computes: whoever uses it compares its outputs.

    Args:
        teacher: A function of a batch, or an object with `predict_proba`, or with `predict` alone: a regressor.
        arch: Its name.
        classes: Names of the classes of the data, in the order of the labels; () where they have none.
        is_normalized: Whether it is run on normalised views.
        task: What it predicts, see data/tasks.py.

    Attributes:
        is_estimator: Whether it has `predict_proba`, so that its outputs are probabilities.

    Raises:
        UsageError: It is neither, it is for another task, or the classes of the estimator are not those of the data.
    """

    def __init__(
        self, teacher: Any, arch: str, classes: Sequence[str], is_normalized: bool = False, task: str = CLASSES
    ):
        super().__init__()
        self.is_estimator = is_estimator(teacher)
        self._is_regressor = is_regressor(teacher)
        _check_kind(teacher, arch, task)
        if not self.is_estimator and not self._is_regressor and not callable(teacher):
            raise UsageError(
                f"teacher '{arch}' is {name_type(teacher)}: expected a torch.nn.Module, a function of a batch of"
                " views, or an object with predict_proba"
            )
        self._arch, self._classes, self._location = arch, len(classes), locate_definition(teacher)
        self._teacher = teacher if self.is_estimator and task == LABELS else None
        self._columns = _order_columns(teacher, arch, classes) if self.is_estimator and task != LABELS else None
        self._function: Callable[[NDArray[Any]], Any] = teacher.predict_proba if self.is_estimator else teacher
        if self._is_regressor:
            self._function = teacher.predict
        self._is_one_number = task == NUMBERS and len(classes) == 1
        name = f"{arch}\0{'normalized' if is_normalized else 'raw'}"
        self.identity: torch.Tensor
        self.register_buffer(
            "identity", torch.frombuffer(bytearray(sha256(name.encode()).digest()), dtype=torch.uint8)
        )

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """Run it on the CPU: views [B, …] -> float32 [B, K], on the device of the views."""
        batch: NDArray[Any] = views.detach().cpu().numpy()
        if self.is_estimator or self._is_regressor:
            batch = batch.reshape(len(batch), -1).astype(np.float32)
        task = f"teacher '{self._arch}' failed on a batch of {batch.dtype} {list(batch.shape)}"
        with user_code(task, self._location), torch.no_grad():
            outputs = self._function(batch)
            if self._teacher is not None:
                outputs = _select_presence(self._teacher, self._arch, outputs, self._classes)
            if isinstance(outputs, torch.Tensor):
                outputs = outputs.detach().float().cpu().numpy()
            outputs = np.asarray(outputs)
        if outputs.ndim == 1 and self._is_one_number:
            outputs = outputs[:, None]
        if outputs.dtype.kind not in "biuf":
            raise UsageError(f"teacher '{self._arch}' returned {outputs.dtype}, not logits [B, K]")
        if outputs.ndim != 2 or len(outputs) != len(batch) or (self._classes and outputs.shape[1] != self._classes):
            K = self._classes or "K"
            raise UsageError(
                f"teacher '{self._arch}' returned {list(outputs.shape)} for {len(batch)} views, not"
                f" [{len(batch)}, {K}]"
            )
        if self._columns is not None:
            outputs = outputs[:, self._columns]
        return torch.from_numpy(np.array(outputs, np.float32, order="C")).to(views.device)


class RawModel(PreparedModel):
    """A teacher that gets views as they are; its input_spec is that of the students."""

    def prepare_input(self, views: torch.Tensor) -> torch.Tensor:
        """Return the views."""
        return views


def prepare_callable(
    teacher: Any,
    arch: str,
    classes: Sequence[str],
    input_spec: InputSpec,
    is_normalized: bool,
    task: str = CLASSES,
) -> PreparedModel:
    """Prepare a function or an estimator as a teacher.

    Args:
        teacher, arch, classes, is_normalized, task: As of CallableNetwork.
        input_spec: How a view becomes the input of a student; and of the teacher, where it is normalised.

    Raises:
        UsageError: As of CallableNetwork.
    """
    network = CallableNetwork(teacher, arch, () if task == EMBEDDING else classes, is_normalized, task)
    return (PreparedModel if is_normalized else RawModel)(network, input_spec).eval()


def load_callable(arch: str, classes: int, shape: tuple[int, ...]) -> Any:
    """Import what an arch names, and call it where it is a factory.

    A function with one argument that a factory does not have is the teacher itself.

    Args:
        arch: `my_package.module:factory`.
        classes: K, the number of classes.
        shape: Of an input without the batch.

    Returns:
        What the module holds or the factory returns: an nn.Module, a function or an estimator, not checked.

    Raises:
        UsageError: It cannot be imported or called.
    """
    module, _, factory = arch.partition(":")
    with keep_global_state(), torch.random.fork_rng([]):
        _, maker = import_attribute("teacher", module, factory)
        if isinstance(maker, nn.Module) or is_estimator(maker) or is_regressor(maker) or _takes_batch(maker):
            return maker
        return call_factory(arch, maker, classes, shape)


def is_estimator(teacher: Any) -> bool:
    """Return whether an object, no class, has a method predict_proba."""
    return not isinstance(teacher, type | nn.Module) and callable(getattr(teacher, "predict_proba", None))


def is_regressor(teacher: Any) -> bool:
    """Return whether an object, no class and no function, has a method predict and no predict_proba."""
    is_other = isinstance(teacher, type | nn.Module) or callable(teacher) or is_estimator(teacher)
    return not is_other and callable(getattr(teacher, "predict", None))


def _check_kind(teacher: Any, arch: str, task: str) -> None:
    """Check that an estimator is of the kind that a task needs.

    Raises:
        UsageError: It is a classifier and the task is "numbers" or "embedding", or a regressor and the task is not
            "numbers".
    """
    if task == EMBEDDING and is_estimator(teacher):
        raise UsageError(
            f"teacher '{arch}' is a classifier, {name_type(teacher)} with predict_proba, and the task here is"
            f" {EMBEDDING}: give a function of a batch that returns vectors [B, D]"
        )
    if task == NUMBERS and is_estimator(teacher):
        raise UsageError(
            f"teacher '{arch}' is a classifier, {name_type(teacher)} with predict_proba, and the task here is"
            f" {NUMBERS}: fit a regressor"
        )
    if task != NUMBERS and is_regressor(teacher):
        raise UsageError(
            f"teacher '{arch}' is {name_type(teacher)}, with predict and without predict_proba, and the task here is"
            f" {task}: a regressor is for --task {NUMBERS}; others are a torch.nn.Module, a function of a batch of"
            " views, or an object with predict_proba"
        )


def _takes_batch(value: Any) -> bool:
    """Return whether a function has one required argument, of another name than those that a factory gets."""
    if not inspect.isroutine(value):
        return False
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return False
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.default is p.empty and p.kind in named]
    return len(required) == 1 and required[0].name not in _FACTORY_ARGUMENTS


def _order_columns(teacher: Any, arch: str, classes: Sequence[str]) -> NDArray[np.int64] | None:
    """Return the column of each class in the outputs of an estimator; None where they are in order already.

    Its `classes_` are the numbers of the labels, or the names of the classes.
    """
    own = getattr(teacher, "classes_", None)
    if own is None or not len(classes):
        return None
    labels = np.asarray(own)
    if labels.ndim != 1:
        raise UsageError(f"teacher '{arch}' has classes_ of the shape {list(labels.shape)}: it has several outputs")
    is_text = labels.dtype.kind in "SUO"
    expected = list(classes) if is_text else [str(number) for number in range(len(classes))]
    found = [str(label) if is_text or label != int(label) else str(int(label)) for label in labels.tolist()]
    if sorted(found) != sorted(expected):
        raise UsageError(
            f"teacher '{arch}' has {len(found)} classes_ ({_shorten(found)}), the data have {len(expected)}"
            f" ({_shorten(expected)}): fit it to the labels of these data"
        )
    return np.array([found.index(label) for label in expected], np.int64)


def _select_presence(teacher: Any, arch: str, outputs: Any, labels: int) -> Any:
    """Return the probability of each label [B, K] from what predict_proba returned.

    Args:
        teacher: The estimator.
        arch: Its name.
        outputs: [B, K], or a list of K arrays [B, C] with the probabilities of the values in `classes_`.
        labels: K; 0 where it is not known.

    Raises:
        UsageError: There are not K arrays, or one has other values than 0 and 1.
    """
    if not isinstance(outputs, list | tuple):
        return outputs
    if labels and len(outputs) != labels:
        raise UsageError(f"teacher '{arch}' returned probabilities of {len(outputs)} labels, the data have {labels}")
    values = getattr(teacher, "classes_", None)
    if not isinstance(values, list | tuple) or len(values) != len(outputs):
        values = [[0, 1]] * len(outputs)
    columns = []
    for k, (known, probabilities) in enumerate(zip(values, map(np.asarray, outputs), strict=True)):
        numbers = np.asarray(known).tolist()
        if not set(numbers) <= {0, 1} or probabilities.ndim != 2 or probabilities.shape[1] != len(numbers):
            raise UsageError(
                f"teacher '{arch}' returned {list(probabilities.shape)} for label {k}, with the values"
                f" {_shorten(list(map(str, numbers)))}: expected two columns, of 0 and of 1"
            )
        # A label that is the same in all rows of its training has one column.
        columns.append(probabilities[:, numbers.index(1)] if 1 in numbers else np.zeros(len(probabilities)))
    return np.stack(columns, 1)


def _shorten(names: Sequence[str]) -> str:
    return make_printable(", ".join(names[:5]) + (", …" if len(names) > 5 else ""), 120)
