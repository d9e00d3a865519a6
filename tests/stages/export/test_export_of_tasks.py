"""Students of several labels, numbers and embeddings, and of rows: exported files compute what the run measured."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, safe_open

from softcache.data.sources import load_source
from softcache.pipeline.models import build
from softcache.stages.export import quantize
from softcache.stages.export.onnx_model import OnnxStudent
from softcache.stages.export.select_student import read_thresholds
from softcache.stages.runs.logits import read_logits
from tests.helpers.commands import Stages
from tests.helpers.task_data import LABELS, NUMBERS, make_numbers, read_digits
from tests.stages.export.conftest import THRESHOLDS

RUNS = ("r_labels", "r_numbers", "r_embedding", "r_rows")


def read_record(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "export.json").read_text())
    return record


def read_measured(run: Path) -> torch.Tensor:
    """The outputs on the test split that the run measured, of the seed that is exported."""
    seed = read_record(run)["seed"]
    folder = run / f"seed-{seed}" if (run / f"seed-{seed}").is_dir() else run
    return torch.from_numpy(read_logits(folder / "logits.safetensors")["test"].logits)


def read_inputs(run: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The test split as the input of the exported network."""
    if run.name == "r_embedding":
        pixels: torch.Tensor = load_source("digits").splits["test"].images.pixels  # type: ignore[union-attr]
        return pixels.numpy().astype(np.float32) / 255
    images = read_digits()[0][::5]
    if run.name == "r_rows":
        return images.reshape(-1, 64).astype(np.float32) * 1000
    return images[:, None].astype(np.float32) / 255


@pytest.mark.parametrize("name", RUNS)
def test_every_file_computes_what_the_run_measured(name: str, runs: Path) -> None:
    """Numbers in the units of the data, in batches of any size."""
    run, inputs, expected = runs / name, read_inputs(runs / name), read_measured(runs / name).numpy()
    unit = expected.std(0)
    assert (unit > 0).all()
    session = onnxruntime.InferenceSession(run / "student.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(run / "student.pt2").module()
    for rows in (1, 7, len(inputs)):
        (outputs,) = session.run(None, {session.get_inputs()[0].name: inputs[:rows]})
        assert np.abs((outputs - expected[:rows]) / unit).max() < 2e-5
        with torch.inference_mode():
            reloaded = program(torch.from_numpy(inputs[:rows])).numpy()
        assert np.abs((reloaded - expected[:rows]) / unit).max() < 2e-5
    names = {"r_labels": "logits", "r_numbers": "numbers", "r_embedding": "embedding", "r_rows": "numbers"}
    assert session.get_outputs()[0].name == names[name]
    assert session.get_inputs()[0].name == ("rows" if name == "r_rows" else "pictures")
    check = read_record(run)["check"]
    assert check["largest_difference"] < 1e-4
    assert ("flips" in check, check.get("unit")) == (
        (True, None) if name == "r_labels" else (False, "standard deviation")
    )


def test_the_weights_alone_and_the_output_scale_give_numbers(runs: Path) -> None:
    """The standardised outputs of the state dict, times the scale in the file's metadata."""
    path = runs / "r_numbers/student.safetensors"
    with safe_open(path, "pt") as file:
        scale = json.loads(file.metadata()["output_scale"])
    network = build("mlp:8", 2, 1, 8)
    network.load_state_dict(load_file(path))
    spec = json.loads((runs / f"r_numbers/seed-{read_record(runs / 'r_numbers')['seed']}/result.json").read_text())
    spec = spec["student"]["preparation"]
    assert (scale["mean"], scale["std"]) == (spec["output_mean"], spec["output_std"])
    targets = make_numbers()[np.arange(450) % 5 != 0].astype(np.float64)
    np.testing.assert_allclose(scale["mean"], np.nanmean(targets, 0), rtol=0.05)  # of these a tenth is for validation
    inputs = (torch.from_numpy(read_inputs(runs / "r_numbers")) - spec["mean"][0]) / spec["std"][0]
    with torch.inference_mode():
        outputs = network.eval()(inputs).double() * torch.tensor(scale["std"]) + torch.tensor(scale["mean"])
    expected = read_measured(runs / "r_numbers")
    assert float(((outputs - expected) / expected.std(0)).abs().max()) < 2e-5


def test_the_record_and_the_metadata_have_the_task_and_nothing_of_classes(runs: Path) -> None:
    expected: dict[str, dict[str, Any]] = {
        "r_labels": {"task": "labels", "names": list(LABELS), "thresholds": THRESHOLDS},
        "r_numbers": {"task": "numbers", "names": list(NUMBERS)},
        "r_embedding": {"task": "embedding", "width": 12},
    }
    for name, values in expected.items():
        record = read_record(runs / name)
        assert {key: record[key] for key in values} == values
        session = onnxruntime.InferenceSession(runs / name / "student.onnx", providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
        assert metadata["task"] == values["task"]
        assert all(json.loads(metadata[key]) == value for key, value in values.items() if key != "task")
        assert not {"classes"} & {*record, *metadata}
        assert ("thresholds" in metadata) == (name == "r_labels")
        card = (runs / name / "MODEL_CARD.md").read_text()
        assert "| classes |" not in card
        assert "ECE" not in card
    assert "even (0.3), big\\|x (0.7), loop (0.45)" in (runs / "r_labels/MODEL_CARD.md").read_text()
    assert "| height | " in (runs / "r_numbers/MODEL_CARD.md").read_text()
    assert "| cosine | - | " in (runs / "r_embedding/MODEL_CARD.md").read_text()


def test_thresholds_are_halves_where_the_run_has_none_and_damaged_ones_are_refused(
    runs: Path, in_runs: Stages, tmp_path: Path
) -> None:
    shutil.copytree(runs / "r_labels", tmp_path / "copy")
    result = json.loads((tmp_path / "copy/result.json").read_text())
    for thresholds in ([0.5], [0.1, 0.2, 1.5], "0.5", [0.1, 0.2, None]):
        result["student"]["thresholds"] = thresholds
        (tmp_path / "copy/result.json").write_text(json.dumps(result))
        assert "its thresholds are not 3 numbers from 0 to 1" in in_runs.fails(1, "export", tmp_path / "copy")
    del result["student"]["thresholds"]
    (tmp_path / "copy/result.json").write_text(json.dumps(result))
    assert read_thresholds(tmp_path / "copy", 3) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name", ["r_numbers", "r_embedding"])
def test_of_several_seeds_the_best_by_the_main_figure_is_exported(name: str, runs: Path) -> None:
    """The lowest RMSE, the highest cosine; on validation."""
    figure, best = ("rmse", min) if name == "r_numbers" else ("cosine", max)
    seeds = json.loads((runs / name / "result.json").read_text())["seeds"]
    values = {seed["seed"]: seed["student"]["val"][figure] for seed in seeds}
    assert len(set(values.values())) == 2
    assert read_record(runs / name)["seed"] == best(values, key=lambda seed: values[seed])
    assert f"by {figure} on validation" in read_record(runs / name)["chosen"]


def test_the_loss_of_8_bits_is_one_of_the_main_figure(runs: Path) -> None:
    labels, numbers, embedding = (read_record(runs / name)["int8"] for name in RUNS[:3])
    assert (labels["figure"], labels["drop"]) == ("map", labels["before"] - labels["after"])
    assert labels["after"] == labels["figures"]["map"]
    assert numbers["figure"] == "rmse"
    targets, outputs = make_numbers()[::5].astype(np.float64), {}
    for file in ("student.onnx", "student-int8.onnx"):
        student = OnnxStudent.from_bytes((runs / "r_numbers" / file).read_bytes())
        outputs[file] = student.compute_logits(read_inputs(runs / "r_numbers"))
    before, after = (np.sqrt(np.nanmean(np.square(z - targets), 0)) for z in outputs.values())
    assert numbers["drop"] == pytest.approx(float((after / before - 1).mean()), abs=1e-6)
    assert len(np.unique(outputs["student-int8.onnx"][:, 0])) > 60  # numbers are not rounded to 256 levels
    student = OnnxStudent.from_bytes((runs / "r_embedding/student-int8.onnx").read_bytes())
    int8, float32 = student.compute_logits(read_inputs(runs / "r_embedding")), read_measured(runs / "r_embedding")
    cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(int8).double(), float32.double()).mean()
    assert embedding["drop"] == pytest.approx(1 - float(cosine), abs=1e-6)
    assert not {"flips", "accuracy_before"} & {*numbers, *embedding}


LOSSES = {
    "r_labels": r"loses [0-9.]+ points of mAP on test, more than the 1 of --most-drop 0.01",
    "r_numbers": r"raises the RMSE by [0-9.]+ % on test, more than the 1 % of --most-drop 0.01",
    "r_embedding": r"changes embeddings by [0-9.]+ \(1 - cosine\) on test, more than the --most-drop 0.01",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_a_quantised_student_that_loses_too_much_is_refused_by_its_figure(
    name: str, in_runs: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student in 8 bits that mixes up the rows."""
    compute_logits, quantize_onnx, quantized = OnnxStudent.compute_logits, quantize.quantize_onnx, []

    def record(*arguments: Any) -> bytes:
        quantized.append(True)
        return quantize_onnx(*arguments)

    def mix_rows(self: Any, images: Any) -> Any:
        outputs = compute_logits(self, images)
        return outputs[::-1].copy() if quantized else outputs

    monkeypatch.setattr(quantize, "quantize_onnx", record)
    monkeypatch.setattr(OnnxStudent, "compute_logits", mix_rows)
    error = in_runs.fails(1, "export", name, "--int8")
    assert re.search(rf"student-int8\.onnx {LOSSES[name]}: nothing was written", error), error


def test_a_number_that_differs_is_refused_in_standard_deviations(
    runs: Path, in_runs: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference of 1e-3 deviations of the second number is 1e-6 in its units."""
    std = read_record(runs / "r_numbers")["output_scale"]["std"][1]
    compute_logits = OnnxStudent.compute_logits

    def spoil(self: Any, images: Any) -> Any:
        outputs = compute_logits(self, images).copy()
        outputs[:, 1] += 1e-3 * std
        return outputs

    monkeypatch.setattr(OnnxStudent, "compute_logits", spoil)
    error = in_runs.fails(1, "export", "r_numbers")
    assert "a number of student.onnx differs from PyTorch's by 1.00e-03 standard deviations, more than" in error
    assert "top-1" not in error


@pytest.mark.parametrize("name", RUNS)
def test_evaluate_computes_the_figures_of_the_run(name: str, in_runs: Stages) -> None:
    data = ("--data", f"arrays:{name[2:]}.npz") if name != "r_embedding" else ()
    result = json.loads(Path(name, "result.json").read_text())
    seeds = result.get("seeds") or [{"seed": 0, "student": result["student"]}]
    evaluated = in_runs("evaluate", name, *data)
    for seed in seeds:
        for split in ("val", "test"):
            assert_close(evaluated[str(seed["seed"])][split], seed["student"][split])


def assert_close(value: Any, expected: Any) -> None:
    """Compare figures, which are equal to 1e-6."""
    if isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for key in expected:
            assert_close(value[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(value, expected, strict=True):
            assert_close(one, other)
    else:
        assert value == (expected if expected is None else pytest.approx(expected, rel=1e-6, abs=1e-9))
