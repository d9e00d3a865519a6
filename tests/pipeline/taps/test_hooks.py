"""Taps: the output of a named layer is captured as the layer returns it, and the model is not changed."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.models import build
from softcache.pipeline.taps.hooks import capture_features, list_layers


def make_in_place_model() -> nn.Sequential:
    """A BatchNorm, then a ReLU that overwrites its output."""
    torch.manual_seed(0)
    layers = OrderedDict(
        conv=nn.Conv2d(1, 4, 3),
        bn=nn.BatchNorm2d(4),
        relu=nn.ReLU(inplace=True),
        flat=nn.Flatten(),
        out=nn.Linear(64, 3),
    )
    return nn.Sequential(layers)


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_an_output_is_not_overwritten_by_an_in_place_activation() -> None:
    model = make_in_place_model().eval()
    x = torch.randn(2, 1, 6, 6)
    before_activation = model.bn(model.conv(x)).detach().clone()
    assert (before_activation < 0).any(), "otherwise this test shows nothing"
    with torch.no_grad(), capture_features(model, ("bn", "relu")) as features:
        model(x)
    assert torch.equal(features["bn"], before_activation)
    assert torch.equal(features["relu"], before_activation.clamp(min=0))


def test_nor_in_training_mode_or_in_inference_mode() -> None:
    x = torch.randn(4, 1, 6, 6)
    for mode in (torch.no_grad, torch.inference_mode):
        model = make_in_place_model().train()
        with mode(), capture_features(model, ("bn",)) as features:
            model(x)
        assert (features["bn"] < 0).any()


def test_gradients_flow_through_a_tap_as_through_the_layer() -> None:
    x = torch.randn(3, 1, 6, 6)
    model, reference = make_in_place_model(), make_in_place_model()
    with capture_features(model, ("bn",)) as features:
        model(x)
    features["bn"].square().sum().backward()
    reference.bn(reference.conv(x)).square().sum().backward()
    assert model.conv.weight.grad is not None
    torch.testing.assert_close(model.conv.weight.grad, reference.conv.weight.grad)
    assert model.out.weight.grad is None, "it comes after the tap"


def test_a_loss_on_logits_and_on_a_tap_together_adds_their_gradients() -> None:
    x = torch.randn(3, 1, 6, 6)

    def gradient(on_logits: float, on_tap: float) -> torch.Tensor:
        model = make_in_place_model()
        with capture_features(model, ("bn",)) as features:
            (on_logits * model(x).square().sum() + on_tap * features["bn"].sin().sum()).backward()
        assert model.conv.weight.grad is not None
        return model.conv.weight.grad

    torch.testing.assert_close(gradient(1, 2), gradient(1, 0) + gradient(0, 2))


def test_every_forward_pass_captures_new_outputs() -> None:
    model = make_in_place_model().eval()
    with torch.no_grad(), capture_features(model, ("out",)) as features:
        for B in (1, 5):
            assert torch.equal(model(torch.randn(B, 1, 6, 6)), features["out"])
            assert len(features["out"]) == B


def test_layers_inside_blocks_are_tapped_by_their_path() -> None:
    model = build("resnet8", 10, 3, 32).eval()
    with torch.no_grad(), capture_features(model, ("layer2.0.conv2", "layer3")) as features:
        model(torch.rand(2, 3, 32, 32))
    assert {tap: tuple(x.shape) for tap, x in features.items()} == {
        "layer2.0.conv2": (2, 32, 16, 16),
        "layer3": (2, 64, 8, 8),
    }


def test_the_logits_are_the_head_applied_to_the_tap_before_it() -> None:
    model = build("cnn", 10, 1, 8).eval()
    with torch.no_grad(), capture_features(model, ("flatten",)) as features:
        logits = model(torch.rand(2, 1, 8, 8))
        torch.testing.assert_close(model.linear(features["flatten"]), logits)


def test_the_layers_are_all_module_paths_without_the_model_itself() -> None:
    assert list_layers(make_in_place_model()) == ["conv", "bn", "relu", "flat", "out"]
    assert "layer3.0.bn2" in list_layers(build("resnet8", 10, 3, 32))


@pytest.mark.parametrize("arch", ["cnn", "mlp:8", "resnet8"])
def test_taps_do_not_change_the_logits(arch: str) -> None:
    model = build(arch, 5, 1, 8).eval()
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        plain = model(x)
        with capture_features(model, tuple(list_layers(model))):
            assert torch.equal(model(x), plain)
        assert torch.equal(model(x), plain)


def test_hooks_are_removed_at_the_end() -> None:
    model = make_in_place_model()
    with capture_features(model, ("bn", "out")) as features:
        assert count_hooks(model) > 0
    assert count_hooks(model) == 0
    model(torch.rand(2, 1, 6, 6))
    assert features == {}


def test_hooks_are_removed_after_an_error_in_the_model_or_around_it() -> None:
    model = make_in_place_model()
    with pytest.raises(RuntimeError), capture_features(model, ("bn",)):
        model(torch.rand(2, 7, 6, 6))
    assert count_hooks(model) == 0
    with pytest.raises(KeyboardInterrupt), capture_features(model, ("bn",)):
        raise KeyboardInterrupt
    assert count_hooks(model) == 0


def test_hooks_are_removed_when_a_later_tap_is_unknown() -> None:
    model = make_in_place_model()
    with pytest.raises(UsageError), capture_features(model, ("bn", "missing")):
        pass
    assert count_hooks(model) == 0


def test_other_hooks_of_the_model_stay() -> None:
    model = make_in_place_model()
    sizes: list[int] = []
    model.bn.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    with capture_features(model, ("bn",)):
        pass
    model(torch.rand(2, 1, 6, 6))
    assert sizes == [2]


@pytest.mark.parametrize("tap", ["rellu", "", "bn.weight"])
def test_an_unknown_tap_is_refused_with_the_known_paths(tap: str) -> None:
    with pytest.raises(UsageError) as error, capture_features(make_in_place_model(), (tap,)):
        pass
    assert str(error.value).startswith(f"no tap '{tap}'.")
    assert str(error.value).endswith("There are: bn, conv, flat, out, relu")
    assert ("Did you mean 'relu'?" in str(error.value)) is (tap == "rellu")


def test_a_layer_with_several_outputs_is_refused() -> None:
    class First(nn.Module):
        def forward(self, x: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return x[0]

    model = nn.Sequential(OrderedDict(gru=nn.GRU(3, 4, batch_first=True), first=First()))
    with capture_features(model, ("first",)) as features:
        assert torch.equal(model(torch.rand(2, 5, 3)), features["first"])
    with (
        pytest.raises(UsageError, match="tap 'gru' outputs a tuple, not one tensor"),
        capture_features(model, ("gru",)),
    ):
        model(torch.rand(2, 5, 3))
    assert count_hooks(model) == 0


class Conditional(nn.Module):
    """A network that can skip one of its layers, and never runs another one."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.optional, self.never = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.runs_optional = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.always(x)
        return self.optional(x) if self.runs_optional else x


def test_a_layer_that_the_network_never_runs_is_refused() -> None:
    model = Conditional()
    with pytest.raises(UsageError, match="tap 'never' is a layer that the network does not run"):  # noqa: SIM117
        with capture_features(model, ("always", "never")):
            model(torch.rand(1, 2))
    assert count_hooks(model) == 0


def test_an_output_of_an_earlier_forward_pass_is_not_returned_for_this_one() -> None:
    model = Conditional()
    with capture_features(model, ("optional",)) as features:
        model(torch.rand(1, 2))
        assert set(features) == {"optional"}
        model.runs_optional = False
        with pytest.raises(UsageError, match="tap 'optional' is a layer that the network does not run"):
            model(torch.rand(1, 2))
