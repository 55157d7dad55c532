"""What the node knows of every object, study and refusal: own tables, in sqlite or Postgres, without a word of a header.

Arrivals are numbered within their study, without gaps and in the order in which they were written down, so that "since
number n" never misses one. Every write is one transaction; writing the same arrival twice changes nothing.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url

from .nouns import OTHER_BYTES, Arrival, Held, Place, Reason, Refused, Revision, Study
from .spool import Spool

logger = logging.getLogger(__name__)

BUSY_SECONDS = 30
"""How long a write waits for another's: a write takes milliseconds, so a longer wait means that the disk hangs."""

MAKING = 0x48494C554D
"""The lock that whoever makes tables in a Postgres holds meanwhile; its letters say HILUM."""

tables = sql.MetaData()

objects = sql.Table(
    "node_objects",
    tables,
    sql.Column("object", sql.String(20), primary_key=True),
    sql.Column("study", sql.String(20), nullable=False),
    sql.Column("series", sql.String(20), nullable=False),
    sql.Column("number", sql.Integer, nullable=False),
    sql.Column("bytes", sql.BigInteger, nullable=False),
    sql.Column("sha256", sql.String(64), nullable=False),
    sql.Column("kind", sql.String(64), nullable=False),
    sql.Column("source", sql.String(64), nullable=False),
    sql.Column("arrived", sql.Float, nullable=False),
    sql.Column("present", sql.Boolean, nullable=False),
    sql.UniqueConstraint("study", "number"),
    sql.Index("node_objects_by_source", "source", "arrived"),  # when a peer was last seen is asked every few seconds
)
studies = sql.Table(
    "node_studies",
    tables,
    sql.Column("study", sql.String(20), primary_key=True),
    sql.Column("objects", sql.Integer, nullable=False),
    sql.Column("frozen", sql.Integer, nullable=False),
    sql.Column("revision", sql.Integer, nullable=False),
    sql.Column("first", sql.Float, nullable=False),
    sql.Column("last", sql.Float, nullable=False, index=True),
)
revisions = sql.Table(
    "node_revisions",
    tables,
    sql.Column("study", sql.String(20), primary_key=True),
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("objects", sql.Integer, nullable=False),
    sql.Column("digest", sql.String(64), nullable=False),
    sql.Column("frozen_at", sql.Float, nullable=False),
)
refusals = sql.Table(
    "node_refusals",
    tables,
    sql.Column("code", sql.String(32), primary_key=True),
    sql.Column("source", sql.String(64), primary_key=True),
    sql.Column("day", sql.String(10), primary_key=True),
    sql.Column("count", sql.Integer, nullable=False),
    sql.Column("last", sql.Float, nullable=False),
)


@dataclass(frozen=True, kw_only=True)
class Reconciled:
    """What a start put right between the spool and the rows."""

    parts: int
    """Part files that were thrown away; their senders were never told that they had arrived."""
    learned: int
    """Whole objects that had no row: the process was killed before it wrote one."""
    lost: tuple[Place, ...]
    """Objects that have a row and no file, or one of another size. This is not the node's doing."""
    strange: int
    """Files in the spool that are no object of this node. They are left alone."""


class Ledger:
    """The tables. Several threads and processes may use them at once."""

    def __init__(self, address: str | URL) -> None:
        url = make_url(address)
        self._is_sqlite = url.get_backend_name() == "sqlite"
        self.engine = sql.create_engine(url, **_engine_words(self._is_sqlite))
        if self._is_sqlite:
            _tame(self.engine)
        self._insert = sqlite.insert if self._is_sqlite else postgresql.insert
        self.make(*tables.tables.values())

    def make(self, *wanted: sql.Table) -> None:
        """Tables that are there from now on. Several processes that start at once make them one after the other."""
        with self.engine.begin() as connection:
            if not self._is_sqlite:
                connection.execute(sql.select(sql.func.pg_advisory_xact_lock(MAKING)))
            tables.create_all(connection, tables=wanted)

    def close(self) -> None:
        """Let go of every connection."""
        self.engine.dispose()

    def record(self, arrival: Arrival, at: datetime | None = None) -> bool:
        """Write an arrival down. False where it is known; refused where other bytes are known under its UID."""
        moment = (at or now()).timestamp()
        with self.writing() as connection:
            number = self._counted(connection, arrival.place.study, moment)
            known = connection.execute(sql.select(objects).where(objects.c.object == arrival.place.object)).first()
            if known is None:
                connection.execute(sql.insert(objects).values(**_row(arrival, number, moment)))
                return True
            connection.rollback()
        if known.sha256 != arrival.sha256:
            raise Refused(OTHER_BYTES)
        if not known.present:
            self._set_present(arrival.place, True)
        return False

    def agree(self, arrival: Arrival) -> None:
        """Refused where its UID is known with other bytes, be they still in the spool or not."""
        wanted = sql.select(objects.c.sha256).where(objects.c.object == arrival.place.object)
        with self.reading() as connection:
            known = connection.execute(wanted).scalar()
        if known is not None and known != arrival.sha256:
            raise Refused(OTHER_BYTES)

    def known(self, keys: tuple[str, ...]) -> dict[str, Arrival]:
        """What is known of these objects, by key; those that were removed from the spool are not among them."""
        found: dict[str, Arrival] = {}
        with self.reading() as connection:
            for first in range(0, len(keys), AT_ONCE):
                wanted = sql.select(objects).where(objects.c.object.in_(keys[first : first + AT_ONCE]))
                found |= {row.object: _arrival(row) for row in connection.execute(wanted.where(objects.c.present))}
        return found

    def study(self, study: str) -> Study | None:
        """What has come of a study."""
        return next(iter(self._studies(studies.c.study == study)), None)

    def waiting(self) -> list[Study]:
        """Studies of which something came that no revision holds yet, the one silent for longest first."""
        return self._studies(studies.c.objects > studies.c.frozen)

    def since(self, study: str, number: int = 0) -> list[Arrival]:
        """The objects of a study that came after the one of that number, in their order."""
        wanted = sql.select(objects).where(objects.c.study == study, objects.c.number > number, objects.c.present)
        with self.reading() as connection:
            return [_arrival(row) for row in connection.execute(wanted.order_by(objects.c.number))]

    def held(self, revision: Revision, spool: Spool) -> list[Held]:
        """The objects of a revision, and where they lie."""
        wanted = sql.select(objects).where(
            objects.c.study == revision.study, objects.c.number <= revision.objects, objects.c.present
        )
        with self.reading() as connection:
            rows = connection.execute(wanted.order_by(objects.c.number)).all()
        found = [(_arrival(row), row.number) for row in rows]
        return [Held(arrival=it, number=number, path=spool.path(it.place)) for it, number in found]

    def freeze(self, study: str) -> Revision | None:
        """The newest revision of a study, made now if something came since the last; None of a study without objects.

        Two that ask at the same time get the same one.
        """
        with self.writing() as connection:
            row = connection.execute(
                sql.select(studies).where(studies.c.study == study).with_for_update()
            ).first()  # fmt: skip
            if row is None:
                return None
            if row.objects > row.frozen:
                made = _revision(connection, study, row.revision + 1, row.objects)
                connection.execute(sql.insert(revisions).values(**vars(made), frozen_at=now().timestamp()))
                frozen = {"frozen": row.objects, "revision": made.number}
                connection.execute(sql.update(studies).where(studies.c.study == study).values(**frozen))
                return made
            return self._revision_row(connection, study, row.revision)

    def revision(self, study: str, number: int) -> Revision | None:
        """A revision by its number."""
        with self.reading() as connection:
            return self._revision_row(connection, study, number)

    def forget(self, place: Place) -> None:
        """Its file is no longer in the spool, by our own will. That it came, and its hash, stay known."""
        self._set_present(place, False)

    def refuse(self, reason: Reason, source: str) -> None:
        """Count a refusal; by day, so that whoever floods the node does not flood the table."""
        moment = now()
        values = {"code": reason.code, "source": source, "day": moment.date().isoformat()}
        added = self._insert(refusals).values(**values, count=1, last=moment.timestamp())
        more = {"count": refusals.c.count + 1, "last": moment.timestamp()}
        with self.writing() as connection:
            connection.execute(added.on_conflict_do_update(index_elements=list(values), set_=more))

    def refused(self) -> dict[tuple[str, str], int]:
        """How often each reason was given to each source, ever."""
        counted = sql.select(refusals.c.code, refusals.c.source, sql.func.sum(refusals.c.count))
        with self.reading() as connection:
            rows = connection.execute(counted.group_by(refusals.c.code, refusals.c.source)).all()
        return {(code, source): int(count) for code, source, count in rows}

    def last_from(self, source: str) -> datetime | None:
        """When the last object came from there."""
        latest = sql.select(sql.func.max(objects.c.arrived)).where(objects.c.source == source)
        with self.reading() as connection:
            moment = connection.execute(latest).scalar()
        return None if moment is None else datetime.fromtimestamp(moment, UTC)

    def reconcile(self, spool: Spool) -> Reconciled:
        """Put rows and spool right with each other at a start, before anybody is heard. The spool's files count."""
        found = spool.take_stock()
        rows = self._present()
        new = [place for place in found.files if place not in rows]
        learned = sum(self._learn(spool, place, found.files[place].moment) for place in new)
        lost = tuple(
            place for place, size in rows.items() if place not in found.files or found.files[place].bytes != size
        )
        for place in lost:
            logger.error("object %s of study %s is gone from the spool or cut short", place.object, place.study)
            spool.set_aside(place)
            self.forget(place)
        told = Reconciled(parts=found.parts, learned=learned, lost=lost, strange=len(new) - learned)
        logger.info(
            "start: %d objects, %d of them new to the ledger; %d half ones thrown away, %d lost, %d files not ours",
            *(len(found.files), told.learned, told.parts, len(told.lost), told.strange),
        )
        return told

    def _learn(self, spool: Spool, place: Place, moment: datetime) -> bool:
        try:
            self.record(spool.arrival_at(place), moment)
        except Refused as refused:
            logger.error("a file in the spool under study %s was left alone: %s", place.study, refused.reason.code)
            return False
        return True

    def _counted(self, connection: sql.Connection, study: str, moment: float) -> int:
        """The number of the next object of a study. Its row stays locked until the end, so numbers have no gaps."""
        added = self._insert(studies).values(
            study=study, objects=1, frozen=0, revision=0, first=moment, last=moment
        )  # fmt: skip
        more = {"objects": studies.c.objects + 1, "last": moment}
        counted = added.on_conflict_do_update(index_elements=["study"], set_=more).returning(studies.c.objects)
        return int(connection.execute(counted).scalar_one())

    def _studies(self, which: sql.ColumnElement[bool]) -> list[Study]:
        counts = sql.select(objects.c.series, sql.func.count()).group_by(objects.c.series)
        with self.reading() as connection:
            rows = connection.execute(sql.select(studies).where(which).order_by(studies.c.last)).all()
            return [
                _study(row, {series: n for series, n in connection.execute(counts.where(objects.c.study == row.study))})
                for row in rows
            ]

    def _revision_row(self, connection: sql.Connection, study: str, number: int) -> Revision | None:
        wanted = sql.select(revisions).where(revisions.c.study == study, revisions.c.number == number)
        row = connection.execute(wanted).first()
        if row is None:
            return None
        return Revision(study=row.study, number=row.number, objects=row.objects, digest=row.digest)

    def _set_present(self, place: Place, present: bool) -> None:
        with self.writing() as connection:
            connection.execute(sql.update(objects).where(objects.c.object == place.object).values(present=present))

    def _present(self) -> dict[Place, int]:
        with self.reading() as connection:
            rows = connection.execute(sql.select(objects).where(objects.c.present)).all()
        return {Place(study=row.study, series=row.series, object=row.object): row.bytes for row in rows}

    @contextmanager
    def writing(self) -> Iterator[sql.Connection]:
        """One transaction that may write, and alone while it does."""
        with self.engine.connect() as connection:
            if self._is_sqlite:  # one that began as a reader cannot become a writer while another writes
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
            connection.commit()

    @contextmanager
    def reading(self) -> Iterator[sql.Connection]:
        """What is known now."""
        with self.engine.connect() as connection:
            yield connection


AT_ONCE = 500
"""Keys in one question: sqlite takes a thousand at the least."""


def open_ledger(state: Path, address: str = "") -> Ledger:
    """The ledger of a node: what its config or HILUM_LEDGER names, else sqlite in its folder."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Ledger(address or os.environ.get("HILUM_LEDGER", "") or f"sqlite:///{state / 'ledger.sqlite'}")


def now() -> datetime:
    return datetime.now(UTC)


def _engine_words(is_sqlite: bool) -> dict[str, Any]:
    if is_sqlite:
        return {"connect_args": {"timeout": BUSY_SECONDS}}
    # a server that was started anew is found again, and its words never quote what a row holds
    return {"pool_pre_ping": True, "hide_parameters": True}


def _tame(engine: sql.Engine) -> None:
    """What is committed outlives a power cut; readers never wait for a writer; transactions begin where we say."""

    @sql.event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        connection.isolation_level = None  # the driver would begin transactions by itself, and too late
        for word in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_SECONDS * 1000}"):
            connection.execute(f"PRAGMA {word}")


def _row(arrival: Arrival, number: int, moment: float) -> Mapping[str, Any]:
    place = arrival.place
    return {
        **{"object": place.object, "study": place.study, "series": place.series, "number": number},
        **{"bytes": arrival.bytes, "sha256": arrival.sha256, "kind": arrival.kind, "source": arrival.source},
        **{"arrived": moment, "present": True},
    }


def _arrival(row: Any) -> Arrival:
    place = Place(study=row.study, series=row.series, object=row.object)
    return Arrival(place=place, bytes=row.bytes, sha256=row.sha256, kind=row.kind, source=row.source)


def _study(row: Any, series: dict[str, int]) -> Study:
    return Study(
        study=row.study,
        objects=row.objects,
        frozen=row.frozen,
        revision=row.revision,
        first=datetime.fromtimestamp(row.first, UTC),
        last=datetime.fromtimestamp(row.last, UTC),
        series=series,
    )


def _revision(connection: sql.Connection, study: str, number: int, upto: int) -> Revision:
    wanted = sql.select(objects.c.object, objects.c.sha256).where(
        objects.c.study == study, objects.c.number <= upto, objects.c.present
    )
    digest = hashlib.sha256()
    for key, content in connection.execute(wanted.order_by(objects.c.object)):
        digest.update(f"{key} {content}\n".encode())
    return Revision(study=study, number=number, objects=upto, digest=digest.hexdigest())
