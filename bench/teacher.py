"""Rows about stage one: against the teacher's bare inference, a naive loop, and two processes."""

import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.data.views.policy import parse_views
from softcache.pipeline.cache.manifest_reader import read_manifest
from softcache.pipeline.loading.rendering import render_batches
from softcache.pipeline.models import build
from softcache.pipeline.models.bn_folding import fold_batch_norm
from softcache.pipeline.models.precision import autocast
from softcache.pipeline.models.prepared_model import IMAGENET_MEAN, IMAGENET_STD, InputSpec, PreparedModel
from softcache.stages.cli.configs import CacheConfig, PlanConfig, StageOneOptions
from softcache.stages.cli.console import Console
from softcache.stages.plan.estimate import estimate
from softcache.stages.plan.subject import read_subject
from softcache.stages.teacher_cache.command import make_cache

from . import fixtures
from .measurement import BenchOptions, Measurement, NotMeasurable
from .other_process import start_in_other_process
from .timing import Contender, divide, format_medians, make_contender, time_in_turns

FULL_SIZE = 50_000  # images; the seconds of a part are scaled to as many


def compare_with_bare_inference(options: BenchOptions, precision: str) -> Measurement:
    """Images per second of stage one / of the teacher's bare inference.

    Stage one renders, computes, checks, encodes and writes. Bare inference runs the same network in the same
    precision: channels last, and in bfloat16 with batch norms folded, as stage one does.
    """
    data = fixtures.add_data_set(options.scale(8192 if precision == "bfloat16" else 3072, 150))
    rows = fixtures.load_data(data)
    config = _make_config(options, data, weights=str(_save_teacher(options)), precision=precision)
    teacher = fixtures.make_teacher("resnet56").to(options.device).eval()
    if precision == "bfloat16":
        teacher = fold_batch_norm(teacher)
    batches = torch.split(fixtures.make_images(len(rows.splits["train"]), 3, 32), config.batch_size)

    def infer() -> int:
        with torch.inference_mode(), autocast(options.device, precision):
            for views in batches:
                logits = teacher(views.to(options.device))
        logits.sum().item()
        return sum(map(len, batches))

    stage_one = StageOne(options, data, precision=precision)
    seconds = time_in_turns({"bare": make_contender(infer), "stage one": stage_one}, options.scale(4, 1))
    return Measurement(
        divide(seconds["bare"], seconds["stage one"]),
        f"{format_medians(seconds)}; besides, {stage_one.median_fixed_seconds():.2g} s once",
    )


def compare_teacher_size_with_bare_inference(options: BenchOptions) -> Measurement:
    """Images per second of stage one with views at two sizes / of bare inference with decoding.

    Files of 400 x 400 pixels: stage one renders 64 px for the students and 224 px for a ResNet-18, and bare inference
    decodes, crops and resizes to 224 px alone. It decodes the next batch in a thread while the network runs, as stage
    one does.
    """
    data = fixtures.write_jpegs(options.folder / "jpegs-400", options.scale(192, 40), 400)
    arch, weights = "torchvision:resnet18", options.folder / "resnet18.pt"
    torch.manual_seed(0)
    network = build(arch, 10, 3, 224).to(options.device).eval()
    torch.save(network.state_dict(), weights)
    images = fixtures.load_data(data).splits["train"].images
    batches = [np.arange(len(images))[i : i + 32] for i in range(0, len(images), 32)]
    model = PreparedModel(network, InputSpec(3, 224, IMAGENET_MEAN, IMAGENET_STD)).eval()
    policy = parse_views("resized-crop-flip:size=224")

    def infer() -> int:
        with torch.inference_mode(), closing(render_batches(images, policy, 0, batches, 0)) as rendered:
            for views in rendered:
                logits = model(views.to(options.device))
        logits.sum().item()
        return len(images)

    stage_one = StageOne(
        options,
        data,
        teacher=arch,
        weights=str(weights),
        normalize="imagenet",
        views="resized-crop-flip:size=64",
        teacher_size=224,
        batch_size=32,
    )
    seconds = time_in_turns({"bare": make_contender(infer), "stage one": stage_one}, options.scale(4, 1))
    return Measurement(divide(seconds["bare"], seconds["stage one"]), format_medians(seconds))


def compare_with_plan(options: BenchOptions) -> Measurement:
    """Seconds of stage one as `softcache plan` predicts them / as its manifest records them, or the inverse."""
    data = fixtures.add_data_set(options.scale(8192, 150))
    weights = str(_save_teacher(options))
    console, predicted, measured = Console(json_only=True, epoch_lines=False), [], []
    for turn in range(options.scale(3, 1)):
        config = _make_config(options, data, weights=weights, out=str(options.folder / f"planned-{turn}"))
        known = {field.name: getattr(config, field.name) for field in fields(StageOneOptions)}
        plan = PlanConfig(**known)
        predicted.append(estimate(read_subject(plan, console), plan).seconds)
        measured.append(make_cache(config, console)[1].seconds)
    return Measurement(
        [max(ratio, 1 / ratio) for ratio in divide(predicted, measured)],
        f"predicted {statistics.median(predicted):.1f} s, measured {statistics.median(measured):.1f} s",
    )


def compare_with_naive_loop(options: BenchOptions, precision: str) -> Measurement:
    """Seconds of a naive loop over 50,000 images / of stage one, its fixed costs included.

    Both are scaled up from parts, of 1,024 and of 3,072 images.
    """
    data = fixtures.add_data_set(options.scale(3072, 150))
    if precision == "bfloat16":
        more: dict[str, Any] = {"precision": "bfloat16"}  # compiling would take longer than it saves on 50,000 images
    else:
        more = {"precision": "auto", "tolerance": 1e-9}  # float32, with batch norms folded where that is faster
    stage_one = StageOne(options, data, **more)
    naive = (make_naive_loop, (options, options.scale(1024, 150)))
    with start_in_other_process({"naive": naive}) as contenders:
        seconds = time_in_turns({**contenders, "ours": stage_one}, options.scale(4, 1))
    fixed = stage_one.median_fixed_seconds()
    naive_seconds = [FULL_SIZE * per_image for per_image in seconds["naive"]]
    our_seconds = [FULL_SIZE * per_image + fixed for per_image in seconds["ours"]]
    return Measurement(
        divide(naive_seconds, our_seconds),
        f"scaled to {FULL_SIZE:,} images, {statistics.median(naive_seconds):.0f} s against"
        f" {statistics.median(our_seconds):.0f} s: {format_medians(seconds)}; besides, {fixed:.2g} s once",
    )


def compare_two_ranks(options: BenchOptions) -> Measurement:
    """Seconds of stage one in one process / in two gloo ranks. Fails where their payload digests differ."""
    data = fixtures.write_jpegs(options.folder / "jpegs-ranks", options.scale(512, 40), 32)
    weights = _save_teacher(options)
    digests: dict[str, set[str]] = {"one": set(), "two": set()}

    def make_command_contender(name: str, program: list[str]) -> Contender:
        def take_turn() -> float:
            out = options.folder / f"ranks-{name}-{time.monotonic_ns()}"
            arguments = ["teacher-cache", "--data", data, "--teacher", "resnet56", "--weights", str(weights)]
            arguments += ["--views", "crop-flip", "--draws", "1", "--shard-rows", "128", "--out", str(out)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"} if name == "two" else dict(os.environ)
            start = time.perf_counter()
            process = subprocess.run(
                [*program, *arguments], env=environment, capture_output=True, text=True, timeout=200
            )
            if process.returncode:
                raise NotMeasurable(f"{name}: {(process.stderr.strip().splitlines() or ['it failed'])[-1][:120]}")
            seconds = time.perf_counter() - start
            digests[name].add(repr([shard.payload for shard in read_manifest(out).shards]))
            shutil.rmtree(out)
            return seconds

        return take_turn

    one = [sys.executable, "-m", "softcache"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "softcache"]
    contenders = {"one": make_command_contender("one", one), "two": make_command_contender("two", two)}
    seconds = time_in_turns(contenders, options.scale(2, 1))
    if digests["one"] != digests["two"] or len(digests["one"]) != 1:
        raise AssertionError("two ranks wrote other payloads than one process")
    return Measurement(
        divide(seconds["one"], seconds["two"]),
        "the same payloads; with starting PyTorch. " + format_medians(seconds, 1, "s"),
    )


class StageOne:
    """A contender: `softcache teacher-cache`, with a ResNet-56 unless `more` names another teacher. A turn returns
    the seconds per row of its shards.

    What else it takes (reading the data, measuring precisions, compiling, the manifest) does not grow with the number
    of rows; it is collected apart, in fixed_seconds.

    Args:
        options: of the benchmark.
        data: name of the transfer set.
        more: further options of stage one.
    """

    def __init__(self, options: BenchOptions, data: str, **more: Any):
        self.options, self.data, self.more = options, data, more
        if "weights" not in more:
            self.more["weights"] = str(_save_teacher(options, more.get("teacher", "resnet56")))
        self.fixed_seconds: list[float] = []

    def __call__(self) -> float:
        out = self.options.folder / f"one-{time.monotonic_ns()}"
        start = time.perf_counter()
        config = _make_config(self.options, self.data, out=str(out), **self.more)
        manifest = make_cache(config, Console(True, epoch_lines=False))[1]
        self.fixed_seconds.append(time.perf_counter() - start - manifest.seconds)
        shutil.rmtree(out)
        return manifest.seconds / sum(manifest.splits.values())

    def median_fixed_seconds(self) -> float:
        """Return the median over all turns."""
        return statistics.median(self.fixed_seconds)


def make_naive_loop(options: BenchOptions, count: int) -> Contender:
    """Return a contender: the simplest loop over tensors in float32, in batches of 128, with torch.save at the end."""
    images = fixtures.make_images(count, 3, 32).float() / 255
    network = fixtures.make_plain_teacher(options.device)
    mean, std = torch.tensor([0.49, 0.48, 0.45]).view(3, 1, 1), torch.tensor([0.25, 0.24, 0.26]).view(3, 1, 1)

    def infer_and_save() -> int:
        logits = []
        with torch.no_grad():
            for start in range(0, len(images), 128):
                batch = (images[start : start + 128] - mean) / std
                logits.append(network(batch.to(options.device)).cpu())
        torch.save(torch.cat(logits), options.folder / "logits.pt")
        return len(images)

    return make_contender(infer_and_save)


def _make_config(options: BenchOptions, data: str, **more: Any) -> CacheConfig:
    """Return the options of stage one, for a ResNet-56 where `more` names no other teacher."""
    return CacheConfig(
        data=data,
        draws=1,
        device=str(options.device),
        val_fraction=fixtures.VAL_FRACTION,
        json=True,
        **{"teacher": "resnet56", "views": "crop-flip", **more},
    )


def _save_teacher(options: BenchOptions, arch: str = "resnet56") -> Path:
    """Save the weights of a teacher, unless they are there."""
    path = options.folder / f"{arch}.pt"
    if not path.exists():
        torch.save(fixtures.make_teacher(arch).network.state_dict(), path)
    return path
