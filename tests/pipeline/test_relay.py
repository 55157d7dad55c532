"""Cases from hand to hand: in their order, each by itself, never more in memory than was said."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from pipeline.errors import Interrupted
from pipeline.relay import AHEAD, Hands, relay

SECONDS = 30
"""Until a test that waits for another thread gives up."""


def through(
    cases: list[int], read: Callable[[int], Any] = lambda case: case, answer: Callable[[int, Any], Any] = lambda _, it: it,
    write: Callable[[int, Any], Any] = lambda _, it: it, roomy: Callable[[Any], bool] = lambda _: True,
) -> list[tuple[int, Any]]:  # fmt: skip
    """What comes out, in the order in which it came."""
    left, out = iter(cases), []
    hands = Hands(read=read, answer=answer, write=write, failed=lambda _, error: f"failed: {error}", roomy=roomy)
    relay(lambda wait: next(left, None), hands, lambda case, done: out.append((case, done)))
    return out


def test_every_case_comes_out_once_and_in_order() -> None:
    squares = through(list(range(20)), read=lambda case: case, answer=lambda _, it: it * it, write=lambda _, it: -it)
    assert squares == [(case, -case * case) for case in range(20)]
    assert through([]) == []


def test_the_next_is_read_and_the_last_is_written_while_one_is_looked_at() -> None:
    """Each hand waits for another one to be at work: one thread alone would wait for ever."""
    reads: dict[int, Future[None]] = {case: Future() for case in range(4)}
    answering: dict[int, Future[None]] = {case: Future() for case in range(4)}

    def read(case: int) -> int:
        reads[case].set_result(None)
        return case

    def answer(case: int, it: int) -> int:
        answering[case].set_result(None)
        if case < 3:
            reads[case + 1].result(SECONDS)  # while this one is looked at
        return it

    def write(case: int, it: int) -> int:
        if case < 3:
            answering[case + 1].result(SECONDS)  # while this one is written
        return it

    assert through([0, 1, 2, 3], read, answer, write) == [(case, case) for case in range(4)]


@pytest.mark.parametrize(("roomy", "most"), [(True, AHEAD + 2), (False, 1)], ids=["room for others", "room for one"])
def test_no_more_cases_are_in_memory_than_was_said(roomy: bool, most: int) -> None:
    lock, inside, seen = threading.Lock(), 0, []

    def enter(case: int) -> int:
        nonlocal inside
        with lock:
            inside += 1
            seen.append(inside)
        return case

    def leave(case: int, it: int) -> int:
        nonlocal inside
        with lock:
            inside -= 1
        return it

    assert len(through(list(range(30)), read=enter, write=leave, roomy=lambda _: roomy)) == 30
    assert max(seen) <= most and inside == 0


@pytest.mark.parametrize("hand", ["read", "answer", "write"])
def test_a_case_that_a_hand_stumbles_over_fails_alone_and_in_its_place(hand: str) -> None:
    def stumble(case: int, it: Any = None) -> int:
        if case == 2:
            raise ValueError(f"{hand} stumbled")
        return case

    done = through(list(range(5)), **{hand: stumble})
    assert done == [(0, 0), (1, 1), (2, f"failed: {hand} stumbled"), (3, 3), (4, 4)]


def test_stopped_it_still_hands_over_what_was_being_written() -> None:
    begun, out = threading.Event(), []

    def answer(case: int, it: int) -> int:
        if case == 2:
            begun.set()
            raise Interrupted("stopped")
        return it

    def write(case: int, it: int) -> int:
        if case == 1:
            begun.wait(SECONDS)  # it is still being written when the stop comes
        return it

    left = iter(range(5))
    hands = Hands(read=lambda c: c, answer=answer, write=write, failed=lambda *_: "failed", roomy=lambda _: True)
    with pytest.raises(Interrupted):
        relay(lambda wait: next(left, None), hands, lambda case, done: out.append((case, done)))
    assert out == [(0, 0), (1, 1)]


def test_what_is_done_is_told_before_there_is_a_wait_for_more() -> None:
    """A node of a cluster is handed cases one by one, each when the one before is over."""
    handed, over = [1, 2], []

    def take(wait: bool) -> int | None:
        if not wait or not handed:
            return None
        assert len(over) == 2 - len(handed), "the one before was not told of yet"
        return handed.pop(0)

    hands = Hands(
        read=lambda c: c, answer=lambda _, c: c, write=lambda _, c: c, failed=lambda *_: 0, roomy=lambda _: True
    )
    relay(take, hands, lambda case, done: over.append(case))
    assert over == [1, 2]


def test_stopped_while_it_waits_for_the_last_case_to_be_written_it_tells_of_that_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stops, really, out = [Interrupted("stopped")], Future.result, []

    def result(future: Future[Any], timeout: float | None = None) -> Any:
        if stops and really(future) == "written":
            raise stops.pop()
        return really(future, timeout)

    monkeypatch.setattr(Future, "result", result)
    left = iter([1])
    hands = Hands(
        read=lambda c: c, answer=lambda _, c: c, write=lambda *_: "written", failed=lambda *_: "failed",
        roomy=lambda _: True,
    )  # fmt: skip
    with pytest.raises(Interrupted):
        relay(lambda wait: next(left, None), hands, lambda case, done: out.append((case, done)))
    assert out == [(1, "written")]
