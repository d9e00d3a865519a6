"""`--teacher-size`: the teacher gets the views of its students at its own resolution, cut out of the image alike."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from softcache.data.images.image_arrays import ImageArrays
from softcache.data.images.image_folder import ImageFolder
from softcache.data.views.pairs import render_pairs
from softcache.data.views.policy import parse_views
from softcache.data.views.render import render
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models import build
from tests.helpers.commands import Stages

TEACHER = ("--teacher", "resnet8", "--weights", "w.pt", "--normalize", "imagenet", "--codec", "float32")
FOLDER = ("--data", "folder:pictures")
SIZES = ((90, 61), (64, 64), (40, 77))


@pytest.fixture
def pictures(tmp_path: Path, stages: Stages) -> Path:
    """48 smooth pictures of three sizes in two classes, and weights of a teacher."""
    generator = np.random.default_rng(0)
    for i in range(48):
        path = Path(f"pictures/{'train' if i < 32 else 'test'}/{'ab'[i % 2]}/{i:02d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        noise.resize(SIZES[i % 3], Image.Resampling.BICUBIC).save(path)
    torch.manual_seed(0)
    torch.save(build("resnet8", 2, 3, 48).state_dict(), "w.pt")
    return Path("pictures")


def compute_plainly(images: list[Image.Image], size: int) -> NDArray[np.float32]:
    """The teacher over images, by torchvision's functions alone."""
    from torchvision.transforms import v2

    network = build("resnet8", 2, 3, size)
    network.load_state_dict(torch.load("w.pt", weights_only=True))
    to_input = v2.Compose(
        [
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    with torch.inference_mode():
        return network.eval()(torch.stack([to_input(image) for image in images])).numpy()


def test_the_logits_are_those_of_torchvision_on_the_same_crop(pictures: Path, stages: Stages) -> None:
    """Held-out views: the centre, of which the student gets 32 pixels and the teacher 48."""
    from torchvision.transforms import functional

    views = "resized-crop-flip:size=32,resize=40"
    stages("teacher-cache", *FOLDER, *TEACHER, "--views", views, "--teacher-size", 48, "--draws", 1)
    cache = CacheReader(Path("caches/pictures"))
    files = sorted(Path("pictures/test").rglob("*.png"))
    index = cache.index_at("test", np.arange(len(files)))
    logits = cache.read_stored("test", 0, np.arange(len(files)))[0].numpy()
    crops = []
    for i in index:
        image = Image.open(files[i])
        width, height = (round(side * 60 / min(image.size)) for side in image.size)
        resized = functional.resize(image, [height, width], antialias=True)
        crops.append(functional.crop(resized, (height - 48) // 2, (width - 48) // 2, 48, 48))
    assert np.abs(logits - compute_plainly(crops, 48)).max() < 1e-5

    stages("student", *FOLDER, "--cache", cache.folder, "--arch", "mlp:4", "--epochs", 1, "--out", "run")
    assert cache.input_spec.size == 48
    checked = stages("check-cache", cache.folder, "--deep", *FOLDER, "--weights", "w.pt")
    assert checked["teacher"]["rows"] > 0


@pytest.mark.parametrize(
    "views",
    [
        "none",
        "none:resize=40",
        "resized-crop-flip",
        "crop-flip:pad=3,mixup=1",
        "crop-flip:pad=3,erasing=0.6,cutmix=1",
        "multi-crop:global=1,local=2,jitter=0.3,hue=0.1,gray=0.2",
    ],
)
def test_both_views_show_the_same_part_of_the_image(pictures: Path, views: str) -> None:
    """The teacher's view, reduced to the student's size, is the student's but for the blur of two resizings."""
    names = tuple(sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.png")))
    images = ImageFolder(pictures, names, "RGB", 0)
    policy = parse_views(views + (",size=32" if ":" in views else ":size=32"))
    index = np.array([5, 5, 0, 47, 11, 2, 3, 4, 6, 7, 8], np.int64)
    draw = np.arange(len(index)) % 4
    student, teacher = render_pairs(images, (policy, policy.at_size(64)), 7, index, draw)
    assert torch.equal(student, render(images, policy, 7, index, draw))
    assert torch.equal(teacher, render(images, policy.at_size(64), 7, index, draw))
    reduced = torch.nn.functional.avg_pool2d(teacher.float(), 2)
    difference = (reduced - student.float()).abs()
    assert float(difference.mean()) < 3.0
    assert float((reduced.roll(1, 0) - student.float()).abs().mean()) > 20


def test_images_in_memory_are_padded_in_proportion(pictures: Path) -> None:
    policy = parse_views("crop-flip:pad=2,size=8")
    images, index = ImageArrays(torch.full((5, 1, 8, 8), 200, dtype=torch.uint8)), np.arange(5)
    student, teacher = render_pairs(images, (policy, policy.at_size(32)), 0, index, 0)
    assert (student == 0).any()
    assert np.array_equal(teacher.numpy(), np.kron(student.numpy(), np.ones((1, 1, 4, 4), np.uint8)))


def test_a_decoded_file_is_not_decoded_again(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = ImageFolder.decode
    monkeypatch.setattr(ImageFolder, "decode", lambda self, i: (decoded.append(i), decode(self, i))[1])
    names = tuple(sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.png")))
    policy = parse_views("resized-crop-flip:size=8")
    render_pairs(ImageFolder(pictures, names, "RGB", 0), (policy, policy.at_size(16)), 0, np.arange(20), 0)
    assert sorted(decoded) == list(range(20))


def test_the_size_is_part_of_the_identity_only_where_it_is_another_one(pictures: Path, stages: Stages) -> None:
    command = ("teacher-cache", *FOLDER, *TEACHER, "--views", "none:size=32", "--draws", 1)
    stages(*command, "--out", "plain")
    stages(*command, "--out", "same", "--teacher-size", 32)
    stages(*command, "--out", "larger", "--teacher-size", 48)
    plain, same, larger = (CacheReader(Path(name)).manifest for name in ("plain", "same", "larger"))
    assert plain.fingerprint == same.fingerprint
    assert larger.identity["teacher"]["view_size"] == 48
    assert larger.identity["teacher"]["size"] == 48
    assert "view_size" not in plain.identity["teacher"]
    assert "another cache" in stages.fails(1, *command, "--out", "larger")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--teacher-size", "0"), 2, "--teacher-size 0 is below 1"),
        (("--teacher-size", "5000"), 2, "--teacher-size 5000 is above 4096"),
        (("--teacher-size", "x"), 2, "--teacher-size"),
        (("--teacher-size", "-1"), 2, "--teacher-size -1 is below 1"),
        (("--teacher-size", "48", "--views", "crop:size=32"), 2, "48 is no multiple of it: take a multiple, such as"),
        (("--teacher-size", "16", "--views", "crop-flip:size=32"), 2, "16 is no multiple of it"),
        (("--teacher-size", "64", "--weights", ""), 2, "--weights is empty"),
    ],
)
def test_a_wrong_size_is_one_line(
    pictures: Path, stages: Stages, options: tuple[str, ...], code: int, message: str
) -> None:
    error = stages.fails(code, "teacher-cache", *FOLDER, *TEACHER, *options)
    assert message in error
    assert not Path("caches").exists()


def test_a_teacher_that_is_trained_here_has_the_size_of_its_students(pictures: Path, stages: Stages) -> None:
    error = stages.fails(2, "teacher-cache", *FOLDER, "--teacher", "resnet8", "--teacher-size", 64)
    assert "--teacher-size 64 needs --weights" in error
