"""`stages teacher-cache`: stage one. Run the teacher once and keep what it said."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data.errors import Interrupted, Refused, WrongCommand, unknown
from data.transfer_set import TransferSet, load, row_of
from data.views import ViewPolicy, parse_views
from pipeline.cache import crc32, row_order
from pipeline.codec import CODECS, fidelity
from pipeline.identity import identity_of
from pipeline.manifest import Manifest
from pipeline.models import build, head_of
from pipeline.models.from_torchvision import published
from pipeline.models.prepared import Preparation, Prepared
from pipeline.models.weights import load_state, read_state, run_weights, weights_digest
from pipeline.records import Outputs
from pipeline.shards import Arrays
from pipeline.stream import render_in_order
from pipeline.taps import tapped
from pipeline.writer import Piece, Plan, Writer, datasets_of

from . import teacher as teacher_stage
from .console import Console, LongWork, bar, duration, progress
from .runs import device_of, read_json, versions
from .settings import CacheSettings, TeacherSettings
from .training import autocast


def run(settings: CacheSettings) -> None:
    """Data, views, teacher; then shard after shard; then the manifest."""
    console = Console(settings.json)
    settings, views, taps = _checked(settings)
    device, out = device_of(settings.device), Path(settings.out)
    transfer_set = load(
        settings.data, Path(settings.data_root), val_fraction=settings.val_fraction, seed=settings.seed,
        train_size=settings.train_size, progress=progress,
    )  # fmt: skip
    views = teacher_stage.with_size(views, transfer_set)
    teacher, name, advice = _teacher(settings, transfer_set, views, console)
    teacher = teacher.to(device).eval()
    ask = Ask(transfer_set, views, teacher, taps, settings, device)
    plan = _plan(settings, transfer_set, views, name, ask)
    writer = Writer.begin(out, plan)
    if writer.finished is None:
        _write(writer, ask, console, f"{advice}; stopped, the same command goes on from there")
        head = head_of(teacher.network, ask.classes)
        record = None if head is None else writer.add_head(*_numbers(head, ask.classes))
        labelled = {split: int((rows.labels >= 0).sum()) for split, rows in transfer_set.splits.items()}
        manifest = writer.finish(record, labelled, versions())
    else:
        console.say(f"the cache '{out}' is whole already, and the one that is asked for")
        manifest = writer.finished
    _report(manifest, settings, console)


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
    taps = tuple(dict.fromkeys(tap for tap in settings.taps.split(",") if tap))
    return settings, parse_views(settings.views), taps


def _teacher(
    settings: CacheSettings, transfer_set: TransferSet, views: ViewPolicy, console: Console
) -> tuple[Prepared, str, str]:
    """The teacher with its weights, its arch, and how to make stage one shorter."""
    if not settings.weights:
        settings = _train_one(settings, console)
    if settings.weights == "DEFAULT":
        return *_published(settings, transfer_set, views), ""
    path = Path(settings.weights)
    arch, preparation = settings.teacher, None
    if path.is_dir() and (path / "result.json").is_file():
        arch, preparation = _of_run(path, settings)
    if not arch:
        raise WrongCommand(f"--weights {path} does not say which arch it is: name it with --teacher")
    state = read_state(run_weights(path))
    if preparation is None:
        preparation = teacher_stage.preparation_of(settings.normalize or "data", transfer_set, views)
    if preparation.channels < transfer_set.channels:
        raise WrongCommand(
            f"the teacher takes {preparation.channels} channel, the pictures have {transfer_set.channels}"
        )
    classes = len(transfer_set.classes) or _classes_in(state)
    network = build(arch, classes, preparation.channels, preparation.size)
    load_state(network, state, str(path))
    return Prepared(network, preparation), arch, ""


def _classes_in(state: dict[str, torch.Tensor]) -> int:
    """The classes of a teacher for pictures that have none: the length of its last bias or weight."""
    return int(list(state.values())[-1].shape[0])


def _of_run(path: Path, settings: CacheSettings) -> tuple[str, Preparation]:
    """Arch and preparation of a run's teacher or student. What the command says must agree with them."""
    result = read_json(path / "result.json")
    try:
        record = result["student"] if (path / "student.pt").is_file() else result["teacher"]
        arch, preparation = str(record["arch"]), Preparation.from_json(record["preparation"])
    except (KeyError, TypeError, ValueError):
        raise Refused(f"'{path / 'result.json'}' does not say what its weights are") from None
    if settings.teacher and settings.teacher != arch:
        raise WrongCommand(f"--teacher {settings.teacher}, but the run '{path}' is of {arch}")
    if settings.normalize:
        raise WrongCommand(
            f"--normalize {settings.normalize}, but the run '{path}' says itself how its input is normalised"
        )
    return arch, preparation


def _train_one(settings: CacheSettings, console: Console) -> CacheSettings:
    """No teacher was named: train one by the recipe, keep it beside the cache, and go on with it."""
    folder = Path(f"{settings.out}-teacher")
    asked = teacher_stage.with_recipe(
        TeacherSettings(
            data=settings.data, data_root=settings.data_root, arch=settings.teacher, seed=settings.seed,
            normalize=settings.normalize or "data", val_fraction=settings.val_fraction,
            train_size=settings.train_size, device=settings.device, workers=settings.workers, out=str(folder),
        )
    )  # fmt: skip
    if (folder / "result.json").is_file():
        kept = read_json(folder / "settings.json")
        same = ("data", "arch", "seed", "normalize", "val_fraction", "train_size")
        differ = [
            f"{k} {kept.get(k)} there, {getattr(asked, k)} asked" for k in same if kept.get(k) != getattr(asked, k)
        ]
        if differ:
            raise Refused(
                f"the teacher in '{folder}' is another one ({'; '.join(differ)}): name it with --weights, or choose another --out"
            )
        console.say(f"no --weights: using the teacher kept in '{folder}'")
    else:
        console.say(f"no --weights: training the teacher {asked.arch} first, kept in '{folder}'")
        folder.mkdir(parents=True, exist_ok=True)
        result = teacher_stage.train(asked, folder, console, advice="; WEIGHTS=… (--weights) skips it")
        figures = result["teacher"]["test"] or result["teacher"]["val"]
        console.say(
            f"teacher {asked.arch}: accuracy {figures['accuracy']:.4f} in {duration(result['seconds']['train'])}"
        )
    return replace(settings, weights=str(folder), teacher="", normalize="")


def _published(settings: CacheSettings, transfer_set: TransferSet, views: ViewPolicy) -> tuple[Prepared, str]:
    """torchvision's own weights: its picture size and normalisation, grey pictures repeated to three channels."""
    arch = settings.teacher
    if not arch.startswith("torchvision:"):
        raise WrongCommand("--weights DEFAULT wants --teacher torchvision:NAME")
    state, size, mean, std, names = published(arch.partition(":")[2])
    if transfer_set.classes and len(transfer_set.classes) != len(names):
        raise WrongCommand(
            f"the published weights of {arch} know {len(names)} classes, the data have {len(transfer_set.classes)}"
        )
    network = build(arch, len(names), 3, size)
    load_state(network, state, f"{arch} DEFAULT")
    return Prepared(network, Preparation(3, size, tuple(mean), tuple(std))), arch


@dataclass
class Ask:
    """The teacher, and the views it is asked about. classes and shapes: K, and {tap: row shape}, seen on two views."""

    transfer_set: TransferSet
    views: ViewPolicy
    teacher: Prepared
    taps: tuple[str, ...]
    settings: CacheSettings
    device: torch.device

    def __post_init__(self) -> None:
        index = np.arange(min(2, len(self.transfer_set.splits["train"])))
        said = next(self._answers("train", 0, index))[1]
        self.classes = said.logits.shape[1]
        self.shapes = {tap: list(x.shape[1:]) for tap, x in said.features.items()}
        if self.transfer_set.classes and self.classes != len(self.transfer_set.classes):
            raise WrongCommand(
                f"the teacher knows {self.classes} classes, the data have {len(self.transfer_set.classes)}"
            )

    def piece(self, piece: Piece, shown: Any) -> tuple[Arrays, dict[str, float]]:
        """The rows of a shard, and what its codec cost."""
        order = row_order(self.settings.seed, piece.split, len(self.transfer_set.splits[piece.split]))
        index = order[piece.start : piece.start + piece.rows]
        logits = np.empty((piece.rows, self.classes), np.float32)
        features = {tap: np.empty((piece.rows, *shape), np.float16) for tap, shape in self.shapes.items()}
        crcs, at = np.empty(piece.rows, np.uint32), 0
        for views, said in self._answers(piece.split, piece.draw, index):
            rows = slice(at, at := at + len(views))
            crcs[rows], logits[rows] = crc32(views), said.logits.numpy()
            self._finite(piece, index[rows], logits[rows], "output", CODECS[self.settings.codec].largest)
            for tap, values in said.features.items():
                self._finite(piece, index[rows], values.flatten(1).numpy(), f"tap '{tap}'", 65504.0)
                features[tap][rows] = values.numpy()
            shown(len(views))
        labels = self.transfer_set.splits[piece.split].labels[index]
        codec = CODECS[self.settings.codec]
        stored = codec.encode(logits)
        decoded = codec.decode(stored)
        keys = {"index": index.astype("<u4"), "label": labels.astype("<i4"), "view_crc32": crcs.astype("<u4")}
        arrays: Arrays = {**stored, **{f"features/{tap}": x for tap, x in features.items()}, **keys}
        return arrays, {"correct": int((decoded.argmax(1) == labels).sum()), **fidelity(logits, decoded)}

    def _answers(self, split: str, draw: int, index: NDArray[np.int64]) -> Iterator[tuple[torch.Tensor, Outputs]]:
        """Batches of views, and what the teacher says about them, on the CPU in float32."""
        policy = self.views if split == "train" else self.views.plain()
        size, s = self.settings.batch_size, self.settings
        batches = [index[i : i + size] for i in range(0, len(index), size)]
        pictures = self.transfer_set.splits[split].pictures
        with torch.inference_mode(), tapped(self.teacher.network, self.taps) as kept:
            for views in render_in_order(pictures, policy, s.seed, batches, draw, s.workers):
                with autocast(self.device, s.precision):
                    logits = self.teacher(views.to(self.device, non_blocking=True))
                if logits.ndim != 2:
                    raise WrongCommand(f"the teacher gives {list(logits.shape)} for {len(views)} views, not [B, K]")
                yield views, Outputs(logits.float().cpu(), {tap: x.float().cpu() for tap, x in kept.items()})

    def _finite(
        self, piece: Piece, index: NDArray[np.int64], values: NDArray[np.float32], what: str, largest: float
    ) -> None:
        bad = np.flatnonzero(~(np.abs(values) <= largest).all(1))
        if len(bad):
            worst = values[bad[0]][~(np.abs(values[bad[0]]) <= largest)][0]
            raise Refused(
                f"the teacher's {what} for {piece.split} index {index[bad[0]]}, draw {piece.draw} is {worst}:"
                f" it cannot be kept (largest {largest:g})"
            )


def _plan(settings: CacheSettings, transfer_set: TransferSet, views: ViewPolicy, arch: str, ask: Ask) -> Plan:
    """Identity and extent of the cache to be."""
    known = {
        "arch": arch,
        "weights": weights_digest(ask.teacher.network),
        **ask.teacher.preparation.identity(),
    }
    identity = identity_of(transfer_set, views, settings.seed, known, settings.codec, settings.precision)
    splits = {split: len(rows) for split, rows in transfer_set.splits.items()}
    datasets = datasets_of(ask.classes, settings.codec, ask.shapes)
    return Plan(json.loads(json.dumps(identity)), settings.draws, splits, ask.shapes, datasets, settings.shard_rows)


def _write(writer: Writer, ask: Ask, console: Console, advice: str) -> None:
    """Every shard that is not there yet."""
    pieces = list(writer.plan.pieces())
    total = sum(piece.rows for piece in pieces)
    kept = 0
    long_work = LongWork(console, "Running the teacher", total, advice)
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
    if kept:
        console.say(f"went on from {kept} of {len(pieces)} shards that were there, whole")


def _numbers(head: nn.Linear, classes: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    bias = torch.zeros(classes) if head.bias is None else head.bias.detach()
    return head.weight.detach().float().cpu().numpy(), bias.float().cpu().numpy()


def _report(manifest: Manifest, settings: CacheSettings, console: Console) -> None:
    """What was written."""
    rows = sum(n * (manifest.draws if split == "train" else 1) for split, n in manifest.splits.items())
    record = {"cache": settings.out, "settings": asdict(settings), "fingerprint": manifest.fingerprint}
    record |= {"rows": rows, "bytes": manifest.bytes, "seconds": manifest.seconds}
    record |= {"teacher": manifest.teacher, "fidelity": manifest.fidelity, "draws": manifest.draws}
    if settings.json:
        return console.result(json.dumps(record))
    kl = ", ".join(f"{manifest.fidelity[f'kl_{T}']:.1e} at T={T}" for T in (1, 2, 4, 8))
    accuracy = ", ".join(
        f"{split} {found['accuracy']:.4f}"
        for split, found in manifest.teacher.items()
        if found["accuracy"] is not None
    )
    console.say(
        f"cache:   {settings.out} ({manifest.fingerprint[:12]}), {manifest.draws} draws of {manifest.splits['train']:,} views"
    )
    console.say(f"wrote:   {rows:,} rows, {manifest.bytes / rows:.1f} bytes a view, in {duration(manifest.seconds)}")
    console.say(f"teacher: accuracy {accuracy or 'unknown, there are no labels'}")
    console.say(
        f"codec:   {settings.codec} costs KL {kl}; {manifest.fidelity['flips']:.4%} of rows change their first class"
    )
    console.say(f"next:    python -m stages student --cache {settings.out} --baseline")
