"""A shadow sees the same scans, is compared with the package that serves, and never stands in anybody's way."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import SimpleITK

from pipeline.node import rollback, shadow, steps
from pipeline.node.config import Keeping, Node
from pipeline.node.desk import Desk
from pipeline.node.ledger import open_ledger
from pipeline.node.routes import Route, Working
from pipeline.node.rules import Rule
from pipeline.node.spool import Spool, open_keys
from pipeline.node.stories import Stories, Story
from pipeline.package import ModelPackage, amend
from preprocessing.regions import values_of

STUDY = "a" * 20


@pytest.fixture
def desk(
    tiny: Path, make_package: Callable[..., ModelPackage], scan_file: Callable[..., Path], tmp_path: Path
) -> Iterator[Desk]:
    """A story with a scan, and a shadow that was trained otherwise."""
    other = make_package(tmp_path / "other", fold=1)
    other = amend(other, lambda record: replace(record, name="other"))
    route = Route(package=tiny, take={"mr": Rule()}, shadow=other.folder, outputs=("measurements",))
    node = Node(state=tmp_path / "state", routes={"liver": route}, working=Working(memory_gb=4), keeping=Keeping())
    ledger = open_ledger(node.state)
    at = Desk(node=node, spool=Spool(node.state, open_keys(node.state)), ledger=ledger, stories=Stories(ledger))
    for number in (1, 2):
        folder = at.folder(STUDY, 1, "liver") / f"input/case-{number}"
        folder.mkdir(parents=True)
        scan_file(folder / f"scan{number}.nii.gz", seed=number)
    yield at
    at.close()
    ledger.close()


def a_story(at: Desk) -> Story:
    return at.stories.begin(STUDY, 1, "liver")


@pytest.mark.slow
def test_a_shadow_is_compared_label_by_label_and_nothing_of_it_lies_among_the_results(desk: Desk) -> None:
    a_story(desk)
    for case in ("case-1", "case-2"):
        assert steps.segment(desk, STUDY, 1, "liver", case) == steps.DONE
    folder = desk.folder(STUDY, 1, "liver")
    before = sorted(path.relative_to(folder) for path in (folder / "results").rglob("*"))
    story = desk.stories.note(a_story(desk), "done")
    assert shadow.is_awaited(desk, story)
    assert shadow.follow(desk, STUDY, 1, "liver") == "done"
    said = a_story(desk).facts["shadow"]
    assert (said["status"], said["name"], len(said["labels"])) == ("done", "other", 4)
    assert not shadow.is_awaited(desk, a_story(desk)) and a_story(desk).state == "done"
    assert sorted(path.relative_to(folder) for path in (folder / "results").rglob("*")) == before
    for one, case in zip(said["labels"][::2], ("scan1", "scan2"), strict=True):
        wanted = dice_by_simpleitk(folder, case, desk, one["label"])
        assert one["dice"] == pytest.approx(wanted, abs=1e-4)
    assert any(one["dice"] < 1 for one in said["labels"] if one["dice"] is not None), "they were trained otherwise"
    assert shadow.follow(desk, STUDY, 1, "liver") == "nothing", "twice says the same as once"
    known = shadow.summaries(desk.ledger)
    assert [(one.label, one.scans) for one in known] == [("lesion", 2), ("liver", 2)]
    mean = sum(one["dice"] for one in said["labels"][::2]) / 2
    assert next(one.dice for one in known if one.label == "liver") == pytest.approx(mean)


def dice_by_simpleitk(folder: Path, case: str, at: Desk, label: str) -> float:
    masks = []
    values = values_of(ModelPackage.load(at.node.routes["liver"].package).plan.labels)[label]
    for place in ("results", "shadow"):
        voxels = SimpleITK.ReadImage(str(folder / place / case / "labels.nii.gz"))
        masks.append(sum((voxels == value for value in values[1:]), voxels == values[0]))
    overlap = SimpleITK.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*masks)
    return float(overlap.GetDiceCoefficient())


@pytest.mark.slow
def test_a_shadow_that_fails_is_written_down_and_the_story_stays_done(desk: Desk) -> None:
    a_story(desk)
    assert steps.segment(desk, STUDY, 1, "liver", "case-1") == steps.DONE
    desk.stories.note(a_story(desk), "done")
    for path in desk.folder(STUDY, 1, "liver").glob("input/*/*"):
        path.write_bytes(b"no scan")
    assert shadow.follow(desk, STUDY, 1, "liver") == "refused"
    story = a_story(desk)
    assert (story.state, story.facts["shadow"]["status"], story.facts["shadow"]["labels"]) == ("done", "refused", [])


def test_a_story_whose_input_is_gone_or_that_was_begun_anew_is_left_alone(desk: Desk) -> None:
    story = desk.stories.note(a_story(desk), "done", package={"id": "x", "attempt": 1})
    for path in sorted(desk.folder(STUDY, 1, "liver").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    again = desk.stories.again(story)
    assert shadow.follow(desk, STUDY, 1, "liver") == "refused"
    after = a_story(desk)
    assert (after.state, after.attempt) == ("queued", 2) and after.facts["shadow"]["code"] == "input_gone"
    assert not shadow.is_awaited(desk, again)


def test_what_is_only_sent_somewhere_else_is_not_looked_at_again(desk: Desk) -> None:
    story = desk.stories.again(desk.stories.note(a_story(desk), "done", wish={"attempt": 2, "target": "archive"}))
    assert shadow.follow(desk, STUDY, 1, "liver") == "nothing"
    assert not shadow.is_awaited(desk, desk.stories.note(story, "done"))


def test_a_route_without_a_shadow_awaits_none(desk: Desk) -> None:
    routes = {"liver": replace(desk.node.routes["liver"], shadow=None)}
    plain = Desk(node=replace(desk.node, routes=routes), spool=desk.spool, ledger=desk.ledger, stories=desk.stories)
    story = plain.stories.note(a_story(plain), "done")
    assert not shadow.is_awaited(plain, story) and shadow.follow(plain, STUDY, 1, "liver") == "nothing"
    assert shadow.is_awaited(desk, story) and rollback.serving(desk, "liver").who == "config"
