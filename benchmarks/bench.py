"""What every benchmark needs: which machine this is, children that measure one thing each, and the peak of memory.

Nothing but the standard library: peers run these scripts under interpreters of their own.
"""

import contextlib
import ctypes
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).resolve().parent)
sys.path = [place for place in sys.path if place != HERE] + [HERE]  # kernels.py here is not the package `kernels`


def heading() -> str:
    """The machine in a line, as it is just now."""
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return f"{chip()}, {cores()} cores, load {load}, OMP_NUM_THREADS {threads}, Python {platform.python_version()}"


def chip() -> str:
    told = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in told if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def child(python: str | Path, script: str, *words: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a fresh process prints last, as JSON; `error` with its last words where it fails.

    The parent should stay small: a child's peak of memory begins with its parent's size.
    """
    surroundings = {**os.environ, **(environment or {})}
    done = subprocess.run([str(python), script, *words], capture_output=True, text=True, env=surroundings)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it ended without a word"])[-1][:100]}
    answer: dict[str, Any] = json.loads((done.stdout.strip().splitlines() or ["{}"])[-1])
    return answer


def held() -> int:
    """Bytes of memory this process has."""
    return _told("VmRSS")


def peak() -> int:
    """The most bytes this process has had since `forget_peak`, or ever."""
    return _told("VmHWM")


def _told(name: str) -> int:
    if not Path("/proc/self/status").exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024


def forget_peak() -> None:
    """The peak begins anew from what is held now, once what the allocator keeps for later is given back (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
