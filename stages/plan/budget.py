"""Which codec, how many draws and which taps fit into a number of bytes."""

from dataclasses import dataclass

from softcache.pipeline.cache.codec_choice import find_codec
from softcache.pipeline.cache.codecs import CODECS
from softcache.pipeline.cache.manifest import count_row_bytes
from softcache.pipeline.cache.sizes import CacheSize, measure_size

from .subject import Subject

_SPARSE = ("top:100", "top:20")  # for many classes; a sample is for one temperature alone


@dataclass(frozen=True)
class Choice:
    """A cache that is smaller than the one that was asked for, or that one.

    Attributes:
        codec: Of the logits.
        draws: Views of each training image.
        taps: Names of the taps.
        bytes: Of all files.
    """

    codec: str
    draws: int
    taps: tuple[str, ...]
    bytes: int


def measure_subject(subject: Subject, codec: str, draws: int, taps: dict[str, list[int]]) -> CacheSize:
    """Compute the size of the cache with a codec, draws and taps."""
    return measure_size(
        subject.list_datasets(codec, taps),
        subject.splits,
        draws,
        task=subject.task,
        shard_rows=subject.config.shard_rows,
        head=subject.head,
        class_names=subject.class_names,
        classes=subject.classes,
    )


def list_choices(subject: Subject, budget: int) -> list[Choice]:
    """List the caches that fit, the best first: most taps, then most draws, then the finest codec.

    None has more draws, other taps or a finer codec than what was asked for, and none is listed beside which another
    one is at least as good in all three.

    Args:
        subject: What is planned.
        budget: Bytes.
    """
    choices: list[Choice] = []
    for codec in list_codecs(subject):  # the finest first
        for taps in _list_tap_sets(subject):  # most taps first
            draws = _count_draws(subject, codec, taps, budget)
            if draws and not any(c.draws >= draws and set(c.taps) >= set(taps) for c in choices):
                size = measure_subject(subject, codec, draws, taps)
                choices.append(Choice(codec, draws, tuple(taps), size.bytes))
    return sorted(choices, key=lambda choice: (-len(choice.taps), -choice.draws))  # stable: the finer codec first


def find_smallest(subject: Subject) -> Choice:
    """Find the smallest cache there is: one draw, no taps, the coarsest codec."""
    codec = list_codecs(subject)[-1]
    return Choice(codec, 1, (), measure_subject(subject, codec, 1, {}).bytes)


def list_codecs(subject: Subject) -> list[str]:
    """List the codec that was asked for and those that take fewer bytes, the finest first."""
    requested = subject.config.codec
    others = [name for name in (*CODECS, *_SPARSE) if subject.task in find_codec(name).tasks]
    names = dict.fromkeys([requested, *(name for name in others if subject.classes >= find_codec(name).min_classes)])
    sizes = {name: count_row_bytes(subject.list_datasets(name, {})) for name in names}
    smaller = [name for name in names if sizes[name] < sizes[requested]]
    return [requested, *sorted(smaller, key=lambda name: -sizes[name])]


def _list_tap_sets(subject: Subject) -> list[dict[str, list[int]]]:
    """List all taps, then without the largest, and so on, at last none."""
    by_size = sorted(subject.taps, key=lambda tap: count_row_bytes({"": (tuple(subject.taps[tap]), "<f2")}))
    kept = [set(by_size[:count]) for count in range(len(by_size), -1, -1)]
    return [{tap: shape for tap, shape in subject.taps.items() if tap in names} for names in kept]


def _count_draws(subject: Subject, codec: str, taps: dict[str, list[int]], budget: int) -> int:
    """Count the draws that fit, up to those that were asked for."""
    one, two = (measure_subject(subject, codec, draws, taps).bytes for draws in (1, 2))
    draws = max(0, min(subject.config.draws, 1 + (budget - one) // (two - one)))
    while draws and measure_subject(subject, codec, draws, taps).bytes > budget:  # a longer path in the manifest
        draws -= 1
    return draws
