"""The report of labels, numbers and embeddings: a section of each, with the figures, plots and text of its task."""

import contextlib
import io
import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.special import expit

from softcache.stages.report.differences import rank_rows
from softcache.stages.report.plots import Point, plot_costs
from softcache.stages.runs.logits import SplitLogits, read_logits
from tests.helpers.commands import Stages
from tests.helpers.task_runs import TASKS, call

PLOT = {"labels": "F1 of each label", "numbers": "Predicted over true numbers", "embedding": "Cosine of student"}
TITLE = {"labels": "mAP, %", "numbers": "RMSE", "embedding": "cosine"}
MAIN = {"labels": "map", "numbers": "rmse", "embedding": "cosine"}


@pytest.fixture(scope="module")
def home(task_folder: Path) -> Path:
    with contextlib.redirect_stdout(io.StringIO()):
        runs = [f"runs/{task}-a" for task in TASKS]
        call(task_folder, "report", *runs, "--out", "report", "--show", 3)
    return task_folder


def find_section(page: str, task: str) -> str:
    sections = re.findall(r"<section>.*?</section>", page, re.S)
    assert len(sections) == len(TASKS)
    (section,) = (section for section in sections if f"<h2>{task}" in section)
    return unescape(str(section))


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_a_section_with_its_figures_and_plots(home: Path, task: str) -> None:
    section = find_section((home / "report/report.html").read_text(), task)
    result = json.loads((home / f"runs/{task}-a/result.json").read_text())
    value = result["student"]["test"][MAIN[task]]
    text = {"labels": f"{100 * value:.2f}", "numbers": f"{value:.5g}", "embedding": f"{value:.4f}"}[task]
    assert f'data-title="{TITLE[task]}" data-value="{value}">{text}<' in section
    assert f"The best student is runs/{task}-a (mlp:8)" in section
    assert ("lower is better" in section.split("<table")[0]) is (task == "numbers")
    assert section.count('alt="Curves over 3 epochs') == 1
    assert section.count(f'alt="{PLOT[task]}') == 1
    assert section.count('class="card"') == 3
    for absent in ("accuracy", "confusion", "Reliability", "ECE", "true class"):
        assert absent not in section, absent
    assert "No F1" not in section
    if task == "embedding":
        assert "<h4>Classes" not in section
        assert 'class="bars' not in section
    else:
        assert "95 % interval" in section  # of student and baseline
        heading, name = {"labels": ("Labels", "even"), "numbers": ("Outputs", "grey")}[task]
        assert f"<h4>{heading}</h4>" in section
        assert f'<th scope="row">{name}</th>' in section


@pytest.mark.parametrize("task", TASKS)
def test_the_markdown_has_the_table_of_the_task(home: Path, task: str) -> None:
    text = (home / "report/report.md").read_text()
    section = next(part for part in text.split("\n## ") if part.startswith(task))
    header = next(line for line in section.splitlines() if line.startswith("|"))
    assert f"| {TITLE[task]} |" in header
    assert "accuracy" not in header
    assert section.count(f"| runs/{task}-") == (1 if task == "embedding" else 2)


def test_an_unfinished_run_of_numbers_is_reported_by_its_epochs(home: Path, stages: Stages) -> None:
    shutil.copytree(home / "runs/numbers-a", "runs/stopped")
    for path in ("result.json", "logits.safetensors", "baseline/logits.safetensors"):
        Path("runs/stopped", path).unlink()
    assert stages("report", "runs", "--out", "report", "--no-latency", "--show", 0)["runs"] == ["runs/stopped"]
    page = Path("report/report.html").read_text()
    last = json.loads(Path("runs/stopped/metrics.jsonl").read_text().splitlines()[-1])
    assert f'data-title="RMSE" data-value="{last["val_rmse"]}"' in page
    assert 'alt="Curves over 3 epochs' in page


@pytest.mark.parametrize(
    ("key", "value", "wrong"),
    [
        ("per_label", {"precision": [1]}, "per_label"),
        ("map", "high", "a metric is not a number"),
        ("at_thresholds", {"f1_macro": "high"}, "at thresholds"),
    ],
)
def test_a_damaged_result_is_refused(home: Path, stages: Stages, key: str, value: object, wrong: str) -> None:
    shutil.copytree(home / "runs/labels-a", "r")
    result = json.loads(Path("r/result.json").read_text())
    result["student"]["test"][key] = value
    Path("r/result.json").write_text(json.dumps(result))
    assert wrong in stages.fails(1, "report", "r", "--no-latency", "--show", 0)


def test_f1_at_thresholds_has_a_column_where_a_run_has_it(home: Path, stages: Stages) -> None:
    shutil.copytree(home / "runs/labels-a", "r")
    result = json.loads(Path("r/result.json").read_text())
    for model in {"teacher", "student", "baseline"} & set(result):  # as of a run without thresholds
        for split in ("val", "test"):
            result[model][split].pop("at_thresholds", None)
    Path("r/result.json").write_text(json.dumps(result))
    stages("report", "r", "--out", "plain", "--no-latency", "--show", 0)
    assert "at thresholds, %" not in Path("plain/report.html").read_text()
    result["student"]["test"]["at_thresholds"] = {"f1_macro": 0.876543}
    Path("r/result.json").write_text(json.dumps(result))
    stages("report", "r", "--out", "report", "--no-latency", "--show", 0)
    page = Path("report/report.html").read_text()
    assert 'data-title="macro F1 at thresholds, %" data-value="0.876543">87.65<' in page


def test_rows_are_ranked_by_the_difference_of_their_task(home: Path) -> None:
    def read(task: str) -> tuple[SplitLogits, SplitLogits]:
        folder = home / f"runs/{task}-a"
        names = ("logits", "teacher-logits")
        student, teacher = (read_logits(folder / f"{name}.safetensors")["test"] for name in names)
        return student, teacher

    student, teacher = read("labels")
    p, q = expit(student.logits.astype(float)), expit(teacher.logits.astype(float))
    m = (p + q) / 2
    kl = [a * np.log2(a / m) + (1 - a) * np.log2((1 - a) / (1 - m)) for a in (p, q)]
    divergences = ((kl[0] + kl[1]) / 2).mean(1)
    expected = [(int(row), pytest.approx(divergences[row], abs=1e-6)) for row in np.argsort(-divergences)[:4]]
    assert rank_rows("labels", student, teacher, 4) == expected
    student, teacher = read("numbers")
    gaps = (np.abs(student.logits - teacher.logits) / teacher.logits.std(0)).mean(1)
    assert rank_rows("numbers", student, teacher, 1) == [(int(gaps.argmax()), pytest.approx(gaps.max(), rel=1e-5))]
    student, teacher = read("embedding")
    a, b = student.logits, teacher.logits
    gaps = 1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert rank_rows("embedding", student, teacher, 1) == [(int(gaps.argmax()), pytest.approx(gaps.max(), rel=1e-4))]


def test_the_front_of_costs_is_lowest_where_lower_is_better() -> None:
    points = [Point(f"n{i}", "student", rmse, 0.0, 10 ** (i + 2), None) for i, rmse in enumerate((3.0, 4.0, 2.0))]
    figure = Figure((9, 4.4), layout="constrained")
    plot_costs(points, "rmse").draw(figure)
    (front,) = [line for line in figure.axes[0].lines if line.get_label() == "Pareto front"]
    assert front.get_ydata().tolist() == [3.0, 2.0]
    assert figure.axes[0].get_ylabel() == "RMSE"
