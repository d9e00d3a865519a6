"""`--data hf:NAME`: data sets that the `datasets` library has on this machine, or that save_to_disk wrote."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from softcache.base.errors import CacheError, UsageError
from softcache.data.sources import short_name
from tests.helpers.commands import Stages
from tests.helpers.data_files import CLASSES, Encoded, load, make_splits, write_parquet, write_shards

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and no cache of the user."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()


def make_dataset(images: list[Encoded], **columns: Any) -> Any:
    """Make a dataset with the columns image and label, and others."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    rows = {
        "image": [{"bytes": image.content, "path": None} for image in images],
        "label": [image.label for image in images],
        **{name: [value] * len(images) for name, (value, _) in columns.items()},
    }
    features |= {name: feature for name, (_, feature) in columns.items()}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder that save_to_disk wrote, and tar shards of the same images."""
    splits = make_splits()
    made = datasets.DatasetDict({split: make_dataset(images) for split, images in splits.items()})
    made.save_to_disk(tmp_path / "saved")
    write_shards(tmp_path / "tars", splits)
    return tmp_path


def test_a_saved_data_set_is_read_by_offset_and_equals_the_same_images_elsewhere(saved: Path) -> None:
    loaded, shards = load(f"hf:{saved}/saved"), load(f"webdataset:{saved}/tars")
    assert loaded.name == "hf"
    assert loaded.classes == CLASSES
    assert loaded.identity()["content"] == shards.identity()["content"]
    files = loaded.splits["train"].images.files.files  # type: ignore[union-attr]
    assert {file.path.suffix for file in files} == {".arrow"}
    index = np.arange(12)
    views = [rows.splits["test"].images.load_plain(index, 8, 8) for rows in (loaded, shards)]
    assert (views[0] == views[1]).all()


def test_a_data_set_in_the_cache_of_the_library_is_found_without_a_network(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    write_parquet(saved / "repository", make_splits())
    monkeypatch.chdir(saved)
    monkeypatch.setattr(
        "softcache.data.sources.files.hub_dataset._SPEC",
        __import__("re").compile(r"(?P<name>parquet)(?P<config>x)?(?P<revision>x)?"),
    )
    original = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config, revision: original(name, data_dir=str(saved / "repository"))
    )
    loaded = load("hf:parquet")
    assert loaded.classes == CLASSES
    assert loaded.identity()["content"] == load(f"webdataset:{saved}/tars").identity()["content"]


def test_one_saved_split_is_cut(saved: Path) -> None:
    make_dataset(make_splits()["train"]).save_to_disk(saved / "one")
    loaded = load(f"hf:{saved}/one", test_fraction=0.2)
    assert {split: len(rows) for split, rows in loaded.splits.items()} == {"train": 19, "val": 5, "test": 6}


def test_images_that_are_paths_are_read_as_rows(saved: Path) -> None:
    paths = []
    for number, image in enumerate(make_splits()["train"]):
        paths.append(str(saved / f"{number}.jpg"))
        Path(paths[-1]).write_bytes(image.content)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = {"image": paths, "label": [image.label for image in make_splits()["train"]]}
    made = datasets.Dataset.from_dict(rows, features=features)
    made._data.table  # noqa: B018 (in memory: it has no files)
    from softcache.data.sources.files import hub_dataset

    splits = {"train": made}
    columns = {"train": hub_dataset._choose_columns(made, "made", "")}
    assert hub_dataset._list_arrow_files(made) is None
    from softcache.base.progress import no_progress
    from softcache.data.sources.source_data import ReadingOptions

    source = hub_dataset._load_rows(splits, columns, ReadingOptions(), no_progress)
    shards = load(f"webdataset:{saved}/tars")
    assert source.classes == CLASSES
    row = int(shards.splits["train"].source_rows[3])  # type: ignore[index]
    pixels = [
        x.load_plain(np.array([i]), 8, 8)
        for x, i in ((source.splits["train"].images, row), (shards.splits["train"].images, 3))
    ]
    assert (pixels[0] == pixels[1]).all()
    with pytest.raises(UsageError, match="--exif transpose: this data set has paths"):
        hub_dataset._load_rows(splits, columns, ReadingOptions(exif="transpose"), no_progress)


def test_numbers_that_a_missing_one_made_floats_are_labels_and_other_floats_are_refused(saved: Path) -> None:
    images = make_splits()["train"]
    for name, missing, part in (("floats", math.nan, 0.0), ("parts", 0.5, 0.5)):
        labels = [missing, *(image.label + part for image in images[1:])]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("float64")})
        rows = {"image": [{"bytes": image.content, "path": None} for image in images], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(saved / name)
    loaded = load(f"hf:{saved}/floats", test_fraction=0.2)
    assert loaded.classes == ("0", "1", "2")
    assert sum(loaded.count_labelled().values()) == len(images) - 1
    with pytest.raises(CacheError, match=r"row 0 has the label 0\.5: the number of a class or a text is expected"):
        load(f"hf:{saved}/parts")


def test_several_labels_are_named_and_one_is_chosen(saved: Path) -> None:
    fine, coarse = (datasets.ClassLabel(names=names) for names in (["a", "b"], ["x", "y", "z"]))
    made = make_dataset(make_splits()["train"], fine_label=(1, fine), coarse_label=(2, coarse)).remove_columns("label")
    made.save_to_disk(saved / "two")
    with pytest.raises(
        UsageError, match="has 2 columns of labels, fine_label, coarse_label: choose one with --columns"
    ):
        load(f"hf:{saved}/two")
    loaded = load(f"hf:{saved}/two", columns="label=coarse_label")
    assert loaded.classes == ("x", "y", "z")
    assert loaded.cut["columns"] == "label=coarse_label"


def test_rows_without_an_image_are_left_out_and_counted(saved: Path) -> None:
    rows = make_dataset(make_splits()["train"]).to_list()
    rows[3]["image"] = None
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(saved / "gap")
    loaded = load(f"hf:{saved}/gap")
    assert sum(map(len, loaded.splits.values())) == 29
    assert "1 rows without an image" in loaded.left_out


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("hf:", "--data hf needs what it reads after a colon: --data hf:NAME"),
        ("hf:no-such-data-set", "--data hf:no-such-data-set cannot be loaded: "),
        ("hf:nobody/nothing:config@main", "--data hf:nobody/nothing:config@main cannot be loaded: "),
        ("hf:a/b/c", "expected NAME, NAME:CONFIG or NAME:CONFIG@REVISION, or a folder that save_to_disk wrote"),
        ("hf:a b", "expected NAME"),
        ("hf:{saved}/tars", "that folder was not written by save_to_disk: --data folder:PATH reads a folder"),
        ("hf:{saved}/text", "has no column of encoded images (struct with bytes, or binary): its columns are text"),
        ("hf:{saved}/test-only", "has no split train: its splits are test, other"),
        ("hf:{saved}/twice", "has two splits that are val: train, validation, dev"),
        ("hf:{saved}/damaged", "--data hf:{saved}/damaged cannot be loaded: "),
        ("hf:{saved}/grey16", "has more than 8 bits a channel"),
        ("hf:{saved}/broken", "It is the only one of 10 that cannot be used"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(saved: Path, stages: Stages, data: str, message: str) -> None:
    small = make_splits()["train"][::3]
    name = data.rpartition("/")[2]
    if name == "text":
        datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(saved / name)
    if name in ("test-only", "twice"):
        names = ("test", "other") if name == "test-only" else ("train", "validation", "dev")
        datasets.DatasetDict({split: make_dataset(small) for split in names}).save_to_disk(saved / name)
    if name == "damaged":
        make_dataset(small).save_to_disk(saved / name)
        next((saved / name).glob("*.arrow")).write_bytes(b"ARROW1 no more")
    if name == "grey16":
        file = io.BytesIO()
        Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(file, "PNG")
        make_dataset([image._replace(content=file.getvalue()) for image in small]).save_to_disk(saved / name)
    if name == "broken":
        make_dataset([small[0]._replace(content=b"GIF8 no image"), *small[1:]]).save_to_disk(saved / name)
    code = 1 if name in ("grey16", "broken") else 2
    error = stages.fails(code, "teacher", "--data", data.format(saved=saved), "--arch", "mlp:8", "--out", "t")
    assert message.format(saved=saved) in error
    assert len(error.splitlines()) == 1


def test_names_of_folders() -> None:
    assert short_name("hf:beans") == "beans"
    assert short_name("hf:org/name:config@main") == "name-config"
    assert short_name("hf:data/saved/") == "saved"
    assert short_name("parquet:beans/data/train-*.parquet") == "data"
    assert short_name("parquet:beans/train.parquet") == "train"
    assert short_name("webdataset:shards/pets-{000..009}.tar") == "shards"
    assert short_name("webdataset:*.tar") == "webdataset"
