"""measurements.json: per label its millilitres, its connected parts, where it lies and how sure the network was."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer
from scipy import ndimage

from preprocessing.plan import Label
from preprocessing.regions import Place, parted, places
from preprocessing.volume import Geometry

from ..names import MEASUREMENTS
from ..report import Result, as_json, grid, write_whole

FILE_NAME = MEASUREMENTS

MOST_PARTS = 200
"""Of a label in so many pieces the largest are listed, one by one; all of them are counted."""

Millimetres = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to decide."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One connected part of a label: a lesion, say."""

    number: int
    """From 1, the largest first: the same in every table, picture and map of this case."""
    voxels: int
    volume_ml: float
    centroid_mm: Millimetres


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One label of one case. Places are RAS+ millimetres; None where nothing was found."""

    name: str
    value: int
    voxels: int
    volume_ml: float
    components: int
    largest_component_ml: float
    bounding_box_mm: tuple[Millimetres, Millimetres] | None
    """Lowest and highest x, y, z of the outer faces of its voxels."""
    centroid_mm: Millimetres | None
    mean_confidence: float | None
    parts: tuple[Part, ...] = ()
    """The largest first; no more than MOST_PARTS."""


def write(result: Result, folder: Path, config: Config) -> list[Path]:
    """One JSON file, with what its words mean inside it."""
    path = folder / FILE_NAME
    write_whole(path, as_json(_document(result, measure(result))))
    return [path]


def calibrated(result: Result) -> str:
    """How far a confidence can be believed."""
    if result.temperatures:
        return "calibrated on held-out cases of the package's own dataset, and on no other"
    return "as the network gave it; not calibrated"


def measure(result: Result) -> tuple[Measurement, ...]:
    """Every label of the package, in its order, found or not; a region with the regions in it."""
    return tuple(
        _present(label, place, result.scan.geometry, result.confidence.get(label.name)) if place else _absent(label)
        for label, place in places(result.labels.voxels[0], result.label_table)
    )


def _absent(label: Label) -> Measurement:
    return Measurement(
        name=label.name,
        value=label.value,
        voxels=0,
        volume_ml=0.0,
        components=0,
        largest_component_ml=0.0,
        bounding_box_mm=None,
        centroid_mm=None,
        mean_confidence=None,
    )


def _present(label: Label, place: Place, geometry: Geometry, confidence: float | None) -> Measurement:
    numbers, sizes = parted(place.mask)
    voxels = int(place.mask.sum())
    return Measurement(
        name=label.name,
        value=label.value,
        voxels=voxels,
        volume_ml=voxels * geometry.voxel_ml,
        components=len(sizes),
        largest_component_ml=int(sizes[0]) * geometry.voxel_ml,
        bounding_box_mm=_bounding_box(place, geometry),
        centroid_mm=_millimetres(geometry.to_world(_centroid(place.mask) + place.start)),
        mean_confidence=None if confidence is None else float(confidence),
        parts=tuple(_parts(numbers, place, geometry)),
    )


def _parts(numbers: Integer[np.ndarray, "i j k"], place: Place, geometry: Geometry) -> Iterator[Part]:
    for number, box in enumerate(ndimage.find_objects(numbers, max_label=MOST_PARTS), start=1):
        if box is None:
            return
        part = numbers[box] == number
        voxels = int(part.sum())
        yield Part(
            number=number,
            voxels=voxels,
            volume_ml=voxels * geometry.voxel_ml,
            centroid_mm=_millimetres(geometry.to_world(_centroid(part) + [side.start for side in box] + place.start)),
        )


def _bounding_box(place: Place, geometry: Geometry) -> tuple[Millimetres, Millimetres]:
    """A linear function over voxels is least and greatest at the ends of their lines along k: a few points do."""
    mask = place.mask
    i, j = np.nonzero(mask.any(axis=2))
    lines = mask[i, j]
    first, last = lines.argmax(axis=1), mask.shape[2] - 1 - lines[:, ::-1].argmax(axis=1)
    ends = np.concatenate([np.stack([i, j, first], axis=1), np.stack([i, j, last], axis=1)])
    points = geometry.to_world(ends + place.start)
    half = np.abs(geometry.affine[:3, :3]).sum(axis=1) / 2  # from a voxel's centre to its farthest corner, per axis
    return _millimetres(points.min(axis=0) - half), _millimetres(points.max(axis=0) + half)


def _centroid(mask: Bool[np.ndarray, "i j k"]) -> np.ndarray:
    along = [mask.sum(axis=tuple(other for other in range(3) if other != axis)) for axis in range(3)]
    return np.array([np.average(np.arange(len(counts)), weights=counts) for counts in along])


def _millimetres(point: np.ndarray) -> Millimetres:
    x, y, z = (float(value) for value in point)
    return x, y, z


def _document(result: Result, measured: tuple[Measurement, ...]) -> dict[str, Any]:
    return {
        "case": result.case_id,
        "package": {"id": result.package_id, "name": result.package_name},
        "words": {
            "volume_ml": "voxels times the volume of one voxel; a region has those of the regions in it, too",
            "components": "parts whose voxels share a face, an edge or a corner",
            "parts": f"each of them, numbered from the largest; no more than {MOST_PARTS} are listed",
            "bounding_box_mm": "lowest and highest x, y, z (RAS+) of the outer faces of its voxels",
            "centroid_mm": "mean of its voxel centres, RAS+",
            "mean_confidence": f"mean winning probability inside the label; {calibrated(result)}",
            "null": "nothing was found, or the network did not say",
        },
        "grid": grid(result.scan.geometry),
        "labels": {each.name: {k: v for k, v in asdict(each).items() if k != "name"} for each in measured},
    }
