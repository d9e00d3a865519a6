"""A network whose batch norms are synchronised computes what it did before.

SyncBatchNorm runs on a CPU in eval mode.
"""

import copy

import pytest
import torch
from torch import nn

from softcache.pipeline.models import build
from softcache.pipeline.models.sync_batch_norm import find_other_batch_norm, synchronize_batch_norm


class NormAndReLU(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return super().forward(input).relu()


class Renamed(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize("arch", ["resnet8", "torchvision:resnet18", "timm:test_resnet", "timm:test_efficientnet"])
def test_a_network_keeps_its_outputs_weights_and_layers(arch: str) -> None:
    """The batch norms of timm's efficientnets apply an activation as well, which PyTorch's conversion leaves out."""
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    network = nn.Sequential(build(arch, 7, 3, 64).eval())
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.bias)
    before = copy.deepcopy(network)
    images = torch.randn(2, 3, 64, 64)
    assert find_other_batch_norm(network) == ""
    synchronize_batch_norm(network)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert list(network.state_dict()) == list(before.state_dict())
    assert not network[0].training
    torch.testing.assert_close(network(images), before(images))


def test_a_batch_norm_that_would_lose_what_it_computes_is_named() -> None:
    assert find_other_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), NormAndReLU(4))) == "NormAndReLU"
    assert find_other_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), Renamed(4), nn.SyncBatchNorm(4))) == ""
