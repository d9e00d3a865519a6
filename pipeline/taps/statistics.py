"""Statistics of a layer's output: `layer3` or `layer3:map` is the output itself, `layer3:pool` its mean over space.

A loss often needs far less than the feature map: attention of the three stages of a ResNet-32x4 takes 2.7 KB per view,
their maps 224 KiB. One function computes the statistic of the teacher, in stage one, and of the student.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from softcache.base.errors import UsageError, unknown_name_error

STATISTICS = ("map", "pool", "attention", "gram", "grid1", "grid2", "grid4")


def parse_tap(tap: str) -> tuple[str, str]:
    """Split a tap into module path and statistic: `layer3:pool` -> ("layer3", "pool"), `layer3` -> ("layer3", "map").

    Raises:
        UsageError: There is no such statistic.
    """
    path, colon, statistic = tap.partition(":")
    if colon and statistic not in STATISTICS:
        raise unknown_name_error(f"statistic of tap '{tap}'", statistic, STATISTICS)
    return path, statistic or "map"


def normalize_tap(tap: str) -> str:
    """The unique name of a tap: `layer3` for `layer3:map`, every other one unchanged."""
    path, statistic = parse_tap(tap)
    return path if statistic == "map" else f"{path}:{statistic}"


def compute_statistic(x: torch.Tensor, statistic: str, tap: str = "") -> torch.Tensor:
    """Compute a statistic of a layer's output, in its dtype.

    map        x itself, of any shape
    pool       [B, C], the mean over space; of tokens [B, T, C] over T; of a vector [B, C] the vector
    attention  [B, H, W], the mean over channels of x², with norm 1 (Zagoruyko and Komodakis 2017, section 3.1)
    gram       [B, HW, HW], x' x / C, with norm 1 over space for each channel (Huang and Wang 2017, section 4)
    gridN      [B, C, N, N], the mean over each cell of an N x N grid

    Args:
        x: A feature map [B, C, H, W]; for `map` and `pool` also another shape.
        statistic: A name of STATISTICS.
        tap: The layer, as a message calls it.

    Raises:
        UsageError: An output of this shape has no such statistic.
    """
    if statistic == "map":
        return x
    if statistic == "pool" and x.ndim in (2, 3):
        return x if x.ndim == 2 else x.mean(1)
    if x.ndim != 4:
        raise UsageError(
            f"tap '{tap}:{statistic}': '{tap}' outputs {_format_shape(x)}, and {statistic} needs a map CxHxW"
        )
    if statistic == "pool":
        return x.mean((2, 3))
    if statistic == "attention":
        return F.normalize(x.square().mean(1).flatten(1), dim=1).view(len(x), *x.shape[2:])
    if statistic == "gram":
        unit = F.normalize(x.flatten(2), dim=2)
        return unit.transpose(1, 2) @ unit / x.shape[1]
    return F.adaptive_avg_pool2d(x, int(statistic.removeprefix("grid")))


def to_feature_map(x: torch.Tensor) -> torch.Tensor:
    """A vector [B, C] as a map [B, C, 1, 1]; a map [B, C, H, W] unchanged.

    Raises:
        UsageError: x is neither.
    """
    if x.ndim not in (2, 4):
        raise UsageError(
            f"features of {_format_shape(x)} are neither a map CxHxW nor a vector: choose another layer, or its pool"
        )
    return x[:, :, None, None] if x.ndim == 2 else x


def _format_shape(x: torch.Tensor) -> str:
    """The shape of one row, such as 64x8x8."""
    return "x".join(map(str, x.shape[1:]))


def find_source_tap(tap: str, cached_taps: Iterable[str]) -> str | None:
    """The cached tap from which a tap can be computed: itself, else the map of its layer; None where there is none."""
    sources = {normalize_tap(name): name for name in cached_taps}
    path, _ = parse_tap(tap)
    return sources.get(normalize_tap(tap)) or sources.get(path)


def derive_features(features: dict[str, torch.Tensor], taps: Iterable[str]) -> dict[str, torch.Tensor]:
    """Compute the features of some taps from cached ones.

    Args:
        features: {cached tap: [B, …]} of any floating dtype.
        taps: The taps to compute. One that is cached is only converted.

    Returns:
        {tap: float32 [B, …]}.

    Raises:
        KeyError: A tap cannot be computed from the cached ones.
    """
    derived = {}
    for tap in taps:
        source = find_source_tap(tap, features)
        if source is None:
            raise KeyError(tap)
        x = features[source].float()
        path, statistic = parse_tap(tap)
        is_cached = normalize_tap(source) == normalize_tap(tap)
        derived[tap] = x if is_cached else compute_statistic(x, statistic, path)
    return derived
