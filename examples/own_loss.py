"""Losses of your own as terms of a DistillationLoss: a function, and a module with parameters that are trained.

    python examples/own_loss.py

A loss is a callable (outputs, batch) -> scalar: `outputs` are the student's logits and layers, `batch` has the
teacher's. Takes 10 seconds on one core.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import softcache
from softcache import losses


def cosine(outputs: softcache.ModelOutputs, batch: softcache.Batch) -> torch.Tensor:
    """One minus the cosine similarity of the logits, both centred."""
    student, teacher = (z - z.mean(1, keepdim=True) for z in (outputs.logits, batch.logits))
    return 1 - F.cosine_similarity(student, teacher).mean()


class LayerRegression(nn.Module):
    """Mean squared error between a layer of the teacher and a linear map of a layer of the student."""

    teacher_taps = ("hidden1",)  # cached: `taps` of build_cache
    student_taps = ("2",)  # names are those of student.named_modules()

    def __init__(self, student_width: int, teacher_width: int):
        super().__init__()
        self.linear = nn.Linear(student_width, teacher_width)

    def forward(self, outputs: softcache.ModelOutputs, batch: softcache.Batch) -> torch.Tensor:
        return F.mse_loss(self.linear(outputs.features["2"]), batch.features["hidden1"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses of your own.")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/examples/own_loss"))
    arguments = parser.parse_args()
    torch.manual_seed(0)

    cache = softcache.build_cache(
        arguments.out / "cache", "mlp:256", "digits", views="crop:pad=1", draws=8, taps=["hidden1"]
    )
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, cache.num_classes))
    regression = LayerRegression(128, *cache.taps["hidden1"])
    criterion = softcache.DistillationLoss(
        cosine, losses.Custom(regression, weight=0.1), "kd:temperature=4,weight=0.1"
    )
    loader = cache.loader("train", batch_size=64, taps=criterion.teacher_taps)
    criterion.attach(student, example=next(iter(loader)))

    optimizer = torch.optim.AdamW([*student.parameters(), *criterion.parameters()], lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs * len(loader))
    for epoch in range(arguments.epochs):
        for batch in loader:
            loss = criterion(student(batch.images), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        terms = ", ".join(f"{name} {term:.3f}" for name, term in criterion.terms.items())
        print(f"epoch {epoch + 1}/{arguments.epochs}: {terms}")

    with torch.no_grad():
        logits = torch.cat([student(batch.images) for batch in cache.loader("test")])
    figures = softcache.evaluate(logits, cache.labels("test"))
    print(f"test accuracy: {figures['accuracy']:.3f}")


if __name__ == "__main__":
    main()
