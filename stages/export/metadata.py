"""The metadata of an exported student: `softcache export` writes it into the files, `softcache predict` reads it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

METADATA_FORMAT = "softcache student 1"
INPUT, OUTPUT = "pictures", "logits"  # of the ONNX graph
ONNX, INT8, PT2, WEIGHTS = "student.onnx", "student-int8.onnx", "student.pt2", "student.safetensors"
_MAX_CLASSES, _MAX_SIDE = 1_000_000, 4096  # that are accepted from a file


@dataclass(frozen=True)
class ExportMetadata:
    """How images become the network's input, and what its outputs mean.

    Attributes:
        classes: Names, in the order of the logits.
        channels: Of the input: 1 (grey) or 3 (RGB).
        size: Height and width of the input in pixels.
        resize: Length in pixels to which an image's shorter side is resized before the centre crop.
        arch: Of the student.
        fingerprints: Of the caches from which the student was trained.
        versions: Of softcache and PyTorch.
        is_transposed: Whether images are first turned as their EXIF orientation says.
    """

    classes: tuple[str, ...]
    channels: int
    size: int
    resize: int
    arch: str
    fingerprints: tuple[str, ...]
    versions: dict[str, str]
    is_transposed: bool = False

    @property
    def mode(self) -> str:
        """Pillow's name for images with this number of channels."""
        return "L" if self.channels == 1 else "RGB"

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How an image becomes the input, as plain JSON values."""
        return {
            **({"exif": "transpose"} if self.is_transposed else {}),
            "mode": self.mode,
            "channels": self.channels,
            "size": self.size,
            "resize": self.resize,
            "filter": "bilinear, antialiased (Pillow)",
            "range": [0, 1],
            "layout": "float32 [B, C, size, size]",
        }

    def describe_preprocessing(self) -> str:
        """Write out the preprocessing as instructions for a person."""
        kind = "grey" if self.channels == 1 else "RGB"
        turn = ", turned by its EXIF orientation" if self.is_transposed else ""
        return (
            f"Decode the image as {kind} (8 bits a channel){turn}; make its shorter side {self.resize} px with"
            f" Pillow's bilinear filter, unless it is; cut out the middle {self.size} x {self.size} px; divide by 255."
            " Normalisation is inside the network."
        )

    def describe_output(self) -> str:
        """Write out name, dtype, shape and meaning of the output."""
        return (
            f"{OUTPUT}, float32 [B, {len(self.classes)}], one number per class in the order of `classes`;"
            " their softmax is the probabilities"
        )

    def to_dict(self) -> dict[str, str]:
        """Convert to the key-value pairs of text that ONNX, pt2 and safetensors files hold."""
        return {
            "form": METADATA_FORMAT,
            "arch": self.arch,
            "classes": json.dumps(self.classes),
            "preprocessing": json.dumps(self.preprocessing),
            "preprocessing_in_words": self.describe_preprocessing(),
            "outputs": self.describe_output(),
            "cache": json.dumps(self.fingerprints),
            **self.versions,
        }

    @staticmethod
    def from_dict(record: Mapping[str, str]) -> "ExportMetadata":
        """Read the key-value pairs of a file, which may come from anyone.

        Raises:
            ValueError, TypeError, KeyError, RecursionError: `softcache export` cannot have written them.
        """
        if record.get("form") != METADATA_FORMAT:
            raise ValueError(f"its metadata format is not '{METADATA_FORMAT}': `softcache export` did not write it")
        classes, preprocessing = json.loads(record["classes"]), json.loads(record["preprocessing"])
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("its classes are not a list of names")
        if not 1 <= len(classes) <= _MAX_CLASSES:
            raise ValueError(f"it has {len(classes):,} classes, not 1 to {_MAX_CLASSES:,}")
        numbers = [preprocessing[key] for key in ("channels", "size", "resize")]
        if not all(type(number) is int for number in numbers):
            raise ValueError(f"its channels, size and resize are {numbers}, not integers")
        channels, size, resize = numbers
        if channels not in (1, 3) or not 1 <= size <= resize <= _MAX_SIDE:
            raise ValueError(
                f"its preprocessing is {channels} channels, resize {resize} and size {size}: channels must be 1 or 3,"
                f" and 1 <= size <= resize <= {_MAX_SIDE}"
            )
        return ExportMetadata(
            classes=tuple(classes),
            channels=channels,
            size=size,
            resize=resize,
            arch=str(record.get("arch", "")),
            fingerprints=tuple(map(str, json.loads(record.get("cache", "[]")))),
            versions={key: str(record[key]) for key in ("softcache", "torch") if key in record},
            is_transposed=preprocessing.get("exif") == "transpose",
        )
