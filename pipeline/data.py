"""Datasets on disk to batches: the cache of prepared cases, the folds, the windows of each epoch."""

import hashlib
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from preprocessing.augment import IGNORED, augment, draw_turn
from preprocessing.datasets import CaseFiles, Dataset
from preprocessing.patches import Places, cut, draw
from preprocessing.plan import Machine, Plan
from preprocessing.records import encode
from preprocessing.steps import prepare

from .scan import beside

logger = logging.getLogger(__name__)


def measure_machine(device: str) -> Machine:
    """What there is to train with: the limits of a container count, not the host's size."""
    cores = len(os.sched_getaffinity(0))
    quota = _cgroup("cpu.max").split()
    if quota and quota[0] != "max":
        cores = max(1, min(cores, int(quota[0]) // int(quota[1])))
    if device != "cpu" and torch.cuda.is_available():
        return Machine(memory_gb=torch.cuda.mem_get_info()[0] / 1e9, cores=cores, has_gpu=True)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit = _cgroup("memory.max").strip()
    if limit.isdigit():
        free = min(free, int(limit) - int(_cgroup("memory.current").strip() or 0))
    return Machine(memory_gb=free / 1e9, cores=cores, has_gpu=False)


def _cgroup(name: str) -> str:
    path = Path("/sys/fs/cgroup") / name
    return path.read_text() if path.exists() else ""


@dataclass(frozen=True, kw_only=True)
class PreparedCase:
    """One case as training sees it, read from the cache patch by patch."""

    id: str
    folder: Path

    def image(self) -> Float[np.ndarray, "channel i j k"]:
        return np.load(self.folder / "image.npy", mmap_mode="r")

    def labels(self) -> np.ndarray:
        """int16 [1, i, j, k]: a network's class numbers, not the values in the label files."""
        return np.load(self.folder / "labels.npy", mmap_mode="r")

    def places(self) -> Places:
        with np.load(self.folder / "places.npz") as stored:
            return Places(per_label={int(key): stored[key] for key in stored.files})


def cached(
    dataset: Dataset, plan: Plan, cache: Path, progress: Callable[[int, int], None] = lambda done, of: None
) -> list[PreparedCase]:
    """Every case prepared once. The key is the plan, how scans are read, and the case's own files; a killed run leaves
    only whole cases."""
    root = cache / plan.digest[:16]
    complete = [files for files in dataset.cases if files.images and files.labels]
    prepared = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for done, case in enumerate(
            pool.map(lambda files: _cached_case(dataset, files, plan, root), complete), start=1
        ):
            prepared.append(case)
            progress(done, len(complete))
    return prepared


def _cached_case(dataset: Dataset, files: CaseFiles, plan: Plan, root: Path) -> PreparedCase:
    assert files.labels is not None
    stamps = [
        (str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in _all_files((*files.images, files.labels))
    ]
    key = hashlib.sha256(json.dumps([stamps, encode(dataset.reading)]).encode()).hexdigest()[:16]
    folder = root / f"{files.id}-{key}"
    if not (folder / "complete").exists():
        _prepare_case(dataset, files, plan, folder)
    return PreparedCase(id=files.id, folder=folder)


def _all_files(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, with the voxels that lie beside a header; a DICOM folder as its files."""
    return [one for path in paths for one in (sorted(path.iterdir()) if path.is_dir() else [path, *beside(path)])]


def _prepare_case(dataset: Dataset, files: CaseFiles, plan: Plan, folder: Path) -> None:
    case = dataset.read(files)
    assert case.labels is not None
    image, trail = prepare(case.image, plan.steps)
    labels = trail.follow(case.labels).voxels
    numbered = plan.numbered(labels)
    seed = int(hashlib.sha256(files.id.encode()).hexdigest()[:8], 16)
    places = Places.of(numbered, np.random.default_rng(seed))
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = {str(value): voxels for value, voxels in places.per_label.items()}
    with _whole(folder / "image.npy") as stream:
        np.save(stream, np.ascontiguousarray(image.voxels))
    with _whole(folder / "labels.npy") as stream:
        np.save(stream, np.ascontiguousarray(numbered))
    with _whole(folder / "places.npz") as stream:
        np.savez(stream, **stored)
    (folder / "complete").touch()


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that is there with all of its bytes or not at all; two trainings may prepare the same case at once."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as stream:
        yield stream
    partial.replace(path)


def split(ids: Sequence[str], fold: int, folds: int) -> tuple[list[str], list[str]]:
    """Ids to train on and ids held out: shuffled once by a fixed seed, every id held out in exactly one fold."""
    if not 0 <= fold < folds:
        raise ValueError(f"fold {fold} of {folds} was asked for; folds count from 0 to {folds - 1}.")
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} case(s) were given; training needs at least two, one of them to be held out.")
    shuffled = sorted(ids)
    random.Random(12345).shuffle(shuffled)
    held_out = shuffled[fold :: min(folds, len(ids))] or shuffled[:1]
    return sorted(set(ids) - set(held_out)), sorted(held_out)


class Windows(TorchDataset[tuple[Tensor, Tensor]]):
    """The training windows of one epoch. Window n of epoch e depends on the seed, e and n alone, so a resumed run
    sees exactly what an undisturbed one would have seen, whatever the number of loading processes."""

    def __init__(self, cases: Sequence[PreparedCase], plan: Plan, *, seed: int, epoch: int, windows: int):
        self.cases = list(cases)
        self.plan = plan
        self.seed = seed
        self.epoch = epoch
        self.windows = windows
        order = np.random.default_rng([seed, epoch])
        rounds = [order.permutation(len(self.cases)) for _ in range(windows // len(self.cases) + 1)]
        self.order = np.concatenate(rounds)[:windows]

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, self.epoch, index])
        case = self.cases[self.order[index]]
        image, labels = case.image(), case.labels()
        i, j, k = draw(image.shape[1:], self.plan.patch, case.places(), rng)
        turn = draw_turn(rng, self.plan.spacing_mm)
        size = turn.reach(self.plan.patch, self.plan.spacing_mm)
        start = [begin - (wide - side) // 2 for begin, wide, side in zip((i, j, k), size, self.plan.patch, strict=True)]
        seen = torch.from_numpy(cut(image, start, size, outside=0))
        truth = torch.from_numpy(cut(labels, start, size, outside=IGNORED).astype(np.float32))
        seen, truth = augment(seen, truth, turn, self.plan.patch, self.plan.spacing_mm, rng)
        return seen, truth[0].long()


class Whole(TorchDataset[tuple[Tensor, Tensor]]):
    """Held-out cases whole, as segmentation will see them."""

    def __init__(self, cases: Sequence[PreparedCase]):
        self.cases = list(cases)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        case = self.cases[index]
        return torch.from_numpy(case.image().copy()), torch.from_numpy(case.labels()[0].astype(np.int64))
