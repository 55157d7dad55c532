"""How an object becomes the node's own, by whatever door it comes: named, agreed with what is known, safe on the disk,
written down. Whoever is told that it was taken may forget it.
"""

import logging
from collections.abc import Callable

from .config import GB, Node
from .ledger import Ledger
from .nouns import OTHER_STUDY, Arrival, Reason, Refused
from .spool import Part, Spool

logger = logging.getLogger(__name__)


class Admission:
    """One for each door; several threads may use it at once."""

    def __init__(
        self,
        node: Node,
        spool: Spool,
        ledger: Ledger,
        *,
        free_bytes: Callable[[], int] | None = None,
        arrived: Callable[[Arrival], None] | None = None,
    ) -> None:
        self.node, self.spool, self.ledger = node, spool, ledger
        self._free_bytes = free_bytes or spool.free_bytes
        self._arrived = arrived

    def has_room(self) -> bool:
        """Whether more may be written than what must stay free."""
        return self._free_bytes() > self.node.receiving.reserve_gb * GB

    def take(self, part: Part, source: str, study: str = "") -> Arrival:
        """The object is safe when this returns; refused with the reason where it is not kept.

        `study`: the key of the only study that it may belong to, where its sender named one.
        """
        try:
            part.finish()
            arrival = self.spool.name(part, source)
            if study and arrival.place.study != study:
                raise Refused(OTHER_STUDY)
            self.ledger.agree(arrival)
            is_new = self.spool.admit(part, arrival)
        finally:
            part.discard()
        self._write_down(arrival, is_new)
        return arrival

    def refuse(self, reason: Reason, source: str) -> None:
        """Count it. A ledger that cannot be written must not keep the answer from the caller."""
        try:
            self.ledger.refuse(reason, source)
        except Exception as error:  # any of the database's
            logger.error("a refusal (%s) could not be counted (%s)", reason.code, type(error).__name__)

    def _write_down(self, arrival: Arrival, is_new: bool) -> None:
        try:
            is_new_to_ledger = self.ledger.record(arrival)
        except Refused:  # another brought other bytes under this UID in the meantime, into another study
            if is_new:
                self.spool.remove(arrival.place)
            raise
        if is_new_to_ledger and self._arrived is not None:
            self._arrived(arrival)
