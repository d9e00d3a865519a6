"""The distiller's mapping: from the teacher's distribution to the one that the student learns from.

All four maps are affine in the logits, z -> W z + b, so that one map serves every term alike: the logits, and the
teacher's last linear layer for losses that lead the student's features through it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize

from softcache.base.errors import UsageError, unknown_name_error
from softcache.base.spec import check_parameters, parse_number, parse_spec
from softcache.pipeline.batch import LinearHead

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Affine = tuple[torch.Tensor, torch.Tensor]
OnStep = Callable[[], None]


@dataclass(frozen=True)
class DistributionMap:
    """z -> W z + b. spec: as on the command line; weight: float64 [K], a diagonal, or [K, K]; bias: float64 [K]."""

    spec: str
    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [..., K] of the student's teacher, in the dtype of those given."""
        return _apply(logits, self.weight.to(logits.dtype), self.bias.to(logits.dtype))

    def map_head(self, head: LinearHead) -> LinearHead:
        """The last linear layer that gives mapped logits."""
        weight, bias = self.weight.to(head.weight.dtype), self.bias.to(head.bias.dtype)
        rows = weight[:, None] * head.weight if weight.ndim == 1 else weight @ head.weight
        return LinearHead(rows, _apply(head.bias, weight, bias))

    def to_json(self) -> dict[str, Any]:
        return {"map": self.spec, "weight": self.weight.tolist(), "bias": self.bias.tolist()}

    @staticmethod
    def from_json(record: dict[str, Any]) -> "DistributionMap":
        """Raises ValueError, TypeError or KeyError for what is no map."""
        weight, bias = (torch.tensor(record[name], dtype=torch.float64) for name in ("weight", "bias"))
        if bias.ndim != 1 or weight.shape not in ((len(bias),), (len(bias), len(bias))):
            raise ValueError(f"a map of {tuple(weight.shape)} and {tuple(bias.shape)}")
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise ValueError("a map that is not finite")
        if record["map"] == "temperature" and not (weight > 0).all():
            raise ValueError("a temperature that is not positive")
        return DistributionMap(str(record["map"]), weight, bias)


def _apply(z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (z * weight if weight.ndim == 1 else z @ weight.T) + bias


def fit_map(
    spec: str, logits: NDArray[np.floating], labels: Rows, counts: Rows, stepped: OnStep = lambda: None
) -> DistributionMap:
    """The map `temperature`, `vector`, `matrix` or `prior:tau=1` of a teacher.

    logits [N, K] and labels [N] of the validation split, to which the first three are fitted by their NLL (Guo et al.
    2017, arXiv 1706.04599, section 4.2); counts [K]: rows of each class in training, for `prior`, which subtracts tau
    log of their shares (Menon et al. 2021, arXiv 2007.07314, section 4.1). What is fitted of W - I and b has a
    standard normal prior, which weighs as one row does: it holds many parameters where rows are few, and a
    temperature where the teacher is right on every row. stepped: called after each step of a fit.
    Raises UsageError for a map there is none of, and for rows that cannot say what it is.
    """
    name, knobs = parse_spec(spec, "map")
    if name not in (*_FITTED, "prior"):
        raise unknown_name_error("map", name, [*_FITTED, "prior"])
    check_parameters(spec, "map", knobs, ("tau",) if name == "prior" else ())
    K = logits.shape[1]
    if name == "prior":
        tau = parse_number(spec, "map", "tau", knobs.get("tau", "1"))
        if tau < 0:
            raise UsageError(f"--map {spec}: tau={tau:g} would add the prior once more; it is from 0 on")
        if (counts == 0).any():
            raise UsageError(f"--map {spec}: class {int(counts.argmin())} has no training row with a label")
        shares = torch.from_numpy(counts / counts.sum())
        return DistributionMap(spec, torch.ones(K, dtype=torch.float64), -tau * shares.log())
    known = labels >= 0
    if not known.any():
        raise UsageError(f"--map {spec} is fitted to validation labels, and these images have none")
    z, y = torch.from_numpy(logits[known].astype(np.float64)), torch.from_numpy(labels[known])
    return DistributionMap(spec, *_FITTED[name](z, y, stepped))


def _fit_temperature(z: torch.Tensor, y: torch.Tensor, stepped: OnStep) -> Affine:
    """One number for all logits; the NLL is convex in its inverse."""
    K = z.shape[1]

    def affine(x: torch.Tensor) -> Affine:
        return x.expand(K), x.new_zeros(K)

    return affine(_minimize_nll(z, y, affine, np.ones(1), stepped, bounds=[(1e-3, 1e3)]))


def _fit_vector(z: torch.Tensor, y: torch.Tensor, stepped: OnStep) -> Affine:
    K = z.shape[1]

    def affine(x: torch.Tensor) -> Affine:
        return x[:K], x[K:]

    return affine(_minimize_nll(z, y, affine, np.concatenate([np.ones(K), np.zeros(K)]), stepped))


def _fit_matrix(z: torch.Tensor, y: torch.Tensor, stepped: OnStep) -> Affine:
    K = z.shape[1]

    def affine(x: torch.Tensor) -> Affine:
        return x[: K * K].reshape(K, K), x[K * K :]

    return affine(_minimize_nll(z, y, affine, np.concatenate([np.eye(K).ravel(), np.zeros(K)]), stepped))


_FITTED: dict[str, Callable[[torch.Tensor, torch.Tensor, OnStep], Affine]] = {
    "temperature": _fit_temperature,
    "vector": _fit_vector,
    "matrix": _fit_matrix,
}


def _minimize_nll(
    z: torch.Tensor,
    y: torch.Tensor,
    affine: Callable[[torch.Tensor], Affine],
    start: Floats,
    stepped: OnStep,
    bounds: Any = None,
) -> torch.Tensor:
    """The most probable parameters of softmax(W z + b), given the rows and a standard normal prior about start."""
    origin = torch.from_numpy(start)

    def value(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(_apply(z, *affine(x)), y) + (x - origin).square().sum() / (2 * len(y))

    return torch.from_numpy(minimize_convex(value, start, stepped, bounds=bounds))


def minimize_convex(
    value: Callable[[torch.Tensor], torch.Tensor], start: Floats, stepped: OnStep, **more: Any
) -> Floats:
    """Where a differentiable function of float64 [n] is least, by SciPy, from start. stepped: called at each step."""

    def value_and_gradient(x: Floats) -> tuple[float, Floats]:
        at = torch.from_numpy(np.array(x)).requires_grad_()
        found = value(at)
        found.backward()  # type: ignore[no-untyped-call]
        assert at.grad is not None
        return float(found.detach()), at.grad.numpy()

    options = {"maxiter": 500, "ftol": 1e-10}
    method = more.pop("method", "L-BFGS-B")
    more |= {"method": method, "options": options, "callback": lambda _: stepped()}
    found: Floats = minimize(value_and_gradient, start, jac=True, **more).x
    return found
