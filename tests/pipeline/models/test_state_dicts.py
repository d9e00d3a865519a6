"""Weights on disk: every usual way to save them is read, nothing in them is run, and what does not fit is named."""

import argparse
import os
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from softcache.base.errors import CacheError, UsageError
from softcache.pipeline.models import build
from softcache.pipeline.models.state_dicts import find_weights_file, hash_weights, load_weights, read_state_dict


def network() -> nn.Sequential:
    """A network with every kind of entry: weights, biases, running statistics and a counter."""
    torch.manual_seed(0)
    layers = OrderedDict(conv=nn.Conv2d(1, 2, 3), bn=nn.BatchNorm2d(2), flatten=nn.Flatten(), linear=nn.Linear(8, 3))
    made = nn.Sequential(layers)
    with torch.no_grad():
        for value in made.state_dict().values():
            value.add_(torch.randn(value.shape).to(value.dtype))
    return made


def saved(path: Path, what: Any, **options: Any) -> Path:
    torch.save(what, path, **options)
    return path


def refused(path: Path) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(CacheError) as error:
        read_state_dict(path)
    text = str(error.value)
    assert "\n" not in text
    assert f"'{path}'" in text
    return text


def does_not_fit(target: nn.Module, state: dict[str, torch.Tensor]) -> str:
    """The one line with which a state is refused."""
    with pytest.raises(UsageError) as error:
        load_weights(target, state, "teacher.pt")
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("the weights of teacher.pt do not fit the arch: ")
    return text.partition("arch: ")[2]


# Ways to save a state dict


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("nest", ["", "state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_read_however_it_was_saved(tmp_path: Path, prefix: str, nest: str, zipped: bool) -> None:
    original = network()
    state = {prefix + key: value for key, value in original.state_dict().items()}
    what = {nest: state, "epoch": 3, "best_prec1": 91.7} if nest else state
    path = saved(tmp_path / "weights.pt", what, _use_new_zipfile_serialization=zipped)
    assert list(read_state_dict(path)) == list(original.state_dict())
    fresh = network()
    nn.init.zeros_(fresh.linear.weight)
    load_weights(fresh, read_state_dict(path), str(path))
    for key, value in original.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


def test_a_state_dict_inside_a_state_dict_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path / "nested.pt", {"state_dict": {"model": {"module.a": torch.ones(2)}}})
    assert list(read_state_dict(path)) == ["a"]


def test_a_prefix_is_taken_off_at_the_front_alone(tmp_path: Path) -> None:
    names = ("module.encoder.module.weight", "encoder.module.weight.module.", "submodule.bias")
    path = saved(tmp_path / "w.pt", {name: torch.zeros(1) for name in names})
    assert list(read_state_dict(path)) == ["encoder.module.weight", "encoder.module.weight.module.", "submodule.bias"]


def test_an_arch_with_a_layer_of_its_own_called_module_loads_what_it_saved(tmp_path: Path) -> None:
    original = nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    path = saved(tmp_path / "w.pt", original.state_dict())
    fresh = nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    load_weights(fresh, read_state_dict(path), str(path))
    assert hash_weights(fresh) == hash_weights(original)


def test_weights_of_an_arch_that_asks_for_its_version_load_from_a_bare_dict(tmp_path: Path) -> None:
    """MNASNet looks for a version number that only PyTorch's own kind of state dict carries."""
    torch.manual_seed(0)
    original = build("torchvision:mnasnet0_5", 3, 1, 32)
    path = saved(tmp_path / "mnasnet.pt", dict(original.state_dict()))
    fresh = build("torchvision:mnasnet0_5", 3, 1, 32)
    load_weights(fresh, read_state_dict(path), str(path))
    assert hash_weights(fresh) == hash_weights(original)


def test_names_of_torchvisions_older_files_are_translated_where_the_arch_has_the_new_ones() -> None:
    block = nn.ModuleDict({"norm1": nn.BatchNorm2d(2), "conv2": nn.Conv2d(2, 2, 1)})
    mlp = nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Dropout(0.0), nn.Linear(3, 2))
    layer = nn.ModuleDict({"denselayer1": block, "mlp": mlp})
    today = nn.ModuleDict({"features": layer})
    state = {key: value + 1 for key, value in today.state_dict().items()}
    of_old = {
        key.replace("norm1.", "norm.1.")
        .replace("conv2.", "conv.2.")
        .replace("mlp.0.", "mlp.linear_1.")
        .replace("mlp.3.", "mlp.linear_2."): value
        for key, value in state.items()
    }
    assert set(of_old) & set(state) == set()
    load_weights(today, of_old, "an old file")
    assert all(torch.equal(today.state_dict()[key], value) for key, value in state.items())


def test_names_that_an_arch_itself_has_are_not_translated() -> None:
    mine = nn.ModuleDict({"block": nn.ModuleDict({"mlp": nn.ModuleDict({"linear_1": nn.Linear(2, 2)})})})
    state = {key: value + 1 for key, value in mine.state_dict().items()}
    load_weights(mine, state, "mine")
    assert all(torch.equal(mine.state_dict()[key], value) for key, value in state.items())


# What does not fit


def test_missing_batch_counters_are_no_fault_and_keep_their_value() -> None:
    state = {k: v for k, v in network().state_dict().items() if not k.endswith("num_batches_tracked")}
    fresh = network()
    before = fresh.bn.num_batches_tracked.clone()
    nn.init.zeros_(fresh.conv.weight)
    load_weights(fresh, state, "old.pt")
    assert torch.equal(fresh.conv.weight, state["conv.weight"])
    assert torch.equal(fresh.bn.num_batches_tracked, before)


@pytest.mark.parametrize("name", ["bn.running_mean", "linear.bias"])
def test_a_missing_weight_is_named(name: str) -> None:
    state = network().state_dict()
    del state[name]
    assert does_not_fit(network(), state) == f"{name} is missing"


def test_a_weight_too_many_is_named() -> None:
    state = {**network().state_dict(), "fc.weight": torch.zeros(2)}
    assert does_not_fit(network(), state) == "fc.weight is not in the arch"


def test_a_weight_of_another_shape_is_named_with_both_shapes() -> None:
    state = {**network().state_dict(), "linear.weight": torch.zeros(10, 8)}
    assert does_not_fit(network(), state) == "linear.weight is 10x8 in the file, 3x8 in the arch"
    state = {**network().state_dict(), "linear.bias": torch.tensor(1.0)}
    assert does_not_fit(network(), state) == "linear.bias is a single number in the file, 3 in the arch"


def test_of_many_problems_the_first_three_are_named_and_the_rest_counted() -> None:
    state = {
        "head.weight": torch.zeros(1),
        "linear.weight": torch.zeros(10, 8),
        "bn.num_batches_tracked": torch.tensor(0),
    }
    assert does_not_fit(network(), state) == (
        "conv.weight is missing; conv.bias is missing; bn.weight is missing (and 6 more)"
    )


def test_weights_that_do_not_fit_leave_the_network_as_it_was() -> None:
    target = network()
    before = hash_weights(target)
    state = {key: torch.zeros_like(value) for key, value in target.state_dict().items()}
    del state["linear.bias"]
    does_not_fit(target, state)
    assert hash_weights(target) == before


# What is no file of weights


class Trap:
    """Loaded as a pickle, it would make a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nest", ["bare", "state_dict", "weight"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, nest: str, zipped: bool) -> None:
    trap = Trap(tmp_path / "sprung")
    what = {"bare": trap, "state_dict": {"state_dict": trap}, "weight": {"a": torch.zeros(2), "b": trap}}[nest]
    path = saved(tmp_path / "trap.pt", what, _use_new_zipfile_serialization=zipped)
    text = refused(path)
    assert "it would run code when loaded" in text
    assert "save model.state_dict() alone" in text
    assert not (tmp_path / "sprung").exists()


def test_the_trap_of_these_tests_does_spring_without_the_guard(tmp_path: Path) -> None:
    path = saved(tmp_path / "trap.pt", Trap(tmp_path / "sprung"))
    torch.load(path, weights_only=False)
    assert (tmp_path / "sprung").is_dir()


@pytest.mark.parametrize("what", [nn.Linear(2, 2), {"model": nn.Linear(2, 2)}, {"args": argparse.Namespace(lr=0.1)}])
def test_a_whole_network_or_a_record_of_arguments_is_refused_for_the_code_it_needs(tmp_path: Path, what: Any) -> None:
    assert "it would run code when loaded" in refused(saved(tmp_path / "model.pt", what))


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        (torch.zeros(3), "Tensor"),
        ([torch.zeros(3)], "list"),
        ({}, "dict"),
        ({"state_dict": {}}, "dict"),
        ({"lr": 0.1, "weight": torch.zeros(2)}, "dict"),
        ({0: torch.zeros(2)}, "dict"),
        (3, "int"),
    ],
)
def test_a_file_of_something_else_is_refused_with_what_it_is(tmp_path: Path, what: Any, kind: str) -> None:
    text = refused(saved(tmp_path / "other.pt", what))
    assert f"holds a {kind} and no state dict: save model.state_dict()" in text


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, zipped: bool) -> None:
    state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}
    whole = saved(tmp_path / "whole.pt", state, _use_new_zipfile_serialization=zipped).read_bytes()
    path = tmp_path / "cut.pt"
    for length in [*range(0, len(whole) - 1, 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path)


def test_random_bytes_and_text_are_refused_whatever_they_begin_with(tmp_path: Path) -> None:
    draw = random.Random(0)
    path = tmp_path / "noise.pt"
    for first in range(256):
        path.write_bytes(bytes([first]) + draw.randbytes(40))
        refused(path)
        path.write_bytes(bytes([first]) + b"ello, this is a text\n" * 3)
        refused(path)


def test_a_web_page_in_place_of_weights_is_called_damaged_and_not_dangerous(tmp_path: Path) -> None:
    path = tmp_path / "page.pt"
    path.write_text("<!DOCTYPE html>\n<html><body>404: not found</body></html>\n")
    assert "it is damaged or is no file of weights" in refused(path)


def test_weights_that_are_not_there_and_folders_without_any_are_wrong_commands(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there are no weights at '.*nowhere\.pt'"):
        read_state_dict(tmp_path / "nowhere.pt")
    with pytest.raises(UsageError, match=r"is a folder without teacher\.pt or student\.pt"):
        read_state_dict(find_weights_file(tmp_path))


@pytest.mark.parametrize("names", [["teacher.pt"], ["student.pt"], ["student.pt", "teacher.pt"]])
def test_the_weights_of_a_run_are_found_in_its_folder(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        saved(tmp_path / name, {name.replace(".", "_"): torch.zeros(1)})
    assert find_weights_file(tmp_path) == tmp_path / names[-1]
    assert find_weights_file(tmp_path / names[0]) == tmp_path / names[0]


# The digest


def test_equal_weights_have_one_digest_however_they_were_saved(tmp_path: Path) -> None:
    original = network()
    digest = hash_weights(original)
    for zipped in (True, False):
        for prefix in ("", "module."):
            state = {prefix + k: v for k, v in reversed(original.state_dict().items())}
            path = saved(tmp_path / "w.pt", {"model": state}, _use_new_zipfile_serialization=zipped)
            fresh = network()
            nn.init.zeros_(fresh.conv.weight)
            load_weights(fresh, read_state_dict(path), "w.pt")
            assert hash_weights(fresh) == digest
    assert hash_weights(original.to(memory_format=torch.channels_last)) == digest
    assert hash_weights(original.eval().requires_grad_(False)) == digest


def test_one_changed_weight_changes_the_digest() -> None:
    original = network()
    digests = {hash_weights(original)}
    for key, value in original.state_dict().items():
        changed = network()
        at = changed.state_dict()[key].view(-1)[-1:]
        at.copy_(torch.nextafter(at, at + 1) if at.is_floating_point() else at + 1)
        assert not torch.equal(changed.state_dict()[key], value)
        digests.add(hash_weights(changed))
    assert len(digests) == 1 + len(original.state_dict())


def test_names_types_and_shapes_are_part_of_the_digest() -> None:
    def digest(**weights: torch.Tensor) -> str:
        module = nn.Module()
        for name, value in weights.items():
            module.register_buffer(name, value)
        return hash_weights(module)

    zeros = torch.zeros(2, 2)
    kinds = [
        digest(a=zeros),
        digest(b=zeros),
        digest(a=zeros.view(4)),
        digest(a=zeros.int()),
        digest(a=zeros[:1], b=zeros[1:]),
        digest(a=zeros.bfloat16()),
        digest(a=zeros.bool()),
        digest(a=torch.tensor(0.0)),
        digest(a=-zeros),
    ]
    assert len(set(kinds)) == len(kinds)


def test_a_digest_is_the_same_for_ever() -> None:
    """It is part of the identity of every cache: another digest of the same weights would refuse them all."""
    module = nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, -2.0]]))
        module.bias.fill_(0.5)
    assert hash_weights(module) == "78caf5d3e8f75d8869fcec943f45c9f4fe6fc5ea66b53873b213a620e609e95a"
