"""The archs of the CIFAR benchmark of Tian et al. 2020: published sizes, taps of the stages, structure by family."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet, shufflenetv2, vgg13_bn
from torchvision.models.mobilenetv2 import InvertedResidual

from softcache.base.errors import UsageError
from softcache.pipeline.models import MODELS, build, count_parameters, find_head
from softcache.pipeline.models.archs.cifar_resnet import Block as ResNetBlock
from softcache.pipeline.models.archs.mobilenet import Block as MobileNetBlock
from softcache.pipeline.models.archs.shufflenet import UnitV1, UnitV2, shuffle
from softcache.pipeline.models.archs.wide_resnet import Block as WideBlock
from softcache.pipeline.taps.hooks import capture_features
from tests.helpers.networks import compute_logits, get_one_line_message

PARAMETERS = {  # with 100 classes and three channels
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenet_v2": 812_836,
    "shufflenet_v1": 949_258,
    "shufflenet_v2": 1_355_528,
}

RESNET_X4 = {"layer1": (64, 32), "layer2": (128, 16), "layer3": (256, 8)}
WRN_1 = {"layer1": (16, 32), "layer2": (32, 16), "layer3": (64, 8), "last": (64, 8)}
WRN_2 = {"layer1": (32, 32), "layer2": (64, 16), "layer3": (128, 8), "last": (128, 8)}
VGG = {"layer1": (64, 32), "layer2": (128, 16), "layer3": (256, 8), "layer4": (512, 4), "layer5": (512, 4)}
STAGES = {  # channels and side of the map at each tap, for images of 32 px; the last one is pooled
    "resnet8x4": RESNET_X4,
    "resnet32x4": RESNET_X4,
    "wrn_16_1": WRN_1,
    "wrn_16_2": WRN_2,
    "wrn_40_1": WRN_1,
    "wrn_40_2": WRN_2,
    "vgg8": VGG,
    "vgg13": VGG,
    "mobilenet_v2": {"layer1": (12, 16), "layer2": (16, 8), "layer3": (48, 4), "layer4": (160, 2), "last": (1280, 2)},
    "shufflenet_v1": {"layer1": (240, 16), "layer2": (480, 8), "layer3": (960, 4)},
    "shufflenet_v2": {"layer1": (116, 16), "layer2": (232, 8), "layer3": (464, 4), "last": (1024, 4)},
}
# Maps without a ReLU: sums of pre-activation blocks, linear bottlenecks.
WITHOUT_RELU = {(arch, f"layer{i}") for arch in STAGES if arch.startswith(("wrn", "mobile")) for i in (1, 2, 3, 4)}

ARCHS = sorted(PARAMETERS)


def randomize_batch_norms(network: nn.Module) -> nn.Module:
    """The network in float64 and eval mode, with batch norms that are no identities."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.double().eval()


def copy_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy our weights into their network, in the order of the two state dicts."""
    state = theirs.state_dict()
    assert [v.shape for v in state.values()] == [v.shape for v in ours.state_dict().values()]
    theirs.load_state_dict(dict(zip(state, ours.state_dict().values(), strict=True)))
    theirs.double().eval()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-9 of the largest value."""
    assert float(expected.detach().abs().max()) > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * float(expected.detach().abs().max()))


# All archs


@pytest.mark.parametrize("arch", ARCHS)
def test_an_arch_has_the_published_number_of_parameters(arch: str) -> None:
    assert count_parameters(build(arch, 100, 3, 32)) == PARAMETERS[arch]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_stage_can_be_tapped_and_the_head_reads_the_mean_of_the_last_map(arch: str) -> None:
    torch.manual_seed(0)
    network = randomize_batch_norms(build(arch, 100, 3, 32))
    with torch.no_grad(), capture_features(network, tuple(STAGES[arch])) as features:
        logits = network(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert {tap: tuple(x.shape) for tap, x in features.items()} == (
        {tap: (2, width, side, side) for tap, (width, side) in STAGES[arch].items()}
    )
    assert {tap for tap, x in features.items() if float(x.min()) < 0} == (
        {tap for tap in STAGES[arch] if (arch, tap) in WITHOUT_RELU}
    )
    head = network.get_submodule("linear")
    assert head is find_head(network, 100)
    assert_close(head(features[list(STAGES[arch])[-1]].mean((2, 3))), logits)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 8)])
def test_images_of_other_sizes_and_channels_are_taken(arch: str, channels: int, size: int) -> None:
    logits = compute_logits(build(arch, 7, channels, size), channels, size)
    assert logits.shape == (3, 7)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_every_parameter_gets_a_gradient(arch: str) -> None:
    torch.manual_seed(0)
    network = build(arch, 4, 1, 8).train()
    network(torch.randn(4, 1, 8, 8)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("arch", ARCHS)
def test_no_relu_overwrites_what_a_tap_or_a_loss_holds(arch: str) -> None:
    assert not any(m.inplace for m in build(arch, 4, 1, 8).modules() if isinstance(m, nn.ReLU))


@pytest.mark.parametrize("arch", ARCHS)
def test_an_argument_is_refused(arch: str) -> None:
    with pytest.raises(UsageError) as error:
        build(f"{arch}:4", 10, 3, 32)
    assert get_one_line_message(error) == f"arch '{arch}:4': {arch} takes no argument"


@pytest.mark.parametrize("arch", ["vgg8", "vgg13"])
def test_vgg_refuses_images_that_are_too_small_for_three_poolings(arch: str) -> None:
    with pytest.raises(UsageError) as error:
        build(arch, 10, 3, 7)
    assert get_one_line_message(error) == f"arch '{arch}' needs images of at least 8 px, these are 7 px"


@pytest.mark.parametrize("arch", sorted(set(ARCHS) - {"vgg8", "vgg13"}))
def test_the_others_downsample_by_padded_strides_and_take_images_of_any_size(arch: str) -> None:
    assert compute_logits(build(arch, 2, 1, 1), 1, 1).shape == (3, 2)


def test_the_table_has_each_arch_under_its_name() -> None:
    assert set(MODELS) - set(PARAMETERS) == (
        {"mlp", "cnn", "torchvision", "timm", "hf", *(f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110))}
    )


# Residual networks


@pytest.mark.parametrize("depth", [8, 32])
def test_a_wide_cifar_resnet_has_the_depth_of_its_name_and_three_shortcuts(depth: int) -> None:
    layers = [m for m in build(f"resnet{depth}x4", 10, 3, 32).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    shortcuts = [m for m in layers if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert [(m.in_channels, m.out_channels, m.stride[0]) for m in shortcuts] == (
        [(32, 64, 1), (64, 128, 2), (128, 256, 2)]
    )
    assert len(layers) - len(shortcuts) == depth


def test_a_block_with_option_b_equals_that_of_torchvision() -> None:
    ours = randomize_batch_norms(ResNetBlock(4, 8, 2, has_projection=True))
    projection = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    theirs = resnet.BasicBlock(4, 8, 2, projection)
    copy_weights(ours, theirs)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(("depth", "widening"), [(16, 1), (16, 2), (40, 1), (40, 2)])
def test_a_wide_resnet_has_the_number_of_convolutions_of_its_name(depth: int, widening: int) -> None:
    network = build(f"wrn_{depth}_{widening}", 10, 3, 32)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    shortcuts = 3 if widening > 1 else 2  # the first stage of the narrowest has 16 channels like its input
    assert sum(m.kernel_size == (1, 1) for m in convolutions) == shortcuts
    assert len(convolutions) - shortcuts == depth - 3
    assert {len(network.get_submodule(f"layer{i}")) for i in (1, 2, 3)} == {(depth - 4) // 6}  # type: ignore[arg-type]


@pytest.mark.parametrize(("in_channels", "out_channels", "stride"), [(4, 4, 1), (4, 8, 2), (4, 8, 1)])
def test_the_shortcut_of_a_wide_block_is_its_input_or_a_convolution_of_the_first_relu(
    in_channels: int, out_channels: int, stride: int
) -> None:
    block = randomize_batch_norms(WideBlock(in_channels, out_channels, stride))
    weights = dict(block.named_parameters())

    def normalize(x: torch.Tensor, name: str) -> torch.Tensor:
        bn = block.get_submodule(name)
        mean, var, weight, bias = (v.view(1, -1, 1, 1) for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
        return ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)

    x = torch.randn(2, in_channels, 7, 7, dtype=torch.float64)
    first = normalize(x, "bn1")
    middle = normalize(F.conv2d(first, weights["conv1.weight"], stride=stride, padding=1), "bn2")
    shortcut = F.conv2d(first, weights["shortcut.weight"], stride=stride) if in_channels != out_channels else x
    assert_close(block(x), F.conv2d(middle, weights["conv2.weight"], padding=1) + shortcut)


# VGG


@pytest.mark.parametrize(("depth", "per_stage"), [(8, 1), (13, 2)])
def test_vgg_has_the_depth_of_its_name_but_for_two_linear_layers(depth: int, per_stage: int) -> None:
    network = build(f"vgg{depth}", 10, 3, 32)
    assert [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)] == (
        [width for width in (64, 128, 256, 512, 512) for _ in range(per_stage)]
    )
    assert 5 * per_stage + 3 == depth


@pytest.mark.parametrize(("size", "poolings"), [(32, 3), (64, 4)])
def test_vgg13_equals_that_of_torchvision_without_its_last_poolings(size: int, poolings: int) -> None:
    ours, theirs = randomize_batch_norms(build("vgg13", 5, 3, size)), vgg13_bn().features
    layers = nn.ModuleList(getattr(ours, f"layer{i}") for i in range(1, 6))
    copy_weights(layers, theirs)
    x = torch.rand(1, 3, size, size, dtype=torch.float64)
    with torch.no_grad(), capture_features(ours, ("layer5",)) as features:
        ours(x)
        for layer in theirs:
            if isinstance(layer, nn.MaxPool2d):
                poolings -= 1
            if not isinstance(layer, nn.MaxPool2d) or poolings >= 0:
                x = layer(x)
    assert_close(features["layer5"], x)


# MobileNetV2


@pytest.mark.parametrize(("in_channels", "out_channels", "stride"), [(4, 4, 1), (4, 6, 1), (4, 4, 2)])
def test_an_inverted_residual_equals_that_of_torchvision_with_relu(
    in_channels: int, out_channels: int, stride: int
) -> None:
    torch.manual_seed(0)
    ours = randomize_batch_norms(MobileNetBlock(in_channels, out_channels, stride, expansion=6))
    theirs = InvertedResidual(in_channels, out_channels, stride, 6)
    copy_weights(ours, theirs)
    for layer in theirs.conv[:2]:
        assert isinstance(layer[2], nn.ReLU6)
        layer[2] = nn.ReLU()
    x = torch.randn(2, in_channels, 7, 7, dtype=torch.float64)
    assert_close(ours(x), theirs(x))


def test_mobilenet_v2_has_the_blocks_of_the_benchmark() -> None:
    network = build("mobilenet_v2", 10, 3, 32)
    blocks = [m for m in network.modules() if isinstance(m, MobileNetBlock)]
    shapes = [(b.expand[0].out_channels // b.expand[0].in_channels, b.project[0].out_channels) for b in blocks]
    widths = [12] * 2 + [16] * 3 + [32] * 4 + [48] * 3 + [80] * 3 + [160]
    assert shapes == [(1, 8), *((6, width) for width in widths)]
    assert [i for i, b in enumerate(blocks) if b.depthwise[0].stride == (2, 2)] == [3, 6, 13]
    assert all(b.depthwise[0].groups == b.depthwise[0].in_channels for b in blocks)


# ShuffleNet


@pytest.mark.parametrize(("channels", "groups"), [(6, 2), (12, 3), (4, 4), (5, 1)])
def test_a_shuffle_interleaves_the_groups_of_channels(channels: int, groups: int) -> None:
    x = torch.randn(2, channels, 3, 3)
    order = [g * (channels // groups) + i for i in range(channels // groups) for g in range(groups)]
    assert sorted(order) == list(range(channels))
    for layout in (torch.contiguous_format, torch.channels_last):
        assert torch.equal(shuffle(x.contiguous(memory_format=layout), groups), x[:, order])
    assert torch.equal(F.channel_shuffle(x, groups), x[:, order])


def test_shufflenet_v1_has_three_groups_except_in_its_first_convolution() -> None:
    units = [m for m in build("shufflenet_v1", 10, 3, 32).modules() if isinstance(m, UnitV1)]
    assert [u.conv1.groups for u in units] == [u.groups for u in units] == [1, *[3] * 15]
    assert {u.conv3.groups for u in units} == {3}
    assert all(u.conv2.groups == u.conv2.in_channels for u in units)
    assert [i for i, u in enumerate(units) if u.conv2.stride == (2, 2)] == [0, 4, 12]
    assert [u.conv1.out_channels for u in units] == [54, 60, 60, 60, 60, *[120] * 7, 120, 240, 240, 240]


def test_a_downsampling_unit_of_shufflenet_v1_concatenates_its_averaged_input_to_the_new_channels() -> None:
    unit = randomize_batch_norms(UnitV1(12, 24, 3))
    nn.init.zeros_(unit.bn3.weight)  # makes the new channels 0
    nn.init.zeros_(unit.bn3.bias)
    x = torch.randn(2, 12, 7, 7, dtype=torch.float64)
    expected = torch.zeros(2, 24, 4, 4, dtype=torch.float64)
    padded = F.pad(x, (1, 1, 1, 1))
    for i in range(4):
        for j in range(4):
            expected[:, 12:, i, j] = padded[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].mean((2, 3)).clamp(min=0)
    assert_close(unit(x), expected)


def test_a_unit_of_shufflenet_v1_mixes_groups_by_its_shuffle_alone() -> None:
    """With 3 groups of 4 middle channels an output channel depends on all 3 groups of the input; unshuffled, on 1."""
    unit = randomize_batch_norms(UnitV1(48, 48, 3))
    x = torch.randn(1, 48, 5, 5, dtype=torch.float64, requires_grad=True)
    before_sum = unit.bn3(unit.conv3(unit.bn2(unit.conv2(shuffle(unit.bn1(unit.conv1(x)), 3)))))
    (gradient,) = torch.autograd.grad(before_sum[0, 0].sum(), x)
    assert (gradient.abs().sum((0, 2, 3)) > 0).all()
    y = shuffle(torch.relu(unit.bn1(unit.conv1(x))), 3)
    y = unit.bn3(unit.conv3(torch.relu(unit.bn2(unit.conv2(y)))))
    assert_close(unit(x), torch.relu(x + y))


@pytest.mark.parametrize(("in_channels", "out_channels"), [(8, 8), (6, 8)])
def test_a_unit_of_shufflenet_v2_equals_that_of_torchvision(in_channels: int, out_channels: int) -> None:
    ours = randomize_batch_norms(UnitV2(in_channels, out_channels))
    theirs = shufflenetv2.InvertedResidual(in_channels, out_channels, 1 if in_channels == out_channels else 2)
    copy_weights(ours, theirs)
    x = torch.randn(2, in_channels, 7, 7, dtype=torch.float64)
    assert_close(ours(x), theirs(x))
