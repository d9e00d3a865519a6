"""A network with what happens to a image before it: the same for teacher and student, part of the identity."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class InputSpec:
    """How a uint8 view becomes an input. channels: of the input, 3 repeats a grey image; size: of the input in
    pixels, bilinear with antialiasing where the view has another; mean, std: per channel, of values 0 … 1."""

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @staticmethod
    def from_json(record: dict[str, Any]) -> "InputSpec":
        """The inverse of identity. Raises ValueError, TypeError or KeyError for what no image can be prepared by."""
        mean, std = tuple(map(float, record["mean"])), tuple(map(float, record["std"]))
        channels, size = int(record["channels"]), int(record["size"])
        if not (1 <= channels <= 4 and 1 <= size <= 4096 and len(mean) == len(std) == channels):
            raise ValueError(
                f"an input of {channels} channels, {size} pixels, {len(mean)} means and {len(std)} deviations"
            )
        if not all(abs(m) <= 1e6 for m in mean) or not all(1e-6 <= s <= 1e6 for s in std):
            raise ValueError(f"an input of mean {list(mean)} and standard deviation {list(std)}")
        return InputSpec(channels, size, mean, std)


class PreparedModel(nn.Module):
    """uint8 views [B, C, S, S] -> float32 logits [B, K]. `network` is the arch itself: its names are the taps."""

    def __init__(self, network: nn.Module, input_spec: InputSpec):
        super().__init__()
        self.network = network
        self.input_spec = input_spec
        # Rank 4 only: a network without convolutions keeps its own layout.
        self._convolves = any(isinstance(m, nn.Conv2d) for m in network.modules())
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        mean = torch.tensor(input_spec.mean).view(1, -1, 1, 1)
        std = torch.tensor(input_spec.std).view(1, -1, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self._by_channel = list(zip(self.shift.flatten().unbind(), self.scale.flatten().tolist(), strict=True))
        if self._convolves:  # 1.2 to 3 times as fast on CPUs and GPUs with matrix units
            self.to(memory_format=torch.channels_last)

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(self.prepare_input(views))
        return logits.float()

    def prepare_input(self, views: torch.Tensor) -> torch.Tensor:
        """The network's input float32 [B, channels, size, size] of uint8 views."""
        x = views.to(torch.float32)
        if self.input_spec.channels != x.shape[1]:
            x = x.expand(-1, self.input_spec.channels, -1, -1)
        if self.input_spec.size != x.shape[-1]:
            size = [self.input_spec.size] * 2
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
        return self._normalize(x)

    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        """shift + x scale by channel, in the network's layout. On a CPU each channel by itself, straight into its
        place: equal to the bit, and 18 us instead of 54 for 128 images of 28 x 28, of the 640 us of a step of
        `mlp:64`; 125 us instead of 205 for 3 x 32 x 32 on two threads."""
        layout = torch.channels_last if self._convolves else torch.contiguous_format
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return torch.addcmul(self.shift, x, self.scale).contiguous(memory_format=layout)
        found = torch.empty_like(x, memory_format=layout)
        for channel, (shift, scale) in enumerate(self._by_channel):
            torch.add(shift, x[:, channel], alpha=scale, out=found[:, channel])
        return found
