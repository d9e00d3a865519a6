"""MobileNetV2 (Sandler et al. 2018, sections 3 and 4, table 2) at half width, as the benchmark of Tian et al. 2020
has it for CIFAR.

Against the paper: ReLU, not ReLU6; the second group of blocks has stride 1; the very first block has its 1 x 1
convolution too, at expansion 1. The last convolution keeps 1,280 channels at half width, as in the paper.
"""

import torch
from torch import nn

from .checks import check_no_argument


class Block(nn.Module):
    """Inverted residual: [B, inside, H, W] -> [B, outside, H/stride, W/stride], by expansion * inside channels.

    There is a shortcut where shapes agree. The output has no activation (linear bottleneck).
    """

    def __init__(self, inside: int, outside: int, stride: int, expansion: int):
        super().__init__()
        hidden = inside * expansion
        self.expand = _convolution(inside, hidden, 1)
        self.depthwise = _convolution(hidden, hidden, 3, stride, hidden)
        self.project = nn.Sequential(nn.Conv2d(hidden, outside, 1, bias=False), nn.BatchNorm2d(outside))
        self.residual = stride == 1 and inside == outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """float32 [B, channels, S, S] -> logits [B, classes], any S.

    layer1 … layer4: 12, 16, 48 and 160 channels of S/2, S/4, S/8 and S/16 pixels, where the benchmark takes
    features; no ReLU ends them. `last`, [B, 1280, S/16, S/16] after ReLU, is the map just before pooling.
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
        """The row of the table of archs."""
        check_no_argument("mobilenet_v2", argument)
        return MobileNetV2(classes, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        logits: torch.Tensor = self.linear(self.last(x).mean((2, 3)))
        return logits


def _convolution(inside: int, outside: int, side: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inside, outside, side, stride, side // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU())


def _group(inside: int, outside: int, blocks: int, stride: int, expansion: int = 6) -> list[Block]:
    first = Block(inside, outside, stride, expansion)
    return [first, *(Block(outside, outside, 1, expansion) for _ in range(blocks - 1))]
