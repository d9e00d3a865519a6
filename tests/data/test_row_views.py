"""Views of rows of numbers: pinned to the bit, a pure function of (policy, seed, index, draw), and as distributed."""

from contextlib import closing
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from softcache.base.errors import UsageError
from softcache.data.images.row_arrays import RowArrays, make_rows
from softcache.data.views.mixing import draw_mixup
from softcache.data.views.policy import check_policy, parse_views, read_views
from softcache.data.views.render import render
from softcache.pipeline.cache.checksums import compute_crc32, compute_joined_crc32, join_crc32
from softcache.pipeline.loading.rendering import render_batches
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel

N = 40


def formula(*shape: int) -> RowArrays:
    return make_rows((np.arange(N * int(np.prod(shape))) % 1009 / 64).astype(np.float64).reshape(N, *shape))


def index(*rows: int) -> NDArray[np.int64]:
    return np.array(rows, np.int64)


GOLDEN = {
    ("none", 0, 3, 0): 0x484BB3D8,
    ("none:mixup=0.2", 7, 11, 1): 0x7A39133F,
    ("noise", 0, 3, 0): 0x61A2C09A,
    ("noise:std=2.5", 2**40, 5, 299): 0x8C8A977E,
    ("noise:std=0.5,mixup=1", 4, 9, 3): 0xD11C8867,
}


@pytest.mark.parametrize(("spec", "seed", "row", "draw"), GOLDEN)
def test_views_are_pinned_to_the_bit(spec: str, seed: int, row: int, draw: int) -> None:
    view = render(formula(3, 5), parse_views(spec), seed, index(row), draw)
    assert view.dtype == torch.float32
    assert crc32(view.numpy().tobytes()) == GOLDEN[spec, seed, row, draw]


@pytest.mark.parametrize("spec", ["noise:std=0.3", "none:mixup=0.4", "noise:std=0.3,mixup=0.4"])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 4)])
def test_a_view_depends_on_its_row_and_draw_alone(spec: str, shape: tuple[int, ...]) -> None:
    rows, policy = formula(*shape), parse_views(spec)
    order = np.random.default_rng(0).permutation(N)
    draws = np.arange(N) % 3
    together = render(rows, policy, 5, order, draws[order])
    for position, row in enumerate(order):
        assert torch.equal(render(rows, policy, 5, index(row), int(draws[row]))[0], together[position])
    assert not torch.equal(render(rows, policy, 5, index(3), 0), render(rows, policy, 5, index(3), 1))
    assert not torch.equal(render(rows, policy, 5, index(3), 0), render(rows, policy, 6, index(3), 0))


def test_noise_is_normal_and_independent_of_row_entry_and_draw() -> None:
    rows = make_rows(np.full((4000, 6), 3.0))
    noise = torch.stack([render(rows, parse_views("noise:std=0.5"), 0, np.arange(4000), k) for k in range(2)], 2) - 3
    values = noise.reshape(4000, 12).numpy()
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 0.5) < 0.01
    assert abs((np.abs(values) < 0.5).mean() - 0.6827) < 0.01
    assert np.abs(np.corrcoef(values.T) - np.eye(12)).max() < 0.06
    assert np.abs(np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1]) < 0.06


def test_mixup_is_the_weighted_mean_of_two_rows() -> None:
    rows, policy = formula(5), parse_views("none:mixup=0.7")
    everything = np.arange(N)
    plain = render(rows, parse_views("none"), 0, everything, 2)
    partner, share = draw_mixup(policy, 3, everything, 2, N)
    weight = torch.from_numpy(share / 256).float()[:, None]
    expected = plain * weight + plain[torch.from_numpy(partner)] * (1 - weight)
    assert torch.equal(render(rows, policy, 3, everything, 2), expected)


def test_worker_processes_render_the_same_of_a_file_and_of_memory(tmp_path: Path) -> None:
    values = formula(4).values
    np.save(tmp_path / "x.npy", values)
    mapped = make_rows(np.load(tmp_path / "x.npy", mmap_mode="c")).take(np.arange(N)[::-1].copy())
    policy, batches = parse_views("noise:std=0.1"), [np.arange(10), np.arange(30, 40)]
    expected = [render(mapped, policy, 0, batch, 1) for batch in batches]
    for rows in (mapped, make_rows(values[::-1].copy())):
        with closing(render_batches(rows, policy, 0, batches, 1, workers=1)) as rendered:
            for views, same in zip(rendered, expected, strict=True):
                assert torch.equal(views, same)


def test_checksums_are_those_of_the_bytes_of_the_floats() -> None:
    views = render(formula(3), parse_views("noise"), 0, np.arange(9), 0)
    crcs = compute_crc32(views)
    assert crcs[4] == crc32(views[4].numpy().tobytes())
    assert join_crc32(crcs, 3 * 4) == compute_joined_crc32(views)


def test_a_record_gives_the_policy_back() -> None:
    policy = parse_views("noise:std=0.25,mixup=0.5")
    assert policy.parameters() == {"std": 0.25, "mixup": 0.5, "size": 0, "resize": 0}
    assert read_views({"policy": policy.name, **policy.parameters(), "seed": 0}) == policy


@pytest.mark.parametrize(
    ("spec", "shape", "words"),
    [
        ("crop", (4,), "views 'crop' are for images"),
        ("resized-crop-flip", (3, 8, 8), "views 'resized-crop-flip' are for images"),
        ("none:size=8", (4,), "size=8 is for images"),
        ("noise:resize=8", (4,), "resize=8 is for images"),
        ("noise", (), "views 'noise' are for rows of numbers, the data are images"),
    ],
)
def test_policies_of_other_data_are_refused(spec: str, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_policy(parse_views(spec), shape)


# The input of a network


def test_rows_are_normalised_by_the_entries_of_their_first_axis_without_a_loss_where_a_mean_is_large() -> None:
    spec = InputSpec(2, 0, (1e6, 0.5), (0.25, 4.0), shape=(2, 3))
    views = torch.tensor([1e6, 0.5])[None, :, None] + torch.arange(6).reshape(1, 2, 3) / 4
    expected = torch.tensor([[[0, 1, 2], [3 / 16, 4 / 16, 5 / 16]]])
    assert torch.equal(PreparedModel(torch.nn.Identity(), spec).prepare_input(views), expected)
    one = InputSpec(2, 0, (1.0,), (2.0,), shape=(2, 3))
    assert torch.equal(PreparedModel(torch.nn.Identity(), one).prepare_input(views), (views - 1) / 2)


@pytest.mark.parametrize(
    "spec", [InputSpec(2, 0, (1e9, 0.5), (1e-9, 4.0), shape=(2, 3)), InputSpec(3, 8, (0.5,) * 3, (0.2,) * 3)]
)
def test_a_record_gives_the_preparation_back(spec: InputSpec) -> None:
    assert InputSpec.from_json(spec.to_json()) == spec
    assert ("shape" in spec.to_json()) == bool(spec.shape)
    assert spec.make_views(4).shape == (4, *spec.input_shape)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": []},
        {"shape": [2, 0]},
        {"shape": [2, -3]},
        {"shape": [2, 1 << 24]},
        {"shape": [2] + [1] * 31},
        {"shape": [3, 3]},
        {"channels": 3},
        {"size": 8},
        {"mean": [0.0, 0.0, 0.0]},
        {"std": [1.0]},
        {"std": [0.0, 1.0]},
        {"mean": [float("nan"), 0.0]},
        {"mean": [1e31, 0.0]},
        {"shape": "ab"},
    ],
)
def test_a_record_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    record = InputSpec(2, 0, (1.0, 0.5), (1.0, 4.0), shape=(2, 3)).to_json() | change
    with pytest.raises((ValueError, TypeError)):
        InputSpec.from_json(record)
