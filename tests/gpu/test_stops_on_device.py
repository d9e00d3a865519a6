"""Both stages on a device, killed and started again, end with what they would have made; caches move between devices.

The weights of a student are equal to the bit with PyTorch's deterministic algorithms. Without them a GPU adds some
sums in another order each time, with and without a stop.
"""

from pathlib import Path

import pytest
import torch

from tests.helpers.caches import read_payloads
from tests.helpers.commands import Stages, tiny_cache_command
from tests.helpers.device_processes import kill_deterministic, run_deterministic
from tests.helpers.processes import assert_equal_runs, stat_shards

pytestmark = pytest.mark.gpu


def make_cache_command(tiny: Path, device: torch.device, out: Path, *more: object) -> list[object]:
    return [*tiny_cache_command(tiny)[:-1], out, "--device", device, *more]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_student_that_is_killed_and_resumed_ends_with_the_same_weights(
    tiny: Path, device: torch.device, tmp_path: Path, precision: str
) -> None:
    if (device.type, precision) == ("cpu", "bfloat16"):
        pytest.skip("bfloat16 is emulated on some CPUs, and takes long there")
    common = ("student", "--cache", tiny / "cache", "--arch", "resnet8", "--batch-size", 50, "--ema", 0.9)
    common = (*common, "--device", device, "--precision", precision, "--epochs", 15, "--out")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_deterministic(*common, whole, cwd=tmp_path)
    lines = killed / "metrics.jsonl"
    kill_deterministic(lambda: lines.exists() and lines.read_text().count("\n") >= 3, *common, killed, cwd=tmp_path)
    assert not (killed / "result.json").exists()
    run_deterministic("student", "--resume", "--out", killed, cwd=tmp_path)
    assert_equal_runs(killed, whole)


def test_stage_one_that_is_killed_goes_on_to_the_same_digests(
    tiny: Path, device: torch.device, tmp_path: Path
) -> None:
    small = ("--shard-rows", 20)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_deterministic(*make_cache_command(tiny, device, whole, *small), cwd=tmp_path)
    command = make_cache_command(tiny, device, killed, *small)
    kill_deterministic(lambda: len(stat_shards(killed)) > 5, *command, cwd=tmp_path)
    assert not (killed / "manifest.json").exists()
    before = stat_shards(killed)
    run_deterministic(*command, cwd=tmp_path)
    assert before.items() <= stat_shards(killed).items()
    assert read_payloads(killed) == read_payloads(whole)


@pytest.mark.parametrize("more", [(), ("--precision", "bfloat16"), ("--workers", 2)], ids=str)
def test_a_cache_that_is_written_on_the_device_is_read_by_a_student_on_the_cpu(
    tiny: Path, device: torch.device, stages: Stages, tmp_path: Path, more: tuple[object, ...]
) -> None:
    """Its logits are those of the CPU but for rounding, and its views those of the CPU to the bit."""
    import softcache

    stages(*make_cache_command(tiny, device, tmp_path / "device", *more))
    stages(*make_cache_command(tiny, torch.device("cpu"), tmp_path / "cpu"))
    stages("check-cache", tmp_path / "device", "--deep")
    on_device, on_cpu = (softcache.Cache(tmp_path / name) for name in ("device", "cpu"))
    for draw in range(on_cpu.draws):
        a, b = (cache.targets("train", range(300), draw) for cache in (on_device, on_cpu))
        assert float((a - b).abs().max() / (b.max() - b.min())) < (0.05 if "bfloat16" in more else 0.01)
    student = ("--arch", "mlp:16", "--epochs", 10, "--device", "cpu", "--out", "run")
    result = stages("student", "--cache", tmp_path / "device", *student)
    assert result["student"]["test"]["agreement"] > 0.5
    assert result["machine"]["device"].startswith("cpu ")


def test_the_fastest_precision_is_measured_on_the_device(
    tiny: Path, device: torch.device, stages: Stages, tmp_path: Path
) -> None:
    stages(*make_cache_command(tiny, device, tmp_path / "auto", "--precision", "auto"))
    stages("check-cache", tmp_path / "auto")
