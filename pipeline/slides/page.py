"""page.html: one slide on one page that opens anywhere, offline: the slide to zoom into, the prediction, the tiles behind it."""

import logging
from base64 import b64encode
from collections.abc import Sequence

from ..outputs._html import document, listed, pairs, text
from ..report import hilum_version
from . import zoom
from .deletion import PASSED
from .picture import facts, sum_of
from .result import SlideResult, TopTile, probability

FILE_NAME = "page.html"

logger = logging.getLogger(__name__)


def page(result: SlideResult, picture: bytes) -> str:
    """The whole page, this PNG on it for where no script runs. The same result gives the same bytes."""
    sheet = b64encode(picture).decode()
    reason = zoom.missing()
    if reason:
        logger.warning(reason)
        return document(result.frame.slide_id, _body(result, sheet, listed((reason,), "alarm")), style=zoom.style())
    part = zoom.part(result, zoom.MOST_BYTES - len(sheet))
    return document(
        result.frame.slide_id,
        _body(result, sheet, part.html, zoom.licences()),
        style=part.style,
        script=part.script,
        data=part.data,
        trusted=part.trusted,
    )


def _body(result: SlideResult, sheet: str, viewer: str, licences: str = "") -> str:
    return "\n".join(
        [
            f"<h1>{text(result.frame.slide_id)}</h1>",
            f'<p class="prediction"><b>{text(result.name)}</b>, calibrated probability '
            f"{probability(result.probabilities[result.predicted])}</p>",
            f'<p class="quiet">by {text(result.origin.package_name)} · {text(facts(result))} · for research, not for diagnosis</p>',
            listed(result.warnings, "alarm"),
            viewer,
            '<details id="picture" open><summary>Picture</summary>'
            f'<img src="data:image/png;base64,{sheet}" alt="The slide, and beside it what each tile adds to the prediction">'
            "</details>",
            _tiles(result, result.top, "for", "The tiles that add most"),
            _tiles(result, result.against, "against", "The tiles that speak most against it"),
            "<h2>Prediction</h2>",
            _prediction(result),
            _tested(result),
            f'<div class="two"><section>{_slide(result)}</section><section>{_origin(result)}</section></div>',
            f"<footer>hilum {text(hilum_version())} · for research, not for diagnosis. A tile's share is what it adds to the "
            "logit of a class in the very forward pass that made the prediction. Logits are told less their mean over the "
            f"classes: what is the same for all changes no probability.{licences}</footer>",
        ]
    )


def _tiles(result: SlideResult, tiles: Sequence[TopTile], kind: str, heading: str) -> str:
    """Pictures that lead the viewer to their places."""
    if not tiles:
        return ""
    figures = "".join(
        f'<figure data-tile="{tile.index}" data-rank="{tile.rank}" data-kind="{kind}" tabindex="0">'
        f'<img src="data:image/jpeg;base64,{zoom.jpeg(tile.picture, quality=90)}" alt="tile {tile.rank} {kind} {text(result.name)}">'
        f"<figcaption><b>{tile.rank}</b>{result.values[tile.index]:+.3g} logits<br>"
        f'<span class="quiet">x {result.middle_um[tile.index, 0]:.0f}, y {result.middle_um[tile.index, 1]:.0f} µm</span>'
        "</figcaption></figure>"
        for tile in tiles
    )
    side = f"{result.tile_um:g} µm in {tiles[0].picture.shape[0]} pixels, as the model saw them"
    return f'<h2>{heading}</h2><p class="quiet">{side}; each leads to its place.</p><div class="tiles">{figures}</div>'


def _prediction(result: SlideResult) -> str:
    """Per class: how the tiles and the rest become its logit, and the logits the probabilities."""
    numbers = ("calibrated probability", "logit", "of it from tiles", "the rest")
    head = "<tr><th>class</th>" + "".join(f'<th class="number">{name}</th>' for name in numbers) + "</tr>"
    rows = "".join(
        f"<tr{' class=predicted' if c == result.predicted else ''}><td>{text(name)}</td>"
        f'<td class="number">{probability(result.probabilities[c])}{_meter(result.probabilities[c])}</td>'
        f'<td class="number">{result.logits[c]:.4g}</td><td class="number">{result.shares[:, c].sum():+.4g}</td>'
        f'<td class="number">{result.rest[c]:+.4g}</td></tr>'
        for c, name in enumerate(result.classes)
    )
    return f'<div class="wide"><table>{head}{rows}</table></div><p class="quiet">{text(sum_of(result))}.</p>'


def _meter(value: float) -> str:
    """A bar, as an SVG: the policy allows no inline style."""
    bar = (
        '<rect width="100" height="8" rx="3" fill="#9aa3ad" opacity=".3"/>'
        f'<rect width="{100 * value:.1f}" height="8" rx="3" fill="#0a5fa8"/>'
    )
    return f'<svg class="meter" viewBox="0 0 100 8" preserveAspectRatio="none">{bar}</svg>'


def _tested(result: SlideResult) -> str:
    tested = result.deletion
    words = (
        "Is the map to be believed? Its strongest tiles are taken out of the bag and the model answers again; a map that "
        "shows what the prediction rests on must change it more than any random removal of as many tiles. "
        "An answer that rests on something being absent rests on no few tiles, and its map often fails."
    )
    kind = "quiet" if tested.verdict == PASSED else "alarm"
    rows = ""
    if tested.draws:
        rows = pairs(
            [
                ("whole slide", f"probability {probability(tested.probability)}"),
                (f"without the top {tested.removed}", f"probability {probability(tested.probability_left)}"),
                (
                    f"without {tested.removed} at random",
                    f"probability {probability(tested.probability_random)}, mean of {tested.draws}",
                ),
            ]
        )
    return (
        f'<h2>Deletion test</h2><p>{words}</p><p class="{kind}" id="deletion">{text(_capital(tested.words))}.</p>{rows}'
    )


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _slide(result: SlideResult) -> str:
    frame = result.frame
    x, y = frame.microns_per_pixel
    given = "as its file says" if frame.resolution_from == "file" else "as was stated"
    quarantined = ", ".join(f"{number} {why}" for why, number in result.quarantined.items()) or "none"
    rows = [
        (
            "size",
            text(f"{frame.size_um[0]:.0f} × {frame.size_um[1]:.0f} µm, {frame.size_px[0]} × {frame.size_px[1]} pixels"),
        ),
        ("resolution", text(f"{x:.5g} × {y:.5g} µm per pixel, {given}")),
        ("tiles", text(f"{len(result.values):,} of {result.tile_um:g} µm, {result.step_um:g} µm apart")),
        ("tiles left out", text(quarantined)),
        (
            "attention",
            text(
                f"entropy {result.entropy:.2f} of the highest it can have; the top tenth has {_top(result):.0%} of it"
            ),
        ),
        ("input sha256", f'<span class="mono">{text(frame.sha256)}</span>'),
    ]
    return "<h2>Slide</h2>" + pairs(rows)


def _top(result: SlideResult) -> float:
    """Share of the attention that the tenth of the tiles with most of it has."""
    most = sorted(result.attention, reverse=True)
    return float(sum(most[: max(1, len(most) // 10)]))


def _origin(result: SlideResult) -> str:
    made = result.origin
    rows = [
        ("package", text(made.package_name)),
        ("package id", f'<span class="mono">{text(made.package_id)}</span>'),
        ("network", text(f"{made.network}, {made.members} member{'s' * (made.members != 1)}")),
        ("encoder", f'{text(made.encoder)}<br><span class="mono">{text(made.encoder_sha256)}</span>'),
        ("temperature", text(f"{made.temperature:.3g}")),
        ("cross-validated", "<br>".join(text(f"{name} {words}") for name, words in made.scores.items()) or "not said"),
        ("hilum", text(hilum_version())),
        *((hop, f"{seconds:.2f} s") for hop, seconds in result.seconds.items()),
    ]
    return "<h2>Made by</h2>" + pairs(rows)
