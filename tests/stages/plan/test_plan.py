"""`softcache plan`: what it says before a cache is written is what the cache then takes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache.pipeline.models import build
from softcache.stages.teacher_cache.targets import TargetGenerator
from tests.helpers.commands import Stages

NUMBERS = ("--rows", "1e6", "--classes", "100", "--rate", "500")


def save_weights(path: Path, arch: str, classes: int, channels: int, size: int) -> None:
    torch.manual_seed(0)
    torch.save(build(arch, classes, channels, size).state_dict(), path)


def make_digits(folder: Path, _save: Any) -> tuple[str, ...]:
    save_weights(folder / "t.pt", "cnn", 10, 1, 8)
    return ("--data", "digits", "--teacher", "cnn", "--views", "crop:pad=1", "--draws", "12")


def make_small_images(folder: Path, save: Callable[..., Any]) -> tuple[str, ...]:
    for split, count in (("train", 60), ("test", 10)):
        for c in range(4):
            for k in range(count):
                save(folder / f"images/{split}/class {c}/{k}.png", width=32, height=32, k=100 * c + k)
    save_weights(folder / "t.pt", "resnet8", 4, 3, 32)
    taps = ("--taps", "layer2:attention,layer3,layer3:pool", "--shard-rows", "50", "--codec", "float32")
    return ("--data", "folder:images", "--teacher", "resnet8", "--normalize", "none", "--draws", "3", *taps)


def make_many_classes(folder: Path, _save: Any) -> tuple[str, ...]:
    y = np.arange(3000) % 1000
    x = (np.arange(3000)[:, None] * np.arange(1, 7) % 11).astype(np.float32)
    np.savez(folder / "table.npz", x=x, y=y)
    save_weights(folder / "t.pt", "mlp:4", 1000, 6, 1)
    return ("--data", "arrays:table.npz", "--teacher", "mlp:4", "--codec", "sqrt8", "--draws", "2")


KINDS: dict[str, Callable[[Path, Any], tuple[str, ...]]] = {
    "digits": make_digits,
    "small images with taps": make_small_images,
    "1,000 classes in sqrt8": make_many_classes,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_those_of_the_cache(kind: str, stages: Stages, save_image: Any) -> None:
    options = (*KINDS[kind](Path(), save_image), "--weights", "t.pt")
    plan = stages("plan", *options)
    assert not Path("caches").exists()
    cache = stages("teacher-cache", *options, "--out", "c")
    sizes = {path: path.stat().st_size for path in Path("c").rglob("*") if path.is_file() and path.name != ".lock"}
    manifest = json.loads(Path("c/manifest.json").read_text())
    size = plan["size"]
    assert size["bytes"] == pytest.approx(sum(sizes.values()), rel=0.01)
    assert size["manifest_bytes"] == pytest.approx(Path("c/manifest.json").stat().st_size, rel=0.05)
    assert size["files"] == len(sizes)
    assert size["shards"] == len(manifest["shards"])
    assert size["rows"] == cache["rows"]
    assert size["shard_rows"] == max(shard["rows"] for shard in manifest["shards"])
    assert size["shard_bytes"] == pytest.approx(max(shard["bytes"] for shard in manifest["shards"]), rel=0.01)
    assert (plan["splits"], plan["taps"], plan["classes"]) == (
        manifest["splits"],
        manifest["taps"],
        manifest["classes"],
    )
    by_rate = stages("plan", *options, "--rate", "100")
    assert by_rate["size"] == size
    assert by_rate["taps"] == plan["taps"]
    assert by_rate["seconds"] == pytest.approx(size["rows"] / 100)


def test_the_rate_is_that_of_stage_one(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher whose batches take 50 ms: its rate does not depend on this machine."""
    import time

    infer_batches = TargetGenerator._infer_batches

    def infer_slowly(self: Any, *arguments: Any) -> Any:
        for batch in infer_batches(self, *arguments):
            time.sleep(0.05)
            yield batch

    monkeypatch.setattr(TargetGenerator, "_infer_batches", infer_slowly)
    plan = stages("plan", "--data", "digits", "--draws", "2", "--views", "crop:pad=1", "--batch-size", "64")
    assert 600 < plan["views_per_second"] < 64 / 0.05
    assert plan["seconds"] == pytest.approx((2 * 1257 + 180 + 360) / plan["views_per_second"])


def test_neither_data_nor_weights_are_opened_for_numbers(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    from softcache.stages.plan import subject

    def fail(*_: object) -> None:
        raise AssertionError("the data are loaded")

    monkeypatch.setattr(subject, "load_data", fail)
    monkeypatch.setattr(subject, "prepare_cache", fail)
    plan = stages(
        *("plan", "--rows", "14e6", "--classes", "21841", "--rate", "2000", "--data", "folder:nowhere"),
        *("--teacher", "torchvision:resnet50", "--weights", "nowhere.pt", "--taps", "layer4:pool", "--draws", "90"),
        *("--ranks", "64", "--epochs", "300", "--students", "5", "--student-rate", "3000"),
    )
    assert plan["splits"] == {"train": 12_600_000, "val": 1_400_000}
    assert plan["taps"] == {"layer4:pool": [2048]}
    rows = 90 * 12_600_000 + 1_400_000
    row_bytes = 2 * 21841 + 2 * 2048 + 12
    assert (plan["size"]["rows"], plan["size"]["row_bytes"]) == (rows, row_bytes)
    assert plan["size"]["bytes"] == pytest.approx(rows * row_bytes, rel=1e-3)
    assert plan["seconds"] == pytest.approx(rows / 2000)
    assert plan["seconds"] / 64 <= plan["rank_seconds"] < 1.01 * plan["seconds"] / 64
    assert plan["read_rate"] == 3000 * (row_bytes - 8)
    assert plan["live_seconds"] == pytest.approx(5 * 300 * 12_600_000 / 2000)
    assert plan["paid_epochs"] == 19  # 90 draws and the validation rows, shared by five students


def test_shards_that_a_manifest_cannot_list_get_a_number_of_rows(stages: Stages) -> None:
    options = ("--rows", "14e6", "--classes", "21841", "--rate", "2000", "--draws", "90")
    code, out, err = stages.call("plan", *options)
    assert code == 0, err
    assert "a manifest lists 41,943 shards at most: add --shard-rows " in out
    advised = int(out.partition("--shard-rows ")[2].split()[0])
    plan = stages("plan", *options, "--shard-rows", advised)
    assert plan["shard_rows"] == 0
    assert 40_000 < plan["size"]["shards"] <= 41_943
    assert stages("plan", *options, "--shard-rows", advised - 1000)["shard_rows"] == advised
    plan = stages("plan", "--rows", "4e9", "--classes", "21841", "--rate", "2000", "--draws", "90")
    assert not plan["can_be_listed"]


def test_what_fits_a_budget_comes_best_first(stages: Stages) -> None:
    options = ("plan", *NUMBERS, "--teacher", "resnet8", "--views", "crop-flip:size=32", "--draws", "20")
    taps = ("--taps", "layer1,layer3:pool")
    asked = stages(*options, *taps)["size"]["bytes"]
    (whole,) = stages(*options, *taps, "--budget", f"{asked / 1e9 + 0.001:.3f}GB")["budget"]
    assert whole == {"codec": "float16", "draws": 20, "taps": ["layer1", "layer3:pool"], "bytes": asked}
    choices = stages(*options, *taps, "--budget", "3.5GB")["budget"]
    assert len(choices) > 3
    assert all(choice["bytes"] <= 3.5e9 for choice in choices)
    order = [(-len(choice["taps"]), -choice["draws"]) for choice in choices]
    assert order == sorted(order)
    for choice in choices:
        again = stages(*options, "--codec", choice["codec"], "--draws", choice["draws"], *make_taps(choice["taps"]))
        assert again["size"]["bytes"] == choice["bytes"]
    for choice in (choices[0], choices[-1]):
        if choice["draws"] < 20:
            more = ("--codec", choice["codec"], "--draws", choice["draws"] + 1, *make_taps(choice["taps"]))
            assert stages(*options, *more)["size"]["bytes"] > 3.5e9


def make_taps(taps: list[str]) -> tuple[str, ...]:
    return ("--taps", ",".join(taps)) if taps else ()


def test_a_budget_for_nothing_is_said_in_one_line(stages: Stages) -> None:
    code, out, err = stages.call("plan", *NUMBERS, "--budget", "1MiB")
    assert code == 0, err
    smallest = next(line for line in out.splitlines() if line.startswith("budget: "))
    assert smallest.startswith("budget:  nothing fits 1MiB: top:20 with 1 draw and no taps takes ")
    assert stages("plan", *NUMBERS, "--budget", "1MiB")["budget"] == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--codec", "flot16"), "no codec 'flot16'. Did you mean 'float16'?"),
        (("--codec", "int8"), "--codec int8 is not for the task classes, which has float16, float32, sqrt8"),
        (("--draws", "0"), "--draws 0 is below 1"),
        (("--rows", "0"), "--rows 0 is not a whole number from 2 to 4294967295"),
        (("--rows", "1.5"), "--rows 1.5 is not a whole number"),
        (("--rows", "nan"), "--rows nan is not a whole number"),
        (("--rows", "many"), "--rows many is not a number, such as 14e6"),
        (("--classes", "0"), "--classes 0 is not between 1 and"),
        (("--budget", "500"), "--budget 500 has no unit: there are kB, kiB"),
        (("--budget", "5XB"), "--budget 5XB has the unit XB: there are"),
        (("--budget", "-5GB"), "--budget -5GB is not above 0"),
        (("--budget", "1.2.3GB"), "--budget 1.2.3GB is no number of bytes"),
        (("--rate", "0"), "--rate 0.0 is below 1e-06"),
        (("--student-rate", "0"), "--student-rate 0.0 is below 1e-06"),
        (("--ranks", "0"), "--ranks 0 is below 1"),
        (("--taps", "layer9"), "no tap 'layer9'. There are: "),
        (("--taps", "layer9", "--rate", "5"), "no tap 'layer9'. There are: "),
        (("--taps", "pool1:best", "--rate", "5"), "no statistic of tap 'pool1:best' 'best'"),
        (("--teacher", "resnet9", "--rate", "5"), "no arch 'resnet9'. Did you mean 'resnet8'?"),
        (("--weights", "nowhere.pt"), "there are no weights at 'nowhere.pt'"),
        (("--task", "embedding"), "--task embedding needs the teacher"),
        (("--teacher", "my:net", "--rate", "5", "--taps", "a"), "leave out --rate"),
        (("--data", "nothing"), "no data set 'nothing'"),
    ],
)
def test_wrong_input_gets_one_line(options: tuple[str, ...], error: str, stages: Stages) -> None:
    assert error in stages.fails(2, "plan", *options)


def test_nothing_is_written(stages: Stages, tmp_path: Path) -> None:
    stages("plan", "--data", "digits")
    stages("plan", *NUMBERS)
    assert list(tmp_path.iterdir()) == []
