"""`softcache head-cache`: turn a cache of embeddings into the cache of a classifier, without its teacher."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from softcache.base.errors import UsageError
from softcache.data.content_index import open_index
from softcache.data.sampling import draw_labelled_rows
from softcache.data.sources import get_source_name, has_argument
from softcache.data.tasks import CLASSES, EMBEDDING, find_known
from softcache.data.transfer_set import TransferSet
from softcache.pipeline.cache.manifest import Manifest
from softcache.pipeline.cache.reader import CacheReader
from softcache.stages.cli.configs import HeadConfig, StudentConfig
from softcache.stages.cli.console import Console
from softcache.stages.cli.copied_commands import format_command
from softcache.stages.runs.data import format_teacher_accuracies, load_cache_data
from softcache.stages.runs.output_folder import check_output_folder
from softcache.stages.teacher_cache.cache_readme import describe_fidelity

from .head_file import read_head_file
from .heads import CENTROIDS, PROBE, Floats, Head, Rows, check_every_class, fit_centroids, fit_probe
from .writing import write_head_cache


def run(name: str, config: HeadConfig) -> None:
    """Fit or read a head, write the cache of its logits, and report what it holds.

    Args:
        name: Folder of a cache of embeddings.
        config: Options of the command.

    Raises:
        UsageError: An option is missing or does not fit the cache.
        CacheError: A file is damaged or does not fit, or --out holds another cache.
    """
    console = Console(config.json)
    cache = CacheReader(Path(name))
    _check_options(cache, config)
    index = open_index(config.index, config.rehash)
    transfer_set = load_cache_data(cache, config.data, Path(config.data_root), index)
    for line in index.notes:
        console.note(line)
    head, how = make_head(cache, transfer_set, config)
    record: dict[str, Any] = {"kind": head.kind, "weights": head.digest()}
    if config.labelled:
        record |= {"labelled": config.labelled, "seed": config.seed}
    out = config.out or f"{cache.folder}-{head.kind}"
    settings = {
        "license": cache.manifest.settings.get("license", ""),
        "embeddings": cache.folder.resolve().name,
        "head": Path(config.head).name,
        "labelled": config.labelled,
        "seed": config.seed,
    }
    of_classes = replace(transfer_set, task=CLASSES)
    manifest = write_head_cache(cache, head, record, of_classes, Path(out), settings)
    _print_report(manifest, out, how, config, console)


def _check_options(cache: CacheReader, config: HeadConfig) -> None:
    """Check what can be checked before the data are read."""
    if cache.task != EMBEDDING:
        raise UsageError(
            f"'{cache.folder}' is a cache of the task {cache.task}, and a head is for caches of the task {EMBEDDING}"
        )
    if not config.head:
        raise UsageError(f"name the head: --head {PROBE}, --head {CENTROIDS} or --head FILE.npz")
    if config.head in (PROBE, CENTROIDS):
        if not config.labelled:
            raise UsageError(f"--head {config.head} is fitted to labelled rows: name their number, --labelled N")
    elif config.labelled:
        raise UsageError(
            f"--labelled {config.labelled} is for --head {PROBE} and {CENTROIDS}: a head in a file needs no labels"
        )
    elif not config.head.endswith(".npz"):
        raise UsageError(f"no head '{config.head}'. There are: {PROBE}, {CENTROIDS}, FILE.npz")
    if config.out and Path(config.out).resolve() == cache.folder.resolve():
        raise UsageError(f"--out {config.out} is the cache of embeddings itself: choose another folder")
    if config.out and not (Path(config.out) / "manifest.json").is_file():
        check_output_folder(Path(config.out))


def make_head(cache: CacheReader, transfer_set: TransferSet, config: HeadConfig) -> tuple[Head, str]:
    """Fit a head to labelled rows, or read one.

    The rows are those that keep their labels in `softcache student --labelled N --seed S`; of each, the embedding of
    the first draw is read.

    Args:
        cache: Of embeddings.
        transfer_set: Its data.
        config: `head`, `labelled` and `seed`.

    Returns:
        The head, and how it was made, for a person.

    Raises:
        UsageError: There are no such rows.
        CacheError: The file is damaged or does not fit.
    """
    classes, labels = transfer_set.classes, transfer_set.splits["train"].labels
    if config.head not in (PROBE, CENTROIDS):
        head = read_head_file(Path(config.head), cache.classes, classes)
        return head, f"{Path(config.head).name}, {'cosines' if head.normalize else 'linear'}, no label was read"
    known = int(find_known(labels).sum())
    if not known:
        raise UsageError(f"--head {config.head} needs labels, and these images have none: take --head FILE.npz")
    if not len(classes) <= config.labelled <= known:
        raise UsageError(f"--labelled {config.labelled} is not between {len(classes)} classes and {known} rows")
    if len(classes) < 2:
        raise UsageError(f"--head {config.head} needs two classes or more, the data have {len(classes)}")
    rows, drawn = read_labelled(cache, labels, config)
    check_every_class(drawn, classes, config.labelled)
    if config.head == PROBE:
        head, how = fit_probe(rows, drawn, len(classes), config.seed)
    else:
        head, how = fit_centroids(rows, drawn, len(classes))
    return head, f"{head.kind}, {how}; {config.labelled:,} labelled rows"


def read_labelled(cache: CacheReader, labels: Rows, config: HeadConfig) -> tuple[Floats, Rows]:
    """Read the embeddings float64 [n, D] and labels int64 [n] of the rows that are drawn."""
    index = draw_labelled_rows(labels, config.labelled, config.seed)
    positions = np.argsort(cache.row_order("train"))[index]
    return cache.read_stored("train", 0, positions)[0].numpy().astype(np.float64), labels[index]


def _print_report(manifest: Manifest, out: str, how: str, config: HeadConfig, console: Console) -> None:
    """Print what the cache holds, or with --json one object."""
    record = {
        "cache": out,
        "fingerprint": manifest.fingerprint,
        "draws": manifest.draws,
        "rows": manifest.count_views(),
        "bytes": manifest.bytes,
        "head": manifest.identity["teacher"]["head"],
        "teacher": manifest.teacher,
        "fidelity": manifest.fidelity,
    }
    if config.json:
        return console.print_json(json.dumps(record))
    accuracy = format_teacher_accuracies(manifest)
    console.print(f"head:    {how}")
    console.print(f"cache:   {out} ({manifest.fingerprint[:12]}), {manifest.count_views():,} rows")
    console.print(f"teacher: accuracy {accuracy or 'unknown, there are no labels'}")
    console.print(f"codec:   {manifest.identity['codec']} costs {describe_fidelity(manifest)}")
    student = StudentConfig(
        data=config.data if config.data and has_argument(get_source_name(config.data)) else "",
        data_root=config.data_root,
        index=config.index,
        cache=(out,),
        labelled=config.labelled,
        seed=config.seed if config.labelled else 0,
        baseline=bool(config.labelled),
        loss=() if config.labelled else ("kd:temperature=4",),
    )
    console.print(f"next:    {format_command('student', student)}")
    if config.labelled:
        console.print(
            f"With another --labelled or --seed, a student sees labels of other rows than the head's"
            f" {config.labelled:,}."
        )
