"""A study's way once it is whole: choose, segment, send, prove that it was kept, let go. The one file that knows DBOS.

Each step's answer is written down before the next begins, so that whoever is killed goes on at the step in hand; every step
may run twice and then says and does the same. What fails for now is tried again after a pause that is written down, too;
what fails for good, or too often, ends as a dead letter with its reason, and its input is kept.
"""

import logging
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import wraps
from pathlib import Path
from typing import Any

from . import steps
from .desk import Desk
from .ledger import BUSY_SECONDS
from .routes import Route
from .shadow import follow
from .stories import Story

logger = logging.getLogger(__name__)

QUEUE = "stories"
SENDING = "sendings"
"""What is made waits here for its targets: a target that is away, or that takes its time to vouch, holds up no case."""

SENDINGS = 32
"""At once in a process: each mostly waits for a target's answer, and none for a target that is away."""

POLL_SECONDS = 0.2
"""Between two looks into a queue: a question of less than a millisecond."""

_desk: Desk | None = None
"""DBOS finds steps by their names; what they work with is this process's own."""


def desk() -> Desk:
    assert _desk is not None, "start comes first"
    return _desk


def start(at: Desk, address: str = "", executor: str = "node", works: bool = True) -> None:
    """Begin to work: stories that a killed process of that name left are taken up where they were.

    Without `works` stories are only begun and watched here; others work on them.
    """
    global _desk
    from dbos import DBOS
    from dbos._serialization import DBOSPortableJSONSerializer  # JSON: the store holds nothing that could run

    _desk = at
    quiet = logging.getLogger("dbos")
    quiet.setLevel(logging.ERROR)
    DBOS(
        config={
            "name": "hilum-node",
            "system_database_url": address or _own_store(at.node.state / "workflows.sqlite"),
            "application_version": "1",  # by default a hash of the code: after an upgrade nobody would finish what was begun
            "executor_id": executor,
            "serializer": DBOSPortableJSONSerializer(),
            "log_level": "ERROR",
            "enable_otlp": False,
            "notification_listener_polling_interval_sec": 0.2,
        }
    )
    _register()
    DBOS.listen_queues([QUEUE, SENDING] if works else [])
    DBOS.launch()
    DBOS.register_queue(QUEUE, worker_concurrency=at.node.working.workers, polling_interval_sec=POLL_SECONDS)
    DBOS.register_queue(SENDING, worker_concurrency=SENDINGS, polling_interval_sec=POLL_SECONDS)


def _own_store(path: Path) -> str:
    """The address of an sqlite in which a commit takes a third of the time, and readers do not wait; the file keeps that."""
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    return f"sqlite:///{path}"


def stop() -> None:
    """No new step begins; what is under way is taken up at the next start."""
    from dbos import DBOS

    DBOS.destroy()
    desk().close()


def enqueue(story: Story, route: Route) -> None:
    """Have it worked on; once, however often this is called."""
    from dbos import DBOS, SetEnqueueOptions, SetWorkflowID

    words = (story.study, story.revision, story.route, story.attempt)
    with SetWorkflowID(story.id), SetEnqueueOptions(priority=story.facts.get("priority", route.priority)):
        DBOS.enqueue_workflow(QUEUE, _registered["story"], *words)


SENT = "~sending"
"""Behind a story's name, with a number: the workflows of its results' way, each from a pause to the next. No route has such
a sign in its name."""


def holders() -> set[str]:
    """The processes that have begun something and not ended it."""
    from dbos import DBOS

    under_way = DBOS.list_workflows(status="PENDING", load_input=False, load_output=False)
    return {one.executor_id for one in under_way if one.executor_id}


def take_over(executor: str) -> int:
    """What that process had begun goes back into the queues; asked by several at once, it goes there once."""
    from dbos import DBOS

    return len(DBOS._recover_pending_workflows([executor]))


def broken_off(stories: list[Story]) -> list[Story]:
    """Those of these whose workflow ended without them: by an error of ours, or begun too often by dying processes."""
    from dbos import DBOS

    names = {story.id: story for story in stories}
    failed = ["ERROR", "MAX_RECOVERY_ATTEMPTS_EXCEEDED", "CANCELLED"]
    found = DBOS.list_workflows(status=failed, start_time=_oldest(stories), load_input=False, load_output=False)
    return [names[name] for name in {one.workflow_id.split(SENT)[0] for one in found} & names.keys()]


def _oldest(stories: list[Story]) -> str:
    """A day before the first of them: their clock and DBOS's are two."""
    first = min((story.began for story in stories), default=datetime.now(UTC))
    return (first - timedelta(days=1)).isoformat()


def bury() -> int:
    """What broke off becomes a dead letter, with its input kept: nobody else would ever end it. How many there were."""
    at = desk()
    found = broken_off(at.stories.unended())
    for story in found:
        at.stories.note(story, "dead", "fault", BROKEN_OFF)
        logger.error("study %s revision %d on %s broke off", story.study, story.revision, story.route)
    return len(found)


BROKEN_OFF = (
    "a step failed in a way that no step expects, or a hundred processes ended while they worked on this. The node's log "
    "names the step; begin it anew when that is mended."
)


def forget(before: datetime) -> int:
    """Workflows that ended before then, some at a time: stories tell what became of a study, for as long as anybody asks."""
    from dbos import DBOS

    if _desk is None:  # nothing is worked on in this process
        return 0
    over = ["SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"]
    found = DBOS.list_workflows(
        status=over, completed_before=before.isoformat(), limit=FORGOTTEN_AT_ONCE, load_input=False, load_output=False
    )
    if found:
        DBOS.delete_workflows([one.workflow_id for one in found])
    return len(found)


FORGOTTEN_AT_ONCE = 200
"""Each minute: more than a node of the fastest kind makes, and a transaction of a tenth of a second."""

_registered: dict[str, Callable[..., Any]] = {}

STEPS: tuple[Callable[..., Any], ...] = (
    steps.take, steps.segment, steps.put_away, steps.hand_over, steps.prove, steps.end, follow,
)  # fmt: skip


def _register() -> None:
    """Once in a process: DBOS keeps what it knows across starts."""
    from dbos import DBOS

    if not _registered:
        again = {"retries_allowed": True, "max_attempts": STEP_TRIES, "interval_seconds": STEP_PAUSE_SECONDS}
        _registered.update({step.__name__: DBOS.step(name=step.__name__, **again)(_at_desk(step)) for step in STEPS})
        _registered["story"] = DBOS.workflow(name="story")(_story)
        _registered["sending"] = DBOS.workflow(name="sending")(_sending)
        _registered["shadow"] = DBOS.workflow(name="shadow")(_shadow)


def _at_desk(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step as DBOS calls it: with values that can be written down, and this process's desk."""

    @wraps(step)
    def work(*words: Any) -> Any:
        try:
            return step(desk(), *words)
        except Exception as error:  # a library's words may quote a header, and DBOS keeps what it is told
            kind = type(error).__name__
        logger.error("a step (%s) failed: %s", step.__name__, kind)
        raise Fault(f"{step.__name__}: {kind}")

    return work


class Fault(RuntimeError):
    """A step met what no step expects: a database that is away, a disk that is full. Only its kind is told."""


STEP_TRIES, STEP_PAUSE_SECONDS = 7, 1.0
"""Of a step that met a fault: pauses of 1, 2, 4 … seconds, a minute in all, as long as a Postgres takes to start anew."""


def _story(study: str, revision: int, route: str, attempt: int = 0) -> str:
    """One revision of a study on one route, from its series to its end."""
    words = (study, revision, route)
    taken = _registered["take"](*words, attempt)
    if taken.get("left"):  # somebody holds it, or had it begun anew since it was put into the queue
        return "left"
    if taken["ends"]:
        return _end(words, taken["ends"])
    for case in taken["cases"]:
        reason = _until_done("segment", *words, case)
        if reason:
            return _end(words, reason)
    _enqueue_sending(_Way(words=words, steps=taken["way"]))
    return "made"


def _end(words: tuple[str, int, str], reason: Mapping[str, str]) -> str:
    return str(_registered["end"](*words, reason["state"], reason["code"], reason["words"]))


@dataclass(frozen=True, kw_only=True)
class _Way:
    """How far results have come."""

    words: tuple[str, int, str]
    steps: list[list[str]]
    """What is left: a step and what it is about."""
    tried: int = 0
    """How often the first of them was tried."""
    waited: int = 0
    """How often somebody looked since."""
    leg: int = 0
    """A pause ends a workflow and begins the next: nobody's thread sleeps while a target is away."""


def _enqueue_sending(way: _Way, pause: float = 0.0) -> None:
    from dbos import DBOS, SetEnqueueOptions, SetWorkflowID

    study, revision, route = way.words
    name = str(DBOS.workflow_id).split(SENT)[0]
    how = SetEnqueueOptions(priority=desk().node.routes[route].priority, delay_seconds=pause or None)
    with SetWorkflowID(f"{name}{SENT}-{way.leg}"), how:
        left = (way.steps, way.tried, way.waited, way.leg)
        DBOS.enqueue_workflow(SENDING, _registered["sending"], study, revision, route, *left)


def _sending(
    study: str, revision: int, route: str, steps: list[list[str]], tried: int = 0, waited: int = 0, leg: int = 0
) -> str:
    """What was made of one revision on one route, step by step to its targets, and the end of the story."""
    words = (study, revision, route)
    while steps:
        said = _registered[steps[0][0]](*words, steps[0][1])
        if said["status"] == "done":
            steps, tried, waited = steps[1:], 0, 0
            continue
        if said["status"] == "wait":
            _enqueue_sending(
                _Way(words=words, steps=steps, tried=tried, waited=waited + 1, leg=leg + 1), _patience(waited)
            )
            return "waits"
        working = desk().node.working
        reason = _given_up(said, tried + 1, working.target_attempts)
        if reason:
            return _end(words, reason)
        pause = working.pause(tried + 1)
        _enqueue_sending(_Way(words=words, steps=steps, tried=tried + 1, leg=leg + 1), pause)
        return "tries again later"
    said = _end(words, {"state": "done", "code": "", "words": ""})
    if desk().node.routes[route].shadow:
        _enqueue_shadow(words)
    return said


AFTER_ALL = 10
"""Behind every route's priority: nobody waits for a shadow."""


def _enqueue_shadow(words: tuple[str, int, str]) -> None:
    from dbos import DBOS, SetEnqueueOptions, SetWorkflowID

    name = str(DBOS.workflow_id).split(SENT)[0]
    with SetWorkflowID(f"{name}-shadow"), SetEnqueueOptions(priority=AFTER_ALL):
        DBOS.enqueue_workflow(QUEUE, _registered["shadow"], *words)


def _shadow(study: str, revision: int, route: str) -> str:
    """What another package would have made of it, once the results are where they belong."""
    return str(_registered["follow"](study, revision, route))


LONGEST_PATIENCE_SECONDS = 60.0
"""Between two looks whether a target has vouched: a look is one row read."""


def _patience(looked: int) -> float:
    return float(min(LONGEST_PATIENCE_SECONDS, 2.0 ** min(looked, 16)))


def _until_done(step: str, *words: Any) -> dict[str, str] | None:
    """None once the step succeeded; else why it never will, or did not in so many tries."""
    from dbos import DBOS

    tried = 0
    while (said := _registered[step](*words))["status"] != "done":
        tried += 1
        reason = _given_up(said, tried, desk().node.working.attempts)
        if reason:
            return reason
        DBOS.sleep(desk().node.working.pause(tried))
    return None


def _given_up(said: Mapping[str, str], tried: int, most: int) -> dict[str, str] | None:
    """Why a step is not tried again; None where it is."""
    if said["status"] == "never":
        return {"state": said["state"], "code": said["code"], "words": said["words"]}
    if tried < most:
        return None
    return {"state": "dead", "code": said["code"], "words": f"{said['words']} Tried {tried} times."}
