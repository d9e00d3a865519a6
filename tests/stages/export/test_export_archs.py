"""Every arch of the table, as a file: ONNX Runtime says what PyTorch says, of real images, in any batch size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from softcache.data.transfer_set import TRANSFER_SETS
from softcache.data.views import parse_views, render
from softcache.pipeline.models import MODELS
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.stages.export.formats import ExportedModel, capture_program, make_onnx
from softcache.stages.export.onnx_model import OnnxStudent
from tests.helpers.trained_networks import make_input_spec, train_briefly

ROWS = {"mlp": "mlp:64,32", "torchvision": "torchvision:resnet18"}  # an argument where a row wants one
SIMKD = "simkd(resnet8;layer3;256)"
# More of the same, for `make slow`.
DEEP = {
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
}
LARGE = ("torchvision:mobilenet_v3_small", "torchvision:vit_b_16", SIMKD)
# Of training: fewer where each takes long, more where the network learns slowly.
QUICK_STEPS = {"torchvision:resnet18": 4, "shufflenet_v1": 8, "shufflenet_v2": 8}
SLOW_STEPS = {"mobilenet_v2": 200, "shufflenet_v2": 120, "torchvision:efficientnet_b0": 250}
EFFICIENTNET = pytest.param(
    "torchvision:efficientnet_b0",
    marks=pytest.mark.xfail(reason="float32 itself is 3e-3 from float64: batch norms with a gain of 256", strict=True),
)
TOLERANCE = 1e-4
Shown = tuple[torch.Tensor, torch.Tensor]  # views uint8 [N, C, S, S], labels [N]


@pytest.fixture(scope="module")
def digits() -> Shown:
    """128 digits as RGB images of 16 x 16, each in a colour of its own."""
    splits, _ = TRANSFER_SETS["digits"].read(Path())
    images, labels = splits["test"]
    views = render(images, parse_views("none:size=16"), 0, np.arange(128), 0).numpy()
    colours = np.random.default_rng(0).integers(64, 256, (len(views), 3, 1, 1))
    return torch.from_numpy((views * colours // 255).astype(np.uint8)), torch.from_numpy(labels[:128])


@pytest.fixture(scope="module")
def cifar(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """1,000 test images of CIFAR-10, as JPEG decoded."""
    import tarfile

    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(shared / "data/cifar10-jpeg/cifar10-jpeg.tar.gz") as tar:
        tar.extractall(folder, [m for m in tar if "/test/" in f"/{m.name}"], filter="data")
    found = sorted(folder.rglob("test/*/*.jpg"))[::10]
    names = sorted({path.parent.name for path in found})
    views = np.stack([np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1) for path in found])
    return torch.from_numpy(views), torch.tensor([names.index(path.parent.name) for path in found])


def compared(arch: str, shown: Shown, rows: int, steps: int) -> tuple[float, int, torch.Tensor, int]:
    """The largest difference of a logit over so many rows, flips, PyTorch's logits, bytes of the file."""
    views = shown[0]
    channels, size = views.shape[1], views.shape[-1]
    network = train_briefly(arch, *shown, channels, steps)
    model = PreparedModel(network, make_input_spec(channels, size)).eval()
    with torch.inference_mode():
        said = torch.cat([model(some) for some in views[:rows].split(100)])
    program = capture_program(ExportedModel(network, make_input_spec(channels, size)), arch, channels, size)
    content = make_onnx(program, arch, {}, "0")
    runner = OnnxStudent.from_session(content, 1)
    images = views[:rows].numpy().astype(np.float32) / 255
    found = np.concatenate([runner.logits(images[i : i + 100]) for i in range(0, rows, 100)])
    for batch in (1, 7):
        assert np.abs(runner.logits(images[:batch]) - said[:batch].numpy()).max() <= TOLERANCE
    difference = float(np.abs(found - said.numpy()).max())
    return difference, int((found.argmax(1) != said.numpy().argmax(1)).sum()), said, len(content)


def check(arch: str, shown: Shown, rows: int, steps: int, least: float) -> str:
    """One row of a table: arch, largest difference, flips, mean spread of a class's logit, largest logit, bytes."""
    difference, flips, said, size = compared(arch, shown, rows, steps)
    spread, largest = float(said.std(0).mean()), float(said.abs().max())
    row = f"| {arch} | {difference:.1e} | {flips} | {spread:.2f} | {largest:.1f} | {size:,} |"
    assert spread > least, f"the logits hardly differ from image to image: {row}"
    assert len(said.argmax(1).unique()) >= 4, f"few classes are ever the first: {row}"
    assert difference <= TOLERANCE, row
    assert flips == 0, row
    return row


@pytest.mark.parametrize("arch", [ROWS.get(name, name) for name in MODELS if name not in DEEP] + [SIMKD])
def test_onnx_runtime_says_what_pytorch_says(arch: str, digits: Shown) -> None:
    check(arch, digits, 128, QUICK_STEPS.get(arch, 14), least=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*(ROWS.get(name, name) for name in MODELS), *LARGE, EFFICIENTNET])
def test_onnx_runtime_says_what_pytorch_says_of_a_thousand_pictures(arch: str, cifar: Shown) -> None:
    """After some steps of training; `-s` prints a row of figures for each arch."""
    print(f"\n{check(arch, cifar, 1000, SLOW_STEPS.get(arch, 60), least=0.3)}", flush=True)
