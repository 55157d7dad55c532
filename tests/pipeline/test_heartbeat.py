"""A process is known again, and known to be gone, whatever the system does with its number."""

import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta

import pytest

from pipeline.heartbeat import SILENT_HOURS, Owner, now, read_time


def test_an_owner_is_read_as_it_was_written() -> None:
    here = Owner.here()
    assert here.pid == os.getpid() and Owner.read(str(here)) == here
    nameless = replace(here, started="")
    assert Owner.read(str(nameless)) == nameless


@pytest.mark.parametrize("words", ["", "a b c", "host boot pid 7", "host boot 1 2 3"])
def test_other_words_are_nobody(words: str) -> None:
    assert Owner.read(words) is None


def test_a_living_process_is_not_gone_however_long_it_was_silent() -> None:
    assert not Owner.here().is_gone(None)
    assert not Owner.here().is_gone(now() - timedelta(days=30))


def test_a_dead_process_is_gone_and_so_is_one_whose_number_was_given_again() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert replace(Owner.here(), pid=child.pid).is_gone(now())
    assert replace(Owner.here(), started="1").is_gone(now()), "this number belonged to another process before"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a process that nobody has buried")
def test_a_process_that_nobody_has_buried_is_gone() -> None:
    code = "import os; from pipeline.heartbeat import Owner; print(Owner.here(), flush=True); os._exit(9)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        owner = Owner.read(child.stdout.readline().strip())
        child.stdout.read()  # to the end: it has left, and was not waited for
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert owner is not None and owner.is_gone(now())


@pytest.mark.parametrize("change", [{"host": "another"}, {"boot": "another"}], ids=["machine", "start or container"])
def test_of_a_process_elsewhere_only_a_long_silence_says_anything(change: dict[str, str]) -> None:
    elsewhere = replace(Owner.here(), pid=1, **change)
    assert not elsewhere.is_gone(now() - timedelta(hours=SILENT_HOURS - 1))
    assert elsewhere.is_gone(now() - timedelta(hours=SILENT_HOURS + 1))
    assert not elsewhere.is_gone(None) and not elsewhere.is_gone(read_time("yesterday"))
