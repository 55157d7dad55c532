"""One phantom in every pose a file can give it: read, written and segmented, every voxel stays where it is in the patient."""

from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch

from pipeline.prediction import Inference, segment_volume
from preprocessing import dicom, files
from preprocessing.plan import Label, Plan
from preprocessing.steps import Normalise, Orient, Pad, Scale
from preprocessing.volume import Geometry, Volume
from tests.reading import series
from tests.reading.phantom import LPS_TO_RAS, turn

SHAPE = (11, 8, 6)
SPACING = (1.5, 2.25, 3.125)
ORIGIN = (-13.5, 22.25, -104.0)
NIFTI_MM = 1e-3
"""Places in a NIfTI file are float32: seven digits of some hundred millimetres."""
DICOM_MM = 1e-4
ITK_MM = 1e-3


def values() -> np.ndarray:
    """No symmetry whatever: no two voxels are alike. [i j k]"""
    numbers = np.random.default_rng(2).permutation(np.prod(SHAPE)).reshape(SHAPE)
    return (numbers - 100).astype(np.int16)


UPRIGHT = np.diag([*SPACING, 1.0])
UPRIGHT[:3, 3] = ORIGIN


def stored_otherwise(order: tuple[int, ...], flips: tuple[int, ...]) -> Volume:
    """The same scan in the same place, its axes stored in another order and direction."""
    shape, affine = np.array(SHAPE), UPRIGHT.copy()
    axes = affine[:3, :3] * flips
    affine[:3, 3] += sum(affine[:3, n] * (shape[n] - 1) for n in range(3) if flips[n] < 0)
    affine[:3, :3] = axes[:, order]
    voxels = np.ascontiguousarray(values()[:: flips[0], :: flips[1], :: flips[2]].transpose(order))
    return volume(voxels, affine)


def volume(voxels: np.ndarray, affine: np.ndarray) -> Volume:
    return Volume(voxels=voxels[None], geometry=Geometry(shape=voxels.shape, affine=affine), channels=("0",))


def turned_somehow(seed: int) -> Volume:
    """Rotated about anything, mirrored in half of the cases, with other spacings, far from the origin."""
    rng = np.random.default_rng(seed)
    directions = turn(*rng.uniform(-180, 180, 3)) @ np.diag([1, 1, (-1) ** seed])
    affine = np.eye(4)
    affine[:3, :3] = directions * rng.uniform(0.4, 5, 3)
    affine[:3, 3] = rng.uniform(-500, 500, 3)
    return volume(values(), affine)


ALL_48 = {
    f"{''.join(map(str, order))}{''.join('+-'[flip < 0] for flip in flips)}": (order, flips)
    for order in permutations(range(3))
    for flips in product((1, -1), repeat=3)
}
POSES = {name: lambda pose=pose: stored_otherwise(*pose) for name, pose in ALL_48.items()}
POSES |= {f"oblique {seed}": lambda seed=seed: turned_somehow(seed) for seed in range(50)}
UPRIGHT_POSES = list(ALL_48)
EVERY_POSE = [
    pytest.param(name, marks=[pytest.mark.slow] if name not in [*ALL_48, *list(POSES)[48:60]] else []) for name in POSES
]
"""All 48 and a dozen oblique ones at every run; all 98 in the slow one."""


def difference(one: Volume, voxels: np.ndarray, affine: np.ndarray) -> float:
    """Millimetres between the grids at their corners, where every voxel of the other has the same value in the same place."""
    corners = np.array(list(product((0, 1), repeat=3))) * (np.array(one.geometry.shape) - 1)
    every = np.argwhere(np.ones(one.geometry.shape, bool))
    found = (np.c_[one.geometry.to_world(every), np.ones(len(every))] @ np.linalg.inv(affine).T)[:, :3]
    assert sorted(voxels.shape) == sorted(one.geometry.shape)
    nearest = np.rint(found).astype(int)
    assert (nearest >= 0).all() and (nearest < voxels.shape).all()
    np.testing.assert_array_equal(voxels[tuple(nearest.T)], one.voxels[0][tuple(every.T)])
    at_corners = (np.abs(found - nearest) @ np.abs(affine[:3, :3]).T)[
        np.ravel_multi_index(corners.T, one.geometry.shape)
    ]
    return float(at_corners.max())


def same(one: Volume, other: Volume) -> float:
    return difference(one, other.voxels[0], other.geometry.affine)


def by_nibabel(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nibabel.load(path)
    return np.asanyarray(image.dataobj), image.affine


def by_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = SimpleITK.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), LPS_TO_RAS @ affine


@pytest.mark.parametrize("name", EVERY_POSE)
def test_a_nifti_file_of_any_pose_is_read_as_nibabel_reads_it(name: str, tmp_path: Path) -> None:
    true = POSES[name]()
    image = nibabel.Nifti1Image(true.voxels[0], true.geometry.affine)
    image.set_sform(true.geometry.affine, 1)
    image.set_qform(true.geometry.affine, 1)
    nibabel.save(image, tmp_path / "scan.nii")
    assert same(true, files.read(tmp_path / "scan.nii")) < NIFTI_MM


@pytest.mark.parametrize("name", EVERY_POSE)
def test_what_is_written_in_any_pose_others_read_alike(name: str, tmp_path: Path) -> None:
    true = POSES[name]()
    for ending, read, within in (
        *((".nii.gz", by_nibabel, NIFTI_MM), (".nii.gz", by_itk, NIFTI_MM)),
        *((".nrrd", by_itk, ITK_MM), (".mha", by_itk, ITK_MM)),
    ):
        path = tmp_path / f"scan{ending}"
        files.write(true, path)
        assert difference(true, *read(path)) < within, (ending, read.__name__)
        assert same(true, files.read(path)) < within, ending


@pytest.mark.parametrize("name", EVERY_POSE)
def test_a_series_of_any_pose_comes_back_where_it_was(name: str, tmp_path: Path) -> None:
    true = POSES[name]()
    dicom.write_series(true, tmp_path / "series", description="pose")
    read = files.read(tmp_path / "series")
    assert same(true, read) < DICOM_MM
    assert np.linalg.det(read.geometry.affine) > 0  # right-handed: the slices along the normal of their plane
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "series"))
    image = SimpleITK.ReadImage(names)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    assert difference(true, SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), LPS_TO_RAS @ affine) < DICOM_MM


@pytest.mark.parametrize("name", EVERY_POSE)
def test_a_series_written_by_pydicom_in_any_pose_and_order_is_read_where_it_is(name: str, tmp_path: Path) -> None:
    """Left-handed grids too: they are series whose slices run against the normal, whatever their files are called."""
    true = POSES[name]()
    slices = series.ct(true.voxels[0], LPS_TO_RAS @ true.geometry.affine)
    series.change(slices, RescaleIntercept="0")
    shuffled = np.random.default_rng(len(name)).permutation(len(slices))
    series.save([slices[k] for k in shuffled], tmp_path / "series")
    assert same(true, files.read(tmp_path / "series")) < DICOM_MM


@pytest.mark.parametrize("name", EVERY_POSE)
def test_an_enhanced_object_of_any_pose_is_read_where_it_is(name: str, tmp_path: Path) -> None:
    true = POSES[name]()
    data = series.enhanced(true.voxels[0], LPS_TO_RAS @ true.geometry.affine)
    data.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0].RescaleIntercept = "0"
    (tmp_path / "scan.dcm").write_bytes(series.as_bytes(data))
    assert same(true, files.read(tmp_path / "scan.dcm")) < DICOM_MM


# Segmented: labels lie in the patient, not in the file


class BrighterThanItsLeft(torch.nn.Module):
    """Label 2 where a voxel is brighter than its neighbour to the patient's left by 50, else 1 where above 200.

    No mirror image, no other order of axes gives the same labels.
    """

    def forward(self, scan: torch.Tensor) -> torch.Tensor:
        to_the_left = torch.roll(scan, 1, dims=2)  # axis 0 of a prepared scan runs to the Right
        to_the_left[:, :, 0] = scan[:, :, 0]
        step, bright = scan - to_the_left > 50, scan > 200
        one = bright & ~step
        return 20.0 * torch.cat([~(one | step), one, step], dim=1).float()


class Bright(torch.nn.Module):
    """Label by the voxel's own value alone: every pose must agree, oblique ones too."""

    def forward(self, scan: torch.Tensor) -> torch.Tensor:
        return 20.0 * torch.cat([scan <= 100, (scan > 100) & (scan <= 300), scan > 300], dim=1).float()


PLAN = Plan(
    name="poses",
    channels=("ct",),
    labels=(Label(value=1, name="bright", colour=(230, 159, 0)), Label(value=2, name="edge", colour=(86, 180, 233))),
    steps=(Orient(), Normalise(channels=(Scale(by="dataset", low=-1000, high=1000),)), Pad(shape=(16, 16, 16))),
    spacing_mm=(1.0, 1.0, 1.0),
    patch=(16, 16, 16),
    batch=1,
    dataset="ab" * 32,
)


def segmented(scan: Volume, network: torch.nn.Module) -> Volume:
    how = Inference(overlap=0.0, flips=False, device="cpu")
    return segment_volume(scan.with_channels(("ct",)), [network], PLAN, how, "poses").labels


def in_a_file(true: Volume, folder: Path, kind: str) -> Volume:
    if kind == "nifti":
        files.write(true, folder / "scan.nii")
        return files.read(folder / "scan.nii")
    dicom.write_series(true, folder / "series", description="pose", modality="CT")
    return files.read(folder / "series")


@pytest.fixture(scope="module")
def labels_upright() -> Volume:
    found = segmented(volume(values(), UPRIGHT), BrighterThanItsLeft())
    assert set(np.unique(found.voxels)) == {0, 1, 2}
    return found


@pytest.mark.parametrize("kind", ["nifti", "dicom"])
@pytest.mark.parametrize("name", UPRIGHT_POSES)
def test_labels_are_the_same_however_the_scan_was_stored(
    name: str, kind: str, labels_upright: Volume, tmp_path: Path
) -> None:
    labels = segmented(in_a_file(POSES[name](), tmp_path, kind), BrighterThanItsLeft())
    assert same(labels_upright, labels) < NIFTI_MM
    files.write(labels, tmp_path / "labels.nii.gz", is_labels=True)
    assert difference(labels_upright, *by_nibabel(tmp_path / "labels.nii.gz")) < NIFTI_MM


@pytest.mark.parametrize("kind", ["nifti", "dicom"])
@pytest.mark.parametrize("name", EVERY_POSE)
def test_every_label_lies_where_its_voxel_lies(name: str, kind: str, tmp_path: Path) -> None:
    true = POSES[name]()
    labels = segmented(in_a_file(true, tmp_path, kind), Bright())
    wanted = np.digitize(true.voxels[0], [101, 301]).astype(labels.voxels.dtype)
    assert same(volume(wanted, true.geometry.affine), labels) < NIFTI_MM
    files.write(labels, tmp_path / "labels.nii.gz", is_labels=True)
    assert difference(volume(wanted, true.geometry.affine), *by_itk(tmp_path / "labels.nii.gz")) < NIFTI_MM
