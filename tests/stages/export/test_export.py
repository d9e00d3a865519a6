"""`softcache export`: its files compute the student's logits and contain no path; others are not written."""

import contextlib
import errno
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from softcache.base import packages
from softcache.base.text import escape_markdown
from softcache.data.sources import load_source
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.metrics.classification import evaluate
from softcache.pipeline.models import build
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.pipeline.models.state_dicts import load_weights, read_state_dict
from softcache.stages.export import quantize
from softcache.stages.export.onnx_model import OnnxStudent, open_onnx_student
from softcache.stages.export.predict import load_input
from softcache.stages.main import commands
from softcache.stages.runs.logits import read_logits
from tests.helpers.commands import Stages
from tests.helpers.paths import ROOT

FILES = ("student.onnx", "student-int8.onnx", "student.pt2", "student.safetensors", "MODEL_CARD.md", "export.json")


def read_test_split() -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """The digits' test split: images uint8 [360, 1, 8, 8], labels [360]."""
    images, labels = load_source("digits").splits["test"]
    return images.pixels, labels  # type: ignore[union-attr]


def pytorch_logits(run: Path, cache: Path, seed: int, weights: str = "student.pt") -> np.ndarray[Any, Any]:
    """The logits of a seed's student on the test split, float32 [360, 10]."""
    network = build("cnn", 10, 1, 8)
    load_weights(network, read_state_dict(run / f"seed-{seed}" / weights), "")
    model = PreparedModel(network, CacheReader(cache).input_spec).eval()
    with torch.inference_mode():
        logits: np.ndarray[Any, Any] = model(read_test_split()[0]).numpy()
    return logits


def load_onnx(file: Path) -> Callable[[Any], Any]:
    """The function images -> logits of an ONNX file."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"pictures": images})[0]


def read_record(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "export.json").read_text())
    return record


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    """A copy of the run in the test's folder, without the exported files."""
    shutil.copytree(exported, tmp_path / "run", ignore=shutil.ignore_patterns(*FILES))
    return tmp_path / "run"


# Contents of the files


def test_onnx_runtime_computes_pytorchs_logits_in_any_batch_size(exported: Path, tiny: Path) -> None:
    record = read_record(exported)
    expected = pytorch_logits(exported, tiny / "cache", record["seed"])
    compute_logits = load_onnx(exported / "student.onnx")
    images = read_test_split()[0].numpy().astype(np.float32) / 255
    logits = compute_logits(images)
    assert np.abs(logits - expected).max() <= 1e-4
    assert (logits.argmax(1) == expected.argmax(1)).all()
    assert expected.std(0).min() > 0.5
    for size in (1, 7, 512):
        batch = np.resize(images, (size, 1, 8, 8))
        assert np.abs(compute_logits(batch) - np.resize(expected, (size, 10))).max() <= 1e-4
    check = record["check"]
    assert (check["rows"], check["flips"], check["split"]) == (360, 0, "test")
    assert check["largest_difference"] == pytest.approx(np.abs(logits - expected).max(), abs=5e-6)


def test_pt2_and_safetensors_hold_the_same_student(exported: Path, tiny: Path) -> None:
    seed = read_record(exported)["seed"]
    with safe_open(exported / "student.safetensors", "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected_state = read_state_dict(exported / f"seed-{seed}/student.pt")
    assert set(state) == set(expected_state)
    assert all(torch.equal(state[name], expected_state[name]) for name in expected_state)
    assert json.loads(metadata["classes"]) == list("0123456789")
    model = torch.export.load(exported / "student.pt2").module()
    images = read_test_split()[0].float() / 255
    with torch.inference_mode():
        for size in (1, 7, 360):
            expected = pytorch_logits(exported, tiny / "cache", seed)[:size]
            assert np.abs(model(images[:size]).numpy() - expected).max() <= 1e-4
    assert read_record(exported)["check"]["pt2_difference"] == 0


def test_onnx_files_have_names_shapes_and_metadata_and_nothing_else(exported: Path, tiny: Path) -> None:
    record = read_record(exported)
    for name in ("student.onnx", "student-int8.onnx"):
        model = onnx.load(exported / name)
        onnx.checker.check_model(model)
        assert [(o.domain, o.version) for o in model.opset_import if not o.domain] == [("", record["opset"])]
        (input_,), (output,) = model.graph.input, model.graph.output
        dims = [d.dim_param or d.dim_value for d in input_.type.tensor_type.shape.dim]
        assert (input_.name, dims) == ("pictures", ["batch", 1, 8, 8])
        dims = [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim]
        assert (output.name, dims) == ("logits", ["batch", 10])
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert metadata["form"] == "softcache student 1"
        assert json.loads(metadata["classes"]) == list("0123456789")
        preprocessing = json.loads(metadata["preprocessing"])
        assert (preprocessing["mode"], preprocessing["size"], preprocessing["resize"]) == ("L", 8, 8)
        assert preprocessing["range"] == [0, 1]
        assert json.loads(metadata["cache"]) == [CacheReader(tiny / "cache").manifest.fingerprint]
        assert metadata["torch"] == torch.__version__
        assert metadata["arch"] == "cnn"
        assert "divide by 255" in metadata["preprocessing_in_words"]
        assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
        assert not model.graph.value_info
        assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


def test_no_file_contains_a_path_of_this_machine(exported: Path, tiny: Path) -> None:
    paths = [
        str(exported.parent),
        str(tiny),
        str(ROOT),
        sys.prefix,
        sys.base_prefix,
        str(Path.home()),
        "site-packages",
    ]
    paths = [path for path in paths if len(path) > 1]
    for name in FILES:
        content = (exported / name).read_bytes()
        if name.endswith(".pt2"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                content += b"".join(archive.read(part) for part in archive.namelist())
        assert not [path for path in paths if path.encode() in content], name


# Which student is exported


def test_of_several_seeds_the_best_on_validation_is_exported(run: Path, stages: Stages, tiny: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    for best in (0, 1):
        for seed in result["seeds"]:
            seed["student"]["val"]["accuracy"] = 0.9 if seed["seed"] == best else 0.8
        (run / "result.json").write_text(json.dumps(result))
        record = stages("export", run)
        assert record["seed"] == best
        assert record["chosen"] == "the best of 2 by accuracy on validation (0.9000)"
        logits = load_onnx(run / "student.onnx")(read_test_split()[0].numpy().astype(np.float32) / 255)
        assert np.abs(logits - pytorch_logits(run, tiny / "cache", best)).max() <= 1e-4
    for seed in result["seeds"]:
        seed["student"]["val"]["accuracy"] = 0.9
    (run / "result.json").write_text(json.dumps(result))
    assert stages("export", run)["seed"] == 0


def test_the_folder_of_one_seed_can_be_exported(run: Path, stages: Stages) -> None:
    assert stages("export", run / "seed-1")["seed"] == 1
    assert (run / "seed-1/student.onnx").is_file()
    assert not (run / "student.onnx").exists()
    assert "has no seed 7" in stages.fails(2, "export", run / "seed-7")


def test_a_folder_without_a_finished_run_is_refused_in_one_line(run: Path, stages: Stages, tiny: Path) -> None:
    assert "is not the run of a student" in stages.fails(2, "export", tiny / "runs/teacher")
    assert "there is no folder 'nowhere'" in stages.fails(2, "export", "nowhere")
    result = (run / "result.json").read_text()
    (run / "result.json").unlink()
    assert "is not finished: continue it with" in stages.fails(1, "export", run)
    for damaged in ("{}", '{"seeds": [{"seed": 0}]}', '{"seeds": 3}', result.replace('"seed": 1', '"seed": 5')):
        (run / "result.json").write_text(damaged)
        assert "is damaged" in stages.fails(1, "export", run)


def test_another_cache_is_refused(run: Path, stages: Stages, cache: Path) -> None:
    stages("teacher-cache", "--train-size", 200, "--teacher", "mlp:4", "--draws", 1, "--out", "other")
    assert "was trained from the caches" in stages.fails(1, "export", run, "--cache", "other")
    assert stages("export", run, "--cache", cache, "--data", "digits")["check"]["flips"] == 0


@pytest.mark.parametrize("missing", [{"onnx"}, {"onnxscript", "onnxruntime"}])
def test_a_missing_library_is_reported_with_the_command_that_installs_it(
    missing: set[str], stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in missing else object())
    error = stages.fails(2, "export", "nowhere")
    assert error == (
        f"Error: export needs {' and '.join(sorted(missing, reverse=True))}, which is not installed:"
        " pip install -e '.[export]'"
    )


# Failed checks


def test_over_the_tolerance_the_older_export_stays_and_the_tolerance_to_pass_is_named(
    run: Path, stages: Stages
) -> None:
    stages("export", run)
    older = {name: (run / name).read_bytes() for name in FILES if (run / name).exists()}
    assert "student.onnx" in older
    error = stages.fails(1, "export", run, "--tolerance", 0)
    assert "more than --tolerance 0 (0 of 360 top-1 predictions change): nothing was written" in error
    assert {name: (run / name).read_bytes() for name in FILES if (run / name).exists()} == older
    assert not list(run.glob(".*"))
    assert (match := re.search(r"pass --tolerance (\S+)$", error))
    assert stages("export", run, "--tolerance", match[1])["check"]["tolerance"] == float(match[1])


def test_an_export_that_cannot_be_written_leaves_the_older_one(
    run: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FILES:
        (run / name).write_text("older")
    write_bytes, written = Path.write_bytes, []

    def write_until_full(path: Path, content: bytes) -> int:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_until_full)
    assert "No space left on device" in stages.fails(1, "export", run)
    assert {(run / name).read_text() for name in FILES} == {"older"}
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("wrong", ["one image", "one batch size"])
def test_a_file_with_other_logits_is_not_published(
    wrong: str, run: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime computes another logit for one image, or NaN in batches of 7."""
    compute_logits = OnnxStudent.compute_logits

    def compute_wrong_logits(self: Any, images: Any) -> Any:
        logits = compute_logits(self, images).copy()
        if wrong == "one image" and len(images) == 360:
            logits[211] += 1e-3
        if wrong == "one batch size" and len(images) == 7:
            logits[0, 0] = np.nan
        return logits

    monkeypatch.setattr(OnnxStudent, "compute_logits", compute_wrong_logits)
    assert "a logit of student.onnx differs" in stages.fails(1, "export", run)
    assert not (run / "student.onnx").exists()


def test_an_arch_that_cannot_be_captured_is_refused_in_one_line(
    run: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import nn

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        for module in self:
            x = module(x)
        return x if float(x.sum()) > 0 else -x

    monkeypatch.setattr(nn.Sequential, "forward", forward)
    assert "arch 'cnn' cannot be exported: " in stages.fails(1, "export", run)


# int8


def test_the_record_has_the_accuracy_and_size_of_the_int8_file(exported: Path, tiny: Path) -> None:
    record = read_record(exported)
    int8 = record["int8"]
    labels, images = read_test_split()[1], read_test_split()[0].numpy().astype(np.float32) / 255
    before, after = (load_onnx(exported / name)(images).argmax(1) for name in FILES[:2])
    assert int8["accuracy_before"] == (before == labels).mean()
    assert int8["accuracy_after"] == (after == labels).mean()
    assert int8["flips"] == (before != after).sum()
    assert int8["drop"] == int8["accuracy_before"] - int8["accuracy_after"]
    sizes = [(exported / name).stat().st_size for name in FILES[:2]]
    assert int8["size_ratio"] == sizes[1] / sizes[0] <= 0.3
    assert {name: file["bytes"] for name, file in record["files"].items()} == {
        name: (exported / name).stat().st_size for name in FILES[:4]
    }
    for size in ("1", "64"):
        assert all(milliseconds > 0 for milliseconds in int8["milliseconds"][size].values())
    model = onnx.load(exported / "student-int8.onnx")
    dtypes = {
        tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1 and np.prod(tensor.dims) > 9
    }
    assert dtypes == {onnx.TensorProto.INT8}


def test_int8_is_calibrated_on_the_views_of_the_cache(
    run: Path, stages: Stages, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 of them, from every draw, recognised by their checksums."""
    quantize_onnx, checksums = quantize.quantize_onnx, []

    def quantize_and_record(model: bytes, batches: Iterator[Any], *more: Any) -> bytes:
        def recorded() -> Iterator[Any]:
            for batch in batches:
                checksums.extend(zlib.crc32(np.rint(255 * view).astype(np.uint8).tobytes()) for view in batch)
                yield batch

        return quantize_onnx(model, recorded(), *more)

    monkeypatch.setattr(quantize, "quantize_onnx", quantize_and_record)
    assert stages("export", run, "--int8", "--most-drop", 1)["int8"]["calibration_rows"] == len(checksums) == 512
    cache = CacheReader(tiny / "cache")
    draws = [set(cache.read_rows("train", draw, "view_crc32", np.arange(300)).tolist()) for draw in range(3)]
    assert all(len(set(checksums) & draw) > 100 for draw in draws)
    assert set(checksums) <= set.union(*draws)
    assert len(set(checksums)) > 450  # a crop can leave an image unchanged in two draws


def test_an_int8_file_that_loses_too_much_accuracy_is_refused(
    run: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_onnx = quantize.quantize_onnx

    def quantize_and_zero_weights(*arguments: Any) -> bytes:
        model = onnx.load_from_string(quantize_onnx(*arguments))
        weights = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
        weights[0].raw_data = bytes(len(weights[0].raw_data))
        return bytes(model.SerializeToString())

    monkeypatch.setattr(quantize, "quantize_onnx", quantize_and_zero_weights)
    error = stages.fails(1, "export", run, "--int8")
    assert re.search(r"student-int8\.onnx loses [0-9.]+ points of accuracy on test, more than the 1 of", error)
    assert not [name for name in FILES if (run / name).exists()]


# Grey images for a network that wants three channels


def test_a_grey_channel_is_repeated_inside_the_graph(stages: Stages) -> None:
    torch.manual_seed(0)
    torch.save(build("mlp:4", 10, 3, 8).state_dict(), "t.pt")
    teacher = ("--train-size", 100, "--teacher", "mlp:4", "--weights", "t.pt", "--normalize", "imagenet")
    stages("teacher-cache", *teacher, "--draws", 1, "--out", "c")
    stages("student", "--cache", "c", "--arch", "resnet8", "--epochs", 2, "--batch-size", 50, "--out", "r")
    stages("export", "r")
    network = build("resnet8", 10, 3, 8)
    load_weights(network, read_state_dict(Path("r/student.pt")), "")
    input_spec = CacheReader(Path("c")).input_spec
    assert input_spec.channels == 3
    with torch.inference_mode():
        expected = PreparedModel(network, input_spec).eval()(read_test_split()[0]).numpy()
    logits = load_onnx(Path("r/student.onnx"))(read_test_split()[0].numpy().astype(np.float32) / 255)
    assert np.abs(logits - expected).max() <= 1e-4


# The model card


def test_the_card_has_the_metrics_of_the_files(exported: Path, tiny: Path) -> None:
    card, record = (exported / "MODEL_CARD.md").read_text(), read_record(exported)
    labels = read_test_split()[1]
    weights = {"student": "student.pt", "baseline": "baseline/baseline.pt"}
    accuracy = {
        name: evaluate(pytorch_logits(exported, tiny / "cache", record["seed"], file), labels)["accuracy"]
        for name, file in weights.items()
    }
    accuracy["teacher"] = CacheReader(tiny / "cache").manifest.teacher["test"]["accuracy"]
    table = card.partition("test split, 360 images")[2].partition("val split")[0]
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.+) \|$", table, re.MULTILINE))
    expected = [accuracy["teacher"], accuracy["baseline"], accuracy["student"], record["int8"]["accuracy_after"]]
    assert rows["accuracy"] == " | ".join(f"{value:.4f}" for value in expected)
    assert {"precision, macro", "recall, macro", "F1, macro", "AUROC, macro", "NLL, nats", "ECE"} <= set(rows)
    recall = record["figures"]["student"]["test"]["per_class"]["recall"]
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.+) \|$", card.partition("Recall of")[2], re.MULTILINE))
    assert rows["7"] == f"{recall[7]:.4f} | 36"
    assert CacheReader(tiny / "cache").manifest.fingerprint in card
    assert "soft targets" in card
    assert "softcache" in card
    command = re.search(r"```sh\n(.*?)\n```", card, re.DOTALL)
    assert command
    words = shlex.split(command[1])
    assert words[:4] == ["python", "-m", "softcache", "student"]
    student = commands.get_command(click.Context(commands), "student")
    assert student is not None
    parsed = student.make_context("student", words[4:]).params
    assert (parsed["arch"], parsed["epochs"], parsed["seeds"]) == (("cnn",), 15, 2)


def read_example(run: Path) -> str:
    """The Python code in a run's model card."""
    match = re.search(r"```python\n(.*?)```", (run / "MODEL_CARD.md").read_text(), re.DOTALL)
    assert match
    return match[1]


def test_the_example_in_the_card_predicts_what_predict_does(exported: Path, tmp_path: Path, stages: Stages) -> None:
    """It has five lines beside its imports, and takes images of any shape, size and mode."""
    code = read_example(exported)
    assert len([line for line in code.splitlines() if line]) == 2 + 5
    shutil.copy(exported / "student.onnx", tmp_path)
    digit = Image.fromarray(read_test_split()[0][3, 0].numpy())
    for image in (digit, digit.resize((31, 40)), digit.resize((8, 13)).convert("RGB"), digit.resize((77, 30))):
        image.save(tmp_path / "picture.png")
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        (prediction,) = stages("predict", "student.onnx", "picture.png")["pictures"]
        assert done.stdout.strip() == prediction["top"][0]["class"]
        names: dict[str, Any] = {}
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, names)
        view = load_input(tmp_path / "picture.png", open_onnx_student(tmp_path / "student.onnx")[1])
        assert np.array_equal(names["inputs"]["pictures"], view)


def test_markup_in_names_is_escaped() -> None:
    text = escape_markdown("a|b`c<script>\n[x](y)*\x1b[31m")
    assert text == "a\\|b\\`c&lt;script&gt;?\\[x\\](y)\\*?\\[31m"


# Folders of images


def test_predict_computes_the_logits_of_the_run_for_the_files_of_an_image_folder(
    stages: Stages, tmp_path: Path, save_image: Callable[..., Any]
) -> None:
    for split, count in (("train", 12), ("test", 5)):
        for c, name in enumerate(("cat", "dog|`x`")):
            for k in range(count):
                save_image(tmp_path / "pets" / split / name / f"{k}.png", 9 + k, 14 - k % 3, 20 * c + k)
    torch.manual_seed(0)
    torch.save(build("mlp:4", 2, 3, 8).state_dict(), "pets.pt")
    views = ("--views", "crop:pad=1,size=8,resize=9", "--draws", 2)
    teacher = ("--teacher", "mlp:4", "--weights", "pets.pt", "--normalize", "none")
    stages("teacher-cache", "--data", "folder:pets", *teacher, *views, "--license", "CC0", "--out", "c")
    student = ("--arch", "resnet8", "--epochs", 3, "--batch-size", 8)
    stages("student", "--data", "folder:pets", "--cache", "c", *student, "--out", "r")
    record = stages("export", "r", "--int8", "--most-drop", 1)
    assert record["preprocessing"]["resize"] == 9
    assert record["check"]["flips"] == 0
    test_logits = read_logits(Path("r/logits.safetensors"))["test"]
    files = sorted(tmp_path.glob("pets/test/*/*.png"), key=lambda path: (path.parent.name, path.name))
    probabilities = torch.softmax(torch.from_numpy(test_logits.logits), 1).numpy()
    predictions = stages("predict", "r/student.onnx", *files)["pictures"]
    for prediction, row in zip(predictions, probabilities, strict=True):
        assert {c["class"]: c["probability"] for c in prediction["top"]} == pytest.approx(
            dict(zip(test_logits.classes, row.tolist(), strict=True)), abs=1e-5
        )
    card = Path("r/MODEL_CARD.md").read_text()
    assert "--data folder:PATH" in card
    assert "CC0" in card
    assert str(tmp_path) not in card + Path("r/export.json").read_text()
    assert "dog\\|\\`x\\`" in card
    assert "dog|" not in card


def test_without_labels_int8_is_judged_by_changed_predictions(
    stages: Stages, tmp_path: Path, save_image: Callable[..., Any]
) -> None:
    """Without a test split they are measured on validation."""
    for k in range(20):
        save_image(tmp_path / "pets" / f"{k}.png", 8, 8, k)
    torch.manual_seed(0)
    torch.save(build("mlp:4", 3, 3, 8).state_dict(), "pets.pt")
    teacher = ("--teacher", "mlp:4", "--weights", "pets.pt", "--normalize", "none", "--draws", 1)
    stages("teacher-cache", "--data", "folder:pets", *teacher, "--val-fraction", 0.3, "--out", "c")
    student = ("--arch", "mlp:4", "--epochs", 2, "--batch-size", 7, "--loss", "kd")
    stages("student", "--data", "folder:pets", "--cache", "c", *student, "--out", "r")
    int8 = stages("export", "r", "--int8", "--most-drop", 1)["int8"]
    assert (int8["split"], int8["rows"], int8["accuracy_before"]) == ("val", 6, None)
    assert int8["drop"] == int8["flips"] / 6
    assert int8["calibration_rows"] == 14
    card = Path("r/MODEL_CARD.md").read_text()
    assert "agreement with the teacher" in card
    assert "Recall" not in card
