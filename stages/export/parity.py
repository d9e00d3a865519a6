"""Parity check: an exported file computes PyTorch's outputs, on a whole held-out split and in several batch sizes."""

import math
from collections.abc import Callable
from contextlib import closing, suppress
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import nn

from softcache.base.errors import CacheError
from softcache.base.threads import take_first
from softcache.data.tasks import CLASSES
from softcache.stages.cli.console import progress
from softcache.stages.training.validation import HeldOutSplit

from .onnx_model import Images, OnnxStudent
from .output_comparison import Logits, OutputComparison

BATCH_SIZES = (1, 7, 512)
_SINGLE_IMAGES = 16  # that are computed one by one, to measure rounding
_MOST_BY_ROUNDING = 10  # times the rounding within PyTorch that another runtime may differ from it


def run_in_batches(
    held_out: HeldOutSplit, compute_logits: Callable[[torch.Tensor], Logits], description: str
) -> Logits:
    """Compute the logits of a split.

    Args:
        held_out: The split.
        compute_logits: Plain views uint8 [B, C, S, S] -> logits float32 [B, K].
        description: Title of the progress bar.

    Returns:
        float32 [N, K], in row order of the split.
    """
    batches = -(-len(held_out.labels) // held_out.batch_size)
    with closing(held_out.batches()) as all_views:
        return np.concatenate([compute_logits(views) for views in progress(all_views, batches, description)])


def to_unit_range(views: torch.Tensor) -> Images:
    """Convert views uint8 [B, C, S, S] to the exported network's input, float32 of values 0 … 1; rows stay."""
    if views.is_floating_point():
        rows: Images = views.numpy()
        return rows
    pixels: Images = views.numpy().astype(np.float32)
    return pixels / np.float32(255)


def take_first_images(held_out: HeldOutSplit, count: int) -> Images:
    """Return the first images of a split, float32 [count, C, S, S]; they are repeated where it has fewer."""
    images = to_unit_range(take_first(held_out.batches()))
    return np.resize(images, (count, *images.shape[1:]))


def measure_batch_difference(
    onnx_student: OnnxStudent, held_out: HeldOutSplit, expected: Logits, comparison: OutputComparison
) -> float:
    """Run the first images in batches of every size of BATCH_SIZES.

    Args:
        onnx_student: The exported network.
        held_out: The split.
        expected: float32 [N, K], PyTorch's logits of the split.
        comparison: How they are compared.

    Returns:
        The largest difference of a logit from PyTorch's; NaN where a logit is NaN.
    """
    images = take_first_images(held_out, max(BATCH_SIZES))
    first_expected = np.resize(expected[: held_out.batch_size], (max(BATCH_SIZES), expected.shape[1]))
    differences = [
        comparison.measure(onnx_student.compute_logits(images[:size]), first_expected[:size]) for size in BATCH_SIZES
    ]
    return float(np.max(differences))


def measure_float32_noise(
    model: nn.Module, held_out: HeldOutSplit, expected: Logits, comparison: OutputComparison
) -> float:
    """Measure how far PyTorch's logits of the first batch depend on the memory layout of the network.

    This is the effect of float32 rounding, by which a difference from another runtime can be judged.

    Args:
        model: The network in contiguous memory format, see `formats.ExportedModel`.
        held_out: The split.
        expected: float32 [N, K], PyTorch's logits of the split from the network as it was trained.
        comparison: How they are compared.
    """
    images = torch.from_numpy(to_unit_range(take_first(held_out.batches())))
    with torch.inference_mode():
        return comparison.measure(model(images).numpy(), expected[: len(images)])


def measure_rounding(model: nn.Module, held_out: HeldOutSplit, comparison: OutputComparison) -> float:
    """Measure how far PyTorch's own logits of the first batch depend on rounding: on the batch, and against float64.

    Args:
        model: The network in float32.
        held_out: The split.
        comparison: How they are compared.
    """
    images = torch.from_numpy(to_unit_range(take_first(held_out.batches())))
    with torch.inference_mode():
        logits = model(images).numpy()
        single = torch.cat([model(image[None]) for image in images[:_SINGLE_IMAGES]])
        differences = [comparison.measure(single.numpy(), logits[:_SINGLE_IMAGES])]
        with suppress(Exception):  # a user's network can make float32 tensors of its own, which do not go with float64
            differences.append(comparison.measure(deepcopy(model).double()(images.double()).numpy(), logits))
    return max(differences)


def _explain_difference(difference: float, rounding: float, noun: str) -> str:
    """Explain a difference above the tolerance: by rounding, with the tolerance that accepts it, or not."""
    if not difference <= _MOST_BY_ROUNDING * rounding:  # also true of NaN
        return (
            f"PyTorch's own float32 rounding explains {rounding:.2e} of it, so the file does not compute the same"
            " function: do not use a larger tolerance"
        )
    exponent = math.floor(math.log10(2 * difference))
    suggested = math.ceil(2 * difference / 10**exponent) * 10**exponent
    return (
        f"PyTorch's own float32 rounding changes a {noun} of this network by {rounding:.2e} (other memory layouts,"
        f" other batches, float64): pass --tolerance {suggested:.0e}"
    )


def check_parity(
    name: str,
    expected: Logits,
    logits: Logits,
    *,
    comparison: OutputComparison,
    batch_difference: float,
    noise: float,
    measure_rounding: Callable[[], float],
    tolerance: float,
) -> dict[str, Any]:
    """Check that ONNX Runtime's logits of a split are PyTorch's, within a tolerance.

    Args:
        name: Of the file.
        expected: float32 [N, K], PyTorch's logits.
        logits: float32 [N, K], ONNX Runtime's logits.
        comparison: How they are compared.
        batch_difference: See `measure_batch_difference`.
        noise: See `measure_float32_noise`.
        measure_rounding: Called where a logit differs by more than the tolerance, see `measure_rounding`.
        tolerance: Largest difference of a logit that is accepted.

    Returns:
        The record for export.json.

    Raises:
        CacheError: A logit differs by more than the tolerance, or is NaN.
    """
    difference = float(np.max([comparison.measure(logits, expected), batch_difference]))  # NaN where one of them is
    changed_predictions = comparison.count_changes(logits, expected)
    if not difference <= tolerance:  # also true of NaN
        noun, changes = (
            comparison.noun,
            comparison.describe_changes(
                changed_predictions, len(expected) if comparison.task == CLASSES else expected.size
            ),
        )
        raise CacheError(
            f"a {noun} of {name} differs from PyTorch's by {difference:.2e}{comparison.describe_unit()}, more than"
            f" --tolerance {tolerance:g}{changes and f' ({changes})'}: nothing was written."
            f" {_explain_difference(difference, max(noise, measure_rounding()), noun)}"
        )
    return {
        "rows": len(expected),
        "tolerance": tolerance,
        "largest_difference": difference,
        **comparison.to_json(changed_predictions),
        "own_difference": noise,
    }


def check_reloaded(
    name: str,
    reloaded: nn.Module,
    *,
    model: nn.Module,
    held_out: HeldOutSplit,
    comparison: OutputComparison,
    measure_rounding: Callable[[], float],
    tolerance: float,
) -> float:
    """Check that a network read from its file computes the logits of the original, on the first batch.

    Args:
        name: Of the file.
        reloaded: The network from the file.
        model: The original.
        held_out: The split whose first batch is used.
        comparison: How they are compared.
        measure_rounding: Called where a logit differs by more than the tolerance, see `measure_rounding`.
        tolerance: Largest difference of a logit that is accepted.

    Returns:
        The largest difference of a logit.

    Raises:
        CacheError: It is more than the tolerance, or NaN.
    """
    images = torch.from_numpy(to_unit_range(take_first(held_out.batches())))
    with torch.inference_mode():
        difference = comparison.measure(reloaded(images).numpy(), model(images).numpy())
    if not difference <= tolerance:
        raise CacheError(
            f"a {comparison.noun} of {name}, read back from the file, differs by {difference:.2e}"
            f"{comparison.describe_unit()}, more than --tolerance {tolerance:g}: nothing was written."
            f" {_explain_difference(difference, measure_rounding(), comparison.noun)}"
        )
    return difference
