"""Views of rows of numbers: noise and mixup of float32 rows, equal to the bit on every machine.

NumPy adds and multiplies float32 in single steps, each of which IEEE 754 rounds correctly. The normal numbers come
from a table whose values are rounded, so that the mathematical library of a machine cannot change one.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base import rng

_QUANTILES = 1 << 16  # a number takes 16 of 64 random bits
_LANES = 4
_STEP = 2.0**-12


def add_noise(rows: torch.Tensor, std: float, key: rng.Key, index: NDArray[np.int64]) -> torch.Tensor:
    """Add normal noise to each number: row + std * z.

    Args:
        rows: float32 [B, *shape].
        std: Standard deviation of the noise, in the units of the rows.
        key: What the random numbers are for: (seed, draw, purpose), the draw of all rows or int64 [B].
        index: int64 [B], the row that each of them is.

    Returns:
        float32 [B, *shape].
    """
    values: NDArray[np.float32] = rows.numpy()
    entries = math.prod(values.shape[1:])
    per_row = tuple(part[:, None] if isinstance(part, np.ndarray) else part for part in key)
    bits = rng.bits((*per_row, np.arange(-(-entries // _LANES))), index[:, None])  # [B, entries / 4, rounded up]
    lanes = np.ascontiguousarray(bits, "<u8").view("<u2")[:, :entries]
    noise = _tabulate_normal()[lanes].reshape(values.shape)
    noise *= np.float32(std)
    noise += values
    return torch.from_numpy(noise)


def mix_rows(rows: torch.Tensor, partners: torch.Tensor, share: NDArray[np.int64]) -> torch.Tensor:
    """Return the weighted mean of float32 [B, *shape] and its partners, with weights share / 256, int64 [B]."""
    weight = (share / 256).astype(np.float32).reshape(-1, *[1] * (rows.ndim - 1))  # exact
    mixed = rows.numpy() * weight
    mixed += partners.numpy() * (1 - weight)
    return torch.from_numpy(mixed)


@lru_cache(maxsize=1)
def _tabulate_normal() -> NDArray[np.float32]:
    """65,536 equally likely numbers of the normal distribution, multiples of 2**-12 between -4.325 and 4.325.

    Their standard deviation is 0.99999.
    """
    from scipy.special import ndtri  # not at the top: `softcache losses` starts in 2.5 s instead of 4.4 s

    quantiles = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    table: NDArray[np.float32] = (np.rint(ndtri(quantiles) / _STEP) * _STEP).astype(np.float32)
    return table
