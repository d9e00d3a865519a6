"""A student as one network from images to logits, and the files that hold it: ONNX, pt2 and safetensors."""

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors.torch import load, save
from torch import nn

from softcache.base.errors import CacheError
from softcache.pipeline.models.prepared_model import InputSpec

from .metadata import INPUT, OUTPUT
from .onnx_model import serialize_onnx, strip_onnx

# PyTorch's exporter writes this opset without a conversion, and every ONNX Runtime since 1.14 (2023) runs it.
# Quantisation per channel needs 13 or later.
OPSET = 18
Program = torch.export.ExportedProgram


class ExportedModel(nn.Module):
    """A student with its input preparation inside: float32 images [B, C, S, S] of values 0 … 1 -> logits [B, K].

    Preparation is the normalisation, and the repetition of a grey channel for a network of three input channels.
    Rows of numbers are float32 [B, *shape], in their own units. Numbers that are predicted are in those of the data.

    Args:
        network: Normalised images -> logits float32 [B, K].
        input_spec: Channels, mean and standard deviation of the network's input, and the scale of its output.
    """

    def __init__(self, network: nn.Module, input_spec: InputSpec):
        super().__init__()
        self.network = network
        self.channels, self.shape = input_spec.channels, input_spec.shape
        axes = (1, -1, *[1] * (len(input_spec.input_shape) - 1))
        mean, std = (torch.tensor(x).view(axes) for x in (input_spec.mean, input_spec.std))
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.register_buffer("scale", 1 / std)
        self.register_buffer("shift", -mean if self.shape else -mean / std)
        self.has_output_scale = bool(input_spec.output_std)
        if self.has_output_scale:
            self.output_scale: torch.Tensor
            self.output_shift: torch.Tensor
            self.register_buffer("output_scale", torch.tensor(input_spec.output_std))
            self.register_buffer("output_shift", torch.tensor(input_spec.output_mean))
        self.to(memory_format=torch.contiguous_format)
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.network(self._prepare_input(images))
        return outputs * self.output_scale + self.output_shift if self.has_output_scale else outputs

    def _prepare_input(self, images: torch.Tensor) -> torch.Tensor:
        if self.shape:
            return (images + self.shift) * self.scale  # as PreparedModel: nothing is lost where a mean is large
        x = images
        if x.shape[1] != self.channels:
            x = x.expand(-1, self.channels, -1, -1)
        return torch.addcmul(self.shift, x, self.scale)


def capture_program(model: ExportedModel, arch: str, channels: int, size: int, shape: tuple[int, ...] = ()) -> Program:
    """Capture the network as a graph of any batch size.

    Args:
        model: The network.
        arch: Its arch, for the error.
        channels: Of the images.
        size: Height and width of the images in pixels.
        shape: Of a row of numbers; () for images.

    Raises:
        CacheError: torch.export cannot capture the network, for example where its control flow depends on data.
    """
    example = torch.zeros(2, *(shape or (channels, size, size)))
    batch = torch.export.Dim("batch", min=1)
    with _without_warnings(), _one_line_error(arch):
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def make_onnx(
    program: Program,
    arch: str,
    metadata: dict[str, str],
    version: str,
    names: tuple[str, str] = (INPUT, OUTPUT),
) -> bytes:
    """Convert a captured network to an ONNX file.

    Args:
        program: The network, see `capture_program`.
        arch: Its arch, for the error.
        metadata: Key-value pairs for the file.
        version: Version of softcache, for the file.
        names: Of the graph's input and output.

    Raises:
        CacheError: One of its operators has no counterpart in ONNX, or it is too large for one file.
    """
    with _without_warnings(), _one_line_error(arch):
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[names[0]],
            output_names=[names[1]],
            external_data=False,
            verbose=False,
        )
    assert onnx_program is not None
    model = onnx_program.model_proto  # every access makes a copy
    strip_onnx(model, metadata, version)
    return serialize_onnx(model)


def make_pt2(program: Program, metadata: dict[str, str]) -> bytes:
    """Convert a captured network to the file that torch.export.load reads."""
    content = io.BytesIO()
    with _without_warnings():
        torch.export.save(program, content, extra_files={"softcache.json": json.dumps(metadata)})
    return content.getvalue()


def load_pt2(content: bytes) -> nn.Module:
    """Load the network of a pt2 file. The file must come from `make_pt2`: torch.export.load is for trusted files."""
    with _without_warnings():
        return torch.export.load(io.BytesIO(content)).module()


def make_safetensors(network: nn.Module, metadata: dict[str, str]) -> bytes:
    """Convert the weights to a safetensors file, under their names in the network's state dict.

    Raises:
        CacheError: The weights read back from the file are not equal to the network's.
    """
    state = {name: value.detach().clone().contiguous() for name, value in network.state_dict().items()}
    content: bytes = save(state, metadata)
    reloaded = load(content)
    if set(reloaded) != set(state) or not all(torch.equal(reloaded[name], value) for name, value in state.items()):
        raise CacheError("student.safetensors: the weights read back from the file are not those of the student")
    return content


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence the exporters' warnings of their own matters: deprecated names, operators that they could fold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _one_line_error(arch: str) -> Iterator[None]:
    """Replace any error of an exporter by a CacheError with its first line."""
    try:
        yield
    except Exception as error:  # a network can be any code, and the exporters' errors have no common class
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CacheError(f"arch '{arch}' cannot be exported: {lines[0][:200]}") from None
