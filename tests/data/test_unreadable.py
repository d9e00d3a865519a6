"""Images that cannot be used: all are named at once, or left out and recorded; depth and orientation of the others."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from softcache.base.errors import CacheError, UsageError
from softcache.data.images import image_sample
from softcache.data.transfer_set import TransferSet, load_transfer_set
from softcache.data.views.policy import parse_views
from softcache.data.views.render import render
from softcache.pipeline.models import build
from tests.helpers.commands import Stages

Save = Callable[..., Image.Image]
CACHE = ("--views", "none", "--draws", 1, "--out", "c")


def load_folder(root: Path, **options: str) -> TransferSet:
    return load_transfer_set(f"folder:{root}", Path("unused"), val_fraction=0.25, **options)  # type: ignore[arg-type]


@pytest.fixture
def pets(tmp_path: Path, save_image: Save) -> Path:
    """train/ with 8 and test/ with 4 images of each of the classes cat and dog."""
    root = tmp_path / "pets"
    for split, rows in (("train", 8), ("test", 4)):
        for c, name in enumerate(("cat", "dog")):
            for k in range(rows):
                save_image(root / split / name / f"{k}.png", k=10 * rows + 5 * k + c)
    return root


def save_teacher() -> tuple[str, ...]:
    """Save the weights of a small teacher of these images; return the options that name it."""
    torch.save(build("mlp:2", 2, 3, 8).state_dict(), "w.pt")
    return ("--teacher", "mlp:2", "--weights", "w.pt", "--normalize", "none")


def damage(root: Path) -> list[str]:
    """Make six images of several kinds unreadable; return their names in order."""
    (root / "train/cat/1.png").write_bytes(b"")
    (root / "train/cat/2.png").write_bytes(b"not an image")
    truncated = (root / "train/dog/3.png").read_bytes()
    (root / "train/dog/3.png").write_bytes(truncated[: len(truncated) // 2])
    (root / "train/dog/4.png").unlink()
    (root / "train/dog/4.png").symlink_to("nowhere")
    (root / "test/cat/0.png").write_bytes(make_png16(2, 3))
    (root / "test/dog/0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return ["test/cat/0", "test/dog/0", "train/cat/1", "train/cat/2", "train/dog/3", "train/dog/4"]


def make_png16(color_type: int, channels: int) -> bytes:
    """Return a PNG of 8 x 8 pixels with 16 bits a channel."""
    row = b"\0" + np.arange(8 * channels, dtype=">u2").tobytes()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 8, 8, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(8 * row)) + chunk(b"IEND", b"")


def make_tiff(bits: int, channels: int) -> bytes:
    """Return a TIFF of 8 x 8 pixels."""
    pixels, depths = bytes(8 * bits * channels), struct.pack(f"<{channels}H", *[bits] * channels)
    offset = 8 + len(pixels)
    tags = {256: (3, 1, 8), 257: (3, 1, 8), 258: (3, channels, offset), 259: (3, 1, 1), 262: (3, 1, 2)}
    tags |= {273: (4, 1, 8), 277: (3, 1, channels), 278: (3, 1, 8), 279: (4, 1, len(pixels))}
    entries = b"".join(struct.pack("<HHII", tag, *values) for tag, values in tags.items())
    return (
        b"II*\0"
        + struct.pack("<I", offset + len(depths))
        + pixels
        + depths
        + struct.pack("<H", 9)
        + entries
        + bytes(4)
    )


# --- unreadable ---------------------------------------------------------------------------------------------------


def test_all_are_named_at_once_with_the_way_out(pets: Path) -> None:
    damage(pets)
    with pytest.raises(CacheError) as raised:
        load_folder(pets)
    text = str(raised.value)
    assert f"6 of 24 images in '{pets}' cannot be used: " in text
    assert "train/cat/1.png cannot be decoded: not an image; " in text
    assert "train/dog/4.png cannot be read: No such file or directory; …" in text or "; …. Mend or remove them" in text
    assert text.endswith("Mend or remove them, or leave them out with --unreadable skip")
    assert text.isprintable()


@pytest.mark.parametrize("workers", [0, 1])
def test_all_are_named_where_they_are_met_during_stage_one(
    stages: Stages, pets: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """The images that are looked at first are good."""
    monkeypatch.setattr(image_sample, "_SAMPLED_IMAGES", 1)
    for name in ("cat/5.png", "dog/6.png"):
        (pets / "train" / name).write_bytes((pets / "train" / name).read_bytes()[:-30])
    options = ("--data", f"folder:{pets}", "--views", "none", "--workers", workers)
    for command in (("teacher", "--arch", "mlp:2", "--epochs", 1), ("teacher-cache", "--draws", 1, *save_teacher())):
        error = stages.fails(1, *command, *options, "--out", command[0])
        assert f"2 of 24 images in '{pets}' cannot be used: " in error
        assert "train/cat/5.png cannot be decoded" in error
        assert "train/dog/6.png cannot be decoded" in error


def test_skip_leaves_them_out_and_records_their_names(pets: Path) -> None:
    names = [f"{name}.png" for name in damage(pets)]
    transfer_set = load_folder(pets, unreadable="skip")
    assert {split: len(rows) for split, rows in transfer_set.splits.items()} == {"train": 9, "val": 3, "test": 6}
    assert transfer_set.identity()["cut"]["unreadable"] == names  # type: ignore[index]
    assert any("6 images cannot be used and are left out (--unreadable skip): " in note for note in transfer_set.notes)
    again = load_transfer_set(f"folder:{pets}", Path(), val_fraction=0.25, unreadable=names)
    assert again.identity() == transfer_set.identity()


def test_skip_changes_no_identity_where_all_are_good(pets: Path) -> None:
    assert load_folder(pets, unreadable="skip").identity() == load_folder(pets).identity()


def test_skip_leaves_no_class_without_an_image(pets: Path) -> None:
    for path in (pets / "test/dog").iterdir():
        path.write_bytes(b"")
    notes = load_folder(pets, unreadable="skip").notes
    assert "the split test has no image of 1 of 2 classes: dog" in notes
    for path in (pets / "train/dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UsageError, match=r"there is no image in '.*/train/dog'"):
        load_folder(pets, unreadable="skip")


def test_a_student_leaves_out_what_the_cache_left_out(stages: Stages, pets: Path) -> None:
    names = [f"{name}.png" for name in damage(pets)]
    data = ("--data", f"folder:{pets}")
    stages("teacher-cache", *data, "--unreadable", "skip", *save_teacher(), *CACHE)
    manifest = json.loads(Path("c/manifest.json").read_text())
    assert manifest["identity"]["transfer_set"]["cut"]["unreadable"] == names
    assert manifest["settings"]["unreadable"] == "skip"
    stages("student", *data, "--cache", "c", "--arch", "mlp:2", "--epochs", 1, "--out", "s")
    stages("check-cache", "c", *data, "--deep")


def test_options_at_their_defaults_are_not_in_the_manifest(stages: Stages, pets: Path) -> None:
    """The identities of caches of earlier versions, which lack these options, are then the same."""
    data = ("--data", f"folder:{pets}", "--views", "none")
    stages("teacher", *data, "--arch", "mlp:2", "--epochs", 1, "--out", "t")
    stages("teacher-cache", *data, "--weights", "t", "--draws", 1, "--out", "c")
    manifest = json.loads(Path("c/manifest.json").read_text())
    assert not {"classes", "exif", "unreadable"} & set(manifest["settings"])
    assert set(manifest["identity"]["transfer_set"]["cut"]) == {"val_fraction", "seed", "train_size"}


# --- depth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        ("png", make_png16(0, 1)),
        ("png", make_png16(2, 3)),
        ("png", make_png16(4, 2)),
        ("png", make_png16(6, 4)),
        ("tif", make_tiff(16, 3)),
        ("tif", make_tiff(16, 4)),
        ("ppm", b"P6 8 8 65535\n" + bytes(8 * 8 * 6)),
        ("ppm", b"P6 8 8 1023\n" + bytes(8 * 8 * 6)),
        ("pgm", b"P5 8 8 4095\n" + bytes(8 * 8 * 2)),
    ],
)
def test_more_than_8_bits_a_channel_are_refused(pets: Path, ending: str, content: bytes) -> None:
    (pets / f"train/cat/deep.{ending}").write_bytes(content)
    with pytest.raises(CacheError, match=rf"deep\.{ending} has more than 8 bits a channel \(\d+ bits"):
        load_folder(pets)


@pytest.mark.parametrize(("ending", "content"), [("tif", make_tiff(8, 3)), ("ppm", b"P6 8 8 255\n" + bytes(192))])
def test_8_bits_and_fewer_are_read(pets: Path, ending: str, content: bytes) -> None:
    (pets / f"train/cat/plain.{ending}").write_bytes(content)
    assert len(load_folder(pets).splits["train"]) == 13


# --- orientation --------------------------------------------------------------------------------------------------


@pytest.fixture
def turned(pets: Path) -> Path:
    """One image of the test split is stored lying down, with an EXIF orientation."""
    with Image.open(pets / "test/cat/0.png") as image:
        exif = Image.Exif()
        exif[0x0112] = 6  # the top of the image is at the right of the stored pixels
        stored = io.BytesIO()
        image.save(stored, "WEBP", lossless=True, exif=exif)
    (pets / "test/cat/0.webp").write_bytes(stored.getvalue())
    (pets / "test/cat/0.png").unlink()
    return pets


def first_test_image(transfer_set: TransferSet) -> torch.Tensor:
    return render(transfer_set.splits["test"].images, parse_views("none"), 0, np.arange(1), 0)[0]


def test_the_orientation_is_applied_where_it_is_said(turned: Path) -> None:
    stored, upright = load_folder(turned), load_folder(turned, exif="transpose")
    assert any("1 of 24 images that were looked at have an EXIF orientation" in note for note in stored.notes)
    assert not any("EXIF" in note for note in upright.notes)
    assert torch.equal(first_test_image(upright), first_test_image(stored).rot90(-1, (1, 2)))
    expected = stored.identity()
    expected["cut"]["exif"] = "transpose"  # type: ignore[index]
    assert upright.identity() == expected


def test_a_student_and_its_export_turn_images_as_the_teacher_did(stages: Stages, turned: Path) -> None:
    data = ("--data", f"folder:{turned}")
    stages("teacher-cache", *data, "--exif", "transpose", *save_teacher(), *CACHE)
    stages("student", *data, "--cache", "c", "--arch", "mlp:2", "--epochs", 1, "--out", "s")
    stages("check-cache", "c", *data, "--deep")
    pytest.importorskip("onnxruntime")
    stages("export", "s")
    record = stages("predict", "s/student.onnx", turned / "test/cat/0.webp")
    Image.fromarray(first_test_image(load_folder(turned, exif="transpose")).permute(1, 2, 0).numpy()).save("up.png")
    assert record["pictures"][0]["top"] == stages("predict", "s/student.onnx", "up.png")["pictures"][0]["top"]
