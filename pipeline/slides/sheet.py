"""What nested cross-validation leaves to read: two tables that name slides and stay in the package; a page and a picture
that name none and go to MLflow."""

import base64
import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from preprocessing.declared import PALETTE

from .. import charts
from ..outputs._drawing import INK, LINE, PAGE, QUIET, fitting, png, write
from ..outputs._html import document, text
from ..report import hilum_version, inert
from .division import Division
from .package import SlideRecord
from .scores import Estimate, Judged, reliability, roc
from .table import LabelledSlide, SlideTable


def splits(table: SlideTable, division: Division) -> str:
    """CSV: of every slide the outer fold that measured it, the inner part of each other fold and the member it chose."""
    outer = {one: fold.number for fold in division.outer for one in fold.measured}
    inner = [{one: n for n, part in enumerate(fold.inner) for one in part.held_out} for fold in division.outer]
    member = {one: n for n, part in enumerate(division.members) for one in part.held_out}
    head = [
        "slide",
        "patient",
        "label",
        "outer fold",
        *(f"inner part in fold {n}" for n in range(len(inner))),
        "member",
    ]
    rows = [
        [*_named(slide, table), outer[slide.id], *(part.get(slide.id, "") for part in inner), member[slide.id]]
        for slide in table.slides
    ]
    return as_csv(head, rows)


def predictions(table: SlideTable, judged: Judged) -> str:
    """CSV: what was said of every slide by networks that its patient had no part in."""
    classes = table.classes
    head = ["slide", "patient", "label", "decided", "outer fold", *(f"probability {name}" for name in classes),
            *(f"logit {name}" for name in classes)]  # fmt: skip
    rows = [
        [*_named(slide, table), classes[decided], fold, *likely.round(6).tolist(), *logits.round(6).tolist()]
        for slide, decided, fold, likely, logits in zip(
            table.slides, judged.decided, judged.folds.tolist(), judged.probabilities, judged.logits, strict=True
        )
    ]
    return as_csv(head, rows)


def page(record: SlideRecord, judged: Judged) -> str:
    """One file that needs no other; no slide and no patient is named in it."""
    scores = record.scores
    drawn = base64.b64encode(png(Image.fromarray(picture(record, judged)))).decode()
    curves = {name: reliability(judged, calibrated) for name, calibrated in (("before", False), ("after", True))}
    body = [
        f"<h1>{text(record.name)}: nested cross-validation</h1>",
        f'<p class="quiet">{text(record.network)}, {record.folds} outer folds, {scores.slides} {record.kind} of {scores.patients} '
        "patients, each predicted once by networks that its patient had no part in · for research, not for diagnosis</p>",
        "<h2>Scores, with 95 % intervals over patients</h2>",
        f'<div class="narrow">{_whiskers(scores.macros)}</div>',
        "<h2>ROC and confusion</h2>",
        f'<img alt="ROC curves and confusion matrix" src="data:image/png;base64,{drawn}">',
        "<h2>How far its probabilities can be believed</h2>",
        f'<div class="narrow">{charts.reliability(curves, "How often right against how sure")}</div>',
        "<h2>Class by class</h2>" + _classes(record),
        f"<footer>hilum {text(hilum_version())} · AUROC compares within outer folds; decision by argmax; intervals by "
        "bootstrap over patients. One by one: predictions.csv in the package.</footer>",
    ]
    style = charts.STYLE + ".narrow { max-width: 720px; margin: 0 0 10px; }"
    return document(f"{record.name}: nested cross-validation", "\n".join(body), style=style)


SIDE, EDGE, FRAME = 420, 70, 560
"""Pixels: of a plot, before it, and of the whole picture's height: two plots beside each other are wide enough for MLflow."""


def picture(record: SlideRecord, judged: Judged) -> UInt8[np.ndarray, "h w 3"]:
    """ROC curves of the classes, and who was taken for whom."""
    image = Image.new("RGB", (2 * (SIDE + 2 * EDGE), FRAME), PAGE)
    draw = ImageDraw.Draw(image)
    _draw_roc(draw, record, judged)
    _draw_confusion(draw, record)
    return np.asarray(image)


def _draw_roc(draw: ImageDraw.ImageDraw, record: SlideRecord, judged: Judged) -> None:
    left, top = EDGE, EDGE
    write(draw, (left, top - 20), f"macro AUROC {record.scores.macro_auroc.said}", 20, INK, "ls", bold=True)
    draw.rectangle((left, top, left + SIDE, top + SIDE), outline=LINE)
    draw.line((left, top + SIDE, left + SIDE, top), fill=LINE)
    write(
        draw,
        (left + SIDE // 2, top + SIDE + 30),
        "share found (up) against share of the others called so (across)",
        16,
        QUIET,
        "ms",
    )
    for number, (name, one) in enumerate(record.scores.per_class.items()):
        colour = PALETTE[number % len(PALETTE)]
        if curve := roc(judged, number):
            points = [(left + x * SIDE, top + (1 - y) * SIDE) for x, y in ((0.0, 0.0), *curve)]
            draw.line(points, fill=colour, width=3)
        if number < MOST_NAMES:
            words = fitting(f"{_figure(one.auroc)} {name}", 16, SIDE // 2)
            write(
                draw,
                (left + SIDE - 10, top + SIDE - 12 - 22 * number),
                words,
                16,
                "#{:02x}{:02x}{:02x}".format(*colour),
                "rs",
            )


MOST_NAMES = 12
"""Classes that fit beside the curves."""


def _draw_confusion(draw: ImageDraw.ImageDraw, record: SlideRecord) -> None:
    left, top = 3 * EDGE + SIDE, EDGE
    table = np.array(record.scores.confusion)
    side = SIDE / len(table)
    write(draw, (left, top - 20), "decided (across) against true (down)", 20, INK, "ls", bold=True)
    for row, counts in enumerate(table):
        for column, count in enumerate(counts):
            share = count / max(1, counts.sum())
            at = (left + column * side, top + row * side)
            draw.rectangle((*at, at[0] + side, at[1] + side), fill=_shade(share), outline=LINE)
            write(draw, (round(at[0] + side / 2), round(at[1] + side / 2)), str(count), _letters(side), INK, "mm")
    for number, name in enumerate(record.classes):
        middle = round((number + 0.5) * side)
        write(draw, (left + middle, top + SIDE + 24), fitting(name, 14, round(side)), 14, QUIET, "ms")
        write(draw, (left - 8, top + middle), fitting(name, 14, BESIDE), 14, QUIET, "rm")


BESIDE = 110
"""Pixels for the name of a row."""


def _letters(side: float) -> int:
    """Pixels of the figures in a cell of that side."""
    return int(np.clip(side / 3, 9, 24))


def _shade(share: float) -> tuple[int, int, int]:
    """From the page's colour to a blue, by the share of the row."""
    ends = np.array([[12, 14, 17], [10, 95, 168]])
    red, green, blue = (ends[0] + share * (ends[1] - ends[0])).astype(int).tolist()
    return red, green, blue


def _whiskers(rows: Mapping[str, Estimate]) -> str:
    known = {name: (one.value, one.interval) for name, one in rows.items() if one.value is not None}
    return charts.whiskers(
        known, charts.axis([0.0, 1.0], low=0.0, high=1.0), "Scores and their intervals over patients"
    )


def _classes(record: SlideRecord) -> str:
    head = "".join(
        f'<th class="number">{name}</th>' for name in (record.kind, "patients", "AUROC", "recall", "precision", "F1")
    )
    rows = []
    for name, one in record.scores.per_class.items():
        figures = (one.slides, one.patients, one.auroc.said, one.recall.said, one.precision.said, one.f1.said)
        cells = "".join(f'<td class="number">{text(each)}</td>' for each in figures)
        rows.append(f"<tr><td>{text(name)}</td>{cells}</tr>")
    return f'<div class="wide"><table><tr><th>class</th>{head}</tr>{"".join(rows)}</table></div>'


def _figure(estimate: Estimate) -> str:
    return "-" if estimate.value is None else f"{estimate.value:.3f}"


def _named(slide: LabelledSlide, table: SlideTable) -> list[str]:
    return [slide.id, slide.patient, table.classes[slide.label]]


def as_csv(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    for row in (head, *rows):
        writer.writerow([inert(cell) if isinstance(cell, str) else cell for cell in row])
    return lines.getvalue()
