"""LABELS.csv beside a folder of features: which slide is whose and of which class, or what keeps them from being learnt from."""

import csv
import hashlib
import io
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocessing.records import nearest

from ..errors import UsageError
from ..folds import FoldCase
from .feature_file import FeatureFile, FeatureRecipe, files_in

logger = logging.getLogger(__name__)

FEWEST_PATIENTS = 3
"""Of each class: one to measure on, one to choose the checkpoint by, one to learn from."""

SHOWN = 5
"""Names in a message; the first mistakes are enough to see what is wrong."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledSlide:
    """A slide to learn from."""

    id: str
    patient: str
    label: int
    """Its class, by its place among the classes."""
    file: FeatureFile


@dataclass(frozen=True, kw_only=True, eq=False)
class SlideTable:
    """Everything a training is told: slides by their names, sorted, and the classes they are of, sorted too."""

    slides: tuple[LabelledSlide, ...]
    classes: tuple[str, ...]
    recipe: FeatureRecipe

    @property
    def cases(self) -> list[FoldCase]:
        """As folds are made of them: by patient, each class spread over all."""
        return [
            FoldCase(id=slide.id, patient=slide.patient, labels=frozenset({self.classes[slide.label]}))
            for slide in self.slides
        ]

    @property
    def digest(self) -> str:
        """sha256 of every slide's features, patient and class."""
        rows = [(s.id, s.patient, self.classes[s.label], s.file.features_sha256) for s in self.slides]
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    @property
    def slides_by_class(self) -> dict[str, int]:
        counts = Counter(slide.label for slide in self.slides)
        return {name: counts[number] for number, name in enumerate(self.classes)}

    @property
    def patients_by_class(self) -> dict[str, int]:
        counts = Counter(label for _, label in {(slide.patient, slide.label) for slide in self.slides})
        return {name: counts[number] for number, name in enumerate(self.classes)}


def read_table(
    features: Path, labels: Path, *, slide: str = "slide", patient: str = "patient", label: str = "label"
) -> SlideTable:
    """Both, put together; `slide`, `patient` and `label` are the columns' names. Refused where they do not fit."""
    rows = read_rows(labels, {"slide": slide, "patient": patient, "label": label})
    paths = folders_of(features)
    rows = [row | {"slide": known(row["slide"], paths)} for row in rows]
    _refuse_repeated(labels, [row["slide"] for row in rows])
    refuse_without_features(features, labels, [row["slide"] for row in rows], paths)
    _refuse_patients_of_two_classes(labels, rows)
    rows.sort(key=lambda row: row["slide"])
    found = {row["slide"]: FeatureFile.read(paths[row["slide"]]) for row in rows}
    recipe = one_recipe(found)
    refuse_the_same_pixels(found)
    classes = classes_of(labels, rows)
    if unlabelled := len(paths) - len(found):
        logger.warning("%d slide(s) have features and no row in %s: they take no part", unlabelled, labels.name)
    return SlideTable(
        slides=tuple(
            LabelledSlide(
                id=row["slide"],
                patient=row["patient"],
                label=classes.index(row["label"]),
                file=found[row["slide"]],
            )
            for row in rows
        ),
        classes=classes,
        recipe=recipe,
    )


def read_rows(path: Path, columns: Mapping[str, str]) -> list[dict[str, str]]:
    """Of a CSV with a head the columns that are asked for (ours -> the file's), every cell filled, blanks around it gone."""
    text = _text(path)
    reader = csv.DictReader(io.StringIO(text), delimiter=_delimiter(text), restval="")
    head = [name.strip() for name in reader.fieldnames or ()]
    for ours, theirs in columns.items():
        if theirs not in head:
            raise UsageError(
                f"{path.name} has the columns {', '.join(head) or 'none'}, and no {theirs!r}. {_remedy(ours, columns)}"
            )
    rows = []
    for number, said in enumerate(reader, start=2):
        cells = {(name or "").strip(): (value or "").strip() for name, value in said.items() if isinstance(value, str)}
        if not any(cells.values()):
            continue
        row = {ours: cells.get(theirs, "") for ours, theirs in columns.items()}
        if empty := [columns[ours] for ours, value in row.items() if not value]:
            raise UsageError(
                f"line {number} of {path.name} has nothing under {', '.join(empty)}; every row needs it. "
                "Fill it in, or take the row out."
            )
        rows.append(row)
    if not rows:
        raise UsageError(f"{path.name} has no row; one per slide is needed, under the head. Fill it in.")
    return rows


def one_recipe(files: Mapping[str, FeatureFile]) -> FeatureRecipe:
    """That of all of them: features of two encoders, or of tiles of two sizes, are not of one kind."""
    by_recipe: dict[FeatureRecipe, list[str]] = defaultdict(list)
    for name, file in files.items():
        by_recipe[file.recipe].append(name)
    first, *others = sorted(by_recipe, key=lambda recipe: -len(by_recipe[recipe]))
    if others:
        told = "; ".join(f"{_listed(by_recipe[other])}: {first.difference(other)}" for other in others)
        raise UsageError(
            f"the features were made in {len(by_recipe)} ways, {len(by_recipe[first])} slide(s) in one and others otherwise "
            f"({told}); one way for all is needed. Run `hilum slides features` on those slides again with the same settings."
        )
    return first


def _text(path: Path) -> str:
    if not path.is_file():
        raise UsageError(
            f"{path} is no file; a CSV with a row per slide is needed (slide,patient,label). Look at the spelling."
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path.name} is not UTF-8; a CSV in UTF-8 is needed. Save it as 'CSV UTF-8'.") from None


def _delimiter(text: str) -> str:
    """What stands between the columns: spreadsheets of half the world write semicolons."""
    return max(",;\t", key=text.partition("\n")[0].count)


def _remedy(ours: str, columns: Mapping[str, str]) -> str:
    if ours == "patient":
        return (
            "Whose slides are is needed, for no patient may be both learnt from and measured on. Name the column with "
            f"--patient_column; where every slide is of another patient, say so with --patient_column {columns['slide']}."
        )
    if ours in ("x_um", "y_um"):
        return "A row says where its tile lies: micrometres from the slide's top left corner, to the right and down. Add it."
    return f"Every row needs it. Name the column with --{ours}_column, or add it."


def folders_of(features: Path) -> dict[str, Path]:
    """Of every slide that has features the file, by the slide's name."""
    found = {path.parent.name: path for path in files_in(features)}
    if not found:
        raise UsageError(
            f"{features} holds no features of slides; a folder that `hilum slides features` wrote is needed. Run that first."
        )
    return found


def known(name: str, paths: Mapping[str, Path]) -> str:
    """The slide's id; a table may call it by its file, with the suffix."""
    return Path(name).stem if name not in paths and Path(name).stem in paths else name


def _refuse_repeated(labels: Path, names: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(
            f"{labels.name} has more than one row for {_listed(twice)}; every slide needs one row. Take the others out."
        )


def refuse_without_features(features: Path, labels: Path, names: Sequence[str], paths: Mapping[str, Path]) -> None:
    missing = [name for name in names if name not in paths]
    if missing:
        close = nearest(missing[0], list(paths)) if len(missing) == 1 else ""
        close = close or "."
        raise UsageError(
            f"{labels.name} names {len(missing)} slide(s) of which {features} has no features: {_listed(missing)}{close} "
            "Each needs them: run `hilum slides features` on these slides, correct their names, or take the rows out."
        )


def _refuse_patients_of_two_classes(labels: Path, rows: Sequence[Mapping[str, str]]) -> None:
    found = _grouped(rows, lambda row: row["patient"], lambda row: row["label"])
    torn = [f"{patient} ({', '.join(sorted(names))})" for patient, names in found.items() if len(names) > 1]
    if torn:
        raise UsageError(
            f"{labels.name} gives {len(torn)} patient(s) two classes: {_listed(torn)}; all slides of a patient need one, the "
            "patient's. Correct them, or take out the slides that do not show it."
        )


def refuse_the_same_pixels(files: Mapping[str, FeatureFile]) -> None:
    """One slide under two names would be learnt from and measured on; also where only its file is another."""
    by_file = _grouped(files.items(), lambda item: item[1].slide_sha256, lambda item: item[0])
    by_features = _grouped(files.items(), lambda item: item[1].features_sha256, lambda item: item[0])
    found = (*by_file.values(), *by_features.values())
    if twins := sorted({" = ".join(sorted(names)) for names in found if len(names) > 1}):
        raise UsageError(
            f"{len(twins)} slide(s) are there under more than one name (same sha256): {_listed(twins)}; each is needed once, "
            "else it is learnt from and measured on. Take the rows of the copies out."
        )


def classes_of(labels: Path, rows: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    found = _grouped(rows, lambda row: row["label"], lambda row: row["patient"])
    if len(found) < 2:
        raise UsageError(
            f"{labels.name} has the one class {_listed(list(found))}; at least two are needed to tell apart. Add slides of another."
        )
    few = [f"{name} ({len(patients)})" for name, patients in sorted(found.items()) if len(patients) < FEWEST_PATIENTS]
    if few:
        raise UsageError(
            f"{labels.name} has classes of fewer than {FEWEST_PATIENTS} patients: {_listed(few)}; one to measure on, one to "
            "choose the checkpoint by and one to learn from are needed. Add patients, or put the class together with another."
        )
    return tuple(sorted(found))


def _grouped(items: Iterable[Any], key: Callable[[Any], str], value: Callable[[Any], str]) -> dict[str, set[str]]:
    groups: dict[str, set[str]] = defaultdict(set)
    for item in items:
        groups[key(item)].add(value(item))
    return groups


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
