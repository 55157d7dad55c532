"""A node is lost with its disk, and another goes on from the backup: what was under way ends as if nothing had been."""

import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from .hospital import Orthanc, Process, network_of_its_own, wait_until
from .scanner import storescu

pytestmark = pytest.mark.slow


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Orthanc]:
    """Not there yet."""
    with network_of_its_own():
        orthanc = Orthanc(tmp_path / "orthanc")
        yield orthanc
        orthanc.stop()


def config_of(folder: Path, package: Path) -> Path:
    folder.mkdir()
    said = {
        "state": str(folder / "state"),
        "receiving": {"reserve_gb": 0.1},
        "peers": {"scanner": {"aet": "SCANNER"}, "archive": {"aet": "ORTHANC", "host": "127.0.0.1", "port": 14242}},
        "waiting": {"quiet_s": 1.0, "settled_s": 0.5, "cap_s": 60},
        "working": {"first_pause_s": 0.5, "attempts": 100, "target_attempts": 100, "longest_pause_s": 1},
        "routes": {"brain": {"package": str(package), "take": {"mr": {}}, "outputs": ["dicom_seg"], "targets": ["archive"]}},
        "showing": {"port": 18080},
    }  # fmt: skip
    (folder / "node.yaml").write_text(yaml.safe_dump(said))
    return folder / "node.yaml"


def hilum(*words: str) -> int:
    return subprocess.run([sys.executable, "-m", "pipeline", *words], check=False, capture_output=True).returncode


def test_a_study_that_waits_for_the_archive_is_sent_by_the_node_that_was_restored(
    archive: Orthanc, tiny: Path, shared: Path, tmp_path: Path
) -> None:
    study = next(path for path in sorted((shared / "data/hippocampus-dicom").iterdir()) if path.is_dir())
    config = config_of(tmp_path / "old", tiny)
    old = Process(config).start()
    wait_until(metrics, old)
    assert hilum("node", "--config", str(config), "--healthy") == 0
    assert storescu(11112, *sorted(study.glob("*.dcm"))).returncode == 0
    wait_until(lambda: list((tmp_path / "old/state/work").glob("*/brain/results/*/*.dcm")), old)
    assert hilum("node", "--config", str(config), "--backup", str(tmp_path / "backup")) == 0
    old.kill()
    shutil.rmtree(tmp_path / "old")

    config = config_of(tmp_path / "new", tiny)
    shutil.copytree(tmp_path / "backup" / "state", tmp_path / "new" / "state")
    archive.start()
    new = Process(config).start()
    try:
        wait_until(lambda: 'state="done"' in metrics() and "hilum_queue_depth 0" in metrics(), new)
    finally:
        assert new.stop() == 0
    (series,) = archive.series()
    assert series["MainDicomTags"]["Modality"] == "SEG" and len(series["Instances"]) == 1


def metrics() -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open("http://127.0.0.1:18080/metrics", timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""
