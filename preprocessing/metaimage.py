"""MetaImage, .mha and .mhd, as ITK reads it, but nothing that its header leaves out is filled in."""

from pathlib import Path

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
    refuse_other_length,
    sizes_of,
    text_header,
    to_millimetres,
    unit_of,
    unpacked,
)
from .volume import LPS_TO_RAS, Geometry

KINDS = {
    **{"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4"},
    **{"MET_FLOAT": "f4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_DOUBLE": "f8"},
}
"""MET_LONG is left out: 4 bytes on one machine, 8 on another."""

SYNONYMS = {
    **dict.fromkeys(("Rotation", "Orientation"), "TransformMatrix"),
    **dict.fromkeys(("Position", "Origin"), "Offset"),
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
MODALITIES = {"MET_MOD_CT": "CT", "MET_MOD_MR": "MR", "MET_MOD_NM": "NM", "MET_MOD_US": "US"}
DIRECTION_TOLERANCE = 1e-3
"""How far rounding may bring a direction vector from length 1."""


def read(path: Path, reading: Reading) -> Stored:
    """The voxels with the channels first, whether they are interleaved or a fourth axis."""
    lines, start = text_header(path, ends=lambda line: line.partition("=")[0].strip() == "ElementDataFile")
    pairs = [(key.strip(), value.strip()) for key, sign, value in (line.partition("=") for line in lines) if sign]
    fields = fields_of([(SYNONYMS.get(key, key), value) for key, value in pairs], path)
    need(fields, ("DimSize", "ElementType", "BinaryData", "ElementDataFile"), path, "damaged")
    need(fields, ("ElementSpacing", "TransformMatrix", "Offset"), path, "no_geometry")
    _refuse_scaling(fields, path)
    payload = _payload(fields, start, path)
    affine = _affine(fields, len(sizes_of(fields["DimSize"], path)), path)
    unit = fields.get("DistanceUnits", "").lower()
    affine, repairs = to_millimetres(affine, unit_of({unit} - {"", "?"}, path))
    voxels = _channels_first(unpacked(payload), int(fields.get("ElementNumberOfChannels", 1)))
    return Stored(
        voxels=voxels,
        affine=affine,
        files=(path,) if payload.path == path else (path, payload.path),
        reader="hilum, MetaImage",
        encoding=f"MetaImage, {packed_as(payload.kind, payload.packing)}",
        modality=MODALITIES.get(fields.get("Modality", "").upper(), ""),
        repairs=(*repairs, *_contradicted(fields, affine, voxels.shape[1:])),
        notes=_unused(fields),
    )


def _payload(fields: dict[str, str], start: int, path: Path) -> Payload:
    shape, kind = sizes_of(fields["DimSize"], path), fields["ElementType"].upper()
    channels, axes = int(fields.get("ElementNumberOfChannels", 1)), int(fields.get("NDims", len(shape)))
    expect(kind in KINDS, path, f"voxels of type '{kind}'", "integers or floats of a sure size", "encoding")
    expect(_is_true(fields["BinaryData"]), path, "voxels written as text", "binary ones", "encoding")
    expect(int(fields.get("HeaderSize", 0)) == 0, path, "bytes to skip", "voxels from the first byte on")
    expect(axes == len(shape), path, f"{axes} axes of sizes {shape}", "as many sizes as axes", "contradiction")
    expect(axes > 2, path, f"sizes {shape}", "3 or 4 axes", "too_few_slices")
    expect(axes == 3 or (axes == 4 and channels == 1), path, f"sizes {shape}", "3 or 4 axes, one of channels")
    expect(channels > 0, path, f"{channels} channels", "one or more", "contradiction")
    data = path if fields["ElementDataFile"].upper() == "LOCAL" else beside(path, fields["ElementDataFile"])
    first = start if data == path else 0
    packed = _is_true(fields.get("CompressedData", "False"))
    if packed and (length := int(fields.get("CompressedDataSize", 0))):
        there = data.stat().st_size - first
        refuse_other_length(there, length, there > length, data)
    return Payload(
        path=data,
        start=first,
        shape=shape if channels == 1 else (channels, *shape),
        kind=_byte_order(np.dtype(KINDS[kind]), fields, path),
        packing="zlib" if packed else "raw",
    )


def _byte_order(kind: np.dtype, fields: dict[str, str], path: Path) -> np.dtype:
    if kind.itemsize == 1:
        return kind
    need(fields, ("BinaryDataByteOrderMSB",), path, "values")
    return kind.newbyteorder(">" if _is_true(fields["BinaryDataByteOrderMSB"]) else "<")


def _is_true(word: str) -> bool:
    return word[:1].upper() in ("T", "1")


def _refuse_scaling(fields: dict[str, str], path: Path) -> None:
    """VTK applies it, ITK does not: the same file has two meanings."""
    for name, nothing in (("ElementToIntensityFunctionSlope", 1), ("ElementToIntensityFunctionOffset", 0)):
        expect(float(fields.get(name, nothing)) == nothing, path, f"a `{name}`", "plain values", "values")


def _affine(fields: dict[str, str], axes: int, path: Path) -> Float[np.ndarray, "4 4"]:
    """To RAS in the file's unit. A row of TransformMatrix is the direction of an axis."""
    directions = _numbers(fields["TransformMatrix"], axes * axes, path).reshape(axes, axes).T
    spacing, offset = _numbers(fields["ElementSpacing"], axes, path), _numbers(fields["Offset"], axes, path)
    mixed = bool(np.any(directions[3:, :3]) or np.any(directions[:3, 3:]))
    expect(not mixed, path, f"{axes} axes that are not three of space and one of channels", "such axes")
    lengths = np.linalg.norm(directions[:3, :3], axis=0)
    long = f"direction vectors of lengths {lengths.round(4).tolist()}"
    expect(float(np.abs(lengths - 1).max()) <= DIRECTION_TOLERANCE, path, long, "vectors of length 1", "contradiction")
    expect(bool((spacing > 0).all()), path, f"the spacing {spacing.tolist()}", "a positive one", "no_geometry")
    affine = np.eye(4)
    affine[:3, :3] = directions[:3, :3] * spacing[:3]
    affine[:3, 3] = offset[:3]
    return LPS_TO_RAS @ affine


def _numbers(text: str, count: int, path: Path) -> Float[np.ndarray, " n"]:
    numbers = np.array([float(word) for word in text.split()])
    fits = len(numbers) == count and bool(np.isfinite(numbers).all())
    expect(fits, path, f"'{text}'", f"{count} numbers", "no_geometry")
    return numbers


def _channels_first(voxels: np.ndarray, interleaved: int) -> np.ndarray:
    if interleaved > 1:
        return voxels
    return np.moveaxis(voxels, -1, 0) if voxels.ndim == 4 else voxels[None]


def _contradicted(fields: dict[str, str], affine: Float[np.ndarray, "4 4"], shape: tuple[int, ...]) -> list[str]:
    """AnatomicalOrientation names the sides that axes come from; ITK writes it and believes the matrix."""
    said = fields.get("AnatomicalOrientation", "").upper()
    geometry = Geometry(shape=(shape[0], shape[1], shape[2]), affine=affine)
    came_from = "".join("LRAPSI"["RLPAIS".index(side)] for side in geometry.orientation)
    is_plain = np.abs(geometry.direction).max(axis=0).min() > 0.8
    if len(said) != 3 or "?" in said or said == came_from or not is_plain:
        return []
    return [
        f"AnatomicalOrientation says {said}, the TransformMatrix {came_from}; the matrix was believed, as ITK does."
    ]


def _unused(fields: dict[str, str]) -> tuple[str, ...]:
    centre = fields.get("CenterOfRotation", "")
    used = any(float(word) for word in centre.split())
    return (f"Its CenterOfRotation ({centre}) places nothing, in ITK neither.",) if used else ()
