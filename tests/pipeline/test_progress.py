"""What is told of many cases while they are gone through: rates of what was worked on, and lines that machines read."""

import json

import pytest

from pipeline.bar import Bar, Lines
from pipeline.progress import Tally

Said = pytest.CaptureFixture[str]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A time that stands still until it is set."""
    now = [1000.0]
    for module in ("bar", "progress"):
        monkeypatch.setattr(f"pipeline.{module}.time.monotonic", lambda: now[0])
    return now


def end(tally: Tally, case: str, status: str = "done", seconds: float = 1.0, reason: str = "") -> None:
    failed = status == "failed"
    tally.over(case, status, seconds=seconds, reason=reason, message=f"{reason} it is" if failed else "", failed=failed)


def test_the_time_left_is_that_of_cases_worked_on_and_not_of_those_that_were_there(
    clock: list[float], capsys: Said
) -> None:
    tally = Tally(Lines(), "segment", 100)
    for number in range(60):
        end(tally, f"there{number}", "skipped as complete", seconds=0)
    for number in range(20):
        clock[0] += 30
        end(tally, f"new{number}", seconds=28)
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (last["over"], last["of"], last["per_minute"], last["left"]) == (80, 100, 2.0, 600.0)


def test_a_machine_reads_every_event_as_one_object(clock: list[float], capsys: Said) -> None:
    tally = Tally(Lines(), "segment", 2)
    clock[0] += 5
    end(tally, "a", seconds=4.5)
    end(tally, "b", "failed", seconds=0.1, reason="damaged")
    tally.ended({"done": 1, "failed": 1})
    started, first, second, ended = map(json.loads, capsys.readouterr().err.splitlines())
    assert started == {"event": "started", "stage": "segment", "of": 2}
    assert (first["event"], first["case"], first["status"], first["seconds"]) == ("case", "a", "done", 4.5)
    assert (second["reason"], second["message"], second["failed"]) == ("damaged", "damaged it is", 1)
    assert second["left"] == 0 and ended == {
        "event": "ended", "stage": "segment", "counts": {"done": 1, "failed": 1}, "spent": 5.0,
    }  # fmt: skip


def test_a_case_that_other_hands_had_counts_once_and_as_it_ended(capsys: Said) -> None:
    tally = Tally(Lines(), "segment", 2)
    end(tally, "a", "in other hands", seconds=0)
    end(tally, "b", "failed")
    end(tally, "a", "skipped as complete", seconds=0)
    end(tally, "b", "done")
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (last["over"], last["failed"]) == (2, 0)


def test_a_person_sees_cases_rate_time_left_and_failures(clock: list[float], capsys: Said) -> None:
    tally = Tally(Bar(), "segment", 4)
    for number, status in enumerate(("done", "failed", "done", "done")):
        clock[0] += 20
        end(tally, str(number), status)
    tally.ended({"done": 3, "failed": 1})
    lines = capsys.readouterr().err.splitlines()
    assert "2 of 4 cases, 3 a minute, 1 failed" in lines[1] and "0:40 left" in lines[1]
    assert "100%" in lines[-1] and "1:20 in all" in lines[-1] and "4 of 4 cases" in lines[-1]


def test_a_night_of_hours_is_told_in_hours(clock: list[float], capsys: Said) -> None:
    tally = Tally(Bar(), "segment", 400)
    clock[0] += 90
    end(tally, "a")
    assert "9:58:30 left" in capsys.readouterr().err


def test_who_only_wants_to_know_how_far_it_is_hears_what_he_always_heard() -> None:
    heard = []
    tally = Tally(lambda stage, done, of, note="": heard.append((stage, done, of, note)), "convert", 2)
    end(tally, "a", "failed")
    end(tally, "b")
    tally.ended({"done": 1, "failed": 1})
    assert heard == [("convert", 1, 2, "1 failed"), ("convert", 2, 2, "1 failed")]
