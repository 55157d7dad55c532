"""Patients with a known answer: ellipsoid organs and small lesions, scanned by a noisy, oblique, uneven scanner.

The demo trains on them and the tests measure with them. Every shape lives in millimetres, so its volume is known
exactly and does not depend on the grid it is scanned on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from .volume import Case, Geometry, Provenance, Volume

CHANNELS = ("t1", "t2")
LABELS = {"liver": 1, "kidney": 2, "lesion": 3}

_TISSUE = {"outside": (0.02, 0.03), "body": (0.40, 0.30), "liver": (0.72, 0.45), "kidney": (0.50, 0.80)}
_LESION = (0.45, 0.95)
"""Mean signal in each channel. A lesion is dark in t1 and bright in t2, as fluid is; no single channel tells all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ellipsoid:
    """One tissue: {x : |(R^T (x - centre)) / radii| <= 1}, in RAS+ millimetres."""

    tissue: str
    centre: Float[np.ndarray, " 3"]
    radii: Float[np.ndarray, " 3"]
    rotation: Float[np.ndarray, "3 3"]

    @property
    def ml(self) -> float:
        """Its exact volume."""
        return float(4 / 3 * np.pi * np.prod(self.radii)) / 1000

    def depth_mm(self, points: Float[np.ndarray, "*any 3"]) -> Float[np.ndarray, "*any"]:
        """About how far inside each point lies; negative outside; exact on a sphere."""
        local = (points - self.centre) @ self.rotation / self.radii
        return (1 - np.linalg.norm(local, axis=-1)) * float(self.radii.min())


@dataclass(frozen=True, kw_only=True, eq=False)
class Body:
    """A patient as shapes, painted in order: the later one wins."""

    shapes: tuple[Ellipsoid, ...]

    def known_ml(self) -> dict[str, float]:
        """The exact volume of each label: lesions lie wholly inside the liver and are not liver."""
        volumes = {name: sum(s.ml for s in self.shapes if s.tissue == name) for name in LABELS}
        volumes["liver"] -= volumes["lesion"]
        return volumes


def body(seed: int) -> Body:
    """A patient of their own: organs vary in place, size and tilt; one to three lesions sit apart inside the liver."""
    rng = np.random.default_rng(seed)
    liver = Ellipsoid(
        tissue="liver",
        centre=np.array([14.0, 2.0, 2.0]) + rng.uniform(-4, 4, 3),
        radii=np.array([25.0, 20.0, 22.0]) * rng.uniform(0.88, 1.12, 3),
        rotation=_rotation(rng, 0.3),
    )
    kidney = Ellipsoid(
        tissue="kidney",
        centre=np.array([-29.0, -6.0, -4.0]) + rng.uniform(-3, 3, 3),
        radii=np.array([9.0, 8.0, 15.0]) * rng.uniform(0.88, 1.12, 3),
        rotation=_rotation(rng, 0.3),
    )
    torso = Ellipsoid(tissue="body", centre=np.zeros(3), radii=np.array([47.0, 36.0, 120.0]), rotation=np.eye(3))
    return Body(shapes=(torso, liver, kidney, *_lesions(liver, rng)))


def _lesions(liver: Ellipsoid, rng: np.random.Generator) -> list[Ellipsoid]:
    found: list[Ellipsoid] = []
    wanted = int(rng.integers(1, 4))
    for _ in range(200):  # a crowded liver keeps the lesions that found room: always the first, nearly always all
        if len(found) == wanted:
            break
        radius = rng.uniform(5.5, 8.5)
        place = _unit(rng) * rng.uniform(0, 0.9) * (1 - (radius + 1) / liver.radii.min()) * liver.radii
        centre = liver.centre + liver.rotation @ place
        if all(np.linalg.norm(centre - other.centre) > radius + other.radii[0] + 3 for other in found):
            found.append(Ellipsoid(tissue="lesion", centre=centre, radii=np.full(3, radius), rotation=np.eye(3)))
    return found


def geometry(seed: int, *, extent_mm: Sequence[float] = (98.0, 78.0, 68.0)) -> Geometry:
    """A scanner's grid around the patient: anisotropic, oblique, its axes in any order and direction."""
    rng = np.random.default_rng([seed, 1])
    spacing = np.array([2.4, 2.4, rng.uniform(3.8, 4.6)]) * rng.uniform(0.95, 1.05)
    shape = np.ceil(np.array(extent_mm) / spacing).astype(int)
    order, signs = rng.permutation(3), rng.choice([-1, 1], 3)
    axes = (_rotation(rng, 0.25) * spacing * signs)[:, order]
    shape = shape[order]
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = rng.uniform(-3, 3, 3) - axes @ (shape - 1) / 2
    i, j, k = (int(n) for n in shape)
    return Geometry(shape=(i, j, k), affine=affine)


def scan(patient: Body, grid: Geometry, *, seed: int, noise: float = 0.04, bias: float = 0.25) -> tuple[Volume, Volume]:
    """The patient on that grid: two channels with soft edges, a bias field and noise; and the labels at voxel centres."""
    rng = np.random.default_rng([seed, 2])
    points = grid.to_world(np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij"), axis=-1))
    labels = np.zeros((1, *grid.shape), dtype=np.uint8)
    signal = np.stack([np.full(grid.shape, level) for level in _TISSUE["outside"]])
    soft_mm = float(np.mean(grid.spacing)) / 4
    for shape in patient.shapes:
        depth = shape.depth_mm(points)
        levels = _LESION if shape.tissue == "lesion" else _TISSUE[shape.tissue]
        share = 1 / (1 + np.exp(-np.clip(depth / soft_mm, -30, 30)))
        for channel, level in enumerate(levels):
            signal[channel] += share * (level * rng.uniform(0.92, 1.08) - signal[channel])
        if shape.tissue in LABELS:
            labels[0][depth >= 0] = LABELS[shape.tissue]
    slope = rng.uniform(-1, 1, (len(CHANNELS), 3))
    field = 1 + bias * np.einsum("ijkx,cx->cijk", points / 60, slope / np.linalg.norm(slope, axis=1, keepdims=True))
    noisy = signal * field + rng.normal(0, noise, signal.shape)
    provenance = Provenance(reader="phantom")
    image = Volume(voxels=(1000 * noisy).astype(np.float32), geometry=grid, channels=CHANNELS, provenance=provenance)
    return image, Volume(voxels=labels, geometry=grid, channels=("labels",), provenance=provenance)


def phantom(seed: int) -> Case:
    """One patient, scanned: the same seed gives the same bytes."""
    image, labels = scan(body(seed), geometry(seed), seed=seed)
    return Case(id=f"phantom_{seed:03d}", image=image, labels=labels)


def _unit(rng: np.random.Generator) -> Float[np.ndarray, " 3"]:
    vector = rng.normal(size=3)
    return vector / np.linalg.norm(vector)


def _rotation(rng: np.random.Generator, most: float) -> Float[np.ndarray, "3 3"]:
    """A turn about a random axis by at most so many radians (Rodrigues)."""
    x, y, z = _unit(rng)
    angle = rng.uniform(-most, most)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
