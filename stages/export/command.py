"""`softcache export`: a finished student as files that other programs take, each checked against PyTorch first."""

import json
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softcache import __version__
from softcache.base.errors import make_printable
from softcache.base.files import publish_bytes, publish_json, publish_text, remove_stale_files
from softcache.base.lock import hold_lock
from softcache.pipeline.losses.hard import Hard
from softcache.pipeline.models import count_multiply_adds, count_parameters
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.pipeline.models.state_dicts import load_weights, read_state_dict
from softcache.stages.cli.configs import ExportConfig
from softcache.stages.cli.console import Console, format_duration, progress_bar
from softcache.stages.cli.extras import require_extra
from softcache.stages.student.evaluate import check_same_teachers
from softcache.stages.student.setup import DistillationSetup
from softcache.stages.student.teachers import open_caches

from .formats import OPSET, ExportedModel, capture_program, load_pt2, make_onnx, make_pt2, make_safetensors
from .metadata import INT8, ONNX, PT2, WEIGHTS, ExportMetadata
from .model_card import model_card
from .onnx_model import OnnxStudent, versions
from .parity import (
    BATCHES,
    Logits,
    check_parity,
    check_reloaded,
    float32_noise,
    largest_batch_difference,
    run_in_batches,
    to_unit_range,
)
from .select_student import ExportedRun, select_student

CARD_FILE, RECORD_FILE = "MODEL_CARD.md", "export.json"
_FILES = (RECORD_FILE, CARD_FILE, INT8, ONNX, PT2, WEIGHTS)  # in the order in which an older export is taken away


def run(name: str, config: ExportConfig, said: set[str]) -> None:
    """Everything is made and checked before the first file is published; export.json is the last."""
    require_extra("export needs", "export", "onnx", "onnxscript", "onnxruntime")
    console, begun = Console(config.json), time.monotonic()
    here = {name: getattr(config, name) for name in said & {"data", "data_root", "cache"}}
    # On this machine's CPU in float32, whatever the run was trained in: that is what the files are compared with.
    chosen = select_student(Path(name), device="cpu", precision="float32", **here)
    check_same_teachers(Path(chosen.config.out), open_caches(chosen.config.cache))
    setup = DistillationSetup.open(chosen.config)
    console.print(f"exporting {make_printable(chosen.config.arch)}, seed {chosen.config.seed} ({chosen.reason})")
    with hold_lock(chosen.folder):
        _remove_old_files(chosen.folder)
        record, files = _make_files(chosen, setup, config)
        record["seconds"] = time.monotonic() - begun
        for file, content in files.items():
            publish_bytes(chosen.folder / file, content)
        publish_text(
            chosen.folder / CARD_FILE, model_card(record, chosen, [c.manifest for c in setup.teachers.members])
        )
        publish_json(chosen.folder / RECORD_FILE, record)
    if config.json:
        return console.print_json(json.dumps(record))
    for line in _print_summary(record):
        console.print(line)
    console.print(
        f"files: {chosen.folder}/{', '.join((*files, CARD_FILE, RECORD_FILE))} ({format_duration(record['seconds'])})"
    )


def _remove_old_files(folder: Path) -> None:
    """Take away what an older export left: whatever lies there is of the last command, or nothing does."""
    remove_stale_files(folder, _FILES)
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)


def _make_files(
    chosen: ExportedRun, setup: DistillationSetup, config: ExportConfig
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """export.json, but for the time it took, and the files. Raises CacheError for one that fails its check."""
    network, losses = setup.build_student(chosen.config, setup.losses), setup.losses
    path = chosen.seed_folder / "student.pt"
    load_weights(network, read_state_dict(path), str(path))
    arch, about = setup.student_arch(chosen.config, losses), _make_metadata(chosen, setup)
    split = "test" if "test" in setup.held_out else "val"
    rows = setup.held_out[split]
    said = _student_logits(network, setup, "student")
    figures = {
        "student": setup.compute_metrics(said),
        "teacher": setup.teacher_metrics,
        **_baseline(chosen, setup),
    }

    model = ExportedModel(network, setup.input_spec)
    with progress_bar(3, "writing graphs", "file") as shown:
        program = capture_program(model, arch, about.channels, about.size)
        shown.update()
        files = {ONNX: make_onnx(program, arch, about.to_metadata(), __version__)}
        shown.update()
        files[PT2] = make_pt2(program, about.to_metadata())
        shown.update()
    runner = OnnxStudent.from_session(files[ONNX], torch.get_num_threads())
    found = run_in_batches(rows, lambda views: runner.logits(to_unit_range(views)), f"checking {ONNX}")
    sizes, own = largest_batch_difference(runner, rows, said[split]), float32_noise(model, rows, said[split])
    check = check_parity(ONNX, said[split], found, sizes, own, config.tolerance)
    again = check_reloaded(PT2, load_pt2(files[PT2]), model, rows, config.tolerance)
    files[WEIGHTS] = make_safetensors(network, about.to_metadata())

    record: dict[str, Any] = {
        "run": chosen.folder.resolve().name,
        "seed": chosen.config.seed,
        "chosen": chosen.reason,
        "arch": arch,
        "parameters": count_parameters(network),
        "multiply_adds": count_multiply_adds(network, setup.input_spec.channels, about.size),
        "classes": list(about.classes),
        "preprocessing": about.preprocessing(),
        "outputs": about.outputs(),
        "cache": list(about.fingerprints),
        "figures": figures,
        "opset": OPSET,
        "check": {"split": split, **check, "batch_sizes": list(BATCHES), "pt2_difference": again},
        "int8": None,
        "versions": {**about.versions, **versions()},
    }
    if config.int8:
        from .quantized_file import make_quantized_file

        made = make_quantized_file(setup, about, files[ONNX], runner, split, said[split], config.most_drop)
        files[INT8], record["int8"] = made
    record["files"] = {
        name: {"bytes": len(content), "sha256": sha256(content).hexdigest()} for name, content in files.items()
    }
    return record, files


def _make_metadata(chosen: ExportedRun, setup: DistillationSetup) -> ExportMetadata:
    views, transfer_set = setup.cache.views, setup.transfer_set
    return ExportMetadata(
        transfer_set.classes,
        transfer_set.channels,
        views.size,
        max(views.resize, views.size),
        setup.student_arch(chosen.config, setup.losses),
        tuple(cache.manifest.fingerprint for cache in setup.teachers.members),
        {"softcache": __version__, "torch": torch.__version__},
    )


def _student_logits(network: nn.Module, setup: DistillationSetup, what: str) -> dict[str, Logits]:
    """{split: logits} by PyTorch, in float32 and eval mode, as the student was validated."""
    model = PreparedModel(network, setup.input_spec).eval()

    def ask(views: torch.Tensor) -> Logits:
        with torch.inference_mode():
            logits: Logits = model(views).numpy()
        return logits

    return {split: run_in_batches(rows, ask, f"{what}, {split}") for split, rows in setup.held_out.items()}


def _baseline(chosen: ExportedRun, setup: DistillationSetup) -> dict[str, Any]:
    """The figures of the baseline, where there is one."""
    path = chosen.baseline
    if not chosen.config.baseline or not path.is_file():
        return {}
    network = setup.build_student(chosen.config, (Hard(),))
    load_weights(network, read_state_dict(path), str(path))
    return {"baseline": setup.compute_metrics(_student_logits(network, setup, "baseline"))}


def _print_summary(record: dict[str, Any]) -> Iterator[str]:
    """What was measured."""
    check, eight = record["check"], record["int8"]
    size = {name: f"{file['bytes']:,} bytes" for name, file in record["files"].items()}
    yield (
        f"{ONNX}: {size[ONNX]}, opset {record['opset']}; of {check['rows']:,} images of {check['split']}"
        f" {check['flips']} change their first class, logits differ from PyTorch's by"
        f" {check['largest_difference']:.1e} at most (--tolerance {check['tolerance']:g})"
    )
    yield f"{PT2}: {size[PT2]}, loaded again its logits differ by {check['pt2_difference']:.1g}"
    yield f"{WEIGHTS}: {size[WEIGHTS]}"
    if eight:
        before, after = eight["accuracy_before"], eight["accuracy_after"]
        accuracy = f"accuracy {before:.4f} before, {after:.4f} after" if before is not None else "no labels"
        yield (
            f"{INT8}: {size[INT8]}, {eight['size_ratio']:.3f} of {ONNX}; {accuracy},"
            f" {eight['flips']} of {eight['rows']:,} change their first class"
        )
        for batch, took in eight["milliseconds"].items():
            times = f"{took[ONNX]:.3f} ms in float32, {took[INT8]:.3f} ms in 8 bits"
            yield f"batch {batch}: {times} ({eight['threads']} threads)"
