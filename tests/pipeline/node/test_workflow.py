"""A study's way from the spool into the archive, with Debian's Orthanc as the archive and DBOS as the engine."""

import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.node import acts, workflow
from pipeline.node.config import Node, Peer
from pipeline.node.desk import Desk
from pipeline.node.ledger import open_ledger
from pipeline.node.routes import Route, Waiting, Working
from pipeline.node.rules import Rule
from pipeline.node.spool import Spool, open_keys
from pipeline.node.stories import ENDED, Stories, Story
from pipeline.node.watcher import Watcher

from .hospital import Orthanc, network_of_its_own
from .scanner import an_mr_study, read, receive

pytestmark = pytest.mark.slow

ARCHIVE = Peer(aet="ORTHANC", host="127.0.0.1", port=14242, timeout_s=10)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with network_of_its_own():
        orthanc = Orthanc(tmp_path_factory.mktemp("orthanc"))
        orthanc.start()
        yield orthanc
        orthanc.stop()


@pytest.fixture(scope="module")
def desk(archive: Orthanc, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    route = Route(
        package=tiny, take={"mr": Rule(modality=("MR",), least_slices=8)}, outputs=("dicom_seg", "secondary_capture"),
        targets=("archive",),
    )  # fmt: skip
    node = Node(
        state=tmp_path_factory.mktemp("node") / "state", peers={"archive": ARCHIVE, "scanner": Peer(aet="SCANNER")},
        routes={"hippo": route}, waiting=Waiting(quiet_s=0.4, settled_s=0.2, cap_s=60),
        working=Working(first_pause_s=0.2, longest_pause_s=1.0, attempts=2, target_attempts=4),
    )  # fmt: skip
    ledger = open_ledger(node.state)
    at = Desk(node=node, spool=Spool(node.state, open_keys(node.state)), ledger=ledger, stories=Stories(ledger))
    workflow.start(at)
    yield at
    workflow.stop()
    ledger.close()


@pytest.fixture
def slices(tmp_path: Path) -> list[Path]:
    return sorted(an_mr_study(tmp_path / "sent").glob("*.dcm"))


def wait(at: Desk, study: str, *states: str, seconds: float = 120) -> list[Story]:
    """The study's stories once they are in these states, the newest revision first."""
    watcher, until = Watcher(desk=at), time.monotonic() + seconds
    while time.monotonic() < until:
        watcher.look()
        there = at.stories.of(study)
        if [story.state for story in there] == list(states):
            return there
        time.sleep(0.1)
    raise AssertionError(f"not so in time: {at.stories.of(study)}")


def kinds_of(archive: Orthanc, path: Path) -> Counter[str]:
    """What the archive has of a study, by modality."""
    uid = str(read(path).StudyInstanceUID)
    tags = (archive.ask(f"instances/{one}/simplified-tags") for one in archive.ask("instances"))  # type: ignore[attr-defined]
    return Counter(one["Modality"] for one in tags if one["StudyInstanceUID"] == uid)  # type: ignore[index, call-overload]


BOTH = {"OT": 1, "SEG": 1}


def test_a_study_goes_in_and_its_results_lie_in_the_archive_once(
    desk: Desk, archive: Orthanc, slices: list[Path]
) -> None:
    study = receive(desk, slices)
    (story,) = wait(desk, study, "done")
    assert story.facts["proven"] == {"archive": "read_back"} and story.facts["chosen"][0][0]["modality"] == "MR"
    way = [moment["state"] for moment in story.facts["moments"]]
    assert way == ["queued", "choosing", "segmenting", "sending", "confirming", "done"]
    assert kinds_of(archive, slices[0]) == BOTH
    assert acts.do(desk, story, "retry", "somebody").attempt == 2
    (story,) = wait(desk, study, "done")
    assert story.attempt == 2 and kinds_of(archive, slices[0]) == BOTH
    uids = {str(read(path).StudyInstanceUID) for path in slices}
    assert not any(uid in repr(desk.stories.all()) for uid in uids)


def test_a_study_that_fits_no_rule_says_why_not(desk: Desk, slices: list[Path]) -> None:
    (story,) = wait(desk, receive(desk, slices[:5]), "refused")
    assert story.code == "no_series" and story.facts["why_not"][0]["why_not"] == "5 slices, fewer than 8"


def test_while_the_archive_is_away_the_way_waits_and_a_late_slice_takes_its_place(
    desk: Desk, archive: Orthanc, slices: list[Path]
) -> None:
    archive.stop()
    try:
        study = receive(desk, slices[:-1])
        wait(desk, study, "sending")
        receive(desk, slices[-1:])
        second, first = wait(desk, study, "sending", "superseded")
    finally:
        archive.start()
    assert first.code == "superseded" and first.facts["superseded_by"] == 2
    assert second.facts["chosen"][0][0]["slices"] == len(slices)
    wait(desk, study, "done", "superseded")
    assert kinds_of(archive, slices[0]) == BOTH


def test_an_archive_that_stays_away_ends_as_a_dead_letter_that_can_be_begun_anew(
    desk: Desk, archive: Orthanc, slices: list[Path]
) -> None:
    archive.stop()
    try:
        study = receive(desk, slices)
        (story,) = wait(desk, study, "dead")
    finally:
        archive.start()
    assert story.code == "target_away" and "Tried 4 times" in story.words
    acts.do(desk, story, "retry", "somebody")
    wait(desk, study, "done")
    assert kinds_of(archive, slices[0]) == BOTH


def test_workflows_that_ended_are_forgotten_in_time_and_no_others(desk: Desk) -> None:
    assert all(story.state in ENDED for story in desk.stories.all())
    assert workflow.forget(datetime.now(UTC) - timedelta(hours=1)) == 0
    assert workflow.forget(datetime.now(UTC) + timedelta(seconds=5)) > 0
    assert workflow.forget(datetime.now(UTC) + timedelta(seconds=5)) == 0
    before = {story.id for story in desk.stories.all()}
    Watcher(desk=desk).look()
    assert {story.id for story in desk.stories.all()} == before
