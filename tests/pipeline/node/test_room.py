"""The room in which scans are decoded: what happens in it stays in it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from pipeline.claims import at_work
from pipeline.node.room import Answer, Job, Room

from .scanner import REPOSITORY, until

pytestmark = pytest.mark.slow

PLAIN = {"outputs": ["labels"]}


@pytest.fixture
def room() -> Iterator[Room]:
    made = Room(memory_bytes=1_000_000_000)
    yield made
    made.close()


def a_job(package: Path, out: Path, *paths: Path) -> Job:
    return Job(paths=tuple(map(str, paths)), package=str(package), out=str(out), settings=PLAIN)


def test_a_job_is_done_and_the_next_one_by_the_same_child(
    room: Room, tiny: Path, scan_file: Callable[..., Path], tmp_path: Path
) -> None:
    first = room.work(a_job(tiny, tmp_path / "out", scan_file(tmp_path / "a.nii.gz")), 120)
    assert first == Answer(status="done", folders=("a",)) and (tmp_path / "out/a/labels.nii.gz").exists()
    child = room.child
    assert child is not None
    second = room.work(a_job(tiny, tmp_path / "out2", scan_file(tmp_path / "b.nii.gz", seed=1)), 60)
    assert second.folders == ("b",) and room.child is child


def test_a_scan_that_is_refused_is_told_by_its_code_alone(room: Room, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "MUELLER.nii.gz"
    path.write_bytes(b"no scan")
    answer = room.work(a_job(tiny, tmp_path / "out", path), 120)
    assert answer == Answer(status="refused", code="no_scan") and "MUELLER" not in repr(answer)


def test_a_package_that_was_changed_is_told(room: Room, scan_file: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    answer = room.work(a_job(tmp_path / "package", tmp_path / "out", scan_file(tmp_path / "a.nii.gz")), 120)
    assert answer == Answer(status="failed", code="package")


def test_what_takes_too_long_is_ended_and_the_next_job_is_done(
    room: Room, tiny: Path, scan_file: Callable[..., Path], tmp_path: Path
) -> None:
    job = a_job(tiny, tmp_path / "out", scan_file(tmp_path / "a.nii.gz"))
    assert room.work(job, 0.05) == Answer(status="killed", code="time") and room.child is None
    assert room.work(job, 120).status == "done"


def test_a_child_that_dies_is_told_and_replaced(
    room: Room, tiny: Path, scan_file: Callable[..., Path], tmp_path: Path
) -> None:
    job = a_job(tiny, tmp_path / "out", scan_file(tmp_path / "a.nii.gz"))

    def murder() -> None:
        while room.child is None:
            time.sleep(0.01)
        os.kill(room.child.pid, signal.SIGKILL)

    threading.Thread(target=murder).start()
    assert room.work(job, 120) == Answer(status="killed", code="crashed")
    assert room.work(job, 120).status == "done"


def test_a_scan_that_unpacks_to_more_than_the_memory_it_may_have_ends_there(
    room: Room, tiny: Path, scan_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Research: 2048 cubed of zeros are 5 MB on disk and 16 GB unpacked. Here the same in little: the room has 1 GB."""
    import gzip

    import nibabel

    image = nibabel.Nifti1Image(np.zeros((1, 1, 1), np.int16), np.eye(4))
    image.set_qform(np.eye(4), 1)
    header = image.header
    header.set_xyzt_units("mm")
    header["vox_offset"] = 352
    header.set_data_shape((2048, 2048, 1024))
    with gzip.open(tmp_path / "bomb.nii.gz", "wb", compresslevel=1) as bomb:
        bomb.write(header.binaryblock + b"\0" * 4)
        nothing = bytes(1 << 24)
        for _ in range(2048 * 2048 * 1024 * 2 >> 24):
            bomb.write(nothing)
    answer = room.work(a_job(tiny, tmp_path / "out", tmp_path / "bomb.nii.gz"), 120)
    assert answer.status in ("killed", "refused") and answer.code in ("memory", "too_large")
    assert room.work(a_job(tiny, tmp_path / "out", scan_file(tmp_path / "a.nii.gz")), 120).status == "done"


def test_no_password_of_the_node_reaches_the_room(
    tiny: Path, scan_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    room = Room(memory_bytes=1_000_000_000)
    try:
        room.work(a_job(tiny, tmp_path / "out", scan_file(tmp_path / "a.nii.gz")), 120)
        assert room.child is not None
        surroundings = Path(f"/proc/{room.child.pid}/environ").read_bytes()
        assert b"secret" not in surroundings and b"PATH=" in surroundings
    finally:
        room.close()


def test_a_case_that_another_still_works_on_is_waited_for(
    room: Room, tiny: Path, scan_file: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    job, answers = a_job(tiny, tmp_path / "out", scan_file(tmp_path / "a.nii.gz")), []
    waiting = threading.Thread(target=lambda: answers.append(room.work(job, 240)))
    with at_work(tmp_path / "out"):
        waiting.start()
        waiting.join(20)  # as long as a job takes where nobody is in its way
        assert answers == []
    waiting.join()
    assert answers == [Answer(status="done", folders=("a",))]


NODE = """
import json, sys
from pipeline.node.room import Job, Room
room = Room(memory_bytes=1_000_000_000)
job = json.loads(sys.argv[1])
child = room._opened()
print(child.pid, flush=True)
room.work(Job(**job | {"paths": tuple(job["paths"])}), 600)
"""


def test_a_room_ends_with_its_node_however_that_ends_and_whatever_it_does(
    tiny: Path, scan_file: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    job = a_job(tiny, tmp_path / "out", scan_file(tmp_path / "a.nii.gz"))
    words = [sys.executable, "-c", NODE, json.dumps(asdict(job))]
    with at_work(tmp_path / "out"):  # so that its case would take for ever
        with subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as node:
            assert node.stdout is not None
            child = Path("/proc") / node.stdout.readline().strip()
            assert until(lambda: "libtorch" in (child / "maps").read_text(), 120), "it has begun"
            node.kill()
        assert until(lambda: not child.exists(), 60)
