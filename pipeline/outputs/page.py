"""page.html: one case on one page that opens anywhere, offline: the picture, the millilitres, what made them."""

import base64
from dataclasses import dataclass, field
from pathlib import Path

from ..report import Result, hilum_version, millilitres, told, write_whole
from . import measurements, overlay
from ._html import document, listed, pairs, swatch, text

FILE_NAME = "page.html"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the page shows."""

    picture: overlay.Config = field(default_factory=overlay.Config)
    """The picture on it, as in the output `overlay`."""


def write(result: Result, folder: Path, config: Config) -> list[Path]:
    """One file that needs no other."""
    path = folder / FILE_NAME
    write_whole(path, document(result.case_id, _body(result, config)))
    return [path]


def _body(result: Result, config: Config) -> str:
    picture = base64.b64encode(overlay.png(overlay.picture(result, config.picture))).decode()
    return "\n".join(
        [
            f"<h1>{text(result.case_id)}</h1>",
            f'<p class="quiet">segmented by {text(result.package_name)} · for research, not for diagnosis</p>',
            listed(result.warnings, "alarm"),
            f'<img src="data:image/png;base64,{picture}" alt="The largest finding in three planes and axial slices">',
            "<h2>Measurements</h2>",
            _measurements(result),
            f'<div class="two"><section>{_scan(result)}</section><section>{_origin(result)}</section></div>',
            f"<footer>hilum {text(hilum_version())} · for research, not for diagnosis. Volumes are voxels counted; "
            f"confidence is the mean probability inside a label, {measurements.calibrated(result)}.</footer>",
        ]
    )


def _measurements(result: Result) -> str:
    head = (
        '<tr><th>label</th><th class="number">volume</th><th class="number">parts</th>'
        '<th class="number">largest part</th><th class="number">confidence</th><th>centre (x, y, z)</th></tr>'
    )
    rows = [
        _row(each, label.colour) for each, label in zip(measurements.measure(result), result.label_table, strict=True)
    ]
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _row(measured: measurements.Measurement, colour: tuple[int, int, int]) -> str:
    name = f"<td>{swatch(colour)}{text(measured.name)}</td>"
    if measured.centroid_mm is None:
        return f'<tr class="quiet">{name}<td class="number">not found</td>{"<td></td>" * 4}</tr>'
    confidence = "" if measured.mean_confidence is None else f"{measured.mean_confidence:.2f}"
    numbers = (
        millilitres(measured.volume_ml),
        measured.components,
        millilitres(measured.largest_component_ml),
        confidence,
    )
    cells = "".join(f'<td class="number">{text(each)}</td>' for each in numbers)
    return f"<tr>{name}{cells}<td>{_place(measured.centroid_mm)}</td></tr>"


def _place(centroid_mm: tuple[float, float, float]) -> str:
    """As consoles write it: R 12.0, P 3.5, S 20.1 mm."""
    sides = (rises if mm >= 0 else falls for mm, (rises, falls) in zip(centroid_mm, overlay.SIDES, strict=True))
    return ", ".join(f"{side} {abs(mm):.1f}" for side, mm in zip(sides, centroid_mm, strict=True)) + " mm"


def _scan(result: Result) -> str:
    geometry, provenance = result.scan.geometry, result.scan.provenance
    rows = [
        ("verdict", text(provenance.verdict)),
        ("modality", text(provenance.modality or "not said")),
        ("grid", text(geometry)),
        ("channels", text(", ".join(result.scan.channels))),
        ("read from", "<br>".join(text(source) for source in provenance.sources) or "not said"),
        ("read by", text(provenance.reader or "not said")),
        ("encoding", text(provenance.encoding or "not said")),
        ("repairs", _sentences(provenance.repairs) or "none were needed"),
        ("notes", _sentences(provenance.notes) or "none"),
        ("input sha256", f'<span class="mono">{text(provenance.sha256 or "not said")}</span>'),
    ]
    return "<h2>Scan</h2>" + pairs(rows)


def _sentences(said: tuple[str, ...]) -> str:
    return f"<ul>{''.join(f'<li>{text(sentence)}</li>' for sentence in said)}</ul>" if said else ""


def _origin(result: Result) -> str:
    rows = [
        ("package", text(result.package_name)),
        ("package id", f'<span class="mono">{text(result.package_id)}</span>'),
        ("hilum", text(hilum_version())),
    ]
    if result.precision != "float32":
        rows.append(("computed in", text(result.precision)))
    if result.temperatures:
        numbers = ", ".join(f"{temperature:.3g} (fold {fold})" for fold, temperature in result.temperatures.items())
        rows.append(("temperature", text(numbers)))
    if result.postprocessing:
        rows.append(("post-processing", _sentences(tuple(map(told, result.postprocessing)))))
    rows += [(hop, f"{seconds:.2f} s") for hop, seconds in result.seconds.items()]
    if result.seconds:
        rows.append(("in all", f"{sum(result.seconds.values()):.2f} s"))
    return "<h2>Made by</h2>" + pairs(rows)
