"""A study's way from the spool into the archive, with Debian's Orthanc as the archive."""

import time
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest

from pipeline.node import workflow
from pipeline.node.config import Node, Peer
from pipeline.node.ledger import open_ledger
from pipeline.node.routes import Route, Waiting, Working
from pipeline.node.rules import Rule
from pipeline.node.spool import Spool, open_keys
from pipeline.node.stories import ENDED, Stories, Story
from pipeline.node.watcher import Watcher, retry
from pipeline.node.workflow import Desk

from .hospital import Orthanc, network_of_its_own

ARCHIVE = Peer(aet="ORTHANC", host="127.0.0.1", port=14242, timeout_s=10)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with network_of_its_own():
        orthanc = Orthanc(tmp_path_factory.mktemp("orthanc"))
        orthanc.start()
        yield orthanc
        orthanc.stop()


@pytest.fixture
def desk(archive: Orthanc, tiny: Path, tmp_path: Path) -> Iterator[Desk]:
    route = Route(
        package=tiny, take={"mr": Rule(modality=("MR",), least_slices=10)}, outputs=("dicom_seg", "secondary_capture"),
        targets=("archive",),
    )  # fmt: skip
    node = Node(
        state=tmp_path / "state", peers={"archive": ARCHIVE, "scanner": Peer(aet="SCANNER")}, routes={"hippo": route},
        waiting=Waiting(quiet_s=0.4, settled_s=0.2, cap_s=60), working=Working(first_pause_s=0.2, attempts=4),
    )  # fmt: skip
    keys = open_keys(node.state)
    ledger = open_ledger(node.state)
    at = Desk(node=node, spool=Spool(node.state, keys), ledger=ledger, stories=Stories(ledger))
    workflow.start(at)
    yield at
    workflow.stop()
    ledger.close()


@pytest.fixture(scope="module")
def series(shared: Path) -> list[Path]:
    folder = next(path for path in sorted((shared / "data/hippocampus-dicom").iterdir()) if path.is_dir())
    paths = [path for path in folder.rglob("*") if path.is_file() and pydicom.misc.is_dicom(path)]
    return sorted(paths, key=lambda path: pydicom.dcmread(path, stop_before_pixels=True).InstanceNumber)


def arrive(at: Desk, paths: list[Path], source: str = "scanner") -> str:
    """As the listener does it, one object after the other."""
    for path in paths:
        meta = pydicom.dcmread(path, stop_before_pixels=True).file_meta
        part = at.spool.begin(meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID)
        content = path.read_bytes()
        part.write(content[144 + meta.FileMetaInformationGroupLength :])
        part.finish()
        arrival = at.spool.name(part, source)
        at.spool.admit(part, arrival)
        at.ledger.record(arrival)
    return arrival.place.study


def ended(at: Desk, watcher: Watcher, stories: int, seconds: float = 90) -> list[Story]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        watcher.look()
        there = at.stories.all()
        if len(there) >= stories and all(story.state in ENDED for story in there):
            return there
        time.sleep(0.2)
    raise AssertionError(f"not ended in time: {at.stories.all()}")


def kinds_in(archive: Orthanc) -> list[str]:
    return sorted(
        archive.ask(f"instances/{one}/simplified-tags")["Modality"]  # type: ignore[index]
        for one in archive.ask("instances")  # type: ignore[attr-defined]
    )


def test_a_study_goes_in_and_its_results_lie_in_the_archive_once(
    desk: Desk, archive: Orthanc, series: list[Path]
) -> None:
    before = len(archive.ask("instances"))  # type: ignore[arg-type]
    arrive(desk, series)
    (story,) = ended(desk, Watcher(desk=desk), 1)
    assert story.state == "done", story
    assert story.facts["proven"] == {"archive": True} and story.facts["chosen"][0][0]["modality"] == "MR"
    assert len(archive.ask("instances")) == before + 2 and kinds_in(archive) == ["OT", "SEG"]  # type: ignore[arg-type]
    again = retry(story, desk)
    assert again.attempt == 2
    (story,) = ended(desk, Watcher(desk=desk), 1)
    assert story.state == "done" and len(archive.ask("instances")) == before + 2  # type: ignore[arg-type]
    uids = {str(pydicom.dcmread(path, stop_before_pixels=True).StudyInstanceUID) for path in series}
    rows = repr(desk.stories.all())
    assert not any(uid in rows for uid in uids)


@pytest.mark.slow
def test_slices_that_come_late_make_a_second_revision(desk: Desk, archive: Orthanc, series: list[Path]) -> None:
    study = arrive(desk, series[:-3])
    watcher = Watcher(desk=desk)
    (first,) = ended(desk, watcher, 1)
    assert first.state == "done" and desk.ledger.study(study).revision == 1  # type: ignore[union-attr]
    arrive(desk, series[-3:])
    second, _ = ended(desk, watcher, 2)
    assert (second.revision, second.state) == (2, "done")
    assert second.facts["chosen"][0][0]["slices"] == len(series)


def test_a_study_that_fits_no_rule_says_why_not(desk: Desk, series: list[Path], tmp_path: Path) -> None:
    arrive(desk, series[:5])
    (story,) = ended(desk, Watcher(desk=desk), 1)
    assert (story.state, story.code) == ("refused", "no_series")
    assert story.facts["why_not"][0]["why_not"] == "5 slices, fewer than 10"


@pytest.mark.slow
def test_an_archive_that_was_away_gets_everything_once_it_is_back(
    desk: Desk, archive: Orthanc, series: list[Path]
) -> None:
    archive.stop()
    try:
        arrive(desk, series)
        watcher, until = Watcher(desk=desk), time.monotonic() + 60
        while not any(story.state == "sending" for story in desk.stories.all()) and time.monotonic() < until:
            watcher.look()
            time.sleep(0.1)
    finally:
        archive.start()
    (story,) = ended(desk, watcher, 1)
    assert story.state == "done"


@pytest.mark.slow
def test_an_archive_that_stays_away_ends_as_a_dead_letter_that_can_be_begun_anew(
    desk: Desk, archive: Orthanc, series: list[Path]
) -> None:
    archive.stop()
    try:
        arrive(desk, series)
        (story,) = ended(desk, Watcher(desk=desk), 1)
    finally:
        archive.start()
    assert (story.state, story.code) == ("dead", "target_away") and "Tried 4 times" in story.words
    retry(story, desk)
    (story,) = ended(desk, Watcher(desk=desk), 1)
    assert story.state == "done"
