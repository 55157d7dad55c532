"""When a study is whole: its source says so, or nothing has come for long enough. Then its revision is frozen and begun."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from .nouns import Study
from .peers import Counts, Line, PeerError, Refused, counts_of
from .stories import Story
from .workflow import Desk, enqueue

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Watcher:
    """Looks at every study that has something new, again and again. One per node."""

    desk: Desk
    begin: Callable[..., None] = enqueue
    asked: dict[str, tuple[float, int | None]] = field(default_factory=dict)
    """When the source of a study was last asked, and how many objects it says there are."""

    def look(self) -> None:
        """Once over all studies, then over all stories that nobody began."""
        for study in self.desk.ledger.waiting():
            verdict = self._verdict(study)
            if verdict is not None:
                self._freeze(study, verdict)
        self._make_up_leeway()

    def _verdict(self, study: Study) -> str | None:
        """None: wait. Else what is to be said of its wholeness; empty where nothing is."""
        waiting = self.desk.node.waiting
        silent = (datetime.now(UTC) - study.last).total_seconds()
        if silent < waiting.settled_s:
            return None
        there = self._expected(study)
        if there is None:
            return "" if silent >= waiting.quiet_s else None
        if study.objects >= there:
            return ""
        if silent >= waiting.cap_s:
            return f"{study.objects} of {there} objects had come when the wait ended"
        return None

    def _expected(self, study: Study) -> int | None:
        """How many objects the source says there are; None where it does not say."""
        moment, known = self.asked.get(study.study, (0.0, None))
        if moment and time.monotonic() - moment < self.desk.node.waiting.ask_every_s:
            return known
        answer = self._counts(study)
        known = None if answer is None else answer.objects or None
        self.asked[study.study] = time.monotonic(), known
        return known

    def _counts(self, study: Study) -> Counts | None:
        first = next(iter(self.desk.ledger.since(study.study)), None)
        peer = self.desk.node.peers.get(first.source) if first else None
        if first is None or peer is None or not peer.answers:
            return None
        uid = self.desk.spool.uids(first.place)["StudyInstanceUID"]
        try:
            return counts_of(uid, Line.to(first.source, self.desk.node))
        except (PeerError, Refused) as error:
            logger.info("study %s: its source does not say how much there is (%s)", study.study, type(error).__name__)
            return None

    def _freeze(self, study: Study, said: str) -> None:
        revision = self.desk.ledger.freeze(study.study)
        if revision is None:
            return
        self.asked.pop(study.study, None)
        for name, route in self.desk.node.routes.items():
            story = self.desk.stories.begin(study.study, revision.number, name)
            if said:
                story = self.desk.stories.note(story, story.state, incomplete=said)
            if self._is_open(study, route.sources):
                self.begin(story, route)
            else:
                self.desk.stories.note(story, "refused", "other_source", "this route is for studies of other peers")
        self._supersede(study.study, revision.number)

    def _is_open(self, study: Study, sources: tuple[str, ...]) -> bool:
        return not sources or any(one.source in sources for one in self.desk.ledger.since(study.study))

    def _supersede(self, study: str, number: int) -> None:
        """What is still under way for an earlier revision need not be finished."""
        for story in self.desk.stories.unended():
            if story.study == study and story.revision < number:
                self.desk.stories.note(story, story.state, superseded_by=number)

    def _make_up_leeway(self) -> None:
        """Revisions that were frozen, and stories that were written down, just before the process was killed."""
        routes = self.desk.node.routes
        for name in routes:
            for study, number in self.desk.stories.frozen_without(name):
                self.desk.stories.begin(study, number, name)
        for story in self.desk.stories.unended():
            if story.state == "queued" and story.route in routes:
                self.begin(story, routes[story.route])


def retry(story: Story, desk: Desk) -> Story:
    """An operator's wish: a story that ended is begun anew, from its first step."""
    again = desk.stories.again(story)
    enqueue(again, desk.node.routes[story.route])
    return again
