"""`stages teacher-cache`: stage one. Run the teacher once and keep what it said.

Under torchrun each rank asks a teacher of its own about every world-th shard. Rank 0 alone holds the lock, claims the
folder and writes the manifest; the others share nothing with it but the files, for a shard vouches for itself. Rows
do not depend on the number of ranks. Where a CPU asks, they may depend in the last bit of float32 on its threads, as
they do without ranks: `mlp:800,800` and `cnn` at 28 px with 1 and 2 threads differ by 5e-7, resnets do not. torchrun
gives each rank one thread unless OMP_NUM_THREADS says otherwise; the same OMP_NUM_THREADS gives the same bits.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from pipeline.cache import Cache
from pipeline.codec import CODECS
from pipeline.files import make_folder
from pipeline.identity import Identity, fingerprint, identity_of
from pipeline.lock import held
from pipeline.manifest import NAME, Manifest, Piece
from pipeline.models import head_of
from pipeline.models.prepared import Prepared
from pipeline.models.weights import weights_digest
from pipeline.proof import probe
from pipeline.reading import read_manifest
from pipeline.recover import extent_of, lost_pieces
from pipeline.statistic import plain_tap
from pipeline.writer import Plan, Writer, refuse_another, sweep

from . import ranks
from . import teacher as teacher_stage
from .asking import Ask
from .asking_again import again
from .card import write_card
from .command_line import command, free_name
from .console import Console, LongWork, bar, duration
from .runs import device_of, versions
from .settings import CacheSettings, StudentSettings
from .which_teacher import teacher_of


def run(settings: CacheSettings) -> None:
    """Make the cache, and say what it is."""
    console = Console(settings.json)
    with ranks.joined(settings.device):
        if not ranks.is_first():
            return assist(settings, console)
        settings, manifest = make(settings, console)
        _report(manifest, settings, console)


def make(settings: CacheSettings, console: Console) -> tuple[CacheSettings, Manifest]:
    """Data, views, teacher; then shard after shard; then the manifest. The settings come back with the recipe in."""
    with _other_named(settings):
        settings, identity, ask = _asked(settings, console)
        return settings, _cache(settings, identity, ask, console)


def assist(settings: CacheSettings, console: Console) -> None:
    """What another rank than the first does: its share of the shards, once the first has claimed the folder."""
    settings, identity, ask = _asked(settings, console)
    if ranks.from_first(lambda: True):
        _write_shared(Writer.look(Path(settings.out), _plan(settings, identity, ask)), ask, console)


@contextmanager
def _other_named(settings: CacheSettings) -> Iterator[None]:
    """Where the cache that is there is another one, the command for the one that is asked for."""
    try:
        yield
    except OtherCache as error:
        settings = _checked(settings)[0]
        right = command("teacher-cache", settings, out=free_name(settings.out))
        raise Refused(f"{error}\nMake the one that is asked for with  {right}") from None


def _asked(settings: CacheSettings, console: Console) -> tuple[CacheSettings, Identity, Ask]:
    """The settings with the recipe in, what the rows are to be, and who is asked about what."""
    settings, views, taps = _checked(settings)
    transfer_set = teacher_stage.load_cut(settings)
    views = teacher_stage.with_size(views, transfer_set, console)
    teacher, arch = teacher_of(settings, transfer_set, views, console)
    teacher = teacher.to(device_of(settings.device)).eval()
    identity = _identity(settings, transfer_set, views, teacher, arch)
    ranks.agree("cache in mind", fingerprint(identity))
    taps = tuple(ranks.from_first(lambda: _with_taps_of(settings, identity, taps)))
    return settings, identity, Ask(transfer_set, views, teacher, taps, settings)


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
    """What the rows of the cache to be are."""
    known = {"arch": arch, "weights": weights_digest(teacher.network), **teacher.preparation.identity()}
    identity = identity_of(transfer_set, views, settings.seed, known, settings.codec, settings.precision)
    plain: Identity = json.loads(json.dumps(identity))
    return plain


def _with_taps_of(settings: CacheSettings, identity: Identity, taps: tuple[str, ...]) -> tuple[str, ...]:
    """The taps of a cache that is there already, and those that are asked for. Raises OtherCache."""
    out = Path(settings.out)
    if (out / NAME).is_file():
        manifest = read_manifest(out)
        refuse_another(out, identity, {}, manifest)
        there = manifest.taps
    else:
        there = extent_of(lost_pieces(out, fingerprint(identity), {}))[1]
    return tuple(dict.fromkeys((*there, *taps)))


def _plan(settings: CacheSettings, identity: Identity, ask: Ask) -> Plan:
    splits = {split: len(rows) for split, rows in ask.transfer_set.splits.items()}
    return Plan(identity, ask.classes, settings.draws, splits, ask.shapes, settings.shard_rows, _to_keep(settings))


def _cache(settings: CacheSettings, identity: Identity, ask: Ask, console: Console) -> Manifest:
    """Write what is not there yet; the manifest of it all."""
    out, transfer_set = Path(settings.out), ask.transfer_set
    plan = _plan(settings, identity, ask)
    if (whole := Writer.look(out, plan)).nothing_to_do:  # needs no lock: the cache may be on a read-only mount
        sweep(out)
        console.say(f"the cache '{out}' is whole already, with all that is asked for")
        ranks.from_first(lambda: False)
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
            ranks.from_first(lambda: False)
            return writer.grown
        if set(writer.plan.taps) != set(ask.taps):
            raise Refused(f"'{out}' was given other taps while this began: run the same command again")
        ranks.from_first(lambda: True)
        _write_shared(writer, ask, console)
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


def _write_shared(writer: Writer, ask: Ask, console: Console) -> None:
    """Every shard that is not there yet, each rank its share; then rank 0 takes over what the others wrote."""
    ranks.barrier()  # all have looked at what there is, before the first new shard changes that
    own = ranks.share(writer.todo)
    if kept := ranks.total(_write(writer, own, ask, console)):
        console.say(f"went on from {kept} of {len(writer.todo)} shards that were there, whole")
    mine = {piece.path for piece in own}
    others = [piece for piece in writer.todo if piece.path not in mine]
    if others and ranks.is_first():
        for piece in others:
            ranks.wait_for(writer.folder / piece.path)
        _write(writer, others, ask, console)  # asks for what is not there: a rank may have planned otherwise
        writer.sort()


def _write(writer: Writer, pieces: list[Piece], ask: Ask, console: Console) -> int:
    """Those of the shards that are not there yet; how many were there."""
    total = sum(piece.rows for piece in pieces)
    kept = 0
    long_work = LongWork(console, "Running the teacher", total, "; stopped, the same command goes on from there")
    try:
        with bar(total, "teacher-cache", "images") as shown:

            def count(rows: int) -> None:
                shown.update(rows)
                long_work.at(int(shown.n))

            for piece in pieces:
                if writer.have(piece):
                    kept += 1
                    shown.update(piece.rows)
                    shown.initial += piece.rows
                    continue
                begun = time.monotonic()
                arrays, facts = ask.piece(piece, count)
                writer.add(piece, arrays, {**facts, "seconds": round(time.monotonic() - begun, 4)})
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped after {len(writer.records)} of {len(pieces)} shards; the same command goes on from there"
        ) from None
    return kept


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
    console.say(f"wrote:   {rows:,} rows, {manifest.bytes / rows:.1f} bytes a view, in {duration(manifest.seconds)}")
    mixed = ", train on mixed views" if manifest.identity["views"]["mixup"] else ""
    console.say(f"teacher: accuracy {accuracy or 'unknown, there are no labels'}{mixed}")
    console.say(
        f"codec:   {settings.codec} costs KL {kl}; {manifest.fidelity['flips']:.4%} of rows change their first class"
    )
    data = settings.data if settings.data.startswith("folder:") else ""
    student = StudentSettings(data=data, data_root=settings.data_root, cache=(settings.out,), baseline=True)
    console.say(f"next:    {command('student', student)}")
