"""Which series of a study a package is asked about, by rules a hospital wrote down; and of every other series why not."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from preprocessing import dicom
from preprocessing.dicom.headers import read_header
from preprocessing.dicom.volumes import places
from preprocessing.records import BadRecord

Direction = Literal["axial", "coronal", "sagittal", "oblique"]
Preference = Literal["most_slices", "thinnest", "all"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a series must be; what is left empty is not asked."""

    modality: tuple[str, ...] = ()
    """CT, MR, PT ...: one of these."""
    description: str = ""
    """A regular expression that SeriesDescription must contain, whatever the case of its letters."""
    not_description: str = ""
    """One that it must not contain."""
    direction: tuple[Direction, ...] = ()
    """How its slices lie: one of these."""
    least_slices: int = 0
    most_slices: int | None = None
    widest_mm: float | None = None
    """Its slices lie no further apart than this."""
    contrast: bool | None = None
    """Whether a contrast agent is named. A header that names none may have forgotten it: false is weaker than true."""
    image_type: tuple[str, ...] = ()
    """Words that ImageType must hold, as ORIGINAL or PRIMARY."""
    not_image_type: tuple[str, ...] = ()
    """Words that it must not hold, as DERIVED or MIP."""
    part: str = ""
    """A regular expression for what tells a volume from others of its series: echo 2, b 1000."""

    def __post_init__(self) -> None:
        for name in ("description", "not_description", "part"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise BadRecord(
                    f"a rule's {name} is {getattr(self, name)!r}, which is no regular expression ({error}); one is needed. "
                    "Correct it, or leave it out."
                ) from None

    def unmet(self, facts: "SeriesFacts") -> tuple[str, ...]:
        """What the series is not. Only the rule's own words are said: a description may name a patient."""
        return tuple(words for words, holds in self._asked(facts) if not holds)

    def _asked(self, facts: "SeriesFacts") -> list[tuple[str, bool]]:
        distance = "unknown" if facts.distance_mm is None else f"{facts.distance_mm:.2f}"
        types = set(facts.image_type)
        asked = [
            (f"modality {facts.told_modality}, not {_or(self.modality)}",
             not self.modality or facts.modality in self.modality),
            (f"its description does not hold /{self.description}/", _found(self.description, facts.description)),
            (f"its description holds /{self.not_description}/",
             not self.not_description or not _found(self.not_description, facts.description)),
            (f"slices {facts.direction}, not {_or(self.direction)}",
             not self.direction or facts.direction in self.direction),
            (f"{facts.slices} slices, fewer than {self.least_slices}", facts.slices >= self.least_slices),
            (f"{facts.slices} slices, more than {self.most_slices}",
             self.most_slices is None or facts.slices <= self.most_slices),
            (f"slices {distance} mm apart, more than {self.widest_mm}",
             self.widest_mm is None or (facts.distance_mm is not None and facts.distance_mm <= self.widest_mm)),
            ("no contrast agent is named" if self.contrast else "a contrast agent is named",
             self.contrast is None or facts.contrast == self.contrast),
            (f"its image type lacks {_or(sorted(set(self.image_type) - types))}", types >= set(self.image_type)),
            (f"its image type has {_or(sorted(types & set(self.not_image_type)))}",
             not types & set(self.not_image_type)),
            (f"it is not /{self.part}/ of its series", _found(self.part, facts.part)),
        ]  # fmt: skip
        return asked


def _found(pattern: str, words: str) -> bool:
    return not pattern or re.search(pattern, words, re.IGNORECASE) is not None


def _or(words: Sequence[str]) -> str:
    return " or ".join(words)


@dataclass(frozen=True, kw_only=True)
class SeriesFacts:
    """What rules ask of a volume of a series, from its headers."""

    series: dicom.Series = field(repr=False)
    modality: str = field(repr=False)
    description: str = field(repr=False)
    direction: Direction
    slices: int
    distance_mm: float | None
    """The median distance between neighbouring slices; None of a single one, or where nothing says where slices lie."""
    contrast: bool
    image_type: tuple[str, ...]
    part: str

    @property
    def told_modality(self) -> str:
        """Where DICOM has such a modality; whatever else stands there somebody may have typed."""
        return self.modality if self.modality in MODALITIES else "unknown"


MODALITIES = frozenset(re.findall(
    r"\w+", "ANN AR ASMT AU BDUS BI BMD CFM CR CT CTPROTOCOL DG DMS DOC DX ECG EEG EMG EOG EPS ES FID GM HC HD IO IOL IVOCT IVUS KER "
    "KO LEN LS MG MR M3D NM OAM OCT OP OPM OPT OPTBSV OPTENF OPV OSS OT PA PLAN POS PR PT PX REG RESP RF RG RTDOSE RTIMAGE "
    "RTINTENT RTPLAN RTRAD RTRECORD RTSEGANN RTSTRUCT RWV SEG SM SMR SR SRF STAIN TEXTUREMAP TG US VA XA XAPROTOCOL XC "
    "AS CD CF CP CS DD DF DM DS EC FA FS LP MA MS OPR ST VF",
))  # fmt: skip
"""PS3.3 C.7.3.1.1.1, those that are retired in the last line."""


OBLIQUE_DEGREES = 30.0
"""Slices tilted further than this away from the body's axes are called oblique; a head's tilted axial slices are not."""


def facts_of(series: dicom.Series) -> SeriesFacts:
    """Of one volume; its first file says what all of them share."""
    header = read_header(series.paths[0], ("ContrastBolusAgent", "ContrastBolusAgentSequence", "ImageType"))
    said = {} if isinstance(header, str) else header.elements
    kinds = said.get("ImageType") or ()
    frames = series.frames
    return SeriesFacts(
        series=series,
        modality=series.modality,
        description=series.description,
        direction=_direction(series),
        slices=len(frames),
        distance_mm=_distance(series),
        contrast=bool(said.get("ContrastBolusAgent") or said.get("ContrastBolusAgentSequence")),
        image_type=tuple(str(word).upper() for word in ((kinds,) if isinstance(kinds, str) else kinds)),
        part=series.part,
    )


def _direction(series: dicom.Series) -> Direction:
    plane = series.frames[0].plane if series.frames else None
    if plane is None:
        return "oblique"
    normal = np.abs(np.cross(plane.row, plane.column))
    axis = int(normal.argmax())
    if normal[axis] < np.cos(np.radians(OBLIQUE_DEGREES)):
        return "oblique"
    directions: tuple[Direction, ...] = ("sagittal", "coronal", "axial")
    return directions[axis]


def _distance(series: dicom.Series) -> float | None:
    frames = series.frames
    if len(frames) < 2 or any(frame.position is None or frame.plane is None for frame in frames):
        return None
    plane = frames[0].plane
    assert plane is not None
    heights = np.array([frame.position for frame in frames]) @ np.cross(plane.row, plane.column)
    numbers = places(frames)
    apart = np.diff([float(np.median(heights[numbers == number])) for number in range(numbers.max() + 1)])
    return float(np.median(apart)) if len(apart) else None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a route takes of a study, and why it leaves the rest."""

    chosen: tuple[tuple[SeriesFacts, ...], ...]
    """Each a case: one series per channel of the package, in its order."""
    why_not: tuple[tuple[SeriesFacts, str], ...]
    """Every series that no case has, with the reason."""

    @property
    def refusal(self) -> str:
        """Why there is nothing to do; empty where there is."""
        if self.chosen:
            return ""
        return (
            "no series of the study fits this route's rules" if self.why_not else "the study holds no series of images"
        )


def choose(series: Sequence[SeriesFacts], rules: Mapping[str, Rule], prefer: Preference) -> Choice:
    """One rule per channel of a package, its name the key. Among several that fit a channel `prefer` settles which, and the
    others are told that one was preferred; `all` makes a case of each, for packages of one channel."""
    if prefer == "all" and len(rules) > 1:
        raise BadRecord(
            f"a route of {len(rules)} channels prefers 'all'; which series belong together nobody could say. Choose "
            "most_slices or thinnest."
        )
    fitting = {name: [one for one in series if not rule.unmet(one)] for name, rule in rules.items()}
    if prefer == "all":
        (found,) = fitting.values()
        return Choice(chosen=tuple((one,) for one in found), why_not=_left(series, found, rules, ""))
    best = {name: min(found, key=_order(prefer)) for name, found in fitting.items() if found}
    twice = len({id(one.series) for one in best.values()}) < len(best)
    missing = [name for name in rules if name not in best]
    if missing or twice:
        reason = (
            f"no series fits the channel {_or(missing)}"
            if missing
            else "one series fits several channels best; make the rules differ"
        )
        return Choice(chosen=(), why_not=_left(series, [], rules, reason))
    case = tuple(best[name] for name in rules)
    return Choice(chosen=(case,), why_not=_left(series, case, rules, f"another series is preferred ({prefer})"))


def _order(prefer: Preference) -> Callable[[SeriesFacts], tuple[Any, ...]]:
    """Ties go to the series whose UID comes first: the same study gives the same choice."""
    if prefer == "thinnest":
        return lambda one: (
            np.inf if one.distance_mm is None else one.distance_mm,
            -one.slices,
            one.series.uid,
            one.part,
        )
    return lambda one: (-one.slices, one.series.uid, one.part)


def _left(
    series: Sequence[SeriesFacts], taken: Sequence[SeriesFacts], rules: Mapping[str, Rule], otherwise: str
) -> tuple[tuple[SeriesFacts, str], ...]:
    return tuple((one, _why_not(one, rules) or otherwise) for one in series if not any(one is those for those in taken))


def _why_not(facts: SeriesFacts, rules: Mapping[str, Rule]) -> str:
    """What it is not, channel by channel; nothing where it fits one."""
    unmet = {name: rule.unmet(facts) for name, rule in rules.items()}
    if not all(unmet.values()):
        return ""
    if len(rules) == 1:
        return "; ".join(next(iter(unmet.values())))
    return "; ".join(f"{name}: {', '.join(words)}" for name, words in unmet.items())
