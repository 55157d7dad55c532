"""The DICOM listener: C-ECHO, C-STORE and storage commitment, for peers it knows, as long as there is room.

Success is said when file, folder and row are on the disk, and not before. Whatever is refused is refused with a reason
from a closed list, told to the peer, counted in the ledger and logged without a word of a header.
"""

import hashlib
import hmac
import logging
import socket
import ssl
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socketserver import BaseServer
from typing import Any, cast

from pydicom.dataset import Dataset
from pynetdicom import _config, evt
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.events import Event
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from .admission import Admission
from .commitment import Commitments
from .config import GB, Node, Peer
from .contexts import contexts, known, stored
from .intake import PDU_BYTES, Bounds, Intake, Line, Machine, intake_of
from .ledger import Ledger, open_ledger
from .nouns import (
    MISBEHAVED,
    NO_ROOM,
    NO_SECURITY,
    NOT_KEPT,
    NOT_READABLE,
    NOT_UNDERSTOOD,
    OTHER_CALLED,
    TOO_MANY,
    UNKNOWN_CALLER,
    Arrival,
    Reason,
    Refused,
)
from .security import server_side
from .spool import IMPLEMENTATION, Spool, open_keys
from .vouching import Vouchings

logger = logging.getLogger(__name__)

# it logs UIDs, titles and whatever a caller sends; what matters is logged here
logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
_config.LOG_HANDLER_LEVEL = "none"

NOT_THAT_CALLER, NOT_THAT_CALLED = (1, 1, 3), (1, 1, 7)
CONGESTED, LIMIT_REACHED = (2, 3, 1), (2, 3, 2)
"""Result, source and diagnostic of a rejected association (PS3.8 9.3.4): the first two for good, the last two for now."""

UNHEARD = 4
"""Times as many connections as associations may be open, so that some that only say nothing keep nobody out."""


class Listener:
    """A DICOM node that listens from `start` to `stop`."""

    def __init__(
        self,
        node: Node,
        spool: Spool,
        ledger: Ledger,
        *,
        free_bytes: Callable[[], int] | None = None,
        arrived: Callable[[Arrival], None] | None = None,
    ) -> None:
        self.node, self.spool = node, spool
        self.admission = Admission(node, spool, ledger, free_bytes=free_bytes, arrived=arrived)
        self.commitments, self.vouchings = Commitments(node, spool, ledger), Vouchings(ledger, spool.keys)
        self._server: _Server | None = None

    @property
    def port(self) -> int:
        """The port that callers reach it on."""
        assert self._server is not None, "start() comes first"
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Listen from now on."""
        receiving = self.node.receiving
        entity = ApplicationEntity(receiving.aet)
        entity.maximum_pdu_size = PDU_BYTES
        entity.maximum_associations = (
            receiving.associations * UNHEARD * 2
        )  # never reached: we count ourselves, with a reason
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = receiving.silence_s
        entity.implementation_class_uid, entity.implementation_version_name = IMPLEMENTATION, "HILUM"
        self._server = _Server(self, entity)
        threading.Thread(target=self._server.serve_forever, name="listener", daemon=True).start()
        self.commitments.start()
        refused = len(known()) - len(stored(receiving.kinds))
        logger.info(
            "listening on %s:%d%s; %d peers, %d kinds of objects, %d refused",
            *(receiving.host, self.port, " with TLS" if receiving.security else ""),
            *(len(self.node.peers), len(stored(receiving.kinds)), refused),
        )

    def stop(self) -> None:
        """Hear nobody any more. Objects that are half here are thrown away; their senders were not told success."""
        if self._server is not None:
            self._server.close()
        self.commitments.stop()
        self._server = None


@contextmanager
def listening(node: Node) -> Iterator[Listener]:
    """A listener on a node's folder, once what a killed start left behind has been put right."""
    spool, ledger = Spool(node.state, open_keys(node.state)), open_ledger(node.state, node.ledger)
    ledger.reconcile(spool)
    listener = Listener(node, spool, ledger)
    before, threading.excepthook = threading.excepthook, _say_that_a_thread_failed
    try:
        listener.start()
        yield listener
    finally:
        listener.stop()
        ledger.close()
        threading.excepthook = before


def _say_that_a_thread_failed(failed: threading.ExceptHookArgs) -> None:
    """A stack on the screen would quote what a caller sent."""
    logger.error("%s failed (%s)", failed.thread.name if failed.thread else "a thread", failed.exc_type.__name__)


class _Server(ThreadedAssociationServer):
    """A thread per connection, in which TLS is spoken too: pynetdicom would let one silent caller keep all others out."""

    def __init__(self, listener: Listener, entity: ApplicationEntity) -> None:
        receiving = listener.node.receiving
        self.listener = listener
        self.tls = server_side(receiving.security) if receiving.security else None
        self._open: set[_Connection] = set()
        self._heard: set[_Connection] = set()
        self._lock = threading.Lock()
        address = (receiving.host, receiving.port)
        super().__init__(entity, address, receiving.aet, contexts(receiving.kinds), request_handler=_Connection)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether one more connection is spoken with at all."""
        if len(self._open) < self.listener.node.receiving.associations * UNHEARD:
            return True
        self.listener.admission.refuse(TOO_MANY, "")
        return False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One connection that fails is its own affair. A trace would quote what was sent."""
        kind = sys.exc_info()[0]
        logger.error("a connection failed (%s)", kind.__name__ if kind else "unknown")

    def enter(self, connection: "_Connection") -> None:
        """A connection that may ask for an association."""
        with self._lock:
            self._open.add(connection)

    def hear(self, connection: "_Connection") -> bool:
        """Whether it gets one, as far as their number goes."""
        with self._lock:
            if len(self._heard) >= self.listener.node.receiving.associations:
                return False
            self._heard.add(connection)
            return True

    def leave(self, connection: "_Connection") -> None:
        """It hung up."""
        with self._lock:
            self._open.discard(connection)
            self._heard.discard(connection)

    def close(self) -> None:
        """No new callers, and an end to those at hand; back when no thread of it is left."""
        BaseServer.shutdown(self)
        with self._lock:
            still_open = tuple(self._open)
        for connection in still_open:
            connection.hang_up()
        self.server_close()


class _Connection(RequestHandler):
    """One caller, from its first byte to its last."""

    server: _Server
    request: socket.socket

    def setup(self) -> None:
        """Before a word is spoken."""
        self.source = ""
        self._association: Association | None = None
        self._was_asked = False
        """Whether it made itself understood so far as to ask for an association."""
        self._stored, self._bytes, self._refused = 0, 0, Counter[str]()
        self._listener = self.server.listener
        self._receiving = self._listener.node.receiving
        self.request.settimeout(self._receiving.silence_s)

    def handle(self) -> None:
        """Speak with it until one of the two hangs up; then nothing of a half object is left."""
        self.server.enter(self)
        try:
            if self.server.tls is not None:
                self.request = self.server.tls.wrap_socket(self.request, server_side=True)
            self._speak()
        except OSError as error:  # ssl.SSLError is one
            logger.info("a caller from %s was not understood (%s)", self.client_address[0], type(error).__name__)
            self._refuse(NO_SECURITY if self.server.tls is not None else MISBEHAVED)
        finally:
            self.server.leave(self)
            self.server.shutdown_request(self.request)
            self._say_what_came()

    def hang_up(self) -> None:
        """End it from outside."""
        if self._association is not None and self._association.is_established:
            self._association.abort()
        with suppress(OSError):
            self.request.shutdown(socket.SHUT_RDWR)

    def _speak(self) -> None:
        self._association = association = self._create_association()
        line = cast(Line, association.dul.socket)
        association.start()
        association.join()
        association.dul.kill_dul()
        association.dul.join()
        intake_of(association).close()
        is_broken = cast(Machine, association.dul.state_machine).is_broken
        if is_broken or (not self._was_asked and line.has_spoken):
            self._refuse(MISBEHAVED)

    def _create_association(self) -> Association:
        association = super()._create_association()
        # the connection it made reads without bounds; each new one announces itself to the state machine
        association.dul.event_queue.get_nowait()
        association.dul.socket = None
        association.set_socket(Line(association, client_socket=self.request))
        association.dul.state_machine = Machine(association.dul)
        bounds = Bounds(object_bytes=int(self._receiving.object_gb * GB), has_room=self._listener.admission.has_room)
        association.dimse = Intake(association, self._listener.spool, bounds, self._refuse)
        association.bind(evt.EVT_REQUESTED, self._answer)
        association.bind(evt.EVT_C_ECHO, _echo)
        association.bind(evt.EVT_C_STORE, self._store)
        association.bind(evt.EVT_N_ACTION, self._commit)
        association.bind(evt.EVT_N_EVENT_REPORT, self._hear)
        return association

    def _answer(self, event: Event) -> None:
        """Reject the association where there is a reason to; else it is negotiated."""
        asked = event.assoc.requestor.primitive
        self._was_asked = isinstance(asked, A_ASSOCIATE)
        if not isinstance(asked, A_ASSOCIATE):  # it hung up before it asked
            event.assoc.is_aborted = True
            event.assoc.kill()
            return
        no = self._why_not(asked)
        if no is not None:
            reason, result = no
            self._refuse(reason)
            event.assoc.acse.send_reject(*result)
            event.assoc.kill()

    def _why_not(self, asked: A_ASSOCIATE) -> tuple[Reason, tuple[int, int, int]] | None:
        caller = self._listener.node.peer_called(str(asked.calling_ae_title or ""))
        self.source = caller[0] if caller else ""
        if str(asked.called_ae_title or "").strip() != self._receiving.aet.strip():
            return OTHER_CALLED, NOT_THAT_CALLED
        if caller is None and not self._receiving.strangers:
            return UNKNOWN_CALLER, NOT_THAT_CALLER
        if caller is not None and not self._is_who_it_says(caller[1]):
            return UNKNOWN_CALLER, NOT_THAT_CALLER
        if not self._listener.admission.has_room():
            return NO_ROOM, CONGESTED
        if not self.server.hear(self):
            return TOO_MANY, LIMIT_REACHED
        return None

    def _is_who_it_says(self, peer: Peer) -> bool:
        """An AE title is no proof: anybody may say one."""
        if peer.calls_from and self.client_address[0] not in peer.calls_from:
            return False
        if not peer.certificate:
            return True
        shown = self.request.getpeercert(binary_form=True) if isinstance(self.request, ssl.SSLSocket) else None
        wanted = peer.certificate.replace(":", "").lower()
        return shown is not None and hmac.compare_digest(hashlib.sha256(shown).hexdigest(), wanted)

    def _store(self, event: Event) -> Dataset:
        name = cast(C_STORE, event.request)._dataset_path
        try:
            if not isinstance(name, Path):
                raise Refused(NOT_READABLE)  # a request without a data set
            incoming = intake_of(event.assoc).come(name)
            if incoming.part is None:
                raise Refused(incoming.refusal or NOT_KEPT)
            arrival = self._listener.admission.take(incoming.part, self.source)
        except Refused as refused:
            return self._refused_with(refused.reason)
        except Exception as error:  # whatever the disk or the ledger say: the sender must not believe that it is safe
            logger.error("an object was not kept (%s)", type(error).__name__)
            return self._refused_with(NOT_KEPT)
        self._stored, self._bytes = self._stored + 1, self._bytes + arrival.bytes
        return _status(0x0000)

    def _commit(self, event: Event) -> tuple[Dataset, None]:
        asked = self._listener.commitments.ask
        return self._taken(lambda: asked(event.action_information, self.source), "a request for commitment")

    def _hear(self, event: Event) -> tuple[Dataset, None]:
        """A target's answer whether it keeps our results."""
        hear = self._listener.vouchings.hear
        return self._taken(lambda: hear(event.event_information, self.source), "an answer about commitment")

    def _taken(self, take: Callable[[], None], what: str) -> tuple[Dataset, None]:
        try:
            take()
        except Refused as refused:
            return self._refused_with(refused.reason), None
        except Exception as error:  # a data set of a caller's making can be wrong in any way
            logger.error("%s was not kept (%s)", what, type(error).__name__)
            return self._refused_with(NOT_UNDERSTOOD), None
        return _status(0x0000), None

    def _refused_with(self, reason: Reason) -> Dataset:
        self._refuse(reason)
        return _status(reason.status, reason.words)

    def _refuse(self, reason: Reason) -> None:
        self._refused[reason.code] += 1
        self._listener.admission.refuse(reason, self.source)

    def _say_what_came(self) -> None:
        if self._stored or self._refused:
            refused = ", ".join(f"{code} {count}" for code, count in sorted(self._refused.items())) or "none"
            logger.info(
                "from %s: %d objects, %d bytes; refused: %s",
                *(self.source or "nobody we know", self._stored, self._bytes, refused),
            )


def _echo(event: Event) -> int:
    return 0x0000


def _status(status: int, words: str = "") -> Dataset:
    answer = Dataset()
    answer.Status = status
    if words:
        answer.ErrorComment = words[:COMMENT_LETTERS]
    return answer


COMMENT_LETTERS = 64
"""Of an Error Comment, which is an LO (PS3.5 6.2)."""
