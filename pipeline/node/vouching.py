"""Storage commitment for what we sent: a target is asked whether it keeps our results, and its answer comes to our listener.

What was asked is a row before it is asked, so that an answer is never quicker than we are, and is understood by whichever
process hears it. Rows hold keys: the true UIDs are in the results, and are read from there.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sql
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from .ledger import Ledger, tables
from .nouns import NOT_ASKED, Keys, Refused

vouchings = sql.Table(
    "node_vouchings",
    tables,
    sql.Column("transaction", sql.String(20), primary_key=True),
    sql.Column("story", sql.String(120), nullable=False, index=True),
    sql.Column("target", sql.String(64), nullable=False),
    sql.Column("objects", sql.Text, nullable=False),
    sql.Column("asked", sql.Float),
    sql.Column("answered", sql.Float),
    sql.Column("failed", sql.Text, nullable=False),
)


@dataclass(frozen=True, kw_only=True)
class Vouching:
    """A question whether a target keeps objects."""

    transaction: str
    """Its key."""
    asked: datetime | None
    """None where a process was killed before it asked, or before it knew that it had."""
    answered: datetime | None
    failed: frozenset[str]
    """Keys of the objects that the target does not keep, or of which it said nothing; empty as long as it is silent."""


class Vouchings:
    """The table. Workers ask, listeners hear; several processes may use it at once."""

    def __init__(self, ledger: Ledger, keys: Keys) -> None:
        self._ledger, self._keys = ledger, keys
        ledger.make(vouchings)

    def begin(self, story: str, target: str, objects: Sequence[str]) -> str:
        """The UID of a transaction about these objects, given by their UIDs; what was asked for this story before is void."""
        uid = str(generate_uid(prefix=None))
        row = {"transaction": self._keys.transaction(uid), "story": story, "target": target}
        row |= {"objects": json.dumps([self._keys.object(one) for one in objects]), "failed": "[]"}
        with self._ledger.writing() as connection:
            connection.execute(sql.delete(vouchings).where(vouchings.c.story == story, vouchings.c.target == target))
            connection.execute(sql.insert(vouchings).values(**row))
        return uid

    def asked(self, uid: str) -> None:
        """The target took the question."""
        this = vouchings.c.transaction == self._keys.transaction(uid)
        with self._ledger.writing() as connection:
            connection.execute(sql.update(vouchings).where(this).values(asked=_now()))

    def of(self, story: str, target: str) -> Vouching | None:
        """What was asked of a target for a story."""
        wanted = sql.select(vouchings).where(vouchings.c.story == story, vouchings.c.target == target)
        with self._ledger.reading() as connection:
            row = connection.execute(wanted).first()
        if row is None:
            return None
        return Vouching(
            transaction=row.transaction, asked=_moment(row.asked), answered=_moment(row.answered),
            failed=frozenset(json.loads(row.failed)),
        )  # fmt: skip

    def hear(self, told: Dataset, source: str) -> None:
        """A target's answer; refused where nobody asked that target. What it does not name it does not keep."""
        key = self._keys.transaction(str(told.get("TransactionUID") or ""))
        safe = {self._keys.object(str(one.get("ReferencedSOPInstanceUID"))) for one in _kept(told)}
        this = (vouchings.c.transaction == key, vouchings.c.target == source)
        with self._ledger.writing() as connection:
            row = connection.execute(sql.select(vouchings).where(*this).with_for_update()).first()
            if row is None:
                connection.rollback()
                raise Refused(NOT_ASKED)
            failed = sorted(set(json.loads(row.objects)) - safe)
            answer = {"answered": _now(), "failed": json.dumps(failed)}
            connection.execute(sql.update(vouchings).where(*this).values(**answer))

    def forget(self, story: str) -> None:
        """What was asked for a story that ended."""
        with self._ledger.writing() as connection:
            connection.execute(sql.delete(vouchings).where(vouchings.c.story == story))


def _kept(told: Dataset) -> Sequence[Dataset]:
    return tuple(told.get("ReferencedSOPSequence") or ())


def _moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _now() -> float:
    return datetime.now(UTC).timestamp()
