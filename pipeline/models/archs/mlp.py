"""Multi-layer perceptrons: Hinton et al. 2015 (section 3) use two hidden layers of 800 and of 1,200."""

from collections import OrderedDict
from itertools import pairwise

from torch import nn

from softcache.base.errors import UsageError

_MAX_WEIGHTS = 10**9  # 4 GB in float32, and a training takes three times as much again


def mlp(widths: str, classes: int, channels: int, size: int) -> nn.Sequential:
    """Build `mlp:800,800`: hidden layers `hidden1`, `relu1`, … and `linear`, on the flattened image.

    Raises:
        UsageError: The argument is not a list of positive whole numbers, or there would be too many weights.
    """
    try:
        hidden = [int(w) for w in widths.split(",")]
    except ValueError:
        hidden = []
    if not hidden or min(hidden) < 1:
        raise UsageError(f"arch 'mlp:{widths}': expected widths, such as mlp:64 or mlp:800,800")
    all_widths = [channels * size * size, *hidden, classes]
    weights = sum(rows * columns for rows, columns in pairwise(all_widths))
    if weights > _MAX_WEIGHTS:
        raise UsageError(
            f"arch 'mlp:{widths}' would have {weights:,} weights, more than {_MAX_WEIGHTS:,}: choose smaller widths"
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    in_features = channels * size * size
    for i, width in enumerate(hidden, 1):
        layers[f"hidden{i}"] = nn.Linear(in_features, width)
        layers[f"relu{i}"] = nn.ReLU()
        in_features = width
    layers["linear"] = nn.Linear(in_features, classes)
    return nn.Sequential(layers)
