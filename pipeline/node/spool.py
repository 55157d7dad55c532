"""Where received objects lie: state/spool/<study>/<series>/<object>.dcm under opaque keys, whole or not at all.

A data set is written to a part file while it comes, with its hash. Only when file and folder are on the disk does it get
its name, and a name is never given twice: what lies under it stays as it came. A process that is killed at any moment
leaves part files, which the next start throws away, and whole objects, which the ledger learns of again.
"""

import hashlib
import os
import secrets
import shutil
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from preprocessing.dicom.headers import Header, read_header, text

from .nouns import (
    NO_STUDY,
    NO_UID,
    NOT_READABLE,
    OTHER_BYTES,
    OTHER_OBJECT,
    UID,
    Arrival,
    Keys,
    Place,
    Refused,
)

IMPLEMENTATION = "2.25.283191847261044392610937501846370229467"
"""Of the program that wrote the meta information. It stays for ever: the same object must be the same file in ten years."""

NAMING = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
SERIES = 0x0020000E
HEAD = 1 << 22
"""The last element that is needed to name an object, and the bytes in which it must come: lists of references before it
reach some hundred thousand. Twice as many are inflated of a deflated data set, not more."""

CHUNK = 1 << 20
"""Bytes read at once to hash a file."""


class Part:
    """A data set on its way to the disk. Used by one thread at a time."""

    def __init__(self, path: Path, beginning: bytes) -> None:
        self.path = path
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.write(beginning)

    def write(self, data: bytes | memoryview) -> None:
        """More of it."""
        self.bytes += len(data)
        self._hash.update(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]

    @property
    def sha256(self) -> str:
        """Of what was written so far."""
        return self._hash.hexdigest()

    def finish(self) -> None:
        """All is there, and on the disk."""
        os.fsync(self._file)
        self._close()

    def discard(self) -> None:
        """As if it had never come."""
        self._close()
        self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


@dataclass(frozen=True, kw_only=True)
class Lying:
    """A file of the spool."""

    bytes: int
    moment: datetime
    """When it was written."""


@dataclass(frozen=True, kw_only=True)
class Stock:
    """What lies in the spool, seen at a start."""

    parts: int
    """Part files that were thrown away: nobody was told that they had arrived."""
    files: dict[Place, Lying]
    """Every object, the oldest first."""


class Spool:
    """The folder of received objects. Several threads may use it, and several processes may write into it."""

    def __init__(self, state: Path, keys: Keys) -> None:
        self.folder = state / "spool"
        self.keys = keys
        self._parts = state / "parts"
        """Beside the spool, on the same disk: a name is given by a link."""
        self._safe: set[Path] = set()
        """Folders that are known to be on the disk."""
        for folder in (self.folder, self._parts):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def free_bytes(self) -> int:
        """What a process without privileges may still write."""
        return shutil.disk_usage(self.folder).free

    def begin(self, kind: str, uid: str, syntax: str) -> Part:
        """A part for a data set of that SOP class, UID and transfer syntax, behind the meta information of a file."""
        return Part(self._parts / f"{secrets.token_hex(10)}.part", meta_information(kind, uid, syntax))

    def name(self, part: Part, source: str) -> Arrival:
        """What a finished part is; refused where it cannot be told, or is something else than its meta information says."""
        header = naming_header(part.path)
        announced = {tag: text(header.elements.file_meta, f"MediaStorage{tag}") for tag in NAMING[:2]}
        if any(text(header.elements, tag) != uid for tag, uid in announced.items()):
            raise Refused(OTHER_OBJECT)
        place = self._place(header)
        kind = announced["SOPClassUID"]
        return Arrival(place=place, bytes=part.bytes, sha256=part.sha256, kind=kind, source=source)

    def admit(self, part: Part, arrival: Arrival) -> bool:
        """Give a finished part its name, safely on the disk. False where the same bytes lie there already."""
        path = self.path(arrival.place)
        try:
            is_new = self._link(part.path, path)
            # two callers may bring the same object at once: the first to name it wins, the other must agree with it
            if not is_new and hash_of(path) != arrival.sha256:
                raise Refused(OTHER_BYTES)
        finally:
            part.discard()
        sync(path.parent)  # of one that was there, too: the other caller may not be as far as this
        return is_new

    def path(self, place: Place) -> Path:
        """Where an object lies, or would."""
        return self.folder / place.study / place.series / f"{place.object}.dcm"

    def arrival_at(self, place: Place, source: str = "") -> Arrival:
        """What lies at a place, read anew; refused where the file is not what its place says."""
        path = self.path(place)
        header = naming_header(path)
        if self._place(header) != place:
            raise Refused(OTHER_OBJECT)
        kind = text(header.elements, "SOPClassUID")
        return Arrival(place=place, bytes=path.stat().st_size, sha256=hash_of(path), kind=kind, source=source)

    def uids(self, place: Place) -> dict[str, str]:
        """The true UIDs of an object, to ask a peer about it. They go nowhere else."""
        elements = naming_header(self.path(place)).elements
        return {tag: text(elements, tag) for tag in NAMING}

    def remove(self, place: Place) -> None:
        """An object that is no longer needed; what was removed before is no error."""
        path = self.path(place)
        path.unlink(missing_ok=True)
        for folder in (path.parent, path.parent.parent):
            with suppress(OSError):  # another object lies there, or just came
                folder.rmdir()
                self._safe.discard(folder)

    def set_aside(self, place: Place) -> None:
        """A file that is no longer what it was makes room for the same object, sent again."""
        path = self.path(place)
        if path.exists():
            path.rename(path.with_suffix(".damaged"))

    def take_stock(self) -> Stock:
        """What lies here at a start, when nobody else writes: part files go, whole objects are told."""
        parts = list(self._parts.iterdir())
        for part in parts:
            part.unlink()
        files = sorted(self._objects(), key=lambda lying: lying[1].moment)
        return Stock(parts=len(parts), files=dict(files))

    def _objects(self) -> Iterator[tuple[Place, Lying]]:
        for path in self.folder.glob("*/*/*.dcm"):
            facts = path.stat()
            place = Place(study=path.parts[-3], series=path.parts[-2], object=path.stem)
            yield place, Lying(bytes=facts.st_size, moment=datetime.fromtimestamp(facts.st_mtime, UTC))

    def _place(self, header: Header) -> Place:
        instance, study, series = (text(header.elements, tag) for tag in NAMING[1:])
        if not UID.fullmatch(instance):
            raise Refused(NO_UID)
        if not UID.fullmatch(study) or not UID.fullmatch(series):
            raise Refused(NO_STUDY)
        return Place(study=self.keys.study(study), series=self.keys.series(series), object=self.keys.object(instance))

    def _link(self, part: Path, path: Path) -> bool:
        self._make_safe(path.parent)
        try:
            os.link(part, path)
        except FileExistsError:
            return False
        except FileNotFoundError:  # another object was just removed, and its folder with it
            self._safe.discard(path.parent)
            self._make_safe(path.parent)
            os.link(part, path)
        return True

    def _make_safe(self, folder: Path) -> None:
        """A folder whose name is on the disk too, and its parents' names; else a power cut takes them and all in them."""
        if folder in self._safe and folder.is_dir():
            return
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for parent in (folder.parent, folder.parent.parent):
            sync(parent)
        self._safe.add(folder)


def open_keys(state: Path) -> Keys:
    """The keys of this node, with a secret that is made at the first start and never again."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = state / "secret"
    if not path.exists():
        _write_once(path, secrets.token_bytes(32))
    secret = path.read_bytes()
    if len(secret) != 32:
        raise ValueError(
            f"{path} holds {len(secret)} bytes, not the 32 that this node's keys are made with. Restore it from the backup: "
            "with another secret nothing that was received is found again."
        )
    return Keys(secret)


def _write_once(path: Path, content: bytes) -> None:
    """Whole or not at all, and by one of several starts at once."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(file, content)
        os.fsync(file)
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.close(file)
        draft.unlink()
    sync(path.parent)


def naming_header(path: Path) -> Header:
    """The head of a file, as far as its series; refused where that cannot be read."""
    header = read_header(path, NAMING, last=SERIES, ceiling=HEAD)
    if isinstance(header, str):
        raise Refused(NOT_READABLE)
    return header


def meta_information(kind: str, uid: str, syntax: str) -> bytes:
    """Preamble and group 2 of a DICOM file (PS3.10 7.1). Nothing in it depends on who sent the object, or when."""
    elements = b"".join(
        (
            struct.pack("<HH2sHL", 2, 1, b"OB", 0, 2) + b"\0\1",
            _short_element(0x02, kind),
            _short_element(0x03, uid),
            _short_element(0x10, syntax),
            _short_element(0x12, IMPLEMENTATION),
        )
    )
    return bytes(128) + b"DICM" + struct.pack("<HH2sHL", 2, 0, b"UL", 4, len(elements)) + elements


def _short_element(number: int, uid: str) -> bytes:
    value = uid.encode("ascii")
    value += bytes(len(value) % 2)
    return struct.pack("<HH2sH", 2, number, b"UI", len(value)) + value


def hash_of(path: Path) -> str:
    """The SHA-256 of a file, however large."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(folder: Path) -> None:
    """What names a folder holds is on the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
