"""VGG with batch norm for CIFAR, in the variant of the benchmark of Tian et al. 2020.

`vgg13` is network B of Simonyan and Zisserman 2015 (section 2.1, table 1); `vgg8` has one convolution per stage
instead of two. Different from the paper, there is one linear layer instead of three, and no pooling between the last
two stages.
"""

import torch
from torch import nn

from .checks import check_image_size, check_no_argument


class VGG(nn.Module):
    """float32 [B, channels, S, S] -> logits [B, classes], for S >= 8.

    Outputs of layer1 … layer5, after their last ReLU and before the pooling that follows: 64, 128, 256, 512 and 512
    channels of S, S/2, S/4, S/8 and S/8 pixels. That of layer5 is pooled. From S = 64 on, where the benchmark pools
    once more, layer5 has S/16 pixels.

    Args:
        depth: 5n + 3 layers, n convolutions per stage.
        classes, channels: Of the output and of the input.
        size: S.
    """

    def __init__(self, depth: int, classes: int, channels: int = 3, size: int = 32):
        super().__init__()
        n = (depth - 3) // 5
        self.layer1, self.pool1 = _stage(channels, 64, n), nn.MaxPool2d(2)
        self.layer2, self.pool2 = _stage(64, 128, n), nn.MaxPool2d(2)
        self.layer3, self.pool3 = _stage(128, 256, n), nn.MaxPool2d(2)
        self.layer4, self.pool4 = _stage(256, 512, n), nn.MaxPool2d(2) if size >= 64 else nn.Identity()
        self.layer5 = _stage(512, 512, n)
        self.linear = nn.Linear(512, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                nn.init.zeros_(module.get_parameter("bias"))
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    @staticmethod
    def build(depth: int, argument: str, classes: int, channels: int, size: int) -> "VGG":
        """Build for a row of the table MODELS."""
        check_no_argument(f"vgg{depth}", argument)
        check_image_size(8, f"vgg{depth}", size)
        return VGG(depth, classes, channels, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool2(self.layer2(self.pool1(self.layer1(x))))
        x = self.pool4(self.layer4(self.pool3(self.layer3(x))))
        x = self.layer5(x)
        logits: torch.Tensor = self.linear(x.mean((2, 3)))
        return logits


def _stage(in_channels: int, out_channels: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(convolutions):
        conv = nn.Conv2d(out_channels if i else in_channels, out_channels, 3, padding=1)
        layers += [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)
