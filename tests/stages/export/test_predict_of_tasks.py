"""`softcache predict` of students of several labels, numbers and embeddings, and of rows of numbers."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from softcache.stages.runs.logits import read_logits
from tests.helpers.commands import Stages
from tests.helpers.task_data import LABELS, NUMBERS, read_digits, save_image
from tests.stages.export.conftest import THRESHOLDS

TEST_ROWS = [0, 5, 10, 15, 20]  # of the digits


def read_outputs(runs: Path, name: str) -> NDArray[np.float64]:
    """The outputs that a run measured on the first rows of its test split, of the seed that is exported."""
    run = runs / f"r_{name}"
    seed = run / f"seed-{json.loads((run / 'export.json').read_text())['seed']}"
    logits = read_logits((seed if seed.is_dir() else run) / "logits.safetensors")["test"].logits
    return logits[: len(TEST_ROWS)].astype(np.float64)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Image files of the first rows of the test split."""
    paths = [tmp_path / f"{row}.png" for row in TEST_ROWS]
    for path, row in zip(paths, TEST_ROWS, strict=True):
        save_image(path, row)
    return paths


def test_labels_above_their_thresholds_are_predicted(runs: Path, images: list[Path], stages: Stages) -> None:
    probabilities = 1 / (1 + np.exp(-read_outputs(runs, "labels")))
    is_predicted = probabilities > THRESHOLDS
    assert 0 < is_predicted.sum() < is_predicted.size
    assert (is_predicted != (probabilities > 0.5)).any()  # the thresholds matter
    predictions = stages("predict", runs / "r_labels/student.onnx", *images)["pictures"]
    for prediction, p, expected in zip(predictions, probabilities, is_predicted, strict=True):
        listed = {label["label"]: label for label in prediction["labels"]}
        assert set(listed) == {name for name, is_above in zip(LABELS, expected, strict=True) if is_above}
        assert list(listed) == sorted(listed, key=lambda name: -listed[name]["probability"])
        for name, label in listed.items():
            k = LABELS.index(name)
            assert label["probability"] == pytest.approx(p[k], abs=1e-5)
            assert (label["threshold"], label["predicted"]) == (THRESHOLDS[k], True)


def test_top_lists_labels_below_their_thresholds_too_and_marks_the_others(
    runs: Path, images: list[Path], stages: Stages
) -> None:
    probabilities = 1 / (1 + np.exp(-read_outputs(runs, "labels")))
    predictions = stages("predict", runs / "r_labels/student.onnx", *images, "--top", 2)["pictures"]
    for prediction, p in zip(predictions, probabilities, strict=True):
        order = np.argsort(-p)[:2]
        assert [label["label"] for label in prediction["labels"]] == [LABELS[k] for k in order]
        assert [label["predicted"] for label in prediction["labels"]] == [p[k] > THRESHOLDS[k] for k in order]
    code, out, _ = stages.call("predict", runs / "r_labels/student.onnx", *images, "--top", 3)
    assert code == 0
    assert out.count("(predicted)") == (probabilities > THRESHOLDS).sum()
    code, out, _ = stages.call("predict", runs / "r_labels/student.onnx", *images)
    assert out.count("no label is above its threshold") == (~(probabilities > THRESHOLDS).any(1)).sum()


def test_numbers_have_their_names_and_the_units_of_the_data(runs: Path, images: list[Path], stages: Stages) -> None:
    outputs = read_outputs(runs, "numbers")
    predictions = stages("predict", runs / "r_numbers/student.onnx", *images)["pictures"]
    for prediction, row in zip(predictions, outputs, strict=True):
        assert [number["name"] for number in prediction["numbers"]] == list(NUMBERS)
        np.testing.assert_allclose([number["value"] for number in prediction["numbers"]], row, rtol=1e-5)
    code, out, _ = stages.call("predict", runs / "r_numbers/student.onnx", images[0])
    assert code == 0
    match = re.search(r"height ([0-9.]+), light ([0-9.]+)$", out.strip())
    assert match
    np.testing.assert_allclose([float(match[1]), float(match[2])], outputs[0], rtol=1e-5)


def test_an_embedding_is_printed_whole_in_json_and_by_its_norm_in_text(runs: Path, stages: Stages) -> None:
    from PIL import Image

    from softcache.data.sources import load_source

    images: Any = load_source("digits").splits["test"].images
    Image.fromarray(images.pixels[0, 0].numpy()).save("d.png")
    expected = read_outputs(runs, "embedding")[0]
    (prediction,) = stages("predict", runs / "r_embedding/student.onnx", "d.png")["pictures"]
    np.testing.assert_allclose(prediction["embedding"], expected, rtol=1e-4, atol=1e-5)
    code, out, _ = stages.call("predict", runs / "r_embedding/student.onnx", "d.png")
    assert code == 0
    assert out.startswith(f"d.png  {expected[0]:.4f}, ")
    assert f"(12 numbers, norm {np.linalg.norm(expected):.4f})" in out


def test_rows_come_from_npy_files(runs: Path, stages: Stages) -> None:
    rows = read_digits()[0].reshape(-1, 64)[TEST_ROWS].astype(np.float64) * 1000
    np.save("rows.npy", rows)
    np.save("one.npy", rows[2].astype(np.float32))
    expected = read_outputs(runs, "rows")
    predictions = stages("predict", runs / "r_rows/student.onnx", "rows.npy", "one.npy")["rows"]
    assert [(p["file"], p["row"]) for p in predictions] == [*(("rows.npy", k) for k in range(5)), ("one.npy", 0)]
    values = [[number["value"] for number in p["numbers"]] for p in predictions]
    np.testing.assert_allclose(values, expected[[0, 1, 2, 3, 4, 2]], rtol=1e-5)
    np.save("narrow.npy", rows[:, :3])
    error = stages.fails(1, "predict", runs / "r_rows/student.onnx", "narrow.npy")
    assert error == "Error: 'narrow.npy' has the shape [5, 3], the model takes rows [64]"
    np.save("objects.npy", np.array([{}] * 64), allow_pickle=True)
    np.savez("rows.npz", x=rows)
    Path("cut.npy").write_bytes(Path("rows.npy").read_bytes()[:600])
    save_image(Path("d.png"), 0)
    for name in ("objects.npy", "rows.npz", "cut.npy", "d.png"):
        error = stages.fails(1, "predict", runs / "r_rows/student.onnx", name)
        assert error == f"Error: '{name}' is no .npy file of numbers, or is damaged: the model takes rows of numbers"


@pytest.mark.parametrize("task", ["numbers", "embedding"])
def test_top_is_refused_where_nothing_is_named(task: str, runs: Path, images: list[Path], stages: Stages) -> None:
    model = runs / f"r_{task}/student.onnx"
    error = stages.fails(2, "predict", model, images[0], "--top", 3)
    assert error == (
        f"Error: --top 3 is for students of classes or labels, and '{model}' is one of the task {task}: leave it out"
    )


@pytest.mark.parametrize("name", ["labels", "numbers", "embedding", "rows"])
def test_the_example_in_the_card_prints_what_predict_does(
    name: str, runs: Path, images: list[Path], stages: Stages, tmp_path: Path
) -> None:
    Path("student.onnx").write_bytes((runs / f"r_{name}/student.onnx").read_bytes())
    images[0].rename("picture.png")
    np.save("rows.npy", read_digits()[0].reshape(-1, 64)[:3].astype(np.float32) * 1000)
    match = re.search(r"```python\n(.*?)```", (runs / f"r_{name}/MODEL_CARD.md").read_text(), re.DOTALL)
    assert match
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(match[1], {})
    source = "rows.npy" if name == "rows" else "picture.png"
    prediction = stages("predict", "student.onnx", source)["rows" if name == "rows" else "pictures"][0]
    if name == "labels":
        predicted = sorted((label["label"] for label in prediction["labels"]), key=LABELS.index)
        assert printed.getvalue() == f"{predicted}\n"
    elif name == "embedding":
        values = np.array(printed.getvalue().strip("[]\n ").split(), float)
        np.testing.assert_allclose(values, prediction["embedding"], rtol=1e-5, atol=1e-6)
    else:
        assert printed.getvalue() == f"{ ({n['name']: n['value'] for n in prediction['numbers']}) }\n"


@pytest.mark.parametrize(
    ("name", "key", "text"),
    [
        ("labels", "task", "number"),
        ("labels", "names", None),
        ("labels", "names", '["a", "b"]'),
        ("labels", "thresholds", None),
        ("labels", "thresholds", "[0.5, 0.5]"),
        ("labels", "thresholds", "[0.5, 0.5, NaN]"),
        ("labels", "thresholds", "[0.5, 0.5, 1.5]"),
        ("labels", "thresholds", "[0.5, 0.5, true]"),
        ("labels", "task", "numbers"),
        ("numbers", "output_scale", "{}"),
        ("numbers", "output_scale", '{"mean": [0, 1], "std": [1, Infinity]}'),
        ("numbers", "names", '["a", "b", "c"]'),
        ("embedding", "width", "13"),
        ("embedding", "width", "1e99"),
        ("embedding", "width", "true"),
        ("rows", "preprocessing", '{"shape": []}'),
        ("rows", "preprocessing", '{"shape": [63]}'),
        ("rows", "preprocessing", '{"shape": [1e9, 1e9]}'),
        ("rows", "preprocessing", '{"shape": [-64]}'),
    ],
)
def test_malformed_metadata_are_refused_in_one_line(
    name: str, key: str, text: str | None, runs: Path, images: list[Path], stages: Stages
) -> None:
    model = onnx.load(runs / f"r_{name}/student.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props if entry.key != key}
    del model.metadata_props[:]
    helper.set_model_props(model, metadata if text is None else metadata | {key: text})
    onnx.save(model, "m.onnx")
    error = stages.fails(1, "predict", "m.onnx", images[0])
    assert error.startswith("Error: 'm.onnx' ")
    assert len(error) < 600
