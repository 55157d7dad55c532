"""DICOMweb's way in, STOW-RS (PS3.18 10.5): objects in a multipart body, each to the spool as it comes, as by C-STORE.

What is answered as stored is on the disk and written down; whatever is refused is named with its reason. Nothing of a body
is held but the head of the object at hand.
"""

import json
import logging
import struct
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from .admission import Admission
from .bodies import Malformed, Multipart, media_type, pour
from .config import GB
from .contexts import SYNTAXES, stored
from .desk import Desk
from .guard import Caller, demand
from .intake import ROOM_EVERY
from .nouns import (
    BROKEN_OFF,
    MISBEHAVED,
    NO_ROOM,
    NO_STUDY,
    NO_UID,
    NOT_KEPT,
    NOT_READABLE,
    NOT_SPOKEN,
    NOT_WANTED,
    TOO_LARGE,
    TOO_MANY,
    UID,
    Reason,
    Refused,
)
from .spool import Part

logger = logging.getLogger(__name__)

OBJECTS_AT_MOST = 20_000
"""Of one request: the largest CT studies have some thousand slices, and the answer names each."""
META_BYTES = 1 << 16
"""In which the meta information of a file must be through; it has some hundred."""
JSON = "application/dicom+json"
ANSWERED = {"", "*/*", "application/*", "application/json", JSON}
"""What a caller may want the answer to be."""
AGAIN_SECONDS = 60
"""After so long who was refused for want of room or places may ask again."""


def routes(desk: Desk) -> list[Route]:
    """The two addresses that objects are stored at."""
    kinds = frozenset(stored(desk.node.receiving.kinds))
    door = Door(desk=desk, admission=Admission(desk.node, desk.spool, desk.ledger), kinds=kinds)
    return [
        Route("/dicom-web/studies", door.store, methods=["POST"]),
        Route("/dicom-web/studies/{study}", door.store, methods=["POST"]),
    ]


@dataclass(kw_only=True, eq=False)
class Door:
    """Where objects come in, some requests at once."""

    desk: Desk
    admission: Admission
    kinds: frozenset[str]
    inside: int = 0
    """Requests under way."""

    async def store(self, request: Request) -> Response:
        """One request with many objects."""
        caller = demand(request, "sender")
        source = caller.name if caller.name in self.desk.node.peers else ""
        boundary = _boundary(request)
        study = await run_in_threadpool(self._study, request.path_params.get("study"), source)
        if not await run_in_threadpool(self.admission.has_room):
            raise self._later(NO_ROOM, source)
        if self.inside >= self.desk.node.receiving.associations:
            raise self._later(TOO_MANY, source)
        self.inside += 1
        try:
            return await self._stored(request, boundary, Objects(self.admission, source, study, self.kinds), caller)
        finally:
            self.inside -= 1

    async def _stored(self, request: Request, boundary: str, objects: "Objects", caller: Caller) -> Response:
        silence_s = self.desk.node.receiving.silence_s
        trouble: Reason | None = None
        try:
            body = Multipart(boundary=boundary, sink=objects, most=OBJECTS_AT_MOST)
            await pour(request, body.feed, silence_s)
            body.close()
        except (ClientDisconnect, TimeoutError):
            trouble = BROKEN_OFF
        except Malformed:
            trouble = MISBEHAVED
        except _TooLarge:
            trouble = TOO_LARGE
        finally:
            objects.drop()  # at once, whatever it was: the server may be stopping
        if trouble:
            await run_in_threadpool(objects.break_off, trouble)
        objects.say(caller.name)
        return objects.answer(trouble)

    def _study(self, uid: str | None, source: str) -> str:
        """The key of the study that the address names; empty where it names none."""
        if uid is None:
            return ""
        if not UID.fullmatch(uid):
            self.admission.refuse(NO_STUDY, source)
            raise HTTPException(400, NO_STUDY.words)
        return self.desk.spool.keys.study(uid)

    def _later(self, reason: Reason, source: str) -> HTTPException:
        self.admission.refuse(reason, source)
        return HTTPException(503, reason.words, {"Retry-After": str(AGAIN_SECONDS), "Connection": "close"})


def _boundary(request: Request) -> str:
    wanted = {part.partition(";")[0].strip() for part in request.headers.get("accept", "").lower().split(",")}
    if not wanted & ANSWERED:
        raise HTTPException(406, f"The answer is {JSON}, and nothing else. Accept that.")
    kind, said = media_type(request.headers.get("content-type", ""))
    if kind != "multipart/related" or said.get("type", "application/dicom").lower() != "application/dicom":
        raise HTTPException(
            415, 'A body of multipart/related; type="application/dicom" is needed. Send DICOM files so.'
        )
    return said.get("boundary", "")


class _TooLarge(Exception):
    """One object is larger than this node takes; its rest is not read."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What the meta information of a DICOM file says of the object behind it."""

    kind: str
    uid: str
    syntax: str
    bytes: int
    """Its own length: there the object begins."""


@dataclass(eq=False)
class Objects:
    """The objects of one request: each goes to the spool while it comes."""

    admission: Admission
    source: str
    study: str
    kinds: frozenset[str]
    """Classes that are taken."""
    kept: list[Meta] = field(default_factory=list)
    failed: list[tuple[Meta | None, Reason]] = field(default_factory=list)
    came: int = 0
    """Bytes of the object at hand."""
    _head: bytes = b""
    _meta: Meta | None = None
    _part: Part | None = None
    _refusal: Reason | None = None
    _is_open: bool = False
    _looked_at: int = 0

    def begin(self, headers: dict[str, str]) -> None:
        """A part of the body."""
        self._head, self._meta, self._part, self._refusal, self._is_open = b"", None, None, None, True
        self.came = self._looked_at = 0
        if media_type(headers.get("content-type", "application/dicom"))[0] != "application/dicom":
            self._refusal = NOT_READABLE

    def write(self, data: bytes) -> None:
        """More of it."""
        self.came += len(data)
        if self.came > self.admission.node.receiving.object_gb * GB:
            raise _TooLarge
        if self._refusal is None and self._meta is None:
            self._head += data
            data = self._begun()
        if self._part is not None and data:
            self._keep(self._part, data)

    def end(self) -> None:
        """It is whole: admitted, or refused with its reason."""
        self._is_open = False
        if self._meta is None or self._part is None:
            return self._fail(self._refusal or NOT_READABLE)
        try:
            self.admission.take(self._part, self.source, self.study)
        except Refused as refused:
            return self._fail(refused.reason)
        except Exception as error:  # whatever the disk or the ledger say: the sender must not believe that it is safe
            logger.error("an object was not kept (%s)", type(error).__name__)
            return self._fail(NOT_KEPT)
        self.kept.append(self._meta)

    def drop(self) -> None:
        """What is half here goes."""
        if self._is_open and self._part is not None:
            self._part.discard()

    def break_off(self, reason: Reason) -> None:
        """Nothing more comes."""
        if self._is_open:
            self._is_open = False
            self._fail(reason)
        else:
            self.admission.refuse(reason, self.source)

    def _begun(self) -> bytes:
        """A part in the spool, once the meta information is through; what came behind it."""
        try:
            meta = meta_of(self._head)
        except Refused as refused:
            self._refusal = refused.reason
            return b""
        if meta is None:
            return b""
        data, self._head, self._meta = self._head[meta.bytes :], b"", meta
        self._refusal = self._why_not(meta)
        if self._refusal is None:
            try:
                self._part = self.admission.spool.begin(meta.kind, meta.uid, meta.syntax)
            except OSError as error:
                logger.error("no part file can be begun: %s", error.strerror)
                self._refusal = NOT_KEPT
        return data

    def _why_not(self, meta: Meta) -> Reason | None:
        if not UID.fullmatch(meta.uid) or not UID.fullmatch(meta.kind):
            return NO_UID
        if meta.kind not in self.kinds:
            return NOT_WANTED
        if meta.syntax not in SYNTAXES:
            return NOT_SPOKEN
        return None if self.admission.has_room() else NO_ROOM

    def _keep(self, part: Part, data: bytes) -> None:
        if self.came - self._looked_at > ROOM_EVERY:
            self._looked_at = self.came
            if not self.admission.has_room():
                return self._throw_away(part, NO_ROOM)
        try:
            part.write(data)
        except OSError as error:  # the disk is full, or gone
            logger.error("a part file cannot be written: %s", error.strerror)
            self._throw_away(part, NOT_KEPT)

    def _throw_away(self, part: Part, reason: Reason) -> None:
        part.discard()
        self._part, self._refusal = None, reason

    def _fail(self, reason: Reason) -> None:
        if self._part is not None:
            self._part.discard()
        self.failed.append((self._meta, reason))
        self.admission.refuse(reason, self.source)

    def say(self, caller: str) -> None:
        """In the log: numbers and codes."""
        codes = sorted(reason.code for _, reason in self.failed)
        refused = ", ".join(f"{code} {codes.count(code)}" for code in dict.fromkeys(codes)) or "none"
        logger.info("by STOW from %s: %d objects; refused: %s", self.source or caller, len(self.kept), refused)

    def answer(self, trouble: Reason | None) -> Response:
        """What became of each (PS3.18 10.5.3, PS3.18 I.2.2)."""
        status = 200 if not self.failed else 202 if self.kept else 409
        if trouble or not (self.kept or self.failed):
            status = {TOO_LARGE: 413, BROKEN_OFF: 408}.get(trouble or MISBEHAVED, 400)
        told: dict[str, Any] = {"00081190": {"vr": "UR"}}  # nothing is retrieved from here
        failed = [{**_named(meta), **_why(reason)} for meta, reason in self.failed if meta]
        others = [_why(reason) for meta, reason in self.failed if not meta]
        kept = [{**_named(meta), "00081190": {"vr": "UR"}} for meta in self.kept]
        for tag, those in (("00081198", failed), ("00081199", kept), ("0008119A", others)):
            if those:
                told[tag] = {"vr": "SQ", "Value": those}
        more = {"Connection": "close"} if trouble else {}
        return Response(json.dumps(told), status, {"Cache-Control": "no-store", **more}, media_type=JSON)


def _named(meta: Meta) -> dict[str, Any]:
    return {"00081150": {"vr": "UI", "Value": [meta.kind]}, "00081155": {"vr": "UI", "Value": [meta.uid]}}


PROCESSING_FAILURE = 0x0110
"""PS3.7 C.4.1: what has no number of its own."""


def _why(reason: Reason) -> dict[str, Any]:
    return {"00081197": {"vr": "US", "Value": [reason.status or PROCESSING_FAILURE]}}


LONG = (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UC", b"UN", b"UR", b"UT", b"SV", b"UV")
"""Kinds of elements whose length has four bytes (PS3.5 7.1.2)."""


def meta_of(head: bytes) -> Meta | None:
    """Of a file that begins so; None where more of it must come first, refused where it is none (PS3.10 7.1)."""
    found: dict[int, str] = {}
    if len(head) >= 132 and head[128:132] != b"DICM":
        raise Refused(NOT_READABLE)
    at, until = 132, META_BYTES + 132
    while at + 8 <= len(head):
        group, number = struct.unpack_from("<HH", head, at)
        if group != 2 or at >= until:  # what is deflated may begin with any number
            return _meta(found, at)
        is_long = head[at + 4 : at + 6] in LONG
        if is_long and at + 12 > len(head):
            break
        length = struct.unpack_from("<L", head, at + 8)[0] if is_long else struct.unpack_from("<H", head, at + 6)[0]
        begin = at + (12 if is_long else 8)
        value, at = head[begin : begin + length], begin + length
        found[number] = value.rstrip(b"\0 ").decode("latin-1")
        if number == 0 and len(value) == 4:
            until = at + struct.unpack("<L", value)[0]
        if at > META_BYTES:
            raise Refused(NOT_READABLE)
    if len(head) > META_BYTES:
        raise Refused(NOT_READABLE)
    return None


def _meta(found: dict[int, str], at: int) -> Meta:
    if not all(found.get(number) for number in (0x02, 0x03, 0x10)):
        raise Refused(NOT_READABLE)
    return Meta(kind=found[0x02], uid=found[0x03], syntax=found[0x10], bytes=at)
