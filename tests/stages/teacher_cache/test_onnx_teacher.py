"""A teacher in ONNX format: `--teacher onnx:FILE`."""

import contextlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache.base.progress import no_progress
from softcache.data.views.render import render
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models import build
from softcache.pipeline.models.other_frameworks.onnx_network import load_onnx_network
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from tests.helpers.commands import Stages

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

from onnx import TensorProto  # noqa: E402

from tests.helpers.onnx_models import WEIGHT, Shape, save_model  # noqa: E402

COMMAND = ("teacher-cache", "--views", "none", "--draws", "1", "--codec", "float32", "--normalize", "none")


def read_logits(cache: str, split: str = "test", taps: tuple[str, ...] = ()) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Return the views of a cache's split (uint8), their logits and their features."""
    reader = CacheReader(Path(cache))
    rows = reader.load_transfer_set("", Path("datasets"), no_progress).splits[split]
    positions = np.arange(len(rows))
    index = reader.index_at(split, positions).astype(np.int64)
    views = render(rows.images, reader.views.of_split(split), reader.seed, index, 0)
    return views, *reader.read_stored(split, 0, positions, taps)


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_network_that_was_exported_gives_the_logits_of_pytorch(stages: Stages, dynamo: bool) -> None:
    torch.manual_seed(0)
    network = build("resnet8", 10, 1, 8)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    network(torch.randn(64, 1, 8, 8))
    network.eval()
    torch.save(network.state_dict(), "t.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes: dict[str, Any] = {"dynamic_axes": {"x": {0: "batch"}}, "input_names": ["x"]}
        if dynamo:
            axes = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
        torch.onnx.export(network, (torch.zeros(2, 1, 8, 8),), "t.onnx", dynamo=dynamo, verbose=False, **axes)
    assert Path("t.onnx.data").is_file() == dynamo, "the tensors are in a second file"
    normalize = ("--normalize", "mean=0.3,std=0.4")
    torch_command = (*COMMAND, *normalize, "--teacher", "resnet8", "--weights", "t.pt", "--taps", "layer2")
    stages(*torch_command, "--out", "torch")
    value = next(v for v, m in load_onnx_network(Path("t.onnx")).named_modules() if "relu" in v.lower())
    stages(*COMMAND, *normalize, "--teacher", "onnx:t.onnx", "--taps", value, "--out", "onnx")
    for split in ("train", "val", "test"):
        torch.testing.assert_close(read_logits("onnx", split)[1], read_logits("torch", split)[1], rtol=0, atol=1e-4)
    stages("check-cache", "onnx", "--deep", "--teacher", "onnx:t.onnx")
    stages("student", "--cache", "onnx", "--arch", "mlp:8", "--epochs", "1", "--out", "s")


def test_a_model_of_any_size_gets_views_of_the_teacher_size(stages: Stages) -> None:
    save_model("any.onnx", ["N", 1, "H", "W"])
    save_model("fixed.onnx")
    views = ("--views", "none:size=4", "--teacher-size", 8)
    for name in ("any", "fixed"):
        stages(*COMMAND, *views, "--teacher", f"onnx:{name}.onnx", "--out", name)
    stages(*COMMAND, "--teacher", "onnx:any.onnx", "--out", "plain")
    for name in ("any", "fixed"):
        assert torch.equal(read_logits(name)[1], read_logits("plain")[1])
        assert read_logits(name)[0].shape[-1] == 4
    error = stages.fails(2, *COMMAND, "--teacher", "onnx:fixed.onnx", "--teacher-size", 16, "--out", "x")
    assert "--teacher-size 16: 'fixed.onnx' takes 8 pixels alone" in error


@pytest.mark.parametrize(
    ("shape", "dtype", "normalize"),
    [
        (["N", 1, 8, 8], TensorProto.FLOAT, "none"),
        ([1, 1, 8, 8], TensorProto.FLOAT, "none"),
        ([7, 1, 8, 8], TensorProto.FLOAT, "none"),
        (["N", 3, 8, 8], TensorProto.FLOAT, "none"),
        (["N", 8, 8, 1], TensorProto.FLOAT, "none"),
        (["N", "H", "W", 3], TensorProto.FLOAT, "imagenet"),
        (["N", 1, "H", "W"], TensorProto.FLOAT, "mean=0.5,std=0.5"),
        (["N", 1, 8, 8], TensorProto.FLOAT16, "none"),
        (["N", 1, 8, 8], TensorProto.DOUBLE, "data"),
        (["N", 1, 8, 8], TensorProto.FLOAT, "pixels"),
        (["N", 8, 8, 1], TensorProto.UINT8, "pixels"),
    ],
)
def test_every_layout_dtype_and_batch_gives_the_logits_of_numpy(
    stages: Stages, shape: Shape, dtype: int, normalize: str
) -> None:
    save_model("t.onnx", shape, dtype)
    stages(*COMMAND, "--teacher", "onnx:t.onnx", "--out", "c", "--normalize", normalize, "--batch-size", "100")
    views, logits, _ = read_logits("c")
    spec = CacheReader(Path("c")).input_spec
    assert spec.channels == (3 if 3 in shape else 1)
    x = views.double().expand(-1, spec.channels, -1, -1) / 255
    x = (x - torch.tensor(spec.mean).view(-1, 1, 1)) / torch.tensor(spec.std).view(-1, 1, 1)
    expected = x.sum(1).flatten(1) @ torch.from_numpy(WEIGHT).double()
    tolerance = 2e-2 if dtype == TensorProto.FLOAT16 else 1e-5
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_views_are_resized_to_the_size_of_the_model(stages: Stages) -> None:
    save_model("t.onnx", ["N", 1, 8, 8])
    stages(*COMMAND, "--teacher", "onnx:t.onnx", "--out", "c", "--views", "none:size=12,resize=12")
    assert CacheReader(Path("c")).input_spec == InputSpec(1, 8, (0.0,), (1.0,))


@pytest.mark.parametrize(
    ("written", "tap"),
    [
        ("/pool.1/Sum", "pool.1.Sum"),
        ("pool.1.Sum", "pool.1.Sum"),
        ("/pool.1/Sum:pool", "pool.1.Sum:pool"),
        ("dense/BiasAdd:0", "dense.BiasAdd.0"),
    ],
)
def test_an_inner_value_is_tapped_by_the_name_it_has_in_the_graph(stages: Stages, written: str, tap: str) -> None:
    save_model("t.onnx")
    stages(*COMMAND, "--teacher", "onnx:t.onnx", "--taps", written, "--out", "c")
    views, logits, features = read_logits("c", taps=(tap,))
    expected = {
        "pool.1.Sum": views[:, 0] / 255,
        "pool.1.Sum:pool": (views[:, 0] / 255).mean(1),
        "dense.BiasAdd.0": logits,
    }[tap]
    torch.testing.assert_close(features[tap].float(), expected, rtol=1e-3, atol=1e-2)
    # A cache grows by another value; the rows that it has stay as they are.
    stages(*COMMAND, "--teacher", "onnx:t.onnx", "--taps", "flat", "--out", "c")
    assert set(CacheReader(Path("c")).manifest.taps) == {tap, "flat"}


def test_the_logits_are_one_of_several_outputs(stages: Stages) -> None:
    save_model("t.onnx", outputs=("label", "dense/BiasAdd:0"))
    stages(*COMMAND, "--teacher", "onnx:t.onnx", "--out", "a")  # the label is no [B, K]
    save_model("t.onnx", outputs=("softmax", "dense/BiasAdd:0"))
    error = stages.fails(2, *COMMAND, "--teacher", "onnx:t.onnx", "--out", "b")
    assert "softmax: [2, 10], dense/BiasAdd:0: [2, 10]" in error
    assert "--output softmax" in error
    for k, output in enumerate(("1", "dense/BiasAdd:0")):
        stages(*COMMAND, "--teacher", "onnx:t.onnx", "--output", output, "--out", f"c{k}")
        teacher = json.loads(Path(f"c{k}/manifest.json").read_text())["identity"]["teacher"]
        assert teacher["output"] == "dense/BiasAdd:0"
    assert torch.equal(read_logits("a")[1], read_logits("c0")[1])
    stages("check-cache", "c1", "--deep", "--weights", "t.onnx")
    probabilities = (*COMMAND, "--teacher", "onnx:t.onnx", "--output", "softmax")
    assert "--outputs probabilities" in stages.fails(2, *probabilities, "--out", "d")
    stages(*probabilities, "--outputs", "probabilities", "--out", "d")
    assert read_logits("d")[1].logsumexp(1).abs().max() < 1e-4


def test_the_identity_is_that_of_the_file_not_of_its_name(stages: Stages) -> None:
    save_model("t.onnx")
    stages(*COMMAND, "--teacher", "onnx:t.onnx", "--out", "c")
    Path("t.onnx").rename("other.onnx")
    code, out, _ = stages.call(*COMMAND, "--teacher", "onnx:other.onnx", "--out", "c")
    assert code == 0
    assert "is complete" in out
    manifest = json.loads(Path("c/manifest.json").read_text())
    assert manifest["identity"]["teacher"]["arch"] == "onnx"
    assert manifest["settings"]["teacher"] == "onnx:t.onnx"
    save_model("new.onnx", weight=WEIGHT + 1)
    assert "weights" in stages.fails(1, *COMMAND, "--teacher", "onnx:new.onnx", "--out", "c")
    shard = Path("c/test/shard-00000.h5")
    shard.write_bytes(shard.read_bytes()[:-9])
    assert "not the teacher of the cache" in stages.fails(1, "check-cache", "c", "--repair", "--weights", "new.onnx")
    stages("check-cache", "c", "--repair", "--teacher", "onnx:other.onnx")


def test_a_network_of_onnx_is_a_teacher_alone_and_makes_the_same_logits_in_any_pieces(stages: Stages) -> None:
    save_model("t.onnx", [3, 1, 8, 8])
    network = load_onnx_network(Path("t.onnx"))
    network.find_logits("", 10, 1, 8)
    model = PreparedModel(network, InputSpec(1, 8, (0.0,), (1.0,)))
    views = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(views), torch.cat([model(views[k : k + 1]) for k in range(8)]))
    assert "is a teacher alone" in stages.fails(2, "teacher", "--arch", "onnx:t.onnx")


def test_tensors_in_a_file_beside_the_model_are_read_and_are_part_of_the_identity(stages: Stages) -> None:
    Path("here").mkdir()
    with contextlib.chdir("here"):
        external("w.bin")()
        Path("w.bin").write_bytes(WEIGHT.tobytes())
    save_model("one.onnx")
    stages(*COMMAND, "--teacher", "onnx:here/t.onnx", "--out", "c")
    stages(*COMMAND, "--teacher", "onnx:one.onnx", "--out", "one")
    assert torch.equal(read_logits("c")[1], read_logits("one")[1])
    digest = load_onnx_network(Path("here/t.onnx")).digest
    Path("here/w.bin").write_bytes((WEIGHT + 1).tobytes())
    assert load_onnx_network(Path("here/t.onnx")).digest != digest
    assert "teacher.weights" in stages.fails(1, *COMMAND, "--teacher", "onnx:here/t.onnx", "--out", "c")


def external(location: str) -> Callable[[], None]:
    """Return a function that saves t.onnx, whose matrix lies in another file."""

    def save() -> None:
        save_model("t.onnx")
        model = onnx.load("t.onnx")
        tensor = model.graph.initializer[0]
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        Path("folder").mkdir(exist_ok=True)
        for path in ("folder/w.bin", "../w.bin"):
            Path(path).write_bytes(WEIGHT.tobytes())
        Path("link.bin").symlink_to(Path("folder/w.bin").absolute())
        tensor.ClearField("raw_data")
        Path("t.onnx").write_bytes(model.SerializeToString())

    return save


def cut() -> None:
    """Save the first half of a model."""
    save_model("t.onnx")
    content = Path("t.onnx").read_bytes()
    Path("t.onnx").write_bytes(content[: len(content) // 2])


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "not-onnx": (lambda: Path("t.onnx").write_bytes(b"PK\3\4" + bytes(99)), "no ONNX file"),
    "empty": (lambda: Path("t.onnx").write_bytes(b""), "no ONNX file"),
    "truncated": (cut, "t.onnx"),
    "absolute-path": (external("/etc/passwd"), "only files beside it"),
    "other-folder": (external("../w.bin"), "only files beside it"),
    "sub-folder": (external("folder/w.bin"), "only files beside it"),
    "missing-data": (external("w.bin"), "which is not beside it"),
    "link": (external("link.bin"), "a link to another folder"),
    "vector": (lambda: save_model("t.onnx", ["N", 64], weight=WEIGHT[:1]), "takes [any, 64], not images"),
    "two-inputs": (lambda: save_model("t.onnx", inputs=2), "takes 2 inputs (images, mask)"),
    "five-channels": (lambda: save_model("t.onnx", ["N", 5, 8, 8], weight=WEIGHT[:40]), "1 or 3 channels"),
    "no-square": (
        lambda: save_model("t.onnx", ["N", 1, 8, 16], weight=np.concatenate([WEIGHT, WEIGHT])),
        "8 x 16 pixels",
    ),
    "integer-input": (lambda: save_model("t.onnx", dtype=TensorProto.INT32), "takes tensor(int32)"),
    "uint8": (lambda: save_model("t.onnx", dtype=TensorProto.UINT8), "--normalize pixels"),
    "label-alone": (lambda: save_model("t.onnx", outputs=("label",)), "label: [2] for 2 images"),
    "nine-classes": (lambda: save_model("t.onnx", weight=WEIGHT[:, :9].copy()), "9 classes, the data have 10"),
    "other-size": (lambda: save_model("t.onnx", ["N", 1, "H", "W"], weight=WEIGHT[:9]), "cannot be run on images"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(stages: Stages, name: str) -> None:
    save, expected = WRONG[name]
    save()
    code, _, error = stages.call(*COMMAND, "--teacher", "onnx:t.onnx", "--out", "c")
    assert code in (1, 2)
    assert error.count("\n") == 1, error
    assert expected in error
    assert not Path("c/manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--normalize", "imagenet"), "takes 1 channel, --normalize imagenet has 3"),
        (("--weights", "t.onnx"), "leave it out"),
        (("--precision", "bfloat16"), "leave it out"),
        (("--compile",), "leave it out"),
        (("--taps", "pool.1.Sun"), "Did you mean 'pool.1.Sum'"),
        (("--taps", "axes"), "no tap 'axes'"),
        (("--output", "logits"), "no output 'logits'"),
        (("--output", "7"), "no output '7'"),
        (("--teacher", "onnx:"), "onnx:FILE"),
        (("--teacher", "onnx:none.onnx"), "no ONNX file 'none.onnx'"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_in_one_line(
    stages: Stages, options: tuple[str, ...], expected: str
) -> None:
    save_model("t.onnx")
    error = stages.fails(2, *COMMAND, "--teacher", "onnx:t.onnx", "--out", "c", *options)
    assert "\n" not in error
    assert expected in error


def test_the_range_of_the_input_has_to_be_given(stages: Stages) -> None:
    save_model("t.onnx")
    error = stages.fails(2, "teacher-cache", "--teacher", "onnx:t.onnx", "--out", "c")
    assert "needs --normalize, the input that the model takes: imagenet, none (0 to 1), pixels (0 to 255)" in error
