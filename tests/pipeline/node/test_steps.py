"""What each step does, one by one: revisions, label maps where they are taken, proof by the target's own word.

Orthanc and dcmtk's storescp are the targets. No engine of workflows runs: steps are functions.
"""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydicom
import pytest

from pipeline.node import steps
from pipeline.node.config import Node, Peer, Receiving
from pipeline.node.desk import Desk
from pipeline.node.ledger import open_ledger
from pipeline.node.listener import Listener
from pipeline.node.room import Room
from pipeline.node.routes import Route
from pipeline.node.rules import Rule
from pipeline.node.spool import Spool, open_keys
from pipeline.node.stories import Stories, Story

from .hospital import Orthanc, network_of_its_own
from .scanner import a_study, an_mr_study, free_port, read, receive, until

pytestmark = pytest.mark.slow

LABELMAP = "1.2.840.10008.5.1.4.1.1.66.7"
ARCHIVE = Peer(aet="ORTHANC", host="127.0.0.1", port=14242, timeout_s=10)
OUR_PORT = 11113


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with network_of_its_own():
        knows = {"hilum": {"AET": "HILUM", "Host": "127.0.0.1", "Port": OUR_PORT, "AllowStorageCommitment": True}}
        orthanc = Orthanc(tmp_path_factory.mktemp("orthanc"), knows)
        orthanc.start()
        yield orthanc
        orthanc.stop()


ROOMS: list[Room] = []
"""Shared by all tests here: each costs seconds to open."""


@pytest.fixture(scope="module", autouse=True)
def rooms_are_closed() -> Iterator[None]:
    yield
    while ROOMS:
        ROOMS.pop().close()


@contextmanager
def a_desk(place: Path, tiny: Path, peers: dict[str, Peer], **said: Any) -> Iterator[Desk]:
    how: dict[str, Any] = {"outputs": ("dicom_seg", "structured_report"), "targets": tuple(peers)}
    how["take"] = {"mr": Rule(modality=("MR",), least_slices=8)}
    route = Route(package=tiny, **(how | said))
    node = Node(
        state=place / "state", peers=peers | {"scanner": Peer(aet="SCANNER")}, routes={"brain": route},
        receiving=Receiving(port=OUR_PORT, reserve_gb=0.0),
    )  # fmt: skip
    ledger = open_ledger(node.state)
    at = Desk(
        node=node, spool=Spool(node.state, open_keys(node.state)), ledger=ledger, stories=Stories(ledger), rooms=ROOMS
    )
    yield at
    ledger.close()


def begun(at: Desk, paths: list[Path]) -> tuple[str, int, str]:
    """A study that came, as a revision that was frozen."""
    revision = at.ledger.freeze(receive(at, paths))
    assert revision is not None
    at.stories.begin(revision.study, revision.number, "brain")
    return revision.study, revision.number, "brain"


def story(at: Desk, words: tuple[str, int, str]) -> Story:
    found = at.stories.get(*words)
    assert found is not None
    return found


def made(at: Desk, words: tuple[str, int, str]) -> dict[str, pydicom.Dataset]:
    """The results of a story that is taken and segmented, by their modality."""
    taken = steps.take(at, *words)
    assert taken["ends"] is None, taken
    for case in taken["cases"]:
        assert steps.segment(at, *words, case) == steps.DONE
    results = (at.folder(*words) / "results").glob("[!.]*/*.dcm")
    return {one.Modality: one for one in map(pydicom.dcmread, results)}


def slices(folder: Path) -> list[Path]:
    return sorted(an_mr_study(folder).glob("*.dcm"))


@contextmanager
def storescp(folder: Path) -> Iterator[Peer]:
    """dcmtk's receiver, told to take what it does not know, as archives younger than it do."""
    if shutil.which("storescp") is None:
        pytest.skip("dcmtk is not installed (apt-get install dcmtk)")
    folder.mkdir()
    port = free_port()
    process = subprocess.Popen(["storescp", "--promiscuous", "-od", str(folder), str(port)])
    peer = Peer(aet="STORESCP", host="127.0.0.1", port=port, timeout_s=10)
    try:
        time.sleep(0.3)
        yield peer
    finally:
        process.terminate()
        process.wait(10)


def test_a_target_that_takes_label_maps_gets_one_and_the_story_says_so(
    archive: Orthanc, tiny: Path, tmp_path: Path
) -> None:
    with storescp(tmp_path / "got") as new, a_desk(tmp_path, tiny, {"new": new}, proof="none") as at:
        words = begun(at, slices(tmp_path / "sent"))
        assert made(at, words)["SEG"].SOPClassUID == LABELMAP
        assert story(at, words).facts["seg"]["kind"] == "labelmap"
        assert steps.hand_over(at, *words, "new") == steps.DONE
        assert steps.prove(at, *words, "new") == steps.DONE
        got = [pydicom.dcmread(path) for path in (tmp_path / "got").iterdir()]
        assert {one.SOPClassUID for one in got if one.Modality == "SEG"} == {LABELMAP}


def test_one_target_that_takes_none_is_enough_for_a_binary_segmentation(
    archive: Orthanc, tiny: Path, tmp_path: Path
) -> None:
    gone = Peer(aet="GONE", host="127.0.0.1", port=1, timeout_s=1)
    with storescp(tmp_path / "got") as new, a_desk(tmp_path, tiny, {"new": new, "old": ARCHIVE, "gone": gone}) as at:
        words = begun(at, slices(tmp_path / "sent"))
        assert steps.take(at, *words)["ends"] is None
        assert story(at, words).facts["seg"] == {
            "kind": "binary", "attempt": 1,
            "why": {"new": "takes label maps", "old": "takes no label maps", "gone": "could not be asked"},
        }  # fmt: skip


def test_a_late_slice_makes_an_answer_of_its_own_that_names_the_one_it_replaces(
    archive: Orthanc, tiny: Path, tmp_path: Path
) -> None:
    with a_desk(tmp_path, tiny, {"archive": ARCHIVE}) as at:
        paths = slices(tmp_path / "sent")
        first = begun(at, paths[:-1])
        before = made(at, first)
        assert steps.hand_over(at, *first, "archive") == steps.prove(at, *first, "archive") == steps.DONE
        steps.end(at, *first, "done", "", "")
        second = begun(at, paths[-1:])
        after = made(at, second)
        assert second[1] == 2 and not {one.SOPInstanceUID for one in before.values()} & {
            one.SOPInstanceUID for one in after.values()
        }
        named = after["SR"].PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
        assert named.ReferencedSOPInstanceUID == before["SR"].SOPInstanceUID
        assert before["SEG"].SOPInstanceUID in {
            one.ReferencedSOPInstanceUID for one in after["SEG"].ReferencedInstanceSequence
        }
        assert steps.hand_over(at, *second, "archive") == steps.prove(at, *second, "archive") == steps.DONE


def test_what_came_late_and_is_none_of_the_routes_business_makes_no_second_answer(
    archive: Orthanc, tiny: Path, tmp_path: Path
) -> None:
    with a_desk(tmp_path, tiny, {"archive": ARCHIVE}) as at:
        paths = slices(tmp_path / "sent")
        first = begun(at, paths)
        made(at, first)
        localiser = a_study(tmp_path / "localiser", slices=2)
        for path in localiser:
            data = read(path)
            data.StudyInstanceUID = read(paths[0]).StudyInstanceUID
            data.save_as(path)
        second = begun(at, localiser)
        taken = steps.take(at, *second)
        assert second[1] == 2 and taken["ends"]["state"] == "done" and not taken["cases"]
        assert story(at, second).facts["as_before"] == 1
        assert steps.hand_over(at, *first, "archive") == steps.prove(at, *first, "archive") == steps.DONE
        assert story(at, first).facts["same_in"] == 2
        at.stories.note(story(at, second), "done")
        retried = at.stories.again(at.stories.note(story(at, first), "dead"))
        assert steps.take(at, *first, retried.attempt)["cases"] == ["case-1"], "a newer revision leans on its answer"
        again = at.stories.again(story(at, second))
        assert steps.take(at, *second, again.attempt)["cases"] == ["case-1"], "a person wants them made anew"
        assert not story(at, second).facts["as_before"]


def test_our_own_picture_that_an_archive_sends_on_to_us_is_no_scan(tiny: Path, tmp_path: Path) -> None:
    with a_desk(tmp_path, tiny, {}, outputs=("secondary_capture",), prefer="all", take={"mr": Rule()}) as at:
        first = begun(at, slices(tmp_path / "sent"))
        made(at, first)
        second = begun(at, sorted((at.folder(*first) / "results").glob("*/*.dcm")))
        assert second[:2] == (first[0], 2)
        assert steps.take(at, *second)["ends"]["state"] == "done"
        told = story(at, second).facts
        assert told["as_before"] == 1 and len(told["chosen"]) == 1, "not even a route that takes all series takes it"


def test_a_route_that_makes_nothing_a_target_could_take_says_so(tiny: Path, tmp_path: Path) -> None:
    with a_desk(tmp_path, tiny, {"archive": ARCHIVE}, outputs=("labels",)) as at:
        words = begun(at, slices(tmp_path / "sent"))
        assert steps.hand_over(at, *words, "archive")["code"] == "nothing_to_send"


def test_a_story_stops_before_its_next_step_once_more_of_the_study_is_frozen(
    archive: Orthanc, tiny: Path, tmp_path: Path
) -> None:
    with a_desk(tmp_path, tiny, {"archive": ARCHIVE}) as at:
        paths = slices(tmp_path / "sent")
        first = begun(at, paths[:-1])
        made(at, first)
        held = len(archive.ask("instances"))  # type: ignore[arg-type]
        begun(at, paths[-1:])
        for step in (steps.hand_over, steps.prove):
            said = step(at, *first, "archive")
            assert (said["status"], said["state"], said["code"]) == ("never", "superseded", "superseded")
        assert steps.segment(at, *first, "case-1")["state"] == steps.take(at, *first)["ends"]["state"] == "superseded"
        assert len(archive.ask("instances")) == held  # type: ignore[arg-type]


def test_part_of_a_study_is_never_segmented_for_the_rest_is_gone(tiny: Path, tmp_path: Path) -> None:
    with a_desk(tmp_path, tiny, {}) as at:
        paths = slices(tmp_path / "sent")
        first = begun(at, paths[:-1])
        for one in at.ledger.since(first[0]):
            at.spool.remove(one.place)
            at.ledger.forget(one.place)
        second = begun(at, paths[-1:])
        ends = steps.take(at, *second)["ends"]
        assert (ends["state"], ends["code"]) == ("refused", "input_gone") and "9 of 10" in ends["words"]
        assert begun(at, paths) == second and steps.take(at, *second)["ends"] is None


def test_results_lie_in_the_routes_folder_whole(tiny: Path, tmp_path: Path) -> None:
    with a_desk(tmp_path, tiny, {}, folder=tmp_path / "out", outputs=("labels", "measurements")) as at:
        words = begun(at, slices(tmp_path / "sent"))
        made(at, words)
        (tmp_path / "out" / f"{words[0]}-1" / "brain").mkdir(parents=True)
        (tmp_path / "out" / f"{words[0]}-1" / "brain" / ".case-1.half").mkdir()
        for _ in range(2):
            assert steps.put_away(at, *words) == steps.DONE
        (case,) = (tmp_path / "out" / f"{words[0]}-1" / "brain").iterdir()
        source = at.folder(*words) / "results" / case.name
        assert sorted(p.name for p in case.iterdir()) == sorted(p.name for p in source.iterdir())


@contextmanager
def listening(at: Desk) -> Iterator[None]:
    listener = Listener(at.node, at.spool, at.ledger)
    listener.start()
    try:
        yield
    finally:
        listener.stop()


def with_results(at: Desk, folder: Path) -> tuple[str, int, str]:
    """A story with objects for results that nobody needed to compute."""
    words = begun(at, slices(folder))
    results = at.folder(*words) / "results" / "case-1"
    results.mkdir(parents=True)
    for path in a_study(folder / "made", slices=3):
        shutil.copy(path, results)
    return words


def answer(at: Desk, words: tuple[str, int, str]) -> dict[str, str]:
    """What `prove` says once the archive has answered."""
    assert steps.prove(at, *words, "archive")["status"] == "wait"
    asked = at.vouchings.of(story(at, words).id, "archive")
    assert asked is not None and until(
        lambda: at.vouchings.of(story(at, words).id, "archive").answered,
        20,  # type: ignore[union-attr]
    )
    return steps.prove(at, *words, "archive")


def test_an_archive_that_vouches_is_believed_and_what_it_lost_is_sent_again(
    archive: Orthanc, tiny: Path, tmp_path: Path
) -> None:
    with a_desk(tmp_path, tiny, {"archive": ARCHIVE}, proof="commitment") as at, listening(at):
        words = with_results(at, tmp_path / "sent")
        assert steps.hand_over(at, *words, "archive") == steps.DONE
        lost = str(read(next((at.folder(*words) / "results").glob("*/*.dcm"))).SOPInstanceUID)
        (found,) = archive.ask("tools/lookup", lost.encode())  # type: ignore[misc]
        subprocess.run(["curl", "-sfX", "DELETE", f"{archive.rest}/instances/{found['ID']}"], check=True)
        said = answer(at, words)
        assert (said["status"], said["code"]) == ("later", "not_kept") and "1 objects" in said["words"]
        assert archive.ask("tools/lookup", lost.encode())
        assert answer(at, words) == steps.DONE
        assert story(at, words).facts["proven"] == {"archive": "commitment"}
        assert lost not in (at.node.state / "ledger.sqlite").read_bytes().decode("latin-1")


def test_an_archive_that_does_not_answer_in_time_is_asked_anew(archive: Orthanc, tiny: Path, tmp_path: Path) -> None:
    with a_desk(tmp_path, tiny, {"archive": ARCHIVE}, proof="commitment", vouch_s=0.05) as at:
        words = with_results(at, tmp_path / "sent")
        assert steps.hand_over(at, *words, "archive") == steps.DONE
        assert steps.prove(at, *words, "archive")["status"] == "wait"
        time.sleep(0.1)
        said = steps.prove(at, *words, "archive")
        assert (said["status"], said["code"]) == ("later", "not_vouched")


def test_a_target_that_is_away_when_it_should_vouch_is_asked_again_later(tiny: Path, tmp_path: Path) -> None:
    gone = replace(ARCHIVE, port=1, timeout_s=1.0)
    with a_desk(tmp_path, tiny, {"archive": gone}, proof="commitment") as at:
        words = with_results(at, tmp_path / "sent")
        assert steps.prove(at, *words, "archive")["code"] == "target_away"
        asked = at.vouchings.of(story(at, words).id, "archive")
        assert asked is not None and asked.asked is None, "nobody waits for an answer to what was never asked"
