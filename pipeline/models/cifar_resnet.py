"""The residual networks for CIFAR of He et al. 2016 (section 4.2): 6n + 2 layers, 16, 32 and 64 channels.

Shortcuts are option A (every second pixel, missing channels zero, no parameters). Layers are called
conv1, bn1, layer1 … layer3, linear, as in the public checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import nn

from data.errors import WrongCommand


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: [B, inside, H, W] -> [B, outside, H/stride, W/stride]."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride = stride
        self.missing = outside - inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.missing:
            half = self.missing // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.missing - half))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """float32 [B, channels, S, S] -> logits [B, classes], any S; depth = 6n + 2."""

    def __init__(self, depth: int, classes: int, channels: int = 3):
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, n)
        self.layer2 = _stage(16, 32, 2, n)
        self.layer3 = _stage(32, 64, 2, n)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def build(depth: int, argument: str, classes: int, channels: int, size: int) -> "CifarResNet":
        """The row of the table of archs."""
        if argument:
            raise WrongCommand(f"arch 'resnet{depth}:{argument}': resnet{depth} takes no argument")
        return CifarResNet(depth, classes, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.linear(x.mean((2, 3)))
        return logits


def _stage(inside: int, outside: int, stride: int, blocks: int) -> nn.Sequential:
    first = Block(inside, outside, stride)
    return nn.Sequential(first, *(Block(outside, outside, 1) for _ in range(blocks - 1)))
