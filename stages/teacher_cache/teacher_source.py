"""Which teacher stage one runs: weights from a file, a run or torchvision, or one that is trained first."""

from dataclasses import replace
from pathlib import Path

import torch

from softcache.base.errors import CacheError, UsageError
from softcache.data.transfer_set import TransferSet
from softcache.data.views import ViewPolicy
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.models import build
from softcache.pipeline.models.archs.torchvision_models import load_published_weights
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from softcache.pipeline.models.state_dicts import find_weights_file, hash_weights, load_weights, read_state_dict
from softcache.stages.cli.configs import CacheConfig, TeacherConfig
from softcache.stages.cli.console import Console, format_duration
from softcache.stages.distributed.ranks import broadcast_from_first
from softcache.stages.runs.folder import read_json
from softcache.stages.teacher.command import fill_defaults, train_teacher
from softcache.stages.teacher.data import SPLIT_OPTIONS, make_input_spec


def load_teacher(
    config: CacheConfig, transfer_set: TransferSet, views: ViewPolicy, console: Console
) -> tuple[PreparedModel, str]:
    """The teacher with its weights, and its arch. Raises UsageError or CacheError where they do not fit."""
    if not config.weights:
        kept = broadcast_from_first(lambda: _train_teacher(config, console))  # of several ranks one trains it
        config = replace(config, weights=kept, teacher="", normalize="")
    if config.weights == "DEFAULT":
        return _load_published(config, transfer_set)
    path = Path(config.weights)
    seeds = sorted(path.glob("seed-*"))
    if seeds and find_weights_file(path) == path:
        raise UsageError(f"the run '{path}' is of several seeds: name one of them, such as --weights {seeds[0]}")
    if not path.exists():
        raise UsageError(f"there are no weights at '{path}'")
    arch, input_spec = config.teacher, None
    if path.is_dir() and (path / "result.json").is_file():
        arch, input_spec = _read_run(path, config)
        _note_another_cut(path, config, console)
    if not arch:
        raise UsageError(f"--weights {path} does not say which arch it is: name it with --teacher")
    state = read_state_dict(find_weights_file(path))
    if input_spec is None:
        input_spec = make_input_spec(config.normalize or "data", transfer_set, views)
    if input_spec.channels < transfer_set.channels:
        raise UsageError(f"the teacher takes {input_spec.channels} channel, the images have {transfer_set.channels}")
    classes = len(transfer_set.classes) or _count_classes(state, path)
    network = build(arch, classes, input_spec.channels, input_spec.size)
    load_weights(network, state, str(path))
    return PreparedModel(network, input_spec), arch


def load_cache_teacher(cache: Cache, weights: str, arch: str) -> PreparedModel:
    """The teacher that a cache is of. Its weights must be those of the identity. Raises CacheError with both digests.

    arch: named by the user, where it is code of theirs: a manifest's word is not taken for what is imported.
    """
    recorded = cache.teacher
    if arch != recorded and (arch or (":" in recorded and not recorded.startswith(("mlp:", "torchvision:")))):
        raise UsageError(f"the cache's teacher is {recorded!r}: name it with --teacher, if you trust that code")
    input_spec = cache.input_spec
    network = build(recorded, cache.classes, input_spec.channels, input_spec.size)
    if weights == "DEFAULT":
        state = load_published_weights(recorded.partition(":")[2])[0]
    else:
        state = read_state_dict(find_weights_file(Path(weights)))
    load_weights(network, state, weights)
    mine, theirs = hash_weights(network), cache.manifest.identity["teacher"]["weights"]
    if mine != theirs:
        raise CacheError(f"'{weights}' are other weights: teacher.weights {mine[:16]}…, in the cache {theirs[:16]}…")
    return PreparedModel(network, input_spec).eval()


def _count_classes(state: dict[str, torch.Tensor], source: Path) -> int:
    """The classes of a teacher for images that have none: the rows of its last matrix."""
    matrices = [weight for weight in state.values() if weight.ndim == 2]
    if not matrices:
        raise UsageError(f"the weights of {source} do not show how many classes there are, nor do the images")
    return int(matrices[-1].shape[0])


def _read_run(path: Path, config: CacheConfig) -> tuple[str, InputSpec]:
    """Arch and preparation of a run's teacher or student. What the command says must agree with them."""
    result = read_json(path / "result.json")
    try:
        record = result["student"] if (path / "student.pt").is_file() else result["teacher"]
        arch, input_spec = str(record["arch"]), InputSpec.from_json(record["preparation"])
    except (KeyError, TypeError, ValueError):
        raise CacheError(f"'{path / 'result.json'}' does not say what its weights are") from None
    if config.teacher and config.teacher != arch:
        raise UsageError(f"--teacher {config.teacher}, but the run '{path}' is of {arch}")
    if config.normalize:
        raise UsageError(
            f"--normalize {config.normalize}, but the run '{path}' says itself how its input is normalised"
        )
    return arch, input_spec


def _note_another_cut(path: Path, config: CacheConfig, console: Console) -> None:
    """Say so when the teacher was trained on other rows of these data than are its training rows here."""
    if not (path / "settings.json").is_file():
        return
    kept = read_json(path / "settings.json")
    cut = [name for name in SPLIT_OPTIONS if name in kept]
    differ = [f"{n} {kept[n]} there, {here} here" for n in cut if kept[n] != (here := getattr(config, n))]
    if "val_fraction" in cut and kept.get("data") == config.data and differ:
        console.print(
            f"the teacher in '{path}' was trained on another cut ({'; '.join(differ)}): it may have learned rows of"
            " validation; fits, --select and tune would believe it too much"
        )


def _train_teacher(config: CacheConfig, console: Console) -> str:
    """No teacher was named: train one by the recipe, and keep it beside the cache; its folder."""
    folder = Path(f"{config.out}-teacher")
    asked = fill_defaults(
        TeacherConfig(
            data=config.data,
            data_root=config.data_root,
            arch=config.teacher,
            normalize=config.normalize or "data",
            device=config.device,
            workers=config.workers,
            out=str(folder),
            **{name: getattr(config, name) for name in SPLIT_OPTIONS},
        )
    )
    if (folder / "settings.json").is_file():
        kept = read_json(folder / "settings.json")
        same = ("data", "arch", "normalize", *SPLIT_OPTIONS)
        differ = [f"{k} {kept.get(k)} there, {v} asked" for k in same if kept.get(k) != (v := getattr(asked, k))]
        if differ:
            raise CacheError(
                f"the teacher in '{folder}' is another one ({'; '.join(differ)}):"
                " name it with --weights, or choose another --out"
            )
    if (folder / "result.json").is_file():
        console.print(f"no --weights: using the teacher kept in '{folder}'")
    else:
        console.print(f"no --weights: training the teacher {asked.arch} first, kept in '{folder}'")
        asked = replace(asked, resume=(folder / "settings.json").is_file())  # stopped before: it goes on
        result = train_teacher(asked, folder, console, advice="; WEIGHTS=… (--weights) skips it")
        figures = result["teacher"]["test"] or result["teacher"]["val"]
        seconds = format_duration(result["seconds"]["train"])
        console.print(f"teacher {asked.arch}: accuracy {figures['accuracy']:.4f} in {seconds}")
    return str(folder)


def _load_published(config: CacheConfig, transfer_set: TransferSet) -> tuple[PreparedModel, str]:
    """torchvision's own weights: its image size and normalisation, grey images repeated to three channels."""
    arch = config.teacher
    if not arch.startswith("torchvision:"):
        raise UsageError("--weights DEFAULT wants --teacher torchvision:NAME")
    state, size, mean, std, names = load_published_weights(arch.partition(":")[2])
    if transfer_set.classes and len(transfer_set.classes) != len(names):
        raise UsageError(
            f"the published weights of {arch} know {len(names)} classes, the data have {len(transfer_set.classes)}"
        )
    network = build(arch, len(names), 3, size)
    load_weights(network, state, f"{arch} DEFAULT")
    return PreparedModel(network, InputSpec(3, size, tuple(mean), tuple(std))), arch
