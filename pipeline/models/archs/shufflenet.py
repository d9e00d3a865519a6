"""ShuffleNet for CIFAR, as the benchmark of Tian et al. 2020 has it.

`shufflenet_v1`: Zhang et al. 2018 (section 3, table 1), 3 groups. `shufflenet_v2`: Ma et al. 2018 (section 3.2,
table 5), 1 x. Against both papers, the first layer is a 1 x 1 convolution of stride 1 and no pooling follows it.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .checks import check_no_argument


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Channels [B, C, H, W] dealt out: the first of each group, then the second of each group, and so on."""
    B, C, H, W = x.shape
    return x.reshape(B, groups, C // groups, H, W).transpose(1, 2).reshape(B, C, H, W)


class UnitV1(nn.Module):
    """1 x 1 in groups, shuffle, 3 x 3 per channel, 1 x 1 in groups: [B, inside, H, W] -> [B, outside, …].

    Where the width grows, H and W are halved and the input, averaged, is put behind the new channels; else it is
    added. Against the paper, ReLU follows the 3 x 3 convolution too.
    """

    def __init__(self, inside: int, outside: int, groups: int, first: bool = False):
        super().__init__()
        self.halves = outside != inside
        new = outside - inside if self.halves else outside
        self.groups = 1 if first else groups  # 24 channels are too few to part
        self.conv1 = nn.Conv2d(inside, new // 4, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(new // 4)
        self.conv2 = nn.Conv2d(new // 4, new // 4, 3, 2 if self.halves else 1, 1, groups=new // 4, bias=False)
        self.bn2 = nn.BatchNorm2d(new // 4)
        self.conv3 = nn.Conv2d(new // 4, new, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(new)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(torch.cat((y, F.avg_pool2d(x, 3, 2, 1)), 1) if self.halves else y + x)


class ShuffleNetV1(nn.Module):
    """float32 [B, channels, S, S] -> logits [B, classes], any S.

    layer1, layer2, layer3: [B, 240, S/2, S/2], [B, 480, S/4, S/4], [B, 960, S/8, S/8] after their last ReLU.
    layer3 is the map just before pooling.
    """

    def __init__(self, classes: int, channels: int = 3):
        super().__init__()
        self.stem = _convolution(channels, 24)
        self.layer1 = nn.Sequential(UnitV1(24, 240, 3, first=True), *(UnitV1(240, 240, 3) for _ in range(3)))
        self.layer2 = nn.Sequential(UnitV1(240, 480, 3), *(UnitV1(480, 480, 3) for _ in range(7)))
        self.layer3 = nn.Sequential(UnitV1(480, 960, 3), *(UnitV1(960, 960, 3) for _ in range(3)))
        self.linear = nn.Linear(960, classes)

    @staticmethod
    def build(argument: str, classes: int, channels: int, size: int) -> "ShuffleNetV1":
        """The row of the table of archs."""
        check_no_argument("shufflenet_v1", argument)
        return ShuffleNetV1(classes, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        logits: torch.Tensor = self.linear(x.mean((2, 3)))
        return logits


class UnitV2(nn.Module):
    """Two branches, joined and shuffled: [B, inside, H, W] -> [B, outside, …].

    Where the width grows, both branches see all channels and halve H and W. Else the first half of the channels
    goes through as it is.
    """

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.halves = outside != inside
        half, stride = outside // 2, 2 if self.halves else 1
        self.left = nn.Sequential(*_per_channel(inside, stride), *_convolution(inside, half)) if self.halves else None
        start = _convolution(inside if self.halves else half, half)
        self.right = nn.Sequential(*start, *_per_channel(half, stride), *_convolution(half, half))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.left is not None:
            return shuffle(torch.cat((self.left(x), self.right(x)), 1), 2)
        kept, seen = x.chunk(2, 1)
        return shuffle(torch.cat((kept, self.right(seen)), 1), 2)


class ShuffleNetV2(nn.Module):
    """float32 [B, channels, S, S] -> logits [B, classes], any S.

    layer1, layer2, layer3: [B, 116, S/2, S/2], [B, 232, S/4, S/4], [B, 464, S/8, S/8], every channel after a ReLU.
    `last`, [B, 1024, S/8, S/8] after ReLU, is the map just before pooling.
    """

    def __init__(self, classes: int, channels: int = 3):
        super().__init__()
        self.stem = _convolution(channels, 24)
        self.layer1 = nn.Sequential(UnitV2(24, 116), *(UnitV2(116, 116) for _ in range(3)))
        self.layer2 = nn.Sequential(UnitV2(116, 232), *(UnitV2(232, 232) for _ in range(7)))
        self.layer3 = nn.Sequential(UnitV2(232, 464), *(UnitV2(464, 464) for _ in range(3)))
        self.last = _convolution(464, 1024)
        self.linear = nn.Linear(1024, classes)

    @staticmethod
    def build(argument: str, classes: int, channels: int, size: int) -> "ShuffleNetV2":
        """The row of the table of archs."""
        check_no_argument("shufflenet_v2", argument)
        return ShuffleNetV2(classes, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        logits: torch.Tensor = self.linear(self.last(x).mean((2, 3)))
        return logits


def _convolution(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU())


def _per_channel(width: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width))
