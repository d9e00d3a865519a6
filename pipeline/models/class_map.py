"""A teacher's classes as those of the data: columns of its logits are chosen, put in another order or summed."""

from collections.abc import Sequence

import torch

from softcache.base.errors import UsageError

# The end of a message about a teacher with another number of classes.
MAP_ADVICE = "--class-map names, or a file, maps the teacher's classes to those of the data"


class ClassMap:
    """Maps the logits of a teacher to those of the classes of the data.

    The logit of a class that several of the teacher's classes stand for is their logsumexp: the softmax of the mapped
    logits is then the sum of the teacher's probabilities, divided by that of all the columns that are used.

    Args:
        columns: Of each class of the data, the columns of the teacher's logits, at least one; no column twice.

    Attributes:
        columns: As given.
    """

    def __init__(self, columns: Sequence[Sequence[int]]):
        self.columns = tuple(tuple(row) for row in columns)
        self._last = max(column for row in self.columns for column in row)
        width = max(map(len, self.columns))
        self._index = torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in self.columns])
        self._is_padding = torch.tensor([[k >= len(row) for k in range(width)] for row in self.columns])

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Map logits [B, K of the teacher] to [B, K of the data], in their dtype.

        Raises:
            UsageError: The teacher does not have a column that is used.
        """
        if self._last >= logits.shape[1]:
            raise UsageError(
                f"--class-map uses class {self._last} of the teacher, which outputs {logits.shape[1]} classes, 0 to"
                f" {logits.shape[1] - 1}"
            )
        chosen = logits[:, self._index.to(logits.device)]
        if self._index.shape[1] == 1:
            return chosen[:, :, 0]
        return chosen.masked_fill(self._is_padding.to(logits.device), -torch.inf).logsumexp(2)

    def is_identity(self, classes: int) -> bool:
        """Whether all `classes` of a teacher are used as they are, in their order."""
        return self.columns == tuple((k,) for k in range(classes))
