"""Logits of students and teacher on the held-out splits are saved with the run; damaged files raise an error."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from softcache.base.errors import CacheError, UsageError
from softcache.pipeline.metrics.classification import evaluate
from softcache.stages.runs.logits import read_logits
from tests.helpers.commands import Stages

STUDENT = ("--arch", "mlp:8", "--epochs", 2)


def test_the_metrics_of_a_run_follow_from_its_saved_logits(tiny: Path, stages: Stages) -> None:
    more = ("--seeds", 2, "--baseline", "--finetune-epochs", 1, "--out", "r")
    result = stages("student", "--cache", tiny / "cache", *STUDENT, *more)
    teacher = read_logits(Path("r/teacher-logits.safetensors"))
    assert set(teacher) == {"val", "test"}
    for number, seed in enumerate(result["seeds"]):
        for model, place in (("student", ""), ("baseline", "baseline/")):
            kept = read_logits(Path(f"r/seed-{number}/{place}logits.safetensors"))
            for split, one in kept.items():
                assert one.content == teacher[split].content
                assert np.array_equal(one.labels, teacher[split].labels)
                figures = evaluate(one.logits, one.labels, teacher[split].logits)
                for name in ("accuracy", "nll", "f1_macro", "auroc_macro", "agreement", "kl_to_teacher"):
                    assert figures[name] == seed[model][split][name]
    assert teacher["test"].classes == tuple("0123456789")
    for split in ("val", "test"):
        assert evaluate(teacher[split].logits, teacher[split].labels)["nll"] == result["teacher"][split]["nll"]


def test_only_equal_rows_have_equal_content_digests(tiny: Path, stages: Stages) -> None:
    stages("student", "--cache", tiny / "cache", *STUDENT, "--out", "a")
    val, test = read_logits(Path("a/logits.safetensors")).values()
    assert val.content != test.content
    cache = json.loads((tiny / "cache/manifest.json").read_text())
    assert test.content == cache["identity"]["transfer_set"]["content"]["test"]


def test_a_damaged_file_raises_an_error_with_its_name(tiny: Path, stages: Stages) -> None:
    stages("student", "--cache", tiny / "cache", *STUDENT, "--out", "r")
    path = Path("r/logits.safetensors")
    whole = path.read_bytes()
    with pytest.raises(UsageError, match="does not exist: only a finished training has logits"):
        read_logits(Path("r/none.safetensors"))
    for damaged in (whole[:-1], whole[:100], b"", whole + b"x", b"\xff" * 8 + whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(CacheError, match=r"'r/logits\.safetensors' is damaged"):
            read_logits(path)
    path.write_bytes(whole)
    arrays = load_file(path)
    record = {"form": "softcache logits 1", "content": '{"val": "1", "test": "2"}', "classes": json.dumps(["a"] * 10)}
    wrong = {"test.labels": arrays["test.labels"][1:]}, {"test.logits": arrays["test.logits"].astype(np.float64)}
    worse = {"test.labels": arrays["test.labels"] + 9}, {"more": arrays["test.labels"]}
    for change in (*wrong, *worse):
        save_file(arrays | change, path, record)
        with pytest.raises(CacheError, match="is damaged"):
            read_logits(path)
    for field, text in (("content", "["), ("content", "3"), ("form", "other"), ("classes", "2")):
        save_file(arrays, path, record | {field: text})
        with pytest.raises(CacheError, match="is damaged"):
            read_logits(path)
    save_file(arrays, path, record)
    assert set(read_logits(path)) == {"val", "test"}
