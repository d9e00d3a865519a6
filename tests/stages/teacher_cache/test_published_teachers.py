"""Teachers of timm and transformers: weights of a file or as published, and the input that is published with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from softcache.data.sources import load_source
from softcache.data.views.policy import parse_views
from softcache.data.views.render import render
from softcache.pipeline.cache.reader import CacheReader
from tests.helpers.commands import Stages
from tests.helpers.hub import publish_timm_weights, save_hf_model, save_timm_weights

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
CACHE = ("teacher-cache", "--train-size", 100, "--draws", 1, "--codec", "float32", "--out", "c")
TEN = tuple(f"digit {i}" for i in range(10))


def identity(folder: str = "c") -> dict[str, Any]:
    """The teacher in the identity of a cache."""
    record: dict[str, Any] = CacheReader(Path(folder)).manifest.identity["teacher"]
    return record


def read_test_logits() -> torch.Tensor:
    """The cached logits of the first 50 rows of the test split, by index."""
    cache = CacheReader(Path("c"))
    positions = np.argsort(cache.row_order("test"))[:50]
    return cache.read_stored("test", 0, positions)[0]


def render_test_views(size: int) -> torch.Tensor:
    images = load_source("digits").splits["test"][0]
    return render(images, parse_views(f"none:size={size}"), 0, np.arange(50), 0).float()


def test_a_file_of_timm_is_run_with_the_input_that_timm_publishes(stages: Stages) -> None:
    state = save_timm_weights("test_resnet", "w.pt", classes=10)
    teacher = ("--teacher", "timm:test_resnet", "--weights", "w.pt")
    code, out, err = stages.call(*CACHE, "--views", "none:size=32", *teacher)
    assert code == 0, err
    mean, std = (0.5,) * 3, (0.5,) * 3
    assert "input of timm:test_resnet: 32 px, bilinear, mean=0.5,0.5,0.5,std=0.5,0.5,0.5, as published with it" in out
    assert "as published with it; --normalize changes it" in out
    teacher = identity()
    assert (teacher["arch"], teacher["size"], teacher["channels"]) == ("timm:test_resnet", 32, 3)
    assert (teacher["mean"], teacher["std"]) == (list(mean), list(std))
    assert "interpolation" not in teacher
    network = timm.create_model("test_resnet", num_classes=10).eval()
    network.load_state_dict(state)
    x = (render_test_views(32).expand(-1, 3, -1, -1) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(
        std
    ).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(read_test_logits(), network(x), rtol=0, atol=1e-5)


def test_normalize_wins_over_what_is_published(stages: Stages) -> None:
    save_timm_weights("test_resnet", "w.pt", classes=10)
    teacher = ("--views", "none:size=32", "--teacher", "timm:test_resnet", "--weights", "w.pt")
    stages(*CACHE, *teacher, "--normalize", "mean=0,0,0,std=1,1,1")
    assert (identity()["mean"], identity()["std"]) == ([0.0] * 3, [1.0] * 3)


def test_a_published_teacher_of_transformers(stages: Stages) -> None:
    """Views of 8 px are resized to its input, bicubic as its image processor does; check-cache needs its name."""
    save_hf_model(Path("model"), TEN)
    code, out, err = stages.call(*CACHE, "--views", "none", "--teacher", "hf:model", "--weights", "DEFAULT")
    assert code == 0, err
    assert "input of hf:model: 12 px, bicubic, mean=0.5,0.4,0.3,std=0.2,0.25,0.3, as published with it" in out
    assert (identity()["size"], identity()["interpolation"]) == (12, "bicubic")
    network = transformers.AutoModelForImageClassification.from_pretrained("model").eval()
    x = F.interpolate(render_test_views(8).expand(-1, 3, -1, -1), size=[12, 12], mode="bicubic", antialias=True)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            read_test_logits(), network((x.clamp(0, 255) / 255 - mean) / std).logits, rtol=0, atol=1e-5
        )
    error = stages.fails(2, "check-cache", "c", "--deep", "--weights", "DEFAULT")
    assert "the cache 'c' names a model on this machine, 'hf:model'" in error
    stages("check-cache", "c", "--deep", "--weights", "DEFAULT", "--teacher", "hf:model")


def test_explicit_normalize_is_printed_and_used_for_published_weights(stages: Stages) -> None:
    save_hf_model(Path("model"), TEN)
    command = (*CACHE, "--views", "none", "--teacher", "hf:model", "--weights", "DEFAULT", "--normalize", "none")
    code, out, err = stages.call(*command)
    assert code == 0, err
    assert "input of hf:model: 12 px, bicubic, mean=0,0,0,std=1,1,1, by --normalize" in out
    assert identity()["mean"] == [0.0, 0.0, 0.0]


@pytest.fixture
def pets(tmp_path: Path, save_image: Callable[..., Any]) -> Path:
    """A folder of images that differ in size."""
    for split, count in (("train", 10), ("test", 4)):
        for i in range(count):
            save_image(tmp_path / "pets" / split / ("cat", "dog")[i % 2] / f"{i}.png", 20 + i, 24, i)
    return tmp_path / "pets"


def test_views_of_a_folder_have_the_size_of_the_teacher(stages: Stages, pets: Path) -> None:
    save_timm_weights("test_resnet", "w.pt", classes=2)
    command = ("teacher-cache", "--data", "folder:pets", "--draws", 1, "--val-fraction", 0.2, "--out", "c")
    teacher = ("--teacher", "timm:test_resnet", "--weights", "w.pt")
    code, out, err = stages.call(*command, "--views", "none", *teacher)
    assert code == 0, err
    assert "views are of 160 px, cut out of images whose shorter side is 168 px, as published with the teacher" in out
    views = CacheReader(Path("c")).views
    assert (views.size, views.resize) == (160, 168)
    stages(*command[:-1], "c2", "--views", "none:size=32", *teacher)
    assert CacheReader(Path("c2")).views.resize == 0


def test_weights_of_1000_classes_are_refused_for_data_of_10(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_timm_weights("test_resnet", tmp_path / "hub", monkeypatch)
    error = stages.fails(2, *CACHE, "--views", "none:size=32", "--teacher", "timm:test_resnet", "--weights", "DEFAULT")
    assert "the published weights of timm:test_resnet output 1000 classes, the data have 10" in error


def test_a_run_that_names_a_model_of_transformers_does_not_have_it_opened(stages: Stages, tmp_path: Path) -> None:
    save_hf_model(Path("model"), TEN)
    common = ("--train-size", 50, "--views", "none:size=12", "--epochs", 1)
    stages("teacher", "--arch", "hf:model", *common, "--out", "t")
    result = json.loads(Path("t/result.json").read_text())
    assert result["teacher"]["arch"] == "hf:model"
    error = stages.fails(2, *CACHE, "--views", "none:size=12", "--weights", "t")
    assert "the run 't' names a model on this machine, 'hf:model', and a file alone does not have it opened" in error
    stages(*CACHE, "--views", "none:size=12", "--weights", "t", "--teacher", "hf:model")


WRONG = [
    ("--teacher timm:resnt18 --weights w.pt", "no timm model 'resnt18'. Did you mean 'resnet18'?"),
    ("--teacher timm:test_resnet.nope --weights w.pt", "timm model 'test_resnet' has no weights 'nope'"),
    ("--teacher timm: --weights w.pt", "has nothing after its colon: timm:NAME"),
    ("--teacher timm:test_resnet --weights none.pt", "there are no weights at 'none.pt'"),
    ("--teacher timm:test_vit --weights w.pt", "the weights of w.pt do not fit the arch"),
    ("--teacher timm:test_resnet --weights w.pt --taps layer9", "no tap 'layer9'"),
    ("--teacher timm:test_resnet --weights w.pt --output 0", "--output 0 is for networks of your own"),
    ("--teacher timm:test_resnet --weights w.pt --normalize modl", "--normalize modl: there are imagenet"),
    ("--teacher cnn --weights w.pt --normalize model", "--normalize model is the input published with torchvision:"),
    (
        "--teacher cnn --weights DEFAULT",
        "needs --teacher torchvision:NAME, timm:NAME, hf:NAME or my_package.module:factory",
    ),
    ("--teacher timm:test_vit --weights w.pt --views none:size=20", "timm:test_vit cannot take images of"),
    ("--teacher hf:none --weights DEFAULT", "no model 'none': it is neither a folder with a config.json"),
    ("--teacher hf:empty --weights DEFAULT", "no model 'empty'"),
    ("--teacher hf: --weights w.pt", "has nothing after its colon: hf:NAME or hf:FOLDER"),
    ("--teacher hf:model --weights DEFAULT", "the published weights of hf:model output 3 classes, the data have 10"),
    ("--teacher hf:model --weights w.pt", "do not fit the arch"),
    ("--teacher hf:model --weights w.pt --weights-key ema", "--weights-key ema: 'w.pt' has no weights under that key"),
    ("--teacher hf:model --weights DEFAULT --weights-key ema", "--weights-key ema is for a file of weights"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_wrong_inputs_are_refused_in_one_line(stages: Stages, tmp_path: Path, options: str, words: str) -> None:
    Path("empty").mkdir()
    if "hf:model" in options:
        save_hf_model(Path("model"), ("cat", "dog", "owl"))
    if "w.pt" in options:
        save_timm_weights("test_resnet", "w.pt", classes=10)
    views = () if "--views" in options else ("--views", "none:size=32")
    error = stages.fails(2, *CACHE, *views, *options.split())
    assert words in error
    assert "\n" not in error
    assert not Path("c").exists()
