"""`softcache inspect`: informative taps and channels rank first, and its numbers are those of independent loops."""

import csv
import json
import math
import shlex
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression

from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.metrics.classification import evaluate
from softcache.pipeline.metrics.soft_targets import (
    TEMPERATURES,
    calibration,
    most_confused,
    similarity,
    soft_target_statistics,
)
from softcache.stages.inspect.linear_probe import (
    MAX_COLUMNS,
    GatheredProbe,
    describe_tap,
    fit_probe,
    measure_importance,
    read_columns,
)
from softcache.stages.main import main
from tests.helpers.caches import save_pets, save_pets_teacher
from tests.helpers.commands import Stages

Floats = NDArray[np.float64]
TEACHER = """
import torch
class Noise(torch.nn.Module):
    "Six numbers that depend on the image, and have no information on its class."
    def forward(self, x):
        waves = torch.arange(1, 65) * torch.arange(1, 7)[:, None] % 61 + 0.5
        return torch.sin(x.flatten(1) @ waves.T * 1e4)
class Net(torch.nn.Module):
    "Predicts the class with the nearest mean image."
    def __init__(self):
        super().__init__()
        self.images, self.noise = torch.nn.Identity(), Noise()
        self.columns, self.linear = torch.nn.Flatten(), torch.nn.Linear(64, 10)
    def forward(self, x):
        return self.linear(self.columns(self.images(x))) + 0 * self.noise(x).sum(1, keepdim=True)
def make(classes, channels, size): return Net()
"""


def save_teacher(folder: Path, name: str) -> None:
    """Write folder/NAME.py and its weights, folder/w.pt."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    means = np.stack([pixels[labels == c].mean(0) / 16 for c in range(10)])
    (folder / f"{name}.py").write_text(TEACHER)
    weights = {"linear.weight": torch.tensor(means), "linear.bias": torch.tensor(-(means**2).sum(1) / 2)}
    torch.save({name: 2 * x.float() for name, x in weights.items()}, folder / "w.pt")


def make_cache(folder: Path, name: str, *options: object) -> Path:
    """Make a cache `c` of digits by that teacher."""
    save_teacher(folder, name)
    command = ("teacher-cache", "--teacher", f"{name}:make", "--weights", "w.pt", "--normalize", "none")
    with chdir(folder):
        main([str(argument) for argument in (*command, *options, "--out", "c")])
    return folder / "c"


@pytest.fixture(scope="module")
def noise_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 600 training rows with the taps `noise`, which is random, and `columns`, which are the pixels."""
    return make_cache(
        tmp_path_factory.mktemp("noise"), "teacher_with_noise", "--train-size", 600, "--taps", "noise,columns"
    )


@pytest.fixture(scope="module")
def output(noise_cache: Path) -> Path:
    """The folder with the findings of its inspection."""
    out = noise_cache.parent / "output"
    main(["inspect", str(noise_cache), "--out", str(out), "--json"])
    return out


@pytest.fixture
def record(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "inspect.json").read_text())
    return content


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Taps and channels


def test_the_informative_tap_is_best_by_probe_and_by_importance_and_the_random_one_is_at_chance(
    record: dict[str, Any],
) -> None:
    noise, pixels = record["taps"]["noise"], record["taps"]["columns"]
    assert pixels["accuracy"] > 0.85
    assert noise["accuracy"] < 0.25
    assert pixels["importance"]["mean"] > 0.5
    assert abs(noise["importance"]["mean"]) < 0.1
    assert record["best"] == "columns"
    assert record["joint"]["majority"] < 0.15
    assert record["joint"]["teacher"] == record["calibration"]["val"]["accuracy"] > 0.8


def test_constant_pixels_are_not_among_the_most_important_channels(record: dict[str, Any]) -> None:
    """Pixels 0 and 32, at the edge of the digits, are always blank; channels are listed by importance."""
    channels = record["channels"]["columns"]
    means = [channel["mean"] for channel in channels]
    assert means == sorted(means, reverse=True)
    assert means[0] > 0.02
    assert not {0, 32} & {channel["channel"] for channel in channels[:5]}


def test_the_tables_have_the_values_of_the_record_and_the_plots_are_complete(
    output: Path, record: dict[str, Any]
) -> None:
    taps = {row["tap"]: row for row in read_table(output / "taps.csv")}
    for name, tap in record["taps"].items():
        assert float(taps[name]["accuracy"]) == tap["accuracy"]
        assert float(taps[name]["f1_macro"]) == tap["f1_macro"]
        assert float(taps[name]["importance_sd"]) == tap["importance"]["sd"]
    channels = read_table(output / "channels.csv")
    assert len(channels) == 64 + 6
    assert (
        int(next(row for row in channels if row["tap"] == "columns")["channel"])
        == (record["channels"]["columns"][0]["channel"])
    )
    assert {path.name for path in output.iterdir()} == {"inspect.json", *record["files"]}
    images = [name for name in record["files"] if name.endswith(".png")]
    assert len(images) == 5
    for name in images:
        content = (output / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert content.endswith(b"IEND\xaeB`\x82")


def test_a_probe_has_the_accuracy_of_scikit_learns_model_on_the_rows_of_the_cache(
    noise_cache: Path, record: dict[str, Any]
) -> None:
    cache, positions = CacheReader(noise_cache), {"train": np.arange(600), "val": np.arange(180)}
    x = {
        split: cache.read_targets(split, 0, rows, ("columns",))[1]["columns"].double().numpy()
        for split, rows in positions.items()
    }
    y = {split: cache.read_column(split, 0, "label") for split in positions}
    mean, sd = x["train"].mean(0), x["train"].std(0)
    sd[sd == 0] = 1
    model = LogisticRegression(max_iter=1000).fit((x["train"] - mean) / sd, y["train"])
    accuracy = float((model.predict((x["val"] - mean) / sd) == y["val"]).mean())
    assert record["taps"]["columns"]["accuracy"] == accuracy


def make_rows(classes: int) -> tuple[Floats, NDArray[np.int64]]:
    """Random columns [150, 9] that depend on their labels [150]."""
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, 150)
    return random.normal(size=(150, 9)) + np.eye(classes, 9)[labels], labels


@pytest.mark.parametrize("classes", [2, 4])
def test_the_importance_of_channels_is_that_of_scikit_learns_model(classes: int) -> None:
    x, labels = make_rows(classes)
    model = LogisticRegression(max_iter=1000).fit(x, labels)
    expected = permutation_importance(model, x, labels, n_repeats=4, random_state=3)
    steps: list[int] = []
    channels = tuple(slice(c, c + 1) for c in range(9))
    probe = fit_probe(x, labels)
    mean, sd = measure_importance(probe, x, labels, channels, repeats=4, seed=3, on_progress=steps.append)
    np.testing.assert_array_equal(mean, expected.importances_mean)
    np.testing.assert_array_equal(sd, expected.importances_std)
    assert sum(steps) == 1 + 4 * 9


def test_a_permuted_group_takes_all_its_columns_from_the_given_rows() -> None:
    x, labels = make_rows(3)
    probe, groups = fit_probe(x, labels), (slice(0, 2), slice(2, 7), slice(7, 9))
    rows = np.random.default_rng(1).integers(0, len(x), (len(x), 3)).astype(np.int32)
    gathered = np.concatenate([x[rows[:, g]][:, group] for g, group in enumerate(groups)], 1)
    expected = probe.compute_scores(gathered).argmax(1)
    assert (expected != probe.compute_scores(x).argmax(1)).any()
    np.testing.assert_array_equal(GatheredProbe(probe, x, groups).predict(rows), expected)


@pytest.mark.parametrize(
    ("tap", "shape", "columns", "channels"),
    [
        ("layer", [5, 4, 4], 5, 5),
        ("tokens", [7, 5], 5, 5),
        ("vector", [12], 12, 12),
        ("layer:attention", [4, 4], 16, 16),
        ("layer:grid2", [5, 2, 2], 20, 5),
        ("layer:grid4", [512, 4, 4], MAX_COLUMNS, 0),
    ],
)
def test_the_columns_and_channels_of_a_tap(tap: str, shape: list[int], columns: int, channels: int) -> None:
    form = describe_tap(tap, shape)
    assert form.columns == columns
    assert len(form.channels or ()) == channels
    if form.channels:
        assert [i for group in form.channels for i in range(columns)[group]] == list(range(columns))


def test_maps_are_read_as_the_mean_of_each_channel_and_wide_taps_are_projected_by_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = make_cache(tmp_path, "teacher_with_maps", "--train-size", 50, "--taps", "images,columns")
    cache, rows = CacheReader(name), np.arange(50)
    maps = cache.read_targets("train", 0, rows, ("images",))[1]["images"].double().numpy()
    steps: list[int] = []
    columns = read_columns(cache, "train", rows, "images", seed=0, on_progress=steps.append)
    np.testing.assert_allclose(columns, maps.mean((2, 3)), rtol=1e-6)
    assert sum(steps) == 50
    monkeypatch.setattr("softcache.stages.inspect.linear_probe.MAX_COLUMNS", 16)
    first, repeated, other_seed = (
        read_columns(cache, "train", rows, "columns", seed=seed, on_progress=steps.append) for seed in (0, 0, 1)
    )
    assert first.shape == (50, 16)
    np.testing.assert_array_equal(first, repeated)
    assert (first != other_seed).any()
    values = maps.reshape(50, 64)
    # Each value is added, with a random sign, to one column: with equal signs the sum of a row would be the same.
    for row in range(3):
        assert abs(first[row]).sum() <= values[row].sum() * (1 + 1e-12)
    ratio = (first**2).sum() / (values**2).sum()
    assert 0.5 < ratio < 2


# Calibration, similarity, temperatures


def read_logits(cache: CacheReader, split: str) -> tuple[Floats, NDArray[np.int64]]:
    labels = cache.read_column(split, 0, "label").astype(np.int64)
    return cache.read_targets(split, 0, np.arange(len(labels)))[0].double().numpy(), labels


@pytest.mark.parametrize("split", ["val", "test"])
def test_calibration_is_that_of_evaluate_and_of_its_bins(
    noise_cache: Path, output: Path, record: dict[str, Any], split: str
) -> None:
    logits, labels = read_logits(CacheReader(noise_cache), split)
    expected, actual = evaluate(logits, labels), record["calibration"][split]
    for key in ("accuracy", "ece", "nll"):
        assert actual[key] == pytest.approx(expected[key], rel=1e-12)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert actual["confidence"] == pytest.approx(p.max(1).mean(), rel=1e-12)
    bins = [row for row in read_table(output / "reliability.csv") if row["split"] == split]
    assert sum(int(row["rows"]) for row in bins) == len(labels)
    gaps = [
        int(row["rows"]) * abs(float(row["accuracy"]) - float(row["confidence"])) for row in bins if row["rows"] != "0"
    ]
    assert sum(gaps) / len(labels) == pytest.approx(expected["ece"], rel=1e-9)
    assert {row["accuracy"] for row in bins if row["rows"] == "0"} == {"n/a"}


def soften(logits: Floats, T: float) -> list[list[float]]:
    """Probabilities at temperature T, by a loop."""
    rows = []
    for row in logits:
        powers = [math.exp((z - max(row)) / T) for z in row]
        rows.append([power / math.fsum(powers) for power in powers])
    return rows


def entropy(p: list[float]) -> float:
    return -math.fsum(x * math.log(x) for x in p if x > 0)


def mutual_information(rows: list[list[float]]) -> float:
    """Entropy of the mean distribution minus the mean of the entropies."""
    mean = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    return entropy(mean) - math.fsum(map(entropy, rows)) / len(rows)


def test_entropies_and_information_are_those_of_a_loop(noise_cache: Path, record: dict[str, Any]) -> None:
    """By the chain rule, among rows of one first class: the information of the label minus that of whether it is the
    first class."""
    logits, labels = read_logits(CacheReader(noise_cache), "train")
    assert [r["temperature"] for r in record["soft_targets"]["temperatures"]] == list(TEMPERATURES)
    for actual in record["soft_targets"]["temperatures"]:
        rows = soften(logits, actual["temperature"])
        assert actual["entropy"] == pytest.approx(math.fsum(map(entropy, rows)) / len(rows), rel=1e-9)
        assert actual["share"] == pytest.approx(actual["entropy"] / math.log(10), rel=1e-12)
        others = [1 - row[c] for row, c in zip(rows, labels, strict=True)]
        assert actual["others"] == pytest.approx(math.fsum(others) / len(rows), rel=1e-9)
        information = 0.0
        for c in range(10):
            of_class = [row for row, z in zip(rows, logits, strict=True) if list(z).index(max(z)) == c]
            is_first = [[row[c], 1 - row[c]] for row in of_class]
            weight = len(of_class) / len(rows)
            information += weight * (mutual_information(of_class) - mutual_information(is_first))
        assert actual["information"] == pytest.approx(information, rel=1e-7, abs=1e-12)
    best = max(record["soft_targets"]["temperatures"], key=lambda statistics: statistics["information"])
    assert record["soft_targets"]["most_information_at"] == best["temperature"]


def compute_statistics(logits: Floats, target: NDArray[np.int64]) -> list[dict[str, Any]]:
    """The statistics at every temperature."""
    return [soft_target_statistics(logits, target, T) for T in TEMPERATURES]


def test_certain_and_wrong_targets_have_no_information_besides_their_first_class() -> None:
    logits, target = 1e6 * np.eye(3)[[0, 0, 0, 1]], np.array([0, 1, 2, 1])
    assert all((s["information"], s["others"]) == (0, 0.5) for s in compute_statistics(logits, target))


def test_hard_flat_and_equal_targets_of_a_class_have_no_information() -> None:
    target = np.array([0, 0, 1, 1])
    hard = 1e6 * np.eye(5)[target]
    assert all(s["information"] == 0 == s["others"] for s in compute_statistics(hard, target))
    flat = np.zeros((4, 5))
    assert all(s["information"] == pytest.approx(0, abs=1e-15) for s in compute_statistics(flat, target))
    equal = np.array([[4.0, 3, 1, 0, 0], [0, 5, 2, 1, 0]])[target]
    assert all(s["information"] == pytest.approx(0, abs=1e-15) for s in compute_statistics(equal, target))
    equal[1] = [4, 1, 3, 0, 0]
    assert all(s["information"] > 1e-4 for s in compute_statistics(equal, target))


def test_similarity_is_the_mean_soft_target_of_each_class(
    noise_cache: Path, output: Path, record: dict[str, Any]
) -> None:
    logits, labels = read_logits(CacheReader(noise_cache), "val")
    rows = read_table(output / "similarity.csv")
    matrix = [[float(row[str(c)]) for c in range(10)] for row in rows]
    probabilities = np.array(soften(logits, 4.0))
    expected = np.stack([probabilities[labels == c].mean(0) for c in range(10)])
    np.testing.assert_allclose(matrix, expected, rtol=1e-9)
    off_diagonal = {(i, j): expected[i, j] for i in range(10) for j in range(10) if i != j}
    i, j = max(off_diagonal, key=lambda pair: off_diagonal[pair])
    first = record["most_confused"][0]
    assert (first["true"], first["other"]) == (str(i), str(j))
    assert first["probability"] == pytest.approx(off_diagonal[i, j], rel=1e-9)


def test_a_class_without_rows_has_no_similarity_and_no_accuracy() -> None:
    logits, labels = np.array([[2.0, 1, 0], [0, 2, 1]]), np.array([0, 1])
    matrix = similarity(logits, labels, 1.0)
    assert np.isnan(matrix[2]).all()
    assert [i for i, _, _ in most_confused(matrix, 10)].count(2) == 0
    assert calibration(logits, labels)["class_accuracy"] == [1, 1, None]


# Missing labels, taps and classes


def test_a_val_split_without_some_of_the_classes(stages: Stages, tmp_path: Path) -> None:
    cache = make_cache(
        tmp_path, "teacher_few", "--val-fraction", 0.0035, "--train-size", 200, "--taps", "columns,noise"
    )
    record = stages("inspect", cache, "--out", "o")
    missing = record["joint"]["classes_without_rows"]
    assert len(missing) == 5 == record["joint"]["rows"]
    rows = read_table(Path("o/similarity.csv"))
    for c, row in enumerate(rows):
        assert (set(list(row.values())[1:]) == {"n/a"}) == (c in missing)
        assert (record["calibration"]["val"]["class_accuracy"][c] is None) == (c in missing)
    assert {int(pair["true"]) for pair in record["most_confused"]}.isdisjoint(missing)
    code, out, _ = stages.call("inspect", cache, "--out", "p")
    assert code == 0
    assert "5 classes have no rows in val: n/a" in out


def test_without_taps_the_logits_are_inspected_and_the_way_to_taps_is_printed(stages: Stages, tmp_path: Path) -> None:
    cache = make_cache(tmp_path, "teacher_without_taps", "--train-size", 100)
    code, out, _ = stages.call("inspect", cache, "--out", "o")
    assert code == 0
    assert "the cache has no taps: the same teacher-cache command with --taps adds them" in out
    assert "carries the most information" in out
    assert "best tap" not in out
    record = json.loads(Path("o/inspect.json").read_text())
    assert record["taps"] == {} == record["channels"]
    assert record["best"] is record["command"] is None
    assert set(record["calibration"]) == {"val", "test"}
    assert not Path("o/taps.csv").exists()
    assert Path("o/similarity.png").exists()


def test_without_labels_only_soft_targets_are_inspected(stages: Stages, tmp_path: Path, save_image: Any) -> None:
    for k in range(12):
        save_image(tmp_path / "pets" / f"{k}.png", k=k)
    save_pets_teacher(tmp_path / "pets.pt")
    stages(
        "teacher-cache",
        "--data",
        "folder:pets",
        "--teacher",
        "mlp:4",
        "--weights",
        "pets.pt",
        "--normalize",
        "none",
        "--views",
        "crop:pad=1",
        "--taps",
        "hidden1",
        "--out",
        "c",
    )
    code, out, _ = stages.call("inspect", "c", "--out", "o")
    assert code == 0
    assert "the training rows have no labels: no probe of the taps" in out
    assert "the held-out rows have no labels: no calibration" in out
    record = json.loads(Path("o/inspect.json").read_text())
    assert record["files"] == ["temperatures.csv", "temperatures.png"]
    soft_targets = record["soft_targets"]
    assert soft_targets["by_own_class"] == soft_targets["rows"] == CacheReader(Path("c")).manifest.splits["train"]


def test_mixed_views_have_no_probe(stages: Stages, tmp_path: Path) -> None:
    cache = make_cache(
        tmp_path, "teacher_mixed", "--train-size", 100, "--taps", "columns", "--views", "crop:pad=1,mixup=1"
    )
    code, out, _ = stages.call("inspect", cache, "--out", "o")
    assert code == 0
    assert "mix two images and have no single label: no probe" in out
    assert json.loads(Path("o/inspect.json").read_text())["soft_targets"]["by_own_class"] == 100


@pytest.mark.parametrize("loss", ["hint:teacher=hidden1", "concat_hint:teacher=hidden1"])
def test_the_suggested_command_runs_with_two_classes(
    stages: Stages, tmp_path: Path, save_image: Any, loss: str
) -> None:
    save_pets(tmp_path / "pets", save_image)
    save_pets_teacher(tmp_path / "pets.pt")
    tap = "hidden1" if loss.startswith("hint") else "hidden1:pool"
    stages(
        "teacher-cache",
        "--data",
        "folder:pets",
        "--teacher",
        "mlp:4",
        "--weights",
        "pets.pt",
        "--normalize",
        "none",
        "--views",
        "crop:pad=1",
        "--taps",
        tap,
        "--out",
        "c",
    )
    record = stages("inspect", "c", "--out", "o")
    assert record["best"] == tap
    assert record["taps"][tap]["columns"] == 4
    arguments = shlex.split(record["command"].partition(" -m softcache ")[2])
    assert arguments[-4:] == ["--loss", "kd", "--loss", loss]
    arguments[arguments.index("folder:PATH")] = "folder:pets"
    assert stages(*arguments, "--epochs", 1)["student"]["arch"] == "mlp:4"


def test_a_sample_is_named_as_one_and_the_same_seed_gives_the_same_findings(stages: Stages, noise_cache: Path) -> None:
    first = stages("inspect", noise_cache, "--rows", 120, "--repeats", 2, "--seed", 7)
    repeated = stages("inspect", noise_cache, "--rows", 120, "--repeats", 2, "--seed", 7)
    assert (first["joint"]["train_rows"], first["joint"]["train_of"]) == (120, 600)
    assert first["joint"]["rows"] == 120
    assert first["calibration"]["val"]["rows"] == 180
    keys = first.keys() - {"seconds", "settings"}
    assert repeated.keys() == first.keys()
    assert {key: first[key] for key in keys} == {key: repeated[key] for key in keys}
    assert [record["settings"]["out"] for record in (first, repeated)] == ["runs/inspect-c-1", "runs/inspect-c-2"]
    _, out, _ = stages.call("inspect", noise_cache, "--rows", 120, "--repeats", 2, "--seed", 8)
    assert json.loads(Path("runs/inspect-c-3/inspect.json").read_text())["channels"] != first["channels"]
    assert "trained on a random sample of 120 of 600 training rows of draw 0" in out
    assert out.splitlines()[-1].startswith("best tap: columns; a student with a hint from it:  ")


def test_the_suggested_arch_is_a_placeholder_where_the_manifest_names_code(record: dict[str, Any]) -> None:
    assert "--arch my_package.module:factory --loss kd --loss hint:teacher=columns" in record["command"]


def test_missing_matplotlib_is_reported_in_one_line_before_any_work(
    stages: Stages, noise_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(CacheReader, "read_rows", lambda *_: pytest.fail("rows were read"))
    error = stages.fails(2, "inspect", noise_cache)
    assert error == ("Error: inspect draws with matplotlib, which is not installed: pip install -e '.[report]'")
    assert not Path("runs").exists()


def test_a_folder_that_is_not_empty_is_refused_and_left_as_it_is(stages: Stages, noise_cache: Path) -> None:
    Path("o").mkdir()
    Path("o/mine").write_text("mine")
    error = stages.fails(2, "inspect", noise_cache, "--out", "o")
    assert error == "Error: 'o' exists and is not empty: choose another --out"
    assert [path.name for path in Path("o").iterdir()] == ["mine"]


def test_features_that_are_not_finite_and_a_missing_cache_are_refused(stages: Stages, noise_cache: Path) -> None:
    assert "nowhere" in stages.fails(1, "inspect", "nowhere")
    read_rows = CacheReader.read_rows

    def read_rows_with_nan(self: CacheReader, split: str, draw: int, name: str, positions: Any) -> Any:
        rows = read_rows(self, split, draw, name, positions)
        return rows if name != "features/noise" else np.where(positions[:, None] == 3, np.nan, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheReader, "read_rows", read_rows_with_nan)
        assert "tap 'noise' of train has values that are not finite" in stages.fails(1, "inspect", noise_cache)


def test_class_names_are_plain_text_in_plots(tmp_path: Path) -> None:
    from softcache.stages.cli.plot_style import plot_text, save_png
    from softcache.stages.inspect.plots import plot_similarity

    assert plot_text("a$b\n") == r"a\$b?"
    names = [r"$\frac{x$", "犬", "a very long name of a class that would push everything aside"]
    save_png(tmp_path / "s.png", plot_similarity(np.full((3, 3), 0.3), names, "what"))
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
