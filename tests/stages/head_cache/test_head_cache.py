"""`head-cache`: the rows, keys and identity of what it makes, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import softcache
from softcache.data.sampling import draw_stratified
from softcache.pipeline.cache.reader import CacheReader
from tests.helpers.commands import Stages
from tests.helpers.damage import flip_bit
from tests.helpers.embeddings import DIGITS


@pytest.fixture
def folder(embedding_folder: Path) -> Path:
    """The caches, and files of heads."""
    weight = np.random.default_rng(0).normal(size=(10, 12))
    np.savez("h.npz", weight=weight, bias=np.arange(10.0))
    np.savez("narrow.npz", weight=weight[:, :3])
    np.savez("large.npz", weight=1e6 * weight)
    return embedding_folder


def test_a_probe_makes_a_complete_cache_of_the_same_rows(folder: Path, stages: Stages) -> None:
    code, out, err = stages.call("head-cache", "a", "--head", "probe", "--labelled", 60, "--seed", 3, "--out", "p")
    assert code == 0, err
    source, cache = softcache.Cache("a"), softcache.Cache("p")
    assert (cache.task, cache.num_classes, cache.draws, cache.splits) == ("classes", 10, 2, source.splits)
    y, rows = source.labels("train").numpy(), np.arange(200)
    labelled = draw_stratified(y, 60, key=(3, 50))
    x = source.targets("train", rows).double().numpy()
    strength = float(out.partition("C ")[2].split()[0])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(
        x[labelled], y[labelled]
    )
    for split, draw in (("train", 0), ("train", 1), ("val", 0), ("test", 0)):
        index = np.arange(source.splits[split])
        z = source.targets(split, index, draw).double().numpy()
        p = cache.targets(split, index, draw).double().softmax(1).numpy()
        np.testing.assert_allclose(p, model.predict_proba(z), atol=2e-3)  # float16 logits
        position = np.arange(len(index))
        for key in ("index", "label", "view_crc32"):
            first, second = (c.reader.read_rows(split, draw, key, position) for c in (source, cache))
            assert np.array_equal(first, second)
    head = json.loads((folder / "p/manifest.json").read_text())["identity"]["teacher"]["head"]
    assert (head["kind"], head["labelled"], head["seed"]) == ("probe", 60, 3)
    accuracy = (
        (cache.targets("test", np.arange(cache.splits["test"])).argmax(1) == cache.labels("test")).double().mean()
    )
    assert CacheReader(Path("p")).manifest.teacher["test"]["accuracy"] == pytest.approx(float(accuracy))
    (printed,) = [line.split() for line in out.splitlines() if line.startswith("next:")]
    command = " ".join(printed)
    assert all(text in command for text in (" student ", "--cache p", "--labelled 60", "--baseline", "--seed 3"))
    assert "head (probe, fitted to 60 labelled rows)" in (folder / "p/README.md").read_text()
    stages("check-cache", "p", "--deep")


def test_the_student_keeps_the_labels_of_the_head(folder: Path, stages: Stages) -> None:
    stages("head-cache", "a", "--head", "centroids", "--labelled", 30, "--out", "c")
    result = stages("student", "--cache", "c", "--arch", "mlp:8", "--labelled", 30, "--baseline", "--epochs", 1)
    assert result["student"]["test"]["accuracy"] >= 0
    assert result["settings"]["labelled"] == 30


def test_a_head_of_a_file_reads_no_label(folder: Path, stages: Stages) -> None:
    result = stages("head-cache", "a", "--head", "h.npz", "--data", "digits")
    assert result["cache"] == "a-file"
    assert set(result["head"]) == {"kind", "weights"}
    source, cache = softcache.Cache("a"), softcache.Cache("a-file")
    with np.load("h.npz") as arrays:
        expected = source.targets("val", np.arange(20)).double().numpy() @ arrays["weight"].T + arrays["bias"]
    np.testing.assert_allclose(cache.targets("val", np.arange(20)), expected, rtol=2e-3, atol=2e-3)
    code, out, _ = stages.call("head-cache", "a", "--head", "h.npz")
    assert (code, "--loss kd:temperature=4" in out, "--labelled" in out) == (0, True, False)


def test_the_same_command_adds_draws_and_finishes_what_is_left(folder: Path, stages: Stages) -> None:
    command = ("head-cache", "a", "--head", "probe", "--labelled", 40, "--out", "p")
    stages(*command)
    before = json.loads((folder / "p/manifest.json").read_text())
    teacher = ("--teacher", "mlp:12", "--weights", "a.pth", "--axes", "--views", "crop:pad=1")
    stages(*DIGITS, *teacher, "--draws", 3, "--out", "a")
    grown = stages(*command)
    assert (grown["draws"], grown["fingerprint"]) == (3, before["fingerprint"])
    path = CacheReader(folder / "p").manifest.shards[1].path
    flip_bit(folder / "p" / path, 8 * ((folder / "p" / path).stat().st_size // 2))
    error = stages.fails(1, "check-cache", "p")
    assert "Remove them and manifest.json, then" in error
    assert error.endswith("head-cache a --head probe --labelled 40 --out p")
    assert "is not repaired by its teacher" in stages.fails(1, "check-cache", "p", "--repair")
    (folder / "p" / path).unlink()
    (folder / "p/manifest.json").unlink()
    assert stages(*command)["fingerprint"] == before["fingerprint"]
    stages("check-cache", "p", "--deep")


WRONG = [
    (("a",), 2, "name the head: --head probe, --head centroids or --head FILE.npz"),
    (("a", "--head", "knn"), 2, "no head 'knn'. There are: probe, centroids, FILE.npz"),
    (("a", "--head", "probe"), 2, "name their number, --labelled N"),
    (("a", "--head", "centroids"), 2, "name their number, --labelled N"),
    (("a", "--head", "h.npz", "--labelled", 20), 2, "a head in a file needs no labels"),
    (("a", "--head", "probe", "--labelled", 9), 2, "--labelled 9 is not between 10 classes and 200 rows"),
    (("a", "--head", "probe", "--labelled", 201), 2, "--labelled 201 is not between 10 classes and 200 rows"),
    (("a", "--head", "nowhere.npz"), 2, "there is no file or folder 'nowhere.npz'"),
    (("a", "--head", "narrow.npz"), 1, "weight has the shape [10, 3], the embedding has 12 numbers"),
    (("a", "--head", "large.npz"), 1, "which float16 cannot store"),
    (("a", "--head", "h.npz", "--out", "a"), 2, "--out a is the cache of embeddings itself"),
    (("a", "--head", "h.npz", "--out", "b"), 1, "'b' holds another cache"),
    (("a", "--head", "h.npz", "--out", "a.pth"), 2, "'a.pth' is a file"),
    (("a", "--head", "h.npz", "--data", "mnist"), 1, "is of digits, not of mnist"),
    (("nowhere", "--head", "h.npz"), 1, "there is no cache at 'nowhere'"),
    (("TINY", "--head", "h.npz"), 2, "is a cache of the task classes, and a head is for caches of the task embedding"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG, ids=[message[:40] for *_, message in WRONG])
def test_what_cannot_work_is_refused_in_one_line(
    arguments: tuple[object, ...], code: int, message: str, folder: Path, stages: Stages, tiny: Path
) -> None:
    named = [tiny / "cache" if argument == "TINY" else argument for argument in arguments]
    error = stages.fails(code, "head-cache", *named)
    assert message in error
    assert "holds another cache" in error or "\n" not in error


def test_what_a_head_made_has_no_teacher_to_run_and_no_layers(folder: Path, stages: Stages) -> None:
    stages("head-cache", "a", "--head", "h.npz", "--out", "p")
    error = stages.fails(2, "check-cache", "p", "--deep", "--weights", "a.pth")
    assert "--weights cannot be compared with 'p', whose logits a head computed" in error
    error = stages.fails(1, "student", "--cache", "p", "--loss", "hint:teacher=hidden1,student=hidden1")
    assert "has no layers; choose a loss that reads logits alone, such as kd" in error
