"""A backup made while the node works is one that a node can go on from, elsewhere: nothing lost, nothing done twice."""

import json
import os
import sqlite3
import subprocess
import threading
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from pipeline.cli import main
from pipeline.errors import UsageError
from pipeline.node.audit import Audit, verify
from pipeline.node.backup import back_up
from pipeline.node.config import Node
from pipeline.node.desk import Desk
from pipeline.node.ledger import open_ledger
from pipeline.node.routes import Route
from pipeline.node.rules import Rule
from pipeline.node.spool import Spool, open_keys
from pipeline.node.stories import Stories
from pipeline.node.watcher import Watcher

from .scanner import a_node, a_study, storescu


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "node.yaml"
    path.write_text(yaml.safe_dump({"state": str(tmp_path / "state")}))
    return path


def sums_agree(folder: Path) -> bool:
    words = ["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"]
    return subprocess.run(words, cwd=folder, capture_output=True, check=False).returncode == 0


def test_what_was_received_is_in_a_backup_made_while_the_node_listens(config: Path, tmp_path: Path) -> None:
    sent = a_study(tmp_path / "sent", slices=4)
    with a_node(tmp_path / "state") as node:
        assert storescu(node.port, *sent).returncode == 0
        made = back_up(node.node, config, tmp_path / "backup")
        (study,) = node.ledger.waiting()
    assert made.elsewhere == () and sums_agree(tmp_path / "backup")
    with a_node(tmp_path / "backup" / "state") as restored:
        (found,) = restored.ledger.waiting()
        assert (found.study, found.objects) == (study.study, 4), "under the same keys"
        assert restored.codes() == {}
        assert storescu(restored.port, *sent).returncode == 0
        assert restored.ledger.study(study.study).objects == 4, "what is sent again is known"


def test_what_came_in_the_middle_of_the_copy_is_learned_of(config: Path, tmp_path: Path) -> None:
    """The databases are copied first: what is newer than they are lies there without a row."""
    with a_node(tmp_path / "state") as node:
        assert storescu(node.port, *a_study(tmp_path / "early", slices=2)).returncode == 0
        rows = tmp_path / "ledger.sqlite"
        with (
            closing(sqlite3.connect(tmp_path / "state" / "ledger.sqlite")) as now,
            closing(sqlite3.connect(rows)) as copy,
        ):
            now.backup(copy)
        assert storescu(node.port, *a_study(tmp_path / "late", slices=3)).returncode == 0
        back_up(node.node, config, tmp_path / "backup")
    rows.replace(tmp_path / "backup" / "state" / "ledger.sqlite")
    with a_node(tmp_path / "backup" / "state") as restored:
        assert sorted(study.objects for study in restored.ledger.waiting()) == [2, 3]


def test_a_story_whose_row_is_ahead_of_the_workflows_is_begun_at_the_first_look_after_a_restore(tmp_path: Path) -> None:
    node = Node(state=tmp_path, routes={"brain": Route(package=tmp_path, take={"mr": Rule()})})
    ledger = open_ledger(tmp_path)
    stories, begun = Stories(ledger), list[str]()
    for number, state in enumerate(("choosing", "sending", "done", "held"), 1):
        stories.note(stories.begin("ab" * 10, number, "brain"), state)
    desk = Desk(node=node, spool=Spool(tmp_path, open_keys(tmp_path)), ledger=ledger, stories=stories)
    watcher = Watcher(desk=desk, begin=lambda story, route: begun.append(story.state))
    watcher.look()
    assert sorted(begun) == ["choosing", "sending"]
    watcher.look()
    assert len(begun) == 2
    ledger.close()


def test_on_the_same_disk_received_objects_take_no_room_and_nothing_else_is_shared(
    config: Path, tmp_path: Path
) -> None:
    with a_node(tmp_path / "state") as node:
        assert storescu(node.port, *a_study(tmp_path / "sent", slices=2)).returncode == 0
        work = tmp_path / "state" / "work" / "a-1" / "brain" / "input"
        work.mkdir(parents=True)
        (received, *_) = node.files()
        os.link(received, work / received.name)
        (work.parent / "overlay.dcm").write_text("may change")
        back_up(node.node, config, tmp_path / "backup")
    there = tmp_path / "backup" / "state"
    assert (there / received.relative_to(tmp_path / "state")).samefile(received)
    assert (there / "work/a-1/brain/input" / received.name).samefile(there / received.relative_to(tmp_path / "state"))
    for name in ("secret", "work/a-1/brain/overlay.dcm"):
        assert not (there / name).samefile(tmp_path / "state" / name)


def test_half_things_and_the_lock_stay_behind_and_the_rest_is_the_owners_alone(config: Path, tmp_path: Path) -> None:
    with a_node(tmp_path / "state") as node:
        for name in ("parts/x.part", "work/a-1/brain/results/.case.partial/labels.nii.gz", "routes/brain.json", "lock"):
            (tmp_path / "state" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "state" / name).write_text("x")
        back_up(node.node, config, tmp_path / "backup")
    names = {str(path.relative_to(tmp_path / "backup")) for path in (tmp_path / "backup").rglob("*") if path.is_file()}
    assert names == {
        "SHA256SUMS", "backup.json", "node.yaml", "state/ledger.sqlite", "state/routes/brain.json", "state/secret",
    }  # fmt: skip
    assert (tmp_path / "backup").stat().st_mode & 0o077 == 0


def test_the_audit_trail_in_a_backup_is_whole_while_others_write_into_it(config: Path, tmp_path: Path) -> None:
    audit, enough = Audit(tmp_path / "state", open_keys(tmp_path / "state")), threading.Event()

    def write() -> None:
        while not enough.is_set():
            audit.note("study", study="ab")

    writing = threading.Thread(target=write)
    writing.start()
    try:
        for number in range(5):
            back_up(Node(state=tmp_path / "state"), config, tmp_path / f"backup-{number}")
    finally:
        enough.set()
        writing.join()
    for number in range(5):
        state = tmp_path / f"backup-{number}" / "state"
        verdict = verify(state, open_keys(state))
        assert verdict.broken == "" and verdict.lines > 0


def test_every_damage_to_a_backup_is_found_by_its_sums(config: Path, tmp_path: Path) -> None:
    with a_node(tmp_path / "state") as node:
        back_up(node.node, config, tmp_path / "backup")
    secret = tmp_path / "backup" / "state" / "secret"
    secret.write_bytes(bytes(32))
    assert not sums_agree(tmp_path / "backup")


def test_a_backup_needs_a_place_of_its_own_and_a_node_that_ran(config: Path, tmp_path: Path) -> None:
    node = Node(state=tmp_path / "state")
    with pytest.raises(UsageError, match="no node ever ran"):
        back_up(node, config, tmp_path / "backup")
    open_keys(tmp_path / "state")
    with pytest.raises(UsageError, match="own folder"):
        back_up(node, config, tmp_path / "state" / "backup")
    (tmp_path / "backup").mkdir()
    with pytest.raises(UsageError, match="there already"):
        back_up(node, config, tmp_path / "backup")


def test_rows_in_a_postgres_are_named_as_missing(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_keys(tmp_path / "state")
    monkeypatch.setenv("HILUM_LEDGER", "postgresql+psycopg2://hilum@database/ledger")
    made = back_up(Node(state=tmp_path / "state"), config, tmp_path / "backup")
    assert made.elsewhere == ("ledger",)
    assert json.loads((tmp_path / "backup" / "backup.json").read_text())["elsewhere"] == ["ledger"]


def test_the_command_makes_one_and_says_where(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_keys(tmp_path / "state")
    assert main(["node", "--config", str(config), "--backup", str(tmp_path / "backup")]) == 0
    assert str(tmp_path / "backup") in capsys.readouterr().err
    assert sums_agree(tmp_path / "backup")


def test_a_node_that_is_not_there_is_not_healthy(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["node", "--config", str(config), "--healthy"]) == 1
    assert "does not answer" in capsys.readouterr().err
    assert main(["node", "--config", str(config), "--healthy", "--only", "worker"]) == 1
    assert "no worker's heart" in capsys.readouterr().err
