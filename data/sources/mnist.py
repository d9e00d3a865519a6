"""MNIST and Fashion-MNIST: 60,000 training and 10,000 test images, grey, 28 x 28 pixels, 10 classes."""

from pathlib import Path

from .source_data import SourceData
from .torchvision_files import load_torchvision


def load_mnist(root: Path) -> SourceData:
    """Load MNIST from `root`/MNIST/raw. For arguments and errors see `load_torchvision`."""
    from torchvision.datasets import MNIST

    return load_torchvision(MNIST, root, "MNIST/raw")


def load_fashion_mnist(root: Path) -> SourceData:
    """Load Fashion-MNIST from `root`/FashionMNIST/raw. For arguments and errors see `load_torchvision`."""
    from torchvision.datasets import FashionMNIST

    return load_torchvision(FashionMNIST, root, "FashionMNIST/raw")
