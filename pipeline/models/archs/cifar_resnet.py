"""The residual networks for CIFAR of He et al. 2016 (section 4.2): 6n + 2 layers, 16, 32 and 64 channels.

Shortcuts are option A: every second pixel, zeros for the missing channels, no parameters. Layers are called conv1,
bn1, layer1 … layer3, linear, as in the public checkpoints.

The wide networks `resnet8x4` and `resnet32x4` of Tian et al. 2020 have 32 channels in conv1, then 64, 128 and 256, and
shortcuts of option B (1 x 1 convolution and batch norm) at the start of each stage. The narrow networks of that
benchmark also have option B, and so a few more parameters than these.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .checks import check_no_argument


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: [B, in, H, W] -> [B, out, H/stride, W/stride].

    Args:
        in_channels, out_channels, stride: Of the block; the first convolution has the stride.
        has_projection: Whether the shortcut is option B, else option A.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, has_projection: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.missing_channels = out_channels - in_channels
        self.shortcut: nn.Sequential | None = None
        if has_projection:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.missing_channels:
            half = self.missing_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.missing_channels - half))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """float32 [B, channels, S, S] -> logits [B, classes], for any S.

    Outputs of layer1, layer2, layer3, after their last ReLU: [B, C, S, S], [B, 2C, S/2, S/2], [B, 4C, S/4, S/4], with
    C = 16, or 64 for a wide network. That of layer3 is pooled.

    Args:
        depth: 6n + 2 layers, n blocks per stage.
        classes, channels: Of the output and of the input.
        wide: Whether it is a network of Tian et al., four times as wide.
    """

    def __init__(self, depth: int, classes: int, channels: int = 3, wide: bool = False):
        super().__init__()
        n = (depth - 2) // 6
        stem, *widths = (32, 64, 128, 256) if wide else (16, 16, 32, 64)
        self.conv1 = nn.Conv2d(channels, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _stage(stem, widths[0], 1, n, wide)
        self.layer2 = _stage(widths[0], widths[1], 2, n, wide)
        self.layer3 = _stage(widths[1], widths[2], 2, n, wide)
        self.linear = nn.Linear(widths[2], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out" if wide else "fan_in")
            elif isinstance(module, nn.Linear) and not wide:  # the benchmark keeps the initialisation of PyTorch
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def build(depth: int, wide: bool, argument: str, classes: int, channels: int, size: int) -> "CifarResNet":
        """Build for a row of the table MODELS."""
        check_no_argument(f"resnet{depth}x4" if wide else f"resnet{depth}", argument)
        return CifarResNet(depth, classes, channels, wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.linear(x.mean((2, 3)))
        return logits


def _stage(in_channels: int, out_channels: int, stride: int, blocks: int, has_projection: bool) -> nn.Sequential:
    first = Block(in_channels, out_channels, stride, has_projection)
    return nn.Sequential(first, *(Block(out_channels, out_channels, 1) for _ in range(blocks - 1)))
