"""Checkpoints as people save them: each is loaded, or refused in one line that says what to do."""

import argparse
import datetime
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from softcache.base.errors import CacheError, UsageError
from softcache.pipeline.models.checkpoint_files import choose_state_dict, describe_choice, read_checkpoint
from softcache.pipeline.models.state_dicts import hash_weights, load_weights
from tests.helpers.commands import Stages

State = dict[str, torch.Tensor]


def make_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = OrderedDict(conv=nn.Conv2d(1, 2, 3), bn=nn.BatchNorm2d(2), flatten=nn.Flatten(), fc=nn.Linear(8, 3))
    return nn.Sequential(layers)


def prefix(state: State, name: str) -> State:
    return {name + key: value for key, value in state.items()}


def load(path: Path, key: str = "", network: nn.Module | None = None) -> tuple[str, str]:
    """Load a file into a new network, and return its digest and what is said about the choice."""
    network = network or make_network(1)
    states = read_checkpoint(path)
    chosen, state = choose_state_dict(states, key, path)
    note = load_weights(network, state, str(path))
    return hash_weights(network), describe_choice(chosen, states) or note


# Each makes the content of a file from the weights of a network, and those of another one.
FORMS: dict[str, Callable[[State, State], Any]] = {
    "torchvision's references": lambda s, e: {"model": s, "args": argparse.Namespace(lr=0.1), "epoch": 3},
    "NumPy figures": lambda s, e: {"net": s, "acc": np.float64(0.9), "confusion": np.eye(3), "seed": np.int64(1)},
    "paths and dates": lambda s, e: {"state_dict": s, "out": Path("/x"), "at": datetime.datetime(2026, 1, 2)},
    "a default dict": lambda s, e: {"model": s, "history": defaultdict(list, {"loss": [0.1]})},
    "a tutorial's": lambda s, e: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}, "loss": 0.1},
    "another name": lambda s, e: {"best": s, "epoch": 3},
    "nested": lambda s, e: {"checkpoint": {"network": s}, "epoch": 3},
    "averaged beside": lambda s, e: {"model_ema": e, "model": s},
    "averaged beside, of DataParallel": lambda s, e: {"state_dict_ema": prefix(e, "module."), "state_dict": s},
    "compiled": lambda s, e: prefix(s, "_orig_mod."),
    "compiled and parallel": lambda s, e: prefix(s, "module._orig_mod."),
    "Lightning": lambda s, e: {"state_dict": prefix(s, "model.") | {"criterion.weight": torch.ones(3)}},
    "Lightning, averaged beside": lambda s, e: {"state_dict": prefix(e, "ema_model.") | prefix(s, "model.")},
    "compiled within Lightning": lambda s, e: {"state_dict": prefix(s, "model._orig_mod."), "callbacks": {}},
    "a layer compiled": lambda s, e: {k.replace("conv.", "conv._orig_mod."): v for k, v in s.items()},
    "a backbone and a head": lambda s, e: {("fc." if k[:2] == "fc" else "backbone.") + k: v for k, v in s.items()},
    "a backbone, and the head as it is": lambda s, e: {("" if k[:2] == "fc" else "backbone.") + k: s[k] for k in s},
    "of AveragedModel": lambda s, e: prefix(s, "module.") | {"n_averaged": torch.tensor(3)},
    "of a counter of operations": lambda s, e: s | {"total_ops": torch.zeros(1), "conv.total_params": torch.zeros(1)},
    "a teacher beside a student": lambda s, e: {"student": e, "teacher": s},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zipped", [True, False])
def test_each_form_gives_the_weights_of_the_network(tmp_path: Path, form: str, zipped: bool) -> None:
    network = make_network()
    content = FORMS[form](dict(network.state_dict()), dict(make_network(2).state_dict()))
    path = tmp_path / "w.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    digest, note = load(path)
    assert digest == hash_weights(network)
    assert ("--weights-key" in note) == ("beside" in form)


@pytest.mark.parametrize(
    ("form", "key"),
    [
        ("averaged beside", "model_ema"),
        ("averaged beside, of DataParallel", "state_dict_ema"),
        ("Lightning, averaged beside", "state_dict.ema_model"),
        ("Lightning, averaged beside", "ema_model"),
        ("a teacher beside a student", "student"),
    ],
)
def test_a_key_takes_the_other_weights(tmp_path: Path, form: str, key: str) -> None:
    other = make_network(2)
    content = FORMS[form](dict(make_network().state_dict()), dict(other.state_dict()))
    torch.save(content.get("state_dict", content) if key == "ema_model" else content, tmp_path / "w.pt")
    assert load(tmp_path / "w.pt", key)[0] == hash_weights(other)


def test_the_key_that_a_note_names_works(tmp_path: Path) -> None:
    s, e = dict(make_network().state_dict()), dict(make_network(2).state_dict())
    torch.save({"model": s, "model_ema": e}, tmp_path / "w.pt")
    note = load(tmp_path / "w.pt")[1]
    assert note == "'model' of the file (also there: 'model_ema'; --weights-key model_ema takes those)"
    with pytest.raises(UsageError, match=r"--weights-key nothing: .* it has 'model', 'model_ema'"):
        load(tmp_path / "w.pt", "nothing")


def test_several_state_dicts_without_a_usual_name_are_listed(tmp_path: Path) -> None:
    s = dict(make_network().state_dict())
    torch.save({"first": s, "second": s}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="several state dicts, 'first', 'second': name one with --weights-key"):
        load(tmp_path / "w.pt")


def test_a_network_around_another_takes_weights_of_the_inner_one(tmp_path: Path) -> None:
    network = make_network()
    torch.save(network.state_dict(), tmp_path / "w.pt")
    outer = nn.ModuleDict({"model": make_network(1)})
    load(tmp_path / "w.pt", network=outer)
    assert hash_weights(outer["model"]) == hash_weights(network)


def test_safetensors_are_read_and_damaged_ones_refused(tmp_path: Path) -> None:
    network, path = make_network(), tmp_path / "w.safetensors"
    save_file(prefix(dict(network.state_dict()), "model."), path)
    assert load(path)[0] == hash_weights(network)
    (tmp_path / "w.bin").write_bytes(path.read_bytes())  # known by its content, whatever its name
    assert load(tmp_path / "w.bin")[0] == hash_weights(network)
    content = path.read_bytes()
    for damaged in (content[:-5], content[:20], b"\xff" * 8 + content[8:], b""):
        path.write_bytes(damaged)
        with pytest.raises(CacheError, match="is not loaded: it is damaged"):
            load(path)


class OwnSettings:
    """An object that a user's own class makes."""


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.jit
@pytest.mark.parametrize("content", ["network", "TorchScript"])
def test_a_file_with_code_is_refused_with_the_python_that_converts_it(tmp_path: Path, content: str) -> None:
    network, path = make_network().eval(), tmp_path / "w.pt"
    if content == "TorchScript":
        torch.jit.trace(network, torch.zeros(2, 1, 4, 4)).save(path)
    else:
        torch.save(network, path)
    with pytest.raises(CacheError) as error:
        read_checkpoint(path)
    text = str(error.value)
    assert "\n" not in text
    exec(text.partition(":  ")[2].partition("  (")[0], {"torch": torch})
    assert load(tmp_path / "w-weights.pt")[0] == hash_weights(network)


def test_an_object_of_a_users_class_beside_the_weights_is_named(tmp_path: Path) -> None:
    torch.save({"model": make_network().state_dict(), "settings": OwnSettings()}, tmp_path / "w.pt")
    with pytest.raises(CacheError, match=r"it would run code when loaded \(.*OwnSettings\)"):
        read_checkpoint(tmp_path / "w.pt")


def test_names_and_shapes_that_do_not_fit_are_counted_and_named(tmp_path: Path) -> None:
    state = dict(make_network().state_dict())

    def fail(content: State) -> str:
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(UsageError) as error:
            load(tmp_path / "w.pt")
        return str(error.value)

    wide = state | {"fc.weight": torch.zeros(10, 8), "fc.bias": torch.zeros(10)}
    text = fail(prefix(wide, "net."))
    assert "2 of another shape (fc.weight is 10x8 in the file, 3x8 in the arch; " in text
    assert "the prefix 'net.' of the file is taken off" in text
    assert text.endswith("the last layer of the file is for 10 classes, that of the network for 3")
    text = fail({f"vit.blocks.{i}.w": torch.zeros(1) for i in range(9)})
    assert "8 missing (conv.weight, conv.bias, bn.weight, …); 9 not in the arch (vit.blocks.0.w, " in text
    assert "all names in the file begin with 'vit.blocks.'" in text
    deeper = prefix(state | {"conv2.weight": torch.zeros(1)}, "model.")
    assert "1 not in the arch (model.conv2.weight)" in fail(deeper)
    mixture = {("" if k[:2] == "fc" else "backbone.") + k: v for k, v in state.items()}
    assert "do not fit" in fail(mixture | {"backbone.conv2.weight": torch.zeros(1)})


def test_teacher_cache_says_which_weights_it_takes_and_check_cache_takes_the_same(stages: Stages) -> None:
    from softcache.pipeline.models import build

    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(build("mlp:4", 10, 1, 8))
    states = [prefix(network.state_dict(), "model.") for network in networks]
    torch.save({"state_dict": states[0], "ema": states[1], "args": argparse.Namespace(lr=0.1)}, "w.pt")
    common = ("--teacher", "mlp:4", "--weights", "w.pt", "--views", "none", "--draws", 1, "--train-size", 100)
    code, out, err = stages.call("teacher-cache", *common, "--out", "raw")
    assert code == 0, err
    assert "weights: 'state_dict' of the file (also there: 'ema'; --weights-key ema takes those)" in out
    stages("teacher-cache", *common, "--weights-key", "ema", "--out", "averaged")
    check = ("--deep", "--weights", "w.pt")
    stages("check-cache", "averaged", *check, "--weights-key", "ema")
    assert "are not those of the cache" in stages.fails(1, "check-cache", "averaged", *check)
    assert "it has 'state_dict', 'ema'" in stages.fails(2, "check-cache", "raw", *check, "--weights-key", "nothing")
