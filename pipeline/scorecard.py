"""The page of an evaluation: the summary, every case as a dot, the worst cases' pictures, the difference to another prediction."""

import base64
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from preprocessing.volume import ScanError

from . import charts, gallery
from .outputs._html import document, swatch, text
from .references import Key, Matched, read_image, read_maps
from .report import hilum_version
from .scores import WORDS, Evaluation, Score, Summary, conventions, figure, less_is_better
from .significance import Difference, Spread

logger = logging.getLogger(__name__)

WORST = 6
"""Pictures on a page."""
MOST_ROWS = 400
"""Of the table of cases; the rest is in the CSV."""

STYLE = (
    charts.STYLE
    + """
main { max-width: 1320px; }
h3 { font-size: 14px; margin: 16px 0 6px; }
figure { margin: 0 0 24px; }
figcaption { margin: 6px 0 0; }
td .quiet { font-size: 12.5px; display: block; }
.wide + .quiet, .two + .quiet { margin-top: 8px; }
.case { min-width: 150px; max-width: 320px; overflow-wrap: anywhere; }
.good { color: var(--good); } .worse { color: var(--bad); }
:root { --good: #1a6b34; }
@media (prefers-color-scheme: dark) { :root { --good: #6fd08c; } }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 10px; padding: 0; list-style: none; }
"""
)

SHOWN = {"dice": 3, "nsd": 3, "hd95_mm": 2, "assd_mm": 2, "lesion_f1": 3, "volume_error_ml": 2}
"""Columns of the summary, with their digits."""
CHARTS = ("dice", "nsd", "hd95_mm", "volume_error_percent")


def page(evaluation: Evaluation, matched: Matched | None, key: Key) -> str:
    """One file that needs no other."""
    cases = len(evaluation.cases)
    within = evaluation.mean_dice_interval
    sure = f", 95 % interval {within[0]:.3f} to {within[1]:.3f}" if within else ""
    body = [
        f"<h1>{cases} case{'' if cases == 1 else 's'}, mean Dice {figure(evaluation.mean_dice, 3)}</h1>",
        f'<p class="quiet">mean over {len(evaluation.summary)} label(s){sure} · NSD at {evaluation.tolerance_mm:g} mm · '
        f"surfaces of {evaluation.measure.surface} · for research, not for diagnosis</p>",
        _left_out(evaluation),
        "<h2>Labels</h2>",
        _summary(evaluation.summary),
        '<p class="quiet">Mean over cases, below it the 95 % interval of the mean and the median. '
        "Missed: drawn in the reference alone. Invented: drawn in the prediction alone.</p>",
        "<h2>Cases</h2>",
        _charts(evaluation.scores),
        _against(evaluation),
        _worst(evaluation, matched, key),
        "<h2>Every case and label</h2>",
        _cases(evaluation.scores),
        "<h2>What the numbers mean</h2>",
        "<table>"
        + "".join(
            f"<tr><th>{text(name.replace('_', ' '))}</th><td>{text(said)}</td></tr>"
            for name, said in conventions(evaluation.measure).items()
        )
        + "</table>",
        f"<footer>hilum {text(hilum_version())} · for research, not for diagnosis</footer>",
    ]
    return document("Evaluation", "\n".join(body), style=STYLE)


def _left_out(evaluation: Evaluation) -> str:
    return (
        _lost(evaluation)
        + _named(evaluation.partly_annotated, "annotated for some labels alone, and measured by these")
        + _named(evaluation.left_out, "drawn in DICOM objects and none of the labels, so left out")
    )


def _lost(evaluation: Evaluation, which: str = "prediction") -> str:
    """Cases that are in no mean."""
    items = "".join(f"<li>{text(case)}: {text(reason)}</li>" for case, reason in evaluation.failed.items())
    failed = f'<div class="bad">{len(evaluation.failed)} of the {which} could not be compared:<ul>{items}</ul></div>'
    return (
        failed * bool(evaluation.failed)
        + _named(evaluation.unmatched_predictions, f"of the {which} without a reference")
        + _named(evaluation.unmatched_references, f"without the {which}")
    )


def _named(names: Sequence[str], words: str) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f'<div class="alarm">{len(names)} {words}: {text(", ".join(names[:5]))}{more}</div>' if names else ""


def _summary(summary: Sequence[Summary]) -> str:
    head = "".join(
        f'<th class="number">{word}</th>' for word in ("cases", *(WORDS[name] for name in SHOWN), "missed", "invented")
    )
    rows = []
    for number, one in enumerate(summary):
        cells = [f'<td class="number">{one.cases}</td>']
        cells += [_spread(one.of[name], digits) for name, digits in SHOWN.items()]
        cells += [f'<td class="number{" worse" if count else ""}">{count}</td>' for count in (one.missed, one.invented)]
        rows.append(f"<tr><td>{swatch(gallery.colour(number))}{text(one.label)}</td>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr><th>label</th>{head}</tr>{"".join(rows)}</table></div>'


def _spread(spread: Spread, digits: int) -> str:
    if spread.mean is None or spread.median is None:
        return '<td class="number quiet">-</td>'
    low_high = spread.interval
    within = f"{low_high[0]:.{digits}f} to {low_high[1]:.{digits}f}" if low_high else "too few for an interval"
    return (
        f'<td class="number">{spread.mean:.{digits}f}<span class="quiet">{within}</span>'
        f'<span class="quiet">median {spread.median:.{digits}f}</span></td>'
    )


def _charts(scores: Sequence[Score]) -> str:
    drawn = []
    for name in CHARTS:
        rows = {label: {} for label in dict.fromkeys(score.label for score in scores)}  # type: dict[str, dict[str, float]]
        for score in scores:
            if (value := getattr(score, name)) is not None:
                rows[score.label][score.case_id] = value
        values = [value for row in rows.values() for value in row.values()]
        if values:
            along = charts.axis(values, **_ends(name, values))
            chart = charts.strips(rows, along, WORDS[name])
            drawn.append(f"<section><h3>{text(WORDS[name])}</h3>{chart}</section>")
    return f'<div class="two">{"".join(drawn)}</div>' + (
        '<p class="quiet">A dot is a case (its name under the pointer); the box holds the middle half, the bar is the median.</p>'
    )


def _ends(name: str, values: Sequence[float]) -> dict[str, float]:
    if name in ("dice", "nsd"):
        return {"high": 1.0}
    if name.endswith("_mm"):
        return {"low": 0.0}
    furthest = max(max(map(abs, values)), 1.0)
    return {"low": -furthest, "high": furthest}


def _against(evaluation: Evaluation) -> str:
    if evaluation.against is None or evaluation.other is None:
        return ""
    metrics = list(evaluation.against)
    head = "".join(f'<th class="number">{text(WORDS[metric])}</th>' for metric in metrics)
    rows = []
    for label in dict.fromkeys(label for of in evaluation.against.values() for label in of):
        cells = "".join(
            difference_cell(evaluation.against[metric].get(label), less_is_better(metric)) for metric in metrics
        )
        rows.append(f"<tr><td>{text(label)}</td>{cells}</tr>")
    return (
        f"<h2>Difference to the other prediction</h2><p>Its mean Dice is {figure(evaluation.other.mean_dice, 3)}. Each cell is "
        "this prediction minus the other, over the cases that both have: the mean, its 95 % bootstrap interval, Wilcoxon's "
        "signed-rank test with Holm's correction over the labels of a column, and how many cases are higher (↑) and lower (↓). "
        "Green is better, red is worse, beyond chance (p < 0.05).</p>"
        f"{_lost(evaluation.other, 'other prediction')}"
        f'<div class="wide"><table><tr><th>label</th>{head}</tr>{"".join(rows)}</table></div>'
    )


def difference_cell(one: Difference | None, less: bool) -> str:
    """A mean difference with its interval and test; coloured only where it is beyond chance."""
    if one is None or one.mean is None:
        return '<td class="number quiet">-</td>'
    digits = 2 if less else 3
    kind = ""
    if one.p_holm is not None and one.p_holm < 0.05:
        kind = " good" if (one.mean < 0) == less else " worse"
    interval = f"{one.interval[0]:+.{digits}f} to {one.interval[1]:+.{digits}f}" if one.interval else ""
    return (
        f'<td class="number{kind}">{one.mean:+.{digits}f}<span class="quiet">{interval}</span>'
        f'<span class="quiet">{text(one.said)}, n = {one.cases} (↑{one.higher} ↓{one.lower})</span></td>'
    )


def _worst(evaluation: Evaluation, matched: Matched | None, key: Key) -> str:
    if matched is None:
        return ""
    names = [one.label for one in evaluation.summary]
    labels = {name: key.labels.get(name) or (int(name),) for name in names if name in key.labels or name.isdecimal()}
    figures = [_figure(case, mean, evaluation, matched, key, labels) for case, mean in worst(evaluation.scores)]
    if not any(figures):
        return ""
    legend = "".join(f"<li>{swatch(gallery.colour(n))}{text(name)}</li>" for n, name in enumerate(labels))
    return (
        "<h2>The worst cases</h2><p>Filled: the reference. Line: the prediction. Axial, coronal and sagittal, each where most "
        f'voxels are wrong; the patient\'s right on the left.</p><ul class="legend">{legend}</ul><div class="two">{"".join(figures)}</div>'
    )


def worst(scores: Sequence[Score]) -> list[tuple[str, float]]:
    """The cases of lowest mean Dice over their labels, the lowest first."""
    found: dict[str, list[float]] = {}
    for score in scores:
        if score.dice is not None:
            found.setdefault(score.case_id, []).append(score.dice)
    means = {case: float(np.mean(values)) for case, values in found.items()}
    return sorted(means.items(), key=lambda item: (item[1], item[0]))[:WORST]


def _figure(
    case: str, mean: float, evaluation: Evaluation, matched: Matched, key: Key,
    labels: Mapping[str, Sequence[int]],
) -> str:  # fmt: skip
    reference_id = matched.pairs[case]
    looked_for = key.annotated.get(reference_id)
    shown = {name: values if looked_for is None or name in looked_for else () for name, values in labels.items()}
    try:
        image = read_image(reference_id, matched.predictions[case], key)
        png = gallery.picture(read_maps(case, matched, key), shown, image)
    except (ScanError, OSError) as reason:  # it was there a moment ago
        logger.warning("%s has no picture: %s", case, reason)
        return ""
    said = ", ".join(
        f"{text(score.label)} {score.dice:.3f}"
        for score in evaluation.scores
        if score.case_id == case and score.dice is not None
    )
    source = base64.b64encode(png).decode()
    return (
        f'<figure><img src="data:image/png;base64,{source}" alt="{text(case)}: reference and prediction in three planes">'
        f"<figcaption><b>{text(case)}</b>, mean Dice {mean:.3f}: {said}</figcaption></figure>"
    )


def _cases(scores: Sequence[Score]) -> str:
    columns = {**SHOWN, "volume_error_percent": 1}
    head = "".join(f'<th class="number">{text(WORDS[name])}</th>' for name in columns)
    ordered = sorted(scores, key=lambda score: (score.dice is None, score.dice or 0.0, score.case_id))
    rows = "".join(
        f'<tr><td class="case">{text(score.case_id)}</td><td>{text(score.label)}</td>'
        + "".join(f'<td class="number">{figure(getattr(score, name), digits)}</td>' for name, digits in columns.items())
        + f'<td class="number">{score.lesions_found} of {score.lesions}</td>'
        f'<td class="number">{score.volume_ml:.3f}</td><td class="number">{score.reference_ml:.3f}</td></tr>'
        for score in ordered[:MOST_ROWS]
    )
    more = (
        f'<p class="quiet">The {MOST_ROWS} worst of {len(scores)}; the CSV has all.</p>'
        if len(scores) > MOST_ROWS
        else ""
    )
    return (
        f'<div class="wide"><table><tr><th>case</th><th>label</th>{head}<th class="number">lesions found</th>'
        f'<th class="number">ml</th><th class="number">reference ml</th></tr>{rows}</table></div>{more}'
    )
