"""What a dataset.json declares, in Decathlon's words, in nnU-Net's, and in two of ours: which labels were looked for in a
case, and whose scan it is."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .codes import meaning_of
from .plan import Label
from .volume import ScanError

# after Okabe & Ito (2008), green, vermilion and yellow moved a little: to simulated red- and green-blind eyes (Machado 2009)
# two of theirs are 17 apart (CIE 1976), of these any two at least 20; yellow last, it drowns on bright bone
PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 105), (200, 80, 0), (204, 121, 167), (0, 114, 178), (250, 242, 80))


class DatasetError(ScanError):
    """A folder is no dataset, or cases in it do not fit."""


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What there is to know before any case is looked at; nothing where there is no dataset.json."""

    name: str = ""
    channels: tuple[str, ...] = ()
    labels: tuple[Label, ...] = ()
    ignored: int | None = None
    """The value in label files under which nobody knows the truth."""
    promised: tuple[str, ...] = ()
    """Images that Decathlon lists."""
    annotated: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The labels that were looked for in a case; a case that is not named: all of them."""
    patients: dict[str, str] = field(default_factory=dict)
    """The patient of a case."""


def declared(folder: Path) -> Declared:
    """What the dataset.json in that folder says."""
    path = folder / "dataset.json"
    if not path.exists():
        return Declared()
    try:
        record = json.loads(path.read_text())
        channels = record.get("channel_names") or record.get("modality") or {}
        labels, ignored = _labels(record.get("labels", {}), record.get("regions_class_order"))
        return Declared(
            name=str(record.get("name") or ""),
            channels=tuple(str(channels[key]) for key in sorted(channels, key=int)),
            labels=labels,
            ignored=ignored,
            promised=tuple(str(one["image"]) for one in record.get("training", ()) if isinstance(one, dict)),
            annotated={str(case): _names(names) for case, names in record.get("annotated", {}).items()},
            patients={str(case): str(patient) for case, patient in record.get("patients", {}).items()},
        )
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"{folder.name}/dataset.json cannot be understood ({error}); Decathlon's or nnU-Net's form is needed. "
            "README shows both."
        ) from None


def label_table(values: Mapping[str, int]) -> tuple[Label, ...]:
    """Names and values with colours from the palette and codes from the table, background left out."""
    named = sorted((value, name) for name, value in values.items() if value != 0)
    return _coloured((name, value, ()) for value, name in named)


def _coloured(labels: Iterable[tuple[str, int, tuple[int, ...]]]) -> tuple[Label, ...]:
    table = []
    for n, (name, value, parts) in enumerate(labels):
        told = meaning_of(name)
        table.append(
            Label(
                value=value, name=name, colour=PALETTE[n % len(PALETTE)], parts=parts,
                category=told.category, type=told.type, modifiers=told.modifiers,
            )
        )  # fmt: skip
    return tuple(table)


def _labels(record: Mapping[str, Any], order: Any) -> tuple[tuple[Label, ...], int | None]:
    """Decathlon writes {"1": "liver"}, nnU-Net {"liver": 1}, and {"whole tumour": [1, 2, 3]} of a region."""
    if all(re.fullmatch(r"\d+", key) for key in record):
        record = {str(name): int(value) for value, name in record.items()}
    values = {name: _values(name, value) for name, value in record.items()}
    ignored = _ignored(values)
    values = {name: own for name, own in values.items() if own != (0,)}
    if any(isinstance(record[name], list) for name in values):
        return _regions(values, order), ignored
    return label_table({name: own[0] for name, own in values.items()}), ignored


def _values(name: str, value: Any) -> tuple[int, ...]:
    own = value if isinstance(value, list) else [value]
    if not own or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in own):
        raise DatasetError(
            f"dataset.json declares {name!r} as {value!r}; a whole number, or for a region a list of them, is needed. "
            "Correct it there."
        )
    return tuple(dict.fromkeys(own))


def _ignored(values: dict[str, tuple[int, ...]]) -> int | None:
    """The value of the label called `ignore`, which is taken off the labels."""
    own = values.pop("ignore", None)
    highest = max((value for others in values.values() for value in others), default=0)
    if own is not None and (len(own) > 1 or own[0] <= highest):
        raise DatasetError(
            f"dataset.json declares 'ignore' as {list(own)}; one number above all others ({highest}) is needed, as nnU-Net "
            "has it. Give the ignored voxels such a number."
        )
    return own[0] if own else None


def _regions(values: dict[str, tuple[int, ...]], order: Any) -> tuple[Label, ...]:
    """Overlapping labels as declared; the order is that in which they are painted over each other."""
    numbers = order if isinstance(order, list) else []
    if len(numbers) != len(values) or len(set(map(str, numbers))) < len(numbers) or not all(
        isinstance(n, int) and n > 0 for n in numbers
    ):  # fmt: skip
        raise DatasetError(
            f"dataset.json declares the regions {', '.join(values)} with the regions_class_order {order!r}; a number for "
            "each, from 1 up, in the same order, is needed: what is written where that region is found, a later one over "
            "an earlier one. Add it, as for nnU-Net."
        )
    if any(0 in own for own in values.values()):
        raise DatasetError(
            "dataset.json declares a region that holds 0, the background; values from 1 up are needed. Take it out."
        )
    _refuse_ambiguous(dict(zip(numbers, values, strict=True)), values)
    return _coloured((name, number, own) for (name, own), number in zip(values.items(), numbers, strict=True))


def _refuse_ambiguous(painted: dict[int, str], values: dict[str, tuple[int, ...]]) -> None:
    """A number that is painted and that label files have too must lie in the same regions in both."""
    for number, region in painted.items():
        own = [name for name, parts in values.items() if number in parts]
        around = [name for name, parts in values.items() if set(values[region]) <= set(parts)]
        if own and own != around:
            raise DatasetError(
                f"dataset.json has {number} in its regions_class_order for {region!r}, which lies in {', '.join(around)}; in "
                f"its label files {number} belongs to {', '.join(own)}. A number must mean the same in both: take one that "
                "no region is made of, or the value that lies in just those regions."
            )


def _names(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DatasetError(
            f"dataset.json has {names!r} under `annotated`; a list of labels' names for a case is needed. Correct it there."
        )
    return tuple(dict.fromkeys(names))
