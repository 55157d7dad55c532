"""Who did what, and what became of whose study, under keys: lines that are only ever added, and whose tampering shows.

Each line carries a code made of itself and of the line before, under a key that comes of the node's secret. Whoever changes,
adds, removes or moves a line without it breaks the chain there; whoever cuts off the end disagrees with the head, which is
kept beside it. Whoever has the secret too can write all of it anew: against that write down the head that
`hilum node --verify_audit` prints, somewhere else, and give it back later (`--audit_head`).
"""

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ..errors import UsageError
from .nouns import Keys
from .spool import sync

What = Literal[
    "begun", "start", "stop", "login", "login_failed", "token_failed", "retry", "resume", "reroute", "requeue", "give_up", "release",
    "download", "package", "study", "submission", "sent", "ended", "rollback", "refusals", "torn", "echo", "hold", "resume",
]  # fmt: skip
"""The closed list. `begun` is the first line of a trail, `torn` says that a power cut left half a line, which was no line."""

LONGEST = 200
"""Letters of a fact: names of the config, keys and hashes are shorter; a text that somebody typed in may not be."""

BEGINNING = "0" * 64
"""What stands for the line before the first."""

CODE = re.compile(rb'(.*), "code": "([0-9a-f]{64})"\}', re.DOTALL)
"""A line: what it says, and the code of that."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """The last line that is known: how-manyth it is, and its code."""

    number: int = 0
    code: str = BEGINNING

    def __str__(self) -> str:
        return f"{self.number}:{self.code}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of reading a whole trail."""

    lines: int
    """Those that are as they were written, from the first on."""
    head: Head
    broken: str = ""
    """What is wrong, and where; empty where nothing is."""


class Audit:
    """The trail of a node, in state/audit. Several threads and processes may write into it at once."""

    def __init__(self, state: Path, keys: Keys) -> None:
        self.folder = state / "audit"
        self._key = _key(keys)
        self._turn = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._alone():
            head = self._head()
            if head.number == 0:
                self._add(head, "begun", {})

    def note(self, what: What, **facts: Any) -> None:
        """One more line, on the disk when this returns. Facts are keys, codes, counts, and names of the config: nothing else."""
        told = {name: _plain(value) for name, value in facts.items()}
        with self._alone():
            self._add(self._head(), what, told)

    def newest(self, most: int = 200) -> list[dict[str, Any]]:
        """The last lines, the newest first, for the page."""
        found: list[dict[str, Any]] = []
        for path in reversed(_files(self.folder)):
            for raw in reversed(path.read_bytes().splitlines()):
                if len(found) == most:
                    return found
                found.append(_readable(raw))
        return found

    def _add(self, head: Head, what: What, facts: Mapping[str, Any]) -> Head:
        moment = datetime.now(UTC)
        said = {"number": head.number + 1, "at": moment.isoformat(timespec="milliseconds"), "what": what}
        line, code = _written(said | {"facts": facts, "before": head.code}, self._key)
        path, added = self._file(moment), Head(number=head.number + 1, code=code)
        _append(path, line)
        self._keep(added, path)
        return added

    def _file(self, moment: datetime) -> Path:
        """One for each month; of a clock that was put back, the one that is there already."""
        name = f"{moment:%Y-%m}.jsonl"
        return self.folder / max([name, *(path.name for path in _files(self.folder)[-1:])])

    def _head(self) -> Head:
        """The last line: the head's, or those after it, where a process was killed between a line and its head."""
        kept = _kept(self.folder, self._key)
        head = kept.head if kept else Head()
        for path in _files(self.folder):
            start = kept.bytes if kept and path.name == kept.file else 0
            if kept is None or path.name >= kept.file:
                head = self._gone_on(head, path, start)
        if kept is None and head.number:  # a process was killed before its first head, or somebody took it away
            return self._add(head, "torn", {"head": "missing"})
        return head

    def _gone_on(self, head: Head, path: Path, start: int) -> Head:
        with path.open("rb") as stream:
            stream.seek(start)
            rest = stream.read()
        for raw in _lines(rest):
            following = _following(raw, head, self._key)
            if following is None:
                return head if raw.endswith(b"\n") else self._without(raw, head, path)
            head = following
        return head

    def _without(self, half: bytes, head: Head, path: Path) -> Head:
        """Half a line goes, and that it was there is said; a whole one that is not ours stays, for its reader to find."""
        os.truncate(path, path.stat().st_size - len(half))
        return self._add(head, "torn", {"bytes": len(half)})

    def _keep(self, head: Head, path: Path) -> None:
        line, _ = _written(
            {"number": head.number, "head": head.code} | {"file": path.name, "bytes": path.stat().st_size}, self._key
        )
        draft = self.folder / f".head.{secrets.token_hex(4)}"
        _append(draft, line)
        draft.replace(self.folder / "head")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._turn, (self.folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class Refusals:
    """Counts of what was refused, at most a line a minute: whoever floods the node does not flood the trail."""

    def __init__(self, trail: Audit, counts: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        self._trail, self._counts = trail, counts
        self._told: dict[str, int] = {}
        self._looked = -REFUSALS_SECONDS

    def look(self) -> None:
        """Note what grew since it was last noted: by reason and source, how often ever."""
        if time.monotonic() - self._looked < REFUSALS_SECONDS:
            return
        self._looked = time.monotonic()
        counts = {f"{code} {source}".strip(): count for (code, source), count in self._counts().items()}
        grown = {name: count for name, count in counts.items() if count != self._told.get(name)}
        if grown:
            self._trail.note("refusals", ever=grown)
            self._told = counts


REFUSALS_SECONDS = 60.0
"""Short enough to tell an attack from a wrong setting by its times; a flood of a year is half a million lines."""


def verify(state: Path, keys: Keys, seen: Sequence[Head] = ()) -> Verdict:
    """Read a trail from its first line to its head; `seen` are heads that somebody noted elsewhere, long ago perhaps."""
    key, folder = _key(keys), state / "audit"
    with _while_nobody_writes(folder):
        head, broken, codes = _followed(folder, key)
        kept = _kept(folder, key)
    return Verdict(lines=head.number, head=head, broken=broken or _disagreement(head, kept, codes, seen))


def read_head(words: str) -> Head:
    """A head as `hilum node --verify_audit` prints it."""
    number, _, code = words.strip().partition(":")
    if not number.isdecimal() or not re.fullmatch(r"[0-9a-f]{64}", code):
        raise UsageError(
            f"{words!r} is no head of a trail; a number, a colon and 64 hexadecimal digits are needed. `hilum node "
            "--verify_audit` prints one."
        )
    return Head(number=int(number), code=code)


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What the file `head` says."""

    head: Head
    file: str
    bytes: int
    """Of that file, when the head was written."""


def _followed(folder: Path, key: bytes) -> tuple[Head, str, dict[int, str]]:
    """The last line that is as it was written; what is wrong with the next; the codes by number."""
    head, codes = Head(), dict[int, str]()
    for path in _files(folder):
        for count, raw in enumerate(_lines(path.read_bytes()), 1):
            following = _following(raw, head, key)
            if following is None:
                words = (
                    "is not the one that was written there: it, or one before it, was changed, added, moved or removed"
                )
                return head, f"line {count} of {path.name} {words}.", codes
            head = following
            codes[head.number] = head.code
    return head, "", codes


def _disagreement(head: Head, kept: _Kept | None, codes: Mapping[int, str], seen: Sequence[Head]) -> str:
    """What is wrong with a chain that holds."""
    if kept is None:
        return "the head is missing or was changed; nobody can say whether lines at the end were removed."
    for one in (kept.head, *seen):
        if one.number > head.number:
            return (
                f"the trail ends with line {head.number}; there was a line {one.number}. Lines at the end were removed."
            )
        if one.number and codes[one.number] != one.code:
            return f"line {one.number} is another than it was when its head was noted. The trail was written anew."
    return ""


def _following(raw: bytes, head: Head, key: bytes) -> Head | None:
    """The line's head, if it is as it was written and comes next."""
    found = CODE.fullmatch(raw.removesuffix(b"\n"))
    if not raw.endswith(b"\n") or not found or not hmac.compare_digest(_code(found[1], key).encode(), found[2]):
        return None
    said = _read(raw)
    if (said["number"], said["before"]) != (head.number + 1, head.code):
        return None
    return Head(number=said["number"], code=found[2].decode())


def _kept(folder: Path, key: bytes) -> _Kept | None:
    try:
        raw = (folder / "head").read_bytes()
    except FileNotFoundError:
        return None
    found = CODE.fullmatch(raw.removesuffix(b"\n"))
    if not raw.endswith(b"\n") or not found or not hmac.compare_digest(_code(found[1], key).encode(), found[2]):
        return None
    said = _read(raw)
    return _Kept(head=Head(number=said["number"], code=said["head"]), file=said["file"], bytes=said["bytes"])


def _written(said: Mapping[str, Any], key: bytes) -> tuple[bytes, str]:
    """A line, and its code."""
    body = json.dumps(said)[:-1].encode()
    code = _code(body, key)
    return body + f', "code": "{code}"}}\n'.encode(), code


def _code(body: bytes, key: bytes) -> str:
    return hmac.new(key, body, hashlib.sha256).hexdigest()


def _read(raw: bytes) -> dict[str, Any]:
    said = json.loads(raw)
    assert isinstance(said, dict)
    return said


def _readable(raw: bytes) -> dict[str, Any]:
    """For a page, which shows the lines of a trail that somebody touched, too."""
    try:
        said = json.loads(raw)
        datetime.fromisoformat(said["at"])
        return {
            "number": int(said["number"]),
            "at": said["at"],
            "what": str(said["what"]),
            "facts": dict(said["facts"]),
        }
    except (ValueError, TypeError, KeyError):
        return {"number": 0, "at": datetime.fromtimestamp(0, UTC).isoformat(), "what": "unreadable", "facts": {}}


def _lines(content: bytes) -> list[bytes]:
    """With their ends: what lacks one is half a line."""
    return [line for line in re.split(rb"(?<=\n)", content) if line]


def _append(path: Path, line: bytes) -> None:
    is_new = not path.exists()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        while line:
            line = line[os.write(file, line) :]
        os.fsync(file)
    finally:
        os.close(file)
    if is_new:
        sync(path.parent)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.jsonl"))


def _plain(value: Any) -> Any:
    """What may stand in a line; a text that is too long to be ours is a mistake of ours."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {_plain(str(name)): _plain(one) for name, one in value.items()}
    assert value is None or isinstance(value, (bool, int, float, str)), f"a fact is a {type(value).__name__}"
    assert not isinstance(value, str) or (len(value) <= LONGEST and value.isprintable()), "a fact is no name of ours"
    return value


def _key(keys: Keys) -> bytes:
    """Of its own, so that a key of a study never says anything of a line."""
    return hmac.new(keys.secret, b"audit trail", hashlib.sha256).digest()


@contextmanager
def _while_nobody_writes(folder: Path) -> Iterator[None]:
    """Where the trail can be locked; of a copy on another disk nobody writes."""
    try:
        lock = (folder / "lock").open("r")
    except FileNotFoundError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield
