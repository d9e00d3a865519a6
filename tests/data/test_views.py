"""A view is a pure function of (policy, seed, index, draw): without that, cached outputs belong to other pixels."""

import multiprocessing
import random
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from softcache.base import rng
from softcache.base.errors import CacheError
from softcache.data.images.image_arrays import ImageArrays
from softcache.data.images.image_folder import ImageFolder
from softcache.data.transfer_set import Split, load_transfer_set
from softcache.data.views.mixing import draw_mixup
from softcache.data.views.policy import VIEW_POLICIES, parse_views
from softcache.data.views.render import render
from softcache.pipeline.loading.rendering import render_batches
from softcache.pipeline.loading.stream import BatchStream
from tests.helpers.boxes import BoxRecorder
from tests.helpers.views import make_images

# What each random number is for. Changing one of them makes the views of every cache on disk wrong.
TOP, LEFT, FLIP, PARTNER = 0, 1, 2, 7

SPECS = [
    "none",
    "none:resize=12",
    "none:size=6,resize=11",
    "none:mixup=0.4",
    "crop",
    "crop:pad=1,size=7",
    "crop-flip:pad=2,mixup=0.2",
    "resized-crop-flip:size=10",
    "resized-crop-flip:min_scale=0.5,size=8,mixup=1",
    "resized-crop-flip:size=10,revision=1",
    "multi-crop:size=10,global=1,local=2",
    "crop-flip:randaugment=2x9,jitter=0.4,hue=0.1,gray=0.2,erasing=0.5,cutmix=0.7,mixup=0.4",
]


def rows(*index: int) -> NDArray[np.int64]:
    return np.array(index, np.int64)


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory: pytest.TempPathFactory, save_image: Callable[..., Image.Image]) -> Path:
    """64 training images in two classes, no two neighbours of one size; some are wide, some tall, some tiny."""
    root = tmp_path_factory.mktemp("mixed")
    for k in range(64):
        width, height = 5 + (7 * k) % 16, 6 + (5 * k) % 13
        save_image(root / "train" / f"class{k % 2}" / f"{k:02}.png", width, height, k)
    for k in range(2):
        save_image(root / "test" / f"class{k}" / "a.png", 9, 9, k)
    return root


@pytest.fixture(scope="module")
def mixed_images(mixed_folder: Path) -> ImageFolder:
    names = tuple(sorted(p.relative_to(mixed_folder).as_posix() for p in mixed_folder.glob("train/*/*.png")))
    return ImageFolder(mixed_folder, names, "RGB", 0)


@pytest.fixture
def mixed_train(mixed_folder: Path) -> Split:
    return load_transfer_set(f"folder:{mixed_folder}", Path(), val_fraction=0.25).splits["train"]


# --- pinned to the bit --------------------------------------------------------------------------------------------

GOLDEN = {
    ("none", 0, 0, 0): 0x28DDF801,
    ("none:size=6,resize=11", 0, 3, 0): 0x053F59D8,
    ("crop", 0, 3, 0): 0x82D06AC8,
    ("crop:pad=2,mixup=0.2", 7, 11, 1): 0x365FC374,
    ("crop-flip", 1, 4, 2): 0xF5EA3BC1,
    ("crop-flip:pad=3", 2**40, 5, 299): 0x3C186E50,
    ("resized-crop-flip", 3, 2, 0): 0x430010CB,
    ("resized-crop-flip:min_scale=0.5,size=12,mixup=1", 4, 9, 3): 0xEEDEBAD4,
    ("resized-crop-flip:revision=1", 3, 2, 0): 0x1ADF99DA,
    ("resized-crop-flip:min_scale=0.5,size=12,mixup=1,revision=1", 4, 9, 3): 0xDF82AD2B,
}


@pytest.mark.parametrize(("spec", "seed", "index", "draw"), GOLDEN)
def test_views_are_pinned_to_the_bit(spec: str, seed: int, index: int, draw: int) -> None:
    view = render(make_images(12), parse_views(spec), seed, rows(index), draw)
    assert crc32(view.numpy().tobytes()) == GOLDEN[spec, seed, index, draw]


def test_the_pins_cover_every_policy_and_a_view_that_is_flipped() -> None:
    assert {spec.partition(":")[0] for spec, *_ in GOLDEN} == set(VIEW_POLICIES) - {
        "noise",
        "multi-crop",
    }  # of files of their own
    flips = {int(rng.integers((seed, draw, FLIP), rows(i), 2)[0]) for s, seed, i, draw in GOLDEN if "flip" in s}
    assert flips == {0, 1}


def test_a_crop_is_pinned_pixel_by_pixel() -> None:
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    view = render(ImageArrays(image.expand(4, 1, 5, 5)), parse_views("crop:pad=2"), 0, rows(2), 2)
    assert view[0, 0].tolist() == [
        [0, 0, 0, 0, 0],
        [3, 4, 5, 0, 0],
        [8, 9, 10, 0, 0],
        [13, 14, 15, 0, 0],
        [18, 19, 20, 0, 0],
    ]


# --- a view depends on nothing else -------------------------------------------------------------------------------

MANY = make_images(64)


@settings(deadline=None, max_examples=60)
@given(
    spec=st.sampled_from(SPECS),
    seed=st.integers(0, 2**63),
    draw=st.integers(0, 10_000),
    index=st.lists(st.integers(0, 63), min_size=1, max_size=12),
)
def test_a_view_does_not_depend_on_its_batch(spec: str, seed: int, draw: int, index: list[int]) -> None:
    policy = parse_views(spec)
    batch = render(MANY, policy, seed, rows(*index), draw)
    for i, view in zip(index, batch, strict=True):
        assert torch.equal(render(MANY, policy, seed, rows(i), draw)[0], view)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("source", ["memory", "folder"])
def test_64_at_once_or_one_by_one_or_backwards_are_equal(source: str, spec: str, mixed_images: ImageFolder) -> None:
    images = MANY if source == "memory" else mixed_images
    policy = parse_views(spec if "size=" in spec else f"{spec}{',' if ':' in spec else ':'}size=9")
    index = np.arange(64)
    expected = render(images, policy, 5, index, 2)
    for order, size in ((index, 1), (index, 7), (index[::-1].copy(), 10)):
        parts = [render(images, policy, 5, part, 2) for part in np.array_split(order, -(-64 // size))]
        assert torch.equal(torch.cat(parts), expected[torch.from_numpy(order)])


@pytest.mark.parametrize("spec", SPECS)
def test_images_in_files_and_in_memory_give_equal_views(spec: str, tmp_path: Path) -> None:
    stored = make_images(12)
    names = []
    for i, image in enumerate(stored.pixels):
        names.append(f"{i:02}.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / names[-1])
    files = ImageFolder(tmp_path, tuple(names), "RGB", 9)
    index, policy = np.arange(12), parse_views(spec)
    assert torch.equal(render(files, policy, 1, index, 3), render(stored, policy, 1, index, 3))


@pytest.mark.parametrize("spec", SPECS)
def test_global_generators_are_neither_used_nor_changed(spec: str) -> None:
    def render_after(seed: int) -> torch.Tensor:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        views = render(MANY, parse_views(spec), 0, np.arange(8), 1)
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
        return views

    with torch.random.fork_rng(devices=[]):
        assert torch.equal(render_after(1), render_after(2))


def test_rendering_does_not_change_the_images() -> None:
    images = make_images(12)
    for spec in SPECS:
        render(images, parse_views(spec), 0, np.arange(12), 0).zero_()
    assert torch.equal(images.pixels, make_images(12).pixels)


@pytest.mark.parametrize("spec", SPECS)
def test_shape_and_dtype_of_views(spec: str) -> None:
    policy = parse_views(spec)
    for channels in (1, 3):
        views = render(make_images(5, channels), policy, 0, rows(1, 4), 0)
        assert views.shape == (2, channels, policy.size or 9, policy.size or 9)
        assert views.dtype == torch.uint8


# --- teacher and student --------------------------------------------------------------------------------------------


def render_for_teacher(split: Split, spec: str, draws: int, workers: int = 0) -> dict[tuple[int, int], torch.Tensor]:
    """Render all views as stage one does, in the order of the split: {(index, draw): view}."""
    batches = np.array_split(np.arange(len(split)), 5)
    views_by_key = {}
    for draw in range(draws):
        rendered = list(render_batches(split.images, parse_views(spec), 9, batches, draw, workers))
        assert [len(views) for views in rendered] == [len(batch) for batch in batches]
        for batch, views in zip(batches, rendered, strict=True):
            views_by_key |= {(int(i), draw): view for i, view in zip(batch, views, strict=True)}
    return views_by_key


def render_for_student(
    split: Split, spec: str, draws: int, batch_size: int, workers: int = 0, start_method: str | None = None
) -> dict[tuple[int, int], torch.Tensor]:
    """Render all views as stage two does, in random order, each once: {(index, draw): view}."""
    stream = BatchStream(
        split,
        parse_views(spec),
        view_seed=9,
        order_seed=3,
        batch_size=batch_size,
        labels=split.labels,
        rows=np.arange(len(split)),
        draws=draws,
        workers=workers,
        start_method=start_method,
    )
    views_by_key, order = {}, []
    for batch in stream.batches(0, draws * stream.steps_per_epoch):
        order += [(int(i), batch.draw) for i in batch.index]
        views_by_key |= {(int(i), batch.draw): view.clone() for i, view in zip(batch.index, batch.views, strict=True)}
    assert sorted(order) == sorted(product(range(len(split)), range(draws)))
    assert [index for index, _ in order[: len(split)]] != list(range(len(split)))
    return views_by_key


def assert_same_views(first: dict[tuple[int, int], torch.Tensor], second: dict[tuple[int, int], torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize(
    ("spec", "batch_size"),
    [
        ("none:size=8", 7),
        ("crop:size=8", 1),
        ("crop-flip:size=8,mixup=0.2", 16),
        ("resized-crop-flip:size=8", 48),
    ],
)
def test_the_student_gets_the_pixels_that_the_teacher_got(mixed_train: Split, spec: str, batch_size: int) -> None:
    assert_same_views(render_for_teacher(mixed_train, spec, 3), render_for_student(mixed_train, spec, 3, batch_size))


def available(*cases: tuple[int, str]) -> list[tuple[int, str]]:
    """The cases (workers, start method) whose start method this system has."""
    return [case for case in cases if case[1] in multiprocessing.get_all_start_methods()]


# Python warns of a fork beside threads, torch of more workers than cores: both are intended here.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning", "ignore:This DataLoader will create")
@pytest.mark.parametrize(("workers", "start_method"), available((1, "fork"), (2, "fork"), (1, "spawn")))
def test_worker_processes_render_the_same_pixels(mixed_train: Split, workers: int, start_method: str) -> None:
    spec = "resized-crop-flip:size=8,mixup=1"
    by_workers = render_for_student(mixed_train, spec, 2, 5, workers, start_method)
    assert_same_views(render_for_teacher(mixed_train, spec, 2), by_workers)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning", "ignore:This DataLoader will create")
def test_stage_one_renders_the_same_pixels_with_and_without_workers(mixed_train: Split) -> None:
    spec = "crop-flip:size=8,mixup=0.2"
    assert_same_views(render_for_teacher(mixed_train, spec, 1), render_for_teacher(mixed_train, spec, 1, workers=2))


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning", "ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_wherever_it_is_decoded(
    tmp_path: Path, save_image: Callable[..., Image.Image], workers: int
) -> None:
    for k in range(6):
        save_image(tmp_path / f"{k}.png", k=k)
    content = (tmp_path / "4.png").read_bytes()
    (tmp_path / "4.png").write_bytes(content[: len(content) // 2])
    images = ImageFolder(tmp_path, tuple(f"{k}.png" for k in range(6)), "RGB", 8)
    rendered = render_batches(images, parse_views("none"), 0, np.array_split(np.arange(6), 3), 0, workers)
    assert len(next(rendered)) == len(next(rendered)) == 2
    with pytest.raises(CacheError, match=r"the image .*4\.png cannot be decoded: ") as raised:
        next(rendered)
    assert "\n" not in str(raised.value)


# --- an independent reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pad", "draw"), [(1, 0), (4, 0), (4, 7), (12, 2)])
def test_a_crop_is_zero_padding_and_a_slice(pad: int, draw: int) -> None:
    images, index = make_images(40), np.arange(40)
    views = render(images, parse_views(f"crop:pad={pad}"), 6, index, draw).numpy()
    tops = rng.integers((6, draw, TOP), index, 2 * pad + 1)
    lefts = rng.integers((6, draw, LEFT), index, 2 * pad + 1)
    padded = np.pad(images.pixels.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    for i, top, left in zip(index, tops, lefts, strict=True):
        assert np.array_equal(views[i], padded[i, :, top : top + 9, left : left + 9])


def test_a_crop_without_padding_is_the_image() -> None:
    assert torch.equal(render(MANY, parse_views("crop:pad=0"), 0, np.arange(64), 0), MANY.pixels)


@pytest.mark.parametrize(("with_flip", "without"), [("crop-flip:pad=0", "none"), ("crop-flip:pad=4", "crop:pad=4")])
def test_a_flip_mirrors_left_and_right_and_nothing_else(with_flip: str, without: str) -> None:
    index = np.arange(64)
    views = render(MANY, parse_views(with_flip), 2, index, 5).numpy()
    unflipped = render(MANY, parse_views(without), 2, index, 5).numpy()
    is_flipped = rng.integers((2, 5, FLIP), index, 2)
    assert 0 < is_flipped.sum() < 64
    for i in index:
        assert np.array_equal(views[i], unflipped[i, :, :, ::-1] if is_flipped[i] else unflipped[i])


@pytest.mark.parametrize("spec", ["none", "crop-flip", "resized-crop-flip"])
@pytest.mark.parametrize("alpha", [0.2, 1, 50])
def test_mixup_is_one_rounded_sum_of_two_views(spec: str, alpha: float) -> None:
    policy, index = parse_views(f"{spec}:mixup={alpha}"), np.arange(64)
    partner, share = draw_mixup(policy, 8, index, 4, 64)
    first = render(MANY, parse_views(spec), 8, index, 4).numpy().astype(int)
    second = render(MANY, parse_views(spec), 8, partner, 4).numpy().astype(int)
    w = share[:, None, None, None]
    expected = (first * w + second * (256 - w) + 128) // 256  # round half up of the weighted mean
    assert np.array_equal(render(MANY, policy, 8, index, 4).numpy(), expected)


def test_a_mixup_partner_is_any_image_but_the_first() -> None:
    policy, index = parse_views("none:mixup=1"), np.arange(500)
    partner, _ = draw_mixup(policy, 0, index, 3, 500)
    assert np.array_equal(partner, (index + 1 + rng.integers((0, 3, PARTNER), index, 499)) % 500)
    pairs = {(i, int(draw_mixup(policy, 0, rows(i), draw, 5)[0][0])) for i in range(5) for draw in range(60)}
    assert pairs == {(i, j) for i in range(5) for j in range(5) if i != j}


def test_a_single_image_is_mixed_with_itself() -> None:
    single = make_images(1)
    assert torch.equal(render(single, parse_views("none:mixup=1"), 0, rows(0), 0), single.pixels)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1, 4])
def test_mixup_shares_follow_the_beta_distribution(alpha: float) -> None:
    _, share = draw_mixup(parse_views(f"none:mixup={alpha}"), 0, np.arange(40_000), 0, 40_000)
    assert share.min() >= 0
    assert share.max() <= 256
    # Mean 1/2, variance 1 / (4 (2 alpha + 1)); four standard errors.
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs((share / 256).mean() - 0.5) < 4 * (variance / 40_000) ** 0.5
    assert (share / 256).var() == pytest.approx(variance, rel=0.02)


def test_a_resized_crop_of_the_full_area_of_a_square_is_the_image() -> None:
    index = np.arange(64)
    views = render(MANY, parse_views("resized-crop-flip:min_scale=1"), 0, index, 0).numpy()
    is_flipped = rng.integers((0, 0, FLIP), index, 2)
    for i in index:
        image = MANY.pixels[i].numpy()
        assert np.array_equal(views[i], image[:, :, ::-1] if is_flipped[i] else image)


def test_a_resized_crop_is_what_pillow_makes_of_its_box(mixed_images: ImageFolder) -> None:
    index, policy = np.arange(64), parse_views("resized-crop-flip:size=7")
    images = [Image.open(mixed_images.root / name) for name in mixed_images.names]
    recorder = BoxRecorder(*[image.size for image in images])
    render(recorder, policy, 1, index, 6)
    flips = rng.integers((1, 6, FLIP), index, 2)
    views = render(mixed_images, policy, 1, index, 6).numpy()
    for view, image, box, flip in zip(views, images, recorder.boxes, flips, strict=True):
        expected = np.asarray(image.resize((7, 7), Image.Resampling.BILINEAR, box=box)).transpose(2, 0, 1)
        assert np.array_equal(view, expected[:, :, ::-1] if flip else expected)
        image.close()


def test_a_plain_view_of_another_size_is_a_scaled_centre(mixed_images: ImageFolder) -> None:
    views = render(mixed_images, parse_views("none:size=8,resize=12"), 0, np.arange(64), 0).numpy()
    for view, name in zip(views, mixed_images.names, strict=True):
        with Image.open(mixed_images.root / name) as image:
            scale = 12 / min(image.size)
            width, height = round(image.width * scale), round(image.height * scale)
            scaled = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert min(width, height) == 12
        top, left = (height - 8) // 2, (width - 8) // 2
        assert np.array_equal(view, scaled[:, top : top + 8, left : left + 8])


def test_held_out_views_have_the_size_of_the_training_views_and_nothing_random() -> None:
    policy = parse_views("resized-crop-flip:size=8,resize=10,mixup=1").without_augmentation()
    assert policy == parse_views("none:size=8,resize=10")
    assert torch.equal(render(MANY, policy, 0, np.arange(64), 0), render(MANY, policy, 1, np.arange(64), 5))


# --- how random it is ---------------------------------------------------------------------------------------------


def offsets(n: int, seed: int, draw: int) -> list[tuple[int, int]]:
    """Rows and columns to which crops of pad 4 move a bright pixel in the middle of a 9 x 9 image."""
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[0, 0, 4, 4] = 255
    views = render(ImageArrays(image.expand(n, 1, 9, 9)), parse_views("crop"), seed, np.arange(n), draw)
    positions = views.view(n, 81).argmax(1).tolist()
    assert int((views == 255).sum()) == n
    return [divmod(position, 9) for position in positions]


def test_all_81_offsets_of_a_crop_occur_equally_often() -> None:
    n = 8100
    counts = Counter(offsets(n, 0, 0))
    assert set(counts) == set(product(range(9), range(9)))
    # Chi-square with 80 degrees of freedom: mean 80, standard deviation 12.6; four of them.
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 80 + 4 * 160**0.5


def test_draws_and_seeds_are_independent_of_each_other() -> None:
    n = 8100
    first = offsets(n, 0, 0)
    for second in (offsets(n, 0, 1), offsets(n, 1, 0), offsets(n, 1, 1)):
        equal = sum(a == b for a, b in zip(first, second, strict=True))
        assert abs(equal - n / 81) < 4 * (n / 81) ** 0.5
    rows_, columns = np.array(first).T
    assert abs(np.corrcoef(rows_, columns)[0, 1]) < 4 / n**0.5


@pytest.mark.parametrize("spec", ["crop-flip", "resized-crop-flip"])
def test_about_half_of_the_views_are_flipped(spec: str) -> None:
    n = 4096
    ramp = torch.arange(0, 250, 10, dtype=torch.uint8).expand(n, 1, 25, 25)
    views = render(ImageArrays(ramp), parse_views(spec), 0, np.arange(n), 0).int()
    is_flipped = views[:, 0, 12, 10] > views[:, 0, 12, 14]  # the ramp rises from left to right
    assert abs(int(is_flipped.sum()) - n / 2) < 4 * (n / 4) ** 0.5


@pytest.mark.parametrize("spec", ["crop", "crop-flip", "resized-crop-flip", "none:mixup=1"])
def test_different_draws_are_different_views(spec: str) -> None:
    draws = [render(MANY, parse_views(spec), 0, np.arange(64), draw) for draw in range(8)]
    difference = [(a != b).flatten(1).any(1).float().mean() for i, a in enumerate(draws) for b in draws[:i]]
    assert min(difference) > 0.8


def test_the_plain_view_is_the_same_in_every_draw() -> None:
    for draw in range(3):
        assert torch.equal(render(MANY, parse_views("none"), draw, np.arange(64), draw), MANY.pixels)
