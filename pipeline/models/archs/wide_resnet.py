"""The wide residual networks of Zagoruyko and Komodakis 2016 (section 2, table 1), without dropout.

`wrn_D_K`: D = 6n + 4 layers, K times as wide as the narrowest. Batch norm and ReLU come before each convolution.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .checks import check_no_argument


class Block(nn.Module):
    """Twice batch norm, ReLU and 3 x 3 convolution: [B, inside, H, W] -> [B, outside, H/stride, W/stride].

    Where the width changes, the shortcut is a 1 x 1 convolution of what the first ReLU gave; else it is the input.
    """

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False) if inside != outside else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = F.relu(self.bn1(x))
        y: torch.Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """float32 [B, channels, S, S] -> logits [B, classes], any S.

    layer1, layer2, layer3: [B, 16K, S, S], [B, 32K, S/2, S/2], [B, 64K, S/4, S/4]. These are sums: the ReLU after
    a stage belongs to the next one. `last` is layer3 after batch norm and ReLU, the map just before pooling.
    """

    def __init__(self, depth: int, times: int, classes: int, channels: int = 3):
        super().__init__()
        n = (depth - 4) // 6
        narrow, middle, wide = 16 * times, 32 * times, 64 * times
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
    def build(depth: int, times: int, argument: str, classes: int, channels: int, size: int) -> "WideResNet":
        """The row of the table of archs."""
        check_no_argument(f"wrn_{depth}_{times}", argument)
        return WideResNet(depth, times, classes, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        logits: torch.Tensor = self.linear(self.last(x).mean((2, 3)))
        return logits


def _stage(inside: int, outside: int, stride: int, blocks: int) -> nn.Sequential:
    first = Block(inside, outside, stride)
    return nn.Sequential(first, *(Block(outside, outside, 1) for _ in range(blocks - 1)))
