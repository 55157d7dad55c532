"""Predictions and the references they are measured by: which belongs to which, what labels are called, where images lie."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from preprocessing import files
from preprocessing.datasets import is_dataset, open_dataset
from preprocessing.declared import Declared, declared
from preprocessing.dicom import is_dicom
from preprocessing.dicom import labels as dicom_labels
from preprocessing.volume import Geometry, GeometryMismatch, ScanError, UnreadableScan, Volume

from .errors import UsageError
from .outputs.labels import FILE_NAME as LABELS_FILE
from .outputs.labels import NRRD_FILE_NAME as NRRD_FILE
from .outputs.measurements import FILE_NAME as MEASUREMENTS_FILE
from .report import FILE_NAME as REPORT_FILE

MOST = 65535
"""The highest value of a label."""


class NothingToEvaluate(UsageError):
    """No prediction has a reference of the same case."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """How references are to be read."""

    labels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name to value; to several values, where the label is a region and may overlap others."""
    ignored: int | None = None
    """The value in references under which nobody knows the truth."""
    annotated: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Case to the labels that were looked for in it; a case that is not here was looked through for all of them."""
    images: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    """The scans that references were drawn on, where the dataset has them."""

    def of(self, case: str) -> dict[str, tuple[int, ...]]:
        """The labels by which a case may be measured."""
        looked_for = self.annotated.get(case)
        return self.labels if looked_for is None else {n: v for n, v in self.labels.items() if n in looked_for}


@dataclass(frozen=True, kw_only=True)
class Matched:
    """Files on both sides, and which case of one is which of the other."""

    predictions: dict[str, Path]
    references: dict[str, Path]
    pairs: dict[str, str]
    """Prediction's name to reference's name."""

    @property
    def unmatched_predictions(self) -> tuple[str, ...]:
        return tuple(case for case in self.predictions if case not in self.pairs)

    @property
    def unmatched_references(self) -> tuple[str, ...]:
        return tuple(case for case in self.references if case not in set(self.pairs.values()))


def match(predictions: Path, references: Path) -> Matched:
    """By name; refused where no name is on both sides. nnU-Net names a scan case_0000 and its labels case."""
    predicted, given = _predictions(predictions), _references(references)
    named = ((case, case if case in given else case.removesuffix("_0000")) for case in predicted)
    pairs = {case: reference for case, reference in named if reference in given}
    if not pairs:
        raise NothingToEvaluate(
            f"{predictions} holds {_some(predicted)}, {references} holds {_some(given)}; no case is in both. "
            "A reference must be named like its case: give the matching folders."
        )
    return Matched(predictions=predicted, references=given, pairs=pairs)


def read_key(references: Path, predictions: Path) -> Key:
    """As the dataset says; else as the package that predicted, or a DICOM file, says; else nothing has a name."""
    homes = (references, references.resolve().parent)
    images = next((found for home in homes if (found := _images(home))), {})
    for home in homes:
        if (said := declared(home)).labels:
            return replace(_key_of_dataset(said), images=images)
    return Key(labels=_labels_said(references, predictions), images=images)


def _labels_said(references: Path, predictions: Path) -> dict[str, tuple[int, ...]]:
    for path in sorted(predictions.glob(f"*/{MEASUREMENTS_FILE}")):
        return {name: (int(each["value"]),) for name, each in _json(path).get("labels", {}).items()}
    for path in (*_references(references).values(), *_predictions(predictions).values()):
        if dicom_labels.is_labels(path):
            return {name: (number,) for name, number in dicom_labels.names_in(path).items()}
    return {}


def _images(home: Path) -> dict[str, tuple[Path, ...]]:
    try:
        return {one.id: one.images for one in open_dataset(home).cases if one.images} if is_dataset(home) else {}
    except ScanError:  # labels without images, or names that do not fit, can be measured all the same
        return {}


@dataclass(frozen=True, kw_only=True, eq=False)
class Maps:
    """A prediction and its reference on one grid."""

    predicted: Integer[np.ndarray, "i j k"]
    given: Integer[np.ndarray, "i j k"]
    geometry: Geometry


def read_maps(case_id: str, prediction: Path, reference: Path, key: Key) -> Maps:
    """Both label maps; what nobody knows is background in both. DICOM SEG and RTSTRUCT are put on the other's grid."""
    names = {name: values[0] for name, values in key.labels.items() if len(values) == 1}
    drawn = [dicom_labels.is_labels(path) for path in (prediction, reference)]
    if all(drawn):
        onto = read_image(case_id, None, key)
        if onto is None:
            raise ScanError(
                f"{case_id}: prediction and reference are both DICOM objects, which lie on the grid of a scan; that scan was "
                "not found. Give one of them as NIfTI, or the references as a dataset with its images.",
                "grids_differ",
            )
        both = [dicom_labels.read_labels(path, onto, names) for path in (prediction, reference)]
    elif any(drawn):
        grid = files.read(reference if drawn[0] else prediction, is_labels=True)
        other = dicom_labels.read_labels(prediction if drawn[0] else reference, grid, names)
        both = [other, grid] if drawn[0] else [grid, other]
    else:
        both = [files.read(path, is_labels=True) for path in (prediction, reference)]
    return _on_one_grid(case_id, both[0], both[1], key.ignored)


def _on_one_grid(case_id: str, prediction: Volume, reference: Volume, ignored: int | None) -> Maps:
    if not prediction.geometry.matches(reference.geometry):
        raise GeometryMismatch(
            f"{case_id}: the prediction lies on {prediction.geometry}, the reference on {reference.geometry}. "
            "Both must share one grid: segment the very image the reference was drawn on."
        )
    predicted, given = _values(prediction, case_id, "prediction"), _values(reference, case_id, "reference")
    if ignored is not None and (unknown := given == ignored).any():
        predicted, given = (np.where(unknown, 0, each).astype(each.dtype) for each in (predicted, given))
    return Maps(predicted=predicted, given=given, geometry=prediction.geometry)


def read_image(case_id: str, prediction: Path | None, key: Key) -> Volume | None:
    """The scan a case was drawn on: from the dataset of the references, or where the report of `segment` says it lay."""
    known = key.images.get(case_id) or key.images.get(case_id.removesuffix("_0000"), ())
    for path in (*known[:1], *_sources(prediction)[:1]):
        try:
            return files.read(path)
        except (ScanError, OSError):  # a picture without its scan is better than none
            continue
    return None


def _sources(prediction: Path | None) -> tuple[Path, ...]:
    report = prediction.parent / REPORT_FILE if prediction else None
    if report is None or not report.is_file():
        return ()
    return tuple(path for path in map(Path, _json(report).get("sources", ())) if path.exists())


def _values(volume: Volume, case_id: str, which: str) -> Integer[np.ndarray, "i j k"]:
    """Whole numbers, in the smallest type that holds them: there are many voxels."""
    voxels = volume.voxels
    least, most = float(voxels.min()), float(voxels.max())
    whole = voxels.dtype.kind in "iub" or bool((np.isfinite(voxels) & (voxels == np.rint(voxels))).all())
    if voxels.shape[0] != 1 or not whole or least < 0 or most > MOST:
        raise UnreadableScan(
            f"{case_id}: the {which} has {voxels.shape[0]} channel(s) of values from {least:g} to {most:g}; "
            f"one channel of whole numbers from 0 to {MOST} is needed. Give a label map, not a scan or probabilities."
        )
    return voxels[0].astype(np.uint8 if most < 256 else np.uint16, copy=False)


def _predictions(folder: Path) -> dict[str, Path]:
    _must_be_folder(folder)
    # importing what writes the DICOM ones would import highdicom
    for name in (LABELS_FILE, NRRD_FILE, "labels.dcm", "labels-labelmap.dcm", "contours.dcm"):
        if of_segment := {path.parent.name: path for path in sorted(folder.glob(f"*/{name}"))}:
            return of_segment
    return _label_files(folder)


def _references(folder: Path) -> dict[str, Path]:
    _must_be_folder(folder)
    return _label_files(next((folder / name for name in ("labelsTr", "labels") if (folder / name).is_dir()), folder))


def _must_be_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; a folder of label files is needed. Look at the path.")


def _label_files(folder: Path) -> dict[str, Path]:
    """Scans by their endings, DICOM objects by their content; each alone, or in a folder called as the case."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        inside = [one for one in sorted(path.iterdir()) if not one.name.startswith(".")] if path.is_dir() else [path]
        if len(inside) == 1 and (inside[0].name.lower().endswith(files.EXTENSIONS) or _is_drawn(inside[0])):
            found[path.name if path.is_dir() else files.stem(path).removesuffix(".dcm")] = inside[0]
    return found


def _is_drawn(path: Path) -> bool:
    return path.is_file() and is_dicom(path) and dicom_labels.is_labels(path)


def _key_of_dataset(said: Declared) -> Key:
    """A region is its parts, and what the regions inside it are painted with where that is a number of its own."""
    parts = {label.name: label.parts or (label.value,) for label in said.labels}
    known = {value for own in parts.values() for value in own}
    painted = {
        name: tuple(each.value for each in said.labels if each.value not in known and set(parts[each.name]) <= set(own))
        for name, own in parts.items()
    }
    return Key(
        labels={name: own + painted[name] for name, own in parts.items()},
        ignored=said.ignored,
        annotated=said.annotated,
    )


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
