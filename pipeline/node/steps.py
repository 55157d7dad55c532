"""The steps of a study's way: plain functions of a desk and plain values, each of which may run twice and does the same.

What a step says is written down before the next begins: done, later (try again after a pause), wait
(look again after a pause, which is no try) or never, with its reason.
"""

import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from preprocessing import dicom

from . import rollback
from .desk import Desk
from .nouns import Held, Revision
from .peers import Line, PeerError, Refused, accepted, ask_commitment, kept, send
from .room import Answer, Job
from .routes import Route
from .rules import Choice, SeriesFacts, choose, facts_of
from .shadow import LABELS
from .spool import sync
from .stories import Story
from .submissions import outputs_for

logger = logging.getLogger(__name__)

DONE = {"status": "done"}


def _later(code: str, words: str) -> dict[str, str]:
    return {"status": "later", "code": code, "words": words}


def _never(code: str, words: str, state: str = "dead") -> dict[str, str]:
    return {"status": "never", "code": code, "words": words, "state": state}


def take(at: Desk, study: str, revision: int, route: str, attempt: int = 0) -> dict[str, Any]:
    """Which series the route's package is asked about: laid out as links, and why not the others; and where results go."""
    story = at.stories.begin(study, revision, route)
    if story.state == "held" or attempt not in (0, story.attempt):
        return _taken() | {"left": True}
    story = _noted(at, study, revision, route, "choosing")
    if _is_wish(story):  # a person wants what was made sent somewhere else, and nothing made anew
        return _taken(way=_way([story.facts["wish"]["target"]]))
    if newer := outdated(at, story):
        return _taken(ends=newer)
    if at.submissions.get(study) is not None:
        return _submitted(at, story)
    return _chosen(at, story)


def _taken(
    cases: Sequence[str] = (), way: Sequence[Sequence[str]] = (), ends: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The cases to be segmented, then steps with what each is about; or how the story ends here and now."""
    return {"cases": list(cases), "way": [list(one) for one in way], "ends": dict(ends) if ends else None}


def _ends(state: str, code: str, words: str) -> dict[str, str]:
    return {"state": state, "code": code, "words": words}


def _way(targets: Sequence[str], is_filed: bool = False) -> list[tuple[str, str]]:
    """From made results to their end: into the route's folder, then to each target and proven there."""
    filed = [("put_away", "")] if is_filed else []
    return filed + [(step, target) for target in targets for step in ("hand_over", "prove")]


def _is_wish(story: Story) -> bool:
    return bool(story.facts.get("wish", {}).get("attempt") == story.attempt)


def outdated(at: Desk, story: Story) -> dict[str, str] | None:
    """How a story ends of whose study more has come that changes its answer. None where it goes on."""
    known = at.ledger.study(story.study)
    if known is None or known.revision <= story.revision or _is_wish(story):
        return None
    newest = at.stories.get(story.study, known.revision, story.route)
    leans = newest is not None and newest.state == "done" and newest.facts.get("as_before") == story.revision
    if leans or story.facts.get("same_in") == known.revision:
        return None
    if _is_same_in(at, story, known.revision):
        at.stories.remember(story, same_in=known.revision)
        return None
    at.stories.remember(story, superseded_by=known.revision)
    return _ends("superseded", "superseded", f"more of the study came: revision {known.revision} takes its place")


def _is_same_in(at: Desk, story: Story, newest: int) -> bool:
    """Whether a newer revision is asked the very same: what came is a localiser, or our own picture that an archive sent on."""
    if "asked" not in story.facts:
        return False
    held = at.ledger.held(_revision(at, story.study, newest), at.spool)
    choice = _choice([one for one in held if one.path.exists()], at.node.routes[story.route])
    return _digest(at, story, choice) == story.facts["asked"]


def _chosen(at: Desk, story: Story) -> dict[str, Any]:
    how, revision = at.node.routes[story.route], _revision(at, story.study, story.revision)
    held = [one for one in at.ledger.held(revision, at.spool) if one.path.exists()]
    if gone := revision.objects - len(held):  # numbers have no gaps
        words = (
            f"{gone} of {revision.objects} objects are no longer in the spool; all are needed. Send the study again."
        )
        return _taken(ends=_ends("refused", "input_gone", words))
    choice = _choice(held, how)
    story = _note_choice(at, story, choice)
    if choice.refusal:
        return _taken(ends=_ends("refused", "no_series", choice.refusal))
    if made := _made_before(at, story):
        at.stories.note(story, "choosing", as_before=made)
        return _taken(ends=_ends("done", "", f"what came since revision {made} changes nothing on this route"))
    if story.facts.get("as_before"):  # not any more: a person wants an answer of its own
        story = at.stories.note(story, "choosing", as_before=0)
    if "dicom_seg" in how.outputs:
        _settle_kind(at, story, how)
    folder = at.folder(story.study, story.revision, story.route) / "input"
    cases = [_laid_out(case, list(how.take), folder / f"case-{n}") for n, case in enumerate(choice.chosen, 1)]
    return _taken(cases, _way(how.targets, is_filed=how.folder is not None))


def _submitted(at: Desk, story: Story) -> dict[str, Any]:
    """What was handed in without DICOM, as it is; the rules for series have nothing to choose from, and nobody is sent to."""
    how = at.node.routes[story.route]
    outputs, _ = outputs_for(how)
    at.stories.note(story, "choosing", without_dicom=list(outputs))
    cases = at.submissions.lay_out(story.study, at.folder(story.study, story.revision, story.route) / "input")
    if not cases:
        words = "The files of this submission are no longer here; they are needed. Hand them in again."
        return _taken(ends=_ends("refused", "input_gone", words))
    return _taken(cases, _way((), is_filed=how.folder is not None))


def _choice(held: list[Held], how: Route) -> Choice:
    series, _ = dicom.series_in([one.path for one in held])
    return choose([facts_of(one) for one in series], how.take, how.prefer)


def _note_choice(at: Desk, story: Story, choice: Choice) -> Story:
    """Under keys: what a person typed into a header is not kept."""
    return at.stories.note(
        story, "choosing",
        chosen=[[_told(at, one) for one in case] for case in choice.chosen],
        why_not=[_told(at, one) | {"why_not": reason} for one, reason in choice.why_not],
        asked=_digest(at, story, choice),
    )  # fmt: skip


def _digest(at: Desk, story: Story, choice: Choice) -> str:
    """Of everything that results depend on: the objects that were chosen, the package, and what the config says of the route."""
    objects = [[*sorted(path.name for path in one.series.paths), one.part] for case in choice.chosen for one in case]
    package, how = rollback.begun_with(at, story), at.node.routes[story.route]
    return hashlib.sha256(repr((objects, package, how)).encode()).hexdigest()


def _before(at: Desk, story: Story) -> Iterator[Story]:
    """The same route's stories of earlier revisions, the newest first."""
    for number in range(story.revision - 1, 0, -1):
        if (earlier := at.stories.get(story.study, number, story.route)) is not None:
            yield earlier


def _made_before(at: Desk, story: Story) -> int:
    """The earlier revision whose results are, or will be, what this one's would be; 0 where there is none, or a person wants
    them anew. Else our own picture, which an archive sends on to us, would go round for ever."""
    earlier = next((one for one in _before(at, story) if one.state not in ("superseded", "refused")), None)
    if earlier is None or story.attempt > 1 or earlier.facts.get("asked") != story.facts["asked"]:
        return 0
    return int(earlier.facts.get("as_before") or earlier.revision)


def _settle_kind(at: Desk, story: Story, how: Route) -> None:
    """Label maps where every target takes them, else binary, which all take. Asked once for each attempt, and noted."""
    if how.output_options.get("dicom_seg", {}).get("kind") or not how.targets:
        return
    known = story.facts.get("seg", {})
    if known.get("attempt") == story.attempt:
        return
    why = {target: _label_maps(at, target) for target in how.targets}
    kind = "labelmap" if set(why.values()) == {TAKES} else "binary"
    if known.get("kind", kind) != kind:  # what an earlier attempt made is of the other kind
        shutil.rmtree(at.folder(story.study, story.revision, story.route) / "results", ignore_errors=True)
    at.stories.note(story, "choosing", seg={"kind": kind, "attempt": story.attempt, "why": why})


LABELMAP, BINARY = "1.2.840.10008.5.1.4.1.1.66.7", "1.2.840.10008.5.1.4.1.1.66.4"
TAKES = "takes label maps"


def _label_maps(at: Desk, target: str) -> str:
    """What a target says of label maps, in words for people."""
    if target not in at.node.peers:
        return "is no longer among the peers"
    line = Line.to(target, at.node)
    if line.peer.web:
        return "is reached by the web, where nobody says beforehand what is taken"
    try:
        return TAKES if LABELMAP in accepted((LABELMAP, BINARY), line) else "takes no label maps"
    except PeerError:
        return "could not be asked"


def _told(at: Desk, facts: SeriesFacts) -> dict[str, Any]:
    return {
        "series": at.spool.keys.series(facts.series.uid), "modality": facts.told_modality, "slices": facts.slices,
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


def segment(at: Desk, study: str, revision: int, route: str, case: str) -> dict[str, str]:
    """One case through the route's package, in the room; what is complete is not made again."""
    story = at.stories.begin(study, revision, route)
    if newer := outdated(at, story):
        return _never(**newer)
    story, folder = _noted(at, study, revision, route, "segmenting"), at.folder(study, revision, route)
    package = rollback.begun_with(at, story)
    job = Job(
        paths=(str(folder / "input" / case),), package=str(rollback.shelf(at).place(package)), package_id=package,
        trusted=tuple(map(str, at.node.trusted)), out=str(folder / "results"),
        settings=_settings(at, story, case),
    )  # fmt: skip
    with at.room() as room:
        answer = room.work(job, at.node.working.seconds)
    logger.info("study %s revision %d on %s: %s %s", study, revision, route, answer.status, answer.code)
    at.stories.note(story, "segmenting", tries={**story.facts.get("tries", {}), case: asdict(answer)})
    return _judged(answer)


def _settings(at: Desk, story: Story, case: str) -> dict[str, Any]:
    how = at.node.routes[story.route]
    if at.submissions.get(story.study) is not None:
        outputs, options = outputs_for(how)
        return {"outputs": list(outputs), "output_options": options}
    options = {name: dict(said) for name, said in how.output_options.items()}
    if "seg" in story.facts:
        options.setdefault("dicom_seg", {})["kind"] = story.facts["seg"]["kind"]
    if story.revision > 1:
        # the first revision is the first answer, which has the number 0: its UIDs are those that anybody's run would have
        number = {"number": story.revision - 1, "replaces": _replaced(at, story, case)}
        for name in revised(how.outputs):
            options.setdefault(name, {}).setdefault("revision", number)
    wanted = [*how.outputs, LABELS] if how.shadow else how.outputs  # what a shadow is compared with; it is not sent
    return {"outputs": list(dict.fromkeys(wanted)), "output_options": options}


def revised(names: Sequence[str]) -> list[str]:
    """Those outputs that say which of several answers they are: the DICOM ones."""
    from .. import outputs  # not at the top: a node that only listens needs none of them

    return [name for name in names if any(field.name == "revision" for field in fields(outputs.load(name).Config))]


def _replaced(at: Desk, story: Story, case: str) -> str:
    """The folder of this case in the newest revision before whose results somebody has; empty where nobody has any."""
    earlier = next((one for one in _before(at, story) if _is_out(one)), None)
    if earlier is None:
        return ""
    cases = earlier.facts.get("chosen", [])
    wanted = _series_of(story.facts["chosen"], case)
    number = next((n for n, _ in enumerate(cases, 1) if _series_of(cases, f"case-{n}") == wanted), 0)
    if not number and len(cases) == len(story.facts["chosen"]) == 1:  # another series is better now: its answer counts
        number = 1
    folders = earlier.facts.get("tries", {}).get(f"case-{number}", {}).get("folders", ())
    results = at.folder(earlier.study, earlier.revision, earlier.route) / "results"
    return next((str(results / name) for name in folders if (results / name).is_dir()), "")


def _is_out(story: Story) -> bool:
    """Whether a target or a folder got results of it."""
    return bool(story.facts.get("sent")) or (story.state == "done" and not story.facts.get("as_before"))


def _series_of(cases: Sequence[Sequence[Mapping[str, Any]]], case: str) -> list[str]:
    return [str(one["series"]) for one in cases[int(case.removeprefix("case-")) - 1]]


def _judged(answer: Answer) -> dict[str, str]:
    if answer.status == "done":
        return DONE
    if answer.status == "refused":
        return _never(
            answer.code, "the scan was refused when it was read; its report in the work folder says why", "refused"
        )
    return _later(answer.code, f"the case was not finished ({answer.status}, {answer.code}).")


def put_away(at: Desk, study: str, revision: int, route: str, _: str = "") -> dict[str, str]:
    """Results as files into the route's folder, each case whole or not at all."""
    story = at.stories.begin(study, revision, route)
    if newer := outdated(at, story):
        return _never(**newer)
    _noted(at, study, revision, route, "sending")
    folder = at.node.routes[route].folder
    assert folder is not None, "the way leads there only where there is one"
    results = at.folder(study, revision, route) / "results"
    try:
        for case in sorted(path for path in results.glob("[!.]*") if path.is_dir()):
            copy_whole(case, folder / f"{study}-{revision}" / route / case.name)
    except OSError as error:
        return _later("folder_away", f"results could not be put into the route's folder ({type(error).__name__}).")
    return DONE


def copy_whole(source: Path, target: Path) -> None:
    """A folder under its name once all is in it; one that is there already is replaced by what is newer."""
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    for left in target.parent.glob(f".{target.name}.*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(source, draft)
    if target.exists():
        target.rename(target.with_name(f".{target.name}.{secrets.token_hex(4)}"))
    draft.rename(target)
    sync(target.parent)
    for left in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(left)


def hand_over(at: Desk, study: str, revision: int, route: str, target: str) -> dict[str, str]:
    """Every DICOM object of the results to one target. What it has already it takes again and keeps once."""
    story = at.stories.begin(study, revision, route)
    if newer := outdated(at, story):
        return _never(**newer)
    if target not in at.node.peers:
        return _never("no_target", f"{target} is no longer among the peers. Name it in the config, or send elsewhere.")
    story, paths = _noted(at, study, revision, route, "sending"), _results(at, study, revision, route)
    if not paths:
        return _never(
            "nothing_to_send", f"{target} should get DICOM objects, and no output of the route is one. Add one."
        )
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
    whose = {"study": study, "revision": revision, "route": route}
    at.audit.note("sent", **whose, target=target, objects=len(sent.stored))
    return DONE


def prove(at: Desk, study: str, revision: int, route: str, target: str) -> dict[str, str]:
    """That the target kept them, by its own word."""
    story = at.stories.begin(study, revision, route)
    if newer := outdated(at, story):
        return _never(**newer)
    if target not in at.node.peers:
        return _never("no_target", f"{target} is no longer among the peers. Name it in the config, or send elsewhere.")
    story = _noted(at, study, revision, route, "confirming")
    try:
        said = PROOFS[at.node.routes[route].proof](at, story, target)
    except PeerError as error:
        return _later("target_away", str(error))
    except Refused as error:
        return _never("no_proof", str(error))
    if said == DONE:
        how = {target: at.node.routes[route].proof}
        at.stories.note(story, "confirming", proven={**story.facts.get("proven", {}), **how})
    return said


def _believed(at: Desk, story: Story, target: str) -> dict[str, str]:
    return DONE


def _read_back(at: Desk, story: Story, target: str) -> dict[str, str]:
    missing = _not_kept(at, _results(at, story.study, story.revision, story.route), target)
    return _sent_again(at, missing, target) if missing else DONE


def _vouched_for(at: Desk, story: Story, target: str) -> dict[str, str]:
    """Asked once, then waited for: its answer comes to the listener, in a second or in the night."""
    asked, objects = at.vouchings.of(story.id, target), _references(at, story)
    if asked is not None and asked.answered is not None:
        missing = [path for (_, uid), path in objects.items() if at.spool.keys.object(uid) in asked.failed]
        if not missing:
            return DONE
        at.vouchings.forget(story.id)  # what is sent again is asked for again
        return _sent_again(at, missing, target)
    patience = at.node.routes[story.route].vouch_s
    if asked is not None and asked.asked is not None and (datetime.now(UTC) - asked.asked).total_seconds() < patience:
        return {"status": "wait", "code": "not_vouched", "words": f"{target} has not yet said that it keeps them."}
    number = at.vouchings.begin(story.id, target, [uid for _, uid in objects])
    ask_commitment(list(objects), Line.to(target, at.node), number)
    at.vouchings.asked(number)
    if asked is not None and asked.asked is not None:
        return _later(
            "not_vouched", f"{target} did not say in {patience:.0f} s that it keeps the results; it was asked anew."
        )
    return {"status": "wait", "code": "not_vouched", "words": f"{target} was asked whether it keeps them."}


PROOFS = {"read_back": _read_back, "commitment": _vouched_for, "none": _believed}


def _sent_again(at: Desk, missing: Sequence[Path], target: str) -> dict[str, str]:
    send(missing, Line.to(target, at.node))
    return _later("not_kept", f"{target} did not keep {len(missing)} objects; they were sent again.")


def _references(at: Desk, story: Story) -> dict[tuple[str, str], Path]:
    """The results by SOP class and SOP instance."""
    import pydicom

    found = {}
    for path in _results(at, story.study, story.revision, story.route):
        meta = pydicom.dcmread(path, specific_tags=["SOPInstanceUID"], stop_before_pixels=True).file_meta
        found[str(meta.MediaStorageSOPClassUID), str(meta.MediaStorageSOPInstanceUID)] = path
    return found


def _not_kept(at: Desk, paths: list[Path], target: str) -> list[Path]:
    import pydicom

    of_series = dict[tuple[str, str], dict[str, Path]]()
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


def end(at: Desk, study: str, revision: int, route: str, state: Any, code: str, words: str) -> str:
    """How it ended; the input of what is dead is kept, for another try."""
    story = _noted(at, study, revision, route, state, code, words)
    logger.info("study %s revision %d on %s ended: %s %s", study, revision, route, state, code)
    at.audit.note("ended", study=study, revision=revision, route=route, state=state, code=code)
    if at.node.routes[route].proof == "commitment":
        at.vouchings.forget(story.id)
    return str(state)


def _noted(at: Desk, study: str, revision: int, route: str, state: Any, code: str = "", words: str = "") -> Story:
    return at.stories.note(at.stories.begin(study, revision, route), state, code, words)


def _revision(at: Desk, study: str, number: int) -> Revision:
    found = at.ledger.revision(study, number)
    assert found is not None, "a story is begun of a revision that was frozen"
    return found


def _results(at: Desk, study: str, revision: int, route: str) -> list[Path]:
    return sorted((at.folder(study, revision, route) / "results").glob("[!.]*/*.dcm"))
