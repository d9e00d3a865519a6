"""A network of any framework in ONNX Runtime, as a teacher. The only importer of onnxruntime in this package."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from softcache.base.errors import CacheError, UsageError, make_printable, unknown_name_error
from softcache.pipeline.taps.statistics import STATISTICS

from .file_network import FileNetwork
from .onnx_files import OnnxFile, read_onnx_file

_FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
}
_PROBE_ROWS = 2
Array = NDArray[Any]


class OnnxInput(NamedTuple):
    """The input of a model.

    Attributes:
        name: Its name in the graph.
        dtype: float32, float16, float64 or uint8.
        batch: Rows of a batch; 0 for any number.
        channels: 1 or 3; 0 where the model takes both.
        size: Side in pixels; 0 where the model takes any.
        is_channels_last: Whether it is [N, H, W, C], as in TensorFlow, not [N, C, H, W].
    """

    name: str
    dtype: str
    batch: int
    channels: int
    size: int
    is_channels_last: bool


class OnnxNetwork(FileNetwork):
    """A network in ONNX Runtime, on the CPU: float32 [B, C, S, S] -> logits [B, K], without gradients.

    Every value of its graph is a submodule through which the value passes where it has a forward hook: so inner values
    are tapped as the layers of any network. `find_logits` is called before the first forward pass.

    Args:
        file: The model.

    Attributes:
        input: What the model takes.
        output: Name of the output that are the logits; "" before `find_logits`.

    Raises:
        UsageError: The model takes something else than images.
        CacheError: ONNX Runtime cannot load it.
    """

    def __init__(self, file: OnnxFile):
        super().__init__(file.digest)
        self.output = ""
        self._file = file
        self._sessions: dict[tuple[str, ...], Any] = {}
        self._values: dict[str, str] = {}  # {name of the submodule: name of the value}
        for value in file.list_values():
            name = name_value(value)
            if name and name.isprintable() and name not in self._values:
                self._values[name] = value
                self._modules[name] = nn.Identity()  # add_module refuses the dots in a name
        session = self._open_session(())
        self.input = _read_input(file.path, session)
        self._batch = self.input.batch

    def find_logits(self, output: str, classes: int, channels: int, size: int) -> None:
        """Run the model on two empty images, to find out which output are the logits.

        Args:
            output: Name or index of the output; "" to find it: the one that is [B, K].
            classes: K of the data, which decides between several; 0 where it is not known.
            channels, size: Of the images.

        Raises:
            UsageError: There is no such output, several can be the logits, or the model cannot be run.
        """
        outputs = [x.name for x in self._open_session(()).get_outputs() if x.type.startswith("tensor(")]
        if output:
            named = outputs[int(output)] if output not in outputs and _is_index(output, outputs) else output
            if named not in outputs:
                raise unknown_name_error("output", output, outputs, f"'{self._file.path}'")
            outputs = [named]
        images = np.zeros((_PROBE_ROWS, channels, size, size), np.float32)
        try:
            arrays = self._run((), outputs, images)
        except UsageError:
            if self._batch:
                raise
            self._batch = 1  # some models say that they take any batch and then reshape it to one row
            arrays = self._run((), outputs, images)
        shapes = {name: list(array.shape) for name, array in zip(outputs, arrays, strict=True)}
        candidates = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == _PROBE_ROWS]
        candidates = [name for name in candidates if arrays[outputs.index(name)].dtype.kind == "f"]
        if len(candidates) > 1:
            candidates = [name for name in candidates if shapes[name][1] == classes] or candidates
        if len(candidates) != 1:
            text = ", ".join(f"{make_printable(name, 40)}: {shape}" for name, shape in list(shapes.items())[:6])
            problem = (
                f"name the logits with --output {make_printable(candidates[0], 40)}"
                if candidates
                else "none are logits [B, K]: let the model end there"
            )
            raise UsageError(f"'{self._file.path}' outputs {text} for {_PROBE_ROWS} images: {problem}")
        self.output = candidates[0]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, K] of images float32 [B, C, S, S]; values whose submodule has a forward hook pass through it."""
        taps = tuple(name for name in self._values if self._modules[name]._forward_hooks)  # type: ignore[union-attr]
        values = [self._values[name] for name in taps]
        logits, *tapped = self._run(tuple(values), [self.output, *values], images.detach().cpu().numpy())
        for name, value in zip(taps, tapped, strict=True):
            if value.shape[:1] != images.shape[:1]:
                raise UsageError(
                    f"tap '{name}' is {list(value.shape)} for {len(images)} images, not one row for each: choose"
                    " another"
                )
            self._modules[name](torch.from_numpy(value).to(images.device))  # type: ignore[misc]
        return torch.from_numpy(logits).to(images.device)

    def _run(self, values: tuple[str, ...], outputs: list[str], images: Array) -> list[Array]:
        """Run the model in pieces of its batch size, the last one padded with its own rows."""
        session, rows = self._open_session(values), self._batch or len(images)
        pieces = []
        for start in range(0, len(images), rows):
            piece = images[start : start + rows]
            index = np.arange(rows) % len(piece)
            try:
                arrays = session.run(outputs, {self.input.name: self._convert(piece[index])})
            except Exception as error:  # ONNX Runtime's errors are a dozen classes without a common one
                text = _shorten_error(error)
                raise UsageError(f"'{self._file.path}' cannot be run on images {list(piece.shape)}: {text}") from None
            pieces.append([np.asarray(array)[: len(piece)] for array in arrays] if self._batch else arrays)
        return [np.ascontiguousarray(np.concatenate(arrays)) for arrays in zip(*pieces, strict=True)]

    def _convert(self, images: Array) -> Array:
        """Convert images float32 [B, C, S, S] to the layout and the dtype that the model takes."""
        if self.input.is_channels_last:
            images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        if self.input.dtype == "uint8":
            return np.rint(images).clip(0, 255).astype(np.uint8)
        return images.astype(self.input.dtype, copy=False)

    def _open_session(self, values: tuple[str, ...]) -> Any:
        """Open the model with some inner values as outputs, or return it where that was done before."""
        if values in self._sessions:
            return self._sessions[values]
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are raised as well
        options.add_session_config_entry(_FOLDER_OPTION, str(self._file.path.parent.absolute()))
        try:
            content = self._file.serialize(values)
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # as above; ValueError for a model of more than 2 GB in one file
            raise CacheError(f"ONNX Runtime cannot load '{self._file.path}': {_shorten_error(error)}") from None
        self._sessions[values] = session
        return session


def load_onnx_network(path: Path) -> OnnxNetwork:
    """Load a model from an ONNX file, see `read_onnx_file` and OnnxNetwork."""
    return OnnxNetwork(read_onnx_file(path))


def name_value(value: str) -> str:
    """Return the tap of a value of a graph: slashes, colons and commas, which taps cannot have, become dots."""
    return re.sub(r"[/:,]+", ".", value).strip(".")


def parse_value_tap(tap: str) -> str:
    """Return the tap of a value as a user reads it in the graph: `/layer3/Relu_output_0:pool`, `dense/BiasAdd:0`."""
    value, colon, statistic = tap.rpartition(":")
    if colon and statistic in STATISTICS:
        return f"{name_value(value)}:{statistic}"
    return name_value(tap)


def _read_input(path: Path, session: Any) -> OnnxInput:
    """Read what a model takes. Raises UsageError for something else than images."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(make_printable(x.name, 40) for x in inputs[:4])
        raise UsageError(f"'{path}' takes {len(inputs)} inputs ({names}): a teacher takes one, the images")
    (only,) = inputs
    shape = [x if isinstance(x, int) and x > 0 else 0 for x in only.shape]
    if only.type not in _DTYPES:
        raise UsageError(f"'{path}' takes {only.type}: a teacher takes {', '.join(_DTYPES)}")
    text = ", ".join(str(x or "any") for x in shape)
    if len(shape) != 4:
        raise UsageError(f"'{path}' takes [{text}], not images [N, C, H, W] or [N, H, W, C]")
    is_channels_last = shape[1] not in (1, 3) and shape[3] in (1, 3)
    batch, channels, height, width = (shape[0], shape[3], *shape[1:3]) if is_channels_last else shape
    if channels not in (0, 1, 3):
        raise UsageError(f"'{path}' takes [{text}], not images of 1 or 3 channels [N, C, H, W] or [N, H, W, C]")
    if height and width and height != width:
        raise UsageError(f"'{path}' takes images of {height} x {width} pixels: views are squares")
    return OnnxInput(only.name, _DTYPES[only.type], batch, channels, height or width, is_channels_last)


def _is_index(text: str, names: list[str]) -> bool:
    return text.isdecimal() and int(text) < len(names)


def _shorten_error(error: Exception) -> str:
    return make_printable((str(error).strip().splitlines() or [type(error).__name__])[0], 160)
