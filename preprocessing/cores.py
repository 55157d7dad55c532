"""How many cores there are to use: the limits of a container count, not the size of its host."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def usable_cores(root: Path = ROOT) -> int:
    """Cores this process may run on (a cpuset is obeyed by its affinity), no more than its groups' quota of time.
    `root` is where /proc and /sys lie."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([own, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    for group in groups(root, "cpu"):
        told = words(group / "cpu.max").split()  # version 2: "150000 100000", or "max 100000"
        old = [words(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        quota, period = told if len(told) == 2 else old
        if quota.isdigit() and period.isdigit() and int(period):  # without a quota it is "max", or -1
            yield int(quota) / int(period)


def groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the groups this process lies in, innermost first; in a container only some may be seen."""
    for line in words(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        mounts = (controller, controllers) if number != "0" else (".", "unified")
        inside = PurePosixPath(path.lstrip("/"))
        for mount in dict.fromkeys(mounts):
            for group in (inside, *inside.parents):
                if (folder := root / "sys/fs/cgroup" / mount / group).is_dir():
                    yield folder


def words(path: Path) -> str:
    """What a file of the system says; nothing where it is not there."""
    try:
        return path.read_text()
    except OSError:
        return ""
