"""What held-out cases say of a package, case by case: a table for programs, a page for people. Cases go by their hashes."""

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np

from . import charts
from .outputs._html import document, text
from .package import Package
from .report import hilum_version
from .significance import interval_of_mean

Table = dict[str, dict[str, float]]
"""Case -> label -> Dice."""

MOST_ROWS = 200
"""Cases named on the page, the worst first; the table beside it has them all."""


def by_fold(record: Package) -> dict[str, Table]:
    """Of every fold that held cases out."""
    return {number: fold.held_out.cases for number, fold in record.folds.items() if fold.held_out.cases}


def mean_dice(dice: Mapping[str, float]) -> float | None:
    """Of a case, over the labels that it or its prediction has."""
    return float(np.mean(list(dice.values()))) if dice else None


def interval(table: Table) -> tuple[float, float] | None:
    """In which the mean over labels lies, by the bootstrap over cases."""
    labels = dict.fromkeys(label for dice in table.values() for label in dice)
    return interval_of_mean({label: {case: dice.get(label) for case, dice in table.items()} for label in labels})


def mean_over_labels(table: Table) -> float:
    """Of their means over cases, as packages are compared."""
    labels = dict.fromkeys(label for dice in table.values() for label in dice)
    means = [np.mean([dice[label] for dice in table.values() if label in dice]) for label in labels]
    return float(np.mean(means)) if means else 0.0


def chosen(means: Sequence[float | None]) -> dict[str, int]:
    """Which case is the worst, the median and the best, by their numbers; each once, fewer where there are fewer."""
    order = sorted(range(len(means)), key=lambda number: (means[number] is None, means[number] or 0.0))
    known = [number for number in order if means[number] is not None] or order
    if len(known) < 2:
        return {"only": known[0]} if known else {}
    middle = {"median": known[len(known) // 2]} if len(known) > 2 else {}
    return {"worst": known[0], **middle, "best": known[-1]}


def sheet(record: Package) -> str:
    """CSV: a row for each held-out case of each fold."""
    labels = [label.name for label in record.plan.labels]
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["case", "fold", *(f"dice {name}" for name in labels), "mean dice"])
    for fold, table in by_fold(record).items():
        for case, dice in table.items():
            mean, known = mean_dice(dice), [dice.get(name, "") for name in labels]
            writer.writerow([case, fold, *known, "" if mean is None else round(mean, 6)])
    return lines.getvalue()


def page(record: Package, reliability: Mapping[str, Sequence[tuple[float, float]]] | None = None) -> str:
    """One file that needs no other. `reliability`: how sure and how often right, before and after the temperature."""
    folds = by_fold(record)
    body = [
        f"<h1>{text(record.name)}: held-out cases</h1>",
        f'<p class="quiet">{text(_what(record, folds))} · for research, not for diagnosis</p>',
        "<h2>Dice of every case</h2>" + _strips(record, folds),
        _folds(folds),
        _calibration(record, reliability or {}),
        "<h2>Case by case, the worst first</h2>" + _rows(record, folds),
        f"<footer>hilum {text(hilum_version())} · for research, not for diagnosis. A case is named by a hash of its scan: who "
        "has the scan can find it again (package.json, held_out), who has this page cannot.</footer>",
    ]
    return document(f"{record.name}: held-out cases", "\n".join(body), style=charts.STYLE + STYLE)


STYLE = ".narrow { max-width: 720px; margin: 0 0 10px; }"


def _what(record: Package, folds: Mapping[str, Table]) -> str:
    cases = sum(map(len, folds.values()))
    number = f"fold {', '.join(folds)}" if folds else "no fold"
    return f"{record.network}, {number}, {cases} case(s) that the network judged on them never saw"


def _strips(record: Package, folds: Mapping[str, Table]) -> str:
    rows = {
        label.name: {case: dice[label.name] for table in folds.values() for case, dice in table.items() if label.name in dice}
        for label in record.plan.labels
    }  # fmt: skip
    along = charts.axis([0.0, 1.0], low=0.0, high=1.0)
    return f'<div class="narrow">{charts.strips(rows, along, "Dice")}</div>'


def _folds(folds: Mapping[str, Table]) -> str:
    if len(folds) < 2:
        return ""
    rows = {f"fold {number}": (mean_over_labels(table), interval(table)) for number, table in folds.items()}
    every = {case: dice for table in folds.values() for case, dice in table.items()}
    rows["all folds"] = (mean_over_labels(every), interval(every))
    ends = [end for mean, within in rows.values() for end in (within or (mean,))]
    what = "Mean Dice over labels of each fold, with its 95 % interval over cases"
    return f'<h2>{what}</h2><div class="narrow">{charts.whiskers(rows, charts.axis(ends, high=1.0), what)}</div>'


def _calibration(record: Package, reliability: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    known = {number: fold for number, fold in record.folds.items() if fold.calibration and fold.temperature}
    if not known:
        return ""
    rows = []
    for number, fold in known.items():
        was = fold.calibration
        assert was is not None
        figures = (was.ece_before, was.ece_after, was.nll_before, was.nll_after, was.brier_before, was.brier_after)
        cells = "".join(f'<td class="number">{value:.4f}</td>' for value in figures)
        rows.append(f'<tr><td>{text(number)}</td><td class="number">{fold.temperature:.3f}</td>{cells}</tr>')
    names = ("temperature", "ECE before", "after", "NLL before", "after", "Brier before", "after")
    head = "".join(f'<th class="number">{name}</th>' for name in names)
    drawn = charts.reliability(reliability, "How often right against how sure") if reliability else ""
    return (
        "<h2>How far its probabilities can be believed</h2>"
        f'<div class="narrow">{drawn}</div>'
        f'<div class="wide"><table><tr><th>fold</th>{head}</tr>{"".join(rows)}</table></div>'
        '<p class="quiet">Figures after the temperature come from cases that had no part in fitting it; the curve after it '
        "is of all of them.</p>"
    )


def _rows(record: Package, folds: Mapping[str, Table]) -> str:
    labels = [label.name for label in record.plan.labels]
    every = [(mean_dice(dice), case, fold, dice) for fold, table in folds.items() for case, dice in table.items()]
    every.sort(key=lambda row: (row[0] is None, row[0] or 0.0, row[1]))
    head = "".join(f'<th class="number">{text(name)}</th>' for name in (*labels, "mean"))
    rows = []
    for mean, case, fold, dice in every[:MOST_ROWS]:
        cells = "".join(f'<td class="number">{_figure(dice.get(name))}</td>' for name in labels)
        rows.append(
            f'<tr><td class="mono">{text(case)}</td><td>{text(fold)}</td>{cells}<td class="number">{_figure(mean)}</td></tr>'
        )
    more = f"<p>{len(every) - MOST_ROWS} better ones are in held_out.csv.</p>" if len(every) > MOST_ROWS else ""
    return f'<div class="wide"><table><tr><th>case</th><th>fold</th>{head}</tr>{"".join(rows)}</table></div>{more}'


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
