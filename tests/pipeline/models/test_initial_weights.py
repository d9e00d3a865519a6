"""Weights that a training starts from: what is loaded, what stays fresh, and what does not fit."""

from pathlib import Path

import pytest
import torch
from torch import nn

from softcache.base.errors import CacheError, UsageError
from softcache.pipeline.models import build
from softcache.pipeline.models.initial_weights import InitialWeights, check_init, read_initial_weights
from tests.helpers.networks import get_one_line_message


def save(path: Path, arch: str, classes: int, channels: int = 1, size: int = 8) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    state: dict[str, torch.Tensor] = build(arch, classes, channels, size).state_dict()
    torch.save(state, path)
    return state


def read(path: Path, arch: str) -> InitialWeights:
    return read_initial_weights(str(path), arch, 1, 8)


def test_all_weights_are_loaded_where_the_classes_are_as_many(tmp_path: Path) -> None:
    state = save(tmp_path / "w.pt", "resnet8", 10)
    network = build("resnet8", 10, 1, 8)
    weights = read(tmp_path / "w.pt", "resnet8")
    weights.load_into(network, 10)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())
    assert weights.describe(network, 10).endswith("w.pt: all weights, those of the last layer too")
    assert weights.to_json(network, 10) == {"weights": "w.pt", "digest": weights.digest, "fresh": ""}


@pytest.mark.parametrize("arch", ["resnet8", "cnn", "mlp:10,10", "torchvision:squeezenet1_1"])
def test_the_last_layer_is_fresh_where_the_classes_differ(tmp_path: Path, arch: str) -> None:
    """The last layer of SqueezeNet is a convolution."""
    size = 32 if "squeeze" in arch else 8
    state = save(tmp_path / "w.pt", arch, 100, size=size)
    torch.manual_seed(2)
    network = build(arch, 10, 1, size)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    weights = read_initial_weights(str(tmp_path / "w.pt"), arch, 1, size)
    weights.load_into(network, 10)
    after = network.state_dict()
    fresh = [name for name in state if state[name].shape != after[name].shape]
    assert len(fresh) == 2
    for name, value in after.items():
        assert torch.equal(value, before[name] if name in fresh else state[name]), name
    assert weights.describe(network, 10) == (
        f"{arch} starts from --init {tmp_path / 'w.pt'}; last layer: 100 → 10 classes, fresh: {', '.join(fresh)}"
    )
    assert weights.to_json(network, 10)["fresh"] == ", ".join(fresh)


def test_a_file_without_a_last_layer_is_a_start_too(tmp_path: Path) -> None:
    state = save(tmp_path / "w.pt", "resnet8", 10)
    torch.save({f"backbone.{k}": v for k, v in state.items() if not k.startswith("linear.")}, tmp_path / "body.pt")
    network, weights = build("resnet8", 7, 1, 8), read(tmp_path / "body.pt", "resnet8")
    weights.load_into(network, 7)
    assert torch.equal(network.state_dict()["conv1.weight"], state["conv1.weight"])
    assert "last layer: none → 7 classes, fresh: linear.weight, linear.bias" in weights.describe(network, 7)


def test_the_same_weights_have_the_same_digest_however_they_were_saved(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = save(tmp_path / "w.pt", "resnet8", 10)
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"model": dict(reversed(state.items())), "epoch": 3}, tmp_path / "more.pt")
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run/teacher.pt")
    paths = ("w.pt", "w.safetensors", "more.pt", "run")
    assert len({read(tmp_path / name, "resnet8").digest for name in paths}) == 1
    state["conv1.weight"][0, 0, 0, 0] += 1e-6
    torch.save(state, tmp_path / "other.pt")
    assert read(tmp_path / "other.pt", "resnet8").digest != read(tmp_path / "w.pt", "resnet8").digest


@pytest.mark.parametrize(
    ("arch", "change", "words"),
    [
        ("resnet14", {}, "missing"),
        ("cnn", {}, "do not fit the arch"),
        ("resnet8", {"conv1.weight": torch.zeros(16, 3, 3, 3)}, "conv1.weight is 16x3x3x3 in the file, 16x1x3x3"),
        ("resnet8", {"linear.weight": torch.zeros(100, 32)}, "linear.weight is 100x32 in the file, 7x64 in the arch"),
        ("resnet8", {"linear.bias": torch.zeros(())}, "linear.bias is a single number"),
        ("resnet8", {"more.weight": torch.zeros(1)}, "1 not in the arch (more.weight)"),
    ],
)
def test_other_differences_than_the_last_layer_are_refused(
    tmp_path: Path, arch: str, change: dict[str, torch.Tensor], words: str
) -> None:
    torch.save(save(tmp_path / "w.pt", "resnet8", 100) | change, tmp_path / "w.pt")
    with pytest.raises(UsageError) as error:
        read(tmp_path / "w.pt", arch).load_into(build(arch, 7, 1, 8), 7)
    message = get_one_line_message(error)
    assert f"--init {tmp_path / 'w.pt'}" in message
    assert words in message


def test_the_first_convolution_of_torchvision_for_small_images_is_named(tmp_path: Path) -> None:
    save(tmp_path / "w.pt", "torchvision:resnet18", 7, channels=3, size=64)
    weights = read_initial_weights(str(tmp_path / "w.pt"), "torchvision:resnet18", 3, 32)
    with pytest.raises(UsageError) as error:
        weights.load_into(build("torchvision:resnet18", 7, 3, 32), 7)
    assert "for views under 64 px, torchvision: networks get another first convolution" in get_one_line_message(error)


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    state = save(tmp_path / "w.pt", "resnet8", 10)
    torch.save(state | {"conv1.weight": torch.full_like(state["conv1.weight"], torch.nan)}, tmp_path / "w.pt")
    with pytest.raises(CacheError) as error:
        read(tmp_path / "w.pt", "resnet8").load_into(build("resnet8", 10, 1, 8), 10)
    assert "NaN" in get_one_line_message(error)


def test_a_file_of_several_networks_is_refused_with_a_way_out(tmp_path: Path) -> None:
    state = save(tmp_path / "w.pt", "resnet8", 10)
    torch.save({"first": state, "second": state}, tmp_path / "w.pt")
    with pytest.raises(UsageError) as error:
        read(tmp_path / "w.pt", "resnet8")
    assert "save the one to start from in a file of its own" in get_one_line_message(error)


def test_published_weights_of_torchvision_are_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    theirs = torchvision.models.resnet18(weights=None)
    weights = torchvision.models.get_model_weights("resnet18")
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **options: theirs.state_dict())
    network = build("torchvision:resnet18", 10, 3, 64)
    initial = read_initial_weights("DEFAULT", "torchvision:resnet18", 3, 64)
    initial.load_into(network, 10)
    assert torch.equal(network.get_parameter("layer4.0.conv1.weight"), theirs.layer4[0].conv1.weight)
    assert "last layer: 1,000 → 10 classes, fresh: fc.weight, fc.bias" in initial.describe(network, 10)


@pytest.mark.parametrize(
    ("init", "arch", "words"),
    [
        ("none.pt", "cnn", "there are no weights at 'none.pt', which --init names"),
        ("DEFAULT", "cnn", "--init DEFAULT is for torchvision:NAME, timm:NAME and hf:NAME, and the network is 'cnn'"),
        ("DEFAULT", "my.nets:make", "name a file of weights"),
        ("w.pt", "module(nets.Net)", "load the weights into the network that you pass"),
    ],
)
def test_what_cannot_be_a_start_is_found_before_an_image_is_read(init: str, arch: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        check_init(init, arch)
    assert words in get_one_line_message(error)


def test_layers_that_only_look_like_the_last_one_are_loaded(tmp_path: Path) -> None:
    """A hidden layer with as many outputs as there are classes."""
    network = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 7))
    state = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 100)).state_dict()
    torch.save(state, tmp_path / "w.pt")
    weights = read(tmp_path / "w.pt", "nets:make")
    weights.load_into(network, 7)
    assert torch.equal(network[0].weight, state["0.weight"])
    assert weights.to_json(network, 7)["fresh"] == "1.weight, 1.bias"
