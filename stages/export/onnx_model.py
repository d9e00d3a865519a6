"""The one door to onnx and onnxruntime: a student's file made lean, opened with distrust, and asked."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError, UsageError, make_printable

from .metadata import INPUT, OUTPUT, ExportMetadata

Images = NDArray[np.float32]
MAX_BYTES = (2 << 30) - 1  # of a protobuf message, and so of an ONNX file without other files beside it


@dataclass(frozen=True)
class OnnxStudent:
    """A network in ONNX Runtime, on the CPU."""

    session: Any

    @staticmethod
    def from_session(model: bytes, threads: int = 0) -> "OnnxStudent":
        """threads: of one call; 0: a thread for each core. Raises whatever ONNX Runtime does."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors, which are raised as well
        return OnnxStudent(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]))

    def logits(self, images: Images) -> NDArray[np.float32]:
        """float32 [B, K] of images [B, C, S, S] of values 0 … 1."""
        found: NDArray[np.float32] = self.session.run([OUTPUT], {INPUT: images})[0]
        return found


def strip_onnx(model: Any, metadata: Mapping[str, str], version: str) -> None:
    """Take out of a ModelProto all that no runtime reads: traces with paths of this machine, names of modules, shapes
    in between; and put the metadata in."""
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
    """The bytes of a ModelProto. Raises CacheError where a file cannot hold it."""
    if model.ByteSize() > MAX_BYTES:
        size = model.ByteSize() / 1e9
        raise CacheError(f"the network has {size:.1f} GB, and an ONNX file that is whole in itself at most 2.1 GB")
    found: bytes = model.SerializeToString(deterministic=True)
    return found


def open_onnx_student(path: Path) -> tuple[OnnxStudent, ExportMetadata]:
    """A student in a file from anyone. Raises UsageError where there is none, CacheError for any other file.

    Paths in a file are not followed: a tensor that lies elsewhere is refused before the runtime sees it.
    """
    if not path.is_file():
        raise UsageError(f"there is no model '{path}'")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise CacheError(f"'{path}' has {size:,} bytes, more than the {MAX_BYTES:,} of an ONNX file")
    content = path.read_bytes()
    model = _parse_onnx(path, content)
    if name := next(_reject_external(model), None):
        raise CacheError(
            f"'{path}' keeps the tensor '{make_printable(name, 80)}' in another file, which is not followed"
        )
    try:
        about = ExportMetadata.from_metadata({entry.key: entry.value for entry in model.metadata_props})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CacheError(f"'{path}' has no metadata of a student, or damaged ones: {make_printable(error)}") from None
    try:
        runner = OnnxStudent.from_session(content)
        _check_form(runner.session, about)
    except Exception as error:  # of ONNX Runtime: one of a dozen classes, all of its own
        raise CacheError(f"'{path}' cannot be run: {make_printable(str(error).strip())}") from None
    return runner, about


def _parse_onnx(path: Path, content: bytes) -> Any:
    import onnx

    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception:  # protobuf's DecodeError, which has no door of its own
        raise CacheError(f"'{path}' is no ONNX file, or is damaged") from None
    return model


def _reject_external(message: Any) -> Iterator[str]:
    """The names of tensors, wherever in a protobuf message, whose values lie in another file."""
    if message.DESCRIPTOR.name == "TensorProto" and (message.data_location or message.external_data):
        yield message.name
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in (value,) if hasattr(value, "DESCRIPTOR") else value:
                yield from _reject_external(inner)


def _check_form(session: Any, about: ExportMetadata) -> None:
    """Raise ValueError where input and output are not what the metadata say."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    asked = [(value.name, value.type, list(value.shape)[1:]) for value in inputs]
    given = [(value.name, value.type, list(value.shape)[1:]) for value in outputs]
    wanted = [(INPUT, "tensor(float)", [about.channels, about.size, about.size])]
    if asked != wanted or given != [(OUTPUT, "tensor(float)", [len(about.classes)])]:
        raise ValueError(f"it takes {asked} and gives {given}, its metadata say otherwise")


def versions() -> dict[str, str]:
    """Of what writes and runs the files."""
    import onnx
    import onnxruntime
    import onnxscript

    return {"onnx": onnx.__version__, "onnxscript": onnxscript.__version__, "onnxruntime": onnxruntime.__version__}
