"""Networks whose logits differ between images, after a short training."""

import torch
import torch.nn.functional as F
from torch import nn

from softcache.pipeline.models import build
from softcache.pipeline.models.prepared_model import InputSpec


def make_input_spec(channels: int, size: int) -> InputSpec:
    """Return an input specification with mean 0.5 and standard deviation 0.25."""
    return InputSpec(channels, size, (0.5,) * channels, (0.25,) * channels)


def train_briefly(arch: str, views: torch.Tensor, labels: torch.Tensor, channels: int, steps: int) -> nn.Module:
    """Train a network of 10 classes, then compute its batch norm statistics from all views with the final weights.

    Args:
        arch: of the network.
        views: uint8 [N, C, S, S].
        labels: int64 [N].
        channels: of the network's input; views of one channel are repeated.
        steps: of 64 views.

    Returns:
        The network in eval mode.
    """
    torch.manual_seed(0)
    network = build(arch, 10, channels, views.shape[-1]).train()
    x = ((views.float() / 255 - 0.5) / 0.25).expand(-1, channels, -1, -1)
    batches = torch.randperm(len(x)).split(64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for step in range(steps):
        batch = batches[step % len(batches)]
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min(1, (step + 1) / 10)
        optimizer.zero_grad()
        F.cross_entropy(network(x[batch]), labels[batch]).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
    with torch.no_grad():
        for batch in batches:
            network(x[batch])
    return network.eval()
