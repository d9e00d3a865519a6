"""Taps: what a named layer gave is kept as it gave it, and the model is left alone."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.models import build
from softcache.pipeline.taps.hooks import capture_features, list_layers


def in_place() -> nn.Sequential:
    """BatchNorm followed by a ReLU that overwrites what BatchNorm gave."""
    torch.manual_seed(0)
    layers = OrderedDict(
        conv=nn.Conv2d(1, 4, 3),
        bn=nn.BatchNorm2d(4),
        relu=nn.ReLU(inplace=True),
        flat=nn.Flatten(),
        out=nn.Linear(64, 3),
    )
    return nn.Sequential(layers)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_an_output_survives_the_in_place_activation_behind_it() -> None:
    model = in_place().eval()
    x = torch.randn(2, 1, 6, 6)
    before_activation = model.bn(model.conv(x)).detach().clone()
    assert (before_activation < 0).any(), "otherwise this proves nothing"
    with torch.no_grad(), capture_features(model, ("bn", "relu")) as kept:
        model(x)
    assert torch.equal(kept["bn"], before_activation)
    assert torch.equal(kept["relu"], before_activation.clamp(min=0))


def test_in_training_mode_too_and_under_inference_mode() -> None:
    x = torch.randn(4, 1, 6, 6)
    for mode in (torch.no_grad, torch.inference_mode):
        model = in_place().train()
        with mode(), capture_features(model, ("bn",)) as kept:
            model(x)
        assert (kept["bn"] < 0).any()


def test_gradients_flow_through_a_tap_as_through_the_layer() -> None:
    x = torch.randn(3, 1, 6, 6)
    one, other = in_place(), in_place()
    with capture_features(one, ("bn",)) as kept:
        one(x)
    kept["bn"].square().sum().backward()
    other.bn(other.conv(x)).square().sum().backward()
    assert one.conv.weight.grad is not None
    torch.testing.assert_close(one.conv.weight.grad, other.conv.weight.grad)
    assert one.out.weight.grad is None, "it lies behind the tap"


def test_a_loss_on_logits_and_on_a_tap_together_adds_their_gradients() -> None:
    x = torch.randn(3, 1, 6, 6)

    def gradient(on_logits: float, on_tap: float) -> torch.Tensor:
        model = in_place()
        with capture_features(model, ("bn",)) as kept:
            (on_logits * model(x).square().sum() + on_tap * kept["bn"].sin().sum()).backward()
        assert model.conv.weight.grad is not None
        return model.conv.weight.grad

    torch.testing.assert_close(gradient(1, 2), gradient(1, 0) + gradient(0, 2))


def test_every_pass_brings_its_own_outputs() -> None:
    model = in_place().eval()
    with torch.no_grad(), capture_features(model, ("out",)) as kept:
        for B in (1, 5):
            assert torch.equal(model(torch.randn(B, 1, 6, 6)), kept["out"])
            assert len(kept["out"]) == B


def test_layers_inside_blocks_are_tapped_by_their_path() -> None:
    model = build("resnet8", 10, 3, 32).eval()
    with torch.no_grad(), capture_features(model, ("layer2.0.conv2", "layer3")) as kept:
        model(torch.rand(2, 3, 32, 32))
    assert {tap: tuple(x.shape) for tap, x in kept.items()} == {
        "layer2.0.conv2": (2, 32, 16, 16),
        "layer3": (2, 64, 8, 8),
    }


def test_the_head_of_a_network_gives_its_logits_from_the_tap_before_it() -> None:
    model = build("cnn", 10, 1, 8).eval()
    with torch.no_grad(), capture_features(model, ("flatten",)) as kept:
        logits = model(torch.rand(2, 1, 8, 8))
        torch.testing.assert_close(model.linear(kept["flatten"]), logits)


def test_tap_names_are_all_paths_and_not_the_model_itself() -> None:
    assert list_layers(in_place()) == ["conv", "bn", "relu", "flat", "out"]
    assert "layer3.0.bn2" in list_layers(build("resnet8", 10, 3, 32))


@pytest.mark.parametrize("arch", ["cnn", "mlp:8", "resnet8"])
def test_tapping_changes_no_logits(arch: str) -> None:
    model = build(arch, 5, 1, 8).eval()
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        plain = model(x)
        with capture_features(model, tuple(list_layers(model))):
            assert torch.equal(model(x), plain)
        assert torch.equal(model(x), plain)


def test_hooks_are_gone_afterwards() -> None:
    model = in_place()
    with capture_features(model, ("bn", "out")) as kept:
        assert hooks(model) > 0
    assert hooks(model) == 0
    model(torch.rand(2, 1, 6, 6))
    assert kept == {}


def test_hooks_are_gone_after_an_error_in_the_model_or_around_it() -> None:
    model = in_place()
    with pytest.raises(RuntimeError), capture_features(model, ("bn",)):
        model(torch.rand(2, 7, 6, 6))
    assert hooks(model) == 0
    with pytest.raises(KeyboardInterrupt), capture_features(model, ("bn",)):
        raise KeyboardInterrupt
    assert hooks(model) == 0


def test_hooks_are_gone_after_an_unknown_tap_behind_a_known_one() -> None:
    model = in_place()
    with pytest.raises(UsageError), capture_features(model, ("bn", "nowhere")):
        pass
    assert hooks(model) == 0


def test_hooks_that_were_there_before_stay() -> None:
    model = in_place()
    seen: list[int] = []
    model.bn.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with capture_features(model, ("bn",)):
        pass
    model(torch.rand(2, 1, 6, 6))
    assert seen == [2]


@pytest.mark.parametrize("tap", ["rellu", "", "bn.weight"])
def test_an_unknown_tap_is_refused_with_the_paths_there_are(tap: str) -> None:
    with pytest.raises(UsageError) as error, capture_features(in_place(), (tap,)):
        pass
    assert str(error.value).startswith(f"no tap '{tap}'.")
    assert str(error.value).endswith("There are: bn, conv, flat, out, relu")
    assert ("Did you mean 'relu'?" in str(error.value)) is (tap == "rellu")


def test_a_layer_that_gives_more_than_one_tensor_is_refused() -> None:
    class First(nn.Module):
        def forward(self, x: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return x[0]

    model = nn.Sequential(OrderedDict(gru=nn.GRU(3, 4, batch_first=True), first=First()))
    with capture_features(model, ("first",)) as kept:
        assert torch.equal(model(torch.rand(2, 5, 3)), kept["first"])
    with pytest.raises(UsageError, match="tap 'gru' gives a tuple, not one tensor"), capture_features(model, ("gru",)):
        model(torch.rand(2, 5, 3))
    assert hooks(model) == 0


class Sometimes(nn.Module):
    """A network that runs one of its layers only when it is told to, and another one never."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.told = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.always(x)
        return self.sometimes(x) if self.told else x


def test_a_layer_that_the_network_never_runs_is_refused_and_not_left_out() -> None:
    model = Sometimes()
    with pytest.raises(UsageError, match="tap 'never' is a layer that the network does not run"):  # noqa: SIM117
        with capture_features(model, ("always", "never")):
            model(torch.rand(1, 2))
    assert hooks(model) == 0


def test_an_output_of_an_earlier_pass_is_not_given_for_this_one() -> None:
    model = Sometimes()
    with capture_features(model, ("sometimes",)) as kept:
        model(torch.rand(1, 2))
        assert set(kept) == {"sometimes"}
        model.told = False
        with pytest.raises(UsageError, match="tap 'sometimes' is a layer that the network does not run"):
            model(torch.rand(1, 2))
