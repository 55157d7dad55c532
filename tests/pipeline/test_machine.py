"""What a container may take is what counts, in both versions of control groups, at whatever depth."""

import os
from pathlib import Path

import pytest

from pipeline.machine import free_memory, measure_machine
from preprocessing.cores import usable_cores

GB = 10**9


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A made-up host with 64 GB free and no groups."""
    write(tmp_path / "proc/meminfo", "MemTotal: 128000000 kB\nMemAvailable: 62500000 kB\n")
    write(tmp_path / "proc/self/cgroup", "")
    return tmp_path


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))


def write(path: Path, words: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(words)


def test_without_groups_the_host_is_all_there_is(host: Path) -> None:
    assert free_memory(host) == 64 * GB
    assert usable_cores(host) == 16


def test_in_version_2_a_limit_leaves_what_is_not_taken_and_copies_of_files_are_not_taken(host: Path) -> None:
    write(host / "proc/self/cgroup", "0::/\n")
    write(host / "sys/fs/cgroup/memory.max", f"{8 * GB}\n")
    write(host / "sys/fs/cgroup/memory.current", f"{5 * GB}\n")
    write(host / "sys/fs/cgroup/memory.stat", f"anon {3 * GB}\ninactive_file {2 * GB}\n")
    write(host / "sys/fs/cgroup/cpu.max", "350000 100000\n")
    assert free_memory(host) == 5 * GB
    assert usable_cores(host) == 3


def test_a_group_without_a_limit_lies_in_one_that_has_one(host: Path) -> None:
    write(host / "proc/self/cgroup", "0::/slurm/job_7/step_0\n")
    groups = host / "sys/fs/cgroup"
    write(groups / "slurm/job_7/step_0/memory.max", "max\n")
    write(groups / "slurm/job_7/step_0/memory.current", "17\n")
    write(groups / "slurm/job_7/step_0/cpu.max", "max 100000\n")
    write(groups / "slurm/job_7/memory.max", f"{16 * GB}\n")
    write(groups / "slurm/job_7/memory.current", f"{4 * GB}\n")
    write(groups / "slurm/job_7/cpu.max", "400000 100000\n")
    write(groups / "slurm/cpu.max", "200000 100000\n")
    assert free_memory(host) == 12 * GB
    assert usable_cores(host) == 2


def test_in_version_1_each_resource_has_a_tree_of_its_own(host: Path) -> None:
    write(host / "proc/self/cgroup", "9:name=systemd:/\n4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/\n")
    write(host / "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", f"{6 * GB}\n")
    write(host / "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes", f"{2 * GB}\n")
    write(host / "sys/fs/cgroup/memory/docker/abc/memory.stat", f"cache 5\ntotal_inactive_file {GB}\n")
    write(host / "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us", "150000\n")
    write(host / "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us", "100000\n")
    assert free_memory(host) == 5 * GB
    assert usable_cores(host) == 1


def test_a_container_that_sees_only_its_own_group_finds_it_at_the_root(host: Path) -> None:
    write(host / "proc/self/cgroup", "4:memory:/docker/abc\n1:cpu:/docker/abc\n")
    write(host / "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{6 * GB}\n")
    write(host / "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{2 * GB}\n")
    write(host / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    write(host / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert free_memory(host) == 4 * GB
    assert usable_cores(host) == 16


def test_no_limit_of_version_1_is_a_very_large_one(host: Path) -> None:
    write(host / "proc/self/cgroup", "4:memory:/\n")
    write(host / "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(host / "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{2 * GB}\n")
    assert free_memory(host) == 64 * GB


def test_a_full_group_leaves_nothing_and_a_sliver_of_a_core_is_one(host: Path) -> None:
    write(host / "proc/self/cgroup", "0::/\n")
    write(host / "sys/fs/cgroup/memory.max", f"{GB}\n")
    write(host / "sys/fs/cgroup/memory.current", f"{GB + 5}\n")
    write(host / "sys/fs/cgroup/cpu.max", "20000 100000\n")
    assert free_memory(host) == 0
    assert usable_cores(host) == 1


def test_a_process_bound_to_few_cores_has_no_more(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5})
    write(host / "proc/self/cgroup", "0::/\n")
    write(host / "sys/fs/cgroup/cpu.max", "800000 100000\n")
    assert usable_cores(host) == 2


def test_the_machine_is_measured_not_guessed() -> None:
    machine = measure_machine("cpu")
    assert machine.cores >= 1 and not machine.has_gpu
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    assert 0 <= machine.memory_gb <= total
