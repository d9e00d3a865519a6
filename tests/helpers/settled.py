"""Networks whose logits differ from image to image, after a short training."""

import torch
import torch.nn.functional as F
from torch import nn

from softcache.pipeline.models import build
from softcache.pipeline.models.prepared_model import InputSpec


def input_spec(channels: int, size: int) -> InputSpec:
    return InputSpec(channels, size, (0.5,) * channels, (0.25,) * channels)


def settled(arch: str, views: torch.Tensor, labels: torch.Tensor, channels: int, steps: int) -> nn.Module:
    """A network of 10 classes, in eval mode: so many steps of 64 views uint8 [N, C, S, S], then the statistics of its
    batch norms from all of them, with the weights that it has in the end."""
    torch.manual_seed(0)
    network = build(arch, 10, channels, views.shape[-1]).train()
    x = ((views.float() / 255 - 0.5) / 0.25).expand(-1, channels, -1, -1)
    batches = torch.randperm(len(x)).split(64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for step in range(steps):
        some = batches[step % len(batches)]
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min(1, (step + 1) / 10)
        optimizer.zero_grad()
        F.cross_entropy(network(x[some]), labels[some]).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
    with torch.no_grad():
        for some in batches:
            network(x[some])
    return network.eval()
