"""The student of SimKD: a backbone, a projector, and the teacher's last linear layer."""

import torch
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.batch import LinearHead
from softcache.pipeline.taps.hooks import capture_features
from softcache.pipeline.taps.statistics import to_feature_map


class SimKDStudent(nn.Module):
    """backbone up to `layer` -> projector -> mean over space -> the teacher's linear layer, which is not trained.

    The projector is 1 x 1, 3 x 3 and 1 x 1 convolutions, with half the teacher's channels in between, each with batch
    norm and ReLU.

    Args:
        backbone: The student's network, without its last layer: that is neither used nor counted.
        layer: The tap of the backbone whose output is projected.
        in_channels: Channels of that output.
        width: Inputs of the teacher's last linear layer.
        classes: Its outputs.

    Source:
        Chen et al. 2022, "Knowledge distillation with the reused teacher classifier", arXiv 2203.14001.
    """

    def __init__(self, backbone: nn.Module, layer: str, in_channels: int, width: int, classes: int):
        super().__init__()
        self.backbone, self.layer = backbone, layer
        middle = max(1, width // 2)
        self.projector = nn.Sequential(
            nn.Conv2d(in_channels, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, middle, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.linear = nn.Linear(width, classes).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with capture_features(self.backbone, (self.layer,)) as features:
            self.backbone(x)
        feature_map = to_feature_map(features[self.layer])
        if self.training and feature_map[:, 0].numel() == 1:
            raise UsageError("loss 'simkd' normalises over the batch: a --batch-size of 1 leaves nothing")
        logits: torch.Tensor = self.linear(self.projector(feature_map).mean((2, 3)))
        return logits

    def use_head(self, head: LinearHead) -> None:
        """Copy the teacher's last linear layer."""
        with torch.no_grad():
            self.linear.weight.copy_(head.weight)
            self.linear.bias.copy_(head.bias)


def format_simkd_arch(backbone: str, layer: str, width: int) -> str:
    """The name of a SimKD student's arch, as build takes it: `simkd(resnet8;layer3;256)`."""
    return f"simkd({backbone};{layer};{width})"


def parse_simkd_arch(arch: str) -> tuple[str, str, int] | None:
    """The inverse of format_simkd_arch.

    Returns:
        Backbone, layer and width; None for every other arch.

    Raises:
        UsageError: The name begins as that of a SimKD student and is none.
    """
    if not (arch.startswith("simkd(") and arch.endswith(")")):
        return None
    parts = arch[len("simkd(") : -1].rsplit(";", 2)
    if len(parts) != 3 or not parts[2].isdecimal() or not 1 <= int(parts[2]) <= 1 << 16 or "simkd(" in parts[0]:
        raise UsageError(f"arch '{arch}' is not of the form simkd(resnet8;layer3;256)")
    return parts[0], parts[1], int(parts[2])


def build_simkd(
    backbone: nn.Module, head_name: str, layer: str, width: int, classes: int, example: torch.Tensor
) -> SimKDStudent:
    """Build a SimKD student around a backbone.

    Args:
        backbone: A complete network. Its last layer is replaced by an identity, in place.
        head_name: Module path of that layer.
        layer: The tap of the backbone whose output is projected.
        width: Inputs of the teacher's last linear layer.
        classes: Its outputs.
        example: float32 [1, channels, size, size], an input of the backbone, to find the channels of the tap.

    Raises:
        UsageError: The backbone has no such tap, or its output is neither a feature map nor a vector.
    """
    was_training = backbone.training
    with torch.no_grad(), capture_features(backbone.eval(), (layer,)) as features:
        backbone(example)
    backbone.train(was_training)
    backbone.set_submodule(head_name, nn.Identity())
    return SimKDStudent(backbone, layer, to_feature_map(features[layer]).shape[1], width, classes)
