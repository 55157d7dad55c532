"""Damage done to DICOM series: every case of the folder that a hospital sends, and every lie a header can tell."""

from functools import partial
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    LegacyConvertedEnhancedCTImageStorage,
    RLELossless,
)

from . import series
from .kinds import FINE, REFUSED, REPAIRED, Made, kind
from .phantom import OBLIQUE, SHAPE, SPACING, Seen, lps_affine, stored_values, truth, turn
from .series import anything_goes, as_bytes, change, ct, enhanced, item, pack, pixels, save, set_pixels, text

dicom = partial(kind, "DICOM")
LAST = SHAPE[2]
MIDDLE = 11
NORMAL = OBLIQUE[:3, 2] / SPACING[2]


def moved(slices: list[Dataset], shifts_mm: np.ndarray) -> list[Dataset]:
    """The slices with their positions shifted by so many millimetres [slice xyz]."""
    for k, (data, shift) in enumerate(zip(slices, shifts_mm, strict=True)):
        data.ImagePositionPatient = text((OBLIQUE @ [0, 0, k, 1])[:3] + shift)
    return slices


def without(slices: list[Dataset], *numbers: int) -> list[Dataset]:
    return [data for k, data in enumerate(slices) if k not in numbers]


def one_file(data: bytes, folder: Path, name: str) -> None:
    (folder / name).write_bytes(data)


# What is right, in every shape in which it comes


@dicom(FINE)
def control(folder: Path) -> Made:
    save(ct(), folder)
    return Made(folder, (truth(),))


@dicom(FINE)
def shuffled_numbers_and_names(folder: Path) -> Made:
    order = np.random.default_rng(3).permutation(LAST)
    slices = [ct()[k] for k in order]
    for number, data in zip(np.random.default_rng(4).permutation(LAST) + 1, slices, strict=True):
        data.InstanceNumber = str(number)
    save(slices, folder)
    return Made(folder, (truth(),))


@dicom(FINE)
def axial_and_square(folder: Path) -> Made:
    lps = lps_affine(np.eye(3), (1.5, 1.5, 2.0))
    save(ct(lps=lps), folder)
    return Made(folder, (truth(lps=lps),))


@dicom(FINE)
def descending(folder: Path) -> Made:
    save(ct()[::-1], folder)
    return Made(folder, (truth(),))


@dicom(FINE)
def flipped_column_direction(folder: Path) -> Made:
    lps = lps_affine(turn(11, -7, 23) @ np.diag([1.0, -1.0, -1.0]))
    save(ct(lps=lps), folder)
    return Made(folder, (truth(lps=lps),))


@dicom(FINE)
def slices_stacked_against_the_normal(folder: Path) -> Made:
    lps = lps_affine(turn(11, -7, 23) @ np.diag([1.0, 1.0, -1.0]))
    save(ct(lps=lps), folder)
    return Made(folder, (truth(lps=lps),))


@dicom(FINE)
def sagittal_far_from_the_origin(folder: Path) -> Made:
    lps = lps_affine(np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]), (0.8, 1.25, 2.0), (-1234.5, 987.25, 2045.125))
    save(ct(lps=lps), folder)
    return Made(folder, (truth(lps=lps),))


@dicom(FINE)
def jitter_of_4_micrometres(folder: Path) -> Made:
    save(moved(ct(), np.random.default_rng(5).uniform(-0.004, 0.004, (LAST, 1)) * NORMAL), folder)
    return Made(folder, (truth(),))


@dicom(FINE)
def wrong_slice_thickness_spacing_and_location(folder: Path) -> Made:
    slices = change(ct(), SliceThickness="7.5", SpacingBetweenSlices="0.4")
    for k, data in enumerate(slices):
        data.SliceLocation = text([100 - 9.0 * ((k * 7) % LAST)])[0]
    save(slices, folder)
    return Made(folder, (truth(),))


@dicom(FINE)
def empty_type_2_elements(folder: Path) -> Made:
    names = ("SeriesNumber", "AcquisitionNumber", "SliceThickness", "InstanceNumber", "AcquisitionTime", "StudyID")
    save(change(ct(), **dict.fromkeys(names, "")), folder)
    return Made(folder, (truth(),))


@dicom(FINE, REPAIRED)
def empty_class_and_instance_uids(folder: Path) -> Made:
    folder.mkdir(parents=True)
    for k, data in enumerate(ct()):
        uid = data.SOPInstanceUID
        data.SOPClassUID = data.SOPInstanceUID = data.StudyInstanceUID = data.SeriesNumber = ""
        one_file(as_bytes(data, MediaStorageSOPInstanceUID=uid), folder, f"{k}.dcm")
    return Made(folder, (truth(),))


@dicom(FINE, REPAIRED)
def no_ending_no_preamble_no_meta(folder: Path) -> Made:
    folder.mkdir(parents=True)
    for k, data in enumerate(ct()):
        with anything_goes():
            pydicom.dcmwrite(folder / f"IM{k}", data, implicit_vr=True, little_endian=True)
    return Made(folder, (truth(),))


@dicom(FINE, REPAIRED)
def no_preamble_but_meta(folder: Path) -> Made:
    folder.mkdir(parents=True)
    for k, data in enumerate(ct()):
        one_file(as_bytes(data)[132:], folder, f"IM{k}")
    return Made(folder, (truth(),))


def in_syntax(syntax: str, folder: Path) -> Made:
    save([pack(data, syntax) for data in ct()] if UID(syntax).is_encapsulated else ct(), folder, syntax=syntax)
    return Made(folder, (truth(),))


@dicom(FINE)
def implicit_little_endian(folder: Path) -> Made:
    return in_syntax(ImplicitVRLittleEndian, folder)


@dicom(FINE)
def explicit_big_endian(folder: Path) -> Made:
    slices = ct()
    for data in slices:
        data.PixelData = np.frombuffer(data.PixelData, "<i2").astype(">i2").tobytes()
    save(slices, folder, syntax=ExplicitVRBigEndian)
    return Made(folder, (truth(),))


@dicom(FINE)
def deflated(folder: Path) -> Made:
    return in_syntax(series.DEFLATED, folder)


@dicom(FINE)
def jpeg_2000(folder: Path) -> Made:
    return in_syntax(JPEG2000Lossless, folder)


@dicom(FINE)
def jpeg_ls(folder: Path) -> Made:
    return in_syntax(JPEGLSLossless, folder)


@dicom(FINE)
def rle(folder: Path) -> Made:
    return in_syntax(RLELossless, folder)


@dicom(FINE)
def lossy_ratio_declared_without_loss(folder: Path) -> Made:
    save(change(ct(), LossyImageCompression="01", LossyImageCompressionRatio="4"), folder)
    return Made(folder, (truth(),))


@dicom(FINE)
def enhanced_multi_frame(folder: Path) -> Made:
    folder.mkdir(parents=True)
    one_file(as_bytes(enhanced()), folder, "enhanced.dcm")
    return Made(folder, (truth(),))


@dicom(FINE)
def legacy_converted_enhanced(folder: Path) -> Made:
    folder.mkdir(parents=True)
    one_file(as_bytes(enhanced(sop_class=LegacyConvertedEnhancedCTImageStorage)), folder, "enhanced.dcm")
    return Made(folder, (truth(),))


@dicom(FINE)
def enhanced_frames_out_of_order(folder: Path) -> Made:
    order = np.random.default_rng(6).permutation(LAST)
    data = enhanced()
    set_pixels(data, stored_values()[:, :, order])
    groups = data.PerFrameFunctionalGroupsSequence
    data.PerFrameFunctionalGroupsSequence = pydicom.Sequence([groups[int(k)] for k in order])
    folder.mkdir(parents=True)
    one_file(as_bytes(data), folder, "enhanced.dcm")
    return Made(folder, (truth(),))


@dicom(FINE)
def enhanced_rescale_per_frame(folder: Path) -> Made:
    data, values = enhanced(), stored_values().astype(np.int64)
    del data.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    for k, group in enumerate(data.PerFrameFunctionalGroupsSequence):
        group.PixelValueTransformationSequence = item(
            RescaleIntercept=str(-1024 - 10 * k), RescaleSlope=str(1 + k % 3), RescaleType="HU"
        )
    folder.mkdir(parents=True)
    one_file(as_bytes(data), folder, "enhanced.dcm")
    k = np.arange(LAST)
    return Made(folder, (Seen(values * (1.0 + k % 3) - 1024 - 10 * k, truth().affine),))


@dicom(FINE)
def enhanced_packed_in_jpeg_2000(folder: Path) -> Made:
    data = series.set_codestreams(
        enhanced(), [series.codestream(plane, JPEG2000Lossless) for plane in np.moveaxis(stored_values(), 2, 0)]
    )
    folder.mkdir(parents=True)
    one_file(as_bytes(data, JPEG2000Lossless), folder, "enhanced.dcm")
    return Made(folder, (truth(),))


# Values


@dicom(FINE)
def slope_per_slice(folder: Path) -> Made:
    slices, values = ct(), stored_values().astype(np.float64)
    for k, data in enumerate(slices):
        data.RescaleSlope, data.RescaleIntercept = text([0.25 + 0.013 * k])[0], "0"
        values[:, :, k] *= 0.25 + 0.013 * k
    save(slices, folder)
    return Made(folder, (Seen(values, truth().affine),))


@dicom(FINE)
def first_slope_whole_the_others_not(folder: Path) -> Made:
    slices, values = ct(), stored_values().astype(np.float64)
    for k, data in enumerate(slices):
        data.RescaleSlope, data.RescaleIntercept = ("1" if k == 0 else "0.0123"), "0"
        values[:, :, k] *= 1 if k == 0 else 0.0123
    save(slices, folder)
    return Made(folder, (Seen(values, truth().affine, within=0.01),))


@dicom(FINE)
def other_intercept_in_one_slice(folder: Path) -> Made:
    slices, true = ct(), truth()
    slices[MIDDLE].RescaleIntercept = "-2000"
    true.voxels[:, :, MIDDLE] += 1024 - 2000
    save(slices, folder)
    return Made(folder, (true,))


@dicom(REFUSED, reasons=("values",))
def slope_of_zero(folder: Path) -> Made:
    save(change(ct(), RescaleSlope="0"), folder)
    return Made(folder)


@dicom(REFUSED)
def slope_that_is_no_number(folder: Path) -> Made:
    slices = ct()
    with anything_goes():
        change(slices[5:6], RescaleSlope="1")
        slices[5]["RescaleSlope"]._value = "nan"
        save(slices, folder)
    return Made(folder)


@dicom(REFUSED)
def two_slopes(folder: Path) -> Made:
    save(change(ct(), RescaleSlope=["1", "2"]), folder)
    return Made(folder)


@dicom(REFUSED)
def slope_in_one_slice_alone(folder: Path) -> Made:
    """A CT of which one slice lost its rescale: values 1024 higher there than they can be meant."""
    slices = ct()
    change(slices[MIDDLE : MIDDLE + 1], RescaleSlope=None, RescaleIntercept=None, RescaleType=None)
    save(slices, folder)
    return Made(folder)


@dicom(FINE)
def monochrome_1(folder: Path) -> Made:
    save(change(ct(), PhotometricInterpretation="MONOCHROME1"), folder)
    return Made(folder, (truth(),))


@dicom(FINE, REPAIRED)
def padding_declared(folder: Path) -> Made:
    values, true = stored_values(), truth()
    unsure = np.zeros(SHAPE, bool)
    unsure[:6] = True
    values[:6] = -2000
    slices = ct(values)
    for data in slices:
        data.add_new("PixelPaddingValue", "SS", -2000)
    save(slices, folder)
    return Made(folder, (Seen(true.voxels, true.affine, unsure),))


@dicom(FINE, REPAIRED)
def bits_above_bits_stored(folder: Path) -> Made:
    rng, slices = np.random.default_rng(7), ct()
    for data in slices:
        data.BitsStored, data.HighBit, data.PixelRepresentation = 12, 11, 0
        plane = pixels(data)
        set_pixels(data, plane | (rng.integers(0, 16, plane.shape) << 12).astype(np.uint16).astype(np.int16))
    save(slices, folder)
    return Made(folder, (truth(),))


@dicom(REFUSED, reasons=("contradiction", "encoding", "values"))
def more_bits_stored_than_allocated(folder: Path) -> Made:
    save(change(ct(), BitsStored=20, HighBit=19), folder)
    return Made(folder, (truth(),))


@dicom(FINE, REPAIRED, REFUSED)
def signed_and_unsigned_slices(folder: Path) -> Made:
    slices = ct()
    change(slices[::2], PixelRepresentation=0)
    save(slices, folder)
    return Made(folder, (truth(),))


@dicom(REFUSED, reasons=("colour",))
def coloured(folder: Path) -> Made:
    slices, values = ct(), (stored_values() // 16).astype(np.uint8)
    for k, data in enumerate(slices):
        _colour(data, values[:, :, k])
    save(slices, folder)
    return Made(folder, (Seen(np.repeat(values[..., None], 3, axis=-1), truth().affine),))


def _colour(data: Dataset, plane: np.ndarray) -> None:
    change([data], SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0, BitsAllocated=8,
           BitsStored=8, HighBit=7, PixelRepresentation=0, RescaleSlope=None, RescaleIntercept=None)  # fmt: skip
    data.PixelData = np.repeat(plane.T[..., None], 3, axis=-1).astype(np.uint8).tobytes()
    data["PixelData"].VR = "OB"


@dicom(REFUSED)
def one_slice_coloured(folder: Path) -> Made:
    slices = ct()
    _colour(slices[MIDDLE], (stored_values()[:, :, MIDDLE] // 16).astype(np.uint8))
    save(slices, folder)
    return Made(folder)


# Slices missing, doubled, moved


@dicom(FINE, unknowable="the rest is a whole scan of fewer slices; nothing in it says how many there were")
def first_slice_missing(folder: Path) -> Made:
    save(ct()[1:], folder)
    return Made(folder, (truth(first=1),))


@dicom(REFUSED, reasons=("missing_slices",))
def middle_slice_missing(folder: Path) -> Made:
    save(without(ct(), MIDDLE), folder)
    return Made(folder)


@dicom(REFUSED, reasons=("missing_slices",))
def three_neighbouring_slices_missing(folder: Path) -> Made:
    save(without(ct(), 9, 10, 11), folder)
    return Made(folder)


@dicom(REFUSED, reasons=("missing_slices", "uneven_spacing"))
def second_slice_missing(folder: Path) -> Made:
    save(without(ct(), 1), folder)
    return Made(folder)


@dicom(FINE, unknowable="even slices alone are a whole scan of twice the distance (SliceThickness says nothing of it)")
def every_other_slice_missing(folder: Path) -> Made:
    save(ct()[::2], folder)
    true = truth()
    affine = true.affine.copy()
    affine[:3, 2] *= 2
    return Made(folder, (Seen(true.voxels[:, :, ::2], affine),))


@dicom(FINE, unknowable="the rest is a whole scan of fewer slices; nothing in it says how many there were")
def last_slice_missing(folder: Path) -> Made:
    save(ct()[:-1], folder)
    return Made(folder, (truth(last=LAST - 1),))


@dicom(REPAIRED, REFUSED)
def a_slice_twice_under_another_uid(folder: Path) -> Made:
    slices = ct()
    save([*slices, *change([ct()[MIDDLE]], SOPInstanceUID=f"{series.ROOT}.1.99", InstanceNumber="99")], folder)
    return Made(folder, (truth(),))


@dicom(REFUSED, reasons=("duplicate_slices", "mixed", "contradiction"))
def two_different_slices_at_one_place(folder: Path) -> Made:
    other = ct(stored_values(9))[MIDDLE]
    other.SOPInstanceUID, other.InstanceNumber = f"{series.ROOT}.1.99", "99"
    save([*ct(), other], folder)
    return Made(folder)


@dicom(FINE, REPAIRED)
def a_file_twice(folder: Path) -> Made:
    save([*ct(), ct()[MIDDLE]], folder)
    return Made(folder, (truth(),))


@dicom(REFUSED)
def one_uid_with_two_contents(folder: Path) -> Made:
    save([*ct(), ct(stored_values(9))[MIDDLE]], folder)
    return Made(folder)


@dicom(REFUSED)
def one_uid_at_two_places(folder: Path) -> Made:
    slices = ct()
    slices[7].SOPInstanceUID = slices[8].SOPInstanceUID
    save(slices, folder)
    return Made(folder)


@dicom(FINE, unknowable="every position is taken once; which slice belongs where is told by the positions alone")
def two_slices_with_exchanged_positions(folder: Path) -> Made:
    slices = ct()
    a, b = slices[6], slices[15]
    a.ImagePositionPatient, b.ImagePositionPatient = b.ImagePositionPatient, a.ImagePositionPatient
    save(slices, folder)
    return Made(folder, (truth(),))


@dicom(FINE, unknowable="both orders of two numbers are possible pixels")
def pixel_spacing_in_the_wrong_order(folder: Path) -> Made:
    save(change(ct(), PixelSpacing=text([SPACING[0], SPACING[1]])), folder)
    return Made(folder, (truth(),))


@dicom(FINE, unknowable="another patient's orientation is as good as this one's")
def mirrored_orientation(folder: Path) -> Made:
    slices = ct()
    for data in slices:
        row = [float(x) for x in data.ImageOrientationPatient]
        data.ImageOrientationPatient = text([-x for x in row[:3]] + row[3:])
    save(slices, folder)
    return Made(folder, (truth(),))


@dicom(REFUSED, reasons=("tilted",))
def gantry_tilted_by_15_degrees(folder: Path) -> Made:
    rise = np.tan(np.radians(15)) * SPACING[2] * np.arange(LAST)[:, None]
    save(moved(ct(), rise * OBLIQUE[:3, 1] / SPACING[1]), folder)
    lps = OBLIQUE.copy()
    lps[:3, 2] += np.tan(np.radians(15)) * SPACING[2] * OBLIQUE[:3, 1] / SPACING[1]
    return Made(folder, (truth(lps=lps),))


@dicom(REFUSED)
def slices_shifted_sideways_by_1_mm(folder: Path) -> Made:
    aside = np.where(np.arange(LAST) % 2, 1.0, 0.0)[:, None] * OBLIQUE[:3, 0] / SPACING[0]
    save(moved(ct(), aside), folder)
    return Made(folder)


@dicom(REFUSED)
def one_slice_shifted_sideways_by_3_mm(folder: Path) -> Made:
    shifts = np.zeros((LAST, 3))
    shifts[MIDDLE] = 3 * OBLIQUE[:3, 0] / SPACING[0]
    save(moved(ct(), shifts), folder)
    return Made(folder)


@dicom(REFUSED, reasons=("uneven_spacing", "missing_slices"))
def spacing_doubles_half_way(folder: Path) -> Made:
    save(moved(ct(), np.maximum(np.arange(LAST) - 12, 0)[:, None] * SPACING[2] * NORMAL), folder)
    return Made(folder)


@dicom(REFUSED, reasons=("uneven_spacing", "missing_slices"))
def spacing_grows_slowly(folder: Path) -> Made:
    save(moved(ct(), 0.01 * np.arange(LAST)[:, None] ** 2 * NORMAL), folder)
    return Made(folder)


@dicom(REFUSED, reasons=("uneven_spacing",))
def jitter_of_half_a_millimetre(folder: Path) -> Made:
    save(moved(ct(), np.random.default_rng(8).uniform(-0.5, 0.5, (LAST, 1)) * NORMAL), folder)
    return Made(folder)


@dicom(REFUSED, reasons=("no_geometry",))
def no_positions(folder: Path) -> Made:
    save(change(ct(), ImagePositionPatient=None), folder)
    return Made(folder)


@dicom(REFUSED)
def one_slice_without_position(folder: Path) -> Made:
    slices = ct()
    del slices[MIDDLE].ImagePositionPatient
    save(slices, folder)
    return Made(folder)


@dicom(REFUSED, reasons=("no_geometry",))
def no_orientations(folder: Path) -> Made:
    save(change(ct(), ImageOrientationPatient=None), folder)
    return Made(folder)


@dicom(REFUSED, reasons=("no_geometry",))
def no_pixel_spacing(folder: Path) -> Made:
    save(change(ct(), PixelSpacing=None), folder)
    return Made(folder)


@dicom(REFUSED, reasons=("no_geometry", "contradiction"))
def pixel_spacing_of_zero(folder: Path) -> Made:
    save(change(ct(), PixelSpacing=["0", "0.8"]), folder)
    return Made(folder)


@dicom(REFUSED)
def all_positions_alike(folder: Path) -> Made:
    save(change(ct(), ImagePositionPatient=["0", "0", "0"]), folder)
    return Made(folder)


@dicom(REFUSED)
def position_that_is_no_number(folder: Path) -> Made:
    slices = ct()
    with anything_goes():
        slices[MIDDLE]["ImagePositionPatient"]._value = ["nan", "0", "0"]
        save(slices, folder)
    return Made(folder)


@dicom(REFUSED, REPAIRED)
def cosines_of_length_two(folder: Path) -> Made:
    slices = ct()
    for data in slices:
        data.ImageOrientationPatient = text([2 * float(x) for x in data.ImageOrientationPatient])
    save(slices, folder)
    return Made(folder, (truth(),))


@dicom(REFUSED)
def cosines_80_degrees_apart(folder: Path) -> Made:
    slices = ct()
    row, column = OBLIQUE[:3, 0] / SPACING[0], OBLIQUE[:3, 1] / SPACING[1]
    skew = np.cos(np.radians(80)) * row + np.sin(np.radians(80)) * column
    save(change(slices, ImageOrientationPatient=text([*row, *skew])), folder)
    return Made(folder)


@dicom(REFUSED)
def one_slice_turned(folder: Path) -> Made:
    slices = ct()
    turned = turn(11, -7, 24)
    slices[MIDDLE].ImageOrientationPatient = text(turned[:, :2].T.ravel())
    save(slices, folder)
    return Made(folder)


@dicom(REFUSED)
def one_slice_of_another_size(folder: Path) -> Made:
    slices, small = ct(), ct(stored_values()[:40, :32])
    save([*without(slices, MIDDLE), small[MIDDLE]], folder)
    return Made(folder)


@dicom(REFUSED)
def one_slice_with_other_pixel_spacing(folder: Path) -> Made:
    slices = ct()
    slices[MIDDLE].PixelSpacing = text([1.5, 0.96])
    save(slices, folder)
    return Made(folder)


@dicom(REFUSED, reasons=("too_few_slices",))
def a_single_slice(folder: Path) -> Made:
    save(ct()[:1], folder)
    return Made(folder, (truth(last=1),))


@dicom(REFUSED, reasons=("too_few_slices",))
def two_slices(folder: Path) -> Made:
    save(ct()[:2], folder)
    return Made(folder, (truth(last=2),))


# Several things in one folder


def second_series(seed: int = 9, number: str = "2", **common: str) -> list[Dataset]:
    return ct(stored_values(seed), lps_affine(turn(11, -7, 23), origin=(40, 50, 60)), series=number, **common)


@dicom(REFUSED, scans=(FINE, FINE))
def two_series_in_a_folder(folder: Path) -> Made:
    save(ct(), folder)
    save(second_series(), folder, first=101)
    return Made(folder, (truth(), truth(stored_values(9), lps_affine(turn(11, -7, 23), origin=(40, 50, 60)))))


@dicom(REFUSED, scans=(FINE, FINE))
def two_patients_in_a_folder(folder: Path) -> Made:
    save(ct(), folder)
    save(second_series(patient="P2"), folder, first=101)
    return Made(folder, (truth(), truth(stored_values(9), lps_affine(turn(11, -7, 23), origin=(40, 50, 60)))))


@dicom(REFUSED, scans=None)
def two_patients_under_one_series_uid(folder: Path) -> Made:
    """The upper half of one patient and the lower half of another make a perfect grid."""
    slices = ct()
    change(slices[12:], PatientID="P2", PatientName="Phantom^P2")
    save(slices, folder)
    return Made(folder, (truth(last=12), truth(first=12)))


@dicom(REFUSED, scans=None)
def two_studies_under_one_series_uid(folder: Path) -> Made:
    slices = ct()
    change(slices[12:], StudyInstanceUID=f"{series.ROOT}.9.55")
    save(slices, folder)
    return Made(folder, (truth(last=12), truth(first=12)))


@dicom(REFUSED)
def two_frames_of_reference(folder: Path) -> Made:
    slices = ct()
    change(slices[12:], FrameOfReferenceUID=f"{series.ROOT}.8.55")
    save(slices, folder)
    return Made(folder, (truth(last=12), truth(first=12)))


@dicom(REFUSED, scans=(FINE, FINE))
def two_time_points_in_one_series(folder: Path) -> Made:
    later = change(ct(stored_values(9)), AcquisitionNumber="2", AcquisitionTime="100900", ContentTime="100901")
    change(later, TemporalPositionIdentifier="2")
    for k, data in enumerate(later):
        data.SOPInstanceUID, data.InstanceNumber = f"{series.ROOT}.1.{100 + k}", str(25 + k)
    save([*change(ct(), TemporalPositionIdentifier="1"), *later], folder)
    return Made(folder, (truth(), truth(stored_values(9))))


def told_by_number_alone(folder: Path, numbers: list[str]) -> Made:
    both = [*ct(), *ct(stored_values(9))]
    for n, (data, number) in enumerate(zip(both, numbers, strict=True)):
        data.SOPInstanceUID, data.InstanceNumber = f"{series.ROOT}.1.{100 + n}", number
    save(both, folder)
    return Made(folder, (truth(), truth(stored_values(9))))


@dicom(REFUSED)
def two_time_points_told_apart_by_their_numbers(folder: Path) -> Made:
    """Numbers are no geometry, but 1 to 24 and 25 to 48 may well say what belongs together."""
    return told_by_number_alone(folder, [str(n + 1) for n in range(2 * LAST)])


@dicom(REFUSED, scans=(REFUSED,), reasons=("duplicate_slices", "mixed"))
def two_time_points_that_nothing_tells_apart(folder: Path) -> Made:
    return Made(told_by_number_alone(folder, [""] * 2 * LAST).path)


@dicom(REFUSED, scans=(REFUSED,), reasons=("duplicate_slices", "mixed"))
def two_time_points_with_shuffled_numbers(folder: Path) -> Made:
    numbers = np.random.default_rng(12).permutation(2 * LAST)
    return Made(told_by_number_alone(folder, [str(n + 1) for n in numbers]).path)


@dicom(REFUSED, scans=(REFUSED,), reasons=("duplicate_slices", "mixed", "missing_slices"))
def second_time_point_incomplete(folder: Path) -> Made:
    """One and a half volumes, told apart by nothing but where they overlap."""
    both = [*ct(), *ct(stored_values(9))[:13]]
    for n, data in enumerate(both):
        data.SOPInstanceUID, data.InstanceNumber = f"{series.ROOT}.1.{100 + n}", ""
    save(both, folder)
    return Made(folder)


@dicom(REFUSED, scans=(FINE, FINE))
def two_echoes_in_one_series(folder: Path) -> Made:
    echoes = [_as_mr(ct()), _as_mr(ct(stored_values(9)))]
    for number, slices in enumerate(echoes, start=1):
        change(slices, EchoTime=str(4.6 * number), EchoNumbers=str(number))
        for k, data in enumerate(slices):
            data.SOPInstanceUID, data.InstanceNumber = f"{series.ROOT}.1.{100 * number + k}", str(2 * k + number)
    save([data for pair in zip(*echoes, strict=True) for data in pair], folder)
    return Made(folder, tuple(Seen(stored_values(n).astype(float), truth().affine) for n in (0, 9)))


def _as_mr(slices: list[Dataset]) -> list[Dataset]:
    return change(slices, SOPClassUID=pydicom.uid.MRImageStorage, Modality="MR", RescaleSlope=None,
                  RescaleIntercept=None, RescaleType=None, KVP=None)  # fmt: skip


@dicom(FINE, REPAIRED)
def a_localizer_among_the_slices(folder: Path) -> Made:
    localizer = _localizer()
    localizer.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    save([localizer, *ct()], folder)
    return Made(folder, (truth(),))


@dicom(FINE, REPAIRED, REFUSED, scans=(FINE, REFUSED))
def a_localizer_that_does_not_say_so(folder: Path) -> Made:
    save([_localizer(), *ct()], folder)
    return Made(folder, (truth(),))


def _localizer() -> Dataset:
    lps = lps_affine(np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]))
    localizer = ct(lps=lps)[0]
    localizer.SOPInstanceUID, localizer.InstanceNumber = f"{series.ROOT}.1.200", "0"
    return localizer


@dicom(FINE)
def a_structured_report_in_the_series(folder: Path) -> Made:
    save([*ct(), series.other_object("1.2.840.10008.5.1.4.1.1.88.33", 1, "SR")], folder)
    return Made(folder, (truth(),))


@dicom(FINE)
def a_presentation_state_in_the_series(folder: Path) -> Made:
    save([*ct(), series.other_object("1.2.840.10008.5.1.4.1.1.11.1", 2, "PR")], folder)
    return Made(folder, (truth(),))


@dicom(FINE)
def a_dose_report_in_the_series(folder: Path) -> Made:
    save([*ct(), series.dose_report(3)], folder)
    return Made(folder, (truth(),))


@dicom(REFUSED, FINE, REPAIRED)
def garbage_named_dcm_beside_the_slices(folder: Path) -> Made:
    save(ct(), folder)
    one_file(np.random.default_rng(1).bytes(4096), folder, "099.dcm")
    return Made(folder, (truth(),))


@dicom(FINE)
def garbage_without_ending_beside_the_slices(folder: Path) -> Made:
    save(ct(), folder)
    one_file(np.random.default_rng(1).bytes(4096), folder, "VERSION")
    return Made(folder, (truth(),))


@dicom(REFUSED)
def garbage_in_place_of_a_slice(folder: Path) -> Made:
    save(ct(), folder)
    one_file(np.random.default_rng(1).bytes(4096), folder, "012.dcm")
    return Made(folder)


@dicom(REFUSED)
def an_empty_file_in_place_of_a_slice(folder: Path) -> Made:
    save(ct(), folder)
    one_file(b"", folder, "012.dcm")
    return Made(folder)


@dicom(REFUSED)
def an_empty_file_in_place_of_the_last_slice(folder: Path) -> Made:
    save(ct(), folder)
    one_file(b"", folder, "024.dcm")
    return Made(folder, (truth(last=LAST - 1),))


# Bytes missing, changed, too many


def _cut(folder: Path, name: str, keep: float, *left: Seen) -> Made:
    content = (folder / name).read_bytes()
    one_file(content[: int(len(content) * keep)], folder, name)
    return Made(folder, left)


@dicom(REFUSED)
def middle_slice_cut_short(folder: Path) -> Made:
    save(ct(), folder)
    return _cut(folder, "012.dcm", 0.7)


@dicom(REFUSED)
def last_slice_cut_short(folder: Path) -> Made:
    save(ct(), folder)
    return _cut(folder, "024.dcm", 0.7, truth(last=LAST - 1))


@dicom(REFUSED)
def last_slice_without_pixels(folder: Path) -> Made:
    slices = ct()
    del slices[-1].PixelData
    save(slices, folder)
    return Made(folder, (truth(last=LAST - 1),))


@dicom(REFUSED)
def last_slice_cut_within_its_header(folder: Path) -> Made:
    save(ct(), folder)
    return _cut(folder, "024.dcm", 0.05, truth(last=LAST - 1))


@dicom(REFUSED)
def last_slice_cut_within_its_meta_group(folder: Path) -> Made:
    save(ct(), folder)
    content = (folder / "024.dcm").read_bytes()
    one_file(content[:150], folder, "024.dcm")
    return Made(folder, (truth(last=LAST - 1),))


@dicom(REFUSED, reasons=("damaged", "contradiction"))
def more_pixels_than_declared(folder: Path) -> Made:
    slices = ct()
    slices[MIDDLE].PixelData += b"\1\2" * 400
    save(slices, folder)
    return Made(folder, (truth(),))


@dicom(REFUSED)
def rows_declared_that_are_not_there(folder: Path) -> Made:
    save(change(ct(), Rows=60), folder)
    return Made(folder)


@dicom(REFUSED)
def fewer_rows_declared_than_are_there(folder: Path) -> Made:
    save(change(ct(), Rows=30), folder)
    return Made(folder)


@dicom(REFUSED)
def deflated_and_cut_short(folder: Path) -> Made:
    in_syntax(series.DEFLATED, folder)
    return _cut(folder, "012.dcm", 0.7)


def packed_with_one_damaged(syntax: str, folder: Path, damage: object) -> Made:
    slices = [pack(data, syntax, damage if k == MIDDLE else None) for k, data in enumerate(ct())]
    save(slices, folder, syntax=syntax)
    return Made(folder)


def flipped(stream: bytes, at: int, bit: int = 5) -> bytes:
    changed = bytearray(stream)
    changed[at] ^= 1 << bit
    return bytes(changed)


@dicom(REFUSED)
def rle_with_a_flipped_control_byte(folder: Path) -> Made:
    return packed_with_one_damaged(RLELossless, folder, lambda stream: flipped(stream, 64))


@dicom(REFUSED)
def rle_cut_short(folder: Path) -> Made:
    return packed_with_one_damaged(RLELossless, folder, lambda stream: stream[: len(stream) * 2 // 3 & ~1])


@dicom(REFUSED)
def rle_with_a_segment_too_few(folder: Path) -> Made:
    return packed_with_one_damaged(RLELossless, folder, lambda stream: b"\1" + stream[1:])


@dicom(FINE, REFUSED, unknowable="RLE has no checksum: a flipped literal is another pixel")
def rle_with_a_flipped_literal_byte(folder: Path) -> Made:
    made = packed_with_one_damaged(RLELossless, folder, lambda stream: flipped(stream, 64 + 9))
    return Made(made.path, (truth(),))


@dicom(REFUSED)
def jpeg_2000_with_a_flipped_byte_in_its_header(folder: Path) -> Made:
    return packed_with_one_damaged(
        JPEG2000Lossless, folder, lambda stream: flipped(stream, stream.index(b"\xff\x51") + 9)
    )


@dicom(FINE, REFUSED, unknowable="the codestream has no checksum: it decodes, to other pixels")
def jpeg_2000_with_a_flipped_byte_in_its_data(folder: Path) -> Made:
    made = packed_with_one_damaged(JPEG2000Lossless, folder, lambda stream: flipped(stream, len(stream) // 2))
    return Made(made.path, (truth(),))


@dicom(REFUSED)
def jpeg_2000_cut_short(folder: Path) -> Made:
    return packed_with_one_damaged(JPEG2000Lossless, folder, lambda stream: stream[: len(stream) // 2 & ~1])


@dicom(REFUSED)
def jpeg_2000_of_another_size(folder: Path) -> Made:
    other = series.codestream(stored_values()[:40, :32, MIDDLE], JPEG2000Lossless)
    return packed_with_one_damaged(JPEG2000Lossless, folder, lambda _: other)


@dicom(REFUSED)
def jpeg_ls_cut_short(folder: Path) -> Made:
    return packed_with_one_damaged(JPEGLSLossless, folder, lambda stream: stream[: len(stream) // 2 & ~1])


@dicom(REFUSED)
def jpeg_ls_of_nothing(folder: Path) -> Made:
    return packed_with_one_damaged(JPEGLSLossless, folder, lambda _: b"\0\0")


@dicom(REFUSED, FINE, REPAIRED)
def jpeg_2000_declared_as_native(folder: Path) -> Made:
    folder.mkdir(parents=True)
    for k, data in enumerate(ct()):
        content = as_bytes(pack(data, JPEG2000Lossless), JPEG2000Lossless)
        wrong = ExplicitVRLittleEndian.ljust(len(JPEG2000Lossless), "\0").encode()
        one_file(content.replace(JPEG2000Lossless.encode(), wrong), folder, f"{k:03d}.dcm")
    return Made(folder, (truth(),))


@dicom(REFUSED, FINE, REPAIRED)
def native_declared_as_jpeg_2000(folder: Path) -> Made:
    folder.mkdir(parents=True)
    stand_in = "1.2.3.4.5.6.7.8.9.0.11"  # as long as the name it gives way to, behind pydicom's back
    for k, data in enumerate(ct()):
        content = as_bytes(data, TransferSyntaxUID=stand_in)
        one_file(content.replace(stand_in.encode(), JPEG2000Lossless.encode()), folder, f"{k:03d}.dcm")
    return Made(folder, (truth(),))


@dicom(REFUSED, FINE, REPAIRED)
def big_endian_declared_as_little_endian(folder: Path) -> Made:
    folder.mkdir(parents=True)
    for k, data in enumerate(ct()):
        data.PixelData = np.frombuffer(data.PixelData, "<i2").astype(">i2").tobytes()
        content = as_bytes(data, ExplicitVRBigEndian)
        honest, wrong = (
            ExplicitVRBigEndian.encode(),
            ExplicitVRLittleEndian.ljust(len(ExplicitVRBigEndian), "\0").encode(),
        )
        one_file(content.replace(honest, wrong), folder, f"{k:03d}.dcm")
    return Made(folder, (truth(),))


@dicom(REFUSED, reasons=("encoding",))
def unknown_transfer_syntax(folder: Path) -> Made:
    folder.mkdir(parents=True)
    for k, data in enumerate(ct()):
        one_file(as_bytes(data, TransferSyntaxUID="1.2.3.4.5"), folder, f"{k:03d}.dcm")
    return Made(folder, (truth(),))


# Objects of many frames that lie


def saved_enhanced(data: Dataset, folder: Path, *truths: Seen) -> Made:
    folder.mkdir(parents=True)
    one_file(as_bytes(data), folder, "enhanced.dcm")
    return Made(folder, truths)


@dicom(REFUSED)
def enhanced_with_a_frame_more_than_pixels(folder: Path) -> Made:
    data = enhanced()
    data.NumberOfFrames = LAST + 1
    return saved_enhanced(data, folder)


@dicom(REFUSED)
def enhanced_with_fewer_frames_declared(folder: Path) -> Made:
    data = enhanced()
    data.NumberOfFrames = LAST - 1
    return saved_enhanced(data, folder, truth(last=LAST - 1))


@dicom(REFUSED)
def enhanced_without_one_position(folder: Path) -> Made:
    data = enhanced()
    del data.PerFrameFunctionalGroupsSequence[MIDDLE].PlanePositionSequence
    return saved_enhanced(data, folder)


@dicom(REFUSED)
def enhanced_with_a_group_too_few(folder: Path) -> Made:
    data = enhanced()
    del data.PerFrameFunctionalGroupsSequence[LAST - 1]
    return saved_enhanced(data, folder, truth())


@dicom(REFUSED, reasons=("no_geometry",))
def enhanced_without_orientation(folder: Path) -> Made:
    data = enhanced()
    del data.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    return saved_enhanced(data, folder)


@dicom(REFUSED, reasons=("no_geometry",))
def enhanced_without_functional_groups(folder: Path) -> Made:
    data = enhanced()
    del data.SharedFunctionalGroupsSequence, data.PerFrameFunctionalGroupsSequence
    return saved_enhanced(data, folder)


@dicom(REFUSED)
def enhanced_with_a_frame_missing_in_between(folder: Path) -> Made:
    kept = [k for k in range(LAST) if k != MIDDLE]
    data = enhanced(stored_values()[:, :, kept])
    for group, k in zip(data.PerFrameFunctionalGroupsSequence, kept, strict=True):
        group.PlanePositionSequence = item(ImagePositionPatient=text((OBLIQUE @ [0, 0, k, 1])[:3]))
    return saved_enhanced(data, folder)


@dicom(REFUSED)
def enhanced_cut_short(folder: Path) -> Made:
    saved_enhanced(enhanced(), folder)
    return _cut(folder, "enhanced.dcm", 0.8)


@dicom(REFUSED)
def classic_slice_that_claims_two_frames(folder: Path) -> Made:
    save(change(ct(), NumberOfFrames=2), folder)
    return Made(folder, (truth(),))


@dicom(REFUSED)
def a_mosaic_without_its_layout(folder: Path) -> Made:
    """25 tiles in a sheet, as Siemens scanners store fMRI; here without the private header that tells them apart."""
    tiles = np.pad(stored_values(), ((0, 0), (0, 0), (0, 1))).reshape(48, 40, 5, 5)
    sheet = tiles.transpose(3, 0, 2, 1).reshape(240, 200)
    slices = _as_mr(ct(np.stack([sheet] * 3, axis=2)))
    for data in slices:
        data.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    save(slices, folder)
    return Made(folder)


@dicom(REFUSED, scans=())
def a_photograph(folder: Path) -> Made:
    folder.mkdir(parents=True)
    one_file(as_bytes(series.dose_report(1)), folder, "photo.dcm")
    return Made(folder)


# Harder still: what hides behind a sound series


@dicom(FINE)
def micrometre_spacing(folder: Path) -> Made:
    """A specimen in a micro-CT: tolerances in millimetres would swallow it."""
    lps = lps_affine(turn(11, -7, 23), (0.008, 0.008, 0.008), (1, 2, 3))
    save(ct(lps=lps), folder)
    return Made(folder, (truth(lps=lps),))


@dicom(REFUSED)
def micrometre_spacing_and_a_slice_missing(folder: Path) -> Made:
    save(without(ct(lps=lps_affine(turn(11, -7, 23), (0.008, 0.008, 0.008), (1, 2, 3))), MIDDLE), folder)
    return Made(folder)


def tilted(degrees: float, folder: Path) -> Made:
    rise = np.tan(np.radians(degrees)) * SPACING[2] * np.arange(LAST)[:, None]
    save(moved(ct(), rise * OBLIQUE[:3, 1] / SPACING[1]), folder)
    lps = OBLIQUE.copy()
    lps[:3, 2] += np.tan(np.radians(degrees)) * SPACING[2] * OBLIQUE[:3, 1] / SPACING[1]
    return Made(folder, (truth(lps=lps),))


@dicom(REFUSED)
def gantry_tilted_by_half_a_degree(folder: Path) -> Made:
    return tilted(0.5, folder)


@dicom(FINE, REPAIRED, REFUSED)
def drift_of_6_micrometres_a_slice(folder: Path) -> Made:
    return tilted(np.degrees(np.arctan(0.006 / SPACING[2])), folder)


@dicom(REFUSED)
def an_extra_slice_between_two(folder: Path) -> Made:
    extra = ct(stored_values(9))[MIDDLE]
    extra.SOPInstanceUID = f"{series.ROOT}.1.99"
    extra.ImagePositionPatient = text((OBLIQUE @ [0, 0, MIDDLE + 0.5, 1])[:3])
    save([*ct(), extra], folder)
    return Made(folder)


@dicom(REFUSED)
def two_fields_of_view_in_one_series(folder: Path) -> Made:
    slices, lps = ct(), lps_affine(turn(11, -7, 23), (0.5, 0.5, 2.0), (OBLIQUE @ [0, 0, 12, 1])[:3])
    for k, data in enumerate(slices[12:]):
        data.PixelSpacing = text([0.5, 0.5])
        data.ImagePositionPatient = text((lps @ [0, 0, k, 1])[:3])
    save(slices, folder)
    return Made(folder, (truth(last=12), Seen(truth().voxels[:, :, 12:], series_ras(lps))))


def series_ras(lps: np.ndarray) -> np.ndarray:
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


@dicom(REFUSED)
def two_series_without_a_series_uid(folder: Path) -> Made:
    save(change(ct(), SeriesInstanceUID=""), folder)
    save(change(second_series(), SeriesInstanceUID=""), folder, first=101)
    return Made(folder, (truth(), truth(stored_values(9), lps_affine(turn(11, -7, 23), origin=(40, 50, 60)))))


@dicom(FINE, REPAIRED, REFUSED)
def patient_unnamed_in_one_slice(folder: Path) -> Made:
    slices = ct()
    change(slices[MIDDLE : MIDDLE + 1], PatientID="", PatientName="")
    save(slices, folder)
    return Made(folder, (truth(),))


@dicom(REFUSED)
def ct_and_mr_under_one_series_uid(folder: Path) -> Made:
    slices = ct()
    _as_mr(slices[12:])
    save(slices, folder)
    return Made(folder, (truth(last=12), Seen(truth().voxels[:, :, 12:] + 1024, truth(first=12).affine)))


@dicom(FINE)
def half_of_the_slices_packed(folder: Path) -> Made:
    slices = ct()
    save(slices[:12], folder)
    save([pack(data, JPEG2000Lossless) for data in slices[12:]], folder, syntax=JPEG2000Lossless, first=13)
    return Made(folder, (truth(),))


@dicom(REFUSED, scans=(FINE,))
def a_series_in_two_subfolders(folder: Path) -> Made:
    save(ct()[::2], folder / "a")
    save(ct()[1::2], folder / "b")
    return Made(folder, (truth(),))


@dicom(REFUSED, FINE)
def bits_not_at_the_bottom(folder: Path) -> Made:
    """12 bits stored in the upper part of 16: values are 16 times what they mean unless they are shifted."""
    slices = change(ct(), BitsStored=12, HighBit=15, PixelRepresentation=0)
    for data in slices:
        set_pixels(data, pixels(data).astype(np.uint16) << 4, "<u2")
    save(slices, folder)
    return Made(folder, (truth(),))


@dicom(FINE, REFUSED)
def pixels_of_32_bits(folder: Path) -> Made:
    slices = change(ct(), BitsAllocated=32, BitsStored=32, HighBit=31)
    for data in slices:
        set_pixels(data, np.frombuffer(data.PixelData, "<i2").reshape(data.Rows, data.Columns).T, "<i4")
    save(slices, folder)
    return Made(folder, (truth(),))


@dicom(FINE)
def pixels_of_8_bits(folder: Path) -> Made:
    values = stored_values() // 16
    slices = change(ct(values), BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0)
    for k, data in enumerate(slices):
        set_pixels(data, values[:, :, k], "u1")
    save(slices, folder)
    return Made(folder, (truth(values),))


@dicom(FINE, REFUSED)
def values_through_a_lookup_table(folder: Path) -> Made:
    table = (np.arange(4096) * 3 + 7).astype(np.uint16)
    slices = change(ct(), RescaleSlope=None, RescaleIntercept=None, RescaleType=None, PixelRepresentation=0)
    for data in slices:
        data.ModalityLUTSequence = item(LUTDescriptor=[4096, 0, 16], ModalityLUTType="US", LUTData=table.tolist())
        data.ModalityLUTSequence[0]["LUTDescriptor"].VR = data.ModalityLUTSequence[0]["LUTData"].VR = "US"
    save(slices, folder)
    return Made(folder, (Seen(stored_values() * 3.0 + 7, truth().affine),))


@dicom(REFUSED, FINE)
def a_lookup_table_in_one_slice_alone(folder: Path) -> Made:
    table = (np.arange(4096) * 3 + 7).astype(np.uint16)
    slices = ct()
    data = change(slices[MIDDLE : MIDDLE + 1], RescaleSlope=None, RescaleIntercept=None, RescaleType=None)[0]
    data.PixelRepresentation = 0
    data.ModalityLUTSequence = item(LUTDescriptor=[4096, 0, 16], ModalityLUTType="US", LUTData=table.tolist())
    data.ModalityLUTSequence[0]["LUTDescriptor"].VR = data.ModalityLUTSequence[0]["LUTData"].VR = "US"
    save(slices, folder)
    values = truth().voxels
    values[:, :, MIDDLE] = stored_values()[:, :, MIDDLE] * 3.0 + 7
    return Made(folder, (Seen(values, truth().affine),))


def with_geometry(folder: Path, **values: object) -> Made:
    with anything_goes():
        save(change(ct(), **values), folder)
    return Made(folder)


@dicom(REFUSED)
def position_of_two_numbers(folder: Path) -> Made:
    return with_geometry(folder, ImagePositionPatient=["1", "2"])


@dicom(REFUSED)
def orientation_of_zeros(folder: Path) -> Made:
    return with_geometry(folder, ImageOrientationPatient=["0"] * 6)


@dicom(REFUSED)
def orientation_of_parallel_axes(folder: Path) -> Made:
    return with_geometry(folder, ImageOrientationPatient=["1", "0", "0", "1", "0", "0"])


@dicom(REFUSED)
def orientation_of_five_numbers(folder: Path) -> Made:
    return with_geometry(folder, ImageOrientationPatient=["1", "0", "0", "0", "1"])


@dicom(REFUSED)
def a_single_pixel_spacing(folder: Path) -> Made:
    return with_geometry(folder, PixelSpacing="0.8")


@dicom(REFUSED)
def negative_pixel_spacing(folder: Path) -> Made:
    return with_geometry(folder, PixelSpacing=["-1.25", "0.8"])


@dicom(REFUSED)
def decimal_commas(folder: Path) -> Made:
    slices = ct()
    folder.mkdir(parents=True)
    for k, data in enumerate(slices):
        content = as_bytes(change([data], PixelSpacing=["1.25", "0.80"])[0])
        one_file(content.replace(b"1.25\\0.80", b"1,25\\0,80"), folder, f"{k}.dcm")
    return Made(folder)


def packed_enhanced(streams: list[bytes], folder: Path, *truths: Seen) -> Made:
    data = series.set_codestreams(enhanced(), streams)
    folder.mkdir(parents=True)
    one_file(as_bytes(data, JPEG2000Lossless), folder, "enhanced.dcm")
    return Made(folder, truths)


def all_streams() -> list[bytes]:
    return [series.codestream(plane, JPEG2000Lossless) for plane in np.moveaxis(stored_values(), 2, 0)]


@dicom(REFUSED)
def enhanced_with_a_codestream_too_few(folder: Path) -> Made:
    return packed_enhanced([stream for k, stream in enumerate(all_streams()) if k != MIDDLE], folder)


@dicom(REFUSED, FINE)
def enhanced_with_a_codestream_too_many(folder: Path) -> Made:
    return packed_enhanced([*all_streams(), all_streams()[0]], folder, truth())


@dicom(REFUSED, FINE)
def enhanced_with_offsets_that_lie(folder: Path) -> Made:
    made = packed_enhanced(all_streams(), folder, truth())
    content = bytearray((folder / "enhanced.dcm").read_bytes())
    at = content.rindex(b"\xe0\x7f\x10\x00") + 12 + 8  # behind the element's head and the head of the table's item
    content[at : at + 4], content[at + 20 : at + 24] = content[at + 20 : at + 24], content[at : at + 4]
    one_file(bytes(content), folder, "enhanced.dcm")
    return made


@dicom(FINE)
def frames_in_three_fragments(folder: Path) -> Made:
    slices = ct()
    for data in slices:
        stream = series.codestream(pixels(data), JPEG2000Lossless)
        series.set_codestreams(data, [stream])
        data.PixelData = pydicom.encaps.encapsulate([stream + b"\0" * (len(stream) % 2)], fragments_per_frame=3)
    save(slices, folder, syntax=JPEG2000Lossless)
    return Made(folder, (truth(),))


@dicom(REFUSED)
def enhanced_rescale_missing_in_one_frame(folder: Path) -> Made:
    data = enhanced()
    shared = data.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    del data.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    for k, group in enumerate(data.PerFrameFunctionalGroupsSequence):
        if k != MIDDLE:
            group.PixelValueTransformationSequence = shared
    return saved_enhanced(data, folder)


@dicom(REFUSED, scans=(FINE, FINE))
def enhanced_with_two_time_points(folder: Path) -> Made:
    both = np.concatenate([stored_values(), stored_values(9)], axis=2)
    data = enhanced(both)
    for n, group in enumerate(data.PerFrameFunctionalGroupsSequence):
        group.PlanePositionSequence = item(ImagePositionPatient=text((OBLIQUE @ [0, 0, n % LAST, 1])[:3]))
        group.FrameContentSequence = item(
            StackID="1", InStackPositionNumber=n % LAST + 1, TemporalPositionIndex=n // LAST + 1,
            DimensionIndexValues=[n // LAST + 1, n % LAST + 1],
        )  # fmt: skip
    return saved_enhanced(data, folder, truth(), truth(stored_values(9)))


@dicom(REFUSED, FINE)
def enhanced_in_two_objects(folder: Path) -> Made:
    """12 frames in each of two files of one series: one volume, or two halves, or a refusal."""
    lower, upper = enhanced(stored_values()[:, :, :12]), enhanced(stored_values()[:, :, 12:])
    upper.SOPInstanceUID = f"{series.ROOT}.5.2"
    for k, group in enumerate(upper.PerFrameFunctionalGroupsSequence):
        group.PlanePositionSequence = item(ImagePositionPatient=text((OBLIQUE @ [0, 0, 12 + k, 1])[:3]))
    saved_enhanced(lower, folder)
    one_file(as_bytes(upper), folder, "upper.dcm")
    return Made(folder, (truth(), truth(last=12), truth(first=12)))


@dicom(REFUSED)
def enhanced_with_two_pixel_sizes(folder: Path) -> Made:
    """The shared groups say one pixel spacing, a frame's own group another."""
    data = enhanced()
    data.PerFrameFunctionalGroupsSequence[MIDDLE].PixelMeasuresSequence = item(
        PixelSpacing=text([1.5, 0.96]), SliceThickness="2"
    )
    return saved_enhanced(data, folder)
