"""Slices lie where their positions say: exactly on an even, straight grid, or resampled onto one, or refused."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from preprocessing import dicom
from preprocessing.dicom.placing import Resampling, resample
from preprocessing.reading import Reading
from preprocessing.volume import ScanError, UnreadableScan
from tests.preprocessing.dicom.slices import (
    a_slice,
    a_stack,
    assert_shows_the_ramp,
    ramp,
    read_one,
    save,
    series_of,
    turned,
)

OBLIQUE = ((0.6, 0.8, 0.0), (-0.48, 0.36, 0.8))
NORMAL = np.cross(*OBLIQUE)


def along(heights: list[float], tilt: float = 0.0, **elements: object) -> list[Dataset]:
    """Oblique slices at these heights, each pushed along its columns by so much of its height."""
    return [
        a_slice(np.array([7.0, -3, 11]) + h * (NORMAL + tilt * np.array(OBLIQUE[1])), OBLIQUE, **elements)
        for h in heights
    ]


def test_an_oblique_stack_with_long_pixels_lies_exactly_where_it_says(tmp_path: Path) -> None:
    save(tmp_path, along([0, 2, 4, 6, 8]))
    volume = read_one(tmp_path)
    assert volume.provenance.verdict == "fine" and volume.geometry.spacing == pytest.approx((0.7, 0.8, 2.0))
    assert_shows_the_ramp(volume)
    assert [name for name, _ in volume.provenance.slices] == [str(tmp_path / f"{n:04d}.dcm") for n in range(5)]


@pytest.mark.parametrize("flips", list(product((1, -1), repeat=2)))
def test_flipped_rows_and_columns_lie_exactly_where_they_say(flips: tuple[int, int], tmp_path: Path) -> None:
    direction = (tuple(flips[0] * np.array(OBLIQUE[0])), tuple(flips[1] * np.array(OBLIQUE[1])))
    save(tmp_path, [a_slice(h * NORMAL, direction) for h in (0, 3, 6)], name="{:02d}-x".format)
    assert_shows_the_ramp(read_one(tmp_path))


def test_the_order_of_files_and_their_numbers_do_not_matter(tmp_path: Path) -> None:
    slices = along([0, 2, 4, 6, 8], SliceThickness=99, SpacingBetweenSlices=0.1)
    for number, data in enumerate(slices):
        data.InstanceNumber, data.SliceLocation = 17 * number % 5, -number
    save(tmp_path / "one", slices)
    save(tmp_path / "other", [slices[n] for n in (3, 0, 4, 1, 2)])
    one, other = read_one(tmp_path / "one"), read_one(tmp_path / "other")
    np.testing.assert_array_equal(one.voxels, other.voxels)
    np.testing.assert_array_equal(one.geometry.affine, other.geometry.affine)


def test_a_missing_slice_is_refused_and_filled_where_gaps_are_allowed(tmp_path: Path) -> None:
    save(tmp_path, along([0, 2, 4, 10, 12, 14, 18]))
    with pytest.raises(
        UnreadableScan, match=r"misses slices: between 0002.dcm and 0003.dcm .* as if 2 were lost"
    ) as no:
        read_one(tmp_path)
    assert no.value.reason == "missing_slices"
    volume = read_one(tmp_path, Reading(allow=("gaps",)))
    assert volume.geometry.shape == (6, 5, 10) and volume.provenance.slices == ()
    assert_shows_the_ramp(volume, 0.011)
    assert any("3 slice(s) were missing" in one and "number 4 to 5, 9" in one for one in volume.provenance.repairs)


def test_slices_that_are_there_stay_what_they_are_when_a_gap_is_filled(tmp_path: Path) -> None:
    save(tmp_path, [a_slice((0, 0, z), values=np.full((5, 6), z, np.int16)) for z in (0, 1, 2, 4, 5)])
    volume = read_one(tmp_path, Reading(allow=("gaps",)))
    np.testing.assert_array_equal(volume.voxels[0, 0, 0], [0, 1, 2, 3, 4, 5])


def test_uneven_slices_are_refused_and_interpolated_at_their_true_places_where_allowed(tmp_path: Path) -> None:
    save(tmp_path, along([0, 2, 4.5, 6, 9, 11]))
    with pytest.raises(UnreadableScan, match="uneven") as no:
        read_one(tmp_path, Reading(allow=("gaps", "tilt")))
    assert no.value.reason == "uneven_spacing"
    volume = read_one(tmp_path, Reading(allow=("uneven",)))
    assert volume.provenance.slices == () and volume.provenance.verdict == "repaired"
    np.testing.assert_allclose(
        volume.geometry.to_world([0, 0, volume.geometry.shape[2] - 1]), [-7, 3, 11] + 11 * NORMAL * [-1, -1, 1]
    )
    assert_shows_the_ramp(volume, 0.011)


def test_a_hole_among_uneven_slices_needs_both_words(tmp_path: Path) -> None:
    save(tmp_path, along([0, 2, 4.5, 6, 16, 18, 20.2]))
    for allowed in ((), ("gaps",), ("uneven",)):
        with pytest.raises(UnreadableScan) as no:
            read_one(tmp_path, Reading(allow=allowed))
        assert no.value.reason == ("uneven_spacing" if allowed == ("gaps",) else "missing_slices")
    assert_shows_the_ramp(read_one(tmp_path, Reading(allow=("gaps", "uneven"))), 0.011)


def test_a_void_is_filled_on_nobodys_word(tmp_path: Path) -> None:
    save(tmp_path, along([0, 2, 4, 6, 60, 62, 64]))
    with pytest.raises(UnreadableScan, match="more than can be interpolated") as no:
        read_one(tmp_path, Reading(allow=("gaps", "uneven")))
    assert no.value.reason == "missing_slices"


@pytest.mark.parametrize("tilt", [0.31, -0.31])
def test_a_tilted_stack_is_refused_and_straightened_where_allowed(tilt: float, tmp_path: Path) -> None:
    save(tmp_path, along([0, 2, 4, 6, 8], tilt=tilt, shape=(9, 6)))
    with pytest.raises(UnreadableScan, match="tilt of 17") as no:
        read_one(tmp_path, Reading(allow=("gaps", "uneven")))
    assert no.value.reason == "tilted"
    volume = read_one(tmp_path, Reading(allow=("tilt",)))
    assert not volume.geometry.is_sheared and volume.geometry.shape == (6, 13, 5)
    covered = _covered(
        volume.geometry.to_world(np.stack(np.meshgrid(*map(np.arange, (6, 13, 5)), indexing="ij"), -1)), tilt
    )
    assert covered.sum() > 200
    assert_shows_the_ramp(volume, 0.011, inside=covered)
    lowest = min(float(ramp_of_first.min()) for ramp_of_first in [volume.voxels[0][covered]])
    assert (volume.voxels[0][~covered] <= lowest + 0.5).all() and len(set(volume.voxels[0][~covered])) == 1
    assert volume.provenance.slices == ()


def _covered(ras: np.ndarray, tilt: float) -> np.ndarray:
    """Where one of the slices has pixels around a point."""
    offset = ras * [-1, -1, 1] - np.array([7.0, -3, 11])
    height = offset @ NORMAL
    down = (offset @ np.array(OBLIQUE[1]) - tilt * height) / 0.8
    return (down > -1e-6) & (down < 8 + 1e-6)


def test_tilt_and_uneven_steps_are_mended_together(tmp_path: Path) -> None:
    save(tmp_path, along([0, 2, 4.5, 6, 9], tilt=0.2, shape=(20, 6)))
    for allowed in (("tilt",), ("uneven",)):
        with pytest.raises(UnreadableScan):
            read_one(tmp_path, Reading(allow=allowed))
    volume = read_one(tmp_path, Reading(allow=("tilt", "uneven")))
    inner = volume.voxels[0] > volume.voxels.min()
    assert inner.mean() > 0.8 and len(volume.provenance.repairs) == 2
    assert_shows_the_ramp(volume, 0.011, inside=inner)


@settings(max_examples=40, deadline=None)
@given(
    heights=st.lists(st.floats(0.8, 3.0), min_size=2, max_size=7),
    tilt=st.tuples(st.floats(-0.4, 0.4), st.floats(-0.4, 0.4)),
)
def test_resampling_brings_a_linear_field_back(
    heights: list[float], tilt: tuple[float, float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the steps and the shifts: where there are values, they are those of the place."""
    folder = tmp_path_factory.mktemp("field")
    at = np.concatenate([[0], np.cumsum(heights)])
    push = np.array(OBLIQUE[0]) * tilt[0] + np.array(OBLIQUE[1]) * tilt[1]
    positions = [np.array([7.0, -3, 11]) + h * (NORMAL + push) for h in at]
    save(folder, [a_slice(position, OBLIQUE, shape=(24, 24)) for position in positions])
    volume = read_one(folder, Reading(allow=("tilt", "uneven", "gaps")))
    # a slice within a hundredth of the usual 3 mm of its place is taken as it is; the ramp's steepness is 0.79 a mm
    assert_shows_the_ramp(volume, 0.03, inside=volume.voxels[0] > volume.voxels.min())


def test_what_lies_between_a_slice_and_nothing_is_filled() -> None:
    slices = np.array([[[1.0, 2.0, 4.0]], [[3.0, 5.0, 9.0]]])
    how = Resampling(
        shifts=np.array([[0, 0], [0, 0.5]]), below=np.array([0, 0, 1]), above=np.array([0, 0.5, 0]), size=(1, 4)
    )
    found = resample(slices, how, fill=-7)
    np.testing.assert_allclose(found[:, 0], [[1, 2, 4, -7], [-7, 3, 5.5, -7], [-7, 4, 7, -7]])


def test_slices_shifted_out_of_sight_of_each_other_are_refused(tmp_path: Path) -> None:
    save(tmp_path, along([0, 2, 4, 6], tilt=20.0))
    with pytest.raises(UnreadableScan, match="beside each other"):
        read_one(tmp_path, Reading(allow=("tilt",)))


@pytest.mark.parametrize("wobble", [0.004, 0.009])
def test_rounded_positions_are_no_gap_and_no_tilt(wobble: float, tmp_path: Path) -> None:
    save(tmp_path, along([k + wobble * (-1) ** k / 2 for k in range(8)]))
    volume = read_one(tmp_path)
    assert volume.provenance.verdict == "fine" and volume.geometry.spacing[2] == pytest.approx(1, abs=0.002)


def test_a_hundredth_of_the_distance_is_allowed(tmp_path: Path) -> None:
    save(tmp_path, along([0, 5.04, 10, 15.03, 20]))
    assert read_one(tmp_path).provenance.verdict == "fine"


def test_two_slices_need_a_word_and_one_is_never_a_volume(tmp_path: Path) -> None:
    save(tmp_path, a_stack(2))
    with pytest.raises(UnreadableScan, match="2 slices") as no:
        read_one(tmp_path)
    assert no.value.reason == "too_few_slices"
    volume = read_one(tmp_path, Reading(allow=("few",)))
    assert volume.geometry.shape[2] == 2 and "as allowed" in volume.provenance.repairs[0]
    (tmp_path / "0001.dcm").unlink()
    with pytest.raises(UnreadableScan, match="1 slice") as no:
        read_one(tmp_path, Reading(allow=("few", "gaps", "uneven", "tilt")))
    assert no.value.reason == "too_few_slices"


def test_directions_slightly_off_a_right_angle_are_straightened_and_said(tmp_path: Path) -> None:
    bent = ((1.0, 0.0, 0.0), (0.0005, 1.0, 0.0))
    save(tmp_path, [a_slice((0, 0, z), bent) for z in (0, 2, 4)])
    volume = read_one(tmp_path)
    assert "straightened" in volume.provenance.repairs[0] and not volume.geometry.is_sheared


@pytest.mark.parametrize(
    "spoil",
    [
        {"ImagePositionPatient": [0, 0, 1e9]},
        {"PixelSpacing": [0, 1]},
        {"PixelSpacing": [1e12, 1]},
        {"ImageOrientationPatient": [1, 0, 0, 0.2, 1, 0]},
        {"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]},
        {"ImagePositionPatient": None},
    ],
)
def test_a_place_that_is_none_spoils_the_whole_series(spoil: dict[str, object], tmp_path: Path) -> None:
    save(tmp_path, [*a_stack(5), a_slice((-10, -20, 42.5), **spoil)])
    with pytest.raises(UnreadableScan, match=r"0005.dcm") as no:
        read_one(tmp_path)
    assert no.value.reason == "no_geometry"


def test_every_refusal_says_what_was_met_what_is_needed_and_what_to_do(tmp_path: Path) -> None:
    stacks = {"gap": [0, 2, 4, 8], "uneven": [0, 2, 5, 7], "few": [0, 2], "tilt": [0, 2, 4]}
    for name, heights in stacks.items():
        save(tmp_path / name, along(heights, tilt=0.5 * (name == "tilt")))
        with pytest.raises(ScanError) as no:
            read_one(tmp_path / name)
        assert f"allow {'gaps' if name == 'gap' else name}" in str(no.value)
        assert "1.2.3" not in str(no.value)


def test_a_grid_holds_for_every_series_it_was_built_from(tmp_path: Path) -> None:
    """The values at the corners of the grid, computed from the headers alone."""
    save(tmp_path, along([0, 2, 4]))
    (series,) = series_of(tmp_path).values()
    volume = dicom.read(series)
    corner = volume.geometry.to_world([5, 4, 2]) * [-1, -1, 1]
    wanted = np.array([7.0, -3, 11]) + 4 * NORMAL + 5 * 0.7 * np.array(OBLIQUE[0]) + 4 * 0.8 * np.array(OBLIQUE[1])
    np.testing.assert_allclose(corner, wanted, atol=1e-6)
    assert volume.voxels[0, 5, 4, 2] == pytest.approx(float(ramp(wanted)), abs=0.006)


def test_oblique_cosines_of_three_digits_are_no_tilt(tmp_path: Path) -> None:
    """Thirty slices of 5 mm drift by 0.08 mm; the line through their positions is the truer normal."""
    row, column, normal = turned((1, 2, 0.5), 0.35).T
    slices = [a_slice(np.array([-100, -90, 20]) + 5 * k * normal, (row, column)) for k in range(30)]
    for data in slices:
        data.ImageOrientationPatient = [round(float(cosine), 3) for cosine in (*row, *column)]
    save(tmp_path, slices)
    volume = read_one(tmp_path)
    assert_shows_the_ramp(volume, tolerance=0.02)
    np.testing.assert_allclose(volume.geometry.affine[:3, 2] / 5, normal * [-1, -1, 1], atol=1e-6)
    assert "rounded to few digits" in volume.provenance.repairs[-1]


def test_more_than_the_last_digit_explains_is_a_tilt(tmp_path: Path) -> None:
    row, column, normal = turned((1, 2, 0.5), 0.35).T
    slices = [a_slice(np.array([-100, -90, 20]) + 5 * k * (normal + 0.004 * row), (row, column)) for k in range(30)]
    for data in slices:
        data.ImageOrientationPatient = [round(float(cosine), 3) for cosine in (*row, *column)]
    save(tmp_path, slices)
    with pytest.raises(UnreadableScan) as no:
        read_one(tmp_path)
    assert no.value.reason == "tilted"
