"""An exported student says what the student says, carries no path, and is refused where it does not."""

import contextlib
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

from softcache.data.sources import load_source
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.metrics.classification import evaluate
from softcache.pipeline.models import build
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.pipeline.models.state_dicts import load_weights, read_state_dict
from softcache.stages.cli import extras
from softcache.stages.export import quantized_file as in_8_bits
from softcache.stages.export.model_card import quoted
from softcache.stages.export.onnx_model import OnnxStudent, open_onnx_student
from softcache.stages.export.predict import load_input
from softcache.stages.main import commands
from softcache.stages.runs.logits import read_logits
from tests.helpers.commands import Stages
from tests.helpers.paths import ROOT

FILES = ("student.onnx", "student-int8.onnx", "student.pt2", "student.safetensors", "MODEL_CARD.md", "export.json")


def pixels() -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """The digits' test split: uint8 [360, 1, 8, 8], labels."""
    images, labels = load_source("digits", Path()).splits["test"]
    return images.pixels, labels  # type: ignore[union-attr]


def by_pytorch(run: Path, cache: Path, seed: int, what: str = "student.pt") -> np.ndarray[Any, Any]:
    """What the student of a seed says of the test split."""
    opened = Cache(cache)
    network = build("cnn", 10, 1, 8)
    load_weights(network, read_state_dict(run / f"seed-{seed}" / what), "")
    with torch.inference_mode():
        said: np.ndarray[Any, Any] = PreparedModel(network, opened.input_spec).eval()(pixels()[0]).numpy()
    return said


def by_onnx(file: Path) -> Callable[[Any], Any]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"pictures": images})[0]


def record_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "export.json").read_text())
    return found


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    """A copy of the run, without what was exported, where a test is."""
    shutil.copytree(exported, tmp_path / "run", ignore=shutil.ignore_patterns(*FILES))
    return tmp_path / "run"


# What the files say


def test_onnx_runtime_says_what_pytorch_says_in_batches_of_any_size(exported: Path, tiny: Path) -> None:
    record = record_of(exported)
    said, ask = by_pytorch(exported, tiny / "cache", record["seed"]), by_onnx(exported / "student.onnx")
    images = pixels()[0].numpy().astype(np.float32) / 255
    found = ask(images)
    assert np.abs(found - said).max() <= 1e-4
    assert (found.argmax(1) == said.argmax(1)).all()
    assert said.std(0).min() > 0.5
    for size in (1, 7, 512):
        some = np.resize(images, (size, 1, 8, 8))
        assert np.abs(ask(some) - np.resize(said, (size, 10))).max() <= 1e-4
    check = record["check"]
    assert (check["rows"], check["flips"], check["split"]) == (360, 0, "test")
    assert check["largest_difference"] == pytest.approx(np.abs(found - said).max(), abs=5e-6)


def test_pt2_and_safetensors_hold_the_same_student(exported: Path, tiny: Path) -> None:
    seed = record_of(exported)["seed"]
    with safe_open(exported / "student.safetensors", "pt") as file:
        about, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kept = read_state_dict(exported / f"seed-{seed}/student.pt")
    assert set(state) == set(kept)
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert json.loads(about["classes"]) == list("0123456789")
    model = torch.export.load(exported / "student.pt2").module()
    images = pixels()[0].float() / 255
    with torch.inference_mode():
        for size in (1, 7, 360):
            said = by_pytorch(exported, tiny / "cache", seed)[:size]
            assert np.abs(model(images[:size]).numpy() - said).max() <= 1e-4
    assert record_of(exported)["check"]["pt2_difference"] == 0


def test_the_file_says_what_it_takes_and_gives_and_nothing_else(exported: Path, tiny: Path) -> None:
    record = record_of(exported)
    for name in ("student.onnx", "student-int8.onnx"):
        model = onnx.load(exported / name)
        onnx.checker.check_model(model)
        assert [(o.domain, o.version) for o in model.opset_import if not o.domain] == [("", record["opset"])]
        (given,), (gives,) = model.graph.input, model.graph.output
        dims = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
        assert (given.name, dims) == ("pictures", ["batch", 1, 8, 8])
        dims = [d.dim_param or d.dim_value for d in gives.type.tensor_type.shape.dim]
        assert (gives.name, dims) == ("logits", ["batch", 10])
        about = {entry.key: entry.value for entry in model.metadata_props}
        assert about["form"] == "softcache student 1"
        assert json.loads(about["classes"]) == list("0123456789")
        how = json.loads(about["preprocessing"])
        assert (how["mode"], how["size"], how["resize"], how["range"]) == ("L", 8, 8, [0, 1])
        assert json.loads(about["cache"]) == [Cache(tiny / "cache").manifest.fingerprint]
        assert about["torch"] == torch.__version__
        assert about["arch"] == "cnn"
        assert "divide by 255" in about["preprocessing_in_words"]
        assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
        assert not model.graph.value_info
        assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


def test_no_file_names_a_place_of_this_machine(exported: Path, tiny: Path) -> None:
    places = [
        str(exported.parent),
        str(tiny),
        str(ROOT),
        sys.prefix,
        sys.base_prefix,
        str(Path.home()),
        "site-packages",
    ]
    places = [place for place in places if len(place) > 1]
    for name in FILES:
        content = (exported / name).read_bytes()
        if name.endswith(".pt2"):
            with zipfile.ZipFile(io.BytesIO(content)) as whole:
                content += b"".join(whole.read(part) for part in whole.namelist())
        assert not [place for place in places if place.encode() in content], name


# Which student


def test_of_several_seeds_the_best_on_validation_is_exported(run: Path, stages: Stages, tiny: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    for best in (0, 1):
        for one in result["seeds"]:
            one["student"]["val"]["accuracy"] = 0.9 if one["seed"] == best else 0.8
        (run / "result.json").write_text(json.dumps(result))
        record = stages("export", run)
        assert record["seed"] == best
        assert record["chosen"] == "the best of 2 by accuracy on validation (0.9000)"
        found = by_onnx(run / "student.onnx")(pixels()[0].numpy().astype(np.float32) / 255)
        assert np.abs(found - by_pytorch(run, tiny / "cache", best)).max() <= 1e-4
    for one in result["seeds"]:
        one["student"]["val"]["accuracy"] = 0.9
    (run / "result.json").write_text(json.dumps(result))
    assert stages("export", run)["seed"] == 0


def test_the_folder_of_a_seed_may_be_named(run: Path, stages: Stages) -> None:
    assert stages("export", run / "seed-1")["seed"] == 1
    assert (run / "seed-1/student.onnx").is_file()
    assert not (run / "student.onnx").exists()
    assert "has no seed 7" in stages.fails(2, "export", run / "seed-7")


def test_what_is_no_finished_run_of_a_student_gets_one_line(run: Path, stages: Stages, tiny: Path) -> None:
    assert "is no run of a student" in stages.fails(2, "export", tiny / "runs/teacher")
    assert "is no run: it has no settings.json" in stages.fails(2, "export", "nowhere")
    result = (run / "result.json").read_text()
    (run / "result.json").unlink()
    assert "is not finished: go on with" in stages.fails(1, "export", run)
    for damaged in ("{}", '{"seeds": [{"seed": 0}]}', '{"seeds": 3}', result.replace('"seed": 1', '"seed": 5')):
        (run / "result.json").write_text(damaged)
        assert "is damaged" in stages.fails(1, "export", run)


def test_another_cache_is_refused(run: Path, stages: Stages, cache: Path) -> None:
    stages("teacher-cache", "--train-size", 200, "--teacher", "mlp:4", "--draws", 1, "--out", "other")
    assert "was trained from the caches" in stages.fails(1, "export", run, "--cache", "other")
    assert stages("export", run, "--cache", cache, "--data", "digits")["check"]["flips"] == 0


@pytest.mark.parametrize("missing", [{"onnx"}, {"onnxscript", "onnxruntime"}])
def test_a_missing_library_is_named_with_what_installs_it(
    missing: set[str], stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in missing else object())
    said = stages.fails(2, "export", "nowhere")
    assert said == (
        f"Error: export needs {' and '.join(sorted(missing, reverse=True))}, which is not installed:"
        " pip install 'softcache[export]'"
    )


# What is refused


def test_over_the_tolerance_nothing_is_left(run: Path, stages: Stages) -> None:
    stages("export", run)
    assert (run / "student.onnx").is_file()
    said = stages.fails(1, "export", run, "--tolerance", 0)
    assert "more than --tolerance 0 (0 of 360 images change their first class): nothing was written" in said
    assert "between two layouts of memory" in said
    assert not [name for name in FILES if (run / name).exists()]
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("wrong", ["a image", "batches"])
def test_a_file_that_says_something_else_is_not_published(
    wrong: str, run: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime is off for one image, or where there are exactly 7 of them."""
    ask = OnnxStudent.logits

    def off(self: Any, images: Any) -> Any:
        logits = ask(self, images).copy()
        if wrong == "a image" and len(images) == 360:
            logits[211] += 1e-3
        if wrong == "batches" and len(images) == 7:
            logits[0, 0] = np.nan
        return logits

    monkeypatch.setattr(OnnxStudent, "logits", off)
    assert "a logit of student.onnx differs" in stages.fails(1, "export", run)
    assert not (run / "student.onnx").exists()


def test_an_arch_that_cannot_be_captured_gets_one_line(
    run: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import nn

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        for module in self:
            x = module(x)
        return x if float(x.sum()) > 0 else -x

    monkeypatch.setattr(nn.Sequential, "forward", forward)
    assert "arch 'cnn' cannot be exported: " in stages.fails(1, "export", run)


# 8 bits


def test_8_bits_cost_and_save_what_the_record_says(exported: Path, tiny: Path) -> None:
    record = record_of(exported)
    eight = record["int8"]
    labels, images = pixels()[1], pixels()[0].numpy().astype(np.float32) / 255
    said, found = (by_onnx(exported / name)(images) for name in FILES[:2])
    assert eight["accuracy_before"] == (said.argmax(1) == labels).mean()
    assert eight["accuracy_after"] == (found.argmax(1) == labels).mean()
    assert eight["flips"] == (said.argmax(1) != found.argmax(1)).sum()
    assert eight["drop"] == eight["accuracy_before"] - eight["accuracy_after"]
    sizes = [(exported / name).stat().st_size for name in FILES[:2]]
    assert eight["size_ratio"] == sizes[1] / sizes[0] <= 0.3
    assert {name: file["bytes"] for name, file in record["files"].items()} == {
        name: (exported / name).stat().st_size for name in FILES[:4]
    }
    for size in ("1", "64"):
        assert all(took > 0 for took in eight["milliseconds"][size].values())
    model = onnx.load(exported / "student-int8.onnx")
    kinds = {
        tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1 and np.prod(tensor.dims) > 9
    }
    assert kinds == {onnx.TensorProto.INT8}


def test_8_bits_are_calibrated_on_the_views_of_the_cache(
    run: Path, stages: Stages, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 different ones, by their checksums, of every draw."""
    quantised, seen = in_8_bits.quantize_onnx, []

    def watched(model: bytes, batches: Iterator[Any], *more: Any) -> bytes:
        def each() -> Iterator[Any]:
            for batch in batches:
                seen.extend(zlib.crc32(np.rint(255 * view).astype(np.uint8).tobytes()) for view in batch)
                yield batch

        return quantised(model, each(), *more)

    monkeypatch.setattr(in_8_bits, "quantize_onnx", watched)
    assert stages("export", run, "--int8", "--most-drop", 1)["int8"]["calibration_rows"] == len(seen) == 512
    cache = Cache(tiny / "cache")
    known = [cache.read_rows("train", draw, "view_crc32", np.arange(300)).tolist() for draw in range(3)]
    assert all(len(set(seen) & set(of_draw)) > 100 for of_draw in known)
    assert set(seen) <= {crc for of_draw in known for crc in of_draw}
    assert len(set(seen)) > 450  # a crop may leave a image as it is in two draws


def test_8_bits_that_cost_too_much_are_refused(run: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    quantised = in_8_bits.quantize_onnx

    def wrecked(*arguments: Any) -> bytes:
        model = onnx.load_from_string(quantised(*arguments))
        weights = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
        weights[0].raw_data = bytes(len(weights[0].raw_data))
        return bytes(model.SerializeToString())

    monkeypatch.setattr(in_8_bits, "quantize_onnx", wrecked)
    said = stages.fails(1, "export", run, "--int8")
    assert re.search(r"student-int8\.onnx loses [0-9.]+ points of accuracy on test, more than the 1 of", said)
    assert not [name for name in FILES if (run / name).exists()]


# Grey images for a network that wants three channels


def test_a_grey_channel_is_repeated_inside_the_graph(stages: Stages) -> None:
    torch.manual_seed(0)
    torch.save(build("mlp:4", 10, 3, 8).state_dict(), "t.pt")
    cut = ("--train-size", 100, "--teacher", "mlp:4", "--weights", "t.pt", "--normalize", "imagenet")
    stages("teacher-cache", *cut, "--draws", 1, "--out", "c")
    stages("student", "--cache", "c", "--arch", "resnet8", "--epochs", 2, "--batch-size", 50, "--out", "r")
    stages("export", "r")
    network = build("resnet8", 10, 3, 8)
    load_weights(network, read_state_dict(Path("r/student.pt")), "")
    input_spec = Cache(Path("c")).input_spec
    assert input_spec.channels == 3
    with torch.inference_mode():
        said = PreparedModel(network, input_spec).eval()(pixels()[0]).numpy()
    found = by_onnx(Path("r/student.onnx"))(pixels()[0].numpy().astype(np.float32) / 255)
    assert np.abs(found - said).max() <= 1e-4


# The card


def test_the_card_gives_the_figures_of_the_files(exported: Path, tiny: Path) -> None:
    card, record = (exported / "MODEL_CARD.md").read_text(), record_of(exported)
    labels = pixels()[1]
    models = {"student": "student.pt", "baseline": "baseline/baseline.pt"}
    accuracy = {
        name: evaluate(by_pytorch(exported, tiny / "cache", record["seed"], file), labels)["accuracy"]
        for name, file in models.items()
    }
    accuracy["teacher"] = Cache(tiny / "cache").manifest.teacher["test"]["accuracy"]
    after = card.partition("test split, 360 images")[2].partition("val split")[0]
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.+) \|$", after, re.MULTILINE))
    shown = [accuracy["teacher"], accuracy["baseline"], accuracy["student"], record["int8"]["accuracy_after"]]
    assert rows["accuracy"] == " | ".join(f"{value:.4f}" for value in shown)
    assert {"precision, macro", "recall, macro", "F1, macro", "AUROC, macro", "NLL, nats", "ECE"} <= set(rows)
    recall = record["figures"]["student"]["test"]["per_class"]["recall"]
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.+) \|$", card.partition("Recall of")[2], re.MULTILINE))
    assert rows["7"] == f"{recall[7]:.4f} | 36"
    assert Cache(tiny / "cache").manifest.fingerprint in card
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


def example_of(run: Path) -> str:
    found = re.search(r"```python\n(.*?)```", (run / "MODEL_CARD.md").read_text(), re.DOTALL)
    assert found
    return found[1]


def test_the_five_lines_of_the_card_work_as_they_are(exported: Path, tmp_path: Path, stages: Stages) -> None:
    """On images of another shape, size and mode too, with what `predict` says."""
    code = example_of(exported)
    assert len([line for line in code.splitlines() if line]) == 2 + 5
    shutil.copy(exported / "student.onnx", tmp_path)
    digit = Image.fromarray(pixels()[0][3, 0].numpy())
    for image in (digit, digit.resize((31, 40)), digit.resize((8, 13)).convert("RGB"), digit.resize((77, 30))):
        image.save(tmp_path / "picture.png")
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        (found,) = stages("predict", "student.onnx", "picture.png")["pictures"]
        assert done.stdout.strip() == found["top"][0]["class"]
        names: dict[str, Any] = {}
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, names)
        view = load_input(tmp_path / "picture.png", open_onnx_student(tmp_path / "student.onnx")[1])
        assert np.array_equal(names["inputs"]["pictures"], view)


def test_text_of_others_cannot_change_the_card() -> None:
    said = quoted("a|b`c<script>\n[x](y)*\x1b[31m")
    assert not set("\n\x1b<") & set(said.replace("&lt;", ""))
    assert "`" not in said
    assert "\\|" in said


# Folders of images


def test_a_student_of_a_folder_of_pictures_is_exported_and_asked_about_its_files(
    stages: Stages, tmp_path: Path, save_image: Callable[..., Any]
) -> None:
    """`predict` of the test images' files says what the run kept of its test split."""
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
    kept = read_logits(Path("r/logits.safetensors"))["test"]
    files = sorted(tmp_path.glob("pets/test/*/*.png"), key=lambda path: (path.parent.name, path.name))
    p = torch.softmax(torch.from_numpy(kept.logits), 1).numpy()
    for one, row in zip(stages("predict", "r/student.onnx", *files)["pictures"], p, strict=True):
        assert {best["class"]: best["probability"] for best in one["top"]} == pytest.approx(
            dict(zip(kept.classes, row.tolist(), strict=True)), abs=1e-5
        )
    card = Path("r/MODEL_CARD.md").read_text()
    assert "--data folder:PATH" in card
    assert "CC0" in card
    assert str(tmp_path) not in card + Path("r/export.json").read_text()
    assert "dog\\|'x'" in card
    assert "dog|" not in card


def test_without_labels_8_bits_are_judged_by_what_changes_its_class(
    stages: Stages, tmp_path: Path, save_image: Callable[..., Any]
) -> None:
    """And validation stands in for the test split that is not there."""
    for k in range(20):
        save_image(tmp_path / "pets" / f"{k}.png", 8, 8, k)
    torch.manual_seed(0)
    torch.save(build("mlp:4", 3, 3, 8).state_dict(), "pets.pt")
    teacher = ("--teacher", "mlp:4", "--weights", "pets.pt", "--normalize", "none", "--draws", 1)
    stages("teacher-cache", "--data", "folder:pets", *teacher, "--val-fraction", 0.3, "--out", "c")
    student = ("--arch", "mlp:4", "--epochs", 2, "--batch-size", 7, "--loss", "kd")
    stages("student", "--data", "folder:pets", "--cache", "c", *student, "--out", "r")
    eight = stages("export", "r", "--int8", "--most-drop", 1)["int8"]
    assert (eight["split"], eight["rows"], eight["accuracy_before"]) == ("val", 6, None)
    assert eight["drop"] == eight["flips"] / 6
    assert eight["calibration_rows"] == 14
    card = Path("r/MODEL_CARD.md").read_text()
    assert "agreement with the teacher" in card
    assert "Recall" not in card
