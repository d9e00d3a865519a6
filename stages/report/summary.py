"""What a report says of logits and figures: who agrees with whom, who is worth its size, which rows stand apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr

from softcache.data.transfer_set import Labels
from softcache.pipeline.metrics.classification import log_softmax

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Rows of a split by what teacher and student say of them, means over seeds. right: of rows that the teacher gets
    right, wrong: of those that it gets wrong, the shares in which the student says the same, is right where the
    teacher is not, or is wrong in its own way; rows: how many of each."""

    rows: tuple[int, int]
    right: tuple[float, float, float]
    wrong: tuple[float, float, float]


def measure_agreement(
    students: Sequence[NDArray[np.floating]], teacher: NDArray[np.floating], labels: Labels
) -> Agreement:
    """students: logits [N, K] of each seed; teacher [N, K]; labels [N], -1 for rows that are left out."""
    known = labels >= 0
    truth, said = labels[known], teacher.argmax(1)[known]
    shares: list[list[Floats]] = [[], []]
    for logits in students:
        guess = logits.argmax(1)[known]
        for i, rows in enumerate((said == truth, said != truth)):
            some = guess[rows]
            same, corrected = some == said[rows], (some == truth[rows]) & (some != said[rows])
            shares[i].append(
                np.array([same.mean(), corrected.mean(), (~same & ~corrected).mean()]) if rows.any() else np.zeros(3)
            )
    right, wrong = (tuple(np.mean(one, axis=0).tolist()) for one in shares)
    count = int((said == truth).sum())
    return Agreement((count, len(truth) - count), right, wrong)


def largest_disagreements(
    student: NDArray[np.floating], teacher: NDArray[np.floating], most: int
) -> list[tuple[int, float]]:
    """The rows whose two distributions differ most, and by how much: the Jensen-Shannon divergence (Lin 1991), in
    bits, 0 … 1. student, teacher: logits [N, K]."""
    p, q = np.exp(log_softmax(student)), np.exp(log_softmax(teacher))
    middle = (p + q) / 2
    divergence = (rel_entr(p, middle).sum(1) + rel_entr(q, middle).sum(1)) / 2 / np.log(2)
    order = np.argsort(-divergence, kind="stable")[:most]
    return [(int(row), float(divergence[row])) for row in order]


def find_pareto(cost: Sequence[float], worth: Sequence[float]) -> list[int]:
    """The places of those to which no other is cheaper or as cheap, and better; from cheap to dear."""
    front: list[int] = []
    for i in sorted(range(len(cost)), key=lambda i: (cost[i], -worth[i])):
        if not front or worth[i] > worth[front[-1]]:
            front.append(i)
    return front
