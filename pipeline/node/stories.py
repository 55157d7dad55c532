"""What became of each revision of a study on each route: own tables beside the ledger's, without a word of a header."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sql

from .ledger import Ledger, revisions, tables

State = Literal["queued", "choosing", "segmenting", "sending", "confirming", "done", "refused", "dead", "superseded"]
ENDED: tuple[State, ...] = ("done", "refused", "dead", "superseded")

stories = sql.Table(
    "node_stories",
    tables,
    sql.Column("study", sql.String(20), primary_key=True),
    sql.Column("revision", sql.Integer, primary_key=True),
    sql.Column("route", sql.String(64), primary_key=True),
    sql.Column("attempt", sql.Integer, nullable=False),
    sql.Column("state", sql.String(16), nullable=False, index=True),
    sql.Column("code", sql.String(32), nullable=False),
    sql.Column("words", sql.Text, nullable=False),
    sql.Column("facts", sql.Text, nullable=False),
    sql.Column("began", sql.Float, nullable=False),
    sql.Column("changed", sql.Float, nullable=False),
)


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
        stories.create(ledger.engine, checkfirst=True)

    def begin(self, study: str, revision: int, route: str) -> Story:
        """A story that is there from now on; of one that was begun before, that one."""
        with self._writing() as connection:
            row = self._row(connection, study, revision, route)
            if row is None:
                values: dict[str, Any] = {"attempt": 1, "state": "queued", "code": "", "words": "", "facts": "{}"}
                values |= {"study": study, "revision": revision, "route": route, "began": _now(), "changed": _now()}
                connection.execute(sql.insert(stories).values(**values))
                row = self._row(connection, study, revision, route)
        return _story(row)

    def note(self, story: Story, state: State, code: str = "", words: str = "", **facts: Any) -> Story:
        """Where it is now; facts are added to those that are known."""
        with self._writing() as connection:
            row = self._row(connection, story.study, story.revision, story.route)
            known = json.loads(row.facts) | facts
            values = {"state": state, "code": code, "words": words, "facts": json.dumps(known), "changed": _now()}
            connection.execute(sql.update(stories).where(*_is(story)).values(**values))
            return _story(self._row(connection, story.study, story.revision, story.route))

    def again(self, story: Story) -> Story:
        """A story that ended, to be begun anew."""
        with self._writing() as connection:
            values = {"attempt": story.attempt + 1, "state": "queued", "code": "", "words": "", "changed": _now()}
            connection.execute(sql.update(stories).where(*_is(story), stories.c.state.in_(ENDED)).values(**values))
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

    def unended(self) -> list[Story]:
        """Those that are queued or under way."""
        with self._reading() as connection:
            rows = connection.execute(sql.select(stories).where(stories.c.state.not_in(ENDED))).all()
        return [_story(row) for row in rows]

    def frozen_without(self, route: str) -> list[tuple[str, int]]:
        """Revisions that were frozen and have no story on that route: the process was killed in between."""
        there = sql.select(stories.c.study).where(
            stories.c.study == revisions.c.study, stories.c.revision == revisions.c.number, stories.c.route == route
        )
        with self._reading() as connection:
            rows = connection.execute(sql.select(revisions.c.study, revisions.c.number).where(~there.exists())).all()
        return [(row.study, row.number) for row in rows]

    def counts(self) -> Mapping[tuple[str, str], int]:
        """How many there are by state and code."""
        counted = sql.select(stories.c.state, stories.c.code, sql.func.count()).group_by(
            stories.c.state, stories.c.code
        )
        with self._reading() as connection:
            return {(state, code): int(count) for state, code, count in connection.execute(counted)}

    def _row(self, connection: sql.Connection, study: str, revision: int, route: str) -> Any:
        wanted = (stories.c.study == study, stories.c.revision == revision, stories.c.route == route)
        return connection.execute(sql.select(stories).where(*wanted)).first()

    def _writing(self) -> AbstractContextManager[sql.Connection]:
        return self._ledger.writing()

    def _reading(self) -> AbstractContextManager[sql.Connection]:
        return self._ledger.reading()


def _now() -> float:
    return datetime.now(UTC).timestamp()


def _is(story: Story) -> tuple[sql.ColumnElement[bool], ...]:
    return stories.c.study == story.study, stories.c.revision == story.revision, stories.c.route == story.route


def _story(row: Any) -> Story:
    return Story(
        study=row.study, revision=row.revision, route=row.route, attempt=row.attempt, state=row.state, code=row.code,
        words=row.words, facts=json.loads(row.facts), began=datetime.fromtimestamp(row.began, UTC),
        changed=datetime.fromtimestamp(row.changed, UTC),
    )  # fmt: skip
