"""`softcache export`: a finished student as files for other programs, each checked against PyTorch first."""

import json
import time
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softcache import __version__
from softcache.base.errors import make_printable
from softcache.base.files import format_json, publish_together, remove_stale_files
from softcache.base.lock import hold_lock
from softcache.base.packages import require_extra
from softcache.data.tasks import EMBEDDING, LABELS
from softcache.pipeline.losses import HARD_LOSSES
from softcache.pipeline.losses.hard import Hard
from softcache.pipeline.models import count_parameters
from softcache.pipeline.models.multiply_adds import count_multiply_adds
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from softcache.pipeline.models.state_dicts import load_weights, read_state_dict
from softcache.stages.cli.configs import ExportConfig
from softcache.stages.cli.console import Console, format_duration, progress_bar
from softcache.stages.cli.copied_commands import format_command
from softcache.stages.runs.named_code import require_named_code, require_named_data
from softcache.stages.student.evaluate import check_same_teachers
from softcache.stages.student.requirements import hide_labels
from softcache.stages.student.setup import DistillationSetup
from softcache.stages.student.teachers import open_caches

from .formats import OPSET, ExportedModel, capture_program, load_pt2, make_onnx, make_pt2, make_safetensors
from .metadata import INT8, ONNX, PT2, WEIGHTS, ExportMetadata
from .model_card import format_model_card
from .onnx_model import OnnxStudent, get_onnx_versions
from .output_comparison import Logits, OutputComparison
from .parity import (
    BATCH_SIZES,
    check_parity,
    check_reloaded,
    measure_batch_difference,
    measure_float32_noise,
    measure_rounding,
    run_in_batches,
    to_unit_range,
)
from .select_student import ExportedRun, read_thresholds, select_student
from .summary import format_summary

CARD_FILE, RECORD_FILE = "MODEL_CARD.md", "export.json"
_FILES = (RECORD_FILE, CARD_FILE, INT8, ONNX, PT2, WEIGHTS)


def run(name: str, config: ExportConfig, explicit_options: set[str]) -> None:
    """Export a student into its run's folder.

    All files are made, checked and written before the first replaces one of an older export; export.json is the last.

    Args:
        name: Folder of the run, or of one of its seeds.
        config: Options of the command.
        explicit_options: Names of the options that were given on the command line.

    Raises:
        UsageError: The folder is not a student's run, or an optional library is missing.
        CacheError: The run or its cache is damaged or does not match, or a file fails its check.
    """
    require_extra("export needs", "export", "onnx", "onnxscript", "onnxruntime")
    console, start = Console(config.json), time.monotonic()
    overrides = {
        name: getattr(config, name) for name in explicit_options & {"data", "data_root", "cache", "index", "rehash"}
    }
    # On the CPU in float32, however the run was trained: the files are compared with that.
    exported = select_student(Path(name), device="cpu", precision="float32", **overrides)
    require_named_code(
        exported.config.arch,
        config.arch,
        owner=f"the run '{exported.config.out}'",
        option="--arch",
        command=format_command("export", config, name, arch=exported.config.arch),
    )
    require_named_data(
        exported.config.data,
        config.data,
        owner=f"the run '{exported.config.out}'",
        command=format_command("export", config, name, data=exported.config.data),
    )
    check_same_teachers(Path(exported.config.out), open_caches(exported.config.cache))
    setup = DistillationSetup.open(exported.config)
    console.print(f"exporting {make_printable(exported.config.arch)}, seed {exported.config.seed} ({exported.reason})")
    with hold_lock(exported.folder):
        remove_stale_files(exported.folder, _FILES)
        record, files = _make_files(exported, setup, config)
        record["seconds"] = time.monotonic() - start
        card = format_model_card(record, exported, [cache.manifest for cache in setup.teachers.members])
        contents = {**files, CARD_FILE: card.encode(), RECORD_FILE: format_json(record)}
        publish_together(exported.folder, contents, obsolete=_FILES)
    if config.json:
        return console.print_json(json.dumps(record))
    for line in format_summary(record):
        console.print(line)
    names = ", ".join((*files, CARD_FILE, RECORD_FILE))
    console.print(f"files: {exported.folder}/{names} ({format_duration(record['seconds'])})")


def _make_files(
    exported: ExportedRun, setup: DistillationSetup, config: ExportConfig
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Make all files and check them. Raises CacheError where one fails its check.

    Returns:
        export.json without its duration, and {name: content} of the other files.
    """
    network = setup.build_student(exported.config, setup.losses)
    weights = exported.seed_folder / "student.pt"
    load_weights(network, read_state_dict(weights), str(weights))
    labels = hide_labels(exported.config, setup.transfer_set.splits["train"].labels)
    input_spec = setup.scale_output(labels)
    split = "test" if "test" in setup.held_out else "val"
    held_out = setup.held_out[split]
    logits = _compute_logits(network, input_spec, setup, "student")
    expected = logits[split]
    arch = setup.student_arch(exported.config, setup.losses)
    metadata = _make_metadata(exported, setup, input_spec, width=expected.shape[1])
    comparison = OutputComparison.of_task(metadata.task, expected, input_spec.output_std)
    figures = {
        "student": setup.compute_metrics(logits),
        "teacher": setup.teacher_metrics,
        **_measure_baseline(exported, setup, input_spec),
    }

    model = ExportedModel(network, input_spec)
    names = metadata.input_name, metadata.output_name
    rounding = partial(measure_rounding, model, held_out, comparison)
    with progress_bar(3, "writing graphs", "file") as bar:
        program = capture_program(model, arch, metadata.channels, metadata.size, metadata.shape)
        bar.update()
        files = {ONNX: make_onnx(program, arch, metadata.to_dict(), __version__, names)}
        bar.update()
        files[PT2] = make_pt2(program, metadata.to_dict())
        bar.update()
    files[WEIGHTS] = make_safetensors(network, metadata.to_dict())

    onnx_student = OnnxStudent.from_bytes(files[ONNX], torch.get_num_threads())
    parity = check_parity(
        ONNX,
        expected,
        run_in_batches(held_out, lambda views: onnx_student.compute_logits(to_unit_range(views)), f"checking {ONNX}"),
        comparison=comparison,
        batch_difference=measure_batch_difference(onnx_student, held_out, expected, comparison),
        noise=measure_float32_noise(model, held_out, expected, comparison),
        measure_rounding=rounding,
        tolerance=config.tolerance,
    )
    pt2_difference = check_reloaded(
        PT2,
        load_pt2(files[PT2]),
        model=model,
        held_out=held_out,
        comparison=comparison,
        measure_rounding=rounding,
        tolerance=config.tolerance,
    )

    record: dict[str, Any] = {
        "run": exported.folder.resolve().name,
        "seed": exported.config.seed,
        "chosen": exported.reason,
        "arch": arch,
        "parameters": count_parameters(network),
        "multiply_adds": count_multiply_adds(network, input_spec.channels, metadata.size, metadata.shape),
        **metadata.describe_task(),
        "preprocessing": metadata.preprocessing,
        "outputs": metadata.describe_output(),
        "cache": list(metadata.fingerprints),
        "figures": figures,
        "opset": OPSET,
        "check": {"split": split, **parity, "batch_sizes": list(BATCH_SIZES), "pt2_difference": pt2_difference},
        "int8": None,
        "versions": {**metadata.versions, **get_onnx_versions()},
    }
    if config.int8:
        from .quantize import make_int8_file

        files[INT8], record["int8"] = make_int8_file(
            setup,
            metadata,
            model=files[ONNX],
            float32_student=onnx_student,
            split=split,
            expected=expected,
            comparison=comparison,
            most_drop=config.most_drop,
        )
    record["files"] = {
        name: {"bytes": len(content), "sha256": sha256(content).hexdigest()} for name, content in files.items()
    }
    return record, files


def _make_metadata(
    exported: ExportedRun, setup: DistillationSetup, input_spec: InputSpec, width: int
) -> ExportMetadata:
    views, transfer_set = setup.cache.views, setup.transfer_set
    task, is_embedding = setup.cache.task, setup.cache.task == EMBEDDING
    names = transfer_set.classes or tuple(map(str, range(width)))  # images without class folders have none
    return ExportMetadata(
        classes=() if is_embedding else names,
        channels=input_spec.shape[0] if input_spec.shape else transfer_set.channels,
        size=views.size,
        resize=max(views.resize, views.size),
        arch=setup.student_arch(exported.config, setup.losses),
        fingerprints=tuple(cache.manifest.fingerprint for cache in setup.teachers.members),
        versions={"softcache": __version__, "torch": torch.__version__},
        is_transposed=transfer_set.cut.get("exif") == "transpose",
        task=task,
        thresholds=read_thresholds(exported.seed_folder, width) if task == LABELS else (),
        width=width if is_embedding else 0,
        output_mean=input_spec.output_mean,
        output_std=input_spec.output_std,
        shape=input_spec.shape,
    )


def _compute_logits(
    network: nn.Module, input_spec: InputSpec, setup: DistillationSetup, description: str
) -> dict[str, Logits]:
    """Compute {split: logits} with PyTorch, in float32 and eval mode, as the student was validated."""
    model = PreparedModel(network, input_spec).eval()

    def compute(views: torch.Tensor) -> Logits:
        with torch.inference_mode():
            logits: Logits = model(views).numpy()
        return logits

    return {
        split: run_in_batches(held_out, compute, f"{description}, {split}")
        for split, held_out in setup.held_out.items()
    }


def _measure_baseline(exported: ExportedRun, setup: DistillationSetup, input_spec: InputSpec) -> dict[str, Any]:
    """Compute {"baseline": its metrics}; an empty dict where no baseline was trained."""
    path = exported.baseline
    if not exported.config.baseline or not path.is_file():
        return {}
    network = setup.build_student(exported.config, (HARD_LOSSES.get(setup.cache.task, Hard()),))
    load_weights(network, read_state_dict(path), str(path))
    return {"baseline": setup.compute_metrics(_compute_logits(network, input_spec, setup, "baseline"))}
