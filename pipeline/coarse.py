"""Where to look: a coarse model sees the whole scan at larger voxels, and the networks then look only around what it found.

A package has one only where held-out cases proved that no label lay outside (coarse_making.py). Where it finds nothing, all
is looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Integer

from preprocessing.plan import Plan
from preprocessing.steps import prepare
from preprocessing.volume import Geometry, Volume

from .engines import Engine
from .engines.torch import engine
from .package import Coarse, ModelPackage
from .prediction import Inference, Region, choose_device, open_stream

OVERLAP = 0.25
"""Of its windows: a box is sought, no border."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """Where a scan is worth looking at."""

    corners: tuple[tuple[float, float, float], ...]
    """Of a box, in millimetres; none: everywhere."""
    margin_mm: float
    words: str
    """For the report."""

    def on(self, grid: Geometry) -> Region | None:
        """The box and its margin on a prepared grid; None: all of it."""
        return region_around(self.corners, grid, self.margin_mm) if self.corners else None


def look(volume: Volume, coarse: Coarse, network: Engine) -> Look:
    """Where the coarse model finds something in a scan."""
    corners, sides = box_of(volume, coarse.plan, network)
    if not corners:
        return Look(corners=(), margin_mm=0.0, words="everywhere: the coarse model found nothing")
    size = " x ".join(f"{side + 2 * coarse.margin_mm:.0f}" for side in sides)
    words = f"a box of {size} mm: where the coarse model found something, and {coarse.margin_mm:g} mm around"
    return Look(corners=corners, margin_mm=coarse.margin_mm, words=words)


def coarse_engine(package: ModelPackage, device: str) -> Engine:
    """What runs the coarse model of a package that has one: torch, in float32, whatever runs the others."""
    return engine(package.coarse_network(), choose_device(device), built_by=f"{package.id} coarse")


Corners = tuple[tuple[float, float, float], ...]
Box = tuple[Integer[np.ndarray, " 3"], Integer[np.ndarray, " 3"]]
"""The first voxel, and the first behind the last."""


def box_of(volume: Volume, plan: Plan, network: Engine) -> tuple[Corners, tuple[float, ...]]:
    """Corners of all that a network finds, in millimetres, and how long its sides are; nothing where it finds nothing."""
    prepared, _ = prepare(volume, plan.steps)
    stream = open_stream(prepared, [network], plan, Inference(overlap=OVERLAP, device=str(network.device)))
    seen = [torch.zeros(size, dtype=torch.bool) for size in prepared.geometry.shape]
    one, other = (axis for axis in range(3) if axis != stream.axis)
    for rows in stream.rows():
        logits = rows.logits[0].cpu()
        something = (logits > 0).any(dim=0) if plan.has_regions else logits.argmax(dim=0) > 0
        seen[stream.axis][rows.first : rows.first + len(something)] |= something.any(dim=2).any(dim=1)
        seen[one] |= something.any(dim=2).any(dim=0)
        seen[other] |= something.any(dim=1).any(dim=0)
    if not seen[0].any():
        return (), ()
    grid = prepared.geometry
    start, stop = ends([along.numpy() for along in seen])
    corners = [grid.to_world(np.array(corner) - 0.5) for corner in product(*zip(start, stop, strict=True))]
    sides = (stop - start) * np.array(grid.spacing)
    return tuple((float(x), float(y), float(z)) for x, y, z in corners), tuple(sides.tolist())


def ends(along: Sequence[np.ndarray]) -> Box:
    """Of what is there, seen along each axis."""
    places = [np.flatnonzero(one) for one in along]
    return np.array([place[0] for place in places]), np.array([place[-1] + 1 for place in places])


def region_around(corners: Corners, grid: Geometry, margin_mm: float) -> Region:
    """Every voxel of the grid that lies in the box or not farther away than the margin, in part at least."""
    voxels = np.array([grid.to_voxel(np.array(corner)) for corner in corners]) + 0.5
    margin = margin_mm / np.array(grid.spacing)
    start = np.clip(np.floor(voxels.min(axis=0) - margin + 1e-6), 0, np.array(grid.shape) - 1).astype(int).tolist()
    stop = np.clip(np.ceil(voxels.max(axis=0) + margin - 1e-6), 1, grid.shape).astype(int).tolist()
    return Region(start=(start[0], start[1], start[2]), stop=(stop[0], stop[1], stop[2]))
