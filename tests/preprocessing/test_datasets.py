"""Every layout is read, and everything that does not fit is named, case by case, to the end."""

import csv
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from preprocessing import dicom, files
from preprocessing.datasets import (
    DatasetError,
    Finding,
    check,
    examine,
    label_table,
    open_dataset,
    read_labels,
    take_fingerprint,
)
from preprocessing.dicom.labels import is_labels
from preprocessing.files import read
from preprocessing.volume import ScanError

SHAPE = (8, 9, 7)
AFFINE = np.array([[0, -1.5, 0, 30], [1.5, 0, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])
MSD = {
    "name": "Livers",
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "liver", "2": "lesion"},
    "training": [{"image": f"./imagesTr/case_{n}.nii.gz", "label": f"./labelsTr/case_{n}.nii.gz"} for n in range(3)],
}


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def an_image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, SHAPE).astype(np.float32)


def some_labels(*values: int) -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    for n, value in enumerate(values):
        labels[n + 1, 2:6, 2:5] = value
    return labels


@pytest.fixture
def decathlon(tmp_path: Path) -> Path:
    """Three cases in Decathlon's layout, all well."""
    root = tmp_path / "Task99"
    for n in range(3):
        save(root / "imagesTr" / f"case_{n}.nii.gz", an_image(n))
        save(root / "labelsTr" / f"case_{n}.nii.gz", some_labels(1, 2))
    (root / "dataset.json").write_text(json.dumps(MSD))
    return root


def findings(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for finding in check(open_dataset(path)):
        found.setdefault(finding.case, []).append(finding.problem)
    return found


def test_decathlon_is_read(decathlon):
    dataset = open_dataset(decathlon)
    assert (dataset.name, dataset.channels) == ("Livers", ("CT",))
    assert [(label.value, label.name) for label in dataset.labels] == [(1, "liver"), (2, "lesion")]
    assert [files.id for files in dataset.cases] == ["case_0", "case_1", "case_2"]
    assert check(dataset) == ()
    case = dataset.read(dataset.cases[1])
    np.testing.assert_array_equal(case.image.voxels[0], an_image(1))
    np.testing.assert_array_equal(case.labels.voxels[0], some_labels(1, 2))
    assert case.image.channels == ("CT",)
    assert case.labels.voxels.dtype == np.uint8


def test_nnunet_with_two_channels_is_read_in_the_order_of_its_numbers(tmp_path):
    for case in ("a", "b_01"):
        for channel in (1, 0):
            save(tmp_path / "imagesTr" / f"{case}_000{channel}.nii.gz", an_image(channel))
        save(tmp_path / "labelsTr" / f"{case}.nii.gz", some_labels(3))
    record = {"channel_names": {"1": "T2", "0": "T1"}, "labels": {"background": 0, "cyst": 3}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(record))
    dataset = open_dataset(tmp_path)
    assert dataset.channels == ("T1", "T2")
    assert [files.id for files in dataset.cases] == ["a", "b_01"]
    assert [(label.value, label.name) for label in dataset.labels] == [(3, "cyst")]
    image = dataset.read(dataset.cases[0]).image
    np.testing.assert_array_equal(image.voxels, [an_image(0), an_image(1)])
    assert [finding.case for finding in check(dataset)] == ["b_01"]  # the twin


def test_images_beside_labels_are_read_without_a_description(tmp_path):
    for n in range(2):
        save(tmp_path / "images" / f"p{n}.nii", an_image(n))
        save(tmp_path / "labels" / f"p{n}.nii.gz", some_labels(4, 9))
    dataset = open_dataset(tmp_path)
    assert (dataset.name, dataset.channels, dataset.labels) == (tmp_path.name, ("channel_0",), ())
    assert check(dataset) == ()
    assert [label.name for label in take_fingerprint(dataset).labels] == ["label_4", "label_9"]


def write_table(path: Path, rows: list[list[str]], **how: str) -> Path:
    with path.open("w", newline="", **how) as lines:
        csv.writer(lines).writerows(rows)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_is_read_with_paths_beside_it_or_absolute(tmp_path, encoding):
    for n in range(2):
        save(tmp_path / "scans" / f"t1_{n}.nii.gz", an_image(n))
        save(tmp_path / "scans" / f"t2_{n}.nii.gz", an_image(n + 5))
        save(tmp_path / "painted" / f"{n}.nii.gz", some_labels(1))
    rows = [
        ["id", "t1", "t2", "labels"],
        *[
            [f"p{n}", f"scans/t1_{n}.nii.gz", str(tmp_path / f"scans/t2_{n}.nii.gz"), f"painted/{n}.nii.gz"]
            for n in (0, 1)
        ],
    ]
    dataset = open_dataset(write_table(tmp_path / "study.csv", rows, encoding=encoding))
    assert (dataset.name, dataset.layout, dataset.channels) == ("study", "CSV", ("t1", "t2"))
    assert check(dataset) == ()
    np.testing.assert_array_equal(dataset.read(dataset.cases[1]).image.voxels, [an_image(1), an_image(6)])


def test_rows_of_a_table_that_name_nothing_are_found(tmp_path):
    save(tmp_path / "a.nii.gz", an_image(0))
    save(tmp_path / "la.nii.gz", some_labels(1))
    rows = [["id", "ct", "labels"], ["a", "a.nii.gz", "la.nii.gz"], ["b", "b.nii.gz", "la.nii.gz"], ["c", "a.nii.gz"]]
    rows += [
        ["d", str(tmp_path.parent / "nowhere.nii"), ""],
        ["a", "a.nii.gz", "la.nii.gz"],
        ["e/f", "a.nii.gz", "la.nii.gz"],
    ]
    found = findings(write_table(tmp_path / "study.csv", rows))
    assert "b.nii.gz does not exist" in found["b"][0]
    assert "labels does not exist" in found["c"][0]
    assert len(found["d"]) == 2
    assert any("the id of 2 cases" in problem for problem in found["a"])
    assert any("no name for a folder" in problem for problem in found["e/f"])


def test_a_table_without_its_columns_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="id, labels and one column per channel are needed"):
        open_dataset(write_table(tmp_path / "study.csv", [["case", "ct"], ["a", "b"]]))


def test_what_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="neither imagesTr"):
        open_dataset(tmp_path)


def test_every_orphan_is_named(decathlon):
    (decathlon / "labelsTr" / "case_0.nii.gz").unlink()
    (decathlon / "imagesTr" / "case_2.nii.gz").unlink()
    found = findings(decathlon)
    assert list(found) == ["case_0", "case_2"]
    assert "an image but no labels in labelsTr" in found["case_0"][0]
    assert "labels but no image in imagesTr" in found["case_2"][0]


def test_a_listed_case_that_lies_in_no_folder_is_named_with_the_nearest(decathlon):
    for folder in ("imagesTr", "labelsTr"):
        (decathlon / folder / "case_1.nii.gz").unlink()
    (problem,) = findings(decathlon)["case_1"]
    assert "listed in dataset.json but lies in no folder" in problem
    assert "did you mean" in problem


def spoil_grid(root: Path) -> None:
    half = AFFINE.copy()
    half[:3, 3] += AFFINE[:3, 0] / 2
    save(root / "labelsTr" / "case_0.nii.gz", some_labels(1), half)


def spoil_label(root: Path) -> None:
    save(root / "labelsTr" / "case_0.nii.gz", some_labels(1, 2, 7))


def spoil_nan(root: Path) -> None:
    image = an_image(0)
    image[1, 2, 3] = np.nan
    save(root / "imagesTr" / "case_0.nii.gz", image)


def spoil_contrast(root: Path) -> None:
    save(root / "imagesTr" / "case_0.nii.gz", np.full(SHAPE, 7, np.int16))


def spoil_kind(root: Path) -> None:
    save(root / "labelsTr" / "case_0.nii.gz", some_labels(1).astype(np.float32) / 2)


def spoil_sign(root: Path) -> None:
    save(root / "labelsTr" / "case_0.nii.gz", -some_labels(1).astype(np.int16))


def spoil_file(root: Path) -> None:
    path = root / "imagesTr" / "case_0.nii.gz"
    path.write_bytes(path.read_bytes()[:-200])


def spoil_dimension(root: Path) -> None:
    save(root / "imagesTr" / "case_0.nii.gz", np.stack([an_image(0), an_image(1)], axis=-1))


def spoil_label_channels(root: Path) -> None:
    save(root / "labelsTr" / "case_0.nii.gz", np.stack([some_labels(1)] * 2, axis=-1))


SPOILT = {
    spoil_grid: "0.75 mm apart",
    spoil_label: "12 voxels carry the label 7, which dataset.json does not declare",
    spoil_nan: "case_0.nii.gz",
    spoil_contrast: "every voxel of channel CT is 7",
    spoil_kind: "holds values that are no labels",
    spoil_sign: "holds values that are no labels",
    spoil_file: "case_0.nii.gz",
    spoil_dimension: "2 channels",
    spoil_label_channels: "a label map has one",
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_what_is_wrong_is_named_and_what_follows_is_still_looked_at(decathlon, spoil):
    spoil(decathlon)
    save(decathlon / "imagesTr" / "case_2.nii.gz", np.full(SHAPE, 3, np.int16))
    seen = []
    found = check(open_dataset(decathlon), lambda done, of: seen.append((done, of)))
    assert [finding.case for finding in found] == ["case_0", "case_2"]
    assert SPOILT[spoil] in found[0].problem
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(DatasetError, match=r"2 case\(s\) of Livers do not fit, the first: case_0"):
        take_fingerprint(open_dataset(decathlon))


def test_byte_identical_twins_are_named(decathlon):
    for folder in ("imagesTr", "labelsTr"):
        copied = (decathlon / folder / "case_0.nii.gz").read_bytes()
        (decathlon / folder / "case_2.nii.gz").write_bytes(copied)
    found = findings(decathlon)
    assert list(found) == ["case_2"]
    assert "the very image of case_0" in found["case_2"][0]


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_a_case_stored_in_two_formats_is_named_and_not_guessed(decathlon, folder):
    save(decathlon / folder / "case_1.nii", some_labels(1, 2))
    (problem,) = findings(decathlon)["case_1"]
    assert "case_1.nii, case_1.nii.gz" in problem


def test_a_case_with_a_channel_too_few_is_named_and_does_not_stop_the_check(tmp_path):
    for case, channels in (("a", 3), ("b", 2), ("c", 1)):
        for channel in range(channels):
            save(tmp_path / "imagesTr" / f"{case}_000{channel}.nii.gz", an_image(channel))
        save(tmp_path / "labelsTr" / f"{case}.nii.gz", some_labels(1))
    record = {"channel_names": {"0": "T1", "1": "T2", "2": "FLAIR"}, "labels": {"background": 0, "lesion": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(record))
    found = findings(tmp_path)
    assert set(found) == {"b", "c"}
    assert "2 channel files; dataset.json names 3: T1, T2, FLAIR" in found["b"][0]


def test_a_folder_without_a_single_case_is_no_dataset_without_findings(tmp_path):
    (tmp_path / "images").mkdir()
    (finding,) = check(open_dataset(tmp_path))
    assert "no labelled case" in finding.problem


@pytest.mark.parametrize(
    "words",
    ["{", "[1]", '{"labels": {"liver": "1"}}', '{"labels": {"liver": -1}}', '{"modality": {"x": "CT"}}', "3"],
)
def test_a_description_nobody_understands_is_refused(decathlon, words):
    (decathlon / "dataset.json").write_text(words)
    with pytest.raises(DatasetError, match=r"dataset\.json"):
        open_dataset(decathlon)


def test_a_fingerprint_tells_every_grid_in_ras_order(decathlon):
    fingerprint = take_fingerprint(open_dataset(decathlon))
    facts = fingerprint.cases["case_0"]
    assert facts.shape == (9, 8, 7)
    np.testing.assert_allclose(facts.spacing_mm, (1.5, 1.5, 3.0))
    assert facts.voxels == {"liver": 12, "lesion": 12}
    assert facts.kept == 1.0
    inside = an_image(0)[some_labels(1, 2) > 0]
    assert np.mean(facts.intensities[0]) == pytest.approx(inside.mean(), rel=1e-3)
    assert inside.min() < facts.intensities[0][0] < facts.intensities[0][-1] < inside.max()


def test_a_fingerprint_knows_its_data_by_their_bytes(decathlon):
    before = take_fingerprint(open_dataset(decathlon)).dataset
    assert take_fingerprint(open_dataset(decathlon)).dataset == before
    save(decathlon / "imagesTr" / "case_1.nii.gz", an_image(77))
    assert take_fingerprint(open_dataset(decathlon)).dataset != before


def test_labels_nobody_painted_make_no_plan(tmp_path):
    save(tmp_path / "images" / "a.nii.gz", an_image(0))
    save(tmp_path / "labels" / "a.nii.gz", some_labels())
    with pytest.raises(DatasetError, match="no voxel of any case carries a label"):
        take_fingerprint(open_dataset(tmp_path))


def test_whole_numbers_stored_as_floats_are_labels_and_large_ones_keep_their_value(tmp_path):
    image = read(save(tmp_path / "image.nii.gz", np.zeros(SHAPE, np.int16)))
    labels = read_labels(save(tmp_path / "a.nii.gz", some_labels(1, 2).astype(np.float64)), image, {})
    assert labels.voxels.dtype == np.uint8
    large = read_labels(save(tmp_path / "b.nii.gz", some_labels(1).astype(np.int32) * 40_000), image, {})
    assert large.voxels.dtype == np.uint16
    assert large.voxels.max() == 40_000
    with pytest.raises(ScanError, match="no labels"):
        read_labels(save(tmp_path / "c.nii.gz", some_labels(1).astype(np.int32) * 70_000), image, {})


def test_labels_get_a_name_and_a_colour_each_in_the_order_of_their_values():
    table = label_table({"background": 0, "b": 9, "a": 4})
    assert [(label.name, label.value) for label in table] == [("a", 4), ("b", 9)]
    assert len({label.colour for label in table}) == 2


def test_a_finding_reads_as_a_sentence():
    assert str(Finding(case="case_1", problem="is torn.")) == "case_1: is torn."


def test_the_unpaired_hippocampi_are_named_exactly(shared):
    dataset = open_dataset(shared / "data" / "hippocampus-unpaired")
    assert sorted(finding.case for finding in check(dataset)) == [
        "hippocampus_010",
        "hippocampus_118",
        "hippocampus_281",
    ]


def test_a_gap_in_channel_numbers_is_a_finding_not_another_channel(tmp_path):
    from preprocessing.phantoms import phantom

    for seed in (5, 7):
        case = phantom(seed)
        for number, name in ((0, "a"), (2 if seed == 7 else 1, "b")):
            one = case.image.with_voxels(case.image.voxels[:1] + number, channels=(name,))
            files.write(one, tmp_path / "imagesTr" / f"p{seed}_{number:04d}.nii.gz")
        files.write(case.labels, tmp_path / "labelsTr" / f"p{seed}.nii.gz", is_labels=True)
    described = {
        "name": "gap",
        "channel_names": {"0": "a", "1": "b"},
        "labels": {"background": 0, "x": 1, "y": 2, "z": 3},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    findings = check(open_dataset(tmp_path))
    assert [finding.case for finding in findings] == ["p7"] and "[0, 2]" in findings[0].problem


REGIONS = {
    "channel_names": {"0": "T1"},
    "labels": {"background": 0, "whole tumour": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4},
    "regions_class_order": [1, 2, 3],
}


def nnunet(root: Path, record: dict, *painted: np.ndarray) -> Path:
    """Cases c0, c1 ... in nnU-Net's layout, labelled so."""
    for n, labels in enumerate(painted):
        save(root / "imagesTr" / f"c{n}_0000.nii.gz", an_image(n))
        save(root / "labelsTr" / f"c{n}.nii.gz", labels)
    (root / "dataset.json").write_text(json.dumps(record))
    return root


def test_regions_keep_their_order_their_parts_and_the_number_they_are_written_as(tmp_path):
    record = {**REGIONS, "regions_class_order": [1, 12, 11]}
    dataset = open_dataset(nnunet(tmp_path, record, some_labels(1, 2, 3, 4)))
    assert [(label.name, label.value, label.parts) for label in dataset.labels] == [
        ("whole tumour", 1, (1, 2, 3)), ("core", 12, (2, 3)), ("enhancing", 11, (3,)),
    ]  # fmt: skip
    assert dataset.ignored == 4
    assert check(dataset) == ()
    fingerprint = take_fingerprint(dataset)
    assert fingerprint.cases["c0"].voxels == {"whole tumour": 36, "core": 24, "enhancing": 12}
    assert fingerprint.ignored == 4


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ({"whole": [1, 2, 3], "core": [1, 3], "active": 3}, [2, 1, 3]),
        ({"kidney": [1, 2, 3], "mass": [2, 3], "tumour": 2}, [1, 3, 2]),
        ({"left": [1, 2], "right": [3, 4]}, [1, 4]),
        ({"one": [1, 2], "other": [2, 3]}, [1, 3]),
    ],
)
def test_numbers_that_lie_in_the_same_regions_in_label_files_and_in_what_is_painted_are_taken(tmp_path, labels, order):
    record = {"channel_names": {"0": "T1"}, "labels": labels, "regions_class_order": order}
    dataset = open_dataset(nnunet(tmp_path, record, some_labels(1)))
    assert [label.value for label in dataset.labels] == order


def test_check_says_regions_and_what_is_ignored_and_which_region_nobody_has(tmp_path):
    looked = examine(open_dataset(nnunet(tmp_path, REGIONS, some_labels(1, 2, 4))))
    assert looked.findings == () and looked.absent == ("enhancing",)
    assert looked.notes == (
        "labels are regions that may overlap: whole tumour of 1 + 2 + 3, core of 2 + 3, enhancing of 3",
        "voxels of the value 4 are ignored: they neither teach nor count",
    )


def test_intensities_are_those_under_labels_and_not_those_under_what_is_ignored(tmp_path):
    painted = some_labels(1, 4)
    facts = take_fingerprint(open_dataset(nnunet(tmp_path, REGIONS, painted))).cases["c0"]
    assert np.mean(facts.intensities[0]) == pytest.approx(an_image(0)[painted == 1].mean(), abs=0.5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"regions_class_order": None}, "a number for each, from 1 up"),
        ({"regions_class_order": [1, 2]}, "a number for each, from 1 up"),
        ({"regions_class_order": [1, 2, 2]}, "a number for each, from 1 up"),
        ({"regions_class_order": [0, 1, 2]}, "a number for each, from 1 up"),
        (
            {"regions_class_order": [2, 1, 3]},
            "2 in .* 'whole tumour', which lies in whole tumour; .* 2 belongs to whole tumour, core",
        ),
        ({"labels": {"whole": [1, 2, 3], "core": [1, 3]}, "regions_class_order": [1, 2]}, "1 belongs to whole, core"),
        ({"labels": {"left": 1, "both": [1, 2]}, "regions_class_order": [2, 1]}, "A number must mean the same in both"),
        ({"labels": {"tumour": [0, 1]}, "regions_class_order": [1]}, "holds 0, the background"),
        ({"labels": {"tumour": []}}, "a whole number, or for a region a list"),
        ({"labels": {"tumour": [1.5]}}, "a whole number, or for a region a list"),
        ({"labels": {"tumour": True}}, "a whole number, or for a region a list"),
        ({"labels": {"ignore": 2, "tumour": 3}}, "one number above all others"),
        ({"labels": {"ignore": [4, 5], "tumour": 3}}, "one number above all others"),
        ({"labels": {"ignore": 0}}, "one number above all others"),
        ({"annotated": {"c0": "core"}}, "a list of labels' names"),
        ({"annotated": ["c0"]}, "cannot be understood"),
        ({"patients": ["c0"]}, "cannot be understood"),
    ],
    ids=str,
)
def test_a_description_that_contradicts_itself_is_refused_with_what_is_needed(tmp_path, changes, words):
    with pytest.raises(DatasetError, match=words):
        open_dataset(nnunet(tmp_path, REGIONS | changes, some_labels(1)))


def test_values_nobody_declared_are_named_beside_regions_and_what_is_ignored_too(tmp_path):
    (problem,) = findings(nnunet(tmp_path, REGIONS, some_labels(1, 4, 5)))["c0"]
    assert "12 voxels carry the label 5" in problem and "[1, 2, 3]" in problem


PARTLY = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "spleen": 2, "kidney": 3}}


def test_which_labels_were_looked_for_and_whose_scan_it_is_are_told_by_the_description(tmp_path):
    record = {
        **PARTLY,
        "annotated": {"c0": ["liver"], "c1": ["spleen", "kidney"]},
        "patients": {"c0": "Doe", "c2": "Doe"},
    }
    dataset = open_dataset(nnunet(tmp_path, record, some_labels(1), some_labels(2, 3), some_labels(1, 2)))
    assert [files.annotated for files in dataset.cases] == [("liver",), ("spleen", "kidney"), None]
    assert [files.patient for files in dataset.cases] == ["Doe", "", "Doe"]
    looked = examine(dataset)
    assert looked.findings == ()
    assert looked.notes == (
        "in 2 of 3 cases only some labels were looked for: liver in 2, spleen in 2, kidney in 2",
        "3 cases are of 2 patients; no patient is divided between training and validation",
    )
    facts = take_fingerprint(dataset).cases
    assert [one.annotated for one in facts.values()] == [("liver",), ("spleen", "kidney"), None]
    assert [one.patient for one in facts.values()] == ["1", "", "1"], "a number, for names must not leave the house"


def test_what_was_looked_for_is_part_of_what_a_dataset_is(tmp_path):
    root = nnunet(tmp_path, PARTLY, some_labels(1), some_labels(1, 2))
    whole = take_fingerprint(open_dataset(root)).dataset
    (root / "dataset.json").write_text(json.dumps(PARTLY | {"annotated": {"c0": ["liver"]}}))
    assert take_fingerprint(open_dataset(root)).dataset != whole


@pytest.mark.parametrize(
    ("changes", "case", "words"),
    [
        ({"annotated": {"c0": ["livr"]}}, "c0", "'livr', which is no label; declared are liver, spleen, kidney; did you mean 'liver'?"),
        ({"annotated": {"c0": []}}, "c0", "annotated with no label"),
        ({"annotated": {"c01": ["liver"]}}, "c01", "named under `annotated` in dataset.json and is no case; did you mean"),
        ({"patients": {"patient3": "x"}}, "patient3", "named under `patients` in dataset.json and is no case."),
        ({"annotated": {"c0": ["liver"]}}, "c0", "12 voxels carry the label 2 (spleen), which was not looked for"),
    ],
    ids=["no label", "none", "no case", "nobody", "contradiction"],
)  # fmt: skip
def test_what_cannot_have_been_looked_for_is_named(tmp_path, changes, case, words):
    found = findings(nnunet(tmp_path, PARTLY | changes, some_labels(1, 2)))
    assert set(found) == {case} and any(words in problem for problem in found[case])


def test_a_part_of_a_region_that_was_looked_for_may_be_there_though_a_smaller_region_was_not(tmp_path):
    whole = REGIONS | {"annotated": {"c0": ["whole tumour"]}}
    assert findings(nnunet(tmp_path / "whole", whole, some_labels(1, 2))) == {}
    inner = REGIONS | {"annotated": {"c0": ["enhancing"]}}
    (one, two) = findings(nnunet(tmp_path / "inner", inner, some_labels(1, 2, 3)))["c0"]
    assert "label 1 (whole tumour)" in one and "label 2 (whole tumour)" in two


def test_a_table_tells_what_was_looked_for_and_whose_scan_it_is_and_names_labels_by_a_description_beside_it(tmp_path):
    for n in range(2):
        save(tmp_path / f"{n}.nii.gz", an_image(n))
        save(tmp_path / f"labels{n}.nii.gz", some_labels(1))
    rows = [
        ["id", "ct", "labels", "annotated", "patient"],
        ["a", "0.nii.gz", "labels0.nii.gz", "liver; spleen", "p1"],
        ["b", "1.nii.gz", "labels1.nii.gz", "", ""],
    ]
    path = write_table(tmp_path / "study.csv", rows)
    assert "no label is declared by name in a dataset.json" in findings(path)["a"][0]
    (tmp_path / "dataset.json").write_text(json.dumps(PARTLY | {"name": "other"}))
    dataset = open_dataset(path)
    assert (dataset.name, dataset.channels) == ("study", ("ct",))
    assert [label.name for label in dataset.labels] == ["liver", "spleen", "kidney"]
    assert [(files.annotated, files.patient) for files in dataset.cases] == [(("liver", "spleen"), "p1"), (None, "")]
    assert check(dataset) == ()


def test_what_a_table_leaves_empty_the_description_beside_it_says(tmp_path):
    rows = [["id", "ct", "labels", "annotated", "patient"]]
    for n, cells in enumerate((["liver; spleen", "p1"], ["", ""])):
        save(tmp_path / f"{n}.nii.gz", an_image(n))
        save(tmp_path / f"labels{n}.nii.gz", some_labels(1))
        rows.append([f"c{n}", f"{n}.nii.gz", f"labels{n}.nii.gz", *cells])
    record = PARTLY | {
        "annotated": {"c0": ["kidney"], "c1": ["liver"], "c7": ["liver"]},
        "patients": {"c0": "p7", "c1": "p2", "c8": "p3"},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(record))
    for columns in (5, 3):
        path = write_table(tmp_path / "study.csv", [row[:columns] for row in rows])
        one, other = open_dataset(path).cases
        assert (one.annotated, one.patient) == ((("liver", "spleen"), "p1") if columns == 5 else (("kidney",), "p7"))
        assert (other.annotated, other.patient) == (("liver",), "p2")
    assert {"c7", "c8"} <= set(findings(path))
    assert "named under `annotated` in dataset.json" in findings(path)["c7"][0]


def dicom_dataset(root: Path, *patients: str) -> Path:
    """A series and its labels per case; the headers name the patients."""
    for n, patient in enumerate(patients):
        image = read(save(root / f"{n}.nii.gz", np.round(an_image(n)).astype(np.int16)))
        for path in dicom.write_series(image, root / "images" / f"c{n}", description="x", study=str(n)):
            slice_ = pydicom.dcmread(path)
            slice_.PatientID = patient
            slice_.save_as(path)
        files.write(image.with_voxels(some_labels(1)[None]), root / "labels" / f"c{n}.nii.gz", is_labels=True)
    return root


def test_the_patients_of_dicom_images_are_known_and_never_named(tmp_path):
    dataset = open_dataset(dicom_dataset(tmp_path, "Doe-17", "Roe-3", "Doe-17", ""))
    first, second, third, fourth = (one.patient for one in dataset.cases)
    assert first == third != second and fourth == ""
    assert "Doe" not in repr(dataset) and "Roe" not in repr(dataset)
    fingerprint = take_fingerprint(dataset)
    assert [one.patient for one in fingerprint.cases.values()] == ["1", "2", "1", ""]


def test_one_name_in_all_headers_is_an_anonymisers_and_no_patient(tmp_path):
    dataset = open_dataset(dicom_dataset(tmp_path, "ANON", "ANON", "ANON"))
    assert [one.patient for one in dataset.cases] == ["", "", ""]


def test_a_region_of_several_numbers_cannot_be_told_from_a_dicom_object(tmp_path, shared):
    root = nnunet(tmp_path, REGIONS, some_labels(1))
    (root / "labelsTr" / "c0.nii.gz").unlink()
    found = next(
        path for path in sorted((shared / "data" / "zoo" / "dicom_seg_dcmqi").rglob("*.dcm")) if is_labels(path)
    )
    shutil.copy(found, root / "labelsTr" / "c0.dcm")
    (finding,) = check(open_dataset(root))
    assert (finding.case, finding.reason) == ("c0", "unsupported") and "region of several numbers" in finding.problem
