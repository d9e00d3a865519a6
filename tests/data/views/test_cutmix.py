"""CutMix: a box of a second image in a view, with the distribution of torchvision's transform."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest, chisquare, ks_2samp
from torchvision.transforms import v2

import softcache
from softcache.data.views.mixing import Mixing, draw_mixing
from softcache.data.views.policy import parse_views
from softcache.data.views.render import render
from softcache.pipeline.batch import ModelOutputs
from softcache.pipeline.losses.hard import Hard
from tests.helpers.commands import Stages, tiny_cache_command
from tests.helpers.formulas_of_logits import log_softmax
from tests.helpers.views import make_images, render_views

N = 100_000


def draw(spec: str, n: int = N, side: int = 32, seed: int = 0) -> Mixing:
    return draw_mixing(parse_views(spec), seed, np.arange(n), 0, n, side)


@pytest.mark.parametrize("spec", ["none", "crop-flip", "resized-crop-flip"])
def test_a_view_is_its_own_outside_of_the_box_and_its_partners_inside(spec: str) -> None:
    images = make_images(64)
    mixing = draw_mixing(parse_views(f"{spec}:cutmix=1"), 8, np.arange(64), 4, 64, 9)
    own = render_views(images, spec, seed=8, draw=4)
    mixed = render_views(images, f"{spec}:cutmix=1", seed=8, draw=4)
    shares = []
    for i, (top, left, bottom, right) in enumerate(mixing.boxes):
        expected = own[i].copy()
        expected[:, top:bottom, left:right] = own[mixing.partner[i], :, top:bottom, left:right]
        assert np.array_equal(mixed[i], expected)
        inside = np.zeros((9, 9), bool)
        inside[top:bottom, left:right] = True
        shares.append(1 - inside.sum() / 81)
    assert mixing.share.tolist() == pytest.approx(shares, abs=1e-15)
    assert 0 < min(shares) < max(shares) == 1
    assert (mixing.partner != np.arange(64)).all()


def make_torchvision_boxes(alpha: float, n: int, side: int) -> Iterator[tuple[float, tuple[int, ...]]]:
    """(share, (left, top, right, bottom)) of torchvision's CutMix."""
    transform = v2.CutMix(alpha=alpha, num_classes=2)
    transform._dist = BetaSamples(alpha, n)
    inputs = [torch.zeros(2, 1, side, side)]
    for _ in range(n):
        parameters = transform.make_params(inputs)
        yield parameters["lam_adjusted"], parameters["box"]


class BetaSamples:
    """Samples of torch's Beta distribution, drawn at once: 100,000 calls of `sample` take 9 s."""

    def __init__(self, alpha: float, n: int):
        self.samples = iter(torch.distributions.Beta(alpha, alpha).sample((n,)))

    def sample(self, _: object) -> torch.Tensor:
        return next(self.samples)


@pytest.mark.parametrize("count", [N // 10, pytest.param(N, marks=pytest.mark.slow)])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_shares_and_boxes_have_the_distribution_of_torchvision(alpha: float, count: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        shares, boxes = zip(*make_torchvision_boxes(alpha, count, 32), strict=True)
    mixing = draw(f"none:cutmix={alpha}")
    theirs: NDArray[np.int64] = np.array(boxes)[:, [1, 0, 3, 2]]
    assert ks_2samp(mixing.share, shares).pvalue > 0.01
    for side in range(4):
        assert ks_2samp(mixing.boxes[:, side], theirs[:, side]).pvalue > 0.01
    sizes, their_sizes = (b[:, 2:] - b[:, :2] for b in (mixing.boxes, theirs))
    for axis in range(2):
        assert ks_2samp(sizes[:, axis], their_sizes[:, axis]).pvalue > 0.01
    for power in (1, 2):
        error = np.sqrt((np.array(shares) ** power).var() * (1 / N + 1 / count))  # of the difference of both means
        assert abs((mixing.share**power).mean() - (np.array(shares) ** power).mean()) < 4 * error
    assert np.corrcoef(*sizes.T)[0, 1] == pytest.approx(np.corrcoef(*their_sizes.T)[0, 1], abs=0.02)


def test_a_share_is_that_of_the_box_and_a_box_is_no_larger_than_the_view() -> None:
    for side in (1, 2, 7, 224):
        mixing = draw("none:cutmix=1", n=4000, side=side)
        top, left, bottom, right = mixing.boxes.T
        assert mixing.boxes.min() >= 0
        assert mixing.boxes.max() <= side
        assert (top <= bottom).all()
        assert (left <= right).all()
        assert np.abs(mixing.share - (1 - (bottom - top) * (right - left) / side**2)).max() < 1e-15
        assert (mixing.weight == 256).all()


def test_with_mixup_half_of_the_views_are_cut_and_the_others_are_means() -> None:
    both = draw("none:mixup=1,cutmix=1")
    is_cut, is_mean = both.boxes.any(1), both.weight < 256
    assert not (is_cut & is_mean).any()
    alone = {"cutmix": draw("none:cutmix=1"), "mixup": draw("none:mixup=1")}
    assert np.array_equal(both.boxes[is_cut], alone["cutmix"].boxes[is_cut]), "a knob moves no number of another one"
    assert np.array_equal(both.weight[is_mean], alone["mixup"].weight[is_mean])
    assert np.array_equal(both.partner, alone["mixup"].partner)
    cut = int((both.boxes == alone["cutmix"].boxes).all(1)[alone["cutmix"].boxes.any(1)].sum())
    whole = int(alone["cutmix"].boxes.any(1).sum())
    assert chisquare([cut, whole - cut]).pvalue > 0.01


def test_a_teachers_view_of_another_size_has_the_box_of_the_students_view() -> None:
    student = parse_views("none:cutmix=1,size=8")
    drawn = draw_mixing(student, 0, np.arange(16), 0, 16, 8)
    images = make_images(16, size=8)
    images.pixels[:] = torch.arange(1, 17, dtype=torch.uint8)[:, None, None, None]
    small = render(images, student, 0, np.arange(16), 0)
    large = render(images, student.at_size(24), 0, np.arange(16), 0)
    assert torch.equal(large[..., 1::3, 1::3], small)
    uneven = render(images, student.at_size(20), 0, np.arange(16), 0)
    own = (uneven == images.pixels[:, :, :1, :1]).float().mean((1, 2, 3)).numpy()
    assert np.abs(own - drawn.share).max() < 2 / 20


def test_batches_carry_both_labels_and_shares_and_the_hard_loss_weights_them(
    tiny: Path, stages: Stages, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cutmix")
    stages(*tiny_cache_command(tiny)[:-1], folder / "c", "--views", "crop:pad=1,cutmix=1")
    cache = softcache.Cache(folder / "c")
    images = cache.transfer_set.splits["train"].images
    labels = cache.transfer_set.splits["train"].labels
    plain = {k: render_views(images, "crop:pad=1", draw=k) for k in range(3)}
    seen = set()
    for batch in cache.loader("train", batch_size=50):
        assert batch.partner is not None
        assert batch.share is not None
        for view, i, label, partner, share in zip(
            batch.views.numpy(), batch.index.tolist(), batch.labels, batch.partner, batch.share.tolist(), strict=True
        ):
            own = plain[batch.draw]
            differs = (view != own[i]).any(0)
            assert int(label) == labels[i]
            rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
            if len(rows):
                box = (slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
                fits = [j for j in range(len(own)) if np.array_equal(own[j][box], view[box])]
                assert int(partner) in {int(labels[j]) for j in fits}
                assert differs.sum() <= round((1 - share) * 64)  # both images may have the same pixels in the box
            seen.add(share)
        logits = torch.linspace(-3, 3, len(batch) * 10).sin().reshape(-1, 10) * 4
        terms = [
            -share * log_softmax(row)[int(label)] - (1 - share) * log_softmax(row)[int(partner)]
            for row, label, partner, share in zip(
                logits.double().tolist(), batch.labels, batch.partner, batch.share.tolist(), strict=True
            )
        ]
        assert float(Hard()(ModelOutputs(logits), batch, None)) == pytest.approx(sum(terms) / len(terms), rel=1e-6)
    assert len(seen) > 10
    assert all(share * 64 == round(share * 64) for share in seen)


def test_with_mixup_shares_have_the_distribution_of_timm() -> None:
    """timm's boxes may have odd sides, torchvision's and ours have even ones: at 2,048 px that is no difference."""
    mixup = pytest.importorskip("timm.data.mixup", reason="timm is not installed")
    state = np.random.get_state()
    np.random.seed(7)
    try:
        shares, is_cut = mixup.Mixup(mixup_alpha=0.4, cutmix_alpha=1.0, mode="elem")._params_per_elem(N // 4)
        shares = shares.astype(float)
        for i in np.flatnonzero(is_cut):
            shares[i] = mixup.cutmix_bbox_and_lam((3, 2048, 2048), shares[i])[1]
    finally:
        np.random.set_state(state)
    ours = draw("none:mixup=0.4,cutmix=1", side=2048)
    assert ks_2samp(np.rint(256 * ours.share), np.rint(256 * shares)).pvalue > 0.01  # means have shares of 1/256
    means = np.rint(256 * shares[~is_cut])
    assert ks_2samp(ours.weight[ours.weight < 256], means[means < 256]).pvalue > 0.01
    is_box = ours.boxes.any(1)
    assert ks_2samp(ours.share[is_box], shares[is_cut & (shares < 1)]).pvalue > 0.01
    assert binomtest(int(is_box.sum()), N).pvalue > 0.01  # no box of this size is empty, but for one in a million
