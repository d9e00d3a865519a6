"""Images of one colour a class, and networks that classify them without a training."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

SOURCE = '''
import os
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """Logits of the mean colour of an image, changed in the way that `form` names."""

    def __init__(self, classes, form):
        super().__init__()
        self.form = form
        self.linear = nn.Linear(3, classes)
        self.hidden = nn.Identity()
        self.norm = nn.BatchNorm1d(classes, affine=False, track_running_stats=form != "no statistics")

    def forward(self, x):
        colour = x.mean((2, 3))
        self.hidden(F.dropout(colour, 0.5) if self.form == "random tap" else colour)
        z = self.linear(colour)
        if self.form == "dropout":
            z = F.dropout(z, 0.5)
        if self.form == "noise":
            z = z + 0.01 * torch.randn_like(z)
        if self.form == "batch norm":
            z = F.batch_norm(z, None, None, training=True)
        if self.form == "no statistics":
            z = self.norm(z)
        if self.form == "train mode":
            z = self.norm.train()(z)
        if self.form == "softmax":
            z = z.softmax(1)
        if self.form == "certain":
            z = (1000 * z).softmax(1)
        if self.form == "log_softmax":
            z = z.log_softmax(1)
        if self.form == "sigmoid":
            z = z.sigmoid()
        if os.environ.get("RANK") == "1" and self.form == "by rank":
            z = -z
        return z


def plain(classes, channels, size): return Net(classes, "plain")
def dropout(classes, channels, size): return Net(classes, "dropout")
def noise(classes, channels, size): return Net(classes, "noise")
def random_tap(classes, channels, size): return Net(classes, "random tap")
def batch_norm(classes, channels, size): return Net(classes, "batch norm")
def train_mode(classes, channels, size): return Net(classes, "train mode")
def no_statistics(classes, channels, size): return Net(classes, "no statistics")
def softmax(classes, channels, size): return Net(classes, "softmax")
def certain(classes, channels, size): return Net(classes, "certain")
def log_softmax(classes, channels, size): return Net(classes, "log_softmax")
def sigmoid(classes, channels, size): return Net(classes, "sigmoid")
def by_rank(classes, channels, size): return Net(classes, "by rank")
'''


def make_palette(classes: int) -> np.ndarray:
    """Return a colour for each class, float [classes, 3] in 0 … 1, the corners and edges of a cube."""
    grid = np.stack(np.meshgrid(*[[0.1, 0.5, 0.9]] * 3, indexing="ij"), -1).reshape(-1, 3)
    return grid[np.arange(classes) * len(grid) // classes]


def save_colours(root: Path, names: list[str], train: int = 12, test: int = 4) -> None:
    """Save images of 4 x 4 pixels: class number k, in the order of `names`, has the colour k of the palette."""
    rng = np.random.default_rng(0)
    for name, colour in zip(names, make_palette(len(names)), strict=True):
        for split, count in (("train", train), ("test", test)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = 255 * colour + rng.normal(0, 8, (4, 4, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{i:03d}.png")


def save_colour_teacher(folder: Path, module: str, order: list[int]) -> None:
    """Save folder/MODULE.py, and folder/w.pt: weights of the nearest colour.

    Args:
        folder: where the files are saved.
        module: name of the module; its attribute `plain` and so on make the network in that form.
        order: the colour of each output.
    """
    (folder / f"{module}.py").write_text(SOURCE)
    palette = torch.from_numpy(make_palette(len(order))[order]).float()
    norm = {"running_mean": torch.zeros(len(order)), "running_var": torch.ones(len(order))}
    state = {"linear.weight": 40 * palette, "linear.bias": -20 * palette.square().sum(1)}
    state |= {f"norm.{name}": value for name, value in norm.items()}
    torch.save(state | {"norm.num_batches_tracked": torch.tensor(0)}, folder / "w.pt")
    del state["norm.running_mean"], state["norm.running_var"]
    torch.save(state, folder / "no-statistics.pt")
