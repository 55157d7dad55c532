"""Cases on the nodes of a cluster: nodes may die, a case that kills everyone is set aside, and nobody needs Ray who asks for
none."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.claims import Claims, at_work
from pipeline.cluster import DEATHS, Cluster, Worker, _Crew, _go_through
from pipeline.config import Segment
from pipeline.errors import UsageError
from pipeline.results import SKIPPED, Handed, Row

from .test_batch import ScanFile, run, told_by

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Sheet:
    """A case of nothing but its name."""

    case_id: str


class Copying(Handed[Sheet, str]):
    """Work that takes no time."""

    stage, mark, incomplete = "copy", "note.txt", frozenset({"error.json"})

    def found(self, folder: Path) -> Row[str] | None:
        note = folder / self.mark
        return Row(case_id=folder.name, status="done", report=note.read_text()) if note.exists() else None

    def is_enough(self, result: str, folder: Path) -> bool:
        return True

    def other(self, result: str, scan: Sheet) -> str:
        return ""

    def read(self, scan: Sheet) -> str:
        return scan.case_id

    def roomy(self, read: str) -> bool:
        return True

    def answer(self, scan: Sheet, read: str, folder: Path) -> str:
        return read.upper()

    def write(self, scan: Sheet, answer: str, folder: Path) -> Row[str]:
        (folder / self.mark).write_text(answer)
        return Row(case_id=scan.case_id, status="done", report=answer)

    def explain(self, scan: Sheet, error: Exception, folder: Path) -> Row[str]:
        folder.mkdir(exist_ok=True)
        (folder / "error.json").write_text(str(error))
        return Row(case_id=scan.case_id, status="failed", error={"message": str(error)})

    def summarise(self, out: Path, rows: object, left_alone: object) -> None: ...


class Lost(Exception):
    """As Ray says that an actor is gone."""


class Wrong(Exception):
    """As Ray says that an actor raised something."""


@dataclass(eq=False)
class Answer:
    """What is awaited of an actor."""

    actor: "Actor"
    made: Callable[[], Any]


@dataclass(eq=False)
class Actor:
    """A worker in a process of its own: it dies of some cases, and all it has in hand with it."""

    ray: "StandIn"
    held: list[str] = field(default_factory=list)
    alive: bool = True

    def __getattr__(self, name: str) -> Any:
        def remote(*given: Any) -> Answer:
            case = given[0].case_id if name == "do" else ""
            if case:
                self.held.append(case)
                self.ray.most = max(self.ray.most, len(self.held))
            return Answer(self, lambda: self._done(case) if name == "do" else self.ray.unfit)

        return type("Method", (), {"remote": staticmethod(remote)})

    def _done(self, case: str) -> Row[str]:
        if not self.alive:
            raise Lost
        if case in self.ray.poison:
            self.alive = False
            self.ray.company[case].append(len(self.held))
            raise Lost
        self.held.remove(case)
        return Row(case_id=case, status="done")


class StandIn:
    """What of Ray is used, in this process: two nodes, one actor each."""

    exceptions = type("Exceptions", (), {"RayActorError": Lost, "RayTaskError": Wrong})

    def __init__(self, poison: set[str] = frozenset(), unfit: str = "") -> None:  # type: ignore[assignment]
        self.poison, self.unfit, self.most = poison, unfit, 0
        self.company: dict[str, list[int]] = {case: [] for case in poison}

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"Alive": True, "NodeID": f"node{n}", "NodeManagerAddress": f"10.0.0.{n}", "Resources": {"CPU": 2.0}}
            for n in range(2)
        ]

    def wait(self, awaited: list[Answer], num_returns: int, timeout: float) -> tuple[list[Answer], list[Answer]]:
        return awaited[:1], awaited[1:]

    def get(self, answer: Answer) -> Any:
        return answer.made()


@pytest.fixture
def claims(tmp_path: Path) -> Iterator[Claims]:
    with at_work(tmp_path, shared=True) as claims:
        yield claims


def gone_through(names: str, ray: StandIn, claims: Claims, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr("pipeline.cluster.ROLL_CALL", 0.0)
    over: list[tuple[str, str]] = []
    crew = _Crew(ray, lambda place, has: Actor(ray), Copying(), claims, (), claims.out)
    _go_through([Sheet(name) for name in names], crew, lambda case, row: over.append((case.case_id, row.status)))
    assert len(over) == len(dict(over)), "each case is over once"
    return dict(over)


def test_every_case_is_handed_out_once_and_few_at_a_time(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = StandIn()
    assert gone_through("abcdefgh", ray, claims, monkeypatch) == dict.fromkeys("abcdefgh", "done")
    assert ray.most == 2


def test_a_case_that_kills_whoever_takes_it_up_is_set_aside_and_its_neighbours_are_not_blamed(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = StandIn(poison={"c"})
    over = gone_through("abcdefgh", ray, claims, monkeypatch)
    assert over == dict.fromkeys("abdefgh", "done") | {"c": "failed"}
    assert len(ray.company["c"]) == DEATHS and ray.company["c"][1:] == [1] * (DEATHS - 1), "alone from the second on"
    assert "were killed" in (claims.out / "c" / "error.json").read_text()


def test_a_cluster_none_of_whose_nodes_sees_the_folders_is_refused(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"10\.0\.0\.0: it does not see /out; .*Mount"):
        gone_through("ab", StandIn(unfit="it does not see /out"), claims, monkeypatch)


def test_a_worker_does_what_it_is_handed_and_leaves_nothing_behind(claims: Claims, tmp_path: Path) -> None:
    worker = Worker(Copying(), tmp_path)
    with (claims.folder / ".probe").open("a") as probe:
        assert "does not see /nowhere" in worker.begin([Path("/nowhere")], Path(probe.name))
        assert "locks of other machines" in worker.begin([tmp_path], Path(probe.name)), "nobody holds the probe"
    claims.take("probe")
    assert worker.begin([tmp_path], claims.folder / "probe") == ""
    assert [worker.do(Sheet(name)).report for name in "ab"] == ["A", "B"]
    assert worker.do(Sheet("a")).status == "skipped as complete"
    worker.end()
    assert not worker.thread.is_alive() and (tmp_path / "b" / "note.txt").read_text() == "B"


def test_without_ray_it_is_told_what_to_install(
    tiny: Path, scan_file: ScanFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install hilum\[ray\]"):
        run(scan_file(tmp_path / "a.nii.gz"), tiny, tmp_path / "out", Segment(outputs=("labels",), ray="auto"))


def test_who_asks_for_no_cluster_never_imports_ray() -> None:
    code = "import sys, pipeline.batch, pipeline.cli, pipeline.cluster; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
    assert Cluster("auto").address == "auto"


NODES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False, object_store_memory=10**8))
other = cluster.add_node(num_cpus=1, object_store_memory=10**8)
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(other, allow_graceful=False)
cluster.shutdown()
"""
"""Two nodes on this machine; a line kills the second one, and no more lines end both."""


@pytest.fixture
def nodes() -> Iterator[subprocess.Popen[str]]:
    pytest.importorskip("ray")
    place = Path(tempfile.mkdtemp(prefix="ray"))  # not in pytest's folder: a socket's path may have 107 letters
    (place / "ray").mkdir()
    surroundings = os.environ | {
        "RAY_TMPDIR": str(place), "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=surroundings, text=True,
    )  # fmt: skip
    yield process
    process.communicate(timeout=60)
    shutil.rmtree(place, ignore_errors=True)


@pytest.mark.slow
def test_a_node_that_is_killed_costs_the_cases_it_had_in_hand(
    nodes: subprocess.Popen[str], tiny: Path, scan_file: ScanFile, tmp_path: Path
) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    for seed in range(8):
        scan_file(scans / f"case{seed}.nii.gz", seed)
    assert nodes.stdout and nodes.stdin
    address = nodes.stdout.readline().strip()
    words = ["segment", scans, "--package", tiny, "--out", out, "--outputs", "labels", "--device", "cpu"]
    words += ["--progress", "lines", "--ray", address]
    code = "import pipeline.__main__"
    driver = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    assert driver.stderr
    events: list[dict[str, Any]] = []
    others: list[str] = []
    for line in driver.stderr:
        if not line.startswith("{"):
            others.append(line)
            continue
        events.append(json.loads(line))
        if len(events) == 3:  # two cases are over, others are in hand
            nodes.stdin.write("kill\n")
            nodes.stdin.flush()
    assert driver.wait(120) == 0, "".join(others)
    told = [(event["case"], event["status"]) for event in events if event["event"] == "case"]
    assert Counter(case for case, _ in told) == {f"case{seed}": 1 for seed in range(8)}
    # a case that was written whole when its node died, and not yet told of, is found complete by the next
    assert {status for _, status in told} <= {"done", SKIPPED}
    assert {path.name for path in out.glob(".*")} == {".lock"}
    driver.stderr.close()

    run(scans, tiny, tmp_path / "here")
    assert told_by(out) == told_by(tmp_path / "here"), "the same files as of one machine"
