"""What is no longer needed goes: received objects once their study is done on every route, results when they are old.

A dead letter keeps everything: somebody may mend what was wrong and begin it anew. What was let go of is still known, so
that the same study sent again is taken again, and what waited for it goes on.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import sqlalchemy as sql

from .desk import Desk
from .ledger import objects, studies
from .nouns import Held, Revision
from .shadow import is_awaited
from .stories import ENDED, Story
from .submissions import submissions
from .workflow import enqueue, forget

logger = logging.getLogger(__name__)

HOUR = 3600.0

OVER = ("done", "refused")
"""How the stories of a study ended that nobody needs any more."""


@dataclass(kw_only=True, eq=False)
class Keeper:
    """Looks at everything that is kept."""

    desk: Desk
    begin: Callable[..., None] = enqueue

    def look(self) -> None:
        """Once over all that may go, and over what came back."""
        for study in self._settled():
            self._release(study)
        for key, route in self._submitted():
            self._remove(key, route)
        for folder in sorted((self.desk.node.state / "work").glob("*-*/*")):
            self._clear(folder)
        for story in self.desk.stories.ended_with("input_gone"):
            self._take_up(story)
        forget(datetime.now(UTC) - timedelta(hours=self.desk.node.keeping.results_h))

    def _settled(self) -> list[str]:
        """Studies that have objects here, all of them frozen, and of which nothing came for as long as input is kept."""
        before = datetime.now(UTC).timestamp() - self.desk.node.keeping.input_h * HOUR
        here = sql.select(objects.c.study).where(objects.c.study == studies.c.study, objects.c.present)
        wanted = (studies.c.objects == studies.c.frozen, studies.c.last <= before, here.exists())
        with self.desk.ledger.reading() as connection:
            return [row.study for row in connection.execute(sql.select(studies.c.study).where(*wanted))]

    def _submitted(self) -> list[tuple[str, str]]:
        """Submissions whose files are here, and their routes."""
        wanted = sql.select(submissions.c.submission, submissions.c.route).where(submissions.c.present)
        with self.desk.ledger.reading() as connection:
            return [(row.submission, row.route) for row in connection.execute(wanted)]

    def _release(self, study: str) -> None:
        """If every route is done with its newest revision, for long enough."""
        known = self.desk.ledger.study(study)
        if known is None or not self._is_over(self._deciding(study, known.revision)):
            return
        revision = self.desk.ledger.revision(study, known.revision)
        held = self.desk.ledger.held(revision, self.desk.spool) if revision else []
        if any(_age_h(one.path) < self.desk.node.keeping.input_h for one in held if one.path.exists()):
            return  # it was sent again
        for one in held:
            self.desk.spool.remove(one.arrival.place)
            self.desk.ledger.forget(one.arrival.place)
        for folder in self._work(study):
            shutil.rmtree(folder / "input", ignore_errors=True)
        self.desk.audit.note("release", study=study, revision=known.revision, objects=len(held))
        logger.info("study %s: %d objects were let go of", study, len(held))

    def _deciding(self, study: str, newest: int) -> list[Story]:
        """The stories of the newest revision; where one says that its answer is an earlier one's, that one too."""
        stories = self.desk.stories.of(study)
        deciding = [one for one in stories if one.revision == newest]
        named = {(one.facts["as_before"], one.route) for one in deciding if one.facts.get("as_before")}
        return deciding + [one for one in stories if (one.revision, one.route) in named]

    def _remove(self, key: str, route: str) -> None:
        """A submission's files, if its story is over for long enough."""
        if not self._is_over([one for one in self.desk.stories.of(key) if one.route == route]):
            return
        self.desk.submissions.remove(key)
        for folder in self._work(key):
            shutil.rmtree(folder / "input", ignore_errors=True)
        self.desk.audit.note("release", study=key)
        logger.info("submission %s: its files were let go of", key)

    def _is_over(self, stories: list[Story]) -> bool:
        hours = self.desk.node.keeping.input_h
        if any(is_awaited(self.desk, one) for one in stories):
            return False
        return bool(stories) and all(one.state in OVER and _hours_since(one.changed) >= hours for one in stories)

    def _work(self, study: str) -> Iterator[Path]:
        return (self.desk.node.state / "work").glob(f"{study}-*/*")

    def _clear(self, folder: Path) -> None:
        """Results and what they were made of, when they are old enough."""
        study, _, number = folder.parent.name.rpartition("-")
        if not number.isdecimal():
            return
        story = self.desk.stories.get(study, int(number), folder.name)
        if story is None or story.state not in ENDED or story.state == "dead":
            return
        if _hours_since(story.changed) < self.desk.node.keeping.results_h or self._is_awaited(story):
            return
        shutil.rmtree(folder)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
        logger.info("study %s revision %d on %s: its results were let go of", study, story.revision, story.route)

    def _is_awaited(self, story: Story) -> bool:
        """A newer revision may say that its answer is this one's: then this one's results are kept as long."""
        known = self.desk.ledger.study(story.study)
        if known is None:
            return False
        newer = (
            self.desk.stories.get(story.study, n, story.route) for n in range(story.revision + 1, known.revision + 1)
        )
        return any(
            one.facts.get("as_before") == story.revision
            and _hours_since(one.changed) < self.desk.node.keeping.results_h
            for one in newer
            if one is not None
        )

    def _take_up(self, story: Story) -> None:
        """A story that ended because objects were gone, once all are here again: that is what its words asked for."""
        known, route = self.desk.ledger.study(story.study), self.desk.node.routes.get(story.route)
        if known is None or route is None or known.revision != story.revision:
            return
        revision = self.desk.ledger.revision(story.study, story.revision)
        if revision is None or len(self._here(revision)) < revision.objects:
            return
        self.begin(self.desk.stories.again(story), route)

    def _here(self, revision: Revision) -> list[Held]:
        return [one for one in self.desk.ledger.held(revision, self.desk.spool) if one.path.exists()]


def _hours_since(moment: datetime) -> float:
    return (datetime.now(UTC) - moment).total_seconds() / HOUR


def _age_h(path: Path) -> float:
    return (time.time() - path.stat().st_mtime) / HOUR
