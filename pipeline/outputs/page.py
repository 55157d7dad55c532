"""page.html: one case on one page that opens anywhere, offline: the scan to leaf through, the millilitres, what made them."""

import base64
import logging
from dataclasses import dataclass, field
from pathlib import Path

from ..faithfulness import Faithfulness
from ..maps import KINDS
from ..names import PAGE
from ..report import Explanation, Result, hilum_version, millilitres, place, run_words, told, write_whole
from . import _viewer, measurements, overlay
from ._drawing import png
from ._html import document, listed, pairs, swatch, text
from ._rows import subject
from ._viewer import unsure

FILE_NAME = PAGE

MOST_PARTS = 12
"""Rows of parts under a label; measurements.json has more."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the page shows."""

    picture: overlay.Config = field(default_factory=overlay.Config)
    """The picture on it, as in the output `overlay`; the viewer shows the same channel in the same window."""
    viewer: bool = True
    """Whether the scan itself is on it, to leaf through: 1 MB for the viewer and as much as the scan needs, up to 20."""


def write(result: Result, folder: Path, config: Config) -> list[Path]:
    """One file that needs no other."""
    path = folder / FILE_NAME
    write_whole(path, page(result, config))
    return [path]


def page(result: Result, config: Config) -> str:
    """The whole page. The same case gives the same bytes."""
    picture = base64.b64encode(png(overlay.picture(result, config.picture))).decode()
    reason = _viewer.missing() if config.viewer else ""
    if reason:
        logger.warning(reason)
    if reason or not config.viewer:
        said = listed((reason,), "alarm") if reason else ""
        return document(result.case_id, _body(result, picture, said), style=_viewer.style())
    room = _viewer.MOST_BYTES - len(picture)
    part = _viewer.part(result, config.picture.channel, config.picture.window, room)
    body = _body(result, picture, part.html, _viewer.licences(), can_jump=True)
    return document(
        result.case_id,
        body,
        style=part.style,
        script=part.script,
        data=part.data,
        trusted=part.trusted,
    )


def _body(result: Result, picture: str, viewer: str = "", licences: str = "", *, can_jump: bool = False) -> str:
    return "\n".join(
        [
            f"<h1>{text(result.case_id)}</h1>",
            f'<p class="quiet">segmented by {text(result.package_name)} · for research, not for diagnosis</p>',
            listed(result.warnings, "alarm"),
            viewer,
            '<details id="picture" open><summary>Picture</summary>'
            f'<img src="data:image/png;base64,{picture}" alt="The largest finding in three planes and axial slices">'
            "</details>",
            "<h2>Measurements</h2>",
            _measurements(result, can_jump),
            _unsure(result),
            _explained(result),
            f'<div class="two"><section>{_scan(result)}</section><section>{_origin(result)}</section></div>',
            f"<footer>hilum {text(hilum_version())} · for research, not for diagnosis. Volumes are voxels counted; "
            f"confidence is the mean probability inside a label, {measurements.calibrated(result)}.{licences}</footer>",
        ]
    )


def _measurements(result: Result, can_jump: bool) -> str:
    head = (
        '<tr><th>label</th><th class="number">volume</th><th class="number">parts</th>'
        '<th class="number">largest part</th><th class="number">confidence</th><th>centre (x, y, z)</th><th></th></tr>'
    )
    maps = _viewer.map_numbers(result) if can_jump else {}
    rows = [
        _row(each, label.colour, maps)
        for each, label in zip(measurements.measure(result), result.label_table, strict=True)
    ]
    table = f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'
    return table + ('<p class="quiet">A row leads the viewer to its place.</p>' if can_jump else "")


Maps = dict[tuple[str, int | None], int]


def _row(measured: measurements.Measurement, colour: tuple[int, int, int], maps: Maps) -> str:
    name = f'<td class="label">{swatch(colour)}{text(measured.name)}</td>'
    if measured.centroid_mm is None:
        return f'<tr class="quiet">{name}<td class="number">not found</td>{"<td></td>" * 5}</tr>'
    confidence = "" if measured.mean_confidence is None else f"{measured.mean_confidence:.2f}"
    numbers = (
        millilitres(measured.volume_ml),
        measured.components,
        millilitres(measured.largest_component_ml),
        confidence,
    )
    cells = "".join(f'<td class="number">{text(each)}</td>' for each in numbers)
    whole = _leading(measured.centroid_mm, name + cells, maps.get((measured.name, None)))
    return whole + (_parts(measured, maps) if measured.components > 1 else "")


def _parts(measured: measurements.Measurement, maps: Maps) -> str:
    rows = [
        _leading(
            part.centroid_mm,
            f'<td class="part">{text(measured.name)} {part.number}</td>'
            f'<td class="number">{text(millilitres(part.volume_ml))}</td><td></td><td></td><td></td>',
            maps.get((measured.name, part.number)),
        )
        for part in measured.parts[:MOST_PARTS]
    ]
    if (more := measured.components - len(rows)) > 0:
        rows.append(f'<tr class="quiet"><td class="part">{more} smaller</td>{"<td></td>" * 6}</tr>')
    return "".join(rows)


def _leading(centre: measurements.Millimetres, cells: str, map_number: int | None) -> str:
    """A row that leads to a place, and to its map where there is one."""
    at = " ".join(f"{mm:.3f}" for mm in centre)
    shown = "" if map_number is None else f'<button data-map="{map_number}" aria-pressed="false">map</button>'
    return f'<tr data-mm="{at}">{cells}<td>{place(centre)}</td><td>{shown}</td></tr>'


def _unsure(result: Result) -> str:
    """How unsure the networks are inside every label that was found, and what each number says."""
    if not result.uncertainty or result.maps is None:
        return ""
    kinds = result.maps.kinds
    head = "".join(f'<th class="number">{text(unsure.NAMES[kind])}</th>' for kind in kinds)
    colours = {label.name: label.colour for label in result.label_table}
    rows = "".join(
        f'<tr><td class="label">{swatch(colours[name])}{text(name)}</td>'
        + "".join(f'<td class="number">{found[kind]:.3f}</td>' for kind in kinds)
        + "</tr>"
        for name, found in result.uncertainty.items()
    )
    meaning = "".join(f"<li>{text(unsure.NAMES[kind])}: {text(KINDS[kind])}</li>" for kind in kinds)
    return (
        "<h2>Where the model is unsure</h2>"
        f'<p class="quiet">Mean inside each label. A model can be sure and wrong, most of all on scans unlike those it '
        f'learnt from.</p><div class="wide"><table><tr><th>label</th>{head}</tr>{rows}</table></div>'
        f'<ul class="meaning quiet">{meaning}</ul>'
    )


TESTS = (
    ("taken away", "deletion", "deletion_random", "deletion_mask"),
    ("put in", "insertion", "insertion_random", "insertion_mask"),
    ("in the label", "energy", "energy_chance", None),
    ("outside", "context", None, None),
    ("random weights", "randomisation", None, None),
    ("noise", "stability", None, None),
)
"""What a column is called, its number, and what that is held against: chance, and the mask itself."""

TESTS_MEAN = """taken away: share of the score left, on average, while the map's strongest voxels are taken away; lower is better.
put in: share that comes back while they are put in; higher is better.
in the label: share of the map's positive importance in and close around the label; chance is the share of voxels there.
outside: share of its importance elsewhere. Not wrong as such: it says on what surroundings the model leans.
random weights: likeness to the map of the same network with random weights; near 0 where the map shows what was learnt.
noise: least likeness to maps of the same scan with a little noise; near 1 is steady."""


def _explained(result: Result) -> str:
    """What the tests say of every map."""
    if not result.explanations:
        return ""
    head = "".join(f'<th class="number">{name}</th>' for name, *_ in TESTS)
    rows = "".join(map(_tested, result.explanations))
    meaning = "".join(f"<li>{text(line)}</li>" for line in TESTS_MEAN.splitlines())
    return (
        "<h2>Where the model looked</h2>"
        '<p class="quiet">Not where disease is. A map is to be believed no further than its tests go.</p>'
        f'<div class="wide"><table><tr><th>map</th><th>tests</th>{head}</tr>{rows}</table></div>'
        f"<details><summary>What the tests mean</summary><ul>{meaning}</ul></details>"
    )


def _tested(each: Explanation) -> str:
    doubtful = bool(each.faithfulness and each.faithfulness.failed)
    noted = each.faithfulness.noted if each.faithfulness else ()
    said = "<br>".join([f"<b>{text(each.standing)}</b>" if doubtful else text(each.standing), *map(text, noted)])
    warned = "".join(f"<br>{text(warning)}" for warning in each.warnings)
    numbers = _numbers(each.faithfulness) if each.faithfulness else "<td></td>" * len(TESTS)
    health = "" if each.health is None else f", health {each.health:.2g}"
    if each.agreement is not None:
        health += f", agrees with integrated gradients by {each.agreement:.2f}"
    how = f'<br><small class="quiet">{text(each.method)}, {text(each.layer)}{health}</small>'
    return (
        f'<tr><td>{text(subject(each))}{how}</td><td class="{"standing failed" if doubtful else "standing"}">{said}{warned}</td>'
        f"{numbers}</tr>"
    )


def _numbers(tests: Faithfulness) -> str:
    cells = []
    for _, name, chance, mask in TESTS:
        against = [f"chance {getattr(tests, chance):.2f}"] if chance else []
        against += [f"mask {getattr(tests, mask):.2f}"] if mask else []
        beside = "".join(f'<br><small class="quiet">{words}</small>' for words in against)
        cells.append(f'<td class="number">{getattr(tests, name):.2f}{beside}</td>')
    return "".join(cells)


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
    rows += [(name, text(words)) for name, words in run_words(result)]
    if result.temperatures:
        numbers = ", ".join(f"{temperature:.3g} (fold {fold})" for fold, temperature in result.temperatures.items())
        rows.append(("temperature", text(numbers)))
    if result.postprocessing:
        rows.append(("post-processing", _sentences(tuple(map(told, result.postprocessing)))))
    rows += [(hop, f"{seconds:.2f} s") for hop, seconds in result.seconds.items()]
    if result.seconds:
        rows.append(("in all", f"{sum(result.seconds.values()):.2f} s"))
    return "<h2>Made by</h2>" + pairs(rows)
