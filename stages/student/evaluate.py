"""`softcache evaluate`: a student's figures again, from its weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.pipeline.models.state_dicts import load_weights, read_state_dict
from softcache.stages.cli.configs import EvaluateConfig, StudentConfig
from softcache.stages.cli.console import Console
from softcache.stages.runs.folder import read_config, read_fingerprints, read_json

from .setup import DistillationSetup
from .teachers import open_caches


def run(name: str, config: EvaluateConfig, said: set[str]) -> None:
    """Every student of the run: its weights, the held-out splits, the teacher's cached logits."""
    console, folder = Console(config.json), Path(name)
    kept = read_json(folder / "settings.json")
    if "cache" not in kept:
        raise UsageError(f"'{folder}' is no run of a student")
    begun = read_config(folder, StudentConfig)
    here = {name: getattr(config, name) for name in said - {"json"}}
    begun = replace(begun, out=str(folder), **here)  # where things lie on this machine; the rest is as the run says
    check_same_teachers(folder, open_caches(begun.cache))
    setup = DistillationSetup.open(begun)
    seeds = range(begun.seed, begun.seed + begun.seeds)
    found: dict[str, Any] = {}
    for seed in seeds:
        own = folder if begun.seeds == 1 else folder / f"seed-{seed}"
        found[str(seed)] = _figures(own, begun, setup)
    if config.json:
        return console.print_json(json.dumps(found))
    for number, splits in found.items():
        for split, figures in splits.items():
            numbers = ", ".join(f"{k} {v:.4f}" for k, v in figures.items() if isinstance(v, float))
            console.print(f"seed {number}, {split}: {numbers}")


def check_same_teachers(folder: Path, caches: tuple[Cache, ...]) -> None:
    """Figures against the teacher are of the run's own caches, in its order, wherever they lie now."""
    record = read_json(folder / "cache.json")
    begun = read_fingerprints(record, folder / "cache.json")
    if begun != (here := [cache.manifest.fingerprint for cache in caches]):
        theirs, mine = (", ".join(str(one)[:12] for one in names) for names in (begun, here))
        raise CacheError(f"'{folder}' was trained from the caches {make_printable(theirs)}, these are {mine}")


def _figures(folder: Path, config: StudentConfig, setup: DistillationSetup) -> dict[str, Any]:
    path = folder / "student.pt"
    if not path.is_file():
        raise CacheError(f"'{folder}' has no student.pt: it was not finished; go on with --resume --out {config.out}")
    network = setup.build_student(config, setup.losses)
    load_weights(network, read_state_dict(path), str(path))
    model = PreparedModel(network, setup.input_spec).to(setup.device)
    return setup.compute_metrics(setup.compute_logits(model))
