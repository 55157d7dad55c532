"""Datasets on disk to Cases: Decathlon, nnU-Net, images/ + labels/, CSV; and what is wrong with them."""

import csv
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .codes import meaning_of
from .dicom import is_dicom
from .dicom import labels as dicom_labels
from .files import EXTENSIONS, read, stem
from .plan import CaseFacts, Fingerprint, Label
from .reading import STRICT, Reading
from .records import nearest
from .steps import Orient, nonzero_box
from .verdict import Verdict
from .volume import Case, ScanError, Volume, stack

logger = logging.getLogger(__name__)

# Okabe & Ito (2008): told apart by every common kind of colour vision; yellow last, it drowns on bright bone
PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (213, 94, 0), (204, 121, 167), (0, 114, 178), (240, 228, 66))


class DatasetError(ScanError):
    """A folder is no dataset, or cases in it do not fit."""


@dataclass(frozen=True, kw_only=True)
class CaseFiles:
    """Where one case lies."""

    id: str
    images: tuple[Path, ...]
    """One file of all channels, or one file (or DICOM series folder) per channel, in the dataset's order."""
    labels: Path | None
    annotated: tuple[str, ...] | None = None
    """Names of the labels that were looked for in this case; None: all of them. Others may be there unpainted."""
    patient: str = ""
    """Cases of one patient are never divided between training and validation; empty: a patient of its own."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong: what was met, and what to do."""

    case: str
    problem: str
    reason: str = "contradiction"
    """One of the keys of volume.REASONS; most of what is wrong with a dataset is that its parts disagree."""

    def __str__(self) -> str:
        return f"{self.case}: {self.problem}"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Labelled cases with names for channels and labels. Opening reads descriptions and names, not voxels."""

    name: str
    layout: str
    channels: tuple[str, ...]
    labels: tuple[Label, ...]
    cases: tuple[CaseFiles, ...]
    findings: tuple[Finding, ...]
    """What was wrong before any voxel was read: missing twins, names used twice."""
    reading: Reading = STRICT
    """What is allowed when its scans are read."""

    def read(self, files: CaseFiles) -> Case:
        """The case as a value, on one grid, its channels named."""
        volumes = [read(path, self.reading) for path in files.images]
        image = volumes[0] if len(volumes) == 1 else stack(volumes, self.channels, self.reading.match)
        image = image.with_channels(self.channels)
        names = {label.name: label.value for label in self.labels}
        labels = read_labels(files.labels, image, names, self.reading) if files.labels else None
        return Case(id=files.id, image=image, labels=labels)


def open_dataset(path: Path, reading: Reading = STRICT) -> Dataset:
    """The dataset at that folder or CSV, whatever its layout; refused when it is none."""
    return _named_by_dicom(replace(_opened(path), reading=reading))


def _opened(path: Path) -> Dataset:
    if not path.exists():
        raise DatasetError(f"{path} does not exist; a dataset's folder or CSV is needed. Look at the spelling.")
    if path.is_file():
        return _open_csv(path)
    if (path / "imagesTr").is_dir() or (path / "labelsTr").is_dir():
        return _open_folders(path, path / "imagesTr", path / "labelsTr", "Decathlon / nnU-Net")
    if (path / "images").is_dir() or (path / "labels").is_dir():
        return _open_folders(path, path / "images", path / "labels", "images + labels")
    raise DatasetError(
        f"{path.name} holds neither imagesTr + labelsTr nor images + labels; one of these, or a CSV file with the columns "
        "id, one per channel, labels, is needed. README shows each layout."
    )


def is_dataset(path: Path) -> bool:
    """Whether that is laid out as a dataset; any other file or folder is just scans."""
    if path.is_file():
        return path.suffix.lower() == ".csv"
    if any((path / name).exists() for name in ("imagesTr", "labelsTr", "dataset.json")):
        return True
    return (path / "images").is_dir() and (path / "labels").is_dir()


def read_labels(path: Path, image: Volume, names: dict[str, int], reading: Reading = STRICT) -> Volume:
    """A label map as integers: a DICOM SEG or RTSTRUCT on its image's grid, its segments known by name; or a file of
    numbers as it is, refused when they are no labels, or when it has several channels."""
    path = _label_file(path)
    if dicom_labels.is_labels(path):
        return dicom_labels.read_labels(path, image, names)
    volume = read(path, reading, is_labels=True)
    if len(volume.channels) != 1:
        raise ScanError(
            f"{path.name} has {len(volume.channels)} channels; a label map has one. Save one number per voxel."
        )
    whole = np.round(volume.voxels)
    if whole.min() < 0 or whole.max() > 65535 or np.abs(volume.voxels - whole).max() > 1e-3:
        raise ScanError(
            f"{path.name} holds values that are no labels ({volume.voxels.min():g} to {volume.voxels.max():g}, "
            "not all whole); whole numbers from 0 up are needed. Export it as a label map, unscaled and uninterpolated."
        )
    return volume.with_voxels(whole.astype(np.uint8 if whole.max() < 256 else np.uint16), channels=("labels",))


def _label_file(path: Path) -> Path:
    """The labels of a case may lie in a folder of their own, as archives export them."""
    if not path.is_dir():
        return path
    inside = [one for one in sorted(path.iterdir()) if not one.name.startswith(".")]
    found = [one for one in inside if one.is_file() and (dicom_labels.is_labels(one) or one.name.endswith(EXTENSIONS))]
    if len(found) == 1:
        return found[0]
    if not found and inside and is_dicom(inside[0]):
        return path  # a series whose pixels are the labels
    raise ScanError(
        f"the folder {path.name} holds {len(found)} label files; exactly one is needed. Give one per case.",
        "mixed" if found else "no_scan",
    )


def _named_by_dicom(dataset: Dataset) -> Dataset:
    """Where nobody declared labels, the names inside DICOM label files; with their own numbers if all files agree."""
    if dataset.labels:
        return dataset
    numbers: dict[str, set[int]] = {}
    for files in dataset.cases:
        for name, number in _names_in(files.labels).items():
            numbers.setdefault(name, set()).add(number)
    if not numbers:
        return dataset
    known = {plain: name for name in sorted(numbers, reverse=True) if (plain := dicom_labels.plain(name))}
    agreed = [next(iter(found)) for found in numbers.values() if len(found) == 1]
    if len(set(agreed)) == len(numbers) == len(known):
        return replace(dataset, labels=label_table({name: min(found) for name, found in numbers.items()}))
    return replace(dataset, labels=label_table({name: n for n, name in enumerate(sorted(known.values()), start=1)}))


def _names_in(path: Path | None) -> dict[str, int]:
    try:
        return dicom_labels.names_in(_label_file(path)) if path else {}
    except ScanError:  # told when the case is read
        return {}


def check(dataset: Dataset, progress: Callable[[int, int], None] = lambda done, of: None) -> tuple[Finding, ...]:
    """Everything that does not fit, case by case, to the end; nothing when all is well."""
    return examine(dataset, progress).findings


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What a look at every case found."""

    findings: tuple[Finding, ...]
    verdicts: dict[str, Verdict]
    """Per case, by its id; a case with a finding is refused."""
    absent: tuple[str, ...] = ()
    """Labels that are declared and occur in no case; a name is spelt differently, or a case is missing."""


def examine(dataset: Dataset, progress: Callable[[int, int], None] = lambda done, of: None) -> Examination:
    """Every case, read to the end: what does not fit, and the one word for each."""
    findings, examined = _examine_all(dataset, progress)
    verdicts = {files.id: _unread(files) for files in dataset.cases} | {one.id: one.verdict for one in examined}
    wrong: dict[str, list[Finding]] = {}
    for finding in findings:
        wrong.setdefault(finding.case, []).append(finding)
    for case, those in wrong.items():
        seen = verdicts.get(case, Verdict(word="fine"))
        verdicts[case] = seen.refused(" ".join(finding.problem for finding in those), those[0].reason)
    verdicts = dict(sorted(verdicts.items()))
    return Examination(findings=findings, verdicts=verdicts, absent=() if findings else _absent(dataset, examined))


def _absent(dataset: Dataset, examined: Sequence["_Examined"]) -> tuple[str, ...]:
    seen = {value for one in examined for value in one.values}
    return tuple(label.name for label in dataset.labels if label.value not in seen)


def _unread(files: CaseFiles) -> Verdict:
    return Verdict(word="fine", files=tuple(str(path) for path in (*files.images, files.labels) if path))


def take_fingerprint(dataset: Dataset, progress: Callable[[int, int], None] = lambda done, of: None) -> Fingerprint:
    """What the dataset is, from one pass over it; refused while cases in it do not fit."""
    findings, examined = _examine_all(dataset, progress)
    if findings:
        raise DatasetError(
            f"{len({f.case for f in findings})} case(s) of {dataset.name} do not fit, the first: {findings[0]} "
            "All must fit before a plan is made of them. `hilum check` names every one: mend or remove them."
        )
    labels = dataset.labels or _found_labels(examined)
    if absent := _absent(dataset, examined):
        logger.warning("no case has a voxel of %s, which the dataset declares; nothing can learn it", ", ".join(absent))
    repaired = sum(one.verdict.word == "repaired" for one in examined)
    if repaired:
        logger.warning("%d of %d cases were repaired; `hilum check` tells what was done", repaired, len(examined))
    bytes_read = "".join(f"{one.id}{one.sha256}" for one in examined)
    how = "" if dataset.reading == STRICT else repr(dataset.reading)  # the same bytes read otherwise are other voxels
    digest = hashlib.sha256((bytes_read + how).encode()).hexdigest()
    names = {label.value: label.name for label in labels}
    cases = {one.id: replace(one.facts, voxels={names[v]: n for v, n in one.values.items()}) for one in examined}
    return Fingerprint(name=dataset.name, channels=dataset.channels, labels=labels, cases=cases, dataset=digest)


@dataclass(frozen=True, kw_only=True)
class _Examined:
    id: str
    findings: tuple[Finding, ...]
    verdict: Verdict
    facts: CaseFacts
    values: dict[int, int]
    sha256: str
    image_sha256: str


def _examine_all(
    dataset: Dataset, progress: Callable[[int, int], None]
) -> tuple[tuple[Finding, ...], tuple[_Examined, ...]]:
    findings, examined = list(dataset.findings), []
    complete = [files for files in dataset.cases if files.labels and files.images]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # inflating gzip lets other threads run
        for done, one in enumerate(pool.map(lambda files: _examine(dataset, files), complete), start=1):
            findings += one.findings
            examined.append(one)
            progress(done, len(complete))
    findings += _twins(examined)
    if not complete and not findings:
        findings.append(Finding(case=dataset.name, problem="no labelled case was found; at least one is needed."))
    return tuple(findings), tuple(examined)


def _examine(dataset: Dataset, files: CaseFiles) -> _Examined:
    nothing = CaseFacts(shape=(1, 1, 1), spacing_mm=(1.0, 1.0, 1.0), kept=1.0, intensities=(), voxels={})
    try:
        case = dataset.read(files)
    except ScanError as error:
        return _Examined(
            id=files.id,
            findings=(Finding(case=files.id, problem=str(error), reason=error.reason),),
            verdict=_unread(files),
            facts=nothing,
            values={},
            sha256="",
            image_sha256="",
        )
    assert case.labels is not None
    values, counts = np.unique(case.labels.voxels, return_counts=True)
    found = {int(v): int(n) for v, n in zip(values, counts, strict=True) if v != 0}
    findings = [Finding(case=files.id, problem=problem) for problem in _undeclared(dataset, found)]
    findings += [Finding(case=files.id, problem=problem, reason="values") for problem in _constant(case)]
    return _Examined(
        id=files.id,
        findings=tuple(findings),
        verdict=_verdict(case),
        facts=_facts(case),
        values=found,
        sha256=case.image.provenance.sha256 + case.labels.provenance.sha256,
        image_sha256=case.image.provenance.sha256,
    )


def _verdict(case: Case) -> Verdict:
    """Of the image and its labels together: a repair of either is a repair of the case."""
    assert case.labels is not None
    image, labels = Verdict.of(case.image), Verdict.of(case.labels)
    return replace(
        image,
        word="repaired" if "repaired" in (image.word, labels.word) else "fine",
        repairs=(*image.repairs, *(f"labels: {repair}" for repair in labels.repairs)),
        notes=(*image.notes, *(f"labels: {note}" for note in labels.notes)),
        files=(*image.files, *labels.files),
    )


def _undeclared(dataset: Dataset, found: dict[int, int]) -> Iterator[str]:
    declared = {label.value for label in dataset.labels}
    for value in sorted(set(found) - declared if declared else ()):
        yield (
            f"{found[value]} voxels carry the label {value}, which dataset.json does not declare; declared are "
            f"{sorted(declared)}. Declare it or repaint those voxels."
        )


def _constant(case: Case) -> Iterator[str]:
    for name, voxels in zip(case.image.channels, case.image.voxels, strict=True):
        if voxels.min() == voxels.max():
            yield f"every voxel of channel {name} is {voxels.flat[0]:g}; a scan with contrast is needed. Export it again."


def _twins(examined: Sequence[_Examined]) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for one in examined:
        if one.image_sha256 and one.image_sha256 in seen:
            problem = f"has the very image of {seen[one.image_sha256]}; a patient in both training and validation flatters. Remove one."
            yield Finding(case=one.id, problem=problem, reason="mixed")
        seen.setdefault(one.image_sha256, one.id)


def _facts(case: Case) -> CaseFacts:
    assert case.labels is not None
    image = Orient().apply(case.image)
    inside = case.labels.voxels[0] > 0
    ranks = np.linspace(0, 1, 201)
    painted = [voxels[inside] if inside.any() else voxels.ravel() for voxels in case.image.voxels]
    return CaseFacts(
        shape=image.geometry.shape,
        spacing_mm=image.geometry.spacing,
        kept=float(np.prod(nonzero_box(image, margin=2).shape) / np.prod(image.geometry.shape)),
        intensities=tuple(tuple(float(x) for x in np.quantile(v, ranks)) for v in painted),
        voxels={},
    )


def _found_labels(examined: Iterable[_Examined]) -> tuple[Label, ...]:
    values = sorted({value for one in examined for value in one.values})
    if not values:
        raise DatasetError(
            "no voxel of any case carries a label; at least one label is needed. Look at the label files."
        )
    return label_table({f"label_{value}": value for value in values})


def label_table(values: dict[str, int]) -> tuple[Label, ...]:
    """Names and values with colours from the palette and codes from the table, background left out."""
    named = sorted((value, name) for name, value in values.items() if value != 0)
    return tuple(_label(value, name, PALETTE[n % len(PALETTE)]) for n, (value, name) in enumerate(named))


def _label(value: int, name: str, colour: tuple[int, int, int]) -> Label:
    told = meaning_of(name)
    return Label(
        value=value, name=name, colour=colour, category=told.category, type=told.type, modifiers=told.modifiers
    )


def _open_csv(path: Path) -> Dataset:
    with path.open(newline="", encoding="utf-8-sig") as lines:  # Excel opens a CSV with a byte order mark
        reader = csv.DictReader(lines, restval="")
        columns = list(reader.fieldnames or ())
        rows = list(reader)
    channels = tuple(name for name in columns if name not in ("id", "labels"))
    if "id" not in columns or "labels" not in columns or not channels:
        raise DatasetError(
            f"{path.name} has the columns {columns}; id, labels and one column per channel are needed. Name them so in its first line."
        )
    cases, findings = [], []
    for row in rows:
        images = tuple(path.parent / row[name] for name in channels)
        labels = path.parent / row["labels"]
        named = [(name, row[name]) for name in (*channels, "labels")]
        missing = [
            file or f"a file for {name}" for name, file in named if not file or not (path.parent / file).exists()
        ]
        findings += [Finding(case=row["id"], problem=f"{m} does not exist; correct the row.") for m in missing]
        cases.append(CaseFiles(id=row["id"], images=() if missing else images, labels=labels))
    findings += _bad_ids([case.id for case in cases])
    return Dataset(
        name=path.stem, layout="CSV", channels=channels, labels=(), cases=tuple(cases), findings=tuple(findings)
    )


def _open_folders(root: Path, images: Path, labels: Path, layout: str) -> Dataset:
    described = _described(root)
    findings = list(described.findings)
    label_files = {_name(path): path for path in _scans(labels)}
    grouped = _grouped(_scans(images), set(label_files), described.channels)
    cases = []
    for case_id in sorted(set(grouped) | set(label_files)):
        files = CaseFiles(id=case_id, images=grouped.get(case_id, ()), labels=label_files.get(case_id))
        findings += _orphan(files, described.channels, images.name, labels.name)
        cases.append(files)
    findings += _bad_ids(list(grouped))
    findings += _gaps(_numbered(_scans(images), set(label_files)))
    findings += [*_stored_twice(_scans(images)), *_stored_twice(_scans(labels))]
    findings += _promised(described.promised, {case.id for case in cases})
    channels = described.channels or tuple(f"channel_{n}" for n in range(_channel_count(grouped)))
    return Dataset(
        name=described.name or root.resolve().name,
        layout=layout,
        channels=channels,
        labels=described.labels,
        cases=tuple(cases),
        findings=tuple(findings),
    )


@dataclass(frozen=True, kw_only=True)
class _Description:
    name: str = ""
    channels: tuple[str, ...] = ()
    labels: tuple[Label, ...] = ()
    promised: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


def _described(root: Path) -> _Description:
    """What dataset.json says, in Decathlon's or nnU-Net's words."""
    path = root / "dataset.json"
    if not path.exists():
        return _Description()
    try:
        record = json.loads(path.read_text())
        channels = record.get("channel_names") or record.get("modality") or {}
        return _Description(
            name=str(record.get("name") or ""),
            channels=tuple(str(channels[key]) for key in sorted(channels, key=int)),
            labels=_described_labels(record.get("labels", {})),
            promised=tuple(_name(Path(one["image"])) for one in record.get("training", ()) if isinstance(one, dict)),
        )
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{root.name}/dataset.json cannot be understood ({error}); Decathlon's or nnU-Net's form is needed. README shows both."
        ) from None


def _described_labels(record: dict[str, Any]) -> tuple[Label, ...]:
    """Decathlon writes {"1": "liver"}, nnU-Net {"liver": 1}."""
    if all(re.fullmatch(r"\d+", key) for key in record):
        return label_table({str(name): int(value) for value, name in record.items()})
    for name, value in record.items():
        if not isinstance(value, int) or name == "ignore":
            raise DatasetError(
                f"dataset.json declares {name!r} as {value!r}; one whole number per label is what can be trained today. "
                "Regions and ignored voxels are not read yet: write plain labels."
            )
    return label_table(record)


def _scans(folder: Path) -> list[Path]:
    """Files by their endings, DICOM files, and folders of DICOM files."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and _is_scan(p))


def _is_scan(path: Path) -> bool:
    if path.is_dir():
        return any(is_dicom(one) for one in path.iterdir() if not one.name.startswith("."))
    return path.name.endswith((*EXTENSIONS, ".dcm"))


def _name(path: Path) -> str:
    """A case's name: a file's without its ending, a folder's whole."""
    return path.name if path.is_dir() else stem(path).removesuffix(".dcm")


def _grouped(paths: Sequence[Path], labelled: set[str], channels: tuple[str, ...]) -> dict[str, tuple[Path, ...]]:
    """nnU-Net writes case_0000, case_0001, one per channel; elsewhere a file is a case."""
    numbered = _numbered(paths, labelled)
    channel_files = {path for found in numbered.values() for _, path in found}
    whole = {_name(path): (path,) for path in paths if path not in channel_files}
    return whole | {case: tuple(path for _, path in sorted(dict(found).items())) for case, found in numbered.items()}


def _numbered(paths: Sequence[Path], labelled: set[str]) -> dict[str, list[tuple[int, Path]]]:
    """Per case its channel files with their numbers; a file whose whole name has labels is no channel."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in paths:
        match = re.fullmatch(r"(.+)_(\d{4})", _name(path))
        if match and _name(path) not in labelled:
            found.setdefault(match[1], []).append((int(match[2]), path))
    return found


def _gaps(numbered: dict[str, list[tuple[int, Path]]]) -> Iterator[Finding]:
    """case_0000 and case_0002 are not the first two channels: a gap would give a network the wrong contrast."""
    for case, files in numbered.items():
        found = sorted(number for number, _ in files)
        if found != list(range(len(found))):
            problem = (
                f"has the channel numbers {found}; 0 to {len(found) - 1}, each once, are needed. Add what is missing."
            )
            yield Finding(case=case, problem=problem)


def _channel_count(grouped: dict[str, tuple[Path, ...]]) -> int:
    """Without a description, the first case says how many channels there are."""
    for _, paths in sorted(grouped.items()):
        try:
            return len(paths) if len(paths) > 1 else len(read(paths[0]).channels)
        except ScanError:
            continue
    return 1


def _orphan(files: CaseFiles, channels: tuple[str, ...], images: str, labels: str) -> Iterator[Finding]:
    if not files.images:
        yield Finding(
            case=files.id, problem=f"has labels but no image in {images}; add the image or remove the labels."
        )
    elif files.labels is None:
        yield Finding(
            case=files.id, problem=f"has an image but no labels in {labels}; add the labels or remove the image."
        )
    elif 1 < len(files.images) != len(channels) and channels:
        problem = f"has {len(files.images)} channel files; dataset.json names {len(channels)}: {', '.join(channels)}. Add what is missing."
        yield Finding(case=files.id, problem=problem)


def _bad_ids(ids: Sequence[str]) -> Iterator[Finding]:
    for case_id in sorted(set(ids)):
        if not re.fullmatch(r"[\w.\-]+", case_id) or case_id.startswith("."):
            yield Finding(case=case_id, problem="is no name for a folder; use letters, digits, '-', '_' and '.' alone.")
        if ids.count(case_id) > 1:
            yield Finding(case=case_id, problem=f"is the id of {ids.count(case_id)} cases; each needs its own.")


def _stored_twice(paths: Sequence[Path]) -> Iterator[Finding]:
    """case.nii.gz beside case.nrrd: which of the two is meant must not be guessed."""
    named: dict[str, list[str]] = {}
    for path in paths:
        named.setdefault(_name(path), []).append(path.name)
    for name, files in named.items():
        if len(files) > 1:
            yield Finding(
                case=name, problem=f"is stored {len(files)} times: {', '.join(files)}. Keep the one that is meant."
            )


def _promised(promised: Sequence[str], present: set[str]) -> Iterator[Finding]:
    for case_id in sorted(set(promised) - present):
        hint = nearest(case_id, sorted(present))
        yield Finding(
            case=case_id,
            problem=f"is listed in dataset.json but lies in no folder{hint} Add it or take it off the list.",
        )
