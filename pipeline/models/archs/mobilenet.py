"""MobileNetV2 (Sandler et al. 2018, sections 3 and 4, table 2) at half width, in the variant for CIFAR of Tian et al.
2020.

Differences from the paper: ReLU instead of ReLU6; the second group of blocks has stride 1; the first block also has
the 1 x 1 convolution, at expansion 1. As in the paper, the last convolution keeps its 1,280 channels at half width.
"""

import torch
from torch import nn

from .checks import check_no_argument


class Block(nn.Module):
    """Inverted residual: [B, in, H, W] -> [B, out, H/stride, W/stride], through expansion * in channels.

    There is a shortcut where the shapes are equal. The output has no activation (linear bottleneck).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        self.expand = _convolution(in_channels, hidden, 1)
        self.depthwise = _convolution(hidden, hidden, 3, stride, hidden)
        self.project = nn.Sequential(nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_shortcut else y


class MobileNetV2(nn.Module):
    """float32 [B, channels, S, S] -> logits [B, classes], for any S.

    Outputs of layer1 … layer4, where the benchmark takes features: 12, 16, 48 and 160 channels of S/2, S/4, S/8 and
    S/16 pixels, without a ReLU. That of `last`, [B, 1280, S/16, S/16] after its ReLU, is pooled.
    """

    def __init__(self, classes: int, channels: int = 3):
        super().__init__()
        self.stem = _convolution(channels, 16, 3, 2)
        self.layer1 = nn.Sequential(*_group(16, 8, 1, 1, expansion=1), *_group(8, 12, 2, 1))
        self.layer2 = nn.Sequential(*_group(12, 16, 3, 2))
        self.layer3 = nn.Sequential(*_group(16, 32, 4, 2), *_group(32, 48, 3, 1))
        self.layer4 = nn.Sequential(*_group(48, 80, 3, 2), *_group(80, 160, 1, 1))
        self.last = _convolution(160, 1280, 1)
        self.linear = nn.Linear(1280, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    @staticmethod
    def build(argument: str, classes: int, channels: int, size: int) -> "MobileNetV2":
        """Build for a row of the table MODELS."""
        check_no_argument("mobilenet_v2", argument)
        return MobileNetV2(classes, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        logits: torch.Tensor = self.linear(self.last(x).mean((2, 3)))
        return logits


def _convolution(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def _group(in_channels: int, out_channels: int, blocks: int, stride: int, expansion: int = 6) -> list[Block]:
    first = Block(in_channels, out_channels, stride, expansion)
    return [first, *(Block(out_channels, out_channels, 1, expansion) for _ in range(blocks - 1))]
