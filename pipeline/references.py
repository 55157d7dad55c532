"""Predictions and the references they are measured by: which belongs to which, what labels are called, where images lie."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from preprocessing import datasets, files
from preprocessing.datasets import CaseFiles, Dataset, Finding, is_dataset, label_table, open_dataset
from preprocessing.declared import Declared, declared
from preprocessing.dicom import is_dicom
from preprocessing.dicom import labels as dicom_labels
from preprocessing.plan import Label
from preprocessing.reading import STRICT, Reading
from preprocessing.regions import values_of
from preprocessing.volume import Geometry, GeometryMismatch, ScanError, Volume

from .errors import UsageError
from .outputs.labels import FILE_NAME as LABELS_FILE
from .outputs.labels import NRRD_FILE_NAME as NRRD_FILE
from .outputs.measurements import FILE_NAME as MEASUREMENTS_FILE
from .report import FILE_NAME as REPORT_FILE

# importing what writes the DICOM ones would import highdicom
WRITTEN = (LABELS_FILE, NRRD_FILE, "labels.dcm", "labels-labelmap.dcm", "contours.dcm")
"""Label maps as `segment` writes them into the folder of a case; of several the first is taken."""


class NothingToEvaluate(UsageError):
    """No prediction has a reference of the same case."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """The references, and how they are to be read."""

    files: dict[str, Path] = field(default_factory=dict)
    """Case to its label map."""
    labels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name to value; to several values, where the label is a region and may overlap others."""
    ignored: int | None = None
    """The value in references under which nobody knows the truth."""
    annotated: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Case to the labels that were looked for in it; a case that is not here was looked through for all of them."""
    images: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    """The scans that references were drawn on, where the dataset has them."""
    reading: Reading = STRICT
    left_out: tuple[str, ...] = ()
    """What DICOM objects on either side hold and no label is called."""

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


def match(predictions: Path, key: Key) -> Matched:
    """By name; refused where no name is on both sides. nnU-Net names a scan case_0000 and its labels case."""
    predicted = _label_maps(predictions)
    named = {case: case if case in key.files else case.removesuffix("_0000") for case in predicted}
    pairs = {
        case: reference
        for case, reference in named.items()
        if reference in key.files and (case == reference or reference not in predicted)
    }
    if not pairs:
        raise NothingToEvaluate(
            f"{predictions} holds {_some(predicted)}, the references are {_some(key.files)}; no case is in both. "
            "A reference must be named like its case: give the matching folders."
        )
    return Matched(predictions=predicted, references=key.files, pairs=pairs)


def read_key(
    references: Path, predictions: Path, reading: Reading = STRICT, names: Mapping[int, str] | None = None
) -> Key:
    """Labels are called as `names` (value to name) says; else as the dataset, else as the package that predicted, else as
    DICOM files say; else nothing has a name."""
    told = next((said for home in _homes(references) if (said := declared(home)).labels), Declared())
    dataset = _dataset(references, told, reading)
    drawn = [one.labels for one in dataset.cases], list(_label_maps(predictions).values())
    called = label_table({name: value for value, name in (names or {}).items()}) or told.labels
    labels = called or _of_package(predictions) or datasets.named_in(drawn[0]) or datasets.named_in(drawn[1])
    named = replace(dataset, labels=labels)
    _refuse(datasets.looked_for_in_vain(named))
    return replace(_key(named), left_out=_left_out(labels, [*drawn[0], *drawn[1]]))


def _homes(references: Path) -> tuple[Path, ...]:
    """Where a dataset.json may lie."""
    above = references.resolve().parent
    return (above,) if references.is_file() else (references, above)


def _dataset(references: Path, told: Declared, reading: Reading) -> Dataset:
    """References as labelled cases, whether or not their scans are there."""
    if references.is_file() and is_dataset(references):
        dataset = open_dataset(references, reading)
        _refuse(datasets.bad_ids([one.id for one in dataset.cases]))
        return dataset
    _must_be_folder(references)
    folder = next((path for name in ("labelsTr", "labels") if (path := references / name).is_dir()), references)
    images = next((found for home in _homes(references) if (found := _images(home))), {})
    cases = (
        CaseFiles(id=case, images=images.get(case, ()), labels=path, annotated=told.annotated.get(case))
        for case, path in _label_maps(folder).items()
    )
    return Dataset(
        name=references.name, layout="label maps", channels=(), labels=(), ignored=told.ignored, cases=tuple(cases),
        findings=(), reading=reading,
    )  # fmt: skip


def _images(home: Path) -> dict[str, tuple[Path, ...]]:
    try:
        return {one.id: one.images for one in open_dataset(home).cases if one.images} if is_dataset(home) else {}
    except ScanError:  # labels without images, or names that do not fit, can be measured all the same
        return {}


def _of_package(predictions: Path) -> tuple[Label, ...]:
    for path in sorted(predictions.glob(f"[!.]*/{MEASUREMENTS_FILE}")):
        return label_table({name: int(each["value"]) for name, each in _json(path).get("labels", {}).items()})
    return ()


def _key(dataset: Dataset) -> Key:
    """A region is its parts, and what it and the regions inside it are painted with."""
    painted = values_of(dataset.labels)
    return Key(
        files={one.id: one.labels for one in dataset.cases if one.labels},
        labels={each.name: tuple(dict.fromkeys((*each.parts, *painted[each.name]))) for each in dataset.labels},
        ignored=dataset.ignored,
        annotated={one.id: one.annotated for one in dataset.cases if one.annotated is not None},
        images={one.id: one.images for one in dataset.cases if one.images},
        reading=dataset.reading,
    )


def _left_out(labels: Iterable[Label], paths: Iterable[Path | None]) -> tuple[str, ...]:
    wanted = {dicom_labels.plain(label.name) for label in labels}
    drawn = {name for path in paths for name in datasets.names_in(path)}
    return tuple(sorted(name for name in drawn if wanted and dicom_labels.plain(name) not in wanted))


def _refuse(findings: Iterable[Finding]) -> None:
    for first in findings:
        raise UsageError(str(first))


@dataclass(frozen=True, kw_only=True, eq=False)
class Maps:
    """A prediction and its reference on one grid."""

    predicted: Integer[np.ndarray, "i j k"]
    given: Integer[np.ndarray, "i j k"]
    geometry: Geometry


def read_maps(case_id: str, matched: Matched, key: Key) -> Maps:
    """Both label maps; what nobody knows is background in both. DICOM SEG and RTSTRUCT are put on the other's grid."""
    reference_id = matched.pairs[case_id]
    prediction, reference = matched.predictions[case_id], matched.references[reference_id]
    paths = [datasets.label_file(path) for path in (prediction, reference)]
    maps = [None if dicom_labels.is_labels(path) else datasets.read_map(path, key.reading) for path in paths]
    onto = next((each for each in maps if each is not None), None) or read_image(reference_id, prediction, key)
    if onto is None:
        raise ScanError(
            f"{case_id}: prediction and reference are both DICOM objects, which lie on the grid of a scan; that scan was "
            "not found. Give one of them as NIfTI, or the references as a dataset with its images.",
            "grids_differ",
        )
    predicted, given = (
        dicom_labels.read_labels(path, onto, _numbers(case_id, key)) if each is None else each
        for path, each in zip(paths, maps, strict=True)
    )
    return _on_one_grid(case_id, predicted, given, key.ignored)


def _numbers(case_id: str, key: Key) -> dict[str, int]:
    """What the segments of a DICOM object are painted with."""
    for name, values in key.labels.items():
        if len(values) > 1:
            raise ScanError(
                f"{case_id}: {name} is a region of {len(values)} values, and a DICOM object has one segment of it; label maps "
                "are needed where labels are regions. Give both sides as NIfTI or NRRD.",
                "unsupported",
            )
    return {name: values[0] for name, values in key.labels.items()}


def _on_one_grid(case_id: str, prediction: Volume, reference: Volume, ignored: int | None) -> Maps:
    if not prediction.geometry.matches(reference.geometry):
        raise GeometryMismatch(
            f"{case_id}: the prediction lies on {prediction.geometry}, the reference on {reference.geometry}. "
            "Both must share one grid: segment the very image the reference was drawn on."
        )
    predicted, given = prediction.voxels[0], reference.voxels[0]
    if ignored is not None and (unknown := given == ignored).any():
        predicted, given = (np.where(unknown, 0, each).astype(each.dtype) for each in (predicted, given))
    return Maps(predicted=predicted, given=given, geometry=prediction.geometry)


def read_image(reference_id: str, prediction: Path, key: Key) -> Volume | None:
    """The scan a case was drawn on: from the dataset of the references, or where the report of `segment` says it lay."""
    for path in (*key.images.get(reference_id, ())[:1], *_sources(prediction)[:1]):
        try:
            return files.read(path, key.reading)
        except (ScanError, OSError):  # a picture without its scan is better than none
            continue
    return None


def _sources(prediction: Path) -> tuple[Path, ...]:
    try:
        said = _json(prediction.parent / REPORT_FILE).get("sources", ())
    except (UsageError, OSError):  # torn, or none
        return ()
    return tuple(path for path in map(Path, said) if path.exists())


def _label_maps(folder: Path) -> dict[str, Path]:
    """Case to its label map: what `segment` wrote, else a file or folder called as the case; what is hidden is not looked at."""
    _must_be_folder(folder)
    found = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and _holds_labels(path)]
    _refuse(datasets.stored_twice(found))
    written = {path.parent.name: path for name in reversed(WRITTEN) for path in folder.glob(f"[!.]*/{name}")}
    return dict(sorted(({datasets.case_name(path): path for path in found} | written).items()))


def _holds_labels(path: Path) -> bool:
    """A scan by its ending, a DICOM object by its content; a folder by what lies in it."""
    if path.is_dir():
        return any(_holds_labels(one) for one in path.iterdir() if one.is_file() and not one.name.startswith("."))
    return path.name.lower().endswith(files.EXTENSIONS) or is_dicom(path)


def _must_be_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; a folder of label files, or a dataset, is needed. Look at the path.")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as mistake:
        raise UsageError(
            f"{path} is no JSON ({mistake}); what `hilum segment` wrote is needed. Segment again."
        ) from mistake
    return content if isinstance(content, dict) else {}


def _some(cases: Mapping[str, Path]) -> str:
    if not cases:
        return "no label files"
    first = ", ".join(list(cases)[:3])
    return f"{len(cases)} case(s) ({first}{', ...' if len(cases) > 3 else ''})"
