"""MODEL_CARD.md: what an exported student is, its metrics, how it was trained, and how to use it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softcache.base.text import escape_markdown, format_code_span
from softcache.data.sources import format_placeholder, has_argument
from softcache.data.tasks import NUMBERS, get_task
from softcache.pipeline.cache.manifest import Manifest
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.copied_commands import format_command
from softcache.stages.cli.typed_command import program_name
from softcache.stages.runs.figures import Figures

from .card_of_task import (
    NAME,
    describe_command_line,
    describe_input,
    describe_kind,
    format_example,
    format_names_row,
    format_output_table,
    get_metric_titles,
    list_limits,
    name_packages,
    name_row,
)
from .metadata import INT8, ONNX, PT2, WEIGHTS
from .select_student import ExportedRun
from .summary import describe_changes, describe_difference, describe_int8_loss, name_outputs

_CONTENTS = {
    ONNX: "float32, any batch size, for ONNX Runtime and other readers of ONNX",
    INT8: "the same network quantised to int8",
    PT2: "the same graph for `torch.export.load`",
    WEIGHTS: "the weights alone, under their names in the arch's state dict",
}
_TEMPLATE = """\
# {arch}, a student of {teachers}

Exported by softcache {version}: {kind} that was distilled from the stored outputs of a teacher. It runs
without the teacher.

| | |
|---|---|
| arch | {arch_code}, {parameters:,} parameters, {multiply_adds:,} multiply-adds per {row} |
{names}
| input | {input} |
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

`pip install {packages}`, then:

```python
{example}```
{command_line}
## Limits

{limits}
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
        arch=escape_markdown(record["arch"], NAME),
        arch_code=format_code_span(record["arch"], in_table=True),
        teachers=" and ".join(escape_markdown(m.identity["teacher"]["arch"], NAME) for m in manifests),
        version=record["versions"]["softcache"],
        parameters=record["parameters"],
        multiply_adds=record["multiply_adds"],
        kind=describe_kind(record),
        row=name_row(record),
        names=format_names_row(record),
        input=describe_input(preprocessing),
        output=record["outputs"],
        seed=record["seed"],
        reason=record["chosen"],
        licence=_format_licence(manifests),
        metrics="\n".join([*_metrics_lines(record), *format_output_table(record)]),
        sources="\n".join(_source_lines(exported.run_config, manifests)) + "\n",
        training=_describe_training(exported.run_config),
        command=_format_training_command(exported.run_config, data),
        files="\n".join(_file_rows(record)),
        checks="\n\n".join(_check_paragraphs(record)),
        packages=name_packages(record),
        example=format_example(record),
        command_line=describe_command_line(record),
        limits="\n".join(f"- {line}" for line in list_limits(record, escape_markdown(data, NAME))),
    )


def _metrics_lines(record: dict[str, Any]) -> Iterator[str]:
    """Yield a table of metrics for each split: teacher, baseline, student and the int8 file side by side."""
    figures, int8 = record["figures"], record["int8"]
    student = figures["student"]
    titles = {"teacher": "teacher", "baseline": "same arch, hard targets only", "student": "student"}
    for split in sorted(split for split in student if split in ("test", "val")):  # test first
        columns = {title: figures[model][split] for model, title in titles.items() if model in figures}
        if int8 and int8["split"] == split:
            columns["student, int8"] = int8["figures"]
        yield f"{split} split, {student[split]['rows']:,} {name_row(record)}s, plain views, computed in float32:\n"
        yield f"| | {' | '.join(columns)} |"
        yield "|---|" + "---|" * len(columns)
        for key, title in get_metric_titles(record).items():
            values = [Figures(metrics).get(key) for metrics in columns.values()]
            if any(value is not None for value in values):
                yield f"| {title} | {' | '.join('-' if v is None else f'{v:.4f}' for v in values)} |"
        yield ""


def _source_lines(run_config: StudentConfig, manifests: list[Manifest]) -> Iterator[str]:
    """Yield a list of the transfer set, the views and each teacher's cache."""
    first = manifests[0]
    transfer_set, views = first.identity["transfer_set"]["name"], first.identity["views"]
    task, rows = get_task(first.identity), "rows" if "shape" in first.identity["teacher"] else "images"
    parameters = ", ".join(f"{name} {value:g}" for name, value in views.items() if name != "policy")
    draws = run_config.draws or first.draws
    yield (
        f"- {first.splits['train']:,} {rows} of {escape_markdown(transfer_set, NAME)}, each in"
        f" {draws} view{'s' if draws > 1 else ''} {format_code_span(views['policy'])} ({parameters})"
    )
    if run_config.labelled:
        targets, outputs = ("numbers", "numbers") if task == NUMBERS else ("labels", "logits")
        yield f"- {targets} of {run_config.labelled:,} of them; the teacher's {outputs} of all"
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
    changes = describe_changes(record, check, has_total=False)
    yield (
        f"`{ONNX}` in ONNX Runtime {versions['onnxruntime']} against PyTorch {versions['torch']}"
        f" on {check['rows']:,} {name_row(record)}s of {check['split']}: {name_outputs(record)} differ by at most"
        f" {describe_difference(record)}{changes and ', ' + changes}. Batch sizes"
        f" {', '.join(map(str, check['batch_sizes']))} were run."
    )
    if int8:
        latencies = "; ".join(
            f"batch size {size}: {milliseconds[ONNX]:.3f} ms in float32, {milliseconds[INT8]:.3f} ms in int8"
            for size, milliseconds in int8["milliseconds"].items()
        )
        losses = (describe_int8_loss(record, absent="", between=" and "), describe_changes(record, int8))
        yield (
            f"`{INT8}`, calibrated on {int8['calibration_rows']:,} cached training views:"
            f" {', '.join(filter(None, losses))}; {int8['size_ratio']:.3f} of"
            f" the size. Median latencies on the exporting machine's CPU, {int8['threads']} threads: {latencies}."
        )


def _format_licence(manifests: list[Manifest]) -> str:
    licences = [str(manifest.settings.get("license") or "not stated") for manifest in manifests]
    return "; ".join(dict.fromkeys(escape_markdown(licence, NAME) for licence in licences))
