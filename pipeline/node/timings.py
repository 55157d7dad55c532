"""How long stories are in each state, counted as they end: a histogram in the rows, one for all processes of a node."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import sqlalchemy as sql
from sqlalchemy.dialects import postgresql, sqlite

from .ledger import tables

BOUNDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0, 14400.0)
"""Seconds: from a read-back, which is a tenth, to a night in the queue; each about three times the one before."""
ENDLESS = -1.0
"""The bound of what took longer than all of them: databases agree on no infinity."""

seconds = sql.Table(
    "node_seconds",
    tables,
    sql.Column("state", sql.String(16), primary_key=True),
    sql.Column("bound", sql.Float, primary_key=True),
    sql.Column("times", sql.BigInteger, nullable=False),
    sql.Column("sum", sql.Float, nullable=False),
)

INSERTS: Mapping[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def spent(moments: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Each state since the story was last queued, in order, and how long it lasted; the last one, which lasts, is not there."""
    first = max((n for n, one in enumerate(moments) if one["state"] == "queued"), default=0)
    now = moments[first:]
    return [(str(one["state"]), float(then["at"]) - float(one["at"])) for one, then in pairwise(now)]


def count(connection: sql.Connection, lasted: Iterable[tuple[str, float]]) -> None:
    """Add them, within a transaction that somebody else ends: with the story's end, or not at all."""
    found: dict[tuple[str, float], list[float]] = {}
    for state, time in lasted:
        found.setdefault((state, _bound(time)), []).append(time)
    for (state, bound), times in sorted(found.items()):  # in one order by all, so that no two wait for each other
        added = INSERTS[connection.dialect.name](seconds).values(
            state=state, bound=bound, times=len(times), sum=sum(times)
        )
        more = {"times": seconds.c.times + len(times), "sum": seconds.c.sum + sum(times)}
        connection.execute(added.on_conflict_do_update(index_elements=["state", "bound"], set_=more))


def _bound(time: float) -> float:
    return next((bound for bound in BOUNDS if time <= bound), ENDLESS)


def counted(connection: sql.Connection) -> dict[str, tuple[dict[float, int], float]]:
    """By state: how many lasted up to each bound and longer than the one before, and how long all of them did."""
    found: dict[str, tuple[dict[float, int], float]] = {}
    for row in connection.execute(sql.select(seconds).order_by(seconds.c.state, seconds.c.bound)):
        counts, total = found.get(row.state, ({}, 0.0))
        found[row.state] = {**counts, row.bound: int(row.times)}, total + row.sum
    return found
