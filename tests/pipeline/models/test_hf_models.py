"""Image classifiers of transformers, from a local folder: their input and weights, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from softcache.base.errors import CacheError, UsageError
from softcache.pipeline.models import build, check_arch, is_custom_arch, is_external_arch, list_arch_layers
from softcache.pipeline.models.configurations import find_configuration, load_published_state
from softcache.pipeline.models.outputs import find_selector
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from softcache.pipeline.models.state_dicts import load_weights
from tests.helpers.hub import save_hf_model
from tests.helpers.networks import get_one_line_message

transformers = pytest.importorskip("transformers")
CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The arch of a small model in a folder."""
    save_hf_model(tmp_path / "model", CLASSES)
    return f"hf:{tmp_path / 'model'}"


def change(model: str, file: str, **entries: Any) -> None:
    """Change entries of a JSON file of a model; None takes one out."""
    path = Path(model.removeprefix("hf:")) / file
    record = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (3, 12)])
def test_a_model_has_classes_and_channels_of_the_data(model: str, channels: int, size: int) -> None:
    network = build(model, 7, channels, size)
    logits = network(torch.rand(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert find_selector(network) is not None
    assert "classifier" in list_arch_layers(model)


def test_its_arch_is_no_code_but_a_file_alone_cannot_name_it(model: str) -> None:
    assert not is_custom_arch(model)
    assert is_external_arch(model)
    assert is_external_arch(f"simkd({model};layer;8)")


def test_published_weights_output_the_logits_of_transformers(model: str) -> None:
    """With resizing, cropping and normalisation of its image processor: here of images of its own size."""
    network = build(model, 3, 3, 12)
    load_weights(network, load_published_state(model, 3, 12), model)
    spec = InputSpec(3, 12, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    views = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(model.removeprefix("hf:")).eval()
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    with torch.no_grad():
        expected = theirs((views / 255 - mean) / std).logits
        torch.testing.assert_close(PreparedModel(network, spec).eval()(views), expected, rtol=0, atol=1e-5)


def test_the_input_is_that_of_its_image_processor(model: str) -> None:
    configuration = find_configuration(model)
    assert configuration is not None
    assert (configuration.size, configuration.resize, configuration.interpolation) == (12, 14, "bicubic")
    assert (configuration.mean, configuration.std) == ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    assert (configuration.classes, configuration.class_names) == (3, CLASSES)


@pytest.mark.parametrize(
    ("entries", "size", "resize", "mean"),
    [
        ({"do_center_crop": False, "size": {"height": 20, "width": 20}}, 20, 20, 0.5),
        ({"do_center_crop": None, "size": 18, "crop_pct": 0.9}, 18, 20, 0.5),
        ({"crop_size": 10, "rescale_factor": 1.0}, 10, 14, 0.5 / 255),
        ({"do_normalize": False}, 12, 14, 0.0),
    ],
)
def test_other_forms_of_image_processors(
    model: str, entries: dict[str, Any], size: int, resize: int, mean: float
) -> None:
    change(model, "preprocessor_config.json", **entries)
    configuration = find_configuration(model)
    assert configuration is not None
    assert (configuration.size, configuration.resize) == (size, resize)
    assert configuration.mean[0] == pytest.approx(mean)


def test_without_an_image_processor_mean_and_deviation_are_not_published(model: str) -> None:
    (Path(model.removeprefix("hf:")) / "preprocessor_config.json").unlink()
    configuration = find_configuration(model)
    assert configuration is not None
    assert (configuration.size, configuration.mean) == (224, ())


@pytest.mark.parametrize(
    ("file", "entries", "words"),
    [
        ("config.json", {"model_type": "bert"}, "is of the type 'bert', which is no image classifier"),
        ("config.json", {"model_type": "nope"}, "is of the type 'nope', which this version of transformers"),
        ("config.json", {"model_type": None}, "is of the type 'None'"),
        ("config.json", {"model_type": ["resnet"]}, "this version of transformers does not have"),
        ("config.json", {"model_type": "mine", "auto_map": {"AutoModel": "m.py"}}, "its own code is not run"),
        ("config.json", {"model_type": "timm_wrapper"}, "is a model of timm: name it as timm:NAME"),
        ("config.json", {"layer_type": "nope"}, "damaged"),
        ("config.json", {"hidden_sizes": "wide"}, "damaged: Validation error for field 'hidden_sizes'"),
        ("preprocessor_config.json", {"size": {"height": "x"}}, "describes no input"),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}, "describes no input"),
        ("preprocessor_config.json", {"size": 10**9, "do_center_crop": False}, "describes no input"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(model: str, file: str, entries: dict[str, Any], words: str) -> None:
    change(model, file, **entries)
    check = check_arch if file == "config.json" else find_configuration
    with pytest.raises((UsageError, CacheError)) as error:
        check(model)
    assert words in get_one_line_message(error)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{" * 100_000, b"\xff\xfe"])
def test_a_damaged_config_is_an_error(model: str, content: bytes) -> None:
    (Path(model.removeprefix("hf:")) / "config.json").write_bytes(content)
    with pytest.raises(CacheError) as error:
        check_arch(model)
    assert "config.json' is damaged" in get_one_line_message(error)


@pytest.mark.parametrize("name", ["nobody/nothing", "a/b/c/d", "no folder", "../..", "-"])
def test_a_model_that_is_not_on_this_machine_is_refused(name: str) -> None:
    with pytest.raises(UsageError) as error:
        check_arch(f"hf:{name}")
    assert "neither a folder with a config.json nor in the local cache" in get_one_line_message(error)


@pytest.mark.parametrize("damage", ["none", "damaged", "other", "pickle"])
def test_weights_that_are_not_those_of_the_model_are_an_error(model: str, damage: str) -> None:
    folder = Path(model.removeprefix("hf:"))
    if damage == "damaged":
        (folder / "model.safetensors").write_bytes(b"x" * 100)
    elif damage == "other":
        change(model, "config.json", hidden_sizes=[8, 24])
    else:
        (folder / "model.safetensors").unlink()
    if damage == "pickle":
        torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(CacheError) as error:
        load_published_state(model, 3, 12)
    assert f"the weights of {model}" in get_one_line_message(error)


def test_the_settings_of_transformers_stay_as_they_were(model: str) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_published_state(model, 3, 12)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
