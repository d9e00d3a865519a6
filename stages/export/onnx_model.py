"""ONNX files: their clean-up before they are written, and loading them safely into ONNX Runtime.

Beside quantize.py the only importer of onnx and onnxruntime.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError, UsageError, make_printable

from .metadata import ExportMetadata

Images = NDArray[np.float32]
MAX_BYTES = (2 << 30) - 1  # of a protobuf message, and so of an ONNX file without external data


@dataclass(frozen=True)
class OnnxStudent:
    """A network in ONNX Runtime, on the CPU.

    Attributes:
        session: The onnxruntime.InferenceSession.
    """

    session: Any

    @staticmethod
    def from_bytes(model: bytes, threads: int = 0) -> "OnnxStudent":
        """Load an ONNX file.

        Args:
            model: Content of the file.
            threads: Threads of one call; 0: one per core.

        Raises:
            Exception: Any error of ONNX Runtime, whose errors have no common class.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors, which are raised as well
        return OnnxStudent(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]))

    def compute_logits(self, images: Images) -> NDArray[np.float32]:
        """Run the network: images float32 [B, C, S, S] of values 0 … 1 -> logits float32 [B, K].

        Rows of numbers are float32 [B, *shape]. Outputs are those of the task: logits, numbers or an embedding.
        """
        logits: NDArray[np.float32] = self.session.run(None, {self.session.get_inputs()[0].name: images})[0]
        return logits


def strip_onnx(model: Any, metadata: Mapping[str, str], version: str) -> None:
    """Remove from a ModelProto what no runtime reads, and add the metadata; in place.

    Removed are stack traces with paths of this machine, names of modules, and shapes of inner values.

    Args:
        model: The onnx.ModelProto.
        metadata: Key-value pairs to add.
        version: Of softcache, named as the producer.
    """
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *model.functions):
        part.doc_string = ""
        del part.metadata_props[:]
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    model.producer_name, model.producer_version = "softcache", version
    for key, text in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, text


def serialize_onnx(model: Any) -> bytes:
    """Return the bytes of a ModelProto. Raises CacheError for a network that is too large for one file."""
    if model.ByteSize() > MAX_BYTES:
        size = model.ByteSize() / 1e9
        raise CacheError(f"the network has {size:.1f} GB: a single ONNX file holds 2.1 GB at most")
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def open_onnx_student(path: Path) -> tuple[OnnxStudent, ExportMetadata]:
    """Load an exported student from a file that may come from anyone.

    Paths in the file are not followed: a tensor with external data is refused before ONNX Runtime sees the file.

    Raises:
        UsageError: There is no such file.
        CacheError: The file is not an exported student, is damaged, or cannot be run.
    """
    if not path.is_file():
        raise UsageError(f"there is no model '{path}'")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise CacheError(f"'{path}' has {size:,} bytes, more than the {MAX_BYTES:,} of an ONNX file")
    content = path.read_bytes()
    model = _parse_onnx(path, content)
    if name := next(_find_external_tensors(model), None):
        raise CacheError(
            f"'{path}' keeps the tensor '{make_printable(name, 80)}' in another file: external data are not read"
        )
    try:
        metadata = ExportMetadata.from_dict({entry.key: entry.value for entry in model.metadata_props})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CacheError(
            f"'{path}' has no metadata of an exported student, or they are damaged: {make_printable(error)}"
        ) from None
    try:
        onnx_student = OnnxStudent.from_bytes(content)
        _check_interface(onnx_student.session, metadata)
    except Exception as error:  # ONNX Runtime's errors are a dozen classes without a common one
        raise CacheError(f"'{path}' cannot be run: {make_printable(str(error).strip())}") from None
    return onnx_student, metadata


def _parse_onnx(path: Path, content: bytes) -> Any:
    import onnx

    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception:  # protobuf's DecodeError, which no public module exports
        raise CacheError(f"'{path}' is not an ONNX file, or is damaged") from None
    return model


def _find_external_tensors(message: Any) -> Iterator[str]:
    """Yield the names of tensors with external data, at any depth of a protobuf message."""
    if message.DESCRIPTOR.name == "TensorProto" and (message.data_location or message.external_data):
        yield message.name
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in (value,) if hasattr(value, "DESCRIPTOR") else value:
                yield from _find_external_tensors(inner)


def _check_interface(session: Any, metadata: ExportMetadata) -> None:
    """Raise ValueError where the network's input and output are not those of its metadata."""
    interface = [
        [(value.name, value.type, list(value.shape)[1:]) for value in values]
        for values in (session.get_inputs(), session.get_outputs())
    ]
    expected = [
        [(metadata.input_name, "tensor(float)", list(metadata.input_shape))],
        [(metadata.output_name, "tensor(float)", [metadata.outputs])],
    ]
    if interface != expected:
        raise ValueError(f"its inputs and outputs are {interface}, by its metadata they are {expected}")


def get_onnx_versions() -> dict[str, str]:
    """Return the versions of the libraries that write and run ONNX files."""
    import onnx
    import onnxruntime
    import onnxscript

    return {"onnx": onnx.__version__, "onnxscript": onnxscript.__version__, "onnxruntime": onnxruntime.__version__}
