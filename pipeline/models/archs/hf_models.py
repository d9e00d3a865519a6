"""The image classifiers of transformers: `hf:PATH` of a local folder, or `hf:NAME` of the hub's local cache.

Their code is that of transformers: a model whose own code would have to be run is refused. transformers is imported
where it is used: that takes seconds.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import nn

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.files import open_input_file
from softcache.base.packages import require_extra

from .network_configuration import NetworkConfiguration

_MAX_JSON = 1 << 24  # bytes; the names of 21,841 classes take 1.5 MB
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # numbers of PIL.Image.Resampling
_MAX_SIZE = 4096  # pixels
_OWN_CODE = ("auto_map", "custom_pipelines")  # entries of a config.json that name code of the model's own
_DTYPE = ("dtype", "torch_dtype")


def build_hf(name: str, classes: int, channels: int, size: int) -> nn.Module:
    """Build the network of `hf:NAME` from its config.json, with fresh weights.

    Args:
        name: A folder with a config.json, or a model in the hub's local cache.
        classes, channels, size: As of softcache.pipeline.models.build.

    Returns:
        A network whose output has its logits under the key `logits`.

    Raises:
        UsageError: There is no such model, transformers is not installed, the model is no image classifier of its, or
            it cannot take such images.
        CacheError: config.json is damaged.
    """
    from transformers import AutoModelForImageClassification

    config = _make_config(name, classes, channels, size)
    try:
        with _quiet():
            network: nn.Module = AutoModelForImageClassification.from_config(config)
        if next(network.parameters()).device.type != "meta":
            with torch.no_grad():
                network.eval()(torch.zeros(1, channels, size, size))
    except Exception as error:  # a config.json can hold anything
        raise UsageError(
            f"hf:{name} cannot take images of {channels} channel{'s' * (channels > 1)} and {size} px"
            f" ({_describe(error)}): try another --views size"
        ) from None
    return network.train()


def check_hf_model(name: str) -> None:
    """Check that `hf:NAME` is an image classifier of transformers, without building it; see `build_hf`.

    Raises:
        UsageError, CacheError: As of `build_hf`.
    """
    _make_config(name, 2, 3, 0)


def load_hf_weights(name: str, channels: int, size: int) -> dict[str, torch.Tensor]:
    """Load the weights of `hf:NAME` from its safetensors files, as a state dict of `build_hf`.

    Args:
        name: As of `build_hf`.
        channels, size: Of the input.

    Raises:
        UsageError: As of `build_hf`.
        CacheError: There are no weights, or they are damaged or not those of its config.json.
    """
    from transformers import AutoModelForImageClassification

    config = _make_config(name, _find_classes(read_hf_config(name))[0], channels, size)
    folder = _find_file(name, "config.json")
    assert folder is not None, "read_hf_config has found it"
    try:
        with _quiet():
            network, report = AutoModelForImageClassification.from_pretrained(
                str(folder.parent),
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                dtype=torch.float32,
            )
    except Exception as error:  # of the library or of damaged files, anything
        raise CacheError(
            f"the weights of hf:{name} cannot be loaded ({_describe(error)}):"
            " there must be a model.safetensors beside its config.json"
        ) from None
    wrong = sorted({str(key) for kind in ("missing_keys", "unexpected_keys") for key in report.get(kind, ())})
    wrong += sorted(str(key[0]) for key in report.get("mismatched_keys", ()))
    if wrong:
        raise CacheError(
            f"the weights of hf:{name} do not fit its config.json: {make_printable(', '.join(wrong[:3]), 120)}"
            f"{', …' * (len(wrong) > 3)}"
        )
    state: dict[str, torch.Tensor] = network.state_dict()
    return state


def _make_config(name: str, classes: int, channels: int, size: int) -> Any:
    """Make transformers' config of `hf:NAME` for classes, channels and size; size 0 leaves that as it is."""
    record = read_hf_config(name)
    from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    kind = record.get("model_type")
    shown = make_printable(str(kind), 40)
    if kind == "timm_wrapper":
        raise UsageError(f"hf:{name} is a model of timm: name it as timm:NAME")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = " and its own code is not run" if any(entry in record for entry in _OWN_CODE) else ""
        raise UsageError(f"hf:{name} is of the type '{shown}', which this version of transformers does not have{own}")
    if CONFIG_MAPPING[kind] not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise UsageError(f"hf:{name} is of the type '{shown}', which is no image classifier")
    record = {key: value for key, value in record.items() if key not in (*_OWN_CODE, *_DTYPE, "quantization_config")}
    try:
        with _quiet():
            config = CONFIG_MAPPING[kind].from_dict(record)
    except Exception as error:  # of a file with anything in it
        raise CacheError(f"the config.json of hf:{name} is damaged: {_describe(error)}") from None
    if config.num_labels != classes:
        config.num_labels = classes
    if getattr(config, "num_channels", 3) != channels:
        if not hasattr(config, "num_channels"):
            raise UsageError(f"hf:{name} takes 3 channels, not {channels}: --normalize imagenet repeats grey images")
        config.num_channels = channels
    if size and hasattr(config, "image_size"):
        config.image_size = [size, size] if isinstance(config.image_size, list | tuple) else size
    config.return_dict = True
    return config


def _describe(error: Exception) -> str:
    """Describe an error of the library in one line."""
    return make_printable(" ".join(str(error).split()), 120)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing progress bars and warnings."""
    from transformers.utils import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def find_hf_configuration(name: str) -> NetworkConfiguration:
    """Find the input and the classes of `hf:NAME`, from its config.json and preprocessor_config.json.

    Raises:
        UsageError: There is no such model, or transformers is not installed.
        CacheError: A file is damaged.
    """
    config = read_hf_config(name)
    path = _find_file(name, "preprocessor_config.json")
    record = _read_json(path) if path is not None else {}
    source = str(path or _find_file(name, "config.json"))
    try:
        size, resize = _find_sizes(record, config)
        mean, std = _find_normalization(record)
        classes, names = _find_classes(config)
        if not (1 <= size <= _MAX_SIZE and 1 <= resize <= 2 * _MAX_SIZE and all(s > 0 for s in std)):
            raise ValueError(f"an input of {size} px with standard deviation {list(std)}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CacheError(f"'{source}' describes no input: {make_printable(error, 80)}") from None
    return NetworkConfiguration(
        size=size,
        mean=mean,
        std=std,
        interpolation=_INTERPOLATIONS.get(record.get("resample", 2), "bilinear"),
        resize=max(resize, size),
        classes=classes,
        class_names=names,
    )


def read_hf_config(name: str) -> dict[str, Any]:
    """Read the config.json of `hf:NAME`.

    Raises:
        UsageError: There is no such model on this machine, or transformers is not installed.
        CacheError: The file is damaged.
    """
    require_extra(f"arch hf:{name} needs", "hf", "transformers")
    path = _find_file(name, "config.json")
    if path is None:
        shown = make_printable(name, 80)
        raise UsageError(
            f"no model '{shown}': it is neither a folder with a config.json nor in the local cache of the hub; where"
            f" it is on the hub,  hf download {quote(shown)}  gets it"
        )
    return _read_json(path)


def _find_file(name: str, file: str) -> Path | None:
    """Find a file of a model in its folder or in the hub's local cache; None where it has none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if (folder := Path(name)).is_dir():
        return folder / file if (folder / file).exists() else None
    try:
        path = try_to_load_from_cache(name, file)
    except HFValidationError:  # a name that no model of the hub can have
        return None
    return Path(path) if isinstance(path, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with open_input_file(path) as file:
            record = json.loads(file.read(_MAX_JSON).decode())
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise CacheError(f"'{path}' is damaged: it is no JSON object")
    return record


def _find_sizes(record: dict[str, Any], config: dict[str, Any]) -> tuple[int, int]:
    """Return the side of the input, and the length to which the shorter side of an image is scaled before."""
    shape = record.get("size", config.get("image_size", 224))
    if isinstance(shape, list):
        shape = max(shape)
    shape = {"shortest_edge": shape} if isinstance(shape, int) else shape
    resize = int(shape["shortest_edge"] if "shortest_edge" in shape else max(shape["height"], shape["width"]))
    if record.get("do_center_crop") and (crop := record.get("crop_size")):
        return int(crop if isinstance(crop, int) else max(crop["height"], crop["width"])), resize
    if (share := record.get("crop_pct")) and resize < 384:  # as ConvNextImageProcessor
        return resize, int(resize / float(share))
    return resize, resize


def _find_normalization(record: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation for values of 0 … 1; empty where they are not recorded."""
    if not record:
        return (), ()
    if not record.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    elif "image_mean" not in record or "image_std" not in record:
        return (), ()
    else:
        mean, std = record["image_mean"], record["image_std"]
    scale = 255 * float(record.get("rescale_factor", 1 / 255)) if record.get("do_rescale", True) else 255.0
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    return tuple(float(x) / scale for x in mean), tuple(float(x) / scale for x in std)


def _find_classes(config: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Return the number of classes and their names; no names where they are the library's LABEL_0, LABEL_1, …"""
    labels = config.get("id2label")
    if not labels:
        return int(config.get("num_labels", 2)), ()
    names = tuple(str(labels[str(i)]) for i in range(len(labels)))
    return len(names), () if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names
