"""What a scan is: voxels, where they lie in the patient, and where they came from."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float, Shaped

if TYPE_CHECKING:
    import torch

CORNER_TOLERANCE_MM = 1e-2
"""Two grids are one when every corner agrees this well: NIfTI keeps its affine in float32, DICOM in decimal text."""

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From the axes of DICOM, ITK and MetaImage to ours; and back."""

SHEAR_TOLERANCE = 1e-4
"""Largest cosine between two axes of a grid that still counts as a right angle (nifti quaternions round to about 1e-5)."""


REASONS = {
    "damaged": "bytes are missing, changed or too many",
    "no_scan": "it is something else than a scan",
    "no_geometry": "nothing says where its voxels lie",
    "resolution": "nothing believable says how large its pixels are, or they are too large for what is asked",
    "no_tissue": "there is no tissue on it",
    "contradiction": "it says two things that cannot both be true",
    "missing_slices": "slices lack in between",
    "duplicate_slices": "several slices lie at one place",
    "uneven_spacing": "its slices lie at uneven distances",
    "tilted": "its axes do not meet at right angles",
    "too_few_slices": "it has too few slices for a volume",
    "mixed": "it mixes what does not belong together",
    "not_numbers": "voxels are NaN or infinite",
    "colour": "it is coloured",
    "encoding": "it is packed in a way that cannot be unpacked here",
    "too_large": "it is larger than can be believed or held",
    "values": "its values cannot be brought to a scale",
    "channels": "channels are missing or too many",
    "grids_differ": "its parts lie on different grids",
    "unsupported": "it is of a kind that is not read",
}
"""Why a scan is refused: the closed list of words by which a program can tell refusals apart."""


class ScanError(ValueError):
    """A scan cannot be used. The message says what was met, what was needed, what to do; `reason` is one of REASONS."""

    usual_reason: ClassVar[str] = "unsupported"

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or self.usual_reason
        assert self.reason in REASONS, self.reason


class UnreadableScan(ScanError):
    """The file is damaged, is no scan, or says too little about where its voxels lie."""


class GeometryMismatch(ScanError):
    """Two volumes that must share a grid do not."""

    usual_reason = "grids_differ"


class MissingChannel(ScanError):
    """A scan has other channels than the package was trained on."""

    usual_reason = "channels"


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
                "Look at how the scan was exported.",
                "contradiction",
            )
        if not _places(affine):
            raise ScanError(
                f"The affine {affine[:3].round(4).tolist()} does not place voxels in space; an invertible one is "
                "needed. Export the scan again with its orientation.",
                "no_geometry",
            )
        if not np.allclose(affine[3], [0, 0, 0, 1]):
            raise ScanError(
                f"The last row of an affine is {affine[3].tolist()}; it must be [0, 0, 0, 1].", "no_geometry"
            )
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


def _places(affine: Float[np.ndarray, "4 4"]) -> bool:
    """Whether three axes of some length lead into three directions, whatever the size of a voxel."""
    if not np.isfinite(affine).all():
        return False
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(lengths.min() > 1e-9 and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-6)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where voxels came from, and what was done to them on the way in."""

    sources: tuple[str, ...] = ()
    """The files, or the folder of a series, as the user named them."""
    sha256: str = ""
    """One hash over the bytes of all sources, in the order of `sources` or of the slices."""
    reader: str = ""
    repairs: tuple[str, ...] = ()
    """Everything that was not as it should be and was mended, one sentence each: what was wrong, what was done."""
    notes: tuple[str, ...] = ()
    """What one should know and nothing was done about: compressed with loss, files left alone. One sentence each."""
    modality: str = ""
    """CT, MR, PT ..., where the file says it."""
    encoding: str = ""
    """How the voxels were packed, in words: 'JPEG 2000 Image Compression (Lossless Only)', 'NIfTI-1, int16, gzip'."""
    files: tuple[str, ...] = ()
    """Every file that was read, one by one."""
    slices: tuple[tuple[str, int], ...] = ()
    """Where slice k of the grid is exactly one frame of a DICOM file: that file, and the frame's number from 1."""

    frame_of_reference: str = ""
    """The UID of the patient's coordinates that positions are measured in; empty where no file says it."""

    @property
    def verdict(self) -> str:
        """'fine' or 'repaired'; the third word, 'refused', is a ScanError."""
        return "repaired" if self.repairs else "fine"


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
            count, names = len(self.channels), ", ".join(channels)
            needed = f"{len(channels)} are needed: {names}" if len(channels) > 1 else f"one is needed: {names}"
            raise MissingChannel(
                f"The scan has {count} channel{'' if count == 1 else 's'}; {needed}. Give each patient a folder with one "
                "file or series folder per channel, called as the channel; links will do."
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


def stack(volumes: Sequence[Volume], channels: Sequence[str], match: str = "") -> Volume:
    """Single-channel scans of one patient as one Volume.

    Refused unless they share a grid; or, with the name of a channel to match, the others are resampled onto its grid.
    """
    if len(volumes) != len(channels):
        raise MissingChannel(
            f"{len(volumes)} file(s) were met; {len(channels)} are needed, one for each of {', '.join(channels)}. "
            "Add what is missing, or take away what does not belong."
        )
    many = [name for name, volume in zip(channels, volumes, strict=True) if len(volume.channels) != 1]
    if many:
        raise MissingChannel(
            f"The file for {many[0]} holds several channels; one file per channel, with one channel each, is needed. "
            "Split it, or give one file that holds them all."
        )
    chosen = _chosen(channels, match)
    _refuse_other_patients(volumes, channels)
    if match:
        volumes = [
            _matched(one, volumes[chosen], name, channels[chosen]) for one, name in zip(volumes, channels, strict=True)
        ]
    _refuse_other_grids(volumes, channels)
    kind = np.result_type(*[volume.voxels for volume in volumes])
    voxels = np.concatenate(
        [volume.voxels for volume in volumes], dtype=np.float32 if kind == np.float64 else kind, casting="unsafe"
    )
    return Volume(
        voxels=voxels,
        geometry=volumes[chosen].geometry,
        channels=tuple(channels),
        provenance=_joined([volume.provenance for volume in volumes], channels, chosen),
    )


def _chosen(channels: Sequence[str], match: str) -> int:
    """The number of the channel whose grid is kept; the first without a word."""
    if not match:
        return 0
    found = [number for number, name in enumerate(channels) if name.casefold() == match.casefold()]
    if len(found) != 1:
        raise MissingChannel(
            f"The channel {match!r} was to be matched; there are {', '.join(channels)}. Name one of them."
        )
    return found[0]


def _matched(volume: Volume, wanted: Volume, name: str, wanted_name: str) -> Volume:
    """The volume on the grid of the one that is matched, and a word about what that cost."""
    if volume.geometry.matches(wanted.geometry):
        return volume
    from .resampling import onto  # not at the top: it stands on this module

    there, outside = onto(volume, wanted.geometry)
    if outside > 0.5:
        raise GeometryMismatch(
            f"{name} lies on {volume.geometry} and covers {1 - outside:.0%} of the grid of {wanted_name}, "
            f"{wanted.geometry}; at least half must be covered. Give scans of the same part of the same patient."
        )
    away = _offset(volume.geometry, wanted.geometry).replace(" apart", " away") or f", from {volume.geometry}"
    repair = f"{name} was resampled onto the grid of {wanted_name}{away}"
    if outside:
        repair += f"; {outside:.1%} of it lies outside and got the lowest value"
    return replace(there, provenance=replace(there.provenance, repairs=(*there.provenance.repairs, f"{repair}.")))


def _refuse_other_patients(volumes: Sequence[Volume], channels: Sequence[str]) -> None:
    """Two patients scanned by one protocol share a grid and nothing else."""
    known = [(name, v.provenance.frame_of_reference) for name, v in zip(channels, volumes, strict=True)]
    known = [(name, frame) for name, frame in known if frame]
    for name, frame in known[1:]:
        if frame != known[0][1]:
            raise GeometryMismatch(
                f"{known[0][0]} and {name} were measured in two frames of reference (two patients, or one who was moved "
                "in between); the channels of a case share one. Give the scans of one examination, or register them.",
                "mixed",
            )


def _refuse_other_grids(volumes: Sequence[Volume], channels: Sequence[str]) -> None:
    first = volumes[0].geometry
    for name, other in zip(channels[1:], volumes[1:], strict=True):
        if not first.matches(other.geometry):
            raise GeometryMismatch(
                f"{channels[0]} lies on {first}; {name} on {other.geometry}{_offset(first, other.geometry)}. "
                f"Channels must share a grid: resample one onto the other, or let it be done while reading: "
                f"`--match {channels[0]}`, or another channel whose grid is to be kept."
            )


def _joined(parts: Sequence[Provenance], channels: Sequence[str], chosen: int) -> Provenance:
    """Where all channels came from; the slices are those of the channel whose grid was kept."""
    return Provenance(
        sources=tuple(source for part in parts for source in part.sources),
        sha256=_combined([part.sha256 for part in parts]),
        reader=_each_once([part.reader for part in parts]),
        repairs=_told([part.repairs for part in parts], channels),
        notes=_told([part.notes for part in parts], channels),
        modality=_each_once([part.modality for part in parts]),
        encoding=_each_once([part.encoding for part in parts]),
        files=tuple(file for part in parts for file in part.files),
        slices=parts[chosen].slices,
        frame_of_reference=next((part.frame_of_reference for part in parts if part.frame_of_reference), ""),
    )


def _each_once(words: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(word for word in words if word))


def _told(sentences: Sequence[tuple[str, ...]], channels: Sequence[str]) -> tuple[str, ...]:
    """Each sentence with the channel it speaks of, unless it begins with that name."""
    named = zip(channels, sentences, strict=True)
    return tuple(one if one.startswith(f"{name} ") else f"{name}: {one}" for name, told in named for one in told)


def _combined(hashes: Sequence[str]) -> str:
    import hashlib

    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _offset(one: Geometry, other: Geometry) -> str:
    if one.shape != other.shape:
        return ""
    return f", up to {np.abs(one.corners_mm - other.corners_mm).max():.2f} mm apart"
