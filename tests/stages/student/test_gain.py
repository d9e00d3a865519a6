"""What a student gained over its baseline is printed with its interval, and is called a gain only if it is one."""

import re
from pathlib import Path

import numpy as np
import pytest

from softcache.stages.student.command import explain_gain
from tests.helpers.commands import Stages

SENTENCE = re.compile(
    r"The student from the cache is (?:(\d+\.\d\d) points (above|below)|equal to) the baseline"
    r" \(95 % interval ([-+]\d+\.\d\d) to ([-+]\d+\.\d\d)\): (.+)\."
)


def read_sentence(out: str) -> tuple[float, float, float, str]:
    """The difference and its interval in points, and the verdict."""
    match = SENTENCE.search(out)
    assert match, out
    points = float(match[1] or 0) * (-1 if match[2] == "below" else 1)
    return points, float(match[3]), float(match[4]), match[5]


@pytest.mark.parametrize(("options", "scope"), [((), " between these trained students"), (("--seeds", 2), "")])
def test_a_student_reports_its_gain_as_compare_does(
    tiny: Path, stages: Stages, options: tuple[object, ...], scope: str
) -> None:
    command = ("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 2, "--baseline", *options)
    code, out, err = stages.call(*command, "--out", "r")
    assert code == 0, err
    points, low, high, verdict = read_sentence(out)
    (record,) = stages("compare", "r")["comparisons"]
    assert (points, low, high) == pytest.approx(
        [100 * record["accuracy"][key] for key in ("value", "low", "high")], abs=0.006
    )
    is_significant = record["verdict"] == "real"
    assert verdict == ("" if is_significant else "no ") + "significant difference" + scope
    assert (low > 0 or high < 0) is is_significant


def test_a_gain_is_explained_only_where_it_is_significant(tiny: Path, stages: Stages) -> None:
    command = ("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--baseline", "--labelled", 20)
    for epochs, learning_rate in ((1, 1e-9), (12, 0.1)):
        out_folder = Path(f"r{epochs}")
        code, out, err = stages.call(
            *command, "--epochs", epochs, "--learning-rate", learning_rate, "--out", out_folder
        )
        assert code == 0, err
        _, low, _, verdict = read_sentence(out)
        assert ("The gain comes from" in out) is (low > 0 and not verdict.startswith("no "))
        assert "The baseline learned from 20 labels" in out


def test_without_labels_or_a_baseline_nothing_is_claimed() -> None:
    labelled = {"student": {"test": {"accuracy": 0.5}}}
    assert explain_gain(labelled, Path("none")) == []
    assert explain_gain({"student": {"val": {}}, "baseline": {"val": {}}}, Path("none")) == []
    assert np.isfinite(labelled["student"]["test"]["accuracy"])
