"""Rows about kinds of data: the same images inside of parquet files and tar shards, against a folder of them."""

import io
import tarfile
from pathlib import Path

from . import fixtures
from .measurement import BenchOptions, Measurement
from .student import TrainingLoop, make_run
from .timing import divide, format_medians, time_in_turns

_SHARD_ROWS = 1000


def compare_with_folder(options: BenchOptions, kind: str) -> Measurement:
    """Epoch of `mlp:64` from a cache of JPEGs of 32 px in files of this kind / in a folder. One pass of all images.

    Args:
        options: of the benchmark.
        kind: "parquet" or "webdataset".
    """
    data = {"folder": fixtures.write_jpegs(options.folder / "jpegs-32", options.scale(10_000, 100), 32)}
    write = {"parquet": _write_parquet, "webdataset": _write_shards}[kind]
    data[kind] = write(Path(data["folder"].partition(":")[2]), options.folder / f"jpegs-32-{kind}")
    loops = {}
    for name, spec in data.items():
        cache = fixtures.write_random_cache(options.folder / f"jpegs-32-cache-{name}", spec, "crop-flip")
        config, setup = fixtures.open_setup(cache, spec, "mlp:64")
        run = make_run(options, config, setup, name)
        loops[name] = TrainingLoop(run, run.steps)
    seconds = time_in_turns(loops, options.scale(8, 1))
    return Measurement(divide(seconds[kind], seconds["folder"]), format_medians(seconds))


def _list_images(folder: Path, split: str) -> list[tuple[Path, int]]:
    """List the images of a split, class by class, each with the number of its class."""
    classes = sorted(path.name for path in (folder / split).iterdir())
    return [(path, label) for label, name in enumerate(classes) for path in sorted((folder / split / name).iterdir())]


def _write_parquet(folder: Path, out: Path) -> str:
    """Write the images of a folder as compressed parquet files of the hub's convention."""
    import pyarrow as pa
    from pyarrow import parquet

    if not out.exists():
        out.mkdir(parents=True)
        for split in ("train", "test"):
            images = _list_images(folder, split)
            encoded = [{"bytes": path.read_bytes(), "path": path.name} for path, _ in images]
            table = pa.table({"image": encoded, "label": [label for _, label in images]})
            parquet.write_table(table, out / f"{split}-00000-of-00001.parquet", row_group_size=_SHARD_ROWS)
    return f"parquet:{out}"


def _write_shards(folder: Path, out: Path) -> str:
    """Write the images of a folder as tar shards, as the `webdataset` library does."""
    if not out.exists():
        out.mkdir(parents=True)
        for split in ("train", "test"):
            images = _list_images(folder, split)
            for start in range(0, len(images), _SHARD_ROWS):
                with tarfile.open(out / f"{split}-{start // _SHARD_ROWS:06d}.tar", "w") as tar:
                    for number, (path, label) in enumerate(images[start : start + _SHARD_ROWS], start):
                        _add_file(tar, f"{number:06d}.jpg", path.read_bytes())
                        _add_file(tar, f"{number:06d}.cls", str(label).encode())
    return f"webdataset:{out}"


def _add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
