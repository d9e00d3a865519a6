"""The metadata of an exported student: `softcache export` writes it into the files, `softcache predict` reads it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS, TASKS

METADATA_FORMAT = "softcache student 1"
INPUT, OUTPUT = "pictures", "logits"  # of the ONNX graph, of images and classes
_ROWS = "rows"  # the input of rows of numbers
_OUTPUTS = {NUMBERS: "numbers", EMBEDDING: "embedding"}
ONNX, INT8, PT2, WEIGHTS = "student.onnx", "student-int8.onnx", "student.pt2", "student.safetensors"
_MAX_CLASSES, _MAX_SIDE, _MAX_ENTRIES = 1_000_000, 4096, 1 << 24  # that are accepted from a file


@dataclass(frozen=True)
class ExportMetadata:
    """How images become the network's input, and what its outputs mean.

    Attributes:
        classes: Names of the classes, labels or numbers, in the order of the outputs; () of an embedding.
        channels: Of the input: 1 (grey) or 3 (RGB). Of rows of numbers, length of the first axis.
        size: Height and width of the input in pixels; 0 for rows.
        resize: Length in pixels to which an image's shorter side is resized before the centre crop; 0 for rows.
        arch: Of the student.
        fingerprints: Of the caches from which the student was trained.
        versions: Of softcache and PyTorch.
        is_transposed: Whether images are first turned as their EXIF orientation says.
        task: What is predicted, see data/tasks.py.
        thresholds: Of several labels: the probability above which each is predicted; () for other tasks.
        width: D of an embedding; 0 for other tasks.
        output_mean, output_std: Of numbers: the network without its output scale returns (number - mean) / std;
            () for other tasks.
        shape: Of a row of numbers; () for images.
    """

    classes: tuple[str, ...]
    channels: int
    size: int
    resize: int
    arch: str
    fingerprints: tuple[str, ...]
    versions: dict[str, str]
    is_transposed: bool = False
    task: str = CLASSES
    thresholds: tuple[float, ...] = ()
    width: int = 0
    output_mean: tuple[float, ...] = ()
    output_std: tuple[float, ...] = ()
    shape: tuple[int, ...] = ()

    @property
    def mode(self) -> str:
        """Pillow's name for images with this number of channels."""
        return "L" if self.channels == 1 else "RGB"

    @property
    def input_name(self) -> str:
        """Name of the graph's input."""
        return _ROWS if self.shape else INPUT

    @property
    def output_name(self) -> str:
        """Name of the graph's output."""
        return _OUTPUTS.get(self.task, OUTPUT)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a row of the input."""
        return self.shape or (self.channels, self.size, self.size)

    @property
    def outputs(self) -> int:
        """K, the number of outputs."""
        return self.width or len(self.classes)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How an image becomes the input, as plain JSON values."""
        if self.shape:
            return {"shape": list(self.shape), "layout": self._describe_rows()}
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

    def _describe_rows(self) -> str:
        return f"float32 [B, {', '.join(map(str, self.shape))}]"

    def describe_preprocessing(self) -> str:
        """Write out the preprocessing as instructions for a person."""
        if self.shape:
            return f"Rows of numbers, {self._describe_rows()}, as they are. Normalisation is inside the network."
        kind = "grey" if self.channels == 1 else "RGB"
        turn = ", turned by its EXIF orientation" if self.is_transposed else ""
        return (
            f"Decode the image as {kind} (8 bits a channel){turn}; make its shorter side {self.resize} px with"
            f" Pillow's bilinear filter, unless it is; cut out the middle {self.size} x {self.size} px; divide by 255."
            " Normalisation is inside the network."
        )

    def describe_output(self) -> str:
        """Write out name, dtype, shape and meaning of the output."""
        meanings = {
            CLASSES: "one number per class in the order of `classes`; their softmax is the probabilities",
            LABELS: (
                "one number per label in the order of `names`; the sigmoid of each is its probability, and a label is"
                " predicted where that is above its number in `thresholds`"
            ),
            NUMBERS: "in the order of `names`, in the units of the data",
            EMBEDDING: "the embedding of each input, as the student outputs it",
        }
        return f"{self.output_name}, float32 [B, {self.outputs}], {meanings[self.task]}"

    def describe_task(self) -> dict[str, Any]:
        """Return what the outputs are, as plain JSON values: {"classes": names}, or the task and what it needs."""
        if self.task == CLASSES:
            return {"classes": list(self.classes)}
        if self.task == EMBEDDING:
            return {"task": self.task, "width": self.width}
        if self.task == LABELS:
            return {"task": self.task, "names": list(self.classes), "thresholds": list(self.thresholds)}
        # Of the weights alone, which do not hold the scale: they return (number - mean) / std.
        scale = {"mean": list(self.output_mean), "std": list(self.output_std)}
        return {"task": self.task, "names": list(self.classes), "output_scale": scale}

    def to_dict(self) -> dict[str, str]:
        """Convert to the key-value pairs of text that ONNX, pt2 and safetensors files hold."""
        task = {key: value if key == "task" else json.dumps(value) for key, value in self.describe_task().items()}
        return {
            "form": METADATA_FORMAT,
            "arch": self.arch,
            **task,
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
        outputs = _read_outputs(record)
        preprocessing = json.loads(record["preprocessing"])
        shape = _read_shape(preprocessing["shape"]) if "shape" in preprocessing else ()
        channels, size, resize = (shape[0], 0, 0) if shape else _read_numbers(preprocessing)
        return ExportMetadata(
            channels=channels,
            size=size,
            resize=resize,
            arch=str(record.get("arch", "")),
            fingerprints=tuple(map(str, json.loads(record.get("cache", "[]")))),
            versions={key: str(record[key]) for key in ("softcache", "torch") if key in record},
            is_transposed=preprocessing.get("exif") == "transpose",
            shape=shape,
            **outputs,
        )


def _read_outputs(record: Mapping[str, str]) -> dict[str, Any]:
    """Read what the outputs are: the fields of ExportMetadata that depend on the task."""
    task = record.get("task", CLASSES)
    if task not in TASKS:
        raise ValueError(f"its task is none of {', '.join(TASKS)}")
    if task == EMBEDDING:
        width = json.loads(record["width"])
        if type(width) is not int or not 1 <= width <= _MAX_ENTRIES:
            raise ValueError(f"its width is not a whole number from 1 to {_MAX_ENTRIES:,}")
        return {"task": task, "classes": (), "width": width}
    key = "classes" if task == CLASSES else "names"
    names = json.loads(record[key])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"its {key} are not a list of names")
    if not 1 <= len(names) <= _MAX_CLASSES:
        raise ValueError(f"it has {len(names):,} {key}, not 1 to {_MAX_CLASSES:,}")
    fields: dict[str, Any] = {"task": task, "classes": tuple(names)}
    if task == LABELS:
        fields["thresholds"] = _read_floats("thresholds", json.loads(record["thresholds"]), len(names))
        if not all(0 <= threshold <= 1 for threshold in fields["thresholds"]):
            raise ValueError("its thresholds are not between 0 and 1")
    if task == NUMBERS:
        scale = json.loads(record["output_scale"])
        fields["output_mean"] = _read_floats("means", scale["mean"], len(names))
        fields["output_std"] = _read_floats("standard deviations", scale["std"], len(names))
    return fields


def _read_floats(what: str, values: Any, count: int) -> tuple[float, ...]:
    is_list = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    if not is_list or len(values) != count or not all(map(math.isfinite, values)):
        raise ValueError(f"its {what} are not {count} finite numbers")
    return tuple(map(float, values))


def _read_shape(values: Any) -> tuple[int, ...]:
    is_list = isinstance(values, list) and all(type(value) is int for value in values)
    if not is_list or not 1 <= len(values) <= 31 or min(values) < 1 or math.prod(values) > _MAX_ENTRIES:
        raise ValueError("the shape of its rows is not a list of lengths")
    return tuple(values)


def _read_numbers(preprocessing: Any) -> tuple[int, int, int]:
    """Read channels, size and resize of images."""
    numbers = [preprocessing[key] for key in ("channels", "size", "resize")]
    if not all(type(number) is int for number in numbers):
        raise ValueError(f"its channels, size and resize are {numbers}, not integers")
    channels, size, resize = numbers
    if channels not in (1, 3) or not 1 <= size <= resize <= _MAX_SIDE:
        raise ValueError(
            f"its preprocessing is {channels} channels, resize {resize} and size {size}: channels must be 1 or 3,"
            f" and 1 <= size <= resize <= {_MAX_SIDE}"
        )
    return channels, size, resize
