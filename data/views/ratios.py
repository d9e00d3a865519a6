"""Tables of the ratios of a box's sides."""

import decimal
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RATIOS = 4096  # in a table


@lru_cache(maxsize=2)
def tabulate_ratios(low: str, high: str) -> NDArray[np.float64]:
    """4,096 equally likely ratios, log-uniform from low to high: the same numbers on every machine.

    Python's decimal module rounds exponentials and logarithms correctly, unlike the C library.

    Args:
        low, high: Fractions as text, such as 3/4.
    """
    with decimal.localcontext(decimal.Context(prec=30)):
        first, last = (_divide(text).ln() for text in (low, high))
        step = (last - first) / RATIOS
        return np.array([float((first + step * (2 * k + 1) / 2).exp()) for k in range(RATIOS)])


def _divide(text: str) -> decimal.Decimal:
    numerator, denominator = text.split("/")
    return decimal.Decimal(numerator) / decimal.Decimal(denominator)
