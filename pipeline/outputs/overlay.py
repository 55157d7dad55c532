"""overlay.png: the largest finding in three planes, every part by itself, and the whole patient from the front."""

from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw

from preprocessing.plan import Label

from ..errors import UsageError
from ..report import Explanation, Result, millilitres, write_whole
from . import _rows
from ._drawing import ALARM, GAP, INK, INNER, QUIET, WIDTH, blank_row, fitting, folded, png, stacked, width_of
from ._drawing import write as put
from ._heat import Heat, heat_of
from ._planes import AXIAL, PLANES, SIDES, Finding, View, along_patient, find, findings, panel, turn

__all__ = ["ALARM", "AXIAL", "PLANES", "SIDES", "WIDTH", "Config", "panel", "picture", "png", "write"]

FILE_NAME = "overlay.png"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the picture shows."""

    channel: str = ""
    """Name of the channel shown; empty: the first."""
    window: tuple[float, float] | None = None
    """Centre and width of the grey values shown, e.g. [40, 400]; null: soft tissue for a CT, else the volume's 1st to
    99th percentile."""
    centre_on: str = ""
    """Name of the label the planes pass through; empty: the one with the largest connected part."""
    fill: float = 0.18
    """Opacity of the colour inside a contour, 0 to 1; none where there is heat."""
    parts: int = 16
    """Parts of labels that are shown one by one, at most; 0: none."""
    heat: str | None = ""
    """Name of the explanation drawn as heat, e.g. lesion-3; empty: that of the label the planes pass through; null: none."""
    full: float | None = None
    """The value drawn in the strongest colour, the same for several cases to compare them; null: the highest of the case."""


def write(result: Result, folder: Path, config: Config) -> list[Path]:
    """The picture as a PNG; the same case gives the same bytes."""
    path = folder / FILE_NAME
    write_whole(path, png(picture(result, config)))
    return [path]


def picture(result: Result, config: Config | None = None, *, anonymous: bool = False) -> Image.Image:
    """The whole sheet. An anonymous one says what was found, and not in whom."""
    config = config or Config()
    view = turn(result, config.channel, config.window)
    found = findings(result, max(1, config.parts))
    finding = find(result, found, config.centre_on)
    explanation = _chosen(result, finding, config)
    if explanation is not None:
        view = replace(view, heat=heat(result, explanation, config.full))
    name = result.package_name if anonymous else result.case_id
    rows = [
        _header(result, view, finding, name),
        _rows.planes(view, finding, config.fill if view.heat is None else 0.0, front=True),
        _rows.heat_bar(view, explanation) if explanation else None,
        *_untouched(result, view, finding),
        _rows.strip(view, finding),
        _rows.montage(_rows.without_heat(view), found, config.parts),
        _rows.footer(result),
    ]
    return stacked([row for row in rows if row is not None])


def planes(result: Result, config: Config | None = None) -> Image.Image:
    """The first row of the sheet by itself: the finding in three planes, and the patient from the front."""
    config = config or Config()
    view = turn(result, config.channel, config.window)
    finding = find(result, findings(result, 1), config.centre_on)
    return stacked([_rows.planes(view, finding, config.fill, front=True)])


def _untouched(result: Result, view: View, finding: Finding) -> list[Image.Image]:
    """The same three planes with nothing on them, the legend beside; or below, where it is long."""
    if finding.label is None and view.heat is None:
        return [_legend(result, INNER, columns=4)]
    row = _rows.planes(view, finding, 0.0, bare=True)
    beside = _legend(result, _rows.COLUMN, columns=1)
    fits = beside.height <= row.height - _rows.TITLE
    if fits:
        row.paste(beside, (3 * (_rows.COLUMN + GAP), _rows.TITLE))
    row = _rows.titled("the scan itself", "the same planes, nothing drawn on them", row)
    return [row] if fits else [row, _legend(result, INNER, columns=4)]


def heat(result: Result, explanation: Explanation, full: float | None = None) -> Heat | None:
    """The map, turned as the scan is; nothing of a blank one, of which nothing shall be seen."""
    if explanation.blank:
        return None
    highest, is_signed = heat_of(explanation, result.explanations, full)
    codes = along_patient(explanation.codes, result.scan.geometry)
    return Heat(codes=codes, scale=explanation.scale, full=highest, is_signed=is_signed)


def _chosen(result: Result, finding: Finding, config: Config) -> Explanation | None:
    if config.heat is None:
        return None
    names = [each.name for each in result.explanations]
    if config.heat and result.explanations and config.heat not in names:
        raise UsageError(
            f"The overlay was asked to draw {config.heat!r}; this case has the explanations {', '.join(names)}. "
            "Choose one of them, or leave it empty for that of the label shown."
        )
    label = finding.label.name if finding.label else ""
    of_label = [each for each in result.explanations if each.label == label and each.method != "attention"]
    asked = [each for each in result.explanations if each.name == config.heat]
    return next(iter(asked or sorted(of_label, key=lambda each: each.part is not None)), None)


def _header(result: Result, view: View, finding: Finding, name: str) -> Image.Image:
    lines = [(_about(view), QUIET)] + [(line, QUIET) for line in _rows.caveats(view.geometry)]
    if result.scan.provenance.repairs:
        lines.append(("the scan was repaired when it was read; the report says how", ALARM))
    lines += [(f"warning: {warning}", ALARM) for warning in result.warnings[:2]]
    if (more := len(result.warnings) - 2) > 0:
        lines.append((f"{more} more warning{'' if more == 1 else 's'} in the report", ALARM))
    if finding.label is None:
        return _rows.header(name, ("nothing found", "of what this package looks for", ALARM), lines)
    amount = millilitres(result.volumes_ml[finding.label.name])
    pieces = "" if finding.of < 2 else f", {finding.of} parts"
    return _rows.header(name, (amount, finding.label.name + pieces, INK), lines)


def _about(view: View) -> str:
    shape = "×".join(str(n) for n in view.geometry.shape)
    spacing = "×".join(f"{s:.3g}" for s in view.geometry.spacing)
    return f"channel {view.channel} · {view.window} · {shape} voxels of {spacing} mm (R×A×S)"


def _legend(result: Result, width: int, columns: int) -> Image.Image:
    """Every label that was found, with its millilitres, in columns; then the names of those that were not."""
    volumes = result.volumes_ml
    found = [label for label in result.label_table if volumes[label.name] > 0]
    absent = [label.name for label in result.label_table if volumes[label.name] == 0]
    missing = folded("not found: " + ", ".join(absent), 16, width, 3) if absent else []
    rows, height = -(-len(found) // columns), 28
    legend, draw = blank_row(rows * height + 24 * len(missing), width)
    for place, label in enumerate(found):  # downwards first: neighbours in the table stay neighbours
        left, middle = (place // rows) * (width // columns), (place % rows) * height + height // 2
        _entry(draw, label, volumes[label.name], left, middle, width // columns - GAP)
    for place, line in enumerate(missing):
        put(draw, (0, rows * height + 24 * place + 12), line, 16, QUIET, "lm")
    return legend


def _entry(draw: ImageDraw.ImageDraw, label: Label, ml: float, left: int, middle: int, width: int) -> None:
    draw.rounded_rectangle((left, middle - 8, left + 16, middle + 8), radius=4, fill=tuple(label.colour))
    amount = millilitres(ml)
    name = fitting(label.name, 18, width - 42 - width_of(amount, 18))
    put(draw, (left + 26, middle), name, 18, INK, "lm")
    put(draw, (left + 38 + width_of(name, 18), middle), amount, 18, QUIET, "lm")
