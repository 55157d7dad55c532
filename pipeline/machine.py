"""What there is to train with: the limits of a container count, not the size of its host."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from preprocessing.cores import ROOT, groups, usable_cores, words
from preprocessing.rules import Machine


def measure_machine(device: str, root: Path = ROOT) -> Machine:
    """Free memory and cores, of the GPU where one is asked for and there. `root` is where /proc and /sys lie."""
    cores = usable_cores(root)
    if device != "cpu" and may_have_gpu():
        import torch  # not at the top: most machines without a GPU are told from others without it

        if torch.cuda.is_available():
            return Machine(memory_gb=torch.cuda.mem_get_info()[0] / 1e9, cores=cores, has_gpu=True)
    return Machine(memory_gb=free_memory(root) / 1e9, cores=cores, has_gpu=False)


def may_have_gpu() -> bool:
    """Whether a GPU's driver is here, without which torch sees none: NVIDIA's library, or AMD's device."""
    if Path("/dev/kfd").exists():
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def free_memory(root: Path = ROOT) -> int:
    """Bytes this process may still take: of the host, and of every group it lies in, innermost to outermost."""
    return max(0, min([_available(root), *_left(root)]))


def _available(root: Path) -> int:
    for line in words(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left(root: Path) -> Iterator[int]:
    for group in groups(root, "memory"):
        for limit, used, idle in MEMORY:
            most, taken = words(group / limit).strip(), words(group / used).strip()
            if most.isdigit() and taken.isdigit():
                yield int(most) - int(taken) + _idle(group, idle)


MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""How much a group may take, how much it took, and what of that are copies of files that it gives back when asked:
the names of version 2, then of version 1."""


def _idle(group: Path, name: str) -> int:
    found = [line.split()[1] for line in words(group / "memory.stat").splitlines() if line.split()[:1] == [name]]
    return int(found[0]) if found else 0
