"""The losses on logits once more, row by row and class by class, in plain Python."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch

from tests.helpers.tensors import Case

Row = Sequence[float]


def log_softmax(row: Row, T: float = 1.0) -> list[float]:
    """Of a row / T."""
    top = max(row)
    total = math.log(math.fsum(math.exp((x - top) / T) for x in row))
    return [(x - top) / T - total for x in row]


def softmax(row: Row, T: float = 1.0) -> list[float]:
    return [math.exp(x) for x in log_softmax(row, T)]


def divergence(log_p: Row, log_q: Row) -> float:
    """KL(p || q)."""
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def cross(p: Row, log_q: Row) -> float:
    """The cross entropy -sum p log q."""
    return -math.fsum(a * b for a, b in zip(p, log_q, strict=True))


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def mean_square(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return mean([(a - b) ** 2 for a, b in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True)])


def z_scored(row: Row) -> list[float]:
    middle = mean(row)
    spread = math.sqrt(math.fsum((x - middle) ** 2 for x in row) / (len(row) - 1))
    return [(x - middle) / (spread + 1e-7) for x in row]


def both(case: Case) -> list[tuple[list[float], list[float]]]:
    """(student's row, teacher's row) of logits, z-scored where the loss says so."""
    assert case.target.logits is not None
    rows = list(zip(case.logits.tolist(), case.target.logits.tolist(), strict=True))
    if getattr(case.loss, "standardize", False):
        return [(z_scored(s), z_scored(t)) for s, t in rows]
    return rows


def labels(case: Case) -> list[int]:
    return [int(label) for label in case.target.labels]


def with_label(case: Case, label: int, row: Row, smoothing: float = 0.0) -> float:
    """Cross entropy of a row with a label."""
    wanted = [(1 - smoothing) * (c == label) + smoothing / len(row) for c in range(len(row))]
    return cross(wanted, log_softmax(row))


def hard(case: Case) -> float:
    rows = [
        with_label(case, y, row, case.loss.smoothing)
        for y, row in zip(labels(case), case.logits.tolist(), strict=True)
        if y >= 0
    ]
    return mean(rows) if rows else 0.0


def tf_kd(case: Case) -> float:
    T, right, found = case.loss.temperature, case.loss.correct, []
    for y, row in zip(labels(case), case.logits.tolist(), strict=True):
        if y >= 0:
            p = [right if c == y else (1 - right) / (len(row) - 1) for c in range(len(row))]
            found.append(T**2 * divergence(log_softmax([math.log(x) for x in p], T), log_softmax(row, T)))
    return mean(found) if found else 0.0


def kd(case: Case) -> float:
    return kd_at(case, case.loss.temperature)


def kd_at(case: Case, T: float) -> float:
    return mean([T**2 * divergence(log_softmax(t, T), log_softmax(s, T)) for s, t in both(case)])


def logit_mse(case: Case) -> float:
    return mean([(a - b) ** 2 for s, t in both(case) for a, b in zip(s, t, strict=True)])


def output(case: Case) -> float:
    T = case.loss.temperature
    if case.loss.kind == "soft_ce":
        return mean([T**2 * cross(softmax(t, T), log_softmax(s, T)) for s, t in both(case)])
    return logit_mse(case) if case.loss.kind == "mse" else kd_at(case, T)


def chosen(case: Case) -> list[int]:
    """The label, or the class that the teacher chose."""
    assert case.target.logits is not None
    said = case.target.logits.tolist()
    return [y if y >= 0 else row.index(max(row)) for y, row in zip(labels(case), said, strict=True)]


def without(row: Row, y: int) -> list[float]:
    return [x for c, x in enumerate(row) if c != y]


def target_and_rest(row: Row, y: int, T: float) -> list[float]:
    """log p_y and log of the sum of all the others."""
    p = softmax(row, T)
    return [math.log(p[y]), math.log(math.fsum(without(p, y)))]


def dkd(case: Case) -> float:
    T, found = case.loss.temperature, []
    for y, (s, t) in zip(chosen(case), both(case), strict=True):
        of_target = divergence(target_and_rest(t, y, T), target_and_rest(s, y, T))
        of_rest = divergence(log_softmax(without(t, y), T), log_softmax(without(s, y), T))
        found.append(T**2 * (case.loss.target * of_target + case.loss.nontarget * of_rest))
    return mean(found)


def nkd(case: Case) -> float:
    T, found = case.loss.temperature, []
    for y, (s, t) in zip(chosen(case), both(case), strict=True):
        of_target = -softmax(t)[y] * log_softmax(s)[y]
        of_rest = cross(softmax(without(t, y), T), log_softmax(without(s, y), T))
        found.append(case.loss.target * of_target + case.loss.nontarget * T**2 * of_rest)
    return mean(found)


def correlation(a: Row, b: Row) -> float:
    """Pearson's, 0 for a row that is constant."""
    u, v = [x - mean(a) for x in a], [x - mean(b) for x in b]
    size = math.sqrt(math.fsum(x * x for x in u)) * math.sqrt(math.fsum(x * x for x in v))
    return math.fsum(x * y for x, y in zip(u, v, strict=True)) / size if size else 0.0


def dist(case: Case) -> float:
    T = case.loss.temperature
    s, t = ([softmax(row, T) for row in rows] for rows in zip(*both(case), strict=True))
    between = 1 - mean([correlation(a, b) for a, b in zip(s, t, strict=True)])
    columns = zip(zip(*s, strict=True), zip(*t, strict=True), strict=True)
    within = 1 - mean([correlation(a, b) for a, b in columns])
    return T**2 * (case.loss.between * between + case.loss.within * within)


def wsld(case: Case) -> float:
    T, found = case.loss.temperature, []
    for y, (s, t) in zip(labels(case), both(case), strict=True):
        if y >= 0:
            share = 1 - math.exp(-with_label(case, y, s) / (with_label(case, y, t) + 1e-7))
            found.append(share * T**2 * cross(softmax(t, T), log_softmax(s, T)))
    return mean(found) if found else 0.0


def ctkd(case: Case) -> float:
    theta = float(case.part.theta.detach())
    return kd_at(case, case.loss.start + case.loss.span / (1 + math.exp(-theta)))


def adjusted(case: Case, weights: Row) -> float:
    """Cross entropy of probabilities that are multiplied by weights and normalised again."""
    found = []
    for y, row in zip(labels(case), case.logits.tolist(), strict=True):
        if y >= 0:
            p = reweighed(softmax(row), weights)
            found.append(-math.log(p[y]))
    return mean(found) if found else 0.0


def reweighed(p: Row, weights: Row) -> list[float]:
    parts = [a * b for a, b in zip(p, weights, strict=True)]
    return [x / math.fsum(parts) for x in parts]


def counts(case: Case) -> list[int]:
    assert case.context.counts is not None
    return [int(n) for n in case.context.counts]


def logit_adjusted(case: Case) -> float:
    n = counts(case)
    return adjusted(case, [(x / sum(n)) ** case.loss.tau for x in n])


def balanced_softmax(case: Case) -> float:
    return adjusted(case, counts(case))


def to_another_teacher(case: Case, change: Callable[[list[float]], list[float]]) -> float:
    """T² KL of the teacher's softened probabilities, changed, with the student's."""
    T, found = case.loss.temperature, []
    for s, t in both(case):
        p = change(softmax(t, T))
        found.append(T**2 * divergence([math.log(x) for x in p], log_softmax(s, T)))
    return mean(found)


def balanced_kd(case: Case) -> float:
    """Weights in fractions: 1 - beta^n loses its last digits otherwise."""
    beta = Fraction(case.loss.beta)
    weights = [float((1 - beta) / (1 - beta**n)) for n in counts(case)]
    return to_another_teacher(case, lambda p: reweighed(p, weights))


def dive(case: Case) -> float:
    def flatter(p: list[float]) -> list[float]:
        return reweighed([x**case.loss.power for x in p], [1.0] * len(p))

    return to_another_teacher(case, flatter)


def soft_f1(case: Case) -> float:
    """From a table of probable counts: rows are the labels' classes, columns the student's."""
    K = case.logits.shape[1]
    table = [[0.0] * K for _ in range(K)]
    for shares, row in zip(label_shares(case), case.logits.tolist(), strict=True):
        for y, share in shares.items():
            table[y] = [a + share * b for a, b in zip(table[y], softmax(row), strict=True)]
    n = [math.fsum(row) for row in table]
    said = [math.fsum(row[c] for row in table) for c in range(K)]
    if not math.fsum(n):
        return 0.0
    f1 = {c: 2 * table[c][c] / (said[c] + n[c] + 1e-8) for c in range(K) if n[c]}
    if case.loss.average == "macro":
        return 1 - mean(list(f1.values()))
    if case.loss.average == "weighted":
        return 1 - math.fsum(n[c] * f1[c] for c in f1) / math.fsum(n)
    return 1 - 2 * math.fsum(table[c][c] for c in range(K)) / (math.fsum(said) + math.fsum(n))


def label_shares(case: Case) -> list[dict[int, float]]:
    """{class: share} of every row, empty where a label is hidden."""
    own, target = labels(case), case.target
    if target.partner is None or target.share is None:
        return [{y: 1.0} if y >= 0 else {} for y in own]
    found = []
    for y, other, share in zip(own, target.partner.tolist(), target.share.tolist(), strict=True):
        parts: dict[int, float] = {}
        for label, part in ((y, share), (other, 1 - share)):
            parts[label] = parts.get(label, 0.0) + part
        found.append(parts if min(y, other) >= 0 else {})
    return found


def multi_temperature(case: Case) -> float:
    total = 0.0
    for T in map(float, case.loss.temperatures.split("+")):
        s, t = ([softmax(row, T) for row in rows] for rows in zip(*both(case), strict=True))
        total += kd_at(case, T) + case.loss.batch * grams(s, t)
        total += case.loss.classes * grams(list(zip(*s, strict=True)), list(zip(*t, strict=True)))
    return total


def grams(s: Sequence[Row], t: Sequence[Row]) -> float:
    """sum over all pairs of rows of (s_i s_j - t_i t_j)², over the number of rows."""
    a, b = np.array(s), np.array(t)
    return float(((a @ a.T - b @ b.T) ** 2).sum()) / len(a)
