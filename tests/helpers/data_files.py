"""The same images as a folder, as tar shards and as parquet files, with the same splits and order."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from softcache.data.transfer_set import TransferSet, load_transfer_set
from tests.helpers.commands import Stages

CLASSES = ("ant", "bee", "cow")


class Encoded(NamedTuple):
    """An encoded image and its label."""

    name: str
    content: bytes
    label: int


def encode_image(k: int, size: int = 8, mode: str = "RGB", format: str = "JPEG") -> bytes:  # noqa: A002
    """Encode image number k of a formula."""
    y, x, c = np.indices((size, size, 3))
    pixels = ((41 * k + 89 * c + 13 * x + 5 * y * y + 7 * x * y) % 256).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def make_images(rows: int, first: int = 0, **options: Any) -> list[Encoded]:
    """Make images of three classes, class by class, as a folder lists them."""
    return [
        Encoded(f"{CLASSES[label]}/{k:04d}", encode_image(first + 3 * k + label, **options), label)
        for label in range(len(CLASSES))
        for k in range(rows // len(CLASSES))
    ]


def make_splits() -> dict[str, list[Encoded]]:
    """Make 30 training and 12 test images."""
    return {"train": make_images(30), "test": make_images(12, first=500)}


def write_folder(root: Path, splits: dict[str, list[Encoded]]) -> str:
    """Write images as a folder, and return the argument of --data."""
    for split, images in splits.items():
        for image in images:
            path = root / split / f"{image.name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image.content)
    return f"folder:{root}"


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar file of these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def list_sample(image: Encoded) -> list[tuple[str, bytes]]:
    """List the files of one sample, without folders in its key."""
    key = image.name.replace("/", "-")
    return [(f"{key}.jpg", image.content), (f"{key}.cls", str(image.label).encode())]


def write_shards(root: Path, splits: dict[str, list[Encoded]], per_shard: int = 20) -> str:
    """Write images as tar shards, and return the argument of --data."""
    for split, images in splits.items():
        for number in range(0, len(images), per_shard):
            samples = [file for image in images[number : number + per_shard] for file in list_sample(image)]
            write_tar(root / f"{split}-{number // per_shard:06d}.tar", samples)
    return f"webdataset:{root}"


def write_parquet(
    root: Path,
    splits: dict[str, list[Encoded]],
    *,
    per_file: int = 20,
    row_group_size: int = 7,
    features: bool = True,
    make_table: Callable[[list[Encoded]], Any] | None = None,
    **options: Any,
) -> str:
    """Write images as parquet files of the hub's convention, and return the argument of --data."""
    import pyarrow as pa
    from pyarrow import parquet

    root.mkdir(parents=True, exist_ok=True)
    info = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": info}}).encode()} if features else None
    for split, images in splits.items():
        files = [images[first : first + per_file] for first in range(0, len(images), per_file)]
        for number, part in enumerate(files):
            table = (make_table or make_hub_table)(part).replace_schema_metadata(metadata)
            assert isinstance(table, pa.Table)
            name = f"{split}-{number:05d}-of-{len(files):05d}.parquet"
            parquet.write_table(table, root / name, row_group_size=row_group_size, **options)
    return f"parquet:{root}"


def make_hub_table(images: list[Encoded]) -> Any:
    """Make a table with the columns image and label, as the hub has them."""
    import pyarrow as pa

    values = [{"bytes": image.content, "path": f"{image.name}.jpg"} for image in images]
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = pa.array([image.label for image in images], pa.int64())
    return pa.table({"image": pa.array(values, image_type), "label": labels})


def load(data: Any, **options: Any) -> TransferSet:
    """Load data with a fifth for validation."""
    return load_transfer_set(data, Path("unused"), **{"val_fraction": 0.2, **options})


def refuse(stages: Stages, code: int, data: str, message: str, *options: str) -> None:
    """Train a teacher on data that must be refused with one line."""
    error = stages.fails(code, "teacher", "--data", data, "--arch", "mlp:8", "--out", "run", *options)
    assert message in error
    assert len(error.splitlines()) == 1
