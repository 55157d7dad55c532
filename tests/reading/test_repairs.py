"""What a person allowed to be mended is right afterwards: every voxel inside the scan has the value of its place."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from preprocessing import files
from preprocessing.reading import Reading
from preprocessing.volume import Volume
from tests.reading import series
from tests.reading.phantom import LPS_TO_RAS, OBLIQUE, SHAPE, SPACING

SLOPE = np.array([2.0, 1.5, -2.5])
"""Units per millimetre, in LPS. A value that runs evenly through space survives every honest interpolation."""

CLOSE = 1.0
"""Stored values are whole numbers: half a unit in, half a unit out; a third of a millimetre in place."""

LAST = SHAPE[2]
NORMAL, ALONG_J = OBLIQUE[:3, 2] / SPACING[2], OBLIQUE[:3, 1] / SPACING[1]
MIDDLE = OBLIQUE @ [24, 20, 12, 1]


def value(lps: np.ndarray) -> np.ndarray:
    """[..., 3] -> [...]"""
    return (lps - MIDDLE[:3]) @ SLOPE + 200


def written(shifts_mm: np.ndarray, kept: list[int], folder: Path) -> Path:
    """A series whose slices lie aside by so much, each with the values of where it truly lies."""
    i, j, k = np.indices(SHAPE)
    places = np.stack([i, j, k, np.ones(SHAPE)], axis=-1) @ OBLIQUE.T[:, :3] + shifts_mm
    slices = series.ct(np.rint(value(places) + 1024).astype(np.int16))
    for number, data in enumerate(slices):
        data.ImagePositionPatient = series.text((OBLIQUE @ [0, 0, number, 1])[:3] + shifts_mm[number])
    series.save([slices[k] for k in kept], folder)
    return folder


def wrong_inside(volume: Volume, shifts_mm: np.ndarray) -> tuple[float, float]:
    """The largest error among voxels a voxel within the scan, and how many of all voxels these are."""
    i, j, k = (axis.astype(float) for axis in np.indices(volume.geometry.shape))
    places = volume.geometry.to_world(np.stack([i, j, k], axis=-1)) * [-1, -1, 1]
    height = (places - OBLIQUE[:3, 3]) @ NORMAL
    heights = np.arange(LAST) * SPACING[2] + shifts_mm @ NORMAL
    aside = np.stack(
        [np.interp(height, heights, shifts_mm[:, n] - (shifts_mm @ NORMAL) * NORMAL[n]) for n in range(3)], -1
    )
    back = (places - aside - OBLIQUE[:3, 3]) @ np.linalg.inv(OBLIQUE[:3, :3]).T
    inside = (back[..., :2] >= 1).all(-1) & (back[..., :2] <= np.array(SHAPE[:2]) - 2).all(-1)
    inside &= (height >= heights[0]) & (height <= heights[-1])
    return float(np.abs(volume.voxels[0] - value(places))[inside].max()), float(inside.mean())


EVERY = list(range(LAST))
STEPS = np.arange(LAST)[:, None]
CASES: dict[str, tuple[str, np.ndarray, list[int]]] = {
    "tilted by 15 degrees": ("tilt", np.tan(np.radians(15)) * SPACING[2] * STEPS * ALONG_J, EVERY),
    "tilted by -20 degrees": ("tilt", -np.tan(np.radians(20)) * SPACING[2] * STEPS * ALONG_J, EVERY),
    "spacing doubles half way": ("uneven", np.maximum(STEPS - 12, 0) * SPACING[2] * 0.75 * NORMAL, EVERY),
    "spacing grows": ("uneven", 0.02 * STEPS**2 * NORMAL, EVERY),
    "jitter": ("uneven", np.random.default_rng(8).uniform(-0.5, 0.5, (LAST, 1)) * NORMAL, EVERY),
    "one missing": ("gaps", np.zeros((LAST, 3)), [k for k in EVERY if k != 11]),
    "three missing": ("gaps", np.zeros((LAST, 3)), [k for k in EVERY if k not in (9, 10, 11)]),
    "two gaps": ("gaps", np.zeros((LAST, 3)), [k for k in EVERY if k not in (5, 15, 16)]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_series_that_was_mended_has_every_value_at_its_place(name: str, tmp_path: Path) -> None:
    repair, shifts, kept = CASES[name]
    folder = written(shifts, kept, tmp_path / "series")
    volume = files.read(folder, Reading(allow=(repair,)))
    error, share = wrong_inside(volume, shifts)
    assert error <= CLOSE
    assert share > 0.5, "most of the grid lies outside the scan, or the scan outside the grid"
    assert volume.provenance.verdict == "repaired"
    assert not volume.geometry.is_sheared


@pytest.mark.parametrize("name", [name for name, (repair, _, _) in CASES.items() if repair != "tilt"])
def test_no_end_of_a_mended_series_is_lost(name: str, tmp_path: Path) -> None:
    repair, shifts, kept = CASES[name]
    volume = files.read(written(shifts, kept, tmp_path / "series"), Reading(allow=(repair,)))
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(SHAPE) - 1)
    places = np.c_[corners, np.ones(8)] @ OBLIQUE.T[:, :3] + shifts[corners[:, 2]]
    found = volume.geometry.to_voxel(places * [-1, -1, 1])
    assert (found > -0.6).all() and (found < np.array(volume.geometry.shape) - 0.4).all()


def test_a_sheared_nifti_that_was_mended_has_every_value_at_its_place(tmp_path: Path) -> None:
    lps = OBLIQUE.copy()
    lps[:3, 2] += 0.3 * lps[:3, 1]
    places = np.stack([*np.indices(SHAPE), np.ones(SHAPE)], axis=-1) @ lps.T[:, :3]
    image = nibabel.Nifti1Image(value(places).astype(np.float32), LPS_TO_RAS @ lps)
    image.set_sform(image.affine, 1)
    image.set_qform(None, 0)
    nibabel.save(image, tmp_path / "scan.nii")
    volume = files.read(tmp_path / "scan.nii", Reading(allow=("tilt",)))
    i, j, k = np.indices(volume.geometry.shape)
    world = volume.geometry.to_world(np.stack([i, j, k], axis=-1)) * [-1, -1, 1]
    back = (world - lps[:3, 3]) @ np.linalg.inv(lps[:3, :3]).T
    inside = ((back >= 1) & (back <= np.array(SHAPE) - 2)).all(-1)
    assert inside.mean() > 0.4
    assert np.abs(volume.voxels[0] - value(world))[inside].max() < 0.05
    assert volume.provenance.verdict == "repaired"


@pytest.mark.parametrize("word", ["sform", "qform"])
def test_the_form_that_a_person_believes_is_the_one_that_counts(word: str, tmp_path: Path) -> None:
    one, other = LPS_TO_RAS @ OBLIQUE, LPS_TO_RAS @ OBLIQUE
    other[:3, 3] += 5
    image = nibabel.Nifti1Image(np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE), one)
    image.set_sform(one, 1)
    image.set_qform(other, 1)
    nibabel.save(image, tmp_path / "scan.nii")
    volume = files.read(tmp_path / "scan.nii", Reading(allow=(word,)))
    np.testing.assert_allclose(volume.geometry.affine, {"sform": one, "qform": other}[word], atol=1e-4)
    assert volume.provenance.verdict == "repaired"


def test_two_slices_that_were_allowed_lie_where_they_lie(tmp_path: Path) -> None:
    folder = written(np.zeros((LAST, 3)), [3, 4], tmp_path / "series")
    volume = files.read(folder, Reading(allow=("few",)))
    error, share = wrong_inside(volume, np.zeros((LAST, 3)))
    assert error <= CLOSE and share > 0.5 and volume.geometry.shape == (48, 40, 2)
