"""Archs: each builds, has the structure of its paper, and takes images of different sizes and channels."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from softcache.base.errors import UsageError
from softcache.pipeline.models import LIBRARIES, MODELS, build, count_parameters, find_head
from softcache.pipeline.models.archs.cifar_resnet import Block, CifarResNet
from softcache.pipeline.models.multiply_adds import count_multiply_adds
from softcache.pipeline.models.prepared_model import IMAGENET_MEAN, IMAGENET_STD, InputSpec, PreparedModel
from softcache.pipeline.models.state_dicts import load_weights, read_state_dict
from tests.helpers.networks import compute_logits, get_one_line_message

CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
SHALLOW = {"mlp": "mlp:16,8", "cnn": "cnn", "resnet8": "resnet8", "torchvision": "torchvision:resnet18"}


# The table


@pytest.mark.parametrize("size", [8, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("arch", SHALLOW.values())
def test_an_arch_outputs_one_row_of_logits_for_each_image(arch: str, channels: int, size: int) -> None:
    logits = compute_logits(build(arch, 7, channels, size), channels, size)
    assert logits.shape == (3, 7)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("arch", sorted(set(MODELS) - set(SHALLOW) - set(LIBRARIES)))
def test_the_other_archs_of_the_table_build_and_output_logits_too(arch: str) -> None:
    assert compute_logits(build(arch, 100, 3, 16), 3, 16, B=2).shape == (2, 100)


@pytest.mark.parametrize("size", [4, 5, 7, 15])
def test_cnn_and_mlp_take_images_of_any_size(size: int) -> None:
    for arch in ("cnn", "mlp:5"):
        assert compute_logits(build(arch, 2, 1, size), 1, size).shape == (3, 2)


def test_cnn_refuses_images_that_are_too_small_for_two_poolings() -> None:
    with pytest.raises(UsageError, match="at least 4 px, these are 3 px"):
        build("cnn", 2, 1, 3)


def test_building_twice_from_one_seed_gives_the_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build("resnet8", 10, 3, 32).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resent20", "Did you mean 'resnet20'?"),
        ("cn", "Did you mean 'cnn'?"),
        ("torchvision:resnet19", "Did you mean 'resnet18'?"),
        ("", "There are: cnn, "),
        (":make", "no arch ':make'"),
        (".nets:make", "no arch '.nets:make'"),
        ("not a module:make", "no arch 'not a module:make'"),
        ("cnn:3", "cnn takes no argument"),
        ("resnet20:4", "resnet20 takes no argument"),
    ],
)
def test_an_unknown_arch_is_refused_with_a_suggestion(arch: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        build(arch, 10, 3, 32)
    assert message in get_one_line_message(error)


# mlp and cnn


@pytest.mark.parametrize("widths", ["", "0", "-3", "64,", ",64", "64;64", "wide", "6.5", "64,0"])
def test_an_mlp_needs_positive_integers_as_widths(widths: str) -> None:
    with pytest.raises(UsageError, match="expected widths, such as mlp:64 or mlp:800,800"):
        build(f"mlp:{widths}", 10, 1, 8)


def test_the_layers_of_mlp_and_cnn_have_the_documented_names() -> None:
    mlp, cnn = build("mlp:5,6", 3, 1, 8), build("cnn", 3, 1, 8)
    assert [n for n, _ in mlp.named_children()] == ["flatten", "hidden1", "relu1", "hidden2", "relu2", "linear"]
    assert [n for n, _ in cnn.named_children()] == (
        ["conv1", "bn1", "relu1", "pool1", "conv2", "bn2", "relu2", "pool2", "average", "flatten", "linear"]
    )


# The residual networks of He et al. 2016


def count_parameters_by_hand(depth: int, classes: int, channels: int) -> int:
    """Parameters of a CIFAR ResNet with option A shortcuts, layer by layer."""
    n = (depth - 2) // 6
    total = channels * 16 * 9 + 2 * 16
    in_channels = 16
    for out_channels in (16, 32, 64):
        for _ in range(n):
            total += in_channels * out_channels * 9 + 2 * out_channels
            total += out_channels * out_channels * 9 + 2 * out_channels
            in_channels = out_channels
    return total + 64 * classes + classes


@pytest.mark.parametrize("depth", CIFAR_DEPTHS)
def test_a_cifar_resnet_has_the_number_of_parameters_that_its_layers_add_up_to(depth: int) -> None:
    for classes, channels in ((10, 3), (100, 1)):
        network = build(f"resnet{depth}", classes, channels, 32)
        assert count_parameters(network) == count_parameters_by_hand(depth, classes, channels)


@pytest.mark.parametrize(
    ("depth", "count"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_a_cifar_resnet_has_the_published_number_of_parameters(depth: int, count: int) -> None:
    assert count_parameters(build(f"resnet{depth}", 10, 3, 32)) == count


@pytest.mark.parametrize("depth", CIFAR_DEPTHS)
def test_a_cifar_resnet_has_the_depth_of_its_name(depth: int) -> None:
    network = build(f"resnet{depth}", 10, 3, 32)
    assert [name for name, _ in network.named_children()] == ["conv1", "bn1", "layer1", "layer2", "layer3", "linear"]
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules()) == depth
    assert {len(network.get_submodule(f"layer{i}")) for i in (1, 2, 3)} == {(depth - 2) // 6}  # type: ignore[arg-type]


@pytest.mark.parametrize(("in_channels", "out_channels", "stride"), [(4, 8, 2), (3, 8, 2), (4, 4, 1)])
@pytest.mark.parametrize("side", [6, 7])
def test_the_shortcut_is_every_second_pixel_and_zeros_for_missing_channels(
    in_channels: int, out_channels: int, stride: int, side: int
) -> None:
    block = Block(in_channels, out_channels, stride).double().eval()
    nn.init.zeros_(block.bn2.weight)  # switches the convolutions off: the output is ReLU(shortcut)
    x = torch.randn(2, in_channels, side, side, dtype=torch.float64)
    half = -(-side // stride)
    expected = torch.zeros(2, out_channels, half, half, dtype=torch.float64)
    before = (out_channels - in_channels) // 2
    for b in range(2):
        for c in range(in_channels):
            for i in range(half):
                for j in range(half):
                    expected[b, before + c, i, j] = max(float(x[b, c, i * stride, j * stride]), 0.0)
    assert torch.equal(block(x), expected)


def test_a_block_adds_its_shortcut_before_the_last_relu() -> None:
    block = Block(4, 4, 1).double().eval()
    nn.init.uniform_(block.bn1.bias)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    y = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), torch.clamp(x + y, min=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("file", "depth"), [("resnet20-12fca82f.th", 20), ("resnet56-4bfd9763.th", 56)])
def test_the_public_checkpoints_load(file: str, depth: int, shared: Path) -> None:
    state = read_state_dict(shared / "weights" / file)
    network = CifarResNet(depth, 10)
    load_weights(network, state, file)
    last = network.get_submodule(f"layer3.{(depth - 8) // 6}.bn2")
    assert torch.equal(last.running_var, state[f"layer3.{(depth - 8) // 6}.bn2.running_var"])
    assert torch.equal(network.linear.weight, state["linear.weight"])


@pytest.mark.slow
def test_a_public_checkpoint_has_the_accuracy_that_was_measured_on_these_images(shared: Path) -> None:
    import tarfile

    from PIL import Image

    network = CifarResNet(20, 10)
    load_weights(network, read_state_dict(shared / "weights" / "resnet20-12fca82f.th"), "resnet20")
    model = PreparedModel(network, InputSpec(3, 32, IMAGENET_MEAN, IMAGENET_STD)).eval()
    images, classes = [], []
    with tarfile.open(shared / "data" / "cifar10-jpeg" / "cifar10-jpeg.tar.gz") as archive:
        for member in archive:
            parts = member.name.removeprefix("./").split("/")
            if "test" in parts and member.isfile() and parts[-1].endswith(".jpg"):
                images.append(np.asarray(Image.open(archive.extractfile(member)).convert("RGB")))  # type: ignore[arg-type]
                classes.append(parts[-2])
    names = sorted(set(classes))
    labels = torch.tensor([names.index(c) for c in classes])
    views = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        predictions = torch.cat([model(part).argmax(1) for part in views.split(500)])
    assert len(labels) == 10_000
    assert float((predictions == labels).double().mean()) == pytest.approx(0.8103, abs=5e-4)


# A user's own arch


def test_a_user_factory_is_called_with_classes_channels_and_size(user_folder: Path) -> None:
    (user_folder / "my_nets").mkdir()
    (user_folder / "my_nets" / "small.py").write_text(
        "from torch import nn\n"
        "def make(*, classes, channels, size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes))\n"
    )
    network = build("my_nets.small:make", 5, 3, 6)
    assert compute_logits(network, 3, 6).shape == (3, 5)


def test_the_current_folder_is_put_on_the_import_path_once_and_first(user_folder: Path) -> None:
    (user_folder / "nets_in_a_file.py").write_text("from torch import nn\nmake = lambda **shape: nn.Identity()\n")
    before = list(sys.path)
    for _ in range(2):
        build("nets_in_a_file:make", 5, 1, 8)
    assert sys.path == [str(user_folder), *before]


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("missing_nets:make", "cannot be imported: No module named 'missing_nets'"),
        ("nets_in_a_file:missing", "cannot be imported: module 'nets_in_a_file' has no attribute 'missing'"),
        ("nets_in_a_file:", "cannot be imported: module 'nets_in_a_file' has no attribute ''"),
        ("nets_in_a_file:make", "returned a int, not a torch.nn.Module"),
    ],
)
def test_a_user_factory_that_is_missing_or_wrong_is_refused_in_one_line(
    user_folder: Path, arch: str, message: str
) -> None:
    (user_folder / "nets_in_a_file.py").write_text("def make(classes, channels, size):\n    return 3\n")
    with pytest.raises(UsageError) as error:
        build(arch, 5, 1, 8)
    assert f"arch '{arch}' " in get_one_line_message(error)
    assert message in get_one_line_message(error)


# Properties of a network


def test_the_head_is_the_last_linear_layer_with_one_output_per_class() -> None:
    mlp, resnet = build("mlp:10,10", 10, 1, 8), build("torchvision:resnet18", 10, 3, 32)
    assert find_head(mlp, 10) is mlp.linear
    assert find_head(resnet, 10) is resnet.fc
    assert find_head(build("torchvision:squeezenet1_1", 10, 3, 32), 10) is None, "its last layer is a convolution"
    assert find_head(mlp, 7) is None


def test_multiply_adds_of_an_mlp_are_those_of_its_matrix_products() -> None:
    assert count_multiply_adds(build("mlp:20,30", 7, 3, 8), 3, 8) == 3 * 8 * 8 * 20 + 20 * 30 + 30 * 7


def test_multiply_adds_of_a_cnn_are_those_of_its_convolutions_and_its_linear_layer() -> None:
    by_hand = 9 * 3 * 64 * 28 * 28 + 9 * 64 * 128 * 14 * 14 + 128 * 4 * 4 * 7
    assert count_multiply_adds(build("cnn", 7, 3, 28), 3, 28) == by_hand


class Products(nn.Module):
    """Operations that are counted otherwise than a plain convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, stride=2, groups=2)
        self.transposed = nn.ConvTranspose2d(8, 6, 3, stride=2, bias=False)
        self.rows = nn.Conv1d(6, 6, 5)
        self.linear = nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.rows(self.transposed(self.grouped(x.repeat(1, 4, 1, 1))).flatten(2))
        x = torch.einsum("ncd,nce->nde", x, x)[:, :9, :9]
        return self.linear(torch.baddbmm(x, x, x)).flatten(1)


class Scaled(nn.Module):
    """A product that PyTorch's own counter counts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled, one = x[0, 0].to(torch.float8_e4m3fn), torch.ones(())
        return torch._scaled_mm(scaled, scaled.T, one, one, out_dtype=torch.float32)[None].flatten(1)


class Attention(nn.Module):
    """An attention with keys of another number and width than its values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x[:, :, :20], x[:, :, :20, :8]).flatten(1)


COUNTED = {
    **{
        arch: lambda arch=arch: build(arch, 7, 1, 32)
        for arch in ("resnet8", "wrn_16_1", "vgg8", "torchvision:resnet18")
    },
    **{arch: lambda arch=arch: build(arch, 7, 1, 32) for arch in ("mobilenet_v2", "shufflenet_v1", "shufflenet_v2")},
    "products": Products,
    "scaled": Scaled,
}


@pytest.mark.parametrize("name", COUNTED)
def test_multiply_adds_are_half_the_operations_that_pytorch_counts(name: str) -> None:
    network = COUNTED[name]().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 1, 32, 32))
    assert count_multiply_adds(network, 1, 32) == counter.get_total_flops() / 2 > 0


def test_multiply_adds_of_an_attention_are_those_of_its_two_products() -> None:
    assert count_multiply_adds(Attention(), 1, 32) == 32 * 20 * 32 + 32 * 20 * 8


@pytest.mark.parametrize("training", [True, False])
def test_counting_multiply_adds_does_not_change_the_network(training: bool) -> None:
    network = build("cnn", 7, 1, 8).train(training)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    count_multiply_adds(network, 1, 8)
    assert network.training is training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


# Preparation of the input


class Flatten(nn.Module):
    """A network that outputs its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def resampling_matrix(old: int, new: int) -> np.ndarray:
    """float64 [new, old]: for each new pixel a triangle around its centre, as wide as the scale, of sum 1."""
    scale = old / new
    width = max(scale, 1.0)
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * scale
        for j in range(old):
            matrix[i, j] = max(0.0, 1 - abs((j + 0.5 - centre) / width))
        matrix[i] /= matrix[i].sum()
    return matrix


def prepare_by_hand(views: torch.Tensor, spec: InputSpec) -> np.ndarray:
    x = views.numpy().astype(np.float64) / 255
    if x.shape[1] != spec.channels:
        x = np.concatenate([x] * spec.channels, axis=1)
    m = resampling_matrix(x.shape[-1], spec.size)
    x = np.einsum("ij,bcjk,lk->bcil", m, x, m)
    mean, std = (np.array(v).reshape(1, -1, 1, 1) for v in (spec.mean, spec.std))
    return np.asarray((x - mean) / std)


@pytest.mark.parametrize("size", [8, 12, 16, 19, 5, 4, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_repeated_resized_and_normalised_as_in_float64(size: int, channels: int) -> None:
    input_spec = InputSpec(3, size, IMAGENET_MEAN, IMAGENET_STD)
    generator = torch.Generator().manual_seed(1)
    views = torch.randint(0, 256, (2, channels, 8, 8), dtype=torch.uint8, generator=generator)
    prepared = PreparedModel(Flatten(), input_spec)(views).view(2, 3, size, size).double().numpy()
    np.testing.assert_allclose(prepared, prepare_by_hand(views, input_spec), rtol=0, atol=2e-6)


def test_one_channel_is_normalised_with_its_mean_and_standard_deviation() -> None:
    input_spec = InputSpec(1, 2, (0.25,), (0.5,))
    views = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    torch.testing.assert_close(PreparedModel(Flatten(), input_spec)(views), torch.tensor([[-0.5, -0.1, 0.3, 1.5]]))


def test_memory_layout_changes_no_logits() -> None:
    """PreparedModel lays a network with convolutions out channels-last, for speed alone."""
    torch.manual_seed(0)
    network = build("cnn", 5, 3, 8).double().eval()
    views = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    input_spec = InputSpec(3, 8, IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        expected = network(torch.from_numpy(prepare_by_hand(views, input_spec)))
        logits = PreparedModel(network.float(), input_spec)(views)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_logits_are_float32_whatever_the_network_computes_in() -> None:
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1).bfloat16()

    logits = PreparedModel(Half(), InputSpec(1, 2, (0.0,), (1.0,)))(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    assert logits.dtype == torch.float32


def test_an_input_spec_survives_json_and_is_not_part_of_the_weights() -> None:
    input_spec = InputSpec(3, 32, IMAGENET_MEAN, IMAGENET_STD)
    assert InputSpec.from_json(json.loads(json.dumps(input_spec.to_json()))) == input_spec
    model = PreparedModel(build("mlp:4", 2, 3, 32), input_spec)
    assert all(key.startswith("network.") for key in model.state_dict())
    assert math.prod(model.scale.shape) == 3
