"""saliency-*.nii.gz: where the network looked when it found a label, or one part of it; a picture of each, and its scores."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from preprocessing import files
from preprocessing.regions import values_of

from ..report import Explanation, Result, as_json, grid, named, write_whole
from . import _rows
from ._drawing import ALARM, GAP, INK, QUIET, blank_row, fitting, png, stacked
from ._drawing import write as put
from ._planes import Finding, View, find, findings, turn
from .overlay import heat

FILE_NAME = "saliency.json"


Method = Literal[
    "hirescam", "gradcam", "gradcam++", "layercam", "xgradcam", "gradcam_elementwise", "gradient_x_input",
    "integrated_gradients", "occlusion",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is explained, and how."""

    method: Method = "hirescam"
    """hirescam, for it does not average gradients over the scan: before a normalisation of each image such means are nearly
    zero, whatever the network saw."""
    layer: str = ""
    """A name among those the network offers; empty: the one nearest to half of the scan's resolution, never the last,
    which repeats the mask."""
    labels: tuple[str, ...] = ()
    """Names of the labels explained; empty: each that was found."""
    parts: int = 3
    """The largest so many parts of a label in several, besides the whole label."""
    attention: bool = True
    """Whether the network's own attention is shown beside, where it has any."""
    tests: bool = True
    """Whether each map is tested: against chance, and against the mask itself. Takes longer than the maps."""
    cross_check: bool = False
    """Whether integrated gradients, of other hands, are computed beside, and how far both agree."""


def write(result: Result, folder: Path, config: Config) -> list[Path]:
    """Per map its voxels and its picture; one table for all."""
    view = turn(result)
    found = findings(result, max((each.part or 1 for each in result.explanations), default=1))
    written, rows = [], []
    for name, each in named(result.explanations):
        voxels, image = folder / f"saliency-{name}.nii.gz", folder / f"saliency-{name}.png"
        codes = result.labels.with_voxels(each.codes[None], result.scan.geometry)
        # a slope of 0 is no slope (nifti1.h), and of a blank map nothing can be scaled
        files.write(codes, voxels, scale=each.scale or 1.0)
        write_whole(image, png(picture(result, each, view, found)))
        written += [voxels, image]
        rows.append({"name": name, "file": voxels.name, "picture": image.name, **_told(each)})
    path = folder / FILE_NAME
    write_whole(path, as_json(_document(result, rows)))
    return [*written, path]


WORDS = {
    "scale": "a voxel's value is its code times this; nibabel does so by itself",
    "unit": "of a voxel's value",
    "part": "the part's number in measurements.json; null: the whole label",
    "score": "what the map explains: the stitched model's own score of this label; null of attention",
    "health": "|mean gradient| / mean |gradient|: near 0, a method that averages gradients sees nothing",
    "agreement": "rank correlation with captum's integrated gradients; null where they were not asked for",
    "faithfulness": "what tests say, in the window that holds most of what is explained; null: not tested",
    "deletion": "mean share of the score left while the map's highest voxels are taken away; lower is better",
    "deletion_random": "the same of a random map as smooth as this one",
    "deletion_mask": "the same of the predicted mask itself: circular, and so the bar",
    "insertion": "mean share of the score that comes back while they are put in; higher is better",
    "insertion_random": "the same of a random map as smooth as this one",
    "insertion_mask": "the same of the predicted mask itself",
    "energy": "share of the map's positive importance inside the mask, a few voxels around it included",
    "energy_chance": "what a map without any idea would have: the share of voxels there",
    "context": "share of the map's importance outside of that",
    "randomisation": "rank correlation with the map of the same network with random weights; near 0 is right",
    "randomisation_overlap": "share that the strongest hundredths of both maps have in common; chance is 0.005",
    "randomisation_scale": "peak of that map against this one's",
    "stability": "least rank correlation with maps of the scan with a little noise",
    "standing": "passed, failed, blank or not tested, and why; a map that failed is not to be believed",
    "failed": "which tests the map did not pass, or could not take",
    "noted": "what a map that passed says of the network",
    "blank": "why there is nothing to be seen; empty where there is",
    "warnings": "why the map should not be believed",
    "caution": "where the network looked, not where disease is; for research, not for diagnosis",
}


def _document(result: Result, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "case": result.case_id,
        "package": {"id": result.package_id, "name": result.package_name},
        "words": WORDS,
        "grid": grid(result.scan.geometry),
        "explanations": list(rows),
    }


def _told(each: Explanation) -> dict[str, Any]:
    tests = {} if each.faithfulness is None else asdict(each.faithfulness)
    return {
        "label": each.label,
        "part": each.part,
        "method": each.method,
        "layer": each.layer,
        "unit": each.unit,
        "score": _number(each.score),
        "scale": float(each.scale),
        "health": _number(each.health),
        "agreement": _number(each.agreement),
        "standing": each.standing,
        "failed": tests.pop("failed", ()),
        "noted": tests.pop("noted", ()),
        "faithfulness": {test: _number(value) for test, value in tests.items()} or None,
        "blank": each.blank,
        "warnings": list(each.warnings),
    }


def _number(value: float | None) -> float | None:
    """As JSON knows it: what a test could not tell is null."""
    return None if value is None or not isfinite(value) else float(value)


# the picture


def picture(result: Result, explanation: Explanation, view: View, found: Sequence[Sequence[Finding]]) -> Image.Image:
    """The map over the scan in three planes through what it explains, the scan itself below, and what tests say."""
    finding = _explained(explanation, found) or find(result, found)
    view = _outlined(replace(view, heat=heat(result, explanation)), explanation, result)
    strongest = _through_strongest(finding, view)
    untouched = _rows.planes(view, strongest, 0.0, bare=True)
    untouched.paste(_scores(explanation), (3 * (_rows.COLUMN + GAP), _rows.TITLE))
    return stacked(
        [
            _header(result, explanation, view),
            _rows.planes(view, strongest, 0.0, front=True),
            _rows.heat_bar(view, explanation, "outlined white: what is explained; grey: what else was found"),
            _rows.titled("the scan itself", "the same planes, nothing drawn on them", untouched),
            _rows.strip(view, finding),
            _rows.footer(result, "where the network looked, not where disease is"),
        ]
    )


def _explained(explanation: Explanation, found: Sequence[Sequence[Finding]]) -> Finding | None:
    """The part that is explained; of a whole label its largest."""
    number = explanation.part or 1
    parts = [part for parts in found for part in parts if part.label and part.label.name == explanation.label]
    return next((part for part in parts if part.number == number), None)


def _through_strongest(finding: Finding, view: View) -> Finding:
    """The planes that show the most: a network may have looked beside what it found."""
    if view.heat is None:
        return finding
    codes = view.heat.codes
    highest, lowest = int(codes.argmax()), int(codes.argmin())  # int8 has no room for its own magnitude
    strongest = highest if codes.flat[highest] >= -int(codes.flat[lowest]) else lowest
    x, y, z = (int(at) for at in np.unravel_index(strongest, codes.shape))
    return replace(finding, centre=(x, y, z))


def _outlined(view: View, explanation: Explanation, result: Result) -> View:
    """Colours are left to the heat: outlines are white around what is explained, and grey around the rest."""
    own = values_of(result.label_table).get(explanation.label, ())
    colours = np.full_like(view.colours, 150)
    colours[list(own)] = 255
    return replace(view, colours=colours)


def _header(result: Result, explanation: Explanation, view: View) -> Image.Image:
    lines = [(f"where {result.package_name} looked · {view.channel} · {view.window}", QUIET)]
    lines += [(line, QUIET) for line in _rows.caveats(view.geometry)]
    verdict = explanation.standing.partition(":")[0]
    word, colour = VERDICTS.get(verdict, (verdict, QUIET))
    return _rows.header(result.case_id, (word, _rows.subject(explanation), colour), lines)


VERDICTS = {"failed": ("FAILED", ALARM), "blank": ("BLANK", ALARM), "passed": ("passed", INK)}


def _scores(explanation: Explanation) -> Image.Image:
    """What was measured, beside what chance and the mask itself would reach."""
    lines = _lines(explanation)
    column, draw = blank_row(26 * len(lines), _rows.COLUMN)
    for place, (words, colour) in enumerate(lines):
        put(draw, (0, 13 + 26 * place), fitting(words, 16, _rows.COLUMN), 16, colour, "lm")
    return column


def _lines(explanation: Explanation) -> list[tuple[str, str]]:
    lines = []
    if explanation.score is not None:
        lines.append((f"score explained: {explanation.score:.4g}", INK))
    if explanation.health is not None:
        lines.append((f"health of its gradients: {explanation.health:.2g}", INK))
    if explanation.agreement is not None:
        lines.append((f"agrees with integrated gradients: {explanation.agreement:.2f}", INK))
    tests = explanation.faithfulness
    if tests is None:
        return [*lines, ("not tested", QUIET)]
    return [
        *lines,
        (f"deletion {tests.deletion:.2f}, lower is better", INK),
        (f"random map {tests.deletion_random:.2f}, the mask itself {tests.deletion_mask:.2f}", QUIET),
        (f"insertion {tests.insertion:.2f}, higher is better", INK),
        (f"random map {tests.insertion_random:.2f}, the mask itself {tests.insertion_mask:.2f}", QUIET),
        (f"energy in the label {tests.energy:.2f}", INK),
        (f"by chance {tests.energy_chance:.2f}; from its context {tests.context:.2f}", QUIET),
        (f"with random weights {tests.randomisation:.2f}, near 0 is right", INK),
        (f"with a little noise {tests.stability:.2f}, near 1 is right", INK),
    ]
