"""`softcache predict`: images are prepared as the held-out ones, and files from anyone are refused safely."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from softcache.base import packages
from softcache.data.sources import load_source
from softcache.data.transfer_set import load_transfer_set
from softcache.data.views.policy import parse_views
from softcache.data.views.render import render
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models import build
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.pipeline.models.state_dicts import load_weights, read_state_dict
from softcache.stages.export import onnx_model
from softcache.stages.export.metadata import ExportMetadata
from softcache.stages.export.predict import load_input
from tests.helpers.commands import Stages
from tests.helpers.paths import ROOT


def make_metadata(channels: int, size: int, resize: int, K: int = 10) -> ExportMetadata:
    return ExportMetadata(tuple(map(str, range(K))), channels, size, resize, "cnn", (), {})


def read_digits() -> torch.Tensor:
    """The digits' test split, uint8 [360, 1, 8, 8]."""
    images: torch.Tensor = load_source("digits").splits["test"].images.pixels  # type: ignore[union-attr]
    return images


def save_digit(path: Path, number: int, scale: int = 1) -> None:
    image = Image.fromarray(read_digits()[number, 0].numpy())
    image.resize((8 * scale, 8 * scale), Image.Resampling.NEAREST).save(path)


# Input


@pytest.mark.parametrize("spec", ["none:size=16", "none:size=12,resize=20", "none:size=9,resize=4", "none:size=40"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_images_are_prepared_as_the_held_out_ones_of_a_folder(
    spec: str, mode: str, tmp_path: Path, save_image: Callable[..., Any]
) -> None:
    """For images of every shape, and for a grey one among colour images."""
    shapes = ((16, 16), (31, 20), (20, 33), (9, 50), (16, 17))
    for split in ("train", "test"):
        for name in ("a", "b"):
            for k, (width, height) in enumerate(shapes):
                save_image(tmp_path / split / name / f"{k}.png", width, height, k, mode)
    if mode != "L":
        save_image(tmp_path / "test/a/9.png", 18, 22, 9, "L")
    transfer_set = load_transfer_set(f"folder:{tmp_path}", tmp_path, val_fraction=0.5)
    split, policy = transfer_set.splits["test"], parse_views(spec)
    views = render(split.images, policy, 0, np.arange(len(split)), 0).numpy()
    metadata = make_metadata(transfer_set.channels, policy.size, max(policy.size, policy.resize))
    for path, view in zip(split.images.names, views, strict=True):  # type: ignore[union-attr]
        prepared = load_input(tmp_path / path, metadata)
        assert prepared.dtype == np.float32
        assert np.array_equal(prepared[0], view.astype(np.float32) / 255)


def test_the_pixels_of_a_grey_image_stay_as_they_are(tmp_path: Path) -> None:
    for number in range(5):
        save_digit(tmp_path / "d.png", number)
        assert np.array_equal(
            load_input(tmp_path / "d.png", make_metadata(1, 8, 8))[0] * 255, read_digits()[number].numpy()
        )


# Predictions


def test_probabilities_are_those_of_the_student_in_pytorch(
    exported: Path, tiny: Path, tmp_path: Path, stages: Stages
) -> None:
    names = [f"{number}.png" for number in range(6)]
    for number, name in enumerate(names):
        save_digit(tmp_path / name, number)
    predictions = stages("predict", exported / "student.onnx", *names, "--top", 10)["pictures"]
    seed = json.loads((exported / "export.json").read_text())["seed"]
    network = build("cnn", 10, 1, 8)
    load_weights(network, read_state_dict(exported / f"seed-{seed}/student.pt"), "")
    with torch.inference_mode():
        expected = (
            PreparedModel(network, CacheReader(tiny / "cache").input_spec).eval()(read_digits()[:6]).softmax(1).numpy()
        )
    assert [prediction["picture"] for prediction in predictions] == names
    for prediction, row in zip(predictions, expected, strict=True):
        top = prediction["top"]
        assert [c["class"] for c in top] == [str(c) for c in np.argsort(-row)]
        for c in top:
            assert c["probability"] == pytest.approx(row[int(c["class"])], abs=1e-5)
        assert math.isclose(sum(c["probability"] for c in top), 1)
    assert len(stages("predict", exported / "student.onnx", "0.png")["pictures"][0]["top"]) == 3
    code, out, _ = stages.call("predict", exported / "student-int8.onnx", "0.png", "1.png", "--top", 2)
    assert code == 0
    assert [len(line.split()) for line in out.splitlines()] == [5, 5]


def test_pytorch_is_not_loaded(exported: Path, tmp_path: Path) -> None:
    save_digit(tmp_path / "d.png", 0)
    arguments = ["-X", "importtime", "-m", "softcache", "predict", str(exported / "student.onnx"), "d.png"]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert {"onnxruntime", "PIL"} <= loaded
    assert not loaded & {"torch", "torchvision", "h5py", "sklearn"}


# Refused files


@pytest.fixture
def image(tmp_path: Path) -> str:
    save_digit(tmp_path / "d.png", 0)
    return "d.png"


def test_missing_and_unreadable_files_are_named(exported: Path, image: str, stages: Stages) -> None:
    model = exported / "student.onnx"
    assert stages.fails(2, "predict", "none.onnx", image) == "Error: there is no model 'none.onnx'"
    assert stages.fails(2, "predict", model, image, "no.png") == "Error: there is no image 'no.png'"
    Path("text.png").write_text("no image")
    assert "the image text.png cannot be decoded" in stages.fails(1, "predict", model, image, "text.png")
    Path("cut.png").write_bytes(Path(image).read_bytes()[:60])
    assert "the image cut.png cannot be decoded" in stages.fails(1, "predict", model, "cut.png")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save("deep.png")
    assert "deep.png has more than 8 bits" in stages.fails(1, "predict", model, "deep.png")


def test_a_missing_library_is_reported_with_the_command_that_installs_it(
    image: str, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "onnxruntime" else object())
    error = stages.fails(2, "predict", "m.onnx", image)
    assert error == "Error: predict needs onnxruntime, which is not installed: pip install -e '.[export]'"


def test_a_damaged_file_is_refused(exported: Path, image: str, stages: Stages) -> None:
    content = (exported / "student.onnx").read_bytes()
    for damaged in (b"", b"PK\x03\x04 no protobuf", content[:1000], content[: len(content) // 2]):
        Path("m.onnx").write_bytes(damaged)
        assert "Error: 'm.onnx' " in stages.fails(1, "predict", "m.onnx", image)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("form", None),
        ("form", "another 2"),
        ("classes", None),
        ("classes", "["),
        ("classes", "3"),
        ("classes", "[]"),
        ("classes", "[1, 2]"),
        ("classes", '["a"]'),
        ("classes", "[" * 100_000),
        ("preprocessing", None),
        ("preprocessing", "{}"),
        ("preprocessing", "7"),
        ("preprocessing", '{"channels": 2, "size": 8, "resize": 8}'),
        ("preprocessing", '{"channels": 1, "size": 0, "resize": 8}'),
        ("preprocessing", '{"channels": 1, "size": 8, "resize": 4}'),
        ("preprocessing", '{"channels": 1, "size": 8, "resize": 1000000000}'),
        ("preprocessing", '{"channels": 1, "size": 8.5, "resize": 9}'),
        ("preprocessing", '{"channels": 1, "size": 9, "resize": 9}'),
        ("preprocessing", '{"channels": 3, "size": 8, "resize": 8}'),
        ("cache", "{"),
    ],
)
def test_missing_and_malformed_metadata_are_refused_in_one_line(
    key: str, text: str | None, exported: Path, image: str, stages: Stages
) -> None:
    model = onnx.load(exported / "student.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props if entry.key != key}
    del model.metadata_props[:]
    helper.set_model_props(model, metadata if text is None else metadata | {key: text})
    onnx.save(model, "m.onnx")
    error = stages.fails(1, "predict", "m.onnx", image)
    assert error.startswith("Error: 'm.onnx' ")
    assert len(error) < 500


@pytest.mark.parametrize("where", ["initializer", "constant", "subgraph", "function", "sparse"])
def test_external_data_are_refused_before_the_network_is_loaded(
    where: str, exported: Path, image: str, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any place in the file, and also where the other file exists."""
    model = onnx.load(exported / "student.onnx")
    Path("secret").write_bytes(bytes(4000))
    tensor = numpy_helper.from_array(np.zeros(1000, np.float32), "far")
    onnx.external_data_helper.set_external_data(tensor, "secret")
    tensor.ClearField("raw_data")
    constant = helper.make_node("Constant", [], ["far_value"], value=tensor)
    if where == "initializer":
        model.graph.initializer.append(tensor)
    elif where == "constant":
        model.graph.node.append(constant)
    elif where == "subgraph":
        inner = helper.make_graph([constant], "inner", [], [helper.make_tensor_value_info("far_value", 1, [1000])])
        model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner))
    elif where == "function":
        imports = [helper.make_opsetid("", 18)]
        model.functions.append(helper.make_function("own", "f", [], ["far_value"], [constant], imports))
    else:
        sparse = model.graph.sparse_initializer.add()
        sparse.values.CopyFrom(tensor)
    Path("m.onnx").write_bytes(model.SerializeToString())
    monkeypatch.setattr(onnx_model.OnnxStudent, "from_bytes", lambda *_: pytest.fail("the network was loaded"))
    error = stages.fails(1, "predict", "m.onnx", image)
    assert error == "Error: 'm.onnx' keeps the tensor 'far' in another file: external data are not read"


def make_model(K: int = 10, dtype: int = TensorProto.FLOAT, input_name: str = "pictures") -> onnx.ModelProto:
    """A network whose logits are all 0, with metadata of 10 classes and images 1 x 8 x 8."""
    shape = numpy_helper.from_array(np.array([1, K], np.int64), "shape")
    zero = helper.make_tensor("value", dtype, [1], [0])
    graph = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["shape"], ["logits"], value=zero)],
        "g",
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", dtype, [1, K])],
        [shape],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    helper.set_model_props(model, make_metadata(1, 8, 8).to_dict())
    return model


def test_a_network_whose_metadata_do_not_fit_is_refused(image: str, stages: Stages) -> None:
    valid = make_model()
    onnx.save(valid, "m.onnx")
    assert stages("predict", "m.onnx", image)["pictures"][0]["top"][0]["probability"] == pytest.approx(0.1)
    for model in (make_model(K=9), make_model(dtype=TensorProto.INT64), make_model(input_name="images")):
        onnx.save(model, "m.onnx")
        assert "'m.onnx' cannot be run: " in stages.fails(1, "predict", "m.onnx", image)
    valid.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(valid, "m.onnx")
    assert "'m.onnx' cannot be run: " in stages.fails(1, "predict", "m.onnx", image)


def test_logits_that_are_not_finite_are_refused(image: str, stages: Stages) -> None:
    model = make_model()
    nan = helper.make_tensor("value", TensorProto.FLOAT, [1], [float("nan")])
    model.graph.node[0].attribute[0].t.CopyFrom(nan)
    onnx.save(model, "m.onnx")
    assert "does not compute 10 finite logits for 'd.png'" in stages.fails(1, "predict", "m.onnx", image)


def test_class_names_are_printed_without_control_characters(image: str, stages: Stages) -> None:
    model = make_model()
    metadata = ExportMetadata(("\x1b[31mred\n", *"123456789"), 1, 8, 8, "cnn", (), {})
    del model.metadata_props[:]
    helper.set_model_props(model, metadata.to_dict())
    onnx.save(model, "m.onnx")
    code, out, _ = stages.call("predict", "m.onnx", image)
    assert code == 0
    assert "?[31mred?" in out
    assert "\x1b" not in out
