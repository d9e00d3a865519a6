"""Codecs: how logits are stored as bytes, and what that costs.

Logits are stored, never probabilities: half-precision probabilities lose 0.28 nats at temperature 4 on 1,000 classes,
half-precision logits 5e-7 (measured on real networks). Of other tasks than classes, the logits are a teacher's output
as it is: an embedding, or numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS, TASKS
from softcache.pipeline.metrics.distances import binary_kl, cosines

Floats = NDArray[np.float32]
Arrays = dict[str, NDArray[np.generic]]
RowKeys = NDArray[np.uint64]  # [n], a random number of each row, on which the choices of a codec for it depend
DENSE, TOP, SAMPLE = "dense", "top", "sample"  # kinds of codecs, see Codec.kind
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
_CHUNK = 32_000  # numbers that are converted at once
_MEASURED = 1 << 18  # numbers whose KL is computed at once: 2 MB in float64


@dataclass(frozen=True)
class Codec:
    """A way to store logits.

    Attributes:
        datasets: K -> {name: (row shape, dtype)}, what is stored of a row.
        encode: Logits float32 [n, K] and a key of each row -> {name: [n, …]}.
        decode: The inverse, with K: float32 [n, K], as near as the codec is. Raises ValueError for numbers that no
            encoding gives.
        max_value: Largest absolute value of a logit that can be stored.
        tasks: For which it is, see data/tasks.py.
        kind: DENSE where every logit is stored; TOP where the largest ones are, and the sum of the others'
            probabilities; SAMPLE where a sample of the classes is.
        min_classes: Least K.
    """

    datasets: Callable[[int], dict[str, tuple[tuple[int, ...], str]]]
    encode: Callable[[Floats, RowKeys], Arrays]
    decode: Callable[[Mapping[str, NDArray[np.generic]], int], Floats]
    max_value: float
    tasks: tuple[str, ...]
    kind: str = DENSE
    min_classes: int = 1


def _make_float_codec(dtype: str, max_value: float, tasks: tuple[str, ...]) -> Codec:
    """Make the codec that stores logits as they are, in a dtype."""
    return Codec(
        datasets=lambda K: {"logits": ((K,), dtype)},
        encode=lambda logits, keys: {"logits": logits.astype(dtype)},
        decode=lambda stored, K: _to_float32(stored["logits"]),
        max_value=max_value,
        tasks=tasks,
    )


def _to_float32(stored: NDArray[np.generic]) -> Floats:
    """Convert float16 or float32 of any shape to a new array of float32.

    By torch: 2,709 rows of 100 take 59 us, by NumPy 217. In chunks below the 32,768 numbers from which on torch starts
    threads, see `views.render`.
    """
    result = np.empty(stored.shape, np.float32)
    source = stored if stored.flags.writeable else stored.copy()  # torch warns of arrays that it could not write to
    outputs, inputs = torch.from_numpy(result).view(-1), torch.from_numpy(source).reshape(-1)
    for output, values in zip(torch.split(outputs, _CHUNK), torch.split(inputs, _CHUNK), strict=True):
        output.copy_(values)
    return result


def _encode_sqrt8(logits: Floats, keys: RowKeys) -> Arrays:
    """Square-root companding below the row maximum: c = round(255 sqrt((max - z) / (max - min))).

    Depths count from the maximum itself and not from its float16: that rounding moves a whole row, which no softmax
    sees, and never lets another class catch up with the first.
    """
    top = logits.max(1, keepdims=True)
    depth = top - logits
    span = np.maximum(depth.max(1, keepdims=True), 1e-3).astype(np.float16).astype(np.float32)
    code = np.rint(255 * np.sqrt(np.minimum(depth / span, 1.0))).astype(np.uint8)
    return {"logits": code, "logits_scale": np.concatenate([top, span], 1).astype(np.float16)}


def _decode_sqrt8(stored: Mapping[str, NDArray[np.generic]], K: int) -> Floats:
    """z = max - (c / 255)² (max - min)."""
    scale = stored["logits_scale"].astype(np.float32)
    share = np.square(stored["logits"].astype(np.float32) * np.float32(1 / 255))
    return np.asarray(scale[:, :1] - share * scale[:, 1:], np.float32)


def _encode_int8(rows: Floats, keys: RowKeys) -> Arrays:
    """Divide each row by a scale of its own, so that its largest absolute value is 127."""
    scale = (np.abs(rows).max(1, keepdims=True) / 127).astype(np.float16)
    divisor = np.maximum(scale.astype(np.float32), np.float32(2**-24))  # the smallest float16 above 0
    code = np.clip(np.rint(rows / divisor), -127, 127).astype(np.int8)
    return {"logits": code, "logits_scale": divisor.astype(np.float16)}


def _decode_int8(stored: Mapping[str, NDArray[np.generic]], K: int) -> Floats:
    return np.asarray(stored["logits"].astype(np.float32) * stored["logits_scale"].astype(np.float32), np.float32)


CODECS: dict[str, Codec] = {
    "float16": _make_float_codec("<f2", 65504.0, (CLASSES, LABELS, EMBEDDING)),
    "float32": _make_float_codec("<f4", float(np.finfo(np.float32).max), TASKS),
    "sqrt8": Codec(
        datasets=lambda K: {"logits": ((K,), "|u1"), "logits_scale": ((2,), "<f2")},
        encode=_encode_sqrt8,
        decode=_decode_sqrt8,
        max_value=30000.0,
        tasks=(CLASSES,),  # it keeps what a softmax sees
    ),
    "int8": Codec(
        datasets=lambda K: {"logits": ((K,), "|i1"), "logits_scale": ((1,), "<f2")},
        encode=_encode_int8,
        decode=_decode_int8,
        max_value=65504.0,
        tasks=(EMBEDDING,),  # it keeps directions
    ),
}
# What is measured of a codec, as means over the rows.
FIDELITY: dict[str, tuple[str, ...]] = {
    CLASSES: ("flips", *(f"kl_{T:g}" for T in TEMPERATURES)),
    LABELS: ("flips", "kl_1"),
    NUMBERS: ("relative_error",),
    EMBEDDING: ("cosine",),
}
SAMPLE_FIDELITY = ("flips", "reverse_kl_1")


def list_measures(task: str, codec: Codec) -> tuple[str, ...]:
    """List what is measured of a codec of a task, see `measure_fidelity` and `measure_sample`."""
    return SAMPLE_FIDELITY if codec.kind == SAMPLE else FIDELITY[task]


def measure_sample(logits: Floats, decoded: Floats) -> dict[str, float]:
    """Measure what a sample of the classes costs on some rows.

    Args:
        logits: float32 [n, K], as the teacher outputs them.
        decoded: float32 [n, K], of the sample.

    Returns:
        Sums over the rows: `rows`; `flips`, the rows whose top-1 class is not the one that was drawn most often; and
        `reverse_kl_1`, KL(sample || softmax(logits)) in nats. The KL of the other codecs is infinite for a sample, and
        that of one sample says little: their mean over the draws of an image is the teacher's distribution.
    """
    sums = {"rows": float(len(logits)), "flips": float((logits.argmax(1) != decoded.argmax(1)).sum())}
    p, q = _log_softmax(logits), _log_softmax(decoded)
    return {**sums, "reverse_kl_1": max(0.0, float((np.exp(q) * (q - p)).sum()))}


def measure_fidelity(logits: Floats, decoded: Floats, task: str = CLASSES) -> dict[str, float]:
    """Measure what a codec costs on some rows.

    Args:
        logits: float32 [n, K], as the teacher outputs them.
        decoded: float32 [n, K], the same after encoding and decoding.
        task: See data/tasks.py.

    Returns:
        Sums over the rows: `rows`, and those of FIDELITY. Of classes `flips`, the changed top-1 classes, and for each
        temperature T of TEMPERATURES `kl_T`, KL(softmax(logits / T) || softmax(decoded / T)) in nats. Of labels
        `flips`, the share of the labels whose logit changes its sign, and `kl_1`, the mean over the labels of the KL
        of two sigmoids in nats. Of numbers `relative_error`, the largest one of the row, as a share of the standard
        deviation of its output in these rows. Of an embedding `cosine`, the cosine of both.
    """
    if task != CLASSES:
        return {"rows": len(logits), **_MEASURES[task](logits.astype(np.float64), decoded.astype(np.float64))}
    sums: dict[str, float] = {
        "rows": len(logits),
        "flips": int((logits.argmax(1) != decoded.argmax(1)).sum()),
    }
    rows = max(1, _MEASURED // logits.shape[1])  # all at once: 10 times the memory, 2.6 times as long
    for T in TEMPERATURES:
        kl = 0.0
        for start in range(0, len(logits), rows):
            p, q = (_log_softmax(z[start : start + rows] / T) for z in (logits, decoded))
            kl += float((np.exp(p) * (p - q)).sum())
        sums[f"kl_{T:g}"] = max(0.0, kl)
    return sums


def _measure_labels(logits: NDArray[np.float64], decoded: NDArray[np.float64]) -> dict[str, float]:
    return {
        "flips": float(((logits > 0) != (decoded > 0)).mean(1).sum()),
        "kl_1": float(binary_kl(logits, decoded).mean(1).sum()),
    }


def _measure_numbers(numbers: NDArray[np.float64], decoded: NDArray[np.float64]) -> dict[str, float]:
    scale = np.maximum(numbers.std(0), 1e-6 * np.abs(numbers).max(0))
    error = np.abs(numbers - decoded) / np.maximum(scale, np.finfo(np.float32).tiny)
    return {"relative_error": float(error.max(1).sum())}


def _measure_embeddings(rows: NDArray[np.float64], decoded: NDArray[np.float64]) -> dict[str, float]:
    is_zero = ~rows.any(1) | ~decoded.any(1)  # which has no direction to lose
    return {"cosine": float(np.where(is_zero, 1.0, cosines(rows, decoded)).sum())}


_MEASURES = {LABELS: _measure_labels, NUMBERS: _measure_numbers, EMBEDDING: _measure_embeddings}


def _log_softmax(z: NDArray[np.floating]) -> NDArray[np.float64]:
    z = z.astype(np.float64)
    z = z - z.max(1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(1, keepdims=True)))
