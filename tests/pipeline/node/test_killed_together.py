"""kill -9 of a front, a worker and its room, at each step and at random moments, and an archive that goes away for a while:
every study ends with exactly one result series of each kind in Orthanc. HILUM_LONG=1 kills a hundred times.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sql
import yaml

from pipeline.node import workflow
from tests.pipeline.test_postgres import INITDB, PASSWORD, Cluster, cluster

from .hospital import Orthanc, Process, network_of_its_own, wait_until
from .scanner import an_mr_study, storescu

__all__ = ["cluster"]

pytestmark = pytest.mark.slow

IS_LONG = bool(os.environ.get("HILUM_LONG"))
KINDS = ["OT", "SEG"]
"""Series that each study ends with: a segmentation, and its picture."""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    if shutil.which("storescu") is None or INITDB is None:
        pytest.skip("dcmtk or Postgres is not installed (apt-get install dcmtk postgresql)")
    with network_of_its_own():
        orthanc = Orthanc(tmp_path_factory.mktemp("orthanc"))
        orthanc.start()
        yield orthanc
        orthanc.stop()


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> Path:
    said = {
        "state": str(tmp_path / "state"),
        "receiving": {"aet": "HILUM", "port": 11112, "reserve_gb": 0.1},
        "peers": {"scanner": {"aet": "SCANNER"}, "archive": {"aet": "ORTHANC", "host": "127.0.0.1", "port": 14242}},
        "waiting": {"quiet_s": 5.0, "settled_s": 0.5},  # a busy machine pauses in the middle of a study
        "working": {"first_pause_s": 0.3, "attempts": 40, "target_attempts": 40, "longest_pause_s": 3, "silent_s": 3.0},
        "routes": {"brain": {
            "package": str(tiny), "take": {"mr": {"modality": ["MR"], "least_slices": 10}},
            "outputs": ["dicom_seg", "secondary_capture"], "targets": ["archive"], "folder": str(tmp_path / "results"),
        }},
        "showing": {"port": 18080},
    }  # fmt: skip
    path = tmp_path / "node.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


class Rows:
    """What a node's ledger knows, seen from outside."""

    def __init__(self, address: str) -> None:
        self.engine = sql.create_engine(address)

    def states(self) -> Counter[str]:
        """How many studies are in which state, in their newest revision."""
        newest = (
            "SELECT state FROM node_stories a WHERE revision = "
            "(SELECT max(revision) FROM node_stories b WHERE b.study = a.study)"
        )
        try:
            with self.engine.connect() as connection:
                return Counter(row[0] for row in connection.execute(sql.text(newest)))
        except sql.exc.DBAPIError:  # the tables are not there yet
            return Counter()

    def are_done(self, studies: int) -> bool:
        return self.states() == {"done": studies}


@pytest.fixture
def rows(config: Path) -> Iterator[Rows]:
    made = Rows(f"sqlite:///{config.parent / 'state' / 'ledger.sqlite'}")
    yield made
    made.engine.dispose()


def is_sent(study: Path) -> bool:
    return storescu(11112, study, more=["+sd", "+r"]).returncode == 0


def results(archive: Orthanc, before: set[str]) -> dict[str, list[str]]:
    """The modalities of what came since, by study."""
    found: dict[str, list[str]] = {}
    for one in archive.series():
        if one["ID"] not in before:
            found.setdefault(one["ParentStudy"], []).append(one["MainDicomTags"]["Modality"])
    return {study: sorted(kinds) for study, kinds in found.items()}


DEADLY = """
import os, signal, sys
from functools import wraps
from pathlib import Path
import pipeline.node.{module} as module
real, once = module.{step}, Path(sys.argv.pop())
@wraps(real)
def deadly(*words, **more):
    if {when!r} == "before" and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    answer = real(*words, **more)
    if not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return answer
module.{step} = deadly
from pipeline.cli import main
sys.exit(main(sys.argv[1:]))
"""
ON_THE_WAY = [step for step in workflow.STEPS if step.__name__ != "follow"]
"""Without what comes after the end, of a route with a shadow."""


@pytest.mark.skipif(not IS_LONG, reason="a minute each; HILUM_LONG=1 runs them")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ON_THE_WAY, ids=lambda step: step.__name__)
def test_killed_at_a_step_the_next_start_goes_on_there(
    archive: Orthanc, config: Path, rows: Rows, tmp_path: Path, step: Callable[..., object], when: str
) -> None:
    """The process kills itself there, so the moment is exact."""
    before = {one["ID"] for one in archive.series()}
    code = DEADLY.format(module=step.__module__.rpartition(".")[2], step=step.__name__, when=when)
    words = [sys.executable, "-c", code, "node", "--config", str(config), str(tmp_path / "once")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    study = an_mr_study(tmp_path / "study")
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
    try:
        wait_until(lambda: first.poll() is not None or is_sent(study))
        assert first.wait(180) == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    finally:
        first.kill()
        first.wait()
    node = Process(config).start()
    try:
        wait_until(lambda: node.name() and rows.are_done(1), node)
    finally:
        assert node.stop() == 0
    assert list(results(archive, before).values()) == [KINDS]
    (case,) = (tmp_path / "results").glob("*/brain/*")
    assert sorted(path.suffix for path in case.glob("*.dcm")) == [".dcm", ".dcm"]


def test_an_archive_that_goes_away_while_it_is_sent_to_has_everything_once_in_the_end(
    archive: Orthanc, config: Path, rows: Rows, tmp_path: Path
) -> None:
    before, away = {one["ID"] for one in archive.series()}, 60.0 if IS_LONG else 6.0
    studies = [an_mr_study(tmp_path / str(number), seed=number) for number in range(6 if IS_LONG else 3)]
    node = Process(config).start()
    try:
        wait_until(lambda: is_sent(studies[0]), node)
        wait_until(lambda: {"sending", "confirming"} & rows.states().keys(), node)
        archive.kill()
        assert all(is_sent(study) for study in studies[1:]), "receiving does not need the archive"
        wait_until(lambda: rows.states()["sending"] + rows.states()["confirming"] == len(studies), node)
        time.sleep(away)  # what is tested is that it lasts
        assert "dead" not in rows.states()
        archive.start()
        wait_until(lambda: rows.are_done(len(studies)), node)
    finally:
        if archive.process is None:
            archive.start()
        assert node.stop() == 0
    assert list(results(archive, before).values()) == [KINDS] * len(studies)


def test_a_node_that_is_told_to_end_does_so_in_the_middle_of_a_case(
    archive: Orthanc, config: Path, rows: Rows, tmp_path: Path
) -> None:
    before, study = {one["ID"] for one in archive.series()}, an_mr_study(tmp_path / "study")
    node = Process(config).start()
    wait_until(lambda: is_sent(study), node)
    wait_until(lambda: rows.states()["segmenting"], node)
    assert node.stop() == 0, node.said()[-2000:]
    node.start()
    try:
        wait_until(lambda: rows.are_done(1), node)
    finally:
        assert node.stop() == 0
    assert list(results(archive, before).values()) == [KINDS]


def test_killed_at_random_moments_every_study_has_one_result(
    archive: Orthanc, cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    """A front, two workers and their rooms over Postgres; one of them is killed, again and again, and comes back."""
    kills, chance = (100, random.Random(20261122)) if IS_LONG else (6, random.Random(7))
    before = {one["ID"] for one in archive.series()}
    address = f"hilum:{PASSWORD}@127.0.0.1:{cluster.port}/postgres"
    own = {"HILUM_LEDGER": f"postgresql+psycopg2://{address}", "HILUM_STORIES": f"postgresql://{address}"}
    studies = [an_mr_study(tmp_path / str(number), seed=number) for number in range(kills // 2)]
    rows, front = Rows(own["HILUM_LEDGER"]), Process(config, "front", own).start()
    workers, enough = [Process(config, "worker", own).start() for _ in range(2)], threading.Event()
    sender = threading.Thread(target=_send_all, args=(studies, enough))
    struck: Counter[str] = Counter()
    wait_until(lambda: all(one.name() for one in (front, *workers)), front, *workers)
    try:
        sender.start()
        for number in range(kills):
            time.sleep(chance.uniform(0.0, 6.0))  # of which a start takes some: it is struck, too
            struck[_strike(VICTIMS[number % 3], front, chance.choice(workers))] += 1
        wait_until(lambda: rows.are_done(len(studies)), front, *workers, seconds=600)
    finally:
        enough.set()
        sender.join()
        ends = [one.stop() for one in (front, *workers)]
        rows.engine.dispose()
    assert ends == [0, 0, 0]
    assert set(struck) == set(VICTIMS)
    assert list(results(archive, before).values()) == [KINDS] * len(studies)


def _send_all(studies: list[Path], enough: threading.Event) -> None:
    """As scanners do: what was not acknowledged is sent again."""
    for study in studies:
        while not is_sent(study) and not enough.wait(0.3):
            pass


VICTIMS = ("front", "worker", "room")


def _strike(victim: str, front: Process, worker: Process) -> str:
    """Kill it; a front and a worker are started again, as whoever starts containers does."""
    if victim == "room":
        wait_until(worker.children, worker)
        os.kill(worker.children()[0], signal.SIGKILL)
        return victim
    one = front if victim == "front" else worker
    one.kill()
    one.start()
    return victim
