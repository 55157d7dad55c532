"""The node: what listens, what watches, what works and what shows, in one process over one folder."""

import fcntl
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml

from preprocessing.records import BadRecord, decode

from ..errors import UsageError
from ..package import ModelPackage
from . import workflow
from .config import Node
from .ledger import open_ledger
from .listener import Listener
from .spool import Spool, open_keys
from .stories import Stories
from .watcher import Watcher
from .workflow import Desk

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


def serve(node: Node) -> None:
    """Run until somebody stops it; what is under way then goes on at the next start."""
    import uvicorn

    from .web import Pages

    with running(node) as desk:
        pages = Pages(desk, node.showing.users).app()
        # no access log: a proxy in front keeps one, and addresses of stories need not stand in two places
        config = uvicorn.Config(
            pages, host=node.showing.host, port=node.showing.port, log_config=None, access_log=False
        )
        server = uvicorn.Server(config)
        with _stopping(server):
            server.run()


@contextmanager
def _stopping(server: Any) -> Iterator[None]:
    """A signal ends the page, and with it the node in good order; uvicorn would let it strike once more, before that."""

    def end(number: int, frame: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    server.capture_signals = nullcontext
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def running(node: Node) -> Iterator[Desk]:
    """Everything but the page."""
    _refuse_unfit_packages(node)
    with _alone_in(node.state):
        keys, ledger = open_keys(node.state), open_ledger(node.state, node.ledger)
        spool = Spool(node.state, keys)
        ledger.reconcile(spool)
        desk = Desk(node=node, spool=spool, ledger=ledger, stories=Stories(ledger))
        workflow.start(desk, node.stories or os.environ.get("HILUM_STORIES", ""))
        listener, enough = Listener(node, spool, ledger), threading.Event()
        listener.start()
        watching = threading.Thread(target=_watch, args=(Watcher(desk=desk), enough), name="watcher")
        watching.start()
        try:
            yield desk
        finally:
            listener.stop()
            enough.set()
            watching.join()
            workflow.stop()
            ledger.close()


def _watch(watcher: Watcher, enough: threading.Event) -> None:
    while not enough.wait(LOOK_SECONDS):
        try:
            watcher.look()
        except Exception as error:  # a database that is away for a minute must not end the watch
            logger.error("looking at studies failed: %s", type(error).__name__)


def _refuse_unfit_packages(node: Node) -> None:
    """Before the first study comes: every byte of a package is checked, and that a route asks for its very channels."""
    for name, route in node.routes.items():
        channels = ModelPackage.load(route.package).plan.channels
        if tuple(route.take) != channels:
            raise UsageError(
                f"route {name} takes {', '.join(route.take)}; its package needs the channels {', '.join(channels)}, in that "
                "order. Name the rules of `take` after them."
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
