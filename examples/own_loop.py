"""A training loop of your own, in plain PyTorch: the loader gives the batches, the criterion the loss.

    python examples/own_loop.py

The first run trains a teacher on the digits of scikit-learn and writes its cache: 10 seconds on one core. The student
has 4,810 parameters, the teacher 85,002.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import softcache


def main() -> None:
    parser = argparse.ArgumentParser(description="A training loop of your own around the loader and the loss.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/examples/own_loop"))
    arguments = parser.parse_args()
    torch.manual_seed(0)

    # Where the cache is complete, this opens it. A named teacher without weights is trained first.
    cache = softcache.build_cache(arguments.out / "cache", "mlp:256", "digits", views="crop:pad=1", draws=8)
    student = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, cache.num_classes),
    )

    loader = cache.loader("train", batch_size=64)
    criterion = softcache.DistillationLoss("kd:temperature=4,weight=0.9", "hard:weight=0.1")
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs * len(loader))
    for epoch in range(arguments.epochs):
        for batch in loader:  # every row once, in another draw of its views in each epoch
            loss = criterion(student(batch.images), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        terms = ", ".join(f"{name} {term:.3f}" for name, term in criterion.terms.items())
        print(f"epoch {epoch + 1}/{arguments.epochs}: {terms}")

    figures = cache.evaluate(student, "test")
    print(f"test accuracy: {figures['accuracy']:.3f}")


if __name__ == "__main__":
    main()
