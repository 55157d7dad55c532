"""Uncertainty in the viewer: what is drawn of it, and what its colours mean."""

from typing import Any

import numpy as np
from jaxtyping import UInt8

from ...maps import KINDS, in_bytes
from ...report import Result
from .._html import text

NAMES = {"entropy": "unclear answer", "folds": "networks at odds", "flips": "mirrorings at odds"}
"""What a button is called."""

LEAST_FULL = 0.1
"""The strongest colour stands for no less than this: what is next to nothing shall not glow."""

MOST_LABELS = 6
"""Means that the legend tells; the table has all."""


def kinds(result: Result) -> tuple[str, ...]:
    """What can be shown; empty where nobody asked."""
    return result.maps.kinds if result.maps else ()


def codes(result: Result, kind: str) -> UInt8[np.ndarray, "i j k"]:
    """One map, 255 for 1."""
    assert result.maps is not None
    found: np.ndarray = in_bytes(result.maps.uncertainty(kind)).voxels[0]
    return found


def facts(result: Result, kind: str) -> dict[str, Any]:
    """What viewer.js needs to know; drawn over all labels alike, and never hidden as doubtful."""
    full = max(_highest(result, kind), LEAST_FULL)
    told = {
        "label": None,
        "word": NAMES[kind],
        "unit": "uncertainty, which goes from 0 to 1",
        "says": says(result, kind),
    }
    return told | {"doubtful": False, "full": full, "signed": False}


def says(result: Result, kind: str) -> list[str]:
    """What it means, and its mean where it matters most."""
    means = {name: found[kind] for name, found in result.uncertainty.items()}
    worst = sorted(means, key=lambda name: -means[name])[:MOST_LABELS]
    said = [f"{NAMES[kind]}: {KINDS[kind]}"]
    if worst:
        said.append(f"mean inside {', '.join(f'{name} {means[name]:.2g}' for name in worst)}")
    return said


def fieldset(result: Result, first: int) -> str:
    """A button for each kind; the number of the first among all maps of the viewer."""
    if not kinds(result):
        return ""
    buttons = "".join(_button(result, kind, number) for number, kind in enumerate(kinds(result), start=first))
    return f'<fieldset><legend>Where the model is unsure</legend><div class="layers">{buttons}</div></fieldset>'


def _button(result: Result, kind: str, number: int) -> str:
    how = f'<small class="quiet">{text(kind)}</small>'
    if _highest(result, kind) == 0:
        return f"<button disabled>{text(NAMES[kind])} <b>none</b>{how}<small>next to 0 in every voxel</small></button>"
    return f'<button data-map="{number}" aria-pressed="false">{text(NAMES[kind])}{how}</button>'


def _highest(result: Result, kind: str) -> float:
    """As the bytes have it that are drawn."""
    assert result.maps is not None
    return round(float(result.maps.uncertainty(kind).voxels.max()) * 255) / 255
