"""Cases on the nodes of a Ray cluster: each node reads, looks and writes by itself; here is only told who does what.

Ray is an extra (hilum[ray]) and is imported when a cluster is asked for. Every node must have this hilum, see the scans, the
package and `out` under the same paths, and its locks. A node that dies costs the cases that it had in hand: they go to others.
"""

import fcntl
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, final

from .claims import Claims, at_work
from .errors import UsageError
from .relay import relay
from .results import Case, Handed, Over, Row, hands

logger = logging.getLogger(__name__)

HANDED = 2
"""Cases that a node has at once: one to look at, one to read meanwhile. More would lie there at the end while others idle."""

DEATHS = 3
"""Processes that may die over a case before it is called bad; from the second on it is alone with them, so that none of its
neighbours is blamed. Two could be two nodes that were lost by chance."""

ROLL_CALL = 3.0
"""Seconds between two looks at which nodes there are: some were lost, some may have come."""

Input = TypeVar("Input", bound=Case)
Record = TypeVar("Record")


class CaseLost(UsageError):
    """Every process that took up a case was killed."""


@dataclass(frozen=True)
class Cluster:
    """A way to go through cases: on the nodes of the cluster at this address."""

    address: str
    needs: tuple[Path, ...] = ()
    """What every node must see, beside the folder of results."""

    def __call__(
        self, cases: Sequence[Any], work: Handed[Any, Any], claims: Claims, over: Over[Any, Any]
    ) -> None:  # a `results.Way`
        with _connected(self.address) as ray, _probe(claims) as probe:
            crew = _Crew(ray, _hiring(ray, work, claims.out), work, claims, (*self.needs, claims.out), probe)
            _go_through(cases, crew, over)
            crew.go_home()


def _go_through(cases: Sequence[Any], crew: "_Crew", over: Over[Any, Any]) -> None:
    left = deque(cases)
    while left or crew.hands:
        crew.call_the_roll()
        crew.deal(left)
        for case, row in crew.collect():
            if row is not None:
                over(case, row)
            elif crew.deaths[case.case_id] < DEATHS:
                left.appendleft(case)
            else:
                over(case, crew.lost(case))


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, told to keep quiet, to report nothing of its use, and to leave our handling of signals alone."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError:
        raise UsageError("--ray needs Ray, which is not installed here. pip install hilum[ray]") from None
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"no Ray cluster answers at {address} ({reason}); the address of its head is needed, as 10.0.0.1:6379, or auto on "
            "one of its nodes. Start one with `ray start --head`, or look at the spelling."
        ) from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _probe(claims: Claims) -> Iterator[Path]:
    """A lock that is held here; a node that can take it nevertheless does not see our locks."""
    path = claims.folder / f".probe-{socket.gethostname()}-{os.getpid()}"
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


@final
class Worker(Generic[Input, Record]):
    """On a node: looks at one case while the next is read and the last is written."""

    def __init__(self, work: Handed[Input, Record], out: Path) -> None:
        self.work, self.out = work, out
        self.inbox: queue.SimpleQueue[Input | None] = queue.SimpleQueue()
        self.waiting: dict[str, Future[Row[Record]]] = {}
        self.thread = threading.Thread(target=self._run, daemon=True)

    def begin(self, needs: Sequence[Path], probe: Path) -> str:
        """Whether it can take part: why not, or nothing."""
        if unseen := [str(path) for path in (*needs, probe) if not path.exists()]:
            return f"it does not see {', '.join(unseen)}"
        with probe.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.thread.start()
                return ""
        return f"it does not see the locks of other machines in {self.out}"

    def do(self, case: Input) -> Row[Record]:
        """The row of a case, when it is over."""
        future: Future[Row[Record]] = Future()
        self.waiting[case.case_id] = future
        self.inbox.put(case)
        return future.result()

    def end(self) -> None:
        """No more cases will come."""
        self.inbox.put(None)
        self.thread.join()

    def _run(self) -> None:
        try:
            with at_work(self.out, shared=True) as claims:

                def over(case: Input, row: Row[Record]) -> None:
                    claims.let_go(case.case_id)
                    self.waiting.pop(case.case_id).set_result(row)

                relay(self._take, hands(self.work, claims), over)
        except BaseException as error:
            for future in self.waiting.values():
                future.set_exception(error)

    def _take(self, wait: bool) -> Input | None:
        with suppress(queue.Empty):
            return self.inbox.get(block=wait)
        return None


Place = tuple[str, int]
"""A node, and which of its GPUs."""

Hire = Callable[[Place, dict[str, float]], Any]
"""A new worker at a place of a node with these resources."""


def _hiring(ray: Any, work: Handed[Any, Any], out: Path) -> Hire:
    """One process per node or GPU, with all of its cores: Ray tells them to torch."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def hire(place: Place, has: dict[str, float]) -> Any:
        gpus = int(has.get("GPU", 0))
        actor = ray.remote(Worker).options(
            num_cpus=max(1, int(has["CPU"]) // max(1, gpus)),
            num_gpus=1 if gpus else 0,
            max_concurrency=HANDED + 2,  # its cases, and being told to begin or to end
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=place[0], soft=False),
        )
        return actor.remote(work, out)

    return hire


@final
class _Crew:
    """The workers that are there, and what each of them has in hand."""

    def __init__(
        self, ray: Any, hire: "Hire", work: Handed[Any, Any], claims: Claims, needs: Sequence[Path], probe: Path
    ) -> None:
        self.ray, self.hire, self.work, self.claims = ray, hire, work, claims
        self.needs, self.probe = tuple(needs), probe
        self.workers: dict[Place, Any] = {}
        self.beginning: dict[Any, Place] = {}
        """Answers that are awaited of workers that were just started."""
        self.hands: dict[Any, tuple[Place, Any]] = {}
        """Of every answer that is awaited, whose it is and of which case."""
        self.ready: set[Place] = set()
        self.unfit: dict[str, str] = {}
        """Nodes that cannot take part, and why."""
        self.deaths: Counter[str] = Counter()
        self.called = 0.0

    def call_the_roll(self) -> None:
        """A worker for every node, or every GPU of it, that has none."""
        if time.monotonic() - self.called < ROLL_CALL:
            return
        self.called = time.monotonic()
        nodes = [node for node in self.ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        fit = [node for node in nodes if node["NodeID"] not in self.unfit]
        if nodes and not fit:
            why = "; ".join(f"{node['NodeManagerAddress']}: {self.unfit[node['NodeID']]}" for node in nodes)
            raise UsageError(
                f"no node of the cluster can take part ({why}). Mount the folders there under the same paths."
            )
        for node in fit:
            for number in range(max(1, int(node["Resources"].get("GPU", 0)))):
                if (place := (node["NodeID"], number)) not in self.workers:
                    self.workers[place] = worker = self.hire(place, node["Resources"])
                    self.beginning[worker.begin.remote(self.needs, self.probe)] = place

    def deal(self, left: deque[Any]) -> None:
        """Cases to whoever has the fewest; one that somebody died over goes to a worker that has no other."""
        alone = {place for place, case in self.hands.values() if self.deaths[case.case_id]}
        while left:
            busy = Counter(place for place, _ in self.hands.values())
            most = 1 if self.deaths[left[0].case_id] else HANDED
            free = [place for place in self.ready - alone if busy[place] < most]
            if not free:
                return
            place, case = min(free, key=lambda one: busy[one]), left.popleft()
            self.hands[self.workers[place].do.remote(case)] = (place, case)
            if self.deaths[case.case_id]:
                alone.add(place)

    def collect(self) -> list[tuple[Any, Row | None]]:
        """What is over by now, after waiting for something to be; no row of a case whose worker died."""
        awaited = [*self.beginning, *self.hands]
        if not awaited:
            time.sleep(ROLL_CALL / 10)
            return []
        answered, _ = self.ray.wait(awaited, num_returns=1, timeout=ROLL_CALL)
        over: list[tuple[Any, Row | None]] = []
        for answer in answered:
            if answer in self.beginning:
                self._begun(answer)
            else:
                over += self._done(answer)
        return over

    def _begun(self, answer: Any) -> None:
        place = self.beginning.pop(answer)
        try:
            if why := self.ray.get(answer):
                self.unfit[place[0]] = why
                logger.warning("node %s takes no part: %s", place[0][:8], why)
            else:
                self.ready.add(place)
        except self.ray.exceptions.RayActorError:  # its node went away meanwhile: the next roll call will tell
            self.workers.pop(place)

    def _done(self, answer: Any) -> list[tuple[Any, Row | None]]:
        place, case = self.hands.pop(answer)
        try:
            return [(case, self.ray.get(answer))]
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self.ray.exceptions.RayActorError:
            self.ready.discard(place)
            self.workers.pop(place, None)
            self.deaths[case.case_id] += 1
            logger.warning("a worker on node %s was lost; its cases go to others", place[0][:8])
            return [(case, None)]

    def lost(self, case: Any) -> Row:
        """What is said of a case that nobody survived."""
        self.claims.take(case.case_id)
        error = CaseLost(
            f"{DEATHS} processes that took up this case were killed; one that lives to its end is needed. If their nodes "
            "were short of memory, give --max-memory; else look at the nodes' system logs."
        )
        return self.work.explain(case, error, self.claims.out / case.case_id)

    def go_home(self) -> None:
        """Workers end what they have in hand and let go of the folder."""
        ended = [self.workers[place].end.remote() for place in self.ready]
        with suppress(Exception):  # whoever is not there any more holds nothing
            self.ray.wait(ended, num_returns=len(ended), timeout=60) if ended else None
