"""What a scan is: voxels, where they lie in the patient, and where they came from."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Shaped

if TYPE_CHECKING:
    import torch

CORNER_TOLERANCE_MM = 1e-2
"""Two grids are one when every corner agrees this well: NIfTI keeps its affine in float32, DICOM in decimal text."""

SHEAR_TOLERANCE = 1e-4
"""Largest cosine between two axes of a grid that still counts as a right angle (nifti quaternions round to about 1e-5)."""


class ScanError(ValueError):
    """A scan cannot be used. The message says what was met, what was needed, what to do."""


class UnreadableScan(ScanError):
    """The file is damaged, is no scan, or says too little about where its voxels lie."""


class GeometryMismatch(ScanError):
    """Two volumes that must share a grid do not."""


class MissingChannel(ScanError):
    """A scan has other channels than the package was trained on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """A grid in the patient: its shape, and the affine from voxel indices (i, j, k) to RAS+ millimetres."""

    shape: tuple[int, int, int]
    affine: Float[np.ndarray, "4 4"]

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ScanError(
                f"A grid of shape {tuple(self.shape)} was met; three axes of at least one voxel are needed. "
                "Look at how the scan was exported."
            )
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise ScanError(
                f"The affine {affine[:3].round(4).tolist()} does not place voxels in space; an invertible one is "
                "needed. Export the scan again with its orientation."
            )
        if not np.allclose(affine[3], [0, 0, 0, 1]):
            raise ScanError(f"The last row of an affine is {affine[3].tolist()}; it must be [0, 0, 0, 1].")
        affine.flags.writeable = False
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "affine", affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between neighbouring voxels along i, j, k."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @property
    def direction(self) -> Float[np.ndarray, "3 3"]:
        """Unit vectors of i, j, k in RAS+, one per column."""
        return self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def orientation(self) -> str:
        """The anatomical side each voxel axis points to, closest first, e.g. 'RAS' or 'LPS'."""
        letters = [""] * 3
        for world, axis, sign in self.axis_order():
            letters[axis] = ("LR", "PA", "IS")[world][int(sign > 0)]
        return "".join(letters)

    def axis_order(self) -> list[tuple[int, int, int]]:
        """For x, y, z in turn: (world axis, the voxel axis nearest to it, its sign).

        The strongest cosine is matched first, so that no voxel axis is used twice on an oblique grid.
        """
        cosines = self.direction.copy()
        matched = []
        for _ in range(3):
            world, axis = np.unravel_index(np.argmax(np.abs(cosines).round(9)), (3, 3))
            matched.append((int(world), int(axis), 1 if cosines[world, axis] > 0 else -1))
            cosines[world, :] = 0
            cosines[:, axis] = 0
        return sorted(matched)

    @property
    def is_oblique(self) -> bool:
        """Whether no relabelling of axes brings the grid parallel to the patient's axes."""
        return bool((np.abs(self.direction).max(axis=0) < 1 - 1e-6).any())

    @property
    def is_sheared(self) -> bool:
        """Whether two voxel axes do not meet at a right angle (a tilted gantry, a careless registration)."""
        cosines = self.direction.T @ self.direction
        return bool(np.abs(cosines - np.eye(3)).max() > SHEAR_TOLERANCE)

    @property
    def voxel_ml(self) -> float:
        """Millilitres in one voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    def to_world(self, ijk: Any) -> Float[np.ndarray, "*any 3"]:
        """Voxel indices to RAS+ millimetres."""
        return np.asarray(ijk, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def to_voxel(self, xyz: Any) -> Float[np.ndarray, "*any 3"]:
        """RAS+ millimetres to voxel indices."""
        return (np.asarray(xyz, dtype=np.float64) - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T

    @property
    def corners_mm(self) -> Float[np.ndarray, "8 3"]:
        """The centres of the eight corner voxels."""
        last = np.array(self.shape) - 1
        return self.to_world(np.array(list(np.ndindex(2, 2, 2))) * last)

    def matches(self, other: "Geometry") -> bool:
        """Whether both are the same grid: same shape, every corner at the same place."""
        if self.shape != other.shape:
            return False
        return float(np.abs(self.corners_mm - other.corners_mm).max()) <= CORNER_TOLERANCE_MM

    def __str__(self) -> str:
        shape = "×".join(str(n) for n in self.shape)
        spacing = "×".join(f"{s:.3g}" for s in self.spacing)
        return f"{shape} voxels of {spacing} mm, {self.orientation}{', oblique' if self.is_oblique else ''}"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where voxels came from, and what was done to them on the way in."""

    sources: tuple[str, ...] = ()
    """The files, or the folder of a series, as the user named them."""
    sha256: str = ""
    """One hash over the bytes of all sources, in the order of `sources` or of the slices."""
    reader: str = ""
    repairs: tuple[str, ...] = ()
    """Everything that was not as it should be and was mended without loss, one sentence each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """Voxels [channel i j k] on a grid. Read-only: a change is a new Volume."""

    voxels: Shaped[np.ndarray, "channel i j k"]
    geometry: Geometry
    channels: tuple[str, ...]
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        if self.voxels.shape[1:] != self.geometry.shape:
            raise GeometryMismatch(
                f"Voxels of shape {self.voxels.shape[1:]} were given a grid of {self.geometry.shape}; "
                "both must be the same. This is a mistake in the calling code."
            )
        if len(self.channels) != self.voxels.shape[0]:
            raise MissingChannel(
                f"{self.voxels.shape[0]} channels of voxels came with the names {list(self.channels)}; "
                "each channel needs one name. Name every channel once."
            )
        view = self.voxels.view()  # the caller's own array stays as writeable as it was
        view.flags.writeable = False
        object.__setattr__(self, "voxels", view)

    def with_voxels(
        self,
        voxels: Shaped[np.ndarray, "channel i j k"],
        geometry: Geometry | None = None,
        channels: Sequence[str] | None = None,
    ) -> "Volume":
        """The same scan with other voxels, and with another grid or other channels where they changed."""
        return replace(
            self,
            voxels=voxels,
            geometry=geometry or self.geometry,
            channels=self.channels if channels is None else tuple(channels),
        )

    def with_channels(self, channels: Sequence[str]) -> "Volume":
        """The same scan under the names its package uses; refused when their number differs."""
        if len(channels) != len(self.channels):
            raise MissingChannel(
                f"The scan has {len(self.channels)} channel(s) {list(self.channels)}; {len(channels)} are needed: "
                f"{', '.join(channels)}. Give one file per channel, named {channels[0]}, ... in a folder of its own."
            )
        return replace(self, channels=tuple(channels))

    def to_tensor(self, device: "torch.device | str" = "cpu") -> "torch.Tensor":
        """A float32 copy [C, D, H, W] on the device. The only way from numpy to torch: a read-only array must be copied."""
        import torch  # not at the top: reading a scan needs no torch

        return torch.from_numpy(self.voxels.astype(np.float32, copy=True)).to(device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One patient's scan with its reference labels, if any, on the same grid."""

    id: str
    image: Volume
    labels: Volume | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and not self.image.geometry.matches(self.labels.geometry):
            raise GeometryMismatch(
                f"{self.id}: the image lies on {self.image.geometry}, its labels on {self.labels.geometry}"
                f"{_offset(self.image.geometry, self.labels.geometry)}. They must share one grid: "
                "save the labels from the image they were drawn on."
            )


def stack(volumes: Sequence[Volume], channels: Sequence[str]) -> Volume:
    """Single-channel scans of one patient as one Volume; refused unless they share a grid."""
    if len(volumes) != len(channels):
        raise MissingChannel(
            f"{len(volumes)} file(s) were met; {len(channels)} are needed, one for each of {', '.join(channels)}. "
            "Add what is missing, or take away what does not belong."
        )
    first = volumes[0]
    for name, other in zip(channels[1:], volumes[1:], strict=True):
        if not first.geometry.matches(other.geometry):
            raise GeometryMismatch(
                f"{channels[0]} lies on {first.geometry}; {name} on {other.geometry}"
                f"{_offset(first.geometry, other.geometry)}. Channels must share a grid: resample one onto the other."
            )
    voxels = np.concatenate([volume.voxels for volume in volumes])
    provenance = Provenance(
        sources=tuple(source for volume in volumes for source in volume.provenance.sources),
        sha256=_combined([volume.provenance.sha256 for volume in volumes]),
        reader=first.provenance.reader,
        repairs=tuple(repair for volume in volumes for repair in volume.provenance.repairs),
    )
    return Volume(voxels=voxels, geometry=first.geometry, channels=tuple(channels), provenance=provenance)


def _combined(hashes: Sequence[str]) -> str:
    import hashlib

    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _offset(one: Geometry, other: Geometry) -> str:
    if one.shape != other.shape:
        return ""
    return f", up to {np.abs(one.corners_mm - other.corners_mm).max():.2f} mm apart"
