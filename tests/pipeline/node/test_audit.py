"""The trail: lines are only added, whoever touches one is found, and it says nothing of a patient."""

import hashlib
import hmac
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cli import main
from pipeline.node.audit import Audit, Head, Refusals, read_head, verify
from pipeline.node.spool import open_keys

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trail of a dozen lines over two months."""
    state = tmp_path_factory.mktemp("state")
    trail = Audit(state, open_keys(state))
    for number in range(6):
        trail.note("study", study=f"{number:020x}", objects=number)
    (first,) = state.glob("audit/*.jsonl")
    later = first.with_name("9999-01.jsonl")
    later.touch()
    for who in ("ann", "bob", "ann", "bob", "ann"):
        trail.note("login", who=who)
    assert len(later.read_bytes().splitlines()) == 5
    return state


def lines_of(state: Path) -> list[bytes]:
    return [line for path in sorted(state.glob("audit/*.jsonl")) for line in path.read_bytes().splitlines()]


def test_what_was_noted_is_read_back_in_order_and_holds(written: Path) -> None:
    said = [json.loads(line) for line in lines_of(written)]
    assert [one["what"] for one in said] == ["begun", *["study"] * 6, *["login"] * 5]
    assert [one["number"] for one in said] == list(range(1, 13))
    verdict = verify(written, open_keys(written))
    assert (verdict.lines, verdict.broken) == (12, "")
    newest = Audit(written, open_keys(written)).newest(3)
    assert [one["facts"]["who"] for one in newest] == ["ann", "bob", "ann"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whoever_touches_a_line_is_found(
    written: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    state = tmp_path_factory.mktemp("touched") / "state"
    shutil.copytree(written, state)
    path = data.draw(st.sampled_from(sorted(state.glob("audit/*.jsonl"))))
    lines = path.read_bytes().splitlines(keepends=True)
    first = data.draw(st.integers(0, len(lines) - 1))
    second = data.draw(st.integers(0, len(lines) - 1).filter(lambda one: one != first))
    how = data.draw(st.sampled_from(["flip", "delete", "insert", "swap", "cut", "end", "join", "empty line", "file"]))
    if how == "flip":
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        lines = [bytes(content)]
    elif how == "delete":
        del lines[first]
    elif how == "insert":
        lines.insert(first, lines[second])
    elif how == "swap":
        lines[first], lines[second] = lines[second], lines[first]
    elif how == "cut":
        content = b"".join(lines)
        lines = [content[: data.draw(st.integers(0, len(content) - 1))]]
    elif how == "end":
        lines = lines[:first]
    elif how == "join":
        lines[first] = lines[first].replace(b"\n", b" ")
    elif how == "empty line":
        lines.insert(first, b"\n")
    path.unlink() if how == "file" else path.write_bytes(b"".join(lines))
    verdict = verify(state, open_keys(state))
    assert verdict.broken and verdict.lines <= 12
    # and a node that goes on writing heals nothing
    Audit(state, open_keys(state)).note("start")
    assert verify(state, open_keys(state)).broken


def test_a_break_is_told_with_its_file_and_line(written: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shutil.copytree(written, state)
    path = state / "audit/9999-01.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"bob"', b'"eve"', 1))
    verdict = verify(state, open_keys(state))
    assert verdict.broken.startswith("line 2 of 9999-01.jsonl") and verdict.lines == 8
    path.write_bytes(path.read_bytes() + b"[1]\n" + b"\xff\n")
    shown = Audit(state, open_keys(state)).newest(3)
    assert [one["what"] for one in shown] == ["unreadable", "unreadable", "login"], "a page shows it nevertheless"


@pytest.mark.parametrize("what", ["removed", "flipped", "of another node"])
def test_a_head_that_is_not_the_trails_own_is_found(written: Path, tmp_path: Path, what: str) -> None:
    state = tmp_path / "state"
    shutil.copytree(written, state)
    head = state / "audit/head"
    if what == "removed":
        head.unlink()
    elif what == "flipped":
        head.write_bytes(head.read_bytes().replace(b'"number": 12', b'"number": 11'))
    else:
        other = tmp_path / "other"
        Audit(other, open_keys(other)).note("start")
        shutil.copy(other / "audit/head", head)
    assert "head is missing or was changed" in verify(state, open_keys(state)).broken


def test_a_trail_of_yesterday_put_back_whole_disagrees_with_the_head_that_somebody_noted(tmp_path: Path) -> None:
    state, keys = tmp_path / "state", open_keys(tmp_path / "state")
    Audit(state, keys).note("start")
    shutil.copytree(state / "audit", tmp_path / "yesterday")
    Audit(state, keys).note("login", who="ann")
    seen = read_head(str(verify(state, keys).head))
    shutil.rmtree(state / "audit")
    shutil.copytree(tmp_path / "yesterday", state / "audit")
    assert not verify(state, keys).broken
    assert "Lines at the end were removed" in verify(state, keys, [seen]).broken


def test_a_trail_written_anew_with_the_secret_disagrees_with_a_head_that_was_noted_elsewhere(
    written: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    shutil.copytree(written, state)
    seen = [Head(number=one["number"], code=one["code"]) for one in map(json.loads, lines_of(state))][4]
    assert not verify(state, open_keys(state), [seen]).broken
    shutil.rmtree(state / "audit")
    forged = Audit(state, open_keys(state))
    for _ in range(11):
        forged.note("start")
    assert not verify(state, open_keys(state)).broken
    assert "line 5 is another" in verify(state, open_keys(state), [seen]).broken


def test_openssl_finds_the_same_codes(written: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key = hmac.new((written / "secret").read_bytes(), b"audit trail", hashlib.sha256).hexdigest()
    for line in lines_of(written)[::5]:
        body, _, code = line.rpartition(b', "code": ')
        words = ["openssl", "dgst", "-sha256", "-mac", "HMAC", "-macopt", f"hexkey:{key}"]
        said = subprocess.run(words, input=body, capture_output=True, check=True).stdout
        assert said.decode().split()[-1] == code.decode().strip('"}')


def test_half_a_line_of_a_power_cut_goes_and_that_it_was_there_is_said(written: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shutil.copytree(written, state)
    with (state / "audit/9999-01.jsonl").open("ab") as stream:
        stream.write(lines_of(state)[-1][:50])
    assert verify(state, open_keys(state)).broken
    Audit(state, open_keys(state)).note("start")
    assert not verify(state, open_keys(state)).broken
    assert [json.loads(line)["what"] for line in lines_of(state)[-2:]] == ["torn", "start"]


def test_threads_and_processes_write_one_chain(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline.node.audit import Audit; from pipeline.node.spool import open_keys\n"
        "state = Path(sys.argv[1]); trail = Audit(state, open_keys(state))\n"
        "for number in range(20): trail.note('sent', objects=number)\n"
    )
    keys = open_keys(tmp_path)
    words = [sys.executable, "-c", code, str(tmp_path)]
    others = [subprocess.Popen(words, cwd=REPOSITORY) for _ in range(2)]
    trail = Audit(tmp_path, keys)

    def note() -> None:
        for number in range(20):
            trail.note("study", objects=number)

    threads = [threading.Thread(target=note) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [other.wait() for other in others] == [0, 0]
    verdict = verify(tmp_path, keys)
    assert (verdict.lines, verdict.broken) == (101, "")


def test_killed_at_any_moment_the_chain_holds_and_goes_on(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline.node.audit import Audit; from pipeline.node.spool import open_keys\n"
        "state = Path(sys.argv[1]); trail = Audit(state, open_keys(state))\n"
        "while True: trail.note('sent', objects=1); print(flush=True)\n"
    )
    said = 0
    for lines in (0, 1, 7, 30):
        words = [sys.executable, "-c", code, str(tmp_path)]
        with subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(lines):
                writer.stdout.readline()
                said += 1
            os.kill(writer.pid, signal.SIGKILL)
    Audit(tmp_path, open_keys(tmp_path)).note("start")
    verdict = verify(tmp_path, open_keys(tmp_path))
    assert not verdict.broken and verdict.lines >= said + 2


def test_a_text_that_is_no_name_of_ours_is_refused(tmp_path: Path) -> None:
    trail = Audit(tmp_path, open_keys(tmp_path))
    for odd in ("x" * 201, "line\nline"):
        with pytest.raises(AssertionError):
            trail.note("login_failed", who=odd)
    with pytest.raises(Exception, match="what"):
        trail.note("something else")  # type: ignore[arg-type]
    assert len(lines_of(tmp_path)) == 1


def test_the_command_says_the_first_broken_line_and_ends_with_1(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, config = tmp_path / "state", tmp_path / "node.yaml"
    shutil.copytree(written, state)
    config.write_text(yaml.safe_dump({"state": str(state)}))
    words = ["node", "--config", str(config), "--verify_audit"]
    assert main(words) == 0
    head = capsys.readouterr().out.strip()
    assert main([*words, "--audit_head", head]) == 0 and main([*words, "--audit_head", "12"]) == 2
    path = state / "audit/9999-01.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    capsys.readouterr()
    assert main(words) == 1 and "there was a line 12" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[7:])
    assert main(words) == 1 and "line 1 of 9999-01.jsonl" in capsys.readouterr().err
    config.write_text(yaml.safe_dump({"state": str(tmp_path / "nowhere")}))
    assert main(words) == 2


def test_a_flood_of_refusals_is_a_line_with_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trail, counts = Audit(tmp_path, open_keys(tmp_path)), {("unknown_caller", ""): 3, ("no_uid", "scanner"): 1}
    refusals = Refusals(trail, lambda: counts)
    refusals.look()
    counts["unknown_caller", ""] = 90_000
    refusals.look()
    assert len(lines_of(tmp_path)) == 2, "at most one a minute"
    monkeypatch.setattr("pipeline.node.audit.REFUSALS_SECONDS", 0.0)
    refusals.look()
    refusals.look()
    assert [json.loads(line)["facts"] for line in lines_of(tmp_path)[1:]] == [
        {"ever": {"unknown_caller": 3, "no_uid scanner": 1}}, {"ever": {"unknown_caller": 90_000}},
    ]  # fmt: skip
