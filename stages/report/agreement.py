"""Agreement of student and teacher, where the teacher is right and where it is wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from softcache.data.transfer_set import Labels

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """How students predict the rows of a split, by whether their teacher is right.

    Attributes:
        rows: Number of rows where the teacher is right, and where it is wrong.
        right: Of the rows where the teacher is right, the shares (0 … 1) in which the student predicts the same class,
            in which it is right with another class (always 0), and in which it is wrong with another class.
        wrong: The same three shares of the rows where the teacher is wrong.
    """

    rows: tuple[int, int]
    right: tuple[float, float, float]
    wrong: tuple[float, float, float]


def measure_agreement(
    students: Sequence[NDArray[np.floating]], teacher: NDArray[np.floating], labels: Labels
) -> Agreement:
    """Measure the agreement with the teacher, as a mean over seeds.

    Args:
        students: Logits [N, K] of each seed.
        teacher: Logits [N, K].
        labels: [N]; rows with -1 are left out.
    """
    has_label = labels >= 0
    truth, teacher_classes = labels[has_label], teacher.argmax(1)[has_label]
    teacher_is_right = teacher_classes == truth
    student_classes = [logits.argmax(1)[has_label] for logits in students]
    right, wrong = (
        np.mean([_compute_shares(classes[rows], teacher_classes[rows], truth[rows]) for classes in student_classes], 0)
        for rows in (teacher_is_right, ~teacher_is_right)
    )
    count = int(teacher_is_right.sum())
    return Agreement((count, len(truth) - count), tuple(right.tolist()), tuple(wrong.tolist()))


def _compute_shares(student: Labels, teacher: Labels, truth: Labels) -> Floats:
    """Return the three shares of Agreement for some rows; zeros for no row. All [n]."""
    if not len(truth):
        return np.zeros(3)
    is_same = student == teacher
    is_corrected = ~is_same & (student == truth)
    return np.array([is_same.mean(), is_corrected.mean(), (~is_same & ~is_corrected).mean()])
