"""Several teachers' logits -> one teacher's."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from softcache.base.errors import UsageError, unknown_name_error

from .distribution_map import Floats, OnStep, minimize_convex

Rows = NDArray[np.int64]
# Rows of ALL give one distribution; with those of EACH a student hears every teacher by itself.
SINGLE_OUTPUT = ("mean_probability", "mean_logit", "geometric", "weighted", "vote", "learned")
PER_TEACHER = ("per_teacher", "ca_mkd")
_LOG_T = (-3, 3)  # bounds of the logarithms of learned temperatures
_TIE = 1e-3  # of a vote: what the mean probability weighs beside it, so that it decides ties and nothing is impossible


@dataclass(frozen=True)
class Combination:
    """How M teachers become one. weights [M] add up to 1; temperatures [M] divide each one's logits."""

    name: str
    weights: tuple[float, ...]
    temperatures: tuple[float, ...]

    @property
    def is_per_teacher(self) -> bool:
        """Whether losses are led by every teacher by itself."""
        return self.name in PER_TEACHER

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [N, M, K] -> log-probabilities, or mean logits, [N, K]; the mean probability for those of EACH."""
        if self.name == "mean_logit":
            return logits.mean(1)
        scale = logits.new_tensor(self.temperatures)[None, :, None]
        log_p = F.log_softmax(logits / scale, dim=2)
        if self.name == "geometric":
            return log_p.mean(1)
        weights = logits.new_tensor(self.weights)
        mean = (log_p + weights.log()[None, :, None]).logsumexp(1)
        if self.name == "vote":
            votes = F.one_hot(logits.argmax(2), logits.shape[2]).to(logits.dtype).mean(1)
            return (((1 - _TIE) * votes).log().logaddexp(mean + math.log(_TIE))).to(logits.dtype)
        return mean

    def to_json(self) -> dict[str, Any]:
        return {"combine": self.name, "weights": list(self.weights), "temperatures": list(self.temperatures)}

    @staticmethod
    def from_json(record: dict[str, Any]) -> "Combination":
        """Raises ValueError, TypeError or KeyError for what is none."""
        weights, temperatures = (tuple(float(x) for x in record[name]) for name in ("weights", "temperatures"))
        if record["combine"] not in (*SINGLE_OUTPUT, *PER_TEACHER) or len(weights) != len(temperatures) or not weights:
            raise ValueError("no way to combine")
        _check_weights("weights", weights)
        if not all(0 < t < math.inf for t in temperatures):
            raise ValueError("temperatures that are not positive")
        return Combination(record["combine"], weights, temperatures)


def parse_combination(spec: str, members: int) -> Combination:
    """`mean_probability`, `weighted:0.7,0.3` … for so many teachers. Raises UsageError.

    mean_probability: the mean of their probabilities, as Hinton et al. 2015 (arXiv 1503.02531, section 3) and Stanton
    et al. 2021 reduce an ensemble; mean_logit; geometric: the normalised product, which at every temperature is the
    distribution of mean_logit, with logits that are log-probabilities; weighted: a mean of probabilities with weights;
    vote: shares of first classes, ties and what nobody voted for by the mean probability; learned: see fit_combine;
    per_teacher: the mean of the losses by each; ca_mkd: see trust.
    """
    name, _, rest = spec.partition(":")
    if name not in (*SINGLE_OUTPUT, *PER_TEACHER):
        raise unknown_name_error("way to combine", name, (*SINGLE_OUTPUT, *PER_TEACHER))
    weights = (1 / members,) * members
    if rest and name != "weighted":
        raise UsageError(f"--combine {spec}: {name} has no knobs")
    if name == "weighted" and not rest:
        raise UsageError("--combine weighted: it wants a weight for each cache, such as weighted:0.7,0.3")
    if rest:
        try:
            weights = tuple(float(text) for text in rest.split(","))
        except ValueError:
            raise UsageError(f"--combine {spec}: {rest} are not numbers") from None
        if len(weights) != members:
            raise UsageError(f"--combine {spec}: {len(weights)} weights for {members} caches")
        _check_weights(f"--combine {spec}", weights)
    return Combination(name, weights, (1.0,) * members)


def _check_weights(what: str, weights: tuple[float, ...]) -> None:
    if not all(0 <= w <= 1 for w in weights) or abs(sum(weights) - 1) > 1e-6:
        raise UsageError(f"{what}: weights are from 0 to 1 and add up to 1, these to {sum(weights):g}")


def fit_combination(logits: NDArray[np.floating], labels: Rows, stepped: OnStep = lambda: None) -> Combination:
    """The blend sum_k w_k softmax(z_k / T_k) with the least NLL on validation. logits [N, M, K]; labels [N]; stepped:
    called after each step of the fit.

    The weights alone are a convex problem. It is solved twice, at T = 1 and at each member's own best temperature: a
    member that is badly calibrated gets no weight at T = 1, and without weight its temperature would never be found.
    From both, weights and temperatures together, because teachers that are each right in their confidence are too
    careful when they are averaged. No member, with or without a temperature, and no mean of members is better.
    Raises UsageError without labels.
    """
    known = labels >= 0
    if not known.any():
        raise UsageError("--combine learned is fitted to validation labels, and these images have none")
    z, y = torch.from_numpy(logits[known].astype(np.float64)), torch.from_numpy(labels[known])
    M = z.shape[1]

    def nll(x: torch.Tensor) -> torch.Tensor:
        """x [2 M]: weights, then logarithms of temperatures."""
        at_label = F.log_softmax(z / x[M:].exp()[None, :, None], dim=2)[torch.arange(len(y)), :, y]
        return -(at_label + x[:M].clamp(min=1e-12).log()).logsumexp(1).mean()

    own = np.concatenate([_own_temperature(z[:, k], y, stepped) for k in range(M)])
    starts = [_best_weights(nll, log_t, stepped) for log_t in (np.zeros(M), own)]
    bounds = [(0, 1)] * M + [_LOG_T] * M
    ends = [minimize_convex(nll, start, stepped, bounds=bounds, **_simplex(M)) for start in starts]
    best = min([*ends, *starts], key=lambda x: float(nll(torch.from_numpy(x))))
    weights = np.clip(best[:M], 0, 1) / np.clip(best[:M], 0, 1).sum()
    return Combination("learned", tuple(weights.tolist()), tuple(np.exp(best[M:]).tolist()))


def _own_temperature(z: torch.Tensor, y: torch.Tensor, stepped: OnStep) -> Floats:
    """float64 [1]: the logarithm of one member's best temperature. z [N, K]; y [N]."""
    return minimize_convex(lambda x: F.cross_entropy(z / x.exp(), y), np.zeros(1), stepped, bounds=[_LOG_T])


def _best_weights(nll: Callable[[torch.Tensor], torch.Tensor], log_t: Floats, stepped: OnStep) -> Floats:
    """float64 [2 M]: the best weights at these logarithms of temperatures [M], and these."""
    M = len(log_t)
    fixed, mean = torch.from_numpy(log_t), np.full(M, 1 / M)

    def of_weights(x: torch.Tensor) -> torch.Tensor:
        return nll(torch.cat([x, fixed]))

    fitted = minimize_convex(of_weights, mean, stepped, bounds=[(0, 1)] * M, **_simplex(M))
    best = min([mean, *np.eye(M), fitted], key=lambda x: float(of_weights(torch.from_numpy(x))))
    return np.concatenate([best, log_t])


def _simplex(M: int) -> dict[str, Any]:
    """That the first M parameters add up to 1, as SciPy is told."""
    sums = {"type": "eq", "fun": lambda x: x[:M].sum() - 1, "jac": lambda x: (np.arange(len(x)) < M).astype(float)}
    return {"method": "SLSQP", "constraints": [sums]}


def confidence_weights(terms: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """How much a row trusts each teacher [B, M]; 1 / M each where a row has no label. Each row adds up to 1.

    w_k = (1 - softmax_k(CE_k)) / (M - 1), CE_k the cross entropy of teacher k with the label: confidence-aware
    multi-teacher distillation, Zhang, Chen and Wang 2022 (arXiv 2201.00007, equation 3). (The authors' program divides
    by M once more.) terms [B, M]: these cross entropies; known [B].
    """
    M = terms.shape[1]
    weights = (1 - terms.softmax(1)) / (M - 1)
    return torch.where(known[:, None], weights, torch.full_like(weights, 1 / M))
