"""Which codec a name means: those with a fixed row, and the sparse ones, whose names have a number."""

import re
from functools import lru_cache

from .codecs import CODECS, Codec
from .sparse_codecs import make_sample_codec, make_top_codec

MAX_NUMBER = 65_535  # in the name of a sparse codec
_MAKERS = {"top": make_top_codec, "sample": make_sample_codec}
_NUMBERED = re.compile("(top|sample):([1-9][0-9]{0,4})")
CODEC_PATTERN = re.compile(f"{'|'.join(CODECS)}|{_NUMBERED.pattern}")
SPARSE_EXAMPLES = ("top:20", "sample:50")


@lru_cache(maxsize=64)
def find_codec(name: str) -> Codec:
    """Return the codec of a name, such as float16, top:20 or sample:50.

    Raises:
        KeyError: there is none.
    """
    if name in CODECS:
        return CODECS[name]
    match = _NUMBERED.fullmatch(name)
    if match is None or int(match[2]) > MAX_NUMBER:
        raise KeyError(name)
    return _MAKERS[match[1]](int(match[2]))


def list_codecs(task: str) -> list[str]:
    """List the names of the codecs of a task, an example of those whose names have a number."""
    return [name for name in (*CODECS, *SPARSE_EXAMPLES) if task in find_codec(name).tasks]
