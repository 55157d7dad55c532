"""overlay.png: the largest finding in three planes and along its length, the way a radiologist looks at a scan.

Patient right is on the left of the picture, anterior or superior on top, millimetres are true along both edges. The
grey values are those of the scan; colour lies on and inside contours only, and contours lie inside their label.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer, Num, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from preprocessing.plan import Label
from preprocessing.regions import places
from preprocessing.volume import Geometry

from ..errors import UsageError
from ..report import Result, millilitres, write_whole

FILE_NAME = "overlay.png"

WIDTH, MARGIN, GAP = 1440, 24, 16
GUTTER, LETTER = 26, 15
"""Pixels around each plane, and from its edge to the middle of a letter: nothing is written on the scan itself."""

STRIP_SLICES = 6
STRIP_SIDE_MM = 40.0
"""The strip shows at least so much of the patient, that a small lesion keeps its surroundings."""

CONTOUR = 2
"""Pixels. On 256-pixel thumbnails thinner ones vanish."""

FINE = 2
"""Overlays are drawn this many times larger, then averaged: smooth edges."""

MOST_SAMPLES = 4_000_000
"""Voxels that the grey window is taken from, at most; more do not move a percentile."""

PAGE, PANEL, LINE, INK, QUIET, ALARM = "#0c0e11", "#000000", "#2a2f36", "#f2f4f6", "#9aa3ad", "#f0b429"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the picture shows."""

    channel: str = ""
    """Name of the channel shown; empty: the first."""
    window: tuple[float, float] | None = None
    """Centre and width of the grey values shown, e.g. [40, 400]; null: the volume's 1st to 99th percentile."""
    centre_on: str = ""
    """Name of the label the planes pass through; empty: the one with the largest connected part."""
    fill: float = 0.18
    """Opacity of the colour inside a contour, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Plane:
    """A plane of the patient. Axes are those of a scan turned to R, A, S."""

    name: str
    through: int
    across: int
    down: int


AXIAL = Plane(name="axial", through=2, across=0, down=1)
PLANES = (
    AXIAL,
    Plane(name="coronal", through=1, across=0, down=2),
    Plane(name="sagittal", through=0, across=1, down=2),
)
SIDES = (("R", "L"), ("A", "P"), ("S", "I"))
"""Where each axis of the turned scan rises to, and where it falls to."""


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """A scan turned to R, A, S without touching a voxel's value: any of the 48 axis orders becomes the same View."""

    grey: Num[np.ndarray, "x y z"]
    labels: Integer[np.ndarray, "x y z"]
    geometry: Geometry
    low: float
    high: float
    automatic: bool
    colours: UInt8[np.ndarray, "value 3"]
    """By label value; row 0 is background and never drawn."""
    rank: Integer[np.ndarray, " value"]
    """By label value: 1 for the largest label, 2 for the next ...; 0 for background."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Where to look: a label's largest connected part, or nothing."""

    label: Label | None
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    """First and last index along x, y, z."""
    centre: tuple[int, int, int]
    """Along each axis, the slice that shows the most of it."""


def write(result: Result, folder: Path, config: Config) -> list[Path]:
    """The picture as a PNG; the same case gives the same bytes."""
    path = folder / FILE_NAME
    write_whole(path, png(picture(result, config)))
    return [path]


def png(image: Image.Image) -> bytes:
    """Bytes without a date in them."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=7)
    return buffer.getvalue()


def picture(result: Result, config: Config | None = None) -> Image.Image:
    """The whole sheet: words, three planes, a strip of axial slices, the legend."""
    config = config or Config()
    view = turn(result, config)
    finding = find(view, result.label_table, config.centre_on)
    return _stacked(
        [
            _header(result, view, config),
            _three_planes(view, finding, config.fill),
            _strip(view, finding),
            _legend(result),
            _footer(result),
        ]
    )


def turn(result: Result, config: Config) -> View:
    """The chosen channel and the labels along R, A, S, with the grey window of the whole volume."""
    scan = result.scan
    if config.channel and config.channel not in scan.channels:
        raise UsageError(
            f"The overlay was asked to show channel {config.channel!r}; this scan has {', '.join(scan.channels)}. "
            "Choose one of them, or leave it empty for the first."
        )
    grey = _along_patient(scan.voxels[scan.channels.index(config.channel) if config.channel else 0], scan.geometry)
    low, high = _window(grey, config.window)
    values = 1 + max([np.iinfo(result.labels.voxels.dtype).max, *(label.value for label in result.label_table)])
    colours, rank = np.full((values, 3), 255, dtype=np.uint8), np.zeros(values, dtype=np.int32)
    for place, label in enumerate(sorted(result.label_table, key=lambda label: -result.volumes_ml[label.name])):
        colours[label.value], rank[label.value] = label.colour, place + 1
    return View(
        grey=grey,
        labels=_along_patient(result.labels.voxels[0], scan.geometry),
        geometry=_patient_geometry(scan.geometry),
        low=low,
        high=high,
        automatic=config.window is None,
        colours=colours,
        rank=rank,
    )


def _along_patient(voxels: Shaped[np.ndarray, "i j k"], geometry: Geometry) -> Shaped[np.ndarray, "x y z"]:
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


def _window(grey: Num[np.ndarray, "x y z"], window: tuple[float, float] | None) -> tuple[float, float]:
    """Of the whole volume, never of one slice: what is bright in one picture is bright in the next."""
    if window is not None:
        centre, width = window
        return centre - width / 2, centre + width / 2
    step = max(1, int(np.ceil((grey.size / MOST_SAMPLES) ** (1 / 3))))
    sample = grey[::step, ::step, ::step].astype(np.float64)
    sample = sample[np.isfinite(sample)]
    if sample.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(sample, (1, 99))
    if low == high:  # nearly all voxels are one value, as around a cut-out brain
        low, high = sample.min(), sample.max()
    return float(low), float(high)


def find(view: View, label_table: Sequence[Label], centre_on: str = "") -> Finding:
    """The largest connected part, of the label asked for if it is there, or of any; else the middle of the scan."""
    asked = [label for label in label_table if label.name == centre_on]
    if centre_on and not asked:
        raise UsageError(
            f"The overlay was asked to centre on {centre_on!r}; this package has the labels "
            f"{', '.join(label.name for label in label_table)}. Choose one of them, or leave it empty for the largest."
        )
    largest = _largest(view.labels, label_table, asked) or _largest(view.labels, label_table, label_table)
    return largest or _nothing(view.labels.shape)


def _largest(
    labels: Integer[np.ndarray, "x y z"], label_table: Sequence[Label], among: Sequence[Label]
) -> Finding | None:
    best, best_size = None, 0
    for label, place in places(labels, label_table, among):
        if place is None:
            continue
        parts, _ = ndimage.label(place.mask, structure=np.ones((3, 3, 3)))
        sizes = np.bincount(parts.ravel())[1:]
        if sizes.max() > best_size:
            best_size = int(sizes.max())
            best = _finding(label, parts == 1 + int(sizes.argmax()), place.start)
    return best


def _finding(label: Label, part: Bool[np.ndarray, "x y z"], start: tuple[int, int, int]) -> Finding:
    box, centre = [], []
    for axis in range(3):
        area = part.sum(axis=tuple(other for other in range(3) if other != axis))
        inside = np.nonzero(area)[0] + start[axis]
        box.append((int(inside[0]), int(inside[-1])))
        centre.append(int(area.argmax()) + start[axis])
    return Finding(label=label, box=(box[0], box[1], box[2]), centre=(centre[0], centre[1], centre[2]))


def _nothing(shape: tuple[int, ...]) -> Finding:
    x, y, z = ((0, n - 1) for n in shape)
    return Finding(label=None, box=(x, y, z), centre=(shape[0] // 2, shape[1] // 2, shape[2] // 2))


def panel(
    view: View,
    plane: Plane,
    index: int,
    *,
    box: tuple[int, int],
    fill: float,
    crop: tuple[tuple[int, int], tuple[int, int]] | None = None,
) -> tuple[Image.Image, float]:
    """One slice with its overlay, as large as the box allows, and its pixels per millimetre.

    `crop` is first and last index, across and down; None: the whole slice.
    """
    grey, labels = (_cut(voxels, plane, index, crop) for voxels in (view.grey, view.labels))
    spacing = view.geometry.spacing
    wide_mm, high_mm = grey.shape[1] * spacing[plane.across], grey.shape[0] * spacing[plane.down]
    scale = min(box[0] / wide_mm, box[1] / high_mm)
    size = max(1, round(wide_mm * scale)), max(1, round(high_mm * scale))
    plain = np.asarray(Image.fromarray(_shades(grey, view.low, view.high)).resize(size, Image.Resampling.BILINEAR))
    colour, opacity = _coloured(labels, size, view, fill)
    mixed = plain[..., None] * (1 - opacity[..., None]) + colour
    return Image.fromarray(np.clip(np.rint(mixed), 0, 255).astype(np.uint8)), scale


def _cut(
    voxels: Shaped[np.ndarray, "x y z"], plane: Plane, index: int, crop: tuple[tuple[int, int], tuple[int, int]] | None
) -> Shaped[np.ndarray, "down across"]:
    flat = np.moveaxis(voxels, plane.through, 0)[index]  # [across, down], both rising
    if crop is not None:
        (left, right), (top, bottom) = crop
        flat = flat[left : right + 1, top : bottom + 1]
    return np.ascontiguousarray(flat.T[::-1, ::-1])


def _shades(grey: Num[np.ndarray, "down across"], low: float, high: float) -> UInt8[np.ndarray, "down across"]:
    share = (grey.astype(np.float64) - low) / ((high - low) or 1.0)
    return (np.clip(np.nan_to_num(share, nan=0.0, posinf=1.0, neginf=0.0), 0, 1) * 255).round().astype(np.uint8)


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


def _three_planes(view: View, finding: Finding, fill: float) -> Image.Image:
    width = (WIDTH - 2 * MARGIN - 2 * GAP) // 3
    box = width - 2 * GUTTER, width - 2 * GUTTER
    slices = [panel(view, plane, finding.centre[plane.through], box=box, fill=fill) for plane in PLANES]
    size = width, max(image.height for image, _ in slices) + 2 * GUTTER + 30
    frames = [
        _framed(view, plane, finding, size, image, scale) for plane, (image, scale) in zip(PLANES, slices, strict=True)
    ]
    return _side_by_side(frames, width)


def _framed(
    view: View, plane: Plane, finding: Finding, size: tuple[int, int], image: Image.Image, scale: float
) -> Image.Image:
    """A plane with its name, place, scale, letters, and marks where the other two planes cut it."""
    width, height = size
    frame = Image.new("RGB", size, PAGE)
    draw = ImageDraw.Draw(frame)
    _text(draw, (0, 13), plane.name, 18, INK, "lm")
    place = _place(view, plane, finding)
    _text(draw, (_width(plane.name, 18) + 12, 13), place, 16, QUIET, "lm")
    _scale_bar(draw, (width, 13), scale, width // 4)
    draw.rectangle((0, 30, width, height), fill=PANEL)
    left, top = (width - image.width) // 2, 30 + (height - 30 - image.height) // 2
    draw.rectangle((left - 1, top - 1, left + image.width, top + image.height), outline=LINE)  # where the scan ends
    frame.paste(image, (left, top))
    _letters(draw, plane, (left, top, left + image.width, top + image.height))
    _marks(draw, view, plane, finding, (left, top, left + image.width, top + image.height))
    return frame


def _place(view: View, plane: Plane, finding: Finding) -> str:
    x, y, z = finding.centre
    return _millimetres(view.geometry.to_world((x, y, z))[plane.through], plane.through)


def _millimetres(position: float, axis: int) -> str:
    """As consoles write it: S 12.4 mm is 12.4 mm superior of the scanner's origin."""
    rounded = round(float(position), 1)
    return f"{SIDES[axis][0] if rounded >= 0 else SIDES[axis][1]} {abs(rounded):.1f} mm"


def _letters(draw: ImageDraw.ImageDraw, plane: Plane, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    across, down = SIDES[plane.across], SIDES[plane.down]
    middle = (left + right) // 2, (top + bottom) // 2
    _text(draw, (left - LETTER, middle[1]), across[0], 16, INK, "mm")
    _text(draw, (right + LETTER, middle[1]), across[1], 16, INK, "mm")
    _text(draw, (middle[0], top - LETTER), down[0], 16, INK, "mm")
    _text(draw, (middle[0], bottom + LETTER), down[1], 16, INK, "mm")


def _marks(
    draw: ImageDraw.ImageDraw, view: View, plane: Plane, finding: Finding, box: tuple[int, int, int, int]
) -> None:
    left, top, right, bottom = box
    shape = view.geometry.shape
    column = left + round((1 - (finding.centre[plane.across] + 0.5) / shape[plane.across]) * (right - left))
    row = top + round((1 - (finding.centre[plane.down] + 0.5) / shape[plane.down]) * (bottom - top))
    for near, far in ((top - 5, top - 2), (bottom + 1, bottom + 4)):
        draw.line((column, near, column, far), fill=QUIET)
    for near, far in ((left - 5, left - 2), (right + 1, right + 4)):
        draw.line((near, row, far, row), fill=QUIET)


def _strip(view: View, finding: Finding) -> Image.Image:
    """Axial slices from the lowest to the highest of the finding, close up, contours only."""
    width = (WIDTH - 2 * MARGIN - (STRIP_SLICES - 1) * GAP) // STRIP_SLICES
    crop = tuple(_surroundings(finding.box[axis], view, axis, finding) for axis in (0, 1))
    slices = [
        (index, *panel(view, AXIAL, index, box=(width - 2, 260), fill=0.0, crop=(crop[0], crop[1])))
        for index in _along(finding.box[2], view.geometry.shape[2])
    ]
    row = _side_by_side([_small(view, finding, index, image, width) for index, image, _ in slices], width)
    whole = Image.new("RGB", (WIDTH - 2 * MARGIN, row.height + 34), PAGE)
    draw = ImageDraw.Draw(whole)
    words = "axial slices through the scan" if finding.label is None else f"{finding.label.name}: its largest part"
    _text(draw, (0, 14), words + ", inferior to superior", 18, INK, "lm")
    _scale_bar(draw, (whole.width, 14), slices[0][2], width)
    whole.paste(row, (0, 34))
    return whole


def _surroundings(extent: tuple[int, int], view: View, axis: int, finding: Finding) -> tuple[int, int]:
    """The finding and half of its size around it, the same millimetres along both axes, inside the scan."""
    spacing = view.geometry.spacing
    widest = max((finding.box[each][1] - finding.box[each][0] + 1) * spacing[each] for each in (0, 1))
    wanted = int(np.ceil(max(1.6 * widest, STRIP_SIDE_MM) / spacing[axis]))
    count = view.geometry.shape[axis]
    if wanted >= count:
        return 0, count - 1
    first = min(max(0, (extent[0] + extent[1] + 1 - wanted) // 2), count - wanted)
    return first, first + wanted - 1


def _along(extent: tuple[int, int], count: int) -> list[int]:
    """Evenly spaced slices; beyond a finding thinner than the strip, as far as the scan goes."""
    first, last = extent
    while last - first + 1 < min(STRIP_SLICES, count):
        first, last = max(0, first - 1), min(count - 1, last + 1)
    return sorted({int(each) for each in np.linspace(first, last, STRIP_SLICES).round()})


def _small(view: View, finding: Finding, index: int, image: Image.Image, width: int) -> Image.Image:
    frame = Image.new("RGB", (width, image.height + 26), PAGE)
    draw = ImageDraw.Draw(frame)
    draw.rectangle((0, 0, width, image.height), fill=PANEL)
    frame.paste(image, ((width - image.width) // 2, 0))
    position = view.geometry.to_world((finding.centre[0], finding.centre[1], index))[2]
    _text(draw, (width // 2, image.height + 15), _millimetres(position, 2), 16, QUIET, "mm")
    return frame


def _header(result: Result, view: View, config: Config) -> Image.Image:
    lines = [(_about(result, view, config), QUIET)] + [(line, QUIET) for line in _caveats(view.geometry)]
    if result.scan.provenance.repairs:
        lines.append(("the scan was repaired when it was read; the report says how", ALARM))
    lines += [(f"warning: {warning}", ALARM) for warning in result.warnings[:2]]
    if (more := len(result.warnings) - 2) > 0:
        lines.append((f"{more} more warning{'' if more == 1 else 's'} in the report", ALARM))
    header = Image.new("RGB", (WIDTH - 2 * MARGIN, 40 + 24 * len(lines)), PAGE)
    draw = ImageDraw.Draw(header)
    name = _fitting(result.case_id, 28, header.width - 660, bold=True)
    _text(draw, (0, 16), name, 28, INK, "lm", bold=True)
    if not any(result.volumes_ml.values()):
        _text(draw, (_width(name, 28, bold=True) + 24, 16), "nothing found", 28, ALARM, "lm")
    _text(draw, (header.width, 16), _fitting(result.package_name, 18, 400), 18, QUIET, "rm")
    for row, (line, colour) in enumerate(lines):
        _text(draw, (0, 52 + 24 * row), _fitting(line, 16, header.width), 16, colour, "lm")
    return header


def _about(result: Result, view: View, config: Config) -> str:
    channel = config.channel or result.scan.channels[0]
    origin = ", 1st to 99th percentile" if view.automatic else ""
    shape = "×".join(str(n) for n in view.geometry.shape)
    spacing = "×".join(f"{s:.3g}" for s in view.geometry.spacing)
    level, width = (view.low + view.high) / 2, view.high - view.low
    return f"channel {channel} · level {level:.4g}, width {width:.4g}{origin} · {shape} voxels of {spacing} mm (R×A×S)"


def _caveats(geometry: Geometry) -> list[str]:
    said = []
    if geometry.is_oblique:
        cosines = np.abs(np.diag(geometry.direction)).clip(max=1)
        tilt = np.degrees(np.arccos(cosines.min()))
        said.append(f"oblique scan: planes and letters follow its own axes, up to {tilt:.1f}° from the patient's")
    if geometry.is_sheared:
        said.append("sheared scan: drawn as if its axes met at right angles")
    return said


def _legend(result: Result) -> Image.Image:
    """Every label that was found, with its millilitres, in columns; then the names of those that were not."""
    volumes = result.volumes_ml
    found = [label for label in result.label_table if volumes[label.name] > 0]
    absent = [label.name for label in result.label_table if volumes[label.name] == 0]
    columns, height = 4, 28
    width = (WIDTH - 2 * MARGIN) // columns
    rows = -(-len(found) // columns)
    legend = Image.new("RGB", (WIDTH - 2 * MARGIN, max(1, rows * height + 26 * bool(absent))), PAGE)
    draw = ImageDraw.Draw(legend)
    for place, label in enumerate(found):
        left, middle = (place % columns) * width, (place // columns) * height + height // 2
        _entry(draw, label, volumes[label.name], left, middle, width - GAP)
    if absent:
        words = _fitting("not found: " + ", ".join(absent), 16, legend.width)
        _text(draw, (0, rows * height + 13), words, 16, QUIET, "lm")
    return legend


def _entry(draw: ImageDraw.ImageDraw, label: Label, ml: float, left: int, middle: int, width: int) -> None:
    draw.rounded_rectangle((left, middle - 8, left + 16, middle + 8), radius=4, fill=tuple(label.colour))
    amount = millilitres(ml)
    name = _fitting(label.name, 18, width - 42 - _width(amount, 18))
    _text(draw, (left + 26, middle), name, 18, INK, "lm")
    _text(draw, (left + 38 + _width(name, 18), middle), amount, 18, QUIET, "lm")


def _footer(result: Result) -> Image.Image:
    footer = Image.new("RGB", (WIDTH - 2 * MARGIN, 26), PAGE)
    draw = ImageDraw.Draw(footer)
    draw.line((0, 0, footer.width, 0), fill=LINE)
    words = f"hilum · {result.package_name} · {result.package_id[:12]}"
    _text(draw, (0, 15), _fitting(words, 15, footer.width - 300), 15, QUIET, "lm")
    _text(draw, (footer.width, 15), "for research, not for diagnosis", 15, QUIET, "rm")
    return footer


def _scale_bar(draw: ImageDraw.ImageDraw, end: tuple[int, int], scale: float, most: int) -> None:
    """A round number of millimetres, right-aligned."""
    length = next((mm for mm in (200, 100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if mm * scale <= most), 0.1)
    words = f"{length:g} mm"
    right, middle = end[0] - 1, end[1]
    _text(draw, (right, middle), words, 16, QUIET, "rm")
    right -= _width(words, 16) + 8
    left = right - round(length * scale)
    draw.line((left, middle, right, middle), fill=INK, width=2)
    for tip in (left, right):
        draw.line((tip, middle - 4, tip, middle + 4), fill=INK, width=2)


def _side_by_side(images: Sequence[Image.Image], width: int) -> Image.Image:
    row = Image.new("RGB", (WIDTH - 2 * MARGIN, max(image.height for image in images)), PAGE)
    for place, image in enumerate(images):
        row.paste(image, (place * (width + GAP), 0))
    return row


def _stacked(rows: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (WIDTH, sum(row.height for row in rows) + GAP * (len(rows) - 1) + 2 * MARGIN), PAGE)
    top = MARGIN
    for row in rows:
        sheet.paste(row, (MARGIN, top))
        top += row.height + GAP
    return sheet


def _text(draw: Any, at: tuple[int, int], words: str, size: int, fill: str, anchor: str, bold: bool = False) -> None:
    draw.text(at, _writable(words), fill=fill, font=_font(size, bold), anchor=anchor)


def _width(words: str, size: int, bold: bool = False) -> int:
    return int(np.ceil(_font(size, bold).getlength(_writable(words))))


def _fitting(words: str, size: int, width: int, bold: bool = False) -> str:
    """Cut at the end, with three dots, where it is too long."""
    if _width(words, size, bold) <= width:
        return words
    while words and _width(words + "...", size, bold) > width:
        words = words[:-1]
    return words + "..."


@cache
def _font(size: int, bold: bool = False) -> Any:
    """DejaVu, which knows accents, Greek and Cyrillic and comes with matplotlib (MLflow brings it); or Pillow's own."""
    path = _dejavu(bold)
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@cache
def _dejavu(bold: bool) -> str | None:
    home = find_spec("matplotlib")  # finds, does not import: matplotlib is heavy
    if home is None or home.origin is None:
        return None
    path = Path(home.origin).parent / "mpl-data" / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return str(path) if path.is_file() else None


def _writable(words: str) -> str:
    """On one line; in ASCII where Pillow's own font, which knows no more, has to do."""
    words = " ".join(words.split())
    if _dejavu(False):
        return words
    return words.replace("×", "x").replace("·", "|").replace("°", " deg").encode("ascii", "replace").decode()
