"""Several caches as one teacher: the targets of a student, errors, and rows without targets."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import softcache.stages.training.loop as training
from softcache.data.transfer_set import load_transfer_set
from softcache.pipeline.batch import Batch, ModelOutputs
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.losses import LOSSES
from softcache.pipeline.losses.multi_teacher import ConfidenceWeighted, HardFallback, wrap_loss
from softcache.pipeline.teachers.combine import confidence_weights
from softcache.pipeline.teachers.ensemble import TeacherEnsemble
from softcache.stages.training.step import ActiveTraining
from tests.helpers.commands import Stages, tiny_cache_command
from tests.helpers.stopping import stop_at

STUDENT = ("--arch", "mlp:8", "--epochs", 2, "--loss", "kd:temperature=2")


@pytest.fixture(scope="session")
def two_caches(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the caches `a` (the tiny one) and `b`, of another teacher on the same views; `t` is its run."""
    from softcache.stages.main import main

    home = tmp_path_factory.mktemp("two_caches")
    shutil.copytree(tiny / "cache", home / "a")
    main(["teacher", "--train-size", "300", "--arch", "mlp:16", "--epochs", "20", "--seed", "3", "--out", f"{home}/t"])
    main(
        [
            "teacher-cache",
            "--train-size",
            "300",
            "--weights",
            f"{home}/t",
            "--views",
            "crop:pad=1",
            "--draws",
            "3",
            "--shard-rows",
            "120",
            "--out",
            f"{home}/b",
        ]
    )
    return home


@pytest.fixture
def pair(two_caches: Path, tmp_path: Path) -> tuple[str, ...]:
    """Copies of both caches, as options of a command."""
    for name in ("a", "b"):
        shutil.copytree(two_caches / name, tmp_path / name)
    return ("--cache", "a", "--cache", "b")


def read_logits(folder: str, split: str = "test") -> torch.Tensor:
    """float32 [N, K] by index."""
    cache = CacheReader(Path(folder))
    order = cache.row_order(split)
    logits = torch.empty(len(order), 10)
    logits[torch.from_numpy(order)] = cache.read_targets(split, 0, np.arange(len(order)))[0]
    return logits


def load_labels(split: str) -> torch.Tensor:
    return torch.from_numpy(
        load_transfer_set("digits", Path(), val_fraction=0.125, train_size=300).splits[split].labels
    )


def record_batches(patch: pytest.MonkeyPatch) -> list[Batch]:
    """List every batch that a student is trained on from now on."""
    batches: list[Batch] = []
    train_step = training.train_step

    def record_batch(active: ActiveTraining, batch: Batch, *rest: Any) -> torch.Tensor:
        if active.run.name == "student":
            batches.append(batch)
        return train_step(active, batch, *rest)

    patch.setattr(training, "train_step", record_batch)
    return batches


# The table of `softcache blend`


def test_the_table_has_the_figures_of_every_cache_and_every_combination(pair: tuple[str, ...], stages: Stages) -> None:
    rows = {row["name"]: row for row in stages("blend", *pair, "--combine", "weighted:0.9,0.1")["rows"]}
    assert list(rows) == [
        "cnn (a)",
        "mlp:16 (b)",
        "mean_probability",
        "mean_logit",
        "geometric",
        "vote",
        "weighted",
        "learned",
    ]
    a, b, labels = read_logits("a"), read_logits("b"), load_labels("test")
    mean = (F.softmax(a.double(), 1) + F.softmax(b.double(), 1)) / 2
    for name, p in (
        ("cnn (a)", F.softmax(a.double(), 1)),
        ("mlp:16 (b)", F.softmax(b.double(), 1)),
        ("mean_probability", mean),
        ("weighted", 0.9 * F.softmax(a.double(), 1) + 0.1 * F.softmax(b.double(), 1)),
        ("mean_logit", F.softmax((a.double() + b.double()) / 2, 1)),
    ):
        assert rows[name]["test"]["nll"] == pytest.approx(float(F.nll_loss(p.log(), labels)), rel=1e-5)
        assert rows[name]["test"]["accuracy"] == pytest.approx(float((p.argmax(1) == labels).double().mean()))
    learned = rows["learned"]["val"]["nll"]
    assert learned <= min(row["val"]["nll"] for row in rows.values())
    code, out, _ = stages.call("blend", *pair)
    assert code == 0
    assert "learned, on val:" in out


def test_one_cache_is_refused(pair: tuple[str, ...], stages: Stages) -> None:
    assert "blend compares several caches" in stages.fails(2, "blend", "--cache", "a")


# The targets of a student


@pytest.mark.parametrize("spec", ["", "mean_logit", "weighted:0.25,0.75", "vote", "learned"])
def test_the_targets_of_a_student_are_the_combination_of_its_own_rows(
    pair: tuple[str, ...], stages: Stages, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    batches = record_batches(monkeypatch)
    combine = ("--combine", spec) if spec else ()
    result = stages("student", *pair, *STUDENT, *combine, "--out", "r")
    rows = {row["name"]: row for row in stages("blend", *pair, *combine)["rows"]}
    name = spec.partition(":")[0] or "mean_probability"
    for split in ("val", "test"):
        assert result["teacher"][split]["nll"] == pytest.approx(rows[name][split]["nll"], rel=1e-9)
        assert result["members"][1][split]["nll"] == pytest.approx(rows["mlp:16 (b)"][split]["nll"], rel=1e-9)
    assert result["teacher"]["arch"] == "cnn + mlp:16"
    record = json.loads(Path("r/targets.json").read_text())["combine"]
    assert record["weights"] == pytest.approx(rows[name]["weights"])
    caches = CacheReader(Path("a")), CacheReader(Path("b"))
    position_of_index = np.argsort(caches[0].row_order("train"))
    weights, temperatures = torch.tensor(record["weights"]), torch.tensor(record["temperatures"])
    for batch in batches:
        positions = position_of_index[batch.index.numpy()]
        logits = [cache.read_stored("train", batch.draw, positions)[0] for cache in caches]
        assert batch.logits is not None
        if name in ("mean_probability", "weighted", "learned"):
            p = sum(w * F.softmax(z / t, 1) for w, z, t in zip(weights, logits, temperatures, strict=True))
        elif name == "mean_logit":
            p = F.softmax((logits[0] + logits[1]) / 2, 1)
        else:
            p = 0.999 * sum(F.one_hot(z.argmax(1), 10) for z in logits) / 2
            p = p + 0.001 * (F.softmax(logits[0], 1) + F.softmax(logits[1], 1)) / 2
        torch.testing.assert_close(F.softmax(batch.logits, 1), p, rtol=1e-4, atol=1e-6)
    again = stages("evaluate", "r")["0"]["test"]
    assert again["kl_to_teacher"] == pytest.approx(result["student"]["test"]["kl_to_teacher"], rel=1e-6)


def test_features_are_those_of_the_first_cache(
    pair: tuple[str, ...], stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = record_batches(monkeypatch)
    stages("student", *pair, "--arch", "cnn", "--epochs", 1, "--loss", "kd", "--loss", "hint:teacher=pool1")
    cache = CacheReader(Path("a"))
    positions = np.argsort(cache.row_order("train"))[batches[0].index.numpy()]
    expected = cache.read_stored("train", batches[0].draw, positions, ("pool1",))[1]["pool1"]
    assert torch.equal(batches[0].features["pool1"], expected)


def make_batch(M: int = 3, B: int = 6, K: int = 4) -> tuple[ModelOutputs, Batch]:
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 3, -1, 1])[:B]
    logits = torch.randn(B, M, K, dtype=torch.float64)
    views = torch.zeros(B, 1, 2, 2, dtype=torch.uint8)
    student = ModelOutputs(torch.randn(B, K, dtype=torch.float64, requires_grad=True))
    return student, Batch(torch.arange(B), 0, views, labels, logits)


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "logit_mse", "hard"])
def test_per_teacher_is_the_mean_of_the_losses_of_the_teachers(name: str) -> None:
    student, target = make_batch()
    assert target.logits is not None
    loss = LOSSES[name]
    single = [loss(student, replace(target, logits=target.logits[:, k]), None) for k in range(3)]
    torch.testing.assert_close(wrap_loss(loss, "per_teacher")(student, target, None), sum(single) / 3)


@pytest.mark.parametrize(("name", "scale"), [("kd", 16), ("output", 16), ("logit_mse", 1)])
def test_confidence_weighted_weighs_each_row_by_the_cross_entropy_of_each_teacher(name: str, scale: float) -> None:
    student, target = make_batch()
    assert target.logits is not None
    z_s, z_t, total = student.logits, target.logits, torch.zeros((), dtype=torch.float64)
    for i, y in enumerate(target.labels.tolist()):
        terms = torch.stack([-F.log_softmax(z_t[i, k].float(), 0)[max(y, 0)] for k in range(3)])[None]
        weights = confidence_weights(terms, torch.tensor([y >= 0]))[0]
        for k in range(3):
            if name == "logit_mse":
                row = ((z_s[i] - z_t[i, k]) ** 2).mean()
            else:
                p, q = F.softmax(z_t[i, k] / 4, 0), F.log_softmax(z_s[i] / 4, 0)
                row = (p * (p.log() - q)).sum()
            total = total + scale * weights[k].double() * row / 6
    loss = ConfidenceWeighted(LOSSES[name])(student, target, None)
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=1e-9)
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.logits.grad is not None
    assert student.logits.grad.abs().sum() > 0


def test_the_loss_of_rows_without_targets_is_their_cross_entropy() -> None:
    student, target = make_batch(M=1)
    assert target.logits is not None
    logits = target.logits[:, 0].clone()
    logits[1] = logits[5] = torch.nan
    target = replace(target, logits=logits)
    rows = torch.tensor([0, 2, 3, 4])
    soft = LOSSES["kd"](student.select(rows), target.select(rows), None)
    hard = F.cross_entropy(student.logits[[1, 5]], target.labels[[1, 5]])
    loss = HardFallback(LOSSES["kd"])(student, target, None)
    torch.testing.assert_close(loss, (4 * soft + 2 * hard) / 6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.logits.grad is not None
    assert student.logits.grad.isfinite().all()
    torch.testing.assert_close(
        wrap_loss(LOSSES["hard"], missing_to_labels=True)(student, target, None),
        LOSSES["hard"](student, target, None),
    )
    no_targets = replace(target, logits=torch.full_like(logits, torch.nan))
    loss = HardFallback(LOSSES["kd"])(student, no_targets, None)
    torch.testing.assert_close(loss, LOSSES["hard"](student, target, None))


@pytest.mark.parametrize("combine", ["per_teacher", "ca_mkd"])
def test_a_student_can_have_the_logits_of_each_teacher(
    pair: tuple[str, ...], stages: Stages, monkeypatch: pytest.MonkeyPatch, combine: str
) -> None:
    batches = record_batches(monkeypatch)
    result = stages("student", *pair, *STUDENT, "--combine", combine, "--map", "temperature", "--out", "r")
    assert batches[0].logits is not None
    assert batches[0].logits.shape[1:] == (2, 10)
    maps = json.loads(Path("r/targets.json").read_text())["maps"]
    assert len(maps) == 2
    positions = np.argsort(CacheReader(Path("a")).row_order("train"))[batches[0].index.numpy()]
    for k, name in enumerate("ab"):
        logits = CacheReader(Path(name)).read_stored("train", batches[0].draw, positions)[0]
        torch.testing.assert_close(batches[0].logits[:, k], logits * maps[k]["weight"][0])
    assert result["student"]["test"]["agreement"] > 0
    of_mean = stages("student", *pair, *STUDENT, "--out", "of-mean")
    assert of_mean["student"]["val"]["nll"] != result["student"]["val"]["nll"]


def test_a_stopped_run_of_several_caches_continues_to_the_same_weights(
    pair: tuple[str, ...], stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("student", *pair, *STUDENT, "--combine", "learned")
    stages(*command, "--out", "uninterrupted")
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert stages.call(*command, "--out", "r")[0] == 130
    stages("student", "--resume", "--out", "r")
    assert Path("r/student.pt").read_bytes() == Path("uninterrupted/student.pt").read_bytes()
    others = json.loads(Path("r/cache.json").read_text())["others"]
    assert [other["fingerprint"] for other in others] == [CacheReader(Path("b")).manifest.fingerprint]


# Errors


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--views", "crop:pad=2"), "views.pad"),
        (("--seed", "1"), "views.seed"),  # another order of rows, and another cut
        (("--train-size", "299"), "transfer_set.content.train"),
    ],
)
def test_caches_of_other_views_order_or_rows_are_refused(
    tiny: Path, tmp_path: Path, stages: Stages, options: tuple[str, ...], field: str
) -> None:
    shutil.copytree(tiny / "runs", tmp_path / "runs")
    stages(*tiny_cache_command(tmp_path, "other"), *options)
    for command in (("student", *STUDENT), ("blend",)):
        error = stages.fails(1, *command, "--cache", tiny / "cache", "--cache", "other")
        assert "are not of the same rows and views" in error
        assert field in error
        assert not Path("runs").joinpath("digits-mlp-8-1").exists()


def test_caches_whose_classes_are_in_another_order_are_refused(
    tmp_path: Path, stages: Stages, save_image: Any
) -> None:
    from tests.helpers.caches import PETS_CACHE_COMMAND, save_pets, save_pets_teacher

    save_pets_teacher(tmp_path / "pets.pt")
    save_pets(tmp_path / "pets", save_image)
    stages(*PETS_CACHE_COMMAND, "--out", "a")
    for split in ("train", "test"):  # dog becomes first: the images are the same
        (tmp_path / "pets" / split / "dog").rename(tmp_path / "pets" / split / "ant")
    stages(*PETS_CACHE_COMMAND, "--out", "b")
    assert "transfer_set.classes" in stages.fails(1, "blend", "--cache", "a", "--cache", "b")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--cache", "a", "--cache", "a"), 2, "'a' and 'a' are the same cache: one --cache is enough"),
        (("--cache", "a", "--cache", "b", "--cache", "b"), 2, "'b' and 'b' are the same cache"),
        (("--cache", "a", "--combine", "vote"), 2, "--combine vote is for several caches: --cache A --cache B"),
        (("--cache", "a", "--cache", "c"), 1, "there is no cache at 'c'"),
        (("--cache", "a", "--cache", "b", "--combine", "weighted:0.5,0.4"), 2, "add up to 1, these to 0.9"),
        (
            ("--cache", "a", "--cache", "b", "--combine", "ca_mkd", "--loss", "dkd"),
            2,
            "loss 'dkd' is not a mean over rows",
        ),
        (
            ("--cache", "a", "--cache", "b", "--loss", "srrl:teacher=flatten,student=flatten"),
            2,
            "loss 'srrl' uses the last layer of one teacher, and there are several caches",
        ),
    ],
)
def test_options_that_do_not_fit_together_are_refused_before_a_folder_is_made(
    pair: tuple[str, ...], stages: Stages, options: tuple[str, ...], code: int, message: str
) -> None:
    loss = () if "--loss" in options else ("--loss", "kd")
    assert message in stages.fails(code, "student", "--arch", "cnn", "--epochs", 1, *loss, *options, "--out", "r")
    assert not Path("r").exists()


def test_a_cache_with_fewer_draws_is_refused_with_the_command_that_adds_them(
    pair: tuple[str, ...], two_caches: Path, stages: Stages
) -> None:
    shutil.rmtree("b")
    stages("teacher-cache", "--train-size", 300, "--weights", two_caches / "t", "--views", "crop:pad=1", "--out", "b")
    error = stages.fails(1, "student", *pair, *STUDENT)
    assert "--draws 3, but the cache 'b' has 1" in error
    assert "teacher-cache" in error
    stages("student", *pair, *STUDENT, "--draws", 1)


@pytest.mark.parametrize("combine", ["per_teacher", "ca_mkd"])
def test_combinations_of_losses_have_no_row_in_the_table(pair: tuple[str, ...], stages: Stages, combine: str) -> None:
    assert "combines losses, not teachers" in stages.fails(2, "blend", *pair, "--combine", combine)


def test_a_student_is_evaluated_against_its_own_caches_in_their_order(pair: tuple[str, ...], stages: Stages) -> None:
    stages("student", *pair, *STUDENT, "--combine", "weighted:0.9,0.1", "--out", "r")
    shutil.move("a", "moved-a")
    shutil.move("b", "moved-b")
    a, b = ("--cache", "moved-a"), ("--cache", "moved-b")
    stages("evaluate", "r", *a, *b)
    for caches in ((*b, *a), a):
        assert "was trained from the caches" in stages.fails(1, "evaluate", "r", *caches)
    error = stages.fails(1, "student", "--resume", "--out", "r", *b, *a)
    assert "was trained from other shards than 'moved-b', 'moved-a'" in error


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record["combine"].update(weights=[10**400, 1]),
        lambda record: record["combine"].update(weights=[2, 3]),
        lambda record: record["combine"].update(weights=[0.25, 0.75]),
        lambda record: record["combine"].update(combine="vote"),
        lambda record: record.update(combine=None),
        lambda record: record["maps"][0].update(weight=[10**400] * 10),
        lambda record: record["maps"][0].update(weight=[0] * 10),
        lambda record: record["maps"][0].update(map="vector"),
        lambda record: record["maps"].append(record["maps"][0]),
        lambda record: record.pop("maps"),
    ],
)
def test_a_record_of_targets_that_contradicts_the_options_of_the_run_is_refused(
    pair: tuple[str, ...], stages: Stages, damage: Any
) -> None:
    stages("student", *pair, *STUDENT, "--epochs", 1, "--map", "temperature", "--out", "r")
    record = json.loads(Path("r/targets.json").read_text())
    damage(record)
    Path("r/targets.json").write_text(json.dumps(record))
    assert "'r/targets.json' is damaged" in stages.fails(1, "evaluate", "r")


def test_settings_without_a_cache_are_refused(pair: tuple[str, ...], stages: Stages) -> None:
    stages("student", "--cache", "a", *STUDENT, "--epochs", 1, "--out", "r")
    settings = json.loads(Path("r/settings.json").read_text())
    Path("r/settings.json").write_text(json.dumps(settings | {"cache": []}))
    for command in (("evaluate", "r"), ("student", "--resume", "--out", "r")):
        assert "the run's settings name no cache" in stages.fails(1, *command)


def test_the_command_to_run_next_has_the_same_teachers(pair: tuple[str, ...], stages: Stages) -> None:
    options = (*pair, "--combine", "mean_logit", "--map", "prior:tau=0.5", "--data-root", "some where")
    _, out, _ = stages.call("student", *options, "--arch", "mlp:8", "--epochs", 1, "--loss", "hard")
    assert "no loss reads the teacher's logits: --combine and --map change the reported figures only" in out
    line = next(line for line in out.splitlines() if line.startswith("next:"))
    command = shlex.split(line.partition(" -m softcache ")[2])
    assert set(map(str, options)) <= set(command)
    assert command.count("--cache") == 2
    assert stages.call(*command, "--epochs", 1)[0] == 0
    _, out, _ = stages.call("student", *pair, *STUDENT)
    assert "no loss reads" not in out


def test_the_table_of_methods_is_of_the_combined_teacher(pair: tuple[str, ...], stages: Stages) -> None:
    methods = stages(
        "methods", *pair, "--arch", "mlp:8", "--epochs", 1, "--only", "kd", "--layers", "flatten", "--time-steps", 1
    )
    mean = {row["name"]: row for row in stages("blend", *pair)["rows"]}["mean_probability"]
    assert methods["teacher"]["arch"] == "cnn + mlp:16"
    assert methods["teacher"]["test"]["accuracy"] == mean["test"]["accuracy"]
    assert [row["bytes_a_view"] for row in methods["methods"]] == [0, 2 * 10 * 2]


# Rows without targets


def delete_shard(folder: str, name: str) -> None:
    Path(folder, name).unlink()


def test_a_deleted_shard_is_an_error_without_the_option_missing(pair: tuple[str, ...], stages: Stages) -> None:
    delete_shard("b", "draw-001/shard-00001.h5")
    assert "shard-00001.h5" in stages.fails(1, "student", *pair, *STUDENT)


@pytest.mark.parametrize("treatment", ["skip", "hard"])
@pytest.mark.parametrize("caches", [("--cache", "a"), ("--cache", "b", "--cache", "a")])
def test_missing_rows_are_skipped_or_learned_from_labels_and_counted(
    pair: tuple[str, ...], stages: Stages, monkeypatch: pytest.MonkeyPatch, treatment: str, caches: tuple[str, ...]
) -> None:
    delete_shard("a", "draw-001/shard-00001.h5")
    missing = set(CacheReader(Path("a")).row_order("train")[100:200].tolist())
    batches = record_batches(monkeypatch)
    code, out, _ = stages.call("student", *caches, *STUDENT, "--epochs", 3, "--missing", treatment, "--out", "r")
    assert code == 0
    assert f"--missing {treatment}: 100 of 300 rows have no targets in some draw" in out
    rows = {int(i) for batch in batches for i in batch.index}
    if treatment == "skip":
        assert rows == set(range(300)) - missing
        assert not any(batch.logits.isnan().any() for batch in batches if batch.logits is not None)
        return
    assert rows == set(range(300))
    for batch in batches:
        assert batch.logits is not None
        without_targets = {int(i) for i in batch.index[batch.logits.isnan().any(1)]}
        assert without_targets == ({int(i) for i in batch.index} & missing if batch.draw == 1 else set())


def test_a_draw_without_any_targets_is_learned_from_labels_or_no_row_is_left(
    pair: tuple[str, ...], stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        delete_shard("a", f"draw-001/shard-0000{number}.h5")
    batches = record_batches(monkeypatch)
    for caches in (("--cache", "a"), pair, (*pair, "--combine", "ca_mkd")):
        stages("student", *caches, *STUDENT, "--epochs", 3, "--missing", "hard")
    for batch in batches:
        assert batch.logits is not None
        assert bool(batch.logits.isnan().all()) == bool(batch.logits.isnan().any()) == (batch.draw == 1)
    error = stages.fails(1, "student", "--cache", "a", *STUDENT, "--missing", "skip", "--out", "r")
    assert "no row of the training split is left" in error
    assert not Path("r").exists()


@pytest.mark.parametrize("loss", ["crd", "srrl"])
def test_losses_that_read_rows_before_training_leave_out_the_missing_ones(
    pair: tuple[str, ...], stages: Stages, loss: str
) -> None:
    delete_shard("a", "draw-000/shard-00000.h5")
    terms = ("--loss", "kd", "--loss", f"{loss}:teacher=flatten,student=flatten", "--clip-norm", 1)
    for treatment in ("skip", "hard"):
        stages("student", "--cache", "a", "--arch", "cnn", "--epochs", 1, *terms, "--missing", treatment)
    for number in (1, 2):
        delete_shard("a", f"draw-000/shard-0000{number}.h5")
    error = stages.fails(1, "student", "--cache", "a", "--arch", "cnn", "--epochs", 1, *terms, "--missing", "hard")
    assert "has no row of the first draw" in error


def test_missing_features_count_in_the_first_cache_only(pair: tuple[str, ...], tiny: Path, stages: Stages) -> None:
    command = (
        "teacher-cache",
        "--train-size",
        300,
        "--weights",
        tiny / "runs/teacher",
        "--views",
        "crop:pad=1",
        "--draws",
        3,
        "--shard-rows",
        120,
        "--codec",
        "float32",
        "--out",
        "c",
    )
    assert stages.call(*command)[0] == 0
    assert stages.call(*command, "--taps", "pool1")[0] == 0
    delete_shard("c", "draw-000/shard-00000-1.h5")
    hint = ("--arch", "cnn", "--epochs", 1, "--loss", "kd", "--loss", "hint:teacher=pool1", "--missing", "skip")
    _, out, _ = stages.call("student", "--cache", "a", "--cache", "c", *hint)
    assert ": 0 of 300 rows have no targets" in out
    _, out, _ = stages.call("student", "--cache", "c", "--cache", "a", *hint)
    assert ": 100 of 300 rows have no targets" in out


@pytest.mark.parametrize("treatment", ["skip", "hard"])
def test_a_stopped_run_is_continued_only_with_the_same_rows_missing(
    pair: tuple[str, ...], stages: Stages, monkeypatch: pytest.MonkeyPatch, treatment: str
) -> None:
    shard = Path("a/draw-000/shard-00000.h5").read_bytes()
    delete_shard("a", "draw-000/shard-00000.h5")
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert stages.call("student", "--cache", "a", *STUDENT, "--missing", treatment, "--out", "r")[0] == 130
    Path("a/draw-000/shard-00000.h5").write_bytes(shard)
    assert '{"0": [[0, 100]]}' in stages.fails(1, "student", "--resume", "--out", "r")
    delete_shard("a", "draw-000/shard-00000.h5")
    delete_shard("a", "draw-002/shard-00001.h5")
    assert "missing.2" in stages.fails(1, "student", "--resume", "--out", "r")


def test_hidden_labels_cannot_replace_missing_targets(pair: tuple[str, ...], stages: Stages) -> None:
    command = ("student", "--cache", "a", *STUDENT, "--missing", "hard", "--labelled", 50)
    assert "--missing hard needs the labels of all rows" in stages.fails(2, *command)


def test_a_finished_run_is_resumed_only_with_the_same_rows_missing(pair: tuple[str, ...], stages: Stages) -> None:
    """A shard that was restored or deleted in between would change what the rest of a training learns from."""
    command = ("student", "--cache", "a", *STUDENT, "--missing", "skip", "--out")
    stages(*command, "uninterrupted")
    shard = Path("a/draw-001/shard-00001.h5").rename("elsewhere.h5")
    stages(*command, "less")
    assert json.loads(Path("less/cache.json").read_text())["missing"] == {"1": [[100, 200]]}
    stages("student", "--resume", "--out", "less")
    assert "missing" in stages.fails(1, "student", "--resume", "--out", "uninterrupted")
    shard.rename("a/draw-001/shard-00001.h5")
    assert "[[100, 200]]" in stages.fails(1, "student", "--resume", "--out", "less")
    stages("student", "--resume", "--out", "uninterrupted")


def test_the_next_commands_keep_combination_map_and_missing_rows(pair: tuple[str, ...], stages: Stages) -> None:
    options = ("--combine", "vote", "--map", "prior", "--missing", "skip")
    _, out, _ = stages.call("student", *pair, *STUDENT, *options, "--out", "r")
    assert f"student {' '.join((*pair, *options))} --arch cnn --baseline" in out
    rows = {row["name"]: row["val"]["nll"] for row in stages("blend", *pair)["rows"][2:]}
    _, out, _ = stages.call("blend", *pair)
    assert f"student {' '.join(pair)} --combine {min(rows, key=rows.__getitem__)}" in out


def test_the_option_missing_changes_nothing_when_no_row_is_missing(pair: tuple[str, ...], stages: Stages) -> None:
    plain = stages("student", "--cache", "a", *STUDENT, "--out", "p")
    for treatment in ("skip", "hard"):
        student = stages("student", "--cache", "a", *STUDENT, "--missing", treatment, "--out", treatment)["student"]
        assert student == plain["student"] | {k: student[k] for k in ("seconds", "images_per_second")}


def test_a_held_out_row_that_is_missing_is_always_an_error(pair: tuple[str, ...], stages: Stages) -> None:
    delete_shard("a", "val/shard-00000.h5")
    assert "val/shard-00000.h5" in stages.fails(1, "student", "--cache", "a", *STUDENT, "--missing", "skip")


def test_an_ensemble_of_one_cache_has_the_targets_of_the_cache(two_caches: Path) -> None:
    cache = CacheReader(two_caches / "a")
    ensemble, positions = TeacherEnsemble((cache,)), np.array([5, 250, 17])
    logits, features = ensemble.read_targets("train", 1, positions, ("pool1",))
    expected_logits, expected_features = cache.read_targets("train", 1, positions, ("pool1",))
    assert torch.equal(logits, expected_logits)
    assert torch.equal(features["pool1"], expected_features["pool1"])


def test_a_chain_starts_from_the_combined_teacher_and_continues_from_its_student(
    pair: tuple[str, ...], stages: Stages
) -> None:
    chain = stages(
        "born-again",
        *pair,
        "--arch",
        "mlp:8",
        "--epochs",
        2,
        "--loss",
        "kd",
        "--combine",
        "vote",
        "--map",
        "prior",
        "--generations",
        2,
        "--out",
        "chain",
    )
    assert chain["teacher"]["arch"] == "cnn + mlp:16"
    assert Path("chain/generation-1/targets.json").is_file()
    assert not Path("chain/generation-2/targets.json").exists()


def test_the_best_of_a_search_over_several_caches_is_reproduced_by_its_command(
    pair: tuple[str, ...], stages: Stages
) -> None:
    options = (
        "--combine",
        "learned",
        "--map",
        "prior",
        "--search",
        "kd.temperature=1..8",
        "--trials",
        2,
        "--out",
        "s",
    )
    best = stages("tune", *pair, *STUDENT, *options)["best"]
    stages(*shlex.split(best["command"].split(" -m softcache ")[1]), "--out", "again")
    weights = Path("again/student.pt").read_bytes()
    assert weights == Path(f"s/trial-{best['trial']:04d}/student.pt").read_bytes()
