"""tiles.geojson: the tiles that decided, as QuPath draws them: squares in pixels of the slide's finest level, with their numbers.

RFC 7946 in structure. Its coordinates would be longitudes; QuPath's, and these, are pixels (x right, y down), counted from the
corner of what was scanned where a scanner's canvas is larger (MIRAX), as QuPath shows such slides.
"""

from collections.abc import Iterator
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from .heatmap import AGAINST_COLOUR, FOR_COLOUR
from .result import Seen, SlideResult, TopTile

FILE_NAME = "tiles.geojson"


def collection(result: SlideResult) -> dict[str, Any]:
    """The file's content: annotations, locked, so that no slip of the mouse moves one."""
    features = [
        *_features(result, result.top, f"for {result.name}", FOR_COLOUR),
        *_features(result, result.against, f"against {result.name}", AGAINST_COLOUR),
    ]
    return {"type": "FeatureCollection", "features": features}


def _features(
    result: SlideResult, tiles: tuple[TopTile, ...], kind: str, colour: tuple[int, int, int]
) -> Iterator[dict[str, Any]]:
    for tile in tiles:
        yield {
            "type": "Feature",
            # of the slide and the place: importing twice gives the same objects, not others
            "id": str(uuid5(NAMESPACE_URL, f"{result.frame.sha256} {result.origin.package_id} {kind} {tile.rank}")),
            "geometry": {"type": "Polygon", "coordinates": [square(result, tile.index)]},
            "properties": {
                "objectType": "annotation",
                "name": f"{tile.rank} {kind}",
                "classification": {"name": kind, "color": list(colour)},
                "isLocked": True,
                "measurements": _measurements(result, tile),
            },
        }


def square(result: Seen, index: int) -> list[list[float]]:
    """Five corners, the last the first; counter-clockwise where y goes up, as RFC 7946 has it."""
    fine_x, fine_y = result.frame.microns_per_pixel
    x, y = (float(each) for each in result.positions_um[index])
    width, height = result.frame.size_px  # the last tiles of a row may reach beyond the slide
    left, right = round(x / fine_x, 3), round(min((x + result.tile_um) / fine_x, width), 3)
    top, bottom = round(y / fine_y, 3), round(min((y + result.tile_um) / fine_y, height), 3)
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def _measurements(result: SlideResult, tile: TopTile) -> dict[str, float]:
    """By the names QuPath lists."""
    shares = {f"share of {name} (logits)": float(result.shares[tile.index, c]) for c, name in enumerate(result.classes)}
    x, y = (float(each) for each in result.middle_um[tile.index])
    attention = float(result.attention[tile.index])
    return {"rank": tile.rank, **shares, "attention": attention, "centre x (µm)": x, "centre y (µm)": y}
