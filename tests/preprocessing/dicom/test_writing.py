"""What is written as a DICOM series is read again, by us and by others."""

import shutil
import subprocess
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from preprocessing import dicom
from preprocessing.volume import Geometry, ScanError, Volume
from tests.preprocessing.dicom.slices import (
    LPS_TO_RAS,
    SHAPE,
    a_volume,
    an_affine,
    as_simpleitk_reads,
    read_one,
    turned,
)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_all_axis_orders_and_flips_survive_a_series(order: tuple[int, ...], tmp_path: Path) -> None:
    for number, signs in enumerate(product((1, -1), repeat=3)):
        direction = np.eye(3)[:, order] * np.array(signs)
        volume = a_volume(affine=an_affine(turned((1, 2, 3), 0.2) @ direction, (0.7, 0.9, 2.5)))
        folder = tmp_path / str(number)
        dicom.write_series(volume, folder, description="axes")
        assert_same_in_the_patient(read_one(folder), volume)


def assert_same_in_the_patient(found: Volume, wanted: Volume, tolerance: float = 0) -> None:
    voxels, affine = wanted.voxels, wanted.geometry.affine
    if np.linalg.det(affine @ LPS_TO_RAS) < 0:  # left-handed: the slices come back in the opposite order
        last = np.eye(4)
        last[2, 2:] = [-1, voxels.shape[3] - 1]
        voxels, affine = voxels[..., ::-1], affine @ last
    np.testing.assert_allclose(found.geometry.affine, affine, atol=1e-4)
    np.testing.assert_allclose(found.voxels.astype(float), voxels, rtol=3e-7, atol=tolerance)


@settings(max_examples=25, deadline=None)
@given(
    voxels=arrays.arrays(
        st.sampled_from([np.float32, np.int16, np.uint16, np.uint8, np.int32, np.float64]),
        (2, 3, 3),
        elements={"min_value": 0, "max_value": 255},
    ),
    axis=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda axis: np.linalg.norm(axis) > 0.1),
    angle=st.floats(-3.1, 3.1),
    spacing=st.tuples(*[st.floats(0.05, 12)] * 3),
    origin=st.tuples(*[st.floats(-1500, 1500)] * 3),
)
def test_a_series_keeps_values_within_half_a_step_and_the_affine(
    voxels: np.ndarray,
    axis: tuple[float, ...],
    angle: float,
    spacing: tuple[float, ...],
    origin: tuple[float, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    geometry = Geometry(shape=voxels.shape, affine=an_affine(turned(axis, angle), spacing, origin))
    volume = Volume(voxels=voxels[None], geometry=geometry, channels=("0",))
    folder = tmp_path_factory.mktemp("series")
    dicom.write_series(volume, folder, description="values")
    found = read_one(folder)
    slope = float(pydicom.dcmread(folder / "0001.dcm").RescaleSlope)
    assert_same_in_the_patient(found, volume, tolerance=slope / 2 if found.voxels.dtype.kind == "f" else 0)
    assert voxels.dtype.kind == "f" or found.voxels.dtype.kind == "i"


@pytest.mark.parametrize(
    "values",
    [[0, 65535], [-70000, -10000], [1e-7, 3e-7], [-2e9, 2e9], [5.5, 5.5], [-0.1, 40000.3], [2**30, 2**30 + 7]],
)
def test_any_range_of_values_fits_into_sixteen_bits(values: list[float], tmp_path: Path) -> None:
    voxels = np.linspace(*values, num=int(np.prod(SHAPE)), dtype=np.float32).reshape(1, *SHAPE)
    volume = a_volume().with_voxels(voxels)
    dicom.write_series(volume, tmp_path / "s", description="range")
    slope = float(pydicom.dcmread(tmp_path / "s" / "0001.dcm").RescaleSlope)
    assert_same_in_the_patient(read_one(tmp_path / "s"), volume, tolerance=slope / 2)


@pytest.mark.parametrize("spacing", [9.999999999999998, 1 / 3, 0.1 / 7])
def test_a_spacing_of_many_digits_is_spelt_in_sixteen_characters(spacing: float, tmp_path: Path) -> None:
    affine = an_affine(turned((1, 0, 1), 2.0), (spacing, spacing, spacing), origin=(-1 / 3, 2e-16, -1e-17))
    dicom.write_series(a_volume(affine=affine), tmp_path, description="digits")
    np.testing.assert_allclose(read_one(tmp_path).geometry.affine, affine, atol=1e-9)


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_simpleitk_reads_what_we_write(modality: str, tmp_path: Path) -> None:
    volume = a_volume(affine=an_affine(turned((3, -1, 2), 0.5), (0.5, 0.8, 3)))
    dicom.write_series(volume, tmp_path, description="oblique", modality=modality)
    voxels, affine = as_simpleitk_reads(tmp_path)
    np.testing.assert_array_equal(voxels, volume.voxels[0])
    np.testing.assert_allclose(affine, volume.geometry.affine, atol=1e-4)


def test_the_same_volume_makes_the_same_files_and_another_makes_other_uids(tmp_path: Path) -> None:
    one = dicom.write_series(a_volume(), tmp_path / "one", description="x", study="case 1")
    two = dicom.write_series(a_volume(), tmp_path / "two", description="x", study="case 1")
    other = dicom.write_series(a_volume(1), tmp_path / "other", description="x", study="case 1")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    first, second = pydicom.dcmread(one[0]), pydicom.dcmread(other[0])
    assert first.SeriesInstanceUID != second.SeriesInstanceUID and first.SOPInstanceUID != second.SOPInstanceUID
    assert first.StudyInstanceUID == second.StudyInstanceUID
    assert first.FrameOfReferenceUID == second.FrameOfReferenceUID


@pytest.mark.parametrize("tool", ["dcmdump", "dciodvfy"])
@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_tools_for_dicom_find_nothing_wrong(tool: str, modality: str, tmp_path: Path) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    path = dicom.write_series(a_volume(), tmp_path, description="valid", modality=modality)[0]
    done = subprocess.run([tool, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert not [
        line for line in (done.stderr + done.stdout).splitlines() if line.lower().startswith(("e:", "w:", "error"))
    ]


@pytest.mark.parametrize(
    "volume",
    [
        a_volume().with_voxels(np.zeros((2, *SHAPE)), channels=("a", "b")),
        a_volume(affine=an_affine(np.array([[1, 0.2, 0], [0, 1, 0], [0, 0, 1]]), (1, 1, 1))),
        a_volume().with_voxels(np.full((1, *SHAPE), np.nan)),
    ],
)
def test_what_a_series_cannot_hold_is_not_written(volume: Volume, tmp_path: Path) -> None:
    with pytest.raises(ScanError):
        dicom.write_series(volume, tmp_path, description="no")
    with pytest.raises(ScanError, match="modality"):
        dicom.write_series(a_volume(), tmp_path, description="no", modality="US")
    assert not list(tmp_path.iterdir())
