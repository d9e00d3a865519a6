"""Eight views of each augmentation, pinned to the bit: a change of one makes caches on disk wrong."""

import pytest

from tests.helpers.views import compute_checksums, make_images, render_views

GOLDEN = {
    "multi-crop": "b6c6e28d 69bb7d54 0f5aa8c3 9ea3b4ab 90df6b7a a4dfee45 77901e8d 464e9ca6",
    "multi-crop:global=7": "01500b37 b1985b7c 74e71fdb 205f8641 34b696ae ce82328a f6d3cdf8 d4a1c928",
    "crop-flip:pad=2,randaugment=2x9": "c79c3399 a96a61dd 4a4fa276 812251fd baef51ce 3a41fcf5 cb9a1166 1bed7beb",
    "none:size=9,randaugment=16x30": "43d3ec28 d2affb00 d45fe002 3e564633 79076b5f a96fa898 057c10b8 2a7c74ef",
    "none:randaugment=1x5,cutmix=1": "713f23ef 8d3572c3 ad8c0ebc 39f53b98 f04ab7e0 e3c0fe78 a49c1cf5 855874bc",
    "none:jitter=0.4": "36d27432 2f015f6a cf0fb9c0 372ba02d f9db5ad1 27be8b83 0b4303e2 46b4e7c9",
    "none:hue=0.5": "59a8769b cdcde443 e953b882 674dc3b7 bf00c73f 21be9f4e be43862a 789d1c78",
    "crop-flip:gray=0.5": "a1504286 8df5c640 108f4df8 44a1eff7 b2289d0f b59fe6c8 991300ff 2b17cc9e",
    "resized-crop-flip:jitter=0.8,hue=0.2": "60c2732f ce2719a5 dafa57f5 8a473b51 91874cdd 54dde209 d5e9d669 07233696",
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
    plain = render_views(images, f"{policy.replace('multi-crop', 'resized-crop-flip')}:{kept}", seed=3, draw=5)
    assert compute_checksums(plain) != GOLDEN[spec]
