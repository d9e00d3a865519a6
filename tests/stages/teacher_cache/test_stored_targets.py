"""Targets that were made elsewhere: `--teacher logits:FILE`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from softcache.base.progress import no_progress
from softcache.data.sources import load_source
from softcache.pipeline.models import build
from tests.helpers.caches import read_payloads
from tests.helpers.commands import Stages

NORMALIZE = ("--normalize", "mean=0.3,std=0.35")
MEAN, STD = torch.tensor(0.3), torch.tensor(0.35)
PLAIN = ("--views", "none", "--draws", "1")
Arrays = dict[str, NDArray[Any]]


def compute_targets() -> Arrays:
    """Return the logits of `cnn` for digits as a script of plain PyTorch computes them, by row of each split."""
    network = build("cnn", 10, 1, 8).to(memory_format=torch.channels_last).eval()
    network.load_state_dict(torch.load("teacher.pt", weights_only=True))
    targets = {}
    for split, (images, _) in load_source("digits").splits.items():
        x = torch.add(-MEAN / STD, images.pixels.float(), alpha=float(1 / (255 * STD)))  # type: ignore[union-attr]
        with torch.no_grad():
            targets[split] = torch.cat([network(batch) for batch in x.split(256)]).numpy()
    return targets


@pytest.fixture
def targets(stages: Stages) -> Arrays:
    """The targets of a network of random weights, in the current folder, which has its weights, teacher.pt."""
    torch.manual_seed(0)
    torch.save(build("cnn", 10, 1, 8).state_dict(), "teacher.pt")
    return compute_targets()


def save_parquet(path: str, columns: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)


def read_identity(cache: str) -> Any:
    return json.loads(Path(cache, "manifest.json").read_text())["identity"]


def test_targets_of_a_plain_script_give_the_cache_and_the_student_of_stage_one_byte_for_byte(
    stages: Stages, targets: Arrays
) -> None:
    stages("teacher-cache", "--teacher", "cnn", "--weights", "teacher.pt", *NORMALIZE, *PLAIN, "--out", "live")
    np.savez("targets.npz", **targets)
    stages("teacher-cache", "--teacher", "logits:targets.npz", *NORMALIZE, "--out", "stored")
    assert read_payloads(Path("live")) == read_payloads(Path("stored"))
    for cache in ("live", "stored"):
        stages("student", "--cache", cache, "--arch", "mlp:16", "--epochs", "2", "--out", f"student-{cache}")
    assert Path("student-live/student.pt").read_bytes() == Path("student-stored/student.pt").read_bytes()
    live, stored = read_identity("live"), read_identity("stored")
    assert stored["teacher"].pop("arch") == "logits"
    assert stored["teacher"].pop("weights") != live["teacher"].pop("weights")
    assert live["teacher"].pop("arch") == "cnn"
    assert live == stored


def test_the_same_targets_have_one_identity_in_every_form(stages: Stages, rows: Arrays) -> None:
    pytest.importorskip("pyarrow")
    np.savez("a.npz", **rows)
    both = np.concatenate([rows["test"], rows["train"]])
    splits = ["test"] * 360 + ["train"] * 1437
    index = np.concatenate([np.arange(360), np.arange(1437)])
    order = np.random.default_rng(1).permutation(len(both))
    shuffled = {"logits": both[order], "index": index[order], "split": np.array(splits)[order]}
    np.savez_compressed("b.npz", **shuffled)
    np.savez("c.npz", **{split: values.astype("f8") for split, values in rows.items()})
    save_parquet(
        "d.parquet", {name: values.tolist() for name, values in shuffled.items()} | {"logits": list(both[order])}
    )
    for name in ("a.npz", "b.npz", "c.npz", "d.parquet"):
        stages("teacher-cache", "--teacher", f"logits:{name}", "--out", name[0])
    assert {json.dumps(read_identity(name)) for name in "abcd"} == {json.dumps(read_identity("a"))}
    assert read_payloads(Path("a")) == read_payloads(Path("d"))


def test_a_target_is_stored_for_the_row_of_the_data_it_was_made_for(stages: Stages, rows: Arrays) -> None:
    """Validation and left out rows are drawn from the training rows, by whose number the file is read."""
    from softcache.pipeline.cache.reader import CacheReader

    np.savez("a.npz", **rows)
    stages(
        "teacher-cache",
        *("--teacher", "logits:a.npz", "--codec", "float32", "--train-size", "200", "--val-fraction", "0.2"),
        *("--out", "c"),
    )
    cache = CacheReader(Path("c"))
    transfer_set = cache.load_transfer_set("", Path("datasets"), no_progress)
    for split, part in transfer_set.splits.items():
        positions = np.arange(len(part))
        assert part.source_rows is not None
        expected = rows["train" if split == "val" else split][part.source_rows[cache.index_at(split, positions)]]
        assert np.array_equal(cache.read_stored(split, 0, positions)[0].numpy(), expected)


def save_folder(save_image: Callable[..., Any]) -> list[str]:
    """Save a folder `pets` of two classes; return the names of its images."""
    names = [
        f"{split}/{label}/{k}.png"
        for split, count in (("train", 8), ("test", 3))
        for label in ("cat", "dog")
        for k in range(count)
    ]
    for k, name in enumerate(names):
        save_image(Path("pets") / name, k=k)
    return names


@pytest.mark.parametrize("prefix", ["", "./", "pets/", "./pets/", "ABSOLUTE"])
def test_images_of_a_folder_are_found_by_their_name(
    stages: Stages, save_image: Callable[..., Any], prefix: str
) -> None:
    names = save_folder(save_image)
    prefix = f"{Path.cwd()}/pets/" if prefix == "ABSOLUTE" else prefix
    logits = np.random.default_rng(0).normal(size=(len(names), 2)).astype("f4")
    order = np.random.default_rng(1).permutation(len(names))
    np.savez("t.npz", logits=logits[order], names=np.array([prefix + names[i] for i in order]))
    result = stages("teacher-cache", "--data", "folder:pets", "--teacher", "logits:t.npz", "--out", "c")
    labels = np.array([name.split("/")[1] == "dog" for name in names])
    is_test = np.array([name.startswith("test") for name in names])
    assert result["teacher"]["test"]["accuracy"] == (logits.argmax(1) == labels)[is_test].mean()


def test_rows_of_images_that_are_not_there_are_counted_and_a_doubled_or_missing_one_is_refused(
    stages: Stages, save_image: Callable[..., Any]
) -> None:
    names = save_folder(save_image)
    command = ("teacher-cache", "--data", "folder:pets", "--teacher", "logits:t.npz", "--out", "c")
    logits = np.random.default_rng(0).normal(size=(len(names) + 2, 2))
    np.savez("t.npz", logits=logits, names=np.array([*names, "train/bird/1.png", "train/bird/2.png"]), labels=[1])
    code, out, _ = stages.call(*command)
    assert code == 0
    assert "'t.npz': not read: labels\n" in out
    assert "2 of its 24 rows are of no image that is used, the first: 'train/bird/1.png'" in out
    np.savez("t.npz", logits=logits[:-2], names=np.array([*names[:-1], "./" + names[0]]))
    assert "two rows for 'train/cat/0.png'" in stages.fails(2, *command)
    np.savez("t.npz", logits=logits[:-5], names=np.array([f"other/{name}" for name in names[:-3]]))
    error = stages.fails(2, *command)
    assert "no targets for 22 of 22 images" in error
    assert "names of the file are like 'other/train/cat/0.png'" in error


def test_probabilities_are_refused_or_converted(stages: Stages, rows: Arrays) -> None:
    probabilities = {split: np.exp(x) / np.exp(x).sum(1, keepdims=True) for split, x in rows.items()}
    np.savez("p.npz", **probabilities)
    command = ("teacher-cache", "--teacher", "logits:p.npz", "--codec", "float32", "--out", "p")
    assert "--outputs probabilities" in stages.fails(2, *command)
    result = stages(*command, "--outputs", "probabilities")
    assert read_identity("p")["teacher"]["outputs"] == "probabilities"
    np.savez("l.npz", **rows)
    assert "no probabilities" in stages.fails(
        2, "teacher-cache", "--teacher", "logits:l.npz", "--outputs", "probabilities", "--out", "l"
    )
    expected = (rows["test"].argmax(1) == load_source("digits").splits["test"].labels).mean()
    assert result["teacher"]["test"]["accuracy"] == pytest.approx(expected)
    wrong = {split: x.copy() for split, x in probabilities.items()}
    wrong["test"][-1] /= 2
    np.savez("w.npz", **wrong)
    assert "sums to 0.5" in stages.fails(
        2, "teacher-cache", "--teacher", "logits:w.npz", "--outputs", "probabilities", "--out", "w"
    )


def test_a_cache_of_stored_targets_is_checked_and_repaired_from_its_file(stages: Stages, rows: Arrays) -> None:
    np.savez("a.npz", **rows)
    stages("teacher-cache", "--teacher", "logits:a.npz", "--out", "c")
    checked = stages("check-cache", "c", "--deep", "--teacher", "logits:a.npz")
    assert checked["teacher"]["rows"] > 0
    shard = Path("c/test/shard-00000.h5")
    payloads, content = read_payloads(Path("c")), shard.read_bytes()
    shard.write_bytes(content[:-100] + bytes(100))
    error = stages.fails(1, "check-cache", "c")
    assert "--repair" in error
    assert "--weights a.npz" in error
    other = {split: x + 1 for split, x in rows.items()}
    np.savez("b.npz", **other)
    assert "not the teacher of the cache" in stages.fails(1, "check-cache", "c", "--repair", "--weights", "b.npz")
    stages("check-cache", "c", "--repair", "--weights", "a.npz")
    assert read_payloads(Path("c")) == payloads
    stages("check-cache", "c", "--deep", "--weights", "a.npz")


def test_stored_targets_in_python(stages: Stages, rows: Arrays) -> None:
    import softcache

    np.savez("a.npz", **rows)
    cache = softcache.build_cache("c", "logits:a.npz", "digits")
    assert len(softcache.build_cache("c", "logits:a.npz", "digits").splits) == len(cache.splits)
    images = [(np.full((8, 8), 5 * k, np.uint8), k % 2) for k in range(40)]
    np.savez("d.npz", train=rows["train"][:40, :2])
    softcache.build_cache("d", "logits:d.npz", images, val_fraction=0.25)
