"""The losses of one class an image; those of other tasks are tested by task, in modules of their own."""

from softcache.data.tasks import CLASSES
from softcache.pipeline.losses import LOSSES, Loss

CLASS_LOSSES: dict[str, Loss] = {name: loss for name, loss in LOSSES.items() if CLASSES in loss.tasks}
