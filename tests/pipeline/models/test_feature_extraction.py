"""Classification networks without their classifier."""

import pytest
import torch

from softcache.base.errors import UsageError
from softcache.pipeline.models import build
from softcache.pipeline.models.feature_extraction import build_feature_extractor, has_removable_classifier


def make_state(arch: str, channels: int, size: int, classes: int = 17) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build(arch, classes, channels, size).state_dict()


@pytest.mark.parametrize(
    ("arch", "layer", "width"),
    [
        ("resnet20", "linear", 64),
        ("cnn", "linear", 512),
        ("mlp:32", "linear", 32),
        ("torchvision:resnet18", "fc", 512),
        ("torchvision:mobilenet_v3_small", "classifier.3", 1024),
    ],
)
def test_the_output_is_the_input_of_the_last_linear_layer(arch: str, layer: str, width: int) -> None:
    state = make_state(arch, 3, 8)
    network, name, _ = build_feature_extractor(arch, state, 3, 8, "w.pt")
    whole = build(arch, 17, 3, 8)
    whole.load_state_dict(state)
    inputs: list[torch.Tensor] = []
    whole.get_submodule(layer).register_forward_hook(lambda module, x, y: inputs.append(x[0]))
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        whole.eval()(images)
        features = network.eval()(images)
    assert (name, list(features.shape)) == (layer, [2, width])
    assert torch.equal(features, inputs[0])


def test_a_network_of_timm_is_what_timm_builds_without_classes() -> None:
    timm = pytest.importorskip("timm")
    state, images = make_state("timm:resnet18", 3, 32), torch.rand(2, 3, 32, 32)
    network, name, _ = build_feature_extractor("timm:resnet18", state, 3, 32, "w.pt")
    expected = timm.create_model("resnet18", num_classes=0)
    expected.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
    with torch.no_grad():
        assert torch.equal(network.eval()(images), expected.eval()(images))
    assert (name, network(images).shape[1]) == ("fc", 512)
    headless = {key: value for key, value in state.items() if not key.startswith("fc.")}
    from_file = build_feature_extractor("timm:resnet18", headless, 3, 32, "w.pt")[0]
    with torch.no_grad():
        assert torch.equal(from_file.eval()(images), network(images))


def test_a_network_without_a_last_linear_layer_is_refused() -> None:
    state = make_state("torchvision:squeezenet1_0", 3, 64)
    with pytest.raises(UsageError, match="arch 'torchvision:squeezenet1_0' has no last linear layer"):
        build_feature_extractor("torchvision:squeezenet1_0", state, 3, 64, "w.pt")


def test_networks_of_other_forms_are_taken_as_they_are() -> None:
    assert has_removable_classifier("resnet20")
    assert not any(
        map(has_removable_classifier, ("hf:microsoft/resnet-18", "my_module:make", "simkd(my_module:make;a;3)"))
    )
