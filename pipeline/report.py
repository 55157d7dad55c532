"""Result, what was found in one scan; Report, what we say of it; and how either reaches the disk in one piece."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int8

from preprocessing.plan import Label
from preprocessing.reading import STRICT, Reading
from preprocessing.records import decode
from preprocessing.regions import values_of
from preprocessing.volume import Geometry, GeometryMismatch, Volume

from .errors import UsageError
from .faithfulness import Faithfulness
from .maps import Maps
from .names import REPORT
from .postprocessing import Applied

FILE_NAME = REPORT
"""A case is complete when this file lies in its folder: it is written last."""


class UnreadableReport(UsageError):
    """A report file is damaged or is no report."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """Where a network looked when it found a label, or one part of it: a signed map on the scan's own grid."""

    label: str
    part: int | None
    """The part's number in the measurements; None: the whole label."""
    method: str
    """hirescam, gradcam, ...; `attention` of a network's own attention, which belongs to no label."""
    layer: str
    """The layer explained, `input` of methods that go back to the scan."""
    codes: Int8[np.ndarray, "i j k"]
    """-127 to 127; all 0 of a map with nothing behind it."""
    scale: float
    """What one code stands for; 0 of a blank map. Never stretched to fill a range: two maps compare by their scales."""
    unit: str
    """What the map's values are, in words for a legend."""
    score: float | None
    """What the map explains: the stitched model's own score of this label. None of attention."""
    health: float | None = None
    """|mean gradient| / mean |gradient|: near 0, a method that averages gradients sees nothing."""
    faithfulness: Faithfulness | None = None
    """What tests say of the map; None where it was not tested."""
    agreement: float | None = None
    """How alike captum's integrated gradients are in where they matter (rank correlation); None: they were not asked for."""
    blank: str = ""
    """Why there is nothing to be seen; empty where there is."""
    warnings: tuple[str, ...] = ()
    """Why the map should not be believed."""

    @property
    def name(self) -> str:
        """As a file may be called: lesion-hirescam, lesion-3-hirescam, attention-down.2."""
        words = [self.method, self.layer] if self.method == "attention" else [self.label, self.method]
        if self.part is not None:
            words.insert(1, str(self.part))
        return file_word("-".join(words))

    @property
    def standing(self) -> str:
        """What is known of it, in a sentence."""
        if self.blank:
            return f"blank: {self.blank}"
        if self.faithfulness is None:
            return "not tested"
        return f"failed: {'; '.join(self.faithfulness.failed)}" if self.faithfulness.failed else "passed"


@dataclass(frozen=True, kw_only=True)
class WindowCount:
    """What became of the windows of a scan."""

    computed: int = 0
    skipped: int = 0
    """No body in them: background without being computed."""
    repeated: int = 0
    """One value throughout, as a window before it: its logits were taken again."""
    body: str = ""
    """By what rule body was told from air; empty where nobody asked."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a case was said to take beyond the process itself, and took, in bytes."""

    stated: int
    peak: int | None = None
    """The most that was seen; None where the system does not tell."""
    words: tuple[str, ...] = ()
    """What was given up to stay within it, a sentence each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What was found: the scan and its labels, both on the scan's own grid."""

    case_id: str
    scan: Volume
    """With the channel names of the package."""
    labels: Volume
    """One channel of uint8 or uint16; 0 is background."""
    label_table: tuple[Label, ...]
    """Without background, in the order of the package."""
    package_id: str
    package_name: str
    confidence: dict[str, float] = field(default_factory=dict)
    """Mean winning probability inside each label that was found; may be empty."""
    temperatures: dict[str, float] = field(default_factory=dict)
    """What each fold's logits were divided by, as its held-out cases asked for; empty: the confidence is not calibrated."""
    postprocessing: tuple[Applied, ...] = ()
    """What each rule of the package changed in the labels, in order."""
    precision: str = "float32"
    """What the networks computed in."""
    warnings: tuple[str, ...] = ()
    explanations: tuple[Explanation, ...] = ()
    """Where the networks looked, for the outputs that show it; empty where nobody asked."""
    maps: Maps | None = None
    """Probabilities and uncertainty of every voxel; None where nobody asked."""
    memory: Memory | None = None
    windows: WindowCount | None = None
    engine: str = ""
    """What ran the networks, in words."""
    region: str = ""
    """Where alone they looked, and why; empty: everywhere."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Per hop, in order."""

    def __post_init__(self) -> None:
        if not self.scan.geometry.matches(self.labels.geometry):
            raise GeometryMismatch(
                f"{self.case_id}: the scan lies on {self.scan.geometry}, its labels on {self.labels.geometry}. "
                "A result lives on the scan's own grid: undo every step before deciding. "
                "This is a mistake in the calling code."
            )
        assert len(self.labels.channels) == 1 and self.labels.voxels.dtype in (np.uint8, np.uint16)
        assert len({label.value for label in self.label_table}) == len(self.label_table)

    @cached_property
    def volumes_ml(self) -> dict[str, float]:
        """Millilitres of every label of the package, 0 for one that was not found; a region with the regions in it."""
        voxels = self.labels.voxels[0]
        values = 1 + max([np.iinfo(voxels.dtype).max, *(label.value for label in self.label_table)])
        counts = np.zeros(values, dtype=np.int64)
        for slab in voxels:  # slab by slab: bincount makes eight bytes of every voxel it is given
            counts += np.bincount(slab.ravel(), minlength=values)
        found = {name: int(counts[list(values)].sum()) for name, values in values_of(self.label_table).items()}
        return {name: count * self.scan.geometry.voxel_ml for name, count in found.items()}

    @cached_property
    def uncertainty(self) -> dict[str, dict[str, float]]:
        """Of each label that was found its mean uncertainty, kind by kind; empty where nobody asked."""
        return self.maps.inside(self.labels, self.label_table) if self.maps else {}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What we say of one case: enough to trust it, to find it again, and to know what made it."""

    case_id: str
    status: str = "done"
    package_id: str
    package_name: str
    hilum_version: str
    input_sha256: str
    sources: tuple[str, ...]
    reader: str
    repairs: tuple[str, ...]
    grid: dict[str, Any]
    volumes_ml: dict[str, float]
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    files: tuple[str, ...]
    """Names inside the case's folder."""
    outputs: tuple[str, ...]
    """Names of the outputs that wrote them."""
    verdict: str = "fine"
    """What was said of the scan when it was read: fine or repaired; a scan that was refused has no report."""
    notes: tuple[str, ...] = ()
    """What one should know of the scan and nothing was done about."""
    modality: str = ""
    encoding: str = ""
    reading: Reading = STRICT
    """What was allowed when it was read."""
    temperatures: dict[str, float] = field(default_factory=dict)
    """What each fold's logits were divided by; empty: the confidence is not calibrated."""
    postprocessing: tuple[Applied, ...] = ()
    """What each rule of the package removed or added, also where that is nothing."""
    precision: str = "float32"
    """What the networks computed in."""
    confidence: dict[str, float] = field(default_factory=dict)
    """Mean winning probability inside each label that was found."""
    explanations: dict[str, str] = field(default_factory=dict)
    """Of each map of where a network looked what its tests say: passed, failed, blank or not tested, and why."""
    uncertainty: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of each label that was found its mean uncertainty, 0 to 1, kind by kind; empty where nobody asked."""
    memory: Memory | None = None
    """What the networks took; None: nobody measured it."""
    windows: WindowCount | None = None
    engine: str = ""
    """What ran the networks, in words; empty: torch, before there was another."""
    region: str = ""
    """Where alone the networks looked, and why; empty: everywhere."""

    @classmethod
    def of(
        cls, result: Result, files: Sequence[str | Path], outputs: Sequence[str], reading: Reading = STRICT
    ) -> "Report":
        """What is to be said of a result whose files have been written."""
        provenance = result.scan.provenance
        return cls(
            case_id=result.case_id,
            package_id=result.package_id,
            package_name=result.package_name,
            hilum_version=hilum_version(),
            input_sha256=provenance.sha256,
            sources=provenance.sources,
            reader=provenance.reader,
            repairs=provenance.repairs,
            grid=grid(result.scan.geometry),
            volumes_ml=dict(result.volumes_ml),
            warnings=result.warnings,
            seconds=dict(result.seconds),
            files=tuple(Path(file).name for file in files),
            outputs=tuple(outputs),
            verdict=provenance.verdict,
            notes=provenance.notes,
            modality=provenance.modality,
            encoding=provenance.encoding,
            reading=reading,
            temperatures=dict(result.temperatures),
            postprocessing=result.postprocessing,
            precision=result.precision,
            confidence=dict(result.confidence),
            explanations={name: each.standing for name, each in named(result.explanations)},
            uncertainty=result.uncertainty,
            memory=result.memory,
            windows=result.windows,
            engine=result.engine,
            region=result.region,
        )

    def write(self, folder: Path) -> Path:
        """Writes report.json, in one piece: from then on the case counts as complete."""
        path = folder / FILE_NAME
        write_whole(path, as_json(asdict(self)))
        return path

    @classmethod
    def read(cls, path: Path) -> "Report":
        """The report in this file, or in this case's folder."""
        path = path / FILE_NAME if path.is_dir() else path
        return read_record(
            cls,
            path,
            "a report of hilum",
            f"a {FILE_NAME} as `hilum segment` writes it is needed. Delete it and segment the case again.",
        )


Said = TypeVar("Said")


def read_record(kind: type[Said], path: Path, name: str, remedy: str) -> Said:
    """What was said of one case; of another kind, or damaged: not `name`, and the remedy."""
    try:
        return decode(kind, json.loads(path.read_text(encoding="utf-8")), where=path.name)
    except ValueError as mistake:  # no text, no JSON, or another record
        raise UnreadableReport(f"{path} is not {name} ({mistake}); {remedy}") from mistake


def named(explanations: Sequence[Explanation]) -> Iterator[tuple[str, Explanation]]:
    """Each under its own name: of two that are called the same, the second is numbered."""
    met: dict[str, int] = {}
    for each in explanations:
        met[each.name] = met.get(each.name, 0) + 1
        yield each.name if met[each.name] == 1 else f"{each.name}~{met[each.name]}", each


def file_word(words: str) -> str:
    """As a file may be called, on any system."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in words)


def grid(geometry: Geometry) -> dict[str, Any]:
    """A grid in words that JSON knows."""
    return {
        "shape": list(geometry.shape),
        "spacing_mm": list(geometry.spacing),
        "orientation": geometry.orientation,
        "affine": geometry.affine.tolist(),
    }


def millilitres(ml: float) -> str:
    """Three digits that count, and no exponent: 1180 ml, 23.4 ml, 0.052 ml."""
    if ml == 0 or ml >= 100:
        return f"{ml:.0f} ml"
    decimals = max(0, 2 - int(np.floor(np.log10(ml))))
    return f"{ml:.{min(decimals, 5)}f} ml"


def run_words(said: "Result | Report") -> list[tuple[str, str]]:
    """How the networks were run, as name and words; nothing of what was not said."""
    rows = [("engine", said.engine), ("looked at", said.region)]
    if said.windows:
        rows.append(("windows", _counted(said.windows)))
    if said.memory:
        rows.append(("memory", _took(said.memory)))
    return [(name, words) for name, words in rows if words]


def _counted(windows: WindowCount) -> str:
    """What was not computed is told only where there is such."""
    words = [f"{windows.computed} computed"]
    words += [f"{windows.repeated} of one value throughout, their answer taken again"] if windows.repeated else []
    words += [f"{windows.skipped} without body ({windows.body}) called background"] if windows.skipped else []
    return ", ".join(words)


def _took(memory: Memory) -> str:
    """Beside the process itself."""
    took = "" if memory.peak is None else f"took {gigabytes(memory.peak)}, "
    return f"{took}was said to take {gigabytes(memory.stated)} at most{''.join(f'; {one}' for one in memory.words)}"


def gigabytes(size: float) -> str:
    """Bytes as people say them: 12 MB, 2.4 GB."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


SIDES = (("R", "L"), ("A", "P"), ("S", "I"))
"""The side of the patient towards which x, y, z rise, and the other."""


def place(xyz_mm: Sequence[float]) -> str:
    """As consoles write it: R 12.0, P 3.5, S 20.1 mm."""
    sides = (rises if mm >= 0 else falls for mm, (rises, falls) in zip(xyz_mm, SIDES, strict=True))
    return ", ".join(f"{side} {abs(mm):.1f}" for side, mm in zip(sides, xyz_mm, strict=True)) + " mm"


def told(applied: Applied) -> str:
    """What a rule did to a case, in words."""
    changes = [f"{millilitres(ml)} of {name} removed" for name, ml in applied.removed_ml.items()]
    changes += [f"{millilitres(ml)} of {name} added" for name, ml in applied.added_ml.items()]
    return f"{applied.rule}: {', '.join(changes) or 'nothing changed'}"


def hilum_version() -> str:
    """The version that is installed."""
    try:
        return metadata.version("hilum")
    except metadata.PackageNotFoundError:  # run from a checkout that nobody installed
        return "unknown"


def as_json(content: Any) -> str:
    """JSON a person can read. NaN is no JSON, and hides mistakes."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def inert(cell: str) -> str:
    """Spreadsheets run a cell that begins like a formula; an apostrophe before it keeps it text (OWASP)."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def write_whole(path: Path, content: str | bytes) -> None:
    """The file is there with all of its content, or not at all, even when the power fails."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    # a file's name may be no Unicode; \udcff is how JSON, too, writes what such a name holds
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def swap(building: Path, folder: Path) -> None:
    """Put a finished folder in the place of an older one; at no moment is half of either there under the name."""
    recover(folder)
    retired = _retired(folder)
    if folder.exists():
        shutil.rmtree(retired, ignore_errors=True)
        folder.rename(retired)
        building.rename(folder)
        shutil.rmtree(retired)
    else:
        building.rename(folder)


def recover(folder: Path) -> None:
    """Bring the old folder back when a swap was killed after it stepped aside and before the new one stepped in."""
    if not folder.exists() and _retired(folder).exists():
        _retired(folder).rename(folder)


def _retired(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.retired")
