"""How data sets come from the wire to the disk: in pieces, hashed on the way, bounded in memory, bytes and time.

pynetdicom speaks the protocol. What it leaves open is closed here, each with the reason beside it: it reads a PDU of any
length a caller announces into memory, waits for ever in the middle of one, gathers commands and data sets without limit,
and writes chunks to the machine's temporary folder, where they stay when an association ends.
"""

import itertools
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, cast

from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.fsm import StateMachine
from pynetdicom.pdu_primitives import A_P_ABORT, P_DATA
from pynetdicom.transport import AssociationSocket

from .nouns import BROKEN_OFF, MISBEHAVED, NO_ROOM, NO_UID, NOT_KEPT, OTHER_OBJECT, TOO_LARGE, UID, Reason
from .spool import Part, Spool

logger = logging.getLogger(__name__)

PDU_BYTES = 131_072
"""The longest PDU we ask for: what dcmtk's tools send at the most. Longer ones save nothing, shorter ones cost time."""

ANY_PDU_BYTES = 1 << 20
"""The longest that is read at all. A request of 128 contexts with all transfer syntaxes has 200,000 bytes."""

COMMAND_BYTES = 1 << 16
"""Of one command. The longest of DICOM, with every optional element, has some hundred."""

REQUEST_BYTES = 1 << 24
"""Of a data set that is no object, so is held in memory: a request for commitment of 100,000 objects has 14 million."""

AHEAD = 8
"""Requests that a caller may send before it is answered. DICOM says one, unless more are agreed on, which we never do."""

NO_DATA_SET = 0x0101
"""Of a command that no data set follows (PS3.7 E.1)."""

NEEDED = ("MessageID", "Priority", "AffectedSOPClassUID", "AffectedSOPInstanceUID")
"""In every request to store (PS3.7 9.3.1.1)."""

ROOM_EVERY = 1 << 26
"""Bytes of one object after which the disk is looked at again; less than any reserve."""


@dataclass
class Incoming:
    """An object that is coming, or came; or why it is not kept, while its bytes are still read so that it can be told."""

    name: Path
    """By what the message and this are matched; the part's file, where there is one."""
    part: Part | None = None
    refusal: Reason | None = None
    bytes: int = 0
    looked_at: int = 0
    """How many bytes there were when the disk was last looked at."""

    def refuse(self, reason: Reason) -> None:
        """Throw away what came so far."""
        self.refusal = reason
        if self.part is not None:
            self.part.discard()
            self.part = None


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What one object may take."""

    object_bytes: int
    has_room: Callable[[], bool]


class Line(AssociationSocket):
    """A connection that reads no more than a PDU may have, in large pieces, and not for ever."""

    seconds: float = 120.0
    """In which a PDU must be through: a thousand bytes per second are slower than any line, and the timeout of a single
    read alone would let a caller hold on for weeks, byte by byte."""
    has_spoken: bool = False
    """Whether the other side ever said anything."""
    left: int | None = None
    """Bytes that are still read after the association was aborted: what was under way already, not an endless rest."""

    def recv(self, nr_bytes: int) -> bytearray:
        """So many bytes, or as many as came before the other side hung up; OSError where they are too many or too late."""
        if nr_bytes > ANY_PDU_BYTES:
            raise ConnectionError("a longer PDU was announced than any that is needed")
        if self.left is not None:
            self.left -= nr_bytes
            if self.left < 0:
                raise ConnectionError("the other side goes on after the association was aborted")
        pieces, came, until = bytearray(nr_bytes), 0, monotonic() + self.seconds
        view = memoryview(pieces)
        while came < nr_bytes:
            more = cast(socket.socket, self.socket).recv_into(view[came:])
            if not more:
                view.release()
                return pieces[:came]
            if monotonic() > until:
                raise TimeoutError("a PDU came too slowly")
            came, self.has_spoken = came + more, True
        return pieces


class Machine(StateMachine):
    """The states of a connection. What it cannot bear ends the connection, and not the thread with the caller's words on
    the screen: titles that are none, for one, make pynetdicom raise here."""

    def do_action(self, event: str) -> None:
        """One step."""
        has_left = event == "Evt17" and self.current_state == "Sta2"  # it closed the connection before it asked
        try:
            super().do_action(event)
        except Exception as error:  # of bytes of a caller's making
            logger.warning("what a caller said could not be read (%s)", type(error).__name__)
            self.dul.kill_dul()
            if self.dul.socket is not None:
                self.dul.socket._shutdown_socket()
            self.is_broken = has_left = True
        if has_left:  # else its thread would wait for a word of it until the silence is too long
            self.dul.to_user_queue.put(A_P_ABORT())

    is_broken: bool = False


class Intake(DIMSEServiceProvider):
    """Puts messages together as pynetdicom does, but for data sets of C-STORE, which go to the spool as they come."""

    def __init__(
        self, association: Association, spool: Spool, bounds: Bounds, refuse: Callable[[Reason], None]
    ) -> None:
        super().__init__(association)
        self._spool, self._bounds, self._refuse = spool, bounds, refuse
        self._now: Incoming | None = None
        self._gathered = 0
        """Bytes of the message at hand that are in memory."""
        self._is_over = False
        self._come: dict[Path, Incoming] = {}
        self._numbers = itertools.count()

    def receive_primitive(self, primitive: P_DATA) -> None:
        """Called for each PDU. What is not allowed ends the association."""
        for context, value in primitive.presentation_data_value_list:
            if not self._is_over:
                try:
                    self._take(context, value)
                except Exception as error:  # pydicom lets any exception out of damaged commands
                    logger.warning("a message could not be read (%s)", type(error).__name__)
                    self._end(MISBEHAVED)

    def come(self, name: Path) -> Incoming:
        """The object of a message that is whole; it is the caller's from now on."""
        return self._come.pop(name)

    def close(self) -> None:
        """The association is over: what was not handed on is thrown away."""
        self._is_over = True
        if self._now is not None:
            self._now.refuse(BROKEN_OFF)
            self._refuse(BROKEN_OFF)
        for left in self._come.values():
            self._refuse(left.refusal or BROKEN_OFF)
            left.refuse(BROKEN_OFF)
        self._now, self._come = None, {}

    def _take(self, context: int, value: bytes) -> None:
        if not value:
            return self._end(MISBEHAVED)
        is_command, is_last = bool(value[0] & 1), bool(value[0] & 2)
        if is_command or self._now is None:
            return self._gather(context, value, is_command, is_last)
        if reason := self._keep(self._now, memoryview(value)[1:]):
            return self._end(reason)
        if is_last:
            self._hand_on(context, value[:1])

    def _gather(self, context: int, value: bytes, is_command: bool, is_last: bool) -> None:
        """Pieces of commands, and of data sets that are no objects."""
        self._gathered += len(value)
        if self._gathered > (COMMAND_BYTES if is_command else REQUEST_BYTES) or self._now is not None:
            return self._end(MISBEHAVED)
        if max(self.msg_queue.qsize(), len(self._come)) >= AHEAD:
            return self._end(MISBEHAVED)
        self._pass_on(context, value)
        message = self.message
        if message is None:
            self._gathered = 0
        elif is_last and (not is_command or message.command_set.get("CommandDataSetType") == NO_DATA_SET):
            self._end(MISBEHAVED)  # it is whole, and was not understood
        elif isinstance(message, C_STORE_RQ):
            if any(message.command_set.get(name) in (None, "") for name in NEEDED):
                return self._end(MISBEHAVED)  # pynetdicom would pass it over without an answer
            self._now = self._begin(context, message.command_set)

    def _begin(self, context: int, command: Any) -> Incoming:
        """Where the data set that follows this command goes."""
        kind, uid = (str(command.get(f"AffectedSOP{what}UID") or "") for what in ("Class", "Instance"))
        accepted = self.assoc._accepted_cx.get(context)
        if accepted is None or not UID.fullmatch(uid) or not UID.fullmatch(kind):
            return self._unwanted(NO_UID)
        if kind != accepted.abstract_syntax:  # else a report would come in where only images were agreed on
            return self._unwanted(OTHER_OBJECT)
        if not self._bounds.has_room():
            return self._unwanted(NO_ROOM)
        try:
            part = self._spool.begin(kind, uid, str(accepted.transfer_syntax[0]))
        except OSError as error:
            logger.error("no part file can be begun: %s", error.strerror)
            return self._unwanted(NOT_KEPT)
        return Incoming(name=part.path, part=part)

    def _unwanted(self, reason: Reason) -> Incoming:
        return Incoming(name=Path(f"unwanted-{next(self._numbers)}"), refusal=reason)

    def _keep(self, incoming: Incoming, data: memoryview) -> Reason | None:
        """To the disk with it; the reason where the association must end."""
        incoming.bytes += len(data)
        if incoming.bytes > self._bounds.object_bytes:
            return TOO_LARGE
        if incoming.bytes - incoming.looked_at > ROOM_EVERY:
            incoming.looked_at = incoming.bytes
            if incoming.part is not None and not self._bounds.has_room():
                incoming.refuse(NO_ROOM)
        if incoming.part is not None:
            try:
                incoming.part.write(data)
            except OSError as error:  # the disk is full, or gone
                logger.error("a part file cannot be written: %s", error.strerror)
                incoming.refuse(NOT_KEPT)
        return None

    def _hand_on(self, context: int, last: bytes) -> None:
        """The message is whole: pynetdicom gets it with the name of the part, and without a data set."""
        assert self._now is not None and self.message is not None
        incoming, self._now, self._gathered = self._now, None, 0
        self._come[incoming.name] = incoming
        self.message._data_set_path = incoming.name
        self._pass_on(context, last)
        if self.message is not None:  # its command was not understood after all, so nobody will ask for it
            self._end(incoming.refusal or MISBEHAVED)

    def _pass_on(self, context: int, value: bytes) -> None:
        primitive = P_DATA()
        primitive.presentation_data_value_list = [[context, value]]  # it refuses tuples
        super().receive_primitive(primitive)

    def _end(self, reason: Reason) -> None:
        """No more of this: the reason is counted, and the association aborted."""
        self._is_over = True
        self._refuse(reason)
        if self._now is not None:
            self._now.refuse(reason)
            self._now = None
        if isinstance(self.dul.socket, Line):
            self.dul.socket.left = ANY_PDU_BYTES
        self.dul.event_queue.put("Evt19")  # PS3.8 9.2: an invalid PDU came; the state machine sends A-ABORT


def intake_of(association: Association) -> Intake:
    """Of an association that this listener made."""
    assert isinstance(association.dimse, Intake)
    return association.dimse
