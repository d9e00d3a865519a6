"""Networks of a user's own in every command: taken or refused before anything is written, errors in one line."""

import json
from pathlib import Path

import pytest
import torch

from softcache.pipeline.models import build
from tests.helpers.commands import Stages
from tests.helpers.networks import MODULE

FILE = "user_networks.py:"


def save_weights(name: str = "plain") -> None:
    """Save the weights of seed 0 of a network of user_networks.py as w.pt."""
    torch.manual_seed(0)
    torch.save(build(f"{MODULE}:{name}", 10, 1, 8).state_dict(), "w.pt")


def cache_command(name: str, *more: object) -> tuple[object, ...]:
    """The command that makes a cache of a teacher with the weights in w.pt."""
    teacher = ("--teacher", f"{MODULE}:{name}", "--weights", "w.pt", "--normalize", "data")
    return ("teacher-cache", "--train-size", 100, "--views", "none", "--draws", 1, *teacher, *more)


def student_command(tiny: Path, name: str, *more: object) -> tuple[object, ...]:
    """The command that trains a student for an epoch."""
    return ("student", "--cache", tiny / "cache", "--arch", f"{MODULE}:{name}", "--epochs", 1, *more)


# Students


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("FailsInTraining", (), f"failed in training mode: KeyError: 'targets' ({{}}{FILE}"),
        ("raises", (), "RuntimeError: weights of the hub"),
        ("Fixed", (), "; its input is [B, 1, 8, 8], of the size of the views"),
        ("too_wide", (), "it has 32 classes, the data have 10"),
        ("NoParameters", (), "has no trainable parameters"),
        ("rows_normalised", ("--batch-size", 1), "--batch-size 1 makes a batch of one row"),
        ("rows_normalised", ("--labelled", 10, "--baseline", "--batch-size", 7), ""),
        ("two_logits", (), "--output 0"),
        ("DropsAlways", (), "outputs random numbers in eval mode"),
        ("scripted", (), ""),
        ("plain", ("--output", "0"), "returns one tensor: leave it out"),
        ("rows_normalised", ("--seeds", 2, "--batch-size", 1), "--batch-size 1 makes a batch of one row"),
        ("FailsInTraining", ("--seed", 1, "--seed", 2), "failed in training mode"),
        ("FailsInTraining", ("--seed", 1, "--seed", 2, "--vectorize"), "failed in training mode"),
    ],
)
def test_a_student_that_fails_is_refused_before_its_folder_is_made(
    tiny: Path, stages: Stages, tmp_path: Path, name: str, more: tuple[object, ...], words: str
) -> None:
    command = (*student_command(tiny, name, *more), "--out", "run")
    if not words:
        assert stages.call(*command)[0] == 0
        return
    error = stages.fails(2, *command)
    assert "\n" not in error
    assert words.partition("{")[0] in error
    assert not (tmp_path / "run").exists()
    assert FILE in error or "(" not in words


@pytest.mark.parametrize("command", ["teacher", "born-again", "methods", "tune"])
def test_the_other_trainings_refuse_it_before_their_folder_is_made_too(
    tiny: Path, stages: Stages, tmp_path: Path, command: str
) -> None:
    more = {
        "teacher": ("--train-size", 100),
        "born-again": ("--cache", tiny / "cache", "--generations", 2),
        "methods": ("--cache", tiny / "cache", "--only", "kd"),
        "tune": ("--cache", tiny / "cache", "--search", "kd.temperature=1..4", "--trials", 1),
    }[command]
    error = stages.fails(2, command, *more, "--arch", f"{MODULE}:FailsInTraining", "--epochs", 1, "--out", "run")
    assert "failed in training mode: KeyError: 'targets'" in error
    assert not (tmp_path / "run").exists()


def test_an_error_in_the_middle_of_a_training_is_one_line_and_a_traceback_on_request(
    tiny: Path, stages: Stages
) -> None:
    command = student_command(tiny, "FailsLater", "--batch-size", 32, "--epochs", 2)
    error = stages.fails(1, *command, "--out", "run")
    assert "\n" not in error
    assert error.startswith("Error: your network failed: ValueError: a mistake in my own network (")
    assert FILE in error
    assert "in forward" in error
    for words in ((*command, "--out", "b", "--traceback"), ("--traceback", *command, "--out", "c")):
        code, _, text = stages.call(*words)
        assert code == 1
        assert text.count("Traceback (most recent call last)") == 1
        assert "in train_step" in text
        assert text.endswith(error + "\n")


def test_a_traceback_is_printed_for_every_kind_of_error(tiny: Path, stages: Stages) -> None:
    code, _, text = stages.call(*student_command(tiny, "raises"), "--traceback")
    assert code == 2
    assert "RuntimeError: weights of the hub" in text
    assert "The above exception was the direct cause" in text
    code, _, text = stages.call("student", "--cache", "nowhere", "--traceback")
    assert code == 1
    assert "in fill_defaults" in text
    code, _, text = stages.call("student", "--no-such-option", "--traceback")
    assert code == 2
    assert "no such option" in text.lower()


def test_a_student_with_other_outputs_in_training_is_trained_evaluated_resumed_and_exported(
    tiny: Path, stages: Stages, tmp_path: Path
) -> None:
    code, out, _ = stages.call(*student_command(tiny, "aux_first", "--output", "1", "--out", "run"))
    assert code == 0
    assert out.count("returns a list in training: its logits are trained, its other outputs are not") == 1
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert settings["output"] == "1"
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["student"]["output"] == "1"
    arch = ("--arch", f"{MODULE}:aux_first")
    assert stages("evaluate", "run", *arch)["0"]["test"]["accuracy"] == result["student"]["test"]["accuracy"]
    assert "logits" in str(stages("export", "run", *arch)["outputs"])


def test_a_student_that_ends_in_a_softmax_is_noted(tiny: Path, stages: Stages) -> None:
    code, out, _ = stages.call(*student_command(tiny, "EndsInSoftmax", "--out", "run"))
    assert code == 0
    assert "outputs rows that sum to 1, as after a softmax" in out


def test_a_network_that_returns_other_rows_than_it_gets_is_one_line(tiny: Path, stages: Stages) -> None:
    error = stages.fails(2, *student_command(tiny, "AtMostEightRows", "--batch-size", 20, "--out", "run"))
    assert "outputs [8, 10] for 20 images, not one row for each" in error


def test_what_a_network_prints_is_not_in_the_json(tiny: Path, stages: Stages) -> None:
    code, out, err = stages.call(*student_command(tiny, "Prints", "--out", "run"), "--json")
    assert code == 0
    assert json.loads(out)["student"]
    assert "hello from forward" in err


def test_weights_that_are_no_numbers_are_named(stages: Stages) -> None:
    save_weights()
    state = torch.load("w.pt", weights_only=True)
    torch.save(state | {"4.bias": torch.full((10,), torch.nan)}, "w.pt")
    error = stages.fails(1, *cache_command("plain"))
    assert "values that are no numbers (NaN): 4.bias" in error


def test_students_with_named_outputs_are_trained_as_one_model(tiny: Path, stages: Stages) -> None:
    results = stages(*student_command(tiny, "dictionary", "--seed", 0, "--seed", 1, "--vectorize", "--out", "run"))
    assert len(results["students"]) == 2
    alone = stages(*student_command(tiny, "plain", "--seed", 0, "--out", "alone"))
    accuracy = results["students"]["seed-0"]["student"]["val"]["accuracy"]
    assert accuracy == pytest.approx(alone["student"]["val"]["accuracy"], abs=0.02)


def test_an_option_at_its_default_is_not_in_the_manifest(tiny: Path) -> None:
    assert "output" not in (tiny / "cache/manifest.json").read_text()


# Teachers


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("two_logits", "a tuple (0: [2, 10], 1: [2, 10]), which of them are the logits is not clear: name them with"),
        ("scores", "--output scores"),
        ("too_wide", "the teacher outputs 32 classes, the data have 10"),
        ("spatial", "outputs [2, 10, 1, 1], not logits [B, 10]"),
        ("FailsInEval", f"failed: NotImplementedError ({{}}{FILE}"),
        ("nothing", "returns None"),
    ],
)
def test_a_teacher_that_fails_is_refused_before_its_cache_is_made(
    stages: Stages, tmp_path: Path, name: str, words: str
) -> None:
    save_weights(name)
    error = stages.fails(2, *cache_command(name, "--out", "c"))
    assert "\n" not in error
    assert words.partition("{")[0] in error
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["no_arguments", "ready", "Net", "dictionary", "one_tuple", "half", "Views"])
def test_a_teacher_of_another_form_is_cached(stages: Stages, name: str) -> None:
    save_weights(name)
    result = stages(*cache_command(name, "--out", "c"))
    assert result["rows"] > 100
    assert stages.call("check-cache", "c", "--deep", "--weights", "w.pt", "--teacher", f"{MODULE}:{name}")[0] == 0


def test_the_output_of_a_teacher_is_recorded_in_its_cache(stages: Stages, tmp_path: Path) -> None:
    save_weights("two_keys")
    fingerprints = {}
    for output in ("cls", "dist"):
        fingerprints[output] = stages(*cache_command("two_keys", "--output", output, "--out", output))["fingerprint"]
        manifest = json.loads((tmp_path / output / "manifest.json").read_text())
        assert manifest["identity"]["teacher"]["output"] == output
        check = ("check-cache", output, "--deep", "--weights", "w.pt", "--teacher", f"{MODULE}:two_keys")
        assert stages.call(*check)[0] == 0
    assert fingerprints["cls"] != fingerprints["dist"]


def test_a_run_whose_network_needs_output_becomes_a_teacher_without_it(stages: Stages) -> None:
    arch = f"{MODULE}:two_logits"
    more = ("--train-size", 100, "--arch", arch, "--epochs", 1)
    error = stages.fails(2, "teacher", *more, "--out", "t")
    assert "--output 0" in error
    stages("teacher", *more, "--output", 0, "--out", "t")
    stages("teacher-cache", "--train-size", 100, "--weights", "t", "--teacher", arch, "--draws", 1, "--out", "c")
    assert stages.call("check-cache", "c", "--deep", "--weights", "t", "--teacher", arch)[0] == 0
