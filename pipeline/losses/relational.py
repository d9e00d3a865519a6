"""Relations: how the rows of a batch, or the places of a map, stand to each other. No trainable parts."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Ramp, to_float
from .feature_base import FeatureLoss

# Norms that rows are divided by. A row of zeros, such as of a dead layer, has a gradient of at most 1e6 so; with the
# usual 1e-12 it was 1e11, enough to end a training.
_LEAST = 1e-6


@dataclass(frozen=True)
class Attention(FeatureLoss):
    """Attention transfer, Zagoruyko and Komodakis 2017 (arXiv 1612.03928, section 3.1).

    loss = sum over the pairs of the mean over rows and places of (q_s - q_t)², q the mean over the channels of F²,
    of norm 1 over the places. Maps of different sizes: the larger attention is averaged down. (The paper writes a
    norm, the common programs this mean; the weight goes with the mean.)
    """

    weight: float | Ramp = 1000.0
    name: ClassVar[str] = "attention"
    statistic: ClassVar[str] = "attention"
    statistic_only: ClassVar[bool] = True

    def pair_loss(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if s.shape != t.shape:
            size = (min(s.shape[1], t.shape[1]), min(s.shape[2], t.shape[2]))
            s, t = F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size)
        # Again of norm 1: after averaging down, and after the teacher's was rounded to float16.
        s, t = (F.normalize(x.flatten(1), dim=1, eps=_LEAST) for x in (s, t))
        return (s - t).square().mean()


@dataclass(frozen=True)
class NST(FeatureLoss):
    """Neuron selectivity transfer, Huang and Wang 2017 (arXiv 1707.01219, equation 7, the kernel (x'y)²).

    loss = sum over the pairs of the mean over rows of |G_s - G_t|², G = F'F / C [HW, HW] with every channel of norm
    1 over the places: the squared maximum mean discrepancy of that kernel. Maps must have the same size.
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
class Similarity(FeatureLoss):
    """Similarity-preserving KD, Tung and Mori 2019 (arXiv 1907.09682, equation 4).

    loss = sum over the pairs of |N(A_s A_s') - N(A_t A_t')|² / B², A the flattened features [B, D], N divides every
    row by its norm.
    """

    weight: float | Ramp = 3000.0
    name: ClassVar[str] = "similarity"

    def pair_loss(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        mine, theirs = (F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1, eps=_LEAST) for x in (s, t))
        return (mine - theirs).square().mean()


@dataclass(frozen=True)
class RKD(FeatureLoss):
    """Relational KD, Park et al. 2019 (arXiv 1904.05068, equations 5 to 10).

    loss = distance l(d_s / m_s, d_t / m_t) + angle l(a_s, a_t), d the Euclidean distances of all pairs of rows, m
    their mean over the pairs that differ, a the cosines of the angles of all triples, l the Huber loss, mean over
    all entries. Memory grows with B² D and B³.
    """

    weight: float | Ramp = 1.0
    distance: float | Ramp = 25.0
    angle: float | Ramp = 50.0
    name: ClassVar[str] = "rkd"
    statistic: ClassVar[str] = "pool"

    def pair_loss(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        s, t = s.flatten(1), t.flatten(1)
        by_distance = F.smooth_l1_loss(_distances(s), _distances(t))
        by_angle = F.smooth_l1_loss(_angles(s), _angles(t))
        return to_float(self.distance) * by_distance + to_float(self.angle) * by_angle


def _distances(x: torch.Tensor) -> torch.Tensor:
    """Euclidean distances [B, B] over their mean. Equal rows have distance 0, and no gradient."""
    square = (x[:, None] - x[None]).square().sum(2)
    differ = square > 0
    d = torch.where(differ, square, 1).sqrt() * differ
    return d / (d.sum() / differ.sum().clamp(min=1)).clamp(min=1e-12)


def _angles(x: torch.Tensor) -> torch.Tensor:
    """Cosines [B, B, B] of the angle at row i between rows j and k; 0, with no gradient, where two are equal."""
    apart = x[None] - x[:, None]
    square = apart.square().sum(2, keepdim=True)
    unit = apart * (torch.where(square > 0, square, 1).rsqrt() * (square > 0))
    return unit @ unit.transpose(1, 2)


@dataclass(frozen=True)
class PKT(FeatureLoss):
    """Probabilistic knowledge transfer, Passalis and Tefas 2018 (arXiv 1803.10837, equations 3 to 6).

    loss = sum over the pairs of the mean over all B² entries of p_t log(p_t / p_s), p the rows of (1 + cosine) / 2
    between the rows of the batch, made to sum to 1; 1e-7 is added inside the logarithm.
    """

    weight: float | Ramp = 30000.0
    name: ClassVar[str] = "pkt"
    statistic: ClassVar[str] = "pool"

    def pair_loss(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        mine, theirs = _affinity(s.flatten(1)), _affinity(t.flatten(1))
        return (theirs * ((theirs + 1e-7) / (mine + 1e-7)).log()).mean()


def _affinity(x: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(x, dim=1, eps=_LEAST)
    kernel = (1 + unit @ unit.T) / 2
    return kernel / kernel.sum(1, keepdim=True).clamp(min=1e-12)


@dataclass(frozen=True)
class CC(FeatureLoss):
    """Correlation congruence, Peng et al. 2019 (arXiv 1904.01802, equations 6 and 9).

    loss = sum over the pairs of |K_s - K_t|² / B², K = exp(-2 g) sum over p = 0 … 2 of (2 g)^p / p! (f_i'f_j)^p, the
    Taylor series of a Gaussian kernel between rows f of norm 1; g is `gamma`.
    """

    weight: float | Ramp = 100.0
    gamma: float | Ramp = 0.4
    name: ClassVar[str] = "cc"
    statistic: ClassVar[str] = "pool"

    def pair_loss(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (self._kernel(s) - self._kernel(t)).square().mean()

    def _kernel(self, x: torch.Tensor) -> torch.Tensor:
        unit, g = F.normalize(x.flatten(1), dim=1, eps=_LEAST), 2 * to_float(self.gamma)
        cosine = unit @ unit.T
        kernel: torch.Tensor = math.exp(-g) * (1 + g * cosine + g**2 / 2 * cosine.square())
        return kernel
