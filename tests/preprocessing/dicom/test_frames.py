"""Headers of every kind become frames that lie where they say and mean what they say, or are refused."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from preprocessing import dicom
from preprocessing.reading import Reading
from preprocessing.volume import UnreadableScan, Volume
from tests.preprocessing.dicom.slices import (
    LPS_TO_RAS,
    SHARED,
    SLOPE,
    a_slice,
    a_stack,
    assert_shows_the_ramp,
    many_frames,
    placed,
    put_pixels,
    ramp,
    read_one,
    save,
    series_of,
)


def refused(folder: Path, reason: str, words: str | None = None) -> None:
    (series,) = series_of(folder).values()
    with pytest.raises(UnreadableScan, match=words) as no:
        dicom.read(series)
    assert no.value.reason == reason


def constant(value: int, kind: type = np.int16) -> np.ndarray:
    return np.full((5, 6), value, kind)


# enhanced objects


def test_an_enhanced_object_lies_where_its_groups_say(tmp_path: Path) -> None:
    save(tmp_path, [many_frames([placed(z) for z in (36.0, 30.0, 33.0, 39.0)])])
    volume = read_one(tmp_path)
    assert volume.geometry.spacing == pytest.approx((0.7, 0.8, 3.0)) and volume.provenance.verdict == "fine"
    assert_shows_the_ramp(volume)
    assert [number for _, number in volume.provenance.slices] == [2, 3, 1, 4]
    assert len(volume.provenance.files) == 1


def test_groups_of_a_frame_come_before_shared_ones_and_these_before_the_rest(tmp_path: Path) -> None:
    shared = {**SHARED, "PixelValueTransformationSequence": {"RescaleSlope": 2, "RescaleIntercept": 5}}
    own = {"PixelValueTransformationSequence": {"RescaleSlope": 3, "RescaleIntercept": 0}}
    frames = [placed(z, values=constant(10), **(own if z == 1 else {})) for z in (0.0, 1.0, 2.0)]
    save(tmp_path, [many_frames(frames, shared, RescaleSlope=100, RescaleIntercept=100)])
    np.testing.assert_array_equal(read_one(tmp_path).voxels[0, 0, 0], [25, 30, 25])


def test_what_stands_outside_of_the_groups_holds_where_they_are_silent(tmp_path: Path) -> None:
    outside = {"PixelSpacing": [0.8, 0.7], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    save(
        tmp_path,
        [many_frames([placed(z) for z in (0.0, 2.0, 4.0)], {}, RescaleSlope=SLOPE, RescaleIntercept=0, **outside)],
    )
    assert_shows_the_ramp(read_one(tmp_path))


def test_one_position_outside_of_the_groups_places_no_several_frames(tmp_path: Path) -> None:
    frames = [placed(z) for z in (0.0, 2.0, 4.0)]
    data = many_frames(frames, ImagePositionPatient=[0, 0, 0])
    del data.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence
    save(tmp_path, [data])
    refused(tmp_path, "no_geometry", "ImagePositionPatient")


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ({"FrameContentSequence": [{"TemporalPositionIndex": 1}, {"TemporalPositionIndex": 2}]}, {"time 1", "time 2"}),
        ({"FrameContentSequence": [{"StackID": "1"}, {"StackID": "2"}]}, {"stack 1", "stack 2"}),
        ({"MREchoSequence": [{"EffectiveEchoTime": 5.0}, {"EffectiveEchoTime": 80.0}]}, {"echo 1", "echo 2"}),
        ({"MRDiffusionSequence": [{"DiffusionBValue": 0.0}, {"DiffusionBValue": 900.0}]}, {"b 0", "b 900"}),
        (
            {
                "MRImageFrameTypeSequence": [
                    {"FrameType": ["O", "P", "T1", "M"]},
                    {"FrameType": ["O", "P", "T1", "FIELD_MAP"]},
                ]
            },
            {"magnitude", "b0 map"},
        ),
        (
            {"MRImageFrameTypeSequence": [{"ComplexImageComponent": "MAGNITUDE"}, {"ComplexImageComponent": "PHASE"}]},
            {"magnitude", "phase"},
        ),
        (
            {
                "CardiacSynchronizationSequence": [
                    {"NominalCardiacTriggerDelayTime": 0.0},
                    {"NominalCardiacTriggerDelayTime": 50.0},
                ]
            },
            {"phase 1", "phase 2"},
        ),
    ],
)
def test_a_file_of_several_volumes_comes_apart(groups: dict[str, Any], names: set[str], tmp_path: Path) -> None:
    ((macro, each),) = groups.items()
    frames = [placed(z, **{macro: each[n]}, values=constant(int(100 * n + z))) for z in (0.0, 1, 2, 3) for n in (0, 1)]
    save(tmp_path, [many_frames(frames, {**SHARED, "PixelValueTransformationSequence": {"RescaleSlope": 1}})])
    series = series_of(tmp_path)
    assert set(series) == names
    found = {tuple(dicom.read(one).voxels[0, 0, 0].tolist()) for one in series.values()}
    assert found == {(0, 1, 2, 3), (100, 101, 102, 103)}


def test_dimension_indices_tell_volumes_apart_but_for_the_one_of_places(tmp_path: Path) -> None:
    frames = [
        placed(
            z, FrameContentSequence={"DimensionIndexValues": [1, int(z) + 1, n + 1]}, values=constant(10 * n + int(z))
        )
        for z in (0.0, 1.0, 2.0)
        for n in range(2)
    ]
    pointers = []
    for keyword in ("StackID", "InStackPositionNumber", "FlipAngle"):
        item = Dataset()
        item.DimensionIndexPointer = pydicom.datadict.tag_for_keyword(keyword)
        pointers.append(item)
    save(
        tmp_path,
        [
            many_frames(
                frames,
                {**SHARED, "PixelValueTransformationSequence": {"RescaleSlope": 1}},
                DimensionIndexSequence=pointers,
            )
        ],
    )
    series = series_of(tmp_path)
    assert set(series) == {"dimension 1", "dimension 2"}
    np.testing.assert_array_equal(dicom.read(series["dimension 2"]).voxels[0, 0, 0], [10, 11, 12])


def test_an_object_cut_into_several_files_is_one_again_and_all_are_needed(tmp_path: Path) -> None:
    parts = {"ConcatenationUID": "1.2.55", "InConcatenationTotalNumber": 2}
    halves = [
        many_frames([placed(z) for z in heights], **parts, InConcatenationNumber=n + 1)
        for n, heights in enumerate([(0.0, 2.0), (4.0, 6.0, 8.0)])
    ]
    paths = save(tmp_path, halves)
    assert_shows_the_ramp(read_one(tmp_path))
    paths[0].unlink()
    refused(tmp_path, "missing_slices", "1 of the 2 files")


def test_frames_and_their_descriptions_must_be_as_many(tmp_path: Path) -> None:
    data = many_frames([placed(z) for z in (0.0, 2.0, 4.0)])
    del data.PerFrameFunctionalGroupsSequence[2]
    save(tmp_path, [data])
    refused(tmp_path, "contradiction", "holds 3 frames and describes 2")


def test_many_frames_without_groups_are_nowhere(tmp_path: Path) -> None:
    data = a_slice((0, 0, 0))
    put_pixels(data, np.zeros((4, 5, 6), np.int16))
    data.NumberOfFrames = 4
    save(tmp_path, [data])
    refused(tmp_path, "no_geometry", "4 frames")


def test_converted_objects_keep_what_they_could_not_translate_apart(tmp_path: Path) -> None:
    frames = [
        placed(z, UnassignedPerFrameConvertedAttributesSequence={"EchoTime": echo})
        for echo in (4, 9)
        for z in (0.0, 2.0, 4.0)
    ]
    save(tmp_path, [many_frames(frames)])
    assert set(series_of(tmp_path)) == {"echo 1", "echo 2"}


# mosaics


def a_mosaic(count: int = 5, side: int = 3, **elements: Any) -> Dataset:
    """A United Imaging sheet; tile n holds the value n."""
    sheet = np.full((5 * side, 6 * side), 99, np.int16)
    for n in range(count):
        sheet[n // side * 5 : n // side * 5 + 5, n % side * 6 : n % side * 6 + 6] = n
    data = a_slice((0, 0, 0), values=sheet, Modality="MR")
    data.ImageType = ["ORIGINAL", "PRIMARY", "M", "VFRAME"]
    data.add_new(0x00650010, "LO", "Image Private Header")
    data.add_new(0x00651050, "DS", str(count))
    items = []
    for n in range(count):
        item = Dataset()
        item.ImagePositionPatient = [-10, -20, 30 + 3 * n]
        items.append(item)
    data.add_new(0x00651051, "SQ", items)
    for tag, value in elements.items():
        setattr(data, tag, value)
    return data


def test_a_sheet_of_tiles_with_a_position_each_is_cut_into_slices(tmp_path: Path) -> None:
    save(tmp_path, [a_mosaic()])
    volume = read_one(tmp_path)
    assert volume.geometry.shape == (6, 5, 5) and volume.geometry.spacing == pytest.approx((0.7, 0.8, 3))
    np.testing.assert_array_equal(volume.voxels[0], np.broadcast_to(np.arange(5), (6, 5, 5)))
    np.testing.assert_allclose(volume.geometry.affine[:3, 3], [10, 20, 30])
    assert volume.provenance.slices == () and "mosaics" in volume.provenance.notes[0]


@pytest.mark.parametrize("spoil", ["no positions", "another count", "another size"])
def test_a_sheet_that_cannot_be_cut_for_sure_is_refused(spoil: str, tmp_path: Path) -> None:
    data = a_mosaic(side=4 if spoil == "another size" else 3)
    if spoil == "no positions":
        del data[0x00651051]
    elif spoil == "another count":
        data[0x00651050].value = "7"
    save(tmp_path, [data])
    refused(tmp_path, "contradiction" if spoil == "another size" else "no_geometry", "mosaic")


def test_a_siemens_mosaic_without_its_own_header_is_refused(tmp_path: Path) -> None:
    save(tmp_path, [a_slice((0, 0, 0), ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"])])
    refused(tmp_path, "no_geometry", "mosaic")


def test_a_real_mosaic_is_cut_as_two_others_cut_it(shared: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    folder = shared / "data" / "zoo" / "dicom_mosaic_siemens_transfer_syntaxes"
    if not folder.is_dir():
        pytest.skip("the mosaics are not among the real scans")
    reference = nibabel.load(folder / "1.nii")
    for path in sorted(folder.glob("*.dcm")):
        volume = dicom.read(dicom.series_in([path])[0][0])
        assert volume.geometry.shape == (64, 64, 35)
        flipped = np.asarray(reference.dataobj)[:, ::-1]  # its rows run the other way
        np.testing.assert_array_equal(volume.voxels[0], flipped)
        corner = reference.affine @ [0, 63, 0, 1]
        np.testing.assert_allclose(volume.geometry.affine[:3, 3], corner[:3], atol=1e-4)
        np.testing.assert_allclose(volume.geometry.affine[:3, 2], reference.affine[:3, 2], atol=1e-5)


def test_mosaics_with_rubbish_above_their_bits_are_cut_as_nibabel_cuts_them(shared: Path) -> None:
    wrappers = pytest.importorskip("nibabel.nicom.dicomwrappers")
    folder = shared / "data" / "zoo" / "dicom_12bit_garbage_highbits"
    if not folder.is_dir():
        pytest.skip("the 12-bit mosaics are not among the real scans")
    for path in sorted(folder.iterdir()):
        volume = dicom.read(dicom.series_in([path])[0][0])
        other = wrappers.wrapper_from_file(path)
        np.testing.assert_array_equal(volume.voxels[0], np.swapaxes(np.asarray(other.get_data()), 0, 1))
        swapped = (LPS_TO_RAS @ other.affine)[:, [1, 0, 2, 3]]
        np.testing.assert_allclose(volume.geometry.affine, swapped, atol=1e-4)


# values


def test_every_slice_is_rescaled_by_its_own_numbers_in_floating_point(tmp_path: Path) -> None:
    slopes = [0.5, 1.25, 3.0, 0.1]
    save(
        tmp_path,
        [a_slice((0, 0, k), values=constant(7 + k), RescaleSlope=s, RescaleIntercept=-k) for k, s in enumerate(slopes)],
    )
    volume = read_one(tmp_path)
    assert volume.voxels.dtype == np.float32
    np.testing.assert_allclose(volume.voxels[0, 0, 0], [(7 + k) * s - k for k, s in enumerate(slopes)], rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    stored=arrays.arrays(st.sampled_from([np.int8, np.uint8, np.int16, np.uint16]), (2, 3, 3, 2)).map(lambda a: a[0]),
    slope=st.integers(-40, 40).filter(bool),
    intercept=st.integers(-40000, 40000),
)
def test_whole_numbers_stay_exact_whatever_their_kind(
    stored: np.ndarray, slope: int, intercept: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """They are computed modulo their width: no value that fits at the end may be lost on the way."""
    folder = tmp_path_factory.mktemp("kinds")
    save(
        folder,
        [
            a_slice((0, 0, k), values=plane, RescaleSlope=slope, RescaleIntercept=intercept)
            for k, plane in enumerate(stored)
        ],
    )
    volume = read_one(folder)
    np.testing.assert_array_equal(volume.voxels[0].T, stored.astype(np.int64) * slope + intercept)
    assert volume.voxels.dtype.kind == "i"


def test_wide_integers_are_kept_or_said_to_be_rounded(tmp_path: Path) -> None:
    save(tmp_path / "signed", [a_slice((0, 0, k), values=np.full((5, 6), -(2**31) + k, np.int32)) for k in range(3)])
    volume = read_one(tmp_path / "signed")
    assert volume.voxels.dtype == np.int32 and volume.voxels[0, 0, 0].tolist() == [-(2**31) + k for k in range(3)]
    save(tmp_path / "unsigned", [a_slice((0, 0, k), values=np.full((5, 6), 2**32 - 1, np.uint32)) for k in range(3)])
    volume = read_one(tmp_path / "unsigned")
    assert volume.voxels.dtype == np.float32 and "rounded" in volume.provenance.notes[0]


@pytest.mark.parametrize("values", [{"RescaleSlope": 0}, {"RescaleSlope": ["1", "2"]}])
def test_a_slope_that_gives_no_values_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, a_stack(4, **{tag: lambda k, value=value: value for tag, value in values.items()}))
    refused(tmp_path, "values", "RescaleSlope")


def with_table(data: Dataset, descriptor: list[int], entries: Any, vr: str = "US") -> Dataset:
    item = Dataset()
    item.add_new(0x00283002, "SS" if descriptor[1] < 0 else "US", descriptor)
    item.add_new(0x00283006, vr, entries)
    item.ModalityLUTType = "HU"
    data.ModalityLUTSequence = [item]
    del data.RescaleSlope, data.RescaleIntercept
    return data


@pytest.mark.parametrize("first", [0, 2, -3])
@pytest.mark.parametrize("packed", [False, True])
def test_a_lookup_table_is_applied_and_its_ends_hold_beyond_it(first: int, packed: bool, tmp_path: Path) -> None:
    table = [10, 20, 40, 80]
    entries = np.array(table, "<u2").tobytes() if packed else table
    values = np.arange(-6, 24, dtype=np.int16).reshape(5, 6)
    save(
        tmp_path,
        [
            with_table(a_slice((0, 0, k), values=values), [4, first, 16], entries, "OW" if packed else "US")
            for k in range(3)
        ],
    )
    wanted = np.array(table)[np.clip(values - first, 0, 3)]
    np.testing.assert_array_equal(read_one(tmp_path).voxels[0, :, :, 1].T, wanted)


def test_a_table_that_contradicts_itself_or_a_slope_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "short", [with_table(a_slice((0, 0, k)), [5, 0, 16], [1, 2, 3, 4]) for k in range(3)])
    refused(tmp_path / "short", "values", "lookup table")
    both = [with_table(a_slice((0, 0, k)), [4, 0, 16], [1, 2, 3, 4]) for k in range(3)]
    for data in both:
        data.RescaleSlope, data.RescaleIntercept = 2, 0
    save(tmp_path / "both", both)
    refused(tmp_path / "both", "contradiction", "lookup table")


# padding


def padded(value: int, other: int = 50, kind: type = np.int16, **elements: Any) -> list[Dataset]:
    slices = []
    for k in range(3):
        plane = constant(other + k, kind)
        plane[0, :2] = value
        slices.append(a_slice((0, 0, k), values=plane, **elements))
    return slices


def test_padding_becomes_the_lowest_measured_value(tmp_path: Path) -> None:
    save(tmp_path, padded(-2000, PixelPaddingValue=-2000, RescaleIntercept=-1024))
    volume = read_one(tmp_path)
    assert volume.voxels[0, :2, 0].tolist() == [[-974] * 3] * 2 and volume.voxels[0, 3, 3].tolist() == [
        -974,
        -973,
        -972,
    ]
    assert "6 pixel(s) of padding" in volume.provenance.repairs[0] and "-974" in volume.provenance.repairs[0]


def test_a_range_of_padding_is_padding(tmp_path: Path) -> None:
    slices = padded(-2000, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990)
    for data in slices:
        plane = constant(50)
        plane[0, :4] = [-2000, -1995, -1990, -1989]
        data.PixelData = plane.tobytes()
    save(tmp_path, slices)
    assert read_one(tmp_path).voxels[0, :5, 0, 0].tolist() == [-1989, -1989, -1989, -1989, 50]


def test_padding_is_taken_out_before_slices_are_resampled(tmp_path: Path) -> None:
    slices = padded(-2000, PixelPaddingValue=-2000)
    for data, z in zip(slices, (0, 1, 3), strict=True):
        data.ImagePositionPatient = [0, 0, z]
    save(tmp_path, slices)
    assert read_one(tmp_path, Reading(allow=("gaps",))).voxels.min() == 50


@pytest.mark.parametrize(
    ("elements", "value"),
    [
        ({"PixelPaddingValue": 0, "Modality": "MR"}, 0),
        ({"PixelPaddingValue": -2000}, 5),
        ({"PixelPaddingValue": 7}, 50),
    ],
    ids=["a plain background", "declared, not held", "nothing held"],
)
def test_padding_that_is_none_changes_nothing(elements: dict[str, Any], value: int, tmp_path: Path) -> None:
    save(tmp_path, padded(value, **elements))
    volume = read_one(tmp_path)
    assert volume.voxels[0, 0, 0, 0] == value and volume.provenance.repairs == ()


def test_padding_beyond_the_bits_that_are_stored_hides_no_bone(tmp_path: Path) -> None:
    """63536 is -2000 in 16 bits; of 12 bits unsigned it would be 2096, a value like any other."""
    slices = [a_slice((0, 0, k), values=constant(2096, np.uint16)) for k in range(3)]
    for data in slices:
        data.BitsStored, data.HighBit, data.PixelPaddingValue = 12, 11, 63536
    save(tmp_path, slices)
    assert (read_one(tmp_path).voxels == 2096).all()


# what is only noted


def test_what_one_should_know_is_noted(tmp_path: Path) -> None:
    lossy = {"LossyImageCompression": "01", "PhotometricInterpretation": "MONOCHROME1", "ImagesInAcquisition": 9}
    save(tmp_path, a_stack(4, InstanceNumber=lambda k: k + 5, **lossy))
    volume = read_one(tmp_path)
    assert volume.provenance.verdict == "fine"
    assert_shows_the_ramp(volume)
    told = " ".join(volume.provenance.notes)
    for words in ("4 slice(s) had been compressed with loss", "MONOCHROME1", "begin at 5", "9 images were announced"):
        assert words in told
    assert volume.provenance.modality == "CT" and volume.provenance.encoding.startswith("Explicit VR Little Endian")
    assert len(volume.provenance.files) == len(volume.provenance.slices) == 4


def test_half_anonymised_files_are_read_and_said_to_be(tmp_path: Path) -> None:
    for path in save(tmp_path, a_stack(4)):
        data = pydicom.dcmread(path)
        data.SOPClassUID = data.SOPInstanceUID = data.StudyInstanceUID = ""
        data.save_as(path, enforce_file_format=False)
    volume = read_one(tmp_path)
    assert_shows_the_ramp(volume)
    assert any("SOPInstanceUID" in one for one in volume.provenance.repairs)


def test_frames_are_small_and_travel(tmp_path: Path) -> None:
    """A hundred thousand of them must fit into memory, and into another process."""
    save(tmp_path, a_stack(60))
    (series,) = series_of(tmp_path).values()
    assert len(pickle.dumps(series)) < 60 * 700
    again = pickle.loads(pickle.dumps(series))
    np.testing.assert_array_equal(dicom.read(again).voxels, dicom.read(series).voxels)


def test_a_file_that_vanished_or_shrank_between_finding_and_reading_is_refused(tmp_path: Path) -> None:
    paths = save(tmp_path, a_stack(4))
    (series,) = series_of(tmp_path).values()
    paths[1].write_bytes(paths[1].read_bytes()[:-20])
    with pytest.raises(UnreadableScan):
        dicom.read(series)
    paths[1].unlink()
    with pytest.raises(UnreadableScan):
        dicom.read(series)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_to_a_many_frame_object_gets_past_as_another_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    own = {"FrameContentSequence": {"StackID": "1", "DimensionIndexValues": [1, 2]}}
    frames = [placed(z, **own) for z in (0.0, 1.0, 2.0)]
    (path,) = save(folder, [many_frames(frames, shape=(2, 3), SOPInstanceUID="1.2.3.4")])
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(132, len(content) - 1), min_size=1, max_size=8)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    for series in dicom.series_in([path])[0]:
        try:
            dicom.read(series, Reading(allow=("few", "gaps", "uneven", "tilt")))
        except UnreadableScan as refusal:
            assert str(refusal)


# real ones


def test_a_real_enhanced_scan_has_the_values_and_the_place_of_its_classic_slice(shared: Path) -> None:
    folder = shared / "data" / "zoo" / "dicom_enhanced_ct_vs_classic"
    if not folder.is_dir():
        pytest.skip("the enhanced CT is not among the real scans")
    volume = dicom.read(dicom.series_in([folder / "volume.dcm"])[0][0])
    classic = pydicom.dcmread(folder / "slice1.dcm")
    values = classic.pixel_array * float(classic.RescaleSlope) + float(classic.RescaleIntercept)
    position = np.array([*classic.ImagePositionPatient, 1.0], float)
    i, j, k = volume.geometry.to_voxel((LPS_TO_RAS @ position)[:3])
    assert abs(i) < 1e-6 and abs(j) < 1e-6
    np.testing.assert_array_equal(volume.voxels[0, :, :, round(k)].T, values)


def test_what_an_archive_rewrote_is_the_same_scan(shared: Path) -> None:
    folder = shared / "data" / "zoo" / "dicom_enhanced_agfa_rewritten"
    if not folder.is_dir():
        pytest.skip("the rewritten scan is not among the real scans")
    one, other = (dicom.read(series) for series in dicom.series_in(list(folder.iterdir()))[0])
    np.testing.assert_array_equal(one.voxels, other.voxels)
    assert one.geometry.matches(other.geometry)


def test_a_copy_under_another_name_is_no_second_object(tmp_path: Path) -> None:
    (path,) = save(tmp_path, [many_frames([placed(z) for z in (0.0, 2.0, 4.0)])])
    shutil.copy(path, tmp_path / "copy")
    volume = read_one(tmp_path)
    assert volume.geometry.shape[2] == 3 and "twice" in volume.provenance.repairs[0]
    other = pydicom.dcmread(path)
    other.SOPInstanceUID = generate_uid()
    other.save_as(tmp_path / "copy")
    assert "same content" in read_one(tmp_path).provenance.repairs[0]


def test_the_ramp_is_what_it_says() -> None:
    assert ramp(np.zeros(3)) == 40.0


def test_an_object_cut_between_two_volumes_lacks_nothing(tmp_path: Path) -> None:
    parts = {"ConcatenationUID": "1.2.55", "InConcatenationTotalNumber": 2}
    halves = [
        many_frames(
            [placed(z, FrameContentSequence={"TemporalPositionIndex": n + 1}) for z in (0.0, 2.0, 4.0)],
            **parts,
            InConcatenationNumber=n + 1,
        )
        for n in range(2)
    ]
    save(tmp_path, halves)
    for one in series_of(tmp_path).values():
        assert_shows_the_ramp(dicom.read(one))


def test_a_slope_too_large_for_numbers_is_refused(tmp_path: Path) -> None:
    save(tmp_path, a_stack(4, RescaleSlope="1e38"))
    refused(tmp_path, "values", "RescaleSlope")


@pytest.mark.parametrize("lost", [("RescaleSlope", "RescaleIntercept"), ("RescaleIntercept",)])
def test_a_slice_that_lost_its_scale_is_not_read_as_another_one(lost: tuple[str, ...], tmp_path: Path) -> None:
    slices = [a_slice((0, 0, k), values=constant(7), RescaleIntercept=-1024) for k in range(4)]
    for tag in lost:
        delattr(slices[2], tag)
    save(tmp_path, slices)
    refused(tmp_path, "values", "0002.dcm")


def test_a_scale_of_one_may_be_left_out(tmp_path: Path) -> None:
    slices = [a_slice((0, 0, k), values=constant(7)) for k in range(4)]
    del slices[1].RescaleSlope, slices[1].RescaleIntercept
    save(tmp_path, slices)
    assert (read_one(tmp_path).voxels == 7).all()


def test_a_frame_that_lost_its_scale_is_not_read_as_another_one(tmp_path: Path) -> None:
    scale = {"PixelValueTransformationSequence": {"RescaleSlope": 2, "RescaleIntercept": 5}}
    frames = [placed(z, values=constant(10), **({} if z == 1 else scale)) for z in (0.0, 1.0, 2.0)]
    save(tmp_path, [many_frames(frames, {**SHARED, "PixelValueTransformationSequence": {"RescaleType": "US"}})])
    refused(tmp_path, "values")


def test_a_part_that_was_never_sent_is_missed_by_its_number(tmp_path: Path) -> None:
    """Nobody has to say into how many files an object was cut, but the third one says that there are three."""
    parts = [
        many_frames(
            [placed(2.0 * k) for k in range(3 * n, 3 * n + 3)], ConcatenationUID="1.7", InConcatenationNumber=n + 1
        )
        for n in range(3)
    ]
    save(tmp_path / "whole", parts)
    assert read_one(tmp_path / "whole").geometry.shape[2] == 9
    save(tmp_path / "cut", parts[1:])
    refused(tmp_path / "cut", "missing_slices", "2 of the 3 files")


def test_a_file_per_time_point_is_told_from_others_by_its_number(tmp_path: Path) -> None:
    for at_once in (6, 1):  # frames in a file
        files = [
            many_frames(
                [placed(2.0 * k, values=np.full((5, 6), 10 * t + k, np.int16)) for k in range(first, first + at_once)],
                InstanceNumber=6 * t + first + 1,
                SharedFunctionalGroupsSequence=None,
                PixelSpacing=[1, 1],
                ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            )
            for t in range(3)
            for first in range(0, 6, at_once)
        ]
        save(tmp_path / str(at_once), files)
        series = series_of(tmp_path / str(at_once))
        assert set(series) == {"repeat 1", "repeat 2", "repeat 3"}
        for t, name in enumerate(sorted(series)):
            volume = dicom.read(series[name])
            np.testing.assert_array_equal(volume.voxels[0, 0, 0], 10 * t + np.arange(6))
            assert "instance numbers" in volume.provenance.repairs[0]


def mapped(*slopes: float) -> dict[str, Any]:
    """Shared groups that have a real world value mapping per slope in place of a rescale slope."""
    rest = {macro: item for macro, item in SHARED.items() if macro != "PixelValueTransformationSequence"}
    return {**rest, "RealWorldValueMappingSequence": {"RealWorldValueSlope": slopes[0], "RealWorldValueIntercept": 0.0}}


def test_where_there_is_no_slope_the_real_world_value_mapping_holds(tmp_path: Path) -> None:
    """As in parametric maps, whose stored values mean nothing; a slope beside it comes first."""
    frames = [placed(2.0 * k) for k in range(4)]
    save(tmp_path / "map", [many_frames(frames, mapped(SLOPE))])
    assert_shows_the_ramp(read_one(tmp_path / "map"))
    both = SHARED | {"RealWorldValueMappingSequence": {"RealWorldValueSlope": 7.0, "RealWorldValueIntercept": 0.0}}
    save(tmp_path / "both", [many_frames(frames, both)])
    assert_shows_the_ramp(read_one(tmp_path / "both"))


def test_several_real_world_values_are_no_one_value(tmp_path: Path) -> None:
    data = many_frames([placed(2.0 * k) for k in range(4)], mapped(SLOPE))
    mappings = data.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence
    other = Dataset()
    other.RealWorldValueSlope, other.RealWorldValueIntercept = 5.0, 0.0
    mappings.append(other)
    save(tmp_path, [data])
    refused(tmp_path, "values", "real world value mappings")


def shown(volume: Volume) -> int:
    """The stored value that every voxel has."""
    assert np.ptp(volume.voxels) == 0
    return round(float(volume.voxels.max()) / SLOPE)


def test_phases_of_heart_and_breath_come_apart_together(tmp_path: Path) -> None:
    """Delays differ from slice to slice, as hearts do not beat evenly; the share of the cycle tells the phases."""
    frames = [
        placed(
            2.0 * k,
            values=constant(10 * phase + breath),
            CardiacSynchronizationSequence={
                "NominalPercentageOfCardiacPhase": 5.0 * phase,
                "NominalCardiacTriggerDelayTime": (40.0 + 3 * k) * phase,
            },
            RespiratorySynchronizationSequence={"NominalPercentageOfRespiratoryPhase": 50.0 * breath},
        )
        for phase in range(20)
        for breath in range(2)
        for k in range(4)
    ]
    save(tmp_path, [many_frames(frames)])
    volumes = [dicom.read(one) for one in series_of(tmp_path).values()]
    assert sorted(shown(volume) for volume in volumes) == [10 * p + b for p in range(20) for b in range(2)]
    assert all(volume.geometry.shape[2] == 4 for volume in volumes)


def test_time_offsets_tell_time_points_apart(tmp_path: Path) -> None:
    frames = [
        placed(2.0 * k, values=constant(t), TemporalPositionSequence={"TemporalPositionTimeOffset": 5.0 * t})
        for k in range(4)
        for t in range(3)
    ]
    save(tmp_path, [many_frames(frames)])
    series = series_of(tmp_path)
    assert set(series) == {"time 1", "time 2", "time 3"}
    assert [shown(dicom.read(series[name])) for name in sorted(series)] == [0, 1, 2]
