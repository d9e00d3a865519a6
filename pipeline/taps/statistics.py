"""What is kept of a layer's output: `layer3` or `layer3:map` whole, `layer3:pool` and others a part of it.

A loss often needs far less than the map: attention of the three stages of a ResNet-32x4 takes 2.7 KB of a view
where the maps take 224 KiB. The same function makes the statistic of the teacher, in stage one, and of the student.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from softcache.base.errors import UsageError, unknown_name_error

STATISTICS = ("map", "pool", "attention", "gram", "grid1", "grid2", "grid4")


def parse_tap(tap: str) -> tuple[str, str]:
    """`layer3:pool` -> ("layer3", "pool"); `layer3` -> ("layer3", "map"). Raises UsageError for other statistics."""
    path, colon, kind = tap.partition(":")
    if colon and kind not in STATISTICS:
        raise unknown_name_error(f"statistic of tap '{tap}'", kind, STATISTICS)
    return path, kind or "map"


def normalize_tap(tap: str) -> str:
    """The one name of a tap: `layer3:map` is `layer3`."""
    path, kind = parse_tap(tap)
    return path if kind == "map" else f"{path}:{kind}"


def compute_statistic(x: torch.Tensor, kind: str, tap: str = "") -> torch.Tensor:
    """A statistic of a layer's output x, a map [B, C, H, W] but for `map` and `pool`. Computed in x's dtype.

    map        x itself, of any shape
    pool       [B, C], the mean over space; of tokens [B, T, C] over them; a vector [B, C] stays
    attention  [B, H, W], mean over the channels of x², of norm 1 (Zagoruyko and Komodakis 2017, section 3.1)
    gram       [B, HW, HW], x' x / C with every channel of norm 1 over space (Huang and Wang 2017, section 4)
    gridN      [B, C, N, N], the mean over the cells of an N x N grid

    Raises UsageError, naming tap, for a shape that has no such statistic.
    """
    if kind == "map":
        return x
    if kind == "pool" and x.ndim in (2, 3):
        return x if x.ndim == 2 else x.mean(1)
    if x.ndim != 4:
        shape = "x".join(map(str, x.shape[1:]))
        raise UsageError(f"tap '{tap}:{kind}': '{tap}' gives {shape}, and {kind} is of a map CxHxW")
    if kind == "pool":
        return x.mean((2, 3))
    if kind == "attention":
        return F.normalize(x.square().mean(1).flatten(1), dim=1).view(len(x), *x.shape[2:])
    if kind == "gram":
        unit = F.normalize(x.flatten(2), dim=2)
        return unit.transpose(1, 2) @ unit / x.shape[1]
    return F.adaptive_avg_pool2d(x, int(kind.removeprefix("grid")))


def to_feature_map(x: torch.Tensor) -> torch.Tensor:
    """A vector [B, C] as a map [B, C, 1, 1]; a map stays. Raises UsageError for what is neither."""
    if x.ndim not in (2, 4):
        shape = "x".join(map(str, x.shape[1:]))
        raise UsageError(
            f"features of {shape} are neither a map CxHxW nor a vector: choose another layer, or its pool"
        )
    return x[:, :, None, None] if x.ndim == 2 else x


def find_source_tap(tap: str, there: Iterable[str]) -> str | None:
    """Which of the cached taps a tap can be had from: itself, or the whole map of its layer; None from none."""
    found = {normalize_tap(name): name for name in there}
    path, _ = parse_tap(tap)
    return found.get(normalize_tap(tap)) or found.get(path)


def derive_features(features: dict[str, torch.Tensor], taps: Iterable[str]) -> dict[str, torch.Tensor]:
    """{tap: float32 [B, …]} from cached features: as they are where they were cached, else from the layer's map."""
    made = {}
    for tap in taps:
        source = find_source_tap(tap, features)
        if source is None:
            raise KeyError(tap)
        x = features[source].float()
        path, kind = parse_tap(tap)
        made[tap] = x if normalize_tap(source) == normalize_tap(tap) else compute_statistic(x, kind, path)
    return made
