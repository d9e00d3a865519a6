"""A small convolutional network: two convolutions, one linear layer."""

from collections import OrderedDict

from torch import nn

from .checks import check_image_size, check_no_argument


def cnn(argument: str, classes: int, channels: int, size: int) -> nn.Sequential:
    """Build `cnn`: 3 x 3 convolutions of 64 and 128 channels, each with batch norm, ReLU and 2 x 2 pooling; `linear`.

    The last map is averaged down to 4 x 4 where it is larger, so that the linear layer does not outgrow the rest.

    Raises:
        UsageError: There is an argument, or images are smaller than 4 px.
    """
    check_no_argument("cnn", argument)
    check_image_size(4, "cnn", size)
    side = min(4, size // 4)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 64, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(64),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(64, 128, 3, padding=1, bias=False),
            bn2=nn.BatchNorm2d(128),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            average=nn.AdaptiveAvgPool2d(side),
            flatten=nn.Flatten(),
            linear=nn.Linear(128 * side * side, classes),
        )
    )
