"""A dataset and a teacher of your own: their cache, and a student that also learns a layer of the teacher.

    python examples/own_dataset_and_teacher.py

Any map-style dataset of (image, label) and any network will do. Images come without augmentation: softcache makes the
views that the teacher sees, and shows the student the same ones. Takes 15 seconds on one core.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, random_split

import softcache


class Digits(Dataset[tuple[torch.Tensor, int]]):
    """The digits of scikit-learn: images uint8 [1, 8, 8] (also possible: PIL images, arrays) and labels."""

    def __init__(self) -> None:
        pixels, labels = load_digits(return_X_y=True)
        self.images = torch.from_numpy(pixels * (255 / 16)).round().to(torch.uint8).view(-1, 1, 8, 8)
        self.labels = torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.images[i], int(self.labels[i])


def make_network(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def train_teacher(train: Dataset[tuple[torch.Tensor, int]], path: Path) -> nn.Module:
    teacher = make_network(width=512)
    if path.exists():
        teacher.load_state_dict(torch.load(path, weights_only=True))
        return teacher

    optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.003)
    for _ in range(20):
        for images, labels in DataLoader(train, batch_size=64, shuffle=True):
            loss = nn.functional.cross_entropy(teacher((images / 255 - 0.5) / 0.5), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(teacher.state_dict(), path)
    return teacher


def main() -> None:
    parser = argparse.ArgumentParser(description="A dataset and a teacher of your own.")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/examples/own_dataset_and_teacher"))
    arguments = parser.parse_args()
    torch.manual_seed(0)

    train, test = random_split(Digits(), [1437, 360])
    teacher = train_teacher(train, arguments.out / "teacher.pt")
    cache = softcache.build_cache(
        arguments.out / "cache",
        teacher,
        {"train": train, "test": test},  # a tenth of the training images becomes the split "val"
        views="crop:pad=1",
        draws=8,
        taps=["2"],  # the ReLU: names are those of teacher.named_modules()
        normalize=((0.5,), (0.5,)),  # as in the teacher's training
    )
    student = make_network(width=64)
    losses = ["kd:temperature=4,weight=0.9", "hard:weight=0.1", "hint:teacher=2,student=2"]
    result = softcache.train_student(
        cache, student, losses, epochs=arguments.epochs, learning_rate=0.01, out=arguments.out / "student"
    )
    print(f"test accuracy: {result['student']['test']['accuracy']:.3f}")


if __name__ == "__main__":
    main()
