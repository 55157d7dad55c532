"""A study's way once it is whole: choose, segment, send, prove that it was kept, let go. The one file that knows DBOS.

Each step's answer is written down before the next begins, so that whoever is killed goes on at the step in hand; every step
may run twice and then says and does the same. What fails for now is tried again after a pause that is written down, too;
what fails for good, or too often, ends as a dead letter with its reason, and its input is kept.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from preprocessing import dicom

from .config import Node
from .ledger import Ledger
from .nouns import Held, Revision
from .peers import Line, PeerError, Refused, kept, send
from .room import Answer, Job, Room
from .routes import Route
from .rules import Choice, SeriesFacts, choose, facts_of
from .spool import Spool
from .stories import Stories, Story

logger = logging.getLogger(__name__)

QUEUE = "stories"


@dataclass(frozen=True, kw_only=True, eq=False)
class Desk:
    """Everything that a story needs, in the process that works on it."""

    node: Node
    spool: Spool
    ledger: Ledger
    stories: Stories
    rooms: list[Room] = field(default_factory=list)
    """Those that nobody is in just now."""

    @contextmanager
    def room(self) -> Iterator[Room]:
        """A room to oneself: one that is open already, else a new one."""
        try:
            room = self.rooms.pop()
        except IndexError:
            room = Room(int(self.node.working.memory_gb * 1e9))
        try:
            yield room
        finally:
            self.rooms.append(room)

    def close(self) -> None:
        """End every room."""
        while self.rooms:
            self.rooms.pop().close()

    def folder(self, study: str, revision: int, route: str) -> Path:
        """Where a story's input is laid out and its results are made."""
        return self.node.state / "work" / f"{study}-{revision}" / route


_desk: Desk | None = None
"""DBOS finds steps by their names; what they work with is this process's own."""


def desk() -> Desk:
    assert _desk is not None, "open_desk comes first"
    return _desk


def start(at: Desk, address: str = "", executor: str = "node") -> None:
    """Begin to work: stories that a killed process left are taken up where they were."""
    global _desk
    from dbos import DBOS
    from dbos._serialization import DBOSPortableJSONSerializer  # JSON: the store holds nothing that could run

    _desk = at
    quiet = logging.getLogger("dbos")
    quiet.setLevel(logging.ERROR)
    DBOS(
        config={
            "name": "hilum-node",
            "system_database_url": address or f"sqlite:///{at.node.state / 'workflows.sqlite'}",
            "application_version": "1",  # by default a hash of the code: after an upgrade nobody would finish what was begun
            "executor_id": executor,
            "serializer": DBOSPortableJSONSerializer(),
            "log_level": "ERROR",
            "enable_otlp": False,
            "notification_listener_polling_interval_sec": 0.2,
        }
    )
    _register()
    DBOS.launch()
    DBOS.register_queue(QUEUE, worker_concurrency=at.node.working.workers, polling_interval_sec=0.2)


def stop() -> None:
    """No new step begins; what is under way is taken up at the next start."""
    from dbos import DBOS

    DBOS.destroy()
    desk().close()


def enqueue(story: Story, route: Route) -> None:
    """Have it worked on; once, however often this is called."""
    from dbos import DBOS, SetEnqueueOptions, SetWorkflowID

    with SetWorkflowID(story.id), SetEnqueueOptions(priority=route.priority):
        DBOS.enqueue_workflow(QUEUE, _registered["story"], story.study, story.revision, story.route)


_registered: dict[str, Callable[..., Any]] = {}


def _register() -> None:
    """Once in a process: DBOS keeps what it knows across starts."""
    from dbos import DBOS

    if not _registered:
        steps = {step.__name__: DBOS.step(name=step.__name__)(step) for step in (take, segment, hand_over, prove, end)}
        _registered.update(steps)
        _registered["story"] = DBOS.workflow(name="story")(_story)


def _story(study: str, revision: int, route: str) -> str:
    """One revision of a study on one route, from its series to its end."""
    words = (study, revision, route)
    taken = _registered["take"](*words)
    if taken["refusal"]:
        return _registered["end"](*words, "refused", taken["code"], taken["refusal"])
    for case in taken["cases"]:
        reason = _until_done("segment", *words, case)
        if reason:
            return _registered["end"](*words, reason["state"], reason["code"], reason["words"])
    for target in taken["targets"]:
        for step in ("hand_over", "prove"):
            reason = _until_done(step, *words, target)
            if reason:
                return _registered["end"](*words, reason["state"], reason["code"], reason["words"])
    return _registered["end"](*words, "done", "", "")


def _until_done(step: str, *words: Any) -> dict[str, str] | None:
    """None once the step succeeded; else why it never will, or did not in so many tries."""
    from dbos import DBOS

    working = desk().node.working
    for tried in range(1, working.attempts + 1):
        said = _registered[step](*words)
        if said["status"] == "done":
            return None
        if said["status"] == "never":
            return {"state": said.get("state", "dead"), "code": said["code"], "words": said["words"]}
        if tried < working.attempts:
            DBOS.sleep(working.pause(tried))
    return {"state": "dead", "code": said["code"], "words": f"{said['words']} Tried {working.attempts} times."}


DONE = {"status": "done"}


def _later(code: str, words: str) -> dict[str, str]:
    return {"status": "later", "code": code, "words": words}


def _never(code: str, words: str, state: str = "dead") -> dict[str, str]:
    return {"status": "never", "code": code, "words": words, "state": state}


# the steps: plain functions of plain values


def take(study: str, revision: int, route: str) -> dict[str, Any]:
    """Which series the route's package is asked about: laid out as links, and why not the others."""
    at = desk()
    how, story = at.node.routes[route], _noted(study, revision, route, "choosing")
    held = at.ledger.held(_revision(study, revision), at.spool)
    missing = [one for one in held if not one.path.exists()]
    if missing:
        words = (
            f"{len(missing)} of {len(held)} objects are no longer in the spool; all are needed. Send the study again."
        )
        return {"cases": [], "targets": [], "refusal": words, "code": "input_gone"}
    choice = _choice(held, how)
    _note_choice(story, choice)
    if choice.refusal:
        return {"cases": [], "targets": [], "refusal": choice.refusal, "code": "no_series"}
    folder = at.folder(study, revision, route)
    cases = [_laid_out(case, list(how.take), folder / "input" / f"case-{n}") for n, case in enumerate(choice.chosen, 1)]
    return {"cases": cases, "targets": list(how.targets), "refusal": "", "code": ""}


def _choice(held: list[Held], how: Route) -> Choice:
    series, _ = dicom.series_in([one.path for one in held])
    return choose([facts_of(one) for one in series], how.take, how.prefer)


def _note_choice(story: Story, choice: Choice) -> None:
    """Under keys: what a person typed into a header is not kept."""
    desk().stories.note(
        story, "choosing",
        chosen=[[_told(one) for one in case] for case in choice.chosen],
        why_not=[_told(one) | {"why_not": reason} for one, reason in choice.why_not],
    )  # fmt: skip


def _told(facts: SeriesFacts) -> dict[str, Any]:
    return {
        "series": desk().spool.keys.series(facts.series.uid), "modality": facts.modality, "slices": facts.slices,
        "direction": facts.direction, "distance_mm": facts.distance_mm,
    }  # fmt: skip


def _laid_out(case: tuple[SeriesFacts, ...], channels: list[str], folder: Path) -> str:
    """A folder of links: one per channel where there are several, named so that they are brought together."""
    for channel, facts in zip(channels, case, strict=True):
        place = folder / channel if len(case) > 1 else folder
        place.mkdir(parents=True, exist_ok=True)
        for path in dict.fromkeys(facts.series.paths):
            link = place / path.name
            if not link.exists():
                os.link(path, link)
    return folder.name


def segment(study: str, revision: int, route: str, case: str) -> dict[str, str]:
    """One case through the route's package, in the room; what is complete is not made again."""
    at, how = desk(), desk().node.routes[route]
    story, folder = _noted(study, revision, route, "segmenting"), at.folder(study, revision, route)
    job = Job(
        paths=(str(folder / "input" / case),), package=str(how.package), out=str(folder / "results"),
        settings={"outputs": list(how.outputs), "output_options": how.output_options},
    )  # fmt: skip
    with at.room() as room:
        answer = room.work(job, at.node.working.seconds)
    logger.info("study %s revision %d on %s: %s %s", study, revision, route, answer.status, answer.code)
    at.stories.note(story, "segmenting", tries={**story.facts.get("tries", {}), case: asdict(answer)})
    return _judged(answer)


def _judged(answer: Answer) -> dict[str, str]:
    if answer.status == "done":
        return DONE
    if answer.status == "refused":
        return _never(
            answer.code, "the scan was refused when it was read; its report in the work folder says why", "refused"
        )
    return _later(answer.code, f"the case was not finished ({answer.status}, {answer.code}).")


def hand_over(study: str, revision: int, route: str, target: str) -> dict[str, str]:
    """Every DICOM object of the results to one target. What it has already it takes again and keeps once."""
    at, story = desk(), _noted(study, revision, route, "sending")
    paths = _results(study, revision, route)
    try:
        sent = send(paths, Line.to(target, at.node))
    except PeerError as error:
        return _later("target_away", str(error))
    except Refused as error:
        return _never("target_refuses", str(error))
    known = story.facts.get("sent", {})
    at.stories.note(
        story, "sending", sent={**known, target: {"stored": len(sent.stored), "unwanted": len(sent.unwanted)}}
    )
    if sent.unwanted:
        reasons = "; ".join(sorted(set(sent.unwanted.values())))
        return _never(
            "target_refuses", f"{target} does not take {len(sent.unwanted)} of {len(paths)} objects: {reasons}."
        )
    return DONE


def prove(study: str, revision: int, route: str, target: str) -> dict[str, str]:
    """That the target kept them, by its own word."""
    at, how = desk(), desk().node.routes[route]
    story = _noted(study, revision, route, "confirming")
    if how.proof == "none":
        return DONE
    try:
        missing = _not_kept(_results(study, revision, route), target)
    except PeerError as error:
        return _later("target_away", str(error))
    except Refused as error:
        return _never("no_proof", str(error))
    if missing:
        send(missing, Line.to(target, at.node))
        return _later("not_kept", f"{target} did not keep {len(missing)} objects; they were sent again.")
    at.stories.note(story, "confirming", proven={**story.facts.get("proven", {}), target: True})
    return DONE


def _not_kept(paths: list[Path], target: str) -> list[Path]:
    import pydicom

    at, of_series = desk(), dict[tuple[str, str], dict[str, Path]]()
    for path in paths:
        header = pydicom.dcmread(
            path, stop_before_pixels=True, specific_tags=["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"]
        )
        key = str(header.StudyInstanceUID), str(header.SeriesInstanceUID)
        of_series.setdefault(key, {})[str(header.SOPInstanceUID)] = path
    missing = []
    for (study_uid, series_uid), objects in of_series.items():
        there = kept(study_uid, series_uid, Line.to(target, at.node))
        missing += [path for uid, path in objects.items() if uid not in there]
    return missing


def end(study: str, revision: int, route: str, state: Any, code: str, words: str) -> str:
    """How it ended; the input of what is dead is kept, for another try."""
    _noted(study, revision, route, state, code, words)
    logger.info("study %s revision %d on %s ended: %s %s", study, revision, route, state, code)
    return str(state)


def _noted(study: str, revision: int, route: str, state: Any, code: str = "", words: str = "") -> Story:
    at = desk()
    return at.stories.note(at.stories.begin(study, revision, route), state, code, words)


def _revision(study: str, number: int) -> Revision:
    found = desk().ledger.revision(study, number)
    assert found is not None, "a story is begun of a revision that was frozen"
    return found


def _results(study: str, revision: int, route: str) -> list[Path]:
    return sorted((desk().folder(study, revision, route) / "results").glob("[!.]*/*.dcm"))
