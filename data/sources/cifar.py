"""CIFAR-10 and CIFAR-100: 50,000 training and 10,000 test images, RGB, 32 x 32 pixels, 10 or 100 classes."""

from pathlib import Path

from .source_data import SourceData
from .torchvision_files import load_torchvision


def load_cifar10(root: Path) -> SourceData:
    """Load CIFAR-10 from `root`/cifar-10-batches-py. For arguments and errors see `load_torchvision`."""
    from torchvision.datasets import CIFAR10

    return load_torchvision(CIFAR10, root, "cifar-10-batches-py")


def load_cifar100(root: Path) -> SourceData:
    """Load CIFAR-100 from `root`/cifar-100-python. For arguments and errors see `load_torchvision`."""
    from torchvision.datasets import CIFAR100

    return load_torchvision(CIFAR100, root, "cifar-100-python")
