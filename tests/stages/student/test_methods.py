"""The table of methods: every loss is in it, its costs are those measured, and a failure is a row of the table."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from softcache.pipeline.losses import LOSSES, parse_losses
from softcache.stages.main import main
from softcache.stages.student.methods import list_methods
from tests.helpers.commands import Stages

SHORT = ("--arch", "cnn", "--epochs", 1, "--draws", 1, "--time-steps", 1)


def test_every_loss_is_in_a_method() -> None:
    layers = {"all": "a+b", "last": "b", "s_all": "c+d", "s_last": "d"}
    for task in ("classes", "labels", "numbers"):
        specs = [[spec.format(**layers) for spec in specs] for specs in list_methods(task).values()]
        names = {loss.name for method in specs for loss in parse_losses(method)}
        missing = {name for name, loss in LOSSES.items() if task in loss.tasks} - names
        # Losses that stand beside a loss of classes in METHODS.
        assert missing <= ({"srrl"} if task != "classes" else set()), (task, missing)


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished table of seven methods."""
    out = tmp_path_factory.mktemp("methods") / "m"
    only = ("--only", "kd,dkd,hint,srrl,concat_hint,crd", "--layers", "pool1")
    main([str(word) for word in ("methods", "--cache", tiny / "cache", *only, *SHORT, "--out", out)])
    return out


@pytest.fixture
def table(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "methods.json").read_text())
    return record


def test_the_table_has_hard_and_the_given_methods(table: dict[str, Any], folder: Path) -> None:
    rows = {row["method"]: row for row in table["methods"]}
    assert set(rows) == {"hard", "kd", "dkd", "hint", "srrl", "concat_hint", "crd"}
    text = (folder / "methods.md").read_text()
    assert all(f"| {name} |" in text for name in rows)
    for name in ("kd", "crd"):
        run = json.loads((folder / name / "result.json").read_text())
        assert rows[name]["accuracy"]["test"] == run["student"]["test"]["accuracy"]


def test_bytes_of_a_view_are_those_that_the_losses_read(table: dict[str, Any]) -> None:
    """10 float16 logits; pool1 of the teacher is 64 x 4 x 4 in float16, from which its pooled values are computed."""
    size = {row["method"]: row.get("bytes_a_view") for row in table["methods"]}
    assert size["hard"] == 0
    assert size["kd"] == size["dkd"] == 20
    assert size["hint"] == size["concat_hint"] == size["crd"] == 2 * 64 * 4 * 4


def test_own_bytes_are_those_of_the_parts_that_losses_have(table: dict[str, Any]) -> None:
    size = {row["method"]: row.get("own_bytes") for row in table["methods"]}
    assert size["hard"] == size["kd"] == 0
    assert size["concat_hint"] == 4 * (64 * 64 + 64)
    assert size["crd"] > 300 * (2 * 64)  # two embeddings, and the bank of 300 rows


def test_times_are_ratios_to_hard_of_the_same_round(table: dict[str, Any]) -> None:
    for row in table["methods"]:
        if "ratio" in row:
            assert row["least"] <= row["ratio"] <= row["most"]
    rows = {row["method"]: row for row in table["methods"]}
    assert rows["hard"]["ratio"] == rows["kd"]["to_kd"] == 1.0


def test_a_method_that_the_pair_does_not_allow_is_a_row_with_the_reason(table: dict[str, Any]) -> None:
    """The last layer of cnn reads a flattened map, not its mean, so that srrl cannot use it."""
    row = next(row for row in table["methods"] if row["method"] == "srrl")
    assert "last linear layer takes" in row["failed"]


def test_a_method_that_diverges_is_a_row_too(tiny: Path, tmp_path: Path, stages: Stages) -> None:
    options = ("--only", "logit_mse", "--learning-rate", 1e9, "--layers", "pool1")
    record = stages("methods", "--cache", tiny / "cache", *options, *SHORT, "--out", tmp_path / "m")
    assert any("diverged" in row.get("failed", "") for row in record["methods"])


def test_the_same_command_keeps_students_that_are_finished(
    table: dict[str, Any], folder: Path, tiny: Path, tmp_path: Path, stages: Stages
) -> None:
    out, metrics = tmp_path / "m", (folder / "kd/metrics.jsonl").read_text()
    shutil.copytree(folder, out)
    only = ("--only", "kd,cc", "--layers", "pool1", *SHORT)
    rows = {row["method"]: row for row in stages("methods", "--cache", tiny / "cache", *only, "--out", out)["methods"]}
    assert set(rows) == {"hard", "kd", "cc"}
    assert (out / "kd/metrics.jsonl").read_text() == metrics
    assert rows["kd"]["accuracy"] == next(row["accuracy"] for row in table["methods"] if row["method"] == "kd")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "kdd"), "Did you mean 'kd'"),
        (("--seeds", 2), "takes no"),
        (("--loss", "kd"), "takes no"),
    ],
)
def test_options_that_the_table_does_not_take_are_one_line(
    tiny: Path, stages: Stages, options: Any, message: str
) -> None:
    assert message in stages.fails(2, "methods", "--cache", tiny / "cache", *SHORT, *options)


def test_layers_go_from_shallow_to_deep_in_whatever_order_they_were_cached(
    tiny: Path, tmp_path: Path, stages: Stages
) -> None:
    """The cache is made with a deep tap, then a shallow one is added."""
    options = ("--train-size", 300, "--weights", tiny / "runs/teacher", "--draws", 1, "--out", "grown")
    stages("teacher-cache", *options, "--taps", "pool2")
    stages("teacher-cache", *options, "--taps", "conv1:pool")
    only = ("--only", "concat_hint", *SHORT, "--out", tmp_path / "m")
    row = stages("methods", "--cache", "grown", *only)["methods"][1]
    assert row["losses"][1] == "concat_hint:teacher=conv1+pool2,student=conv1+pool2"
    line = stages.fails(2, "methods", "--cache", "grown", *SHORT, "--arch", "mlp:8")
    assert "name them from shallow to deep with --layers" in line


def test_without_taps_the_methods_of_layers_are_left_out_and_named(tiny: Path, tmp_path: Path, stages: Stages) -> None:
    options = ("--train-size", 300, "--weights", tiny / "runs/teacher", "--draws", 1, "--out", tmp_path / "bare")
    stages("teacher-cache", *options)
    assert "'hint' reads layers" in stages.fails(2, "methods", "--cache", tmp_path / "bare", "--only", "hint", *SHORT)
    code, out, _ = stages.call("methods", "--cache", tmp_path / "bare", *SHORT, "--out", tmp_path / "m")
    assert code == 0
    assert "the cache has no taps: left out are output + hint, hint, concat_hint" in out
    assert "| dkd |" in out
    assert "| hint |" not in out
