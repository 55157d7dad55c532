"""Whether a node works, asked from beside it: for a container's health check, which knows the config and nothing else."""

import ssl
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta

from .config import Node
from .heart import Hearts, Part
from .ledger import open_ledger

PATIENCE_S = 5.0
"""For one answer: who starts containers asks again every minute, and gives up after three times."""

EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where a page that listens on all addresses is reached from beside it."""


def ailing(node: Node, part: Part = "both") -> str:
    """Why the node on this machine is not ready; empty where it is. Workers show no page: their hearts are looked at."""
    return _silent(node) if part == "worker" else _unanswered(address_of(node))


def address_of(node: Node) -> str:
    """Where the page says whether the node is ready, from beside it."""
    host, scheme = EVERYWHERE.get(node.showing.host, node.showing.host), "https" if node.showing.security else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{node.showing.port}/health/ready"


def _unanswered(address: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=_near()))
    try:
        with opener.open(address, timeout=PATIENCE_S):
            return ""
    except urllib.error.HTTPError as error:
        return f"{address} says {error.code}; the node is not ready. Its log and its page say why."
    except OSError as error:
        return f"{address} does not answer ({error}); the node is not running, or is starting."


def _near() -> ssl.SSLContext:
    """The page is asked over loopback by its neighbour: its certificate speaks of a name that is none here."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _silent(node: Node) -> str:
    ledger = open_ledger(node.state, node.ledger)
    try:
        hearts = Hearts(ledger=ledger, silent_s=node.working.silent_s).known()
    finally:
        ledger.close()
    since = datetime.now(UTC) - timedelta(seconds=node.working.silent_s)
    if any(one.part == "worker" and not one.is_gone and one.last > since for one in hearts):
        return ""
    return f"no worker's heart beat in the last {node.working.silent_s:.0f} s; it is stopped, or starting."
