"""SLURM says that a job's time is nearly up (`--signal=USR1@60`): the state is kept, and the job goes back into the queue."""

import logging
import os
import signal
import subprocess
import threading

logger = logging.getLogger(__name__)

_asked = threading.Event()


def listen() -> None:
    """Hear the signal from now on. Lightning's own handler would save in the middle of a step; it yields to ours."""
    if is_job() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, lambda *_: _asked.set())


def is_job() -> bool:
    """Whether SLURM started this process."""
    return "SLURM_JOB_ID" in os.environ


def is_requeued() -> bool:
    """Whether it did so before: a requeued job is given the very words it began with."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def is_time_up() -> bool:
    """Whether the signal came."""
    return _asked.is_set()


def requeue() -> None:
    """Back into the queue, once what is done is on disk; SLURM then ends this run."""
    _asked.clear()
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        logger.error("SLURM did not put job %s back into its queue: %s. Go on with --resume.", job, done.stderr.strip())
