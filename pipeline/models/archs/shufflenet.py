"""ShuffleNet for CIFAR, in the variants of the benchmark of Tian et al. 2020.

`shufflenet_v1`: Zhang et al. 2018 (section 3, table 1), 3 groups. `shufflenet_v2`: Ma et al. 2018 (section 3.2,
table 5), 1 x. Different from both papers, the first layer is a 1 x 1 convolution of stride 1 that no
pooling follows.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .checks import check_no_argument


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Reorder the channels of [B, C, H, W]: the first of each group, then the second of each group, and so on."""
    B, C, H, W = x.shape
    return x.reshape(B, groups, C // groups, H, W).transpose(1, 2).reshape(B, C, H, W)


class UnitV1(nn.Module):
    """1 x 1 in groups, shuffle, 3 x 3 per channel, 1 x 1 in groups: [B, in, H, W] -> [B, out, …].

    A unit with more output than input channels halves H and W, and concatenates its result with the average-pooled
    input; any other adds its input. Different from the paper, there is a ReLU after the 3 x 3 convolution too.

    Args:
        in_channels, out_channels, groups: Of the unit.
        is_first: Whether it is the first of the network: its 24 input channels are too few for groups.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, is_first: bool = False):
        super().__init__()
        self.downsamples = out_channels != in_channels
        new = out_channels - in_channels if self.downsamples else out_channels
        self.groups = 1 if is_first else groups
        self.conv1 = nn.Conv2d(in_channels, new // 4, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(new // 4)
        self.conv2 = nn.Conv2d(new // 4, new // 4, 3, 2 if self.downsamples else 1, 1, groups=new // 4, bias=False)
        self.bn2 = nn.BatchNorm2d(new // 4)
        self.conv3 = nn.Conv2d(new // 4, new, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(new)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(torch.cat((y, F.avg_pool2d(x, 3, 2, 1)), 1) if self.downsamples else y + x)


class ShuffleNetV1(nn.Module):
    """float32 [B, channels, S, S] -> logits [B, classes], for any S.

    Outputs of layer1, layer2, layer3, after their last ReLU: [B, 240, S/2, S/2], [B, 480, S/4, S/4],
    [B, 960, S/8, S/8]. That of layer3 is pooled.
    """

    def __init__(self, classes: int, channels: int = 3):
        super().__init__()
        self.stem = _convolution(channels, 24)
        self.layer1 = nn.Sequential(UnitV1(24, 240, 3, is_first=True), *(UnitV1(240, 240, 3) for _ in range(3)))
        self.layer2 = nn.Sequential(UnitV1(240, 480, 3), *(UnitV1(480, 480, 3) for _ in range(7)))
        self.layer3 = nn.Sequential(UnitV1(480, 960, 3), *(UnitV1(960, 960, 3) for _ in range(3)))
        self.linear = nn.Linear(960, classes)

    @staticmethod
    def build(argument: str, classes: int, channels: int, size: int) -> "ShuffleNetV1":
        """Build for a row of the table MODELS."""
        check_no_argument("shufflenet_v1", argument)
        return ShuffleNetV1(classes, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        logits: torch.Tensor = self.linear(x.mean((2, 3)))
        return logits


class UnitV2(nn.Module):
    """Two branches, concatenated and shuffled: [B, in, H, W] -> [B, out, …].

    In a unit with more output than input channels, both branches take all channels and halve H and W. In any other,
    the left branch is the first half of the channels, unchanged.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        downsamples = out_channels != in_channels
        half, stride = out_channels // 2, 2 if downsamples else 1
        self.left: nn.Sequential | None = None
        if downsamples:
            self.left = nn.Sequential(*_depthwise(in_channels, stride), *_convolution(in_channels, half))
        start = _convolution(in_channels if downsamples else half, half)
        self.right = nn.Sequential(*start, *_depthwise(half, stride), *_convolution(half, half))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.left is not None:
            return shuffle(torch.cat((self.left(x), self.right(x)), 1), 2)
        first_half, second_half = x.chunk(2, 1)
        return shuffle(torch.cat((first_half, self.right(second_half)), 1), 2)


class ShuffleNetV2(nn.Module):
    """float32 [B, channels, S, S] -> logits [B, classes], for any S.

    Outputs of layer1, layer2, layer3, every channel after a ReLU: [B, 116, S/2, S/2], [B, 232, S/4, S/4],
    [B, 464, S/8, S/8]. That of `last`, [B, 1024, S/8, S/8] after its ReLU, is pooled.
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
        """Build for a row of the table MODELS."""
        check_no_argument("shufflenet_v2", argument)
        return ShuffleNetV2(classes, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        logits: torch.Tensor = self.linear(self.last(x).mean((2, 3)))
        return logits


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def _depthwise(channels: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))
