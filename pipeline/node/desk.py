"""What a story is worked on with: the node's folder, rows and rooms, as one process has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from .audit import Audit
from .config import Node
from .ledger import Ledger
from .room import Room
from .spool import Spool
from .stories import Stories
from .submissions import Submissions
from .vouching import Vouchings


@dataclass(frozen=True, kw_only=True, eq=False)
class Desk:
    """Everything that a story needs, in the process that works on it."""

    node: Node
    spool: Spool
    ledger: Ledger
    stories: Stories
    rooms: list[Room] = field(default_factory=list)
    """Those that nobody is in just now."""
    busy: set[Room] = field(default_factory=set)
    """The others."""

    @cached_property
    def submissions(self) -> Submissions:
        """What came by other ways than DICOM."""
        return Submissions(self.node, self.spool.keys, self.ledger, self.stories, self.folder)

    @cached_property
    def vouchings(self) -> Vouchings:
        """What targets were asked to vouch for."""
        return Vouchings(self.ledger, self.spool.keys)

    @cached_property
    def audit(self) -> Audit:
        """Where what was done is written down for ever."""
        return Audit(self.node.state, self.spool.keys)

    @contextmanager
    def room(self) -> Iterator[Room]:
        """A room to oneself: one that is open already, else a new one."""
        try:
            room = self.rooms.pop()
        except IndexError:
            room = Room(int(self.node.working.memory_gb * 1e9))
        self.busy.add(room)
        try:
            yield room
        finally:
            self.busy.discard(room)
            self.rooms.append(room)

    def close(self) -> None:
        """End every room, whatever is done in it: it is done again at the next start, or elsewhere."""
        for room in tuple(self.busy):
            room.strike()
        while self.rooms:
            self.rooms.pop().close()

    def folder(self, study: str, revision: int, route: str) -> Path:
        """Where a story's input is laid out and its results are made."""
        return self.node.state / "work" / f"{study}-{revision}" / route
