"""Probabilities and uncertainty of one scan, on its own grid: as large as all classes over all voxels, and so never in
memory but in one file that has no name and is gone with whoever holds it, however that ends."""

import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Num, Shaped

from preprocessing.regions import values_of
from preprocessing.volume import Geometry, Volume

from .errors import UsageError

if TYPE_CHECKING:
    from preprocessing.plan import Label, Plan
    from preprocessing.steps import Trail

PROBABILITIES = "probabilities"
"""Asked for among the kinds: a map for every label. The background's is what they leave of 1."""

KINDS = {
    "entropy": "how far the answer is from clear: 0 sure of one label, 1 all equally likely",
    "folds": "how far the package's networks contradict each other: 0 of one mind",
    "flips": "how far the networks contradict themselves where the scan is mirrored: 0 of one mind",
}
"""Kinds of uncertainty (uncertainty.py has their formulas), and what each says."""

CODES = 255
"""A probability in one byte: steps of 0.004, finer than any network is calibrated."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Maps:
    """What is known of every voxel of a scan, one map at a time."""

    scratch: "_Scratch"
    geometry: Geometry
    """Of the maps as they lie in the scratch file: turned and cropped, not resampled."""
    axis: int
    """The axis of that grid that comes first in the file."""
    labels: tuple[str, ...]
    """Whose probabilities there are; empty where nobody asked."""
    kinds: tuple[str, ...]
    """What uncertainty there is: `entropy`, `folds`, `flips`."""
    scale: float
    """What a 1 of a probability stands for: 1/255 of bytes, 1 of floats."""
    before: "Trail"
    outside: float

    def probability(self, label: str) -> Volume:
        """The probability of a label, divided by `scale`, on the scan's own grid."""
        return self._map(label, self.scratch.read(self.labels.index(label)), self.outside / self.scale)

    def uncertainty(self, kind: str) -> Volume:
        """0 to 1, float32, on the scan's own grid."""
        return self._map(kind, self.scratch.read(len(self.labels) + self.kinds.index(kind)), self.outside)

    def _map(self, name: str, planes: Num[np.ndarray, "plane one other"], outside: float) -> Volume:
        voxels = np.moveaxis(planes, 0, self.axis)[None]
        there = Volume(voxels=voxels, geometry=self.geometry, channels=(name,))
        return self.before.undo(there, outside)

    def inside(self, labels: Volume, table: Sequence["Label"]) -> dict[str, dict[str, float]]:
        """Of each label that was found the mean uncertainty in it, kind by kind; a region with the regions in it."""
        values = values_of(table)
        found: dict[str, dict[str, float]] = {}
        for kind in self.kinds:
            counts, sums = _sums(labels.voxels[0], self.uncertainty(kind).voxels[0])
            for name, own in values.items():
                if count := int(counts[list(own)].sum()):
                    found.setdefault(name, {})[kind] = round(float(sums[list(own)].sum()) / count, 4)
        return {name: found[name] for name in values if name in found}


def _sums(
    labels: Shaped[np.ndarray, "i j k"], map_: Num[np.ndarray, "i j k"]
) -> tuple[Num[np.ndarray, " value"], Num[np.ndarray, " value"]]:
    """Per value of the label map how many voxels have it, and the sum of the map there; plane by plane, for bincount
    makes eight bytes of every voxel it is given."""
    values = 1 + int(np.iinfo(labels.dtype).max)
    counts, sums = np.zeros(values, np.int64), np.zeros(values)
    for found, plane in zip(labels, map_, strict=True):
        counts += np.bincount(found.ravel(), minlength=values)
        sums += np.bincount(found.ravel(), weights=plane.ravel(), minlength=values)
    return counts, sums


def in_bytes(volume: Volume) -> Volume:
    """A map of 0 to 1 whose voxels are bytes that stand for 1/255 each; plane by plane, for it may be large."""
    coded = np.empty(volume.voxels.shape, np.uint8)
    for plane, values in zip(coded[0], volume.voxels[0], strict=True):
        plane[...] = np.rint(values * np.float32(CODES))
    return volume.with_voxels(coded)


@dataclass(frozen=True, kw_only=True, eq=False)
class MapWriter:
    """Takes rows as they are finished, in any order, and keeps none of them."""

    scratch: "_Scratch"
    geometry: Geometry
    axis: int
    labels: tuple[str, ...]
    kinds: tuple[str, ...]
    exact: bool
    first: int
    """The channel of the first label: 1 where channel 0 is the background."""

    @staticmethod
    def create(
        folder: Path | None, plan: "Plan", geometry: Geometry, kinds: Sequence[str], *, axis: int = 0,
        exact: bool = False,
    ) -> "MapWriter":  # fmt: skip
        """Room for what is asked: `probabilities`, and kinds of uncertainty, on a grid whose rows come along `axis`.

        `folder` is where the scratch file lies (by default where temporary files do): on a disk, not in memory.
        `exact`: probabilities as floats instead of bytes.
        """
        labels = tuple(label.name for label in plan.labels) if PROBABILITIES in kinds else ()
        uncertain = tuple(kind for kind in kinds if kind != PROBABILITIES)
        # uncertainty always in floats: means of small numbers go into the report
        types = [np.float32 if exact else np.uint8] * len(labels) + [np.float32] * len(uncertain)
        along = geometry.shape[axis], *(n for other, n in enumerate(geometry.shape) if other != axis)
        scratch = _Scratch(folder, (along[0], along[1], along[2]), types)
        return MapWriter(
            scratch=scratch, geometry=geometry, axis=axis, labels=labels, kinds=uncertain, exact=exact,
            first=0 if plan.has_regions else 1,
        )  # fmt: skip

    def rows(self, start: int, probabilities: Any, uncertainty: Mapping[str, Any]) -> None:
        """Rows from `start` on: probabilities [K, r, H, W] of all classes or None, uncertainty [r, H, W] of each kind;
        tensors, on any device."""
        if self.labels:
            assert probabilities is not None
            for number in range(len(self.labels)):  # one after the other: no second copy of all classes
                rows = probabilities[self.first + number]
                rows = rows if self.exact else (rows.float() * CODES).round_().clamp_(0, CODES)
                self.scratch.write(number, start, _array(rows))
        for number, kind in enumerate(self.kinds, start=len(self.labels)):
            self.scratch.write(number, start, _array(uncertainty[kind]))

    def finish(self, before: "Trail", outside: float = 0.0) -> Maps:
        """The maps, to be read; `before` leads back from their grid to the scan's own, `outside` fills what was cropped."""
        return Maps(
            scratch=self.scratch, geometry=self.geometry, axis=self.axis, labels=self.labels, kinds=self.kinds,
            scale=1.0 if self.exact else 1 / CODES, before=before, outside=outside,
        )  # fmt: skip


def _array(rows: Any) -> Num[np.ndarray, "r one other"]:
    array: np.ndarray = rows.detach().cpu().numpy()
    return array


class _Scratch:
    """Maps of one shape behind each other in a file without a name."""

    def __init__(self, folder: Path | None, shape: tuple[int, int, int], types: Sequence[type]) -> None:
        self.shape, self.types = shape, [np.dtype(each) for each in types]
        sizes = [math.prod(shape) * each.itemsize for each in self.types]
        self.places = [sum(sizes[:number]) for number in range(len(sizes))]
        _refuse_full(Path(folder or tempfile.gettempdir()), sum(sizes))
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with this object)
        os.ftruncate(file.fileno(), max(1, sum(sizes)))
        self.file = file
        weakref.finalize(self, file.close)

    def write(self, number: int, start: int, rows: Num[np.ndarray, "r one other"]) -> None:
        """By writing and not through a map of memory: pages of the file must not count as this process's own."""
        assert rows.shape[1:] == self.shape[1:] and start + len(rows) <= self.shape[0]
        kind = self.types[number]
        data = np.ascontiguousarray(rows, dtype=kind).data.cast("B")
        place = self.places[number] + start * math.prod(self.shape[1:]) * kind.itemsize
        while data:  # a system may take less than it is given
            done = os.pwrite(self.file.fileno(), data, place)
            data, place = data[done:], place + done

    def read(self, number: int) -> Num[np.ndarray, "plane one other"]:
        """Mapped: its pages come when they are looked at, and go when memory is needed."""
        return np.memmap(self.file, self.types[number], "r", self.places[number], self.shape)


def _refuse_full(folder: Path, size: int) -> None:
    if (free := shutil.disk_usage(folder).free) < size:
        raise UsageError(
            f"{folder} has {free / 1e9:.1f} GB left; the maps that were asked for need {size / 1e9:.1f} GB while they are "
            "made. Make room, give an --out on another disk, or leave the outputs probabilities and uncertainty out."
        )
