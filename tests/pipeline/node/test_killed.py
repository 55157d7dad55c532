"""kill -9 at any moment: what was said to be safe is there, whole, and nothing half counts."""

import random
import re
import subprocess
import threading
from pathlib import Path

import pydicom
import pytest

from pipeline.node.ledger import open_ledger
from pipeline.node.spool import Spool, hash_of, open_keys

from .scanner import a_node, a_process, a_study, free_port, read

pytestmark = pytest.mark.slow  # processes are started and killed all the time


def test_what_was_acknowledged_outlives_kills_at_random_moments(tmp_path: Path) -> None:
    acknowledged = _killed_often(tmp_path, kills=15, slices=60)
    assert acknowledged, "no object was ever acknowledged: the test tested nothing"


def _killed_often(folder: Path, kills: int, slices: int) -> set[str]:
    """A sender goes on sending while the node is killed and started again; then everything is compared."""
    sent = {path.name: path for path in a_study(folder / "sent", slices=slices, side=256)}
    state, port, random_moment = folder / "state", free_port(), random.Random(7)
    acknowledged: set[str] = set()
    for _ in range(kills):
        with a_process(state, port=port) as (process, _):
            words = [
                "storescu",
                "-v",
                "-aet",
                "SCANNER",
                "-aec",
                "HILUM",
                "127.0.0.1",
                str(port),
                *map(str, sent.values()),
            ]
            killer = threading.Timer(random_moment.uniform(0.05, 1.5), process.kill)
            killer.start()
            said = subprocess.run(words, capture_output=True, text=True, check=False)
            acknowledged |= _acknowledged(said.stderr)
            killer.join()
            process.wait()
        _compare(state, sent, acknowledged)
    return acknowledged


def _acknowledged(said: str) -> set[str]:
    """The files that dcmtk's sender was told success for."""
    return set(re.findall(r"Sending file: \S*/(\S+)\n(?:.*\n)*?I: Received Store Response \(Success\)", said))


def _compare(state: Path, sent: dict[str, Path], acknowledged: set[str]) -> None:
    spool, ledger = Spool(state, open_keys(state)), open_ledger(state)
    rows = [one for study in ledger.waiting() for one in ledger.since(study.study)]
    for one in rows:
        assert hash_of(spool.path(one.place)) == one.sha256, "a row without its whole object"
    ledger.reconcile(spool)
    files = list(state.glob("spool/*/*/*.dcm"))
    known = {str(pydicom.dcmread(path).SOPInstanceUID): path for path in files}
    originals = {str(read(path).SOPInstanceUID): path for path in sent.values()}
    assert {str(read(sent[name]).SOPInstanceUID) for name in acknowledged} <= set(known), (
        "an acknowledged object is gone"
    )
    for uid, path in known.items():
        assert read(path) == read(originals[uid]), "a half object counts"
    rows = [one for study in ledger.waiting() for one in ledger.since(study.study)]
    assert sorted(spool.path(one.place) for one in rows) == sorted(files), "rows and files differ after a start"
    assert list((state / "parts").iterdir()) == []
    ledger.close()


STEPS = ("spool.Part.finish", "spool.Spool.name", "spool.Spool._link", "spool.Spool.admit", "ledger.Ledger.record")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_each_step_of_taking_an_object_nothing_is_lost(tmp_path: Path, step: str, when: str) -> None:
    """The process kills itself there, so the moment is exact; then it is started again, and the sender tries again."""
    module, owner, name = step.split(".")
    code = f"""
import os, signal
from pathlib import Path
import pipeline.node.{module} as module
real = module.{owner}.{name}
def deadly(*words, **more):
    if {when!r} == "before": os.kill(os.getpid(), signal.SIGKILL)
    answer = real(*words, **more)
    os.kill(os.getpid(), signal.SIGKILL)
module.{owner}.{name} = deadly
"""
    (sent,) = a_study(tmp_path / "sent", slices=1)
    state = tmp_path / "state"
    with a_process(state, prelude=code) as (process, port):
        words = ["storescu", "-v", "-aet", "SCANNER", "-aec", "HILUM", "127.0.0.1", str(port), str(sent)]
        said = subprocess.run(words, capture_output=True, text=True, check=False)
        assert said.returncode != 0 and "(Success)" not in said.stderr
        assert process.wait(10) == -9
    with a_node(state) as node:
        words[words.index(str(port))] = str(node.port)
        assert len(node.files()) == len(node.ledger.waiting())
        assert node.parts() == []
        assert subprocess.run(words, capture_output=True, check=False).returncode == 0
        (path,) = node.files()
        assert read(path) == read(sent)
        (study,) = node.ledger.waiting()
        assert study.objects == 1
