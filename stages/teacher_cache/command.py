"""`softcache teacher-cache`: stage one. Run the teacher once and keep what it said.

Under torchrun each rank asks a teacher of its own about every world-th shard. Rank 0 alone holds the lock, claims the
folder and writes the manifest; the others share nothing with it but the files, for a shard vouches for itself. Rows
do not depend on the number of ranks. Where a CPU asks, they may depend in the last bit of float32 on its threads, as
they do without ranks: `mlp:800,800` and `cnn` at 28 px with 1 and 2 threads differ by 5e-7, resnets do not. torchrun
gives each rank one thread unless OMP_NUM_THREADS says otherwise; the same OMP_NUM_THREADS gives the same bits.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError, CacheMismatchError, unknown_name_error
from softcache.base.files import make_folder
from softcache.base.lock import hold_lock
from softcache.data.sources import short_name
from softcache.data.transfer_set import TransferSet
from softcache.data.views import ViewPolicy, parse_views
from softcache.pipeline.cache.codecs import CODECS
from softcache.pipeline.cache.existing import Complete, read_existing, read_inference_settings
from softcache.pipeline.cache.identity import Identity, compute_fingerprint, make_identity
from softcache.pipeline.cache.manifest import Manifest
from softcache.pipeline.cache.manifest_reader import read_manifest
from softcache.pipeline.cache.plan import CachePlan
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.cache.verification import verify_views
from softcache.pipeline.cache.writer import CacheWriter, check_same_identity, clean_up
from softcache.pipeline.models import find_head, get_head_arrays
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.pipeline.models.state_dicts import hash_weights
from softcache.pipeline.taps.statistics import normalize_tap
from softcache.stages.cli.configs import CacheConfig, StudentConfig
from softcache.stages.cli.console import Console, format_duration
from softcache.stages.cli.copied_commands import find_free_name, format_command
from softcache.stages.cli.defaults import find_defaults
from softcache.stages.distributed import ranks
from softcache.stages.runs.environment import library_versions, select_device
from softcache.stages.teacher.data import fill_size, load_data

from .cache_readme import write_readme
from .precision import ChosenPrecision, choose_precision, restore_precision, resume_precision
from .reproducibility import check_reproducibility
from .targets import TargetGenerator
from .teacher_source import load_teacher
from .trials import TrialViews
from .writing import write_shards


def run(config: CacheConfig) -> None:
    """Make the cache, and say what it is."""
    console = Console(config.json)
    with ranks.process_group(config.device):
        if not ranks.is_first():
            return write_share(config, console)
        config, manifest = make_cache(config, console)
        _print_report(manifest, config, console)


def make_cache(config: CacheConfig, console: Console) -> tuple[CacheConfig, Manifest]:
    """Data, views, teacher; then shard after shard; then the manifest. Returns settings with defaults filled in."""
    with _name_other_cache(config):
        config, identity, ask, chosen = _prepare(config, console)
        return config, _write_cache(config, identity, ask, chosen, console)


def write_share(config: CacheConfig, console: Console) -> None:
    """What another rank than the first does: its share of the shards, once the first has claimed the folder."""
    config, identity, ask, chosen = _prepare(config, console)
    if ranks.broadcast_from_first(lambda: True):
        write_shards(CacheWriter.examine(Path(config.out), _plan(config, identity, ask, chosen)), ask, chosen, console)


@contextmanager
def _name_other_cache(config: CacheConfig) -> Iterator[None]:
    """Where the cache that is there is another one, the command for the one that is asked for."""
    try:
        yield
    except CacheMismatchError as error:
        config = _fill_defaults(config)[0]
        right = format_command("teacher-cache", config, out=find_free_name(config.out))
        raise CacheError(f"{error}\nMake the one that is asked for with  {right}") from None


def _prepare(config: CacheConfig, console: Console) -> tuple[CacheConfig, Identity, TargetGenerator, ChosenPrecision]:
    """The settings with the defaults filled in, what the rows are to be, and who is asked about what."""
    config, views, taps = _fill_defaults(config)
    transfer_set = ranks.first_rank_first(lambda: load_data(config))
    views = fill_size(views, transfer_set, console)
    teacher, arch = load_teacher(config, transfer_set, views, console)
    teacher = teacher.to(select_device(config.device)).eval()
    identity = _identity(config, transfer_set, views, teacher, arch)
    chosen, taps = _decide_precision(config, identity, TrialViews(transfer_set, views, config), teacher, taps, console)
    identity = {**identity, "precision": chosen.inference.precision}
    ranks.check_equal("cache in mind", compute_fingerprint(identity))
    return config, identity, TargetGenerator(transfer_set, views, chosen.inference, config), chosen


def _fill_defaults(config: CacheConfig) -> tuple[CacheConfig, ViewPolicy, tuple[str, ...]]:
    """The settings with the defaults filled in, before anything slow is done."""
    data = config.data or "digits"
    defaults = find_defaults(data)
    config = replace(
        config,
        data=data,
        views=config.views or defaults.views,
        draws=config.draws or defaults.draws,
        val_fraction=config.val_fraction or defaults.val_fraction,
        out=config.out or f"caches/{short_name(data)}",
    )
    if config.codec not in CODECS:
        raise unknown_name_error("codec", config.codec, CODECS)
    taps = tuple(dict.fromkeys(normalize_tap(tap) for tap in config.taps.split(",") if tap))
    return config, parse_views(config.views), taps


def _identity(
    config: CacheConfig, transfer_set: TransferSet, views: ViewPolicy, teacher: PreparedModel, arch: str
) -> Identity:
    """What the rows of the cache to be are, but for the precision where it is still to be chosen."""
    known = {"arch": arch, "weights": hash_weights(teacher.network), **teacher.input_spec.to_json()}
    identity = make_identity(transfer_set, views, config.seed, known, config.codec, config.precision)
    plain: Identity = json.loads(json.dumps(identity))
    return plain


def _decide_precision(
    config: CacheConfig,
    identity: Identity,
    verify_views: TrialViews,
    teacher: PreparedModel,
    taps: tuple[str, ...],
    console: Console,
) -> tuple[ChosenPrecision, tuple[str, ...]]:
    """How the teacher is asked, as rank 0 finds it, and all taps: those of a cache that is there, those asked for.

    Raises CacheMismatchError.
    """
    found: list[ChosenPrecision] = []

    def decide() -> dict[str, Any]:
        out = Path(config.out)
        existing = read_existing(out)
        previous = read_inference_settings(out, existing, identity)
        if isinstance(existing, Complete):  # before the teacher is asked for the layers of another one
            manifest = existing.manifest
            precision = manifest.identity["precision"] if config.precision == "auto" else config.precision
            check_same_identity(out, {**identity, "precision": precision}, {}, manifest)
        every = tuple(dict.fromkeys((*(previous.taps if previous else ()), *taps)))
        chosen = resume_precision(config, previous, teacher, every) or choose_precision(
            config, verify_views, teacher, every, console
        )
        found.append(chosen)
        return {"taps": list(every), **chosen.to_json()}

    told = ranks.broadcast_from_first(decide)
    every = tuple(told["taps"])
    return (found[0] if found else restore_precision(told, teacher, every, verify_views, console)), every


def _plan(config: CacheConfig, identity: Identity, ask: TargetGenerator, chosen: ChosenPrecision) -> CachePlan:
    splits = {split: len(rows) for split, rows in ask.transfer_set.splits.items()}
    kept = (config.shard_rows, _settings_to_store(config), chosen.precision_record)
    return CachePlan(identity, ask.classes, config.draws, splits, ask.shapes, *kept)


def _write_cache(
    config: CacheConfig, identity: Identity, ask: TargetGenerator, chosen: ChosenPrecision, console: Console
) -> Manifest:
    """Write what is not there yet; the manifest of it all."""
    out, transfer_set = Path(config.out), ask.transfer_set
    plan = _plan(config, identity, ask, chosen)
    if (whole := CacheWriter.examine(out, plan)).is_complete:  # needs no lock: the cache may be on a read-only mount
        clean_up(out)
        console.print(f"the cache '{out}' is whole already, with all that is asked for")
        ranks.broadcast_from_first(lambda: False)
        return whole.previous or read_manifest(out)
    make_folder(out)
    with hold_lock(out):
        writer = CacheWriter.examine(out, plan)
        if writer.previous and writer.missing:
            console.print(f"the cache '{out}' grows by {len(writer.missing)} shards; what it holds is left as it is")
            verify_views(Cache(out), transfer_set, writer.previous.draws)
            check_reproducibility(Cache(out), ask).raise_if_different()
        writer.start()
        if writer.previous and not writer.missing:
            console.print(f"the cache '{out}' is whole already, with all that is asked for")
            ranks.broadcast_from_first(lambda: False)
            return writer.previous
        if set(writer.plan.taps) != set(ask.taps):
            raise CacheError(f"'{out}' was given other taps while this began: run the same command again")
        if chosen.is_resumed and (chosen.precision_record or config.precision == "auto"):
            how = f", {chosen.precision_record.describe()}" if chosen.precision_record else ""
            console.print(f"precision: {identity['precision']}{how}; as this cache was begun")
        ranks.broadcast_from_first(lambda: True)
        write_shards(writer, ask, chosen, console)
        head = find_head(ask.teacher.network, ask.classes)
        record = None if head is None or writer.previous else writer.add_head(*get_head_arrays(head, ask.classes))
        labelled = {split: int((rows.labels >= 0).sum()) for split, rows in transfer_set.splits.items()}
        manifest = writer.build_manifest(record, labelled, library_versions())
        write_readme(out, writer.previous, manifest)
        writer.publish_manifest(manifest)
        return manifest


def _settings_to_store(config: CacheConfig) -> dict[str, Any]:
    """The settings that another machine can repeat: no path of this one, but the last part of its name."""
    here = ("data_root", "device", "workers", "json", "out", "draws", "taps")
    kept = {name: value for name, value in asdict(config).items() if name not in here}
    kept["weights"] = Path(config.weights).name
    kept["data"] = "folder:PATH" if config.data.startswith("folder:") else config.data
    return kept


def _print_report(manifest: Manifest, config: CacheConfig, console: Console) -> None:
    """What was written."""
    rows = sum(n * (manifest.draws if split == "train" else 1) for split, n in manifest.splits.items())
    record: dict[str, Any] = {
        "cache": config.out,
        "settings": asdict(config),
        "fingerprint": manifest.fingerprint,
        "draws": manifest.draws,
        "rows": rows,
        "bytes": manifest.bytes,
        "seconds": manifest.seconds,
        "pictures_per_second": round(rows / manifest.seconds, 1) if manifest.seconds else None,
        "teacher": manifest.teacher,
        "fidelity": manifest.fidelity,
    }
    if config.json:
        return console.print_json(json.dumps(record))
    kl = ", ".join(f"{manifest.fidelity[f'kl_{T}']:.1e} at T={T}" for T in (1, 2, 4, 8))
    accuracy = ", ".join(
        f"{split} {found['accuracy']:.4f}"
        for split, found in manifest.teacher.items()
        if found["accuracy"] is not None
    )
    console.print(
        f"cache:   {config.out} ({manifest.fingerprint[:12]}),"
        f" {manifest.draws} draw{'s' if manifest.draws > 1 else ''} of {manifest.splits['train']:,} views"
    )
    pace = f", {rows / manifest.seconds:,.0f} images a second" if manifest.seconds else ""
    size = f"{manifest.bytes / rows:.1f} bytes a view"
    console.print(f"wrote:   {rows:,} rows, {size}, in {format_duration(manifest.seconds)}{pace}")
    mixed = ", train on mixed views" if manifest.identity["views"]["mixup"] else ""
    console.print(f"teacher: accuracy {accuracy or 'unknown, there are no labels'}{mixed}")
    console.print(
        f"codec:   {config.codec} costs KL {kl}; {manifest.fidelity['flips']:.4%} of rows change their first class"
    )
    data = config.data if config.data.startswith("folder:") else ""
    student = StudentConfig(data=data, data_root=config.data_root, cache=(config.out,), baseline=True)
    console.print(f"next:    {format_command('student', student)}")
