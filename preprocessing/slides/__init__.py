"""Whole slides: opened at a known resolution, their tissue found, tiles laid out on it. All places are in micrometres."""

from .finding import SlideFile, SlideFinds, find_slides
from .resolution import stated_resolutions
from .slide import Level, Slide, SlideError, open_slide
from .tiles import Tiles, TileShape, lay_tiles
from .tissue import Tissue, find_tissue

__all__ = [
    "Level",
    "Slide",
    "SlideError",
    "SlideFile",
    "SlideFinds",
    "TileShape",
    "Tiles",
    "Tissue",
    "find_slides",
    "find_tissue",
    "lay_tiles",
    "open_slide",
    "stated_resolutions",
]
