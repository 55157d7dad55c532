"""Watched folders: whatever scan is put into one is claimed, handed in, and its results put beside it. Once, whatever dies.

The names in such a folder are its user's, and stay there: beside a claimed case lies a note with its name, under a ticket of
random letters, and nothing else of the node ever says it. Every move is a rename, and the next one begins from what lies
there: whoever is killed between two goes on with the second.
"""

import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import signal
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from preprocessing.records import decode

from ..report import recover, swap
from .config import GB, Inbox
from .desk import Desk
from .nouns import FILES_MISSING, NO_SCAN, Reason, Refused
from .spool import sync
from .stories import ENDED

logger = logging.getLogger(__name__)

TAKEN, NOTE, MARK = ".taken", "case.json", "submission.json"
ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")
"""Of scans in one file. What ends otherwise, as half copies of most programs do, is left alone."""
NUMBERED = re.compile(r"(.+)_(\d{4})")
"""As nnU-Net names the channels of a case."""
NAME_BYTES = 200
"""Of a folder of results: a file system takes 255, and what is being made has some more."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What lies in the folder under one name."""

    name: str
    entries: tuple[str, ...]
    """What is moved: one folder, or a file per channel."""
    files: dict[str, str]
    """Below the watched folder, by channel."""
    missing: bool = False
    """Whether there is not yet one file for each channel."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """What is kept of a case that was claimed."""

    name: str
    entries: tuple[str, ...]
    files: dict[str, str]
    missing: bool = False
    submission: str = ""
    """Its key, once it is safe."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """In a folder of results: whose they are."""

    submission: str
    """The key that the node knows it by."""
    ticket: str
    state: str


class Inboxes:
    """All watched folders of a node. One thread looks at them again and again."""

    def __init__(self, desk: Desk) -> None:
        self.watched = [Watched(name=name, inbox=inbox, desk=desk) for name, inbox in desk.node.inboxes.items()]

    def look(self) -> None:
        """Once over each; a network drive that is away does not keep the others waiting."""
        for one in self.watched:
            trouble = ""
            try:
                one.look()
            except OSError as error:  # its words would quote a name
                trouble = f"{type(error).__name__} {error.errno or ''}".strip()
            if trouble != one.trouble:
                logger.log(
                    *(logging.ERROR if trouble else logging.INFO, "inbox %s: %s", one.name, trouble or "well again")
                )
            one.trouble = trouble


@dataclass(kw_only=True, eq=False)
class Watched:
    """One folder."""

    name: str
    inbox: Inbox
    desk: Desk
    trouble: str = ""
    """What was the matter at the last look."""
    seen: dict[str, "Look"] = field(default_factory=dict)
    """How each case lay there, and since when."""

    @property
    def results(self) -> Path:
        return self.inbox.results or self.inbox.folder / "results"

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(self.desk.node.routes[self.inbox.route].take)

    def look(self) -> None:
        """Go on with what was claimed, then claim what is whole, as long as there is room for it."""
        troubles: list[OSError] = []
        for ticket in self._tickets():
            with _gathered(troubles):
                self._go_on(ticket)
        has_room = self.desk.spool.free_bytes() > self.desk.node.receiving.reserve_gb * GB
        cases = list(cases_in(self.inbox.folder, self.channels, self.results))
        self.seen = {case.name: self._seen(case) for case in cases}
        for case in cases:
            with _gathered(troubles):
                if has_room and self._is_to_be_claimed(case):
                    self._go_on(self._claim(case))
        if troubles:
            raise troubles[0]

    # what lies there

    def _seen(self, case: Case) -> "Look":
        lies = tuple(_lying(self.inbox.folder, case))
        before, now = self.seen.get(case.name), time.monotonic()
        return before if before and before.lies == lies else Look(lies=lies, since=now)

    def _is_to_be_claimed(self, case: Case) -> bool:
        look = self.seen[case.name]
        silent = time.monotonic() - look.since
        if silent < (self.inbox.cap_s if case.missing else self.inbox.settled_s):
            return False
        return not any(is_being_written(self.inbox.folder / path) for path in case.files.values())

    # what was claimed

    def _tickets(self) -> list[Path]:
        taken = self.inbox.folder / TAKEN
        return sorted(path for path in taken.iterdir() if path.is_dir()) if taken.is_dir() else []

    def _claim(self, case: Case) -> Path:
        """The note comes first: from then on it is known what belongs together."""
        ticket = self.inbox.folder / TAKEN / secrets.token_hex(8)
        (ticket / "in").mkdir(parents=True)
        _write(ticket, Note(**asdict(case)))
        self._move(ticket, case.entries)
        self.seen.pop(case.name, None)
        return ticket

    def _move(self, ticket: Path, entries: tuple[str, ...]) -> None:
        for entry in entries:
            with suppress(FileNotFoundError):  # moved already, or taken back
                (self.inbox.folder / entry).rename(ticket / "in" / entry)
        sync(ticket / "in")

    def _go_on(self, ticket: Path) -> None:
        if ticket.name.startswith("."):
            _remove(ticket)
            return
        note, is_empty = _read(ticket), not (ticket / "in").is_dir() or not any((ticket / "in").iterdir())
        if is_empty and (
            note is None or not note.submission
        ):  # killed before the first move: the case lies there still
            _remove(ticket)
            return
        if note is None:  # we put it there first, and take it away last
            raise OSError("a claimed case has lost its note; its files are left alone")
        self._move(ticket, tuple(entry for entry in note.entries if not (ticket / "in" / entry).exists()))
        if not note.submission:
            try:
                note = replace(note, submission=self._handed_in(ticket, note))
            except Refused as refused:
                self._deliver_refusal(ticket, note, refused.reason)
                return
            _write(ticket, note)
        self._deliver(ticket, note)

    def _handed_in(self, ticket: Path, note: Note) -> str:
        if note.missing:
            raise Refused(FILES_MISSING)
        files = {channel: ticket / "in" / path for channel, path in note.files.items()}
        if not all(_is_readable(path) for path in files.values()):
            raise Refused(NO_SCAN)
        key = self.desk.submissions.begin(self.inbox.route, files, self.name)
        self.desk.audit.note("submission", study=key, route=self.inbox.route, door=self.name)
        return key

    # what came of it

    def _deliver(self, ticket: Path, note: Note) -> None:
        """Once its story ended: results, or why there are none."""
        submission = self.desk.submissions.get(note.submission)
        assert submission is not None, "what was handed in stays known"
        story = self.desk.submissions.story(submission)
        if story.state not in ENDED:
            return
        mark = Mark(submission=note.submission, ticket=ticket.name, state=story.state)
        if story.state == "done":
            self._put(
                ticket, note, mark, {path.name: path for path in self.desk.submissions.results(submission).values()}
            )
            return
        said = {"code": story.code, "words": story.words, "scan": self.desk.submissions.why_refused(submission)}
        self._put(
            ticket, note, mark, self._given_back(ticket, note), {name: word for name, word in said.items() if word}
        )

    def _deliver_refusal(self, ticket: Path, note: Note, reason: Reason) -> None:
        """Of what the node did not even take."""
        said = {"code": reason.code, "words": reason.words, "channels": ", ".join(self.channels)}
        self.desk.ledger.refuse(reason, self.name)
        mark = Mark(submission="", ticket=ticket.name, state="refused")
        self._put(ticket, note, mark, self._given_back(ticket, note), said)

    def _given_back(self, ticket: Path, note: Note) -> dict[str, Path]:
        """What was refused lies beside the reason, so that nothing is lost."""
        lying = {f"input/{path}": ticket / "in" / path for path in note.files.values()}
        return {
            name: path for name, path in lying.items() if path.is_symlink() or path.is_file()
        }  # a pipe holds nothing

    def _put(
        self, ticket: Path, note: Note, mark: Mark, files: Mapping[str, Path], said: Mapping[str, str] | None = None
    ) -> None:
        """A whole folder under the case's name, and then the ticket goes."""
        folder = self._place(note.name, mark)
        if folder is not None:
            building = self.results / f".{mark.ticket}.partial"
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            for name, path in files.items():
                _copy(path, building / name)
            if said is not None:
                _write_json(building / "error.json", said)
            _write_json(building / MARK, asdict(mark))
            swap(building, folder)
            sync(self.results)
        logger.info("inbox %s: submission %s ended: %s", self.name, mark.submission or "none", mark.state)
        _remove(ticket)

    def _place(self, name: str, mark: Mark) -> Path | None:
        """A folder of that name, or of that name and a number where another case has it; none where all is there already."""
        stem, number = os.fsdecode(os.fsencode(name)[:NAME_BYTES]), 1
        while True:
            folder = self.results / (stem if number == 1 else f"{stem}-{number}")
            recover(folder)
            if not folder.exists():
                return folder
            there = _marked(folder)
            if there is not None and there.ticket == mark.ticket:
                return None
            if there is not None and mark.submission and there.submission == mark.submission:
                return folder  # the same files once more: the answer is the newest
            number += 1


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a case lay there."""

    lies: tuple[tuple[str, int, int, int], ...]
    """Each file with its number on the disk, its size and when it was changed."""
    since: float


def cases_in(folder: Path, channels: tuple[str, ...], results: Path) -> Iterator[Case]:
    """What lies in a watched folder, brought together by name and never by guess."""
    loose: dict[str, dict[str, str]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry == results:
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield _folder_case(entry, channels)
        elif ending := _ending(entry.name):
            name, channel = _named(entry.name[: -len(ending)], channels)
            loose.setdefault(name, {}).setdefault(channel, entry.name)
    for name, files in loose.items():
        missing = set(files) != set(channels)
        yield Case(name=name, entries=tuple(files.values()), files=files, missing=missing)


def _folder_case(folder: Path, channels: tuple[str, ...]) -> Case:
    """A file per channel, by its name or by its number; the only file of the only channel may have any name."""
    scans = [path.name for path in sorted(folder.iterdir()) if _ending(path.name) and not path.name.startswith(".")]
    files: dict[str, str] = {}
    for name in scans:
        stem = name[: -len(_ending(name))]
        by_name = next((channel for channel in channels if channel.lower() == stem.lower()), "")
        files.setdefault(by_name or _named(stem, channels)[1], f"{folder.name}/{name}")
    missing = set(files) != set(channels) or len(scans) != len(channels)
    return Case(name=folder.name, entries=(folder.name,), files=files, missing=missing)


def _named(stem: str, channels: tuple[str, ...]) -> tuple[str, str]:
    """The case and the channel that a file's name says; a name without a number is the only channel's, or none's."""
    numbered = NUMBERED.fullmatch(stem)
    if numbered and int(numbered[2]) < len(channels):
        return numbered[1], channels[int(numbered[2])]
    return stem, channels[0] if len(channels) == 1 else ""


def _ending(name: str) -> str:
    return next((ending for ending in ENDINGS if name.lower().endswith(ending) and len(name) > len(ending)), "")


def _lying(folder: Path, case: Case) -> Iterator[tuple[str, int, int, int]]:
    for entry in case.entries:
        place = folder / entry
        for path in (place, *(sorted(place.iterdir()) if place.is_dir() else ())):
            facts = path.lstat()
            yield path.name, facts.st_ino, facts.st_size, facts.st_mtime_ns


def is_being_written(path: Path) -> bool:
    """Whether somebody has the file open to write, as far as the system tells: it grants no lease to read then."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # a link, or closed to us: refused when it is handed in
        return False
    try:
        # who opens it in this very moment is waited for by a signal: by one that nobody minds
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:  # another user's file, or a network drive: then its size and its moment are all that is known
        return False
    finally:
        os.close(file)
    return False


def _is_readable(path: Path) -> bool:
    """A file that we may read, and no link to one that is none of the user's business."""
    try:
        return stat.S_ISREG(path.lstat().st_mode) and os.access(path, os.R_OK)
    except OSError:
        return False


@contextmanager
def _gathered(troubles: list[OSError]) -> Iterator[None]:
    """One case that cannot be moved does not keep the others waiting."""
    try:
        yield
    except OSError as error:
        troubles.append(error)


def _remove(ticket: Path) -> None:
    """Under a name that is no ticket first: half of one would be another claim."""
    if not ticket.name.startswith("."):
        ticket = ticket.rename(ticket.with_name(f".{ticket.name}"))
    shutil.rmtree(ticket)


def _read(ticket: Path) -> Note | None:
    try:
        note = decode(Note, json.loads((ticket / NOTE).read_text()), where=NOTE)
    except FileNotFoundError:  # killed before it was written
        return None
    except ValueError:  # what we cannot read we do not throw away
        raise OSError("a note of a claimed case cannot be read") from None
    if not all(_stays_below(path) for path in (note.name, *note.entries, *note.files.values())):
        raise OSError("a note of a claimed case is not one of ours: whoever may write into the folder wrote it")
    return note


def _stays_below(path: str) -> bool:
    parts = path.split("/")
    return 1 <= len(parts) <= 2 and not any(part in ("", ".", "..") for part in parts)


def _write(ticket: Path, note: Note) -> None:
    _write_json(ticket / f"{NOTE}.new", asdict(note))
    (ticket / f"{NOTE}.new").replace(ticket / NOTE)
    sync(ticket)


def _marked(folder: Path) -> Mark | None:
    try:
        return decode(Mark, json.loads((folder / MARK).read_text()), where=MARK)
    except (OSError, ValueError):
        return None


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    with path.open("w") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def _copy(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path, follow_symlinks=False)
    if not path.is_symlink():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
