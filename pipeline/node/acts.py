"""What a person may do to a story: begin it anew, send it elsewhere, put it first, hold it, give it up. Each is written down."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from .desk import Desk
from .stories import State, Story
from .workflow import enqueue

Wish = Literal["retry", "resume", "requeue", "hold", "give_up", "reroute"]


class Impossible(ValueError):
    """It cannot be done to this story now; the words say why."""


@dataclass(frozen=True, kw_only=True)
class Act:
    """One of them."""

    label: str
    """On its button."""
    sure: str = ""
    """What is said before it is done; nothing where it does no harm."""
    takes_target: bool = False
    """Whether a peer is chosen with it."""
    of: tuple[State, ...]
    """The states in which it makes sense."""
    does: Callable[[Desk, Story, str, str], Story]
    """To the story, by whom, with a target's name where it takes one."""

    def fits(self, story: Story, desk: Desk) -> bool:
        """Whether a person is offered it."""
        return story.state in self.of and story.route in desk.node.routes


def do(desk: Desk, story: Story, act: Wish, who: str, target: str = "") -> Story:
    """The story afterwards."""
    chosen = ACTS[act]
    if not chosen.fits(story, desk):
        raise Impossible(f"The story is {story.state} now; for this it must be {' or '.join(chosen.of)}. Look again.")
    after = chosen.does(desk, story, who, target)
    said = {"study": story.study, "revision": story.revision, "route": story.route}
    desk.audit.note(act, who=who, **said, **({"target": target} if target else {}))
    return after


def _begin_anew(desk: Desk, story: Story, who: str, _: str) -> Story:
    return _enqueued(desk, _turned(story, desk, "retry", who, anew=True))


def _send_elsewhere(desk: Desk, story: Story, who: str, target: str) -> Story:
    peer = desk.node.peers.get(target)
    if peer is None or not peer.answers:
        raise Impossible("No peer of that name can be sent to; choose one that has a host or a web address.")
    if not any((desk.folder(story.study, story.revision, story.route) / "results").glob("[!.]*/*.dcm")):
        raise Impossible("There are no DICOM results to send; they were never made, or are let go of. Begin it anew.")
    wish = {"attempt": story.attempt + 1, "target": target}
    return _enqueued(desk, _turned(story, desk, "reroute", who, target, anew=True, wish=wish))


FIRST = 1
"""DBOS takes what has the lowest number; 1 is the lowest that a route may have."""


def _put_first(desk: Desk, story: Story, who: str, _: str) -> Story:
    return _enqueued(desk, _turned(story, desk, "requeue", who, anew=True, priority=FIRST))


def _go_on(desk: Desk, story: Story, who: str, _: str) -> Story:
    return _enqueued(desk, _turned(story, desk, "resume", who, anew=True))


def _hold(desk: Desk, story: Story, who: str, _: str) -> Story:
    return _turned(story, desk, "hold", who, state="held", words=f"held by {who}")


def _give_up(desk: Desk, story: Story, who: str, _: str) -> Story:
    return _turned(story, desk, "give_up", who, state="refused", code="given_up", words=f"given up by {who}")


def _turned(
    story: Story, desk: Desk, act: Wish, who: str, target: str = "", *,
    state: State = "queued", anew: bool = False, code: str = "", words: str = "", **facts: Any,
) -> Story:  # fmt: skip
    done = {"at": datetime.now(UTC).timestamp(), "act": act, "who": who, "target": target, "was": story.state}
    acts = [*story.facts.get("acts", []), done]
    after = desk.stories.turn(story, ACTS[act].of, state, anew=anew, code=code, words=words, acts=acts, **facts)
    if after is None:
        raise Impossible("The story went on in the meantime, or somebody else was quicker. Look again.")
    return after


def _enqueued(desk: Desk, story: Story) -> Story:
    enqueue(story, desk.node.routes[story.route])
    return story


ACTS: dict[Wish, Act] = {
    "retry": Act(label="Begin anew", of=("done", "refused", "dead"), does=_begin_anew),
    "resume": Act(label="Go on", of=("held",), does=_go_on),
    "requeue": Act(label="Put first", of=("queued", "held"), does=_put_first),
    "hold": Act(label="Hold", of=("queued",), does=_hold),
    "reroute": Act(label="Send", of=("done", "dead"), takes_target=True, does=_send_elsewhere),
    "give_up": Act(
        label="Give up", of=("dead", "held"), does=_give_up,
        sure="Nothing is made or sent of this study on this route any more, and its input is let go of in time.",
    ),
}  # fmt: skip
"""By the word that the audit trail uses."""
