"""The wide residual networks of Zagoruyko and Komodakis 2016 (section 2, table 1), without dropout.

`wrn_D_K`: D = 6n + 4 layers, widening factor K. Batch norm and ReLU come before each convolution.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .checks import check_no_argument


class Block(nn.Module):
    """Twice batch norm, ReLU and 3 x 3 convolution: [B, in, H, W] -> [B, out, H/stride, W/stride].

    The shortcut is the input; where the number of channels changes, a 1 x 1 convolution of the first ReLU's output.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = F.relu(self.bn1(x))
        y: torch.Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """float32 [B, channels, S, S] -> logits [B, classes], for any S.

    Outputs of layer1, layer2, layer3: [B, 16K, S, S], [B, 32K, S/2, S/2], [B, 64K, S/4, S/4]. They are sums without a
    ReLU, which is part of the next stage. That of `last`, the output of layer3 after batch norm and ReLU, is pooled.

    Args:
        depth: 6n + 4 layers, n blocks per stage.
        widening: K.
        classes, channels: Of the output and of the input.
    """

    def __init__(self, depth: int, widening: int, classes: int, channels: int = 3):
        super().__init__()
        n = (depth - 4) // 6
        narrow, middle, wide = 16 * widening, 32 * widening, 64 * widening
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.layer1 = _stage(16, narrow, 1, n)
        self.layer2 = _stage(narrow, middle, 2, n)
        self.layer3 = _stage(middle, wide, 2, n)
        self.last = nn.Sequential(nn.BatchNorm2d(wide), nn.ReLU())
        self.linear = nn.Linear(wide, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.zeros_(self.linear.bias)

    @staticmethod
    def build(depth: int, widening: int, argument: str, classes: int, channels: int, size: int) -> "WideResNet":
        """Build for a row of the table MODELS."""
        check_no_argument(f"wrn_{depth}_{widening}", argument)
        return WideResNet(depth, widening, classes, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        logits: torch.Tensor = self.linear(self.last(x).mean((2, 3)))
        return logits


def _stage(in_channels: int, out_channels: int, stride: int, blocks: int) -> nn.Sequential:
    first = Block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(Block(out_channels, out_channels, 1) for _ in range(blocks - 1)))
