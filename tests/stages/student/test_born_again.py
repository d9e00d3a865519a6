"""Chains: each student is the teacher of the next one, and at the end all of them form an ensemble."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache.data.transfer_set import load_transfer_set
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models import build
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.stages.main import main
from tests.helpers.commands import Stages

SHORT = ("--epochs", 2, "--batch-size", 64, "--draws", 2)


def held_out_probabilities(cache: CacheReader, arch: str, weights: Path) -> np.ndarray[Any, Any]:
    """softmax [N, K] of a student's logits on the test split, float64, computed without the commands."""
    test = load_transfer_set("digits", Path(), val_fraction=0.125, seed=0, train_size=300).splits["test"]
    network = build(arch, 10, cache.input_spec.channels, cache.input_spec.size)
    network.load_state_dict(torch.load(weights, weights_only=True))
    model = PreparedModel(network, cache.input_spec).eval()
    with torch.inference_mode():
        logits = model(test.images.take(np.arange(len(test))).pixels)  # type: ignore[union-attr]
    return logits.double().softmax(1).numpy()


def chain_command(tiny: Path, out: Path) -> list[object]:
    options = ["--cache", tiny / "cache", "--arch", "mlp:16", "--generations", 3, *SHORT, "--baseline", "--out", out]
    return ["born-again", *options]


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished chain of three."""
    out = tmp_path_factory.mktemp("born_again") / "chain"
    main([str(word) for word in chain_command(tiny, out)])
    return out


@pytest.fixture
def chain(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def test_each_generation_learns_from_a_cache_of_the_one_before(chain: dict[str, Any], folder: Path) -> None:
    caches = [CacheReader(Path(generation["cache"])) for generation in chain["generations"]]
    assert [cache.teacher for cache in caches] == ["cnn", "mlp:16", "mlp:16"]
    for number, cache in enumerate(caches[1:], 1):
        state = torch.load(folder / f"generation-{number}/student.pt", weights_only=True)
        network = build("mlp:16", 10, 1, 8)
        network.load_state_dict(state)
        test = load_transfer_set("digits", Path(), val_fraction=0.125, seed=0, train_size=300).splits["test"]
        with torch.inference_mode():
            logits = PreparedModel(network, cache.input_spec).eval()(
                test.images.take(cache.row_order("test")).pixels  # type: ignore[union-attr]
            )
        cached = cache.read_targets("test", 0, np.arange(len(test)))[0]
        assert torch.allclose(logits, cached, rtol=2e-3, atol=2e-3)


def test_the_caches_of_a_chain_have_the_views_of_the_first(chain: dict[str, Any]) -> None:
    views = [CacheReader(Path(generation["cache"])).manifest.identity["views"] for generation in chain["generations"]]
    assert views[0] == views[1] == views[2]


def test_only_the_first_generation_has_a_baseline(chain: dict[str, Any], folder: Path) -> None:
    has_baseline = [(folder / f"generation-{g}/baseline/baseline.pt").exists() for g in (1, 2, 3)]
    assert has_baseline == [True, False, False]
    assert chain["baseline"]["test"]["accuracy"] > 0


def test_the_ensemble_is_the_mean_of_the_students_probabilities(
    chain: dict[str, Any], tiny: Path, folder: Path
) -> None:
    cache = CacheReader(tiny / "cache")
    p = [held_out_probabilities(cache, "mlp:16", folder / f"generation-{g}/student.pt") for g in (1, 2, 3)]
    labels = load_transfer_set("digits", Path(), val_fraction=0.125, seed=0, train_size=300).splits["test"].labels
    mean = np.mean(p, axis=0)
    assert chain["ensemble"]["test"]["accuracy"] == pytest.approx((mean.argmax(1) == labels).mean())
    assert chain["ensemble"]["test"]["nll"] == pytest.approx(
        -np.log(mean[np.arange(len(mean)), labels]).mean(), rel=1e-5
    )


def test_generations_differ_in_their_seed(chain: dict[str, Any], folder: Path) -> None:
    seeds = [json.loads((folder / f"generation-{g}/settings.json").read_text())["seed"] for g in (1, 2, 3)]
    assert seeds == [0, 1, 2]


def test_the_same_command_continues_to_the_same_result(
    chain: dict[str, Any], tiny: Path, tmp_path: Path, stages: Stages
) -> None:
    """Also when the last generation, its result and the cache before it were deleted."""
    out = tmp_path / "chain"
    stages(*chain_command(tiny, out))
    for path in ("generation-3/student.pt", "generation-3/result.json", "result.json", "cache-2/manifest.json"):
        (out / path).unlink()
    (out / "generation-3/metrics.jsonl").unlink()
    again = stages(*chain_command(tiny, out))
    for generation, expected in zip(again["generations"], chain["generations"], strict=True):
        assert generation["student"]["test"] == expected["student"]["test"]
    assert again["ensemble"] == chain["ensemble"]


def test_a_chain_is_not_continued_with_other_options(folder: Path, tiny: Path, stages: Stages) -> None:
    other = ["3" if word == 2 else word for word in chain_command(tiny, folder)]
    assert "epochs 2 there, 3 asked" in stages.fails(1, *other)


def test_archs_make_a_chain_of_teacher_assistants(tiny: Path, tmp_path: Path, stages: Stages) -> None:
    options = ("--archs", "mlp:32,16+mlp:8", *SHORT, "--out", tmp_path / "ta")
    result = stages("born-again", "--cache", tiny / "cache", *options)
    assert [generation["student"]["arch"] for generation in result["generations"]] == ["mlp:32,16", "mlp:8"]
    assert CacheReader(tmp_path / "ta/cache-1").teacher == "mlp:32,16"


def test_a_chain_with_hints_caches_the_layers_of_its_students(tiny: Path, tmp_path: Path, stages: Stages) -> None:
    hint = ("--loss", "kd", "--loss", "hint:teacher=pool1")
    options = ("--arch", "cnn", "--generations", 2, *SHORT, *hint, "--out", tmp_path / "hinted")
    stages("born-again", "--cache", tiny / "cache", *options)
    assert list(CacheReader(tmp_path / "hinted/cache-1").manifest.taps) == ["pool1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--archs", "mlp:8+", "--generations", 2), "names an arch for each generation"),
        (("--archs", "mlp:8+mlp:4", "--arch", "cnn"), "leave out --arch"),
        (("--seeds", 2), "takes no"),
        (("--resume",), "takes no"),
        (("--archs", "mlp:8+resnt8"), "Did you mean"),
        (
            ("--archs", "mlp:8+cnn", "--loss", "hint:teacher=pool1,student=linear"),
            "has no 'pool1'",
        ),
    ],
)
def test_options_that_a_chain_does_not_take_are_one_line(
    tiny: Path, tmp_path: Path, stages: Stages, options: Any, message: str
) -> None:
    out = tmp_path / "wrong"
    assert message in stages.fails(2, "born-again", "--cache", tiny / "cache", *SHORT, *options, "--out", out)
    assert not out.exists()
