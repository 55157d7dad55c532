"""How well labels agree with references: Dice, surface distances and volumes, per case and per label.

Conventions, also written into the JSON:
a label's surface is those of its voxels with a face towards another label or out of the image, at their centres;
NSD (Nikolov et al. 2018) is the share of both surfaces' voxels within the tolerance of the other surface;
HD95 is the larger of the two directed 95th percentiles of surface distances. Both are as MONAI computes them.
A label that is empty in both is not counted. Empty in one: Dice 0 and NSD 0, counted; HD95 does not exist, not counted.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy import ndimage

from preprocessing import files
from preprocessing.volume import GeometryMismatch, ScanError, UnreadableScan, Volume

from .errors import UsageError
from .outputs.labels import FILE_NAME as LABELS_FILE
from .outputs.measurements import FILE_NAME as MEASUREMENTS_FILE
from .report import as_json, write_whole

logger = logging.getLogger(__name__)


class NothingToEvaluate(UsageError):
    """No prediction has a reference of the same case."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One label of one case. None: there is nothing to measure (see the conventions)."""

    case_id: str
    label: str
    dice: float | None
    nsd: float | None
    hd95_mm: float | None
    volume_ml: float
    reference_ml: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One label over all cases: means of what could be measured."""

    label: str
    cases: int
    """In which the label was in the prediction, in the reference, or in both."""
    dice: float | None
    nsd: float | None
    hd95_mm: float | None
    missed: int
    """Cases with a reference and no prediction of it: HD95 knows nothing of these."""
    invented: int
    """Cases with a prediction and no reference of it."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Every case that was compared, every one that could not be, and why."""

    tolerance_mm: float
    mean_dice: float | None
    """Mean over labels of their mean Dice: a rare label weighs as much as a common one."""
    summary: tuple[Summary, ...]
    scores: tuple[Score, ...]
    failed: dict[str, str]
    """Case to reason."""
    unmatched_predictions: tuple[str, ...]
    unmatched_references: tuple[str, ...]


def evaluate(
    predictions: Path,
    references: Path,
    out: Path | None = None,
    *,
    labels: Mapping[int, str] | None = None,
    tolerance_mm: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compares label maps case by case, matched by name; writes JSON to `out`.

    `predictions`: what `segment` wrote, or a folder of label files. `references`: a folder of label files, or a dataset
    with `labelsTr` or `labels` in it. `labels`: value to name; else as the dataset or the package says, else the value.
    `progress` is told cases done and cases in all.
    """
    predicted, given = _predictions(predictions), _references(references)
    matched = _matched(predicted, given)
    if not matched:
        raise NothingToEvaluate(
            f"{predictions} holds {_some(predicted)}, {references} holds {_some(given)}; no case is in both. "
            "A reference must be named like its case: give the matching folders."
        )
    names = dict(labels) if labels is not None else _names(references, predictions)
    scores: list[Score] = []
    failed: dict[str, str] = {}
    for done, (case_id, reference_id) in enumerate(matched.items()):
        if progress:
            progress(done, len(matched))
        try:
            scores += compare(
                files.read(predicted[case_id]), files.read(given[reference_id]), case_id, names, tolerance_mm
            )
        except (ScanError, OSError) as reason:
            failed[case_id] = str(reason)
            logger.warning("%s could not be compared: %s", case_id, reason)
    if progress:
        progress(len(matched), len(matched))
    evaluation = _evaluation(scores, failed, names, tolerance_mm, predicted, given, matched)
    if out is not None:
        write(evaluation, out)
    return evaluation


def compare(
    prediction: Volume, reference: Volume, case_id: str, names: Mapping[int, str], tolerance_mm: float
) -> list[Score]:
    """Every label that has a name or a voxel, lowest value first; refused unless both lie on one grid."""
    if not prediction.geometry.matches(reference.geometry):
        raise GeometryMismatch(
            f"{case_id}: the prediction lies on {prediction.geometry}, the reference on {reference.geometry}. "
            "Both must share one grid: segment the very image the reference was drawn on."
        )
    predicted, given = _values(prediction, case_id, "prediction"), _values(reference, case_id, "reference")
    # unnamed values count too: a reference with a label the package does not know was missed, not absent
    values = sorted(({*np.unique(predicted).tolist(), *np.unique(given).tolist()} | set(names)) - {0})
    geometry = prediction.geometry
    scores = []
    for value in values:
        mask, truth = predicted == value, given == value
        overlap, nsd, hd95 = agreement(mask, truth, geometry.spacing, tolerance_mm)
        scores.append(
            Score(
                case_id=case_id,
                label=names.get(value, str(value)),
                dice=overlap,
                nsd=nsd,
                hd95_mm=hd95,
                volume_ml=int(mask.sum()) * geometry.voxel_ml,
                reference_ml=int(truth.sum()) * geometry.voxel_ml,
            )
        )
    return scores


def agreement(
    mask: Bool[np.ndarray, "i j k"],
    truth: Bool[np.ndarray, "i j k"],
    spacing: tuple[float, float, float],
    tolerance_mm: float,
) -> tuple[float | None, float | None, float | None]:
    """Dice, NSD and HD95 of one label; see the conventions at the top."""
    box = _bounding_box(mask | truth)
    if box is None:
        return None, None, None
    mask, truth = mask[box], truth[box]  # surfaces and distances within the box are those of the whole image
    if not (mask.any() and truth.any()):
        return 0.0, 0.0, None
    to_truth, to_mask = surface_distances(mask, truth, spacing)
    near = int((to_truth <= tolerance_mm).sum()) + int((to_mask <= tolerance_mm).sum())
    hd95 = max(float(np.percentile(to_truth, 95)), float(np.percentile(to_mask, 95)))
    return dice(mask, truth), near / (len(to_truth) + len(to_mask)), hd95


def dice(mask: Bool[np.ndarray, "i j k"], truth: Bool[np.ndarray, "i j k"]) -> float | None:
    """Twice the overlap over the sum of both; None where both are empty."""
    total = int(mask.sum()) + int(truth.sum())
    return 2 * int((mask & truth).sum()) / total if total else None


def surface_distances(
    mask: Bool[np.ndarray, "i j k"], truth: Bool[np.ndarray, "i j k"], spacing: tuple[float, float, float]
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " n"]]:
    """Millimetres from each surface voxel of either to the nearest surface voxel of the other."""
    surface, true_surface = _surface(mask), _surface(truth)
    to_truth = ndimage.distance_transform_edt(~true_surface, sampling=spacing)[surface]
    to_mask = ndimage.distance_transform_edt(~surface, sampling=spacing)[true_surface]
    return to_truth, to_mask


def write(evaluation: Evaluation, out: Path) -> Path:
    """The evaluation as JSON, with the conventions inside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, as_json(_document(evaluation)))
    return out


def _surface(mask: Bool[np.ndarray, "i j k"]) -> Bool[np.ndarray, "i j k"]:
    return mask & ~ndimage.binary_erosion(mask)  # faces only; beyond the image counts as outside


def _bounding_box(mask: Bool[np.ndarray, "i j k"]) -> tuple[slice, slice, slice] | None:
    if not mask.any():
        return None
    along = [np.nonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))[0] for axis in range(3)]
    i, j, k = (slice(int(inside[0]), int(inside[-1]) + 1) for inside in along)
    return i, j, k


def _values(volume: Volume, case_id: str, which: str) -> Integer[np.ndarray, "i j k"]:
    """Whole numbers, whatever type they were stored in."""
    voxels = volume.voxels
    if voxels.shape[0] != 1 or not np.isfinite(voxels).all() or (voxels != np.rint(voxels)).any() or (voxels < 0).any():
        raise UnreadableScan(
            f"{case_id}: the {which} has {voxels.shape[0]} channel(s) of values from {voxels.min()} to {voxels.max()}; "
            "one channel of whole numbers from 0 is needed. Give a label map, not a scan or probabilities."
        )
    return voxels[0].astype(np.int32)


def _predictions(folder: Path) -> dict[str, Path]:
    _must_be_folder(folder)
    of_segment = {path.parent.name: path for path in sorted(folder.glob(f"*/{LABELS_FILE}"))}
    return of_segment or _label_files(folder)


def _references(folder: Path) -> dict[str, Path]:
    _must_be_folder(folder)
    return _label_files(_label_folder(folder))


def _label_folder(folder: Path) -> Path:
    return next((folder / name for name in ("labelsTr", "labels") if (folder / name).is_dir()), folder)


def _must_be_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; a folder of label files is needed. Look at the path.")


def _label_files(folder: Path) -> dict[str, Path]:
    found = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    return {files.stem(path): path for path in found if path.name.lower().endswith(files.EXTENSIONS)}


def _matched(predicted: Mapping[str, Path], given: Mapping[str, Path]) -> dict[str, str]:
    """Case to reference. nnU-Net names a scan case_0000 and its labels case."""
    pairs = ((case, case if case in given else case.removesuffix("_0000")) for case in predicted)
    return {case: reference for case, reference in pairs if reference in given}


def _names(references: Path, predictions: Path) -> dict[int, str]:
    """As the dataset says; else as the package that predicted says; else nothing has a name."""
    for home in (references, references.parent):
        if (home / "dataset.json").is_file():
            return _names_of_dataset(home / "dataset.json")
    for path in sorted(predictions.glob(f"*/{MEASUREMENTS_FILE}")):
        said = _json(path).get("labels", {})
        return {int(each["value"]): name for name, each in said.items()}
    return {}


def _names_of_dataset(path: Path) -> dict[int, str]:
    """MSD writes {"1": "liver"}, nnU-Net v2 {"liver": 1}; regions (lists of values) are no labels of their own."""
    named: dict[int, str] = {}
    for key, value in _json(path).get("labels", {}).items():
        if isinstance(value, str) and key.isdecimal():
            named[int(key)] = value
        elif isinstance(value, int) and key != "ignore":
            named[value] = key
    return {value: name for value, name in named.items() if value != 0}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as mistake:
        raise UsageError(f"{path} is no JSON ({mistake}); the names of labels are read from it. Mend it.") from mistake
    return content if isinstance(content, dict) else {}


def _some(cases: Mapping[str, Path]) -> str:
    if not cases:
        return "no label files"
    first = ", ".join(list(cases)[:3])
    return f"{len(cases)} case(s) ({first}{', ...' if len(cases) > 3 else ''})"


def _evaluation(
    scores: Sequence[Score],
    failed: dict[str, str],
    names: Mapping[int, str],
    tolerance_mm: float,
    predicted: Mapping[str, Path],
    given: Mapping[str, Path],
    matched: Mapping[str, str],
) -> Evaluation:
    labels = dict.fromkeys([*(names[value] for value in sorted(names) if value != 0), *(s.label for s in scores)])
    summary = tuple(_summary(label, [score for score in scores if score.label == label]) for label in labels)
    return Evaluation(
        tolerance_mm=tolerance_mm,
        mean_dice=_mean([each.dice for each in summary]),
        summary=summary,
        scores=tuple(scores),
        failed=failed,
        unmatched_predictions=tuple(case for case in predicted if case not in matched),
        unmatched_references=tuple(case for case in given if case not in set(matched.values())),
    )


def _summary(label: str, scores: Sequence[Score]) -> Summary:
    return Summary(
        label=label,
        cases=sum(score.dice is not None for score in scores),
        dice=_mean([score.dice for score in scores]),
        nsd=_mean([score.nsd for score in scores]),
        hd95_mm=_mean([score.hd95_mm for score in scores]),
        missed=sum(score.volume_ml == 0 < score.reference_ml for score in scores),
        invented=sum(score.reference_ml == 0 < score.volume_ml for score in scores),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _document(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "conventions": {
            "surface": "voxels of the label with a face towards another label or out of the image, at their centres",
            "nsd": "share of both surfaces' voxels within tolerance_mm of the other surface",
            "hd95_mm": "larger of the two directed 95th percentiles of surface distances",
            "empty in both": "null, not counted in any mean",
            "empty in one": "Dice 0 and NSD 0, counted; HD95 null, not counted (see missed, invented)",
            "mean_dice": "mean over labels of their mean Dice",
        },
        "tolerance_mm": evaluation.tolerance_mm,
        "mean_dice": evaluation.mean_dice,
        "summary": {each.label: {k: v for k, v in asdict(each).items() if k != "label"} for each in evaluation.summary},
        "cases": _by_case(evaluation.scores),
        "failed": evaluation.failed,
        "unmatched_predictions": list(evaluation.unmatched_predictions),
        "unmatched_references": list(evaluation.unmatched_references),
    }


def _by_case(scores: Sequence[Score]) -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    for score in scores:
        measured = {k: v for k, v in asdict(score).items() if k not in ("case_id", "label")}
        cases.setdefault(score.case_id, {})[score.label] = measured
    return cases


def table(evaluation: Evaluation) -> str:
    """The summary as a person reads it."""
    lines = [f"{'label':<20} {'cases':>5} {'Dice':>6} {'NSD':>6} {'HD95 mm':>8} {'missed':>6} {'invented':>8}"]
    for one in evaluation.summary:
        figures = f"{_figure(one.dice, 3):>6} {_figure(one.nsd, 3):>6} {_figure(one.hd95_mm, 2):>8}"
        lines.append(f"{one.label:<20} {one.cases:>5} {figures} {one.missed:>6} {one.invented:>8}")
    lines.append(f"mean Dice {_figure(evaluation.mean_dice, 3)}; NSD at {evaluation.tolerance_mm:g} mm")
    return "\n".join(lines)


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
