"""What an exported student says about itself: written into its files, read by `softcache predict`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

METADATA_FORMAT = "softcache student 1"
INPUT, OUTPUT = "pictures", "logits"
ONNX, INT8, PT2, WEIGHTS = "student.onnx", "student-int8.onnx", "student.pt2", "student.safetensors"
_MOST_CLASSES, _LARGEST = 1_000_000, 4096


@dataclass(frozen=True)
class ExportMetadata:
    """classes: names in the order of the logits; channels: of the input, 1 grey, 3 RGB; size: its side in pixels;
    resize: what the image's shorter side is made first; fingerprints: of the caches it learned from; versions: of
    softcache and PyTorch."""

    classes: tuple[str, ...]
    channels: int
    size: int
    resize: int
    arch: str
    fingerprints: tuple[str, ...]
    versions: dict[str, str]

    @property
    def mode(self) -> str:
        """Pillow's name for images of so many channels."""
        return "L" if self.channels == 1 else "RGB"

    def preprocessing(self) -> dict[str, Any]:
        """How a image becomes the input, as plain JSON values."""
        return {
            "mode": self.mode,
            "channels": self.channels,
            "size": self.size,
            "resize": self.resize,
            "filter": "bilinear, antialiased (Pillow)",
            "range": [0, 1],
            "layout": "float32 [B, C, size, size]",
        }

    def describe_input(self) -> str:
        """The same for a reader."""
        kind = "grey" if self.channels == 1 else "RGB"
        return (
            f"Decode the image as {kind} (8 bits a channel); make its shorter side {self.resize} px with Pillow's"
            f" bilinear filter, unless it is; cut out the middle {self.size} x {self.size} px; divide by 255."
            " Normalisation is inside the network."
        )

    def outputs(self) -> str:
        """What the network gives."""
        return (
            f"{OUTPUT}, float32 [B, {len(self.classes)}], one number per class in the order of `classes`;"
            " their softmax is the probabilities"
        )

    def to_metadata(self) -> dict[str, str]:
        """As key-value pairs of text, which ONNX and safetensors files carry."""
        return {
            "form": METADATA_FORMAT,
            "arch": self.arch,
            "classes": json.dumps(self.classes),
            "preprocessing": json.dumps(self.preprocessing()),
            "preprocessing_in_words": self.describe_input(),
            "outputs": self.outputs(),
            "cache": json.dumps(self.fingerprints),
            **self.versions,
        }

    @staticmethod
    def from_metadata(record: Mapping[str, str]) -> "ExportMetadata":
        """The inverse. Raises ValueError, TypeError, KeyError or RecursionError for what no export has written."""
        if record.get("form") != METADATA_FORMAT:
            raise ValueError(f"it is no '{METADATA_FORMAT}': `softcache export` did not write it")
        classes, how = json.loads(record["classes"]), json.loads(record["preprocessing"])
        if not (isinstance(classes, list) and 1 <= len(classes) <= _MOST_CLASSES):
            raise ValueError("its classes are no list of names")
        if not all(isinstance(name, str) for name in classes):
            raise ValueError("its classes are no names")
        numbers = [how[key] for key in ("channels", "size", "resize")]
        if not all(type(number) is int for number in numbers):
            raise ValueError(f"its preprocessing has channels, size and resize {numbers}")
        channels, size, resize = numbers
        if channels not in (1, 3) or not 1 <= size <= resize <= _LARGEST:
            raise ValueError(f"its preprocessing asks for {channels} channels, {resize} px, cut to {size}")
        versions = {key: str(record[key]) for key in ("softcache", "torch") if key in record}
        fingerprints = tuple(map(str, json.loads(record.get("cache", "[]"))))
        return ExportMetadata(
            tuple(classes), channels, size, resize, str(record.get("arch", "")), fingerprints, versions
        )
