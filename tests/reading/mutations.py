"""Good files broken at random, each known by a number, and a process that reads them under guard.

    python -m tests.reading.mutations replay NUMBER     makes that one again, reads it, says where it lies

Each mutant must be read or refused as a ScanError, within seconds, in little memory, with nothing written anywhere.
"""

import contextlib
import gzip
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import imagecodecs
import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import (
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    SegmentationStorage,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPE = (16, 12, 4)
GENERATION = int(os.environ.get("HILUM_GENERATION", 2))
"""Counted up when mutators change, so that a number never means two mutants; another one makes another twenty thousand."""

HUNG_SECONDS = 10
HONEST_TIMES = 4
SLACK_BYTES = 64 << 20
LIMIT_BYTES = 6 << 30
"""What the process may ask for beyond what it has when it starts: enough to see an absurd wish, not to hurt the machine."""

# The seeds: what is broken


@dataclass(frozen=True)
class Seed:
    """Files that belong together; the first one is mutated and named to the reader, unless it is read as a folder."""

    files: dict[str, bytes]
    as_folder: bool = False
    wrapped: str = ""
    """'gzip' or 'deflate', where mutations may also happen beneath the packing."""


def _values() -> np.ndarray:
    return np.random.default_rng(0).integers(24, 2024, SHAPE).astype(np.int16)


def _classic(damage: Callable[[Dataset], Dataset] = lambda data: data, **how: str) -> Seed:
    from . import series

    slices = [damage(data) for data in series.ct(_values())]
    return Seed({f"{n}.dcm": series.as_bytes(data, **how) for n, data in enumerate(slices)}, as_folder=True)


def _packed(syntax: str, encode: Callable[[np.ndarray], bytes] | None = None) -> Seed:
    from . import series

    def pack(data: Dataset) -> Dataset:
        plane = np.ascontiguousarray(series.pixels(data).T.astype(np.uint16))
        return series.set_codestreams(data, [bytes(encode(plane))]) if encode else series.pack(data, syntax)

    return _classic(pack, syntax=syntax)


def _deflated() -> Seed:
    from . import series

    seed = _classic(syntax=series.DEFLATED)
    return Seed(seed.files, as_folder=True, wrapped="deflate")


def _enhanced() -> Seed:
    from . import series

    return Seed({"enhanced.dcm": series.as_bytes(series.enhanced(_values()))})


def _mosaic() -> Seed:
    """Three sheets of 2 x 2 tiles that say so, with a private header that does not help."""
    from . import series

    def sheet(data: Dataset) -> Dataset:
        series.change(
            [data], SOPClassUID=MRImageStorage, Modality="MR", ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]
        )
        data.add_new(0x00290010, "LO", "SIEMENS CSA HEADER")
        data.add_new(0x00291010, "OB", _csa({"NumberOfImagesInMosaic": "4", "SliceNormalVector": "0"}))
        data.add_new(0x0019100A, "US", 4)
        return data

    return _classic(sheet)


def _csa(tags: dict[str, str]) -> bytes:
    """Siemens' private header, version 2, as far as it is known (nibabel's csareader)."""
    out = b"SV10\4\3\2\1" + struct.pack("<II", len(tags), 77)
    for name, value in tags.items():
        text = value.encode() + b"\0"
        out += struct.pack("<64si4siiI", name.encode(), 1, b"IS", 6, 1, 77)
        out += struct.pack("<4I", len(text), len(text), 77, len(text)) + text + b"\0" * (-len(text) % 4)
    return out


def _segmentation() -> Seed:
    from . import series

    data = series.enhanced(_values(), sop_class=SegmentationStorage)
    series.change([data], Modality="SEG", SegmentationType="BINARY", BitsAllocated=1, BitsStored=1, HighBit=0,
                  PixelRepresentation=0)  # fmt: skip
    data.PixelData = np.packbits((_values() > 1000).T.ravel(), bitorder="little").tobytes()
    data.SegmentSequence = series.item(SegmentNumber=1, SegmentLabel="liver", SegmentAlgorithmType="MANUAL")
    for group in data.PerFrameFunctionalGroupsSequence:
        group.SegmentIdentificationSequence = series.item(ReferencedSegmentNumber=1)
    return Seed({"seg.dcm": series.as_bytes(data)})


def _contours() -> Seed:
    from . import series

    data = series.other_object("1.2.840.10008.5.1.4.1.1.481.3", 1, "RTSTRUCT")
    data.StructureSetROISequence = series.item(
        ROINumber=1, ROIName="liver", ReferencedFrameOfReferenceUID=f"{series.ROOT}.8.1"
    )
    contours = []
    for k in (1, 2):
        square = [series.OBLIQUE @ [i, j, k, 1] for i, j in ((3, 3), (12, 3), (12, 8), (3, 8))]
        contours += series.item(
            ContourGeometricType="CLOSED_PLANAR",
            NumberOfContourPoints=4,
            ContourData=series.text(np.array(square)[:, :3].ravel()),
        )
    data.ROIContourSequence = series.item(ReferencedROINumber=1, ContourSequence=contours)
    return Seed({"contours.dcm": series.as_bytes(data)})


def _nifti(version: str, packed: bool) -> Seed:
    import nibabel

    image = getattr(nibabel, version)(_values(), np.diag([-0.8, -1.25, 2, 1]))
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    content = image.to_bytes()
    if packed:
        return Seed({"scan.nii.gz": gzip.compress(content, mtime=0)}, wrapped="gzip")
    return Seed({"scan.nii": content})


def _pair() -> Seed:
    import nibabel

    image = nibabel.Nifti1Pair(_values(), np.diag([-0.8, -1.25, 2, 1]))
    image.set_sform(image.affine, 1)
    with TemporaryDirectory() as folder:
        image.to_filename(Path(folder) / "scan.hdr")
        return Seed({name: (Path(folder) / name).read_bytes() for name in ("scan.hdr", "scan.img")})


def _itk(name: str, packed: bool) -> Seed:
    import SimpleITK

    image = SimpleITK.GetImageFromArray(_values().transpose(2, 1, 0))
    image.SetSpacing((0.8, 1.25, 2))
    with TemporaryDirectory() as folder:
        SimpleITK.WriteImage(image, str(Path(folder) / name), useCompression=packed)
        made = sorted(Path(folder).iterdir(), key=lambda path: path.name != name)
        return Seed({path.name: path.read_bytes() for path in made})


MAKERS: dict[str, Callable[[], Seed]] = {
    "classic": _classic,
    "implicit": lambda: _classic(syntax=ImplicitVRLittleEndian),
    "deflated": _deflated,
    "jpeg 2000": lambda: _packed(JPEG2000Lossless),
    "jpeg-ls": lambda: _packed(JPEGLSLossless),
    "rle": lambda: _packed(RLELossless),
    "jpeg lossless": lambda: _packed(JPEGLosslessSV1, lambda plane: imagecodecs.ljpeg_encode(plane, bitspersample=16)),
    "high-throughput jpeg 2000": lambda: _packed(HTJ2KLossless, lambda plane: imagecodecs.htj2k_encode(plane)),
    "enhanced": _enhanced,
    "mosaic": _mosaic,
    "segmentation": _segmentation,
    "contours": _contours,
    "nifti": lambda: _nifti("Nifti1Image", packed=False),
    "nifti gzip": lambda: _nifti("Nifti1Image", packed=True),
    "nifti 2": lambda: _nifti("Nifti2Image", packed=False),
    "pair": _pair,
    "nrrd": lambda: _itk("scan.nrrd", packed=True),
    "nhdr": lambda: _itk("scan.nhdr", packed=False),
    "mha": lambda: _itk("scan.mha", packed=True),
    "mhd": lambda: _itk("scan.mhd", packed=False),
}


@cache
def seed(name: str) -> Seed:
    return MAKERS[name]()


# The mutators: bytes in, broken bytes out

Rng = np.random.Generator
EXTREMES = (
    0,
    1,
    2,
    3,
    127,
    128,
    255,
    256,
    32767,
    32768,
    65534,
    65535,
    1 << 20,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFE,
    0xFFFFFFFF,
)


def _anywhere(content: bytes, rng: Rng) -> int:
    """A place in the file; in half of all cases within its first kilobyte, where headers are."""
    return int(rng.integers(0, max(1, min(len(content), 1024) if rng.random() < 0.5 else len(content))))


def _flip(content: bytes, rng: Rng) -> bytes:
    out = bytearray(content)
    for _ in range(int(rng.integers(1, 9))):
        out[_anywhere(content, rng)] ^= 1 << int(rng.integers(8))
    return bytes(out)


def _overwrite(content: bytes, rng: Rng) -> bytes:
    at, length = _anywhere(content, rng), int(rng.integers(1, 40))
    filler = rng.bytes(length) if rng.random() < 0.5 else bytes([int(rng.choice([0, 255, 32, 48]))]) * length
    return content[:at] + filler + content[at + length :]


def _number(content: bytes, rng: Rng) -> bytes:
    """A 2-, 4- or 8-byte number with an extreme value: a length, a count, an offset."""
    width = int(rng.choice([2, 4, 8]))
    at = _anywhere(content, rng) & ~1
    value = int(rng.choice(EXTREMES)) & (1 << 8 * width) - 1
    return content[:at] + value.to_bytes(width, "little" if rng.random() < 0.8 else "big") + content[at + width :]


def _cut(content: bytes, rng: Rng) -> bytes:
    return content[: _anywhere(content, rng)]


def _insert(content: bytes, rng: Rng) -> bytes:
    at = _anywhere(content, rng)
    return content[:at] + rng.bytes(int(rng.integers(1, 64))) + content[at:]


def _remove(content: bytes, rng: Rng) -> bytes:
    at = _anywhere(content, rng)
    return content[:at] + content[at + int(rng.integers(1, 200)) :]


def _double(content: bytes, rng: Rng) -> bytes:
    at, length = _anywhere(content, rng), int(rng.integers(1, 2000))
    return content[:at] + content[at : at + length] * int(rng.integers(2, 5)) + content[at + length :]


def _exchange(content: bytes, rng: Rng) -> bytes:
    a, b = sorted((_anywhere(content, rng), _anywhere(content, rng)))
    n = min(int(rng.integers(1, 100)), b - a)
    return content[:a] + content[b : b + n] + content[a + n : b] + content[a : a + n] + content[b + n :]


ANYTHING = (_flip, _overwrite, _number, _cut, _insert, _remove, _double, _exchange)

SYNTAXES = (
    *(b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1", b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.2"),
    *(b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.4.51", b"1.2.840.10008.1.2.4.57", b"1.2.840.10008.1.2.4.70"),
    *(b"1.2.840.10008.1.2.4.80", b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.4.201", b"1.2.840.10008.1.2.5"),
    *(b"1.2.840.10008.1.2.8.1", b"1.2.840.10008.1.2.4.53", b"1.2.3", b""),
)
PATHS = (
    b"../../../../tmp/x",
    b"/etc/cron.d/evil",
    b"..\\..\\x\0y",
    b"a/../../b",
    b"\x1b[2J;rm -rf",
    b"x" * 64,
    b"1..2",
    b"",
    b"%s%n",
)
TEXTS = (
    b"nan",
    b"inf",
    b"-1e308",
    b"1e-300",
    b"",
    b"0",
    b"1\\2\\3\\4\\5\\6\\7",
    b"abc",
    b"9" * 16,
    b"\\\\\\",
    b"1,5\\2,5",
)
WHOLE_TAGS = (
    "28000200",
    "28000800",
    "28001000",
    "28001100",
    "28000001",
    "28000101",
    "28000201",
    "28000301",
    "28000600",
)
TEXT_TAGS = ("20003200", "20003700", "28003000", "28005210", "28005310", "18005000", "28000800", "20001300", "62000400")
UID_TAGS = ("08001600", "08001800", "20000d00", "20000e00", "20005200", "02000200", "02000300")
PATH_TAGS = (*UID_TAGS, "08003e10", "10001000", "10002000", "20001100")


def _elements(content: bytes, tags: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Where elements of these tags are: the place of their length, its width, the length. Explicit or implicit."""
    for tag in tags:
        at = content.find(bytes.fromhex(tag), 132)
        if 0 < at < len(content) - 8:
            explicit = content[at + 4 : at + 6].isalpha()
            width = 2 if explicit else 4
            place = at + 6 if explicit else at + 4
            yield place, width, int.from_bytes(content[place : place + width], "little")


def _with_value(content: bytes, element: tuple[int, int, int], value: bytes) -> bytes:
    place, width, length = element
    value += b"\0" * (len(value) % 2)
    return content[:place] + len(value).to_bytes(width, "little") + value + content[place + width + length :]


def _dicom_value(tags: Sequence[str], values: Sequence[bytes]) -> Callable[[bytes, Rng], bytes]:
    def mutate(content: bytes, rng: Rng) -> bytes:
        found = list(_elements(content, tags))
        if not found:
            return _flip(content, rng)
        element = found[int(rng.integers(len(found)))]
        return _with_value(content, element, values[int(rng.integers(len(values)))])

    return mutate


def changed_text(content: bytes, tags: Sequence[str], value: bytes) -> bytes:
    """Every one of these elements with that value, where it is there."""
    for tag in tags:
        for element in _elements(content, [tag]):
            content = _with_value(content, element, value)
    return content


def _dicom_length(content: bytes, rng: Rng) -> bytes:
    """An element whose length lies, its value as it was."""
    found = list(
        _elements(content, (*WHOLE_TAGS, *TEXT_TAGS, *PATH_TAGS, "e07f1000", "feff00e0", "00523092", "00522992"))
    )
    place, width, _ = found[int(rng.integers(len(found)))] if found else (_anywhere(content, rng), 4, 0)
    lie = int(rng.choice(EXTREMES)) & (1 << 8 * width) - 1
    return content[:place] + lie.to_bytes(width, "little") + content[place + width :]


def _in_pixels(content: bytes, rng: Rng) -> bytes:
    """Behind the header, where decoders are: the header stays sound, so that they are reached."""
    at = content.rfind(b"\xe0\x7f\x10\x00") + 12
    mutate = (_flip, _overwrite, _number, _exchange)[int(rng.integers(4))]
    return content[:at] + mutate(content[at:], rng) if 12 <= at < len(content) else _flip(content, rng)


def _nested(content: bytes, rng: Rng) -> bytes:
    """A sequence in a sequence in a sequence ..., some hundred or thousand deep, ended or not."""
    depth = int(rng.choice([3, 50, 500, 3000]))
    known = b"\x52\x00\x29\x92" if rng.random() < 0.5 else b"\x08\x00\x40\x11"
    opened = (known + b"SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * depth
    closed = (b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0") * depth if rng.random() < 0.5 else b""
    found = next(_elements(content, ("08001600", "08001800", "20001300")), None)
    at = found[0] + found[1] + found[2] if found else min(132, len(content))
    return content[:at] + opened + closed + content[at:]


DICOM = (
    *(_dicom_value(WHOLE_TAGS, [value.to_bytes(2, "little") for value in (0, 1, 2, 7, 8, 15, 16, 32, 4096, 65535)]),)
    * 3,
    _dicom_value(("28000800",), [b"0", b"-1", b"2", b"24", b"100000", b"2147483647", b"99999999999", b"1.5"]),
    *(_dicom_value(TEXT_TAGS, TEXTS),) * 2,
    *(_dicom_value(PATH_TAGS, PATHS),) * 2,
    *(_dicom_value(("02001000",), SYNTAXES),) * 2,
    *(_dicom_length,) * 3,
    *(_in_pixels,) * 6,
    _nested,
)


def _nifti_field(content: bytes, rng: Rng) -> bytes:
    """One field of a NIfTI-1 or -2 header with an extreme value (nifti1.h, nifti2.h)."""
    second = content[:2] == b"\x1c\x02"
    whole = {16: "q", 24: "q", 32: "q", 40: "q", 48: "q", 12: "h", 14: "h", 168: "q", 344: "i", 348: "i"}
    whole_1 = {
        40: "h",
        42: "h",
        44: "h",
        46: "h",
        48: "h",
        50: "h",
        70: "h",
        72: "h",
        252: "h",
        254: "h",
        123: "b",
        0: "i",
    }
    real = {104: "d", 112: "d", 120: "d", 128: "d", 176: "d", 184: "d", 352: "d", 376: "d", 400: "d", 440: "d"}
    real_1 = {
        76: "f",
        80: "f",
        84: "f",
        88: "f",
        108: "f",
        112: "f",
        116: "f",
        256: "f",
        260: "f",
        268: "f",
        280: "f",
        300: "f",
    }
    out = bytearray(content)
    for _ in range(int(rng.integers(1, 3))):
        fields = (whole if second else whole_1) if rng.random() < 0.6 else (real if second else real_1)
        at = int(rng.choice(list(fields)))
        kind = fields[at]
        if at + 8 > len(out):
            return _flip(content, rng)
        if kind in "fd":
            value: float = float(
                rng.choice([0, -1, np.nan, np.inf, -np.inf, 1e38, 1e-38, 352, 353, 544, 2**31, 0.5, -352])
            )
        else:
            bits = 8 * struct.calcsize(kind)
            value = int(
                rng.choice(
                    [0, 1, 2, 3, 4, 5, 7, 16, 64, 128, 256, 512, 1024, 2048, 4096, 32767, -1, -32768, 2**31 - 1, 2**62]
                )
            )
            value = (value + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)
        struct.pack_into(f"<{kind}", out, at, value)
    return bytes(out)


def _text_field(content: bytes, rng: Rng) -> bytes:
    """One line of an NRRD or MetaImage header with another value, doubled, or gone."""
    lines = content[:2000].split(b"\n")
    n = int(rng.integers(min(len(lines), 16)))
    key, mark, _ = lines[n].partition(b":" if b":" in lines[n] else b"=")
    values = (b"99999 99999 99999", b"-1 2 3", b"0 0 0", b"nan", b"1e400", b"../../../etc/passwd", b"/etc/passwd", b"float", b"MET_DOUBLE",
              b"gzip", b"raw", b"(1,0,0) (1,0,0) (0,0,1)", b"(nan,0,0) none (0,0,1)", b"scan.raw", b"LIST", b"SKIP 3", b"65536 65536 65536",
              b"\xff\xfe", b"", b"1 " * 500, b"4294967296 4294967296 1", b"%05d.raw 1 99999999 1")  # fmt: skip
    choice = rng.random()
    if choice < 0.7:
        lines[n] = key + mark + b" " + values[int(rng.integers(len(values)))]
    elif choice < 0.85:
        lines.insert(n, lines[n])
    else:
        del lines[n]
    return b"\n".join(lines) + content[2000:]


@cache
def _bomb(wrapping: str) -> bytes:
    """300 MiB of zeros, packed into a third of a megabyte."""
    packer = zlib.compressobj(9, wbits=31 if wrapping == "gzip" else -15)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(300)) + packer.flush()


TARGETED: dict[str, Sequence[Callable[[bytes, Rng], bytes]]] = {
    ".dcm": DICOM,
    ".nii": (_nifti_field,),
    ".gz": (_nifti_field,),
    ".hdr": (_nifti_field,),
    ".nrrd": (_text_field,),
    ".nhdr": (_text_field,),
    ".mha": (_text_field,),
    ".mhd": (_text_field,),
}


@dataclass(frozen=True)
class Mutant:
    number: int
    seed: str
    files: dict[str, bytes]
    as_folder: bool


def mutant(number: int) -> Mutant:
    """Always the same for the same number."""
    rng = np.random.default_rng([GENERATION, abs(number)])
    name = list(MAKERS)[number % len(MAKERS)]
    whole = seed(name)
    files = dict(whole.files)
    names = list(files)
    # of a pair of header and voxels the header mostly; of a series its first slice
    target = names[0] if whole.as_folder or rng.random() < 0.8 else names[int(rng.integers(len(names)))]
    files[target] = _mutated(files[target], whole.wrapped, Path(target).suffix, rng)
    return Mutant(number, name, files, whole.as_folder)


def _mutated(content: bytes, wrapped: str, suffix: str, rng: Rng) -> bytes:
    within = bool(wrapped) and rng.random() < 0.6
    head = b""
    if wrapped and rng.random() < 0.03:
        return _with_bomb(content, wrapped)
    if within:
        head, content = _unwrapped(content, wrapped)
    choices = (*ANYTHING, *TARGETED.get(suffix, ()) * (1 if suffix == ".dcm" else 8))
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        if content:
            content = choices[int(rng.integers(len(choices)))](content, rng)
    return head + _wrapped(content, wrapped) if within else content


def _unwrapped(content: bytes, wrapping: str) -> tuple[bytes, bytes]:
    if wrapping == "gzip":
        return b"", gzip.decompress(content)
    end = 144 + struct.unpack_from("<I", content, 140)[0]  # (0002,0000) tells how long the meta group is
    return content[:end], zlib.decompress(content[end:], wbits=-15)


def _wrapped(content: bytes, wrapping: str) -> bytes:
    packer = zlib.compressobj(6, wbits=31 if wrapping == "gzip" else -15)
    return packer.compress(content) + packer.flush()


def _with_bomb(content: bytes, wrapping: str) -> bytes:
    if wrapping == "gzip":
        return content + _bomb(wrapping)
    head, inner = _unwrapped(content, wrapping)
    return head + _wrapped(inner[: len(inner) // 3], wrapping)[:-2] + _bomb(wrapping)


# The process that reads them


@dataclass(frozen=True)
class Outcome:
    number: int
    word: str
    """fine, repaired, refused, or what went wrong: crashed, hung, greedy, untamed, untidy."""
    detail: str = ""
    seconds: float = 0.0


GOOD = ("fine", "repaired", "refused")


def read_all(numbers: Sequence[int], patience: float = HUNG_SECONDS) -> Iterator[Outcome]:
    """Every mutant's outcome, from a process that is started again when it dies or hangs."""
    left = list(numbers)
    while left:
        with _worker(left) as process:
            for outcome in _heard(process, left, patience):
                left.remove(outcome.number)
                yield outcome


@contextlib.contextmanager
def _worker(numbers: Sequence[int]) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.reading.mutations", "work"],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
    )
    assert process.stdin and process.stdout
    try:
        process.stdin.write(json.dumps(list(numbers)).encode() + b"\n")
        process.stdin.flush()
        yield process
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()


def _heard(process: "subprocess.Popen[bytes]", left: Sequence[int], patience: float) -> Iterator[Outcome]:
    assert process.stdout
    waiting, seconds, rest = left[0], 60.0, b""  # it imports first
    while True:
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        chunk = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
        if not chunk:
            if ready and process.wait() == 0:
                return
            word = "crashed" if ready else "hung"
            yield Outcome(waiting, word, f"signal or exit {process.returncode}" if ready else f"{seconds:g} s")
            return
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            told = json.loads(line)
            waiting, seconds = told["next"], patience
            if "word" in told:
                yield Outcome(told["number"], told["word"], told["detail"], told["seconds"])


def work() -> None:
    """In the process: numbers by stdin, one line per mutant to stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    numbers = json.loads(sys.stdin.readline())
    with TemporaryDirectory() as folder:
        place = Path(folder)
        os.chdir(_made(place / "nowhere"))
        for name in MAKERS:  # buffers, threads and modules that honest files need are there before anything is counted
            assert read(place, Mutant(0, name, seed(name).files, seed(name).as_folder))
        resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + LIMIT_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        print(json.dumps({"next": numbers[0]}), file=answers)
        for number, following in zip(numbers, [*numbers[1:], numbers[-1]], strict=True):
            started = time.perf_counter()
            word, detail = read(place, mutant(number))
            seconds = time.perf_counter() - started
            told = {"number": number, "word": word, "detail": detail, "seconds": seconds, "next": following}
            print(json.dumps(told), file=answers)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) << 10


def read(place: Path, one: Mutant) -> tuple[str, str]:
    """What hilum says of it, or in which way it misbehaved."""
    folder = lay(place / "scan", one)
    before, peak = _memory("VmSize"), _memory("VmPeak")
    word, detail = _said(folder if one.as_folder else folder / next(iter(one.files)), place, one)
    taken = _memory("VmPeak") - before if _memory("VmPeak") > peak else 0
    honest = 8 * int(np.prod(SHAPE))
    if taken > HONEST_TIMES * honest + SLACK_BYTES:
        return "greedy", f"took {taken >> 20} MiB; then: {word} {detail}"
    strange = [path.name for path in (*(place / "nowhere").iterdir(), *folder.iterdir()) if path.name not in one.files]
    strange += [path.name for path in place.iterdir() if path.name not in ("nowhere", "scan", "out")]
    return ("untidy", f"left {strange}") if strange else (word, detail)


def lay(folder: Path, one: Mutant) -> Path:
    _made(folder)
    for path in folder.iterdir():
        path.unlink()
    for name, content in one.files.items():
        (folder / name).write_bytes(content)
    return folder


def _as_labels(path: Path) -> Any:
    from preprocessing.dicom.labels import read_labels

    return read_labels(path, _labelled(), {})


@cache
def _labelled() -> Any:
    """The scan to which the seeds of labels belong."""
    from preprocessing import files

    with TemporaryDirectory() as folder:
        return files.read(lay(Path(folder), Mutant(0, "classic", seed("classic").files, True)))


def _reading(number: int) -> Any:
    """Every second mutant is read with all repairs allowed: more code is reached, and more can be asked for."""
    from preprocessing.reading import STRICT, Reading

    return STRICT if number % 2 else Reading(allow=("tilt", "uneven", "gaps", "few", "nan", "sform"))


def _said(path: Path, place: Path, one: Mutant) -> tuple[str, str]:
    from preprocessing import files
    from preprocessing.volume import ScanError

    try:
        if one.number in MISBEHAVIOURS:
            MISBEHAVIOURS[one.number](place)
        labels = one.seed in ("segmentation", "contours")
        volume = _as_labels(path) if labels else files.read(path, _reading(one.number))
        if one.number % 20 == 0:
            files.write(volume, _made(place / "out") / "scan.nii.gz")
    except ScanError as error:
        if _wished_too_much(error):
            return "greedy", f"asked for memory that there is not: {error}"
        return "refused", f"[{error.reason}] {error}"
    except BaseException:
        return "untamed", "".join(traceback.format_exc().splitlines(keepends=True)[-6:])
    return volume.provenance.verdict, ""


def _break_off(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _wish(_: Path) -> None:
    np.zeros(200 << 20, np.uint8)


def _wish_absurdly(_: Path) -> None:
    from preprocessing.volume import UnreadableScan

    try:
        np.empty(1 << 50, np.uint8)
    except MemoryError as error:
        raise UnreadableScan("no memory") from error


def _stumble(_: Path) -> None:
    raise KeyError("Rows")


def _litter(place: Path) -> None:
    (place / "evil").write_text("")


MISBEHAVIOURS: dict[int, Callable[[Path], Any]] = {
    -1: _break_off,
    -2: lambda _: time.sleep(1000),
    -3: _wish,
    -4: _wish_absurdly,
    -5: _stumble,
    -6: _litter,
}
"""What readers must not do, done on purpose at numbers below 0: the guard must notice."""


def _wished_too_much(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def replay(number: int) -> None:
    one = mutant(number)
    folder = lay(Path(f"/tmp/mutant-{number}/scan"), one)
    print(one.seed, folder, {name: len(content) for name, content in one.files.items()})
    print(*read(folder.parent, one) if (folder.parent / "nowhere").mkdir(exist_ok=True) is None else (), sep="\n")


if __name__ == "__main__":
    work() if sys.argv[1] == "work" else replay(int(sys.argv[2]))
