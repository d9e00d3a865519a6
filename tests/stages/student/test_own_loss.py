"""`student --loss my_module:MyLoss`: losses of a user's own in the commands that train."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import Stages
from tests.helpers.stopping import stop_at

MINE = """
import torch
import torch.nn.functional as F
from torch import nn

def kd(outputs, batch, temperature=4.0):
    log_p, log_q = (F.log_softmax(z / temperature, 1) for z in (outputs.logits, batch.logits))
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

def square(outputs, batch):
    return F.mse_loss(outputs.features["flatten"], batch.features["flatten"])

square.teacher_taps = square.student_taps = ("flatten",)
square.needs_logits = False

def of_pool1(outputs, batch):
    return outputs.features["pool1"].mean()

of_pool1.student_taps = "pool1"

class Projected(nn.Module):
    '''The student's logits and a teacher's layer, through trained maps of the shapes of the first batch.'''
    teacher_taps = ("pool1:pool",)

    def __init__(self, width=8, scale=1.0):
        super().__init__()
        self.scale = scale
        self.student, self.teacher = nn.LazyLinear(width), nn.LazyLinear(width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs, batch):
        self.calls += 1
        return self.scale * F.mse_loss(self.student(outputs.logits), self.teacher(batch.features["pool1:pool"]))

class Counts:
    '''A loss with a state that is no module's.'''
    def __init__(self):
        self.steps = 0

    def __call__(self, outputs, batch):
        self.steps += 1
        return kd(outputs, batch) / self.steps

counts = Counts()

def not_reduced(outputs, batch):
    return (outputs.logits - batch.logits).square()

def crashes(outputs, batch):
    return outputs.logits @ batch.logits

def detached(outputs, batch):
    return outputs.logits.detach().mean()

def needs_labels(outputs, batch):
    return F.cross_entropy(outputs.logits, batch.labels)

needs_labels.needs_labels = True
"""


@pytest.fixture
def mine(user_folder: Path, stages: Stages) -> Path:
    """A folder with mine.py, the current one."""
    (user_folder / "mine.py").write_text(MINE)
    return user_folder


def student(tiny: Path, *arguments: object, arch: str = "mlp:16") -> tuple[object, ...]:
    return ("student", "--cache", tiny / "cache", "--arch", arch, "--epochs", 3, "--batch-size", 60, *arguments)


def read(run: str, name: str = "student.pt") -> bytes:
    return Path(run, name).read_bytes()


@pytest.mark.parametrize(
    ("own", "ours", "arch"),
    [
        (("mine:kd:weight=0.9",), ("kd:weight=0.9",), "mlp:16"),
        (("mine:kd:temperature=2,weight=1->0", "hard"), ("kd:temperature=2,weight=1->0", "hard"), "mlp:16"),
        (("kd", "mine:square:weight=3"), ("kd", "hint:weight=3,teacher=flatten"), "cnn"),
    ],
    ids=["kd", "ramp", "features"],
)
def test_a_student_of_an_own_loss_is_that_of_the_built_in_one(
    mine: Path, tiny: Path, stages: Stages, own: tuple[str, ...], ours: tuple[str, ...], arch: str
) -> None:
    for out, losses in (("own", own), ("ours", ours)):
        options = [word for loss in losses for word in ("--loss", loss)]
        result = stages(*student(tiny, *options, arch=arch), "--out", out)
        assert result["settings"]["loss"] == list(losses)
    weights = [torch.load(f"{out}/student.pt", weights_only=True) for out in ("own", "ours")]
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], rtol=1e-6, atol=1e-7), name


def test_a_module_is_trained_and_restored_after_an_interrupt(
    mine: Path, tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = ("--loss", "mine:Projected:scale=2,weight=0.1", "--loss", "kd")
    stages(*student(tiny, *losses, "--baseline", "--finetune-epochs", 1), "--out", "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 12)
        error = stages.fails(130, *student(tiny, *losses, "--baseline", "--finetune-epochs", 1), "--out", "cut")
    assert error.endswith(f"--resume --out cut {' '.join(losses)}")
    parts = torch.load("cut/distilled/checkpoint.pt", weights_only=True)["modules"]["Projected"]
    assert sorted(parts) == ["calls", "student.bias", "student.weight", "teacher.bias", "teacher.weight"]
    assert parts["student.weight"].shape == (8, 10)
    stages("student", "--resume", "--out", "cut", *losses)
    assert read("cut") == read("whole")
    assert read("cut", "distilled/distilled.pt") == read("whole", "distilled/distilled.pt")
    stages(*student(tiny, "--loss", "mine:Projected:scale=0,weight=0.1", "--loss", "kd"), "--out", "other")
    assert read("other") != read("whole", "distilled/distilled.pt")


def test_students_share_no_state_of_a_loss(mine: Path, tiny: Path, stages: Stages) -> None:
    losses = [word for name in ("Projected", "counts", "Counts") for word in ("--loss", f"mine:{name}")]
    stages(*student(tiny, *losses, "--seeds", 2), "--out", "both")
    stages(*student(tiny, *losses, "--seed", 1), "--out", "alone")
    assert read("both", "seed-1/student.pt") == read("alone")
    stages(*student(tiny, *losses, "--seed", 0, "--seed", 1, "--order-seed", 1), "--out", "stream")
    assert read("stream", "seed-1/student.pt") == read("alone")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("mine:not_reduced", "loss 'not_reduced' returned a tensor float32 [60, 10]"),
        ("mine:crashes", "loss 'crashes' failed: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("mine:detached", "loss 'detached' has no gradient"),
        ("mine:Projectd", "Did you mean 'mine:Projected'?"),
        ("mine:of_pool1", "no tap 'pool1'"),
    ],
)
def test_a_loss_that_fails_is_refused_before_the_folder_is_made(
    mine: Path, tiny: Path, stages: Stages, loss: str, message: str
) -> None:
    error = stages.fails(2, *student(tiny, "--loss", loss, "--out", "r"))
    assert message in error
    assert "\n" not in error
    if loss == "mine:crashes":
        assert error.endswith("(mine.py:50, in crashes)")
    assert message in stages.fails(2, *student(tiny, "--losses", loss, "--seed", 0, "--seed", 1, "--out", "r"))
    assert not Path("r").exists()


def test_what_takes_no_own_loss_names_it_and_several_teachers_go_with_one(
    mine: Path, tiny: Path, stages: Stages
) -> None:
    seeds = ("--seed", 0, "--seed", 1, "--vectorize", "--out", "r")
    assert "not kd: leave it out" in stages.fails(2, *student(tiny, "--loss", "mine:kd", *seeds))
    views = ("--train-size", 300, "--views", "crop:pad=1", "--draws", 3)
    stages("teacher", "--train-size", 300, "--arch", "mlp:8", "--epochs", 1, "--out", "t")
    stages("teacher-cache", *views, "--weights", "t", "--out", "c")
    several = student(tiny, "--loss", "mine:kd", "--cache", "c", "--out", "r")
    assert "loss 'kd' is not a mean over rows" in stages.fails(2, *several, "--combine", "ca_mkd")
    assert not Path("r").exists()
    stages(*several, "--combine", "per_teacher")


def test_a_loss_of_labels_alone_reads_labelled_rows_alone(mine: Path, tiny: Path, stages: Stages) -> None:
    result = stages(*student(tiny, "--loss", "mine:needs_labels", "--labelled", 50, "--baseline", "--out", "l"))
    assert result["student"]["val"] == result["baseline"]["val"]


def test_a_search_takes_its_parameters(tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("searched.py").write_text(MINE)  # a module of another name: it stays imported, as Optuna does
    tune = ("tune", *student(tiny)[1:], "--loss", "searched:kd", "--loss", "hard", "--grid", "--out", "t")
    assert "Did you mean 'temperature'" in stages.fails(2, *tune, "--search", "kd.temprature=1|2")
    crashing = ("--loss", "searched:crashes", "--search", "hard.weight=0|1")
    assert "loss 'crashes' failed" in stages.fails(2, *tune, *crashing)
    assert not Path("t").exists()
    stages(*tune, "--search", "kd.temperature=1|2")
    losses = {json.loads(path.read_text())["loss"][0] for path in Path("t").glob("trial-*/settings.json")}
    assert losses == {"searched:kd:temperature=1.0", "searched:kd:temperature=2.0"}


def test_a_chain_uses_it_in_every_generation(mine: Path, tiny: Path, stages: Stages) -> None:
    chain = ("born-again", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 1, "--generations", 2)
    stages(*chain, "--loss", "mine:kd", "--out", "chain")
    settings = [json.loads(Path(f"chain/generation-{g}/settings.json").read_text()) for g in (1, 2)]
    assert [record["loss"] for record in settings] == [["mine:kd"]] * 2
