"""The node as a hospital runs it: one process, `storescu` as the scanner, Debian's Orthanc as the archive."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
import yaml

from ..dciodvfy import errors_in
from .hospital import Orthanc, network_of_its_own

PAGE = "http://127.0.0.1:18080"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    if shutil.which("storescu") is None:
        pytest.skip("dcmtk is not installed")
    with network_of_its_own():
        orthanc = Orthanc(tmp_path_factory.mktemp("orthanc"))
        orthanc.start()
        yield orthanc
        orthanc.stop()


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> Path:
    said = {
        "state": str(tmp_path / "state"),
        "receiving": {"aet": "HILUM", "port": 11112, "reserve_gb": 0.1},
        "peers": {"scanner": {"aet": "STORESCU"}, "archive": {"aet": "ORTHANC", "host": "127.0.0.1", "port": 14242}},
        "waiting": {"quiet_s": 1.0, "settled_s": 0.5, "cap_s": 60},
        "working": {"first_pause_s": 0.3, "attempts": 12, "longest_pause_s": 5},
        "routes": {"brain": {
            "package": str(tiny), "take": {"mr": {"modality": ["MR"], "least_slices": 10}},
            "outputs": ["dicom_seg", "secondary_capture", "overlay"], "targets": ["archive"],
        }},
        "showing": {"port": 18080},
    }  # fmt: skip
    path = tmp_path / "node.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


@pytest.fixture(scope="module")
def study(shared: Path) -> Path:
    return next(path for path in sorted((shared / "data/hippocampus-dicom").iterdir()) if path.is_dir())


class NodeProcess:
    """`hilum node`, with what it says kept."""

    def __init__(self, config: Path) -> None:
        self.config, self.log = config, config.with_name("node.log")
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            words = [sys.executable, "-m", "pipeline", "node", "--config", str(self.config)]
            self.process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)

    def told(self) -> str:
        return metrics()


def metrics() -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{PAGE}/metrics", timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def until(holds: object, node: NodeProcess, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():  # type: ignore[operator]
            return
        assert node.process is None or node.process.poll() is None, node.log.read_text()[-3000:]
        time.sleep(0.1)
    raise AssertionError(node.log.read_text()[-3000:] + metrics())


def send(study: Path) -> int:
    """As a scanner does; it may find nobody there, and then comes again."""
    words = [
        "storescu",
        "--aetitle",
        "STORESCU",
        "--call",
        "HILUM",
        "--scan-directories",
        "+r",
        "127.0.0.1",
        "11112",
        str(study),
    ]
    return subprocess.run(words, capture_output=True).returncode


def instances(archive: Orthanc) -> list[dict]:
    return [archive.ask(f"instances/{one}/simplified-tags") for one in archive.ask("instances")]  # type: ignore


@pytest.mark.slow
def test_what_a_scanner_sends_comes_back_into_the_archive_and_lies_right(
    archive: Orthanc, config: Path, study: Path, tmp_path: Path
) -> None:
    node = NodeProcess(config)
    node.start()
    try:
        until(metrics, node)
        assert send(study) == 0
        until(lambda: 'state="done"' in metrics(), node)
        found = archive.ask("instances")
        fetched = []
        for number, one in enumerate(found):  # type: ignore[arg-type]
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                f"{archive.rest}/instances/{one}/file"
            ) as answer:
                fetched.append(tmp_path / f"{number}.dcm")
                fetched[-1].write_bytes(answer.read())
    finally:
        assert node.stop() == 0
    kinds = {pydicom.dcmread(path, stop_before_pixels=True).Modality: path for path in fetched}
    assert set(kinds) == {"SEG", "OT"}
    assert not [error for path in fetched for error in errors_in(path)]
    source = pydicom.dcmread(next(study.glob("*.dcm")), stop_before_pixels=True)
    segmentation = pydicom.dcmread(kinds["SEG"])
    assert segmentation.StudyInstanceUID == source.StudyInstanceUID
    assert segmentation.FrameOfReferenceUID == source.FrameOfReferenceUID
    log = node.log.read_text()
    assert source.StudyInstanceUID not in log and str(source.PatientName) not in log


@pytest.mark.slow
def test_killed_again_and_again_every_study_ends_with_exactly_one_result_in_the_archive(
    archive: Orthanc, config: Path, study: Path
) -> None:
    before, chance = len(instances(archive)), random.Random(20261122)
    node, sent = NodeProcess(config), False
    for _ in range(6):
        node.start()
        until(metrics, node)
        sent = send(study) == 0 or sent  # what was acknowledged is kept; the scanner sends all of it again
        time.sleep(chance.uniform(0.0, 6.0))
        node.kill()
    node.start()
    try:
        until(metrics, node)
        assert send(study) == 0
        until(
            lambda: (
                'state="done"' in metrics()
                and "hilum_queue_depth 0" in metrics()
                and "hilum_studies_waiting 0" in metrics()
            ),
            node,
            180,
        )
    finally:
        node.stop()
    series = {one["SeriesInstanceUID"] for one in instances(archive)}
    assert len(instances(archive)) <= before + 2 and len(series) <= 2
