"""Models of timm and transformers with random weights, saved as their libraries save them: no network is needed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


def save_timm_weights(name: str, path: Path | str, classes: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Save the random weights of a model of timm, and return them."""
    import timm

    torch.manual_seed(seed)
    state: dict[str, torch.Tensor] = timm.create_model(name, num_classes=classes).state_dict()
    torch.save(state, path)
    return state


def publish_timm_weights(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Put random weights of 1,000 classes into a local cache of the hub, as if they had been downloaded."""
    import huggingface_hub
    import timm

    config = timm.models.get_pretrained_cfg(name)
    assert config is not None
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = timm.create_model(name).state_dict()
    repository = folder / f"models--{str(config.hf_hub_id).replace('/', '--')}"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("a" * 40)
    save_file(state, snapshot / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return state


PREPROCESSOR = {
    "crop_size": {"height": 12, "width": 12},
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 14},
}


def save_hf_model(folder: Path, classes: tuple[str, ...]) -> None:
    """Save a small ResNet of transformers with random weights, config.json and preprocessor_config.json."""
    from transformers import AutoModelForImageClassification, ResNetConfig

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: i for i, name in enumerate(classes)},
    )
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
