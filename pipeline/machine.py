"""What there is to train with: the limits of a container count, not the size of its host."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from preprocessing.rules import Machine

ROOT = Path("/")


def measure_machine(device: str, root: Path = ROOT) -> Machine:
    """Free memory and cores, of the GPU where one is asked for and there. `root` is where /proc and /sys lie."""
    cores = usable_cores(root)
    if device != "cpu" and torch.cuda.is_available():
        return Machine(memory_gb=torch.cuda.mem_get_info()[0] / 1e9, cores=cores, has_gpu=True)
    return Machine(memory_gb=free_memory(root) / 1e9, cores=cores, has_gpu=False)


def usable_cores(root: Path = ROOT) -> int:
    """Cores this process may run on (a cpuset is obeyed by its affinity), no more than its groups' quota of time."""
    quotas = [len(os.sched_getaffinity(0)), *_quotas(root)]
    return max(1, int(min(quotas)))


def free_memory(root: Path = ROOT) -> int:
    """Bytes this process may still take: of the host, and of every group it lies in, innermost to outermost."""
    return max(0, min([_available(root), *_left(root)]))


def _available(root: Path) -> int:
    for line in _words(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _quotas(root: Path) -> Iterator[float]:
    for group in _groups(root, "cpu"):
        told = _words(group / "cpu.max").split()  # version 2: "150000 100000", or "max 100000"
        old = [_words(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        quota, period = told if len(told) == 2 else old
        if quota.isdigit() and period.isdigit() and int(period):  # without a quota it is "max", or -1
            yield int(quota) / int(period)


def _left(root: Path) -> Iterator[int]:
    for group in _groups(root, "memory"):
        for limit, used, idle in MEMORY:
            most, taken = _words(group / limit).strip(), _words(group / used).strip()
            if most.isdigit() and taken.isdigit():
                yield int(most) - int(taken) + _idle(group, idle)


MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""How much a group may take, how much it took, and what of that are copies of files that it gives back when asked:
the names of version 2, then of version 1."""


def _idle(group: Path, name: str) -> int:
    found = [line.split()[1] for line in _words(group / "memory.stat").splitlines() if line.split()[:1] == [name]]
    return int(found[0]) if found else 0


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the groups this process lies in, innermost first; in a container only some may be seen."""
    for line in _words(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        mounts = (controller, controllers) if number != "0" else (".", "unified")
        inside = PurePosixPath(path.lstrip("/"))
        for mount in dict.fromkeys(mounts):
            for group in (inside, *inside.parents):
                if (folder := root / "sys/fs/cgroup" / mount / group).is_dir():
                    yield folder


def _words(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
