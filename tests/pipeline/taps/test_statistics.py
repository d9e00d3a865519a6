"""Statistics of a layer's output are their formulas; one cached map serves all of them, a statistic itself alone."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from softcache.base.errors import UsageError
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.models import build
from softcache.pipeline.taps.hooks import capture_features
from softcache.pipeline.taps.statistics import (
    STATISTICS,
    compute_statistic,
    derive_features,
    find_source_tap,
    normalize_tap,
    parse_tap,
    to_feature_map,
)
from tests.helpers.caches import printed_command
from tests.helpers.commands import Stages, tiny_cache_command
from tests.helpers.tensors import numbers

SHAPES = [(2, 3, 4, 4), (1, 5, 7, 6), (3, 2, 1, 1), (2, 4, 5, 3)]


def by_hand(x: torch.Tensor, kind: str) -> np.ndarray:
    """Place by place, in plain Python."""
    B, C, H, W = x.shape
    rows = x.tolist()
    places = list(itertools.product(range(H), range(W)))
    if kind == "map":
        return x.numpy()
    if kind == "pool":
        return np.array([[math.fsum(row[c][i][j] for i, j in places) / (H * W) for c in range(C)] for row in rows])
    if kind == "attention":
        energy = [[math.fsum(row[c][i][j] ** 2 for c in range(C)) / C for i, j in places] for row in rows]
        norms = [math.sqrt(math.fsum(v * v for v in row)) for row in energy]
        return np.array([[v / n for v in row] for row, n in zip(energy, norms, strict=True)]).reshape(B, H, W)
    if kind == "gram":
        made = np.zeros((B, H * W, H * W))
        for b, c in itertools.product(range(B), range(C)):
            flat = [rows[b][c][i][j] for i, j in places]
            norm = math.sqrt(math.fsum(v * v for v in flat))
            for p, q in itertools.product(range(H * W), repeat=2):
                made[b, p, q] += flat[p] / norm * flat[q] / norm / C
        return made
    n = int(kind.removeprefix("grid"))
    made = np.zeros((B, C, n, n))
    for b, c, i, j in itertools.product(range(B), range(C), range(n), range(n)):
        cell = [
            rows[b][c][y][x_]
            for y in range(i * H // n, -(-(i + 1) * H // n))
            for x_ in range(j * W // n, -(-(j + 1) * W // n))
        ]
        made[b, c, i, j] = math.fsum(cell) / len(cell)
    return made


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_statistic_is_its_formula(shape: tuple[int, ...], kind: str) -> None:
    x = numbers(*shape)
    found = compute_statistic(x, kind, "layer3")
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), by_hand(x, kind), rtol=1e-12, atol=1e-14)
    assert compute_statistic(x.float(), kind).dtype == torch.float32


def test_every_statistic_is_compared_with_its_formula() -> None:
    """A new one needs a branch in by_hand: without it, its name is no grid."""
    assert set(STATISTICS) == {"map", "pool", "attention", "gram", "grid1", "grid2", "grid4"}


def test_of_a_vector_and_of_tokens_there_is_the_map_and_the_mean() -> None:
    vector, tokens = numbers(3, 5), numbers(3, 4, 5)
    assert compute_statistic(vector, "map") is vector
    assert compute_statistic(vector, "pool") is vector
    assert torch.equal(compute_statistic(tokens, "pool"), torch.stack([t.sum(0) / 4 for t in tokens]))
    for kind in ("attention", "gram", "grid1", "grid2", "grid4"):
        for x, shape in ((vector, "5"), (tokens, "4x5")):
            with pytest.raises(UsageError, match=f"tap 'relu1:{kind}': 'relu1' gives {shape}, and {kind} is of a map"):
                compute_statistic(x, kind, "relu1")
    with pytest.raises(UsageError, match="gives 2x2x2x2, and pool is of a map CxHxW"):
        compute_statistic(numbers(1, 2, 2, 2, 2), "pool", "conv")


def test_statistics_of_zeros_are_zeros_and_not_nan() -> None:
    for kind in STATISTICS:
        assert (compute_statistic(torch.zeros(2, 3, 4, 4), kind) == 0).all()


def test_the_one_name_of_a_tap() -> None:
    assert parse_tap("layer3") == parse_tap("layer3:map") == ("layer3", "map")
    assert parse_tap("layer3.0.bn2:grid2") == ("layer3.0.bn2", "grid2")
    assert normalize_tap("layer3:map") == normalize_tap("layer3") == "layer3"
    assert normalize_tap("layer3:pool") == "layer3:pool"
    for wrong, meant in (("layer3:pol", "pool"), ("layer3:", ""), ("layer3:grid3", "grid"), ("a:pool:pool", "pool")):
        with pytest.raises(UsageError, match=f"no statistic of tap '{wrong}'.*{meant}.*There are: attention, gram"):
            parse_tap(wrong)


def test_a_map_that_is_cached_serves_every_statistic_and_a_statistic_itself_alone() -> None:
    for kind in STATISTICS:
        assert find_source_tap(f"layer3:{kind}", ["layer2", "layer3"]) == "layer3"
        assert find_source_tap(f"layer3:{kind}", ["layer3:map"]) == "layer3:map"
        for other in STATISTICS[1:]:
            expected = f"layer3:{other}" if kind == other else None
            assert find_source_tap(f"layer3:{kind}", [f"layer3:{other}", "layer2"]) == expected
    assert find_source_tap("layer3:pool", ["layer3", "layer3:pool"]) == "layer3:pool", "what is there need not be made"
    assert find_source_tap("layer3", []) is None
    assert find_source_tap("layer3", ["layer3:pool"]) is None


def test_what_is_derived_of_float16_is_the_statistic_in_float32_and_what_is_there_is_left_as_it_is() -> None:
    x, pool = numbers(3, 4, 4, 4).half(), numbers(3, 4).half()
    made = derive_features(
        {"layer3": x, "layer2:pool": pool}, [*(f"layer3:{kind}" for kind in STATISTICS), "layer2:pool"]
    )
    assert list(made) == [*(f"layer3:{kind}" for kind in STATISTICS), "layer2:pool"]
    for kind in STATISTICS:
        assert made[f"layer3:{kind}"].dtype == torch.float32
        assert torch.equal(made[f"layer3:{kind}"], compute_statistic(x.float(), kind))
    assert torch.equal(made["layer2:pool"], pool.float())
    with pytest.raises(KeyError, match="layer2"):
        derive_features({"layer2:pool": pool}, ["layer2"])


def test_a_vector_is_a_map_of_one_place() -> None:
    x = numbers(2, 3)
    assert torch.equal(to_feature_map(x), x.view(2, 3, 1, 1))
    assert to_feature_map(x.view(2, 3, 1, 1)).shape == (2, 3, 1, 1)
    with pytest.raises(UsageError, match="features of 3x4 are neither a map CxHxW nor a vector"):
        to_feature_map(numbers(2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tapped_statistic_is_that_of_the_tapped_map_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = build("resnet8", 5, 1, 16).eval()
    taps = ("layer3", *(f"layer3:{kind}" for kind in STATISTICS[1:]))
    half = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.no_grad(), half, capture_features(network, taps) as kept:
        network(torch.rand(3, 1, 16, 16))
    assert kept["layer3"].dtype == dtype
    for kind in STATISTICS[1:]:
        assert kept[f"layer3:{kind}"].dtype == torch.float32
        assert torch.equal(kept[f"layer3:{kind}"], compute_statistic(kept["layer3"].float(), kind))


def test_gradients_flow_through_a_tapped_statistic() -> None:
    network = build("resnet8", 5, 1, 16)
    for kind in STATISTICS:
        network.zero_grad()
        with capture_features(network, (f"layer2:{kind}",)) as kept:
            network(torch.rand(3, 1, 16, 16))
        (kept[f"layer2:{kind}"] * torch.rand_like(kept[f"layer2:{kind}"])).sum().backward()
        assert network.conv1.weight.grad.abs().sum() > 0  # type: ignore[union-attr,operator]


# Through the commands


TAPS = "layer3:pool,layer2:attention,layer3:grid2,layer3:gram,layer3:map"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a resnet8 as `runs/teacher` and its cache `cache`, of 2 draws and of statistics."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("statistics")
    asked = ["--arch", "resnet8", "--epochs", "1", "--out", f"{folder}/runs/teacher"]
    main(["teacher", "--train-size", "100", *asked])
    command = tiny_cache_command(folder)
    for knob, value in (("--taps", TAPS), ("--train-size", "100"), ("--draws", "2")):
        command[command.index(knob) + 1] = value
    main(command)
    return folder


def test_a_cache_keeps_the_statistics_that_it_is_asked_for(home: Path, stages: Stages) -> None:
    cache = Cache(home / "cache")
    shapes = {"layer3:pool": [64], "layer2:attention": [4, 4], "layer3:grid2": [64, 2, 2], "layer3:gram": [4, 4]}
    assert {tap: list(shape) for tap, shape in cache.manifest.taps.items()} == shapes | {"layer3": [64, 2, 2]}
    features = cache.read_targets("train", 1, np.arange(20), tuple(cache.manifest.taps))[1]
    for tap in ("layer3:pool", "layer3:grid2", "layer3:gram"):
        made = derive_features({"layer3": features["layer3"]}, [tap])[tap]
        torch.testing.assert_close(features[tap].float(), made, rtol=2e-3, atol=2e-3)
    stages("check-cache", home / "cache", "--deep", "--weights", home / "runs/teacher")


def test_a_student_is_told_how_to_add_the_statistic_that_it_wants_and_then_trains(home: Path, stages: Stages) -> None:
    shutil.copytree(home / "runs/teacher", "teacher")
    make = ("teacher-cache", "--train-size", 100, "--weights", "teacher", "--views", "crop:pad=1", "--draws", 2)
    stages(*make, "--taps", "layer3:pool", "--out", "c")
    asked = ("student", "--cache", "c", "--arch", "resnet8", "--epochs", 1, "--loss", "kd")
    asked += ("--loss", "attention:teacher=layer2+layer3")
    line = stages.fails(1, *asked, "--out", "r")
    assert "does not contain layer2:attention, layer3:attention (it has: layer3:pool)" in line
    assert not Path("r").exists()
    code, _, err = stages.call(*printed_command(line))
    assert code == 0, err
    assert set(Cache(Path("c")).manifest.taps) == {"layer3:pool", "layer2:attention", "layer3:attention"}
    result = stages(*asked, "--out", "r")
    assert json.loads(Path("r/cache.json").read_text())["taps"] == ["layer2:attention", "layer3:attention"]
    assert result["student"]["test"]["nll"] > 0


@pytest.mark.parametrize("spec", ["attention", "nst", "rkd", "cat_kd", "srrl", "crd:negatives=20,"])
def test_a_cached_map_serves_a_loss_on_any_of_its_statistics(home: Path, stages: Stages, spec: str) -> None:
    spec += "teacher=layer3" if spec.endswith(",") else ":teacher=layer3"
    if spec.startswith("attention"):  # of layer3 only the map is there
        assert "layer3:attention" not in Cache(home / "cache").manifest.taps
    asked = ("student", "--cache", home / "cache", "--arch", "resnet8", "--epochs", 1, "--learning-rate", 0.01)
    stages(*asked, "--loss", "kd", "--loss", spec, "--out", "r")
    term = json.loads(Path("r/metrics.jsonl").read_text())[f"loss_{spec.partition(':')[0]}"]
    assert math.isfinite(term)
    assert term > 0


@pytest.mark.parametrize(
    ("taps", "says"),
    [
        ("layer3:pol", "no statistic of tap 'layer3:pol' 'pol'. Did you mean 'pool'?"),
        ("linear:gram", "tap 'linear:gram': 'linear' gives 10, and gram is of a map CxHxW"),
        ("layer4:pool", "no tap 'layer4'. Did you mean 'layer"),
    ],
)
def test_a_statistic_that_does_not_exist_is_refused_in_one_line(
    home: Path, stages: Stages, taps: str, says: str
) -> None:
    line = stages.fails(
        2, "teacher-cache", "--train-size", 50, "--weights", home / "runs/teacher", "--taps", taps, "--out", "c"
    )
    assert says in line
