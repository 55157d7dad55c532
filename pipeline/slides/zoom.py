"""The deep-zoom viewer on a slide's page: OpenSeadragon's script, the slide in small pictures, what each tile adds, the controls."""

import io
import json
from base64 import b64encode
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from ..outputs import _heat
from ..outputs._html import as_data, slider, text
from ..outputs._viewer.scripts import HERE, OPENSEADRAGON
from .heatmap import AGAINST_COLOUR, FOR_COLOUR, colours
from .result import SlideResult

TILE = 512
"""Side of one picture of the pyramid: larger than elsewhere, for no network waits between them."""
QUALITY = 80
"""Of JPEG: stained tissue at 80 takes an eighth of a byte to a quarter per pixel and shows no blocks."""
MOST_PIXELS = 4096 * 4096
"""Of the whole slide: 8.6 um per pixel of one of 50 x 25 mm, 2 to 4 MB. The top tiles are there at full resolution."""
WHITE = 235
"""What is brighter everywhere in a picture of the pyramid is left out: glass."""
MOST_BYTES = 20_000_000
"""Of a page, as of a scan's."""


def missing() -> str:
    """Why there is no such viewer in this hilum; empty where there is."""
    return OPENSEADRAGON.missing()


def licences() -> str:
    return OPENSEADRAGON.told()


def overview_size(size_um: tuple[float, float], finest: float) -> tuple[int, int]:
    """Pixels across and down of the overview that a page can carry, no finer than that."""
    width, height = size_um
    um = max(finest, float(np.sqrt(width * height / MOST_PIXELS)))
    return max(1, round(width / um)), max(1, round(height / um))


@dataclass(frozen=True, kw_only=True)
class Part:
    """What the viewer adds to a page."""

    html: str
    style: str
    script: str
    data: str
    trusted: tuple[str, ...]
    """Scripts that the page holds packed, and that may run nevertheless."""


def part(result: SlideResult, room: int = MOST_BYTES) -> Part:
    """The viewer on this slide, in no more than so many bytes if a coarser copy can make it so."""
    picture, tiles = result.overview, _packed(result)
    room -= len(tiles) + len(OPENSEADRAGON.packed())
    while True:
        levels = pyramid(picture)
        size = sum(len(block) for level in levels for block in level["pictures"].values())
        if size <= room or max(picture.shape[:2]) <= TILE:
            break
        picture = _halved(picture)
    return Part(
        html=_html(result),
        style=style(),
        script=(HERE / "slide.js").read_text(encoding="utf-8"),
        data=as_data("viewer-facts", json.dumps(_facts(result)), kind="application/json")
        + as_data("viewer-levels", json.dumps(levels), kind="application/json")
        + as_data("viewer-tiles", tiles)
        + as_data("viewer-openseadragon", OPENSEADRAGON.packed()),
        trusted=(OPENSEADRAGON.source(),),
    )


def pyramid(picture: UInt8[np.ndarray, "h w 3"]) -> list[dict[str, Any]]:
    """From the coarsest level, which is one picture, to the finest: its size, and its pictures by column and row."""
    levels = [picture]
    while max(levels[-1].shape[:2]) > TILE:
        levels.append(_halved(levels[-1]))
    return [
        {"width": level.shape[1], "height": level.shape[0], "pictures": _pictures(level, skip=number > 0)}
        for number, level in enumerate(reversed(levels))
    ]


def _halved(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "down across 3"]:
    height, width = picture.shape[:2]
    size = (width + 1) // 2, (height + 1) // 2
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def _pictures(level: UInt8[np.ndarray, "h w 3"], skip: bool) -> dict[str, str]:
    height, width = level.shape[:2]
    found = {}
    for row in range(-(-height // TILE)):
        for column in range(-(-width // TILE)):
            cut = level[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
            if not (skip and cut.min() > WHITE):
                found[f"{column}_{row}"] = jpeg(cut)
    return found


def jpeg(picture: UInt8[np.ndarray, "h w 3"], quality: int = QUALITY) -> str:
    """As text that a data: address can hold."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=quality)
    return b64encode(buffer.getvalue()).decode("ascii")


def _packed(result: SlideResult) -> str:
    """x and y, column and row, attention, then the share of each class: a float32 array of each, one after the other."""
    columns: list[Float[np.ndarray, " tile"]] = [
        *result.positions_um.T,
        *result.grid.T.astype(np.float64),
        result.attention,
        *result.shares.T,
    ]
    return b64encode(np.concatenate(columns).astype("<f4").tobytes()).decode("ascii")


def _facts(result: SlideResult) -> dict[str, Any]:
    """What slide.js needs to know."""
    half = np.linspace(0, 1, 6)
    return {
        "width": result.frame.size_um[0],
        "height": result.frame.size_um[1],
        "tile": TILE,
        "side": result.tile_um,
        "step": result.step_um,
        "count": len(result.values),
        "classes": list(result.classes),
        "predicted": result.predicted,
        "tones": {
            "pro": np.rint(colours(half)).astype(int).tolist(),
            "contra": np.rint(colours(-half)).astype(int).tolist(),
        },
        "fullFrom": _heat.FULL_FROM,
        "marks": {"for": list(FOR_COLOUR), "against": list(AGAINST_COLOUR)},
    }


def style() -> str:
    """Of the page; the colours of the bar are those of the pictures."""
    tones = ["#{:02x}{:02x}{:02x}".format(*map(round, tone)) for tone in colours(np.linspace(-1, 1, 12))]
    half = len(tones) // 2
    bars = (
        f".bar {{ background: linear-gradient(to right, {', '.join(tones[half:])}); }}\n"
        f".bar.signed {{ background: linear-gradient(to right, {', '.join(tones)}); }}\n"
    )
    sheets = ((HERE / name).read_text(encoding="utf-8") for name in ("viewer.css", "slide.css"))
    return "".join(sheets) + bars


def _html(result: SlideResult) -> str:
    return (
        '<section id="viewer" class="viewer" hidden><div class="stage">'
        '<div id="viewer-screen" class="screen slide" aria-label="The slide and what each tile adds"></div>'
        f'<output id="viewer-place"></output></div><div class="controls">{_view()}{_layers(result)}{_keys()}</div></section>'
        '<p id="viewer-sorry" class="alarm" hidden>The viewer cannot run here: <span id="viewer-why"></span> '
        "The picture below shows the whole slide.</p>"
    )


def _view() -> str:
    return (
        '<fieldset><legend>View</legend><div class="views"><button id="viewer-whole" data-key="0">whole slide</button>'
        '<button id="viewer-closer" data-key="+" aria-label="closer">+</button>'
        '<button id="viewer-farther" data-key="-" aria-label="farther">−</button></div>'
        f"{_tick('viewer-grey', 'g', 'slide in grey', False)}{_tick('viewer-marks', 't', 'top tiles', True)}"
        f"{_tick('viewer-crosshair', 'x', 'crosshair', True)}</fieldset>"
    )


def _layers(result: SlideResult) -> str:
    """What each tile adds to every class, the predicted one first, and the attention."""
    order = [result.predicted, *(c for c in range(len(result.classes)) if c != result.predicted)]
    names = [(str(c), f"adds to {result.classes[c]}", "predicted" if c == result.predicted else "") for c in order]
    names.append(("attention", "attention", "how much each tile counts, for whatever class"))
    buttons = "".join(
        f'<button data-layer="{key}" aria-pressed="{str(not n).lower()}">{text(words)}'
        f"{f'<small class=quiet>{text(aside)}</small>' if aside else ''}</button>"
        for n, (key, words, aside) in enumerate(names)
    )
    return (
        f'<fieldset><legend>Where the model looked</legend><div class="layers">{buttons}</div><div id="viewer-legend">'
        '<div id="viewer-bar" class="bar"></div><div id="viewer-ends" class="ends"></div>'
        '<span id="viewer-unit" class="quiet"></span></div>'
        f"{_tick('viewer-heat', 'h', 'shown', True)}"
        f"{slider('viewer-strength', 'opacity', 0, 1, 0.05, _heat.MOST_OPACITY)}"
        f"{slider('viewer-least', 'clear below', 0, 0.9, 0.01, _heat.CLEAR_BELOW)}"
        '<p class="says quiet">Where the model looked, not where disease is.</p></fieldset>'
    )


def _tick(name: str, key: str, words: str, checked: bool) -> str:
    box = f'<input type="checkbox" id="{name}" data-key="{key}"{" checked" if checked else ""}>'
    return f'<label class="tick plain">{box}{words}</label>'


def _keys() -> str:
    rows = (
        ("0 + -", "whole slide, closer, farther"),
        ("n p", "next and previous top tile"),
        ("h t g x", "heat, top tiles, grey, crosshair"),
    )
    listed = "".join(f"<li><kbd>{keys}</kbd> {words}</li>" for keys, words in rows)
    return (
        f"<details><summary>Keys and mouse</summary><ul>{listed}<li>wheel or double click: closer; dragged: elsewhere</li>"
        "<li>click: the crosshair goes there</li></ul></details>"
    )
