"""Students train on a device: each loss, each task, in bfloat16, and under torchrun."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import softcache
from softcache.data.tasks import CLASSES
from softcache.pipeline.losses import LOSSES
from softcache.pipeline.models import build
from softcache.pipeline.models.network_checks import TrainingCheck, check_trainable
from softcache.pipeline.models.sync_batch_norm import synchronize_batch_norm
from tests.helpers import task_runs
from tests.helpers.commands import Stages
from tests.helpers.device_processes import run_ranks
from tests.helpers.one_step import INPUT_SPEC, take_one_step

pytestmark = pytest.mark.gpu
STUDENT = ("--arch", "resnet8", "--epochs", 6, "--batch-size", 50, "--learning-rate", 0.05)
LOSSES_OF_CLASSES = [name for name, loss in LOSSES.items() if CLASSES in loss.tasks]


def read_losses(run: Path | str) -> list[float]:
    """Return the loss of each epoch of a run."""
    return [json.loads(line)["loss"] for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def read_weights(run: Path | str) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(Path(run, "student.pt"), weights_only=True)
    return weights


# Devices


def test_auto_is_a_gpu_where_there_is_one(tiny: Path, device: torch.device, stages: Stages) -> None:
    command = ("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 1)
    result = stages(*command, "--out", "auto")
    assert result["machine"]["device"].startswith("cuda " if torch.cuda.is_available() else "cpu ")
    result = stages(*command, "--device", device, "--out", "named")
    assert result["machine"]["device"].startswith(f"{device.type} ")
    assert ("cuda" in result["peak_memory"]) == (device.type == "cuda")
    assert all(x.device.type == "cpu" for x in read_weights("named").values())


def test_cuda_without_a_gpu_is_one_line(tiny: Path, stages: Stages) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = ("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 1, "--out", "r")
    assert "--device cuda: " in stages.fails(2, *command, "--device", "cuda")


# Steps


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", LOSSES_OF_CLASSES)
def test_a_step_with_each_loss_is_that_of_the_cpu(
    device: torch.device, loss: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The term, and the gradients of all weights together. crd draws its negatives on the device: other ones."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    on_device, on_cpu = (
        take_one_step("embed:projection=linear" if loss == "embed" else loss, device=d, precision=precision)
        for d in (device, "cpu")
    )
    tolerance = {"float32": 1e-3, "bfloat16": 0.5}[precision]
    assert on_device.terms.device == device
    assert {p.device for p in on_device.state.weights} == {device}
    if loss == "crd":
        assert torch.isfinite(on_device.terms).all()
        return
    assert float(on_device.terms) == pytest.approx(float(on_cpu.terms), rel=tolerance, abs=tolerance)
    both = [_flatten_gradients(step.state.weights) for step in (on_device, on_cpu)]
    assert torch.isfinite(both[0]).all()
    if precision == "float32" and float(both[1].norm()) > 1e-6:
        assert float(nn.functional.cosine_similarity(*both, dim=0)) > 0.999


def _flatten_gradients(weights: list[nn.Parameter]) -> torch.Tensor:
    return torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten().cpu() for w in weights])


# Trainings


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_student_learns_as_on_the_cpu(tiny: Path, device: torch.device, stages: Stages, precision: str) -> None:
    command = ("student", "--cache", tiny / "cache", *STUDENT, "--epochs", 8, "--learning-rate", 0.1)
    on_cpu = stages(*command, "--device", "cpu", "--out", "cpu")
    on_device = stages(*command, "--device", device, "--precision", precision, "--out", "device")
    losses = read_losses("device")
    assert losses[-1] < 0.7 * losses[0]
    assert losses[0] == pytest.approx(read_losses("cpu")[0], rel=0.1)
    accuracies = [result["student"]["test"]["accuracy"] for result in (on_cpu, on_device)]
    assert min(accuracies) > 0.6
    assert abs(accuracies[0] - accuracies[1]) < 0.15
    assert all(x.dtype in (torch.float32, torch.int64) for x in read_weights("device").values())


def test_the_options_of_a_training_run_on_the_device(tiny: Path, device: torch.device, stages: Stages) -> None:
    """A hint between layers, a baseline, a moving average, clipping, a chosen epoch, and fine-tuning."""
    losses = ("--loss", "kd", "--loss", "hint:teacher=pool1,student=layer1,weight=0.1", "--loss", "hard:weight=0.1")
    options = ("--baseline", "--ema", 0.9, "--clip-norm", 1, "--select", "nll", "--finetune-epochs", 2)
    result = stages(
        "student", "--cache", tiny / "cache", *STUDENT, *losses, *options, "--device", device, "--out", "all"
    )
    assert result["baseline"]["test"]["nll"] > 0
    assert result["student"]["test"]["nll"] > 0


@pytest.mark.parametrize("more", [(), ("--vectorize",)], ids=str)
def test_several_students_train_together(tiny: Path, device: torch.device, stages: Stages, more: Any) -> None:
    command = ("student", "--cache", tiny / "cache", "--arch", "mlp:16", "--epochs", 6, "--device", device)
    stages(*command, "--seed", 0, "--seed", 1, *more, "--out", "both")
    stages(*command, "--seed", 1, "--order-seed", 0, "--out", "alone")
    assert read_losses("both/seed-1") == pytest.approx(read_losses("alone"), rel=0.01)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    task_runs.make_caches(folder)
    return folder


@pytest.mark.parametrize("task", task_runs.TASKS)
def test_students_of_each_task_learn_as_on_the_cpu(tasks: Path, device: torch.device, task: str) -> None:
    losses = []
    for name in ("cpu", str(device)):
        command = ("student", "--data", f"arrays:{task}.npz", "--cache", task, *task_runs.RUN, "--device", name)
        out = tasks / f"{task}-{'cpu' if name == 'cpu' else 'device'}-{len(losses)}"
        task_runs.call(tasks, *command, "--out", out)
        losses.append(read_losses(out))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_loop_of_ones_own_trains_on_the_device(tiny: Path, device: torch.device) -> None:
    cache = softcache.Cache(tiny / "cache")
    torch.manual_seed(0)
    student = build("resnet8", 10, 1, 8).to(device)
    criterion = softcache.DistillationLoss("kd:temperature=4", "similarity:teacher=pool1,student=layer1,weight=10")
    loader = cache.loader(batch_size=50, taps=["pool1"], device=device)
    criterion.attach(student, next(iter(loader)))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    means = []
    for _ in range(5):
        values = []
        for batch in loader:
            optimizer.zero_grad()
            loss = criterion(student(batch.images), batch)
            loss.backward()
            optimizer.step()
            values.append(loss.detach())
        means.append(float(torch.stack(values).mean()))
    assert means[-1] < 0.8 * means[0]


def test_networks_that_are_on_the_device_are_teacher_and_student(
    tiny: Path, device: torch.device, tmp_path: Path
) -> None:
    """A teacher and a student that are passed in Python, with their weights on the device already."""
    data = softcache.Cache(tiny / "cache").transfer_set.splits["train"]
    pixels = data.images.pixels  # type: ignore[attr-defined]
    items = [(pixels[row, 0].numpy(), int(label)) for row, label in enumerate(data.labels)]
    torch.manual_seed(0)
    teacher, student = (build(arch, 10, 1, 8).to(device) for arch in ("cnn", "mlp:16"))
    before = {name: x.clone() for name, x in student.state_dict().items()}
    cache = softcache.build_cache(
        tmp_path / "cache", teacher, items, views="none", class_names=list("0123456789"), device=str(device)
    )
    softcache.train_student(cache, student, "kd", out=tmp_path / "run", epochs=2, device=str(device))
    assert {x.device for x in (*teacher.parameters(), *student.parameters())} == {device}
    assert all(not torch.equal(x, before[name]) for name, x in student.state_dict().items())


def test_a_network_that_outputs_no_negative_number_is_checked_on_the_device(device: torch.device) -> None:
    """Its rows are compared with 1 where they are."""
    arch = "tests.helpers.user_networks:EndsInSoftmax"
    check = TrainingCheck(arch, 10, INPUT_SPEC, device, "float32", 2, 50)
    assert any("sum to 1" in note for note in check_trainable(build(arch, 10, 1, 8), check))


# Ranks


def test_one_rank_of_torchrun_trains_on_the_device(tiny: Path, device: torch.device, tmp_path: Path) -> None:
    command = ("student", "--cache", tiny / "cache", *STUDENT, "--device", device, "--out")
    run_ranks(1, *command, tmp_path / "ranks", cwd=tmp_path)
    task_runs.call(tmp_path, *command, tmp_path / "one")
    assert read_losses(tmp_path / "ranks") == pytest.approx(read_losses(tmp_path / "one"), rel=0.05)


def test_synchronised_batch_norm_of_one_rank_is_batch_norm(gpu: torch.device, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(build("resnet8", 10, 3, 32)).to(gpu).train()
    synchronised = copy.deepcopy(plain)
    synchronize_batch_norm(synchronised)
    x = torch.randn(16, 3, 32, 32, device=gpu)
    torch.cuda.set_device(gpu)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        outputs = [network(x) for network in (plain, synchronised)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
        outputs[1].sum().backward()
    finally:
        dist.destroy_process_group()
    for (name, x), y in zip(plain.state_dict().items(), synchronised.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4, msg=name)


def test_two_ranks_on_one_gpu_train_as_one_process(tiny: Path, gpu: torch.device, tmp_path: Path) -> None:
    """Their batch norms are over the rows of both, unlike on a CPU: over gloo, because NCCL refuses a shared GPU."""
    command = ("student", "--cache", tiny / "cache", *STUDENT, "--device", f"cuda:{gpu.index or 0}", "--out")
    run_ranks(2, *command, tmp_path / "two", cwd=tmp_path)
    task_runs.call(tmp_path, *command, tmp_path / "one")
    one, two = read_losses(tmp_path / "one"), read_losses(tmp_path / "two")
    assert two[0] == pytest.approx(one[0], rel=0.02)
    assert two[-1] == pytest.approx(one[-1], rel=0.2)
