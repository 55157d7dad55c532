"""A scan the way a radiologist looks at it: turned to the patient's axes, its greys windowed, colour on labels and heat.

Patient right is on the left of a picture, anterior or superior on top, millimetres are true along both edges. The grey
values are those of the scan; colour lies on and inside contours, and where there is heat; contours lie inside their label.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int8, Integer, Num, Shaped, UInt8
from PIL import Image
from scipy import ndimage

from preprocessing.plan import Label
from preprocessing.regions import Place, parted, places
from preprocessing.volume import Geometry

from ..errors import UsageError
from ..report import SIDES, Result
from ._heat import Heat

CONTOUR = 2
"""Pixels. On 256-pixel thumbnails thinner ones vanish."""

FINE = 2
"""Overlays are drawn this many times larger, then averaged: smooth edges."""

MOST_SAMPLES = 4_000_000
"""Voxels that the grey window is taken from, at most; more do not move a percentile."""

SOFT_TISSUE = (40.0, 400.0)
"""Centre and width, in Hounsfield units, in which every reading room shows an abdomen."""


@dataclass(frozen=True, kw_only=True)
class Plane:
    """A plane of the patient. Axes are those of a scan turned to R, A, S."""

    name: str
    through: int
    across: int
    down: int


AXIAL = Plane(name="axial", through=2, across=0, down=1)
CORONAL = Plane(name="coronal", through=1, across=0, down=2)
SAGITTAL = Plane(name="sagittal", through=0, across=1, down=2)
PLANES = (AXIAL, CORONAL, SAGITTAL)

Extent = tuple[int, int]
"""First and last index along an axis."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """The grey values between black and white, and in words where they come from."""

    low: float
    high: float
    origin: str

    def __str__(self) -> str:
        level, width = (self.low + self.high) / 2, self.high - self.low
        return f"level {level:.4g}, width {width:.4g}{self.origin and ', ' + self.origin}"


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """A scan turned to R, A, S without touching a voxel's value: any of the 48 axis orders becomes the same View."""

    grey: Num[np.ndarray, "x y z"]
    labels: Integer[np.ndarray, "x y z"]
    geometry: Geometry
    channel: str
    window: Window
    colours: UInt8[np.ndarray, "value 3"]
    """By label value; row 0 is background and never drawn."""
    rank: Integer[np.ndarray, " value"]
    """By label value: 1 for the largest label, 2 for the next ...; 0 for background."""
    heat: Heat | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Where to look: a connected part of a label, or, where nothing was found, the middle of the scan."""

    label: Label | None
    number: int
    """As in the measurements: 1 is the largest part of its label."""
    of: int
    """How many parts the label has."""
    ml: float
    box: tuple[Extent, Extent, Extent]
    """Along x, y, z."""
    centre: tuple[int, int, int]
    """Along each axis, the slice that shows the most of it."""

    @property
    def name(self) -> str:
        """lesion 3; or the label alone where it is in one piece."""
        name = self.label.name if self.label else ""
        return name if self.of < 2 else f"{name} {self.number}"


def turn(result: Result, channel: str = "", window: tuple[float, float] | None = None) -> View:
    """The chosen channel and the labels along R, A, S, with the grey window of the whole volume."""
    scan = result.scan
    if channel and channel not in scan.channels:
        raise UsageError(
            f"The picture was asked to show channel {channel!r}; this scan has {', '.join(scan.channels)}. "
            "Choose one of them, or leave it empty for the first."
        )
    channel = channel or scan.channels[0]
    grey = along_patient(scan.voxels[scan.channels.index(channel)], scan.geometry)
    values = 1 + max([np.iinfo(result.labels.voxels.dtype).max, *(label.value for label in result.label_table)])
    colours, rank = np.full((values, 3), 255, dtype=np.uint8), np.zeros(values, dtype=np.uint16)
    for place, label in enumerate(sorted(result.label_table, key=lambda label: -result.volumes_ml[label.name])):
        colours[label.value], rank[label.value] = label.colour, place + 1
    return View(
        grey=grey,
        labels=along_patient(result.labels.voxels[0], scan.geometry),
        geometry=_patient_geometry(scan.geometry),
        channel=channel,
        window=grey_window(grey, is_ct=is_ct(scan.provenance.modality, channel), asked=window),
        colours=colours,
        rank=rank,
    )


def along_patient(voxels: Shaped[np.ndarray, "i j k"], geometry: Geometry) -> Shaped[np.ndarray, "x y z"]:
    """The same voxels, without a copy, with the axes in the patient's order and direction."""
    order = geometry.axis_order()
    return voxels.transpose([axis for _, axis, _ in order])[tuple(slice(None, None, sign) for _, _, sign in order)]


def _patient_geometry(geometry: Geometry) -> Geometry:
    order = geometry.axis_order()
    turned = np.eye(4)
    turned[:3, :3] = np.stack([sign * geometry.affine[:3, axis] for _, axis, sign in order], axis=1)
    first = np.zeros(3)
    for _, axis, sign in order:
        first[axis] = 0 if sign > 0 else geometry.shape[axis] - 1
    turned[:3, 3] = geometry.to_world(first)
    x, y, z = (geometry.shape[axis] for _, axis, _ in order)
    return Geometry(shape=(x, y, z), affine=turned)


# greys


def is_ct(modality: str, channel: str) -> bool:
    """By what the file says, or by the name of the channel in the dataset: nnU-Net's word for Hounsfield units, too."""
    return modality == "CT" or (not modality and channel.casefold() == "ct")


def grey_window(grey: Num[np.ndarray, "*grid"], *, is_ct: bool, asked: tuple[float, float] | None = None) -> Window:
    """Of the whole volume, never of one slice: what is bright in one picture is bright in the next."""
    if asked is not None:
        return _around(*asked, origin="as asked")
    low, high = _percentiles(grey, (1, 99))
    soft = _around(*SOFT_TISSUE, origin="soft tissue, as for every CT")
    if is_ct and low < soft.high and high > soft.low:  # else its numbers are no Hounsfield units
        return soft
    return Window(low=low, high=high, origin="1st to 99th percentile")


def _around(centre: float, width: float, origin: str) -> Window:
    return Window(low=centre - width / 2, high=centre + width / 2, origin=origin)


def _percentiles(grey: Num[np.ndarray, "*grid"], percents: tuple[float, float]) -> tuple[float, float]:
    step = max(1, int(np.ceil((grey.size / MOST_SAMPLES) ** (1 / 3))))
    sample = grey[(slice(None, None, step),) * grey.ndim].astype(np.float64)
    sample = sample[np.isfinite(sample)]
    if sample.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(sample, percents)
    if low == high:  # nearly all voxels are one value, as around a cut-out brain
        low, high = sample.min(), sample.max()
    return float(low), float(high)


def shades(grey: Num[np.ndarray, "*grid"], window: Window) -> UInt8[np.ndarray, "*grid"]:
    """0 for black to 255 for white."""
    share = (grey.astype(np.float64) - window.low) / ((window.high - window.low) or 1.0)
    return (np.clip(np.nan_to_num(share, nan=0.0, posinf=1.0, neginf=0.0), 0, 1) * 255).round().astype(np.uint8)


# where to look


def findings(result: Result, most: int = 1) -> list[list[Finding]]:
    """Of each label that was found its largest parts, no more than `most` of each, numbered as in the measurements."""
    labels, table = result.labels.voxels[0], result.label_table
    return [_parts(result, label, place, most) for label, place in places(labels, table) if place]


def find(result: Result, found: Sequence[Sequence[Finding]], centre_on: str = "") -> Finding:
    """The largest connected part, of the label asked for if it is there, or of any; else the middle of the scan."""
    names = [label.name for label in result.label_table]
    if centre_on and centre_on not in names:
        raise UsageError(
            f"The picture was asked to centre on {centre_on!r}; this package has the labels "
            f"{', '.join(names)}. Choose one of them, or leave it empty for the largest."
        )
    largest = [parts[0] for parts in found]
    asked = [each for each in largest if each.label and each.label.name == centre_on]
    # of equals the first: max keeps the order of the package
    return max(asked or largest, key=lambda each: each.ml, default=None) or _nothing(result.scan.geometry)


def _parts(result: Result, label: Label, place: Place, most: int) -> list[Finding]:
    numbers, sizes = parted(place.mask)  # on the scan's own grid: numbers depend on it where two parts are of one size
    return [
        Finding(
            label=label,
            number=number,
            of=len(sizes),
            ml=float(sizes[number - 1]) * result.scan.geometry.voxel_ml,
            box=box,
            centre=centre,
        )
        for number, box, centre in _extents(numbers, place, result.scan.geometry, min(most, len(sizes)))
    ]


def _extents(
    numbers: Integer[np.ndarray, "i j k"], place: Place, geometry: Geometry, most: int
) -> Iterator[tuple[int, tuple[Extent, Extent, Extent], tuple[int, int, int]]]:
    for number, sides in enumerate(ndimage.find_objects(numbers, max_label=most), start=1):
        part = along_patient(numbers[sides] == number, geometry)
        start = [side.start + first for side, first in zip(sides, place.start, strict=True)]
        box, centre = [], []
        for axis, (_, own, sign) in enumerate(geometry.axis_order()):
            first = start[own] if sign > 0 else geometry.shape[own] - start[own] - part.shape[axis]
            area = part.sum(axis=tuple(other for other in range(3) if other != axis))
            box.append((first, first + part.shape[axis] - 1))
            centre.append(first + int(area.argmax()))
        yield number, (box[0], box[1], box[2]), (centre[0], centre[1], centre[2])


def _nothing(geometry: Geometry) -> Finding:
    shape = _patient_geometry(geometry).shape
    x, y, z = ((0, n - 1) for n in shape)
    return Finding(
        label=None, number=0, of=0, ml=0.0, box=(x, y, z), centre=(shape[0] // 2, shape[1] // 2, shape[2] // 2)
    )


# one slice


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """A plane as it is seen: rows fall, and what is first is on the patient's left."""

    grey: Num[np.ndarray, "down across"]
    labels: Integer[np.ndarray, "down across"]
    heat: Int8[np.ndarray, "down across"] | None
    spacing: tuple[float, float]
    """Millimetres across and down."""


def panel(
    view: View,
    plane: Plane,
    index: int,
    *,
    box: tuple[int, int],
    fill: float,
    crop: tuple[Extent, Extent] | None = None,
    bare: bool = False,
) -> tuple[Image.Image, float]:
    """One slice with what is drawn on it, as large as the box allows, and its pixels per millimetre.

    `crop` is first and last index, across and down; None: the whole slice. A `bare` slice is the scan and nothing else.
    """
    grey, labels = (_cut(voxels, plane, index, crop) for voxels in (view.grey, view.labels))
    heat = None if view.heat is None else _cut(view.heat.codes, plane, index, crop)
    spacing = view.geometry.spacing[plane.across], view.geometry.spacing[plane.down]
    return drawn(
        Slice(grey=grey, labels=labels, heat=heat, spacing=spacing), view, view.window, box=box, fill=fill, bare=bare
    )


def drawn(
    flat: Slice, view: View, window: Window, *, box: tuple[int, int], fill: float, bare: bool = False
) -> tuple[Image.Image, float]:
    """Greys, over them heat, over it labels."""
    wide_mm, high_mm = flat.grey.shape[1] * flat.spacing[0], flat.grey.shape[0] * flat.spacing[1]
    scale = min(box[0] / wide_mm, box[1] / high_mm)
    size = max(1, round(wide_mm * scale)), max(1, round(high_mm * scale))
    plain = Image.fromarray(shades(flat.grey, window)).resize(size, Image.Resampling.BILINEAR)
    if bare:
        return plain.convert("RGB"), scale
    mixed = np.repeat(np.asarray(plain, dtype=np.float64)[..., None], 3, axis=2)
    if flat.heat is not None and view.heat is not None:
        colour, opacity = view.heat.drawn(flat.heat, size)
        mixed = mixed * (1 - opacity[..., None]) + colour * opacity[..., None]
    colour, opacity = _coloured(flat.labels, size, view, fill)
    mixed = mixed * (1 - opacity[..., None]) + colour
    return Image.fromarray(np.clip(np.rint(mixed), 0, 255).astype(np.uint8)), scale


def projected(view: View, plane: Plane) -> tuple[Slice, Window]:
    """The brightest voxel along every line of sight, the smallest label and the strongest heat on it.

    Bright things add up, so that its window reaches to the 99th percentile of the projection itself.
    """
    axis = plane.through
    grey = _seen(np.fmax.reduce(view.grey, axis=axis))
    _, high = _percentiles(grey, (1, 99))
    window = replace(view.window, high=max(high, view.window.high))
    heat = None if view.heat is None else _seen(_strongest(view.heat.codes, axis))
    spacing = view.geometry.spacing[plane.across], view.geometry.spacing[plane.down]
    return Slice(grey=grey, labels=_seen(_innermost(view, axis)), heat=heat, spacing=spacing), window


def _innermost(view: View, axis: int) -> Integer[np.ndarray, "across down"]:
    """Along every line of sight the smallest label: an organ does not hide its lesions."""
    values = np.zeros(int(view.rank.max()) + 1, dtype=view.labels.dtype)
    values[view.rank[view.rank > 0]] = np.flatnonzero(view.rank)
    highest = 0
    for index in range(view.labels.shape[axis]):  # plane by plane: ranks take twice the memory of labels
        highest = np.maximum(highest, view.rank[view.labels[(slice(None),) * axis + (index,)]])
    return values[highest]


def _strongest(codes: Int8[np.ndarray, "x y z"], axis: int) -> Int8[np.ndarray, "across down"]:
    highest, lowest = codes.max(axis=axis), codes.min(axis=axis)
    return np.where(highest.astype(np.int16) >= -lowest.astype(np.int16), highest, lowest)


def _cut(
    voxels: Shaped[np.ndarray, "x y z"], plane: Plane, index: int, crop: tuple[Extent, Extent] | None
) -> Shaped[np.ndarray, "down across"]:
    flat = np.moveaxis(voxels, plane.through, 0)[index]  # [across, down], both rising
    if crop is not None:
        (left, right), (top, bottom) = crop
        flat = flat[left : right + 1, top : bottom + 1]
    return _seen(flat)


def _seen(flat: Shaped[np.ndarray, "across down"]) -> Shaped[np.ndarray, "down across"]:
    return np.ascontiguousarray(flat.T[::-1, ::-1])


def _coloured(
    labels: Integer[np.ndarray, "down across"], size: tuple[int, int], view: View, fill: float
) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
    """Colour times opacity, and opacity: contours opaque, their inside faint.

    Where two labels touch, one line is drawn, inside the smaller: a lesion in an organ is not framed twice.
    """
    shrinks = size[0] < labels.shape[1] or size[1] < labels.shape[0]
    fine = 1 if shrinks else FINE
    field = _resized(labels, (size[0] * fine, size[1] * fine), least=0 if shrinks else 127)
    rank = view.rank[field]
    # mode nearest: no contour along the picture's edge, where a crop cuts a label
    edge = ndimage.minimum_filter(rank, size=2 * CONTOUR * fine + 1, mode="nearest") < rank
    opacity = np.where(field > 0, np.where(edge, 1.0, fill), 0.0)
    colour = view.colours[field] * opacity[..., None]
    blocks = (size[1], fine, size[0], fine)
    return colour.reshape(*blocks, 3).mean(axis=(1, 3)), opacity.reshape(blocks).mean(axis=(1, 3))


def _resized(
    labels: Integer[np.ndarray, "down across"], size: tuple[int, int], *, least: int
) -> Integer[np.ndarray, "h w"]:
    """Label by label, where it covers more than `least` / 255 of a pixel.

    That is half of it where pixels are finer than voxels, and any of it where they are coarser: a lesion smaller than a
    pixel of the picture still gets one.
    """
    covered = np.full((size[1], size[0]), least, dtype=np.uint8)
    field = np.zeros((size[1], size[0]), dtype=np.int32)
    for value in np.unique(labels[labels > 0]):
        mask = Image.fromarray((labels == value).astype(np.uint8) * 255)
        cover = np.asarray(mask.resize(size, Image.Resampling.BILINEAR))
        wins = cover > covered
        field[wins] = value
        covered = np.maximum(covered, cover)
    return field


def surroundings(box: Sequence[Extent], extent: Extent, view: View, axis: int, least_mm: float) -> Extent:
    """A finding and half of its size around it, the same millimetres along x and y, inside the scan."""
    spacing = view.geometry.spacing
    widest = max((box[each][1] - box[each][0] + 1) * spacing[each] for each in (0, 1))
    wanted = int(np.ceil(max(1.6 * widest, least_mm) / spacing[axis]))
    count = view.geometry.shape[axis]
    if wanted >= count:
        return 0, count - 1
    first = min(max(0, (extent[0] + extent[1] + 1 - wanted) // 2), count - wanted)
    return first, first + wanted - 1


def millimetres(position: float, axis: int) -> str:
    """As consoles write it: S 12.4 mm is 12.4 mm superior of the scanner's origin."""
    rounded = round(float(position), 1)
    return f"{SIDES[axis][0] if rounded >= 0 else SIDES[axis][1]} {abs(rounded):.1f} mm"
