"""Models of torchvision by name: adapted to small and grey images; their published weights, without a download."""

import os
from collections.abc import Callable
from http.client import IncompleteRead
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn

from softcache.base.errors import CacheError, UsageError
from softcache.pipeline.models import build
from softcache.pipeline.models.archs.torchvision_models import load_published_weights
from softcache.pipeline.models.prepared_model import IMAGENET_MEAN, IMAGENET_STD, InputSpec, PreparedModel
from softcache.pipeline.models.state_dicts import load_weights
from tests.helpers.networks import compute_logits, get_one_line_message

FAST = ("resnet18", "mobilenet_v3_small", "squeezenet1_1", "googlenet")
SLOW = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "regnet_y_400mf",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_16",
)


# Small and grey images


def check_torchvision_model(name: str, channels: int, size: int) -> None:
    network = build(f"torchvision:{name}", 7, channels, size)
    assert network.training
    assert compute_logits(network, channels, size, B=2).shape == (2, 7)
    output = network.train()(torch.rand(2, channels, size, size))
    assert isinstance(output, torch.Tensor), "one output in training too"
    output.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FAST)
def test_a_torchvision_model_trains_on_small_images(name: str, channels: int) -> None:
    check_torchvision_model(name, channels, 32)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SLOW)
def test_every_other_family_of_torchvision_trains_on_small_images(name: str, channels: int) -> None:
    check_torchvision_model(name, channels, 32)


@pytest.mark.parametrize(("name", "size"), [("maxvit_t", 32), ("vit_b_32", 28), ("squeezenet1_1", 2)])
def test_a_torchvision_model_that_cannot_take_such_images_is_refused(name: str, size: int) -> None:
    with pytest.raises(UsageError) as error:
        build(f"torchvision:{name}", 7, 3, size)
    assert f"torchvision:{name} cannot take images of {size} px" in get_one_line_message(error)
    assert "try another --views size" in get_one_line_message(error)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAST, *SLOW, "maxvit_t", "vit_b_32"])
@pytest.mark.parametrize("size", [8, 28, 64, 224])
def test_a_torchvision_model_takes_images_of_a_size_or_is_refused_in_one_line(name: str, size: int) -> None:
    try:
        network = build(f"torchvision:{name}", 7, 1, size)
    except UsageError as error:
        message = str(error)
    else:
        message = ""
        assert compute_logits(network, 1, size, B=1).shape == (1, 7)
    assert "\n" not in message
    assert not message or size < 224, "every one takes 224 px"


def first_convolution(network: nn.Module) -> nn.Conv2d:
    return next(m for m in network.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    "name", ["resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "mobilenet_v3_small", "googlenet"]
)
@pytest.mark.parametrize("size", [8, 63])
def test_under_64_px_the_first_convolution_keeps_the_resolution(name: str, size: int) -> None:
    if (name, size) == ("squeezenet1_1", 8):
        size = 16
    stem = first_convolution(build(f"torchvision:{name}", 7, 3, size))
    assert stem(torch.rand(1, 3, size, size)).shape[-2:] == (size, size)
    assert stem.kernel_size == (3, 3)


def test_under_64_px_there_is_no_pooling_after_the_stem() -> None:
    small = build("torchvision:resnet18", 7, 3, 63)
    assert isinstance(small.maxpool, nn.Identity)
    assert isinstance(build("torchvision:squeezenet1_1", 7, 3, 63).get_submodule("features.2"), nn.Identity)
    assert isinstance(build("torchvision:shufflenet_v2_x0_5", 7, 3, 63).maxpool, nn.Identity)
    assert isinstance(build("torchvision:googlenet", 7, 3, 63).maxpool1, nn.Identity)
    maps = nn.Sequential(small.conv1, small.bn1, small.relu, small.maxpool, small.layer1)
    assert maps(torch.rand(1, 3, 63, 63)).shape == (1, 64, 63, 63)


@pytest.mark.parametrize("size", [64, 224])
def test_from_64_px_on_the_network_is_that_of_torchvision(size: int) -> None:
    ours = build("torchvision:resnet18", 7, 3, size)
    theirs = torchvision.models.resnet18(weights=None, num_classes=7)
    assert str(ours) == str(theirs)


def test_grey_images_change_only_the_channels_of_the_first_convolution() -> None:
    ours = build("torchvision:resnet18", 7, 1, 64)
    stem = first_convolution(ours)
    assert (stem.in_channels, stem.kernel_size, stem.stride, stem.padding) == (1, (7, 7), (2, 2), (3, 3))
    assert stem.bias is None
    assert isinstance(ours.maxpool, nn.MaxPool2d)


def test_a_patch_embedding_keeps_its_stride() -> None:
    stem = first_convolution(build("torchvision:vit_b_32", 7, 3, 32))
    assert (stem.kernel_size, stem.stride) == ((32, 32), (32, 32))


# Published weights


def replace_download(
    monkeypatch: pytest.MonkeyPatch, name: str, load: Callable[[], dict[str, torch.Tensor]]
) -> list[dict[str, object]]:
    """Let load() return the weights of a torchvision model. The list gets the options of each call."""
    calls: list[dict[str, object]] = []

    def get_state_dict(weights: object, **options: object) -> dict[str, torch.Tensor]:
        calls.append(options)
        return load()

    weights = torchvision.models.get_model_weights(name)
    monkeypatch.setattr(weights, "get_state_dict", get_state_dict)
    return calls


def test_published_weights_are_loaded_without_code_and_their_hash_is_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = replace_download(monkeypatch, "resnet18", lambda: {"fc.bias": torch.arange(3.0)})
    state = load_published_weights("resnet18")[0]
    assert len(calls) == 1
    assert calls[0]["weights_only"] is True
    assert calls[0]["check_hash"] is True
    assert torch.equal(state["fc.bias"], torch.arange(3.0))


@pytest.mark.parametrize(
    ("name", "size", "mean", "std"),
    [
        ("resnet18", 224, IMAGENET_MEAN, IMAGENET_STD),
        ("efficientnet_v2_s", 384, IMAGENET_MEAN, IMAGENET_STD),
        ("efficientnet_v2_l", 480, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_published_weights_come_with_the_input_they_were_trained_with(
    monkeypatch: pytest.MonkeyPatch, name: str, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    replace_download(monkeypatch, name, dict)
    published = load_published_weights(name)
    assert published.state_dict == {}
    assert published.size == size
    assert (tuple(published.mean), tuple(published.std)) == (mean, std)
    names = published.class_names
    assert (len(names), names[0], names[-1]) == (1000, "tench", "toilet tissue")


@pytest.mark.parametrize("name", ["googlenet", "resnet18"])
def test_a_published_teacher_outputs_the_logits_of_torchvision(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """GoogLeNet is the difficult one: its file has two more outputs, and torchvision rescales its input."""
    torch.manual_seed(0)
    options = {"aux_logits": True, "transform_input": True, "init_weights": True} if name == "googlenet" else {}
    theirs = torchvision.models.get_model(name, weights=None, **options).eval()
    for module in theirs.modules():
        if isinstance(module, nn.Conv2d):
            # With the weights that torchvision initialises, the output of GoogLeNet hardly depends on its input.
            nn.init.kaiming_normal_(module.weight)
    replace_download(monkeypatch, name, theirs.state_dict)
    state, size, mean, std, classes = load_published_weights(name)
    network = build(f"torchvision:{name}", len(classes), 3, size)
    load_weights(network, state, name)
    ours = PreparedModel(network, InputSpec(3, size, tuple(mean), tuple(std))).eval()
    views = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    images = (views / 255 - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = theirs(images)
        assert float((theirs(1.01 * images) - expected).abs().max()) > 1e-3 * float(expected.abs().max())
        torch.testing.assert_close(ours(views), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "error",
    [
        URLError("no route to host"),
        IncompleteRead(b"half"),
        RuntimeError('invalid hash value (expected "f37072fd", got "00000000")'),
        EOFError("Ran out of input\nand more lines"),
    ],
)
def test_a_failed_download_is_an_error_that_says_where_to_put_the_file(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise error

    replace_download(monkeypatch, "resnet18", fail)
    with pytest.raises(CacheError) as error_info:
        load_published_weights("resnet18")
    assert "published weights of torchvision:resnet18 cannot be downloaded" in get_one_line_message(error_info)
    assert "resnet18-f37072fd.pth" in get_one_line_message(error_info)


@pytest.fixture
def hub_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the published weights of resnet18, once they are downloaded."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / "resnet18-f37072fd.pth"


def test_published_weights_in_the_hub_folder_are_not_downloaded(hub_file: Path) -> None:
    torch.save({"fc.bias": torch.arange(3.0)}, hub_file)
    assert torch.equal(load_published_weights("resnet18")[0]["fc.bias"], torch.arange(3.0))


class Trap:
    """An object that makes a folder when it is loaded by pickle."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.folder,)


def test_code_in_the_file_of_published_weights_is_refused_and_not_run(hub_file: Path, tmp_path: Path) -> None:
    torch.save({"fc.bias": Trap(tmp_path / "made_by_trap")}, hub_file)
    with pytest.raises(CacheError) as error_info:
        load_published_weights("resnet18")
    get_one_line_message(error_info)
    assert not (tmp_path / "made_by_trap").exists()


def test_an_unknown_model_has_no_published_weights() -> None:
    with pytest.raises(UsageError, match="Did you mean 'resnet18'"):
        load_published_weights("resnet19")
