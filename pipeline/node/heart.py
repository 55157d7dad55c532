"""Which processes of a node live: each one's heart beats in a table, and what one that fell silent had begun, others finish.

No clock of one machine is held against another's. A process counts its beats; the others look whether the count still
grows, by their own watch. One that is thought dead and comes back does no harm: DBOS takes no answer of a step from a
process that lost the story, and what that process still does is done twice with the same result.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

import sqlalchemy as sql

from .ledger import Ledger, tables

logger = logging.getLogger(__name__)

Part = Literal["both", "front", "worker"]
"""What a process does: all of it, or receive, watch and show, or work on stories."""

BEATS_IN_SILENCE = 6
"""Beats that a process has time for before it is thought dead: five may fail."""

GONE = 0
"""Beats of a process that said farewell: nobody need wait until it is silent."""

workers = sql.Table(
    "node_workers",
    tables,
    sql.Column("name", sql.String(40), primary_key=True),
    sql.Column("part", sql.String(8), nullable=False),
    sql.Column("beats", sql.BigInteger, nullable=False),
    sql.Column("began", sql.Float, nullable=False),
    sql.Column("last", sql.Float, nullable=False),
)


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A process of this node, as the page shows it."""

    name: str
    part: str
    beats: int
    began: datetime
    last: datetime
    """By its own clock: for people, nothing is decided by it."""

    @property
    def is_gone(self) -> bool:
        """Whether it said farewell."""
        return self.beats == GONE


@dataclass(kw_only=True, eq=False)
class Hearts:
    """The table, and what this process has seen of the others."""

    ledger: Ledger
    silent_s: float
    """How long a count may stand still before its process is thought dead."""
    clock: Callable[[], float] = time.monotonic
    seen: dict[str, tuple[int | None, float]] = field(default_factory=dict)
    """Of each name the count that was seen last, and when it was seen to change."""
    looked: float = 0.0
    """When that was."""

    def __post_init__(self) -> None:
        self.ledger.make(workers)

    def beat(self, name: str, part: Part = "both") -> None:
        """It lives."""
        moment = datetime.now(UTC).timestamp()
        more = sql.update(workers).where(workers.c.name == name)
        with self.ledger.writing() as connection:
            known = connection.execute(more.values(part=part, beats=workers.c.beats + 1, last=moment)).rowcount
            if not known:
                row = {"name": name, "part": part, "beats": 1, "began": moment, "last": moment}
                connection.execute(sql.insert(workers).values(**row))

    def farewell(self, name: str) -> None:
        """It ends, of its own will: what it had begun is anybody's from now on."""
        with self.ledger.writing() as connection:
            connection.execute(sql.update(workers).where(workers.c.name == name).values(beats=GONE))

    def forget(self, name: str) -> None:
        """One that is gone and has nothing left to finish."""
        with self.ledger.writing() as connection:
            connection.execute(sql.delete(workers).where(workers.c.name == name))
        self.seen.pop(name, None)

    def known(self) -> list[Worker]:
        """Every process, the youngest first."""
        with self.ledger.reading() as connection:
            rows = connection.execute(sql.select(workers).order_by(workers.c.began.desc())).all()
        return [
            Worker(
                name=row.name, part=row.part, beats=row.beats, began=datetime.fromtimestamp(row.began, UTC),
                last=datetime.fromtimestamp(row.last, UTC),
            )
            for row in rows
        ]  # fmt: skip

    def silent(self, names: Iterable[str] = ()) -> set[str]:
        """Those that are thought dead, of all in the table and of these, which may never have been in it."""
        counts: dict[str, int | None] = dict.fromkeys(names)
        counts |= {worker.name: worker.beats for worker in self.known()}
        now = self.clock()
        if now - self.looked > self.silent_s / 2:  # we or the database were away: nobody else is to blame for that
            self.seen = {}
        self.looked = now
        self.seen = {name: seen for name, seen in self.seen.items() if name in counts}
        for name, beats in counts.items():
            if name not in self.seen or self.seen[name][0] != beats:
                self.seen[name] = beats, now
        return {
            name for name, (beats, since) in self.seen.items() if beats == GONE or now - since >= self.silent_s
        }  # fmt: skip


@dataclass(kw_only=True, eq=False)
class Watch:
    """One process's heart, and its eye on the others."""

    name: str
    part: Part
    hearts: Hearts
    holders: Callable[[], set[str]]
    """Names of the processes that have begun stories and not ended them."""
    take_over: Callable[[str], int]
    """Has what such a process had begun finished by others; how much that was. Twice is once."""
    bury: Callable[[], int]
    """Ends what nobody would end any more."""

    def beat(self) -> None:
        """Say that we live; then look after those who do not."""
        self.hearts.beat(self.name, self.part)
        holding = self.holders()
        for name in self.hearts.silent(holding) - {self.name}:
            if name in holding:
                count = self.take_over(name)
                logger.warning("process %s fell silent; %d of its stories are taken over", name, count)
            self.hearts.forget(name)
        self.bury()

    @contextmanager
    def beating(self) -> Iterator[None]:
        """As long as this lasts."""
        enough = threading.Event()
        self.hearts.beat(self.name, self.part)  # before it begins anything
        thread = threading.Thread(target=self._beat_until, args=(enough,), name="heart", daemon=True)
        thread.start()
        try:
            yield
        finally:
            enough.set()
            thread.join()

    def _beat_until(self, enough: threading.Event) -> None:
        while not enough.wait(self.hearts.silent_s / BEATS_IN_SILENCE):
            try:
                self.beat()
            except Exception as error:  # whatever a database raises: it may be back at the next beat
                logger.error("a beat failed: %s", type(error).__name__)
