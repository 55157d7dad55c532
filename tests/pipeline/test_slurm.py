"""A job of SLURM whose time is up goes back into the queue, after its state is on disk and not before."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import slurm
from pipeline.config import Train
from pipeline.training import is_follower


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What scontrol was asked, in a file."""
    told = tmp_path / "told"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> "{told}"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    return told


def test_the_signal_is_heard_and_the_job_goes_back_into_the_queue(job: Path) -> None:
    """In a process of its own: one that does not hear the signal is ended by it."""
    code = (
        "import os, signal; from pipeline import slurm; slurm.listen(); before = slurm.is_time_up(); "
        "os.kill(os.getpid(), signal.SIGUSR1); heard = slurm.is_time_up(); slurm.requeue(); "
        "print(before, heard, slurm.is_time_up())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True", "False"] and job.read_text() == "requeue 4711\n"


def test_of_an_array_the_one_task_goes_back(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    slurm.requeue()
    assert job.read_text() == "requeue 4700_3\n"


def test_outside_slurm_nothing_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    before = signal.getsignal(signal.SIGUSR1)
    slurm.listen()
    assert signal.getsignal(signal.SIGUSR1) == before and not slurm.is_job()


def test_only_who_was_told_of_devices_or_nodes_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    assert not is_follower(Train()), "tasks of a cluster that each train by themselves"
    assert is_follower(Train(nodes=2))
