"""What an export measured, in words: the lines that the command prints, and the parts that the model card shares."""

from collections.abc import Iterator
from typing import Any

from softcache.data.tasks import CLASSES, EMBEDDING
from softcache.stages.runs.figures import TITLES, get_task

from .metadata import INT8, ONNX, PT2, WEIGHTS
from .output_comparison import OutputComparison

_NOUNS = {"numbers": "numbers", "embedding": "embeddings"}  # of tasks whose outputs are no logits


def name_outputs(record: dict[str, Any]) -> str:
    """Return what the outputs are called: "logits", "numbers" or "embeddings".

    Args:
        record: export.json.
    """
    return _NOUNS.get(get_task(record), "logits")


def describe_changes(record: dict[str, Any], counts: dict[str, Any], split: str = "", has_total: bool = True) -> str:
    """Describe how many predictions change, as "2 of 360 top-1 predictions change"; "" of numbers and embeddings.

    Args:
        record: export.json.
        counts: Its "check" or its "int8".
        split: The split, if it is to be named.
        has_total: Whether the number of all predictions is stated.
    """
    total = counts["rows"] * len(record.get("names", (None,)))
    changes = OutputComparison(get_task(record)).describe_changes(counts.get("flips"), total, split)
    return changes if has_total else changes.replace(f" of {total:,}", "")


def describe_difference(record: dict[str, Any]) -> str:
    """Return the largest difference of an output and its unit: "1.2e-06", or "1.2e-06 standard deviations"."""
    check = record["check"]
    return f"{check['largest_difference']:.1e}{' standard deviations' if 'unit' in check else ''}"


def describe_int8_loss(record: dict[str, Any], absent: str, between: str = ", ") -> str:
    """Describe the main figure before and after the quantisation.

    Args:
        record: export.json, with "int8".
        absent: Where there are no labels.
        between: Words between the two values.
    """
    task, int8 = get_task(record), record["int8"]
    if task == EMBEDDING:
        return f"cosine {1 - int8['drop']:.4f} to the embeddings in float32"
    if task == CLASSES:
        title, before, after = "accuracy", int8["accuracy_before"], int8["accuracy_after"]
    else:
        title, before, after = TITLES.get(int8.get("figure", ""), ""), int8.get("before"), int8.get("after")
    return absent if before is None else f"{title} {before:.4f} before{between}{after:.4f} after"


def format_summary(record: dict[str, Any]) -> Iterator[str]:
    """Yield what was measured, a line for each file.

    Args:
        record: export.json.
    """
    check, int8, outputs = record["check"], record["int8"], name_outputs(record)
    size = {name: f"{file['bytes']:,} bytes" for name, file in record["files"].items()}
    changes = describe_changes(record, check, check["split"])
    differences = f"{outputs} differ from PyTorch's by {describe_difference(record)} at most"
    yield (
        f"{ONNX}: {size[ONNX]}, opset {record['opset']}; {changes and changes + ', '}{differences}"
        f"{'' if changes else ' on ' + check['split']} (--tolerance {check['tolerance']:g})"
    )
    yield f"{PT2}: {size[PT2]}, {outputs} of the reloaded file differ by {check['pt2_difference']:.1g}"
    yield f"{WEIGHTS}: {size[WEIGHTS]}"
    if int8:
        changes = describe_changes(record, int8)
        loss = describe_int8_loss(record, absent="no labels")
        yield f"{INT8}: {size[INT8]}, {int8['size_ratio']:.3f} of {ONNX}; {loss}{changes and ', ' + changes}"
        for batch, milliseconds in int8["milliseconds"].items():
            latencies = f"{milliseconds[ONNX]:.3f} ms in float32, {milliseconds[INT8]:.3f} ms in int8"
            yield f"batch size {batch}: {latencies} ({int8['threads']} threads)"
