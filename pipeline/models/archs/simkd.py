"""The student of SimKD: it answers through a projector and the teacher's own last layer."""

import torch
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.batch import LinearHead
from softcache.pipeline.taps.hooks import capture_features
from softcache.pipeline.taps.statistics import to_feature_map


class SimKDStudent(nn.Module):
    """backbone up to `layer` -> projector -> mean over space -> linear, the teacher's (Chen et al. 2022, 2203.14001).

    The projector is 1 x 1, 3 x 3 and 1 x 1 convolutions with half the teacher's channels between, each with batch
    norm and ReLU. linear is not trained. The backbone's own last layer is taken out: it is not used, nor counted.
    """

    def __init__(self, backbone: nn.Module, layer: str, inside: int, width: int, classes: int):
        super().__init__()
        self.backbone, self.layer = backbone, layer
        middle = max(1, width // 2)
        self.projector = nn.Sequential(
            nn.Conv2d(inside, middle, 1, bias=False),
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
        with capture_features(self.backbone, (self.layer,)) as kept:
            self.backbone(x)
        found = to_feature_map(kept[self.layer])
        if self.training and found[:, 0].numel() == 1:
            raise UsageError("loss 'simkd' normalises over the batch: a --batch-size of 1 leaves nothing")
        logits: torch.Tensor = self.linear(self.projector(found).mean((2, 3)))
        return logits

    def use_head(self, head: LinearHead) -> None:
        """Take over the teacher's last layer."""
        with torch.no_grad():
            self.linear.weight.copy_(head.weight)
            self.linear.bias.copy_(head.bias)


def format_simkd_arch(backbone: str, layer: str, width: int) -> str:
    """The arch of a SimKD student, as build understands it: `simkd(resnet8;layer3;256)`."""
    return f"simkd({backbone};{layer};{width})"


def parse_simkd_arch(arch: str) -> tuple[str, str, int] | None:
    """The inverse of arch_of; None for every other arch."""
    if not (arch.startswith("simkd(") and arch.endswith(")")):
        return None
    parts = arch[len("simkd(") : -1].rsplit(";", 2)
    if len(parts) != 3 or not parts[2].isdecimal() or not 1 <= int(parts[2]) <= 1 << 16 or "simkd(" in parts[0]:
        raise UsageError(f"arch '{arch}' is not such as simkd(resnet8;layer3;256)")
    return parts[0], parts[1], int(parts[2])


def build_simkd(
    backbone: nn.Module, head_name: str, layer: str, width: int, classes: int, example: torch.Tensor
) -> SimKDStudent:
    """The student around a backbone. head_name: the backbone's own last layer; example: one input for it."""
    was_training = backbone.training
    with torch.no_grad(), capture_features(backbone.eval(), (layer,)) as kept:
        backbone(example)
    backbone.train(was_training)
    path, _, name = head_name.rpartition(".")
    setattr(backbone.get_submodule(path), name, nn.Identity())
    return SimKDStudent(backbone, layer, to_feature_map(kept[layer]).shape[1], width, classes)
