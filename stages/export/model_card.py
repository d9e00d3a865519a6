"""MODEL_CARD.md: what an exported student is, its metrics, how it was trained, and how to use it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softcache.base.text import escape_markdown, format_code_span
from softcache.data.sources import format_placeholder, has_argument
from softcache.pipeline.cache.manifest import Manifest
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.copied_commands import format_command
from softcache.stages.cli.typed_command import program_name

from .metadata import INPUT, INT8, ONNX, PT2, WEIGHTS
from .select_student import ExportedRun

_LISTED_CLASSES = 20  # with their names, and with their recall
_NAME = 80  # characters of a name
_METRICS = {
    "accuracy": "accuracy",
    "top5": "top-5 accuracy",
    "precision_macro": "precision, macro",
    "recall_macro": "recall, macro",
    "f1_macro": "F1, macro",
    "auroc_macro": "AUROC, macro",
    "nll": "NLL, nats",
    "ece": "ECE",
    "agreement": "agreement with the teacher",
}
_CONTENTS = {
    ONNX: "float32, any batch size, for ONNX Runtime and other readers of ONNX",
    INT8: "the same network quantised to int8",
    PT2: "the same graph for `torch.export.load`",
    WEIGHTS: "the weights alone, under their names in the arch's state dict",
}
_EXAMPLE = """\
import json, numpy as np, onnxruntime
from PIL import Image

student, image = onnxruntime.InferenceSession("{file}"), Image.open("picture.png").convert("{mode}")
image = image.resize([max(round(side * ({resize} / min(image.size))), {size}) for side in image.size], Image.BILINEAR)
image = image.crop([(side + step) // 2 for step in (-{size}, {size}) for side in image.size])
inputs = {{"{input}": np.array(image, np.float32).reshape(1, {size}, {size}, {channels}).transpose(0, 3, 1, 2) / 255}}
print(json.loads(student.get_modelmeta().custom_metadata_map["classes"])[np.argmax(student.run(None, inputs))])
"""
_TEMPLATE = """\
# {arch}, a student of {teachers}

Exported by softcache {version}: an image classifier that was distilled from the stored outputs of a teacher. It runs
without the teacher.

| | |
|---|---|
| arch | {arch_code}, {parameters:,} parameters, {multiply_adds:,} multiply-adds per image |
| classes | {K}: {classes} |
| input | `{input}`, float32 [B, {channels}, {size}, {size}], values 0 … 1. {preprocessing} |
| output | {output} |
| weights | seed {seed}, {reason} |
| licence of the cache | {licence} |

## Metrics

{metrics}
## Training data

{sources}
## Training

{training}

The command that trains it again, with data and cache at the paths it names:

```sh
{command}
```

## Files

| file | bytes | |
|---|---|---|
{files}

{checks}

## Use

`pip install onnxruntime pillow numpy`, then:

```python
{example}```

Or `python -m softcache predict {file} image.png`, which prints probabilities.

## Limits

- The metrics were measured on held-out images of {data}. They may not hold for other images: another camera, place or
  time. An image of none of the {K} classes is assigned to one of them all the same.
- The student was trained on a teacher's soft targets, so it repeats mistakes of the teacher.
- The probabilities are calibrated as the ECE above states, on those images.
- Images must be prepared as described under input: another filter, size or range of values changes the logits.
"""


def format_model_card(record: dict[str, Any], exported: ExportedRun, manifests: list[Manifest]) -> str:
    """Fill in the model card.

    Args:
        record: export.json.
        exported: The exported student.
        manifests: Of the caches, in the order of the run.
    """
    preprocessing = record["preprocessing"]
    data = manifests[0].identity["transfer_set"]["name"]
    return _TEMPLATE.format(
        arch=escape_markdown(record["arch"], _NAME),
        arch_code=format_code_span(record["arch"], in_table=True),
        teachers=" and ".join(escape_markdown(m.identity["teacher"]["arch"], _NAME) for m in manifests),
        version=record["versions"]["softcache"],
        parameters=record["parameters"],
        multiply_adds=record["multiply_adds"],
        K=len(record["classes"]),
        classes=_list_classes(record["classes"]),
        input=INPUT,
        channels=preprocessing["channels"],
        size=preprocessing["size"],
        preprocessing=_describe_preprocessing(preprocessing),
        output=record["outputs"],
        seed=record["seed"],
        reason=record["chosen"],
        licence=_format_licence(manifests),
        metrics="\n".join([*_metrics_lines(record), *_recall_lines(record)]),
        sources="\n".join(_source_lines(exported.run_config, manifests)) + "\n",
        training=_describe_training(exported.run_config),
        command=_format_training_command(exported.run_config, data),
        files="\n".join(_file_rows(record)),
        checks="\n\n".join(_check_paragraphs(record)),
        file=ONNX,
        data=escape_markdown(data, _NAME),
        example=format_example(ONNX, preprocessing),
    )


def format_example(file: str, preprocessing: dict[str, Any]) -> str:
    """Return Python code that prints the predicted class of an image.

    Args:
        file: Name of the ONNX file.
        preprocessing: See `ExportMetadata.preprocessing`.
    """
    numbers = {name: preprocessing[name] for name in ("mode", "channels", "size", "resize")}
    return _EXAMPLE.format(file=file, input=INPUT, **numbers)


def _list_classes(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED_CLASSES} more" if len(names) > _LISTED_CLASSES else ""
    return ", ".join(escape_markdown(name, _NAME) for name in names[:_LISTED_CLASSES]) + more


def _describe_preprocessing(preprocessing: dict[str, Any]) -> str:
    kind = "a grey" if preprocessing["channels"] == 1 else "an RGB"
    size, resize = preprocessing["size"], preprocessing["resize"]
    return (
        f"Decode as {kind} image, resize the shorter side to {resize} px with Pillow's bilinear filter, cut out the"
        f" central {size} × {size} px, divide by 255; normalisation is inside the network"
    )


def _metrics_lines(record: dict[str, Any]) -> Iterator[str]:
    """Yield a table of metrics for each split: teacher, baseline, student and the int8 file side by side."""
    figures, int8 = record["figures"], record["int8"]
    student = figures["student"]
    titles = {"teacher": "teacher", "baseline": "same arch, hard targets only", "student": "student"}
    for split in sorted(student):  # test first
        columns = {title: figures[model][split] for model, title in titles.items() if model in figures}
        if int8 and int8["split"] == split:
            columns["student, int8"] = int8["figures"]
        yield f"{split} split, {student[split]['rows']:,} images, plain views, computed in float32:\n"
        yield f"| | {' | '.join(columns)} |"
        yield "|---|" + "---|" * len(columns)
        for key, title in _METRICS.items():
            values = [metrics.get(key) for metrics in columns.values()]
            if any(value is not None for value in values):
                yield f"| {title} | {' | '.join('-' if v is None else f'{v:.4f}' for v in values)} |"
        yield ""


def _recall_lines(record: dict[str, Any]) -> Iterator[str]:
    """Yield the table of the student's recall by class: of many classes the lowest."""
    split = record["check"]["split"]
    metrics = record["figures"]["student"][split]
    if "per_class" not in metrics:
        return
    per_class = metrics["per_class"]
    rows = [
        (recall, name, support)
        for recall, name, support in zip(per_class["recall"], record["classes"], per_class["support"], strict=True)
        if recall is not None
    ]
    title = f"Recall of the student by class, {split}"
    if len(rows) > _LISTED_CLASSES // 2:
        rows.sort(key=lambda row: row[0])
        title += ", the lowest first"
    if len(rows) > _LISTED_CLASSES:
        title += f" ({len(rows) - _LISTED_CLASSES} higher ones are left out)"
    yield f"{title}:\n"
    yield "| class | recall | images |\n|---|---|---|"
    for recall, name, support in rows[:_LISTED_CLASSES]:
        yield f"| {escape_markdown(name, _NAME)} | {recall:.4f} | {int(support):,} |"
    yield ""


def _source_lines(run_config: StudentConfig, manifests: list[Manifest]) -> Iterator[str]:
    """Yield a list of the transfer set, the views and each teacher's cache."""
    first = manifests[0]
    transfer_set, views = first.identity["transfer_set"]["name"], first.identity["views"]
    parameters = ", ".join(f"{name} {value:g}" for name, value in views.items() if name != "policy")
    draws = run_config.draws or first.draws
    yield (
        f"- {first.splits['train']:,} images of {escape_markdown(transfer_set, _NAME)}, each in"
        f" {draws} view{'s' if draws > 1 else ''} {format_code_span(views['policy'])} ({parameters})"
    )
    if run_config.labelled:
        yield f"- labels of {run_config.labelled:,} of them; the teacher's logits of all"
    for manifest in manifests:
        teacher = manifest.identity["teacher"]
        yield (
            f"- teacher {format_code_span(teacher['arch'])}, weights SHA-256 {format_code_span(teacher['weights'])};"
            f" cache {format_code_span(manifest.fingerprint)}"
        )
    if run_config.combine:
        yield f"- combined by {format_code_span(run_config.combine)}"
    if run_config.map:
        yield f"- mapped by {format_code_span(run_config.map)}"


def _describe_training(run_config: StudentConfig) -> str:
    losses = " + ".join(format_code_span(loss) for loss in run_config.loss)
    finetuning = ""
    if run_config.finetune_epochs:
        finetuning = f", then {run_config.finetune_epochs} epochs from hard targets alone"
    return (
        f"Loss {losses}; {run_config.epochs} epochs{finetuning}, batch size {run_config.batch_size},"
        f" {run_config.optimizer}, learning rate {run_config.learning_rate:g} ({run_config.schedule}),"
        f" weight decay {run_config.weight_decay:g}, precision {run_config.precision}."
    )


def _format_training_command(run_config: StudentConfig, data: str) -> str:
    """Return the command that trains the run again, without a path of this machine."""
    command = format_command(
        "student",
        run_config,
        out="",
        resume=False,
        json=False,
        data_root="datasets",
        data=format_placeholder(data) if has_argument(data) else run_config.data,
        cache=tuple(f"caches/{Path(cache).resolve().name}" for cache in run_config.cache),
    )
    return "python -m softcache" + command.removeprefix(program_name())


def _file_rows(record: dict[str, Any]) -> Iterator[str]:
    for name, file in record["files"].items():
        opset = f", opset {record['opset']}" if name in (ONNX, INT8) else ""
        yield f"| `{name}` | {file['bytes']:,} | {_CONTENTS[name]}{opset} |"


def _check_paragraphs(record: dict[str, Any]) -> Iterator[str]:
    """Yield what was measured of the ONNX file and of the int8 file."""
    check, int8, versions = record["check"], record["int8"], record["versions"]
    yield (
        f"`{ONNX}` in ONNX Runtime {versions['onnxruntime']} against PyTorch {versions['torch']}"
        f" on {check['rows']:,} images of {check['split']}: logits differ by at most"
        f" {check['largest_difference']:.1e}, {check['flips']} top-1 predictions change. Batch sizes"
        f" {', '.join(map(str, check['batch_sizes']))} were run."
    )
    if int8:
        before, after = int8["accuracy_before"], int8["accuracy_after"]
        accuracy = "" if before is None else f"accuracy {before:.4f} before and {after:.4f} after, "
        latencies = "; ".join(
            f"batch size {size}: {milliseconds[ONNX]:.3f} ms in float32, {milliseconds[INT8]:.3f} ms in int8"
            for size, milliseconds in int8["milliseconds"].items()
        )
        yield (
            f"`{INT8}`, calibrated on {int8['calibration_rows']:,} cached training views: {accuracy}"
            f"{int8['flips']} of {int8['rows']:,} top-1 predictions change; {int8['size_ratio']:.3f} of"
            f" the size. Median latencies on the exporting machine's CPU, {int8['threads']} threads: {latencies}."
        )


def _format_licence(manifests: list[Manifest]) -> str:
    licences = [str(manifest.settings.get("license") or "not stated") for manifest in manifests]
    return "; ".join(dict.fromkeys(escape_markdown(licence, _NAME) for licence in licences))
