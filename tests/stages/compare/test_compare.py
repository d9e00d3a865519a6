"""stages compare: finished runs side by side, in what they differ, and whether that is beyond chance."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.helpers.commands import Stages

STUDENT = ("--arch", "mlp:8", "--epochs", 2)


def test_runs_stand_side_by_side_with_their_teachers_once(tiny: Path, stages: Stages) -> None:
    cache = ("student", "--cache", tiny / "cache", *STUDENT)
    one = stages(*cache, "--loss", "hard", "--seeds", 2, "--baseline", "--out", "a")
    other = stages(*cache, "--loss", "kd", "--out", "b")
    mapped = stages(*cache, "--loss", "kd", "--map", "temperature", "--out", "c")
    _, out, _ = stages.call("compare", "a", "b", "c", "--json")
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["teacher cnn", "a, hard targets only", "a", "b", "teacher cnn, temperature", "c"]
    for name, result in (("a", one), ("b", other), ("c", mapped)):
        assert rows[name]["mean"]["f1_macro"] == result["student"]["test"]["f1_macro"]
    assert rows["a"]["spread"]["accuracy"] == one["spread"]["student"]["test"]["accuracy"]
    assert rows["a, hard targets only"]["mean"]["accuracy"] == one["baseline"]["test"]["accuracy"]
    assert rows["teacher cnn"]["mean"]["accuracy"] == one["teacher"]["test"]["accuracy"]
    code, out, _ = stages.call("compare", "a", "b")
    assert code == 0
    assert f"{one['student']['test']['accuracy']:.4f} ± {one['spread']['student']['test']['accuracy']:.4f}" in out
    (line,) = (line for line in out.splitlines() if line.startswith("b "))
    assert "±" not in line  # one seed has no spread
    assert "n/a" in out  # of balanced data there is no tail


@pytest.mark.parametrize(
    ("text", "code", "wrong"),
    [
        (None, 2, "'r' is no run: it has no result.json"),
        ("{", 1, "'r/result.json' is damaged"),
        ('{"teacher": {}}', 1, "'r/result.json' is not of a student's run"),
    ],
)
def test_what_is_no_run_is_refused(stages: Stages, text: str | None, code: int, wrong: str) -> None:
    Path("r").mkdir()
    if text is not None:
        Path("r/result.json").write_text(text)
    assert wrong in stages.fails(code, "compare", "r")


def test_figures_that_are_no_numbers_are_refused_and_the_split_is_named(tiny: Path, stages: Stages) -> None:
    result = stages("student", "--cache", tiny / "cache", *STUDENT, "--out", "r")
    code, out, _ = stages.call("compare", "r")
    assert code == 0
    assert out.startswith("test split ")
    for part in (result["student"], result["spread"]["student"]):
        part["test"]["accuracy"], right = "high", part["test"]["accuracy"]
        Path("r/result.json").write_text(json.dumps(result))
        assert "'r/result.json' is not of a student's run" in stages.fails(1, "compare", "r")
        part["test"]["accuracy"] = right


# Told apart


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one arch from one cache: a and b differ in the seed; 3 has three of them, and a baseline; random learned
    nothing."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("trained")
    student = ["student", "--cache", f"{tiny}/cache", "--arch", "mlp:64", "--epochs", "30"]
    main([*student, "--out", f"{folder}/a"])
    main([*student, "--out", f"{folder}/b", "--seed", "1", "--workers", "0", "--device", "cpu"])
    main([*student, "--out", f"{folder}/3", "--seed", "2", "--seeds", "3", "--baseline", "--weight-decay", "0"])
    main([*student, "--out", f"{folder}/random", "--learning-rate", "1e-12", "--loss", "hard", "--baseline"])
    return folder


@pytest.fixture
def runs(trained: Path, stages: Stages) -> Path:
    """Copies in the current folder, which a test may damage."""
    shutil.copytree(trained, Path(), dirs_exist_ok=True)
    return Path()


def told(stages: Stages, *names: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = stages("compare", *names)["comparisons"]
    return found


def test_two_seeds_of_the_same_settings_are_not_told_apart(runs: Path, stages: Stages) -> None:
    (found,) = told(stages, "a", "b")
    assert found["verdict"] == "not told apart"
    assert (found["about"], found["seeds"], found["rows"], found["level"]) == ("students", [1, 1], 360, 0.95)
    a, b = (json.loads(Path(name, "result.json").read_text())["student"]["test"] for name in "ab")
    for name in ("accuracy", "f1_macro"):
        assert found[name]["value"] == pytest.approx(b[name] - a[name], abs=1e-12)
        assert (
            found[name]["low"] <= min(0, found[name]["value"]) <= max(0, found[name]["value"]) <= found[name]["high"]
        )
    (test,) = found["mcnemar"]
    assert test["second_alone"] - test["first_alone"] == round(360 * found["accuracy"]["value"])
    code, out, _ = stages.call("compare", "a", "b")
    assert code == 0
    assert "They differ in nothing but seeds:\n        a  b\n  seed  0  1\n" in out
    assert "difference: b less a, test split, 360 rows, 1 seed each" in out
    assert "95 % interval" in out
    assert out.splitlines()[-1] == found["words"]
    assert found["words"].startswith("not told apart: the interval includes 0 and McNemar's p is ")
    assert "of these trained students on these rows; another seed could give another answer; --seeds 3" in out
    assert stages.call("compare", "a", "b")[1] == out


def test_a_student_that_learned_is_told_apart_from_one_that_did_not(runs: Path, stages: Stages) -> None:
    (found,) = told(stages, "random", "a")
    assert found["verdict"] == "real"
    assert found["accuracy"]["low"] > 0.5
    assert found["mcnemar"][0]["p"] < 1e-30
    assert "a is the more accurate" in found["words"]
    assert "Not yet for their settings" in found["words"]  # one seed each
    (turned,) = told(stages, "a", "random")
    assert turned["accuracy"]["low"] == -found["accuracy"]["high"]
    assert turned["f1_macro"]["high"] == -found["f1_macro"]["low"]
    assert "a is the more accurate" in turned["words"]
    _, out, _ = stages.call("compare", "random", "a")
    assert "  learning_rate  1e-12   0.1\n" in out
    assert "  loss           hard    kd:temperature=4\n" in out


def test_what_seeds_alone_do_is_no_gain_of_a_setting(runs: Path, stages: Stages) -> None:
    result = json.loads(Path("random/result.json").read_text())
    result["settings"] = json.loads(Path("b/result.json").read_text())["settings"]
    Path("random/result.json").write_text(json.dumps(result))
    (found,) = told(stages, "a", "random")
    assert found["verdict"] == "not told apart"
    assert found["mcnemar"][0]["p"] < 1e-9
    assert "but no setting differs: it is chance of the seeds; --seeds 3 shows how far seeds go" in found["words"]
    assert ": not told apart\n" in stages.call("compare", "a", "random", "b")[1]
    assert ": not told apart\n" in stages.call("compare", "a", "random", "b")[1]


def test_one_run_is_told_apart_from_its_baseline(runs: Path, stages: Stages) -> None:
    found = stages("compare", "3")
    (one,) = found["comparisons"]
    assert (one["first"], one["second"]) == ("3, hard targets only", "3")
    means = [row["mean"]["accuracy"] for row in found["rows"]]
    assert one["accuracy"]["value"] == pytest.approx(means[2] - means[1], abs=1e-12)
    assert [row["setting"] for row in found["differences"]] == ["loss"]
    assert (one["about"], one["seeds"]) == ("settings", [3, 3])
    assert [test["seeds"] for test in one["mcnemar"]] == [[2, 2], [3, 3], [4, 4]]
    _, out, _ = stages.call("compare", "3")
    assert "hard targets alone" in out
    assert "(seeds 4, 4): each of two students alone, it decides nothing" in out
    assert "another seed" not in out
    assert stages("compare", "a") == {"rows": stages("compare", "a")["rows"], "differences": [], "comparisons": []}
    assert "difference" not in stages.call("compare", "a", "a/")[1]  # one run


def test_one_seed_stands_against_each_of_the_others_seeds(runs: Path, stages: Stages) -> None:
    (found,) = told(stages, "3", "random")
    assert (found["verdict"], found["about"]) == ("real", "students")
    assert [test["seeds"] for test in found["mcnemar"]] == [[2, 0], [3, 0], [4, 0]]
    _, out, _ = stages.call("compare", "3", "random")
    assert "360 rows, 3 and 1 seeds" in out
    assert "decides nothing" not in out


def test_several_runs_are_each_told_apart_from_the_first_with_chance_shared(runs: Path, stages: Stages) -> None:
    found = stages("compare", "a", "b", "random", "3")
    assert [(one["first"], one["second"]) for one in found["comparisons"]] == [("a", "b"), ("a", "random"), ("a", "3")]
    assert {one["level"] for one in found["comparisons"]} == {1 - 0.05 / 3}
    assert [one["verdict"] for one in found["comparisons"]][:2] == ["not told apart", "real"]
    (alone,) = told(stages, "a", "b")
    assert found["comparisons"][0]["accuracy"]["low"] < alone["accuracy"]["low"]
    apart = [(one["second"], one["setting"], one["values"]) for one in found["differences"]]
    assert apart[0] == ("b", "seed", [0, 1])
    assert ("3", "weight_decay", [0.0001, 0.0]) in apart
    _, out, _ = stages.call("compare", "a", "b", "random", "3")
    assert "Each less a, in points; 98.33 % intervals: 95 % for all 3 together (Bonferroni)" in out
    assert "differs in nothing but seed 0 → 1\n" in out
    assert "One seed: real is said of the trained students, not yet of their settings" in out


def test_what_changes_no_student_is_no_difference_and_an_older_run_has_the_defaults(
    runs: Path, stages: Stages
) -> None:
    result = json.loads(Path("b/result.json").read_text())
    result["settings"] |= {"seed": 0, "data_root": "elsewhere", "recipe": "kd", "cache": ["moved"]}
    del result["settings"]["draws_per_decode"]
    Path("b/result.json").write_text(json.dumps(result))
    assert stages("compare", "a", "b")["differences"] == []
    assert "They differ in no setting.\n" in stages.call("compare", "a", "b")[1]


def test_another_cache_is_named_by_its_teacher_and_fingerprint(runs: Path, stages: Stages) -> None:
    record = json.loads(Path("b/cache.json").read_text())
    Path("b/cache.json").write_text(json.dumps(record | {"others": [{"fingerprint": "0123456789abcdef"}]}))
    (row,) = (one for one in stages("compare", "a", "b")["differences"] if one["setting"] == "cache")
    short = record["fingerprint"][:12]
    assert row["values"] == [f"cnn ({short})", f"cnn ({short}, 0123456789ab)"]
    Path("b/cache.json").write_text("{}")
    assert "'b/cache.json' is damaged: it names no fingerprint" in stages.fails(1, "compare", "a", "b")


def test_other_rows_give_no_verdict(runs: Path, stages: Stages) -> None:
    path = Path("b/logits.safetensors")
    with safe_open(path, "np") as file:
        record = file.metadata()
    content = json.loads(record["content"]) | {"test": "other"}
    save_file(load_file(path), path, record | {"content": json.dumps(content)})
    code, out, _ = stages.call("compare", "a", "b")
    assert code == 0
    assert out.splitlines()[-1].startswith("no verdict: 'a' and 'b' were not measured on the same rows, labels and cl")
    assert "\nb  " in out  # the table
    assert told(stages, "a", "b")[0]["verdict"] is None


def test_a_run_without_logits_is_in_the_table_and_has_them_written_again(runs: Path, stages: Stages) -> None:
    before, out = told(stages, "a", "b", "random"), ""
    Path("b/logits.safetensors").unlink()
    for names in (("a", "b"), ("b", "a"), ("a", "b", "random")):
        code, out, _ = stages.call("compare", *names)
        assert code == 0
        assert "no verdict: 'b/logits.safetensors' is not there" in out
        assert "student --resume --out b" in out
    assert ": real\n" in out  # of the other
    assert stages.call("student", "--resume", "--out", "b")[0] == 0
    assert told(stages, "a", "b", "random") == before


def test_logits_that_are_damaged_or_not_of_the_result_are_refused(runs: Path, stages: Stages) -> None:
    path = Path("b/logits.safetensors")
    whole = path.read_bytes()
    shutil.copy("random/logits.safetensors", path)
    assert "'b/logits.safetensors' has an accuracy of" in stages.fails(1, "compare", "a", "b")
    path.write_bytes(whole[:-1])
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
def test_a_result_that_no_student_left_is_refused(runs: Path, stages: Stages, change: dict[str, Any]) -> None:
    result = json.loads(Path("a/result.json").read_text())
    Path("a/result.json").write_text(json.dumps(result | change))
    Path("a/cache.json").unlink()
    assert "is not of a student's run" in stages.fails(1, "compare", "a", "b")
