"""A network of timm with timm's optimizer, scheduler and moving average, around a loader of softcache.

    python examples/timm_student.py

The student is an EfficientNet of 100,000 parameters, timm's smallest. Needs `timm`. Takes 20 seconds on one core.
"""

import argparse
from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

import softcache


def main() -> None:
    parser = argparse.ArgumentParser(description="A network of timm as the student.")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("runs/examples/timm_student"))
    arguments = parser.parse_args()
    torch.manual_seed(0)

    cache = softcache.build_cache(arguments.out / "cache", "mlp:256", "digits", views="crop:pad=1", draws=8)
    student = timm.create_model("test_efficientnet", in_chans=1, num_classes=cache.num_classes)
    loader = cache.loader("train", batch_size=64)
    criterion = softcache.DistillationLoss("kd:temperature=4,weight=0.9", "hard:weight=0.1")
    optimizer = create_optimizer_v2(student, opt="adamw", lr=0.01, weight_decay=0.05)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=arguments.epochs,
        warmup_epochs=1,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    average = ModelEmaV3(student, decay=0.98, use_warmup=True)

    step = 0
    for epoch in range(epochs):
        for batch in loader:
            loss = criterion(student(batch.images), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            scheduler.step_update(step)
            average.update(student, step=step)
        print(f"epoch {epoch + 1}/{epochs}: loss {loss.item():.3f}")

    average.eval()
    with torch.no_grad():
        logits = torch.cat([average(batch.images) for batch in cache.loader("test")])
    figures = softcache.evaluate(logits, cache.labels("test"))
    print(f"test accuracy: {figures['accuracy']:.3f}")


if __name__ == "__main__":
    main()
