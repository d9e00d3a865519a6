"""The record of the weights that a run starts from, in its folder: a resumed run starts from the same."""

from pathlib import Path

from softcache.base.errors import CacheError, make_printable
from softcache.base.files import publish_json
from softcache.pipeline.models.initial_weights import InitialWeights
from softcache.stages.distributed.ranks import broadcast_from_first

from .folder import read_json

INIT_FILE = "init.json"


def record_initial_weights(initial: InitialWeights | None, folder: Path) -> None:
    """Record the weights of --init in the folder of a run, or compare them with the record there.

    Rank 0 does this for all ranks.

    Args:
        initial: The weights; None where a run starts from fresh ones.
        folder: Of the run, which is locked.

    Raises:
        CacheError: The run was started from other weights, or from none.
    """
    if initial is not None:
        record = {"weights": Path(initial.source).name, "digest": initial.digest}
        broadcast_from_first(lambda: _compare_or_write(record, folder / INIT_FILE))


def _compare_or_write(record: dict[str, str], path: Path) -> None:
    if not path.is_file():
        if not read_json(path.parent / "settings.json").get("init"):
            raise CacheError(f"'{path.parent}' was started without --init: leave it out, or choose another --out")
        publish_json(path, record)
        return
    digest = read_json(path).get("digest")
    if digest != record["digest"]:
        raise CacheError(
            f"'{path.parent}' was started from other weights than those of --init today: digest"
            f" {make_printable(str(digest)[:16])}… then, {record['digest'][:16]}… now: put that file back, or choose"
            " another --out"
        )
