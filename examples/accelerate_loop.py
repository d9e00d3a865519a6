"""A loop with Accelerate, in one process or in several that share each batch.

    python examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py    # on GPUs also: accelerate launch --num_processes 2 …

The loader divides every batch among the processes by itself, so it is not given to `accelerator.prepare`. (Without
GPUs `accelerate launch --cpu` starts one process.) Needs `accelerate`. Takes 15 seconds on one core.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

import softcache


def main() -> None:
    parser = argparse.ArgumentParser(description="A loop with Accelerate.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/examples/accelerate_loop"))
    arguments = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())  # without it, processes on CPUs are not joined
    torch.manual_seed(0)

    with accelerator.main_process_first():  # one process makes the cache, the others open it
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
    criterion = softcache.DistillationLoss("kd:temperature=4,weight=0.9", "hard:weight=0.1")
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    student, optimizer = accelerator.prepare(student, optimizer)  # and the criterion, where it has parameters

    loader = cache.loader("train", batch_size=64, device=accelerator.device)  # 64 rows of all processes together
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs * len(loader))
    for epoch in range(arguments.epochs):
        for batch in loader:
            loss = criterion(student(batch.images), batch)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
        accelerator.print(f"epoch {epoch + 1}/{arguments.epochs}: loss {loss.item():.3f}")

    student.eval()
    correct = torch.zeros((), device=accelerator.device)
    with torch.no_grad():
        for batch in cache.loader("test", device=accelerator.device):  # divided among the processes as well
            correct += (student(batch.images).argmax(1) == batch.labels).sum()
    correct = accelerator.reduce(correct, "sum")
    accelerator.print(f"test accuracy: {correct.item() / cache.splits['test']:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
