"""When a study is whole: its source says so, or nothing has come for long enough. Then its revision is frozen and begun."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from .contexts import stored
from .desk import Desk
from .keeper import Keeper
from .nouns import Study
from .peers import Line, PeerError, Refused, classes_of, counts_of
from .workflow import enqueue

logger = logging.getLogger(__name__)

KEEP_HOUSE_SECONDS = 60.0
"""Between two looks at what may be let go of: what is kept for hours is not missed for a minute."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a source last answered about a study."""

    moment: float
    series: Mapping[str, int] | None
    """Objects of each series, by its key; None where it did not say."""


@dataclass(kw_only=True, eq=False)
class Watcher:
    """Looks at every study that has something new, again and again. One per node."""

    desk: Desk
    begin: Callable[..., None] = enqueue
    said: dict[str, Said] = field(default_factory=dict)
    """By study."""
    away: dict[str, float] = field(default_factory=dict)
    """When a peer was last not there: with each study that waits for its answer all others would wait."""
    begun: set[str] = field(default_factory=set)
    """Stories that are known to be in the queue: to say it again costs a transaction each."""
    kept_house: float = 0.0
    """When the keeper last looked; at the first look it does."""

    def look(self) -> None:
        """Once over all studies, then over all stories that nobody began; now and then over what was forgotten, or may go."""
        for study in self.desk.ledger.waiting():
            verdict = self._verdict(study)
            if verdict is not None:
                self._freeze(study, verdict)
        keeps_house = not self.kept_house or time.monotonic() - self.kept_house > KEEP_HOUSE_SECONDS
        if keeps_house:
            for name, number in self.desk.stories.not_set_out():
                self._set_out(name, number)
        self._begin_queued()
        if keeps_house:
            Keeper(desk=self.desk, begin=self.begin).look()
            self.kept_house = time.monotonic()

    def _verdict(self, study: Study) -> str | None:
        """None: wait. Else what is to be said of its wholeness; empty where nothing is."""
        waiting = self.desk.node.waiting
        silent = (datetime.now(UTC) - study.last).total_seconds()
        if silent < waiting.settled_s:
            return None
        there = self._expected(study)
        if there is None:
            return "" if silent >= waiting.quiet_s else None
        missing = sum(_lacking(study, there).values())
        if not missing:
            return ""
        if silent >= waiting.cap_s:
            return f"{missing} of {sum(there.values())} objects had not come when the wait ended"
        return None

    def _expected(self, study: Study) -> Mapping[str, int] | None:
        """How many objects of each series the source says there are; None where it does not say."""
        last = self.said.get(study.study)
        if last is None or time.monotonic() - last.moment >= self.desk.node.waiting.ask_every_s:
            self.said[study.study] = last = Said(moment=time.monotonic(), series=self._asked(study) or None)
        return last.series

    def _asked(self, study: Study) -> Mapping[str, int] | None:
        first = next(iter(self.desk.ledger.since(study.study)), None)
        peer = self.desk.node.peers.get(first.source) if first else None
        if first is None or peer is None or not peer.answers or self._was_away(first.source):
            return None
        uid = self.desk.spool.uids(first.place)["StudyInstanceUID"]
        try:
            return self._counted(study, uid, Line.to(first.source, self.desk.node))
        except PeerError as error:
            self.away[first.source] = time.monotonic()
            logger.info("study %s: its source does not say how much there is (%s)", study.study, type(error).__name__)
        except Refused as error:
            logger.info("study %s: its source does not say how much there is (%s)", study.study, type(error).__name__)
        return None

    def _was_away(self, peer: str) -> bool:
        moment = self.away.get(peer)
        return moment is not None and time.monotonic() - moment < self.desk.node.waiting.ask_every_s

    def _counted(self, study: Study, uid: str, line: Line) -> dict[str, int]:
        """Objects of each series as the source counts them, but what this node would not take.

        Series by series where fewer have come than the source has: it may count reports, a vendor's own, or our results.
        """
        counts, only_images = counts_of(uid, line), self.desk.node.receiving.kinds == "images"
        keys = {self.desk.spool.keys.series(series): series for series in counts.series}
        there = {
            key: 0 if only_images and series in counts.without_images else counts.series[series]
            for key, series in keys.items()
        }
        if lacking := _lacking(study, there):
            taken, ours = {"", *stored(self.desk.node.receiving.kinds)}, self._our_series(study.study)
            there |= dict.fromkeys(lacking.keys() & ours, 0)
            for key in lacking.keys() - ours:
                there[key] = sum(kind in taken for kind in classes_of(uid, keys[key], line).values())
        return there

    def _our_series(self, study: str) -> set[str]:
        """Keys of the series that we made ourselves, and that the source may have been given."""
        import pydicom

        results = (self.desk.node.state / "work").glob(f"{study}-*/*/results/[!.]*/*.dcm")
        uids = {str(pydicom.dcmread(path, specific_tags=["SeriesInstanceUID"]).SeriesInstanceUID) for path in results}
        return {self.desk.spool.keys.series(uid) for uid in uids}

    def _freeze(self, study: Study, said: str) -> None:
        revision = self.desk.ledger.freeze(study.study)
        if revision is None:
            return
        self.said.pop(study.study, None)
        self.desk.audit.note("study", study=study.study, revision=revision.number, objects=revision.objects)
        self._set_out(study.study, revision.number, said)

    def _set_out(self, study: str, revision: int, said: str = "") -> None:
        """A story for each route; those of other sources end at once, those of earlier revisions need not be finished."""
        sources = {one.source for one in self.desk.ledger.since(study)}
        for name, route in self.desk.node.routes.items():
            story = self.desk.stories.begin(study, revision, name)
            if said:
                story = self.desk.stories.remember(story, incomplete=said)
            if route.sources and not sources & set(route.sources):
                self.desk.stories.note(story, "refused", "other_source", "this route is for studies of other peers")
        self._supersede(study, revision)
        self.desk.stories.set_out(study, revision)

    def _supersede(self, study: str, number: int) -> None:
        """What waits is not begun any more; what is under way finds out before its next step."""
        words = f"more of the study came: revision {number} takes its place"
        for story in self.desk.stories.unended():
            if story.study == study and story.revision < number and story.state in ("queued", "held"):
                self.desk.stories.note(story, "superseded", "superseded", words, superseded_by=number)

    def _begin_queued(self) -> None:
        """Those that were written down just now, or just before the process was killed.

        At the first look all that are under way: rows that were restored from a backup may be ahead of the workflows.
        """
        routes, is_start = self.desk.node.routes, not self.kept_house
        meant = ("queued", "choosing", "segmenting", "sending", "confirming") if is_start else ("queued",)
        queued = {story.id: story for story in self.desk.stories.unended() if story.state in meant}
        for name in queued.keys() - self.begun:
            if queued[name].route in routes:
                self.begin(queued[name], routes[queued[name].route])
        self.begun = set(queued)


def _lacking(study: Study, there: Mapping[str, int]) -> dict[str, int]:
    """Of which series objects have not come, and how many."""
    lacking = {key: count - study.series.get(key, 0) for key, count in there.items()}
    return {key: count for key, count in lacking.items() if count > 0}
