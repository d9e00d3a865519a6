"""A LightningModule that learns from a cache: Trainer.fit takes the loaders of softcache as they are.

    python examples/lightning_module.py

Lightning moves each batch to the device of the module. A checkpoint of the Trainer has the place of the loader in its
epoch: `trainer.fit(…, ckpt_path=…)` ends with the same weights. Needs `lightning`. Takes 20 seconds on one core.
"""

import argparse
from pathlib import Path

import lightning
import torch
from torch import nn

import softcache


class Distillation(lightning.LightningModule):
    """Trains a student by a loss between its outputs and the batches of a cache."""

    def __init__(self, student: nn.Module, criterion: softcache.DistillationLoss, learning_rate: float = 0.01):
        super().__init__()
        self.student, self.criterion, self.learning_rate = student, criterion, learning_rate

    def on_train_epoch_start(self) -> None:
        self.trainer.train_dataloader.set_epoch(self.current_epoch)  # for a training that resumes at an epoch's end

    def training_step(self, batch: softcache.Batch, batch_idx: int) -> torch.Tensor:
        loss = self.criterion(self.student(batch.images), batch)
        self.log_dict(self.criterion.terms, batch_size=len(batch))
        return loss

    def validation_step(self, batch: softcache.Batch, batch_idx: int) -> None:
        accuracy = (self.student(batch.images).argmax(1) == batch.labels).float().mean()
        self.log("accuracy", accuracy, batch_size=len(batch), prog_bar=True)

    def configure_optimizers(self) -> tuple[list[object], list[object]]:
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate)  # with those of the criterion, if any
        # Not trainer.estimated_stepping_batches: Lightning then leaves out the place of the loader when it resumes.
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def main() -> None:
    parser = argparse.ArgumentParser(description="A LightningModule that learns from a cache.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/examples/lightning_module"))
    arguments = parser.parse_args()
    torch.manual_seed(0)

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
    module = Distillation(student, criterion)
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs,
        accelerator="cpu",
        default_root_dir=arguments.out,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, cache.loader("train", batch_size=64), cache.loader("val"))
    figures = trainer.validate(module, cache.loader("test"), verbose=False)[0]
    print(f"test accuracy: {figures['accuracy']:.3f}")


if __name__ == "__main__":
    main()
