"""Codecs that store some classes of a row: for many classes, of which a teacher gives nearly all no probability.

A row of 1,000 classes takes 84 bytes with 20 classes, where float16 takes 2,000. What is decoded are logits of all
classes again, so that one training reads every codec.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from softcache.base import rng
from softcache.data.tasks import CLASSES

from .codecs import SAMPLE, TOP, Arrays, Codec, Floats, RowKeys

Stored = Mapping[str, NDArray[np.generic]]
_ABSENT = np.float32(-1e4)  # the logit of a class that was not drawn: its exp is 0, and 0 times it is 0
_WIDEST_UINT16 = 1 << 16  # classes


def make_top_codec(k: int) -> Codec:
    """Make the codec of the k largest logits of a row, and of the probability that all other classes have together.

    Stored are the depths of the k logits below the largest one, in float16, their classes in ascending order, and the
    log-sum-exp of all other logits, in float32. That belongs to the rounded depths: at temperature 1 the probability
    of the others together is exact, whatever float16 costs. They are decoded as equally likely, so at another
    temperature their sum is that of equal logits.

    Of equal logits at the border those of the first classes are stored.

    Source: Wu et al. 2022, "TinyViT" (arXiv 2207.10666, section 3.1), which spreads the rest over the other classes.

    Args:
        k: number of classes, at least 1 and fewer than there are.
    """

    def encode(logits: Floats, keys: RowKeys) -> Arrays:
        n, K = logits.shape
        top = logits.max(1, keepdims=True)
        is_stored = _find_largest(logits, k)
        classes = np.nonzero(is_stored)[1].reshape(n, k)
        depths = np.take_along_axis(logits, classes, 1) - top
        rounded = depths.astype("<f2")
        rest = np.where(is_stored, -np.inf, logits)
        highest = rest.max(1, keepdims=True)
        log_sum = (highest - top) + _log_sum(rest - highest)
        log_sum += _log_sum(rounded.astype(np.float32)) - _log_sum(depths)
        return {
            "logits": rounded,
            "logits_class": classes.astype(_class_dtype(K)),
            "logits_rest": log_sum.astype("<f4"),
        }

    def decode(stored: Stored, K: int) -> Floats:
        classes = _check_classes(stored["logits_class"], K, least_step=1)
        rest = stored["logits_rest"].astype(np.float32) - np.float32(np.log(K - k))
        rest = np.minimum(rest, np.float32(0))  # rounding must not make another class the first
        logits = np.repeat(rest, K, axis=1)
        np.put_along_axis(logits, classes, stored["logits"].astype(np.float32), 1)
        return logits

    return Codec(
        datasets=lambda K: {
            "logits": ((k,), "<f2"),
            "logits_class": ((k,), _class_dtype(K)),
            "logits_rest": ((1,), "<f4"),
        },
        encode=encode,
        decode=decode,
        max_value=30000.0,
        tasks=(CLASSES,),
        kind=TOP,
        min_classes=k + 1,
    )


def make_sample_codec(n: int) -> Codec:
    """Make the codec of n classes drawn from the teacher's distribution at temperature 1.

    Stored are the classes in ascending order, each as often as it was drawn. The target is count / n, whose
    expectation is the probability, of every class. The draws of a row are systematic: one random number u, and class c
    is drawn floor(n C_c + u) - floor(n C_(c-1) + u) times, with C the cumulated probabilities. So a count differs from
    n p by less than 1, which independent draws exceed.

    Source: Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs" (arXiv
        2503.16870), with its proposal at temperature 1; systematic draws: Carpenter, Clifford and Fearnhead 1999,
        "Improved particle filter for nonlinear problems".

    Args:
        n: number of draws, at least 1.
    """

    def encode(logits: Floats, keys: RowKeys) -> Arrays:
        rows, K = logits.shape
        cumulated = np.cumsum(np.exp(logits - logits.max(1, keepdims=True)), 1, dtype=np.float64)
        cumulated *= n / cumulated[:, -1:]
        cumulated += rng.uniform((0,), keys)[:, None]
        below = cumulated.astype(np.int32)
        below[:, -1] = n  # where u, or rounding, has put it beside
        counts = np.diff(np.minimum(below, n, out=below), axis=1, prepend=np.int32(0))
        places = np.flatnonzero(counts)
        drawn = np.repeat(places % K, counts.ravel()[places]).reshape(rows, n)
        return {"logits": drawn.astype(_class_dtype(K))}

    def decode(stored: Stored, K: int) -> Floats:
        drawn = _check_classes(stored["logits"], K, least_step=0)
        logits = np.full((len(drawn), K), _ABSENT)
        places, counts = np.unique(drawn + K * np.arange(len(drawn))[:, None], return_counts=True)
        logits.ravel()[places] = np.log(counts.astype(np.float32) / np.float32(n))
        return logits

    return Codec(
        datasets=lambda K: {"logits": ((n,), _class_dtype(K))},
        encode=encode,
        decode=decode,
        max_value=float(np.finfo(np.float32).max),
        tasks=(CLASSES,),
        kind=SAMPLE,
    )


def _class_dtype(K: int) -> str:
    return "<u2" if K <= _WIDEST_UINT16 else "<u4"


def _find_largest(logits: Floats, k: int) -> NDArray[np.bool_]:
    """Find the k largest logits of each row, of equal ones the first: bool [n, K]."""
    threshold = np.partition(logits, -k, axis=1)[:, -k, None]
    is_largest = logits >= threshold
    for row in np.flatnonzero(is_largest.sum(1) > k):
        is_equal = np.flatnonzero(logits[row] == threshold[row])
        surplus = is_largest[row].sum() - k
        is_largest[row, is_equal[-surplus:]] = False
    return is_largest


def _log_sum(z: Floats) -> NDArray[np.float64]:
    """Compute the log-sum-exp of each row of numbers that are 0 at most, float64 [n, 1]; -inf counts as nothing."""
    total: NDArray[np.float64] = np.exp(z).sum(1, keepdims=True, dtype=np.float64)
    return np.log(total)


def _check_classes(stored: NDArray[np.generic], K: int, least_step: int) -> NDArray[np.int64]:
    """Return stored classes, int64 [n, k].

    Args:
        stored: the classes.
        K: how many there are.
        least_step: from one class of a row to the next, 1 where none is stored twice.

    Raises:
        ValueError: one does not exist, or they are not in ascending order.
    """
    classes = stored.astype(np.int64)
    if classes.size and classes.max() >= K:
        raise ValueError(f"a stored class is {classes.max()}, and there are {K}")
    if (np.diff(classes, axis=1) < least_step).any():
        raise ValueError("the stored classes of a row are not in ascending order")
    return classes
