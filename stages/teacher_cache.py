"""`stages teacher-cache`: stage one. Run the teacher once and keep what it said."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data.errors import Interrupted, OtherCache, Refused, unknown
from data.transfer_set import TransferSet, row_of
from data.views import ViewPolicy, parse_views
from pipeline.begun import begun
from pipeline.cache import Cache
from pipeline.codec import CODECS
from pipeline.files import make_folder
from pipeline.identity import Identity, identity_of
from pipeline.lock import held
from pipeline.manifest import NAME, Manifest
from pipeline.models import head_of
from pipeline.models.prepared import Prepared
from pipeline.models.weights import weights_digest
from pipeline.proof import probe
from pipeline.reading import read_manifest
from pipeline.statistic import plain_tap
from pipeline.writer import Plan, Writer, refuse_another, sweep

from . import teacher as teacher_stage
from .asking import Ask
from .asking_again import again
from .behind import Behind
from .card import write_card
from .command_line import command, free_name
from .console import Console, LongWork, bar, duration
from .precision import Chosen, Probe, choose, compiled_now, going_on
from .runs import device_of, versions
from .settings import CacheSettings, StudentSettings
from .which_teacher import teacher_of


def run(settings: CacheSettings) -> None:
    """Make the cache, and say what it is."""
    console = Console(settings.json)
    settings, manifest = make(settings, console)
    _report(manifest, settings, console)


def make(settings: CacheSettings, console: Console) -> tuple[CacheSettings, Manifest]:
    """Data, views, teacher; then shard after shard; then the manifest. The settings come back with the recipe in."""
    settings, views, taps = _checked(settings)
    transfer_set = teacher_stage.load_cut(settings)
    views = teacher_stage.with_size(views, transfer_set, console)
    teacher, arch = teacher_of(settings, transfer_set, views, console)
    teacher = teacher.to(device_of(settings.device)).eval()
    identity = _identity(settings, transfer_set, views, teacher, arch)
    try:
        there = begun(Path(settings.out), identity)
        taps = tuple(dict.fromkeys((*(there.taps if there else ()), *taps)))
        chosen = going_on(settings, there, teacher, taps) or choose(
            settings, Probe(transfer_set, views, settings), teacher, taps, console
        )
        identity = {**identity, "precision": chosen.answering.precision}
        if (Path(settings.out) / NAME).is_file():
            refuse_another(Path(settings.out), identity, {}, read_manifest(Path(settings.out)))
        ask = Ask(transfer_set, views, chosen.answering, settings)
        manifest = _cache(settings, identity, ask, chosen, console)
    except OtherCache as error:
        right = command("teacher-cache", settings, out=free_name(settings.out))
        raise Refused(f"{error}\nMake the one that is asked for with  {right}") from None
    return settings, manifest


def _checked(settings: CacheSettings) -> tuple[CacheSettings, ViewPolicy, tuple[str, ...]]:
    """The settings with the recipe filled in, before anything slow is done."""
    data = settings.data or "digits"
    recipe = row_of(data).recipe
    settings = replace(
        settings,
        data=data,
        views=settings.views or recipe.views,
        draws=settings.draws or recipe.draws,
        val_fraction=settings.val_fraction or recipe.val_fraction,
        out=settings.out or f"caches/{teacher_stage.row_name(data)}",
    )
    if settings.codec not in CODECS:
        raise unknown("codec", settings.codec, CODECS)
    taps = tuple(dict.fromkeys(plain_tap(tap) for tap in settings.taps.split(",") if tap))
    return settings, parse_views(settings.views), taps


def _identity(
    settings: CacheSettings, transfer_set: TransferSet, views: ViewPolicy, teacher: Prepared, arch: str
) -> Identity:
    """What the rows of the cache to be are, but for the precision where it is still to be chosen."""
    known = {"arch": arch, "weights": weights_digest(teacher.network), **teacher.preparation.identity()}
    identity = identity_of(transfer_set, views, settings.seed, known, settings.codec, settings.precision)
    plain: Identity = json.loads(json.dumps(identity))
    return plain


def _cache(settings: CacheSettings, identity: Identity, ask: Ask, chosen: Chosen, console: Console) -> Manifest:
    """Write what is not there yet; the manifest of it all."""
    out, transfer_set = Path(settings.out), ask.transfer_set
    splits = {split: len(rows) for split, rows in transfer_set.splits.items()}
    kept = (settings.shard_rows, _to_keep(settings), chosen.arithmetic)
    plan = Plan(identity, ask.classes, settings.draws, splits, ask.shapes, *kept)
    if (whole := Writer.look(out, plan)).nothing_to_do:  # needs no lock: the cache may be on a read-only mount
        sweep(out)
        console.say(f"the cache '{out}' is whole already, with all that is asked for")
        return whole.grown or read_manifest(out)
    make_folder(out)
    with held(out):
        writer = Writer.look(out, plan)
        if writer.grown and writer.todo:
            console.say(f"the cache '{out}' grows by {len(writer.todo)} shards; what it holds is left as it is")
            probe(Cache(out), transfer_set, writer.grown.draws)
            again(Cache(out), ask).refuse_if_large()
        writer.begin()
        if writer.grown and not writer.todo:
            console.say(f"the cache '{out}' is whole already, with all that is asked for")
            return writer.grown
        if set(writer.plan.taps) != set(ask.taps):
            raise Refused(f"'{out}' was given other taps while this began: run the same command again")
        if chosen.begun and settings.precision == "auto":
            console.say(f"precision: {identity['precision']}, as this cache was begun")
        if chosen.begun and settings.compile:
            compiled_now(ask.answering, Probe(transfer_set, ask.views, settings), console)
        _write(writer, ask, console)
        head = head_of(ask.teacher.network, ask.classes)
        record = None if head is None or writer.grown else writer.add_head(*numbers_of(head, ask.classes))
        labelled = {split: int((rows.labels >= 0).sum()) for split, rows in transfer_set.splits.items()}
        manifest = writer.manifest(record, labelled, versions())
        write_card(out, writer.grown, manifest)
        writer.finish(manifest)
        return manifest


def _to_keep(settings: CacheSettings) -> dict[str, Any]:
    """The settings that another machine can repeat: no path of this one, but the last part of its name."""
    here = ("data_root", "device", "workers", "json", "out", "draws", "taps")
    kept = {name: value for name, value in asdict(settings).items() if name not in here}
    kept["weights"] = Path(settings.weights).name
    kept["data"] = "folder:PATH" if settings.data.startswith("folder:") else settings.data
    return kept


def _write(writer: Writer, ask: Ask, console: Console) -> None:
    """Every shard that is not there yet. One is written while the teacher is asked for the next: bounded memory.

    In the order of the pieces, and noted in that order: a shard that is there is looked at when nothing is written.
    """
    pieces = writer.todo
    total = sum(piece.rows for piece in pieces)
    kept = 0
    long_work = LongWork(console, "Running the teacher", total, "; stopped, the same command goes on from there")
    try:
        with bar(total, "teacher-cache", "images") as shown, Behind() as writing:

            def count(rows: int) -> None:
                writing.look()
                shown.update(rows)
                long_work.at(int(shown.n))

            begun = time.monotonic()
            for piece in pieces:
                if (writer.folder / piece.path).exists():
                    writing.wait()
                    if writer.have(piece):
                        kept += 1
                        shown.update(piece.rows)
                        shown.initial += piece.rows
                        begun = time.monotonic()
                        continue
                arrays, facts = ask.piece(piece, count)
                writing.wait()
                now = time.monotonic()
                writing.do(writer.add, piece, arrays, {**facts, "seconds": round(now - begun, 4)})
                begun = now
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped after {len(writer.records)} of {len(pieces)} shards; the same command goes on from there"
        ) from None
    if kept:
        console.say(f"went on from {kept} of {len(pieces)} shards that were there, whole")


def numbers_of(head: nn.Linear, classes: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight [K, D] and bias [K] of a linear layer, zeros where it has none."""
    bias = torch.zeros(classes) if head.bias is None else head.bias.detach()
    return head.weight.detach().float().cpu().numpy(), bias.float().cpu().numpy()


def _report(manifest: Manifest, settings: CacheSettings, console: Console) -> None:
    """What was written."""
    rows = sum(n * (manifest.draws if split == "train" else 1) for split, n in manifest.splits.items())
    record: dict[str, Any] = {
        "cache": settings.out,
        "settings": asdict(settings),
        "fingerprint": manifest.fingerprint,
        "draws": manifest.draws,
        "rows": rows,
        "bytes": manifest.bytes,
        "seconds": manifest.seconds,
        "pictures_per_second": round(rows / manifest.seconds, 1) if manifest.seconds else None,
        "teacher": manifest.teacher,
        "fidelity": manifest.fidelity,
    }
    if settings.json:
        return console.result(json.dumps(record))
    kl = ", ".join(f"{manifest.fidelity[f'kl_{T}']:.1e} at T={T}" for T in (1, 2, 4, 8))
    accuracy = ", ".join(
        f"{split} {found['accuracy']:.4f}"
        for split, found in manifest.teacher.items()
        if found["accuracy"] is not None
    )
    console.say(
        f"cache:   {settings.out} ({manifest.fingerprint[:12]}),"
        f" {manifest.draws} draw{'s' if manifest.draws > 1 else ''} of {manifest.splits['train']:,} views"
    )
    pace = f", {rows / manifest.seconds:,.0f} pictures a second" if manifest.seconds else ""
    size = f"{manifest.bytes / rows:.1f} bytes a view"
    console.say(f"wrote:   {rows:,} rows, {size}, in {duration(manifest.seconds)}{pace}")
    mixed = ", train on mixed views" if manifest.identity["views"]["mixup"] else ""
    console.say(f"teacher: accuracy {accuracy or 'unknown, there are no labels'}{mixed}")
    console.say(
        f"codec:   {settings.codec} costs KL {kl}; {manifest.fidelity['flips']:.4%} of rows change their first class"
    )
    data = settings.data if settings.data.startswith("folder:") else ""
    student = StudentSettings(data=data, data_root=settings.data_root, cache=(settings.out,), baseline=True)
    console.say(f"next:    {command('student', student)}")
