"""Resampling agrees with scipy where scipy and we mean the same, and keeps what must be kept where edges begin."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from preprocessing.resampling import resample, resample_labels, resized
from preprocessing.volume import Geometry

QUIET = settings(derandomize=True, max_examples=40, deadline=None, database=None)
SIDES = st.tuples(*[st.integers(1, 14)] * 3)


def noise(shape: tuple[int, int, int], channels: int = 1) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=(channels, *shape)).astype(np.float32)


def by_scipy(voxels: np.ndarray, shape: tuple[int, int, int], order: int) -> np.ndarray:
    factors = np.array(shape) / np.array(voxels.shape)
    return ndimage.zoom(voxels.astype(np.float64), factors, order=order, mode="mirror", grid_mode=True)


def inside_the_outermost_centres(before: tuple[int, int, int], after: tuple[int, int, int]) -> np.ndarray:
    places = [(np.arange(a) + 0.5) * b / a - 0.5 for b, a in zip(before, after, strict=True)]
    within = [(place >= 0) & (place <= b - 1) for place, b in zip(places, before, strict=True)]
    return np.ix_(*within)


@pytest.mark.parametrize("order", [1, 3])
@QUIET
@given(before=SIDES, after=SIDES)
def test_between_the_outermost_voxel_centres_scipy_gives_the_same(order, before, after):
    voxels = noise(before)
    here = inside_the_outermost_centres(before, after)
    ours = resample(voxels, after, order=order)[0]
    assert ours.shape == after
    np.testing.assert_allclose(ours[here], by_scipy(voxels[0], after, order)[here], atol=2e-5)


@pytest.mark.parametrize("order", [1, 3])
def test_beyond_the_outermost_centres_the_edge_repeats(order):
    voxels = noise((5, 5, 5))
    finer = resample(voxels, (50, 5, 5), order=order)
    np.testing.assert_allclose(finer[:, :5], np.repeat(voxels[:, :1], 5, axis=1), atol=1e-5)
    np.testing.assert_allclose(finer[:, -5:], np.repeat(voxels[:, -1:], 5, axis=1), atol=1e-5)


@QUIET
@given(before=SIDES, after=SIDES, order=st.sampled_from([1, 3]))
def test_a_constant_stays_constant(before, after, order):
    np.testing.assert_allclose(resample(np.full((1, *before), 7.5), after, order=order), 7.5, atol=1e-4)


@QUIET
@given(before=SIDES, after=SIDES)
def test_linear_keeps_probabilities_between_0_and_1_and_summing_to_1(before, after):
    rng = np.random.default_rng(0)
    probabilities = np.moveaxis(rng.dirichlet(np.ones(3), size=before), -1, 0)
    there = resample(probabilities, after, order=1)
    np.testing.assert_allclose(there.sum(axis=0), 1, atol=1e-5)
    assert there.min() >= 0
    assert there.max() <= 1 + 1e-6


@QUIET
@given(SIDES)
def test_the_same_shape_gives_the_same_voxels(shape):
    voxels = noise(shape, channels=2)
    np.testing.assert_array_equal(resample(voxels, shape, order=3), voxels)


def test_channels_do_not_mix():
    voxels = noise((6, 7, 5), channels=3)
    together = resample(voxels, (9, 4, 8), order=3)
    for channel in range(3):
        np.testing.assert_allclose(
            together[channel], resample(voxels[channel : channel + 1], (9, 4, 8), order=3)[0], atol=1e-6
        )


def test_a_mirrored_scan_is_resampled_to_the_mirrored_result():
    voxels = noise((7, 5, 6))
    there = resample(voxels, (10, 4, 9), order=3)
    np.testing.assert_allclose(
        resample(voxels[:, ::-1, :, ::-1], (10, 4, 9), order=3), there[:, ::-1, :, ::-1], atol=1e-5
    )


@QUIET
@given(SIDES, SIDES)
def test_another_number_of_voxels_fills_the_same_box(before, after):
    affine = np.array([[0, -2.0, 0.3, 5], [1.5, 0, 0, -4], [0, 0.2, 3, 9], [0, 0, 0, 1]])
    one = Geometry(shape=before, affine=affine)
    other = resized(one, after)
    np.testing.assert_allclose(one.to_world([-0.5] * 3), other.to_world([-0.5] * 3), atol=1e-9)
    np.testing.assert_allclose(one.to_world(np.array(before) - 0.5), other.to_world(np.array(after) - 0.5), atol=1e-9)


@QUIET
@given(before=SIDES, after=SIDES, seed=st.integers(0, 99))
def test_labels_gain_no_value_that_was_not_there(before, after, seed):
    labels = np.random.default_rng(seed).choice([0, 3, 700], size=(1, *before)).astype(np.uint16)
    there = resample_labels(labels, after)
    assert there.dtype == np.uint16
    assert there.shape == (1, *after)
    assert set(np.unique(there)) <= set(np.unique(labels))


def test_labels_put_on_a_grid_three_times_as_fine_keep_the_value_of_every_old_centre():
    labels = np.random.default_rng(1).integers(0, 4, (1, 6, 5, 7)).astype(np.uint8)
    finer = resample_labels(labels, (18, 15, 21))
    np.testing.assert_array_equal(finer[:, 1::3, 1::3, 1::3], labels)


def test_a_tie_between_labels_goes_to_the_lower_one_whatever_the_order_of_slices():
    labels = np.array([1, 2], np.uint8).reshape(1, 2, 1, 1)
    assert resample_labels(labels, (1, 1, 1)).item() == 1
    assert resample_labels(labels[:, ::-1], (1, 1, 1)).item() == 1


def test_an_order_nobody_wrote_is_refused():
    with pytest.raises(ValueError, match="order 2"):
        resample(noise((4, 4, 4)), (5, 5, 5), order=2)
