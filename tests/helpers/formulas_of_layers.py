"""Independent implementations of the losses between layers, by loops and explicit convolutions."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tests.helpers.formulas_of_logits import mean, mean_square
from tests.helpers.tensors import Case

Floats = NDArray[np.float64]


def arrays(case: Case) -> list[tuple[Floats, Floats]]:
    """Return (student's, teacher's) full outputs of each pair of layers."""
    student_layers = list(case.student_layers.values())[: len(case.loss.student_taps())]
    teacher_layers = list(case.teacher_layers.values())[: len(case.loss.teacher_taps())]
    return [(s.detach().numpy(), t.numpy()) for s, t in zip(student_layers, teacher_layers, strict=True)]


def sum_over_pairs(term: Callable[[Case, Floats, Floats], float]) -> Callable[[Case], float]:
    """Return the loss that is the sum of a term over its pairs of layers."""
    return lambda case: math.fsum(term(case, s, t) for s, t in arrays(case))


def weight(layer: nn.Module | torch.Tensor | None, name: str = "") -> Floats:
    """Return a tensor, or the parameter `name` of a layer, as an array."""
    tensor = layer if isinstance(layer, torch.Tensor) else getattr(layer, name)
    array: Floats = tensor.detach().numpy()
    return array


def mean_square_of(a: Floats, b: Floats) -> float:
    return mean_square(torch.from_numpy(np.ascontiguousarray(a)), torch.from_numpy(np.ascontiguousarray(b)))


def unit(x: Floats) -> Floats:
    """Divide a vector by its norm; a vector of zeros stays."""
    norm = math.sqrt(math.fsum(float(v) ** 2 for v in x.ravel()))
    return x / norm if norm else x


def pooled(x: Floats) -> Floats:
    return x if x.ndim == 2 else np.array([[mean(channel.ravel().tolist()) for channel in row] for row in x])


def cells(x: Floats, height: int, width: int) -> Floats:
    """Average over the cells of a grid, with torch's bounds: from floor(i H / h) to ceil((i + 1) H / h)."""
    H, W = x.shape[-2:]
    made = np.empty((*x.shape[:-2], height, width))
    for i, j in itertools.product(range(height), range(width)):
        rows = slice(i * H // height, -(-(i + 1) * H // height))
        made[..., i, j] = x[..., rows, j * W // width : -(-(j + 1) * W // width)].mean((-2, -1))
    return made


def smaller_of(s: Floats, t: Floats) -> tuple[Floats, Floats]:
    """Average both down to the smaller height and width."""
    size = min(s.shape[-2], t.shape[-2]), min(s.shape[-1], t.shape[-1])
    return cells(s, *size), cells(t, *size)


def as_map(x: Floats) -> Floats:
    return x.reshape(*x.shape, 1, 1) if x.ndim == 2 else x


def convolved(x: Floats, kernel: Floats, pad: int = 0) -> Floats:
    """Convolve x [B, I, H, W] with kernel [O, I, h, w], stride 1."""
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    h, w = kernel.shape[2:]
    H, W = x.shape[2] - h + 1, x.shape[3] - w + 1
    made = np.zeros((len(x), len(kernel), H, W))
    for i, j in itertools.product(range(h), range(w)):
        made += np.einsum("oc,bchw->bohw", kernel[:, :, i, j], x[:, :, i : i + H, j : j + W])
    return made


def convolved_up(x: Floats, kernel: Floats) -> Floats:
    """Convolve x with kernel [I, O, 4, 4], transposed, stride 2, padding 1."""
    B, _, H, W = x.shape
    made = np.zeros((B, kernel.shape[1], 2 * H + 2, 2 * W + 2))
    for y, z, i, j in itertools.product(range(H), range(W), range(4), range(4)):
        made[:, :, 2 * y + i, 2 * z + j] += x[:, :, y, z] @ kernel[:, :, i, j]
    return made[:, :, 1:-1, 1:-1]


def normalised(x: Floats, layer: nn.Module) -> Floats:
    """Batch norm in training mode: by mean and variance of the batch."""
    assert isinstance(layer, nn.BatchNorm2d)
    mean_value, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    scale, shift = (weight(layer, name)[:, None, None] for name in ("weight", "bias"))
    made: Floats = (x - mean_value) / np.sqrt(variance + layer.eps) * scale + shift
    return made


def hint(case: Case) -> float:
    total = 0.0
    regressors = list(case.part) if isinstance(case.part, nn.ModuleList) else itertools.repeat(None)
    for r, (s, t) in zip(regressors, arrays(case), strict=False):
        if isinstance(r, nn.Linear):
            s = s @ weight(r, "weight").T + weight(r, "bias")
        elif isinstance(r, nn.Sequential):
            kernel = weight(r[0], "weight")
            s = normalised(
                convolved_up(s, kernel) if isinstance(r[0], nn.ConvTranspose2d) else convolved(s, kernel), r[1]
            )
        total += mean_square_of(s, t)
    return total


def concat_hint(case: Case) -> float:
    student, teacher = (np.concatenate([pooled(x) for x in xs], 1) for xs in zip(*arrays(case), strict=True))
    return mean_square_of(student @ weight(case.part, "weight").T + weight(case.part, "bias"), teacher)


def vid(case: Case) -> float:
    total = 0.0
    assert isinstance(case.part, nn.ModuleList)
    for part, (s, t) in zip(case.part, arrays(case), strict=True):
        s, t = smaller_of(as_map(s), as_map(t))
        for i in (0, 2, 4):
            s = np.einsum("oc,bchw->bohw", weight(part.mean[i], "weight")[:, :, 0, 0], s)
            s = np.maximum(s, 0) if i < 4 else s
        terms = []
        for c, rho in enumerate(weight(part, "rho").ravel().tolist()):
            variance = math.log1p(math.exp(rho)) + 1e-5
            differences = (s[:, c] - t[:, c]).ravel().tolist()
            terms += [0.5 * (d**2 / variance + math.log(variance)) for d in differences]
        total += mean(terms)
    return total


def attention(case: Case, s: Floats, t: Floats) -> float:
    def of(x: Floats) -> Floats:
        return np.array(
            [
                unit(
                    np.array(
                        [
                            [mean((row[:, i, j] ** 2).tolist()) for j in range(row.shape[2])]
                            for i in range(row.shape[1])
                        ]
                    )
                )
                for row in x
            ]
        )

    a, b = smaller_of(of(s), of(t))
    return mean_square_of(np.array([unit(x) for x in a]), np.array([unit(x) for x in b]))


def nst(case: Case, s: Floats, t: Floats) -> float:
    """Squared MMD with the kernel (x'y)², over all pairs of channels of norm 1."""

    def kernel(x: Floats, y: Floats) -> float:
        return mean([float(unit(a).ravel() @ unit(b).ravel()) ** 2 for a in x for b in y])

    return mean([kernel(a, a) + kernel(b, b) - 2 * kernel(a, b) for a, b in zip(s, t, strict=True)])


def similarity(case: Case, s: Floats, t: Floats) -> float:
    def of(x: Floats) -> Floats:
        return np.array([unit(np.array([float(a.ravel() @ b.ravel()) for b in x])) for a in x])

    return math.fsum(((of(s) - of(t)) ** 2).ravel().tolist()) / len(s) ** 2


def huber(x: float) -> float:
    return 0.5 * x**2 if abs(x) < 1 else abs(x) - 0.5


def rkd(case: Case, s: Floats, t: Floats) -> float:
    n = range(len(s))

    def distances(x: Floats) -> list[float]:
        found = [math.dist(x[i], x[j]) for i in n for j in n]
        apart = [d for d in found if d > 0]
        return [d / mean(apart) if apart else 0.0 for d in found]

    def angles(x: Floats) -> list[float]:
        return [float(unit(x[j] - x[i]) @ unit(x[k] - x[i])) for i in n for j in n for k in n]

    s, t = pooled(s), pooled(t)
    by_distance = mean([huber(a - b) for a, b in zip(distances(s), distances(t), strict=True)])
    by_angle = mean([huber(a - b) for a, b in zip(angles(s), angles(t), strict=True)])
    return float(case.loss.distance * by_distance + case.loss.angle * by_angle)


def cosines(x: Floats) -> list[list[float]]:
    rows = [unit(row) for row in pooled(x)]
    return [[math.fsum((a * b).tolist()) for b in rows] for a in rows]


def pkt(case: Case, s: Floats, t: Floats) -> float:
    def of(x: Floats) -> list[float]:
        likes = [[(1 + c) / 2 for c in row] for row in cosines(x)]
        return [like / math.fsum(row) for row in likes for like in row]

    return mean([p * math.log((p + 1e-7) / (q + 1e-7)) for p, q in zip(of(t), of(s), strict=True)])


def cc(case: Case, s: Floats, t: Floats) -> float:
    g = case.loss.gamma

    def of(x: Floats) -> list[float]:
        powers = ((1, 1), (2 * g, 1), ((2 * g) ** 2, 2))
        return [
            math.exp(-2 * g) * math.fsum(a / f * c**p for p, (a, f) in enumerate(powers))
            for row in cosines(x)
            for c in row
        ]

    return math.fsum((a - b) ** 2 for a, b in zip(of(s), of(t), strict=True)) / len(s) ** 2


def srrl(case: Case) -> float:
    ((s, t),) = arrays(case)
    guess = pooled(s) @ weight(case.part.map, "weight").T + weight(case.part.map, "bias")
    logits = guess @ weight(case.teacher_head.weight).T + weight(case.teacher_head.bias)
    assert case.target.logits is not None
    by_outputs = mean_square_of(logits, case.target.logits.numpy())
    return float(case.loss.features * mean_square_of(guess, pooled(t)) + case.loss.outputs * by_outputs)


def cat_kd(case: Case) -> float:
    ((s, t),) = arrays(case)
    a, b = (
        np.einsum("kc,bchw->bkhw", weight(head.weight), cells(x, 2, 2))
        for head, x in ((case.head, s), (case.teacher_head, t))
    )
    return mean_square_of(a, b)


def simkd(case: Case) -> float:
    ((s, t),) = arrays(case)
    return mean_square_of(*smaller_of(as_map(s), as_map(t)))


def crd(case: Case) -> float:
    """With the rows that seed 11 draws. Z is the stored one, or the mean of e over this batch's negatives."""
    torch.manual_seed(11)
    T, rows = case.loss.temperature, case.bank
    drawn = torch.randint(len(rows.index), (case.loss.negatives,)).tolist()
    s, t = (pooled(x) for x in arrays(case)[0])
    student, teacher, stored = (
        [unit(weight(layer, "weight") @ row + weight(layer, "bias")) for row in x]
        for layer, x in (
            (case.part.student, s),
            (case.part.teacher, t),
            (case.part.teacher, rows.features.double().numpy()),
        )
    )
    exponents: list[list[float]] = []
    for i, y in enumerate(case.target.labels.tolist()):
        exponents.append([])
        for j in drawn:
            has_labels = y >= 0 and rows.labels[j] >= 0
            if y != rows.labels[j] if has_labels else case.target.index[i] != rows.index[j]:
                exponents[i].append(float(student[i] @ stored[j]) / T)
    log_z = float(case.part.log_z)
    Z = mean([math.exp(x) for row in exponents for x in row]) if math.isnan(log_z) else math.exp(log_z)
    terms = []
    for i, row in enumerate(exponents):
        e, N = math.exp(float(student[i] @ teacher[i]) / T), max(len(row), 1)
        terms.append(-math.log(e / (e + N * Z)) - math.fsum(math.log(N * Z / (math.exp(x) + N * Z)) for x in row))
    return mean(terms)


def nearest(x: Floats, size: int) -> Floats:
    places = [math.floor(i * x.shape[2] / size) for i in range(size)]
    return x[:, :, places][:, :, :, places]


def review_kd(case: Case) -> float:
    total, deeper = 0.0, None
    for fuse, (s, t) in reversed(list(zip(case.part.fuse, arrays(case), strict=True))):
        s, t = as_map(s), as_map(t)
        x = normalised(convolved(s, weight(fuse.enter[0], "weight")), fuse.enter[1])
        if deeper is not None:
            deeper = nearest(deeper, x.shape[2])
            attention_logits = convolved(np.concatenate([x, deeper], 1), weight(fuse.attend[0], "weight"))
            share = 1 / (1 + np.exp(-(attention_logits + weight(fuse.attend[0], "bias")[:, None, None])))
            x = x * share[:, :1] + deeper * share[:, 1:]
        deeper = x
        out = normalised(convolved(nearest(x, t.shape[2]), weight(fuse.leave[0], "weight"), pad=1), fuse.leave[1])
        smaller = [n for n in (4, 2, 1) if n < out.shape[2]]
        sizes = [(out.shape[2], 1.0), *zip(smaller, (0.5, 0.25, 0.125), strict=False)]
        parts = [share * mean_square_of(cells(out, n, n), cells(t, n, n)) for n, share in sizes]
        total += math.fsum(parts) / math.fsum(share for _, share in sizes)
    return total
