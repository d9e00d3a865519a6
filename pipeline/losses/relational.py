"""Losses on relations between the rows of a batch, or between the positions of a map. They have no trainable parts."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Ramp, to_float
from .feature_base import FeatureLoss, RelationalLoss

# The least norm that a row is divided by. With it, a row of zeros (a dead layer) has a gradient of at most 1e6; with
# the usual 1e-12 the gradient was 1e11, enough to make a training diverge.
_LEAST_NORM = 1e-6


@dataclass(frozen=True)
class Attention(FeatureLoss):
    """Attention transfer, Zagoruyko and Komodakis 2017 (arXiv 1612.03928, section 3.1).

    loss = sum over the pairs of the mean over rows and positions of (q_s - q_t)², q the mean over the channels of F²,
    normalised to norm 1 over the positions. The larger attention map of two of different sizes is averaged down. The
    paper has a norm where common programs have this mean; the default weight is for the mean.

    Args:
        weight: factor of the term in the sum of losses.
        teacher: taps of the teacher joined by +, such as `layer1+layer2`.
        student: layers of the student joined by +, as many; "" where they have the same names.

    Source: Zagoruyko and Komodakis 2017, "Paying More Attention to Attention: Improving the Performance of
        Convolutional Neural Networks via Attention Transfer" (arXiv 1612.03928, section 3.1).
    """

    weight: float | Ramp = 1000.0
    name: ClassVar[str] = "attention"
    statistic: ClassVar[str] = "attention"
    statistic_only: ClassVar[bool] = True

    def pair_loss(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if s.shape != t.shape:
            size = (min(s.shape[1], t.shape[1]), min(s.shape[2], t.shape[2]))
            s, t = F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size)
        # Normalised again: averaging down and the rounding of the teacher's map to float16 change the norm.
        s, t = (F.normalize(x.flatten(1), dim=1, eps=_LEAST_NORM) for x in (s, t))
        return (s - t).square().mean()


@dataclass(frozen=True)
class NST(FeatureLoss):
    """Neuron selectivity transfer, Huang and Wang 2017 (arXiv 1707.01219, equation 7, the kernel (x'y)²).

    loss = sum over the pairs of the mean over rows of |G_s - G_t|², G = F'F / C [HW, HW] with every channel of norm
    1 over the positions: the squared maximum mean discrepancy of that kernel. Maps must have the same size.

    Args:
        weight: factor of the term in the sum of losses.
        teacher: taps of the teacher joined by +, such as `layer1+layer2`.
        student: layers of the student joined by +, as many; "" where they have the same names.

    Source: Huang and Wang 2017, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer" (arXiv
        1707.01219, equation 7).
    """

    weight: float | Ramp = 50.0
    name: ClassVar[str] = "nst"
    statistic: ClassVar[str] = "gram"
    statistic_only: ClassVar[bool] = True

    def pair_loss(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if s.shape != t.shape:
            raise self.shape_error(s, t, "choose layers whose maps have the same size")
        return (s - t).square().sum((1, 2)).mean()


@dataclass(frozen=True)
class Similarity(RelationalLoss):
    """Similarity-preserving KD, Tung and Mori 2019 (arXiv 1907.09682, equation 4).

    loss = sum over the pairs of |N(A_s A_s') - N(A_t A_t')|² / B², A the flattened features [B, D], N divides every
    row by its norm.

    Args:
        weight: factor of the term in the sum of losses.
        teacher: taps of the teacher joined by +, such as `layer1+layer2`; "" for the outputs of the task "embedding".
        student: layers of the student joined by +, as many; "" where they have the same names.

    Source: Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation" (arXiv 1907.09682, equation 4).
    """

    weight: float | Ramp = 3000.0
    name: ClassVar[str] = "similarity"

    def pair_loss(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        n_s, n_t = (F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1, eps=_LEAST_NORM) for x in (s, t))
        return (n_s - n_t).square().mean()


@dataclass(frozen=True)
class RKD(RelationalLoss):
    """Relational KD, Park et al. 2019 (arXiv 1904.05068, equations 5 to 10).

    loss = distance l(d_s / m_s, d_t / m_t) + angle l(a_s, a_t), d the Euclidean distances of all pairs of rows, m
    their mean over the pairs that differ, a the cosines of the angles of all triples, l the Huber loss, mean over
    all entries. Memory grows with B² D and B³.

    Args:
        weight: factor of the term in the sum of losses.
        distance: factor of the part of the distances.
        angle: factor of the part of the angles.
        teacher: taps of the teacher joined by +, such as `layer1+layer2`; "" for the outputs of the task "embedding".
        student: layers of the student joined by +, as many; "" where they have the same names.

    Source: Park et al. 2019, "Relational Knowledge Distillation" (arXiv 1904.05068, equations 5 to 10).
    """

    weight: float | Ramp = 1.0
    distance: float | Ramp = 25.0
    angle: float | Ramp = 50.0
    name: ClassVar[str] = "rkd"
    statistic: ClassVar[str] = "pool"

    def is_zero(self, classes: int) -> bool:
        return to_float(self.distance) == to_float(self.angle) == 0

    def pair_loss(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        s, t = s.flatten(1), t.flatten(1)
        distance_term = F.smooth_l1_loss(_relative_distances(s), _relative_distances(t))
        angle_term = F.smooth_l1_loss(_angle_cosines(s), _angle_cosines(t))
        return to_float(self.distance) * distance_term + to_float(self.angle) * angle_term


def _relative_distances(x: torch.Tensor) -> torch.Tensor:
    """Compute Euclidean distances [B, B] divided by their mean. Equal rows have distance 0 and no gradient."""
    square = (x[:, None] - x[None]).square().sum(2)
    is_different = square > 0
    d = torch.where(is_different, square, 1).sqrt() * is_different
    return d / (d.sum() / is_different.sum().clamp(min=1)).clamp(min=1e-12)


def _angle_cosines(x: torch.Tensor) -> torch.Tensor:
    """Compute the cosine [B, B, B] of the angle at row i between rows j and k; 0 without gradient for equal rows."""
    difference = x[None] - x[:, None]
    square = difference.square().sum(2, keepdim=True)
    unit = difference * (torch.where(square > 0, square, 1).rsqrt() * (square > 0))
    return unit @ unit.transpose(1, 2)


@dataclass(frozen=True)
class PKT(RelationalLoss):
    """Probabilistic knowledge transfer, Passalis and Tefas 2018 (arXiv 1803.10837, equations 3 to 6).

    loss = sum over the pairs of the mean over all B² entries of p_t log(p_t / p_s), p the rows of (1 + cosine) / 2
    between the rows of the batch, normalised to sum 1; 1e-7 is added inside the logarithm.

    Args:
        weight: factor of the term in the sum of losses.
        teacher: taps of the teacher joined by +, such as `layer1+layer2`; "" for the outputs of the task "embedding".
        student: layers of the student joined by +, as many; "" where they have the same names.

    Source: Passalis and Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge Transfer" (arXiv
        1803.10837, equations 3 to 6).
    """

    weight: float | Ramp = 30000.0
    name: ClassVar[str] = "pkt"
    statistic: ClassVar[str] = "pool"

    def pair_loss(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        p_s, p_t = _affinities(s.flatten(1)), _affinities(t.flatten(1))
        return (p_t * ((p_t + 1e-7) / (p_s + 1e-7)).log()).mean()


def _affinities(x: torch.Tensor) -> torch.Tensor:
    """Compute (1 + cosine) / 2 between the rows of x [B, D], each row [B] normalised to sum 1."""
    unit = F.normalize(x, dim=1, eps=_LEAST_NORM)
    kernel = (1 + unit @ unit.T) / 2
    return kernel / kernel.sum(1, keepdim=True).clamp(min=1e-12)


@dataclass(frozen=True)
class CC(RelationalLoss):
    """Correlation congruence, Peng et al. 2019 (arXiv 1904.01802, equations 6 and 9).

    loss = sum over the pairs of |K_s - K_t|² / B², K = exp(-2 g) sum over p = 0 … 2 of (2 g)^p / p! (f_i'f_j)^p, the
    Taylor series of a Gaussian kernel between rows f normalised to norm 1; g is `gamma`.

    Args:
        weight: factor of the term in the sum of losses.
        gamma: g, from 0 on.
        teacher: taps of the teacher joined by +, such as `layer1+layer2`; "" for the outputs of the task "embedding".
        student: layers of the student joined by +, as many; "" where they have the same names.

    Source: Peng et al. 2019, "Correlation Congruence for Knowledge Distillation" (arXiv 1904.01802, equations 6 and
        9).
    """

    weight: float | Ramp = 100.0
    gamma: float | Ramp = 0.4
    name: ClassVar[str] = "cc"
    statistic: ClassVar[str] = "pool"

    def is_zero(self, classes: int) -> bool:
        return to_float(self.gamma) == 0  # every entry of the kernels is 1 then

    def pair_loss(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (self._kernel(s) - self._kernel(t)).square().mean()

    def _kernel(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the kernel [B, B] between the rows of x [B, …]."""
        unit, g = F.normalize(x.flatten(1), dim=1, eps=_LEAST_NORM), 2 * to_float(self.gamma)
        cosine = unit @ unit.T
        kernel: torch.Tensor = math.exp(-g) * (1 + g * cosine + g**2 / 2 * cosine.square())
        return kernel
