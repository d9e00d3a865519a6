"""stages report: what a page says of runs is what the runs say, whatever their state and whoever named them."""

import base64
import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from softcache.pipeline.metrics.classification import log_softmax
from softcache.stages.report.summary import find_pareto, largest_disagreements, measure_agreement
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


def part_of(page: str, run: str) -> str:
    """What the page has of a run."""
    (found,) = (part for part in re.findall(r"<details.*?</details>", page, re.S) if f"<h3>{run}</h3>" in part)
    return str(found)


def rows_of(page: str) -> dict[tuple[str, str], list[str]]:
    """{(name, role): the cells after arch} of the first table."""
    table = re.search(r"<tbody>(.*?)</tbody>", page, re.S)
    assert table
    found = {}
    for row in re.findall(r"<tr.*?</tr>", table[1], re.S):
        cells = [
            unescape(re.sub(r"<[^>]*>", "", cell)).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)
        ]
        found[cells[0].split(" ")[0], cells[1]] = cells[3:]
    return found


def test_the_table_says_what_the_results_say(home: Path, page: str) -> None:
    rows = rows_of(page)
    result = json.loads((home / "runs/hints/result.json").read_text())
    for model in ("student", "baseline"):
        figures, spread = result[model]["test"], result["spread"][model]["test"]
        cells = rows["runs/hints", model]
        assert cells[0] == f"{100 * figures['accuracy']:.2f} ± {100 * spread['accuracy']:.2f}"
        assert cells[1] == f"{100 * figures['f1_macro']:.2f} ± {100 * spread['f1_macro']:.2f}"
        assert cells[5] == f"{figures['nll']:.4f} ± {spread['nll']:.4f}"
        assert cells[8] == f"{result[model]['parameters']:,.0f}"
        assert float(cells[9]) > 0
    assert rows["cnn", "teacher"][0] == f"{100 * result['teacher']['test']['accuracy']:.2f}"
    assert rows["cnn", "teacher"][8] == rows["runs/hints", "student"][8]  # of the same arch
    assert [name for name, role in rows if role == "teacher"] == ["cnn"]  # of all three runs, once


def test_a_run_that_was_stopped_is_there_and_marked(page: str) -> None:
    cells = rows_of(page)["runs/stopped", "student"]
    assert re.fullmatch(r"\d+\.\d\d", cells[0])
    assert "unfinished: student, epoch 1 of 3; figures of validation" in page
    part = part_of(page, "runs/stopped")
    assert "unfinished: student, epoch 1 of 3" in part
    assert part.count('alt="Curves over 1 epochs') == 1
    assert "Not shown: the run is not finished" in part
    assert "runs/stopped is unfinished" in page


@pytest.mark.parametrize(
    ("step", "state"),
    [
        (2, "unfinished: no epoch is over"),
        (5, "unfinished: distilled, seed 1 of 2, epoch 2 of 2"),
        (8, "unfinished: student, seed 1 of 2, epoch 3 of 3"),
        (10, "unfinished: baseline, seed 1 of 2, epoch 1 of 3"),
        (15, "unfinished: distilled, seed 2 of 2, epoch 1 of 2"),
    ],
)
def test_it_is_said_how_far_a_stopped_run_has_come(tiny: Path, stages: Stages, step: int, state: str) -> None:
    """2 + 1 epochs of 2 steps for each of 2 seeds, distilled, fine-tuned and as a baseline."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        more = ("--finetune-epochs", 1, "--seeds", 2, "--baseline", "--batch-size", 150, "--out", "r")
        code, *_ = stages.call("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 2, *more)
    assert code == 130
    stages("report", "r", "--no-latency", "--out", "o")
    part = part_of(Path("o/report.html").read_text(), "r")
    assert f">{state}<" in part
    assert ("Reliability diagram" in part) == (step > 6)  # the student of the first seed is measured


def test_every_picture_of_a_finished_run_is_there_and_says_what_it_shows(home: Path, page: str) -> None:
    part = part_of(page, "runs/hints")
    alts = [unescape(alt) for alt in re.findall(r'<figure>\s*<img src="[^"]*" alt="([^"]*)"', part)]
    for words in ("Curves over 3 epochs", "Confusion", "Reliability", "Agreement", "Feature importance of the taps"):
        assert sum(alt.startswith(words) for alt in alts) == 1, words
    result = json.loads((home / "runs/hints/result.json").read_text())
    (alt,) = (alt for alt in alts if alt.startswith("Reliability"))
    assert f"teacher {100 * result['teacher']['test']['ece']:.2f} %" in alt
    curves = decoded(part, "Curves")
    for label in (">kd<", ">hint<", ">fine-tuning<", ">student, accuracy<", ">baseline, macro F1<"):
        assert label in curves


def decoded(part: str, alt: str) -> str:
    """The SVG of a image."""
    found = re.search(rf'src="data:image/svg\+xml;base64,([^"]*)" alt="{alt}', part)
    assert found
    return base64.b64decode(found[1]).decode()


def test_a_picture_has_its_own_ink_for_dark_pages(page: str) -> None:
    drawn = decoded(page, "Reliability")
    assert "@media screen and (prefers-color-scheme: dark)" in drawn
    for colour in ("#1f2328", "#c8cdd3"):  # the ink and the grid that it changes are those that are used
        assert drawn.count(f": {colour}") > 4, colour
        assert f'[style*="fill: {colour}"]' in drawn


def test_the_pictures_apart_are_those_of_the_rows_whose_distributions_differ_most(home: Path, page: str) -> None:
    student = read_logits(home / "runs/plain/logits.safetensors")["test"]
    teacher = read_logits(home / "runs/plain/teacher-logits.safetensors")["test"]
    p, q = (np.exp(log_softmax(one.logits)) for one in (student, teacher))
    m = (p + q) / 2
    divergence = (p * np.log2(p / m) + q * np.log2(q / m)).sum(1) / 2
    rows = np.argsort(-divergence)[:3]
    part = part_of(page, "runs/plain")
    found = re.findall(r"row (\d+), true class <b>(\d)</b>, ([\d.]+) bits", part)
    assert found == [(str(r), str(student.labels[r]), f"{divergence[r]:.2f}") for r in rows]
    assert part.count('<div class="card">') == part.count('src="data:image/png;base64,') == 3


def test_the_text_for_a_pull_request_has_the_same_figures(home: Path) -> None:
    text = (home / "report/report.md").read_text()
    result = json.loads((home / "runs/hints/result.json").read_text())
    figures, spread = result["student"]["test"], result["spread"]["student"]["test"]
    assert f"| runs/hints | cnn | {100 * figures['accuracy']:.2f} ± {100 * spread['accuracy']:.2f} |" in text
    assert "runs/stopped (unfinished: student, epoch 1 of 3; figures of validation)" in text
    assert result["cache"]["fingerprint"][:12] in text
    assert "## Bill" in text


def test_the_command_in_the_page_makes_the_run_again(home: Path, page: str) -> None:
    found = re.search(r"Again: <code>(.*?)</code>", part_of(page, "runs/plain"))
    assert found
    command = unescape(found[1])
    assert " student " in command
    for words in ("--arch mlp:8", "--epochs 2", "--batch-size 100", "--out runs/plain"):
        assert words in command


def test_the_summary_says_what_compare_says_of_student_and_baseline(home: Path, page: str, stages: Stages) -> None:
    (found,) = stages("compare", home / "runs/hints")["comparisons"]
    low, high = (f"{100 * found['accuracy'][key]:+.2f}" for key in ("low", "high"))
    assert f"(95 % interval {low} to {high}: {found['verdict']})" in unescape(page)


def test_equal_runs_give_an_equal_page(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "runs", tmp_path / "runs")
    report(tmp_path, "--show", 3, "--no-latency")
    first = (tmp_path / "report/report.html").read_text()
    report(tmp_path, "--show", 3, "--no-latency")
    assert (tmp_path / "report/report.html").read_text() == first


def test_names_are_text_and_not_markup(tiny: Path, stages: Stages) -> None:
    name = 'r/<script>alert("x")</script> & $x_1^2$|*b*'
    stages("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 1, "--out", name)
    done = stages("report", name, "--no-latency", "--png", "--out", "o")
    page = Path("o/report.html").read_text()
    assert page.count("<script>") == 1
    assert unescape(page).count('<script>alert("x")') > 2
    assert r"\<script\>alert" in Path("o/report.md").read_text()
    assert r"\*b\*" in Path("o/report.md").read_text()
    assert all((Path("o") / file).is_file() for file in done["files"])
    assert any(file.endswith("-curves.png") for file in done["files"])


def test_without_data_logits_or_cache_the_rest_is_shown(tiny: Path, stages: Stages, tmp_path: Path) -> None:
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
    assert "The run has kept no logits" in Path("o/report.html").read_text()


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
def test_damaged_runs_are_refused_by_name(tiny: Path, stages: Stages, file: str, change: object, wrong: str) -> None:
    stages("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 1, "--baseline", "--out", "r")
    record = json.loads(Path("r", file).read_text())
    change(record)  # type: ignore[operator]
    Path("r", file).write_text(json.dumps(record))
    said = stages.fails(1, "report", "r", "--out", "o")
    assert f"'r/{file}' {wrong}" in said
    assert not Path("o").exists()


def test_logits_of_other_rows_are_refused(tiny: Path, stages: Stages) -> None:
    stages("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 1, "--out", "r")
    arrays, record = load_file("r/logits.safetensors"), {"form": "softcache logits 1", "classes": "[]"}
    kept = read_logits(Path("r/logits.safetensors"))
    record["content"] = json.dumps({split: one.content for split, one in kept.items()})
    save_file({name: value[:9] for name, value in arrays.items()}, "r/logits.safetensors", record)
    said = stages.fails(1, "report", "r", "--out", "o")
    assert said == "Error: 'r': its files of logits are not all of the same rows and classes"


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_without_its_extra_it_is_one_line(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    from softcache.stages.cli import extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == missing else True)
    said = stages.fails(2, "report", tiny)
    assert said == f"Error: report needs {missing}, which is not installed: pip install 'softcache[report]'"


def test_lines_that_are_no_numbers_are_refused(tiny: Path, stages: Stages) -> None:
    stages("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 1, "--out", "r")
    for line in ('{"epoch": 1, "loss": "x"}', '{"epoch": 1, "loss": NaN}', "[1]", "{"):
        Path("r/metrics.jsonl").write_text(line + "\n")
        assert "'r/metrics.jsonl' is damaged" in stages.fails(1, "report", "r", "--out", "o")


def test_what_is_no_run_is_a_wrong_command(tiny: Path, stages: Stages) -> None:
    assert "there is no run of a student in runs" in stages.fails(2, "report")
    assert "there is no folder 'nowhere'" in stages.fails(2, "report", "nowhere")
    Path("other").mkdir()
    Path("other/mine.txt").write_text("mine")
    assert "there is no run of a student in other" in stages.fails(2, "report", "other")
    assert "is a teacher's run" in stages.fails(2, "report", tiny / "runs/teacher")
    stages("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 1, "--out", "runs/r")
    assert "'other' exists and is no report" in stages.fails(2, "report", "--out", "other")
    assert Path("other/mine.txt").read_text() == "mine"


def test_an_arch_from_a_file_is_not_imported(tiny: Path, stages: Stages) -> None:
    """A report looks at runs of strangers: their own code is not run, nor a network of any size built."""
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


def test_agreement_is_split_by_the_teacher_being_right() -> None:
    labels = np.array([0, 0, 0, 1, 1, -1])
    teacher = np.eye(3)[[0, 0, 0, 0, 2, 1]]  # right, right, right, wrong, wrong
    student = np.eye(3)[[0, 0, 1, 1, 2, 1]]  # same, same, other; corrected, copied
    other = np.eye(3)[[0, 0, 0, 2, 2, 0]]  # same, same, same; wrong in its own way, copied
    found = measure_agreement([student, other], teacher, labels)
    assert found.rows == (3, 2)
    assert found.right == pytest.approx((5 / 6, 0, 1 / 6))
    assert found.wrong == pytest.approx((0.5, 0.25, 0.25))


def test_opposite_certainties_are_a_bit_apart() -> None:
    one = np.array([[50.0, 0.0], [0.0, 0.0], [3.0, 1.0]])
    other = np.array([[0.0, 50.0], [0.0, 0.0], [1.0, 3.0]])
    rows = largest_disagreements(one, other, 2)
    assert [row for row, _ in rows] == [0, 2]
    assert rows[0][1] == pytest.approx(1.0)
    assert largest_disagreements(one, one, 3) == [(0, 0.0), (1, 0.0), (2, 0.0)]


def test_the_front_is_of_those_that_no_cheaper_one_equals() -> None:
    assert find_pareto([3, 1, 2, 4, 1], [0.9, 0.5, 0.5, 0.8, 0.4]) == [1, 0]
    assert find_pareto([], []) == []
