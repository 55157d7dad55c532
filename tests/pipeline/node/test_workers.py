"""Many processes, one node: whoever falls silent is followed by another, and every study ends with one result."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sql
import yaml

from pipeline.errors import UsageError
from pipeline.node.config import Node
from pipeline.node.heart import Hearts, Watch
from pipeline.node.ledger import open_ledger
from pipeline.node.service import running
from tests.pipeline.test_postgres import INITDB, PASSWORD, Cluster, cluster

from .hospital import Orthanc, Process, network_of_its_own, wait_until
from .scanner import REPOSITORY, storescu

__all__ = ["cluster"]


class Hand:
    """Of a watch that we turn."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def hearts(tmp_path: Path, hand: Hand) -> Iterator[Hearts]:
    ledger = open_ledger(tmp_path)
    yield Hearts(ledger=ledger, silent_s=10, clock=hand)
    ledger.close()


def test_who_beats_is_never_silent_however_the_clocks_differ(hearts: Hearts, hand: Hand) -> None:
    for second in range(0, 100, 5):
        hand.now = second
        hearts.beat("one")
        assert hearts.silent() == set()
    hand.now += 5
    assert hearts.silent() == set()
    hand.now += 5
    assert hearts.silent() == {"one"}
    hearts.beat("one")
    assert hearts.silent() == set()


def test_who_was_away_itself_thinks_nobody_dead_for_that(hearts: Hearts, hand: Hand) -> None:
    """A machine that slept, or a database that did not answer."""
    hearts.beat("one")
    assert hearts.silent() == set()
    hand.now = 1000
    assert hearts.silent() == set()
    hand.now += 5
    assert hearts.silent() == set()
    hand.now += 5
    assert hearts.silent() == {"one"}


def test_who_said_farewell_is_silent_at_once_and_may_come_back(hearts: Hearts) -> None:
    hearts.beat("one")
    hearts.beat("other")
    assert hearts.silent() == set()
    hearts.farewell("one")
    assert hearts.silent() == {"one"}
    assert {worker.name: worker.is_gone for worker in hearts.known()} == {"one": True, "other": False}
    hearts.beat("one")
    assert hearts.silent() == set()


def test_who_never_beat_but_holds_stories_is_waited_for_and_then_followed(hearts: Hearts, hand: Hand) -> None:
    for second in (0, 5):
        hand.now = second
        assert hearts.silent({"older"}) == set()
    hand.now = 10
    assert hearts.silent({"older"}) == {"older"}


def test_what_the_silent_hold_is_taken_over_and_their_row_goes(hearts: Hearts, hand: Hand) -> None:
    taken, buried = [], []
    watch = Watch(
        name="me", part="worker", hearts=hearts, holders=lambda: {"dead", "alive", "me"},
        take_over=lambda name: taken.append(name) or 1, bury=lambda: buried.append(1) or 0,
    )  # fmt: skip
    hearts.beat("dead")
    hearts.beat("idle")
    watch.beat()
    for second in (5, 10):
        hand.now = second
        hearts.beat("alive")
        watch.beat()
    assert taken == ["dead"]
    assert {worker.name for worker in hearts.known()} == {"me", "alive"}
    assert len(buried) == 3


@pytest.mark.parametrize("part", ["front", "worker"])
def test_several_processes_over_sqlite_are_refused(tmp_path: Path, part: str) -> None:
    with pytest.raises(UsageError, match="need a Postgres for both"), running(Node(state=tmp_path), part):  # type: ignore[arg-type]
        pass


# with real processes, a real Postgres and a real archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    if shutil.which("storescu") is None or INITDB is None:
        pytest.skip("dcmtk or Postgres is not installed (apt-get install dcmtk postgresql)")
    with network_of_its_own():
        orthanc = Orthanc(tmp_path_factory.mktemp("orthanc"))
        orthanc.start()
        yield orthanc
        orthanc.stop()


@pytest.fixture(scope="module")
def studies(shared: Path) -> list[Path]:
    return sorted(path for path in (shared / "data/hippocampus-dicom").iterdir() if path.is_dir())


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> Path:
    said = {
        "state": str(tmp_path / "state"),
        "receiving": {"aet": "HILUM", "port": 11112, "reserve_gb": 0.1},
        "peers": {"scanner": {"aet": "SCANNER"}, "archive": {"aet": "ORTHANC", "host": "127.0.0.1", "port": 14242}},
        "waiting": {"quiet_s": 5.0, "settled_s": 0.5},  # a busy machine pauses in the middle of a study
        "working": {"first_pause_s": 0.3, "attempts": 12, "longest_pause_s": 5, "silent_s": 3.0},
        "routes": {"brain": {
            "package": str(tiny), "take": {"mr": {"modality": ["MR"], "least_slices": 10}},
            "outputs": ["dicom_seg", "secondary_capture"], "targets": ["archive"],
        }},
        "showing": {"port": 18080},
    }  # fmt: skip
    path = tmp_path / "node.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


class Together:
    """A front, workers, and what their Postgres knows of them."""

    def __init__(self, config: Path, cluster: Cluster, database: str) -> None:
        address = f"hilum:{PASSWORD}@127.0.0.1:{cluster.port}/{database}"
        self.environment = {
            "HILUM_LEDGER": f"postgresql+psycopg2://{address}",
            "HILUM_STORIES": f"postgresql://{address}",
        }
        with sql.create_engine(cluster.uri, isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(sql.text(f"CREATE DATABASE {database}"))
        self.engine = sql.create_engine(self.environment["HILUM_LEDGER"], pool_pre_ping=True)
        self.front = Process(config, "front", self.environment).start()
        self.workers = [Process(config, "worker", self.environment).start() for _ in range(2)]
        wait_until(lambda: all(one.name() for one in self.processes), *self.processes)
        wait_until(lambda: "listening on" in self.front.said(), self.front)

    @property
    def processes(self) -> list[Process]:
        return [self.front, *self.workers]

    def rows(self, question: str) -> list:
        with self.engine.connect() as connection:
            return list(connection.execute(sql.text(question)))

    def holder(self) -> Process | None:
        """The worker that has a case in its room now."""
        busy = "SELECT executor_id FROM dbos.workflow_status WHERE status = 'PENDING' AND name = 'story'"
        names = {row[0] for row in self.rows(busy)} if self.rows(SEGMENTING) else set()
        return next((one for one in self.workers if one.name() in names), None)

    def other(self, worker: Process) -> Process:
        return next(one for one in self.workers if one is not worker)

    def states(self) -> list[str]:
        return [row[0] for row in self.rows("SELECT state FROM node_stories")]

    def end(self) -> None:
        for one in self.processes:
            if one.lives():
                one.strike(signal.SIGCONT)
                assert one.stop() == 0, one.said()[-3000:]
        self.engine.dispose()


SEGMENTING = "SELECT 1 FROM node_stories WHERE state = 'segmenting'"


def modalities(archive: Orthanc, before: set[str]) -> list[str]:
    """Of the series that came since."""
    return sorted(one["MainDicomTags"]["Modality"] for one in archive.series() if one["ID"] not in before)


@pytest.mark.slow
def test_a_worker_is_killed_and_its_study_is_finished_by_the_other(
    archive: Orthanc, cluster: Cluster, config: Path, studies: list[Path]
) -> None:
    before = {one["ID"] for one in archive.series()}
    node = Together(config, cluster, "killed")
    try:
        assert storescu(11112, studies[0], more=["+sd", "+r"]).returncode == 0
        wait_until(node.holder, *node.processes)
        victim = node.holder()
        assert victim is not None
        victim.kill()
        heir = node.other(victim)
        wait_until(lambda: node.states() == ["done"], node.front, heir)
        assert f"process {victim.name()} fell silent" in heir.said() + node.front.said()
        who = node.rows("SELECT DISTINCT executor_id FROM dbos.workflow_status WHERE status = 'SUCCESS'")
        assert [row[0] for row in who] == [heir.name()]
        assert victim.name() not in {row[0] for row in node.rows("SELECT name FROM node_workers")}
    finally:
        node.end()
    assert modalities(archive, before) == ["OT", "SEG"]


@pytest.mark.slow
def test_a_worker_that_was_thought_dead_and_comes_back_finishes_nothing_twice(
    archive: Orthanc, cluster: Cluster, config: Path, studies: list[Path]
) -> None:
    before = {one["ID"] for one in archive.series()}
    node = Together(config, cluster, "stopped")
    try:
        assert storescu(11112, studies[1], more=["+sd", "+r"]).returncode == 0
        wait_until(node.holder, *node.processes)
        asleep = node.holder()
        assert asleep is not None
        asleep.strike(signal.SIGSTOP)
        wait_until(lambda: node.states() == ["done"], node.front, node.other(asleep))
        (ended,) = node.rows("SELECT changed, facts FROM node_stories")
        asleep.strike(signal.SIGCONT)
        beats = f"SELECT beats FROM node_workers WHERE name = '{asleep.name()}'"
        wait_until(lambda: [row[0] for row in node.rows(beats)] > [3], *node.processes)  # it is back among us
        assert node.states() == ["done"]
        outcomes = node.rows("SELECT name, status FROM dbos.workflow_status ORDER BY name")
        assert [tuple(row) for row in outcomes] == [("sending", "SUCCESS"), ("story", "SUCCESS")]
        assert json.loads(ended.facts)["sent"] == {"archive": {"stored": 2, "unwanted": 0}}
    finally:
        node.end()
    assert modalities(archive, before) == ["OT", "SEG"]


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("HILUM_LONG"), reason="takes a minute; HILUM_LONG=1 runs it")
def test_a_postgres_that_is_started_anew_costs_no_study(
    archive: Orthanc, cluster: Cluster, config: Path, studies: list[Path]
) -> None:
    before = {one["ID"] for one in archive.series()}
    node = Together(config, cluster, "restarted")
    try:
        assert storescu(11112, studies[2], more=["+sd", "+r"]).returncode == 0
        wait_until(node.holder, *node.processes)
        cluster.stop()
        try:
            wait_until(lambda: all("a beat failed" in one.said() for one in node.processes), *node.processes)
        finally:
            cluster.start()
        wait_until(lambda: node.states() == ["done"], *node.processes)
        assert not any("fell silent" in one.said() for one in node.processes)
    finally:
        node.end()
    assert modalities(archive, before) == ["OT", "SEG"]


FAULTY = """
import sys, time
from functools import wraps
from pathlib import Path
from pipeline.node import steps
@wraps(steps.take)
def take(*words):
    raise ValueError("Fischer^Frieda")
steps.take = take
from pipeline.node import workflow
from pipeline.node.config import Node
from pipeline.node.desk import Desk
from pipeline.node.ledger import open_ledger
from pipeline.node.routes import Route
from pipeline.node.rules import Rule
from pipeline.node.spool import Spool, open_keys
from pipeline.node.stories import Stories
workflow.STEP_PAUSE_SECONDS = 0.001
state = Path(sys.argv[1])
node = Node(state=state, routes={"brain": Route(package=state, take={"mr": Rule()})})
ledger = open_ledger(state)
desk = Desk(node=node, spool=Spool(state, open_keys(state)), ledger=ledger, stories=Stories(ledger))
workflow.start(desk)
story = desk.stories.begin("a" * 20, 1, "brain")
workflow.enqueue(story, node.routes["brain"])
until = time.monotonic() + 60
while not workflow.bury() and time.monotonic() < until:
    time.sleep(0.05)
ended = desk.stories.get("a" * 20, 1, "brain")
print(ended.state, ended.code)
workflow.stop()
"""


def test_a_story_whose_steps_fail_beyond_hope_is_a_dead_letter_and_what_the_error_said_is_kept_nowhere(
    tmp_path: Path,
) -> None:
    words = [sys.executable, "-c", FAULTY, str(tmp_path)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=180, check=False)
    assert done.stdout.split() == ["dead", "fault"], done.stderr[-2000:]
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and b"Fischer" in path.read_bytes()]
    assert kept == [] and "Fischer" not in done.stderr
