"""Eight views of each augmentation, pinned to the bit: a change of one makes caches on disk wrong."""

import pytest

from tests.helpers.views import compute_checksums, make_images, render_views

GOLDEN = {
    "none:erasing=0.5": "7f82a6b9 aef85bec 3aa56bfe d00894a7 c968f4f1 8ef1b25e aad31123 07e11806",
    "resized-crop-flip:size=10,erasing=1": "59174237 b43dcfe6 7485dffc eeeec352 46bbdbc5 8d5f0107 7e2962b1 fd932962",
    "none:cutmix=1": "26cc33c3 23f950a1 654e16a3 d00894a7 9efd04d6 24383191 a49c1cf5 f7ed70af",
    "crop-flip:mixup=0.4,cutmix=0.5": "48e7006b d5b35c97 1c7bd55c 52409db4 b6166024 445bee81 a5d532a6 2b17cc9e",
}


@pytest.mark.parametrize("spec", GOLDEN)
def test_views_are_pinned_to_the_bit(spec: str) -> None:
    assert compute_checksums(render_views(make_images(8, size=12), spec, seed=3, draw=5)) == GOLDEN[spec]


@pytest.mark.parametrize("spec", GOLDEN)
def test_pinned_views_are_no_plain_views(spec: str) -> None:
    """Of the eight views of a pin at least one shows what the augmentation does."""
    policy, _, knobs = spec.partition(":")
    images = make_images(8, size=12)
    kept = ",".join(knob for knob in knobs.split(",") if knob.startswith(("pad", "size", "min_scale")))
    plain = render_views(images, f"{policy}:{kept}", seed=3, draw=5)
    assert compute_checksums(plain) != GOLDEN[spec]
