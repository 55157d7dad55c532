"""The node: what listens, what watches, what works and what shows, in one process over one folder, or in several."""

import fcntl
import hashlib
import logging
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import yaml

from preprocessing.records import BadRecord, decode

from ..errors import UsageError
from . import rollback, workflow
from .audit import Refusals
from .config import Node
from .desk import Desk
from .heart import Hearts, Part, Watch
from .inbox import Inboxes
from .ledger import open_ledger
from .listener import Listener
from .spool import Spool, open_keys
from .stories import Stories
from .tracking import Tracking
from .watcher import Watcher

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""Between two looks at what came: a study waits for seconds at the least."""


def read_config(path: Path) -> Node:
    """A node's YAML; whatever is in it that nobody knows is refused by name."""
    try:
        return decode(Node, yaml.safe_load(path.read_text()) or {}, where=path.name)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); a YAML of the node is needed. docker/node.yaml is one."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is no YAML ({error}); a YAML of the node is needed. docker/node.yaml is one."
        ) from None
    except BadRecord:
        raise
    except ValueError as error:
        raise UsageError(f"{path.name}: {error}") from None


def serve(node: Node, part: Part = "both") -> None:
    """Run until somebody stops it; what is under way then goes on at the next start, or in another worker."""
    enough = threading.Event()
    with _at_a_signal(enough.set), running(node, part) as desk:  # one that comes early ends it in good order, too
        if part == "worker":
            enough.wait()
        else:
            _show(desk, enough)
    # threads may sleep between two tries, or wait for a room: what they know is written down, and nobody waits for them
    logging.shutdown()
    os._exit(0)


def _show(desk: Desk, enough: threading.Event) -> None:
    """The page, until a signal comes."""
    from . import web

    server: Any = web.server(desk)
    server.capture_signals = nullcontext

    def end() -> None:
        server.should_exit = True

    with _at_a_signal(end):
        if not enough.is_set():
            server.run()


@contextmanager
def _at_a_signal(end: Callable[[], None]) -> Iterator[None]:
    """A signal ends the page, and with it the node in good order; uvicorn would let it strike once more, before that."""
    before = {number: signal.signal(number, lambda *_: end()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def digest_of(node: Node) -> str:
    """Of everything the config says: the trail shows when another one came into force."""
    return hashlib.sha256(repr(node).encode()).hexdigest()


@contextmanager
def running(node: Node, part: Part = "both") -> Iterator[Desk]:
    """Everything but the page."""
    _refuse_to_share_sqlite(node, part)
    with ExitStack() as ends:
        if part != "worker":
            ends.enter_context(_alone_in(node.state))
        desk = _opened(node)
        ends.callback(desk.ledger.close)
        desk.audit.note("start", part=part, config=digest_of(node))
        ends.callback(desk.audit.note, "stop", part=part)
        rollback.take_up_all(desk, may_lack=part == "front")
        if part != "worker":
            desk.ledger.reconcile(desk.spool)
            desk.submissions.reconcile()
        ends.enter_context(_working(desk, part))
        if part != "worker":
            ends.enter_context(_receiving(desk))
        yield desk


def _opened(node: Node) -> Desk:
    keys, ledger = open_keys(node.state), open_ledger(node.state, node.ledger)
    return Desk(node=node, spool=Spool(node.state, keys), ledger=ledger, stories=Stories(ledger))


@contextmanager
def _working(desk: Desk, part: Part) -> Iterator[None]:
    """Stories are worked on here or begun for others, and those of dead processes are taken over."""
    hearts = Hearts(ledger=desk.ledger, silent_s=desk.node.working.silent_s)
    name = _name_of(part)
    watch = Watch(
        name=name, part=part, hearts=hearts, holders=workflow.holders, take_over=workflow.take_over, bury=workflow.bury
    )  # fmt: skip
    hearts.beat(name, part)  # before it begins anything
    workflow.start(desk, _address_of_stories(desk.node), executor=name, works=part != "front")
    logger.info("this process is %s", name)
    try:
        with watch.beating():
            yield
    finally:
        workflow.stop()
        hearts.farewell(name)


def _name_of(part: Part) -> str:
    """The one that is alone in its folder keeps its name and takes up at once what it had begun; workers come and go."""
    return {"both": "node", "front": "front", "worker": f"worker-{secrets.token_hex(4)}"}[part]


LET_GO_SECONDS = 20.0
"""To stop, all that look finish what they have in hand, but for a tracking store that hangs: MLflow waits twice ten."""


@contextmanager
def _receiving(desk: Desk) -> Iterator[None]:
    """Studies come in, and are begun once they are whole."""
    listener, enough = Listener(desk.node, desk.spool, desk.ledger), threading.Event()
    listener.start()
    # a thread for each: to copy a large scan must not keep studies waiting
    watching = [
        threading.Thread(target=_watch, args=(watcher, enough), name=name, daemon=True)
        for name, watcher in _watchers(desk).items()
    ]
    for thread in watching:
        thread.start()
    try:
        yield
    finally:
        listener.stop()
        enough.set()
        for thread in watching:
            thread.join(LET_GO_SECONDS)


def _watchers(desk: Desk) -> dict[str, "Looking"]:
    return {
        "watcher": Watcher(desk=desk),
        "inboxes": Inboxes(desk),
        "refusals": Refusals(desk.audit, desk.ledger.refused),
        "tracking": Tracking(desk=desk),
    }


@runtime_checkable
class Looking(Protocol):
    """Somebody who looks after something, again and again."""

    def look(self) -> None: ...


def _watch(watcher: Looking, enough: threading.Event) -> None:
    while not enough.wait(LOOK_SECONDS):
        try:
            watcher.look()
        except Exception as error:  # a database that is away for a minute must not end the watch
            logger.error("looking at studies failed: %s", type(error).__name__)


def _address_of_stories(node: Node) -> str:
    return node.stories or os.environ.get("HILUM_STORIES", "")


def _refuse_to_share_sqlite(node: Node, part: Part) -> None:
    """Its file locks do not hold over a network, and it lets one process write at a time."""
    if part != "both" and not ((node.ledger or os.environ.get("HILUM_LEDGER")) and _address_of_stories(node)):
        raise UsageError(
            f"--only {part} was given, and ledger or stories is sqlite; several processes need a Postgres for both. Set "
            "`ledger` and `stories`, or HILUM_LEDGER and HILUM_STORIES where they hold a password."
        )


@contextmanager
def _alone_in(state: Path) -> Iterator[None]:
    """Two nodes over one folder would each do everything."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another node works in {state}; each needs a folder of its own. Stop it, or name another."
            ) from None
        yield
