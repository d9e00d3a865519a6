"""A student as one network from plain images to logits, and the files that hold it: ONNX, pt2, safetensors."""

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

# What PyTorch's exporter writes without a conversion; every ONNX Runtime since 1.14 (2023) runs it. It has all that
# quantisation per channel wants (13).
OPSET = 18
Program = torch.export.ExportedProgram


class ExportedModel(nn.Module):
    """float32 images [B, C, S, S] of values 0 … 1 -> float32 logits [B, K]: normalisation, and the repetition of a
    grey channel where the network was made for three, are inside."""

    def __init__(self, network: nn.Module, input_spec: InputSpec):
        super().__init__()
        self.network = network
        self.channels = input_spec.channels
        mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in (input_spec.mean, input_spec.std))
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.register_buffer("scale", 1 / std)
        self.register_buffer("shift", -mean / std)
        self.to(memory_format=torch.contiguous_format)
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images
        if x.shape[1] != self.channels:
            x = x.expand(-1, self.channels, -1, -1)
        logits: torch.Tensor = self.network(torch.addcmul(self.shift, x, self.scale))
        return logits


def capture_program(model: ExportedModel, arch: str, channels: int, size: int) -> Program:
    """The network as a graph of any batch size. channels: of the images. Raises CacheError where it has no such
    graph."""
    example = torch.zeros(2, channels, size, size)
    batch = torch.export.Dim("batch", min=1)
    with _quiet(), _in_one_line(arch):
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def make_onnx(program: Program, arch: str, metadata: dict[str, str], version: str) -> bytes:
    """The ONNX file of a captured network. Raises CacheError where an operator of it has no counterpart there."""
    with _quiet(), _in_one_line(arch):
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            external_data=False,
            verbose=False,
        )
    assert made is not None
    model = made.model_proto  # a copy each time that it is asked for
    strip_onnx(model, metadata, version)
    return serialize_onnx(model)


def make_pt2(program: Program, metadata: dict[str, str]) -> bytes:
    """The file that torch.export.load reads."""
    content = io.BytesIO()
    with _quiet():
        torch.export.save(program, content, extra_files={"softcache.json": json.dumps(metadata)})
    return content.getvalue()


def load_pt2(content: bytes) -> nn.Module:
    """The network in a pt2 file of our own."""
    with _quiet():
        return torch.export.load(io.BytesIO(content)).module()


def make_safetensors(network: nn.Module, metadata: dict[str, str]) -> bytes:
    """The weights, named as the arch names them. Raises CacheError where they are not the same when read again."""
    state = {name: value.detach().clone().contiguous() for name, value in network.state_dict().items()}
    content: bytes = save(state, metadata)
    read = load(content)
    if set(read) != set(state) or not all(torch.equal(read[name], value) for name, value in state.items()):
        raise CacheError("student.safetensors: the weights are not the same when they are read again")
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of what is theirs to mend: names that they deprecate, operators that they might fold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _in_one_line(arch: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a network is anyone's code, and the exporter's errors have no common class
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CacheError(f"arch '{arch}' cannot be exported: {why[:200]}") from None
