"""Cases handed from one to the next: the next ones are read and the last one is written while one is being looked at.

Three threads of one process, so that torch is imported once and no volume is copied between processes. Reading and writing
happen in one thread each and in order, the looking in the caller's: what comes out is what one thread alone would make.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

AHEAD = 2
"""Cases that lie ready or are being read: one is not enough where a large one follows a small one."""

Input = TypeVar("Input")
Done = TypeVar("Done")

Take = Callable[[bool], Input | None]
"""Where cases come from: the next one, or None. Who says that he can wait has None only when no more will ever come."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Hands(Generic[Input, Done]):
    """What is done with a case: what one hand makes of it is given to the next."""

    read: Callable[[Input], Any]
    """In a thread, before its turn."""
    answer: Callable[[Input, Any], Any]
    """In the caller's thread."""
    write: Callable[[Input, Any], Done]
    """In a thread, while the next one is answered."""
    failed: Callable[[Input, Exception], Done]
    """What comes of a case that one of these stumbled over; in the caller's thread."""
    roomy: Callable[[Any], bool]
    """Whether memory holds others beside the one that was just read; else they wait until it is done with."""


def relay(take: Take[Input], hands: Hands[Input, Done], over: Callable[[Input, Done], None]) -> None:
    """All cases through these hands; `over` is told of each in the order in which they came, in the caller's thread."""
    with (
        ThreadPoolExecutor(1, thread_name_prefix="reading") as reader,
        ThreadPoolExecutor(1, thread_name_prefix="writing") as writer,
    ):
        line = _Line(take, hands, over, reader, writer)
        try:
            while line.step():
                pass
        finally:
            reader.shutdown(wait=False, cancel_futures=True)
            line.settle()  # stopped or not: what was found in the last case is worth the second that writing takes


class _Line(Generic[Input, Done]):
    """Cases in the order of their turns: coming, in hand, going."""

    def __init__(
        self, take: Take[Input], hands: Hands[Input, Done], over: Callable[[Input, Done], None],
        reader: ThreadPoolExecutor, writer: ThreadPoolExecutor,
    ) -> None:  # fmt: skip
        self.take, self.hands, self.over = take, hands, over
        self.reader, self.writer = reader, writer
        self.coming: deque[tuple[Input, Future[Any]]] = deque()
        self.going: tuple[Input, Future[Done]] | None = None

    def step(self) -> bool:
        """One case from hand to hand; False when there are no more."""
        if not self.coming:
            self._fetch(1, wait=False)
        if not self.coming:
            self.settle()  # before a wait for who knows how long
            self._fetch(1, wait=True)
        if not self.coming:
            return False
        case, reading = self.coming.popleft()
        try:
            read = reading.result()
            del reading  # or its result would stay in memory until the next case
            if roomy := self.hands.roomy(read):
                self._fetch(AHEAD, wait=False)
            else:
                self.settle()
            answer = self.hands.answer(case, read)
            del read
        except Exception as error:
            self.settle()
            self.over(case, self.hands.failed(case, error))
            return True
        self.settle()
        self.going = (case, self.writer.submit(self.hands.write, case, answer))
        if not roomy:
            del answer
            self.settle()
        return True

    def settle(self) -> None:
        """The case that is being written is over."""
        if self.going is None:
            return
        case, writing = self.going
        try:
            done = writing.result()  # stopped here, it is still going, and is settled once more
        except Exception as error:
            done = self.hands.failed(case, error)
        self.going = None
        self.over(case, done)

    def _fetch(self, number: int, *, wait: bool) -> None:
        while len(self.coming) < number and (case := self.take(wait)) is not None:
            self.coming.append((case, self.reader.submit(self.hands.read, case)))
