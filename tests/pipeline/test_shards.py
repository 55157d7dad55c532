"""Parts of many cases, and who works on which: no case twice, none forgotten, no lock of the dead."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.claims import at_work
from pipeline.config import Segment
from pipeline.errors import UsageError
from pipeline.shards import Shard

REPOSITORY = Path(__file__).resolve().parents[2]


@given(st.lists(st.integers()), st.integers(1, 12))
def test_all_parts_together_are_all_cases_and_no_part_is_much_larger(cases: list[int], of: int) -> None:
    parts = [Shard(number=number, of=of).part(cases) for number in range(1, of + 1)]
    assert sorted(case for part in parts for case in part) == sorted(cases)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("words", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/3/4"])
def test_a_part_that_is_none_is_refused_with_an_example(words: str) -> None:
    with pytest.raises(ValueError, match="as 3/8"):
        Segment(shard=words)


def test_a_shard_and_a_cluster_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="Give one"):
        Segment(shard="1/2", ray="auto")


def holding(out: Path, shared: bool) -> subprocess.Popen[str]:
    """Another process at work in a folder, with a claim of the case `mine`; it says when."""
    code = (
        "import sys; from pathlib import Path; from pipeline.claims import at_work\n"
        f"with at_work(Path({str(out)!r}), shared={shared}) as claims:\n"
        "    claims.take('mine'); print('there', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "there\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_case_is_one_process_alone_and_free_when_that_one_is_killed(tmp_path: Path) -> None:
    other = holding(tmp_path, shared=True)
    with at_work(tmp_path, shared=True) as claims:
        (tmp_path / ".mine.partial").mkdir()
        assert claims.take("yours") and not claims.take("mine")
        assert (tmp_path / ".mine.partial").exists(), "what another one is making is left alone"
        end(other)
        assert claims.take("mine")
        assert not (tmp_path / ".mine.partial").exists(), "what a dead one was making is cleared up"
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}, "the last one tidies up"


def test_one_claim_of_two_in_one_process_is_refused_too(tmp_path: Path) -> None:
    with at_work(tmp_path, shared=True) as one, at_work(tmp_path, shared=True) as other:
        assert one.take("case [1]") and not other.take("case [1]")
        one.let_go("case [1]")
        assert other.take("case [1]")


@pytest.mark.parametrize(("there", "comes"), [(False, True), (True, False), (False, False)])
def test_who_did_not_agree_to_share_a_folder_is_alone_in_it(
    tmp_path: Path, there: bool, comes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.claims.PATIENCE", 0.2)
    other = holding(tmp_path, shared=there)
    try:
        with pytest.raises(UsageError, match="another hilum writes"), at_work(tmp_path, shared=comes):
            pass
    finally:
        end(other)
    with at_work(tmp_path, shared=comes):
        assert (tmp_path / ".lock").exists()


def test_the_first_to_leave_takes_nothing_from_the_others(tmp_path: Path) -> None:
    other = holding(tmp_path, shared=True)
    try:
        with at_work(tmp_path, shared=True) as claims:
            assert claims.take("yours")
        with at_work(tmp_path, shared=True) as claims:
            assert not claims.take("mine")
    finally:
        end(other)
