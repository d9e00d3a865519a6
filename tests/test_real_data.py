"""The real thing: public weights on real images. Long; run with `make slow`, skipped where the data are absent."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from softcache.stages.main import main
from softcache.stages.student.methods import METHODS
from tests.helpers.commands import Stages

pytestmark = pytest.mark.slow

# Measured apart from this project, float32, on the 10,000 JPEG test images.
KNOWN = {"resnet56": ("resnet56-4bfd9763.th", 0.8320), "resnet20": ("resnet20-12fca82f.th", 0.8103)}


@pytest.fixture(scope="session")
def cifar(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 as a folder of JPEG images."""
    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(shared / "data/cifar10-jpeg/cifar10-jpeg.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("teacher", KNOWN)
@pytest.mark.parametrize("codec", ["float16", "float32"])
def test_public_weights_score_what_they_score(
    shared: Path, cifar: Path, stages: Stages, teacher: str, codec: str
) -> None:
    """By the cache's own test split, to within 2 images of 10,000."""
    name, accuracy = KNOWN[teacher]
    made = stages(
        "teacher-cache",
        "--data",
        f"folder:{cifar}",
        "--teacher",
        teacher,
        "--weights",
        shared / "weights" / name,
        "--normalize",
        "imagenet",
        "--views",
        "crop-flip",
        "--draws",
        1,
        "--train-size",
        2000,
        "--codec",
        codec,
        "--out",
        "c",
    )
    assert abs(made["teacher"]["test"]["accuracy"] - accuracy) <= 2.0001e-4
    stages("check-cache", "c", "--deep", "--data", f"folder:{cifar}")


def test_students_of_four_families_train_from_one_cache(shared: Path, cifar: Path, stages: Stages) -> None:
    """No teacher: its weights are a copy that is deleted before the first student."""
    weights = Path("weights.th")
    shutil.copy(shared / "weights/resnet56-4bfd9763.th", weights)
    data = ("--data", f"folder:{cifar}")
    stages(
        "teacher-cache",
        *data,
        "--teacher",
        "resnet56",
        "--weights",
        weights,
        "--normalize",
        "imagenet",
        "--views",
        "crop-flip",
        "--draws",
        2,
        "--train-size",
        4000,
        "--out",
        "c",
    )
    weights.unlink()
    for arch in ("resnet8", "cnn", "mlp:512", "torchvision:mobilenet_v3_small"):
        result = stages("student", *data, "--cache", "c", "--arch", arch, "--epochs", 1, "--learning-rate", 0.05)
        assert result["student"]["arch"] == arch
        assert result["student"]["test"]["accuracy"] > 0.09


@pytest.fixture(scope="module")
def featured(shared: Path, cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of maps and statistics of ResNet-56; a statistic that is not there is made from its map."""
    out = tmp_path_factory.mktemp("featured") / "c"
    asked = [
        "teacher-cache",
        "--data",
        f"folder:{cifar}",
        "--teacher",
        "resnet56",
        "--weights",
        shared / "weights/resnet56-4bfd9763.th",
        "--normalize",
        "imagenet",
        "--views",
        "crop-flip",
        "--draws",
        1,
        "--train-size",
        1000,
        "--val-fraction",
        0.02,
        "--out",
        out,
        "--taps",
        "layer1,layer2,layer3,layer2:attention,layer3:pool,layer3:grid2",
    ]
    main([str(word) for word in asked])
    return out


@pytest.mark.parametrize("part", range(4))
def test_every_method_trains_a_student_from_one_cache(featured: Path, cifar: Path, stages: Stages, part: int) -> None:
    some = list(METHODS)[part::4]
    table = stages(
        "methods",
        "--data",
        f"folder:{cifar}",
        "--cache",
        featured,
        "--arch",
        "resnet8",
        "--epochs",
        2,
        "--batch-size",
        64,
        "--learning-rate",
        0.05,
        "--time-steps",
        2,
        "--only",
        ",".join(some),
        "--out",
        "m",
    )
    assert {row["method"]: row.get("failed") for row in table["methods"]} == dict.fromkeys(["hard", *some])
    for name in [path.name for path in Path("m").iterdir() if path.is_dir()]:
        epochs = [json.loads(line) for line in Path(f"m/{name}/metrics.jsonl").read_text().splitlines()]
        assert epochs[1]["loss"] < epochs[0]["loss"], name


def test_the_learned_blend_of_two_public_networks_is_no_worse_than_either_and_than_their_mean(
    shared: Path, cifar: Path, stages: Stages
) -> None:
    data = ("--data", f"folder:{cifar}")
    caches: list[str] = []
    for teacher, (name, _) in KNOWN.items():
        stages(
            "teacher-cache",
            *data,
            "--teacher",
            teacher,
            "--weights",
            shared / "weights" / name,
            "--normalize",
            "imagenet",
            "--views",
            "crop-flip",
            "--draws",
            1,
            "--train-size",
            2000,
            "--out",
            teacher,
        )
        caches += ["--cache", teacher]
    *others, learned = stages("blend", *caches)["rows"]
    assert learned["name"] == "learned"
    for row in others:
        assert learned["val"]["nll"] <= row["val"]["nll"], row["name"]
        assert learned["test"]["nll"] < row["test"]["nll"], row["name"]
    result = stages("student", *data, *caches, "--combine", "learned", "--arch", "cnn", "--epochs", 1, "--loss", "kd")
    assert result["teacher"]["val"]["nll"] == pytest.approx(learned["val"]["nll"], rel=1e-9)


def test_mnist_from_its_own_files(shared: Path, stages: Stages) -> None:
    """Two epochs each: the student from the cache makes fewer errors than the one from hard targets."""
    data = ("--data", "mnist", "--data-root", shared / "data/mnist")
    stages("teacher", *data, "--epochs", 5, "--out", "t")
    made = stages("teacher-cache", *data, "--weights", "t", "--out", "c")
    assert made["rows"] == 70_000
    assert made["teacher"]["test"]["accuracy"] > 0.97
    result = stages("student", *data, "--cache", "c", "--epochs", 4, "--baseline", "--out", "r")
    assert result["settings"]["loss"] == ["kd:temperature=20"]
    assert result["student"]["test"]["accuracy"] > result["baseline"]["test"]["accuracy"]
