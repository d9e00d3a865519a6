"""How a cache's rows were computed, where that is not simply the teacher in the precision of the identity."""

from dataclasses import asdict, dataclass
from typing import Any

from softcache.base.errors import CacheError
from softcache.base.schema import validate

SCHEMA = {"folded": bool, "compiled": bool, "rows": int, "kl_1": float, "kl_4": float, "flips": float}


@dataclass(frozen=True)
class PrecisionRecord:
    """A faster way to the same function of a image, and what it costs.

    folded: batch norm went into the convolutions before it; compiled: by torch.compile, where the cache was begun;
    rows: training views that were asked both ways; kl_1, kl_4: their mean KL(plain float32 || this) in nats at
    T = 1 and 4; flips: share of them whose first class is another one.
    """

    folded: bool
    compiled: bool
    rows: int
    kl_1: float
    kl_4: float
    flips: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    def describe(self) -> str:
        """What was done, and its figures."""
        done = ["batch norm folded"] * self.folded + ["compiled"] * self.compiled
        return (
            f"{', '.join(done) or 'as the network is'}: KL {self.kl_1:.1e} to plain float32 at T=1, {self.kl_4:.1e}"
            f" at T=4, {self.flips:.2%} of {self.rows} views change their first class"
        )


def parse_precision_record(record: Any) -> PrecisionRecord | None:
    """From plain JSON values; None, the teacher as it is, from None and from what is no such record."""
    try:
        validate(record, SCHEMA, "arithmetic")
    except CacheError:
        return None
    return PrecisionRecord(**record)
