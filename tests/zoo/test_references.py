"""Real scans, read here and by somebody else: the same voxels at the same places."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.uid import generate_uid

from preprocessing import dicom, files
from preprocessing.volume import Volume

CLOSE_MM = 1e-4


def volumes_in(folder: Path) -> list[Volume]:
    """Every volume of every series below the folder, in a steady order."""
    series, _ = dicom.series_in(sorted(path for path in folder.rglob("*") if path.is_file()))
    return [dicom.read(one) for one in series]


def only(volumes: Sequence[Volume]) -> Volume:
    assert len(volumes) == 1, [str(volume.geometry) for volume in volumes]
    return volumes[0]


def canonical(image: nibabel.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    turned = nibabel.as_closest_canonical(image)
    return np.asarray(turned.dataobj), turned.affine


def assert_same_in_the_patient(volume: Volume, values: np.ndarray, affine: np.ndarray, tolerance: float = 0) -> None:
    ours, our_affine = canonical(nibabel.Nifti1Image(volume.voxels[0].astype(np.float64), volume.geometry.affine))
    theirs, their_affine = canonical(nibabel.Nifti1Image(values.astype(np.float64), affine))
    assert ours.shape == theirs.shape
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(ours.shape) - 1)
    apart = nibabel.affines.apply_affine(our_affine, corners) - nibabel.affines.apply_affine(their_affine, corners)
    assert np.abs(apart).max() <= CLOSE_MM
    assert np.abs(ours - theirs).max() <= tolerance


@pytest.mark.parametrize(
    "folder, truth",
    [
        ("dicom_d2n_generic_anatomical_001", "67bc44_001_ground_truth.nii.gz"),
        ("dicom_d2n_generic_anatomical_002_non_isotropic", "002_non_isotropic_ground_truth.nii.gz"),
        ("dicom_d2n_hitachi_anatomical_001", "bca91b_001_ground_truth.nii.gz"),
        ("dicom_d2n_philips_enhanced_anatomical_001", "8bdba4_001_ground_truth.nii.gz"),
    ],
)
def test_a_series_is_what_another_converter_made_of_it(shared: Path, folder: str, truth: str) -> None:
    zoo = shared / "data" / "zoo"
    image = nibabel.load(zoo / "dicom_d2n_ground_truth_nifti" / truth)
    values = np.asarray(image.dataobj)
    volume = only(volumes_in(zoo / folder))
    scale = max(1.0, float(np.abs(values).max()))
    assert_same_in_the_patient(volume, values.reshape(values.shape[:3]), image.affine, tolerance=1e-6 * scale)


def test_the_time_points_of_one_series_are_those_of_another_converter(shared: Path) -> None:
    zoo = shared / "data" / "zoo"
    image = nibabel.load(zoo / "dicom_d2n_ground_truth_nifti" / "001_ground_truth.nii.gz")
    values = np.asarray(image.dataobj)
    volumes = volumes_in(zoo / "dicom_d2n_ge_fmri_001")
    assert len(volumes) == values.shape[3] == 2
    for time, volume in enumerate(volumes):
        assert_same_in_the_patient(volume, values[..., time], image.affine)


@pytest.mark.parametrize("modality", ["CT", "MR_T1"])
def test_the_soft_tissue_patient_is_as_the_standardisation_initiative_has_it(shared: Path, modality: str) -> None:
    zoo = shared / "data" / "zoo"
    image = nibabel.load(zoo / "dicom_ibsi_STS019_nifti_reference" / f"{modality}_image.nii.gz")
    volume = only(volumes_in(zoo / f"dicom_ibsi_STS019_{modality}"))
    assert_same_in_the_patient(volume, np.asarray(image.dataobj), image.affine, tolerance=1e-3)


@pytest.mark.parametrize("name", ["1.dcm", "2.dcm", "3.dcm", "4.dcm", "5.dcm", "7.dcm", "9.dcm"])
def test_a_mosaic_is_untiled_as_another_converter_untiles_it(shared: Path, tmp_path: Path, name: str) -> None:
    folder = shared / "data" / "zoo" / "dicom_mosaic_siemens_transfer_syntaxes"
    shutil.copy(folder / name, tmp_path / name)
    image = nibabel.load(folder / "1.nii")
    assert_same_in_the_patient(only(volumes_in(tmp_path)), np.asarray(image.dataobj), image.affine)


def test_an_enhanced_ct_agrees_with_the_classic_slice_it_was_made_of(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "zoo" / "dicom_enhanced_ct_vs_classic"
    classic = pydicom.dcmread(folder / "slice1.dcm")
    values = classic.pixel_array * float(classic.RescaleSlope) + float(classic.RescaleIntercept)
    shutil.copy(folder / "volume.dcm", tmp_path)
    volume = only(volumes_in(tmp_path))
    place = np.array([-1, -1, 1]) * np.array(classic.ImagePositionPatient, float)
    i, j, k = volume.geometry.to_voxel(place)
    assert np.abs([i, j, k - round(k)]).max() <= CLOSE_MM
    assert np.array_equal(volume.voxels[0, :, :, round(k)], values.T)


def test_a_legacy_converted_ct_agrees_with_its_classic_slices(shared: Path) -> None:
    folder = shared / "data" / "zoo" / "dicom_seg_dcmqi" / "24x38x3"
    classic, enhanced = only(volumes_in(folder / "image")), only(volumes_in(folder / "multiframe"))
    assert_same_in_the_patient(enhanced, classic.voxels[0], classic.geometry.affine)


def test_an_enhanced_series_survives_its_rewriting_by_an_archive(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "zoo" / "dicom_enhanced_agfa_rewritten"
    read = []
    for name in ("Siemens_011-0001.img", "Agfa_011-0001.img"):
        (tmp_path / name[:4]).mkdir()
        shutil.copy(folder / name, tmp_path / name[:4])
        read.append(only(volumes_in(tmp_path / name[:4])))
    assert_same_in_the_patient(read[1], read[0].voxels[0], read[0].geometry.affine)


def test_time_points_in_enhanced_files_are_those_in_classic_files(shared: Path) -> None:
    folder = shared / "data" / "zoo" / "dicom_ct_4d_toshiba"
    classic, enhanced = volumes_in(folder / "dicom_4d"), volumes_in(folder / "dicom_4d_enhanced")
    assert len(classic) == len(enhanced) == 19
    for volume in enhanced:
        twins = [one for one in classic if np.array_equal(one.voxels, volume.voxels)]
        assert twins, "an enhanced time point is none of the classic ones"
        assert_same_in_the_patient(volume, twins[0].voxels[0], twins[0].geometry.affine)


LOSSLESS = {
    "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90",
}  # fmt: skip
LOSS_HU = {
    "1.2.840.10008.1.2.4.50": 65, "1.2.840.10008.1.2.4.51": 36, "1.2.840.10008.1.2.4.53": 36,
    "1.2.840.10008.1.2.4.55": 36, "1.2.840.10008.1.2.4.81": 1, "1.2.840.10008.1.2.4.91": 5,
}  # fmt: skip
"""What each lossy encoding cost, measured with two other decoders: 8 bits of 16 leave steps of 32 HU."""


def test_sixteen_encodings_of_one_slice_give_one_array(shared: Path, tmp_path: Path) -> None:
    """Three copies of each, placed one above the other, as one slice is no volume; the packed pixels are not touched."""
    paths = sorted((shared / "data" / "zoo" / "dicom_ct_all_transfer_syntaxes").glob("*.dcm"))
    assert len(paths) == 16
    truth, seen = None, set()
    for number, path in enumerate(paths):
        data = pydicom.dcmread(path)
        syntax = str(data.file_meta.TransferSyntaxUID)
        data.SeriesInstanceUID = generate_uid()
        for k in range(3):
            data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            data.ImagePositionPatient = [-161.399994, -148.800003, 4.7 + 5 * k]
            (tmp_path / str(number)).mkdir(exist_ok=True)
            data.save_as(tmp_path / str(number) / f"{k}.dcm")
        volume = only(volumes_in(tmp_path / str(number)))
        assert volume.voxels.shape == (1, 512, 512, 3)
        truth = volume.voxels.astype(float) if truth is None else truth
        off = float(np.abs(volume.voxels - truth).max())
        assert off <= (0 if syntax in LOSSLESS else LOSS_HU[syntax]), (path.name, off)
        noted = any("loss" in note for note in volume.provenance.notes)
        assert noted == (syntax in LOSS_HU), path.name
        seen.add(syntax)
    assert seen == LOSSLESS | set(LOSS_HU)


def classic_series(folder: Path) -> list[dicom.Series]:
    series, _ = dicom.series_in(sorted(path for path in folder.rglob("*") if path.is_file()))
    return [one for one in series if len(one.paths) > 2]


@pytest.mark.parametrize(
    "folder",
    [
        "dicom_d2n_hitachi_anatomical_001", "dicom_fragmented_jpegll", "dicom_ibsi_STS019_CT", "dicom_mr_canon_dti",
        "dicom_mr_siemens_HFS", "dicom_mr_multiecho_one_series", "dicom_ct_siemens_j2k", "dicom_d2n_ge_dti_001",
        "dicom_d2n_generic_compressed_j2k_001", "dicom_d2n_generic_compressed_jpeg_001",
        "dicom_d2n_generic_compressed_jpegls_001", "dicom_d2n_generic_compressed_rle_001",
    ],
)  # fmt: skip
def test_every_classic_series_is_read_as_simpleitk_reads_its_slices(shared: Path, folder: str) -> None:
    """SimpleITK is given the slices in our order: it must find the same values on the same grid."""
    compared = 0
    for series in classic_series(shared / "data" / "zoo" / folder):
        volume = dicom.read(series)
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames([path for path, _ in volume.provenance.slices])
        image = reader.Execute()
        affine = np.eye(4)
        affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
        affine[:3, 3] = image.GetOrigin()
        values = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)
        assert_same_in_the_patient(volume, values, np.diag([-1, -1, 1, 1]) @ affine, tolerance=1e-3)
        compared += 1
    assert compared


def test_a_nifti_file_is_read_as_nibabel_reads_it(shared: Path) -> None:
    compared = 0
    for path in sorted((shared / "data" / "zoo").rglob("*.nii*")):
        image = nibabel.load(path)
        values = np.asarray(image.dataobj)
        volume = files.read(path)
        assert np.abs(volume.geometry.affine - image.affine).max() <= 1e-5
        shown = values.reshape(*values.shape[:3], -1).transpose(3, 0, 1, 2)
        assert np.allclose(volume.voxels, shown, rtol=1e-6, atol=0)
        compared += 1
    assert compared >= 15
