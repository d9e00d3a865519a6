"""`softcache report`: the page has the metrics of the runs, of unfinished ones too, and is safe with any names."""

import base64
import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

from softcache.pipeline.metrics.classification import log_softmax
from softcache.stages.compare.significance import VERDICT_TEXT
from softcache.stages.report.agreement import measure_agreement
from softcache.stages.report.differences import rank_disagreements
from softcache.stages.report.plots import Point, find_pareto, plot_costs, plot_reliability
from softcache.stages.runs.logits import read_logits
from tests.helpers.commands import Stages
from tests.helpers.reported import make_runs, report
from tests.helpers.stopping import stop_at


@pytest.fixture(scope="module")
def home(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs and their report."""
    folder = tmp_path_factory.mktemp("reported")
    make_runs(tiny, folder)
    report(folder, "--show", 3)
    return folder


@pytest.fixture(scope="module")
def page(home: Path) -> str:
    return (home / "report/report.html").read_text()


def extract_section(page: str, run: str) -> str:
    """The section of a run in the page."""
    sections = re.findall(r"<details.*?</details>", page, re.S)
    (section,) = (section for section in sections if f"<h3>{run}</h3>" in section)
    return str(section)


def extract_rows(page: str) -> dict[tuple[str, str], list[str]]:
    """{(name, role): the cells from the accuracy on} of the first table."""
    table = re.search(r"<tbody>(.*?)</tbody>", page, re.S)
    assert table
    rows = {}
    for row in re.findall(r"<tr.*?</tr>", table[1], re.S):
        cells = [
            unescape(re.sub(r"<[^>]*>", "", cell)).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)
        ]
        rows[cells[0].split(" ")[0], cells[1]] = cells[-11:]
    return rows


def test_the_table_has_the_metrics_of_the_results(home: Path, page: str) -> None:
    rows = extract_rows(page)
    result = json.loads((home / "runs/hints/result.json").read_text())
    for model in ("student", "baseline"):
        metrics, spread = result[model]["test"], result["spread"][model]["test"]
        cells = rows["runs/hints", model]
        assert cells[0] == f"{100 * metrics['accuracy']:.2f} ± {100 * spread['accuracy']:.2f}"
        assert cells[1] == f"{100 * metrics['f1_macro']:.2f} ± {100 * spread['f1_macro']:.2f}"
        assert cells[5] == f"{metrics['nll']:.4f} ± {spread['nll']:.4f}"
        assert cells[8] == f"{result[model]['parameters']:,.0f}"
        assert float(cells[9]) > 0
    assert rows["cnn", "teacher"][0] == f"{100 * result['teacher']['test']['accuracy']:.2f}"
    assert rows["cnn", "teacher"][8] == rows["runs/hints", "student"][8]  # of the same arch
    assert [name for name, role in rows if role == "teacher"] == ["cnn"]  # of all three runs, once


def test_an_unfinished_run_is_in_the_page_and_marked(page: str) -> None:
    cells = extract_rows(page)["runs/stopped", "student"]
    assert re.fullmatch(r"\d+\.\d\d", cells[0])
    assert "unfinished: student, epoch 1 of 3; validation metrics" in page
    section = extract_section(page, "runs/stopped")
    assert "unfinished: student, epoch 1 of 3" in section
    assert section.count('alt="Curves over 1 epochs') == 1
    assert "Not shown: the run is not finished" in section
    assert "runs/stopped is unfinished" in page
    names = [name for name, _ in extract_rows(page)]
    assert names[-1] == "runs/stopped"  # below the teacher, whatever its metrics
    assert page.count('class="student unfinished"') == 1


def test_a_column_names_the_options_in_which_runs_differ(page: str) -> None:
    cells = [unescape(text) for text in re.findall(r'data-title="differs in">(.*?)<', page)]
    assert cells[0].startswith("loss kd hint:teacher=flatten,student=flatten, ")
    assert "finetune epochs 1" in cells[0]
    assert "seeds 2" in cells[0]
    assert cells[1] == "hard targets alone"
    assert any("epochs 3" in cell for cell in cells)
    assert not any("batch size" in cell for cell in cells)  # equal in all runs


def test_without_names_the_runs_of_several_students_are_reported(tiny: Path, stages: Stages) -> None:
    common = ("--cache", tiny / "cache", "--epochs", 1, "--batch-size", 150, "--arch", "mlp:8")
    stages("student", *common, "--seed", 0, "--seed", 1, "--out", "runs/many")
    shutil.copytree("runs/many/seed-0", "runs/search/trial-0000")
    Path("runs/search/search.json").write_text("{}")
    options = ("--no-latency", "--show", 0)
    assert stages("report", *options)["runs"] == ["runs/many/seed-0", "runs/many/seed-1"]
    assert stages("report", "runs/search", *options)["runs"] == ["runs/search/trial-0000"]


def test_labels_of_points_do_not_overlap() -> None:
    """12 students of nearly equal accuracy and size."""
    points = [
        Point(f"students/long-name-{i}", "student", 0.9 + 0.001 * (i % 3), 0.0, 1000 + 20 * i, 0.5 + 0.01 * i)
        for i in range(11)
    ]
    figure = Figure((9, 4.4), dpi=120, layout="constrained")
    plot_costs([*points, Point("teacher", "teacher", 0.95, 0.0, 50_000, 3.0)]).draw(figure)
    figure.draw_without_rendering()
    for axes in figure.axes:
        labels = [text.get_window_extent() for text in axes.texts]
        assert len(labels) >= 4
        assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[:i])
        assert all(axes.bbox.x0 <= a.x0 and a.x1 <= axes.bbox.x1 for a in labels)


def test_bins_of_few_rows_are_hollow() -> None:
    bins = [
        {"low": low, "high": low + 0.5, "rows": rows, "confidence": low + 0.25, "accuracy": 0.5}
        for low, rows in ((0.0, 9), (0.5, 10))
    ]
    figure = Figure((5.4, 4.8))
    plot_reliability({"student": {"bins": bins, "ece": 0.1, "rows": 19}}).draw(figure)
    (points,) = figure.axes[0].collections
    assert [tuple(colour)[3] for colour in points.get_facecolors()] == [0, 1]


@pytest.mark.parametrize(
    ("step", "state"),
    [
        (2, "unfinished: no epoch completed"),
        (5, "unfinished: distilled, seed 1 of 2, epoch 2 of 2"),
        (8, "unfinished: student, seed 1 of 2, epoch 3 of 3"),
        (10, "unfinished: baseline, seed 1 of 2, epoch 1 of 3"),
        (15, "unfinished: distilled, seed 2 of 2, epoch 1 of 2"),
    ],
)
def test_the_state_of_an_unfinished_run_names_its_last_epoch(
    tiny: Path, stages: Stages, step: int, state: str
) -> None:
    """Each of 2 seeds is distilled for 2 epochs, fine-tuned for 1, and a baseline for 3; an epoch has 2 steps."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        options = ("--finetune-epochs", 1, "--seeds", 2, "--baseline", "--batch-size", 150, "--out", "r")
        code, *_ = stages.call("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 2, *options)
    assert code == 130
    stages("report", "r", "--no-latency", "--out", "o")
    section = extract_section(Path("o/report.html").read_text(), "r")
    assert f">{state}<" in section
    assert ("Reliability diagram" in section) == (step > 6)  # the student of the first seed is measured


def test_a_finished_run_has_every_plot_with_alternative_text(home: Path, page: str) -> None:
    section = extract_section(page, "runs/hints")
    alts = [unescape(alt) for alt in re.findall(r'<figure>\s*<img src="[^"]*" alt="([^"]*)"', section)]
    for start in ("Curves over 3 epochs", "Confusion", "Reliability", "Agreement", "Feature importance of the taps"):
        assert sum(alt.startswith(start) for alt in alts) == 1, start
    result = json.loads((home / "runs/hints/result.json").read_text())
    (alt,) = (alt for alt in alts if alt.startswith("Reliability"))
    assert f"teacher {100 * result['teacher']['test']['ece']:.2f} %" in alt
    curves = decode_svg(section, "Curves")
    for label in (">kd<", ">hint<", ">fine-tuning<", ">student, accuracy<", ">baseline, macro F1<"):
        assert label in curves


def decode_svg(section: str, alt: str) -> str:
    """The SVG of the plot whose alternative text begins so."""
    match = re.search(rf'src="data:image/svg\+xml;base64,([^"]*)" alt="{alt}', section)
    assert match
    return base64.b64decode(match[1]).decode()


def test_a_plot_has_other_colours_of_text_and_grid_for_dark_pages(page: str) -> None:
    svg = decode_svg(page, "Reliability")
    assert "@media screen and (prefers-color-scheme: dark)" in svg
    for colour in ("#1f2328", "#c8cdd3"):  # the colours that are replaced are those of text and grid
        assert svg.count(f": {colour}") > 4, colour
        assert f'[style*="fill: {colour}"]' in svg


def test_disagreements_are_the_rows_with_the_largest_divergence(home: Path, page: str) -> None:
    student = read_logits(home / "runs/plain/logits.safetensors")["test"]
    teacher = read_logits(home / "runs/plain/teacher-logits.safetensors")["test"]
    p, q = (np.exp(log_softmax(model.logits)) for model in (student, teacher))
    m = (p + q) / 2
    divergence = (p * np.log2(p / m) + q * np.log2(q / m)).sum(1) / 2
    rows = np.argsort(-divergence)[:3]
    section = extract_section(page, "runs/plain")
    cards = re.findall(r"row (\d+), true class <b>(\d)</b>, ([\d.]+) bits", section)
    assert cards == [(str(r), str(student.labels[r]), f"{divergence[r]:.2f}") for r in rows]
    assert section.count('<div class="card">') == section.count('src="data:image/png;base64,') == 3


def test_the_markdown_has_the_same_metrics(home: Path) -> None:
    text = (home / "report/report.md").read_text()
    result = json.loads((home / "runs/hints/result.json").read_text())
    metrics, spread = result["student"]["test"], result["spread"]["student"]["test"]
    assert f" | {100 * metrics['accuracy']:.2f} ± {100 * spread['accuracy']:.2f} |" in text
    assert "| runs/hints | cnn | loss kd hint:teacher=flatten" in text
    assert "runs/stopped (unfinished: student, epoch 1 of 3; validation metrics)" in text
    assert result["cache"]["fingerprint"][:12] in text
    assert "## Cost" in text


def test_the_command_in_the_page_trains_the_run_again(home: Path, page: str) -> None:
    match = re.search(r"Command: <code>(.*?)</code>", extract_section(page, "runs/plain"))
    assert match
    command = unescape(match[1])
    assert " student " in command
    for option in ("--arch mlp:8", "--epochs 2", "--batch-size 100"):
        assert option in command
    assert "--out" not in command  # the folder of the run is not free


def test_the_summary_has_the_verdict_of_compare_on_student_and_baseline(home: Path, page: str, stages: Stages) -> None:
    (comparison,) = stages("compare", home / "runs/hints")["comparisons"]
    low, high = (f"{100 * comparison['accuracy'][key]:+.2f}" for key in ("low", "high"))
    assert f"(95 % interval {low} to {high}: {VERDICT_TEXT[comparison['verdict']]})" in unescape(page)


def test_the_same_runs_give_the_same_page(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "runs", tmp_path / "runs")
    report(tmp_path, "--show", 3, "--no-latency")
    first = (tmp_path / "report/report.html").read_text()
    report(tmp_path, "--show", 3, "--no-latency")
    assert (tmp_path / "report/report.html").read_text() == first


def test_markup_in_names_is_escaped(tiny: Path, stages: Stages) -> None:
    name = 'r/<script>alert("x")</script> & $x_1^2$|*b*'
    stages("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 1, "--out", name)
    output = stages("report", name, "--no-latency", "--png", "--out", "o")
    page = Path("o/report.html").read_text()
    assert page.count("<script>") == 1
    assert unescape(page).count('<script>alert("x")') > 2
    assert "&lt;script&gt;alert" in Path("o/report.md").read_text()
    assert r"\*b\*" in Path("o/report.md").read_text()
    assert all((Path("o") / file).is_file() for file in output["files"])
    assert any(file.endswith("-curves.png") for file in output["files"])


def test_without_data_logits_or_cache_the_rest_is_in_the_page(tiny: Path, stages: Stages, tmp_path: Path) -> None:
    shutil.copytree(tiny / "cache", "c")
    stages("student", "--cache", "c", "--arch", "mlp:8", "--epochs", 1, "--out", "r")
    shutil.rmtree("c")
    stages("report", "r", "--out", "o")
    page = Path("o/report.html").read_text()
    assert "Not shown: " in page
    assert "Reliability diagram" in page
    for file in ("r/logits.safetensors", "r/teacher-logits.safetensors"):
        Path(file).unlink()
    stages("report", "r", "--out", "o")
    assert "The run has no files of logits" in Path("o/report.html").read_text()


@pytest.mark.parametrize(
    ("file", "change", "wrong"),
    [
        ("result.json", lambda r: r["student"]["test"].update(accuracy="high"), "is not of a student's run"),
        ("result.json", lambda r: r["student"]["test"]["confusion"].append([1]), "is not of a student's run"),
        ("result.json", lambda r: r.pop("bill"), "is not of a student's run"),
        ("result.json", lambda r: r["versions"].update(torch=[]), "is not of a student's run"),
        ("result.json", lambda r: r["seeds"][0].update(seed="x"), "is not of a student's run"),
        ("cache.json", lambda r: r.update(others=[1]), "is damaged"),
        ("settings.json", lambda r: r.update(epochs="many"), "is damaged"),
    ],
)
def test_damaged_runs_are_refused_with_the_file_named(
    tiny: Path, stages: Stages, file: str, change: object, wrong: str
) -> None:
    stages("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 1, "--baseline", "--out", "r")
    record = json.loads(Path("r", file).read_text())
    change(record)  # type: ignore[operator]
    Path("r", file).write_text(json.dumps(record))
    assert f"'r/{file}' {wrong}" in stages.fails(1, "report", "r", "--out", "o")
    assert not Path("o").exists()


def test_logits_of_other_rows_are_refused(tiny: Path, stages: Stages) -> None:
    stages("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 1, "--out", "r")
    arrays, record = load_file("r/logits.safetensors"), {"form": "softcache logits 1", "classes": "[]"}
    splits = read_logits(Path("r/logits.safetensors"))
    record["content"] = json.dumps({split: stored.content for split, stored in splits.items()})
    save_file({name: value[:9] for name, value in arrays.items()}, "r/logits.safetensors", record)
    error = stages.fails(1, "report", "r", "--out", "o")
    assert error == "Error: 'r': its files of logits are not all of the same rows and classes"


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_a_missing_library_is_reported_with_the_command_that_installs_it(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    from softcache.base import packages

    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == missing else True)
    error = stages.fails(2, "report", tiny)
    assert error == f"Error: report needs {missing}, which is not installed: pip install -e '.[report]'"


def test_metrics_of_epochs_that_are_not_numbers_are_refused(tiny: Path, stages: Stages) -> None:
    stages("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 1, "--out", "r")
    for line in ('{"epoch": 1, "loss": "x"}', '{"epoch": 1, "loss": NaN}', "[1]", "{"):
        Path("r/metrics.jsonl").write_text(line + "\n")
        assert "'r/metrics.jsonl' is damaged" in stages.fails(1, "report", "r", "--out", "o")


def test_folders_without_a_run_of_a_student_are_refused(tiny: Path, stages: Stages) -> None:
    assert "there is no run of a student in runs" in stages.fails(2, "report")
    assert "there is no folder 'nowhere'" in stages.fails(2, "report", "nowhere")
    Path("other").mkdir()
    Path("other/mine.txt").write_text("mine")
    assert "there is no run of a student in other" in stages.fails(2, "report", "other")
    assert "is a teacher's run" in stages.fails(2, "report", tiny / "runs/teacher")
    stages("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 1, "--out", "runs/r")
    assert "'other' exists and is not the folder of a report" in stages.fails(2, "report", "--out", "other")
    assert Path("other/mine.txt").read_text() == "mine"


def test_an_arch_from_a_file_is_neither_imported_nor_built_at_any_size(tiny: Path, stages: Stages) -> None:
    """A report can be of runs from anyone."""
    result = stages("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 1, "--out", "r")
    Path("trap.py").write_text("raise SystemExit('imported')\n")
    for arch in ("trap:make", "mlp:1000000,1000000", "mlp:-3", "resnet9"):
        result["student"]["arch"] = arch
        Path("r/result.json").write_text(json.dumps(result))
        assert stages("report", "r", "--out", "o")["runs"] == ["r"]
    result["student"] |= {"arch": "vgg8", "preparation": result["student"]["preparation"] | {"size": 1}}
    Path("r/result.json").write_text(json.dumps(result))
    assert stages("report", "r", "--out", "o")["runs"] == ["r"]
    result["student"]["preparation"]["size"] = 10**9
    Path("r/result.json").write_text(json.dumps(result))
    assert "is not of a student's run" in stages.fails(1, "report", "r", "--out", "o")


def test_agreement_is_measured_by_whether_the_teacher_is_right() -> None:
    labels = np.array([0, 0, 0, 1, 1, -1])
    teacher = np.eye(3)[[0, 0, 0, 0, 2, 1]]  # right, right, right, wrong, wrong
    first = np.eye(3)[[0, 0, 1, 1, 2, 1]]  # same, same, wrong; right with another class, same
    second = np.eye(3)[[0, 0, 0, 2, 2, 0]]  # same, same, same; wrong with another class, same
    agreement = measure_agreement([first, second], teacher, labels)
    assert agreement.rows == (3, 2)
    assert agreement.right == pytest.approx((5 / 6, 0, 1 / 6))
    assert agreement.wrong == pytest.approx((0.5, 0.25, 0.25))


def test_certain_and_opposite_distributions_have_a_divergence_of_one_bit() -> None:
    student = np.array([[50.0, 0.0], [0.0, 0.0], [3.0, 1.0]])
    teacher = np.array([[0.0, 50.0], [0.0, 0.0], [1.0, 3.0]])
    rows = rank_disagreements(student, teacher, 2)
    assert [row for row, _ in rows] == [0, 2]
    assert rows[0][1] == pytest.approx(1.0)
    assert rank_disagreements(student, student, 3) == [(0, 0.0), (1, 0.0), (2, 0.0)]


def test_the_pareto_front_has_the_items_that_are_better_than_all_cheaper_ones() -> None:
    assert find_pareto([3, 1, 2, 4, 1], [0.9, 0.5, 0.5, 0.8, 0.4]) == [1, 0]
    assert find_pareto([], []) == []
