"""From what a file stores to a Volume: unpacked to the last byte, made numbers, put on a straight grid; or refused."""

import bz2
import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Float, Shaped

from .reading import Reading
from .resampling import labels_onto, onto, straightened
from .volume import Geometry, Provenance, UnreadableScan, Volume

AGAIN = "Copy the file again from where it came from."

DEFLATE_RATIO = 1032
"""zlib, technical notes: deflate cannot shrink anything by more than 1032 to 1."""

CHUNK = 1 << 16
"""Bytes unpacked at a time: what a hostile file makes of them must fit into memory."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a file says, before it is judged."""

    voxels: Shaped[np.ndarray, "channel i j k"]
    affine: Float[np.ndarray, "4 4"]
    files: tuple[Path, ...]
    reader: str
    encoding: str
    modality: str = ""
    repairs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def judged(stored: Stored, reading: Reading, *, is_labels: bool) -> Volume:
    """The Volume that is stored, if it is one: numbers on a straight grid of several slices."""
    name = stored.files[0].name
    geometry = Geometry(shape=stored.voxels.shape[1:], affine=stored.affine)
    if min(geometry.shape) < 2:
        raise UnreadableScan(
            f"{name} is a single slice ({geometry}); a volume has several. Name the file that holds them all.",
            "too_few_slices",
        )
    voxels, filled = _finite(_plain(stored.voxels, name), reading, name)
    volume = Volume(
        voxels=voxels,
        geometry=geometry,
        channels=tuple(str(number) for number in range(len(voxels))),
        provenance=Provenance(
            sources=tuple(str(file) for file in stored.files),
            sha256=sha256(stored.files),
            reader=stored.reader,
            repairs=(*stored.repairs, *filled),
            notes=stored.notes,
            modality=stored.modality,
            encoding=stored.encoding,
            files=tuple(str(file) for file in stored.files),
        ),
    )
    return _straight(volume, reading, is_labels, name) if geometry.is_sheared else volume


def sha256(paths: Iterable[Path]) -> str:
    """One hash over the bytes of all files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


# numbers


def as_float32(
    voxels: Shaped[np.ndarray, "*any"], name: str, slope: float = 1.0, intercept: float = 0.0
) -> Float[np.ndarray, "*any"]:
    """Scaled in float64 and kept in float32, which must be able to tell the values apart."""
    scaled = np.empty(voxels.shape, np.float32, order="F")
    lowest, highest, lost = np.inf, -np.inf, 0
    for k in range(voxels.shape[-1]):  # slab by slab: a whole scan in float64 may not fit
        stored = voxels[..., k]
        with np.errstate(over="ignore", invalid="ignore"):
            slab = stored.astype(np.float64) * slope + intercept
            scaled[..., k] = slab
        finite = slab[np.isfinite(slab)]
        lost += int(np.isfinite(stored).sum() - np.isfinite(scaled[..., k]).sum())
        if finite.size:
            lowest, highest = min(lowest, float(finite.min())), max(highest, float(finite.max()))
    if lost:
        raise UnreadableScan(
            f"{name} holds {lost} voxels too large for float32 ({lowest:g} to {highest:g}); intensities up to 1e38 are "
            "needed. Find out what they stand for.",
            "values",
        )
    # a step of float32 beside the largest value must be small against all there is to see
    if lowest < highest and np.spacing(np.float32(max(-lowest, highest))) > (highest - lowest) / 256:
        raise UnreadableScan(
            f"{name} holds values from {lowest!r} to {highest!r}, which float32 cannot tell apart; intensities nearer "
            "to 0 are needed. Subtract the offset.",
            "values",
        )
    return scaled


def _plain(voxels: np.ndarray, name: str) -> np.ndarray:
    """Integers as they are, all else float32; in the byte order of this machine."""
    if voxels.dtype.kind == "f" and voxels.dtype.itemsize > 4:
        return as_float32(voxels, name)
    kind = voxels.dtype.newbyteorder("=") if voxels.dtype.kind in "iu" else np.dtype(np.float32)
    return voxels.astype(kind, copy=False)


def _finite(voxels: np.ndarray, reading: Reading, name: str) -> tuple[np.ndarray, list[str]]:
    odd = [0] if voxels.dtype.kind in "iu" else [int(one.size - np.isfinite(one).sum()) for one in voxels]
    if not any(odd):
        return voxels, []
    met = f"{name} holds {sum(odd)} of {voxels.size} voxels that are NaN or infinite"
    if "nan" not in reading.allow or max(odd) == voxels[0].size:
        hint = "Export it again." if max(odd) == voxels[0].size else "`--allow nan` would put the lowest value there."
        raise UnreadableScan(
            f"{met}; every voxel must be a number. Find out what they stand for, and write a number there. {hint}",
            "not_numbers",
        )
    filled = voxels.copy(order="K")
    for channel in filled:
        known = np.isfinite(channel)
        channel[~known] = channel[known].min()
    return filled, [f"{met}; each got the lowest value of its channel."]


def refuse_kind(kind: np.dtype, name: str) -> None:
    """One real number per voxel is what a scan holds."""
    if kind.kind not in "iuf" or kind.itemsize > 8:
        colour = bool(kind.names)
        raise UnreadableScan(
            f"{name} has voxels {'coloured (RGB)' if colour else f'of type {kind}'}; one real number per voxel is "
            "needed. Convert it first.",
            "colour" if colour else "unsupported",
        )


# grids


def to_millimetres(affine: np.ndarray, unit_mm: float) -> tuple[np.ndarray, list[str]]:
    """The affine in millimetres, and a word about it when it was in something else."""
    if unit_mm == 1:
        return affine, []
    return np.diag([unit_mm] * 3 + [1.0]) @ affine, [f"A grid in units of {unit_mm:g} mm was converted to millimetres."]


def _straight(volume: Volume, reading: Reading, is_labels: bool, name: str) -> Volume:
    cosines = volume.geometry.direction.T @ volume.geometry.direction
    angle = float(np.degrees(np.arccos(min(1.0, np.abs(cosines - np.eye(3)).max()))))
    met = f"{name} lies on a sheared grid (two of its axes meet at {angle:.1f} degrees)"
    if "tilt" not in reading.allow:
        raise UnreadableScan(
            f"{met}; a straight one is needed. Resample it onto a straight grid; `--allow tilt` does so while reading.",
            "tilted",
        )
    grid = straightened(volume.geometry)
    made, outside = labels_onto(volume, grid) if is_labels else onto(volume, grid)
    how = "by the nearest voxel" if is_labels else "linearly"
    repair = (
        f"{met}; it was resampled {how} onto a straight grid of {grid}, of which {outside:.1%} lies outside the scan "
        f"and got {'0' if is_labels else 'the lowest value'}."
    )
    provenance = replace(made.provenance, repairs=(*made.provenance.repairs, repair))
    return replace(made, provenance=provenance)


# bytes


@dataclass(frozen=True, kw_only=True)
class Payload:
    """Where the voxels of a file with a text header lie, and what they are."""

    path: Path
    start: int
    shape: tuple[int, ...]
    """Fastest axis first."""
    kind: np.dtype
    packing: str
    """raw, gzip, zlib or bzip2."""


def unpacked(payload: Payload) -> np.ndarray:
    """The voxels, every one of them and not a byte more, or a refusal."""
    size = payload.path.stat().st_size - payload.start
    promised = int(np.prod(payload.shape, dtype=object)) * payload.kind.itemsize
    ratio = {"raw": 1, "gzip": DEFLATE_RATIO, "zlib": DEFLATE_RATIO}.get(payload.packing)
    refuse_impossible(promised, promised if ratio is None else size * ratio, payload.path)
    taken, length = np.empty(promised, np.uint8), 0
    with payload.path.open("rb") as stream:
        stream.seek(payload.start)
        for part in UNPACKERS[payload.packing](stream):
            refuse_other_length(promised, promised, length + len(part) > promised, payload.path)
            taken[length : length + len(part)] = np.frombuffer(part, np.uint8)
            length += len(part)
    refuse_other_length(length, promised, False, payload.path)
    return taken.view(payload.kind).reshape(payload.shape, order="F")


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    while chunk := stream.read(1 << 20):
        yield chunk


def _inflated(stream: IO[bytes]) -> Iterator[bytes]:
    """gzip or zlib, one member after the other; what follows the last is an error, as is a wrong checksum."""
    chunk = stream.read(CHUNK)
    while chunk:
        inflate = zlib.decompressobj(wbits=47)
        while chunk and not inflate.eof:
            yield inflate.decompress(chunk)
            chunk = inflate.unused_data or stream.read(CHUNK)
        if not inflate.eof:
            raise EOFError


def _bunzipped(stream: IO[bytes]) -> Iterator[bytes]:
    chunk = stream.read(CHUNK)
    while chunk:
        unpack = bz2.BZ2Decompressor()
        while not unpack.eof:
            yield unpack.decompress(chunk, 1 << 24)  # bzip2 can hide gigabytes in a chunk
            chunk = stream.read(CHUNK) if unpack.needs_input and not unpack.eof else b""
            if unpack.needs_input and not unpack.eof and not chunk:
                raise EOFError
        chunk = unpack.unused_data or stream.read(CHUNK)


UNPACKERS: dict[str, Callable[[IO[bytes]], Iterator[bytes]]] = {
    "raw": _chunks,
    "gzip": _inflated,
    "zlib": _inflated,
    "bzip2": _bunzipped,
}


def refuse_impossible(promised: int, most: int, path: Path) -> None:
    """Before memory is asked for: a small file cannot hold what a broken or hostile header says."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if promised > most:
        raise UnreadableScan(
            f"{path.name} is truncated, or its header is wrong: {promised} bytes are promised, a file of this size "
            f"holds at most {most}. {AGAIN}",
            "damaged",
        )
    if promised > memory:
        raise UnreadableScan(
            f"{path.name} holds {promised / 2**30:.0f} GiB; this machine has {memory / 2**30:.0f} GiB. Crop it.",
            "too_large",
        )


def refuse_other_length(length: int, promised: int, longer: bool, path: Path) -> None:
    """What a header promises must be there, and nothing else."""
    if length < promised or longer:
        met = "more data than" if longer else f"{length} bytes instead of the {promised}"
        raise UnreadableScan(
            f"{path.name} is {'longer than it should be' if longer else 'truncated'}: {met} its header promises. "
            f"{AGAIN}",
            "damaged",
        )


# text headers, as NRRD and MetaImage have them

HEADER_LIMIT = 1 << 18
"""Bytes within which a text header must end; real ones take some hundreds."""

UNITS = {"m": 1000.0, "cm": 10.0, "mm": 1.0, "millimeter": 1.0, "millimetre": 1.0, "um": 0.001, "µm": 0.001}
"""Millimetres per unit of length, as NRRD (`space units`) and MetaImage (`DistanceUnits`) spell them."""


def text_header(path: Path, ends: Callable[[str], bool]) -> tuple[list[str], int]:
    """The lines up to the one that ends the header, and the byte behind it."""
    lines = []
    with path.open("rb") as stream:
        while stream.tell() < HEADER_LIMIT and (line := stream.readline(HEADER_LIMIT)):
            lines.append(line.decode("utf-8", errors="replace").strip())
            if ends(lines[-1]):
                return lines, stream.tell()
        if path.suffix.lower() == ".nhdr" and lines and stream.tell() < HEADER_LIMIT:
            return lines, stream.tell()  # a detached header may end with its file
    raise UnreadableScan(f"{path.name} has no whole text header; one that ends was needed. Check the file.", "damaged")


def fields_of(pairs: Iterable[tuple[str, str]], path: Path) -> dict[str, str]:
    """What a header says under each name; refused when it says two things under one."""
    fields: dict[str, str] = {}
    for name, value in pairs:
        expect(fields.setdefault(name, value) == value, path, f"`{name}` twice", "one value", "contradiction")
    return fields


def need(fields: dict[str, str], names: Iterable[str], path: Path, reason: str) -> None:
    """Nothing that a header leaves out is filled in."""
    missing = [name for name in names if not fields.get(name)]
    if missing:
        raise UnreadableScan(
            f"{path.name} has a header without {', '.join(f'`{name}`' for name in missing)}; what its voxels are and "
            "where they lie is not guessed. Export the scan again with its orientation and spacing.",
            reason,
        )


def expect(fits: bool, path: Path, met: str, needed: str, reason: str = "unsupported") -> None:
    """A refusal in one line: what was met, what is needed."""
    if not fits:
        raise UnreadableScan(
            f"{path.name} has {met}; {needed} can be read here. Convert it, or export it again.", reason
        )


def sizes_of(text: str, path: Path) -> tuple[int, ...]:
    """Whole numbers of at least 1."""
    numbers = tuple(int(word) for word in text.split())
    expect(bool(numbers) and min(numbers) > 0, path, f"the sizes {text}", "sizes of at least 1", "contradiction")
    return numbers


def beside(header: Path, name: str) -> Path:
    """The data file of a detached header; only from the header's own folder, whatever path the header tells."""
    data = header.parent / name
    if Path(name).name != name or not data.is_file():
        elsewhere = Path(name).name != name or "%" in name or name.upper().startswith("LIST")
        raise UnreadableScan(
            f"{header.name} has its voxels in '{name}'; one file in the same folder is needed. Keep the two together.",
            "unsupported" if elsewhere else "damaged",
        )
    return data


def unit_of(units: set[str], path: Path) -> float:
    """Millimetres per unit; a header without a unit means millimetres, as ITK and teem have it."""
    if len(units) > 1 or not units <= UNITS.keys():
        raise UnreadableScan(
            f"{path.name} is measured in {sorted(units)}; millimetres are needed. Correct its header.", "no_geometry"
        )
    return UNITS[units.pop()] if units else 1.0


def packed_as(kind: np.dtype, packing: str) -> str:
    """'int16, gzip, big-endian': how voxels were packed, in words."""
    foreign = kind.byteorder == ">" if kind.itemsize > 1 else False
    words = [kind.newbyteorder("=").name, "" if packing == "raw" else packing, "big-endian" if foreign else ""]
    return ", ".join(word for word in words if word)
