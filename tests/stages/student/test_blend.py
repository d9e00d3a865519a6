"""Several caches, one teacher: what a student is told, what is refused, rows that are missing."""

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
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.losses import LOSSES
from softcache.pipeline.losses.multi_teacher import ConfidenceWeighted, HardFallback, wrap_loss
from softcache.pipeline.teachers.combine import confidence_weights
from softcache.pipeline.teachers.ensemble import TeacherEnsemble
from softcache.stages.training.step import ActiveTraining
from tests.helpers.commands import Stages, tiny_cache_command

STUDENT = ("--arch", "mlp:8", "--epochs", 2, "--loss", "kd:temperature=2")


@pytest.fixture(scope="session")
def two(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The caches `a` (the tiny one) and `b`, of another teacher over the same views."""
    from softcache.stages.main import main

    home = tmp_path_factory.mktemp("two")
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
def pair(two: Path, tmp_path: Path) -> tuple[str, ...]:
    """Copies of both caches as arguments of a command."""
    for name in ("a", "b"):
        shutil.copytree(two / name, tmp_path / name)
    return ("--cache", "a", "--cache", "b")


def logits_of(folder: str, split: str = "test") -> torch.Tensor:
    """float32 [N, K] by index."""
    cache = Cache(Path(folder))
    order = cache.row_order(split)
    found = torch.empty(len(order), 10)
    found[torch.from_numpy(order)] = cache.read_targets(split, 0, np.arange(len(order)))[0]
    return found


def labels_of(split: str) -> torch.Tensor:
    return torch.from_numpy(
        load_transfer_set("digits", Path(), val_fraction=0.125, train_size=300).splits[split].labels
    )


def batches_of_a_training(patch: pytest.MonkeyPatch) -> list[Batch]:
    """Every batch that a student is trained on from now on."""
    seen: list[Batch] = []
    step = training.train_step

    def noting(active: ActiveTraining, batch: Batch, *rest: Any) -> torch.Tensor:
        if active.run.name == "student":
            seen.append(batch)
        return step(active, batch, *rest)

    patch.setattr(training, "train_step", noting)
    return seen


def stop_at_the_seventh_step(patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when that step is about to be taken."""
    step, taken = training.train_step, [0]

    def stopping(*arguments: Any) -> torch.Tensor:
        taken[0] += 1
        if taken[0] == 7:
            raise KeyboardInterrupt
        return step(*arguments)

    patch.setattr(training, "train_step", stopping)


# The table


def test_the_table_has_every_member_and_every_way_with_its_figures(pair: tuple[str, ...], stages: Stages) -> None:
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
    a, b, labels = logits_of("a"), logits_of("b"), labels_of("test")
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


def test_one_cache_is_no_blend(pair: tuple[str, ...], stages: Stages) -> None:
    assert "blend compares several caches" in stages.fails(2, "blend", "--cache", "a")


# What a student is told


@pytest.mark.parametrize("spec", ["", "mean_logit", "weighted:0.25,0.75", "vote", "learned"])
def test_a_student_is_told_the_blend_of_its_own_rows(
    pair: tuple[str, ...], stages: Stages, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    seen = batches_of_a_training(monkeypatch)
    asked = ("--combine", spec) if spec else ()
    result = stages("student", *pair, *STUDENT, *asked, "--out", "r")
    rows = {row["name"]: row for row in stages("blend", *pair, *asked)["rows"]}
    name = spec.partition(":")[0] or "mean_probability"
    for split in ("val", "test"):
        assert result["teacher"][split]["nll"] == pytest.approx(rows[name][split]["nll"], rel=1e-9)
        assert result["members"][1][split]["nll"] == pytest.approx(rows["mlp:16 (b)"][split]["nll"], rel=1e-9)
    assert result["teacher"]["arch"] == "cnn + mlp:16"
    kept = json.loads(Path("r/targets.json").read_text())["combine"]
    assert kept["weights"] == pytest.approx(rows[name]["weights"])
    caches = Cache(Path("a")), Cache(Path("b"))
    place = np.argsort(caches[0].row_order("train"))
    weights, temperatures = torch.tensor(kept["weights"]), torch.tensor(kept["temperatures"])
    for batch in seen:
        each = [c.read_stored("train", batch.draw, place[batch.index.numpy()])[0] for c in caches]
        assert batch.logits is not None
        if name in ("mean_probability", "weighted", "learned"):
            p = sum(w * F.softmax(z / t, 1) for w, z, t in zip(weights, each, temperatures, strict=True))
        elif name == "mean_logit":
            p = F.softmax((each[0] + each[1]) / 2, 1)
        else:
            p = 0.999 * sum(F.one_hot(z.argmax(1), 10) for z in each) / 2
            p = p + 0.001 * (F.softmax(each[0], 1) + F.softmax(each[1], 1)) / 2
        torch.testing.assert_close(F.softmax(batch.logits, 1), p, rtol=1e-4, atol=1e-6)
    again = stages("evaluate", "r")["0"]["test"]
    assert again["kl_to_teacher"] == pytest.approx(result["student"]["test"]["kl_to_teacher"], rel=1e-6)


def test_features_are_the_first_caches(pair: tuple[str, ...], stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = batches_of_a_training(monkeypatch)
    stages("student", *pair, "--arch", "cnn", "--epochs", 1, "--loss", "kd", "--loss", "hint:teacher=pool1")
    cache = Cache(Path("a"))
    place = np.argsort(cache.row_order("train"))
    expected = cache.read_stored("train", seen[0].draw, place[seen[0].index.numpy()], ("pool1",))[1]["pool1"]
    assert torch.equal(seen[0].features["pool1"], expected)


def batch_of(M: int = 3, B: int = 6, K: int = 4) -> tuple[ModelOutputs, Batch]:
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 3, -1, 1])[:B]
    logits = torch.randn(B, M, K, dtype=torch.float64)
    views = torch.zeros(B, 1, 2, 2, dtype=torch.uint8)
    student = ModelOutputs(torch.randn(B, K, dtype=torch.float64, requires_grad=True))
    return student, Batch(torch.arange(B), 0, views, labels, logits)


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "logit_mse", "hard"])
def test_per_teacher_is_the_mean_of_the_losses(name: str) -> None:
    student, target = batch_of()
    assert target.logits is not None
    loss = LOSSES[name]
    single = [loss(student, replace(target, logits=target.logits[:, k]), None) for k in range(3)]
    torch.testing.assert_close(wrap_loss(loss, "per_teacher")(student, target, None), sum(single) / 3)


@pytest.mark.parametrize(("name", "scale"), [("kd", 16), ("output", 16), ("logit_mse", 1)])
def test_confidence_weighted_weighs_every_row_by_how_right_each_teacher_is(name: str, scale: float) -> None:
    student, target = batch_of()
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
    found = ConfidenceWeighted(LOSSES[name])(student, target, None)
    torch.testing.assert_close(found, total, rtol=1e-6, atol=1e-9)
    found.backward()  # type: ignore[no-untyped-call]
    assert student.logits.grad is not None
    assert student.logits.grad.abs().sum() > 0


def test_rows_without_an_answer_cost_their_cross_entropy() -> None:
    student, target = batch_of(M=1)
    assert target.logits is not None
    logits = target.logits[:, 0].clone()
    logits[1] = logits[5] = torch.nan
    target = replace(target, logits=logits)
    kept = torch.tensor([0, 2, 3, 4])
    soft = LOSSES["kd"](student.select(kept), target.select(kept), None)
    hard = F.cross_entropy(student.logits[[1, 5]], target.labels[[1, 5]])
    found = HardFallback(LOSSES["kd"])(student, target, None)
    torch.testing.assert_close(found, (4 * soft + 2 * hard) / 6)
    found.backward()  # type: ignore[no-untyped-call]
    assert student.logits.grad is not None
    assert student.logits.grad.isfinite().all()
    torch.testing.assert_close(
        wrap_loss(LOSSES["hard"], missing_to_labels=True)(student, target, None),
        LOSSES["hard"](student, target, None),
    )
    none = replace(target, logits=torch.full_like(logits, torch.nan))
    torch.testing.assert_close(HardFallback(LOSSES["kd"])(student, none, None), LOSSES["hard"](student, target, None))


@pytest.mark.parametrize("combine", ["per_teacher", "ca_mkd"])
def test_a_student_hears_each_teacher_by_itself(
    pair: tuple[str, ...], stages: Stages, monkeypatch: pytest.MonkeyPatch, combine: str
) -> None:
    seen = batches_of_a_training(monkeypatch)
    result = stages("student", *pair, *STUDENT, "--combine", combine, "--map", "temperature", "--out", "r")
    assert seen[0].logits is not None
    assert seen[0].logits.shape[1:] == (2, 10)
    maps = json.loads(Path("r/targets.json").read_text())["maps"]
    assert len(maps) == 2
    place = np.argsort(Cache(Path("a")).row_order("train"))[seen[0].index.numpy()]
    for k, name in enumerate("ab"):
        raw = Cache(Path(name)).read_stored("train", seen[0].draw, place)[0]
        torch.testing.assert_close(seen[0].logits[:, k], raw * maps[k]["weight"][0])
    assert result["student"]["test"]["agreement"] > 0
    one = stages("student", *pair, *STUDENT, "--out", "one")
    assert one["student"]["val"]["nll"] != result["student"]["val"]["nll"]


def test_a_run_of_several_caches_is_stopped_and_goes_on_to_the_same_weights(
    pair: tuple[str, ...], stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("student", *pair, *STUDENT, "--combine", "learned")
    stages(*command, "--out", "whole")
    with monkeypatch.context() as patch:
        stop_at_the_seventh_step(patch)
        assert stages.call(*command, "--out", "r")[0] == 130
    stages("student", "--resume", "--out", "r")
    assert Path("r/student.pt").read_bytes() == Path("whole/student.pt").read_bytes()
    others = json.loads(Path("r/cache.json").read_text())["others"]
    assert [other["fingerprint"] for other in others] == [Cache(Path("b")).manifest.fingerprint]


# What is refused


def made(folder: Path, *more: str) -> None:
    """The tiny cache's command, with another policy, seed, data or order of classes."""
    from softcache.stages.main import main

    main([*tiny_cache_command(folder, "other"), *more])


@pytest.mark.parametrize(
    ("more", "field"),
    [
        (("--views", "crop:pad=2"), "views.pad"),
        (("--seed", "1"), "views.seed"),  # another order of rows, and another cut
        (("--train-size", "299"), "transfer_set.content.train"),
    ],
)
def test_caches_of_other_views_order_or_rows_are_refused(
    tiny: Path, tmp_path: Path, stages: Stages, more: tuple[str, ...], field: str
) -> None:
    shutil.copytree(tiny / "runs", tmp_path / "runs")
    made(tmp_path, *more)
    for command in (("student", *STUDENT), ("blend",)):
        refused = stages.fails(1, *command, "--cache", tiny / "cache", "--cache", "other")
        assert "are not of the same rows and views" in refused
        assert field in refused
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
    refused = stages.fails(1, "blend", "--cache", "a", "--cache", "b")
    assert "transfer_set.classes" in refused


@pytest.mark.parametrize(
    ("arguments", "code", "wrong"),
    [
        (("--cache", "a", "--cache", "a"), 2, "'a' and 'a' are the same cache: one --cache is enough"),
        (("--cache", "a", "--cache", "b", "--cache", "b"), 2, "'b' and 'b' are the same cache"),
        (("--cache", "a", "--combine", "vote"), 2, "--combine vote is of several caches: --cache A --cache B"),
        (("--cache", "a", "--cache", "c"), 1, "there is no cache at 'c'"),
        (("--cache", "a", "--cache", "b", "--combine", "weighted:0.5,0.4"), 2, "add up to 1, these to 0.9"),
        (("--cache", "a", "--cache", "b", "--combine", "ca_mkd", "--loss", "dkd"), 2, "which loss 'dkd' has not"),
        (
            ("--cache", "a", "--cache", "b", "--loss", "srrl:teacher=flatten,student=flatten"),
            2,
            "loss 'srrl' goes through the last layer of one teacher, and there are several",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_before_a_run_is_begun(
    pair: tuple[str, ...], stages: Stages, arguments: tuple[str, ...], code: int, wrong: str
) -> None:
    loss = () if "--loss" in arguments else ("--loss", "kd")
    assert wrong in stages.fails(code, "student", "--arch", "cnn", "--epochs", 1, *loss, *arguments, "--out", "r")
    assert not Path("r").exists()


def test_a_cache_with_fewer_draws_says_how_to_get_more(pair: tuple[str, ...], two: Path, stages: Stages) -> None:
    shutil.rmtree("b")
    stages("teacher-cache", "--train-size", 300, "--weights", two / "t", "--views", "crop:pad=1", "--out", "b")
    refused = stages.fails(1, "student", *pair, *STUDENT)
    assert "--draws 3, but the cache 'b' has 1" in refused
    assert "teacher-cache" in refused
    stages("student", *pair, *STUDENT, "--draws", 1)


@pytest.mark.parametrize("combine", ["per_teacher", "ca_mkd"])
def test_ways_that_blend_losses_have_no_row_in_the_table(pair: tuple[str, ...], stages: Stages, combine: str) -> None:
    assert "blends losses, not teachers" in stages.fails(2, "blend", *pair, "--combine", combine)


def test_a_student_is_evaluated_against_its_own_teachers_in_their_order(pair: tuple[str, ...], stages: Stages) -> None:
    stages("student", *pair, *STUDENT, "--combine", "weighted:0.9,0.1", "--out", "r")
    shutil.move("a", "moved-a")
    shutil.move("b", "moved-b")
    a, b = ("--cache", "moved-a"), ("--cache", "moved-b")
    stages("evaluate", "r", *a, *b)
    for others in ((*b, *a), a):
        refused = stages.fails(1, "evaluate", "r", *others)
        assert "was trained from the caches" in refused
    assert "with other shards than 'moved-b', 'moved-a'" in stages.fails(
        1, "student", "--resume", "--out", "r", *b, *a
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: kept["combine"].update(weights=[10**400, 1]),
        lambda kept: kept["combine"].update(weights=[2, 3]),
        lambda kept: kept["combine"].update(weights=[0.25, 0.75]),
        lambda kept: kept["combine"].update(combine="vote"),
        lambda kept: kept.update(combine=None),
        lambda kept: kept["maps"][0].update(weight=[10**400] * 10),
        lambda kept: kept["maps"][0].update(weight=[0] * 10),
        lambda kept: kept["maps"][0].update(map="vector"),
        lambda kept: kept["maps"].append(kept["maps"][0]),
        lambda kept: kept.pop("maps"),
    ],
)
def test_targets_that_are_not_of_the_runs_settings_are_refused(
    pair: tuple[str, ...], stages: Stages, damage: Any
) -> None:
    stages("student", *pair, *STUDENT, "--epochs", 1, "--map", "temperature", "--out", "r")
    kept = json.loads(Path("r/targets.json").read_text())
    damage(kept)
    Path("r/targets.json").write_text(json.dumps(kept))
    assert "'r/targets.json' is damaged" in stages.fails(1, "evaluate", "r")


def test_settings_without_a_cache_are_refused(pair: tuple[str, ...], stages: Stages) -> None:
    stages("student", "--cache", "a", *STUDENT, "--epochs", 1, "--out", "r")
    settings = json.loads(Path("r/settings.json").read_text())
    Path("r/settings.json").write_text(json.dumps(settings | {"cache": []}))
    for command in (("evaluate", "r"), ("student", "--resume", "--out", "r")):
        assert "the run's settings name no cache" in stages.fails(1, *command)


def test_what_is_said_afterwards_is_a_command_with_the_same_teachers(pair: tuple[str, ...], stages: Stages) -> None:
    asked = (*pair, "--combine", "mean_logit", "--map", "prior:tau=0.5", "--data-root", "some where")
    _, out, _ = stages.call("student", *asked, "--arch", "mlp:8", "--epochs", 1, "--loss", "hard")
    assert "no loss here reads what the teacher says" in out
    said = next(line for line in out.splitlines() if line.startswith("next:"))
    command = shlex.split(said.partition(" -m softcache ")[2])
    assert set(map(str, asked)) <= set(command)
    assert command.count("--cache") == 2
    assert stages.call(*command, "--epochs", 1)[0] == 0
    _, out, _ = stages.call("student", *pair, *STUDENT)
    assert "no loss here" not in out


def test_the_table_of_methods_is_of_the_blend(pair: tuple[str, ...], stages: Stages) -> None:
    methods = stages(
        "methods", *pair, "--arch", "mlp:8", "--epochs", 1, "--only", "kd", "--layers", "flatten", "--time-steps", 1
    )
    blended = {row["name"]: row for row in stages("blend", *pair)["rows"]}["mean_probability"]
    assert methods["teacher"]["arch"] == "cnn + mlp:16"
    assert methods["teacher"]["test"]["accuracy"] == blended["test"]["accuracy"]
    assert [row["bytes_a_view"] for row in methods["methods"]] == [0, 2 * 10 * 2]


# Missing rows


def lose(folder: str, name: str) -> None:
    Path(folder, name).unlink()


def test_a_lost_shard_is_an_error_unless_it_is_said_what_to_do(pair: tuple[str, ...], stages: Stages) -> None:
    lose("b", "draw-001/shard-00001.h5")
    assert "shard-00001.h5" in stages.fails(1, "student", *pair, *STUDENT)


@pytest.mark.parametrize("how", ["skip", "hard"])
@pytest.mark.parametrize("caches", [("--cache", "a"), ("--cache", "b", "--cache", "a")])
def test_missing_rows_are_skipped_or_learned_from_labels_and_counted(
    pair: tuple[str, ...], stages: Stages, monkeypatch: pytest.MonkeyPatch, how: str, caches: tuple[str, ...]
) -> None:
    lose("a", "draw-001/shard-00001.h5")
    gone = set(Cache(Path("a")).row_order("train")[100:200].tolist())
    seen = batches_of_a_training(monkeypatch)
    code, out, _ = stages.call("student", *caches, *STUDENT, "--epochs", 3, "--missing", how, "--out", "r")
    assert code == 0
    assert f"--missing {how}: 100 of 300 rows have no answer in some draw" in out
    shown = {int(i) for batch in seen for i in batch.index}
    if how == "skip":
        assert shown == set(range(300)) - gone
        assert not any(batch.logits.isnan().any() for batch in seen if batch.logits is not None)
        return
    assert shown == set(range(300))
    for batch in seen:
        assert batch.logits is not None
        lost = {int(i) for i in batch.index[batch.logits.isnan().any(1)]}
        assert lost == ({int(i) for i in batch.index} & gone if batch.draw == 1 else set())


def test_a_draw_without_any_row_is_learned_from_labels_or_there_is_nothing_to_skip_to(
    pair: tuple[str, ...], stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        lose("a", f"draw-001/shard-0000{number}.h5")
    seen = batches_of_a_training(monkeypatch)
    for caches in (("--cache", "a"), pair, (*pair, "--combine", "ca_mkd")):
        stages("student", *caches, *STUDENT, "--epochs", 3, "--missing", "hard")
    for batch in seen:
        assert batch.logits is not None
        assert bool(batch.logits.isnan().all()) == bool(batch.logits.isnan().any()) == (batch.draw == 1)
    refused = stages.fails(1, "student", "--cache", "a", *STUDENT, "--missing", "skip", "--out", "r")
    assert "no row of the training split is left" in refused
    assert not Path("r").exists()


@pytest.mark.parametrize("loss", ["crd", "srrl"])
def test_losses_that_read_rows_beforehand_do_without_the_missing_ones(
    pair: tuple[str, ...], stages: Stages, loss: str
) -> None:
    lose("a", "draw-000/shard-00000.h5")
    terms = ("--loss", "kd", "--loss", f"{loss}:teacher=flatten,student=flatten", "--clip-norm", 1)
    for how in ("skip", "hard"):
        stages("student", "--cache", "a", "--arch", "cnn", "--epochs", 1, *terms, "--missing", how)
    for number in (1, 2):
        lose("a", f"draw-000/shard-0000{number}.h5")
    refused = stages.fails(1, "student", "--cache", "a", "--arch", "cnn", "--epochs", 1, *terms, "--missing", "hard")
    assert "has no row of the first draw" in refused


def test_the_features_of_other_caches_than_the_first_are_not_missed(
    pair: tuple[str, ...], tiny: Path, stages: Stages
) -> None:
    make = (
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
    assert stages.call(*make)[0] == 0
    assert stages.call(*make, "--taps", "pool1")[0] == 0
    lose("c", "draw-000/shard-00000-1.h5")
    hint = ("--arch", "cnn", "--epochs", 1, "--loss", "kd", "--loss", "hint:teacher=pool1", "--missing", "skip")
    _, out, _ = stages.call("student", "--cache", "a", "--cache", "c", *hint)
    assert ": 0 of 300 rows have no answer" in out
    _, out, _ = stages.call("student", "--cache", "c", "--cache", "a", *hint)
    assert ": 100 of 300 rows have no answer" in out


@pytest.mark.parametrize("how", ["skip", "hard"])
def test_a_run_goes_on_with_the_same_rows_missing_and_no_others(
    pair: tuple[str, ...], stages: Stages, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    kept = Path("a/draw-000/shard-00000.h5").read_bytes()
    lose("a", "draw-000/shard-00000.h5")
    with monkeypatch.context() as patch:
        stop_at_the_seventh_step(patch)
        assert stages.call("student", "--cache", "a", *STUDENT, "--missing", how, "--out", "r")[0] == 130
    Path("a/draw-000/shard-00000.h5").write_bytes(kept)
    assert '{"0": [[0, 100]]}' in stages.fails(1, "student", "--resume", "--out", "r")
    lose("a", "draw-000/shard-00000.h5")
    lose("a", "draw-002/shard-00001.h5")
    assert "missing.2" in stages.fails(1, "student", "--resume", "--out", "r")


def test_labels_that_are_hidden_cannot_stand_in_for_answers(pair: tuple[str, ...], stages: Stages) -> None:
    command = ("student", "--cache", "a", *STUDENT, "--missing", "hard", "--labelled", 50)
    assert "--missing hard needs the labels of all rows" in stages.fails(2, *command)


def test_a_run_goes_on_with_the_rows_it_was_begun_with_alone(pair: tuple[str, ...], stages: Stages) -> None:
    """A shard that was put back, or lost, between two halves of a training would change what it learns from."""
    asked = ("student", "--cache", "a", *STUDENT, "--missing", "skip", "--out")
    stages(*asked, "whole")
    shard = Path("a/draw-001/shard-00001.h5").rename("elsewhere.h5")
    stages(*asked, "less")
    assert json.loads(Path("less/cache.json").read_text())["missing"] == {"1": [[100, 200]]}
    stages("student", "--resume", "--out", "less")
    assert "missing" in stages.fails(1, "student", "--resume", "--out", "whole")
    shard.rename("a/draw-001/shard-00001.h5")
    assert "[[100, 200]]" in stages.fails(1, "student", "--resume", "--out", "less")
    stages("student", "--resume", "--out", "whole")


def test_the_next_commands_keep_blend_map_and_what_is_missing(pair: tuple[str, ...], stages: Stages) -> None:
    how = ("--combine", "vote", "--map", "prior", "--missing", "skip")
    _, out, _ = stages.call("student", *pair, *STUDENT, *how, "--out", "r")
    assert f"student {' '.join((*pair, *how))} --arch cnn --baseline" in out
    rows = {row["name"]: row["val"]["nll"] for row in stages("blend", *pair)["rows"][2:]}
    _, out, _ = stages.call("blend", *pair)
    assert f"student {' '.join(pair)} --combine {min(rows, key=rows.__getitem__)}" in out


def test_with_every_row_there_nothing_changes(pair: tuple[str, ...], stages: Stages) -> None:
    plain = stages("student", "--cache", "a", *STUDENT, "--out", "p")
    for how in ("skip", "hard"):
        asked = stages("student", "--cache", "a", *STUDENT, "--missing", how, "--out", how)
        assert asked["student"] == plain["student"] | {
            k: asked["student"][k] for k in ("seconds", "images_per_second")
        }


def test_a_held_out_row_that_is_missing_is_always_an_error(pair: tuple[str, ...], stages: Stages) -> None:
    lose("a", "val/shard-00000.h5")
    assert "val/shard-00000.h5" in stages.fails(1, "student", "--cache", "a", *STUDENT, "--missing", "skip")


def test_the_teachers_of_a_cache_alone_are_the_cache(two: Path) -> None:
    cache = Cache(two / "a")
    alone, positions = TeacherEnsemble((cache,)), np.array([5, 250, 17])
    logits, features = alone.read_targets("train", 1, positions, ("pool1",))
    expected, theirs = cache.read_targets("train", 1, positions, ("pool1",))
    assert torch.equal(logits, expected)
    assert torch.equal(features["pool1"], theirs["pool1"])


def test_a_chain_begins_with_the_blend_and_goes_on_with_its_student(pair: tuple[str, ...], stages: Stages) -> None:
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


def test_a_search_over_several_caches_ends_with_a_command_that_gives_the_best_again(
    pair: tuple[str, ...], stages: Stages
) -> None:
    asked = ("--combine", "learned", "--map", "prior", "--search", "kd.temperature=1..8", "--trials", 2, "--out", "s")
    best = stages("tune", *pair, *STUDENT, *asked)["best"]
    stages(*shlex.split(best["command"].split(" -m softcache ")[1]), "--out", "again")
    found = Path("again/student.pt").read_bytes()
    assert found == Path(f"s/trial-{best['trial']:04d}/student.pt").read_bytes()
