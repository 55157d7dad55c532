"""What the report says as numbers is what was found, and every segment it points at is there."""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest

from pipeline import batch, outputs
from pipeline.config import Segment
from pipeline.errors import UsageError
from pipeline.outputs import dicom_seg, rtstruct, secondary_capture, structured_report
from pipeline.outputs._dicom import Revision
from pipeline.report import Result
from preprocessing import dicom
from preprocessing.declared import label_table
from preprocessing.volume import Geometry, Provenance, ScanError, Volume
from tests.pipeline.dciodvfy import errors_in

NAMES = {"liver": 3, "kidney_left": 7, "liver lesion": 9, "spleen": 11}
MADE_BY_OTHERS = ("Study ID", "invalid data values", "Value invalid for this VR")
"""Mistakes of the sources' own headers, which are kept: another spelling is another patient to an archive."""


def result_of(scan: Volume) -> Result:
    labels = np.zeros(scan.geometry.shape, np.uint8)
    i, j, k = (n // 2 for n in scan.geometry.shape)
    labels[:i, :j, :k], labels[i:, :j, :k], labels[:2, :2, :2] = 3, 7, 9
    return Result(
        case_id="Meier^Anna",
        scan=scan,
        labels=Volume(voxels=labels[None], geometry=scan.geometry, channels=("labels",)),
        label_table=label_table(NAMES),
        package_id="cd" * 32,
        package_name="demo",
        confidence={"liver": 0.9312, "kidney_left": 0.88, "liver lesion": 0.55},
        warnings=("liver lesion is uncertain: its mean probability is 0.55", "größere Voxel"),
    )


def scan_on(folder: Path, modality: str = "CT", study: str | None = None) -> Volume:
    geometry = Geometry(shape=(14, 10, 9), affine=np.diag([-0.8, -0.7, 2.0, 1.0]))
    grey = np.random.default_rng(1).integers(-100, 900, (1, *geometry.shape)).astype(np.int16)
    volume = Volume(voxels=grey, geometry=geometry, channels=("0",))
    files = dicom.write_series(volume, folder, description="phantom", modality=modality, study=study)
    (series,), _ = dicom.series_in(files)
    return dicom.read(series)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return result_of(scan_on(tmp_path_factory.mktemp("series")))


def nothing_of(result: Result) -> Result:
    voxels = np.zeros_like(result.labels.voxels)
    return replace(result, labels=result.labels.with_voxels(voxels), confidence={}, warnings=("nothing was found",))


def written(result: Result, folder: Path, *, segmented: bool = True, kind: str = "binary") -> Path:
    folder.mkdir(exist_ok=True)
    if segmented:
        dicom_seg.write(result, folder, dicom_seg.Config(kind=kind))
    (path,) = structured_report.write(result, folder, structured_report.Config())
    return path


@pytest.fixture(scope="module")
def case(found: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(found, tmp_path_factory.mktemp("case")).parent


def report_in(folder: Path) -> Any:
    return highdicom.sr.srread(folder / structured_report.FILE_NAME)


def groups_of(report: Any) -> dict[str, Any]:
    """Every measurement group, by what it tracks."""
    content = report.content
    groups = [*content.get_volumetric_roi_measurement_groups(), *content.get_image_measurement_groups()]
    return {group.tracking_identifier: group for group in groups}


def number(group: Any, name: str) -> tuple[float, str] | None:
    return next(((m.value, m.unit.value) for m in group.get_measurements() if m.name.meaning == name), None)


def comments_of(report: Any) -> list[str]:
    return [item.TextValue for item in report.ContentSequence if item.ValueType == "TEXT"
            and item.ConceptNameCodeSequence[0].CodeMeaning == "Comment"]  # fmt: skip


def test_millilitres_and_certainty_are_those_of_the_result(found: Result, case: Path) -> None:
    groups = groups_of(report_in(case))
    assert set(groups) == set(NAMES)
    for name, group in groups.items():
        value, unit = number(group, "Volume") or (None, "")
        assert value == pytest.approx(found.volumes_ml[name], rel=1e-8) and unit == "mL"
        certainty = number(group, "Certainty of Finding")
        sure = found.confidence.get(name)
        assert certainty == (None if sure is None else (pytest.approx(100 * sure), "%"))


@pytest.mark.parametrize("kind", ["binary", "labelmap", "both"])
def test_every_label_that_was_found_points_at_its_segment_in_the_object_beside(
    kind: str, found: Result, tmp_path: Path
) -> None:
    report = pydicom.dcmread(written(found, tmp_path, kind=kind))
    beside = pydicom.dcmread(tmp_path / "labels.dcm" if kind != "both" else tmp_path / dicom_seg.FILE_NAMES["BINARY"])
    segments = {item.SegmentNumber: item for item in beside.SegmentSequence}
    groups = [item for item in report.ContentSequence if item.ValueType == "CONTAINER"][-1].ContentSequence
    pointed = {}
    for group in groups:
        named = {item.ConceptNameCodeSequence[0].CodeMeaning: item for item in group.ContentSequence}
        template = group.ContentTemplateSequence[0].TemplateIdentifier
        assert ("Referenced Segment" in named) == (template == "1411")
        if "Referenced Segment" in named:
            image = named["Referenced Segment"].ReferencedSOPSequence[0]
            assert (image.ReferencedSOPInstanceUID, image.ReferencedSOPClassUID) == (
                beside.SOPInstanceUID, beside.SOPClassUID,
            )  # fmt: skip
            segment = segments[image.ReferencedSegmentNumber]
            pointed[named["Tracking Identifier"].TextValue] = segment.SegmentLabel
            assert segment.TrackingUID == named["Tracking Unique Identifier"].UID
            source = named["Source Series for Segmentation"].UID
            assert source == pydicom.dcmread(found.scan.provenance.files[0]).SeriesInstanceUID
    assert pointed == {name: name for name in NAMES if name != "spleen"}


def test_every_object_that_is_pointed_at_is_listed_as_evidence(found: Result, case: Path) -> None:
    beside, report = pydicom.dcmread(case / "labels.dcm"), report_in(case)
    sources = {pydicom.dcmread(file).SOPInstanceUID for file in found.scan.provenance.files}
    listed = report.get_evidence(current_procedure_only=True)
    assert {instance for _, _, instance, _ in listed} == {*sources, beside.SOPInstanceUID}
    series = {instance: series for _, series, instance, _ in listed}
    assert series[beside.SOPInstanceUID] == beside.SeriesInstanceUID
    library = next(item for item in report.ContentSequence if "Library" in item.ConceptNameCodeSequence[0].CodeMeaning)
    images = [item for item in library.ContentSequence[0].ContentSequence if item.ValueType == "IMAGE"]
    assert {item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in images} == sources


def test_what_was_sought_and_not_found_measures_nothing_and_points_nowhere(case: Path) -> None:
    report = report_in(case)
    names = [group.tracking_identifier for group in report.content.get_volumetric_roi_measurement_groups()]
    assert "spleen" not in names and number(groups_of(report)["spleen"], "Volume") == (0.0, "mL")
    assert "Looked for and not found: spleen." in comments_of(report)


def test_without_a_segmentation_beside_it_says_so_and_measures_all_the_same(found: Result, tmp_path: Path) -> None:
    report = report_in(written(found, tmp_path, segmented=False).parent)
    assert report.content.get_volumetric_roi_measurement_groups() == []
    assert number(groups_of(report)["liver"], "Volume") == (pytest.approx(found.volumes_ml["liver"]), "mL")
    assert any(comment.startswith("No segmentation was written") for comment in comments_of(report))


def test_a_segmentation_of_another_result_is_not_pointed_at(found: Result, tmp_path: Path) -> None:
    dicom_seg.write(nothing_of(found), tmp_path, dicom_seg.Config())
    with pytest.raises(UsageError, match="another result"):
        structured_report.write(found, tmp_path, structured_report.Config())


def test_findings_sites_and_sides_are_codes(case: Path) -> None:
    groups = groups_of(report_in(case))
    kidney, lesion = groups["kidney_left"], groups["liver lesion"]
    assert (kidney.finding_category.meaning, kidney.finding_type.value) == ("Anatomical Structure", "64033007")
    (site,) = kidney.finding_sites
    assert (site.value.value, site.laterality.meaning) == ("64033007", "Left")
    assert lesion.finding_type.meaning == "Lesion"
    assert [site.value.meaning for site in lesion.finding_sites] == ["Liver"], "its name says in which organ"


def test_it_says_who_made_it_and_what_it_is_not_for(found: Result, case: Path) -> None:
    report = report_in(case)
    said = comments_of(report)
    assert "not for diagnosis" in said[0] and "not for diagnosis" in report.SeriesDescription
    assert [f"Warning: {warning}" for warning in found.warnings] == said[-2:]
    assert (report.PreliminaryFlag, report.VerificationFlag) == ("PRELIMINARY", "UNVERIFIED")
    words = {item.ConceptNameCodeSequence[0].CodeMeaning: item.TextValue
             for item in groups_of(report)["liver"][0].ContentSequence if item.ValueType == "TEXT"}  # fmt: skip
    assert (words["Algorithm Name"], words["Algorithm Version"]) == ("demo", found.package_id)


@pytest.mark.parametrize("module", [dicom_seg, rtstruct, secondary_capture, structured_report])
def test_every_object_names_the_algorithm_as_ihe_asks(module: Any, found: Result, tmp_path: Path) -> None:
    (path,) = module.write(found, tmp_path, module.Config())
    algorithm = pydicom.dcmread(path).ContributingEquipmentSequence[-1]
    purpose = algorithm.PurposeOfReferenceCodeSequence[0]
    assert (purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning) == (
        "Newcode1", "99IHE", "Processing Algorithm",
    )  # fmt: skip
    assert algorithm.ManufacturerModelName == "demo" and found.package_id in algorithm.SoftwareVersions
    assert algorithm.DeviceUID.startswith("2.25.")


def test_the_case_is_named_nowhere_but_in_the_patients_own_tags(case: Path) -> None:
    for path in case.iterdir():
        assert b"Meier" not in path.read_bytes() and "Meier" not in path.name


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("segmented", [True, False])
def test_the_standards_validator_has_nothing_against_it(modality: str, segmented: bool, tmp_path: Path) -> None:
    result = result_of(scan_on(tmp_path / "series", modality))
    assert errors_in(written(result, tmp_path, segmented=segmented)) == []
    assert errors_in(written(nothing_of(result), tmp_path / "nothing", segmented=segmented)) == []


def test_dcmtk_reads_the_very_numbers(found: Result, case: Path) -> None:
    if shutil.which("dsr2xml") is None:
        pytest.skip("dsr2xml (Debian: dcmtk) is not on this machine")
    path = case / structured_report.FILE_NAME
    said = subprocess.run(["dsr2xml", path], capture_output=True, text=True, check=True).stdout
    for ml in found.volumes_ml.values():
        assert f"<value>{float(f'{ml:.9g}')}</value>" in said
    assert "größere Voxel" in said
    assert "Error" not in subprocess.run(["dsrdump", path], capture_output=True, text=True, check=True).stderr


def test_the_same_result_is_the_same_report_and_another_warning_another(found: Result, tmp_path: Path) -> None:
    one, two, other = (
        pydicom.dcmread(written(result, tmp_path / name))
        for name, result in (("one", found), ("two", found), ("three", replace(found, warnings=())))
    )
    assert (one.SOPInstanceUID, one.SeriesInstanceUID) == (two.SOPInstanceUID, two.SeriesInstanceUID)
    assert other.SOPInstanceUID != one.SOPInstanceUID and other.SeriesInstanceUID == one.SeriesInstanceUID


OUTPUTS = (dicom_seg, rtstruct, secondary_capture, structured_report)


def test_a_revision_is_another_object_that_names_the_one_before(found: Result, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, revision in ((first, Revision()), (second, Revision(number=1, replaces=str(first)))):
        folder.mkdir()
        for module in OUTPUTS:
            module.write(found, folder, module.Config(revision=revision))
    for path in second.iterdir():
        before, after = pydicom.dcmread(first / path.name), pydicom.dcmread(path)
        assert before.SOPInstanceUID != after.SOPInstanceUID and before.SeriesInstanceUID != after.SeriesInstanceUID
        assert str(before.SOPInstanceUID) in str(after) and str(after.SOPInstanceUID) not in str(before)
        assert errors_in(path) == []
    document = pydicom.dcmread(second / structured_report.FILE_NAME).PredecessorDocumentsSequence[0]
    named = document.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID
    assert named == pydicom.dcmread(first / structured_report.FILE_NAME).SOPInstanceUID
    assert "PredecessorStructureSetSequence" in pydicom.dcmread(second / rtstruct.FILE_NAME)
    tracked = [report_in(folder).content.get_volumetric_roi_measurement_groups() for folder in (first, second)]
    assert [one.tracking_uid for one in tracked[0]] == [other.tracking_uid for other in tracked[1]]


def test_a_revision_of_another_study_or_of_nothing_is_refused(found: Result, tmp_path: Path) -> None:
    other = tmp_path / "other"
    written(result_of(scan_on(tmp_path / "series", study="1.2.3")), other, segmented=False)
    for replaced, words in ((other, "another study"), (tmp_path / "nowhere", "no such folder")):
        config = structured_report.Config(revision=Revision(number=1, replaces=str(replaced)))
        with pytest.raises(UsageError, match=words):
            structured_report.write(found, tmp_path, config)
    with pytest.raises(UsageError, match="number -1"):
        Revision(number=-1)


def test_asked_for_in_any_order_it_is_written_last(
    tiny: Path, make_scan: Callable[..., Volume], tmp_path: Path
) -> None:
    dicom.write_series(make_scan(), tmp_path / "series", description="phantom", modality="MR")
    wanted = ("structured_report", "dicom_seg")
    assert outputs.in_order(wanted) == ["dicom_seg", "structured_report"]
    batch.segment([tmp_path / "series"], tiny, tmp_path / "out", Segment(outputs=wanted))
    (path,) = (tmp_path / "out").rglob(structured_report.FILE_NAME)
    assert errors_in(path) == []
    assert all("No segmentation" not in comment for comment in comments_of(report_in(path.parent)))


def test_a_scan_that_is_no_dicom_is_refused_before_anything_is_computed(found: Result) -> None:
    with pytest.raises(ScanError, match="not DICOM"):
        outputs.refuse_unsuited(["structured_report"], replace(found.scan, provenance=Provenance(reader="nibabel")))


@pytest.mark.parametrize(
    "folder", ["hippocampus-dicom/Study1", "zoo/dicom_ibsi_STS019_CT/image", "zoo/dicom_enhanced_ct_vs_classic"]
)
def test_reports_of_real_scans_are_valid(folder: str, shared: Path, tmp_path: Path) -> None:
    paths = sorted(path for path in (shared / "data" / folder).rglob("*") if path.is_file())
    series, _ = dicom.series_in([path for path in paths if path.name != "slice1.dcm"])
    path = written(result_of(dicom.read(series[0])), tmp_path)
    assert [error for error in errors_in(path) if not any(words in error for words in MADE_BY_OTHERS)] == []
    assert set(groups_of(report_in(tmp_path))) == set(NAMES)
