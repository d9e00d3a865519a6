"""ONNX files of a user's own: read without following paths out of their folder, and identified by a digest."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.files import open_input_file

_CONSTANTS = ("Constant", "ConstantOfShape", "Shape")  # nodes whose output is none of the images
_CHUNK = 1 << 22  # bytes of a file that are hashed at once


@dataclass(frozen=True)
class OnnxFile:
    """A model in ONNX format.

    Attributes:
        path: The file.
        model: The onnx.ModelProto, without the tensors that lie in other files.
        digest: SHA-256 of the file's bytes; where tensors lie in other files, of both.
    """

    path: Path
    model: Any
    digest: str

    def list_values(self) -> list[str]:
        """List the values that the nodes of the graph compute of the images, in their order."""
        nodes = (node for node in self.model.graph.node if node.op_type not in _CONSTANTS)
        return [name for node in nodes for name in node.output if name]

    def serialize(self, values: tuple[str, ...] = ()) -> bytes:
        """Return the bytes of the model, with some inner values as outputs of the graph."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        outputs = {output.name for output in model.graph.output}
        for name in values:
            if name not in outputs:
                model.graph.output.add().name = name  # ONNX Runtime infers its type
        content: bytes = model.SerializeToString()
        return content


def read_onnx_file(path: Path) -> OnnxFile:
    """Read an ONNX file, which may come from anyone.

    Tensors in other files are read where these lie beside it; a link may lead to where the file itself is a link to.

    Raises:
        UsageError: There is no such file.
        CacheError: It is no ONNX file, is damaged, or names files in other folders or that do not exist.
    """
    import onnx

    if not path.is_file():
        raise UsageError(f"there is no ONNX file '{make_printable(path)}'")
    with open_input_file(path) as file:
        content = file.read()
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception:  # protobuf's DecodeError, which no public module exports
        raise CacheError(f"'{path}' is no ONNX file, or is damaged") from None
    if not model.graph.node:
        raise CacheError(f"'{path}' is no ONNX file, or is damaged: it has no graph")
    digest = sha256(content)
    locations = sorted({location for tensor in _find_tensors(model) for location in _get_locations(tensor)})
    for location in locations:
        digest.update(f"\0{location}\0{_hash_external_file(path, location)}".encode())
    return OnnxFile(path, model, digest.hexdigest())


def _find_tensors(message: Any) -> Iterator[Any]:
    """Yield the tensors with data in another file, at any depth of a protobuf message."""
    if message.DESCRIPTOR.name == "TensorProto":
        if message.data_location or message.external_data:
            yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in (value,) if hasattr(value, "DESCRIPTOR") else value:
                yield from _find_tensors(inner)


def _get_locations(tensor: Any) -> list[str]:
    return [entry.value for entry in tensor.external_data if entry.key == "location"] or [""]


def _hash_external_file(path: Path, location: str) -> str:
    """Return the SHA-256 of a file of tensors beside the model."""
    name = make_printable(location, 80)
    if not location or Path(location).name != location or not location.isprintable():
        raise CacheError(
            f"'{path}' keeps tensors in '{name}', and only files beside it are read: save it with all data in one file"
        )
    data = path.parent / location
    if not data.is_file():
        raise CacheError(f"'{path}' keeps tensors in '{name}', which is not beside it: copy that file there too")
    if data.resolve().parent not in (path.parent.resolve(), path.resolve().parent):
        raise CacheError(f"'{path}' keeps tensors in '{name}', a link to another folder: put the file there")
    digest = sha256()
    with open_input_file(data) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
