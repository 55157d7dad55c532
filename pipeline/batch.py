"""Many scans: found, segmented one by one, each by itself; what is complete is never done twice, what fails is said why."""

import fcntl
import logging
import re
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from preprocessing import dicom, files
from preprocessing.records import decode, nearest

from . import outputs, tracking
from .config import Segment
from .errors import UsageError, is_users, stopped_by_signals
from .index import Row, counts, write_index
from .package import ModelPackage
from .prediction import Inference, choose_device
from .progress import Progress, silent
from .report import Report, UnreadableReport, as_json, recover, swap, write_whole
from .segmentation import Model, Scan, segment_case

logger = logging.getLogger(__name__)

INDEX_SECONDS = 20
"""The index is written at least so often, so that a night can be watched."""

SKIPPED = "skipped as complete"
EARLIER = "from an earlier run"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What came of a run over many scans."""

    folder: Path
    rows: tuple[Row, ...]

    def told(self) -> str:
        """'3 done, 1 failed', in words."""
        return ", ".join(
            f"{number} {status}" for status, number in counts(self.rows).items() if number or status == "done"
        )

    @property
    def failed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == "failed")


def segment(
    scans: Sequence[Path], package: Path | str, out: Path, settings: Segment = Segment(), progress: Progress = silent  # noqa: B008
) -> Batch:  # fmt: skip
    """Segment every scan found; `out` gets a folder per case, a summary and an index. One bad case never stops the rest."""
    _refuse_mistakes(settings)
    opened = open_package(package, settings.tracking_uri)
    found = find_scans(scans, opened.plan.channels, out)
    how = Inference(overlap=settings.overlap, flips=settings.flips, device=settings.device)
    choose_device(how.device)
    out.mkdir(parents=True, exist_ok=True)
    with _alone_in(out), stopped_by_signals("complete cases are kept. The same command goes on from there."):
        rows = list(_earlier(out, {scan.case_id for scan in found.scans}))
        written = time.monotonic()
        model: Model | None = None
        try:
            for done, scan in enumerate(found.scans, start=1):
                row = _complete(scan, opened, out, settings)
                if row is None:
                    model = model or Model.load(opened)
                    row = _isolated(scan, model, out, settings, how)
                rows.append(row)
                progress("segment", done, len(found.scans), f"{sum(r.status == 'failed' for r in rows)} failed")
                if time.monotonic() - written > INDEX_SECONDS:
                    _write_index(out, rows, found.left_alone, opened)
                    written = time.monotonic()
        finally:
            _write_index(out, rows, found.left_alone, opened)
    return Batch(folder=out, rows=tuple(rows))


def _refuse_mistakes(settings: Segment) -> None:
    """A typo in an output or its options is told now, not after the first scan."""
    for name in settings.outputs:
        decode(outputs.load(name).Config, settings.output_options.get(name, {}), where=f"output_options.{name}")
    for name in settings.output_options:
        if name not in settings.outputs:
            raise UsageError(
                f"output_options speaks of {name!r}, which is not among the outputs{nearest(name, settings.outputs)} "
                f"Those asked for: {', '.join(settings.outputs)}."
            )


def open_package(package: Path | str, tracking_uri: str | None = None) -> ModelPackage:
    """A package from a folder, or from the MLflow registry by models:/NAME@ALIAS."""
    if str(package).startswith("models:/"):
        uri = tracking_uri or tracking.default_uri()
        return ModelPackage.load(tracking.fetch(str(package), tracking.home() / "packages", uri))
    return ModelPackage.load(Path(package))


@dataclass(frozen=True, kw_only=True)
class Finds:
    """What lies in the files and folders that were named."""

    scans: tuple[Scan, ...]
    left_alone: dict[str, str]
    """Files that are no scans, and why."""


def find_scans(inputs: Sequence[Path], channels: Sequence[str], out: Path) -> Finds:
    """Every case in any mix of files, series folders and trees; refused when there is none at all."""
    scans: list[Scan] = []
    left_alone: dict[str, str] = {}
    for path in inputs:
        if not path.exists():
            raise UsageError(
                f"{path} does not exist; a scan, a series folder or a tree of them is needed. Look at the spelling."
            )
        if path.resolve() == out.resolve():
            raise UsageError(
                f"{path} is both the input and --out; results need a folder of their own. Give another --out."
            )
        seen = _series_around(path) if path.is_file() else list(_files_in(path, out, left_alone))
        images = [file for file in seen if files.stem(file) != file.name]
        series, others = dicom.series_in([file for file in seen if files.stem(file) == file.name])
        if path.is_file():  # one slice stands for its series, and for no other in the folder
            series = [one for one in series if path in one.paths]
            others = {
                file: reason for file, reason in others.items() if file == path or reason.startswith(dicom.DAMAGED)
            }
        damaged = {file: reason for file, reason in others.items() if reason.startswith(dicom.DAMAGED)}
        left_alone |= {str(file): reason for file, reason in others.items() if file not in damaged}
        pieces = [_Piece(place=file, path=file, series=None) for file in images]
        pieces += [_Piece(place=_home(one.paths), path=_home(one.paths), series=one) for one in series]
        scans += _with_damage(list(_cases(pieces, path, channels)), damaged, path)
    if not scans:
        reasons = "".join(f"\n  {file}: {reason}" for file, reason in list(left_alone.items())[:5])
        raise UsageError(
            f"no scan was found in {', '.join(map(str, inputs))}; NIfTI, NRRD, MetaImage or DICOM is needed.{reasons}"
        )
    apart = sorted(_told_apart(scans), key=lambda scan: scan.case_id)
    return Finds(scans=tuple(apart), left_alone=left_alone)


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A file or a series: a whole case, or one channel of one."""

    place: Path
    path: Path
    series: dicom.Series | None

    @property
    def name(self) -> str:
        return files.stem(self.place)


def _files_in(folder: Path, out: Path, left_alone: dict[str, str]) -> Iterator[Path]:
    """Every file below, in order; hidden ones and `out` are nobody's input, earlier results are named and left alone."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.resolve() == out.resolve():
            continue
        if (path / "report.json").exists():
            left_alone[str(path)] = "a result of hilum"
        elif path.is_dir():
            yield from _files_in(path, out, left_alone)
        elif path.is_file():
            yield path


def _series_around(path: Path) -> list[Path]:
    """The file; for a DICOM slice, everything beside it: its series lies there."""
    return sorted(file for file in path.parent.iterdir() if file.is_file()) if dicom.is_dicom(path) else [path]


def _home(paths: Sequence[Path]) -> Path:
    """The folder a series lies in; the file itself when it is only one among others."""
    if len(paths) == 1:
        return paths[0]
    parents = {path.parent for path in paths}
    return parents.pop() if len(parents) == 1 else Path(*_common([path.parent.parts for path in paths]))


def _common(parts: Sequence[Sequence[str]]) -> list[str]:
    return [some[0] for some in zip(*parts, strict=False) if len(set(some)) == 1]


def _cases(pieces: Sequence[_Piece], root: Path, channels: Sequence[str]) -> Iterator[Scan]:
    """Channels of one patient are brought together by name and never by guess; every other piece is a case of its own."""
    left = list(pieces)
    for group, name in _by_channel_name(pieces, channels):
        left = [piece for piece in left if piece not in group]
        yield _scan(name, group, root)
    numbered: dict[Path, dict[int, _Piece]] = {}
    for piece in list(left):
        match = re.fullmatch(r"(.+)_(\d{4})", piece.name)
        if match and int(match[2]) < len(channels) and piece.series is None:
            numbered.setdefault(piece.place.parent / match[1], {})[int(match[2])] = piece
            left.remove(piece)
    for name, files_of_case in numbered.items():
        yield _scan(name, [files_of_case[n] for n in sorted(files_of_case)], root)
    shared = [piece.place for piece in left]
    for piece in left:
        suffix = f"-{_short(piece.series.uid)}" if piece.series and shared.count(piece.place) > 1 else ""
        yield _scan(piece.place, [piece], root, suffix)


def _with_damage(scans: Sequence[Scan], damaged: dict[Path, str], root: Path) -> Iterator[Scan]:
    """A damaged file may be the slice a series lacks: every series of its folder is refused; alone, it is a case itself."""
    series = {file.parent for scan in scans if scan.series for file in _input_files(scan)}
    for scan in scans:
        near = [f for f in damaged if scan.series and f.parent in {file.parent for file in _input_files(scan)}]
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


def _scan(place: Path, group: Sequence[_Piece], root: Path, suffix: str = "") -> Scan:
    inner = place.relative_to(root).parts if place != root and place.is_relative_to(root) else (root.resolve().name,)
    name = "_".join((*inner[:-1], files.stem(Path(inner[-1]))))
    safe = re.sub(r"[^\w.\-]", "_", name).lstrip(".")[:100]
    if safe != name:
        suffix += f"-{_short(name)}"  # two names that differ only in what a file system dislikes stay two
    series = tuple(piece.series for piece in group)
    return Scan(case_id=safe + suffix, paths=tuple(piece.path for piece in group), series=series if any(series) else ())


def _told_apart(scans: Sequence[Scan]) -> Iterator[Scan]:
    """Two scans of one name, from two folders, keep both: each takes a few letters of its own path."""
    different: dict[tuple[Path, ...], Scan] = {}
    for scan in scans:
        different.setdefault(tuple(file.resolve() for file in _input_files(scan)), scan)  # one may be named twice
    ids = [scan.case_id for scan in different.values()]
    for real, scan in different.items():
        twin = ids.count(scan.case_id) > 1
        case_id = f"{scan.case_id}-{_short(str(real[0]))}" if twin else scan.case_id
        yield replace(scan, case_id=case_id)


def _short(words: str) -> str:
    return sha256(words.encode()).hexdigest()[:6]


def _input_files(scan: Scan) -> list[Path]:
    if scan.series:
        return [file for one in scan.series for file in one.paths]
    return [file for path in scan.paths for file in (path, *_voxels_beside(path))]


def _voxels_beside(header: Path) -> list[Path]:
    """A .mhd or .nhdr names the files that hold its voxels; they are part of what is read."""
    if header.suffix.lower() not in (".mhd", ".nhdr"):
        return []
    said = header.read_bytes()[:65536].decode("latin-1")
    return [file for file in header.parent.iterdir() if file != header and file.is_file() and file.name in said]


def _isolated(scan: Scan, model: Model, out: Path, settings: Segment, how: Inference) -> Row:
    """One case; whatever goes wrong with it stays with it."""
    started = time.monotonic()
    building = out / f".{scan.case_id}.partial"
    folder = out / scan.case_id
    try:
        _refuse_other_result(scan, model.package, folder)
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        report = segment_case(scan, _identity(scan), model, building, settings.outputs, settings.output_options, how)
        swap(building, folder)
        return Row(case_id=scan.case_id, status="done", report=report, seconds=time.monotonic() - started)
    except Exception as error:
        shutil.rmtree(building, ignore_errors=True)
        seconds = round(time.monotonic() - started, 3)
        return Row(case_id=scan.case_id, status="failed", error=_explained(error, scan, model, folder), seconds=seconds)


def _explained(error: Exception, scan: Scan, model: Model, folder: Path) -> dict[str, str]:
    """The reason, beside where the result would be; for a fault of ours with what its mender needs."""
    record = {
        "case_id": scan.case_id,
        "error": type(error).__name__,
        "message": str(error),
        "package_id": model.package.id,
    }
    record["sources"] = ", ".join(map(str, scan.paths))
    if not is_users(error):
        record["message"] = (
            f"hilum itself failed on this scan ({type(error).__name__}: {error}). Report it with this file."
        )
        record["traceback"] = "".join(traceback.format_exception(error))
        logger.error("%s: hilum itself failed: %s", scan.case_id, type(error).__name__)
    folder.mkdir(exist_ok=True)
    write_whole(folder / "error.json", as_json(record))
    return {"message": record["message"]}


def _complete(scan: Scan, package: ModelPackage, out: Path, settings: Segment) -> Row | None:
    """The row of a case that need not be done again: same input, same package, every output there."""
    folder = out / scan.case_id
    recover(folder)
    try:
        report = _report(folder)
        if report is None or report.package_id != package.id or set(settings.outputs) - set(report.outputs):
            return None
        if any(not (folder / name).exists() for name in report.files) or report.input_sha256 != _identity(scan):
            return None
    except (UnreadableReport, OSError):
        return None  # told when the case's turn comes, and for this case alone
    (folder / "error.json").unlink(missing_ok=True)  # of a try with another package: no longer true
    return Row(case_id=scan.case_id, status=SKIPPED, report=report)


def _refuse_other_result(scan: Scan, package: ModelPackage, folder: Path) -> None:
    """Never write over what was said of another scan, or by another package, nor over what is not ours."""
    report = _report(folder)
    strange = [path.name for path in folder.glob("*") if path.name != "error.json"] if report is None else []
    if strange:
        raise UsageError(
            f"{folder} holds files that are no result of hilum, as {strange[0]}; a case needs a folder of its own. "
            "Give another --out."
        )
    if report is None or (report.package_id == package.id and report.input_sha256 == _identity(scan)):
        return
    other = "by another package" if report.package_id != package.id else "of another scan of the same name"
    raise UsageError(
        f"{folder} already holds a result {other}; results are never written over. Remove that folder, or give another --out."
    )


def _report(folder: Path) -> Report | None:
    if not (folder / "report.json").exists():
        return None
    return Report.read(folder / "report.json")


def _identity(scan: Scan) -> str:
    """One hash over the bytes of everything the case is read from, whatever the order the files were found in."""
    return files.sha256(sorted(_input_files(scan)))


def _earlier(out: Path, current: set[str]) -> Iterator[Row]:
    """Complete cases that lie there from runs over other scans: the summary is of the folder, not of the command."""
    for path in sorted(out.glob("[!.]*/report.json")):
        if path.parent.name not in current:
            with suppress(UnreadableReport):  # a report.json that is not ours, or damaged, is no result
                yield Row(case_id=path.parent.name, status=EARLIER, report=Report.read(path))


def _write_index(out: Path, rows: Sequence[Row], left_alone: dict[str, str], package: ModelPackage) -> None:
    write_index(
        out,
        rows,
        left_alone=left_alone,
        labels=[label.name for label in package.plan.labels],
        package_name=package.name,
    )


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """One process writes into a folder at a time; a killed one holds nothing, the system lets go of its lock."""
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another hilum writes into {out} now; one at a time can. Wait for it, or give another --out."
            ) from None
        _clear_up(out)
        yield


def _clear_up(out: Path) -> None:
    """What a killed run left half-written or stepped aside."""
    for retired in out.glob(".*.retired"):
        folder = out / retired.name.removeprefix(".").removesuffix(".retired")
        recover(folder)
        shutil.rmtree(retired, ignore_errors=True)  # still there: the new one had stepped in
    for partial in out.glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for part in out.glob(".*.part"):
        part.unlink(missing_ok=True)
