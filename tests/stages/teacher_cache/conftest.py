"""What several tests of stage one share."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.helpers.commands import Stages


@pytest.fixture
def rows(stages: Stages) -> dict[str, NDArray[Any]]:
    """Random targets for digits, {split: float32 [N, 10]}."""
    generator = np.random.default_rng(0)
    return {
        "train": generator.normal(size=(1437, 10)).astype("f4"),
        "test": generator.normal(size=(360, 10)).astype("f4"),
    }
