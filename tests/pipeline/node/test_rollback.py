"""Packages of a node: copies that nobody outside changes, one before to go back to, and nothing that nobody vouches for."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import PackageError, UsageError
from pipeline.node import rollback
from pipeline.node.config import Node
from pipeline.node.desk import Desk
from pipeline.node.ledger import open_ledger
from pipeline.node.room import Job, Room
from pipeline.node.routes import Route
from pipeline.node.rules import Rule
from pipeline.node.spool import Spool, open_keys
from pipeline.node.stories import Stories
from pipeline.package import ModelPackage, amend
from pipeline.signatures import NotSigned, new_key, sign

Make = Callable[..., Desk]


@pytest.fixture
def named(make_package: Callable[..., ModelPackage], tmp_path: Path) -> Callable[[str], Path]:
    """A package that differs from others in its name, and so in its id."""

    def made(name: str) -> Path:
        package = make_package(tmp_path / "packages" / name)
        return amend(package, lambda record: replace(record, name=name)).folder

    return made


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Make]:
    """A node that was just started, as often as a test likes."""
    opened = []

    def made(**said: object) -> Desk:
        route = Route(take={"mr": Rule()}, **{k: v for k, v in said.items() if k != "trusted"})  # type: ignore[arg-type]
        node = Node(state=tmp_path / "state", routes={"liver": route}, trusted=said.get("trusted", ()))  # type: ignore[arg-type]
        ledger = open_ledger(node.state)
        opened.append(ledger)
        at = Desk(node=node, spool=Spool(node.state, open_keys(node.state)), ledger=ledger, stories=Stories(ledger))
        rollback.take_up_all(at)
        return at

    yield made
    for ledger in opened:
        ledger.close()


def test_a_new_package_serves_from_the_next_start_on_and_an_operator_goes_back_to_the_one_before(
    start: Make, named: Callable[[str], Path]
) -> None:
    old, new = named("old"), named("new")
    at = start(package=old)
    assert rollback.serving(at, "liver").version.name == "old" and rollback.serving(at, "liver").before is None
    with pytest.raises(rollback.NothingBefore, match="Name it as `before`"):
        rollback.roll_back(at, "liver", "ann")
    at = start(package=new)
    serving = rollback.serving(at, "liver")
    assert (serving.version.name, serving.before and serving.before.name, serving.who) == ("new", "old", "config")
    serving = rollback.roll_back(at, "liver", "ann")
    assert (serving.version.name, serving.after and serving.after.name, serving.who) == ("old", "new", "ann")
    assert rollback.serving(start(package=new), "liver").version.name == "old", "a start changes no person's mind"
    assert rollback.roll_forward(at, "liver", "bob").version.name == "new"
    with pytest.raises(rollback.NothingBefore):
        rollback.roll_forward(at, "liver", "bob")
    said = [(one["what"], one["facts"].get("who")) for one in at.audit.newest()]
    assert said[:3] == [("rollback", "bob"), ("package", "ann"), ("rollback", "ann")], "each start says what serves"


def test_another_package_in_the_config_is_a_new_decision_even_after_a_roll_back(
    start: Make, named: Callable[[str], Path]
) -> None:
    old, bad, good = named("old"), named("bad"), named("good")
    at = start(package=bad, before=old)
    rollback.roll_back(at, "liver", "ann")
    serving = rollback.serving(start(package=good), "liver")
    assert [one.name for one in serving.versions] == ["old", "good"] and serving.version.name == "good"


def test_the_package_before_may_be_named_when_it_is_needed(start: Make, named: Callable[[str], Path]) -> None:
    old, new = named("old"), named("new")
    with pytest.raises(rollback.NothingBefore):
        rollback.roll_back(start(package=new), "liver", "ann")
    at = start(package=new, before=old)
    assert rollback.serving(at, "liver").version.name == "new"
    assert rollback.roll_back(at, "liver", "ann").version.name == "old"
    assert [one.name for one in rollback.serving(start(package=new, before=old), "liver").versions] == ["old", "new"]


def test_a_node_goes_back_to_a_package_whose_folder_is_long_gone(start: Make, named: Callable[[str], Path]) -> None:
    old = named("old")
    start(package=old)
    shutil.rmtree(old)
    at = start(package=named("new"))
    identity = rollback.roll_back(at, "liver", "ann").version.id
    assert rollback.shelf(at).open(identity).name == "old"


def test_a_story_ends_with_the_package_it_began_with_and_begins_anew_with_the_one_that_serves(
    start: Make, named: Callable[[str], Path]
) -> None:
    at = start(package=named("new"), before=named("old"))
    story = at.stories.begin("a" * 20, 1, "liver")
    first = rollback.begun_with(at, story)
    results = at.folder("a" * 20, 1, "liver") / "results/case-1"
    results.mkdir(parents=True)
    rollback.roll_back(at, "liver", "ann")
    story = at.stories.begin("a" * 20, 1, "liver")
    assert rollback.begun_with(at, story) == first and results.exists()
    at.stories.note(story, "done")
    again = at.stories.again(story)
    second = rollback.begun_with(at, again)
    assert second == rollback.serving(at, "liver").version.id != first
    assert not results.exists(), "what the other package made is not taken for this one's"
    assert at.stories.begin("a" * 20, 1, "liver").facts["package"]["name"] == "old"


def test_a_package_that_is_written_over_while_the_node_works_changes_nothing_until_the_next_start(
    start: Make, named: Callable[[str], Path]
) -> None:
    package = named("first")
    at = start(package=package)
    amend(ModelPackage.load(package), lambda record: replace(record, name="second"))
    identity = rollback.serving(at, "liver").version.id
    assert rollback.shelf(at).open(identity).name == "first"
    assert rollback.serving(start(package=package), "liver").version.name == "second"


def test_a_package_for_other_channels_does_not_begin_to_serve(
    start: Make, make_package: Callable[..., ModelPackage], named: Callable[[str], Path], tmp_path: Path
) -> None:
    pair = make_package(tmp_path / "pair", ("t1", "t2")).folder
    for said in ({"package": pair}, {"package": named("a"), "before": pair}, {"package": named("b"), "shadow": pair}):
        with pytest.raises(UsageError, match="t1, t2"):
            start(**said)


def test_where_keys_are_named_nothing_serves_that_nobody_vouches_for(
    start: Make, named: Callable[[str], Path], tmp_path: Path
) -> None:
    package, public = named("new"), new_key(tmp_path / "key")
    with pytest.raises(NotSigned):
        start(package=package, trusted=(public,))
    sign(package, tmp_path / "key")
    at = start(package=package, trusted=(public,))
    place = rollback.shelf(at).place(rollback.serving(at, "liver").version.id)
    assert (place / "signature.json").exists()
    with pytest.raises(NotSigned):
        start(package=package, before=named("old"), trusted=(public,))


@pytest.mark.slow
def test_the_room_looks_again_just_before_it_loads(
    start: Make, named: Callable[[str], Path], scan_file: Callable[..., Path], tmp_path: Path
) -> None:
    package, public = named("new"), new_key(tmp_path / "key")
    sign(package, tmp_path / "key")
    at = start(package=package, trusted=(public,))
    identity = rollback.serving(at, "liver").version.id
    place = rollback.shelf(at).place(identity)
    job = Job(
        paths=(str(scan_file(tmp_path / "scan.nii.gz")),), package=str(place), package_id=identity, trusted=(str(public),),
        out=str(tmp_path / "out"), settings={"outputs": ["labels"]},
    )  # fmt: skip
    room = Room(int(4e9))
    try:
        signature = (place / "signature.json").read_bytes()
        (place / "signature.json").unlink()
        assert room.work(job, 120).code == "package"
        (place / "signature.json").write_bytes(signature)
        assert room.work(replace(job, package_id="0" * 64), 120).code == "package"
        assert room.work(job, 120).status == "done"
        record = json.loads((place / "package.json").read_text())
        amend(ModelPackage.load(place), lambda record: replace(record, name="other"))
        assert room.work(replace(job, out=str(tmp_path / "out2")), 120).code == "package" and record["name"] == "new"
    finally:
        room.close()
    with pytest.raises(PackageError):
        rollback.shelf(at).open(identity)
