"""Ways to combine the logits of several teachers into those of one, given or fitted to a validation split."""

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
SINGLE_OUTPUT = ("mean_probability", "mean_logit", "geometric", "weighted", "vote", "learned")  # one distribution
PER_TEACHER = ("per_teacher", "ca_mkd")  # losses are computed with the logits of each teacher
_LOG_T = (-3, 3)  # bounds of the logarithms of learned temperatures
_TIE = 1e-3  # weight of the mean probability beside the votes: it decides ties, and no class has probability 0


@dataclass(frozen=True)
class Combination:
    """How M teachers are combined.

    Attributes:
        name: One of SINGLE_OUTPUT or PER_TEACHER, see parse_combination.
        weights: M numbers from 0 to 1 that add up to 1.
        temperatures: M positive numbers, by which each teacher's logits are divided.
    """

    name: str
    weights: tuple[float, ...]
    temperatures: tuple[float, ...]

    @property
    def is_per_teacher(self) -> bool:
        """Whether losses are computed with the logits of each teacher, and not of a combination."""
        return self.name in PER_TEACHER

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Combine the logits [N, M, K] of M teachers.

        Returns:
            [N, K]: mean logits for `mean_logit`, else log-probabilities. For PER_TEACHER those of the mean
            probability.
        """
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
        """The fields as plain JSON values."""
        return {"combine": self.name, "weights": list(self.weights), "temperatures": list(self.temperatures)}

    @staticmethod
    def from_json(record: dict[str, Any]) -> "Combination":
        """The inverse of to_json.

        Raises:
            KeyError, TypeError, ValueError, UsageError: A field is missing, of another type, or out of range.
        """
        weights, temperatures = (tuple(float(x) for x in record[name]) for name in ("weights", "temperatures"))
        if record["combine"] not in (*SINGLE_OUTPUT, *PER_TEACHER) or len(weights) != len(temperatures) or not weights:
            raise ValueError("no way to combine")
        _check_weights("weights", weights)
        if not all(0 < t < math.inf for t in temperatures):
            raise ValueError("temperatures that are not positive")
        return Combination(record["combine"], weights, temperatures)


def parse_combination(spec: str, members: int) -> Combination:
    """Parse a way to combine.

    mean_probability  the mean of the probabilities (Hinton et al. 2015, arXiv 1503.02531, section 3; Stanton et al.
                      2021)
    mean_logit        the mean of the logits
    geometric         the normalised product of the probabilities: at every temperature the distribution of
                      mean_logit, with log-probabilities as logits
    weighted:0.7,0.3  a mean of the probabilities with these weights
    vote              the share of teachers with this class first; the mean probability decides ties and among
                      classes without a vote
    learned           weights and temperatures fitted to a validation split, see fit_combination
    per_teacher       no combination: the mean of the losses with each teacher
    ca_mkd            no combination: a weighted mean of these losses, see confidence_weights

    Args:
        spec: As above.
        members: M, the number of teachers.

    Raises:
        UsageError: There is no such way, or its weights do not fit.
    """
    name, _, rest = spec.partition(":")
    if name not in (*SINGLE_OUTPUT, *PER_TEACHER):
        raise unknown_name_error("way to combine", name, (*SINGLE_OUTPUT, *PER_TEACHER))
    weights = (1 / members,) * members
    if rest and name != "weighted":
        raise UsageError(f"--combine {spec}: {name} takes no parameters")
    if name == "weighted" and not rest:
        raise UsageError("--combine weighted: it needs a weight for each cache, such as weighted:0.7,0.3")
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
    """Raise UsageError unless weights are from 0 to 1 and add up to 1. what: their name in the message."""
    if not all(0 <= w <= 1 for w in weights) or abs(sum(weights) - 1) > 1e-6:
        raise UsageError(f"{what}: weights are from 0 to 1 and add up to 1, these to {sum(weights):g}")


def fit_combination(logits: NDArray[np.floating], labels: Rows, on_step: OnStep = lambda: None) -> Combination:
    """Fit the blend sum_k w_k softmax(z_k / T_k) with the least NLL on a validation split.

    For given temperatures the weights are a convex problem. It is solved twice, at T = 1 and at the best temperature
    of each teacher alone: at T = 1 a badly calibrated teacher gets no weight, and a temperature without weight is
    never fitted. From both solutions, weights and temperatures are then fitted jointly, because the mean of calibrated
    teachers is under-confident. On these rows the result is no worse than any teacher, with or without a temperature,
    and any mean of teachers.

    Args:
        logits: [N, M, K] of M teachers.
        labels: int64 [N], -1 where there is none; such rows are left out.
        on_step: Called after each step of an optimiser.

    Raises:
        UsageError: No row has a label.
    """
    is_labelled = labels >= 0
    if not is_labelled.any():
        raise UsageError("--combine learned is fitted to validation labels, and these images have none")
    z = torch.from_numpy(logits[is_labelled].astype(np.float64))
    y = torch.from_numpy(labels[is_labelled])
    M = z.shape[1]

    def nll(x: torch.Tensor) -> torch.Tensor:
        """x [2 M]: weights, then logarithms of temperatures."""
        at_label = F.log_softmax(z / x[M:].exp()[None, :, None], dim=2)[torch.arange(len(y)), :, y]
        return -(at_label + x[:M].clamp(min=1e-12).log()).logsumexp(1).mean()

    log_temperatures = np.concatenate([_fit_log_temperature(z[:, k], y, on_step) for k in range(M)])
    starts = [_fit_weights(nll, log_t, on_step) for log_t in (np.zeros(M), log_temperatures)]
    bounds = [(0, 1)] * M + [_LOG_T] * M
    ends = [minimize_convex(nll, start, on_step, bounds=bounds, **_simplex(M)) for start in starts]
    best = min([*ends, *starts], key=lambda x: float(nll(torch.from_numpy(x))))
    weights = np.clip(best[:M], 0, 1) / np.clip(best[:M], 0, 1).sum()
    return Combination("learned", tuple(weights.tolist()), tuple(np.exp(best[M:]).tolist()))


def _fit_log_temperature(z: torch.Tensor, y: torch.Tensor, on_step: OnStep) -> Floats:
    """float64 [1]: the logarithm of the best temperature of one teacher. z: [N, K]; y: [N]."""
    return minimize_convex(lambda x: F.cross_entropy(z / x.exp(), y), np.zeros(1), on_step, bounds=[_LOG_T])


def _fit_weights(nll: Callable[[torch.Tensor], torch.Tensor], log_t: Floats, on_step: OnStep) -> Floats:
    """float64 [2 M]: the best weights at these logarithms of temperatures [M], then the latter."""
    M = len(log_t)
    fixed, mean = torch.from_numpy(log_t), np.full(M, 1 / M)

    def nll_of_weights(x: torch.Tensor) -> torch.Tensor:
        return nll(torch.cat([x, fixed]))

    fitted = minimize_convex(nll_of_weights, mean, on_step, bounds=[(0, 1)] * M, **_simplex(M))
    best = min([mean, *np.eye(M), fitted], key=lambda x: float(nll_of_weights(torch.from_numpy(x))))
    return np.concatenate([best, log_t])


def _simplex(M: int) -> dict[str, Any]:
    """Arguments of minimize_convex: the first M parameters add up to 1."""
    total = {"type": "eq", "fun": lambda x: x[:M].sum() - 1, "jac": lambda x: (np.arange(len(x)) < M).astype(float)}
    return {"method": "SLSQP", "constraints": [total]}


def confidence_weights(terms: torch.Tensor, is_labelled: torch.Tensor) -> torch.Tensor:
    """The weight of each teacher in each row, by how well it predicts the label.

    w_k = (1 - softmax_k(CE_k)) / (M - 1), where CE_k is the cross entropy of teacher k with the label.

    Args:
        terms: [B, M], these cross entropies.
        is_labelled: bool [B].

    Returns:
        [B, M]. Each row adds up to 1; without a label all are 1 / M.

    Source:
        Zhang, Chen and Wang 2022, "Confidence-aware multi-teacher knowledge distillation", arXiv 2201.00007,
        equation 3. (The authors' program divides by M once more.)
    """
    M = terms.shape[1]
    weights = (1 - terms.softmax(1)) / (M - 1)
    return torch.where(is_labelled[:, None], weights, torch.full_like(weights, 1 / M))
