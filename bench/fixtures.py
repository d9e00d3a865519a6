"""What is measured on: smooth random images in memory or as JPEGs, a teacher of random weights, and caches of what
no teacher said, made by the project's own writer."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from softcache.base.lock import hold_lock
from softcache.data.image_arrays import ImageArrays
from softcache.data.transfer_set import (
    TRANSFER_SETS,
    DataSource,
    Recipe,
    SplitsAndClasses,
    TransferSet,
    load_transfer_set,
)
from softcache.data.views import ViewPolicy, parse_views, render
from softcache.pipeline.cache.codecs import CODECS, measure_fidelity
from softcache.pipeline.cache.identity import Identity, make_identity
from softcache.pipeline.cache.manifest import ShardSpec
from softcache.pipeline.cache.rows import make_row_order
from softcache.pipeline.cache.shards import Arrays
from softcache.pipeline.cache.verification import compute_crc32
from softcache.pipeline.cache.writer import CachePlan, CacheWriter
from softcache.pipeline.models import build
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.student.defaults import fill_defaults
from softcache.stages.student.setup import DistillationSetup

VAL_FRACTION = 0.02
_BLOCK = 2048  # rows of features that are made, and repeated


def smooth(n: int, channels: int, size: int, seed: int = 0) -> torch.Tensor:
    """uint8 [n, channels, size, size]: colours that change slowly, and a little noise, as photographs have."""
    chance = torch.Generator().manual_seed(seed)
    found = torch.empty(n, channels, size, size, dtype=torch.uint8)
    for a in range(0, n, 4096):
        coarse = torch.rand(min(4096, n - a), channels, 5, 5, generator=chance) * 255
        fine = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
        found[a : a + 4096] = (fine + 6 * torch.randn(fine.shape, generator=chance)).clamp(0, 255).byte()
    return found


def in_memory(n: int, channels: int = 3, size: int = 32, classes: int = 10) -> str:
    """The name of a data set of n training rows (2 % of them validation) and 128 to test, as --data would have it."""
    name = f"smooth-{n}x{channels}x{size}x{size}-{classes}"

    def read(root: Path) -> SplitsAndClasses:
        splits = {}
        for seed, (split, rows) in enumerate((("train", n), ("test", max(128, classes)))):
            labels = np.arange(rows, dtype=np.int64) % classes
            splits[split] = (ImageArrays(smooth(rows, channels, size, seed)), labels)
        return splits, tuple(f"c{i}" for i in range(classes))  # type: ignore[return-value]

    recipe = Recipe() if channels == 3 else Recipe(views="none", draws=1, learning_rate=0.05)
    TRANSFER_SETS.setdefault(name, DataSource(read, recipe))
    return name


def jpegs(folder: Path, n: int, size: int, classes: int = 10) -> str:
    """`folder:PATH` with n training images of size x size as JPEGs of quality 90, and 64 to test."""
    if not folder.exists():
        for split, rows in (("train", n), ("test", 64)):
            for i, pixels in enumerate(smooth(rows, 3, size, seed=len(split))):
                path = folder / split / f"c{i % classes}" / f"{i:06d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, quality=90)
    return f"folder:{folder}"


@lru_cache(maxsize=2)
def transfer_set(data: str) -> TransferSet:
    return load_transfer_set(data, Path("."), val_fraction=VAL_FRACTION)


def teacher(arch: str, size: int = 32) -> PreparedModel:
    """A teacher of random weights in eval mode, whose batch norms have seen images: its logits are not huge."""
    torch.manual_seed(0)
    input_spec = InputSpec(3, size, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    made = PreparedModel(build(arch, 10, 3, size), input_spec)
    views = smooth(256, 3, size)
    with torch.no_grad():
        for _ in range(8):
            made(views)
    return made.eval()


def usual_teacher(device: torch.device) -> nn.Module:
    """The network of a ResNet-56 alone, in the layout that PyTorch gives it: float32 [B, 3, 32, 32] -> [B, 10]."""
    return teacher("resnet56").network.to(memory_format=torch.contiguous_format).to(device)


def fake_cache(
    folder: Path,
    data: str,
    views: str = "",
    draws: int = 1,
    taps: dict[str, list[int]] | None = None,
    codec: str = "float16",
) -> Path:
    """A cache whose views are those of the data and whose logits are random, written as stage one writes. taps:
    {name: row shape}, of random float16. A cache that is there already is taken as it is."""
    if (folder / "manifest.json").exists():
        return folder
    rows, views = transfer_set(data), views or TRANSFER_SETS[data.partition(":")[0]].recipe.views
    policy = parse_views(views)
    policy = replace(policy, size=policy.size or rows.size)
    classes, seed = len(rows.classes), 0
    input_spec = InputSpec(rows.channels, policy.size, (0.5,) * rows.channels, (0.25,) * rows.channels)
    known = {"arch": "resnet56", "weights": "0" * 64, **input_spec.to_json()}
    identity: Identity = make_identity(rows, policy, seed, known, codec, "float32")
    splits = {split: len(part) for split, part in rows.splits.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder):
        writer = CacheWriter.examine(folder, CachePlan(identity, classes, draws, splits, taps or {}))
        writer.start()
        for piece in writer.missing:
            arrays, facts = _made_up(piece, rows, policy, seed, codec)
            writer.write_shard(piece, arrays, {**facts, "seconds": 0.0})
        writer.publish_manifest(writer.build_manifest(None, {s: len(part) for s, part in rows.splits.items()}, {}))
    return folder


def _made_up(
    piece: ShardSpec, rows: TransferSet, policy: ViewPolicy, seed: int, codec: str
) -> tuple[Arrays, dict[str, float]]:
    """The rows of a shard, its logits and features out of the air."""
    part = rows.splits[piece.split]
    index = make_row_order(seed, piece.split, len(part))[piece.start : piece.start + piece.rows]
    own = policy if piece.split == "train" else policy.without_augmentation()
    seen = [
        compute_crc32(render(part.images, own, seed, index[a : a + 1024], piece.draw))
        for a in range(0, len(index), 1024)
    ]
    chance = np.random.default_rng(piece.draw + 1000 * piece.start)
    logits = chance.standard_normal((piece.rows, len(rows.classes)), np.float32) * 3
    stored = CODECS[codec].encode(logits)
    decoded = CODECS[codec].decode(stored)
    features = {name: _feature(piece.rows, shape) for name, (shape, _) in piece.datasets.items() if "/" in name}
    keys = {
        "index": index.astype("<u4"),
        "label": part.labels[index].astype("<i4"),
        "view_crc32": np.concatenate(seen),
    }
    hits = int((decoded.argmax(1) == part.labels[index]).sum())
    return {**stored, **features, **keys}, {"correct": hits, **measure_fidelity(logits[:_BLOCK], decoded[:_BLOCK])}


def _feature(rows: int, shape: tuple[int, ...]) -> NDArray[np.float16]:
    """Random numbers of the size of a layer's, a block of rows again and again: real bytes, made quickly."""
    block = np.random.default_rng(0).standard_normal((min(rows, _BLOCK), *shape), np.float32).astype(np.float16)
    return np.resize(block, (rows, *shape))


def opened(cache: Path, data: str, arch: str, **more: object) -> tuple[StudentConfig, DistillationSetup]:
    """A student's settings with the recipe in, and what it is trained from, as `softcache student` opens it."""
    config = fill_defaults(StudentConfig(data=data, cache=(str(cache),), arch=arch, **more))  # type: ignore[arg-type]
    return config, DistillationSetup.open(config)
