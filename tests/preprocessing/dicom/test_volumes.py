"""What lies or shows something else is another volume; what varies for no reason tears none apart; nothing is guessed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedMRImageStorage, generate_uid

from preprocessing import dicom
from preprocessing.reading import Reading
from preprocessing.volume import UnreadableScan
from tests.preprocessing.dicom.slices import a_slice, a_stack, assert_shows_the_ramp, read_one, save, series_of

SAGITTAL = ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0))
CORONAL = ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0))


def two(first: dict[str, Any], second: dict[str, Any], **both: Any) -> list[Dataset]:
    """Two volumes at one place."""
    return [*a_stack(5, Modality="MR", **both, **first), *a_stack(5, Modality="MR", **both, **second)]


# what is always another volume


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ({"EchoTime": 11}, {"EchoTime": 92}, {"echo 1", "echo 2"}),
        ({"EchoTime": 92, "EchoNumbers": 2}, {"EchoTime": 11, "EchoNumbers": 1}, {"echo 1", "echo 2"}),
        ({"EchoNumbers": 1}, {"EchoNumbers": 2}, {"echo 1", "echo 2"}),
        ({"DiffusionBValue": 0.0}, {"DiffusionBValue": 1000.0}, {"b 0", "b 1000"}),
        ({}, {"DiffusionBValue": 800.0}, {"b unknown", "b 800"}),
        ({"TemporalPositionIdentifier": 2}, {"TemporalPositionIdentifier": 10}, {"time 1", "time 2"}),
        ({"StackID": "1"}, {"StackID": "2"}, {"stack 1", "stack 2"}),
        ({"ComplexImageComponent": "MAGNITUDE"}, {"ComplexImageComponent": "PHASE"}, {"magnitude", "phase"}),
        ({"ImageType": ["O", "P", "M_FFE", "M"]}, {"ImageType": ["O", "P", "R_FFE", "R"]}, {"magnitude", "real"}),
        ({"ImageType": ["D", "P", "WATER"]}, {"ImageType": ["D", "P", "FAT"]}, {"water", "fat"}),
        ({"ImageType": ["D", "P", "DIFFUSION", "ADC"]}, {"ImageType": ["O", "P", "M"]}, {"adc", "magnitude"}),
        ({"spacing": (0.8, 0.7)}, {"spacing": (0.8, 0.9)}, {"spacing 1", "spacing 2"}),
        ({}, {"FrameOfReferenceUID": "1.2.77"}, {"reference 1", "reference 2"}),
        ({}, {"direction": ((1.0, 0.0, 0.0), (0.0, 0.99995, 0.00999983))}, {"orientation 1", "orientation 2"}),
        ({}, {"shape": (6, 6)}, {"5 x 6", "6 x 6"}),
    ],
)
def test_another_place_or_another_thing_is_another_volume(
    first: dict[str, Any], second: dict[str, Any], names: set[str], tmp_path: Path
) -> None:
    save(tmp_path, two(first, second))
    series = series_of(tmp_path)
    assert set(series) == names
    for one in series.values():
        assert len(one.paths) == 5 and one.volumes == 2
        if "direction" not in second:
            assert_shows_the_ramp(dicom.read(one))


def test_they_are_another_volume_even_where_they_do_not_overlap(tmp_path: Path) -> None:
    save(tmp_path, [*a_stack(4, EchoTime=11), *[a_slice((-10, -20, 40 + 2.5 * k), EchoTime=92) for k in range(4)]])
    assert {len(one.paths) for one in series_of(tmp_path).values()} == {4}


@pytest.mark.parametrize(
    ("tag", "values"),
    [("EchoTime", (4.60, 4.62, 4.64, 4.61, 4.63)), ("DiffusionBValue", (995.0, 1000.0, 1003.0, 998.0, 1001.0))],
)
def test_numbers_that_were_only_rounded_differently_are_one(
    tag: str, values: tuple[float, ...], tmp_path: Path
) -> None:
    save(tmp_path, a_stack(5, **{tag: lambda k: values[k]}))
    assert set(series_of(tmp_path)) == {""}


@pytest.mark.parametrize(
    ("private", "name"),
    [
        ([(0x00190010, "LO", "SIEMENS MR HEADER"), (0x0019100C, "IS", "700")], "b 700"),
        ([(0x00430010, "LO", "GEMS_PARM_01"), (0x00431039, "IS", ["1000000700", "8", "0", "0"])], "b 700"),
        ([(0x20010010, "LO", "Philips Imaging DD 001"), (0x20011003, "FL", 700.0)], "b 700"),
        ([(0x00650010, "LO", "Image Private Header"), (0x00651009, "FD", 700.0)], "b 700"),
    ],
)
@pytest.mark.parametrize("implicit", [False, True])
def test_the_b_values_of_vendors_are_known(
    private: list[tuple[int, str, Any]], name: str, implicit: bool, tmp_path: Path
) -> None:
    slices = two({"DiffusionBValue": 0.0}, {})
    for data in slices[5:]:
        for tag, vr, value in private:
            data.add_new(tag, vr, value)
    for path in save(tmp_path, slices):
        if implicit:
            data = pydicom.dcmread(path)
            data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2"
            pydicom.dcmwrite(path, data, implicit_vr=True, little_endian=True)
    assert set(series_of(tmp_path)) == {"b 0", name}


# what tears nothing apart


@pytest.mark.parametrize(
    "varying",
    [
        {"Exposure": lambda k: 100 + 7 * k},
        {"AcquisitionNumber": lambda k: 1 + k // 2},
        {"AcquisitionTime": lambda k: f"1010{k:02d}.5", "ContentTime": lambda k: f"1012{k:02d}"},
        {"ImageType": lambda k: ["ORIGINAL", "PRIMARY", "AXIAL", *(["ADD"] if k % 3 else [])]},
        {"KVP": lambda k: 100 + 20 * (k == 3)},
        {"TriggerTime": lambda k: 13.0 * k},
        {"TemporalPositionIdentifier": lambda k: k + 1},
        {"StackID": lambda k: str(k)},
        {"ImageOrientationPatient": lambda k: [1, 0, 0, 0, 1, 3e-5 * (k % 2)]},
        {"SliceThickness": lambda k: k},
        {"WindowCenter": lambda k: k},
    ],
)
def test_what_varies_from_slice_to_slice_tears_no_volume_apart(varying: dict[str, Callable], tmp_path: Path) -> None:
    save(tmp_path, a_stack(7, **varying))
    volume = read_one(tmp_path)
    assert volume.geometry.shape == (6, 5, 7) and volume.provenance.repairs == ()


@pytest.mark.parametrize("tag", ["EchoTime", "TemporalPositionIdentifier", "StackID", "FrameOfReferenceUID"])
def test_one_slice_that_does_not_say_goes_with_the_others(tag: str, tmp_path: Path) -> None:
    slices = a_stack(5, EchoTime=4.6, TemporalPositionIdentifier=1, StackID="1")
    del slices[2][tag]
    save(tmp_path, slices)
    assert read_one(tmp_path).geometry.shape[2] == 5


# what is asked only where several lie at one place


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "OTHER"]}, {"ImageType": ["DERIVED", "PRIMARY", "OTHER"]}, "type"),
        ({"AcquisitionNumber": 9}, {"AcquisitionNumber": 10}, "acquisition"),
        ({"TriggerTime": 0.0}, {"TriggerTime": 40.0}, "phase"),
        ({"DiffusionGradientOrientation": [1.0, 0, 0]}, {"DiffusionGradientOrientation": [0, 1.0, 0]}, "direction"),
        ({"InversionTime": 100.0}, {"InversionTime": 2000.0}, "inversion"),
        ({"AcquisitionTime": "101010.25"}, {"AcquisitionTime": "101012"}, "time"),
        ({"ContentTime": "101010"}, {"ContentTime": "101012"}, "time"),
        ({"SeriesTime": "101010"}, {"SeriesTime": "101012"}, "time"),
        ({"KVP": 80.0}, {"KVP": 140.0}, "voltage"),
        ({"ConvolutionKernel": "B30f"}, {"ConvolutionKernel": "B70f"}, "kernel"),
        ({"CorrectedImage": "ATTN"}, {"CorrectedImage": "DECY"}, "correction"),
        ({"FrameReferenceTime": 500.0, "TriggerTime": 0.0}, {"FrameReferenceTime": 900.0, "TriggerTime": 0.0}, "time"),
    ],
)
def test_volumes_at_one_place_come_apart_by_the_first_clue_that_does(
    first: dict[str, Any], second: dict[str, Any], word: str, tmp_path: Path
) -> None:
    save(tmp_path, two(first, second, InstanceNumber=1))
    series = series_of(tmp_path)
    assert set(series) == {f"{word} 1", f"{word} 2"}
    for rank, values in ((1, first), (2, second)):
        tag, value = next(iter(values.items()))
        headers = [pydicom.dcmread(path) for path in series[f"{word} {rank}"].paths]
        if word not in ("type", "direction"):
            assert all(str(header[tag].value) == str(value) for header in headers)
        assert dicom.read(series[f"{word} {rank}"]).provenance.repairs == ()


def test_times_that_run_on_from_slice_to_slice_tell_volumes_apart(tmp_path: Path) -> None:
    first = a_stack(5, AcquisitionTime=lambda k: f"10101{k}", InstanceNumber=1)
    save(tmp_path, [*first, *a_stack(5, AcquisitionTime=lambda k: f"10102{k}", InstanceNumber=1)])
    assert {name: len(one.paths) for name, one in series_of(tmp_path).items()} == {"time 1": 5, "time 2": 5}


def test_two_clues_together_tell_volumes_apart(tmp_path: Path) -> None:
    four = [a_stack(4, AcquisitionNumber=a, InversionTime=t, InstanceNumber=1) for a in (1, 2) for t in (100, 900)]
    save(tmp_path, [data for stack in four for data in stack])
    assert {name: len(one.paths) for name, one in series_of(tmp_path).items()} == {
        f"acquisition {n}": 4 for n in range(1, 5)
    }


@pytest.mark.parametrize("number", [lambda t, k: 5 * t + k, lambda t, k: 2 * k + t], ids=["in turn", "side by side"])
def test_at_last_instance_numbers_tell_volumes_apart_and_that_is_said(
    number: Callable[[int, int], int], tmp_path: Path
) -> None:
    slices = [
        a_slice((0, 0, k), values=np.full((5, 6), 100 * t + k, np.int16), InstanceNumber=number(t, k))
        for t in range(2)
        for k in range(5)
    ]
    save(tmp_path, slices)
    series = series_of(tmp_path)
    assert set(series) == {"repeat 1", "repeat 2"}
    for t, name in enumerate(sorted(series)):
        volume = dicom.read(series[name])
        np.testing.assert_array_equal(volume.voxels[0, 0, 0], 100 * t + np.arange(5))
        assert "instance numbers" in volume.provenance.repairs[0]


def test_instance_numbers_in_no_order_are_not_believed(tmp_path: Path) -> None:
    numbers = [1, 9, 3, 7, 5, 2, 4, 8, 6, 10]
    slices = [
        a_slice((0, 0, n % 5), values=np.full((5, 6), n, np.int16), InstanceNumber=number)
        for n, number in enumerate(numbers)
    ]
    save(tmp_path, slices)
    with pytest.raises(UnreadableScan, match="several slices lie that differ") as no:
        read_one(tmp_path)
    assert no.value.reason == "duplicate_slices"


def test_a_stray_value_does_not_divide_what_it_cannot_divide_evenly(tmp_path: Path) -> None:
    """One slice twice, the second time under another acquisition number: no second volume, but a doubtful place."""
    extra = a_slice((-10, -20, 35), values=np.full((5, 6), 7, np.int16), AcquisitionNumber=2, InstanceNumber=9)
    save(tmp_path, [*a_stack(5, AcquisitionNumber=1), extra])
    with pytest.raises(UnreadableScan) as no:
        read_one(tmp_path)
    assert no.value.reason == "duplicate_slices"


@pytest.mark.parametrize("tag", ["AcquisitionNumber", "ConvolutionKernel", "KVP"])
def test_runs_that_share_only_some_places_come_apart_by_a_label_of_their_own(tag: str, tmp_path: Path) -> None:
    """Chest and belly in one series, which overlap; every slice lies where it lies, and nothing is made up."""
    runs = {1: range(8), 2: range(5, 11)}
    slices = [
        a_slice(
            (-10, -20, 2.0 * k), values=np.full((5, 6), 100 * run + k, np.int16), InstanceNumber=k, **{tag: str(run)}
        )
        for run, ks in runs.items()
        for k in ks
    ]
    save(tmp_path, slices)
    series = series_of(tmp_path)
    assert len(series) == 2
    for one, (run, ks) in zip((series[name] for name in sorted(series)), runs.items(), strict=True):
        volume = dicom.read(one)
        np.testing.assert_array_equal(volume.voxels[0, 0, 0], [100 * run + k for k in ks])
        assert volume.geometry.affine[2, 3] == 2.0 * ks[0]


def test_overlapping_runs_of_which_one_lacks_a_slice_are_refused(tmp_path: Path) -> None:
    slices = [
        a_slice((0, 0, 2.0 * k), values=np.full((5, 6), n, np.int16), AcquisitionNumber=n, InstanceNumber=k)
        for n, ks in ((1, (0, 1, 2, 4, 5, 6)), (2, range(4, 11)))
        for k in ks
    ]
    save(tmp_path, slices)
    with pytest.raises(UnreadableScan) as no:
        read_one(tmp_path)
    assert no.value.reason == "duplicate_slices"


@pytest.mark.parametrize("tag", ["Units", "RescaleType"])
def test_slices_that_count_other_units_are_never_one_volume(tag: str, tmp_path: Path) -> None:
    save(tmp_path, a_stack(6, **{tag: lambda k: "BQML" if k < 3 else "CNTS"}))
    assert {name: len(one.paths) for name, one in series_of(tmp_path).items()} == {"units 1": 3, "units 2": 3}


def test_neighbouring_low_b_values_stay_apart(tmp_path: Path) -> None:
    """As in perfusion studies (IVIM); what differs by a hundredth of itself is one b-value that wavers."""
    stacks = [a_stack(3, DiffusionBValue=float(b), Modality="MR") for b in (0, 5, 10, 15, 20)]
    wavering = a_stack(3, DiffusionBValue=lambda k: 990.0 + 5 * k, Modality="MR")
    save(tmp_path, [data for stack in (*stacks, wavering) for data in stack])
    assert set(series_of(tmp_path)) == {"b 0", "b 5", "b 10", "b 15", "b 20", "b 990"}


def test_stacks_side_by_side_are_two_volumes(tmp_path: Path) -> None:
    save(tmp_path, [a_slice((x, -20, 2.0 * k), InstanceNumber=1) for x in (-90, 40) for k in range(5)])
    series = series_of(tmp_path)
    assert set(series) == {"place 1", "place 2"}
    for one in series.values():
        assert_shows_the_ramp(dicom.read(one))


# copies


def test_a_file_that_lies_there_twice_counts_once(tmp_path: Path) -> None:
    paths = save(tmp_path, a_stack(5))
    shutil.copy(paths[2], tmp_path / "copy")
    (series,) = series_of(tmp_path).values()
    assert len(series.paths) == 6
    volume = dicom.read(series)
    assert volume.geometry.shape[2] == 5 and "twice" in volume.provenance.repairs[0]


def test_one_object_with_two_contents_is_refused(tmp_path: Path) -> None:
    slices = a_stack(5)
    save(tmp_path, [*slices, a_slice((-10, -20, 35), SOPInstanceUID=slices[2].SOPInstanceUID, InstanceNumber=77)])
    with pytest.raises(UnreadableScan, match="bear one SOPInstanceUID") as no:
        read_one(tmp_path)
    assert no.value.reason == "contradiction"


@pytest.mark.parametrize("several", [1, 5])
def test_slices_of_one_content_at_one_place_count_once(several: int, tmp_path: Path) -> None:
    save(tmp_path, [*a_stack(5), *a_stack(5)[:several]])
    volume = read_one(tmp_path)
    assert volume.geometry.shape[2] == 5 and f"{several} slice(s) lay at the place" in volume.provenance.repairs[0]


def test_slices_of_other_values_at_one_place_are_refused(tmp_path: Path) -> None:
    save(tmp_path, [*a_stack(5), a_slice((-10, -20, 35), RescaleIntercept=1, InstanceNumber=3)])
    with pytest.raises(UnreadableScan) as no:
        read_one(tmp_path)
    assert no.value.reason == "duplicate_slices"


# odd ones among many


@pytest.mark.parametrize("odd", [{"shape": (7, 6)}, {"direction": SAGITTAL}])
@pytest.mark.parametrize("place", [-10.0, 35.0])
def test_an_odd_slice_stands_apart_and_the_rest_by_its_own_rules(
    odd: dict[str, Any], place: float, tmp_path: Path
) -> None:
    """In the middle it leaves a gap; as one too many it leaves a volume."""
    slices = a_stack(5)
    if place == 35.0:
        del slices[2]
    save(tmp_path, [*slices, a_slice((-10, -20, place), **odd)])
    series = sorted(series_of(tmp_path).values(), key=lambda one: len(one.paths))
    with pytest.raises(UnreadableScan) as no:
        dicom.read(series[0])
    assert no.value.reason == "too_few_slices"
    if place == 35.0:
        with pytest.raises(UnreadableScan) as no:
            dicom.read(series[1])
        assert no.value.reason == "missing_slices"
    else:
        assert "one of 2 volumes" in dicom.read(series[1]).provenance.notes[0]


def test_a_slice_without_a_place_spoils_the_volume_it_may_belong_to(tmp_path: Path) -> None:
    lost = a_slice((0, 0, 0))
    del lost.ImagePositionPatient
    save(tmp_path, [*a_stack(5), *[a_slice((0, 0, k), shape=(9, 9)) for k in range(4)], lost])
    series = series_of(tmp_path)
    with pytest.raises(UnreadableScan, match="no ImagePositionPatient") as no:
        dicom.read(series["5 x 6"])
    assert no.value.reason == "no_geometry"
    assert dicom.read(series["9 x 9"]).geometry.shape == (9, 9, 4)


def test_an_unplaced_slice_of_another_size_is_a_refused_case_of_its_own(tmp_path: Path) -> None:
    lost = a_slice((0, 0, 0), shape=(9, 9))
    del lost.ImagePositionPatient
    save(tmp_path, [*a_stack(5), lost])
    series = series_of(tmp_path)
    assert set(series) == {"", "unplaced"} and dicom.read(series[""]).geometry.shape[2] == 5
    with pytest.raises(UnreadableScan):
        dicom.read(series["unplaced"])


def test_few_slices_in_three_directions_are_a_localizer(tmp_path: Path) -> None:
    three = [a_slice((30.0 * k, 30.0 * k, 30.0 * k), direction) for direction in (SAGITTAL, CORONAL) for k in range(3)]
    paths = save(tmp_path, [*three, *a_stack(3)])
    series, left_alone = dicom.series_in(paths)
    assert not series and set(left_alone) == set(paths) and "localizer" in left_alone[paths[0]]


def test_many_slices_in_three_directions_are_three_volumes(tmp_path: Path) -> None:
    stacks = [a_slice((2.0 * k, 2.0 * k, 2.0 * k), direction) for direction in (SAGITTAL, CORONAL) for k in range(12)]
    save(tmp_path, [*stacks, *a_stack(12)])
    assert {name: len(one.paths) for name, one in series_of(tmp_path).items()} == {
        f"orientation {n}": 12 for n in (1, 2, 3)
    }


# series


def test_series_of_two_studies_never_meet_even_under_one_uid(tmp_path: Path) -> None:
    save(tmp_path, [*a_stack(4), *[a_slice((-10, -20, 40 + 2.5 * k), StudyInstanceUID="9.9") for k in range(4)]])
    series, _ = dicom.series_in(list(tmp_path.iterdir()))
    assert [len(one.paths) for one in series] == [4, 4] and len({one.study_uid for one in series}) == 2


def test_files_without_a_series_are_one_if_they_fill_a_folder(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        save(tmp_path / folder, a_stack(4, SeriesInstanceUID=""))
    series, left_alone = dicom.series_in([path for path in tmp_path.rglob("*.dcm")])
    assert [len(one.paths) for one in series] == [4, 4] and not left_alone
    assert "do not say to which series" in dicom.read(series[0]).provenance.repairs[0]


def test_a_file_without_a_series_beside_others_is_spoiled(tmp_path: Path) -> None:
    paths = save(tmp_path, [*a_stack(4), a_slice((0, 0, 0), SeriesInstanceUID="")])
    series, left_alone = dicom.series_in(paths)
    assert len(series) == 1 and left_alone[paths[-1]].startswith(dicom.DAMAGED)


def test_patients_name_and_uids_are_in_no_message(tmp_path: Path) -> None:
    secret = {"PatientName": "Canary^Yellow", "SeriesDescription": "Canary", "StackID": "Canary"}
    save(tmp_path / "a", [*a_stack(3, **secret), *a_stack(3, **{**secret, "StackID": "Canary 2"})][:-1])
    for one in series_of(tmp_path / "a").values():
        assert "canary" not in one.part.lower()
        try:
            volume = dicom.read(one)
            told = repr(volume.provenance)
        except UnreadableScan as refusal:
            told = str(refusal)
        assert "Canary" not in told and "1.2.3" not in told


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(12)), echoes=st.lists(st.sampled_from([11.0, 92.0]), min_size=4, max_size=4))
def test_volumes_and_their_names_do_not_depend_on_the_order_of_files(
    order: list[int], echoes: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    slices = [*a_stack(4, EchoTime=11, AcquisitionNumber=1), *a_stack(4, EchoTime=92)]
    slices += [a_slice((-10, -20, 30 + 2.5 * k), EchoTime=11, AcquisitionNumber=2, InstanceNumber=k) for k in range(4)]
    for number, data in enumerate(slices):
        data.SOPInstanceUID = f"1.2.{number + 1}"
    folder = tmp_path_factory.mktemp("order")
    save(folder, [slices[n] for n in order])
    found = {name: {frame.uid for frame in one.frames} for name, one in series_of(folder).items()}
    assert found == {
        "echo 1 acquisition 1": {f"1.2.{n}" for n in range(1, 5)},
        "echo 1 acquisition 2": {f"1.2.{n}" for n in range(9, 13)},
        "echo 2": {f"1.2.{n}" for n in range(5, 9)},
    }


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_the_headers_say_no_frame_is_lost_or_in_two_volumes(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """And a volume that is read holds every place once."""
    slices = []
    for number in range(data.draw(st.integers(1, 9))):
        words = {
            "EchoTime": data.draw(st.sampled_from([1, 2])),
            "AcquisitionNumber": data.draw(st.sampled_from([1, 2])),
            "InstanceNumber": data.draw(st.integers(1, 4)),
            "ContentTime": data.draw(st.sampled_from(["", "10", "1010", "101112.5"])),
        }
        height = data.draw(st.integers(0, 4))
        slices.append(a_slice((0, 0, height), **words, values=np.full((2, 2), number, np.int16)))
    folder = tmp_path_factory.mktemp("any")
    paths = save(folder, slices)
    series = list(series_of(folder).values())
    assert sorted(path for one in series for path in one.paths) == sorted(paths)
    for one in series:
        try:
            volume = dicom.read(one, Reading(allow=("few", "gaps", "uneven")))
        except UnreadableScan as refusal:
            assert refusal.reason in ("too_few_slices", "duplicate_slices", "missing_slices", "uneven_spacing")
            continue
        heights = {frame.position[2] for frame in one.frames if frame.position}
        assert len(heights) == len(one.frames)
        for frame in one.frames:
            assert frame.position is not None
            stored = int(pydicom.dcmread(frame.path).pixel_array[0, 0])
            ijk = volume.geometry.to_voxel([0, 0, frame.position[2]])
            if abs(ijk[2] - round(ijk[2])) < 1e-6:
                assert volume.voxels[0, 0, 0, round(ijk[2])] == stored


def test_a_class_that_only_looks_plain_is_named(tmp_path: Path) -> None:
    save(tmp_path, a_stack(4, SOPClassUID=EnhancedMRImageStorage))
    with pytest.raises(UnreadableScan, match="Enhanced MR Image Storage") as no:
        read_one(tmp_path)
    assert no.value.reason == "unsupported"


def test_a_class_nobody_knows_is_read_where_it_says_everything(tmp_path: Path) -> None:
    save(tmp_path / "ct", a_stack(4, SOPClassUID=generate_uid()))
    assert "no standard knows" in read_one(tmp_path / "ct").provenance.notes[0]
    save(tmp_path / "us", a_stack(4, SOPClassUID=generate_uid(), Modality="US"))
    with pytest.raises(UnreadableScan):
        read_one(tmp_path / "us")
