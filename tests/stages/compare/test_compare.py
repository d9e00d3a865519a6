"""`softcache compare`: the table of runs, the options that differ, and whether students differ significantly."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.helpers.commands import Stages

STUDENT = ("--arch", "mlp:8", "--epochs", 2)


def test_the_table_has_every_run_and_each_teacher_once(tiny: Path, stages: Stages) -> None:
    student = ("student", "--cache", tiny / "cache", *STUDENT)
    a = stages(*student, "--loss", "hard", "--seeds", 2, "--baseline", "--out", "a")
    b = stages(*student, "--loss", "kd", "--out", "b")
    c = stages(*student, "--loss", "kd", "--map", "temperature", "--out", "c")
    _, out, _ = stages.call("compare", "a", "b", "c", "--json")
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["teacher cnn", "a, hard targets only", "a", "b", "teacher cnn, temperature", "c"]
    for name, result in (("a", a), ("b", b), ("c", c)):
        assert rows[name]["mean"]["f1_macro"] == result["student"]["test"]["f1_macro"]
    assert rows["a"]["spread"]["accuracy"] == a["spread"]["student"]["test"]["accuracy"]
    assert rows["a, hard targets only"]["mean"]["accuracy"] == a["baseline"]["test"]["accuracy"]
    assert rows["teacher cnn"]["mean"]["accuracy"] == a["teacher"]["test"]["accuracy"]
    code, out, _ = stages.call("compare", "a", "b")
    assert code == 0
    assert f"{a['student']['test']['accuracy']:.4f} ± {a['spread']['student']['test']['accuracy']:.4f}" in out
    (line,) = (line for line in out.splitlines() if line.startswith("b "))
    assert "±" not in line  # one seed has no spread
    assert "n/a" in out  # balanced data have no tail recall


@pytest.mark.parametrize(
    ("text", "code", "wrong"),
    [
        (None, 2, "'r' is no run: it has no result.json"),
        ("{", 1, "'r/result.json' is damaged"),
        ('{"teacher": {}}', 1, "'r/result.json' is not of a student's run"),
    ],
)
def test_a_folder_without_a_result_of_a_student_is_refused(
    stages: Stages, text: str | None, code: int, wrong: str
) -> None:
    Path("r").mkdir()
    if text is not None:
        Path("r/result.json").write_text(text)
    assert wrong in stages.fails(code, "compare", "r")


def test_metrics_that_are_not_numbers_are_refused_and_the_split_is_named(tiny: Path, stages: Stages) -> None:
    result = stages("student", "--cache", tiny / "cache", *STUDENT, "--out", "r")
    code, out, _ = stages.call("compare", "r")
    assert code == 0
    assert out.startswith("test split ")
    for part in (result["student"], result["spread"]["student"]):
        part["test"]["accuracy"], accuracy = "high", part["test"]["accuracy"]
        Path("r/result.json").write_text(json.dumps(result))
        assert "'r/result.json' is not of a student's run" in stages.fails(1, "compare", "r")
        part["test"]["accuracy"] = accuracy


# Significance


@pytest.fixture(scope="module")
def run_folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one arch from one cache: a and b differ in the seed, 3 has three seeds and a baseline, random is hardly
    trained."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("trained")
    student = ["student", "--cache", f"{tiny}/cache", "--arch", "mlp:64", "--epochs", "30"]
    main([*student, "--out", f"{folder}/a"])
    main([*student, "--out", f"{folder}/b", "--seed", "1", "--workers", "0", "--device", "cpu"])
    main([*student, "--out", f"{folder}/3", "--seed", "2", "--seeds", "3", "--baseline", "--weight-decay", "0"])
    main([*student, "--out", f"{folder}/random", "--learning-rate", "1e-12", "--loss", "hard", "--baseline"])
    return folder


@pytest.fixture
def runs(run_folder: Path, stages: Stages) -> Path:
    """Copies in the current folder, which a test can damage."""
    shutil.copytree(run_folder, Path(), dirs_exist_ok=True)
    return Path()


def compare(stages: Stages, *names: str) -> list[dict[str, Any]]:
    comparisons: list[dict[str, Any]] = stages("compare", *names)["comparisons"]
    return comparisons


def test_two_seeds_of_the_same_settings_do_not_differ_significantly(runs: Path, stages: Stages) -> None:
    (comparison,) = compare(stages, "a", "b")
    assert comparison["verdict"] == "not told apart"
    assert (comparison["about"], comparison["seeds"]) == ("students", [1, 1])
    assert (comparison["rows"], comparison["level"]) == (360, 0.95)
    a, b = (json.loads(Path(name, "result.json").read_text())["student"]["test"] for name in "ab")
    for name in ("accuracy", "f1_macro"):
        difference = comparison[name]
        assert difference["value"] == pytest.approx(b[name] - a[name], abs=1e-12)
        assert difference["low"] <= min(0, difference["value"])
        assert max(0, difference["value"]) <= difference["high"]
    (test,) = comparison["mcnemar"]
    assert test["second_alone"] - test["first_alone"] == round(360 * comparison["accuracy"]["value"])
    code, out, _ = stages.call("compare", "a", "b")
    assert code == 0
    assert "They differ only in seeds:\n        a  b\n  seed  0  1\n" in out
    assert "difference: b minus a, test split, 360 rows, 1 seed each" in out
    assert "95 % interval" in out
    assert out.splitlines()[-1] == comparison["words"]
    assert comparison["words"].startswith("no significant difference: the interval includes 0 and McNemar's p is ")
    assert "for these trained students on these rows, and may not for other seeds; train both with --seeds 3" in out
    assert stages.call("compare", "a", "b")[1] == out


def test_a_trained_student_differs_significantly_from_an_untrained_one(runs: Path, stages: Stages) -> None:
    (comparison,) = compare(stages, "random", "a")
    assert comparison["verdict"] == "real"
    assert comparison["accuracy"]["low"] > 0.5
    assert comparison["mcnemar"][0]["p"] < 1e-30
    assert comparison["words"].startswith("significant difference between these trained students")
    assert "a is more accurate" in comparison["words"]
    assert "It does not yet follow for their settings" in comparison["words"]  # one seed each
    (exchanged,) = compare(stages, "a", "random")
    assert exchanged["accuracy"]["low"] == -comparison["accuracy"]["high"]
    assert exchanged["f1_macro"]["high"] == -comparison["f1_macro"]["low"]
    assert "a is more accurate" in exchanged["words"]
    _, out, _ = stages.call("compare", "random", "a")
    assert "  learning_rate  1e-12   0.1\n" in out
    assert "  loss           hard    kd:temperature=4\n" in out


def test_a_difference_between_seeds_is_not_one_between_settings(runs: Path, stages: Stages) -> None:
    result = json.loads(Path("random/result.json").read_text())
    result["settings"] = json.loads(Path("b/result.json").read_text())["settings"]
    Path("random/result.json").write_text(json.dumps(result))
    (comparison,) = compare(stages, "a", "random")
    assert comparison["verdict"] == "not told apart"
    assert comparison["mcnemar"][0]["p"] < 1e-9
    assert comparison["words"].startswith("no significant difference between settings")
    assert (
        "no setting differs, so it comes from the seeds; --seeds 3 measures how much seeds vary" in comparison["words"]
    )
    assert ": no significant difference\n" in stages.call("compare", "a", "random", "b")[1]


def test_a_single_run_is_compared_with_its_baseline(runs: Path, stages: Stages) -> None:
    output = stages("compare", "3")
    (comparison,) = output["comparisons"]
    assert (comparison["first"], comparison["second"]) == ("3, hard targets only", "3")
    means = [row["mean"]["accuracy"] for row in output["rows"]]
    assert comparison["accuracy"]["value"] == pytest.approx(means[2] - means[1], abs=1e-12)
    assert [row["setting"] for row in output["differences"]] == ["loss"]
    assert (comparison["about"], comparison["seeds"]) == ("settings", [3, 3])
    assert [test["seeds"] for test in comparison["mcnemar"]] == [[2, 2], [3, 3], [4, 4]]
    _, out, _ = stages.call("compare", "3")
    assert "hard targets alone" in out
    assert "(seeds 4, 4): each of two single students, not part of the verdict" in out
    assert "may not for other seeds" not in out
    assert stages("compare", "a") == {"rows": stages("compare", "a")["rows"], "differences": [], "comparisons": []}
    assert "difference" not in stages.call("compare", "a", "a/")[1]  # the same run twice


def test_a_single_seed_is_tested_against_each_seed_of_the_other_run(runs: Path, stages: Stages) -> None:
    (comparison,) = compare(stages, "3", "random")
    assert (comparison["verdict"], comparison["about"]) == ("real", "students")
    assert [test["seeds"] for test in comparison["mcnemar"]] == [[2, 0], [3, 0], [4, 0]]
    _, out, _ = stages.call("compare", "3", "random")
    assert "360 rows, 3 and 1 seeds" in out
    assert "not part of the verdict" not in out


def test_several_runs_are_compared_with_the_first_and_share_the_level_of_significance(
    runs: Path, stages: Stages
) -> None:
    output = stages("compare", "a", "b", "random", "3")
    comparisons = output["comparisons"]
    assert [(c["first"], c["second"]) for c in comparisons] == [("a", "b"), ("a", "random"), ("a", "3")]
    assert {c["level"] for c in comparisons} == {1 - 0.05 / 3}
    assert [c["verdict"] for c in comparisons][:2] == ["not told apart", "real"]
    (single,) = compare(stages, "a", "b")
    assert comparisons[0]["accuracy"]["low"] < single["accuracy"]["low"]
    differences = [(row["second"], row["setting"], row["values"]) for row in output["differences"]]
    assert differences[0] == ("b", "seed", [0, 1])
    assert ("3", "weight_decay", [0.0001, 0.0]) in differences
    _, out, _ = stages.call("compare", "a", "b", "random", "3")
    assert "Each minus a, in points; 98.33 % intervals: 95 % for all 3 together (Bonferroni)" in out
    assert "differs only in seed 0 → 1\n" in out
    assert ": significant difference\n" in out
    assert (
        "With one seed, a significant difference is one between the trained students, not yet between their settings"
        in out
    )


def test_options_that_change_no_student_are_ignored_and_missing_ones_have_their_default(
    runs: Path, stages: Stages
) -> None:
    result = json.loads(Path("b/result.json").read_text())
    result["settings"] |= {"seed": 0, "data_root": "elsewhere", "recipe": "kd", "cache": ["moved"]}
    del result["settings"]["draws_per_decode"]
    Path("b/result.json").write_text(json.dumps(result))
    assert stages("compare", "a", "b")["differences"] == []
    assert "They differ in no setting.\n" in stages.call("compare", "a", "b")[1]


def test_a_differing_cache_is_named_by_its_teacher_and_fingerprint(runs: Path, stages: Stages) -> None:
    record = json.loads(Path("b/cache.json").read_text())
    Path("b/cache.json").write_text(json.dumps(record | {"others": [{"fingerprint": "0123456789abcdef"}]}))
    (difference,) = (row for row in stages("compare", "a", "b")["differences"] if row["setting"] == "cache")
    fingerprint = record["fingerprint"][:12]
    assert difference["values"] == [f"cnn ({fingerprint})", f"cnn ({fingerprint}, 0123456789ab)"]
    Path("b/cache.json").write_text("{}")
    assert "'b/cache.json' is damaged: it names no fingerprint" in stages.fails(1, "compare", "a", "b")


def test_students_measured_on_different_rows_have_no_verdict(runs: Path, stages: Stages) -> None:
    path = Path("b/logits.safetensors")
    with safe_open(path, "np") as file:
        record = file.metadata()
    content = json.loads(record["content"]) | {"test": "other"}
    save_file(load_file(path), path, record | {"content": json.dumps(content)})
    code, out, _ = stages.call("compare", "a", "b")
    assert code == 0
    assert out.splitlines()[-1].startswith("no verdict: 'a' and 'b' were not measured on the same rows, labels and cl")
    assert "\nb  " in out  # the table
    assert compare(stages, "a", "b")[0]["verdict"] is None


def test_a_run_without_logits_is_in_the_table_and_student_resume_writes_them(runs: Path, stages: Stages) -> None:
    before, out = compare(stages, "a", "b", "random"), ""
    Path("b/logits.safetensors").unlink()
    for names in (("a", "b"), ("b", "a"), ("a", "b", "random")):
        code, out, _ = stages.call("compare", *names)
        assert code == 0
        assert "no verdict: 'b/logits.safetensors' does not exist" in out
        assert "student --resume --out b" in out
    assert ": significant difference\n" in out  # with the other run
    assert stages.call("student", "--resume", "--out", "b")[0] == 0
    assert compare(stages, "a", "b", "random") == before


def test_damaged_logits_and_those_of_another_result_are_refused(runs: Path, stages: Stages) -> None:
    path = Path("b/logits.safetensors")
    content = path.read_bytes()
    shutil.copy("random/logits.safetensors", path)
    assert "'b/logits.safetensors' has an accuracy of" in stages.fails(1, "compare", "a", "b")
    path.write_bytes(content[:-1])
    assert "'b/logits.safetensors' is damaged" in stages.fails(1, "compare", "a", "b")
    with safe_open("3/seed-2/logits.safetensors", "np") as file:
        record = file.metadata()
    save_file(load_file("3/seed-2/logits.safetensors"), "3/seed-2/logits.safetensors", record | {"content": "{}"})
    assert "'3/seed-2/logits.safetensors' is damaged" in stages.fails(1, "compare", "3")


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"combine": "", "map": "", "loss": {"a": {}}}},
        {"settings": 3},
        {"seeds": []},
        {"seeds": [3]},
        {"seeds": [{"seed": "../x"}]},
        {"seeds": [{"seed": 1e999}]},
        {"cache": 3},
    ],
)
def test_a_result_that_is_not_of_a_students_run_is_refused(runs: Path, stages: Stages, change: dict[str, Any]) -> None:
    result = json.loads(Path("a/result.json").read_text())
    Path("a/result.json").write_text(json.dumps(result | change))
    Path("a/cache.json").unlink()
    assert "is not of a student's run" in stages.fails(1, "compare", "a", "b")
