"""Rows of stage one: what it takes beside the teacher alone, and beside what one writes without thinking."""

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from softcache.pipeline.cache.manifest_reader import read_manifest
from softcache.pipeline.models.bn_folding import fold_batch_norm
from softcache.pipeline.models.precision import autocast
from softcache.stages.cli.configs import CacheConfig
from softcache.stages.cli.console import Console
from softcache.stages.teacher_cache.command import make_cache

from . import fixtures
from .interleaved import Found, Given, Missing, Side, interleaved, over, parts, timed
from .subprocess_side import apart

FULL = 50_000  # images, to which the seconds of a part are scaled


def settings_of(given: Given, data: str, weights: Path, **more: Any) -> CacheConfig:
    """Stage one over ResNet-56 with these weights, as a command would ask for it."""
    return CacheConfig(
        data=data,
        teacher="resnet56",
        weights=str(weights),
        views="crop-flip",
        draws=1,
        device=str(given.device),
        val_fraction=fixtures.VAL_FRACTION,
        json=True,
        **more,
    )


def saved_teacher(given: Given) -> Path:
    path = given.folder / "teacher.pt"
    if not path.exists():
        torch.save(fixtures.teacher("resnet56").network.state_dict(), path)
    return path


def stage_one(given: Given, data: str, once: list[float], **more: Any) -> Side:
    """`softcache teacher-cache`: seconds of a row, by its shards. What it takes besides (reading the data, trying
    arithmetics, compiling, the manifest) does not grow with the rows that are asked, and goes to once."""
    weights = saved_teacher(given)

    def turn() -> float:
        out = given.folder / f"one-{time.monotonic_ns()}"
        begun = time.perf_counter()
        made = make_cache(settings_of(given, data, weights, out=str(out), **more), Console(True, epoch_lines=False))[1]
        once.append(time.perf_counter() - begun - made.seconds)
        shutil.rmtree(out)
        return made.seconds / sum(made.splits.values())

    return turn


def over_bare_inference(given: Given, precision: str) -> Found:
    """Views of stage one per second: rendered, asked, checked, encoded and written, as a share of asking alone, in the
    same arithmetic: channels last, and with batch norm folded in bfloat16, as stage one does."""
    data = fixtures.in_memory(given.few(8192 if precision == "bfloat16" else 3072, 150))
    rows = fixtures.transfer_set(data)
    config = settings_of(given, data, saved_teacher(given), precision=precision)
    teacher = fixtures.teacher("resnet56").to(given.device).eval()
    if precision == "bfloat16":
        teacher = fold_batch_norm(teacher)
    batches = torch.split(fixtures.smooth(len(rows.splits["train"]), 3, 32), config.batch_size)

    def bare() -> int:
        with torch.inference_mode(), autocast(given.device, precision):
            for views in batches:
                said = teacher(views.to(given.device))
        said.sum().item()
        return sum(map(len, batches))

    once: list[float] = []
    sides = {"bare": timed(bare), "stage one": stage_one(given, data, once, precision=precision)}
    found = interleaved(sides, given.few(4, 1))
    return Found(over(found["bare"], found["stage one"]), parts(found) + in_words(once))


def in_words(once: list[float]) -> str:
    return f"; besides, once, {statistics.median(once):.2g} s"


def naive_side(given: Given, count: int) -> Side:
    """What one writes first: a loop over tensors, float32, batches of 128, torch.save at the end."""
    images = fixtures.smooth(count, 3, 32).float() / 255
    network = fixtures.usual_teacher(given.device)
    mean, std = torch.tensor([0.49, 0.48, 0.45]).view(3, 1, 1), torch.tensor([0.25, 0.24, 0.26]).view(3, 1, 1)

    def naive() -> int:
        logits = []
        with torch.no_grad():
            for a in range(0, len(images), 128):
                logits.append(network(((images[a : a + 128] - mean) / std).to(given.device)).cpu())
        torch.save(torch.cat(logits), given.folder / "logits.pt")
        return len(images)

    return timed(naive)


def naive_over_ours(given: Given, precision: str) -> Found:
    """Seconds of the naive loop over 50,000 images against all seconds of ours, from parts of 1,024 and 3,072."""
    data = fixtures.in_memory(given.few(3072, 150))
    more: dict[str, Any] = {"precision": "auto", "tolerance": 1e-9}  # float32, its batch norm folded where that pays
    if precision == "bfloat16":
        more = {"precision": "bfloat16"}  # compiling takes longer than it saves on 50,000
    once: list[float] = []
    with apart({"naive": (naive_side, (given, given.few(1024, 150)))}) as sides:
        found = interleaved({**sides, "ours": stage_one(given, data, once, **more)}, given.few(4, 1))
    fixed = statistics.median(once)
    ours = [FULL * seconds + fixed for seconds in found["ours"]]
    whole = f"scaled to 50,000 images, {FULL * statistics.median(found['naive']):.0f} s against"
    said = f"{whole} {statistics.median(ours):.0f} s: {parts(found)}{in_words(once)}"
    return Found(over([FULL * s for s in found["naive"]], ours), said)


def two_ranks(given: Given) -> Found:
    """Seconds of stage one in one process, over those of two gloo ranks; the digests must be the same."""
    data = fixtures.jpegs(given.folder / "jpegs-ranks", given.few(512, 40), 32)
    weights = saved_teacher(given)
    digests: dict[str, set[str]] = {"one": set(), "two": set()}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "softcache"]

    def side(name: str, command: list[str]) -> Side:
        def turn() -> float:
            out = given.folder / f"ranks-{name}-{time.monotonic_ns()}"
            arguments = ["teacher-cache", "--data", data, "--teacher", "resnet56", "--weights", str(weights)]
            arguments += ["--views", "crop-flip", "--draws", "1", "--shard-rows", "128", "--out", str(out)]
            threads = {**os.environ, "OMP_NUM_THREADS": "1"} if name == "two" else dict(os.environ)
            begun = time.perf_counter()
            done = subprocess.run([*command, *arguments], env=threads, capture_output=True, text=True, timeout=200)
            if done.returncode:
                raise Missing(f"{name}: {(done.stderr.strip().splitlines() or ['it failed'])[-1][:120]}")
            seconds = time.perf_counter() - begun
            digests[name].add(repr([shard.payload for shard in read_manifest(out).shards]))
            shutil.rmtree(out)
            return seconds

        return turn

    one = [sys.executable, "-m", "softcache"]
    found = interleaved({"one": side("one", one), "two": side("two", start)}, given.few(2, 1))
    if digests["one"] != digests["two"] or len(digests["one"]) != 1:
        raise AssertionError("two ranks wrote other payloads than one process")
    return Found(over(found["one"], found["two"]), "the same payloads; with starting PyTorch. " + parts(found, 1, "s"))
