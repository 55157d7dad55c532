"""A run in MLflow for each story that ended: which package, how long each step took, how much of each label it found.

Told in the background, from the rows: a store that is away delays nothing and misses nothing, and one that was told twice has
one run. It learns of nobody but the story's key, which outside this node means nothing.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import sqlalchemy as sql
from sqlalchemy.engine import make_url

from ..report import FILE_NAME, Report
from ..tracking import Over, TrackingError, is_refusal, tell_of
from .desk import Desk
from .ledger import tables
from .stories import ENDED, Story, stories
from .timings import spent

logger = logging.getLogger(__name__)

AT_ONCE = 20
"""Stories between two looks whether the node is to stop; each takes a tenth of a second."""

LOOK_S = 5.0
"""Between two looks at all that ended; nobody reads a run sooner."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 600.0
"""While the store is away: as a person starts it anew, and as often as costs nothing."""

tracked = sql.Table(
    "node_tracked",
    tables,
    sql.Column("study", sql.String(20), primary_key=True),
    sql.Column("revision", sql.Integer, primary_key=True),
    sql.Column("route", sql.String(64), primary_key=True),
    sql.Column("attempt", sql.Integer, primary_key=True),
)


@dataclass(kw_only=True, eq=False)
class Tracking:
    """Tells the store of what ended since it was last told. One per node."""

    desk: Desk
    pause_s: float = field(default=0.0, init=False)
    """How long to leave the store alone; 0 while it answers."""
    not_before: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.desk.ledger.make(tracked)

    @property
    def uri(self) -> str:
        """Where it is; empty where there is none."""
        return self.desk.node.tracking or os.environ.get("HILUM_TRACKING", "")

    def look(self) -> None:
        """Once over the stories that ended and were not told of."""
        if not self.uri or time.monotonic() < self.not_before:
            return
        try:
            untold = self._untold()
            if untold:
                _knock(self.uri)
            for story in untold:
                self._tell(story)
        except TrackingError as error:
            self._leave_alone(error)
        else:
            self.pause_s, self.not_before = 0.0, time.monotonic() + LOOK_S

    def _tell(self, story: Story) -> None:
        try:
            tell_of(_over(story, self.desk), uri=self.uri, experiment=f"node-{story.route}")
        except TrackingError as error:
            if not isinstance(error.__cause__, Exception) or not is_refusal(error.__cause__):
                raise
            logger.warning("study %s on %s: the tracking store refuses its run", story.study, story.route)
        said = {"study": story.study, "revision": story.revision, "route": story.route, "attempt": story.attempt}
        with self.desk.ledger.writing() as connection:
            connection.execute(sql.delete(tracked).where(*(tracked.c[name] == one for name, one in said.items())))
            connection.execute(sql.insert(tracked).values(**said))

    def _untold(self) -> list[Story]:
        """The oldest first."""
        names = ("study", "revision", "route", "attempt")
        columns = [stories.c[name] for name in names[:3]]
        same = sql.select(tracked.c.study).where(*(tracked.c[name] == stories.c[name] for name in names)).exists()
        ended = sql.select(*columns).where(stories.c.state.in_(ENDED), ~same).order_by(stories.c.changed)
        with self.desk.ledger.reading() as connection:
            rows = connection.execute(ended.limit(AT_ONCE)).all()
        return [story for row in rows if (story := self.desk.stories.get(*row)) and story.state in ENDED]

    def _leave_alone(self, error: TrackingError) -> None:
        if not self.pause_s:
            logger.warning(
                "the tracking store is away (%s); runs wait until it is back", type(error.__cause__).__name__
            )
        self.pause_s = min(LONGEST_PAUSE_S, 2 * self.pause_s or FIRST_PAUSE_S)
        self.not_before = time.monotonic() + self.pause_s


PORTS = {"postgresql": 5432, "mysql": 3306, "http": 80, "https": 443}
KNOCK_S = 5.0
"""For one machine to say that it is there, in a house or between two."""


def _knock(uri: str) -> None:
    """Whether anybody is there, before MLflow asks: of a database that is away it asks for an hour, and nobody can stop it."""
    url = make_url(uri)
    if url.host is None:
        return
    try:
        port = url.port or PORTS.get(url.get_backend_name(), 443)
        socket.create_connection((url.host, port), timeout=KNOCK_S).close()
    except OSError as error:
        raise TrackingError("The tracking store is away; one that answers is needed. Start it.") from error


def _over(story: Story, at: Desk) -> Over:
    package = story.facts.get("package", {})
    params = {"package": str(package.get("name", "")), "package_id": str(package.get("id", ""))}
    tags = {"state": story.state, "code": story.code, "revision": str(story.revision), "attempt": str(story.attempt)}
    steps = tuple((f"seconds/{state}", seconds, 0) for state, seconds in spent(story.facts.get("moments", ())))
    return Over(
        key=story.id, name=f"{story.study}-{story.revision}", params=params, tags=tags,
        metrics=(*steps, *_volumes(story, at)),
        began=story.began, ended=story.changed, is_good=story.state == "done",
    )  # fmt: skip


def _volumes(story: Story, at: Desk) -> Iterator[tuple[str, float, int]]:
    """Of every case a point; of results that are let go of already, none."""
    results = at.folder(story.study, story.revision, story.route) / "results"
    for number, path in enumerate(sorted(results.glob(f"[!.]*/{FILE_NAME}"))):
        for label, volume in Report.read(path).volumes_ml.items():
            yield f"volume_ml/{label}", volume, number
