"""Datasets on disk to Cases: Decathlon, nnU-Net, images/ + labels/, CSV; and what is wrong with them."""

import csv
import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .cores import usable_cores
from .declared import DatasetError, Declared, declared, label_table
from .dicom import is_dicom, patient_of
from .dicom import labels as dicom_labels
from .files import EXTENSIONS, read, stem
from .fingerprint import NOTHING, facts_of, label_counts
from .plan import CaseFacts, Fingerprint, Label
from .reading import STRICT, Reading
from .records import nearest
from .verdict import Verdict
from .volume import Case, ScanError, Volume, stack

logger = logging.getLogger(__name__)

__all__ = [
    "CaseFiles", "Dataset", "DatasetError", "Examination", "Finding", "bad_ids", "case_name", "check", "examine",
    "is_dataset", "label_file", "label_table", "looked_for_in_vain", "named_in", "names_in", "open_dataset", "read_labels",
    "read_map", "stored_twice", "take_fingerprint",
]  # fmt: skip


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
    ignored: int | None = None
    """The value in label files under which nobody knows the truth."""

    def read(self, files: CaseFiles) -> Case:
        """The case as a value, on one grid, its channels named."""
        volumes = [read(path, self.reading) for path in files.images]
        image = volumes[0] if len(volumes) == 1 else stack(volumes, self.channels, self.reading.match)
        image = image.with_channels(self.channels)
        names = {label.name: own[0] for label in self.labels if len(own := _values_of(label)) == 1}
        if files.labels and len(names) < len(self.labels) and dicom_labels.is_labels(label_file(files.labels)):
            wide = next(label.name for label in self.labels if label.name not in names)
            raise ScanError(
                f"{label_file(files.labels).name} is a DICOM object, and {wide} is a region of several numbers; in a DICOM "
                "object labels are known by name. Give label maps of numbers, or one label for each segment.",
                "unsupported",
            )
        labels = read_labels(files.labels, image, names, self.reading) if files.labels else None
        return Case(id=files.id, image=image, labels=labels)


def open_dataset(path: Path, reading: Reading = STRICT) -> Dataset:
    """The dataset at that folder or CSV, whatever its layout; refused when it is none."""
    named = _with_patients(_named_by_dicom(replace(_opened(path), reading=reading)))
    return replace(named, findings=(*named.findings, *looked_for_in_vain(named)))


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


def _values_of(label: Label) -> tuple[int, ...]:
    """The values of label files that it is made of."""
    return label.parts or (label.value,)


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
    path = label_file(path)
    return dicom_labels.read_labels(path, image, names) if dicom_labels.is_labels(path) else read_map(path, reading)


def read_map(path: Path, reading: Reading = STRICT) -> Volume:
    """A file of numbers, one per voxel, as integers."""
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


def label_file(path: Path) -> Path:
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
    """Where nobody declared labels, the names inside DICOM label files."""
    return dataset if dataset.labels else replace(dataset, labels=named_in(files.labels for files in dataset.cases))


def named_in(paths: Iterable[Path | None]) -> tuple[Label, ...]:
    """The names inside those files that are DICOM labels; with their own numbers if all files agree."""
    numbers: dict[str, set[int]] = {}
    for path in paths:
        for name, number in names_in(path).items():
            numbers.setdefault(name, set()).add(number)
    known = {plain: name for name in sorted(numbers, reverse=True) if (plain := dicom_labels.plain(name))}
    agreed = [next(iter(found)) for found in numbers.values() if len(found) == 1]
    if len(set(agreed)) == len(numbers) == len(known):
        return label_table({name: min(found) for name, found in numbers.items()})
    return label_table({name: n for n, name in enumerate(sorted(known.values()), start=1)})


def names_in(path: Path | None) -> dict[str, int]:
    """What a case's DICOM labels call themselves, with their numbers; nothing of any other file."""
    try:
        return dicom_labels.names_in(label_file(path)) if path else {}
    except ScanError:  # told when the case is read
        return {}


def _with_patients(dataset: Dataset) -> Dataset:
    """Where nobody told the patients, what DICOM images say; unless all of them say the same, as anonymisers write it."""
    said = {
        files.id: patient_of(files.images[0])
        for files in dataset.cases
        if files.images and not files.patient and not files.images[0].name.endswith(EXTENSIONS)
    }
    if len(set(said.values())) < 2:
        return dataset
    cases = [replace(files, patient=files.patient or said.get(files.id, "")) for files in dataset.cases]
    return replace(dataset, cases=tuple(cases))


def looked_for_in_vain(dataset: Dataset) -> Iterator[Finding]:
    """Lists of labels that were looked for, with a name that no label has, or with none."""
    names = [label.name for label in dataset.labels]
    for files in dataset.cases:
        if files.annotated == ():
            problem = (
                "is annotated with no label; such a case teaches nothing. Name what was looked for, or leave it out."
            )
            yield Finding(case=files.id, problem=problem)
        for unknown in sorted(set(files.annotated or ()) - set(names)):
            declared = f"declared are {', '.join(names)}" if names else "no label is declared by name in a dataset.json"
            hint = nearest(unknown, names) or "."
            problem = (
                f"was annotated with {unknown!r}, which is no label; {declared}{hint} Correct the one or the other."
            )
            yield Finding(case=files.id, problem=problem)


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
    notes: tuple[str, ...] = ()
    """What is unusual about the dataset and right all the same, a sentence each."""


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
    absent = () if findings else _absent(dataset, examined)
    return Examination(findings=findings, verdicts=verdicts, absent=absent, notes=tuple(_notes(dataset)))


def _absent(dataset: Dataset, examined: Sequence["_Examined"]) -> tuple[str, ...]:
    seen = {value for one in examined for value in one.values}
    return tuple(label.name for label in dataset.labels if seen.isdisjoint(_values_of(label)))


def _notes(dataset: Dataset) -> Iterator[str]:
    cases = len(dataset.cases)
    if any(label.parts for label in dataset.labels):
        made = (f"{label.name} of {' + '.join(map(str, _values_of(label)))}" for label in dataset.labels)
        yield f"labels are regions that may overlap: {', '.join(made)}"
    if dataset.ignored is not None:
        yield f"voxels of the value {dataset.ignored} are ignored: they neither teach nor count"
    partly = [files.annotated for files in dataset.cases if files.annotated is not None]
    if partly:
        counts = {label.name: cases - sum(label.name not in one for one in partly) for label in dataset.labels}
        told = ", ".join(f"{name} in {count}" for name, count in counts.items())
        yield f"in {len(partly)} of {cases} cases only some labels were looked for: {told}"
    patients = {files.patient or f"case {files.id}" for files in dataset.cases}
    if len(patients) < cases:
        yield f"{cases} cases are of {len(patients)} patients; no patient is divided between training and validation"


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
    how += _looked_for(dataset)
    digest = hashlib.sha256((bytes_read + how).encode()).hexdigest()
    return Fingerprint(
        name=dataset.name, channels=dataset.channels, labels=labels, cases=_case_facts(dataset, labels, examined),
        dataset=digest, ignored=dataset.ignored,
    )  # fmt: skip


def _looked_for(dataset: Dataset) -> str:
    """The same voxels teach something else when fewer labels were looked for; nothing where all were."""
    partly = sorted((files.id, sorted(files.annotated)) for files in dataset.cases if files.annotated is not None)
    return repr(partly) if partly else ""


def _case_facts(dataset: Dataset, labels: tuple[Label, ...], examined: Sequence["_Examined"]) -> dict[str, CaseFacts]:
    by_id = {files.id: files for files in dataset.cases}
    told = [by_id[one.id].patient for one in examined]
    numbers = {patient: str(n) for n, patient in enumerate(dict.fromkeys(filter(None, told)), start=1)}
    facts = {}
    for one, patient in zip(examined, told, strict=True):
        counts = {label.name: sum(one.values.get(value, 0) for value in _values_of(label)) for label in labels}
        facts[one.id] = replace(
            one.facts,
            voxels={name: count for name, count in counts.items() if count},
            annotated=by_id[one.id].annotated,
            patient=numbers.get(patient, ""),
        )
    return facts


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
    with ThreadPoolExecutor(usable_cores()) as pool:  # inflating gzip lets other threads run
        for done, one in enumerate(pool.map(lambda files: _examine(dataset, files), complete), start=1):
            findings += one.findings
            examined.append(one)
            progress(done, len(complete))
    findings += _twins(examined)
    if not complete and not findings:
        findings.append(Finding(case=dataset.name, problem="no labelled case was found; at least one is needed."))
    return tuple(findings), tuple(examined)


def _examine(dataset: Dataset, files: CaseFiles) -> _Examined:
    try:
        case = dataset.read(files)
    except ScanError as error:
        return _Examined(
            id=files.id,
            findings=(Finding(case=files.id, problem=str(error), reason=error.reason),),
            verdict=_unread(files),
            facts=NOTHING,
            values={},
            sha256="",
            image_sha256="",
        )
    assert case.labels is not None
    found = label_counts(case.labels.voxels)
    wrong = (*_undeclared(dataset, found), *_not_looked_for(dataset, files, found))
    findings = [Finding(case=files.id, problem=problem) for problem in wrong]
    findings += [Finding(case=files.id, problem=problem, reason="values") for problem in _constant(case)]
    return _Examined(
        id=files.id,
        findings=tuple(findings),
        verdict=_verdict(case),
        facts=facts_of(case, dataset.ignored),
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
    declared = {value for label in dataset.labels for value in _values_of(label)}
    for value in sorted(set(found) - declared - {dataset.ignored} if declared else ()):
        yield (
            f"{found[value]} voxels carry the label {value}, which dataset.json does not declare; declared are "
            f"{sorted(declared)}. Declare it or repaint those voxels."
        )


def _not_looked_for(dataset: Dataset, files: CaseFiles, found: dict[int, int]) -> Iterator[str]:
    """Voxels of labels that, it is said, nobody looked for: either they are right or what is said."""
    if files.annotated is None:
        return
    expected = {value for label in dataset.labels if label.name in files.annotated for value in _values_of(label)}
    for label in dataset.labels:
        for value in sorted(set(_values_of(label)) & set(found) - expected):
            yield (
                f"{found[value]} voxels carry the label {value} ({label.name}), which was not looked for in this case; "
                f"annotated are {', '.join(files.annotated)}. Add it to what is annotated, or take those voxels away."
            )
            expected.add(value)


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


def _found_labels(examined: Iterable[_Examined]) -> tuple[Label, ...]:
    values = sorted({value for one in examined for value in one.values})
    if not values:
        raise DatasetError(
            "no voxel of any case carries a label; at least one label is needed. Look at the label files."
        )
    return label_table({f"label_{value}": value for value in values})


def _open_csv(path: Path) -> Dataset:
    with path.open(newline="", encoding="utf-8-sig") as lines:  # Excel opens a CSV with a byte order mark
        reader = csv.DictReader(lines, restval="")
        columns = list(reader.fieldnames or ())
        rows = list(reader)
    channels = tuple(name for name in columns if name not in ("id", "labels", "annotated", "patient"))
    if "id" not in columns or "labels" not in columns or not channels:
        raise DatasetError(
            f"{path.name} has the columns {columns}; id, labels and one column per channel are needed, annotated and "
            "patient may be. Name them so in its first line."
        )
    told = declared(path.parent)
    cases, findings = [], []
    for row in rows:
        images = tuple(path.parent / row[name] for name in channels)
        labels = path.parent / row["labels"] if row["labels"] else None
        named = [(name, row[name]) for name in (*channels, "labels")]
        missing = [
            file or f"a file for {name}" for name, file in named if not file or not (path.parent / file).exists()
        ]
        findings += [Finding(case=row["id"], problem=f"{m} does not exist; correct the row.") for m in missing]
        cases.append(
            CaseFiles(
                id=row["id"],
                images=() if missing else images,
                labels=labels,
                annotated=_listed(row.get("annotated") or "") or told.annotated.get(row["id"]),
                patient=(row.get("patient") or "").strip() or told.patients.get(row["id"], ""),
            )
        )
    ids = [case.id for case in cases]
    findings += [*bad_ids(ids), *_named_in_vain(told, set(ids))]
    return Dataset(
        name=path.stem,
        layout="CSV",
        channels=channels,
        labels=told.labels,
        ignored=told.ignored,
        cases=tuple(cases),
        findings=tuple(findings),
    )


def _listed(cell: str) -> tuple[str, ...] | None:
    """'liver; spleen' as names; an empty cell says nothing."""
    return tuple(dict.fromkeys(filter(None, map(str.strip, cell.split(";"))))) or None


def _open_folders(root: Path, images: Path, labels: Path, layout: str) -> Dataset:
    told = declared(root)
    findings: list[Finding] = []
    label_files = {case_name(path): path for path in _scans(labels)}
    grouped = _grouped(_scans(images), set(label_files), told.channels)
    cases = []
    for case_id in sorted(set(grouped) | set(label_files)):
        files = CaseFiles(
            id=case_id,
            images=grouped.get(case_id, ()),
            labels=label_files.get(case_id),
            annotated=told.annotated.get(case_id),
            patient=told.patients.get(case_id, ""),
        )
        findings += _orphan(files, told.channels, images.name, labels.name)
        cases.append(files)
    findings += bad_ids(list(grouped))
    findings += _gaps(_numbered(_scans(images), set(label_files)))
    findings += [*stored_twice(_scans(images)), *stored_twice(_scans(labels))]
    present = {case.id for case in cases}
    findings += _promised([case_name(Path(image)) for image in told.promised], present)
    findings += _named_in_vain(told, present)
    channels = told.channels or tuple(f"channel_{n}" for n in range(_channel_count(grouped)))
    return Dataset(
        name=told.name or root.resolve().name,
        layout=layout,
        channels=channels,
        labels=told.labels,
        ignored=told.ignored,
        cases=tuple(cases),
        findings=tuple(findings),
    )


def _scans(folder: Path) -> list[Path]:
    """Files by their endings, DICOM files, and folders of DICOM files."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and _is_scan(p))


def _is_scan(path: Path) -> bool:
    if path.is_dir():
        return any(is_dicom(one) for one in path.iterdir() if not one.name.startswith("."))
    return path.name.endswith((*EXTENSIONS, ".dcm"))


def case_name(path: Path) -> str:
    """A case's name: a file's without its ending, a folder's whole."""
    return path.name if path.is_dir() else stem(path).removesuffix(".dcm")


def _grouped(paths: Sequence[Path], labelled: set[str], channels: tuple[str, ...]) -> dict[str, tuple[Path, ...]]:
    """nnU-Net writes case_0000, case_0001, one per channel; elsewhere a file is a case."""
    numbered = _numbered(paths, labelled)
    channel_files = {path for found in numbered.values() for _, path in found}
    whole = {case_name(path): (path,) for path in paths if path not in channel_files}
    return whole | {case: tuple(path for _, path in sorted(dict(found).items())) for case, found in numbered.items()}


def _numbered(paths: Sequence[Path], labelled: set[str]) -> dict[str, list[tuple[int, Path]]]:
    """Per case its channel files with their numbers; a file whose whole name has labels is no channel."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in paths:
        match = re.fullmatch(r"(.+)_(\d{4})", case_name(path))
        if match and case_name(path) not in labelled:
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


def bad_ids(ids: Sequence[str]) -> Iterator[Finding]:
    for case_id in sorted(set(ids)):
        if not re.fullmatch(r"[\w.\-]+", case_id) or case_id.startswith("."):
            yield Finding(case=case_id, problem="is no name for a folder; use letters, digits, '-', '_' and '.' alone.")
        if ids.count(case_id) > 1:
            yield Finding(case=case_id, problem=f"is the id of {ids.count(case_id)} cases; each needs its own.")


def stored_twice(paths: Sequence[Path]) -> Iterator[Finding]:
    """case.nii.gz beside case.nrrd: which of the two is meant must not be guessed."""
    named: dict[str, list[str]] = {}
    for path in paths:
        named.setdefault(case_name(path), []).append(path.name)
    for name, files in named.items():
        if len(files) > 1:
            yield Finding(
                case=name, problem=f"is stored {len(files)} times: {', '.join(files)}. Keep the one that is meant."
            )


def _promised(promised: Sequence[str], present: set[str]) -> Iterator[Finding]:
    for case_id in sorted(set(promised) - present):
        hint = nearest(case_id, sorted(present)) or "."
        yield Finding(
            case=case_id,
            problem=f"is listed in dataset.json but lies in no folder{hint} Add it or take it off the list.",
        )


def _named_in_vain(told: Declared, present: set[str]) -> Iterator[Finding]:
    for key, named in (("annotated", set(told.annotated)), ("patients", set(told.patients))):
        for case_id in sorted(named - present):
            hint = nearest(case_id, sorted(present)) or "."
            problem = f"is named under `{key}` in dataset.json and is no case{hint} Correct its name there."
            yield Finding(case=case_id, problem=problem)
