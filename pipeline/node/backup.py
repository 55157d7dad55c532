"""A copy of a node's folder that another node can go on from, made while it works: databases first, files after them.

What a row speaks of then lies in the copy, too. What came in between has a file and no row, and the next start learns of it;
a step whose answer came too late for the copy is done once more, with the same result under the same UID.
"""

import hashlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError
from ..report import as_json, hilum_version, write_whole
from .config import Node
from .spool import sync

SUMS = "SHA256SUMS"
"""As `sha256sum --check` reads it."""

DATABASES = ("workflows.sqlite", "ledger.sqlite")
"""In this order: rows may be ahead of the workflows, which then say the same once more; the other way round, a story whose
workflow has ended would wait for ever."""

NOT_COPIED = ("lock", "parts")
"""Of the process that runs, and what nobody was told had arrived."""

RECEIVED = "spool"
"""Before `work`, whose input is links to it."""

HEAD = "head"
"""Of the audit trail. It is copied before the lines: those that came after it are believed, a line too few is not."""

CHUNK = 1 << 20
"""Bytes in hand at once."""


@dataclass(kw_only=True)
class Backup:
    """What was copied."""

    files: int = 0
    bytes: int = 0
    elsewhere: tuple[str, ...] = ()
    """What lies in a Postgres, and must be copied there."""
    _first: dict[tuple[int, int], Path] = field(default_factory=dict)
    """The same file under several names is one file in the copy, too: a story's input is links into the spool."""


def back_up(node: Node, config: Path, folder: Path) -> Backup:
    """Everything that the node must not lose, in a new folder: whole under its name, or not there at all."""
    _refuse(node, folder)
    building = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True, mode=0o700)
    state, made = building / "state", Backup(elsewhere=_elsewhere(node))
    state.mkdir(mode=0o700)
    for path in _databases(node.state):
        _copy_database(path, state / path.name)
    for path in _files(node.state):
        with suppress(FileNotFoundError):  # let go of since we saw it
            _copy(path, state / path.relative_to(node.state), made, is_received=node.state / RECEIVED in path.parents)
    shutil.copyfile(config, building / "node.yaml")
    _sum_up(building, made)
    building.rename(folder)
    sync(folder.parent)
    return made


def _refuse(node: Node, folder: Path) -> None:
    if not (node.state / "secret").is_file():
        raise UsageError(
            f"{node.state} holds no secret, so no node ever ran there; the folder of one is needed. Name its config, or start "
            "it first."
        )
    if folder.exists():
        raise UsageError(f"{folder} is there already; a backup needs a name of its own. Give another, or remove it.")
    if node.state.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UsageError(
            f"{folder} lies in the node's own folder; a backup belongs outside, best on another disk. Name another place."
        )


def _elsewhere(node: Node) -> tuple[str, ...]:
    named = {
        "ledger": node.ledger or "HILUM_LEDGER" in os.environ,
        "stories": node.stories or "HILUM_STORIES" in os.environ,
    }
    return tuple(name for name, is_elsewhere in named.items() if is_elsewhere)


def _databases(state: Path) -> list[Path]:
    """sqlite's, those whose order matters first."""
    there = sorted(state.glob("*.sqlite"))
    return sorted(there, key=lambda path: DATABASES.index(path.name) if path.name in DATABASES else len(DATABASES))


def _copy_database(path: Path, target: Path) -> None:
    """As it is at one moment, however many write; a copy of the file alone would lack what is in its log."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, which its sum is of
    target.chmod(0o600)


def _files(state: Path) -> Iterator[Path]:
    """All that is no database and of no moment, in an order that does not change."""
    for folder, folders, names in os.walk(state):
        here = Path(folder)
        is_top = here == state
        folders[:] = sorted(name for name in folders if not (_is_draft(name) or (is_top and name in NOT_COPIED)))
        for name in sorted(names, key=lambda name: (name != HEAD, name)):
            if not (_is_draft(name) or (is_top and (name in NOT_COPIED or ".sqlite" in name))):
                yield here / name


def _is_draft(name: str) -> bool:
    """Something on its way to a name."""
    return name.endswith((".partial", ".part")) or name.startswith(f".{HEAD}.")


def _copy(path: Path, target: Path, made: Backup, is_received: bool) -> None:
    facts = path.lstat()
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    first = made._first.get((facts.st_dev, facts.st_ino))
    if first is not None:
        os.link(first, target)
        return
    if not (is_received and _linked(path, target)):
        with path.open("rb") as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, CHUNK)
            copy.flush()
            os.fsync(copy.fileno())
        shutil.copystat(path, target)
    made._first[facts.st_dev, facts.st_ino] = target


def _linked(path: Path, target: Path) -> bool:
    """Received objects never change: on the same disk a second name for one is a copy that takes no room."""
    with suppress(OSError):  # another disk, or a file system without links
        os.link(path, target)
        return True
    return False


def _sum_up(building: Path, made: Backup) -> None:
    """What `sha256sum --check` will look at; written last."""
    lines = []
    said = {"hilum": hilum_version(), "elsewhere": list(made.elsewhere)}
    write_whole(building / "backup.json", as_json(said))
    for path in sorted(path for path in building.rglob("*") if path.is_file()):
        made.files, made.bytes = made.files + 1, made.bytes + path.stat().st_size
        with path.open("rb") as stream:
            lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {path.relative_to(building)}\n")
    write_whole(building / SUMS, "".join(lines))
