"""Every arch exports to ONNX: ONNX Runtime computes PyTorch's logits of real images, in any batch size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from softcache.data.sources import load_source
from softcache.data.views.policy import parse_views
from softcache.data.views.render import render
from softcache.pipeline.models import MODELS
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.stages.export.formats import ExportedModel, capture_program, make_onnx
from softcache.stages.export.onnx_model import OnnxStudent
from tests.helpers.trained_networks import make_input_spec, train_briefly

# Those that need an argument; a network of transformers is exported in tests/stages/student/test_student_init.py.
ARCHS = {"mlp": "mlp:64,32", "torchvision": "torchvision:resnet18", "timm": "timm:resnet10t"}
NAMES = [name for name in MODELS if name != "hf"]
SIMKD = "simkd(resnet8;layer3;256)"
# Deeper networks of the same kinds, and those whose export takes 15 to 30 s, in `make slow` only.
DEEP = {
    "mobilenet_v2",
    "shufflenet_v1",
    "shufflenet_v2",
    "resnet8x4",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "resnet32x4",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
    "vgg13",
    "timm",
}
LARGE = ("torchvision:mobilenet_v3_small", "torchvision:vit_b_16", SIMKD)
# Training steps: fewer where a step takes long, more where the network learns slowly.
QUICK_STEPS = {"torchvision:resnet18": 4, "shufflenet_v1": 8, "shufflenet_v2": 8}
SLOW_STEPS = {"mobilenet_v2": 200, "shufflenet_v2": 120, "torchvision:efficientnet_b0": 250}
EFFICIENTNET = pytest.param(
    "torchvision:efficientnet_b0",
    marks=pytest.mark.xfail(
        reason="float32 rounding alone is 3e-3 against float64: batch norms have a gain of 256", strict=True
    ),
)
TOLERANCE = 1e-4
Images = tuple[torch.Tensor, torch.Tensor]  # views uint8 [N, C, S, S], labels [N]


@pytest.fixture(scope="module")
def digits() -> Images:
    """128 digits as RGB images of 16 x 16, each in another colour."""
    images, labels = load_source("digits").splits["test"]
    views = render(images, parse_views("none:size=16"), 0, np.arange(128), 0).numpy()
    colours = np.random.default_rng(0).integers(64, 256, (len(views), 3, 1, 1))
    return torch.from_numpy((views * colours // 255).astype(np.uint8)), torch.from_numpy(labels[:128])


@pytest.fixture(scope="module")
def cifar(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Images:
    """1,000 test images of CIFAR-10, decoded from JPEG."""
    import tarfile

    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(shared / "data/cifar10-jpeg/cifar10-jpeg.tar.gz") as tar:
        tar.extractall(folder, [m for m in tar if "/test/" in f"/{m.name}"], filter="data")
    paths = sorted(folder.rglob("test/*/*.jpg"))[::10]
    classes = sorted({path.parent.name for path in paths})
    views = np.stack([np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1) for path in paths])
    return torch.from_numpy(views), torch.tensor([classes.index(path.parent.name) for path in paths])


def measure_parity(arch: str, data: Images, rows: int, steps: int) -> tuple[float, int, torch.Tensor, int]:
    """The largest difference of a logit, changed top-1 predictions, PyTorch's logits [rows, 10], bytes of the file."""
    views = data[0]
    channels, size = views.shape[1], views.shape[-1]
    network = train_briefly(arch, *data, channels, steps)
    model = PreparedModel(network, make_input_spec(channels, size)).eval()
    with torch.inference_mode():
        expected = torch.cat([model(batch) for batch in views[:rows].split(100)])
    program = capture_program(ExportedModel(network, make_input_spec(channels, size)), arch, channels, size)
    content = make_onnx(program, arch, {}, "0")
    onnx_student = OnnxStudent.from_bytes(content, 1)
    images = views[:rows].numpy().astype(np.float32) / 255
    logits = np.concatenate([onnx_student.compute_logits(images[i : i + 100]) for i in range(0, rows, 100)])
    for batch in (1, 7):
        assert np.abs(onnx_student.compute_logits(images[:batch]) - expected[:batch].numpy()).max() <= TOLERANCE
    difference = float(np.abs(logits - expected.numpy()).max())
    return difference, int((logits.argmax(1) != expected.numpy().argmax(1)).sum()), expected, len(content)


def check(arch: str, data: Images, rows: int, steps: int, least: float) -> str:
    """One row of a table: arch, largest difference, changed predictions, mean standard deviation of a class's logit,
    largest logit, bytes. least: of that standard deviation."""
    difference, changed_predictions, logits, size = measure_parity(arch, data, rows, steps)
    spread, largest = float(logits.std(0).mean()), float(logits.abs().max())
    row = f"| {arch} | {difference:.1e} | {changed_predictions} | {spread:.2f} | {largest:.1f} | {size:,} |"
    assert spread > least, f"the logits hardly differ from image to image: {row}"
    assert len(logits.argmax(1).unique()) >= 4, f"only few classes are predicted: {row}"
    assert difference <= TOLERANCE, row
    assert changed_predictions == 0, row
    return row


@pytest.mark.parametrize("arch", [ARCHS.get(name, name) for name in NAMES if name not in DEEP] + [SIMKD])
def test_onnx_runtime_computes_pytorchs_logits(arch: str, digits: Images) -> None:
    check(arch, digits, 128, QUICK_STEPS.get(arch, 14), least=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*(ARCHS.get(name, name) for name in NAMES), *LARGE, EFFICIENTNET])
def test_onnx_runtime_computes_pytorchs_logits_of_a_thousand_images(arch: str, cifar: Images) -> None:
    """After some steps of training; `-s` prints a row of the table for each arch."""
    print(f"\n{check(arch, cifar, 1000, SLOW_STEPS.get(arch, 60), least=0.3)}", flush=True)
