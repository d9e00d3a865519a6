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
from softcache.data.tasks import CLASSES, EMBEDDING

from .distribution_map import Floats, OnStep, minimize

Rows = NDArray[np.int64]
SINGLE_OUTPUT = ("mean_probability", "mean_logit", "geometric", "weighted", "vote", "learned")  # one distribution
PER_TEACHER = ("per_teacher", "ca_mkd")  # losses are computed with the logits of each teacher
# Bounds of the logarithms of learned temperatures and unnormalised weights. They keep a step of the optimiser from an
# overflow; minima lie within them.
_LOG_T, _LOG_WEIGHT = (-20.0, 20.0), (-40.0, 40.0)
_RANDOM_STARTS = 4  # for each teacher after the first
_ROUGH_SIZE = 100_000  # numbers in the logits, beyond which starts are compared on a part of the rows
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


def choose_combination(spec: str, task: str) -> str:
    """Choose how several caches are combined.

    Args:
        spec: As of parse_combination; "" for the default of the task.
        task: See data/tasks.py.

    Raises:
        UsageError: Teachers of the task are not combined in this way.
    """
    if task == CLASSES:
        return spec or "mean_probability"
    if task != EMBEDDING:
        raise UsageError(f"several caches are for the tasks {CLASSES} and {EMBEDDING}, and the task here is {task}")
    if spec not in ("", "per_teacher"):
        raise UsageError(f"--combine {spec} is for one class an image, and several embeddings are never combined")
    return "per_teacher"


def _check_weights(what: str, weights: tuple[float, ...]) -> None:
    """Raise UsageError unless weights are from 0 to 1 and add up to 1. what: their name in the message."""
    if not all(0 <= w <= 1 for w in weights) or abs(sum(weights) - 1) > 1e-6:
        raise UsageError(f"{what}: weights are from 0 to 1 and add up to 1, these to {sum(weights):g}")


def fit_combination(logits: NDArray[np.floating], labels: Rows, on_step: OnStep = lambda: None) -> Combination:
    """Fit the blend sum_k w_k softmax(z_k / T_k) to a validation split.

    The objective over the N labelled rows, in nats, is

        mean over the rows of -log sum_k w_k softmax(z_k / T_k)[label] + sum_k (log T_k)² / (2 N)

    The second part is a standard normal prior of each log T_k that weighs as much as one row, as for `--map`: a
    teacher that is right on every row keeps a finite temperature, and a teacher without weight has T = 1.

    The weights are softmax(a): then every teacher keeps a gradient, also when its weight comes near 0. The objective
    has several minima, because a badly calibrated teacher gets no weight as long as its temperature is wrong. It is
    therefore minimised from several starts, see `_list_starts`. On the rows of the fit, the NLL of the blend is no
    worse than that of any single teacher and of any mean of the teachers at T = 1.

    Args:
        logits: [N, M, K] of M teachers.
        labels: int64 [N], -1 where there is none; such rows are left out.
        on_step: Called after each step of an optimiser.

    Returns:
        The blend. Teachers that make it no better have the weight 0.

    Raises:
        UsageError: No row has a label.
    """
    is_labelled = labels >= 0
    if not is_labelled.any():
        raise UsageError("--combine learned is fitted to validation labels, and these images have none")
    z, y = logits[is_labelled].astype(np.float64), labels[is_labelled]
    objective = rough_objective = _make_objective(z, y)
    if z.size > _ROUGH_SIZE:
        rows = np.linspace(0, len(y) - 1, max(500, len(y) * _ROUGH_SIZE // z.size)).astype(np.int64)
        rough_objective = _make_objective(z[rows], y[rows])
    starts = _list_starts(z, y, on_step)
    rough_ends = [_minimize(rough_objective, start, on_step, gradient_tolerance=1e-4) for start in starts]
    finalists = _select_best(rough_ends, objective, count=4)
    ends = [_minimize(objective, start, on_step, gradient_tolerance=1e-8) for start in finalists]
    (best,) = _select_best(ends, objective, count=1)
    weights, log_temperatures = _drop_useless(best, objective, on_step)
    return Combination("learned", tuple(weights.tolist()), tuple(np.exp(log_temperatures).tolist()))


Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (log weights [M], log temperatures [M]) -> scalar


def _make_objective(z: Floats, y: Rows) -> Objective:
    """The objective of `fit_combination` for logits [N, M, K] and labels [N]."""
    logits, rows, classes = torch.from_numpy(z), torch.arange(len(y)), torch.from_numpy(y)

    def objective(log_weights: torch.Tensor, log_temperatures: torch.Tensor) -> torch.Tensor:
        at_label = F.log_softmax(logits * (-log_temperatures).exp()[None, :, None], dim=2)[rows, :, classes]
        nll = -(at_label + log_weights).logsumexp(1).mean()
        return nll + log_temperatures.square().sum() / (2 * len(y))

    return objective


def _list_starts(z: Floats, y: Rows, on_step: OnStep) -> list[Floats]:
    """List the starts of the fit, each float64 [2 M]: logarithms of unnormalised weights, then of temperatures.

    Equal weights at T = 1 and at the best temperature of each teacher alone; most of the weight on one teacher; and
    random weights and temperatures.
    """
    M = z.shape[1]
    alone = np.concatenate([_fit_log_temperature(z[:, [k]], y, on_step) for k in range(M)])
    equal = np.zeros(M)
    starts = [np.concatenate([equal, log_t]) for log_t in (equal, alone)]
    starts += [np.concatenate([3.0 * np.eye(M)[k], alone]) for k in range(M)]
    random = np.random.default_rng(0)
    starts += [
        np.concatenate([random.normal(size=M), alone + random.normal(size=M)]) for _ in range(_RANDOM_STARTS * (M - 1))
    ]
    return starts


def _fit_log_temperature(z: Floats, y: Rows, on_step: OnStep) -> Floats:
    """float64 [1]: the logarithm of the best temperature of one teacher. z: [N, 1, K]; y: [N]."""
    objective = _make_objective(z, y)
    weight = torch.zeros(1, dtype=torch.float64)
    return minimize(lambda x: objective(weight, x), np.zeros(1), on_step, bounds=[_LOG_T])


def _minimize(objective: Objective, start: Floats, on_step: OnStep, gradient_tolerance: float) -> Floats:
    """Minimise an objective from a start of the form of `_list_starts`."""
    M = len(start) // 2
    return minimize(
        lambda x: objective(x[:M].log_softmax(0), x[M:]),
        start,
        on_step,
        bounds=[_LOG_WEIGHT] * M + [_LOG_T] * M,
        gradient_tolerance=gradient_tolerance,
    )


def _select_best(points: list[Floats], objective: Objective, count: int) -> list[Floats]:
    """Select the points with the least values, best first, each value once."""
    values: dict[float, Floats] = {}
    for point in points:
        x = torch.from_numpy(point)
        M = len(x) // 2
        values.setdefault(round(float(objective(x[:M].log_softmax(0), x[M:])), 6), point)
    return [values[value] for value in sorted(values)[:count]]


def _drop_useless(point: Floats, objective: Objective, on_step: OnStep) -> tuple[Floats, Floats]:
    """Return weights and logarithms of temperatures [M], without the weight of teachers that do not help."""
    M = len(point) // 2
    log_weights, log_temperatures = torch.from_numpy(point[:M]).log_softmax(0), torch.from_numpy(point[M:])
    value = objective(log_weights, log_temperatures)
    for k in log_weights.argsort().tolist()[:-1]:
        fewer = log_weights.clone()
        fewer[k] = -math.inf
        fewer, cooler = fewer.log_softmax(0), log_temperatures.clone()
        cooler[k] = 0.0
        if (rest := objective(fewer, cooler)) <= value:
            log_weights, log_temperatures, value = fewer, cooler, rest
    return log_weights.exp().numpy(), log_temperatures.numpy()


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
