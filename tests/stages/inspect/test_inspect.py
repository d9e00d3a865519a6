"""`softcache inspect`: it ranks what is informative, its figures are those of independent loops."""

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

from softcache.pipeline.cache.reader import Cache
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
    "Six numbers that follow from the image and say nothing about it."
    def forward(self, x):
        waves = torch.arange(1, 65) * torch.arange(1, 7)[:, None] % 61 + 0.5
        return torch.sin(x.flatten(1) @ waves.T * 1e4)
class Net(torch.nn.Module):
    "The class whose mean image is nearest."
    def __init__(self):
        super().__init__()
        self.images, self.noise = torch.nn.Identity(), Noise()
        self.columns, self.linear = torch.nn.Flatten(), torch.nn.Linear(64, 10)
    def forward(self, x):
        return self.linear(self.columns(self.images(x))) + 0 * self.noise(x).sum(1, keepdim=True)
def make(classes, channels, size): return Net()
"""


def save_teacher(folder: Path, name: str) -> None:
    """folder/NAME.py and its weights, folder/w.pt."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    means = np.stack([pixels[labels == c].mean(0) / 16 for c in range(10)])
    (folder / f"{name}.py").write_text(TEACHER)
    weights = {"linear.weight": torch.tensor(means), "linear.bias": torch.tensor(-(means**2).sum(1) / 2)}
    torch.save({name: 2 * x.float() for name, x in weights.items()}, folder / "w.pt")


def make_cache(folder: Path, name: str, *more: object) -> Path:
    """A cache `c` of digits by that teacher."""
    save_teacher(folder, name)
    asked = ("teacher-cache", "--teacher", f"{name}:make", "--weights", "w.pt", "--normalize", "none")
    with chdir(folder):
        main([str(word) for word in (*asked, *more, "--out", "c")])
    return folder / "c"


@pytest.fixture(scope="module")
def informed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 600 training rows with the taps `noise`, which is random, and `columns`, which are the pixels."""
    return make_cache(
        tmp_path_factory.mktemp("informed"), "teacher_with_noise", "--train-size", 600, "--taps", "noise,columns"
    )


@pytest.fixture(scope="module")
def found(informed: Path) -> Path:
    """The folder of what was found in it."""
    out = informed.parent / "found"
    main(["inspect", str(informed), "--out", str(out), "--json"])
    return out


@pytest.fixture
def record(found: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((found / "inspect.json").read_text())
    return read


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Taps and channels


def test_the_informative_tap_is_first_by_probe_and_by_importance_and_the_random_one_is_at_chance(
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


def test_a_pixel_that_never_changes_has_no_importance_and_the_first_ones_have(record: dict[str, Any]) -> None:
    """The outermost pixels of the digits, 0 and 32, are blank; the list of a tap begins with those that matter."""
    rows = record["channels"]["columns"]
    assert [row["mean"] for row in rows] == sorted((row["mean"] for row in rows), reverse=True)
    assert rows[0]["mean"] > 0.02
    assert not {0, 32} & {row["channel"] for row in rows[:5]}


def test_the_tables_say_what_the_record_says_and_the_pictures_are_whole(found: Path, record: dict[str, Any]) -> None:
    taps = {row["tap"]: row for row in table(found / "taps.csv")}
    for name, tap in record["taps"].items():
        assert float(taps[name]["accuracy"]) == tap["accuracy"]
        assert float(taps[name]["f1_macro"]) == tap["f1_macro"]
        assert float(taps[name]["importance_sd"]) == tap["importance"]["sd"]
    channels = table(found / "channels.csv")
    assert len(channels) == 64 + 6
    assert (
        int(next(row for row in channels if row["tap"] == "columns")["channel"])
        == (record["channels"]["columns"][0]["channel"])
    )
    assert {path.name for path in found.iterdir()} == {"inspect.json", *record["files"]}
    images = [name for name in record["files"] if name.endswith(".png")]
    assert len(images) == 5
    for name in images:
        content = (found / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert content.endswith(b"IEND\xaeB`\x82")


def test_a_probe_of_a_tap_is_scikit_learns_own_on_the_rows_of_the_cache(
    informed: Path, record: dict[str, Any]
) -> None:
    cache, every = Cache(informed), {"train": np.arange(600), "val": np.arange(180)}
    x = {s: cache.read_targets(s, 0, rows, ("columns",))[1]["columns"].double().numpy() for s, rows in every.items()}
    y = {split: cache.read_column(split, 0, "label") for split in every}
    mean, sd = x["train"].mean(0), x["train"].std(0)
    sd[sd == 0] = 1
    model = LogisticRegression(max_iter=1000).fit((x["train"] - mean) / sd, y["train"])
    accuracy = float((model.predict((x["val"] - mean) / sd) == y["val"]).mean())
    assert record["taps"]["columns"]["accuracy"] == accuracy


def some_rows(classes: int) -> tuple[Floats, NDArray[np.int64]]:
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, 150)
    return random.normal(size=(150, 9)) + np.eye(classes, 9)[labels], labels


@pytest.mark.parametrize("classes", [2, 4])
def test_importance_of_channels_is_that_of_scikit_learns_own_model(classes: int) -> None:
    x, labels = some_rows(classes)
    model = LogisticRegression(max_iter=1000).fit(x, labels)
    theirs = permutation_importance(model, x, labels, n_repeats=4, random_state=3)
    steps: list[int] = []
    each = tuple(slice(c, c + 1) for c in range(9))
    mean, sd = measure_importance(fit_probe(x, labels), x, labels, each, 4, 3, steps.append)
    np.testing.assert_array_equal(mean, theirs.importances_mean)
    np.testing.assert_array_equal(sd, theirs.importances_std)
    assert sum(steps) == 1 + 4 * 9


def test_a_group_that_is_permuted_takes_all_its_columns_from_the_named_rows() -> None:
    x, labels = some_rows(3)
    probe, groups = fit_probe(x, labels), (slice(0, 2), slice(2, 7), slice(7, 9))
    rows = np.random.default_rng(1).integers(0, len(x), (len(x), 3)).astype(np.int32)
    gathered = np.concatenate([x[rows[:, g]][:, group] for g, group in enumerate(groups)], 1)
    expected = probe.scores(gathered).argmax(1)
    assert (expected != probe.scores(x).argmax(1)).any()
    np.testing.assert_array_equal(GatheredProbe(probe, x, groups).predict(rows), expected)


@pytest.mark.parametrize(
    ("tap", "shape", "wide", "channels"),
    [
        ("layer", [5, 4, 4], 5, 5),
        ("tokens", [7, 5], 5, 5),
        ("vector", [12], 12, 12),
        ("layer:attention", [4, 4], 16, 16),
        ("layer:grid2", [5, 2, 2], 20, 5),
        ("layer:grid4", [512, 4, 4], MAX_COLUMNS, 0),
    ],
)
def test_how_a_tap_becomes_columns(tap: str, shape: list[int], wide: int, channels: int) -> None:
    form = describe_tap(tap, shape)
    assert form.columns == wide
    assert len(form.channels or ()) == channels
    if form.channels:
        assert [i for group in form.channels for i in range(wide)[group]] == list(range(wide))


def test_maps_are_read_as_the_mean_of_each_channel_and_wide_taps_projected_by_their_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = make_cache(tmp_path, "teacher_with_maps", "--train-size", 50, "--taps", "images,columns")
    cache, rows = Cache(name), np.arange(50)
    maps = cache.read_targets("train", 0, rows, ("images",))[1]["images"].double().numpy()
    steps: list[int] = []
    mine = read_columns(cache, "train", rows, "images", 0, steps.append)
    np.testing.assert_allclose(mine, maps.mean((2, 3)), rtol=1e-6)
    assert sum(steps) == 50
    monkeypatch.setattr("softcache.stages.inspect.linear_probe.MAX_COLUMNS", 16)
    one, same, other = (read_columns(cache, "train", rows, "columns", seed, steps.append) for seed in (0, 0, 1))
    assert one.shape == (50, 16)
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    values = maps.reshape(50, 64)
    for row in range(3):  # each value went, with a sign, into one column: with all signs equal, sums would be kept
        assert abs(one[row]).sum() <= values[row].sum() * (1 + 1e-12)
    ratio = (one**2).sum() / (values**2).sum()
    assert 0.5 < ratio < 2


# Calibration, similarity, temperatures


def cached_logits(cache: Cache, split: str) -> tuple[Floats, NDArray[np.int64]]:
    labels = cache.read_column(split, 0, "label").astype(np.int64)
    return cache.read_targets(split, 0, np.arange(len(labels)))[0].double().numpy(), labels


@pytest.mark.parametrize("split", ["val", "test"])
def test_calibration_is_what_evaluate_says_and_its_bins_add_up(
    informed: Path, found: Path, record: dict[str, Any], split: str
) -> None:
    logits, labels = cached_logits(Cache(informed), split)
    expected, mine = evaluate(logits, labels), record["calibration"][split]
    for key in ("accuracy", "ece", "nll"):
        assert mine[key] == pytest.approx(expected[key], rel=1e-12)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert mine["confidence"] == pytest.approx(p.max(1).mean(), rel=1e-12)
    bins = [row for row in table(found / "reliability.csv") if row["split"] == split]
    assert sum(int(row["rows"]) for row in bins) == len(labels)
    full = [row for row in bins if row["rows"] != "0"]
    gaps = [int(row["rows"]) * abs(float(row["accuracy"]) - float(row["confidence"])) for row in full]
    assert sum(gaps) / len(labels) == pytest.approx(expected["ece"], rel=1e-9)
    assert {row["accuracy"] for row in bins if row["rows"] == "0"} == {"n/a"}


def soft(logits: Floats, T: float) -> list[list[float]]:
    """Softened probabilities, by a loop."""
    rows = []
    for row in logits:
        powers = [math.exp((z - max(row)) / T) for z in row]
        rows.append([power / math.fsum(powers) for power in powers])
    return rows


def entropy(p: list[float]) -> float:
    return -math.fsum(x * math.log(x) for x in p if x > 0)


def between_rows(rows: list[list[float]]) -> float:
    """Entropy of the mean less mean of the entropies."""
    mean = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    return entropy(mean) - math.fsum(map(entropy, rows)) / len(rows)


def test_entropies_and_information_are_those_of_a_loop(informed: Path, record: dict[str, Any]) -> None:
    """Information by the chain rule: of the label, less that of whether it is the first, within a first class."""
    logits, labels = cached_logits(Cache(informed), "train")
    assert [r["temperature"] for r in record["soft_targets"]["temperatures"]] == list(TEMPERATURES)
    for mine in record["soft_targets"]["temperatures"]:
        rows = soft(logits, mine["temperature"])
        assert mine["entropy"] == pytest.approx(math.fsum(map(entropy, rows)) / len(rows), rel=1e-9)
        assert mine["share"] == pytest.approx(mine["entropy"] / math.log(10), rel=1e-12)
        others = [1 - row[c] for row, c in zip(rows, labels, strict=True)]
        assert mine["others"] == pytest.approx(math.fsum(others) / len(rows), rel=1e-9)
        information = 0.0
        for c in range(10):
            own = [row for row, said in zip(rows, logits, strict=True) if list(said).index(max(said)) == c]
            whether = [[row[c], 1 - row[c]] for row in own]
            information += len(own) / len(rows) * (between_rows(own) - between_rows(whether))
        assert mine["information"] == pytest.approx(information, rel=1e-7, abs=1e-12)
    most = max(record["soft_targets"]["temperatures"], key=lambda r: r["information"])
    assert record["soft_targets"]["most_information_at"] == most["temperature"]


def at_each(logits: Floats, target: NDArray[np.int64]) -> list[dict[str, Any]]:
    return [soft_target_statistics(logits, target, T) for T in TEMPERATURES]


def test_a_row_that_the_teacher_gets_wrong_and_is_sure_of_says_nothing_beside_its_first_class() -> None:
    logits, target = 1e6 * np.eye(3)[[0, 0, 0, 1]], np.array([0, 1, 2, 1])
    assert all((r["information"], r["others"]) == (0, 0.5) for r in at_each(logits, target))


def test_information_is_nothing_where_targets_are_hard_flat_or_the_same_for_all_rows_of_a_class() -> None:
    target = np.array([0, 0, 1, 1])
    hard = 1e6 * np.eye(5)[target]
    assert all(r["information"] == 0 == r["others"] for r in at_each(hard, target))
    flat = np.zeros((4, 5))
    assert all(r["information"] == pytest.approx(0, abs=1e-15) for r in at_each(flat, target))
    same = np.array([[4.0, 3, 1, 0, 0], [0, 5, 2, 1, 0]])[target]
    assert all(r["information"] == pytest.approx(0, abs=1e-15) for r in at_each(same, target))
    same[1] = [4, 1, 3, 0, 0]
    assert all(r["information"] > 1e-4 for r in at_each(same, target))


def test_similarity_is_the_mean_of_the_softened_rows_of_each_class(
    informed: Path, found: Path, record: dict[str, Any]
) -> None:
    logits, labels = cached_logits(Cache(informed), "val")
    rows = table(found / "similarity.csv")
    matrix = [[float(row[str(c)]) for c in range(10)] for row in rows]
    probabilities = np.array(soft(logits, 4.0))
    expected = np.stack([probabilities[labels == c].mean(0) for c in range(10)])
    np.testing.assert_allclose(matrix, expected, rtol=1e-9)
    off = {(i, j): expected[i, j] for i in range(10) for j in range(10) if i != j}
    i, j = max(off, key=lambda pair: off[pair])
    first = record["most_confused"][0]
    assert (first["true"], first["other"]) == (str(i), str(j))
    assert first["probability"] == pytest.approx(off[i, j], rel=1e-9)


def test_a_class_without_rows_is_not_a_class_of_zeros() -> None:
    logits, labels = np.array([[2.0, 1, 0], [0, 2, 1]]), np.array([0, 1])
    matrix = similarity(logits, labels, 1.0)
    assert np.isnan(matrix[2]).all()
    assert [i for i, _, _ in most_confused(matrix, 10)].count(2) == 0
    assert calibration(logits, labels)["class_accuracy"] == [1, 1, None]


# What is not there


def test_a_val_split_without_some_of_the_classes(stages: Stages, tmp_path: Path) -> None:
    cache = make_cache(
        tmp_path, "teacher_few", "--val-fraction", 0.0035, "--train-size", 200, "--taps", "columns,noise"
    )
    found = stages("inspect", cache, "--out", "o")
    missing = found["joint"]["classes_without_rows"]
    assert len(missing) == 5 == found["joint"]["rows"]
    rows = table(Path("o/similarity.csv"))
    for c, row in enumerate(rows):
        assert (set(list(row.values())[1:]) == {"n/a"}) == (c in missing)
        assert (found["calibration"]["val"]["class_accuracy"][c] is None) == (c in missing)
    assert {int(pair["true"]) for pair in found["most_confused"]}.isdisjoint(missing)
    code, out, _ = stages.call("inspect", cache, "--out", "p")
    assert code == 0
    assert "5 classes have no row there: n/a" in out


def test_without_taps_the_teacher_is_inspected_and_the_way_to_taps_is_said(stages: Stages, tmp_path: Path) -> None:
    cache = make_cache(tmp_path, "teacher_without_taps", "--train-size", 100)
    code, out, _ = stages.call("inspect", cache, "--out", "o")
    assert code == 0
    assert "the cache has no taps: the same teacher-cache command with --taps adds them" in out
    assert "carries most information" in out
    assert "best tap" not in out
    record = json.loads(Path("o/inspect.json").read_text())
    assert record["taps"] == {} == record["channels"]
    assert record["best"] is record["command"] is None
    assert set(record["calibration"]) == {"val", "test"}
    assert not Path("o/taps.csv").exists()
    assert Path("o/similarity.png").exists()


def test_without_labels_the_soft_targets_alone_are_inspected(stages: Stages, tmp_path: Path, save_image: Any) -> None:
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
    assert soft_targets["by_own_class"] == soft_targets["rows"] == Cache(Path("c")).manifest.splits["train"]


def test_of_mixed_views_there_is_no_probe(stages: Stages, tmp_path: Path) -> None:
    cache = make_cache(
        tmp_path, "teacher_mixed", "--train-size", 100, "--taps", "columns", "--views", "crop:pad=1,mixup=1"
    )
    code, out, _ = stages.call("inspect", cache, "--out", "o")
    assert code == 0
    assert "mixed of two images, and a probe is of one label: no probe" in out
    assert json.loads(Path("o/inspect.json").read_text())["soft_targets"]["by_own_class"] == 100


@pytest.mark.parametrize("loss", ["hint:teacher=hidden1", "concat_hint:teacher=hidden1"])
def test_two_classes_and_the_command_of_the_best_tap_runs(
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
    found = stages("inspect", "c", "--out", "o")
    assert found["best"] == tap
    assert found["taps"][tap]["columns"] == 4
    words = shlex.split(found["command"].partition(" -m softcache ")[2])
    assert words[-4:] == ["--loss", "kd", "--loss", loss]
    words[words.index("folder:PATH")] = "folder:pets"
    assert stages(*words, "--epochs", 1)["student"]["arch"] == "mlp:4"


def test_a_sample_is_said_to_be_one_and_the_same_seed_finds_the_same(stages: Stages, informed: Path) -> None:
    first = stages("inspect", informed, "--rows", 120, "--repeats", 2, "--seed", 7)
    again = stages("inspect", informed, "--rows", 120, "--repeats", 2, "--seed", 7)
    assert (first["joint"]["train_rows"], first["joint"]["train_of"]) == (120, 600)
    assert first["joint"]["rows"] == 120
    assert first["calibration"]["val"]["rows"] == 180
    aside = ("seconds", "settings")
    assert {k: v for k, v in first.items() if k not in aside} == {k: v for k, v in again.items() if k not in aside}
    assert [r["settings"]["out"] for r in (first, again)] == ["runs/inspect-c-1", "runs/inspect-c-2"]
    _, out, _ = stages.call("inspect", informed, "--rows", 120, "--repeats", 2, "--seed", 8)
    assert json.loads(Path("runs/inspect-c-3/inspect.json").read_text())["channels"] != first["channels"]
    assert "trained on a random sample of 120 of 600 training rows of draw 0" in out
    assert out.splitlines()[-1].startswith("best tap: columns, hint from it with  ")


def test_code_that_a_manifest_names_is_left_for_the_user_to_name(record: dict[str, Any]) -> None:
    assert "--arch my_package.module:factory --loss kd --loss hint:teacher=columns" in record["command"]


def test_without_matplotlib_one_line_says_how_to_get_it_before_any_work(
    stages: Stages, informed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(Cache, "read_rows", lambda *_: pytest.fail("work was begun"))
    said = stages.fails(2, "inspect", informed)
    assert said == ("Error: inspect draws with matplotlib, which is not installed: pip install 'softcache[report]'")
    assert not Path("runs").exists()


def test_a_folder_that_holds_something_is_left_alone(stages: Stages, informed: Path) -> None:
    Path("o").mkdir()
    Path("o/mine").write_text("mine")
    said = stages.fails(2, "inspect", informed, "--out", "o")
    assert said == "Error: 'o' exists and is not empty: choose another --out"
    assert [path.name for path in Path("o").iterdir()] == ["mine"]


def test_features_that_are_no_numbers_and_a_cache_that_is_none_are_refused(stages: Stages, informed: Path) -> None:
    assert "nowhere" in stages.fails(1, "inspect", "nowhere")
    rows = Cache.read_rows

    def broken(self: Cache, split: str, draw: int, name: str, positions: Any) -> Any:
        found = rows(self, split, draw, name, positions)
        return found if name != "features/noise" else np.where(positions[:, None] == 3, np.nan, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cache, "read_rows", broken)
        assert "tap 'noise' of train has values that are not finite" in stages.fails(1, "inspect", informed)


def test_names_of_classes_are_no_formulas_and_no_markup_in_pictures(tmp_path: Path) -> None:
    from softcache.stages.cli.plot_style import plot_text, save_png
    from softcache.stages.inspect.plots import plot_similarity

    assert plot_text("a$b\n") == r"a\$b?"
    names = [r"$\frac{x$", "犬", "a very long name of a class that would push everything aside"]
    save_png(tmp_path / "s.png", plot_similarity(np.full((3, 3), 0.3), names, "what"))
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
