"""What became of each revision of a study on each route: own tables beside the ledger's, without a word of a header."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import sqlalchemy as sql

from . import timings
from .ledger import Ledger, revisions, tables

State = Literal[
    "queued", "held", "choosing", "segmenting", "sending", "confirming", "done", "refused", "dead", "superseded"
]
ENDED: tuple[State, ...] = ("done", "refused", "dead", "superseded")
UNENDED: tuple[State, ...] = tuple(state for state in get_args(State) if state not in ENDED)

stories = sql.Table(
    "node_stories",
    tables,
    sql.Column("study", sql.String(20), primary_key=True),
    sql.Column("revision", sql.Integer, primary_key=True),
    sql.Column("route", sql.String(64), primary_key=True),
    sql.Column("attempt", sql.Integer, nullable=False),
    sql.Column("state", sql.String(16), nullable=False),
    sql.Column("code", sql.String(32), nullable=False),
    sql.Column("words", sql.Text, nullable=False),
    sql.Column("facts", sql.Text, nullable=False),
    sql.Column("began", sql.Float, nullable=False, index=True),
    sql.Column("changed", sql.Float, nullable=False),
    # the page and the metrics ask every few seconds: without these, a year's stories are read through each time
    sql.Index("node_stories_by_code", "state", "code"),
    sql.Index("node_stories_by_time", "state", "began"),
)
begun = sql.Table(
    "node_begun",
    tables,
    sql.Column("study", sql.String(20), primary_key=True),
    sql.Column("revision", sql.Integer, primary_key=True),
)
"""Revisions whose stories were all written down: a route that comes into the config later is not for them."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """One revision of a study on one route."""

    study: str
    revision: int
    route: str
    attempt: int
    """How often an operator had it begin anew, this time included."""
    state: State
    code: str = ""
    """Why it is refused or dead: what metrics count by."""
    words: str = ""
    """The same for people, without patient data."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was chosen and why not the others, tries, what each target kept: for the page."""
    began: datetime
    changed: datetime

    @property
    def id(self) -> str:
        """Also the workflow's: one that was begun is never begun twice."""
        return f"{self.study}-{self.revision}-{self.route}-{self.attempt}"


class Stories:
    """The table. Several threads and processes may use it at once."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        for table in (stories, begun, timings.seconds):
            ledger.make(table)

    def begin(self, study: str, revision: int, route: str) -> Story:
        """A story that is there from now on; of one that was begun before, that one."""
        with self._writing() as connection:
            row = self._row(connection, study, revision, route)
            if row is None:
                values: dict[str, Any] = {"attempt": 1, "state": "queued", "code": "", "words": ""}
                values["facts"] = json.dumps({"moments": _moments({}, "", "queued")})
                values |= {"study": study, "revision": revision, "route": route, "began": _now(), "changed": _now()}
                # two processes may begin the same one at once: the second finds the first's
                added = timings.INSERTS[connection.dialect.name](stories).values(**values)
                connection.execute(added.on_conflict_do_nothing())
                row = self._row(connection, study, revision, route)
        return _story(row)

    def note(self, story: Story, state: State, code: str = "", words: str = "", **facts: Any) -> Story:
        """Where it is now; facts are added to those that are known."""
        with self._writing() as connection:
            row = connection.execute(sql.select(stories).where(*_is(story)).with_for_update()).one()
            known = json.loads(row.facts) | facts
            if row.state in ENDED and state not in ENDED:  # said by a process that lost the story to another
                state, code, words = row.state, row.code, row.words
            known["moments"] = _moments(known, row.state, state)
            if state in ENDED and row.state not in ENDED:
                timings.count(connection, timings.spent(known["moments"]))
            values = {"state": state, "code": code, "words": words, "facts": json.dumps(known), "changed": _now()}
            connection.execute(sql.update(stories).where(*_is(story)).values(**values))
            return _story(self._row(connection, story.study, story.revision, story.route))

    def remember(self, story: Story, **facts: Any) -> Story:
        """Facts for somebody who does not know what state the story is in by now."""
        with self._writing() as connection:
            row = connection.execute(sql.select(stories).where(*_is(story)).with_for_update()).one()
            known = json.dumps(json.loads(row.facts) | facts)
            connection.execute(sql.update(stories).where(*_is(story)).values(facts=known))
            return _story(self._row(connection, story.study, story.revision, story.route))

    def again(self, story: Story) -> Story:
        """A story that ended, to be begun anew."""
        with self._writing() as connection:
            row = connection.execute(sql.select(stories).where(*_is(story)).with_for_update()).one()
            known = json.loads(row.facts)
            facts = json.dumps(known | {"moments": _moments(known, row.state, "queued")})
            values = {"attempt": story.attempt + 1, "state": "queued", "code": "", "words": "", "changed": _now()}
            values["facts"] = facts
            connection.execute(sql.update(stories).where(*_is(story), stories.c.state.in_(ENDED)).values(**values))
            return _story(self._row(connection, story.study, story.revision, story.route))

    def turn(
        self, story: Story, of: Sequence[State], state: State, *, anew: bool, code: str, words: str, **facts: Any
    ) -> Story | None:
        """A person's wish: into another state, `anew` as another attempt; None where it is no longer as that person saw it."""
        as_seen = (*_is(story), stories.c.attempt == story.attempt, stories.c.state.in_(of))
        with self._writing() as connection:
            row = connection.execute(sql.select(stories).where(*as_seen).with_for_update()).first()
            if row is None:
                return None
            values = {"attempt": row.attempt + anew, "state": state, "code": code, "words": words, "changed": _now()}
            known = json.loads(row.facts) | facts
            values["facts"] = json.dumps(known | {"moments": _moments(known, row.state, state)})
            connection.execute(sql.update(stories).where(*_is(story)).values(**values))
            return _story(self._row(connection, story.study, story.revision, story.route))

    def get(self, study: str, revision: int, route: str) -> Story | None:
        with self._reading() as connection:
            row = self._row(connection, study, revision, route)
        return None if row is None else _story(row)

    def all(self, most: int = 500) -> list[Story]:
        """The newest first."""
        with self._reading() as connection:
            rows = connection.execute(sql.select(stories).order_by(stories.c.changed.desc()).limit(most)).all()
        return [_story(row) for row in rows]

    def some(
        self, states: Sequence[str] = (), route: str = "", study: str = "", skip: int = 0, most: int = 50
    ) -> tuple[list[Story], int]:
        """Those of these states, of that route and study, the newest first, from a place on; and how many there are."""
        wanted: list[sql.ColumnElement[bool]] = [stories.c.state.in_(states)] if states else []
        wanted += [stories.c.route == route] if route else []
        wanted += [stories.c.study == study] if study else []
        order = (stories.c.began.desc(), stories.c.study, stories.c.revision.desc(), stories.c.route)
        with self._reading() as connection:
            count = connection.execute(sql.select(sql.func.count()).select_from(stories).where(*wanted)).scalar_one()
            chosen = sql.select(stories).where(*wanted).order_by(*order).offset(skip).limit(most)
            return [_story(row) for row in connection.execute(chosen)], int(count)

    def of(self, study: str) -> list[Story]:
        """All of one study, the newest revision first."""
        wanted = sql.select(stories).where(stories.c.study == study)
        with self._reading() as connection:
            rows = connection.execute(wanted.order_by(stories.c.revision.desc(), stories.c.route)).all()
        return [_story(row) for row in rows]

    def unended(self) -> list[Story]:
        """Those that are queued or under way."""
        with self._reading() as connection:
            rows = connection.execute(sql.select(stories).where(stories.c.state.in_(UNENDED))).all()
        return [_story(row) for row in rows]

    def set_out(self, study: str, revision: int) -> None:
        """Every route that was there when it was frozen has its story of this revision."""
        with self._writing() as connection:
            known = connection.execute(sql.select(begun).where(*_is_of(study, revision))).first()
            if known is None:
                connection.execute(sql.insert(begun).values(study=study, revision=revision))

    def not_set_out(self) -> list[tuple[str, int]]:
        """Revisions that were frozen and do not all have their stories: the process was killed in between."""
        there = sql.select(begun.c.study).where(
            begun.c.study == revisions.c.study, begun.c.revision == revisions.c.number
        )
        with self._reading() as connection:
            rows = connection.execute(sql.select(revisions.c.study, revisions.c.number).where(~there.exists())).all()
        return [(row.study, row.number) for row in rows]

    def ended_with(self, code: str) -> list[Story]:
        """Those that ended for that reason."""
        wanted = (stories.c.state.in_(ENDED), stories.c.code == code)
        with self._reading() as connection:
            return [_story(row) for row in connection.execute(sql.select(stories).where(*wanted))]

    def counts(self) -> Mapping[tuple[str, str], int]:
        """How many there are by state and code."""
        counted = sql.select(stories.c.state, stories.c.code, sql.func.count()).group_by(
            stories.c.state, stories.c.code
        )
        with self._reading() as connection:
            return {(state, code): int(count) for state, code, count in connection.execute(counted)}

    def seconds(self) -> dict[str, tuple[dict[float, int], float]]:
        """How long stories that ended were in each state: counts by bound, and the sum."""
        with self._reading() as connection:
            return timings.counted(connection)

    def _row(self, connection: sql.Connection, study: str, revision: int, route: str) -> Any:
        wanted = (stories.c.study == study, stories.c.revision == revision, stories.c.route == route)
        return connection.execute(sql.select(stories).where(*wanted)).first()

    def _writing(self) -> AbstractContextManager[sql.Connection]:
        return self._ledger.writing()

    def _reading(self) -> AbstractContextManager[sql.Connection]:
        return self._ledger.reading()


MOST_MOMENTS = 200
"""Of a story that is begun anew again and again: the newest are kept, some twenty tries with five targets."""


def _moments(facts: Mapping[str, Any], before: str, state: str) -> list[dict[str, Any]]:
    """When the story came into each state, the oldest first: `[{"state": "queued", "at": seconds since 1970}, ...]`."""
    known = list(facts.get("moments", ()))
    if state != before:
        known.append({"state": state, "at": _now()})
    return known[-MOST_MOMENTS:]


def _now() -> float:
    return datetime.now(UTC).timestamp()


def _is_of(study: str, revision: int) -> tuple[sql.ColumnElement[bool], ...]:
    return begun.c.study == study, begun.c.revision == revision


def _is(story: Story) -> tuple[sql.ColumnElement[bool], ...]:
    return stories.c.study == story.study, stories.c.revision == story.revision, stories.c.route == story.route


def _story(row: Any) -> Story:
    return Story(
        study=row.study, revision=row.revision, route=row.route, attempt=row.attempt, state=row.state, code=row.code,
        words=row.words, facts=json.loads(row.facts), began=datetime.fromtimestamp(row.began, UTC),
        changed=datetime.fromtimestamp(row.changed, UTC),
    )  # fmt: skip
