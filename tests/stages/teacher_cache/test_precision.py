"""The precision in which the teacher runs: which one is chosen, what it costs, and that a cache keeps it."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import softcache.stages.teacher_cache.trials as trials_module
from softcache.pipeline.cache.manifest_reader import read_manifest
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models import build
from softcache.pipeline.models.bn_folding import fold_batch_norm
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from softcache.pipeline.models.state_dicts import hash_weights
from softcache.pipeline.taps.hooks import capture_features
from softcache.stages.teacher_cache.inference import TeacherInference
from tests.helpers.caches import interrupt_after_shards
from tests.helpers.commands import Stages, tiny_cache_command

VIEWS = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def make_teacher(network: nn.Module) -> PreparedModel:
    """A teacher of views like VIEWS in eval mode, whose batch norms are not at their initial values."""
    generator = torch.Generator().manual_seed(2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.running_var, module.weight, module.bias):
                values.data = torch.rand(values.shape, generator=generator) + 0.5
    return PreparedModel(network, InputSpec(3, 16, (0.4, 0.5, 0.5), (0.2, 0.3, 0.2))).eval()


def compute_outputs(teacher: PreparedModel, taps: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    with torch.no_grad(), capture_features(teacher.network, taps) as features:
        return {"logits": teacher(VIEWS), **{tap: features[tap] for tap in taps}}


def assert_close(outputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = 1e-5) -> None:
    assert outputs.keys() == expected.keys()
    for name, values in expected.items():
        assert float((outputs[name] - values).abs().max()) <= relative * float(values.abs().max()), name


def count_batch_norms(teacher: PreparedModel) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in teacher.network.modules())


# Folding


@pytest.mark.parametrize(
    "arch", ["resnet8", "resnet8x4", "wrn_16_1", "vgg8", "mobilenet_v2", "shufflenet_v2", "torchvision:resnet18"]
)
def test_a_folded_teacher_is_a_copy_with_the_same_outputs_within_1e_5(arch: str) -> None:
    torch.manual_seed(0)
    teacher = make_teacher(build(arch, 10, 3, 32))
    before, expected = hash_weights(teacher.network), compute_outputs(teacher)
    folded = fold_batch_norm(teacher)
    assert folded is not teacher
    assert count_batch_norms(folded) < count_batch_norms(teacher)
    assert_close(compute_outputs(folded), expected)
    assert hash_weights(teacher.network) == before
    assert torch.equal(compute_outputs(teacher)["logits"], expected["logits"])


def test_every_batch_norm_of_a_resnet_is_folded_and_its_taps_are_unchanged() -> None:
    torch.manual_seed(0)
    teacher = make_teacher(build("resnet8", 10, 3, 16))
    assert count_batch_norms(fold_batch_norm(teacher)) == 0
    taps = ("bn1", "layer1", "layer2.0.bn1", "layer3:pool")
    paths = [tap.partition(":")[0] for tap in taps]
    assert count_batch_norms(fold_batch_norm(teacher, paths)) == 0
    assert_close(compute_outputs(fold_batch_norm(teacher, paths), taps), compute_outputs(teacher, taps))


def test_the_batch_norm_after_a_tapped_convolution_is_not_folded() -> None:
    teacher = make_teacher(build("resnet8", 10, 3, 16))
    taps = ("conv1", "layer2.0.conv2")
    folded = fold_batch_norm(teacher, taps)
    assert count_batch_norms(folded) == 2
    assert_close(compute_outputs(folded, taps), compute_outputs(teacher, taps))


class PartlyFoldable(nn.Module):
    """Convolutions and batch norms of which at most one pair can be folded; kind says why."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
        self.norm, self.last = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        z = self.norm(y)
        if self.kind == "seen twice":
            z = z + y
        if self.kind == "run twice":
            z = self.norm(self.inner(z))
        if self.kind == "weight used":
            z = z * self.inner[0].weight.sum()
        if self.kind == "data":
            z = z if z.sum() > 0 else -z
        if self.kind == "not before":
            z = self.last(z.relu())
        logits: torch.Tensor = self.linear(z.mean((2, 3)))
        return logits


@pytest.mark.parametrize("kind", ["seen twice", "run twice", "weight used", "data"])
def test_a_teacher_that_cannot_be_folded_runs_as_it_is(kind: str) -> None:
    teacher = make_teacher(PartlyFoldable(kind))
    assert fold_batch_norm(teacher) is teacher
    assert TeacherInference(teacher, (), fold=True).is_folded is False


def test_only_a_batch_norm_right_after_its_convolution_is_folded() -> None:
    teacher = make_teacher(PartlyFoldable("not before"))
    assert count_batch_norms(fold_batch_norm(teacher)) == 1
    assert_close(compute_outputs(fold_batch_norm(teacher)), compute_outputs(teacher))
    assert fold_batch_norm(teacher, ["inner"]) is teacher  # a block whose output is the convolution's


class TraceDependent(PartlyFoldable):
    """Takes another path through its code while it is traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.inner(x)
        if not isinstance(x, torch.fx.Proxy):
            z = z * 2
        logits: torch.Tensor = self.linear(self.norm(z).mean((2, 3)))
        return logits


def test_a_network_that_takes_another_path_when_traced_is_not_folded() -> None:
    teacher = make_teacher(TraceDependent(""))
    assert fold_batch_norm(teacher) is not teacher
    assert TeacherInference(teacher, (), fold=True).is_folded is False


# Choosing


def set_pace(patch: pytest.MonkeyPatch, **seconds: float) -> list[str]:
    """From now on a batch of a trial takes so many seconds by precision. Returns the precisions that are tried."""
    tried: list[str] = []
    time_inference = trials_module.time_inference

    def time_as_set(inference: TeacherInference, views: torch.Tensor) -> tuple[Any, float]:
        tried.append(inference.precision)
        return time_inference(inference, views)[0], seconds[inference.precision] / (2 if inference.is_compiled else 1)

    patch.setattr(trials_module, "time_inference", time_as_set)
    return tried


def auto_command(tiny: Path, out: Path, *more: str) -> list[object]:
    return [*tiny_cache_command(tiny)[:-1], out, "--precision", "auto", *more]


def test_auto_chooses_bfloat16_where_it_is_faster_and_records_its_cost(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_pace(monkeypatch, float32=1.0, bfloat16=0.5)
    code, out, err = stages.call(*auto_command(tiny, tmp_path / "c"))
    assert code == 0, err
    manifest = read_manifest(tmp_path / "c")
    assert manifest.identity["precision"] == "bfloat16"
    record = manifest.arithmetic
    assert record is not None
    assert record.rows == 300
    assert not record.compiled
    assert 0 < record.kl_4 < record.kl_1 < 1e-3
    assert f"KL {record.kl_1:.1e} to plain float32 at T=1, {record.kl_4:.1e} at T=4" in out
    assert f"KL {record.kl_1:.1e} to plain float32 at T=1" in (tmp_path / "c/README.md").read_text()
    # The same KL from the first draw in the cache of the plain teacher.
    plain, fast = (
        CacheReader(c).read_targets("train", 0, np.arange(300))[0].double() for c in (tiny / "cache", tmp_path / "c")
    )
    p, q = plain.log_softmax(1), fast.log_softmax(1)
    assert float((p.exp() * (p - q)).sum(1).mean()) == pytest.approx(record.kl_1, rel=0.2)


@pytest.mark.parametrize(
    ("seconds", "more"),
    [({"float32": 1.0, "bfloat16": 0.5}, ("--tolerance", "1e-12")), ({"float32": 1, "bfloat16": 2}, ())],
)
def test_auto_is_the_teacher_to_the_bit_where_bfloat16_costs_too_much_or_is_slower(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: Any, more: tuple[str, ...]
) -> None:
    set_pace(monkeypatch, **seconds)
    code, out, err = stages.call(*auto_command(tiny, tmp_path / "c", *more))
    assert code == 0, err
    assert "precision: float32, the teacher as it is" in out
    record = json.loads((tmp_path / "c/manifest.json").read_text())
    assert "arithmetic" not in record
    assert [s["payload"] for s in record["shards"]] == [s.payload for s in read_manifest(tiny / "cache").shards]


def test_plain_float32_needs_no_trial(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = set_pace(monkeypatch)
    stages(*tiny_cache_command(tiny)[:-1], tmp_path / "c")
    assert tried == []


@pytest.mark.parametrize("lost", ["nothing", "manifest", "unfinished"])
def test_auto_keeps_the_precision_of_an_existing_cache_whatever_a_timing_says(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Interrupted, grown, or with its manifest lost: the same identity, the same record, and no new trial."""
    out = tmp_path / "c"
    with monkeypatch.context() as patch:
        set_pace(patch, float32=1.0, bfloat16=0.5)
        if lost == "unfinished":
            interrupt_after_shards(3, patch)
            stages.fails(130, *auto_command(tiny, out))
            recorded = json.loads((out / "unfinished.json").read_text())["arithmetic"]
            assert not (out / "manifest.json").exists()
        else:
            stages(*auto_command(tiny, out))
            recorded = json.loads((out / "manifest.json").read_text())["arithmetic"]
    if lost == "manifest":
        (out / "manifest.json").unlink()
    tried = set_pace(monkeypatch, float32=0.1, bfloat16=9.0)
    stages(*auto_command(tiny, out, *(("--draws", "4") if lost == "nothing" else ())))
    record = json.loads((out / "manifest.json").read_text())
    assert tried == []
    assert record["identity"]["precision"] == "bfloat16"
    assert record["arithmetic"] == recorded
    stages("check-cache", out, "--deep", "--weights", tiny / "runs/teacher")


def test_a_cache_of_another_precision_than_the_command_names_is_refused(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = set_pace(monkeypatch)
    error = stages.fails(1, *tiny_cache_command(tiny), "--precision", "bfloat16")
    assert ["precision", '"bfloat16"', '"float32"'] in [line.split() for line in error.splitlines()]
    assert tried == []
    assert "is complete" in stages.call(*tiny_cache_command(tiny), "--precision", "auto")[1]


def test_a_bfloat16_cache_without_a_record_grows_unfolded(tiny: Path, stages: Stages, tmp_path: Path) -> None:
    """Earlier versions did not fold, and recorded nothing."""
    command = [*tiny_cache_command(tiny)[:-1], tmp_path / "c", "--precision", "bfloat16"]
    stages(*command)
    old = replace(read_manifest(tmp_path / "c"), arithmetic=None)
    old.write(tmp_path / "c")
    assert "arithmetic" not in json.loads((tmp_path / "c/manifest.json").read_text())
    stages(*command, "--draws", "4")
    assert read_manifest(tmp_path / "c").arithmetic is None
    assert read_manifest(tmp_path / "c").draws == 4


def test_repair_runs_the_teacher_in_the_precision_of_the_cache(tiny: Path, stages: Stages, tmp_path: Path) -> None:
    """A folded convolution rounds differently: only when it is folded again it gives the same bits."""
    torch.manual_seed(0)
    teacher = build("resnet8", 10, 1, 8)
    torch.save(teacher.state_dict(), tmp_path / "w.pt")
    stages(
        "teacher-cache",
        "--train-size",
        "100",
        "--teacher",
        "resnet8",
        "--weights",
        tmp_path / "w.pt",
        "--shard-rows",
        "60",
        "--precision",
        "bfloat16",
        "--out",
        tmp_path / "c",
    )
    manifest = read_manifest(tmp_path / "c")
    assert manifest.arithmetic is not None
    assert manifest.arithmetic.folded
    (tmp_path / "c" / manifest.shards[1].path).unlink()
    _, out, _ = stages.call("check-cache", tmp_path / "c", "--repair", "--weights", tmp_path / "w.pt")
    assert "the same rows as before" in out
    assert [s.payload for s in read_manifest(tmp_path / "c").shards] == [s.payload for s in manifest.shards]


# Compiled


def test_where_compiling_fails_one_line_is_printed_and_the_rows_are_those_of_the_plain_teacher(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_to_compile(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("no working C++ compiler\nand so on")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail_to_compile)
    monkeypatch.setattr(torch, "compile", fail_to_compile)
    code, out, err = stages.call(*tiny_cache_command(tiny)[:-1], tmp_path / "c", "--compile")
    assert code == 0, err
    assert out.count("not compiled, the teacher runs as it is: RuntimeError: no working C++ compiler\n") == 1
    manifest = read_manifest(tmp_path / "c")
    assert manifest.arithmetic is None
    assert [s.payload for s in manifest.shards] == [s.payload for s in read_manifest(tiny / "cache").shards]


def test_a_padded_batch_has_the_outputs_of_its_rows_and_no_second_shape_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a compiler that does nothing, for the padding alone."""
    shapes: list[int] = []

    def record_shapes(function: Any, **more: Any) -> Any:
        def run(views: torch.Tensor) -> Any:
            shapes.append(len(views))
            return function(views)

        return run

    def fail_to_export(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError

    monkeypatch.setattr(torch.export, "export", fail_to_export)
    monkeypatch.setattr(torch, "compile", record_shapes)
    torch.manual_seed(0)
    teacher = make_teacher(build("resnet8", 10, 3, 16))
    taps = ("layer1", "layer3:pool")
    plain, compiled = TeacherInference(teacher, taps), TeacherInference(teacher, taps)
    compiled.compile(VIEWS[:2], 8)
    assert compiled.is_compiled
    for n in (8, 1, 3, 8, 7):
        with plain.open() as infer:
            logits, features = copy.deepcopy(infer(VIEWS[:n]))
        with compiled.open() as infer:
            compiled_logits, compiled_features = infer(VIEWS[:n])
        assert_close({"logits": compiled_logits, **compiled_features}, {"logits": logits, **features}, 1e-6)
    assert set(shapes) == {8}


@pytest.mark.slow
def test_a_compiled_teacher_has_the_same_logits_and_features_and_is_compiled_once() -> None:
    """Really compiled: 10 to 30 s."""
    torch.manual_seed(0)
    teacher = make_teacher(build("resnet8", 10, 3, 16))
    taps = ("layer1", "layer3:pool")
    compiled = TeacherInference(teacher, taps, fold=True)
    compiled.compile(VIEWS[:4], 8)
    expected = compute_outputs(teacher, taps)
    with torch._dynamo.config.patch(error_on_recompile=True), compiled.open() as infer:
        for n in (8, 3, 8, 1):
            logits, features = infer(VIEWS[:n])
            assert_close({"logits": logits, **features}, {k: x[:n] for k, x in expected.items()}, 1e-4)


def test_a_teacher_that_fails_in_bfloat16_is_run_in_float32(tiny: Path, stages: Stages, tmp_path: Path) -> None:
    (tmp_path / "odd_teacher.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, i, classes):\n"
        "        super().__init__()\n"
        "        self.a, self.classes = nn.Linear(i, classes), classes\n"
        "    def forward(self, x):\n"
        "        out = torch.zeros(len(x), self.classes)\n"
        "        out[torch.arange(len(x))] = self.a(x.flatten(1))\n"
        "        return out\n"
        "def make(*, classes, channels, size):\n"
        "    return Net(channels * size * size, classes)\n"
    )
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        from odd_teacher import make

        torch.save(make(classes=10, channels=1, size=8).state_dict(), "w.pt")
        more = ("teacher-cache", "--train-size", 300, "--teacher", "odd_teacher:make", "--weights", "w.pt")
        code, out, _ = stages.call(*more, "--precision", "auto", "--out", "auto")
        assert code == 0
        assert "precision: float32, the teacher as it is" in out
        assert "bfloat16: Index put requires" in out
        line = stages.fails(1, *more, "--precision", "bfloat16", "--out", "half")
        assert "the teacher cannot be run with --precision bfloat16: " in line
    finally:
        sys.path.remove(str(tmp_path))
