"""Teachers without classes: figures of teacher and student, data without labels, and targets equal to live ones."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn import metrics
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import softcache
from softcache.data.views.render import render
from softcache.pipeline.loading import training_embeddings
from softcache.pipeline.models import build
from softcache.pipeline.models.prepared_model import PreparedModel
from tests.helpers.commands import Stages
from tests.helpers.hub import publish_timm_weights

WIDTH = 24
TEACHER = f"""\
import torch
from torch import nn
def make(classes, channels, size, shape):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 32), nn.Tanh(), nn.Linear(32, {WIDTH}))
def predict(classes, channels, size, shape):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes))
"""
STAGE_ONE = (
    "--task",
    "embedding",
    "--teacher",
    "embedder_of_figures:make",
    "--weights",
    "DEFAULT",
    "--normalize",
    "none",
)
DIGITS = ("teacher-cache", "--train-size", 400, *STAGE_ONE, "--views", "crop:pad=1", "--draws", 2)
STUDENT = ("student", "--arch", "mlp:32", "--batch-size", 50)
LABELLED = {"knn", "probe", "centroid_1", "centroid_5"}
LIKENESS = {"cosine", "cka", "overlap"}


def make_teacher(channels: int = 1, size: int = 8) -> nn.Module:
    names: dict[str, Any] = {}
    exec(TEACHER, names)
    network: nn.Module = names["make"](0, channels, size, None)
    return network.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the teacher's module, its caches float16 and float32 of digits, and a run of two seeds."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("embeddings")
    (folder / "embedder_of_figures.py").write_text(TEACHER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        for codec in ("float16", "float32"):
            main([str(word) for word in (*DIGITS, "--codec", codec, "--out", codec)])
        main([str(word) for word in (*STUDENT, "--cache", "float16", "--epochs", 3, "--seeds", 2, "--out", "run")])
    return folder


@pytest.fixture
def here(made: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in made.iterdir():
        (Path.cwd() / path.name).symlink_to(path)
    monkeypatch.syspath_prepend(str(made))
    return Path.cwd()


# Figures


def embed_live(cache: softcache.Cache, split: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The teacher's output for draw 0 of every row of a split, run here, and the labels, both by index."""
    rows, reader = cache.transfer_set.splits[split], cache.reader
    views = render(rows.images, reader.views.of_split(split), reader.seed, np.arange(len(rows)), 0)
    with torch.no_grad():
        outputs = PreparedModel(make_teacher(), reader.input_spec)(views)
    return outputs.half().double().numpy(), rows.labels


def test_figures_are_those_of_the_views_of_draw_0(here: Path, stages: Stages) -> None:
    result = json.loads(Path("run/result.json").read_text())
    assert result["task"] == "embedding"
    cache = softcache.Cache("float16")
    train, train_labels = embed_live(cache, "train")
    classifier = KNeighborsClassifier(
        20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07), algorithm="brute"
    ).fit(train, train_labels)
    for split in ("val", "test"):
        teacher, student = result["teacher"][split], result["student"][split]
        assert teacher["knn"] == pytest.approx(classifier.score(*embed_live(cache, split)), abs=1e-6)
        assert set(teacher) == {"rows", "labelled", *LABELLED}
        assert set(student) == {"rows", "labelled", *LABELLED, *LIKENESS}
        assert all(0 < student[name] < 1 for name in LABELLED | LIKENESS)


def test_evaluate_gives_the_figures_of_the_run(here: Path, stages: Stages) -> None:
    seeds = json.loads(Path("run/result.json").read_text())["seeds"]
    again = stages("evaluate", "run")
    code, out, _ = stages.call("evaluate", "run")
    assert code == 0
    assert out.count("seed ") == 4
    cache = softcache.Cache("float16")
    for seed in (0, 1):
        recorded = seeds[seed]["student"]
        student = PreparedModel(build("mlp:32", WIDTH, 1, 8), cache.input_spec).network
        student.load_state_dict(torch.load(f"run/seed-{seed}/student.pt", weights_only=True))
        student.train()
        for split in ("val", "test"):
            assert again[str(seed)][split] == recorded[split]
            assert f"knn {recorded[split]['knn']:.4f}" in out
            by_call = cache.evaluate(student, split)
            assert by_call == pytest.approx(recorded[split], abs=1e-6)
        assert student.training


def test_a_student_of_another_width_has_no_cosine_and_all_other_figures(here: Path) -> None:
    figures = softcache.Cache("float16").evaluate(build("mlp:16", 7, 1, 8), "test")
    assert figures["cosine"] is None
    assert set(figures) == {"rows", "labelled", *LABELLED, *LIKENESS}


def test_stage_one_prints_the_teachers_figures_of_the_result(here: Path, stages: Stages) -> None:
    teacher = json.loads(Path("run/result.json").read_text())["teacher"]["val"]
    code, out, err = stages.call(*DIGITS, "--out", "again")
    assert code == 0, err
    line = f"kNN accuracy {teacher['knn']:.4f}, 5-shot accuracy {teacher['centroid_5']:.4f}"
    assert f"teacher on {teacher['rows']} labelled rows of val: {line}" in out


def test_weights_from_a_file_may_have_another_width_than_the_data_have_classes(here: Path, stages: Stages) -> None:
    torch.save(build("mlp:16", 5, 1, 8).state_dict(), "w.pt")
    command = ("teacher-cache", "--task", "embedding", "--teacher", "mlp:16", "--weights", "w.pt", "--train-size", 100)
    code, out, err = stages.call(*command, "--normalize", "none", "--out", "c")
    assert code == 0, err
    assert "embedding: 16 numbers, the input of layer" in out
    assert "teacher: 16 outputs, task embedding" in out


@pytest.mark.slow
def test_published_weights_without_a_classifier_are_a_teacher(
    here: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_timm_weights("vit_small_patch16_224.dino", here / "hub", monkeypatch)
    np.savez("few.npz", x=np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8), y=np.arange(12) % 2)
    command = ("teacher-cache", "--data", "arrays:few.npz", "--teacher", "timm:vit_small_patch16_224.dino")
    published = ("--weights", "DEFAULT", "--views", "none", "--draws", 1)
    assert "have no classifier" in stages.fails(2, *command, *published, "--out", "refused")
    code, out, err = stages.call(*command, *published, "--task", "embedding", "--out", "c")
    assert code == 0, err
    assert "teacher: 384 outputs, task embedding" in out


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "most_bytes"), [("float16", 790), ("int8", 400)])
def test_a_row_of_384_numbers_takes_few_bytes(codec: str, most_bytes: int, here: Path, stages: Stages) -> None:
    """20,000 training rows; manifest, statistics and all other files of the folder are part of it."""
    np.savez("rows.npz", x=np.random.default_rng(0).integers(0, 256, (22_000, 8, 8, 1), np.uint8))
    Path("wide.py").write_text(TEACHER.replace(f"32, {WIDTH}", "32, 384"))
    command = list(STAGE_ONE)
    command[command.index("embedder_of_figures:make")] = "wide:make"
    data = ("--data", "arrays:rows.npz", "--val-fraction", 1 / 11)
    code, _, err = stages.call("teacher-cache", *data, *command, "--draws", 1, "--codec", codec, "--out", "c")
    assert code == 0, err
    size = sum(path.stat().st_size for path in Path("c").rglob("*") if path.is_file())
    print(f"{codec}: {size / 22_000:.1f} bytes a row")
    assert size / 22_000 <= most_bytes


def test_the_bank_has_no_more_rows_than_allowed(here: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_embeddings, "MAX_BANK_ROWS", 150)
    result = stages(*STUDENT, "--cache", "float16", "--epochs", 1, "--out", "bounded")
    assert result["teacher"]["test"]["bank_rows"] == result["student"]["test"]["bank_rows"] == 150
    outputs = softcache.Cache("float16").evaluate(build("mlp:16", WIDTH, 1, 8), "test")
    assert outputs["bank_rows"] == 150


def test_mixed_views_have_no_accuracies_and_a_line_says_so(here: Path, stages: Stages) -> None:
    command = list(DIGITS)
    command[command.index("crop:pad=1")] = "crop:pad=1,mixup=1"
    assert stages.call(*command, "--out", "mixed")[0] == 0
    code, out, err = stages.call(*STUDENT, "--cache", "mixed", "--epochs", 1, "--out", "r")
    assert code == 0, err
    assert "mixtures of two images, which have no one class: no kNN, probe or centroid accuracy" in out
    result = json.loads(Path("r/result.json").read_text())
    assert set(result["student"]["test"]) == {"rows", "labelled", *LIKENESS}


@pytest.mark.parametrize("task", ["labels", "numbers"])
def test_stage_one_prints_the_figures_of_other_tasks(task: str, here: Path, stages: Stages) -> None:
    digits = np.arange(80) % 10
    y = np.stack([digits % 2, digits > 4], 1).astype(np.int8) if task == "labels" else digits.astype(np.float32)
    np.savez("data.npz", x=np.random.default_rng(0).integers(0, 256, (80, 8, 8, 1), np.uint8), y=y)
    data = ("--data", "arrays:data.npz", "--task", task, "--normalize", "none")
    code, out, err = stages.call(
        "teacher-cache", *data, "--teacher", "embedder_of_figures:predict", "--weights", "DEFAULT", "--out", "c"
    )
    assert code == 0, err
    (line,) = [text for text in out.splitlines() if text.startswith("teacher on ")]
    cache = softcache.Cache("c", "arrays:data.npz")
    outputs, labels = cache.targets("val", np.arange(cache.splits["val"])).numpy(), cache.labels("val").numpy()
    if task == "labels":
        figures = (
            f"mAP {metrics.average_precision_score(labels, outputs, average='macro'):.4f},"
            f" macro F1 {metrics.f1_score(labels, outputs > 0, average='macro', zero_division=0):.4f}"
        )
    else:
        rmse = metrics.root_mean_squared_error(labels, outputs)
        figures = f"R² {metrics.r2_score(labels, outputs):.4f}, RMSE {rmse:.4f}"
    assert line == f"teacher on {len(labels)} labelled rows of val: {figures}"


# Data without labels


def test_data_without_labels_go_through_both_stages(
    here: Path, stages: Stages, save_image: Callable[..., object]
) -> None:
    for k in range(40):
        save_image(here / f"bare/{k}.png", k=k)
        save_image(here / f"classed/{'ab'[k % 2]}/{k}.png", k=k)
    np.savez("bare.npz", x=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8))
    for number, data in enumerate(
        (
            ("--data", "folder:bare"),
            ("--data", "folder:classed", "--layout", "unlabelled"),
            ("--data", "arrays:bare.npz"),
        )
    ):
        code, out, err = stages.call("teacher-cache", *data, *STAGE_ONE, "--views", "none", "--out", f"c{number}")
        assert code == 0, err
        assert "teacher on" not in out
        code, out, err = stages.call(
            *STUDENT, *data[:2], "--cache", f"c{number}", "--epochs", 2, "--batch-size", 10, "--out", f"r{number}"
        )
        assert code == 0, err
        assert "overlap@10" in out
        assert "kNN" not in out
        assert "have no labels: the student is compared with its teacher alone" in out
        result = json.loads(Path(f"r{number}/result.json").read_text())
        (split,) = set(result["student"]) & {"val", "test"}
        assert set(result["student"][split]) == {"rows", "labelled", *LIKENESS}
        assert set(result["teacher"][split]) == {"rows", "labelled"}
        assert stages.call("evaluate", f"r{number}", *data[:2])[0] == 0
        for option in ("--select", "map"), ("--baseline",), ("--labelled", 10):
            stages.fails(2, *STUDENT, *data[:2], "--cache", f"c{number}", *option, "--out", "refused")


# Cached and live


def train_by_hand(batches: list[softcache.Batch], loss: str, is_live: bool) -> list[float]:
    """The losses of 30 SGD steps, with the cached embeddings or with those of the teacher run on the same views."""
    torch.manual_seed(3)
    source = batches[0].source
    assert source is not None
    teacher = make_teacher()
    student = build("mlp:32", WIDTH, 1, 8)
    criterion = softcache.DistillationLoss(loss)
    optimizer: torch.optim.Optimizer | None = None
    history = []
    for batch in batches:
        if is_live:
            with torch.no_grad():
                batch = replace(batch, logits=teacher(source.prepare_input(batch.views)))
        if optimizer is None:
            criterion.attach(student, example=batch)  # builds the projection, which is a parameter of the criterion
        value = criterion(student(batch.images), batch)
        if optimizer is None:
            parameters = [*student.parameters(), *criterion.parameters()]
            optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history.append(float(value.detach()))
    return history


@pytest.mark.parametrize(("codec", "tolerance"), [("float32", 1e-6), ("float16", 1e-3)])
@pytest.mark.parametrize(
    "loss", ["embed", "embed:kind=mse,standardize=std", "embed:kind=smooth_l1,standardize=mean,projection=mlp"]
)
def test_thirty_steps_from_the_cache_equal_thirty_steps_with_the_live_teacher(
    here: Path, codec: str, tolerance: float, loss: str
) -> None:
    stream = softcache.Cache(codec).loader("train", batch_size=64).stream
    batches = list(stream.batches(0, 30))
    assert len({batch.draw for batch in batches if isinstance(batch.draw, int)}) == 2
    cached, live = (train_by_hand(batches, loss, is_live) for is_live in (False, True))
    worst = max(abs(a - b) / b for a, b in zip(cached, live, strict=True))
    print(f"{loss}, {codec}: largest relative difference of 30 losses {worst:.1e}")
    assert worst <= tolerance
    assert live[-1] < live[0]
    if codec == "float16":
        assert worst > 0
