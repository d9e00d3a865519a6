"""Statistics of a layer's output: their formulas; all can be computed from a cached map, and none from another."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from softcache.base.errors import UsageError
from softcache.pipeline.cache.reader import CacheReader
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
from tests.helpers.caches import parse_printed_command
from tests.helpers.commands import Stages, tiny_cache_command
from tests.helpers.tensors import draw_normal

SHAPES = [(2, 3, 4, 4), (1, 5, 7, 6), (3, 2, 1, 1), (2, 4, 5, 3)]


def compute_by_hand(x: torch.Tensor, kind: str) -> np.ndarray:
    """The statistic, one pixel at a time, in plain Python."""
    B, C, H, W = x.shape
    rows = x.tolist()
    pixels = list(itertools.product(range(H), range(W)))
    if kind == "map":
        return x.numpy()
    if kind == "pool":
        return np.array([[math.fsum(row[c][i][j] for i, j in pixels) / (H * W) for c in range(C)] for row in rows])
    if kind == "attention":
        energy = [[math.fsum(row[c][i][j] ** 2 for c in range(C)) / C for i, j in pixels] for row in rows]
        norms = [math.sqrt(math.fsum(v * v for v in row)) for row in energy]
        return np.array([[v / n for v in row] for row, n in zip(energy, norms, strict=True)]).reshape(B, H, W)
    if kind == "gram":
        gram = np.zeros((B, H * W, H * W))
        for b, c in itertools.product(range(B), range(C)):
            flat = [rows[b][c][i][j] for i, j in pixels]
            norm = math.sqrt(math.fsum(v * v for v in flat))
            for p, q in itertools.product(range(H * W), repeat=2):
                gram[b, p, q] += flat[p] / norm * flat[q] / norm / C
        return gram
    n = int(kind.removeprefix("grid"))
    grid = np.zeros((B, C, n, n))
    for b, c, i, j in itertools.product(range(B), range(C), range(n), range(n)):
        cell = [
            rows[b][c][row][column]
            for row in range(i * H // n, -(-(i + 1) * H // n))
            for column in range(j * W // n, -(-(j + 1) * W // n))
        ]
        grid[b, c, i, j] = math.fsum(cell) / len(cell)
    return grid


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_statistic_equals_its_formula(shape: tuple[int, ...], kind: str) -> None:
    x = draw_normal(*shape)
    statistic = compute_statistic(x, kind, "layer3")
    assert statistic.dtype == torch.float64
    np.testing.assert_allclose(statistic.numpy(), compute_by_hand(x, kind), rtol=1e-12, atol=1e-14)
    assert compute_statistic(x.float(), kind).dtype == torch.float32


def test_every_statistic_is_compared_with_its_formula() -> None:
    """A new statistic needs a branch in compute_by_hand."""
    assert set(STATISTICS) == {"map", "pool", "attention", "gram", "grid1", "grid2", "grid4"}


def test_a_vector_and_tokens_have_only_the_map_and_the_mean() -> None:
    vector, tokens = draw_normal(3, 5), draw_normal(3, 4, 5)
    assert compute_statistic(vector, "map") is vector
    assert compute_statistic(vector, "pool") is vector
    assert torch.equal(compute_statistic(tokens, "pool"), torch.stack([t.sum(0) / 4 for t in tokens]))
    for kind in ("attention", "gram", "grid1", "grid2", "grid4"):
        for x, shape in ((vector, "5"), (tokens, "4x5")):
            with pytest.raises(
                UsageError, match=f"tap 'relu1:{kind}': 'relu1' outputs {shape}, and {kind} needs a map"
            ):
                compute_statistic(x, kind, "relu1")
    with pytest.raises(UsageError, match="outputs 2x2x2x2, and pool needs a map CxHxW"):
        compute_statistic(draw_normal(1, 2, 2, 2, 2), "pool", "conv")


def test_statistics_of_zeros_are_zeros_and_not_nan() -> None:
    for kind in STATISTICS:
        assert (compute_statistic(torch.zeros(2, 3, 4, 4), kind) == 0).all()


def test_a_tap_is_parsed_and_has_one_name() -> None:
    assert parse_tap("layer3") == parse_tap("layer3:map") == ("layer3", "map")
    assert parse_tap("layer3.0.bn2:grid2") == ("layer3.0.bn2", "grid2")
    assert normalize_tap("layer3:map") == normalize_tap("layer3") == "layer3"
    assert normalize_tap("layer3:pool") == "layer3:pool"
    for tap, hint in (("layer3:pol", "pool"), ("layer3:", ""), ("layer3:grid3", "grid"), ("a:pool:pool", "pool")):
        with pytest.raises(UsageError, match=f"no statistic of tap '{tap}'.*{hint}.*There are: attention, gram"):
            parse_tap(tap)


def test_every_statistic_can_be_computed_from_a_cached_map_and_from_no_other_statistic() -> None:
    for kind in STATISTICS:
        assert find_source_tap(f"layer3:{kind}", ["layer2", "layer3"]) == "layer3"
        assert find_source_tap(f"layer3:{kind}", ["layer3:map"]) == "layer3:map"
        for other in STATISTICS[1:]:
            expected = f"layer3:{other}" if kind == other else None
            assert find_source_tap(f"layer3:{kind}", [f"layer3:{other}", "layer2"]) == expected
    assert find_source_tap("layer3:pool", ["layer3", "layer3:pool"]) == "layer3:pool", (
        "a cached statistic is used before the map"
    )
    assert find_source_tap("layer3", []) is None
    assert find_source_tap("layer3", ["layer3:pool"]) is None


def test_derived_features_are_float32_and_cached_statistics_are_not_computed_again() -> None:
    x, pool = draw_normal(3, 4, 4, 4).half(), draw_normal(3, 4).half()
    derived = derive_features(
        {"layer3": x, "layer2:pool": pool}, [*(f"layer3:{kind}" for kind in STATISTICS), "layer2:pool"]
    )
    assert list(derived) == [*(f"layer3:{kind}" for kind in STATISTICS), "layer2:pool"]
    for kind in STATISTICS:
        assert derived[f"layer3:{kind}"].dtype == torch.float32
        assert torch.equal(derived[f"layer3:{kind}"], compute_statistic(x.float(), kind))
    assert torch.equal(derived["layer2:pool"], pool.float())
    with pytest.raises(KeyError, match="layer2"):
        derive_features({"layer2:pool": pool}, ["layer2"])


def test_a_vector_is_a_map_of_one_pixel() -> None:
    x = draw_normal(2, 3)
    assert torch.equal(to_feature_map(x), x.view(2, 3, 1, 1))
    assert to_feature_map(x.view(2, 3, 1, 1)).shape == (2, 3, 1, 1)
    with pytest.raises(UsageError, match="features of 3x4 are neither a map CxHxW nor a vector"):
        to_feature_map(draw_normal(2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tapped_statistic_equals_that_of_the_tapped_map_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = build("resnet8", 5, 1, 16).eval()
    taps = ("layer3", *(f"layer3:{kind}" for kind in STATISTICS[1:]))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.no_grad(), autocast, capture_features(network, taps) as features:
        network(torch.rand(3, 1, 16, 16))
    assert features["layer3"].dtype == dtype
    for kind in STATISTICS[1:]:
        assert features[f"layer3:{kind}"].dtype == torch.float32
        assert torch.equal(features[f"layer3:{kind}"], compute_statistic(features["layer3"].float(), kind))


def test_gradients_flow_through_a_tapped_statistic() -> None:
    network = build("resnet8", 5, 1, 16)
    for kind in STATISTICS:
        network.zero_grad()
        with capture_features(network, (f"layer2:{kind}",)) as features:
            network(torch.rand(3, 1, 16, 16))
        (features[f"layer2:{kind}"] * torch.rand_like(features[f"layer2:{kind}"])).sum().backward()
        assert network.conv1.weight.grad.abs().sum() > 0  # type: ignore[union-attr,operator]


# Through the commands


TAPS = "layer3:pool,layer2:attention,layer3:grid2,layer3:gram,layer3:map"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a resnet8 as `runs/teacher` and its cache `cache`, of 2 draws and the taps TAPS."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("statistics")
    main(["teacher", "--train-size", "100", "--arch", "resnet8", "--epochs", "1", "--out", f"{folder}/runs/teacher"])
    command = tiny_cache_command(folder)
    for option, value in (("--taps", TAPS), ("--train-size", "100"), ("--draws", "2")):
        command[command.index(option) + 1] = value
    main(command)
    return folder


def test_a_cache_stores_the_statistics_of_its_taps(home: Path, stages: Stages) -> None:
    cache = CacheReader(home / "cache")
    shapes = {"layer3:pool": [64], "layer2:attention": [4, 4], "layer3:grid2": [64, 2, 2], "layer3:gram": [4, 4]}
    assert {tap: list(shape) for tap, shape in cache.manifest.taps.items()} == shapes | {"layer3": [64, 2, 2]}
    features = cache.read_targets("train", 1, np.arange(20), tuple(cache.manifest.taps))[1]
    for tap in ("layer3:pool", "layer3:grid2", "layer3:gram"):
        derived = derive_features({"layer3": features["layer3"]}, [tap])[tap]
        torch.testing.assert_close(features[tap].float(), derived, rtol=2e-3, atol=2e-3)
    stages("check-cache", home / "cache", "--deep", "--weights", home / "runs/teacher")


def test_the_message_for_a_missing_statistic_has_the_command_that_adds_it(home: Path, stages: Stages) -> None:
    shutil.copytree(home / "runs/teacher", "teacher")
    make = ("teacher-cache", "--train-size", 100, "--weights", "teacher", "--views", "crop:pad=1", "--draws", 2)
    stages(*make, "--taps", "layer3:pool", "--out", "c")
    student = ("student", "--cache", "c", "--arch", "resnet8", "--epochs", 1, "--loss", "kd")
    student += ("--loss", "attention:teacher=layer2+layer3")
    line = stages.fails(1, *student, "--out", "r")
    assert "does not contain layer2:attention, layer3:attention (it has: layer3:pool)" in line
    assert not Path("r").exists()
    code, _, err = stages.call(*parse_printed_command(line))
    assert code == 0, err
    assert set(CacheReader(Path("c")).manifest.taps) == {"layer3:pool", "layer2:attention", "layer3:attention"}
    result = stages(*student, "--out", "r")
    assert json.loads(Path("r/cache.json").read_text())["taps"] == ["layer2:attention", "layer3:attention"]
    assert result["student"]["test"]["nll"] > 0


@pytest.mark.parametrize("spec", ["attention", "nst", "rkd", "cat_kd", "srrl", "crd:negatives=20,"])
def test_a_loss_on_any_statistic_trains_from_the_cached_map(home: Path, stages: Stages, spec: str) -> None:
    spec += "teacher=layer3" if spec.endswith(",") else ":teacher=layer3"
    if spec.startswith("attention"):  # of layer3 only the map is cached
        assert "layer3:attention" not in CacheReader(home / "cache").manifest.taps
    student = ("student", "--cache", home / "cache", "--arch", "resnet8", "--epochs", 1, "--learning-rate", 0.01)
    stages(*student, "--loss", "kd", "--loss", spec, "--out", "r")
    term = json.loads(Path("r/metrics.jsonl").read_text())[f"loss_{spec.partition(':')[0]}"]
    assert math.isfinite(term)
    assert term > 0


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ("layer3:pol", "no statistic of tap 'layer3:pol' 'pol'. Did you mean 'pool'?"),
        ("linear:gram", "tap 'linear:gram': 'linear' outputs 10, and gram needs a map CxHxW"),
        ("layer4:pool", "no tap 'layer4'. Did you mean 'layer"),
    ],
)
def test_an_unknown_or_impossible_statistic_is_refused_in_one_line(
    home: Path, stages: Stages, taps: str, message: str
) -> None:
    line = stages.fails(
        2, "teacher-cache", "--train-size", 50, "--weights", home / "runs/teacher", "--taps", taps, "--out", "c"
    )
    assert message in line
