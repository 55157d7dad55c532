"""When a study is whole: its source is asked, and only what this node would take is counted."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import BasicTextSRStorage, MRImageStorage, RawDataStorage, SecondaryCaptureImageStorage, generate_uid

from pipeline.node.config import Node, Peer
from pipeline.node.desk import Desk
from pipeline.node.ledger import open_ledger
from pipeline.node.routes import Route, Waiting
from pipeline.node.rules import Rule
from pipeline.node.spool import Spool, open_keys
from pipeline.node.stories import Stories
from pipeline.node.watcher import Watcher

from .hospital import Orthanc, network_of_its_own
from .scanner import a_slice, a_study, free_port, read, receive, write

QUICK = Waiting(settled_s=0.001, quiet_s=0.002, cap_s=1.0)
ASKS = Waiting(settled_s=0.01, quiet_s=60, cap_s=60, ask_every_s=0.01)


def routes(*names: str, **said: Any) -> dict[str, Route]:
    return {name: Route(package=Path("p"), take={"mr": Rule()}, **said) for name in names}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    yield from opened(tmp_path, routes("brain"), QUICK)


def opened(folder: Path, ways: dict[str, Route], waiting: Waiting, **peers: Peer) -> Iterator[Desk]:
    known = {"scanner": Peer(aet="SCANNER")} | peers
    node = Node(state=folder / "state", peers=known, routes=ways, waiting=waiting)
    ledger = open_ledger(node.state)
    yield Desk(node=node, spool=Spool(node.state, open_keys(node.state)), ledger=ledger, stories=Stories(ledger))
    ledger.close()


def watcher(at: Desk, begun: list[str] | None = None) -> Watcher:
    return Watcher(desk=at, begin=lambda story, route: None if begun is None else begun.append(story.id))


def look(at: Desk, begun: list[str] | None = None) -> None:
    time.sleep(0.02)
    watcher(at, begun).look()


def states(at: Desk) -> list[tuple[int, str, str]]:
    return sorted((story.revision, story.route, story.state) for story in at.stories.all())


def test_what_waits_for_an_earlier_revision_is_superseded_and_never_begun(desk: Desk, tmp_path: Path) -> None:
    paths = a_study(tmp_path / "sent", slices=4)
    receive(desk, paths[:2])
    look(desk)
    receive(desk, paths[2:])
    begun: list[str] = []
    look(desk, begun)
    assert states(desk) == [(1, "brain", "superseded"), (2, "brain", "queued")]
    assert [name.split("-")[1] for name in begun] == ["2"]


def test_a_story_that_somebody_holds_gives_way_to_a_newer_revision_too(desk: Desk, tmp_path: Path) -> None:
    paths = a_study(tmp_path / "sent", slices=4)
    receive(desk, paths[:2])
    look(desk)
    desk.stories.note(desk.stories.all()[0], "held")
    receive(desk, paths[2:])
    look(desk)
    assert states(desk) == [(1, "brain", "superseded"), (2, "brain", "queued")]


def test_a_node_that_was_killed_between_two_stories_makes_up_for_it(tmp_path: Path) -> None:
    for at in opened(tmp_path, routes("brain") | routes("other", sources=("archive",)), QUICK):
        study = receive(at, a_study(tmp_path / "sent", slices=2))
        at.ledger.freeze(study)  # and here it was killed
        look(at)
        assert states(at) == [(1, "brain", "queued"), (1, "other", "refused")]


def test_a_route_that_comes_later_is_not_for_what_came_before_it(tmp_path: Path) -> None:
    for at in opened(tmp_path, routes("brain"), QUICK):
        receive(at, a_study(tmp_path / "sent", slices=2))
        look(at)
    for at in opened(tmp_path, routes("brain", "liver"), QUICK):
        look(at)
        assert states(at) == [(1, "brain", "queued")]


def test_a_source_that_is_away_holds_nobody_up_for_long(tmp_path: Path) -> None:
    gone = Peer(aet="GONE", host="127.0.0.1", port=free_port(), timeout_s=1)
    for at in opened(tmp_path, routes("brain"), replace(QUICK, ask_every_s=60.0), gone=gone):
        for number in range(3):
            receive(at, a_study(tmp_path / f"sent{number}", slices=1), source="gone")
        one = watcher(at)
        time.sleep(0.02)
        one.look()
        assert list(one.away) == ["gone"] and [state for *_, state in states(at)] == ["queued"] * 3


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with network_of_its_own():
        orthanc = Orthanc(tmp_path_factory.mktemp("orthanc"))
        orthanc.start()
        yield orthanc
        orthanc.stop()


DIMSE = Peer(aet="ORTHANC", host="127.0.0.1", port=14242, timeout_s=20)
WEB = Peer(aet="ORTHANC", web="http://127.0.0.1:18042/dicom-web", timeout_s=20)


@pytest.mark.slow
@pytest.mark.parametrize("peer", [DIMSE, WEB], ids=["C-FIND", "QIDO"])
def test_reports_raw_data_and_our_own_results_are_not_waited_for_and_a_slice_is(
    archive: Orthanc, tmp_path: Path, peer: Peer
) -> None:
    study, mr = generate_uid(), generate_uid()
    kinds = [(MRImageStorage, "MR", mr, n) for n in range(4)]
    kinds += [(BasicTextSRStorage, "SR", generate_uid(), 9), (RawDataStorage, "MR", mr, 8)]
    made = (SecondaryCaptureImageStorage, "OT", generate_uid(), 7)
    paths = {
        number: write(
            tmp_path / f"{number}.dcm", a_slice(study, series, seed=number, SOPClassUID=kind, Modality=modality)
        )
        for kind, modality, series, number in (*kinds, made)
    }
    for path in paths.values():
        archive.ask("instances", path.read_bytes())
    for at in opened(tmp_path, routes("brain"), ASKS, archive=peer):
        key = receive(at, [paths[0], paths[1], paths[2]], source="archive")
        results = at.folder(key, 1, "brain") / "results" / "case-1"
        results.mkdir(parents=True)
        read(paths[7]).save_as(results / "picture.dcm")
        one = watcher(at)
        time.sleep(0.05)
        one.look()
        assert not at.stories.all(), "a slice is missing"
        receive(at, [paths[3]], source="archive")
        time.sleep(0.05)
        one.look()
        assert states(at) == [(1, "brain", "queued")] and "incomplete" not in at.stories.all()[0].facts


@pytest.mark.slow
def test_a_study_that_stays_incomplete_is_begun_when_the_wait_ends_and_says_so(
    archive: Orthanc, tmp_path: Path
) -> None:
    paths = a_study(tmp_path / "sent", slices=3)
    for path in paths:
        archive.ask("instances", path.read_bytes())
    for at in opened(tmp_path, routes("brain"), replace(ASKS, quiet_s=0.1, cap_s=0.5), archive=DIMSE):
        receive(at, paths[:2], source="archive")
        time.sleep(0.6)
        watcher(at).look()
        (story,) = at.stories.all()
        assert story.facts["incomplete"] == "1 of 3 objects had not come when the wait ended"
