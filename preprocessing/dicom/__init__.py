"""A DICOM series: its frames found, told apart into volumes, put in order by where they lie, and read or refused."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pydicom
from jaxtyping import Shaped

from ..reading import STRICT, Reading
from ..volume import LPS_TO_RAS, Geometry, Provenance, UnreadableScan, Volume
from .frames import SLICES, TAGS, Frame, Intern, frames_of, with_missing_parts
from .headers import DAMAGED, Header, is_dicom, quiet, read_header, why_no_scan
from .pixels import Decoded, Packing, decode_all
from .placing import Placing, place, resample
from .volumes import Part, is_localizer, places, same_direction, volumes_in
from .writing import write_series

__all__ = ["DAMAGED", "LPS_TO_RAS", "Series", "is_dicom", "patient_of", "read", "series_in", "write_series"]


@dataclass(frozen=True, kw_only=True)
class Series:
    """The frames of one volume, not yet read. A DICOM series may hold several volumes, and a file frames of several."""

    uid: str
    """SeriesInstanceUID."""
    study_uid: str = ""
    """StudyInstanceUID; empty where an anonymiser emptied it."""
    paths: tuple[Path, ...]
    modality: str = ""
    description: str = ""
    """SeriesDescription, as a person typed it: not for logs."""
    part: str = ""
    """What tells this volume from the others of its series ('echo 2', 'b 1000'); empty where there are none."""
    frames: tuple[Frame, ...] = field(default=(), repr=False, compare=False)
    copies: tuple[tuple[Path, Path], ...] = field(default=(), repr=False, compare=False)
    """Files that claim to hold the same object: the one whose frames are here, and another one."""
    repairs: tuple[str, ...] = ()
    """What had to be mended before it could be told from others."""
    notes: tuple[str, ...] = ()
    volumes: int = 1
    """How many volumes there are in the DICOM series, with this one."""


Key = tuple[str, str, str, Path | None]
"""StudyInstanceUID, SeriesInstanceUID, PatientID (of two patients anonymisers make one series); without UID, the folder."""


@quiet()
def series_in(paths: Sequence[Path]) -> tuple[list[Series], dict[Path, str]]:
    """The volumes among the files, in order of their first path, and every file left alone with the reason.

    Reads headers only. Folders are left alone too: to walk a tree is the caller's business. A reason that begins with
    DAMAGED means that the file may have been a slice once.
    """
    left_alone: dict[Path, str] = {}
    groups: dict[Key, list[Frame]] = defaultdict(list)
    descriptions: dict[Key, str] = {}
    share = Intern()
    for path in sorted(set(paths)):
        header = read_header(path, TAGS)
        reason = header if isinstance(header, str) else why_no_scan(header)
        if isinstance(header, str) or reason:
            left_alone[path] = reason
            continue
        study, uid, patient = (_said(header, tag) for tag in ("StudyInstanceUID", "SeriesInstanceUID", "PatientID"))
        key = share((study, uid, patient, None if uid else path.parent))
        groups[key] += frames_of(header, share)
        descriptions.setdefault(key, _said(header, "SeriesDescription"))
    left_alone |= _like_slices(left_alone, groups) | _without_nameless(groups)
    groups = _with_half_named(groups)
    series = []
    for key, frames in groups.items():
        if is_localizer(frames):
            left_alone |= {frame.path: "a localizer: few slices in each of three directions" for frame in frames}
        else:
            parts = volumes_in(with_missing_parts(frames))
            series += [_series(part, key, descriptions.get(key, ""), len(parts)) for part in parts]
    return sorted(series, key=lambda one: one.paths[0]), left_alone


def patient_of(path: Path) -> str:
    """A word for the patient of a DICOM file, or of a folder of them: the same for each of their scans, made of PatientID
    without telling it. Empty where no file says it."""
    inside = sorted(one for one in path.iterdir() if not one.name.startswith(".")) if path.is_dir() else [path]
    for one in inside:
        header = read_header(one, ("PatientID",))
        if not isinstance(header, str):  # the slices of a series are of one patient
            said = _said(header, "PatientID")
            return sha256(said.encode()).hexdigest()[:16] if said else ""
    return ""


def _said(header: Header, tag: str) -> str:
    return str(header.elements.get(tag) or "").strip()


def _like_slices(left_alone: dict[Path, str], groups: dict[Key, list[Frame]]) -> dict[Path, str]:
    """Slices without an ending are known by their names: an empty IM0005 beside IM0004 was a slice once."""
    names = {_form(frame.path) for frames in groups.values() for frame in frames}
    reason = f"{DAMAGED}: named like the slices beside it, but not DICOM"
    return {path: reason for path, said in left_alone.items() if said == "not DICOM" and _form(path) in names}


def _form(path: Path) -> tuple[Path, str]:
    """The folder, and the name with one digit for all numbers; where it has none, nothing is like it."""
    form = re.sub(r"\d+", "0", path.name)
    return path.parent, form if "0" in form else path.name


def _with_half_named(groups: dict[Key, list[Frame]]) -> dict[Key, list[Frame]]:
    """Slices without a study or a patient are those of the only study and patient that their series has."""
    mended = "A study or a patient was not named in some slices; it was taken from the others of their series."
    studies: dict[str, set[str]] = defaultdict(set)
    patients: dict[str, set[str]] = defaultdict(set)
    for study, uid, patient, _ in groups:
        studies[uid] |= {study} - {""}
        patients[uid] |= {patient} - {""}
    whole: dict[Key, list[Frame]] = defaultdict(list)
    for key, frames in groups.items():
        _, uid, _, folder = key
        if not uid or len(studies[uid]) > 1 or len(patients[uid]) > 1:
            whole[key] += frames
            continue
        full = (*studies[uid], "")[0], uid, (*patients[uid], "")[0], folder
        whole[full] += frames if full == key else [replace(one, mended=(*one.mended, mended)) for one in frames]
    return whole


def _without_nameless(groups: dict[Key, list[Frame]]) -> dict[Path, str]:
    """Slices that do not say to which series they belong make one if they fill a folder; beside others they are spoiled."""
    named = {frame.path.parent for key, frames in groups.items() if key[1] for frame in frames}
    spoiled: dict[Path, str] = {}
    for key in [key for key in groups if key[3] in named]:
        reason = f"{DAMAGED}: an image that does not say to which series it belongs"
        spoiled |= {frame.path: reason for frame in groups.pop(key)}
    return spoiled


def _series(part: Part, key: Key, description: str, volumes: int) -> Series:
    paths = {frame.path for frame in part.frames} | {other for _, other in part.copies}
    modalities = [frame.traits.modality for frame in part.frames if frame.traits.modality]
    nameless = "The files do not say to which series they belong; those of one folder were taken for one."
    return Series(
        uid=key[1],
        study_uid=key[0],
        paths=tuple(sorted(paths)),
        modality=modalities[0] if modalities else "",
        description=description,
        part=part.name,
        frames=part.frames,
        copies=part.copies,
        repairs=(*part.repairs, *([] if key[1] else [nameless])),
        notes=part.notes,
        volumes=volumes,
    )


@quiet()
def read(series: Series, reading: Reading = STRICT) -> Volume:
    """The volume: columns, rows and slices as i, j, k, the slices along the normal of their plane; or why there is none."""
    name = _name(series)
    _refuse_flaws(series.frames)
    repairs = [*series.repairs, *_mended(series.frames), *_without_copies(series)]
    _refuse_loose(series.frames, name)
    _refuse_two_scales(series.frames, name)
    frames, dropped = _one_at_each_place(series.frames, name)
    placing = place(frames, name, reading)
    try:
        stack, values = _values(placing)
        if placing.resampling is not None:
            stack = resample(stack, placing.resampling, fill=float(stack.min()))
    except MemoryError as error:
        raise UnreadableScan(
            f"{name} needs more memory than there is; a smaller scan is needed. Crop it, or read it on a larger machine.",
            reason="too_large",
        ) from error
    voxels = stack.transpose(2, 1, 0)[None]
    return Volume(
        voxels=voxels,
        geometry=Geometry(shape=voxels.shape[1:], affine=placing.affine),
        channels=("0",),
        provenance=_provenance(series, placing, values, (*repairs, *dropped)),
    )


def _provenance(series: Series, placing: Placing, values: "_Values", repairs: Sequence[str]) -> Provenance:
    files = tuple(dict.fromkeys(str(frame.path) for frame in placing.frames))
    folders = sorted({str(path.parent) for path in series.paths})
    exact = placing.resampling is None and all(frame.tile is None for frame in placing.frames)
    return Provenance(
        sources=tuple(folders) if len(folders) == 1 else files,
        sha256=values.sha256,
        reader=f"pydicom {pydicom.__version__}",
        repairs=tuple(dict.fromkeys([*repairs, *placing.repairs, *values.repairs])),
        notes=(*series.notes, *values.notes, *_notes(series)),
        modality=series.modality,
        frame_of_reference=placing.frames[0].plane.reference if placing.frames[0].plane else "",
        encoding="; ".join(sorted({str(frame.packing) for frame in placing.frames})),
        files=files,
        slices=tuple((str(frame.path), frame.number + 1) for frame in placing.frames) if exact else (),
    )


def _name(series: Series) -> str:
    """Where the series lies; its description may name the patient and is not used."""
    part = f", {series.part}" if series.part else ""
    count = len(series.paths)
    return f"The series in {series.paths[0].parent.name} ({count} file{'' if count == 1 else 's'}{part})"


def _refuse_flaws(frames: Sequence[Frame]) -> None:
    for frame in frames:
        if frame.flaw is not None:
            raise UnreadableScan(frame.flaw.message, reason=frame.flaw.reason)


def _mended(frames: Sequence[Frame]) -> list[str]:
    return list(dict.fromkeys(sentence for frame in frames for sentence in frame.mended))


def _without_copies(series: Series) -> list[str]:
    """The same file twice counts once; two files that claim to be one object are spoiled."""
    for first, other in series.copies:
        try:
            same = first.read_bytes() == other.read_bytes()
        except OSError as error:
            raise UnreadableScan(
                f"{other.name} cannot be read any more ({error.strerror}); every file must be there. Look for it.",
                reason="damaged",
            ) from error
        if not same:
            raise UnreadableScan(
                f"{_name(series)}: {first.name} and {other.name} bear one SOPInstanceUID and differ; one object must "
                "have one content. Find out which is the true one, and take the other away.",
                reason="contradiction",
            )
    return [f"{len(series.copies)} slice(s) lay there twice and were taken once."] if series.copies else []


def _refuse_loose(frames: Sequence[Frame], name: str) -> None:
    """Slices that lie at random, and films of one slice, are no volume whatever else is right with them."""
    if not same_direction(frames):
        raise UnreadableScan(
            f"{name} mixes {len(frames)} slices of which each lies in another direction; a volume needs slices above each "
            "other. Choose the series from which they were made.",
            reason="mixed",
        )
    if len(frames) > 1 and len(set(places(frames).tolist())) == 1:
        raise UnreadableScan(
            f"{name} has {len(frames)} frames at one place; a volume needs at least 3 places. Look for the other slices.",
            reason="too_few_slices",
        )


def _refuse_two_scales(frames: Sequence[Frame], name: str) -> None:
    """A slice that says nothing of its scale among others that do has most likely lost it."""
    scales = {frame.scale for frame in frames}
    if len({scale.stated for scale in scales}) > 1 and any(
        scale.table or (scale.slope, scale.intercept) != (1, 0) for scale in scales
    ):
        odd = Counter(frame.scale.stated for frame in frames).most_common()[-1][0]
        first = next(frame for frame in frames if frame.scale.stated == odd)
        raise UnreadableScan(
            f"{name} gives a slope, an intercept or a lookup table for some slices and not for others, as for "
            f"{first.path.name}; values of one scale are needed. Export the series again.",
            reason="values",
        )


def _one_at_each_place(frames: Sequence[Frame], name: str) -> tuple[list[Frame], list[str]]:
    """Frames that lie at one place and are alike count once; where they differ, nobody knows which one is meant."""
    numbers = places(frames).tolist()
    counts = Counter(numbers)
    doubtful = [frame for frame, number in zip(frames, numbers, strict=True) if counts[number] > 1]
    if not doubtful:
        return list(frames), []
    contents = _contents(doubtful)
    kept: dict[int, Frame] = {}
    for frame, number in zip(frames, numbers, strict=True):
        first = kept.setdefault(number, frame)
        if first is not frame and contents[first] != contents[frame]:
            several = sum(count > 1 for count in counts.values())
            raise UnreadableScan(
                f"{name} has {several} place(s) at which several slices lie that differ ({first.path.name} and "
                f"{frame.path.name}, for one), and nothing says what makes them different; time points, echoes or "
                "repeats must come apart. Split the series by what makes them differ.",
                reason="duplicate_slices",
            )
    sentence = (
        f"{len(frames) - len(kept)} slice(s) lay at the place of another one of the same content and were left out."
    )
    return list(kept.values()), [sentence]


def _contents(frames: Sequence[Frame]) -> dict[Frame, str]:
    """A hash of the values of each frame."""
    found: dict[Frame, str] = {}

    def take(frame: Frame, plane: np.ndarray) -> None:
        found[frame] = sha256(repr(frame.scale).encode() + plane.dtype.str.encode() + plane.tobytes()).hexdigest()

    _decode(frames, lambda n, plane: take(frames[n], plane))
    return found


def _decode(frames: Sequence[Frame], receive: Callable[[int, np.ndarray], None]) -> Decoded:
    """Every frame's stored values, under its number in the sequence; several threads call `receive` at once."""
    files: dict[Path, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for n, frame in enumerate(frames):
        files[frame.path][frame.number].append(n)
    wanted = [(path, next(iter(numbers.values()))[0], sorted(numbers)) for path, numbers in files.items()]
    whole = list(files.values())

    def pass_on(file: int, number: int, plane: np.ndarray) -> None:
        for n in whole[file][number]:
            frame = frames[n]
            top, left = frame.tile or (0, 0)
            receive(n, plane[top : top + frame.size[0], left : left + frame.size[1]])

    return decode_all([(path, _packing(frames[n]), numbers) for path, n, numbers in wanted], pass_on)


def _packing(frame: Frame) -> Packing:
    assert frame.packing is not None  # a frame without one has a flaw
    return frame.packing


@dataclass(frozen=True, kw_only=True)
class _Values:
    """What is to be told of the values that were read."""

    sha256: str
    repairs: tuple[str, ...]
    notes: tuple[str, ...]


def _values(placing: Placing) -> tuple[Shaped[np.ndarray, "slice row column"], _Values]:
    """The slices after rescaling each by its own numbers, and what one should know of them."""
    frames = placing.frames
    kind = _kind(frames)
    stack = np.empty((len(frames), *frames[0].size), kind)
    padded = np.zeros(len(frames), np.int64)
    lowest = np.full(len(frames), np.inf)
    some_padding = any(frame.scale.padding for frame in frames)

    def take(n: int, plane: np.ndarray) -> None:
        _rescale(plane, frames[n], stack[n])
        if some_padding:
            padded[n], lowest[n] = _measured(plane, frames[n], stack[n])

    decoded = _decode(frames, take)
    repairs = _without_padding(stack, frames, padded, float(lowest.min())) if padded.any() else []
    wide = kind == np.float32 and any(_packing(frame).stored > 24 for frame in frames)
    rounded = ["Stored values of more than 24 bits were rounded to float32."] if wide else []
    return stack, _Values(sha256=decoded.sha256, repairs=(*decoded.mended, *repairs), notes=tuple(rounded))


def _kind(frames: Sequence[Frame]) -> np.dtype:
    """int16 or int32 where every value the headers allow is whole and fits, else float32."""
    ends: list[float] = []
    for packing, scale in {(_packing(frame).least_and_most, frame.scale) for frame in frames}:
        if scale.table:
            table = np.frombuffer(scale.table, np.uint16)
            ends += [float(table.min()), float(table.max())]
        elif not scale.slope.is_integer() or not scale.intercept.is_integer():
            return np.dtype(np.float32)
        else:
            ends += [end * scale.slope + scale.intercept for end in packing]
    kinds = (np.dtype(np.int16), np.dtype(np.int32))
    fitting = (kind for kind in kinds if np.iinfo(kind).min <= min(ends) and max(ends) <= np.iinfo(kind).max)
    return next(fitting, np.dtype(np.float32))


def _rescale(plane: Shaped[np.ndarray, "row column"], frame: Frame, out: Shaped[np.ndarray, "row column"]) -> None:
    """Integers are computed modulo their width, without a wider copy: `_kind` has seen to it that the results fit."""
    scale = frame.scale
    if scale.table:
        table = np.frombuffer(scale.table, np.uint16)
        out[...] = table[np.clip(plane.astype(np.int64) - scale.first, 0, len(table) - 1)]
    elif out.dtype.kind == "f":
        out[...] = plane.astype(np.float64) * scale.slope + scale.intercept
    else:
        np.copyto(out, plane, casting="unsafe")
        slope, intercept = (np.int64(int(number)).astype(out.dtype) for number in (scale.slope, scale.intercept))
        if slope != 1:
            np.multiply(out, slope, out=out)
        if intercept != 0:
            np.add(out, intercept, out=out)


def _measured(
    plane: Shaped[np.ndarray, "row column"], frame: Frame, values: Shaped[np.ndarray, "row column"]
) -> tuple[int, float]:
    """How many pixels hold padding, and the lowest value of the others."""
    if frame.scale.padding is None:
        return 0, float(values.min())
    least, most = frame.scale.padding
    hidden = plane == least if least == most else (plane >= least) & (plane <= most)
    count = int(np.count_nonzero(hidden))
    if not count:
        return 0, float(values.min())
    return count, float(values[~hidden].min()) if count < hidden.size else np.inf


def _without_padding(
    stack: Shaped[np.ndarray, "slice row column"], frames: Sequence[Frame], padded: np.ndarray, lowest: float
) -> list[str]:
    """Pixels outside of what was measured become the lowest value, in place; nothing where they are a plain background."""
    changed = 0
    for n in np.flatnonzero(padded).tolist():
        scale = frames[n].scale
        assert scale.padding is not None
        ends = np.empty((1, 2), stack.dtype)
        _rescale(np.array([scale.padding]), frames[n], ends)
        least, most = ends.min(), ends.max()
        if not np.isfinite(lowest) or (least == most == 0 and lowest >= 0) or least == most == lowest:
            continue
        np.copyto(stack[n], stack.dtype.type(lowest), where=(stack[n] >= least) & (stack[n] <= most))
        changed += int(padded[n])
    if not changed:
        return []
    return [f"{changed} pixel(s) of padding, where nothing was measured, became the lowest measured value, {lowest:g}."]


def _notes(series: Series) -> list[str]:
    """What one should know and nothing was done about."""
    frames = series.frames
    lossy = sum(_packing(frame).lossy for frame in frames)
    inverted = any(_packing(frame).photometric == "MONOCHROME1" for frame in frames)
    unknown = {frame.clues.kind for frame in frames} - {str(known) for known in SLICES}
    notes = {
        f"{lossy} slice(s) had been compressed with loss before they came here.": lossy,
        "Its values are meant to be shown inverted (MONOCHROME1); they were left as they are.": inverted,
        "Its files are of a class that no standard knows, and were read as plain slices.": any(
            pydicom.uid.UID(kind).name == kind for kind in unknown
        ),
        "Its slices were cut out of mosaics.": any(frame.tile for frame in frames),
        f"It is one of {series.volumes} volumes in its series: {series.part}.": series.volumes > 1,
        **_sent_in_part(series),
    }
    return [note for note, holds in notes.items() if holds]


def _sent_in_part(series: Series) -> dict[str, bool]:
    """Slices lost at an end leave no gap: only these numbers, which nobody has to fill in rightly, hint at them."""
    instances = [frame.clues.instance for frame in series.frames]
    single = all(_packing(frame).frames == 1 and frame.tile is None for frame in series.frames)
    if series.part or not single or any(instance is None for instance in instances):
        return {}
    first = min(int(instance) for instance in instances if instance is not None)
    announced = max(frame.announced for frame in series.frames)
    return {
        f"Instance numbers begin at {first}: slices at an end may not have been sent.": first > 1,
        f"{announced} images were announced and {len(instances)} are there: slices may not have been sent.": (
            announced > len(instances) and len({frame.clues.acquisition for frame in series.frames}) == 1
        ),
    }
