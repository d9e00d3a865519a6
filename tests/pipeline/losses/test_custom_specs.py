"""`my_module:MyLoss:weight=0.5`: the text of a loss of a user's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.batch import ModelOutputs
from softcache.pipeline.losses import Custom, is_custom_loss, parse_losses, remove_custom_losses, split_loss_spec
from softcache.pipeline.losses.base import Ramp
from softcache.pipeline.losses.distillation_loss import DistillationLoss
from softcache.pipeline.losses.kd import KD
from tests.helpers.tensors import make_batch

MINE = """
import torch
import torch.nn.functional as F
from torch import nn

def kd(outputs, batch, temperature=4.0):
    t = temperature
    log_p, log_q = F.log_softmax(outputs.logits / t, 1), F.log_softmax(batch.logits / t, 1)
    return t**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

class Margin:
    def __init__(self, margin, name="none", flag=False):
        self.arguments = (margin, name, flag)

    def __call__(self, outputs, batch):
        return (outputs.logits - batch.logits).abs().clamp(max=self.arguments[0]).mean()

class Scaled(nn.Module):
    teacher_taps, student_taps, needs_logits, needs_labels = ["layer3:pool"], ("layer1",), False, True

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3))

    def forward(self, outputs, batch):
        return self.scale.sum() * outputs.logits.mean()

class Fails:
    def __init__(self):
        raise RuntimeError("no\\nway")

def make(power=2):
    return lambda outputs, batch: (outputs.logits - batch.logits).abs().pow(power).mean()

def make_of_two(low, high):
    return Margin(high - low)

def make_nothing():
    return 3

ready = Scaled()
called = Margin(0.5)
number = 7
"""


OUTPUTS, BATCH = ModelOutputs(torch.linspace(-1, 2, 30).view(6, 5)), make_batch(6, logits=torch.eye(6, 5))


@pytest.fixture
def mine(user_folder: Path) -> Path:
    """A folder with mine.py, the current one."""
    (user_folder / "mine.py").write_text(MINE)
    return user_folder


def test_a_copy_for_a_training_shares_no_weight(mine: Path) -> None:
    instance = Custom(nn.Sequential(nn.Linear(2, 2)))
    made, ready = parse_losses(["mine:Scaled", "mine:ready"])
    for loss in (instance, made, ready):
        assert isinstance(loss, Custom)
        first, second = loss.copy_for_training(), loss.copy_for_training()
        weights = [set(map(id, x.function.parameters())) for x in (loss, first, second)]  # type: ignore[attr-defined]
        assert all(weights)
        assert len(set().union(*weights)) == sum(map(len, weights))
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        drawn.append(made.copy_for_training().function.scale.tolist())  # type: ignore[attr-defined]
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize(
    ("spec", "weight", "name"),
    [
        ("mine:kd", 1.0, "kd"),
        ("mine:kd:temperature=2,weight=0.5", 0.5, "kd"),
        ("mine:Margin:margin=2,name=abc,flag=true,weight=0->1@3", Ramp(0.0, 1.0, 3), "Margin"),
        ("mine:make", 1.0, "make"),
        ("mine:make:power=1.5", 1.0, "make"),
        ("mine:make_of_two:low=1,high=3", 1.0, "make_of_two"),
        ("mine:called:weight=2", 2.0, "called"),
    ],
)
def test_functions_classes_factories_and_objects_are_losses(mine: Path, spec: str, weight: Any, name: str) -> None:
    before = torch.get_rng_state()
    (loss,) = parse_losses([spec])
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(loss, Custom)
    assert (loss.weight, loss.name) == (weight, name)
    assert loss(OUTPUTS, BATCH, None).shape == ()
    if name == "Margin":
        assert loss.function.arguments == (2, "abc", True)  # type: ignore[attr-defined]


def test_a_function_gets_its_parameters(mine: Path) -> None:
    for spec, ours in (("mine:kd:temperature=2", KD(temperature=2.0)), ("mine:kd", KD(temperature=4.0))):
        (loss,) = parse_losses([spec])
        assert torch.allclose(loss(OUTPUTS, BATCH, None), ours(OUTPUTS, BATCH, None), rtol=1e-6)


def test_one_module_may_be_named_twice_and_beside_ours(mine: Path) -> None:
    losses = parse_losses(["kd", "mine:kd", "mine:kd:weight=2", "output", "hint:teacher=layer1"])
    assert DistillationLoss(*losses[:4]).names == ["kd-0", "kd-1", "kd-2", "output"]
    assert losses[4].weight == 0.5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine:Margn", "cannot be imported: module 'mine' has no attribute 'Margn'. Did you mean 'mine:Margin'?"),
        ("mime:Margin", "loss 'mime:Margin' cannot be imported: No module named 'mime'"),
        ("broken:x", "loss 'broken:x' cannot be imported: SyntaxError: "),
        ("mine.py:Margin", "names a file: name the module, as Python imports it: 'mine:Margin'"),
        ("src/mine.py:Margin:margin=2", "as Python imports it: 'src.mine:Margin:margin=2'"),
        ("mine:number", "loss 'mine:number' is a int: neither a function, a class nor a callable object"),
        ("mine:Margin", "loss 'mine:Margin' cannot be made: TypeError: "),
        ("mine:Margin:margn=2", "no parameter 'margn' of loss 'mine:Margin' (mine.py:12). Did you mean 'margin'?"),
        ("mine:kd:temprature=2", "Did you mean 'temperature'?"),
        ("mine:called:margin=2", "loss 'mine:called' is a Margin, made already: it takes weight=… alone"),
        ("mine:Fails", "loss 'mine:Fails' cannot be made: RuntimeError: no (mine.py:30, in __init__)"),
        ("mine:make_nothing", "loss 'mine:make_nothing' returned a int: a loss is called with (outputs, batch)"),
        ("mine:Margin:margin", "'margin' is not parameter=value"),
        ("mine:Margin:margin=1,margin=2", "'margin' is given twice"),
        ("mine:Margin:margin=1->2", "of a loss of your own, only weight can be a ramp"),
        ("mine:kd:weight=x", "weight=x is not a number"),
        ("mine:kd:weight=-1", "weight=-1 is below 0"),
        ("mine.kd", "no loss 'mine.kd'. Did you mean"),
        ("kdd:temperature=4", "no loss 'kdd'. Did you mean 'kd'?"),
    ],
)
def test_what_cannot_be_made_is_one_line(mine: Path, spec: str, message: str) -> None:
    (mine / "broken.py").write_text("def x(:\n")
    with pytest.raises(UsageError) as error:
        parse_losses([spec])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_of_the_table_wins_over_a_module(user_folder: Path) -> None:
    (user_folder / "kd.py").write_text("from pathlib import Path\nPath('IMPORTED').touch()\ndef f(o, b): ...\n")
    with pytest.raises(UsageError, match="'f' is not parameter=value"):
        parse_losses(["kd:f"])
    assert not (user_folder / "IMPORTED").exists()


def test_which_texts_name_code() -> None:
    assert [
        spec for spec in ("kd", "kd:weight=1", "kd:f", "kdd:weight=1", "a b:c", "", ":", "a:") if is_custom_loss(spec)
    ] == []
    own = ["a:b", "a.b:c.d", "a:b:weight=1", "simkd2:x:y=1"]
    assert [spec for spec in own if not is_custom_loss(spec)] == []
    assert split_loss_spec("a.b:c:weight=1,x=2") == ("a.b:c", {"weight": "1", "x": "2"})
    assert remove_custom_losses(["kd", *own, "hard"], "classes") == ("kd", "hard")
    assert remove_custom_losses(own, "classes") == ("kd",)
    assert remove_custom_losses(own, "numbers") == ("kd_mse",)
