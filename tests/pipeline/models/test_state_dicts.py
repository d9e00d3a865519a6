"""Weights on disk: all usual formats are read, no code in them is run, and weights that do not fit are named."""

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


def make_network() -> nn.Sequential:
    """A network with every kind of entry: weights, biases, running statistics and a counter."""
    torch.manual_seed(0)
    layers = OrderedDict(conv=nn.Conv2d(1, 2, 3), bn=nn.BatchNorm2d(2), flatten=nn.Flatten(), linear=nn.Linear(8, 3))
    network = nn.Sequential(layers)
    with torch.no_grad():
        for value in network.state_dict().values():
            value.add_(torch.randn(value.shape).to(value.dtype))
    return network


def save(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def read_error(path: Path) -> str:
    """The one line of the error of reading a file."""
    with pytest.raises(CacheError) as error:
        read_state_dict(path)
    text = str(error.value)
    assert "\n" not in text
    assert f"'{path}'" in text
    return text


def load_error(target: nn.Module, state: dict[str, torch.Tensor]) -> str:
    """The problems that the error of loading a state names, on one line."""
    with pytest.raises(UsageError) as error:
        load_weights(target, state, "teacher.pt")
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("the weights of teacher.pt do not fit the arch: ")
    return text.partition("arch: ")[2]


# Formats


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("nest", ["", "state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_read_in_every_format(tmp_path: Path, prefix: str, nest: str, zipped: bool) -> None:
    original = make_network()
    state = {prefix + key: value for key, value in original.state_dict().items()}
    content = {nest: state, "epoch": 3, "best_prec1": 91.7} if nest else state
    path = save(tmp_path / "weights.pt", content, _use_new_zipfile_serialization=zipped)
    assert list(read_state_dict(path)) == list(original.state_dict())
    fresh = make_network()
    nn.init.zeros_(fresh.linear.weight)
    load_weights(fresh, read_state_dict(path), str(path))
    for key, value in original.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


def test_a_state_dict_inside_a_state_dict_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "nested.pt", {"state_dict": {"model": {"module.a": torch.ones(2)}}})
    assert list(read_state_dict(path)) == ["a"]


def test_only_a_leading_prefix_is_removed(tmp_path: Path) -> None:
    names = ("module.encoder.module.weight", "encoder.module.weight.module.", "submodule.bias")
    path = save(tmp_path / "w.pt", {name: torch.zeros(1) for name in names})
    assert list(read_state_dict(path)) == ["encoder.module.weight", "encoder.module.weight.module.", "submodule.bias"]


def test_an_arch_with_a_layer_called_module_loads_its_weights(tmp_path: Path) -> None:
    original = nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    path = save(tmp_path / "w.pt", original.state_dict())
    fresh = nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    load_weights(fresh, read_state_dict(path), str(path))
    assert hash_weights(fresh) == hash_weights(original)


def test_an_arch_that_reads_a_version_number_loads_from_a_plain_dict(tmp_path: Path) -> None:
    """MNASNet looks for a version number, which only the state dict of PyTorch has, not a plain dict."""
    torch.manual_seed(0)
    original = build("torchvision:mnasnet0_5", 3, 1, 32)
    path = save(tmp_path / "mnasnet.pt", dict(original.state_dict()))
    fresh = build("torchvision:mnasnet0_5", 3, 1, 32)
    load_weights(fresh, read_state_dict(path), str(path))
    assert hash_weights(fresh) == hash_weights(original)


def test_names_of_older_files_of_torchvision_are_translated() -> None:
    block = nn.ModuleDict({"norm1": nn.BatchNorm2d(2), "conv2": nn.Conv2d(2, 2, 1)})
    mlp = nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Dropout(0.0), nn.Linear(3, 2))
    layer = nn.ModuleDict({"denselayer1": block, "mlp": mlp})
    network = nn.ModuleDict({"features": layer})
    state = {key: value + 1 for key, value in network.state_dict().items()}
    old_state = {
        key.replace("norm1.", "norm.1.")
        .replace("conv2.", "conv.2.")
        .replace("mlp.0.", "mlp.linear_1.")
        .replace("mlp.3.", "mlp.linear_2."): value
        for key, value in state.items()
    }
    assert set(old_state) & set(state) == set()
    load_weights(network, old_state, "an old file")
    assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())


def test_names_of_the_arch_itself_are_not_translated() -> None:
    network = nn.ModuleDict({"block": nn.ModuleDict({"mlp": nn.ModuleDict({"linear_1": nn.Linear(2, 2)})})})
    state = {key: value + 1 for key, value in network.state_dict().items()}
    load_weights(network, state, "a file")
    assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())


# Weights that do not fit


def test_batch_counters_may_be_missing_and_keep_their_value() -> None:
    state = {k: v for k, v in make_network().state_dict().items() if not k.endswith("num_batches_tracked")}
    fresh = make_network()
    before = fresh.bn.num_batches_tracked.clone()
    nn.init.zeros_(fresh.conv.weight)
    load_weights(fresh, state, "old.pt")
    assert torch.equal(fresh.conv.weight, state["conv.weight"])
    assert torch.equal(fresh.bn.num_batches_tracked, before)


@pytest.mark.parametrize("name", ["bn.running_mean", "linear.bias"])
def test_a_missing_weight_is_named(name: str) -> None:
    state = make_network().state_dict()
    del state[name]
    assert load_error(make_network(), state) == f"1 missing ({name})"


def test_an_unknown_weight_is_named() -> None:
    state = {**make_network().state_dict(), "fc.weight": torch.zeros(2)}
    assert load_error(make_network(), state) == "1 not in the arch (fc.weight)"


def test_a_weight_of_another_shape_is_named_with_both_shapes() -> None:
    state = {**make_network().state_dict(), "linear.weight": torch.zeros(10, 8)}
    assert load_error(make_network(), state) == (
        "1 of another shape (linear.weight is 10x8 in the file, 3x8 in the arch): the last layer of the file is for 10"
        " classes, that of the network for 3"
    )
    state = {**make_network().state_dict(), "linear.bias": torch.tensor(1.0)}
    assert load_error(make_network(), state) == (
        "1 of another shape (linear.bias is a single number in the file, 3 in the arch)"
    )


def test_three_problems_are_named_and_the_rest_counted() -> None:
    state = {
        "head.weight": torch.zeros(1),
        "linear.weight": torch.zeros(10, 8),
        "bn.num_batches_tracked": torch.tensor(0),
    }
    assert load_error(make_network(), state) == (
        "7 missing (conv.weight, conv.bias, bn.weight, …); 1 not in the arch (head.weight); 1 of another shape"
        " (linear.weight is 10x8 in the file, 3x8 in the arch)"
    )


def test_weights_that_do_not_fit_do_not_change_the_network() -> None:
    target = make_network()
    before = hash_weights(target)
    state = {key: torch.zeros_like(value) for key, value in target.state_dict().items()}
    del state["linear.bias"]
    load_error(target, state)
    assert hash_weights(target) == before


# Files that hold no weights


class Trap:
    """An object that makes a folder when it is loaded by pickle."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nest", ["bare", "state_dict", "weight"])
def test_a_file_that_would_run_code_is_refused_and_its_code_not_run(tmp_path: Path, nest: str, zipped: bool) -> None:
    trap = Trap(tmp_path / "made_by_trap")
    content = {"bare": trap, "state_dict": {"state_dict": trap}, "weight": {"a": torch.zeros(2), "b": trap}}[nest]
    path = save(tmp_path / "trap.pt", content, _use_new_zipfile_serialization=zipped)
    text = read_error(path)
    assert "it would run code when loaded" in text
    assert "save model.state_dict() alone" in text
    assert not (tmp_path / "made_by_trap").exists()


def test_the_trap_of_these_tests_works_without_weights_only(tmp_path: Path) -> None:
    path = save(tmp_path / "trap.pt", Trap(tmp_path / "made_by_trap"))
    torch.load(path, weights_only=False)
    assert (tmp_path / "made_by_trap").is_dir()


@pytest.mark.parametrize("content", [nn.Linear(2, 2), {"model": nn.Linear(2, 2), "args": argparse.Namespace(lr=0.1)}])
def test_a_pickled_network_is_refused(tmp_path: Path, content: Any) -> None:
    assert "it would run code when loaded" in read_error(save(tmp_path / "model.pt", content))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (torch.zeros(3), "Tensor"),
        ([torch.zeros(3)], "list"),
        ({}, "dict"),
        ({"state_dict": {}}, "dict"),
        ({"args": argparse.Namespace(lr=0.1)}, "dict"),
        ({"lr": 0.1, "weight": torch.zeros(2)}, "dict"),
        ({0: torch.zeros(2)}, "dict"),
        (3, "int"),
    ],
)
def test_another_object_is_refused_with_its_type(tmp_path: Path, content: Any, kind: str) -> None:
    text = read_error(save(tmp_path / "other.pt", content))
    assert f"holds a {kind} and no state dict: save model.state_dict()" in text


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path, zipped: bool) -> None:
    state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}
    data = save(tmp_path / "complete.pt", state, _use_new_zipfile_serialization=zipped).read_bytes()
    path = tmp_path / "cut.pt"
    for length in [*range(0, len(data) - 1, 7), len(data) - 1]:
        path.write_bytes(data[:length])
        read_error(path)


def test_random_bytes_and_text_are_refused_whatever_their_first_byte(tmp_path: Path) -> None:
    draw = random.Random(0)
    path = tmp_path / "noise.pt"
    for first in range(256):
        path.write_bytes(bytes([first]) + draw.randbytes(40))
        read_error(path)
        path.write_bytes(bytes([first]) + b"ello, this is a text\n" * 3)
        read_error(path)


def test_a_web_page_is_called_damaged_and_not_code(tmp_path: Path) -> None:
    path = tmp_path / "page.pt"
    path.write_text("<!DOCTYPE html>\n<html><body>404: not found</body></html>\n")
    assert "it is damaged or is not a file of weights" in read_error(path)


def test_a_missing_file_and_a_folder_without_weights_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there are no weights at '.*missing\.pt'"):
        read_state_dict(tmp_path / "missing.pt")
    with pytest.raises(UsageError, match=r"is a folder without teacher\.pt or student\.pt"):
        read_state_dict(find_weights_file(tmp_path))


@pytest.mark.parametrize("names", [["teacher.pt"], ["student.pt"], ["student.pt", "teacher.pt"]])
def test_the_weights_of_a_run_are_found_in_its_folder(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        save(tmp_path / name, {name.replace(".", "_"): torch.zeros(1)})
    assert find_weights_file(tmp_path) == tmp_path / names[-1]
    assert find_weights_file(tmp_path / names[0]) == tmp_path / names[0]


# The digest


def test_equal_weights_have_one_digest_in_every_format(tmp_path: Path) -> None:
    original = make_network()
    digest = hash_weights(original)
    for zipped in (True, False):
        for prefix in ("", "module."):
            state = {prefix + k: v for k, v in reversed(original.state_dict().items())}
            path = save(tmp_path / "w.pt", {"model": state}, _use_new_zipfile_serialization=zipped)
            fresh = make_network()
            nn.init.zeros_(fresh.conv.weight)
            load_weights(fresh, read_state_dict(path), "w.pt")
            assert hash_weights(fresh) == digest
    assert hash_weights(original.to(memory_format=torch.channels_last)) == digest
    assert hash_weights(original.eval().requires_grad_(False)) == digest


def test_one_changed_weight_changes_the_digest() -> None:
    original = make_network()
    digests = {hash_weights(original)}
    for key, value in original.state_dict().items():
        changed = make_network()
        last = changed.state_dict()[key].view(-1)[-1:]
        last.copy_(torch.nextafter(last, last + 1) if last.is_floating_point() else last + 1)
        assert not torch.equal(changed.state_dict()[key], value)
        digests.add(hash_weights(changed))
    assert len(digests) == 1 + len(original.state_dict())


def test_names_dtypes_and_shapes_are_part_of_the_digest() -> None:
    def digest(**weights: torch.Tensor) -> str:
        module = nn.Module()
        for name, value in weights.items():
            module.register_buffer(name, value)
        return hash_weights(module)

    zeros = torch.zeros(2, 2)
    digests = [
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
    assert len(set(digests)) == len(digests)


def test_the_digest_of_given_weights_never_changes() -> None:
    """It is part of the identity of every cache: if it changed, all caches would be refused."""
    module = nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, -2.0]]))
        module.bias.fill_(0.5)
    assert hash_weights(module) == "78caf5d3e8f75d8869fcec943f45c9f4fe6fc5ea66b53873b213a620e609e95a"
