"""NRRD, attached and detached, as teem defines it; nothing that its header leaves out is filled in."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from .reading import Reading
from .stored import (
    Payload,
    Stored,
    beside,
    expect,
    fields_of,
    need,
    packed_as,
    sizes_of,
    text_header,
    to_millimetres,
    unit_of,
    unpacked,
)

KINDS = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "signed long long int"), "i8"),
    **dict.fromkeys(("int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    **{"float": "f4", "double": "f8"},
}
PACKINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
SPACES = {
    **dict.fromkeys(("left-posterior-superior", "lps"), (-1, -1, 1)),
    **dict.fromkeys(("right-anterior-superior", "ras"), (1, 1, 1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (-1, 1, 1)),
}
"""The sign of each axis of space in RAS."""

CHANNEL_KINDS = {"list", "vector", "covariant-vector", "none", "point", "stub", "scalar", "???", "domain"}
COLOURS = re.compile(r".*color$")
ENDS: dict[str, Literal["<", ">"]] = {"little": "<", "big": ">"}


def read(path: Path, reading: Reading) -> Stored:
    """The voxels with the axis of channels first, wherever the file has it."""
    head = _head(path)
    voxels = unpacked(head.payload)
    voxels = voxels[None] if head.channels is None else np.moveaxis(voxels, head.channels, 0)
    affine, repairs = to_millimetres(head.affine, head.unit_mm)
    data = head.payload.path
    return Stored(
        voxels=voxels,
        affine=affine,
        files=(path,) if data == path else (path, data),
        reader="hilum, NRRD",
        encoding=f"NRRD, {packed_as(head.payload.kind, head.payload.packing)}",
        repairs=tuple(repairs),
    )


@dataclass(frozen=True, kw_only=True)
class _Head:
    payload: Payload
    affine: Float[np.ndarray, "4 4"]
    unit_mm: float
    channels: int | None
    """Which axis of the file holds the channels."""


def _head(path: Path) -> _Head:
    lines, start = text_header(path, ends=lambda line: line == "")
    expect(lines[0].startswith("NRRD000"), path, "no NRRD header", "one that begins with NRRD000", "no_scan")
    fields = fields_of(_pairs(lines[1:]), path)
    need(fields, ("type", "dimension", "sizes", "encoding"), path, "damaged")
    need(fields, ("space", "space directions", "space origin"), path, "no_geometry")
    axes = len(sizes_of(fields["sizes"], path))
    expect(axes == int(fields["dimension"]), path, f"sizes {fields['sizes']}", fields["dimension"], "contradiction")
    expect(axes > 2, path, f"{axes} axes", "three of space", "too_few_slices")
    affine, channels = _placed(fields, axes, path)
    units = {unit.strip('"').lower() for unit in fields.get("space units", "").split()} - {"", "???", "none"}
    payload = _payload(fields, start, path)
    return _Head(payload=payload, affine=affine, unit_mm=unit_of(units, path), channels=channels)


def _pairs(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Fields are 'name: value'; 'key:=value' is a remark, and '# ...' a comment."""
    for line in lines:
        key, colon, value = line.partition(":")
        if colon and not value.startswith("=") and not line.startswith("#"):
            key = key.strip().lower()
            yield (
                {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip"}.get(key, key),
                value.strip(),
            )


def _payload(fields: dict[str, str], start: int, path: Path) -> Payload:
    kind, packing = fields["type"].lower(), fields["encoding"].lower()
    expect(kind in KINDS, path, f"voxels of type '{kind}'", "integers or floats")
    expect(packing in PACKINGS, path, f"the encoding '{packing}'", "raw, gzip or bzip2", "encoding")
    skipped = any(int(fields.get(skip, 0)) != 0 for skip in ("line skip", "byte skip"))
    expect(not skipped, path, "bytes to skip", "voxels without a gap")
    stored = np.dtype(KINDS[kind])
    if stored.itemsize > 1:
        need(fields, ("endian",), path, "values")
        expect(
            fields["endian"].lower() in ENDS, path, f"the byte order '{fields['endian']}'", "little or big", "values"
        )
        stored = stored.newbyteorder(ENDS[fields["endian"].lower()])
    data = beside(path, fields["data file"]) if "data file" in fields else path
    return Payload(
        path=data,
        start=start if data == path else 0,
        shape=sizes_of(fields["sizes"], path),
        kind=stored,
        packing=PACKINGS[packing],
    )


def _placed(fields: dict[str, str], axes: int, path: Path) -> tuple[Float[np.ndarray, "4 4"], int | None]:
    """The affine to RAS in the file's unit, and which axis holds channels."""
    space = fields["space"].lower()
    expect(space in SPACES, path, f"the space '{fields['space']}'", "an anatomical one as LPS", "no_geometry")
    vectors = re.findall(r"none|\([^()]*\)", fields["space directions"].lower())
    outside = [axis for axis, vector in enumerate(vectors) if vector == "none"]
    fits = len(vectors) == axes and axes - len(outside) == 3
    expect(fits, path, f"the directions {fields['space directions']} for {axes} axes", "three axes of space")
    expect(axes <= 4, path, f"{axes} axes", "three of space and one of channels")
    _expect_kinds(fields, axes, outside, path)
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([_vector(vector, path) for vector in vectors if vector != "none"])
    affine[:3, 3] = _vector(fields["space origin"], path)
    return np.diag([*SPACES[space], 1.0]) @ affine, outside[0] if outside else None


def _expect_kinds(fields: dict[str, str], axes: int, outside: list[int], path: Path) -> None:
    kinds = fields.get("kinds", "").lower().split() or ["domain"] * axes
    expect(len(kinds) == axes, path, f"{len(kinds)} kinds for {axes} axes", "one for each axis", "contradiction")
    for axis, kind in enumerate(kinds):
        allowed = CHANNEL_KINDS if axis in outside else {"domain", "space", "none", "???"}
        reason = "colour" if COLOURS.match(kind) else "unsupported" if axis in outside else "contradiction"
        expect(kind in allowed, path, f"an axis of the kind {kind}", "space and channels", reason)


def _vector(text: str, path: Path) -> Float[np.ndarray, " 3"]:
    numbers = np.array([float(word) for word in text.strip("() ").split(",")])
    expect(len(numbers) == 3 and bool(np.isfinite(numbers).all()), path, f"'{text}'", "three numbers", "no_geometry")
    return numbers
