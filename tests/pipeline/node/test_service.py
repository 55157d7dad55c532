"""The node as a hospital runs it: one process, Debian's Orthanc as the archive, dcmtk as those who ask the archive."""

import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import yaml

from ..dciodvfy import errors_in
from .hospital import Orthanc, Process, network_of_its_own

PAGE = "http://127.0.0.1:18080"


MOVER_PORT = 11119


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    if shutil.which("movescu") is None:
        pytest.skip("dcmtk is not installed (apt-get install dcmtk)")
    knows = {
        "node": {"AET": "HILUM", "Host": "127.0.0.1", "Port": 11112, "AllowStorageCommitment": True},
        "mover": ["MOVESCU", "127.0.0.1", MOVER_PORT],
    }
    with network_of_its_own():
        orthanc = Orthanc(tmp_path_factory.mktemp("orthanc"), knows)
        orthanc.start()
        yield orthanc
        orthanc.stop()


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> Path:
    said = {
        "state": str(tmp_path / "state"),
        "receiving": {"aet": "HILUM", "port": 11112, "reserve_gb": 0.1},
        "peers": {"archive": {"aet": "ORTHANC", "host": "127.0.0.1", "port": 14242}},
        "waiting": {"quiet_s": 60.0, "settled_s": 0.5, "cap_s": 600, "ask_every_s": 1.0},
        "working": {"first_pause_s": 0.3, "attempts": 12, "longest_pause_s": 5},
        "routes": {"brain": {
            "package": str(tiny), "take": {"mr": {"modality": ["MR"], "least_slices": 10}},
            "outputs": ["labels", "dicom_seg", "structured_report", "secondary_capture"], "targets": ["archive"],
            "proof": "commitment",
        }},
        "showing": {"port": 18080},
    }  # fmt: skip
    path = tmp_path / "node.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


@pytest.fixture(scope="module")
def study(shared: Path) -> list[Path]:
    """A real scan of the MR of a thigh."""
    return sorted((shared / "data/zoo/dicom_ibsi_STS019_MR_T1/image").iterdir())


def metrics() -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{PAGE}/metrics", timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def until(holds: object, node: Process, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():  # type: ignore[operator]
            return
        assert node.process is None or node.process.poll() is None, node.log.read_text()[-3000:]
        time.sleep(0.1)
    raise AssertionError(node.log.read_text()[-3000:] + metrics())


def found_by_findscu(study_uid: str, folder: Path) -> list[str]:
    """The modalities of a study's series, as dcmtk is told by the archive."""
    words = [
        "findscu",
        "-S",
        "-aec",
        "ORTHANC",
        "-k",
        "QueryRetrieveLevel=SERIES",
        "-k",
        f"StudyInstanceUID={study_uid}",
    ]
    words += ["-k", "Modality", "-k", "SeriesInstanceUID", "-X", "-od", str(folder), "127.0.0.1", str(Orthanc.port)]
    folder.mkdir()
    subprocess.run(words, check=True, capture_output=True)
    return sorted(pydicom.dcmread(path, force=True).Modality for path in folder.iterdir())


def moved_by_movescu(study_uid: str, folder: Path) -> dict[str, list[Path]]:
    """A study as dcmtk fetches it from the archive, by modality."""
    words = ["movescu", "-S", "-aec", "ORTHANC", "-aet", "MOVESCU", "-aem", "MOVESCU", "+P", str(MOVER_PORT)]
    words += ["-od", str(folder), "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={study_uid}"]
    folder.mkdir()
    subprocess.run([*words, "127.0.0.1", str(Orthanc.port)], check=True, capture_output=True)
    found: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        found.setdefault(pydicom.dcmread(path, stop_before_pixels=True).Modality, []).append(path)
    return found


@pytest.mark.slow
def test_what_an_archive_sends_comes_back_into_it_vouched_for_and_lies_right(
    archive: Orthanc, config: Path, study: list[Path], tmp_path: Path
) -> None:
    source = pydicom.dcmread(study[0], stop_before_pixels=True)
    for path in study:
        archive.ask("instances", path.read_bytes())
    (series,) = archive.ask("series")  # type: ignore[misc]
    node = Process(config)
    node.start()
    try:
        until(metrics, node)
        archive.ask("modalities/node/store", series.encode())
        until(lambda: 'state="done"' in metrics(), node)
    finally:
        assert node.stop() == 0
    assert found_by_findscu(source.StudyInstanceUID, tmp_path / "found") == ["MR", "OT", "SEG", "SR"]
    fetched = moved_by_movescu(source.StudyInstanceUID, tmp_path / "fetched")
    assert len(fetched["MR"]) == len(study)
    results = [path for kind in ("OT", "SEG", "SR") for path in fetched[kind]]
    # the scan's own StudyID is longer than the standard allows, and is kept; all else would be our fault
    wrong = [error for path in results for error in errors_in(path) if "Study ID" not in error]
    assert len(results) == 3 and set(wrong) <= {
        "Error - Dicom dataset contains invalid data values for Value Representations"
    }
    segmentation = pydicom.dcmread(fetched["SEG"][0])
    assert segmentation.FrameOfReferenceUID == source.FrameOfReferenceUID
    labels = nibabel.load(next((tmp_path / "state/work").glob("*/brain/results/*/labels.nii.gz")))
    assert as_points(labels) and by_frames(segmentation, labels) == by_highdicom(
        fetched["SEG"][0], labels
    ) == as_points(labels)
    log = node.log.read_text()
    assert source.StudyInstanceUID not in log and str(source.PatientName) not in log


Points = set[tuple[int, int, int, int]]
"""Voxels of the scan's grid with a label, and the label."""


def as_points(labels: nibabel.Nifti1Image) -> Points:
    voxels = np.asanyarray(labels.dataobj)
    return {(*map(int, at), int(voxels[tuple(at)])) for at in np.argwhere(voxels)}


def by_frames(data: pydicom.Dataset, labels: nibabel.Nifti1Image) -> Points:
    """As dcmqi reads it: every frame by its own position and segment, nothing else."""
    shared, points = data.SharedFunctionalGroupsSequence[0], Points()
    spacing = [float(x) for x in shared.PixelMeasuresSequence[0].PixelSpacing]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    values = {one.SegmentNumber: VALUES[one.SegmentLabel] for one in data.SegmentSequence}
    for plane, group in zip(data.pixel_array, data.PerFrameFunctionalGroupsSequence, strict=True):
        value = values[group.SegmentIdentificationSequence[0].ReferencedSegmentNumber]
        start = np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        pixels = np.argwhere(plane)
        lps = start + pixels[:, [1]] * cosines[:3] * spacing[1] + pixels[:, [0]] * cosines[3:] * spacing[0]
        points |= {(*at, value) for at in on_grid(lps, labels)}
    return points


def by_highdicom(path: Path, labels: nibabel.Nifti1Image) -> Points:
    """As highdicom puts the frames together and says where they lie."""
    found = highdicom.seg.segread(path)
    volume = found.get_volume(combine_segments=True, relabel=False)
    array, points = np.asarray(volume.array), Points()
    for item in found.SegmentSequence:
        at = np.argwhere(array == item.SegmentNumber)
        lps = at @ np.asarray(volume.affine)[:3, :3].T + np.asarray(volume.affine)[:3, 3]
        points |= {(*voxel, VALUES[item.SegmentLabel]) for voxel in on_grid(lps, labels)}
    return points


VALUES = {"liver": 1, "lesion": 7}
"""Of the package `tiny`."""


def on_grid(lps: np.ndarray, labels: nibabel.Nifti1Image) -> list[tuple[int, int, int]]:
    """Points in millimetres as voxels of the scan."""
    places = (lps * (-1, -1, 1)) @ np.linalg.inv(labels.affine)[:3, :3].T + np.linalg.inv(labels.affine)[:3, 3]
    np.testing.assert_allclose(places, places.round(), atol=1e-2)
    return [tuple(map(int, one)) for one in places.round()]  # type: ignore[misc]
