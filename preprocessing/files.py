"""Scans on disk: NIfTI, NRRD, MetaImage and folders of DICOM, read without a guess and written in one stroke."""

import gzip
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK
from jaxtyping import Shaped
from nibabel.spatialimages import HeaderDataError

from . import dicom, metaimage, nifti, nrrd
from .reading import STRICT, Reading
from .stored import AGAIN, Stored, judged, sha256
from .volume import LPS_TO_RAS, Geometry, ScanError, UnreadableScan, Volume

__all__ = ["EXTENSIONS", "is_scan", "read", "sha256", "stem", "write"]

EXTENSIONS: tuple[str, ...] = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".hdr.gz")
"""The endings by which `stem` knows a scan; a .hdr stands for its pair. DICOM is known by its content."""


def read(path: Path, reading: Reading = STRICT, *, is_labels: bool = False) -> Volume:
    """A scan file, a folder holding exactly one DICOM series, or the series that a DICOM file belongs to.

    Where a repair resamples, labels take the nearest voxel and are not interpolated.
    """
    with _damage_named(path):
        if path.is_dir():
            return _read_folder(path, reading)
        if path.stat().st_size == 0:
            raise UnreadableScan(f"{path.name} is empty; a scan was needed. Copy the file again.", "damaged")
        content, ending = _content(path), _by_ending(path)
        if not content and dicom.is_dicom(path):
            return _read_series_of(path, reading)
        if not content and not ending:
            raise UnreadableScan(
                f"{path.name} is neither DICOM nor does it end in {', '.join(EXTENSIONS)}; "
                "a scan in one of these formats is needed. Convert it, or correct its ending.",
                "no_scan",
            )
        stored = READERS[content or ending](path, reading)
        return judged(_renamed(stored, content, ending), reading, is_labels=is_labels)


def write(volume: Volume, path: Path, *, is_labels: bool = False, scale: float = 1.0) -> None:
    """One file in the format of the path's ending: whole or not at all, and the same bytes for the same volume.

    `scale` is what a stored 1 stands for, in NIfTI, which can say it: a reader finds voxels times scale.
    """
    extension = _extension(path)
    if extension not in WRITERS:
        raise ScanError(
            f"{path.name} has no ending that says its format; one of {', '.join(WRITERS)} is needed. Rename it."
        )
    voxels = _writeable(volume, path, is_labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        WRITERS[extension](voxels, volume.geometry, Path(folder) / path.name, is_labels, scale)
        # a header comes last, so that it never names voxels that are not there yet
        for made in sorted(Path(folder).iterdir(), key=lambda made: made.name == path.name):
            _flush_to_disk(made)
            made.replace(path.parent / made.name)


def is_scan(path: Path) -> bool:
    """Whether the file begins as NIfTI, NRRD or MetaImage do, whatever it is called."""
    try:
        return path.is_file() and bool(_content(path))
    except OSError:
        return False


def stem(path: Path) -> str:
    """The name of a scan without its ending; a name without one of EXTENSIONS stays whole."""
    extension = _extension(path)
    return path.name[: -len(extension)] if extension else path.name


def _extension(path: Path) -> str | None:
    name = path.name.lower()
    return next((e for e in sorted(EXTENSIONS, key=len, reverse=True) if name.endswith(e) and name != e), None)


# which format it is: the content decides, and an ending that says otherwise is told

FORMATS = {
    **dict.fromkeys((".nii", ".nii.gz", ".hdr", ".hdr.gz"), "NIfTI"),
    **dict.fromkeys((".nrrd", ".nhdr"), "NRRD"),
    **dict.fromkeys((".mha", ".mhd"), "MetaImage"),
}
READERS: dict[str, Callable[[Path, Reading], Stored]] = {
    "NIfTI": nifti.read,
    "NRRD": nrrd.read,
    "MetaImage": metaimage.read,
}
METAIMAGE = re.compile(rb"\s*(ObjectType|NDims|Comment|Name|ID)\s*=.*(NDims|DimSize)\s*=", re.DOTALL)


def _by_ending(path: Path) -> str:
    if nifti.is_pair(path):
        return "NIfTI"
    return FORMATS.get(_extension(path) or "", "")


def _content(path: Path) -> str:
    """The format by its first bytes; empty when they are none we know, DICOM among them."""
    with path.open("rb") as stream:
        head = stream.read(4096)
    if head.startswith(b"\x1f\x8b"):
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, 4096)
        except zlib.error:
            return ""
        return "NIfTI" if _is_nifti(head) else ""
    if head.startswith(b"NRRD000"):
        return "NRRD"
    if METAIMAGE.match(head):
        return "MetaImage"
    return "NIfTI" if _is_nifti(head) else ""


def _is_nifti(head: bytes) -> bool:
    return head[344:347] in (b"n+1", b"ni1") or head[4:7] in (b"n+2", b"ni2")


def _renamed(stored: Stored, content: str, ending: str) -> Stored:
    if not content or content == ending:
        return stored
    told = f"{stored.files[0].name} is a {content} file, though its ending does not say so; it was read as what it is."
    return replace(stored, repairs=(told, *stored.repairs))


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Whatever a reader stumbles over becomes an UnreadableScan that names the file."""
    try:
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # what a header's odd numbers lead to is looked at, not warned of
            yield
    except UnreadableScan:
        raise
    except ScanError as error:
        raise UnreadableScan(f"{path.name}: {error}", error.reason) from error
    except MemoryError as error:
        raise UnreadableScan(f"{path.name} needs more memory than there is. Crop it first.", "too_large") from error
    except FileNotFoundError as error:
        raise UnreadableScan(f"{path} is not there; a scan was needed. Check the path.", "damaged") from error
    except PermissionError as error:
        raise UnreadableScan(
            f"{path.name} may not be read by this user; it must be readable. Use chmod.", "damaged"
        ) from error
    except EOFError as error:
        raise UnreadableScan(
            f"{path.name} is truncated: its compressed data stop before their end. {AGAIN}", "damaged"
        ) from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableScan(
            f"{path.name} is damaged: {error}. Sound compressed data are needed. {AGAIN}", "damaged"
        ) from error
    except (OSError, HeaderDataError, RuntimeError, ValueError, OverflowError) as error:
        raise UnreadableScan(
            f"{path.name} cannot be read ({error}); a sound scan is needed. {AGAIN}", "damaged"
        ) from error


# DICOM: what is a series is decided in dicom, which one is meant is decided here


def _read_folder(folder: Path, reading: Reading) -> Volume:
    series, left_alone = dicom.series_in(sorted(p for p in folder.iterdir() if not p.name.startswith(".")))
    damaged = [path.name for path, reason in left_alone.items() if reason.startswith(dicom.DAMAGED)]
    if damaged:
        raise UnreadableScan(
            f"The folder {folder.name} holds {len(damaged)} damaged file(s), as {damaged[0]}, which may have been "
            "slices; a series must be whole. Send the series again, or take away what does not belong to it.",
            "damaged",
        )
    if not series:
        reasons = "".join(f" {path.name}: {reason}." for path, reason in list(left_alone.items())[:3])
        raise UnreadableScan(
            f"The folder {folder.name} holds 0 DICOM series; exactly one is needed.{reasons} "
            "Give one folder per series, or a single file.",
            "no_scan",
        )
    if len(series) > 1:
        raise UnreadableScan(
            f"The folder {folder.name} holds {len(series)} DICOM series or parts of them{_parts(series)}; exactly one "
            "is needed. Give one folder per series, or a single file.",
            "mixed",
        )
    return _with_left_alone(dicom.read(series[0], reading), left_alone)


def _read_series_of(path: Path, reading: Reading) -> Volume:
    series, left_alone = dicom.series_in(sorted(path.parent.iterdir()))
    mine = [one for one in series if path in one.paths]
    if not mine:
        raise UnreadableScan(
            f"{path.name} is no slice of a scan: {left_alone[path]}. Name a file of the series itself.",
            "damaged" if left_alone[path].startswith(dicom.DAMAGED) else "no_scan",
        )
    if len(mine) > 1:
        raise UnreadableScan(
            f"{path.name} holds {len(mine)} volumes{_parts(mine)}; exactly one is needed. Split it by what tells them "
            "apart.",
            "mixed",
        )
    return dicom.read(mine[0], reading)


def _parts(series: Sequence[dicom.Series]) -> str:
    """' (echo 1, echo 2)', where series have parts that tell them apart."""
    parts = [one.part for one in series if one.part]
    return f" ({', '.join(parts[:8])}{', ...' if len(parts) > 8 else ''})" if parts else ""


def _with_left_alone(volume: Volume, left_alone: dict[Path, str]) -> Volume:
    told = tuple(f"{path.name} left alone: {reason}" for path, reason in left_alone.items())
    return replace(volume, provenance=replace(volume.provenance, notes=(*volume.provenance.notes, *told)))


# writing


def _write_itk(voxels: np.ndarray, geometry: Geometry, path: Path, is_labels: bool, scale: float) -> None:
    if scale != 1:
        raise ScanError(
            f"{path.name}: stored values stand for others; this format cannot say so. Write .nii.gz instead."
        )
    if geometry.is_sheared:
        raise ScanError(f"{path.name}: the grid is sheared; this format needs right angles. Write .nii.gz instead.")
    many = len(voxels) > 1
    image = SimpleITK.GetImageFromArray(
        np.ascontiguousarray(voxels.transpose(3, 2, 1, 0) if many else voxels[0].transpose(2, 1, 0)), isVector=many
    )
    lps = LPS_TO_RAS @ geometry.affine
    image.SetSpacing(geometry.spacing)
    image.SetDirection((lps[:3, :3] / np.array(geometry.spacing)).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    SimpleITK.WriteImage(image, str(path), useCompression=True)


def _writeable(volume: Volume, path: Path, is_labels: bool) -> Shaped[np.ndarray, "channel i j k"]:
    kind = volume.voxels.dtype
    if kind.kind == "b":
        return volume.voxels.astype(np.uint8)
    if kind.kind not in "iuf" or kind.itemsize not in ((4, 8) if kind.kind == "f" else (1, 2, 4, 8)):
        raise ScanError(f"{path.name}: voxels of type {kind} have no place in a scan file; use integers or float32.")
    if is_labels and kind.kind == "f":
        raise ScanError(f"{path.name}: labels came as {kind}; they must be integers. Round them first.")
    return volume.voxels.astype(kind.newbyteorder("="), copy=False)


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


WRITERS: dict[str, Callable[[np.ndarray, Geometry, Path, bool, float], None]] = {
    ".nii": nifti.write,
    ".nii.gz": nifti.write,
    ".nrrd": _write_itk,
    ".nhdr": _write_itk,
    ".mha": _write_itk,
    ".mhd": _write_itk,
}
