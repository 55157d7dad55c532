"""Cases in any mix of files, series folders and trees: found, told apart, brought together by name, never by guess."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from preprocessing import dicom, files
from preprocessing.dicom.headers import read_header

from .errors import UsageError
from .scan import VOXELS_OF, Scan, beside

RESULTS = {"report.json": "a result of hilum", "verdict.json": "a scan converted by hilum; name its folder to read it"}
"""Files by which a folder is known as ours, and what is said of it when it lies in a tree."""


@dataclass(frozen=True, kw_only=True)
class Finds:
    """What lies in the files and folders that were named."""

    scans: tuple[Scan, ...]
    left_alone: dict[str, str]
    """Files that are no scans, and why."""


def find_scans(inputs: Sequence[Path], channels: Sequence[str] = (), out: Path | None = None) -> Finds:
    """Every case in any mix of files, series folders and trees; refused when there is none at all."""
    scans: list[Scan] = []
    left_alone: dict[str, str] = {}
    for path in inputs:
        _refuse_mistake(path, out)
        scans += _scans_in(path, channels, out, left_alone)
    if not scans:
        reasons = "".join(f"\n  {file}: {reason}" for file, reason in list(left_alone.items())[:5])
        raise UsageError(
            f"no scan was found in {', '.join(map(str, inputs))}; NIfTI, NRRD, MetaImage or DICOM is needed.{reasons}"
        )
    apart = sorted(_told_apart(scans), key=lambda scan: scan.case_id)
    return Finds(scans=tuple(apart), left_alone=left_alone)


def _refuse_mistake(path: Path, out: Path | None) -> None:
    if not _holds(path.exists):
        raise UsageError(
            f"{path} does not exist; a scan, a series folder or a tree of them is needed. Look at the spelling."
        )
    if out is not None and path.resolve() == out.resolve():
        raise UsageError(f"{path} is both the input and --out; results need a folder of their own. Give another --out.")


def _scans_in(path: Path, channels: Sequence[str], out: Path | None, left_alone: dict[str, str]) -> Iterator[Scan]:
    seen = _series_around(path) if path.is_file() else list(_files_in(path, path, out, left_alone))
    images = [file for file in seen if _is_image(file)]
    voxels = {file for image in images for file in beside(image)}
    series, others = dicom.series_in([file for file in seen if file not in voxels and file not in images])
    unnamed = [file for file in others if files.is_scan(file)]
    images += unnamed
    others = {file: reason for file, reason in others.items() if file not in unnamed}
    if path.is_file():  # one slice stands for its series, and for nothing else in the folder
        images = [file for file in images if path in (file, *beside(file))]
        series = [one for one in series if path in one.paths]
        others = {file: reason for file, reason in others.items() if file == path or reason.startswith(dicom.DAMAGED)}
    series, more = _exports_apart(series)
    others |= more
    damaged = {file: reason for file, reason in others.items() if reason.startswith(dicom.DAMAGED)}
    left_alone |= {str(file): _plainer(file, reason) for file, reason in others.items() if file not in damaged}
    pieces = [_Piece(place=_place(file), path=file, series=None) for file in images if file not in voxels]
    pieces += [_Piece(place=_home(one.paths), path=_home(one.paths), series=one) for one in series]
    scans = list(_with_damage(list(_cases(pieces, path, channels)), damaged, path))
    of_cases = {file for scan in scans for file in scan.files}
    left_alone |= {
        str(file): f"{reason}; the series beside it are refused"
        for file, reason in damaged.items()
        if file not in of_cases
    }
    yield from scans


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A file or a series: a whole case, or one channel of one."""

    place: Path
    path: Path
    series: dicom.Series | None

    @property
    def name(self) -> str:
        return files.stem(self.place)


LINKS_LIMIT = 2
"""Links to folders followed one behind the other; folders that link to each other are a maze without an end."""


def _files_in(
    folder: Path, root: Path, out: Path | None, left_alone: dict[str, str], came_by: tuple[Path, ...] = ()
) -> Iterator[Path]:
    """Every file below, in order; hidden ones and `out` are nobody's input, earlier results are named and left alone."""
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        left_alone[str(folder)] = f"a folder that cannot be opened ({error.strerror}); nobody knows what is in it"
        return
    for path in inside:
        if path.name.startswith(".") or (out is not None and path.resolve() == out.resolve()):
            continue
        is_folder = _holds(path.is_dir)
        is_link = is_folder and path.is_symlink()
        if is_link and (path.resolve() in (*came_by, folder.resolve(), *folder.resolve().parents)):
            left_alone[str(path)] = "a link to a folder that it lies in"
            continue
        if is_link and len(came_by) == LINKS_LIMIT:
            left_alone[str(path)] = "a link to a folder, behind too many other ones"
            continue
        mark = next((mark for mark in RESULTS if _holds((path / mark).exists)), "")
        if mark == "report.json" or (mark and folder != root):  # who names a folder of converted scans means them
            left_alone[str(path)] = RESULTS[mark]
        elif is_folder:
            yield from _files_in(path, root, out, left_alone, (*came_by, path.resolve()) if is_link else came_by)
        elif _holds(path.is_file) or _holds(path.is_symlink):  # one that leads nowhere may have been a slice
            yield path
        else:
            left_alone[str(path)] = "no file that can be looked at (a pipe, a device, or closed to this user)"


def _holds(claim: Callable[[], bool]) -> bool:
    """Nothing does of what is closed to this user, where pathlib raises."""
    try:
        return claim()
    except OSError:
        return False


def _is_image(file: Path) -> bool:
    """A file whose name says that it is a scan; unless it is a slice of DICOM under a false name."""
    return files.stem(file) != file.name and (files.is_scan(file) or not dicom.is_dicom(file))


def _series_around(path: Path) -> list[Path]:
    """The file; for a DICOM slice, everything beside it, for its series lies there; for voxels alone, their header."""
    if _is_image(path):
        return [path, *beside(path)]
    around = sorted(file for file in path.parent.iterdir() if file.is_file())
    headers = [file for file in around if path in beside(file)]
    return around if dicom.is_dicom(path) else [*headers, path]


def _exports_apart(series: Sequence[dicom.Series]) -> tuple[list[dicom.Series], dict[Path, str]]:
    """A series may be spread over folders, as on a disc, and is one case; the same slices in two folders, packed
    differently, are two exports of it, and each is a case."""
    whole: list[dicom.Series] = []
    others: dict[Path, str] = {}
    of_one_uid: dict[tuple[str, str], list[dicom.Series]] = {}
    for one in series:
        of_one_uid.setdefault((one.study_uid, one.uid), []).append(one)
    for those in of_one_uid.values():
        folders: dict[Path, list[Path]] = {}
        for path in sorted({path for one in those for path in one.paths}):
            folders.setdefault(path.parent, []).append(path)
        if len(folders) == 1 or not _are_exports(folders.values()):
            whole += those
            continue
        for paths in folders.values():
            found, left = dicom.series_in(paths)
            whole += found
            others |= left
    return whole, others


def _are_exports(folders: Iterable[Sequence[Path]]) -> bool:
    """Whether one slice lies in two folders with other bytes."""
    seen: dict[str, Path] = {}
    for path in (path for paths in folders for path in paths):
        header = read_header(path, ("SOPInstanceUID",))
        uid = "" if isinstance(header, str) else str(header.elements.get("SOPInstanceUID") or "")
        twin = seen.setdefault(uid, path)
        if uid and twin.parent != path.parent and files.sha256([twin]) != files.sha256([path]):
            return True
    return False


def _plainer(file: Path, reason: str) -> str:
    """Half of a pair is not just 'not DICOM'."""
    halves = tuple(ending for endings in VOXELS_OF.values() for ending in endings)
    return "voxels without the .hdr that belongs to them" if file.name.lower().endswith(halves) else reason


def _place(image: Path) -> Path:
    """Where a file's case lies: a converted scan is its folder, whose name is the case's."""
    return image.parent if (image.parent / "verdict.json").exists() and image.name == "image.nii.gz" else image


def _home(paths: Sequence[Path]) -> Path:
    """The folder a series lies in; the file itself when it is only one among others."""
    if len(paths) == 1:
        return paths[0]
    parents = {path.parent for path in paths}
    return parents.pop() if len(parents) == 1 else Path(*_common([path.parent.parts for path in paths]))


def _common(parts: Sequence[Sequence[str]]) -> list[str]:
    """The names that all paths begin with."""
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return shared


def _cases(pieces: Sequence[_Piece], root: Path, channels: Sequence[str]) -> Iterator[Scan]:
    """Channels of one patient are brought together by name and never by guess; every other piece is a case of its own."""
    taken: set[int] = set()
    for group, name in (*_by_channel_name(pieces, channels), *_by_number(pieces, channels)):
        if taken.isdisjoint(map(id, group)):
            taken |= set(map(id, group))
            yield _scan(name, group, root)
    left = [piece for piece in pieces if id(piece) not in taken]
    series_at: dict[Path, set[str]] = {}
    for piece in left:
        series_at.setdefault(piece.place, set()).add(piece.series.uid if piece.series else "")
    for piece in left:
        yield _scan(piece.place, [piece], root, _suffix(piece.series, len(series_at[piece.place]) > 1))


def _suffix(series: dicom.Series | None, shared: bool) -> str:
    """What tells a series from others of its folder, and a volume from others of its series. UIDs are hashed: they are
    header text, and header text is no path."""
    if series is None:
        return ""
    uid = f"-{_short(series.uid)}" if shared else ""
    return uid + (f"-{_safe(series.part)[:80]}" if series.part else "")


def _with_damage(scans: Sequence[Scan], damaged: dict[Path, str], root: Path) -> Iterator[Scan]:
    """A damaged file may be the slice a series lacks: every series of its folder is refused; alone, it is a case itself."""
    series = {file.parent for scan in scans if scan.series for file in scan.files}
    for scan in scans:
        around = {file.parent for file in scan.files} if scan.series else set()
        near = [file for file in damaged if file.parent in around]
        if near:
            what = f"{near[0].name} beside the series is {damaged[near[0]]}; it may be one of its slices. Export the series again."
            scan = replace(scan, refusal=what)
        yield scan
    for file, reason in damaged.items():
        if file.parent not in series:
            alone = _scan(file, [_Piece(place=file, path=file, series=None)], root)
            yield replace(alone, refusal=f"{file.name} is {reason}; a whole DICOM file is needed. Export it again.")


def _by_channel_name(pieces: Sequence[_Piece], channels: Sequence[str]) -> Iterator[tuple[list[_Piece], Path]]:
    """case/t1.nii.gz + case/t2.nii.gz, or case/t1/*.dcm + case/t2/*.dcm: the folder is the case."""
    if len(channels) < 2:
        return
    together: dict[Path, dict[str, list[_Piece]]] = {}
    for piece in pieces:
        together.setdefault(piece.place.parent, {}).setdefault(piece.name.lower(), []).append(piece)
    for folder, named in together.items():
        wanted = [named.get(channel.lower(), []) for channel in channels]
        if all(len(found) == 1 for found in wanted):
            yield [found[0] for found in wanted], folder


def _by_number(pieces: Sequence[_Piece], channels: Sequence[str]) -> Iterator[tuple[list[_Piece], Path]]:
    """nnU-Net's case_0000.nii.gz, case_0001.nii.gz; a number that is there twice brings nothing together."""
    numbered: dict[Path, dict[int, list[_Piece]]] = {}
    for piece in pieces:
        match = re.fullmatch(r"(.+)_(\d{4})", piece.name)
        if match and int(match[2]) < len(channels) and piece.series is None:
            numbered.setdefault(piece.place.parent / match[1], {}).setdefault(int(match[2]), []).append(piece)
    for name, found in numbered.items():
        if all(len(pieces) == 1 for pieces in found.values()):
            yield [found[number][0] for number in sorted(found)], name


def _scan(place: Path, group: Sequence[_Piece], root: Path, suffix: str = "") -> Scan:
    inner = place.relative_to(root).parts if place != root and place.is_relative_to(root) else (root.resolve().name,)
    name = "_".join((*inner[:-1], files.stem(Path(inner[-1]))))
    safe = _safe(name).lstrip(".")[:100]
    if safe != name:
        suffix += f"-{_short(name)}"  # two names that differ only in what a file system dislikes stay two
    series = tuple(piece.series for piece in group)
    return Scan(case_id=safe + suffix, paths=tuple(piece.path for piece in group), series=series if any(series) else ())


def _safe(name: str) -> str:
    """The name with an underscore for whatever a file system, a shell or a web page might take amiss."""
    return re.sub(r"[^\w.\-]", "_", name)


def _told_apart(scans: Sequence[Scan]) -> Iterator[Scan]:
    """Two scans of one name, from two folders, keep both: each takes a few letters of its own path."""
    different: dict[tuple[str, ...], Scan] = {}
    for scan in scans:
        real = tuple(sorted(str(file.resolve()) for file in scan.files))
        different.setdefault((*real, *scan.parts), scan)  # one may be named twice
    count = Counter(scan.case_id for scan in different.values())
    for real, scan in different.items():
        own = _short(real[0] + "".join(scan.parts))
        yield scan if count[scan.case_id] == 1 else replace(scan, case_id=f"{scan.case_id}-{own}")


def _short(words: str) -> str:
    return sha256(os.fsencode(words)).hexdigest()[:6]  # a name may be no Unicode
