"""evaluate: how well label maps agree with references; what is written of it as JSON, CSV and a page.

What each number means, and what an empty label means, stands in metrics.py; how intervals and tests are made, in
significance.py. Both are written into every JSON and page.
"""

import csv
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.reading import STRICT, Reading
from preprocessing.volume import ScanError

from .errors import UsageError
from .metrics import Agreement, Measure, Surface, agreements, dice
from .references import Key, Maps, Matched, NothingToEvaluate, match, read_key, read_maps
from .report import as_json, inert, write_whole
from .scorecard import page
from .scores import MEASURED, TESTED, WORDS, Evaluation, Score, Summary, conventions, figure
from .significance import Difference, differences, interval_of_mean, spread

__all__ = [
    "Evaluation",
    "NothingToEvaluate",
    "Score",
    "Summary",
    "beside",
    "compare",
    "dice",
    "evaluate",
    "summary_lines",
    "table",
    "write",
]

logger = logging.getLogger(__name__)


def evaluate(
    predictions: Path,
    references: Path,
    out: Path | None = None,
    *,
    labels: Mapping[int, str] | None = None,
    tolerance_mm: float = 1.0,
    surface: Surface = "voxels",
    against: Path | None = None,
    reading: Reading = STRICT,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compares label maps case by case, matched by name; writes `out` (JSON), and a CSV and a page called the same beside it.

    `predictions`: what `segment` wrote, or a folder of label files. `references`: another such folder, or a dataset: one
    with `labelsTr` or `labels` in it, or a CSV. `labels`: value to name; else as the dataset or the package says, else the
    value. `against`: other predictions of the same cases, to be told apart from these. `progress` is told cases done and
    cases in all.
    """
    if tolerance_mm < 0:
        raise UsageError(f"a tolerance of {tolerance_mm:g} mm was asked for; 0 or more is needed. Give another.")
    if out is not None and out.suffix.lower() in (".csv", ".html"):
        raise UsageError(
            f"{out.name} was named for the JSON; a CSV and a page of the same name come beside it. Name it {out.stem}.json."
        )
    measure = Measure(spacing=(1.0, 1.0, 1.0), tolerance_mm=tolerance_mm, surface=surface)
    key = read_key(references, predictions, reading, labels)
    matched = [match(folder, key) for folder in (predictions, against) if folder]
    tell = _counting(progress, sum(len(one.pairs) for one in matched))
    evaluation = _evaluated(matched[0], key, measure, tell)
    if against:
        other = _evaluated(matched[1], key, measure, tell)
        evaluation = replace(evaluation, against=_against(evaluation, other, matched), other=other)
    if out is not None:
        write(evaluation, out, matched[0], key)
    return evaluation


def _counting(progress: Callable[[int, int], None] | None, of: int) -> Callable[[], None]:
    done = iter(range(1, of + 1))
    if progress:
        progress(0, of)
    return lambda: progress(next(done), of) if progress else None


def _evaluated(matched: Matched, key: Key, measure: Measure, tell: Callable[[], None]) -> Evaluation:
    scores: list[Score] = []
    failed: dict[str, str] = {}
    for case_id, reference_id in matched.pairs.items():
        try:
            scores += compare(read_maps(case_id, matched, key), case_id, key, measure, reference_id)
        except (ScanError, OSError) as reason:
            failed[case_id] = str(reason)
            logger.warning("%s could not be compared: %s", case_id, reason)
        tell()
    return _evaluation(scores, failed, key, measure, matched)


def compare(maps: Maps, case_id: str, key: Key, measure: Measure, reference_id: str = "") -> list[Score]:
    """Every label that has a name or a voxel, lowest value first; of a partly annotated case, what was looked for in it."""
    reference_id = reference_id or case_id
    labels = key.of(reference_id)
    if reference_id not in key.annotated:
        # unnamed values count too: a reference with a label the package does not know was missed, not absent
        known = {value for values in key.labels.values() for value in values}
        labels = labels | {str(value): (value,) for value in _present(maps) - known}
    labels = dict(sorted(labels.items(), key=lambda item: item[1]) if not _overlap(labels) else labels)
    geometry = maps.geometry
    found = agreements(maps.predicted, maps.given, labels, replace(measure, spacing=geometry.spacing))
    return [_score(case_id, label, one, geometry.voxel_ml) for label, one in found.items()]


def _overlap(labels: Mapping[str, Sequence[int]]) -> bool:
    return any(len(values) > 1 for values in labels.values())


def _present(maps: Maps) -> set[int]:
    """Values other than 0, slab by slab: bincount makes eight bytes of every voxel it is given."""
    found: set[int] = set()
    for voxels in (maps.predicted, maps.given):
        counts = np.zeros(int(voxels.max()) + 1, np.int64)
        for slab in voxels:
            counts += np.bincount(slab.ravel(), minlength=len(counts))
        found.update(np.flatnonzero(counts).tolist())
    return found - {0}


def _score(case_id: str, label: str, found: Agreement, voxel_ml: float) -> Score:
    measured = asdict(found)
    volume, reference = measured.pop("voxels") * voxel_ml, measured.pop("reference_voxels") * voxel_ml
    return Score(
        case_id=case_id,
        label=label,
        **measured,
        volume_ml=volume,
        reference_ml=reference,
        volume_error_ml=volume - reference,
        volume_error_percent=100 * (volume - reference) / reference if reference else None,
    )


def _evaluation(
    scores: Sequence[Score], failed: dict[str, str], key: Key, measure: Measure, matched: Matched
) -> Evaluation:
    labels = dict.fromkeys([*key.labels, *(score.label for score in scores)])
    summary = tuple(_summary(label, [score for score in scores if score.label == label]) for label in labels)
    return Evaluation(
        measure=measure,
        mean_dice=_mean([each.dice for each in summary]),
        mean_dice_interval=interval_of_mean(_by_metric(scores, matched.pairs)["dice"]),
        summary=summary,
        scores=tuple(scores),
        failed=failed,
        unmatched_predictions=matched.unmatched_predictions,
        unmatched_references=matched.unmatched_references,
        partly_annotated=tuple(case for case, reference in matched.pairs.items() if reference in key.annotated),
        left_out=key.left_out,
    )


def _summary(label: str, scores: Sequence[Score]) -> Summary:
    counted = [score for score in scores if score.dice is not None]
    return Summary(
        label=label,
        cases=len(counted),
        missed=sum(score.volume_ml == 0 < score.reference_ml for score in counted),
        invented=sum(score.reference_ml == 0 < score.volume_ml for score in counted),
        of={name: spread([getattr(score, name) for score in counted]) for name in MEASURED},
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _against(ours: Evaluation, theirs: Evaluation, matched: Sequence[Matched]) -> dict[str, dict[str, Difference]]:
    """Cases are the same when their reference is."""
    sides = [_by_metric(one.scores, files.pairs) for one, files in zip((ours, theirs), matched, strict=True)]
    return {metric: differences(sides[0][metric], sides[1][metric]) for metric in TESTED}


def _by_metric(scores: Sequence[Score], pairs: Mapping[str, str]) -> dict[str, dict[str, dict[str, float | None]]]:
    found: dict[str, dict[str, dict[str, float | None]]] = {metric: {} for metric in TESTED}
    for score in scores:
        for metric, labels in found.items():
            labels.setdefault(score.label, {})[pairs[score.case_id]] = getattr(score, metric)
    return found


# what is written


def write(evaluation: Evaluation, out: Path, matched: Matched | None = None, key: Key | None = None) -> Path:
    """The JSON, with the conventions inside it; a CSV of every case and label; and a page, with pictures where there are files."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, as_json(document(evaluation)))
    write_whole(beside(out, ".csv"), as_csv(evaluation))
    write_whole(beside(out, ".html"), page(evaluation, matched, key or Key()))  # last: pictures read files again
    return out


def beside(out: Path, ending: str) -> Path:
    """Of the same name: scores.json has scores.csv beside it, and unet.v2 has unet.v2.csv."""
    return out.with_name(out.name.removesuffix(".json") + ending)


def document(evaluation: Evaluation) -> dict[str, Any]:
    """Everything, as plain values."""
    return {
        "conventions": conventions(evaluation.measure),
        "tolerance_mm": evaluation.tolerance_mm,
        "surface": evaluation.measure.surface,
        "mean_dice": evaluation.mean_dice,
        "mean_dice_interval": evaluation.mean_dice_interval,
        "summary": {each.label: _plain(each) for each in evaluation.summary},
        "against": None if evaluation.against is None else _plain_against(evaluation),
        "cases": _by_case(evaluation.scores),
        **_lost(evaluation),
        "partly_annotated": list(evaluation.partly_annotated),
        "left_out": list(evaluation.left_out),
    }


def _lost(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "failed": evaluation.failed,
        "unmatched_predictions": list(evaluation.unmatched_predictions),
        "unmatched_references": list(evaluation.unmatched_references),
    }


def _plain(summary: Summary) -> dict[str, Any]:
    counts = {"cases": summary.cases, "missed": summary.missed, "invented": summary.invented}
    return counts | {name: asdict(one) for name, one in summary.of.items()}


def _plain_against(evaluation: Evaluation) -> dict[str, Any]:
    assert evaluation.against is not None and evaluation.other is not None
    return {
        "mean_dice": evaluation.other.mean_dice,
        **_lost(evaluation.other),
        **{
            metric: {label: asdict(one) | {"said": one.said} for label, one in labels.items()}
            for metric, labels in evaluation.against.items()
        },
    }


def _by_case(scores: Sequence[Score]) -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    for score in scores:
        measured = {k: v for k, v in asdict(score).items() if k not in ("case_id", "label")}
        cases.setdefault(score.case_id, {})[score.label] = measured
    return cases


def as_csv(evaluation: Evaluation) -> str:
    """One row per case and label; what could not be measured is empty. Cases that failed are in the JSON."""
    names = [field.name for field in fields(Score)]
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    rows.writerow(["case", *names[1:]])
    for score in evaluation.scores:
        cells = ["" if (value := getattr(score, name)) is None else value for name in names]
        rows.writerow([inert(cell) if isinstance(cell, str) else f"{cell:.6g}" for cell in cells])
    return buffer.getvalue()


def table(evaluation: Evaluation) -> str:
    """The summary as a person reads it."""
    lines = summary_lines(evaluation.summary)
    within = evaluation.mean_dice_interval
    sure = f" (95 % interval {within[0]:.3f} to {within[1]:.3f})" if within else ""
    lines.append(f"mean Dice {figure(evaluation.mean_dice, 3)}{sure}; NSD at {evaluation.tolerance_mm:g} mm")
    lines += [""] * bool(evaluation.against) + _told(evaluation)
    return "\n".join(lines)


def summary_lines(summary: Sequence[Summary]) -> list[str]:
    """A line per label, under a line of heads."""
    width = max([len("label"), *(len(one.label) for one in summary)])
    columns = {"dice": 3, "iou": 3, "nsd": 3, "hd95_mm": 2, "assd_mm": 2, "lesion_f1": 3, "volume_error_ml": 2}
    heads = [WORDS[name].removeprefix("volume ") for name in columns]
    lines = [" ".join([f"{'label':<{width}} {'cases':>5}", *(f"{head:>9}" for head in heads), "missed invented"])]
    for one in summary:
        figures = [f"{figure(one.of[name].mean, digits):>9}" for name, digits in columns.items()]
        lines.append(" ".join([f"{one.label:<{width}} {one.cases:>5}", *figures, f"{one.missed:>6} {one.invented:>8}"]))
    return lines


def _told(evaluation: Evaluation) -> list[str]:
    if evaluation.against is None:
        return []
    lines = ["difference to the other prediction (95 % interval), Wilcoxon, Holm over labels"]
    for metric in ("dice", "nsd", "hd95_mm"):
        for label, one in evaluation.against[metric].items():
            sure = f" ({one.interval[0]:+.3f} to {one.interval[1]:+.3f})" if one.interval else ""
            mean = "-" if one.mean is None else f"{one.mean:+.3f}"
            lines.append(f"  {WORDS[metric]:<8} {label}: {mean}{sure}, n = {one.cases}, {one.said}")
    return lines
