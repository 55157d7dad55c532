"""The viewer on a case page: NiiVue's script, the volumes it shows, the controls beside it, and our lines that tie them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...maps import CODES
from ...report import Explanation, Result
from .. import _heat
from .._html import as_data, slider, swatch, text
from .._planes import View, Window, find, findings, turn
from .._rows import subject
from . import copies, unsure
from .scripts import NIIVUE

HERE = Path(__file__).parent

MOST_BYTES = 20_000_000
"""Of a page. Browsers take more, but mail does not, and MLflow shows no page of more than 50 MB."""

VIEWS = (
    ("3 planes", 3, "1"),
    ("axial", 0, "2"),
    ("coronal", 1, "3"),
    ("sagittal", 2, "4"),
    ("3-D", 4, "5"),
)
"""What it is called, NiiVue's number of it, and its key."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What the viewer adds to a page."""

    html: str
    style: str
    script: str
    data: str
    trusted: tuple[str, ...]
    """Scripts that the page holds packed, and that may run nevertheless."""


def missing() -> str:
    """Why there is no viewer in this hilum; empty where there is."""
    return NIIVUE.missing()


def part(result: Result, channel: str, window: tuple[float, float] | None, room: int = MOST_BYTES) -> Part:
    """The viewer on this case, in no more than so many bytes if coarser copies can make it so."""
    view = turn(result, channel, window)
    channel, grey_window, start = view.channel, view.window, _start(result, view)
    maps = [each for each in result.explanations if not each.blank]
    most = copies.MOST_VOXELS
    while True:
        blocks, words = _blocks(result, channel, grey_window, maps, most)
        size = sum(map(len, blocks.values()))
        if size <= room or most < copies.MOST_VOXELS // 1000:
            break
        most = int(most * min(0.9, room / size))
    facts = _facts(result, channel, grey_window, start, maps)
    return Part(
        html=_html(result, facts, words),
        style=style(),
        script=(HERE / "viewer.js").read_text(encoding="utf-8"),
        data=as_data("viewer-facts", json.dumps(facts), kind="application/json")
        + "".join(as_data(name, block) for name, block in blocks.items()),
        trusted=(NIIVUE.source(),),
    )


def _start(result: Result, view: View) -> list[float]:
    """The largest finding's own middle, in millimetres."""
    finding = find(result, findings(result))
    return [round(float(mm), 3) for mm in view.geometry.to_world(finding.centre)]


def _blocks(
    result: Result, channel: str, window: Window, maps: Sequence[Explanation], most: int
) -> tuple[dict[str, str], str]:
    grey, found = result.scan.voxels[result.scan.channels.index(channel)], result.labels.voxels[0]
    copy = copies.copy_of(grey, found, result.scan.geometry, window.low, most)
    shown, scale = copies.scan(copy, grey)
    blocks = {
        "viewer-niivue": NIIVUE.packed(),
        "viewer-scan": copies.packed(shown, copy.geometry, scale=scale),
        "viewer-labels": copies.packed(copies.labels(copy, found, result.label_table), copy.geometry, is_labels=True),
    }
    for number, each in enumerate(maps):
        packed = copies.packed(copies.codes(copy, each.codes), copy.geometry, scale=each.scale)
        blocks[f"viewer-map-{number}"] = packed
    for number, kind in enumerate(unsure.kinds(result), start=len(maps)):
        packed = copies.packed(copies.codes(copy, unsure.codes(result, kind)), copy.geometry, scale=1 / CODES)
        blocks[f"viewer-map-{number}"] = packed
    return blocks, copy.words


def _facts(
    result: Result, channel: str, window: Window, start: list[float], maps: Sequence[Explanation]
) -> dict[str, Any]:
    """What viewer.js needs to know."""
    return {
        "channel": channel,
        "window": [window.low, window.high],
        "start": start,
        "labels": [
            {"value": label.value, "name": label.name, "colour": list(map(int, label.colour))}
            for label in result.label_table
        ],
        "maps": [
            *(_map(each, result.explanations) for each in maps),
            *(unsure.facts(result, kind) for kind in unsure.kinds(result)),
        ],
        "heat": {"positive": _heat.POSITIVE, "pro": _heat.FOR, "contra": _heat.AGAINST},
    }


def _map(each: Explanation, all_of_case: Sequence[Explanation]) -> dict[str, Any]:
    full, signed = _heat.heat_of(each, all_of_case)
    says = [f"{subject(each)}: {each.standing}", *each.warnings]
    says += each.faithfulness.noted if each.faithfulness else ()
    told = {"label": each.label, "word": "map", "unit": each.unit, "says": says, "doubtful": is_doubtful(each)}
    return told | {"full": full, "signed": signed}


def is_doubtful(each: Explanation) -> bool:
    """Whether a map should not be believed."""
    return bool(each.warnings) or bool(each.faithfulness and each.faithfulness.failed)


def style() -> str:
    """Of the viewer and the tables that go with it; the colours of the maps are those of the pictures."""

    def gradient(tones: Sequence[tuple[int, int, int]]) -> str:
        return f"linear-gradient(to right, {', '.join('#{:02x}{:02x}{:02x}'.format(*tone) for tone in tones)})"

    both = (*_heat.AGAINST[::-1], *_heat.FOR)
    bars = f".bar {{ background: {gradient(_heat.POSITIVE)}; }}\n.bar.signed {{ background: {gradient(both)}; }}\n"
    return (HERE / "viewer.css").read_text(encoding="utf-8") + bars


def _html(result: Result, facts: dict[str, Any], words: str) -> str:
    count = len(facts["maps"])
    explained = count - len(unsure.kinds(result))
    note = f'<p class="quiet">This display copy is {text(words)}.</p>' if words else ""
    return (
        '<section id="viewer" class="viewer" hidden><div class="stage">'
        '<div class="screen"><canvas id="viewer-canvas" tabindex="0" aria-label="The scan and its labels"></canvas></div>'
        f'<output id="viewer-place"></output>{note}</div><div class="controls">'
        f"{_views()}{_maps(result)}{unsure.fieldset(result, explained)}{_legend(count > 0)}{_labels(result)}"
        f"{_grey(result, facts)}{_keys()}</div></section>"
        '<p id="viewer-sorry" class="alarm" hidden>The viewer cannot run here: <span id="viewer-why"></span> '
        "The picture below shows the largest finding.</p>"
    )


def _views() -> str:
    buttons = "".join(
        f'<button data-view="{number}" data-key="{key}" aria-pressed="{str(key == "1").lower()}">{name}</button>'
        for name, number, key in VIEWS
    )
    crosshair = _tick("viewer-crosshair", "x", "crosshair")
    return f'<fieldset><legend>View</legend><div id="viewer-views" class="views">{buttons}</div>{crosshair}</fieldset>'


def _tick(name: str, key: str, words: str) -> str:
    box = f'<input type="checkbox" id="{name}" data-key="{key}" checked>'
    return f'<label class="tick plain">{box}{words}</label>'


def _labels(result: Result) -> str:
    """Outline and filling, and which of those found are drawn."""
    boxes = "".join(
        f'<label class="tick"><input type="checkbox" data-label="{label.value}" checked>{swatch(label.colour)}'
        f"<span>{text(label.name)}</span></label>"
        for label in result.label_table
        if result.volumes_ml[label.name] > 0
    )
    return (
        f"<fieldset><legend>Labels</legend>{_tick('viewer-outline', 'o', 'outline')}"
        f'{slider("viewer-fill", "filling", 0, 1, 0.05, 0)}<div class="many">{boxes}</div></fieldset>'
    )


def _grey(result: Result, facts: dict[str, Any]) -> str:
    voxels = result.scan.voxels[result.scan.channels.index(facts["channel"])]
    low, high = facts["window"]
    least, most = min(low, _finite(voxels.min(), low)), max(high, _finite(voxels.max(), high))
    step = (most - least) / 400 or 1.0
    return (
        f"<fieldset><legend>Grey values, {text(facts['channel'])}</legend>"
        f"{slider('viewer-level', 'level', least, most, step, (low + high) / 2)}"
        f"{slider('viewer-width', 'width', step, 2 * (most - least) or 1.0, step, high - low)}"
        '<div class="row"><span id="viewer-window" class="quiet"></span>'
        '<button id="viewer-reset">reset</button></div></fieldset>'
    )


def _finite(value: Any, otherwise: float) -> float:
    return float(value) if abs(float(value)) < float("inf") else otherwise


def _maps(result: Result) -> str:
    """Every explanation; the first that can be believed is shown at once."""
    if not result.explanations:
        return ""
    numbers = iter(range(len(result.explanations)))
    first = next((each for each in result.explanations if not each.blank and not is_doubtful(each)), None)
    buttons = "".join(
        _layer(each, None if each.blank else next(numbers), each is first) for each in result.explanations
    )
    return (
        f'<fieldset><legend>Where the model looked</legend><div class="layers">{buttons}</div>'
        '<p class="says quiet">Where the model looked, not where disease is.</p></fieldset>'
    )


def _legend(has_maps: bool) -> str:
    """What the colours of the map stand for that is shown; out of sight while none is."""
    if not has_maps:
        return ""
    return (
        '<fieldset id="viewer-legend" hidden><legend>What the colours mean</legend>'
        '<div id="viewer-bar" class="bar"></div><div id="viewer-ends" class="ends"></div>'
        '<span id="viewer-unit" class="quiet"></span>'
        f"{slider('viewer-strength', 'opacity', 0, 1, 0.05, _heat.MOST_OPACITY)}"
        f"{slider('viewer-least', 'clear below', 0.01, 0.9, 0.01, 0.25)}"
        '<p id="viewer-says" class="says"></p></fieldset>'
    )


def _layer(each: Explanation, number: int | None, is_first: bool) -> str:
    how = "" if each.method == "attention" else f'<small class="quiet">{text(each.method)}, {text(each.layer)}</small>'
    if number is None:
        return f"<button disabled>{text(subject(each))} <b>blank</b>{how}<small>{text(each.blank)}</small></button>"
    failed = bool(each.faithfulness and each.faithfulness.failed)
    mark = ' <span class="failed">failed</span>' if failed else ""
    first = " data-first" if is_first else ""
    return f'<button data-map="{number}"{first} aria-pressed="false">{text(subject(each))}{mark}{how}</button>'


def _keys() -> str:
    rows = (
        ("1 to 5", "views"),
        ("n p", "next and previous finding"),
        ("m", "next map"),
        ("o x", "outline, crosshair"),
        ("arrows, page up, page down", "one voxel further, once the picture was clicked"),
    )
    listed = "".join(f"<li><kbd>{keys}</kbd> {words}</li>" for keys, words in rows)
    return (
        f"<details><summary>Keys and mouse</summary><ul>{listed}<li>wheel: through the slices, once the picture was clicked"
        "</li><li>right button, dragged: level and width; double click: as they were</li></ul></details>"
    )


def map_numbers(result: Result) -> dict[tuple[str, int | None], int]:
    """Of which label, or part of it, which map of the viewer tells; the first, where there are several."""
    found: dict[tuple[str, int | None], int] = {}
    shown = [each for each in result.explanations if not each.blank]
    for number, each in enumerate(shown):
        if each.method != "attention":
            found.setdefault((each.label, each.part), number)
    return found


def licences() -> str:
    """Of NiiVue and what is in it, as their authors ask."""
    return NIIVUE.told()
