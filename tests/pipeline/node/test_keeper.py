"""What is no longer needed goes, what may be needed stays, and what was let go of can be sent again."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.node.config import Keeping, Node, Peer
from pipeline.node.desk import Desk
from pipeline.node.keeper import Keeper
from pipeline.node.ledger import open_ledger
from pipeline.node.routes import Route, Waiting
from pipeline.node.rules import Rule
from pipeline.node.spool import Spool, open_keys
from pipeline.node.stories import Stories, Story
from pipeline.node.watcher import Watcher

from .scanner import a_study, receive

ROUTES = {name: Route(package=Path("p"), take={"ct": Rule()}) for name in ("liver", "lung")}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    yield from opened(tmp_path, Keeping(input_h=0.0, results_h=0.0))


def opened(folder: Path, keeping: Keeping) -> Iterator[Desk]:
    node = Node(
        state=folder / "state", peers={"scanner": Peer(aet="SCANNER")}, routes=ROUTES, keeping=keeping,
        waiting=Waiting(settled_s=0.001, quiet_s=0.001, cap_s=1.0),
    )  # fmt: skip
    ledger = open_ledger(node.state)
    yield Desk(node=node, spool=Spool(node.state, open_keys(node.state)), ledger=ledger, stories=Stories(ledger))
    ledger.close()


class House:
    """A node without workers: stories end when the test says so."""

    def __init__(self, at: Desk) -> None:
        self.at, self.begun = at, list[str]()
        self.keeper = Keeper(desk=at, begin=lambda story, route: self.begun.append(story.id))

    def freeze(self) -> None:
        time.sleep(0.01)
        Watcher(desk=self.at, begin=lambda story, route: None, kept_house=time.monotonic()).look()

    def end(self, story: Story, state: str, code: str = "") -> None:
        folder = self.at.folder(story.study, story.revision, story.route)
        for name in ("input", "results"):
            (folder / name / "case-1").mkdir(parents=True)
        for held in self.at.spool.folder.glob(f"{story.study}/*/*.dcm"):
            os.link(held, folder / "input" / "case-1" / held.name)
        (folder / "results" / "case-1" / "labels.dcm").write_bytes(b"")
        self.at.stories.note(story, state, code)  # type: ignore[arg-type]

    def files(self, where: str) -> int:
        return len(list(self.at.node.state.glob(f"{where}/**/*.dcm")))


def test_input_goes_once_all_routes_are_done_with_it_and_not_before(desk: Desk, tmp_path: Path) -> None:
    house = House(desk)
    study = receive(desk, a_study(tmp_path / "sent", slices=3))
    house.freeze()
    liver, lung = sorted(desk.stories.of(study), key=lambda story: story.route)
    house.end(liver, "done")
    house.keeper.look()
    assert house.files("spool") == 3
    house.end(lung, "refused", "no_series")
    house.keeper.look()
    assert house.files("spool") == 0 and house.files("work") == 0
    assert [line["facts"]["objects"] for line in desk.audit.newest() if line["what"] == "release"] == [3]


def test_results_stay_for_longer_than_input(tmp_path: Path) -> None:
    for desk in opened(tmp_path, Keeping(input_h=0.0, results_h=1.0)):
        house = House(desk)
        study = receive(desk, a_study(tmp_path / "sent", slices=2))
        house.freeze()
        for story in desk.stories.of(study):
            house.end(story, "done")
        house.keeper.look()
        assert house.files("spool") == 0 and house.files("work/*/*/input") == 0
        assert house.files("work/*/*/results") == 2


def test_nothing_goes_that_is_younger_than_the_config_says(tmp_path: Path) -> None:
    for desk in opened(tmp_path, Keeping()):
        house = House(desk)
        study = receive(desk, a_study(tmp_path / "sent", slices=2))
        house.freeze()
        for story in desk.stories.of(study):
            house.end(story, "done")
        house.keeper.look()
        assert house.files("spool") == 2 and house.files("work") == 6


def test_a_dead_letter_keeps_its_input_until_a_person_has_decided(desk: Desk, tmp_path: Path) -> None:
    house = House(desk)
    study = receive(desk, a_study(tmp_path / "sent", slices=2))
    house.freeze()
    liver, lung = sorted(desk.stories.of(study), key=lambda story: story.route)
    house.end(liver, "done")
    house.end(lung, "dead", "target_away")
    house.keeper.look()
    assert house.files("spool") == 2 and house.files("work/*/lung") == 3
    desk.stories.note(lung, "refused", "given_up")
    house.keeper.look()
    assert house.files("spool") == 0 and house.files("work") == 0


def test_a_dead_letter_that_a_newer_revision_leans_on_keeps_its_input_too(desk: Desk, tmp_path: Path) -> None:
    house, slices = House(desk), a_study(tmp_path / "sent", slices=3)
    study = receive(desk, slices[:2])
    house.freeze()
    for story in desk.stories.of(study):
        house.end(story, "dead", "target_away")
    receive(desk, slices[2:])
    house.freeze()
    for story in [one for one in desk.stories.of(study) if one.revision == 2]:
        desk.stories.note(story, "done", as_before=1)
    house.keeper.look()
    assert house.files("spool") == 3


def test_what_is_not_frozen_yet_stays(desk: Desk, tmp_path: Path) -> None:
    house, slices = House(desk), a_study(tmp_path / "sent", slices=3)
    study = receive(desk, slices[:2])
    house.freeze()
    for story in desk.stories.of(study):
        house.end(story, "done")
    receive(desk, slices[2:])
    house.keeper.look()
    assert house.files("spool") == 3


def test_a_story_whose_input_was_gone_goes_on_when_all_of_it_is_here_again(desk: Desk, tmp_path: Path) -> None:
    house, slices = House(desk), a_study(tmp_path / "sent", slices=3)
    study = receive(desk, slices[:2])
    house.freeze()
    for story in desk.stories.of(study):
        house.end(story, "done")
    house.keeper.look()
    assert house.files("spool") == 0
    receive(desk, slices[2:])
    house.freeze()
    newest = [story for story in desk.stories.of(study) if story.revision == 2]
    desk.stories.note(newest[0], "refused", "input_gone")
    desk.stories.note(newest[1], "segmenting")  # so that nothing is let go of in this test
    house.keeper.look()
    assert not house.begun
    receive(desk, slices)
    house.keeper.look()
    assert house.begun == [f"{newest[0].id[:-1]}2"]


def test_a_study_that_came_again_is_not_let_go_of_before_its_time(tmp_path: Path) -> None:
    for desk in opened(tmp_path, Keeping(input_h=0.0001, results_h=1.0)):
        house, slices = House(desk), a_study(tmp_path / "sent", slices=2)
        study = receive(desk, slices)
        house.freeze()
        for story in desk.stories.of(study):
            house.end(story, "done")
        time.sleep(0.5)
        house.keeper.look()
        assert house.files("spool") == 0
        receive(desk, slices)
        house.keeper.look()
        assert house.files("spool") == 2, "its first operator had no time to begin it anew"
        time.sleep(0.5)
        house.keeper.look()
        assert house.files("spool") == 0


@pytest.mark.parametrize("hours", [{"input_h": -1.0}, {"input_h": 5.0, "results_h": 4.0}])
def test_results_are_never_kept_shorter_than_what_they_were_made_of(hours: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="0 or more are needed"):
        Keeping(**hours)
