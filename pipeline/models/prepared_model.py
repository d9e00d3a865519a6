"""A network together with the preparation of its input, which is part of a cache's identity."""

import re
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class InputSpec:
    """How a uint8 view becomes the input of a network.

    Attributes:
        channels: Channels of the input; a grey view is repeated for 3.
        size: Side of the input in pixels; a view of another size is resized, with antialiasing.
        mean: Mean of each channel, for values of 0 … 1.
        std: Standard deviation of each channel, for values of 0 … 1.
        interpolation: How a view is resized: "bilinear" or "bicubic".
    """

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = BILINEAR

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values; without `interpolation` where it is bilinear, as in the first caches."""
        record = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        if self.interpolation == BILINEAR:
            del record["interpolation"]
        return record

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
        mean, std = tuple(map(float, record["mean"])), tuple(map(float, record["std"]))
        channels, size = int(record["channels"]), int(record["size"])
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


NORMALIZATIONS = ("imagenet", "data", "none")  # the named choices of --normalize
PUBLISHED = "model"  # one more: as published with the network


def parse_normalize(text: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Parse --normalize.

    Args:
        text: A name of NORMALIZATIONS; "model"; `pixels` for values of 0 … 255; or `mean=0.5,0.4,0.4,std=0.25`, with
            one number or three for each, for values of 0 … 1.

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
    if not {len(mean), len(std)} <= {1, channels} or channels not in (1, 3):
        raise UsageError(
            f"--normalize has {len(mean)} means and {len(std)} standard deviations: give one of each, or three"
        )
    mean, std = (numbers * channels if len(numbers) < channels else numbers for numbers in (mean, std))
    if not all(abs(number) <= _MAX_NUMBER for number in mean):
        raise UsageError(f"--normalize: mean={','.join(map(str, mean))} is not finite and at most {_MAX_NUMBER:g}")
    if not all(_MIN_STD <= number <= _MAX_NUMBER for number in std):
        raise UsageError(f"--normalize: std={','.join(map(str, std))} is not between {_MIN_STD:g} and {_MAX_NUMBER:g}")
    return mean, std


class PreparedModel(nn.Module):
    """A network that takes views as they are stored: uint8 [B, C, S, S] -> logits float32 [B, K].

    Args:
        network: The arch: float32 [B, channels, size, size] -> [B, K]. Its module paths are the names of taps.
        input_spec: How a view becomes its input.

    Attributes:
        network, input_spec: As given.
        class_map: How a teacher's logits become those of the classes of the data; None where they are these. It is no
            part of the forward pass, see `map_classes`.
        scale, shift: float32 [1, channels, 1, 1], buffers: input = shift + pixel * scale.
    """

    def __init__(self, network: nn.Module, input_spec: InputSpec):
        super().__init__()
        self.network = network
        self.input_spec = input_spec
        self.class_map: ClassMap | None = None
        # Only a network with convolutions is laid out channels-last; any other keeps its layout.
        self._is_channels_last = any(isinstance(m, nn.Conv2d) for m in network.modules()) and not any(
            hasattr(m, NEEDS_CONTIGUOUS_INPUT) for m in network.modules()
        )
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        mean = torch.tensor(input_spec.mean).view(1, -1, 1, 1)
        std = torch.tensor(input_spec.std).view(1, -1, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self._by_channel = list(zip(self.shift.flatten().unbind(), self.scale.flatten().tolist(), strict=True))
        if self._is_channels_last:  # 1.2 to 3 times as fast on CPUs and GPUs with matrix units
            self.to(memory_format=torch.channels_last)

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """Logits float32 [B, K] of views uint8 [B, C, S, S], also where the network computes in another dtype."""
        logits: torch.Tensor = self.network(self.prepare_input(views))
        return logits.float()

    def map_classes(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits of the classes of the data, [B, K], from those of the network."""
        return logits if self.class_map is None else self.class_map(logits)

    def prepare_input(self, views: torch.Tensor) -> torch.Tensor:
        """The network's input, float32 [B, channels, size, size], from views uint8 [B, C, S, S]."""
        x = views.to(torch.float32)
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
