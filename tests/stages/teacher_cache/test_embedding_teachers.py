"""Classification networks as teachers of embeddings: what is stored, and that the same teacher is built again."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models import build
from tests.helpers.caches import read_payloads
from tests.helpers.commands import Stages
from tests.helpers.damage import flip_bit
from tests.helpers.embeddings import DIGITS

TEACHER = ("--teacher", "mlp:12", "--weights", "a.pth", "--axes", "--views", "crop:pad=1")


@pytest.fixture
def folder(embedding_folder: Path) -> Path:
    return embedding_folder


def test_resnet20_stores_64_numbers_a_view(stages: Stages, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(build("resnet20", 10, 1, 8).state_dict(), "resnet20.th")
    code, out, err = stages.call(
        *DIGITS, "--teacher", "resnet20", "--weights", "resnet20.th", "--draws", 1, "--out", "c"
    )
    assert code == 0, err
    assert "embedding: 64 numbers, the input of layer 'linear'" in out.splitlines()
    manifest = json.loads((tmp_path / "c/manifest.json").read_text())
    assert manifest["classes"] == 64
    assert manifest["identity"]["teacher"]["features"] == "linear"
    assert "the input of its layer `linear`" in (tmp_path / "c/README.md").read_text()


def test_the_stored_rows_are_the_features_of_the_views(folder: Path) -> None:
    import softcache

    network = build("mlp:12", 10, 1, 8)
    network.load_state_dict(torch.load("a.pth", weights_only=True))
    network.set_submodule("linear", torch.nn.Identity())
    cache = softcache.Cache("a")
    rows = torch.arange(20)
    images = cache.prepare_input(cache.render("train", rows, draw=1))
    with torch.no_grad():
        expected = network.eval()(images)
    torch.testing.assert_close(cache.targets("train", rows, draw=1), expected, rtol=1e-3, atol=1e-3)


def test_the_same_teacher_is_built_again_to_check_to_repair_and_to_grow(folder: Path, stages: Stages) -> None:
    payloads, head = read_payloads(folder / "a"), CacheReader(folder / "a").read_head_arrays()
    found = stages("check-cache", "a", "--deep", "--weights", "a.pth")
    assert found["teacher"]["share"] < 1e-3
    for path in ("head.h5", CacheReader(folder / "a").manifest.shards[0].path):
        flip_bit(folder / "a" / path, 8 * ((folder / "a" / path).stat().st_size // 2))
    stages("check-cache", "a", "--repair", "--weights", "a.pth")
    assert read_payloads(folder / "a") == payloads
    repaired = CacheReader(folder / "a").read_head_arrays()
    assert head.keys() == repaired.keys() == {"mean", "std", "axes", "axis_std"}
    assert all(torch.equal(head[name], repaired[name]) for name in head)
    assert stages(*DIGITS, *TEACHER, "--draws", 3, "--out", "a")["draws"] == 3
    assert "the weights of b.pth do not fit the arch" in stages.fails(
        2, "check-cache", "a", "--deep", "--weights", "b.pth"
    )
    assert "holds another cache" in stages.fails(
        1, *DIGITS[:5], *DIGITS[7:], *TEACHER[:4], "--views", "crop:pad=1", "--draws", 2, "--out", "a"
    )


def test_a_run_of_classes_gives_features_and_one_of_embeddings_its_outputs(
    folder: Path, stages: Stages, tiny: Path
) -> None:
    shutil.copytree(tiny / "runs/teacher", folder / "teacher")
    of_run = DIGITS[:-2]
    made = stages(*of_run, "--weights", "teacher", "--draws", 1, "--views", "none", "--out", "t")
    assert json.loads((folder / "t/manifest.json").read_text())["identity"]["teacher"]["features"] == "linear"
    assert made["fidelity"]["cosine"] > 0.999
    stages("student", "--cache", "a", "--arch", "mlp:8", "--width", 5, "--epochs", 1, "--out", "s")
    stages(*of_run, "--weights", "s", "--draws", 1, "--views", "none", "--out", "u")
    manifest = json.loads((folder / "u/manifest.json").read_text())
    assert (manifest["classes"], "features" in manifest["identity"]["teacher"]) == (5, False)
    assert stages("check-cache", "u", "--deep", "--weights", "s")["teacher"]["share"] < 1e-3
