"""Scans that come without DICOM, by the watched folder or over REST: kept under a key that is made of what is in them.

A submission is a file per channel for one route. It is there whole, on the disk, or not at all; the same files for the same
route are the same submission, however often and by whatever door they come. From then on it is a story like a study's.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from preprocessing.records import decode

from .config import Node
from .ledger import Ledger, tables
from .nouns import FILES_MISSING, NO_SCAN, Keys, Refused
from .routes import Route
from .spool import Part, sync
from .stories import ENDED, Stories, Story

logger = logging.getLogger(__name__)

REVISION = 1
"""Of every submission: other files are another submission."""

CASE = "case-1"
"""What it is called in its folder, as the first case of a study is."""

INSTEAD = {
    "dicom_seg": "labels", "rtstruct": "labels", "structured_report": "measurements", "secondary_capture": "overlay",
    "pdf": "page", "parametric_map": "saliency",
}  # fmt: skip
"""What says the same where there is no patient and no study that a DICOM object could belong to."""

NOTE = "submission.json"
"""Beside the files: what the row says, for a process that was killed before it wrote one."""

CHUNK = 1 << 20
"""Bytes copied at once."""

submissions = sql.Table(
    "node_submissions",
    tables,
    sql.Column("submission", sql.String(20), primary_key=True),
    sql.Column("route", sql.String(64), nullable=False),
    sql.Column("files", sql.Text, nullable=False),
    sql.Column("bytes", sql.BigInteger, nullable=False),
    sql.Column("door", sql.String(64), nullable=False),
    sql.Column("came", sql.Float, nullable=False),
    sql.Column("present", sql.Boolean, nullable=False),
)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What was handed in."""

    key: str
    """Stands where a study's key stands."""
    route: str
    files: tuple[str, ...]
    """In the order of the package's channels."""
    bytes: int
    door: str
    """Through which it came first: rest, or the name of an inbox."""
    came: datetime
    present: bool
    """Whether its files are still here."""


@dataclass(frozen=True, kw_only=True)
class _Noted:
    """The same beside the files."""

    route: str
    files: tuple[str, ...]
    bytes: int
    door: str


@dataclass(kw_only=True, eq=False)
class Draft:
    """Files that are on their way. Used by one thread at a time."""

    folder: Path
    channels: tuple[str, ...]
    parts: dict[str, Part] = field(default_factory=dict)

    def part(self, channel: str) -> Part:
        """Where the file of a channel is written to, once."""
        if channel not in self.channels or channel in self.parts:
            raise Refused(FILES_MISSING)
        name = f"{self.channels.index(channel):04d}"
        self.parts[channel] = part = Part(self.folder / name, b"")
        return part

    def finish(self) -> tuple[str, ...]:
        """All are there, are scans by their first bytes, and are on the disk under names that say so."""
        if set(self.parts) != set(self.channels):
            raise Refused(FILES_MISSING)
        names = []
        for channel in self.channels:
            part = self.parts[channel]
            part.finish()
            names.append(f"{CASE}_{part.path.name}{ending_of(part.path)}")
            part.path.rename(self.folder / names[-1])
        return tuple(names)

    def digest(self) -> str:
        """Of the content of all files, channel by channel."""
        of_each = " ".join(self.parts[channel].sha256 for channel in self.channels)
        return hashlib.sha256(of_each.encode()).hexdigest()

    def discard(self) -> None:
        """As if nothing had come; of what was handed in, nothing is left here."""
        for part in self.parts.values():
            part.discard()
        shutil.rmtree(self.folder, ignore_errors=True)


class Submissions:
    """The table and the folder. Several threads and processes may use them at once."""

    def __init__(
        self, node: Node, keys: Keys, ledger: Ledger, stories: Stories, work: Callable[[str, int, str], Path]
    ) -> None:
        self.node, self.keys, self._ledger, self._stories, self._work = node, keys, ledger, stories, work
        self.folder = node.state / "submissions"
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        ledger.make(submissions)

    # in

    @contextmanager
    def draft(self, route: str) -> Iterator[Draft]:
        """A place for the files of a submission. What is not handed in is thrown away."""
        folder = self.folder / f".{secrets.token_hex(10)}"
        folder.mkdir(mode=0o700)
        draft = Draft(folder=folder, channels=tuple(self.node.routes[route].take))
        try:
            yield draft
        finally:
            draft.discard()

    def begin(self, route: str, files: Mapping[str, Path], door: str = "") -> str:
        """The key of a submission of these files, by channel. They are copied: whoever has one open may write on."""
        with self.draft(route) as draft:
            for channel, path in files.items():
                part = draft.part(channel)
                with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as source:
                    while piece := source.read(CHUNK):
                        part.write(piece)
            return self.hand_in(draft, route, door).key

    def hand_in(self, draft: Draft, route: str, door: str) -> Submission:
        """Safe, and to be worked on, when this returns; refused where it is no scan, or not all of one."""
        files = draft.finish()
        key = self.keys.study(f"submission {draft.digest()} {route}")
        noted = _Noted(route=route, files=files, bytes=sum(part.bytes for part in draft.parts.values()), door=door)
        _write_safely(draft.folder / NOTE, json.dumps(asdict(noted)))
        sync(draft.folder)
        # rename replaces only an empty folder: where the same submission lies already, it stays
        with suppress(OSError):
            draft.folder.rename(self.folder / key)
        sync(self.folder)
        if not (self.folder / key / NOTE).exists():
            raise OSError("a submission could not be put in its place")
        self._write_down(key, noted)
        self._set_going(key, route)
        found = self.get(key)
        assert found is not None, "it was just written down"
        logger.info("submission %s for %s by %s: %d bytes", key, route, door, noted.bytes)
        return found

    def reconcile(self) -> None:
        """At a start, before anybody hands in: halves go, and whole ones that have no row or no story get them."""
        for folder in self.folder.iterdir():
            if folder.name.startswith("."):
                shutil.rmtree(folder)
            elif (noted := _noted_in(folder)) is not None and noted.route in self.node.routes:
                self._write_down(folder.name, noted)
                self._stories.begin(folder.name, REVISION, noted.route)

    # what is known

    def get(self, key: str) -> Submission | None:
        """What was handed in under that key."""
        with self._ledger.reading() as connection:
            row = connection.execute(sql.select(submissions).where(submissions.c.submission == key)).first()
        return None if row is None else _submission(row)

    def story(self, submission: Submission) -> Story:
        """What became of it."""
        return self._stories.begin(submission.key, REVISION, submission.route)

    def results(self, submission: Submission) -> dict[str, Path]:
        """The files that were made of it, by name; none before it is done."""
        if self.story(submission).state != "done":
            return {}
        folder = self._results(submission.key, submission.route)
        return {path.name: path for path in sorted(folder.glob("[!.]*")) if path.is_file()}

    def why_refused(self, submission: Submission) -> str:
        """What was wrong with the scan, in the words of who read it; they are for its submitter and nobody's log."""
        try:
            said = json.loads((self._results(submission.key, submission.route) / "error.json").read_text())
        except (OSError, ValueError):
            return ""
        return str(said.get("message", "")) if said.get("verdict") == "refused" else ""

    # for the steps of its story

    def lay_out(self, key: str, folder: Path) -> list[str]:
        """Links to its files, named as a case is; the names of the cases. None where the files are no longer here."""
        submission = self.get(key)
        if submission is None or not submission.present:
            return []
        (folder / CASE).mkdir(parents=True, exist_ok=True)
        for name in submission.files:
            with suppress(FileExistsError):
                os.link(self.folder / key / name, folder / CASE / name)
        return [CASE]

    def remove(self, key: str) -> None:
        """Its files are no longer needed. That it came stays known."""
        with self._ledger.writing() as connection:
            where = submissions.c.submission == key
            connection.execute(sql.update(submissions).where(where).values(present=False))
        aside = self.folder / f".{secrets.token_hex(10)}"  # a name never stands for half of the files
        with suppress(FileNotFoundError):
            (self.folder / key).rename(aside)
            shutil.rmtree(aside)

    def _results(self, key: str, route: str) -> Path:
        return self._work(key, REVISION, route) / "results" / CASE

    def _set_going(self, key: str, route: str) -> None:
        """A story, if there is none; anew where the last one led to nothing that is still here. The watcher begins it."""
        story = self._stories.begin(key, REVISION, route)
        if story.state in ENDED and not (story.state == "done" and self._results(key, route).exists()):
            self._stories.again(story)

    def _write_down(self, key: str, noted: _Noted) -> None:
        values = {"route": noted.route, "files": json.dumps(noted.files), "bytes": noted.bytes, "present": True}
        new = {"submission": key, "door": noted.door, "came": datetime.now(UTC).timestamp()}
        changed = sql.update(submissions).where(submissions.c.submission == key).values(**values)
        for _ in range(2):  # another may write the same row at the same time; then it is there to be changed
            with suppress(sql.exc.IntegrityError), self._ledger.writing() as connection:
                if not connection.execute(changed).rowcount:
                    connection.execute(sql.insert(submissions).values(**new, **values))
                return


def outputs_for(how: Route) -> tuple[tuple[str, ...], dict[str, dict[str, Any]]]:
    """What is written of a submission, and how: what the route asks for, or what says the same without DICOM."""
    names = tuple(dict.fromkeys(["labels", *(INSTEAD.get(name, name) for name in how.outputs)]))
    return names, {name: options for name, options in how.output_options.items() if name in names}


def ending_of(path: Path) -> str:
    """By its first bytes, which do not lie as names do; refused where they are of no scan."""
    from preprocessing import files  # not at the top: whoever only asks what became of a scan needs no numpy

    if not files.is_scan(path):
        raise Refused(NO_SCAN)
    with path.open("rb") as stream:
        head = stream.read(64)
    if head.startswith(b"\x1f\x8b"):
        return ".nii.gz"
    if head.startswith(b"NRRD"):
        return ".nrrd"
    return ".mha" if b"=" in head.partition(b"\n")[0] and head[:1].isalpha() else ".nii"


def _noted_in(folder: Path) -> _Noted | None:
    try:
        return decode(_Noted, json.loads((folder / NOTE).read_text()), where=NOTE)
    except (OSError, ValueError):
        return None


def _write_safely(path: Path, content: str) -> None:
    with path.open("w") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _submission(row: Any) -> Submission:
    return Submission(
        key=row.submission, route=row.route, files=tuple(json.loads(row.files)), bytes=row.bytes, door=row.door,
        came=datetime.fromtimestamp(row.came, UTC), present=row.present,
    )  # fmt: skip
