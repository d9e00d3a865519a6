"""What is published of the input and the output of a network of torchvision, timm or transformers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NetworkConfiguration:
    """The input that a network's published weights were trained with, and the classes that they output.

    Attributes:
        size: Side of the input in pixels.
        mean, std: Of each channel of the input, for values of 0 … 1; both empty where they are not published.
        interpolation: How images are resized to the input: "bilinear" or "bicubic".
        resize: Length in pixels to which the shorter side of an image is scaled before its centre of `size` is cut
            out, for evaluation.
        classes: K, the number of outputs of the published weights; 0 where they have no classifier.
        class_names: Of the K outputs in their order; empty where they are not published. Names of timm are the
            descriptions of WordNet, with synonyms after commas: "tench, Tinca tinca".
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize: int
    classes: int
    class_names: tuple[str, ...]
