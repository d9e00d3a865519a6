"""Maps from a teacher's distribution to the one that a student learns from: calibration and prior correction.

All maps are affine in the logits, z -> W z + b. So one map serves all terms of a loss: those of the logits, and those
that lead the student's features through the teacher's last linear layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from softcache.base.errors import UsageError, unknown_name_error
from softcache.base.spec import check_parameters, parse_number, parse_spec
from softcache.pipeline.batch import LinearHead

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Affine = tuple[torch.Tensor, torch.Tensor]  # weight [K] (a diagonal) or [K, K], and bias [K]
OnStep = Callable[[], object]


@dataclass(frozen=True)
class DistributionMap:
    """A map z -> W z + b of logits.

    Attributes:
        spec: As on the command line, see fit_map.
        weight: W, float64 [K, K], or [K] for a diagonal.
        bias: b, float64 [K].
    """

    spec: str
    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The mapped logits [..., K], in the dtype of those given."""
        return _apply(logits, self.weight.to(logits.dtype), self.bias.to(logits.dtype))

    def map_head(self, head: LinearHead) -> LinearHead:
        """The last linear layer whose outputs are the mapped logits."""
        weight, bias = self.weight.to(head.weight.dtype), self.bias.to(head.bias.dtype)
        rows = weight[:, None] * head.weight if weight.ndim == 1 else weight @ head.weight
        return LinearHead(rows, _apply(head.bias, weight, bias))

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {"map": self.spec, "weight": self.weight.tolist(), "bias": self.bias.tolist()}

    @staticmethod
    def from_json(record: dict[str, Any]) -> "DistributionMap":
        """The inverse of to_json.

        Raises:
            KeyError, TypeError, ValueError: A field is missing, of another type or shape, or out of range.
        """
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
    spec: str, logits: NDArray[np.floating], labels: Rows, counts: Rows, on_step: OnStep = lambda: None
) -> DistributionMap:
    """Fit a map of a teacher's distribution.

    temperature  z / T
    vector       a scale and a bias for each class
    matrix       W z + b
    prior:tau=1  subtracts tau times the logarithm of each class's share of the training rows

    The first three minimise the NLL of the validation split, with a standard normal prior of W - I and b that weighs
    as much as one row: few rows then do not fit many parameters, and a teacher that is right on every row gets a
    finite temperature.

    Args:
        spec: As above.
        logits: [N, K] of the teacher on the validation split; unused for prior.
        labels: int64 [N], -1 where there is none; such rows are left out.
        counts: int64 [K], the number of training rows of each class; used for prior alone.
        on_step: Called after each step of the optimiser.

    Raises:
        UsageError: There is no such map, no label to fit it to, or a class without a training row.

    Source:
        Guo et al. 2017, "On calibration of modern neural networks", arXiv 1706.04599, section 4.2; for prior, Menon et
        al. 2021, "Long-tail learning via logit adjustment", arXiv 2007.07314, section 4.1.
    """
    name, tau = check_map(spec)
    K = logits.shape[1]
    if name == "prior":
        if (counts == 0).any():
            raise UsageError(f"--map {spec}: class {int(counts.argmin())} has no training row with a label")
        shares = torch.from_numpy(counts / counts.sum())
        return DistributionMap(spec, torch.ones(K, dtype=torch.float64), -tau * shares.log())
    is_labelled = labels >= 0
    if not is_labelled.any():
        raise UsageError(f"--map {spec} is fitted to validation labels, and these images have none")
    z = torch.from_numpy(logits[is_labelled].astype(np.float64))
    y = torch.from_numpy(labels[is_labelled])
    return DistributionMap(spec, *_FITTED[name](z, y, on_step))


def check_map(spec: str) -> tuple[str, float]:
    """Check the text of a map.

    Returns:
        Its name, and tau, which only `prior` uses.

    Raises:
        UsageError: There is no such map, or it does not take such a parameter.
    """
    name, parameters = parse_spec(spec, "map")
    if name not in (*_FITTED, "prior"):
        raise unknown_name_error("map", name, [*_FITTED, "prior"])
    check_parameters(spec, "map", parameters, ("tau",) if name == "prior" else ())
    tau = parse_number(spec, "map", "tau", parameters.get("tau", "1"))
    if tau < 0:
        raise UsageError(f"--map {spec}: tau={tau:g} would add the prior once more; tau is 0 or larger")
    return name, tau


def _fit_temperature(z: torch.Tensor, y: torch.Tensor, on_step: OnStep) -> Affine:
    """One scale for all logits, the inverse of the temperature, in which the NLL is convex."""
    K = z.shape[1]

    def to_affine(x: torch.Tensor) -> Affine:
        return x.expand(K), x.new_zeros(K)

    return to_affine(_minimize_nll(z, y, to_affine, np.ones(1), on_step, bounds=[(1e-3, 1e3)]))


def _fit_vector(z: torch.Tensor, y: torch.Tensor, on_step: OnStep) -> Affine:
    K = z.shape[1]

    def to_affine(x: torch.Tensor) -> Affine:
        return x[:K], x[K:]

    return to_affine(_minimize_nll(z, y, to_affine, np.concatenate([np.ones(K), np.zeros(K)]), on_step))


def _fit_matrix(z: torch.Tensor, y: torch.Tensor, on_step: OnStep) -> Affine:
    K = z.shape[1]

    def to_affine(x: torch.Tensor) -> Affine:
        return x[: K * K].reshape(K, K), x[K * K :]

    return to_affine(_minimize_nll(z, y, to_affine, np.concatenate([np.eye(K).ravel(), np.zeros(K)]), on_step))


_FITTED: dict[str, Callable[[torch.Tensor, torch.Tensor, OnStep], Affine]] = {
    "temperature": _fit_temperature,
    "vector": _fit_vector,
    "matrix": _fit_matrix,
}


def _minimize_nll(
    z: torch.Tensor,
    y: torch.Tensor,
    to_affine: Callable[[torch.Tensor], Affine],
    start: Floats,
    on_step: OnStep,
    bounds: Sequence[tuple[float, float]] | None = None,
) -> torch.Tensor:
    """The most probable parameters of softmax(W z + b), given the rows and a standard normal prior around start."""
    origin = torch.from_numpy(start)

    def negative_log_posterior(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(_apply(z, *to_affine(x)), y) + (x - origin).square().sum() / (2 * len(y))

    return torch.from_numpy(minimize(negative_log_posterior, start, on_step, bounds=bounds))


def minimize(
    function: Callable[[torch.Tensor], torch.Tensor],
    start: Floats,
    on_step: OnStep,
    bounds: Sequence[tuple[float, float]] | None = None,
    gradient_tolerance: float = 1e-5,
) -> Floats:
    """Find a minimum of a differentiable function by L-BFGS-B: for a convex one, the minimum.

    Args:
        function: float64 [n] -> a scalar, differentiable by PyTorch.
        start: float64 [n].
        on_step: Called after each step.
        bounds: (least, most) of each parameter.
        gradient_tolerance: largest part of the gradient at which the search ends.

    Returns:
        float64 [n], where the function is least.
    """

    def value_and_gradient(x: Floats) -> tuple[float, Floats]:
        point = torch.from_numpy(np.array(x)).requires_grad_()
        value = function(point)
        value.backward()  # type: ignore[no-untyped-call]
        assert point.grad is not None
        return float(value.detach()), point.grad.numpy()

    from scipy import optimize  # not at the top: it takes 0.3 s to import, and few students have a map

    minimum: Floats = optimize.minimize(
        value_and_gradient,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 500, "ftol": 1e-10, "gtol": gradient_tolerance},
        callback=lambda _: on_step(),
    ).x
    return minimum
