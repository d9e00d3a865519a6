"""Models of timm by name: their input as timm resolves it, and their published weights, without a download."""

import os
from pathlib import Path

import pytest
import torch

from softcache.base.errors import CacheError, UsageError
from softcache.pipeline.models import build, check_arch, is_custom_arch, is_external_arch, list_arch_layers
from softcache.pipeline.models.configurations import find_configuration, load_published_state
from softcache.pipeline.models.state_dicts import load_weights
from tests.helpers.hub import publish_timm_weights
from tests.helpers.networks import compute_logits, get_one_line_message

timm = pytest.importorskip("timm")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
@pytest.mark.parametrize(("channels", "size"), [(1, 32), (3, 64)])
def test_a_model_of_timm_outputs_logits_and_trains(name: str, channels: int, size: int) -> None:
    network = build(f"timm:{name}", 7, channels, size)
    assert network.training
    assert compute_logits(network, channels, size, B=2).shape == (2, 7)
    network.train()(torch.rand(2, channels, size, size)).sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_the_network_is_that_of_timm_on_small_images_too() -> None:
    theirs = timm.create_model("test_resnet", num_classes=7)
    assert str(build("timm:test_resnet", 7, 3, 32)) == str(theirs)


def test_the_seed_decides_its_weights() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build("timm:test_vit", 7, 3, 64).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


def test_its_arch_is_no_code_and_opens_nothing() -> None:
    assert not is_custom_arch("timm:test_resnet")
    assert not is_external_arch("timm:test_resnet")
    assert "layer1" in list_arch_layers("timm:test_resnet")


@pytest.mark.parametrize("name", ["resnet18", "resnet18.tv_in1k", "vit_base_patch16_clip_224", "efficientnet_lite0"])
def test_the_input_is_as_timm_resolves_it(name: str) -> None:
    configuration = find_configuration(f"timm:{name}")
    record = timm.models.get_pretrained_cfg(name)
    data = timm.data.resolve_data_config({}, pretrained_cfg=record.to_dict())
    assert configuration is not None
    assert (3, configuration.size, configuration.size) == data["input_size"]
    assert (configuration.mean, configuration.std) == (data["mean"], data["std"])
    assert configuration.interpolation == data["interpolation"]
    resize = timm.data.create_transform(**data, is_training=False).transforms[0].size
    assert configuration.resize == (resize if isinstance(resize, int) else resize[0])
    assert configuration.classes == record.num_classes


def test_the_names_of_its_classes_are_those_of_imagenet() -> None:
    names = find_configuration("timm:resnet18").class_names  # type: ignore[union-attr]
    assert (len(names), names[0], names[282]) == (1000, "tench, Tinca tinca", "tiger cat")
    assert find_configuration("timm:vit_small_patch14_dinov2").class_names == ()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("timm:resnt18", "no timm model 'resnt18'. Did you mean 'resnet18'?"),
        ("timm:resnet18.a9_in1k", "timm model 'resnet18' has no weights 'a9_in1k': it has a1_in1k"),
        ("timm:resnet18.", "timm model 'resnet18' has no weights '': it has a1_in1k"),
        ("timm:hf-hub:timm/resnet18", "no timm model 'hf-hub:timm/resnet18'"),
        ("timm:local-dir:/tmp", "no timm model 'local-dir:/tmp'"),
        ("timm:../resnet18", "no timm model '../resnet18'"),
        ("timm:RESNET18", "no timm model 'RESNET18'"),
        ("timm:", "has nothing after its colon"),
        ("mobilenetv3_small_100", "Did you mean 'timm:mobilenetv3_small_100'?"),
    ],
)
def test_a_name_that_timm_does_not_have_is_refused(arch: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        check_arch(arch)
    assert words in get_one_line_message(error)


@pytest.mark.parametrize(("name", "channels", "size"), [("test_vit", 3, 20), ("maxvit_tiny_tf_224", 3, 10)])
def test_a_model_that_cannot_take_such_images_is_refused(name: str, channels: int, size: int) -> None:
    with pytest.raises(UsageError) as error:
        build(f"timm:{name}", 7, channels, size)
    assert f"timm:{name} cannot take images of {channels} channels and {size} px" in get_one_line_message(error)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softcache.base.packages.find_spec", lambda name: None)
    with pytest.raises(UsageError) as error:
        check_arch("timm:resnet18")
    assert "needs timm, which is not installed: pip install -e '.[timm]'" in get_one_line_message(error)


# Published weights


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_published_weights_are_loaded_by_timm(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = publish_timm_weights(name, tmp_path, monkeypatch)
    state = load_published_state(f"timm:{name}", 3, 160)
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    theirs = timm.create_model(name)
    theirs.load_state_dict(expected)
    network = build(f"timm:{name}", 1000, 3, 160)
    load_weights(network, state, name)
    x = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), theirs.eval()(x))


def test_published_weights_are_adapted_to_channels_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_timm_weights("test_vit", tmp_path, monkeypatch)
    state = load_published_state("timm:test_vit", 1, 64)
    load_weights(build("timm:test_vit", 1000, 1, 64), state, "test_vit")
    assert state["patch_embed.proj.weight"].shape[1] == 1


def test_weights_that_cannot_be_downloaded_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CacheError) as error:
        load_published_state("timm:test_resnet", 3, 160)
    message = get_one_line_message(error)
    assert "published weights of timm:test_resnet cannot be downloaded (HF_HUB_OFFLINE is set)" in message
    assert "hf download timm/test_resnet.r160_in1k model.safetensors" in message


def test_a_damaged_file_of_published_weights_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_timm_weights("test_resnet", tmp_path, monkeypatch)
    next(tmp_path.rglob("model.safetensors")).write_bytes(b"damaged")
    with pytest.raises(CacheError) as error:
        load_published_state("timm:test_resnet", 3, 160)
    assert "timm:test_resnet" in get_one_line_message(error)


def test_a_model_without_published_weights_is_refused() -> None:
    with pytest.raises(CacheError) as error:
        load_published_state("timm:botnet50ts_256", 3, 256)
    assert get_one_line_message(error) == "timm has no published weights of timm:botnet50ts_256: give a file"
