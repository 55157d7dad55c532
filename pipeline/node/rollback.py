"""Which package a route works with: the config's, until an operator goes back to one before. Written down, never guessed.

state/routes/<route>.json lists the packages of a route in the order in which they came to serve, and which of them serves
now. A new package in the config is a new decision and serves from the next start on; the same one leaves it to the operator.
A story ends with the package it began with.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from preprocessing.records import decode, encode

from ..errors import UsageError
from ..package import ModelPackage
from ..report import as_json, write_whole
from .desk import Desk
from .shelf import Shelf
from .stories import Story

CONFIG = "config"
"""Who decided where no person did."""


class NothingBefore(ValueError):
    """A route has no package to go to."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """A package that serves, or served."""

    id: str
    name: str
    since: str
    """When it came to serve for the first time."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What a route works with."""

    versions: tuple[Version, ...]
    """The oldest first."""
    now: int
    """Which of them serves."""
    configured: str
    """The package that the config named when this was written: another one there is a new decision."""
    changed: str
    """When it was last decided, and by whom."""
    who: str

    @property
    def version(self) -> Version:
        return self.versions[self.now]

    @property
    def before(self) -> Version | None:
        """What a roll-back would go to."""
        return self.versions[self.now - 1] if self.now else None

    @property
    def after(self) -> Version | None:
        """What was rolled back from."""
        return self.versions[self.now + 1] if self.now + 1 < len(self.versions) else None


def shelf(at: Desk) -> Shelf:
    """This node's packages."""
    return Shelf(state=at.node.state, trusted=at.node.trusted)


def serving(at: Desk, route: str) -> Serving:
    """What a route works with now; of one that was never asked before, the config's package, from now on."""
    found = _read(at, route)
    return take_up(at, route) if found is None else found


def decided(at: Desk, route: str) -> Serving | None:
    """What a route works with, as it was written down; None where it never was: the packages may be where workers are."""
    return _read(at, route)


def begun_with(at: Desk, story: Story) -> str:
    """The id of the package that a story is worked on with, the same until somebody begins it anew."""
    known = story.facts.get("package", {})
    if known.get("attempt") == story.attempt:
        return str(known["id"])
    chosen = serving(at, story.route).version
    if known.get("id") != chosen.id:  # what another package made would be taken for this one's
        shutil.rmtree(at.folder(story.study, story.revision, story.route) / "results", ignore_errors=True)
    said = {"id": chosen.id, "name": chosen.name, "attempt": story.attempt}
    at.stories.remember(story, package=said)
    return chosen.id


def take_up(at: Desk, route: str) -> Serving:
    """At a start: what the config says of a route, and what was decided since it says so."""
    how = at.node.routes[route]
    configured = shelf(at).take_in(how.package)
    before = shelf(at).take_in(how.before) if how.before else None
    with _alone(at):
        known = _read(at, route)
        is_same = known is not None and known.configured == configured.id
        made = known if known and is_same else _as_configured(known, configured)
        made = _with_before(made, before) if before else made
        at.audit.note("package", route=route, package=made.version.id, who=made.who)
        if made != known:
            _write(at, route, made)
        return made


def _as_configured(known: Serving | None, configured: ModelPackage) -> Serving:
    """Another package in the config is a new decision: it serves, behind those that served until now."""
    versions = [one for one in known.versions[: known.now + 1] if one.id != configured.id] if known else []
    return Serving(
        versions=(*versions, _version(configured)),
        now=len(versions),
        configured=configured.id,
        changed=_moment(),
        who=CONFIG,
    )


def _with_before(known: Serving, before: ModelPackage) -> Serving:
    """Where none served before, the one that the config names."""
    if known.before or before.id in {one.id for one in known.versions}:
        return known
    return replace(known, versions=(_version(before), *known.versions), now=known.now + 1)


def take_up_all(at: Desk, may_lack: bool = False) -> None:
    """Before the first study comes: every byte of every package is checked, who vouches for it, and that it fits its route.

    `may_lack`: a part of the node that works on nothing need not see the packages; its workers bring them.
    """
    for name, route in at.node.routes.items():
        for folder in filter(None, (route.package, route.before, route.shadow)):
            if not may_lack or folder.exists():
                refuse_other_channels(name, tuple(route.take), shelf(at).take_in(folder))
        if not may_lack or route.package.exists():
            take_up(at, name)


def roll_back(at: Desk, route: str, who: str) -> Serving:
    """New stories of a route get the package before. Who wants it back rolls forward."""
    return _turn(at, route, who, -1)


def roll_forward(at: Desk, route: str, who: str) -> Serving:
    """Undo a roll-back."""
    return _turn(at, route, who, +1)


def _turn(at: Desk, route: str, who: str, step: int) -> Serving:
    serving(at, route)
    with _alone(at):
        known = _read(at, route)
        assert known is not None
        goal = known.now + step
        if not 0 <= goal < len(known.versions):
            raise NothingBefore(
                f"route {route} has no package {'before' if step < 0 else 'after'} {known.version.name}; one that served is "
                "needed. Name it as `before` in the config."
            )
        refuse_other_channels(route, tuple(at.node.routes[route].take), shelf(at).open(known.versions[goal].id))
        made = replace(known, now=goal, changed=_moment(), who=who)
        # first into the trail: a change that nobody could look up must not be
        at.audit.note("rollback", route=route, package=made.version.id, who=who)
        _write(at, route, made)
        return made


def refuse_other_channels(route: str, take: tuple[str, ...], package: ModelPackage) -> None:
    """A package that wants other series than the route chooses would never get any."""
    channels = package.plan.channels
    if take != channels:
        raise UsageError(
            f"route {route} takes {', '.join(take)}; its package {package.name} needs the channels {', '.join(channels)}, in "
            "that order. Name the rules of `take` after them."
        )


def _write(at: Desk, route: str, made: Serving) -> None:
    write_whole(_path(at, route), as_json(encode(made)) + "\n")


def _version(package: ModelPackage) -> Version:
    return Version(id=package.id, name=package.name, since=_moment())


def _moment() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _path(at: Desk, route: str) -> Path:
    folder = at.node.state / "routes"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder / f"{route}.json"


def _read(at: Desk, route: str) -> Serving | None:
    path = _path(at, route)
    return decode(Serving, json.loads(path.read_text()), where=path.name) if path.exists() else None


@contextmanager
def _alone(at: Desk) -> Iterator[None]:
    """Processes that share the folder decide one after the other."""
    with (_path(at, "any").parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
