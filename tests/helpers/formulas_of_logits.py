"""Independent implementations of the losses on logits: row by row and class by class, in plain Python."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch

from tests.helpers.tensors import Case

Row = Sequence[float]


def log_softmax(row: Row, T: float = 1.0) -> list[float]:
    """Return the log softmax of a row / T."""
    top = max(row)
    total = math.log(math.fsum(math.exp((x - top) / T) for x in row))
    return [(x - top) / T - total for x in row]


def softmax(row: Row, T: float = 1.0) -> list[float]:
    return [math.exp(x) for x in log_softmax(row, T)]


def divergence(log_p: Row, log_q: Row) -> float:
    """KL(p || q)."""
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def cross(p: Row, log_q: Row) -> float:
    """Return the cross entropy -sum p log q."""
    return -math.fsum(a * b for a, b in zip(p, log_q, strict=True))


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def mean_square(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the mean of (x - y)²."""
    assert x.shape == y.shape
    return mean([(a - b) ** 2 for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)])


def z_scored(row: Row) -> list[float]:
    m = mean(row)
    deviation = math.sqrt(math.fsum((x - m) ** 2 for x in row) / (len(row) - 1))
    return [(x - m) / (deviation + 1e-7) for x in row]


def logit_pairs(case: Case) -> list[tuple[list[float], list[float]]]:
    """Return (student's row, teacher's row) of logits, z-scored where the loss standardizes."""
    assert case.target.logits is not None
    rows = list(zip(case.logits.tolist(), case.target.logits.tolist(), strict=True))
    if getattr(case.loss, "standardize", False):
        return [(z_scored(s), z_scored(t)) for s, t in rows]
    return rows


def labels(case: Case) -> list[int]:
    return [int(label) for label in case.target.labels]


def label_cross_entropy(case: Case, label: int, row: Row, smoothing: float = 0.0) -> float:
    """Return the cross entropy of a row with a label."""
    target = [(1 - smoothing) * (c == label) + smoothing / len(row) for c in range(len(row))]
    return cross(target, log_softmax(row))


def hard(case: Case) -> float:
    rows = [
        label_cross_entropy(case, y, row, case.loss.smoothing)
        for y, row in zip(labels(case), case.logits.tolist(), strict=True)
        if y >= 0
    ]
    return mean(rows) if rows else 0.0


def tf_kd(case: Case) -> float:
    T, right, terms = case.loss.temperature, case.loss.correct, []
    for y, row in zip(labels(case), case.logits.tolist(), strict=True):
        if y >= 0:
            p = [right if c == y else (1 - right) / (len(row) - 1) for c in range(len(row))]
            terms.append(T**2 * divergence(log_softmax([math.log(x) for x in p], T), log_softmax(row, T)))
    return mean(terms) if terms else 0.0


def kd(case: Case) -> float:
    return kd_at(case, case.loss.temperature)


def kd_at(case: Case, T: float) -> float:
    return mean([T**2 * divergence(log_softmax(t, T), log_softmax(s, T)) for s, t in logit_pairs(case)])


def logit_mse(case: Case) -> float:
    return mean([(a - b) ** 2 for s, t in logit_pairs(case) for a, b in zip(s, t, strict=True)])


def output(case: Case) -> float:
    T = case.loss.temperature
    if case.loss.kind == "soft_ce":
        return mean([T**2 * cross(softmax(t, T), log_softmax(s, T)) for s, t in logit_pairs(case)])
    return logit_mse(case) if case.loss.kind == "mse" else kd_at(case, T)


def target_classes(case: Case) -> list[int]:
    """Return the label of each row, or the teacher's top-1 class where it is hidden."""
    assert case.target.logits is not None
    teacher_rows = case.target.logits.tolist()
    return [y if y >= 0 else row.index(max(row)) for y, row in zip(labels(case), teacher_rows, strict=True)]


def without(row: Row, y: int) -> list[float]:
    return [x for c, x in enumerate(row) if c != y]


def target_and_rest(row: Row, y: int, T: float) -> list[float]:
    """Return log p_y and the log of the sum of all other probabilities."""
    p = softmax(row, T)
    return [math.log(p[y]), math.log(math.fsum(without(p, y)))]


def dkd(case: Case) -> float:
    T, terms = case.loss.temperature, []
    for y, (s, t) in zip(target_classes(case), logit_pairs(case), strict=True):
        of_target = divergence(target_and_rest(t, y, T), target_and_rest(s, y, T))
        of_rest = divergence(log_softmax(without(t, y), T), log_softmax(without(s, y), T))
        terms.append(T**2 * (case.loss.target * of_target + case.loss.nontarget * of_rest))
    return mean(terms)


def nkd(case: Case) -> float:
    T, terms = case.loss.temperature, []
    for y, (s, t) in zip(target_classes(case), logit_pairs(case), strict=True):
        of_target = -softmax(t)[y] * log_softmax(s)[y]
        of_rest = cross(softmax(without(t, y), T), log_softmax(without(s, y), T))
        terms.append(case.loss.target * of_target + case.loss.nontarget * T**2 * of_rest)
    return mean(terms)


def correlation(a: Row, b: Row) -> float:
    """Return Pearson's correlation; 0 for a constant row."""
    u, v = [x - mean(a) for x in a], [x - mean(b) for x in b]
    size = math.sqrt(math.fsum(x * x for x in u)) * math.sqrt(math.fsum(x * x for x in v))
    return math.fsum(x * y for x, y in zip(u, v, strict=True)) / size if size else 0.0


def dist(case: Case) -> float:
    T = case.loss.temperature
    s, t = ([softmax(row, T) for row in rows] for rows in zip(*logit_pairs(case), strict=True))
    between = 1 - mean([correlation(a, b) for a, b in zip(s, t, strict=True)])
    columns = zip(zip(*s, strict=True), zip(*t, strict=True), strict=True)
    within = 1 - mean([correlation(a, b) for a, b in columns])
    return T**2 * (case.loss.between * between + case.loss.within * within)


def wsld(case: Case) -> float:
    T, terms = case.loss.temperature, []
    for y, (s, t) in zip(labels(case), logit_pairs(case), strict=True):
        if y >= 0:
            share = 1 - math.exp(-label_cross_entropy(case, y, s) / (label_cross_entropy(case, y, t) + 1e-7))
            terms.append(share * T**2 * cross(softmax(t, T), log_softmax(s, T)))
    return mean(terms) if terms else 0.0


def ctkd(case: Case) -> float:
    theta = float(case.part.theta.detach())
    return kd_at(case, case.loss.start + case.loss.span / (1 + math.exp(-theta)))


def adjusted(case: Case, weights: Row) -> float:
    """Return the cross entropy of probabilities that are multiplied by weights and normalised again."""
    terms = []
    for y, row in zip(labels(case), case.logits.tolist(), strict=True):
        if y >= 0:
            p = reweighed(softmax(row), weights)
            terms.append(-math.log(p[y]))
    return mean(terms) if terms else 0.0


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


def kd_from_changed_teacher(case: Case, change: Callable[[list[float]], list[float]]) -> float:
    """Return T² KL of the teacher's softened probabilities, after a change, with the student's."""
    T, terms = case.loss.temperature, []
    for s, t in logit_pairs(case):
        p = change(softmax(t, T))
        terms.append(T**2 * divergence([math.log(x) for x in p], log_softmax(s, T)))
    return mean(terms)


def balanced_kd(case: Case) -> float:
    """With weights in fractions, because 1 - beta^n loses its last digits in floating point."""
    beta = Fraction(case.loss.beta)
    weights = [float((1 - beta) / (1 - beta**n)) for n in counts(case)]
    return kd_from_changed_teacher(case, lambda p: reweighed(p, weights))


def dive(case: Case) -> float:
    def flatter(p: list[float]) -> list[float]:
        return reweighed([x**case.loss.power for x in p], [1.0] * len(p))

    return kd_from_changed_teacher(case, flatter)


def soft_f1(case: Case) -> float:
    """From a soft confusion matrix: rows are the classes of the labels, columns those of the student."""
    K = case.logits.shape[1]
    table = [[0.0] * K for _ in range(K)]
    for shares, row in zip(label_shares(case), case.logits.tolist(), strict=True):
        for y, share in shares.items():
            table[y] = [a + share * b for a, b in zip(table[y], softmax(row), strict=True)]
    n = [math.fsum(row) for row in table]
    predicted = [math.fsum(row[c] for row in table) for c in range(K)]
    if not math.fsum(n):
        return 0.0
    f1 = {c: 2 * table[c][c] / (predicted[c] + n[c] + 1e-8) for c in range(K) if n[c]}
    if case.loss.average == "macro":
        return 1 - mean(list(f1.values()))
    if case.loss.average == "weighted":
        return 1 - math.fsum(n[c] * f1[c] for c in f1) / math.fsum(n)
    return 1 - 2 * math.fsum(table[c][c] for c in range(K)) / (math.fsum(predicted) + math.fsum(n))


def label_shares(case: Case) -> list[dict[int, float]]:
    """Return {class: share} of every row; empty where a label is hidden."""
    first_labels, target = labels(case), case.target
    if target.partner is None or target.share is None:
        return [{y: 1.0} if y >= 0 else {} for y in first_labels]
    shares = []
    for y, other, share in zip(first_labels, target.partner.tolist(), target.share.tolist(), strict=True):
        parts: dict[int, float] = {}
        for label, part in ((y, share), (other, 1 - share)):
            parts[label] = parts.get(label, 0.0) + part
        shares.append(parts if min(y, other) >= 0 else {})
    return shares


def multi_temperature(case: Case) -> float:
    """Only the KL divergence reads standardised logits."""
    assert case.target.logits is not None
    raw, total = (case.logits.tolist(), case.target.logits.tolist()), 0.0
    for T in map(float, case.loss.temperatures.split("+")):
        s, t = ([softmax(row, T) for row in rows] for rows in raw)
        total += kd_at(case, T) + case.loss.batch * grams(s, t)
        total += case.loss.classes * grams(list(zip(*s, strict=True)), list(zip(*t, strict=True)))
    return total


def grams(s: Sequence[Row], t: Sequence[Row]) -> float:
    """Return the sum over all pairs of rows of (s_i s_j - t_i t_j)², divided by the number of rows."""
    a, b = np.array(s), np.array(t)
    return float(((a @ a.T - b @ b.T) ** 2).sum()) / len(a)
