"""Objects found from runs are those that scipy finds voxel by voxel."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from preprocessing.components import objects_of, runs_of

QUIET = settings(derandomize=True, max_examples=60, deadline=None, database=None)
SIDES = st.tuples(*[st.integers(1, 9)] * 3)


def painted(labels: np.ndarray) -> np.ndarray:
    """A map in which each voxel carries the number of its object, from 1."""
    runs = runs_of(labels)
    numbers = np.zeros(labels.shape, int)
    for number, plane, row, start, stop in zip(
        objects_of(runs), runs.plane, runs.row, runs.start, runs.stop, strict=True
    ):
        numbers[plane, row, start:stop] = number + 1
    return numbers


@QUIET
@given(SIDES, st.integers(0, 2**31), st.floats(0.2, 0.9))
def test_objects_are_those_that_scipy_finds(shape, seed, empty):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 2, 7], size=shape, p=[empty, 0.7 * (1 - empty), 0.3 * (1 - empty)]).astype(np.uint8)
    numbers, seen = painted(labels), 0
    np.testing.assert_array_equal(numbers > 0, labels > 0)
    for value in (2, 7):
        theirs, found = ndimage.label(labels == value, np.ones((3, 3, 3)))
        pairs = {(int(one), int(other)) for one, other in zip(theirs.flat, numbers.flat, strict=True) if one}
        assert len(pairs) == found  # one number of theirs for one of ours
        seen += found
    assert len(np.unique(numbers[numbers > 0])) == seen


def test_neither_a_run_nor_an_object_is_found_in_background():
    runs = runs_of(np.zeros((2, 3, 4), np.int16))
    assert len(runs.label) == 0
    assert len(objects_of(runs)) == 0


def test_opposite_borders_of_a_scan_do_not_touch():
    labels = np.zeros((3, 3, 3), np.uint8)
    labels[1, 0, 0] = labels[1, 0, 2] = labels[1, 2, 1] = labels[0, 2, 2] = labels[2, 0, 1] = 1
    assert len(np.unique(painted(labels))) - 1 == ndimage.label(labels, np.ones((3, 3, 3)))[1]
