"""What the node speaks of: studies, series and objects under opaque keys, what arrived, and why something was refused.

A DICOM UID, a name or any other text of a header never becomes a path, a row or a word in a log. What stands there is a
key: an HMAC under a secret that only this node has, so that nobody who reads a log or a backup of the rows can look a
known UID up in it. The true UIDs are in the spooled files, and are read from there when a peer must be asked.
"""

import hashlib
import hmac
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

KEY_LENGTH = 20
"""Hexadecimal digits of a key, 80 bits: among a thousand million objects two alike are expected once in two million nodes."""

UID = re.compile(r"(?=.{1,64}\Z)[0-9]+(\.[0-9]+)*")
"""What a UID may look like (PS3.5 9.1). Leading zeros are forbidden there and made by so many devices that they pass."""


class Refused(ValueError):
    """Something a peer asked for is not done; `reason` says why, in words that hold no patient data."""

    def __init__(self, reason: "Reason") -> None:
        super().__init__(reason.words)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why something was refused: a code from a closed list, what the peer is told, and the words for people."""

    code: str
    """What tables and metrics count by."""
    status: int
    """Of the DIMSE answer (PS3.4 B.2.3, PS3.7 C); 0 where none is given, for the association ends instead."""
    words: str
    """What was met, what was needed, what to do. The first 64 letters go to the peer as its Error Comment."""


@dataclass(frozen=True)
class Keys:
    """The only place where UIDs become keys."""

    secret: bytes

    def __repr__(self) -> str:
        return "Keys()"

    def study(self, uid: str) -> str:
        """The key of a study."""
        return self._key("study", uid)

    def series(self, uid: str) -> str:
        """The key of a series."""
        return self._key("series", uid)

    def object(self, uid: str) -> str:
        """The key of an object, that is, of a SOP instance."""
        return self._key("object", uid)

    def transaction(self, uid: str) -> str:
        """The key of what a peer asked for and will be answered later."""
        return self._key("transaction", uid)

    def _key(self, kind: str, uid: str) -> str:
        return hmac.new(self.secret, f"{kind} {uid}".encode(), hashlib.sha256).hexdigest()[:KEY_LENGTH]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an object belongs: three keys."""

    study: str
    series: str
    object: str


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One object that lies whole in the spool."""

    place: Place
    bytes: int
    sha256: str
    """Of the file as it lies there."""
    kind: str
    """The UID of its SOP class: what sort of object it is, nothing of whose."""
    source: str
    """The name that the config gives the peer it came from; empty where it gives none."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What has come of a study so far."""

    study: str
    objects: int
    """How many are known, and the number of the last: the first has the number 1."""
    frozen: int
    """How many of them the newest revision holds."""
    revision: int
    """Its number; 0 where there is none."""
    first: datetime
    last: datetime
    """When the first and the last object came."""
    series: dict[str, int]
    """Objects of each series."""


@dataclass(frozen=True, kw_only=True)
class Revision:
    """The objects of a study as they were at one moment. What comes later belongs to the next."""

    study: str
    number: int
    objects: int
    """Those with a number up to this one belong to it."""
    digest: str
    """Of all their keys and hashes: the same objects, the same digest, in whatever order they came."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """An object that is known, and where it lies."""

    arrival: Arrival
    number: int
    """The how-manyth of its study."""
    path: Path


NO_UID = Reason(
    code="no_uid",
    status=0x0117,  # invalid object instance: its UID breaks the rules for UIDs
    words="The SOP Instance UID is none. Digits and dots, at most 64, are needed. Mend the sender.",
)
NOT_READABLE = Reason(
    code="not_readable",
    status=0xC000,
    words="The data set cannot be read up to its series. Send it again, or convert it anew.",
)
NO_STUDY = Reason(
    code="no_study",
    status=0xC001,
    words="Study or series have no valid UID. Both are needed to know what belongs together. Mend the sender.",
)
NO_SCAN = Reason(
    code="no_scan",
    status=0,
    words="A file is no NIfTI, NRRD or MetaImage in one piece. One of these is needed for each channel. Convert it.",
)
FILES_MISSING = Reason(
    code="files_missing",
    status=0,
    words="The files are not one for each channel of the route. Each is needed once, and no other. Name them as channels.",
)
NOT_WANTED = Reason(
    code="not_wanted",
    status=0x0122,  # SOP class not supported
    words="Objects of this class are not taken: no images, or a vendor's own. Send images, or widen `kinds`.",
)
NOT_SPOKEN = Reason(
    code="not_spoken",
    status=0xC122,  # PS3.18 10.5.1: referenced transfer syntax not supported
    words="Nobody here reads that transfer syntax. Send the object uncompressed.",
)
OTHER_STUDY = Reason(
    code="other_study",
    status=0xC002,
    words="The object is of another study than the address names. Send it to the studies as a whole, or to its own.",
)
OTHER_OBJECT = Reason(
    code="other_object",
    status=0xA900,  # data set does not match SOP class
    words="The data set is of another class or UID than announced. Both must agree. Mend the sender.",
)
OTHER_BYTES = Reason(
    code="other_bytes",
    status=0x0111,  # duplicate SOP instance
    words="This SOP Instance UID is here with other content, which is kept. Changed objects need a new UID.",
)
TOO_LARGE = Reason(
    code="too_large",
    status=0,
    words="An object is larger than this node takes. Send smaller ones, or raise object_gb.",
)
NO_ROOM = Reason(
    code="no_room",
    status=0xA700,  # out of resources
    words="The disk is down to its reserve. Send again later, or make room.",
)
NOT_KEPT = Reason(
    code="not_kept",
    status=0xA701,  # out of resources
    words="The object could not be written down safely. Send again later; the node's log says more.",
)
UNKNOWN_CALLER = Reason(
    code="unknown_caller",
    status=0,
    words="A caller is not among the peers, or calls from another address or with another certificate. Name it in the config.",
)
OTHER_CALLED = Reason(
    code="other_called", status=0, words="A caller asked for another AE title than this node's. Correct one of the two."
)
TOO_MANY = Reason(
    code="too_many",
    status=0,
    words="As many associations as this node takes at once are open. Call again, or raise associations.",
)
BROKEN_OFF = Reason(
    code="broken_off",
    status=0,
    words="A sender stopped in the middle of an object, which was thrown away. It will have to send it again.",
)
MISBEHAVED = Reason(
    code="misbehaved",
    status=0,
    words="A caller sent what DICOM does not allow, or more than anybody needs. The association was ended.",
)
NO_SECURITY = Reason(
    code="no_security",
    status=0,
    words="A caller could not show a certificate of the authority, or spoke no TLS. It needs one to be heard.",
)
NO_ADDRESS = Reason(
    code="no_address",
    status=0x0124,  # not authorised
    words="The caller has no address here to send the answer to. Give it host and port in the config.",
)
NOT_ASKED = Reason(
    code="not_asked",
    status=0x0112,  # no such object instance
    words="An answer to a request for commitment came that this node has not made of that peer, or no longer waits for.",
)
NOT_UNDERSTOOD = Reason(
    code="not_understood",
    status=0x0115,  # invalid argument value
    words="The request for commitment names no transaction or no objects. Both are needed. Mend the sender.",
)

REASONS = {
    reason.code: reason
    for reason in (
        NO_UID, NOT_READABLE, NO_STUDY, OTHER_STUDY, NO_SCAN, FILES_MISSING, NOT_WANTED, NOT_SPOKEN,
        OTHER_OBJECT, OTHER_BYTES, TOO_LARGE, NO_ROOM, NOT_KEPT, UNKNOWN_CALLER,
        OTHER_CALLED, TOO_MANY, BROKEN_OFF, MISBEHAVED, NO_SECURITY, NO_ADDRESS, NOT_ASKED, NOT_UNDERSTOOD,
    )
}  # fmt: skip
"""The closed list."""
