"""A region is where it, or any region within it, is painted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from preprocessing.plan import Label
from preprocessing.regions import names_in_map, parted, places, values_of


def region(name: str, value: int, *parts: int) -> Label:
    return Label(value=value, name=name, colour=(1, 2, 3), parts=parts)


NESTED = (region("whole", 2, 1, 2, 3), region("core", 1, 1, 3), region("active", 3, 3), region("beside", 10, 4, 5))
PLAIN = (region("liver", 1), region("lesion", 7))


def test_a_region_holds_what_is_painted_for_the_regions_within_it():
    assert values_of(NESTED) == {"whole": (2, 1, 3), "core": (1, 3), "active": (3,), "beside": (10,)}
    assert values_of(PLAIN) == {"liver": (1,), "lesion": (7,)}
    crossing = (region("one", 1, 1, 2), region("other", 3, 2, 3))
    assert values_of(crossing) == {"one": (1,), "other": (3,)}, "neither lies in the other"


def test_a_label_map_holds_what_is_left_of_a_region():
    names = {
        "whole": "whole without core and active",
        "core": "core without active",
        "active": "active",
        "beside": "beside",
    }
    assert names_in_map(NESTED) == names


@pytest.mark.parametrize("table", [NESTED, PLAIN], ids=["regions", "labels"])
@given(data=st.data())
def test_a_place_is_the_smallest_box_with_all_voxels_of_a_label_in_it(table, data):
    painted = st.sampled_from([0, 0, 0, *(label.value for label in table)])
    voxels = data.draw(arrays.arrays(np.uint8, (4, 5, 3), elements=painted, fill=st.just(0)))
    for label, place in places(voxels, table):
        expected = np.isin(voxels, values_of(table)[label.name])
        assert (place is not None) == expected.any()
        if place is not None:
            back = np.zeros(voxels.shape, bool)
            i, j, k = (slice(start, start + side) for start, side in zip(place.start, place.mask.shape, strict=True))
            back[i, j, k] = place.mask
            np.testing.assert_array_equal(back, expected)
            assert all(place.mask.any(axis=axes)[[0, -1]].all() for axes in ((1, 2), (0, 2), (0, 1)))


def test_only_the_labels_asked_for_are_looked_at():
    voxels = np.full((2, 2, 2), 3, np.uint8)
    ((label, place),) = places(voxels, NESTED, NESTED[:1])
    assert label.name == "whole" and place is not None and place.mask.all()


def test_parts_are_numbered_from_the_largest_and_touch_by_corners() -> None:
    mask = np.zeros((8, 8, 8), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True  # one part of two voxels, by a corner
    mask[4:7, 4:7, 4:7] = True
    mask[7, 0, 0] = True
    numbers, sizes = parted(mask)
    assert sizes.tolist() == [27, 2, 1]
    assert numbers[5, 5, 5] == 1 and numbers[0, 0, 0] == numbers[1, 1, 1] == 2 and numbers[7, 0, 0] == 3
    assert ((numbers > 0) == mask).all()


def test_parts_of_one_size_keep_the_order_in_which_they_are_met() -> None:
    mask = np.zeros((9, 3, 3), bool)
    mask[[0, 4, 8], 1, 1] = True
    numbers, sizes = parted(mask)
    assert numbers[[0, 4, 8], 1, 1].tolist() == [1, 2, 3] and sizes.tolist() == [1, 1, 1]


def test_nothing_has_no_parts() -> None:
    numbers, sizes = parted(np.zeros((2, 3, 4), bool))
    assert not numbers.any() and len(sizes) == 0
