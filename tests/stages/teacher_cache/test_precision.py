"""How fast the teacher may be asked: what is taken, what it costs, and that it stays so."""

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
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.models import build
from softcache.pipeline.models.bn_folding import fold_batch_norm
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from softcache.pipeline.models.state_dicts import hash_weights
from softcache.pipeline.taps.hooks import capture_features
from softcache.stages.teacher_cache.inference import TeacherInference
from tests.helpers.caches import stop_after
from tests.helpers.commands import Stages, tiny_cache_command

VIEWS = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def teacher_of(network: nn.Module) -> PreparedModel:
    """In eval mode, with batch norms that a training has left somewhere, on views like VIEWS."""
    generator = torch.Generator().manual_seed(2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.running_var, module.weight, module.bias):
                values.data = torch.rand(values.shape, generator=generator) + 0.5
    return PreparedModel(network, InputSpec(3, 16, (0.4, 0.5, 0.5), (0.2, 0.3, 0.2))).eval()


def answers(teacher: PreparedModel, taps: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    with torch.no_grad(), capture_features(teacher.network, taps) as kept:
        return {"logits": teacher(VIEWS), **{tap: kept[tap] for tap in taps}}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], relative: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert float((found[name] - values).abs().max()) <= relative * float(values.abs().max()), name


def norms(teacher: PreparedModel) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in teacher.network.modules())


# Folding


@pytest.mark.parametrize(
    "arch", ["resnet8", "resnet8x4", "wrn_16_1", "vgg8", "mobilenet_v2", "shufflenet_v2", "torchvision:resnet18"]
)
def test_a_folded_teacher_says_the_same_within_a_hundred_thousandth_and_is_a_copy(arch: str) -> None:
    torch.manual_seed(0)
    teacher = teacher_of(build(arch, 10, 3, 32))
    before, wanted = hash_weights(teacher.network), answers(teacher)
    found = fold_batch_norm(teacher)
    assert found is not teacher
    assert norms(found) < norms(teacher)
    assert_close(answers(found), wanted)
    assert hash_weights(teacher.network) == before
    assert torch.equal(answers(teacher)["logits"], wanted["logits"])


def test_a_resnet_keeps_no_batch_norm_and_every_tap_what_it_was() -> None:
    torch.manual_seed(0)
    teacher = teacher_of(build("resnet8", 10, 3, 16))
    assert norms(fold_batch_norm(teacher)) == 0
    taps = ("bn1", "layer1", "layer2.0.bn1", "layer3:pool")
    paths = [tap.partition(":")[0] for tap in taps]
    assert norms(fold_batch_norm(teacher, paths)) == 0
    assert_close(answers(fold_batch_norm(teacher, paths), taps), answers(teacher, taps))


def test_a_tap_on_a_convolution_keeps_its_batch_norm_apart() -> None:
    teacher = teacher_of(build("resnet8", 10, 3, 16))
    taps = ("conv1", "layer2.0.conv2")
    found = fold_batch_norm(teacher, taps)
    assert norms(found) == 2
    assert_close(answers(found, taps), answers(teacher, taps))


class Odd(nn.Module):
    """Pairs of which one can be folded; kind says why the others cannot."""

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
def test_what_cannot_be_folded_goes_on_as_it_is(kind: str) -> None:
    teacher = teacher_of(Odd(kind))
    assert fold_batch_norm(teacher) is teacher
    assert TeacherInference(teacher, (), fold=True).is_folded is False


def test_only_a_batch_norm_right_after_its_convolution_is_folded() -> None:
    teacher = teacher_of(Odd("not before"))
    assert norms(fold_batch_norm(teacher)) == 1
    assert_close(answers(fold_batch_norm(teacher)), answers(teacher))
    assert fold_batch_norm(teacher, ["inner"]) is teacher  # a block whose output is the convolution's


class Sly(Odd):
    """Goes another way while it is traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.inner(x)
        if not isinstance(x, torch.fx.Proxy):
            z = z * 2
        logits: torch.Tensor = self.linear(self.norm(z).mean((2, 3)))
        return logits


def test_a_network_that_goes_another_way_when_traced_is_found_out_and_asked_as_it_is() -> None:
    teacher = teacher_of(Sly(""))
    assert fold_batch_norm(teacher) is not teacher
    assert TeacherInference(teacher, (), fold=True).is_folded is False


# What is chosen


def pace(patch: pytest.MonkeyPatch, **seconds: float) -> list[str]:
    """From now on a batch takes so many seconds, by precision; what was asked, by precision."""
    asked: list[str] = []
    timed = trials_module.time_inference

    def paced(answering: TeacherInference, views: torch.Tensor) -> tuple[Any, float]:
        asked.append(answering.precision)
        return timed(answering, views)[0], seconds[answering.precision] / (2 if answering.is_compiled else 1)

    patch.setattr(trials_module, "time_inference", paced)
    return asked


def auto(tiny: Path, out: Path, *more: str) -> list[object]:
    return [*tiny_cache_command(tiny)[:-1], out, "--precision", "auto", *more]


def test_auto_takes_bfloat16_where_it_is_faster_and_writes_down_its_cost(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace(monkeypatch, float32=1.0, bfloat16=0.5)
    code, out, err = stages.call(*auto(tiny, tmp_path / "c"))
    assert code == 0, err
    manifest = read_manifest(tmp_path / "c")
    assert manifest.identity["precision"] == "bfloat16"
    found = manifest.arithmetic
    assert found is not None
    assert found.rows == 300
    assert not found.compiled
    assert 0 < found.kl_4 < found.kl_1 < 1e-3
    assert f"KL {found.kl_1:.1e} to plain float32 at T=1, {found.kl_4:.1e} at T=4" in out
    assert f"KL {found.kl_1:.1e} to plain float32 at T=1" in (tmp_path / "c/README.md").read_text()
    # The plain way beside it: the first draw by the plain teacher's cache, whose rows these should be but for that.
    plain, fast = (
        Cache(c).read_targets("train", 0, np.arange(300))[0].double() for c in (tiny / "cache", tmp_path / "c")
    )
    p, q = plain.log_softmax(1), fast.log_softmax(1)
    assert float((p.exp() * (p - q)).sum(1).mean()) == pytest.approx(found.kl_1, rel=0.2)


@pytest.mark.parametrize(
    ("seconds", "more"),
    [({"float32": 1.0, "bfloat16": 0.5}, ("--tolerance", "1e-12")), ({"float32": 1, "bfloat16": 2}, ())],
)
def test_auto_is_the_teacher_to_the_bit_where_bfloat16_costs_too_much_or_is_slower(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: Any, more: tuple[str, ...]
) -> None:
    pace(monkeypatch, **seconds)
    code, out, err = stages.call(*auto(tiny, tmp_path / "c", *more))
    assert code == 0, err
    assert "precision: float32, the teacher as it is" in out
    record = json.loads((tmp_path / "c/manifest.json").read_text())
    assert "arithmetic" not in record
    assert [s["payload"] for s in record["shards"]] == [s.payload for s in read_manifest(tiny / "cache").shards]


def test_plain_float32_asks_about_no_views_beforehand(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = pace(monkeypatch)
    stages(*tiny_cache_command(tiny)[:-1], tmp_path / "c")
    assert asked == []


@pytest.mark.parametrize("lost", ["nothing", "manifest", "claim"])
def test_auto_goes_on_as_it_was_begun_whatever_a_timing_says(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Stopped half-way, grown, or with its manifest lost: the same identity, the same figures, nothing asked anew."""
    out = tmp_path / "c"
    with monkeypatch.context() as patch:
        pace(patch, float32=1.0, bfloat16=0.5)
        if lost == "claim":
            stop_after(3, patch)
            stages.fails(130, *auto(tiny, out))
            kept = json.loads((out / "unfinished.json").read_text())["arithmetic"]
            assert not (out / "manifest.json").exists()
        else:
            stages(*auto(tiny, out))
            kept = json.loads((out / "manifest.json").read_text())["arithmetic"]
    if lost == "manifest":
        (out / "manifest.json").unlink()
    asked = pace(monkeypatch, float32=0.1, bfloat16=9.0)
    stages(*auto(tiny, out, *(("--draws", "4") if lost == "nothing" else ())))
    record = json.loads((out / "manifest.json").read_text())
    assert asked == []
    assert record["identity"]["precision"] == "bfloat16"
    assert record["arithmetic"] == kept
    stages("check-cache", out, "--deep", "--weights", tiny / "runs/teacher")


def test_a_cache_of_another_precision_than_is_named_is_refused_by_name(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = pace(monkeypatch)
    error = stages.fails(1, *tiny_cache_command(tiny), "--precision", "bfloat16")
    assert ["precision", '"bfloat16"', '"float32"'] in [line.split() for line in error.splitlines()]
    assert asked == []
    assert "whole already" in stages.call(*tiny_cache_command(tiny), "--precision", "auto")[1]


def test_a_bfloat16_cache_of_before_goes_on_unfolded(tiny: Path, stages: Stages, tmp_path: Path) -> None:
    """Its manifest has no figures: it is read, and grows, as it was made."""
    command = [*tiny_cache_command(tiny)[:-1], tmp_path / "c", "--precision", "bfloat16"]
    stages(*command)
    old = replace(read_manifest(tmp_path / "c"), arithmetic=None)
    old.write(tmp_path / "c")
    assert "arithmetic" not in json.loads((tmp_path / "c/manifest.json").read_text())
    stages(*command, "--draws", "4")
    assert read_manifest(tmp_path / "c").arithmetic is None
    assert read_manifest(tmp_path / "c").draws == 4


def test_repair_asks_in_the_arithmetic_of_the_cache(tiny: Path, stages: Stages, tmp_path: Path) -> None:
    """A folded convolution rounds otherwise: only the same way gives the same bits."""
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
    kept = read_manifest(tmp_path / "c")
    assert kept.arithmetic is not None
    assert kept.arithmetic.folded
    (tmp_path / "c" / kept.shards[1].path).unlink()
    _, out, _ = stages.call("check-cache", tmp_path / "c", "--repair", "--weights", tmp_path / "w.pt")
    assert "the same rows as before" in out
    assert [s.payload for s in read_manifest(tmp_path / "c").shards] == [s.payload for s in kept.shards]


# Compiled


def test_compiling_that_fails_is_one_line_and_the_rows_are_those_of_the_teacher(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("no working C++ compiler\nand so on")

    monkeypatch.setattr(torch, "compile", no_compiler)
    code, out, err = stages.call(*tiny_cache_command(tiny)[:-1], tmp_path / "c", "--compile")
    assert code == 0, err
    assert out.count("not compiled, the teacher runs as it is: RuntimeError: no working C++ compiler\n") == 1
    found = read_manifest(tmp_path / "c")
    assert found.arithmetic is None
    assert [s.payload for s in found.shards] == [s.payload for s in read_manifest(tiny / "cache").shards]


def test_a_batch_that_is_padded_says_of_its_rows_what_it_says_without_and_another_shape_is_never_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a compiler that does nothing: the padding alone. In eval mode rows do not see each other."""
    shapes: list[int] = []

    def only_looks(asked: Any, **more: Any) -> Any:
        def looking(views: torch.Tensor) -> Any:
            shapes.append(len(views))
            return asked(views)

        return looking

    monkeypatch.setattr(torch, "compile", only_looks)
    torch.manual_seed(0)
    teacher = teacher_of(build("resnet8", 10, 3, 16))
    taps = ("layer1", "layer3:pool")
    plain, compiled = TeacherInference(teacher, taps), TeacherInference(teacher, taps)
    compiled.compile(VIEWS[:2], 8)
    assert compiled.is_compiled
    for n in (8, 1, 3, 8, 7):
        with plain.open() as ask:
            logits, features = copy.deepcopy(ask(VIEWS[:n]))
        with compiled.open() as ask:
            found, kept = ask(VIEWS[:n])
        assert_close({"logits": found, **kept}, {"logits": logits, **features}, 1e-6)
    assert set(shapes) == {8}


@pytest.mark.slow
def test_a_compiled_teacher_says_the_same_with_taps_and_is_compiled_once() -> None:
    """Really compiled: 10 to 30 s."""
    torch.manual_seed(0)
    teacher = teacher_of(build("resnet8", 10, 3, 16))
    taps = ("layer1", "layer3:pool")
    compiled = TeacherInference(teacher, taps, fold=True)
    compiled.compile(VIEWS[:4], 8)
    wanted = answers(teacher, taps)
    with torch._dynamo.config.patch(error_on_recompile=True), compiled.open() as ask:
        for n in (8, 3, 8, 1):
            logits, features = ask(VIEWS[:n])
            assert_close({"logits": logits, **features}, {k: x[:n] for k, x in wanted.items()}, 1e-4)


def test_a_teacher_that_bfloat16_breaks_is_asked_in_float32(tiny: Path, stages: Stages, tmp_path: Path) -> None:
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
