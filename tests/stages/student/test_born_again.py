"""Chains: each student is the next one's teacher, and all of them answer together at the end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache.data.transfer_set import load_transfer_set
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.models import build
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.stages.main import main
from tests.helpers.commands import Stages

SHORT = ("--epochs", 2, "--batch-size", 64, "--draws", 2)


def held_out_probabilities(cache: Cache, arch: str, weights: Path) -> np.ndarray[Any, Any]:
    """softmax of a student's logits on the test split, float64, without the commands."""
    test = load_transfer_set("digits", Path(), val_fraction=0.125, seed=0, train_size=300).splits["test"]
    network = build(arch, 10, cache.input_spec.channels, cache.input_spec.size)
    network.load_state_dict(torch.load(weights, weights_only=True))
    model = PreparedModel(network, cache.input_spec).eval()
    with torch.inference_mode():
        logits = model(test.images.take(np.arange(len(test))).pixels)  # type: ignore[union-attr]
    return logits.double().softmax(1).numpy()


def command(tiny: Path, out: Path) -> list[object]:
    asked = ["born-again", "--cache", tiny / "cache", "--arch", "mlp:16", "--generations", 3, *SHORT, "--baseline"]
    return [*asked, "--out", out]


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished chain of three."""
    out = tmp_path_factory.mktemp("chained") / "chain"
    main([str(word) for word in command(tiny, out)])
    return out


@pytest.fixture
def chain(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_each_generation_is_taught_by_a_cache_of_the_one_before(chain: dict[str, Any], folder: Path) -> None:
    caches = [Cache(Path(generation["cache"])) for generation in chain["generations"]]
    assert [cache.teacher for cache in caches] == ["cnn", "mlp:16", "mlp:16"]
    for number, cache in enumerate(caches[1:], 1):
        state = torch.load(folder / f"generation-{number}/student.pt", weights_only=True)
        network = build("mlp:16", 10, 1, 8)
        network.load_state_dict(state)
        test = load_transfer_set("digits", Path(), val_fraction=0.125, seed=0, train_size=300).splits["test"]
        with torch.inference_mode():
            said = PreparedModel(network, cache.input_spec).eval()(
                test.images.take(cache.row_order("test")).pixels  # type: ignore[union-attr]
            )
        kept = cache.read_targets("test", 0, np.arange(len(test)))[0]
        assert torch.allclose(said, kept, rtol=2e-3, atol=2e-3)


def test_the_caches_of_a_chain_have_the_views_of_the_first(chain: dict[str, Any]) -> None:
    views = [Cache(Path(generation["cache"])).manifest.identity["views"] for generation in chain["generations"]]
    assert views[0] == views[1] == views[2]


def test_only_the_first_generation_has_a_baseline(chain: dict[str, Any], folder: Path) -> None:
    found = [(folder / f"generation-{g}/baseline/baseline.pt").exists() for g in (1, 2, 3)]
    assert found == [True, False, False]
    assert chain["baseline"]["test"]["accuracy"] > 0


def test_the_ensemble_is_the_mean_of_the_students_probabilities(
    chain: dict[str, Any], tiny: Path, folder: Path
) -> None:
    cache = Cache(tiny / "cache")
    p = [held_out_probabilities(cache, "mlp:16", folder / f"generation-{g}/student.pt") for g in (1, 2, 3)]
    labels = load_transfer_set("digits", Path(), val_fraction=0.125, seed=0, train_size=300).splits["test"].labels
    mean = np.mean(p, axis=0)
    assert chain["ensemble"]["test"]["accuracy"] == pytest.approx((mean.argmax(1) == labels).mean())
    assert chain["ensemble"]["test"]["nll"] == pytest.approx(
        -np.log(mean[np.arange(len(mean)), labels]).mean(), rel=1e-5
    )


def test_generations_differ_in_their_seed(chain: dict[str, Any], folder: Path) -> None:
    kept = [json.loads((folder / f"generation-{g}/settings.json").read_text())["seed"] for g in (1, 2, 3)]
    assert kept == [0, 1, 2]


def test_the_same_command_goes_on_to_the_same_result(
    chain: dict[str, Any], tiny: Path, tmp_path: Path, stages: Stages
) -> None:
    """Also where the last generation, its result and the cache before it are gone."""
    out = tmp_path / "chain"
    stages(*command(tiny, out))
    for path in ("generation-3/student.pt", "generation-3/result.json", "result.json", "cache-2/manifest.json"):
        (out / path).unlink()
    (out / "generation-3/metrics.jsonl").unlink()
    again = stages(*command(tiny, out))
    for one, other in zip(chain["generations"], again["generations"], strict=True):
        assert one["student"]["test"] == other["student"]["test"]
    assert again["ensemble"] == chain["ensemble"]


def test_a_chain_is_not_continued_with_other_settings(folder: Path, tiny: Path, stages: Stages) -> None:
    other = ["3" if word == 2 else word for word in command(tiny, folder)]
    assert "epochs 2 there, 3 asked" in stages.fails(1, *other)


def test_archs_make_a_chain_of_teacher_assistants(tiny: Path, tmp_path: Path, stages: Stages) -> None:
    asked = ("born-again", "--cache", tiny / "cache", "--archs", "mlp:32,16+mlp:8", *SHORT)
    found = stages(*asked, "--out", tmp_path / "ta")
    assert [generation["student"]["arch"] for generation in found["generations"]] == ["mlp:32,16", "mlp:8"]
    assert Cache(tmp_path / "ta/cache-1").teacher == "mlp:32,16"


def test_a_chain_with_hints_keeps_the_students_layers(tiny: Path, tmp_path: Path, stages: Stages) -> None:
    hint = ("--loss", "kd", "--loss", "hint:teacher=pool1")
    asked = ("born-again", "--cache", tiny / "cache", "--arch", "cnn", "--generations", 2, *SHORT, *hint)
    stages(*asked, "--out", tmp_path / "hinted")
    assert list(Cache(tmp_path / "hinted/cache-1").manifest.taps) == ["pool1"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--archs", "mlp:8+", "--generations", 2), "names an arch for each generation"),
        (("--archs", "mlp:8+mlp:4", "--arch", "cnn"), "leave out --arch"),
        (("--seeds", 2), "takes no"),
        (("--resume",), "takes no"),
        (("--archs", "mlp:8+resnt8"), "Did you mean"),
        (
            ("--archs", "mlp:8+cnn", "--loss", "hint:teacher=pool1,student=layers.0"),
            "has no 'pool1'",
        ),
    ],
)
def test_what_a_chain_cannot_do_is_one_line(tiny: Path, tmp_path: Path, stages: Stages, more: Any, says: str) -> None:
    out = tmp_path / "wrong"
    assert says in stages.fails(2, "born-again", "--cache", tiny / "cache", *SHORT, *more, "--out", out)
    assert not out.exists()
