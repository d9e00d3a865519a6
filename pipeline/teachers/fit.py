"""Several caches as one teacher: what has to be fitted for that is fitted to the validation split."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from softcache.data.transfer_set import Labels, TransferSet, count_classes
from softcache.pipeline.cache.reader import CacheReader

from .combine import Combination, fit_combination, parse_combination
from .distribution_map import DistributionMap, OnStep, fit_map
from .ensemble import MissingTargets, TeacherEnsemble

ShowFit = Callable[[str], AbstractContextManager[OnStep]]  # shows the steps of a fit under a title


@contextmanager
def show_no_fit(_title: str) -> Iterator[OnStep]:
    """Show nothing."""
    yield lambda: None


def fit_teachers(
    caches: Sequence[CacheReader],
    transfer_set: TransferSet,
    logits: torch.Tensor,
    combine: str,
    mapping: str,
    missing: MissingTargets,
    show_fit: ShowFit = show_no_fit,
) -> TeacherEnsemble:
    """Make one teacher of caches.

    Args:
        caches: M caches of the same rows and views.
        transfer_set: Their images and labels.
        logits: Of the validation split by index, float32 [N, K] of one cache, [N, M, K] of several.
        combine: How the caches are combined, as in `--combine`; "" for one cache.
        mapping: The map of the teacher's distribution, as in `--map`; "" for none.
        missing: {draw: bool [rows], which positions lack targets}.
        show_fit: Shows the steps of a fit.

    Raises:
        UsageError: A text is no way to combine M teachers or no map, or a fit needs labels and there are none.
    """
    labels = transfer_set.splits["val"].labels
    combination = resolve_combination(combine, logits, labels, show_fit) if combine else None
    maps: tuple[DistributionMap, ...] = ()
    if mapping:
        counts = count_classes(transfer_set.splits["train"].labels, caches[0].classes)
        combined = TeacherEnsemble(tuple(caches), combination).combine_logits(logits)
        outputs = combined.unbind(1) if combined.ndim == 3 else (combined,)
        with show_fit(f"fitting --map {mapping}") as on_step:
            maps = tuple(fit_map(mapping, z.numpy(), labels, counts, on_step) for z in outputs)
    return TeacherEnsemble(tuple(caches), combination, maps, missing)


def resolve_combination(
    spec: str, logits: torch.Tensor, labels: Labels, show_fit: ShowFit = show_no_fit
) -> Combination:
    """Make a way to combine teachers from its text; `learned` is fitted.

    Args:
        spec: As in `--combine`.
        logits: float32 [N, M, K] of M teachers on the validation split.
        labels: int64 [N].
        show_fit: Shows the steps of the fit.

    Raises:
        UsageError: The text is no way to combine M teachers, or a fit has no labels.
    """
    if spec != "learned":
        return parse_combination(spec, logits.shape[1])
    with show_fit("fitting --combine learned") as on_step:
        return fit_combination(logits.numpy(), labels, on_step)
