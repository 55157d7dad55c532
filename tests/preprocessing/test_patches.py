"""Windows cover every voxel, training finds what is rare, and nothing is read from beyond a scan's edge."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from preprocessing.patches import Places, bell, cut, draw, grid

QUIET = settings(derandomize=True, max_examples=80, deadline=None, database=None)
SIDES = st.tuples(*[st.integers(1, 12)] * 3)
EXTRA = st.tuples(*[st.integers(0, 30)] * 3)


@QUIET
@given(SIDES, EXTRA, st.sampled_from([0.0, 0.25, 0.5, 0.75]))
def test_windows_cover_every_voxel_and_neighbours_share_at_least_the_overlap(patch, extra, overlap):
    shape = tuple(int(n) for n in np.add(patch, extra))
    starts = grid(shape, patch, overlap)
    covered = np.zeros(shape, int)
    for i, j, k in starts:
        covered[i : i + patch[0], j : j + patch[1], k : k + patch[2]] += 1
    assert covered.min() >= 1
    assert len(set(starts)) == len(starts)
    for axis in range(3):
        along = sorted({start[axis] for start in starts})
        assert along[0] == 0
        assert along[-1] == shape[axis] - patch[axis]
        stride = max(np.diff(along), default=0)
        assert patch[axis] - stride >= overlap * patch[axis] or stride == 1


@pytest.mark.parametrize(
    ("size", "side", "starts"), [(10, 10, [0]), (11, 10, [0, 1]), (20, 10, [0, 5, 10]), (3, 1, [0, 1, 2])]
)
def test_there_are_no_more_windows_than_the_overlap_asks_for(size, side, starts):
    assert [i for i, _, _ in grid((size, 1, 1), (side, 1, 1), 0.5)] == starts


@pytest.mark.parametrize("side", [1, 4, 7, 64])
def test_a_window_is_trusted_most_in_its_middle_and_nowhere_not_at_all(side):
    weights = bell(side)
    np.testing.assert_allclose(weights, weights[::-1])
    assert weights.min() > 0
    assert (np.diff(weights[: (side + 1) // 2]) >= 0).all()
    middle = np.arange(side) - (side - 1) / 2
    near = np.abs(middle) < 3 * side / 8
    np.testing.assert_allclose(weights[near], np.exp(-0.5 * (middle[near] / (side / 8)) ** 2), rtol=1e-5)


@QUIET
@given(SIDES, st.tuples(*[st.integers(-6, 30)] * 3), st.integers(0, 999), st.sampled_from([None, True, False]))
def test_a_drawn_window_lies_inside_the_scan_or_where_the_scan_is_smaller_around_it(patch, extra, seed, forced):
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in np.maximum(1, np.add(patch, extra)))
    labels = (rng.random((1, *shape)) < 0.05).astype(np.int16)
    places = Places.of(labels, rng)
    room = np.subtract(shape, patch)
    for _ in range(10):
        start = draw(shape, patch, places, rng, foreground=0.5, forced=forced)
        assert (start >= np.minimum(0, room)).all()
        assert (start <= np.maximum(0, room)).all()
        assert not (forced and labels.any()) or (cut(labels, start, patch, 0) > 0).any()


@QUIET
@given(st.tuples(*[st.integers(1, 40)] * 3), st.integers(0, 999))
def test_what_a_window_was_drawn_for_is_still_in_it_when_it_is_turned(patch, seed):
    """By up to 30 degrees about each axis and enlarged by 1 / 0.7, as augmentation does at most."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((1, 100, 100, 100), np.uint8)
    labels[0, 50, 50, 50] = 1
    places = Places.of(labels, rng)
    start = np.array(draw((100, 100, 100), patch, places, rng, foreground=0.0, forced=True))
    offset = 50 - (start + (np.array(patch) - 1) / 2)
    for _ in range(20):
        turned = Rotation.from_euler("xyz", rng.uniform(-30, 30, 3), degrees=True).apply(offset / rng.uniform(0.7, 1.4))
        assert (np.abs(turned) <= np.maximum(np.array(patch) / 2, 1.3)).all()


@pytest.mark.parametrize("patch", [(12, 12, 12), (16, 16, 4), (16, 16, 1)])
def test_a_rare_label_is_met_as_often_as_a_common_one(patch):
    labels = np.zeros((1, 60, 60, 60), np.uint8)
    labels[0, 10:50, 10:50, 10:50] = 1
    labels[0, 5, 55, 7] = 2  # a lesion of one voxel
    rng = np.random.default_rng(0)
    places = Places.of(labels, rng)
    windows = [cut(labels, draw((60, 60, 60), patch, places, rng, foreground=0.5), patch, 0) for _ in range(400)]
    met = sum(bool((window == 2).any()) for window in windows) / 400
    assert met == pytest.approx(0.5 / 2, abs=0.08)


def test_windows_are_drawn_anywhere_where_there_is_no_label():
    rng = np.random.default_rng(0)
    places = Places.of(np.zeros((1, 20, 20, 20), np.uint8), rng)
    starts = np.array([draw((20, 20, 20), (4, 4, 4), places, rng, foreground=0.5) for _ in range(600)])
    assert places.per_label == {}
    assert (starts.min(axis=0) == 0).all()
    assert (starts.max(axis=0) == 16).all()


def test_the_share_on_labels_is_what_was_asked_for_and_none_or_all_where_it_is_forced():
    labels = np.zeros((1, 50, 50, 50), np.int16)
    labels[0, 25, 25, 25] = 1
    rng = np.random.default_rng(0)
    places = Places.of(labels, rng)

    def met(foreground: float, forced: bool | None = None) -> float:
        drawn = [draw((50, 50, 50), (6, 6, 6), places, rng, foreground=foreground, forced=forced) for _ in range(300)]
        return sum(cut(labels, start, (6, 6, 6), 0).any() for start in drawn) / 300

    assert met(0.33) == pytest.approx(0.33, abs=0.09)
    assert (met(1.0), met(0.0, forced=True)) == (1, 1)
    assert max(met(0.0), met(1.0, forced=False)) < 0.03


def test_a_small_lesion_beside_a_large_one_is_drawn_and_the_large_one_all_the_same():
    labels = np.zeros((1, 60, 60, 60), np.int16)
    labels[0, :40, :40, :40] = 1
    labels[0, 50, 50, 50] = labels[0, 51, 51, 51] = 1  # one lesion: its voxels touch at a corner
    labels[0, 57, 3, 3] = 1
    rng = np.random.default_rng(0)
    places = Places.of(labels, rng, most=300)
    assert places.pieces[:, [0, 2]].tolist() == [[1, 64_000], [1, 2], [1, 1]]
    drawn = np.array([places.draw(rng) for _ in range(1200)])
    assert (drawn >= 50).all(axis=1).mean() == pytest.approx(1 / 6, abs=0.04)
    assert (drawn[:, 0] == 57).mean() == pytest.approx(1 / 6, abs=0.04)
    assert len(np.unique(drawn[(drawn < 40).all(axis=1)], axis=0)) > 200


def test_what_nobody_knows_is_never_drawn():
    labels = np.full((1, 9, 9, 9), -1, np.int16)
    labels[0, 4, 4, 4] = 3
    places = Places.of(labels, np.random.default_rng(0))
    assert {value: voxels.tolist() for value, voxels in places.per_label.items()} == {3: [[4, 4, 4]]}


@QUIET
@given(st.integers(0, 9999), st.sampled_from([0.02, 0.3, 0.9]), st.integers(1, 400))
def test_places_are_voxels_of_their_label_each_once_and_no_more_than_asked_for(seed, share, most):
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((1, 9, 8, 7)) < share, rng.integers(-1, 4, (1, 9, 8, 7)), 0).astype(np.int16)
    places = Places.of(labels, rng, most)
    assert set(places.per_label) == set(np.unique(labels)) - {-1, 0}
    for value, voxels in places.per_label.items():
        assert (labels[0][tuple(voxels.T)] == value).all()
        assert len(np.unique(voxels, axis=0)) == len(voxels)
        pieces = places.pieces[places.pieces[:, 0] == value]
        count = (labels == value).sum()
        assert len(voxels) <= most and (count > most // 2 or len(voxels) == count)
        assert (pieces[:, 1] >= 1).all() and (pieces[:, 1] <= pieces[:, 2]).all()
        assert pieces[:, 2].sum() == count or len(pieces) == most
    if len(places.pieces):
        i, j, k = places.draw(rng)
        assert labels[0, i, j, k] > 0


def test_places_keep_all_of_a_small_label_and_a_fair_sample_of_a_large_one():
    labels = np.zeros((1, 40, 40, 40), np.uint16)
    labels[0, :, :, 20:] = 300
    labels[0, 3, 4, 5] = labels[0, 9, 9, 9] = 7
    places = Places.of(labels, np.random.default_rng(0), most=500)
    assert sorted(map(tuple, places.per_label[7].tolist())) == [(3, 4, 5), (9, 9, 9)]
    large = places.per_label[300]
    assert len(large) == 500
    assert len(np.unique(large, axis=0)) == 500
    assert (labels[0][tuple(large.T)] == 300).all()
    np.testing.assert_allclose(large.mean(axis=0), [19.5, 19.5, 29.5], atol=2)


@QUIET
@given(SIDES, SIDES, st.tuples(*[st.integers(-15, 15)] * 3))
def test_a_window_over_the_edge_holds_the_scan_where_it_is_and_the_given_value_elsewhere(shape, size, start):
    voxels = np.arange(1, 2 * np.prod(shape) + 1, dtype=np.int32).reshape(2, *shape)
    wide = np.pad(voxels, ((0, 0), *[(30, 30)] * 3), constant_values=-9)
    i, j, k = np.add(start, 30)
    expected = wide[:, i : i + size[0], j : j + size[1], k : k + size[2]]
    window = cut(voxels, start, size, -9)
    np.testing.assert_array_equal(window, expected)
    assert window.dtype == voxels.dtype
    assert not np.shares_memory(window, voxels)


# as nnU-Net v2 has it: what its compute_steps_for_sliding_window and compute_gaussian do, with scipy's filter


@pytest.mark.parametrize(
    ("size", "side", "starts"), [(110, 64, [0, 23, 46]), (18, 9, [0, 4, 9]), (7, 1, [*range(7)]), (9, 9, [0])]
)
def test_by_nnunets_rule_windows_start_where_nnunets_do(size, side, starts):
    assert [start[0] for start in grid((size, 8, 8), (side, 8, 8), 0.5, "nnunet")] == starts


def test_of_an_odd_side_our_own_rule_lays_windows_closer():
    assert len(grid((18, 8, 8), (9, 8, 8), 0.5)) > len(grid((18, 8, 8), (9, 8, 8), 0.5, "nnunet"))


@pytest.mark.parametrize("side", [1, 5, 20, 40, 128])
def test_by_nnunets_rule_the_bell_is_scipys(side):
    point = np.zeros(side)
    point[side // 2] = 1
    theirs = ndimage.gaussian_filter(point, side / 8, mode="constant")
    np.testing.assert_allclose(bell(side, "nnunet"), theirs / theirs.max(), rtol=1e-5)
