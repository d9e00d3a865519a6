"""Made-up data for the rows: smooth random images in memory or as JPEGs, teachers with random weights, and caches of
random logits, written by the project's own writer."""

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
from softcache.base.progress import Progress
from softcache.data.images.image_arrays import ImageArrays
from softcache.data.sources import SOURCES, Source
from softcache.data.sources.source_data import LabelledImages, ReadingOptions, SourceData
from softcache.data.transfer_set import TransferSet, load_transfer_set
from softcache.data.views.policy import ViewPolicy, parse_views
from softcache.data.views.render import render
from softcache.pipeline.cache.checksums import compute_crc32
from softcache.pipeline.cache.codec_choice import find_codec
from softcache.pipeline.cache.codecs import measure_fidelity
from softcache.pipeline.cache.identity import Identity, make_identity
from softcache.pipeline.cache.manifest import ShardSpec
from softcache.pipeline.cache.plan import CachePlan
from softcache.pipeline.cache.rows import make_row_order
from softcache.pipeline.cache.shards import Arrays
from softcache.pipeline.cache.writer import CacheWriter
from softcache.pipeline.models import build
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.defaults import DEFAULTS, Defaults, find_defaults
from softcache.stages.student.defaults import fill_defaults
from softcache.stages.student.setup import DistillationSetup

VAL_FRACTION = 0.02
_BLOCK = 2048  # rows of random features that are drawn; a shard repeats them


def make_images(n: int, channels: int, size: int, seed: int = 0) -> torch.Tensor:
    """Return uint8 [n, channels, size, size]: colours that change slowly with a little noise, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.empty(n, channels, size, size, dtype=torch.uint8)
    for start in range(0, n, 4096):
        coarse = torch.rand(min(4096, n - start), channels, 5, 5, generator=generator) * 255
        fine = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
        noisy = fine + 6 * torch.randn(fine.shape, generator=generator)
        images[start : start + 4096] = noisy.clamp(0, 255).byte()
    return images


def add_data_set(n: int, channels: int = 3, size: int = 32, classes: int = 10) -> str:
    """Add a data set of made-up images to the table of transfer sets.

    Args:
        n: training rows, 2 % of which become validation rows. There are max(128, classes) test rows.
        channels: 3, or 1 for images as MNIST's.
        size: height and width in pixels.
        classes: number of classes; labels go round in order.

    Returns:
        Its name, as --data takes it.
    """
    name = f"smooth-{n}x{channels}x{size}x{size}-{classes}"

    def load_smooth_images(_argument: str, _options: ReadingOptions, _progress: Progress) -> SourceData:
        splits = {}
        for seed, (split, rows) in enumerate((("train", n), ("test", max(128, classes)))):
            labels = np.arange(rows, dtype=np.int64) % classes
            splits[split] = LabelledImages(ImageArrays(keep_images(rows, channels, size, seed)), labels)
        return SourceData(splits, tuple(f"c{i}" for i in range(classes)))

    SOURCES.setdefault(name, Source(load_smooth_images))
    DEFAULTS.setdefault(name, Defaults() if channels == 3 else Defaults(views="none", draws=1, learning_rate=0.05))
    return name


@lru_cache(maxsize=4)
def keep_images(n: int, channels: int, size: int, seed: int) -> torch.Tensor:
    """Make images once for all who load them: 4,096 of 224 px take seconds, and stage one loads them in each turn."""
    return make_images(n, channels, size, seed)


def write_jpegs(folder: Path, n: int, size: int, classes: int = 10) -> str:
    """Write n training and 64 test images of size x size as JPEGs of quality 90, unless the folder is there.

    Returns:
        `folder:PATH`, as --data takes it.
    """
    if not folder.exists():
        for split, rows in (("train", n), ("test", 64)):
            for i, pixels in enumerate(make_images(rows, 3, size, seed=len(split))):
                path = folder / split / f"c{i % classes}" / f"{i:06d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, quality=90)
    return f"folder:{folder}"


@lru_cache(maxsize=2)
def load_data(data: str) -> TransferSet:
    """Load a transfer set, 2 % of its training rows as validation rows."""
    return load_transfer_set(data, Path("."), val_fraction=VAL_FRACTION)


def make_teacher(arch: str, size: int = 32, rows: int = 256, device: torch.device | str = "cpu") -> PreparedModel:
    """Return a teacher with random weights, in eval mode, on a device.

    Its batch norms have running statistics of 8 batches, without which its logits would be huge.

    Args:
        arch: of the teacher.
        size: of its input in pixels.
        rows: of a batch.
        device: where it is.
    """
    torch.manual_seed(0)
    input_spec = InputSpec(3, size, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    teacher = PreparedModel(build(arch, 10, 3, size), input_spec).to(device)
    views = make_images(rows, 3, size).to(device)
    with torch.no_grad():
        for _ in range(8):
            teacher(views)
    return teacher.eval()


def make_plain_teacher(device: torch.device) -> nn.Module:
    """Return the bare network of a ResNet-56 in PyTorch's default layout: float32 [B, 3, 32, 32] -> [B, 10]."""
    return make_teacher("resnet56").network.to(memory_format=torch.contiguous_format).to(device)


def write_random_cache(
    folder: Path,
    data: str,
    views: str = "",
    draws: int = 1,
    taps: dict[str, list[int]] | None = None,
    codec: str = "float16",
) -> Path:
    """Write a cache with the views of a data set and random logits, as stage one writes it.

    Args:
        folder: of the cache. A finished cache in it is left as it is.
        data: name of the transfer set.
        views: view policy; by default the data set's own.
        draws: number of draws.
        taps: {name: shape of a row} of random float16 features.
        codec: how logits are stored.

    Returns:
        The folder.
    """
    if (folder / "manifest.json").exists():
        return folder
    rows, views = load_data(data), views or find_defaults(data).views
    policy = parse_views(views)
    policy = replace(policy, size=policy.size or rows.size)
    classes, seed = len(rows.classes), 0
    input_spec = InputSpec(rows.channels, policy.size, (0.5,) * rows.channels, (0.25,) * rows.channels)
    teacher = {"arch": "resnet56", "weights": "0" * 64, **input_spec.to_json()}
    identity: Identity = make_identity(rows, policy, seed, teacher, codec, "float32")
    splits = {split: len(part) for split, part in rows.splits.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder):
        writer = CacheWriter.examine(folder, CachePlan(identity, classes, draws, splits, taps or {}))
        writer.start()
        for spec in writer.missing:
            arrays, facts = _make_shard(spec, rows, policy, seed, codec)
            writer.write_shard(spec, arrays, {**facts, "seconds": 0.0})
        writer.publish_manifest(writer.build_manifest(None, splits, {}))
    return folder


def _make_shard(
    spec: ShardSpec, rows: TransferSet, policy: ViewPolicy, seed: int, codec: str
) -> tuple[Arrays, dict[str, float]]:
    """Return the arrays of a shard, with random logits and features, and its facts."""
    part = rows.splits[spec.split]
    order = make_row_order(seed, spec.split, len(part))
    index = order[spec.start : spec.start + spec.rows].astype(np.int64)
    split_policy = policy if spec.split == "train" else policy.without_augmentation()
    checksums = [
        compute_crc32(render(part.images, split_policy, seed, index[start : start + 1024], spec.draw))
        for start in range(0, len(index), 1024)
    ]
    generator = np.random.default_rng(spec.draw + 1000 * spec.start)
    logits = generator.standard_normal((spec.rows, len(rows.classes)), np.float32) * 3
    stored = find_codec(codec).encode(logits, index.astype(np.uint64))
    decoded = find_codec(codec).decode(stored, logits.shape[1])
    features = {name: _make_features(spec.rows, shape) for name, (shape, _) in spec.datasets.items() if "/" in name}
    keys = {
        "index": index.astype("<u4"),
        "label": part.labels[index].astype("<i4"),
        "view_crc32": np.concatenate(checksums),
    }
    correct = int((decoded.argmax(1) == part.labels[index]).sum())
    facts = {"correct": correct, **measure_fidelity(logits[:_BLOCK], decoded[:_BLOCK])}
    return {**stored, **features, **keys}, facts


def _make_features(rows: int, shape: tuple[int, ...]) -> NDArray[np.float16]:
    """Return random rows of a tap. One block is repeated, which is quick and still costs the same to read."""
    block = np.random.default_rng(0).standard_normal((min(rows, _BLOCK), *shape), np.float32).astype(np.float16)
    return np.resize(block, (rows, *shape))


def open_setup(cache: Path, data: str, arch: str, **options: object) -> tuple[StudentConfig, DistillationSetup]:
    """Open what a student is trained from, as `softcache student` does.

    Args:
        cache: folder of the cache.
        data: its transfer set.
        arch: of the student.
        options: further options of `softcache student`.

    Returns:
        The config, with the data set's defaults filled in, and the setup.
    """
    config = fill_defaults(StudentConfig(data=data, cache=(str(cache),), arch=arch, **options))  # type: ignore[arg-type]
    return config, DistillationSetup.open(config)
