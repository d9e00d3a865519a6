"""softcache: offline knowledge distillation in PyTorch.

A teacher runs once over a transfer set, its outputs are stored in HDF5 shards, and any number of students are trained
from them. The packages, from the lowest: base, data, pipeline, stages.

    import softcache

    cache = softcache.Cache("caches/digits")
    loader = cache.loader("train", batch_size=128)
    criterion = softcache.DistillationLoss("kd:temperature=4,weight=0.9", "hard:weight=0.1")
    for batch in loader:
        loss = criterion(student(batch.images), batch)

The public names are those of `__all__`, and of the module `softcache.losses`. Each is imported when it is first used:
`import softcache` loads no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softcache import losses as losses
    from softcache.base.errors import CacheError as CacheError
    from softcache.base.errors import UsageError as UsageError
    from softcache.pipeline.batch import Batch as Batch
    from softcache.pipeline.batch import ModelOutputs as ModelOutputs
    from softcache.pipeline.loading.cache import Cache as Cache
    from softcache.pipeline.loading.loader import CacheLoader as CacheLoader
    from softcache.pipeline.losses.distillation_loss import DistillationLoss as DistillationLoss
    from softcache.pipeline.metrics.tasks import evaluate as evaluate
    from softcache.stages.api.build_cache import build_cache as build_cache
    from softcache.stages.api.distill import distill as distill
    from softcache.stages.api.train_student import train_student as train_student

__version__ = "0.1.0"

_MODULES = {
    "Batch": "softcache.pipeline.batch",
    "Cache": "softcache.pipeline.loading.cache",
    "CacheError": "softcache.base.errors",
    "CacheLoader": "softcache.pipeline.loading.loader",
    "DistillationLoss": "softcache.pipeline.losses.distillation_loss",
    "ModelOutputs": "softcache.pipeline.batch",
    "UsageError": "softcache.base.errors",
    "build_cache": "softcache.stages.api.build_cache",
    "distill": "softcache.stages.api.distill",
    "evaluate": "softcache.pipeline.metrics.tasks",
    "train_student": "softcache.stages.api.train_student",
}
__all__ = [*sorted(_MODULES), "losses"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "losses":
        return import_module("softcache.losses")
    if name not in _MODULES:
        raise AttributeError(f"module 'softcache' has no attribute '{name}'")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
