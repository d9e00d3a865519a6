"""A network together with the preparation of its input, which is part of a cache's identity."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from softcache.base.errors import UsageError, make_printable

from .class_map import ClassMap
from .custom_networks import NEEDS_CONTIGUOUS_INPUT

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BILINEAR, BICUBIC = "bilinear", "bicubic"  # interpolations
PIXEL_STD = 1 / 255  # as standard deviation of values 0 … 1, with a mean of 0: the input is the pixel 0 … 255
_MIN_STD, _MAX_NUMBER = 1e-6, 1e6
_MIN_ROW_STD, _MAX_ROW_NUMBER = 1e-30, 1e30  # of rows of numbers, in their own units
_MAX_ENTRIES = 1 << 24  # of a row


@dataclass(frozen=True)
class InputSpec:
    """How a view becomes the input of a network.

    Attributes:
        channels: Channels of the input; a grey view is repeated for 3. Of rows of numbers, length of the first axis.
        size: Side of the input in pixels; a view of another size is resized, with antialiasing. 0 for rows.
        mean: Mean of each channel, for values of 0 … 1. Of rows: in their own units, of each entry of the first axis
            or one for all.
        std: Standard deviation, as the mean.
        interpolation: How a view is resized: "bilinear" or "bicubic".
        shape: Of a row of numbers, whose views are float32 [B, *shape]; () for images.
        output_mean, output_std: Where the network predicts numbers: mean and standard deviation of each. Its outputs
            are multiplied and shifted by them, so that the network itself learns standardised numbers. () elsewhere.
    """

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = BILINEAR
    shape: tuple[int, ...] = ()
    output_mean: tuple[float, ...] = ()
    output_std: tuple[float, ...] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a row of the network's input."""
        return self.shape or (self.channels, self.size, self.size)

    def make_views(self, rows: int) -> torch.Tensor:
        """Make random views, the same each time: uint8 [rows, C, S, S], or float32 [rows, *shape] near the mean."""
        generator = torch.Generator().manual_seed(0)
        if not self.shape:
            return torch.randint(0, 256, (rows, *self.input_shape), dtype=torch.uint8, generator=generator)
        mean, std = (torch.tensor(x).view(1, -1, *[1] * (len(self.shape) - 1)) for x in (self.mean, self.std))
        return torch.randn(rows, *self.shape, generator=generator) * std + mean

    def with_channels(self, channels: int) -> "InputSpec":
        """Return the same for more channels, a multiple of these, which are repeated: grey images have one."""
        copies = channels // self.channels
        return replace(self, channels=channels, mean=self.mean * copies, std=self.std * copies)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values; no shape of images, and no interpolation where it is bilinear."""
        record = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        if self.interpolation == BILINEAR:  # as in the first caches
            del record["interpolation"]
        if not self.shape:
            del record["shape"]
        if not self.output_std:
            del record["output_mean"], record["output_std"]
        return record

    def with_output(self, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> "InputSpec":
        """Return the same input with another scale of the outputs; () for outputs as they are."""
        return replace(self, output_mean=mean, output_std=std)

    def describe(self) -> str:
        """Describe the input in one line."""
        mean, std = (",".join(f"{number:g}" for number in numbers) for numbers in (self.mean, self.std))
        return f"{self.size} px, {self.interpolation}, mean={mean},std={std}"

    @staticmethod
    def from_json(record: dict[str, Any]) -> "InputSpec":
        """The inverse of to_json.

        Raises:
            KeyError, TypeError, ValueError: A field is missing, of another type, or out of range.
        """
        output_mean, output_std = (tuple(map(float, record.get(f"output_{name}", ()))) for name in ("mean", "std"))
        if len(output_mean) != len(output_std) or not all(abs(m) <= _MAX_ROW_NUMBER for m in output_mean):
            raise ValueError(f"outputs of {len(output_mean)} means and {len(output_std)} deviations")
        if not all(_MIN_ROW_STD <= s <= _MAX_ROW_NUMBER for s in output_std):
            raise ValueError(f"outputs of the standard deviation {list(output_std)[:40]}")
        return InputSpec._parse_input(record).with_output(output_mean, output_std)

    @staticmethod
    def _parse_input(record: dict[str, Any]) -> "InputSpec":
        mean, std = tuple(map(float, record["mean"])), tuple(map(float, record["std"]))
        channels, size = int(record["channels"]), int(record["size"])
        if "shape" in record:
            return InputSpec._check_rows(channels, size, mean, std, tuple(map(int, record["shape"])))
        if not (1 <= channels <= 4 and 1 <= size <= 4096 and len(mean) == len(std) == channels):
            raise ValueError(
                f"an input of {channels} channels, {size} pixels, {len(mean)} means and {len(std)} deviations"
            )
        if not all(abs(m) <= _MAX_NUMBER for m in mean) or not all(_MIN_STD <= s <= _MAX_NUMBER for s in std):
            raise ValueError(f"an input of mean {list(mean)} and standard deviation {list(std)}")
        interpolation = record.get("interpolation", BILINEAR)
        if interpolation not in (BILINEAR, BICUBIC):
            raise ValueError(f"an input of interpolation {make_printable(interpolation, 40)}")
        return InputSpec(channels, size, mean, std, interpolation)

    @staticmethod
    def _check_rows(
        channels: int, size: int, mean: tuple[float, ...], std: tuple[float, ...], shape: tuple[int, ...]
    ) -> "InputSpec":
        """Make the input of rows of numbers. Raises ValueError for numbers out of range."""
        if not 1 <= len(shape) <= 31 or min(shape) < 1 or math.prod(shape) > _MAX_ENTRIES:
            raise ValueError(f"an input of the shape {list(shape)[:40]}")
        if (channels, size) != (shape[0], 0) or len(mean) != len(std) or len(mean) not in (1, channels):
            raise ValueError(
                f"an input of the shape {list(shape)}, {channels} channels, {size} pixels, {len(mean)} means and"
                f" {len(std)} deviations"
            )
        is_mean_valid = all(abs(m) <= _MAX_ROW_NUMBER for m in mean)
        if not is_mean_valid or not all(_MIN_ROW_STD <= s <= _MAX_ROW_NUMBER for s in std):
            raise ValueError(f"an input of mean {list(mean)[:40]} and standard deviation {list(std)[:40]}")
        return InputSpec(channels, size, mean, std, shape=shape)


NORMALIZATIONS = ("imagenet", "data", "none")  # the named choices of --normalize
PUBLISHED = "model"  # one more: as published with the network


def format_normalize(mean: Sequence[float], std: Sequence[float]) -> str:
    """Format numbers as --normalize takes them, to the last bit; the inverse of parse_normalize."""
    return f"mean={','.join(map(repr, mean))},std={','.join(map(repr, std))}"


def parse_normalize(text: str, may_be_rows: bool = False) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Parse --normalize.

    Args:
        text: A name of NORMALIZATIONS; "model"; `pixels` for values of 0 … 255; or `mean=0.5,0.4,0.4,std=0.25`, with
            one number or three for each, for values of 0 … 1.
        may_be_rows: Whether the data may be rows of numbers, which have any number of entries, in any units.

    Returns:
        Mean and standard deviation, both of one number or of three; None for a name.

    Raises:
        UsageError: It is neither.
    """
    if text in (*NORMALIZATIONS, PUBLISHED):
        return None
    if text == "pixels":
        return (0.0,), (PIXEL_STD,)
    form = "mean=0.5,0.5,0.5,std=0.25,0.25,0.25"
    match = re.fullmatch(r"mean=([^=]*),std=([^=]*)", text.replace(" ", ""))
    if match is None:
        names = ", ".join((*NORMALIZATIONS, "pixels", PUBLISHED))
        raise UsageError(f"--normalize {make_printable(text)}: there are {names}, and {form}")
    values = []
    for name, numbers in zip(("mean", "std"), match.groups(), strict=True):
        try:
            values.append(tuple(map(float, numbers.split(","))))
        except ValueError:
            raise UsageError(
                f"--normalize: {name}={make_printable(numbers)} is no list of numbers, as in {form}"
            ) from None
    mean, std = values
    channels = max(len(mean), len(std))
    if not {len(mean), len(std)} <= {1, channels} or not (may_be_rows or channels in (1, 3)):
        raise UsageError(
            f"--normalize has {len(mean)} means and {len(std)} standard deviations: give one of each, or"
            f" {'as many as the rows have entries' if may_be_rows else 'three'}"
        )
    mean, std = (numbers * channels if len(numbers) < channels else numbers for numbers in (mean, std))
    least, most = (_MIN_ROW_STD, _MAX_ROW_NUMBER) if may_be_rows else (_MIN_STD, _MAX_NUMBER)
    if not all(abs(number) <= most for number in mean):
        raise UsageError(f"--normalize: mean={','.join(map(str, mean))} is not finite and at most {most:g}")
    if not all(least <= number <= most for number in std):
        raise UsageError(f"--normalize: std={','.join(map(str, std))} is not between {least:g} and {most:g}")
    return mean, std


class PreparedModel(nn.Module):
    """A network that takes views as they are stored: uint8 [B, C, S, S] -> logits float32 [B, K].

    Views of rows of numbers are float32 [B, *shape].

    Args:
        network: The arch: float32 [B, channels, size, size] -> [B, K]. Its module paths are the names of taps.
        input_spec: How a view becomes its input.
        features: Of a network whose classifier was taken away, the name of that layer, whose input is the output.

    Attributes:
        network, input_spec, features: As given.
        output_scale, output_shift: float32 [K], buffers: logits = shift + output * scale; None for outputs as they
            are.
        class_map: How a teacher's logits become those of the classes of the data; None where they are these. It is no
            part of the forward pass, see `map_classes`.
        scale, shift: float32 [1, channels, 1, 1], buffers: input = shift + pixel * scale. Of rows of numbers float32
            [1, channels or 1, 1, …]: input = (number + shift) * scale, which loses nothing where a mean is large.
    """

    def __init__(self, network: nn.Module, input_spec: InputSpec, features: str = ""):
        super().__init__()
        self.network = network
        self.input_spec = input_spec
        self.features = features
        self.class_map: ClassMap | None = None
        # Only a network with convolutions is laid out channels-last; any other keeps its layout.
        self._is_channels_last = any(isinstance(m, nn.Conv2d) for m in network.modules()) and not any(
            hasattr(m, NEEDS_CONTIGUOUS_INPUT) for m in network.modules()
        )
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        axes = (1, -1, *[1] * (len(input_spec.input_shape) - 1))
        mean, std = torch.tensor(input_spec.mean).view(axes), torch.tensor(input_spec.std).view(axes)
        self.register_buffer("scale", 1 / std if input_spec.shape else 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean if input_spec.shape else -mean / std, persistent=False)
        self.output_scale: torch.Tensor | None
        self.output_shift: torch.Tensor | None
        output_mean, output_std = input_spec.output_mean, input_spec.output_std
        self.register_buffer("output_scale", torch.tensor(output_std) if output_std else None, persistent=False)
        self.register_buffer("output_shift", torch.tensor(output_mean) if output_std else None, persistent=False)
        self._by_channel = list(zip(self.shift.flatten().unbind(), self.scale.flatten().tolist(), strict=True))
        if self._is_channels_last:  # 1.2 to 3 times as fast on CPUs and GPUs with matrix units
            self.to(memory_format=torch.channels_last)

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """Logits float32 [B, K] of views uint8 [B, C, S, S], also where the network computes in another dtype."""
        return self.scale_output(self.network(self.prepare_input(views)))

    def scale_output(self, outputs: torch.Tensor) -> torch.Tensor:
        """Logits float32 [B, K] from what the network returns: standardised numbers become those of the data."""
        if self.output_scale is None or self.output_shift is None:
            return outputs.float()
        return outputs.float() * self.output_scale + self.output_shift

    def map_classes(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits of the classes of the data, [B, K], from those of the network."""
        return logits if self.class_map is None else self.class_map(logits)

    def prepare_input(self, views: torch.Tensor) -> torch.Tensor:
        """The network's input, float32 [B, channels, size, size], from views uint8 [B, C, S, S]."""
        x = views.to(torch.float32)
        if self.input_spec.shape:
            x = (x + self.shift) * self.scale
            return x.contiguous(memory_format=torch.channels_last) if self._is_channels_last and x.ndim == 4 else x
        if self.input_spec.channels != x.shape[1]:
            x = x.expand(-1, self.input_spec.channels, -1, -1)
        if self.input_spec.size != x.shape[-1]:
            size = [self.input_spec.size] * 2
            x = F.interpolate(x, size=size, mode=self.input_spec.interpolation, antialias=True, align_corners=False)
            if self.input_spec.interpolation == BICUBIC:
                x = x.clamp(0, 255)  # it overshoots at edges, where a resized image of 8 bits is cut off
        return self._normalize(x)

    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        """shift + x * scale for each channel, in the network's memory layout.

        On a CPU one channel at a time, written straight into the result: equal to the bit, and 18 us instead of 54
        for 128 images of 28 x 28, of the 640 us of a step of `mlp:64`; 125 us instead of 205 for 3 x 32 x 32 on two
        threads.
        """
        layout = torch.channels_last if self._is_channels_last else torch.contiguous_format
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return torch.addcmul(self.shift, x, self.scale).contiguous(memory_format=layout)
        normalized = torch.empty_like(x, memory_format=layout)
        for channel, (shift, scale) in enumerate(self._by_channel):
            torch.add(shift, x[:, channel], alpha=scale, out=normalized[:, channel])
        return normalized


class InputPreparation:
    """Turns views into the input of a network, on the device where the views are.

    Args:
        input_spec: How a view becomes the input.
    """

    def __init__(self, input_spec: InputSpec):
        self.input_spec = input_spec
        self._by_device: dict[torch.device, PreparedModel] = {}

    def __call__(self, views: torch.Tensor) -> torch.Tensor:
        """The input, float32 [B, channels, size, size], from views uint8 [B, C, S, S]."""
        if views.device not in self._by_device:
            self._by_device[views.device] = PreparedModel(nn.Identity(), self.input_spec).to(views.device)
        return self._by_device[views.device].prepare_input(views)
