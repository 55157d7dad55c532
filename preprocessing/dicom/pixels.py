"""The stored values of frames, whatever way they are packed, unpacked in worker threads."""

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock

import imagecodecs
import numpy as np
import pydicom
from jaxtyping import Integer
from pydicom.uid import HTJ2K as HTJ2KAny
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from ..cores import usable_cores
from ..volume import UnreadableScan
from .headers import ITEM, SEQUENCE_END, Header, PixelData, text

PIXELS_LIMIT = 1 << 26
"""Pixels in a frame above which its header is not believed (8192 x 8192; no scanner makes more)."""

FRAMES_LIMIT = 1 << 32
"""Pixels in all frames of a file above which its header is not believed."""

RATIO_LIMIT = 4096
RATIO_MATTERS = 1 << 28
"""How many times smaller than its pixels a file of this many bytes of pixels may be: empty frames reach a few thousand."""

READ_AT_ONCE = 1 << 23
"""Bytes of a file up to which one worker reads the whole of it; of greater ones, each takes some frames."""

TILES_LIMIT = 4096
SCANS_LIMIT = 256
"""Tiles of a JPEG 2000 image and scans of a JPEG above which it is made to keep a decoder busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How the pixels of one file are packed."""

    syntax: str
    rows: int
    columns: int
    frames: int
    allocated: int
    stored: int
    signed: bool
    photometric: str
    """MONOCHROME1 or MONOCHROME2."""
    lossy: bool
    """Whether they were compressed with loss, now or before they came here."""
    pixels: PixelData
    deflated_from: int
    file_size: int

    @property
    def dtype(self) -> np.dtype:
        """Of the planes that come out: uint8, int8, uint16, int16, uint32 or int32."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.allocated // 8}")

    @property
    def least_and_most(self) -> tuple[int, int]:
        """The least and the greatest stored value that BitsStored and PixelRepresentation allow."""
        return (-(1 << self.stored - 1), (1 << self.stored - 1) - 1) if self.signed else (0, (1 << self.stored) - 1)

    @property
    def frame_bytes(self) -> int:
        """Of one frame, unpacked."""
        return self.rows * self.columns * self.allocated // 8

    def __str__(self) -> str:
        """For Provenance.encoding: 'JPEG 2000 Image Compression (Lossless Only), 12 of 16 bits, signed'."""
        sign = "signed" if self.signed else "unsigned"
        return f"{_syntax_name(self.syntax)}, {self.stored} of {self.allocated} bits, {sign}"


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What is left to say when every frame has been handed over."""

    sha256: str
    """One over the SHA-256s (hexadecimal) of the files, in the order given."""
    mended: tuple[str, ...] = ()
    """Sentences for Provenance.repairs."""


def packing_of(header: Header) -> Packing:
    """How its pixels are packed, if everything the header says of them fits together and they can be unpacked here.

    Raises UnreadableScan with the reason damaged (no pixels, too few or too many bytes), colour, encoding, too_large,
    contradiction or unsupported (floats, bitmaps). The photometric interpretation and `lossy` are for the caller.
    """
    packing = _declared(header)
    for reason, finding in (*_findings(header, packing), *_sizes(packing)):
        raise _unreadable(header.path, finding, reason)
    return packing


def decode_all(
    files: Sequence[tuple[Path, Packing, Sequence[int]]], receive: Callable[[int, int, np.ndarray], None]
) -> Decoded:
    """Every wanted frame (numbered from 0) of every file, handed to receive(file_index, frame_number, plane).

    A plane is [row, column] of `packing.dtype`: stored values, bits above BitsStored masked, the sign extended; it may
    be read-only and is only lent: copy out of it what is to be kept. `receive` is called in the worker threads, several
    at a time and in no order; it must not mind. Raises UnreadableScan(reason="damaged" or "contradiction") that names
    the first file, in the order given, that cannot be unpacked. All bytes of each file are hashed.
    """
    hashes = ["" for _ in files]
    mended: set[str] = set()
    jobs = [job for index, file in enumerate(files) for job in _jobs(_Unpacking(index, *file, receive, hashes, mended))]
    with ThreadPoolExecutor(min(WORKERS, max(len(jobs), 1)), thread_name_prefix="pixels") as pool:
        _finish([pool.submit(job) for job in jobs])
    return Decoded(sha256=hashlib.sha256("".join(hashes).encode()).hexdigest(), mended=tuple(sorted(mended)))


WORKERS = min(usable_cores(), 16)


def _finish(futures: list[Future[None]]) -> None:
    """Wait for all; of several failures the first in order is raised, whichever came first."""
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()


# what the header says


def _declared(header: Header) -> Packing:
    """The numbers as they are; whether they make sense is asked next."""
    elements = header.elements
    if header.pixels is None:
        raise _unreadable(header.path, "it holds no pixel data", "damaged")
    if header.pixels.name != "PixelData":
        raise _unreadable(header.path, f"its pixels are floating-point numbers ({header.pixels.name})", "unsupported")
    try:
        frames = int(text(elements, "NumberOfFrames") or 1)
        rows, columns, samples, allocated, stored, high, sign = (int(elements[tag].value) for tag in NUMBERS)
    except (KeyError, TypeError, ValueError):
        raise _unreadable(header.path, f"one of {', '.join(NUMBERS)} is missing or no number", "damaged") from None
    photometric = text(elements, "PhotometricInterpretation").upper()
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise _unreadable(header.path, f"it is coloured ({photometric or 'no photometric interpretation'})", "colour")
    if allocated == 1:
        raise _unreadable(header.path, "its pixels are single bits", "unsupported")
    if allocated not in (8, 16, 32) or not 0 < stored <= allocated or high != stored - 1 or sign not in (0, 1):
        said = f"bits allocated {allocated}, stored {stored}, high bit {high}, sign {sign}"
        raise _unreadable(header.path, f"what it says of its bits does not fit together ({said})", "contradiction")
    said_lossy = text(elements, "LossyImageCompression")
    return Packing(
        syntax=header.syntax,
        rows=rows,
        columns=columns,
        frames=frames,
        allocated=allocated,
        stored=stored,
        signed=bool(sign),
        photometric=photometric,
        lossy=said_lossy == "01" or header.syntax in LOSSY or (header.syntax in MAYBE_LOSSY and said_lossy != "00"),
        pixels=header.pixels,
        deflated_from=header.deflated_from,
        file_size=header.file_size,
    )


NUMBERS = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")


def _findings(header: Header, packing: Packing) -> Iterator[tuple[str, str]]:
    """What of the declared numbers cannot be believed, or cannot be unpacked here."""
    declared = f"{packing.rows} x {packing.columns} pixels in {packing.frames} frame(s)"
    pixels = packing.rows * packing.columns
    if pixels < 1 or packing.frames < 1:
        yield "contradiction", f"{declared} are declared"
    if pixels > PIXELS_LIMIT or pixels * packing.frames > FRAMES_LIMIT:
        yield "too_large", f"{declared} are declared, more than can be believed"
    whole = packing.frame_bytes * packing.frames
    if whole > max(RATIO_LIMIT * packing.file_size, RATIO_MATTERS):
        yield "too_large", f"{declared} are declared in a file of {packing.file_size} bytes"
    if packing.syntax not in DECODERS and packing.syntax not in NATIVE_SYNTAXES:
        name = _syntax_name(packing.syntax) or "(none)"
        yield "encoding", f"its transfer syntax {name} cannot be unpacked here"
    if packing.syntax in NATIVE_SYNTAXES and packing.pixels.length is None:
        yield (
            "contradiction",
            f"its pixels are compressed, though its transfer syntax is {_syntax_name(packing.syntax)}",
        )
    if packing.syntax in DECODERS and packing.pixels.length is not None:
        yield "contradiction", f"its pixels are not packed as its transfer syntax says ({_syntax_name(packing.syntax)})"
    if packing.syntax == ExplicitVRBigEndian and packing.pixels.vr == "OB" and packing.allocated > 8:
        yield "contradiction", f"its pixels of {packing.allocated} bits are kept as single bytes in big endian order"


def _sizes(packing: Packing) -> Iterator[tuple[str, str]]:
    """Too many or too few bytes for the pixels declared; what can be said of it before a pixel is read."""
    promised, length = packing.frame_bytes * packing.frames, packing.pixels.length
    if length is None:
        if packing.pixels.offset + packing.frames * 9 > packing.file_size:  # an item, and at least a byte of each frame
            yield "damaged", f"it ends before {packing.frames} compressed frame(s) could have been"
        return
    if length not in (promised, promised + promised % 2):  # one byte pads to an even length (PS3.5 8.1.1)
        yield "damaged", f"it holds {length} bytes of pixels instead of {promised}"
    if not packing.deflated_from and packing.pixels.offset + length > packing.file_size:
        held = max(packing.file_size - packing.pixels.offset, 0)
        yield "damaged", f"it is cut short and holds {held} bytes of pixels instead of {promised}"


NATIVE_SYNTAXES = {
    str(syntax)
    for syntax in (
        ImplicitVRLittleEndian,
        ExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
    )
}


def _syntax_name(syntax: str) -> str:
    return NAMES.get(syntax) or UID(syntax, validation_mode=pydicom.config.IGNORE).name


NAMES = {
    "1.2.840.10008.1.2.4.53": "JPEG Spectral Selection, Non-Hierarchical (Process 6 & 8)",
    "1.2.840.10008.1.2.4.55": "JPEG Full Progression, Non-Hierarchical (Process 10 & 12)",
    "1.2.840.10008.1.2.8.1": "Deflated Image Frame Compression",
}
"""Retired or newer than pydicom's dictionary."""

NEEDED = {
    "damaged": "Every slice must be whole. Send the series again.",
    "colour": "A scan of one value per voxel is needed. Choose the original series, not a picture of it.",
    "encoding": "Convert the series to a transfer syntax of the standard, for example Explicit VR Little Endian.",
    "too_large": f"At most {PIXELS_LIMIT} pixels in a frame, and as many as the file can hold, are believed. Export it again.",
    "contradiction": "What a file says of its pixels must be true of them. Export the series again, or convert it anew.",
    "unsupported": "Whole numbers of 8, 16 or 32 bits are needed. Convert the series.",
}


def _unreadable(path: Path, finding: str, reason: str) -> UnreadableScan:
    return UnreadableScan(f"{path.name} is no slice that can be read: {finding}. {NEEDED[reason]}", reason=reason)


# jobs: some frames of one file each


class _Contradiction(Exception):
    """Frames are sound, but not what the header says of them."""


class _OfReceiver(Exception):
    """Not the file's failure: what it was is its cause."""


@dataclass(frozen=True)
class _Unpacking:
    """One file on its way, and where its frames, its hash and what was mended go."""

    index: int
    path: Path
    packing: Packing
    wanted: Sequence[int]
    receive: Callable[[int, int, np.ndarray], None]
    hashes: list[str]
    mended: set[str]
    found: list[list[list["Fragment"]]] = field(default_factory=list)
    """The fragments of its frames, once they have been looked for."""
    lock: Lock = field(default_factory=Lock)

    def frames(self, read: "Read") -> list[list["Fragment"]]:
        with self.lock:
            if not self.found:
                self.found.append(_frames(read, self.packing))
        return self.found[0]

    def hand_over(self, number: int, frame: bytes | memoryview) -> None:
        """Unpack a frame; give it away."""
        plane = DECODERS.get(self.packing.syntax, _native)(frame, self.packing, self.mended)
        if plane.shape != (self.packing.rows, self.packing.columns):
            raise _Contradiction(f"a frame of {plane.shape} pixels came out")
        try:
            self.receive(self.index, number, plane)
        except Exception as error:
            raise _OfReceiver from error


def _jobs(unpacking: _Unpacking) -> list[Callable[[], None]]:
    packing = unpacking.packing
    beyond = [number for number in unpacking.wanted if not 0 <= number < packing.frames]
    assert not beyond, beyond
    if packing.deflated_from:
        work: list[Callable[[_Unpacking], None]] = [_deflated]
    elif packing.file_size <= READ_AT_ONCE:
        work = [_at_once]
    else:
        work = [_hash, *_in_parts(unpacking)]
    return [_naming(unpacking, do) for do in work]


def _naming(unpacking: _Unpacking, do: Callable[[_Unpacking], None]) -> Callable[[], None]:
    """A failure is told of the file; receive() is the caller's own, and so are its failures."""

    def job() -> None:
        try:
            do(unpacking)
        except _OfReceiver as error:
            assert error.__cause__ is not None
            raise error.__cause__ from None
        except MemoryError:
            raise
        except _Contradiction as error:
            raise _unreadable(unpacking.path, str(error), "contradiction") from error
        except Exception as error:  # decoders let any exception out of damaged data
            why = str(error)[:200] or type(error).__name__
            raise UnreadableScan(
                f"{unpacking.path.name} has truncated or damaged pixel data ({why}). {NEEDED['damaged']}",
                reason="damaged",
            ) from error

    return job


def _at_once(unpacking: _Unpacking) -> None:
    """A file that one worker reads as a whole: hashed and unpacked while its bytes are in the cache."""
    content = unpacking.path.read_bytes()
    if len(content) != unpacking.packing.file_size:
        raise ValueError("it has changed since its header was read")
    unpacking.hashes[unpacking.index] = hashlib.sha256(content).hexdigest()
    view = memoryview(content)
    _unpack(unpacking, lambda at, count: view[at : at + count], unpacking.wanted)


def _hash(unpacking: _Unpacking) -> None:
    with unpacking.path.open("rb") as stream:
        unpacking.hashes[unpacking.index] = hashlib.file_digest(stream, "sha256").hexdigest()
        if stream.tell() != unpacking.packing.file_size:
            raise ValueError("it has changed since its header was read")


def _in_parts(unpacking: _Unpacking) -> Iterator[Callable[[_Unpacking], None]]:
    """Jobs of some megabytes each; a great file is never in memory as a whole."""
    at_a_time = max(READ_AT_ONCE // 2 // unpacking.packing.frame_bytes, 1)
    for first in range(0, len(unpacking.wanted), at_a_time):
        yield partial(_part, wanted=unpacking.wanted[first : first + at_a_time])


def _part(unpacking: _Unpacking, wanted: Sequence[int]) -> None:
    with unpacking.path.open("rb") as stream:

        def read(at: int, count: int) -> memoryview:
            stream.seek(at)
            return memoryview(stream.read(count))

        _unpack(unpacking, read, wanted)


Read = Callable[[int, int], memoryview]
"""So many bytes from there on; fewer where the file ends."""


def _unpack(unpacking: _Unpacking, read: Read, wanted: Sequence[int]) -> None:
    packing = unpacking.packing
    if packing.syntax in NATIVE_SYNTAXES:
        for number in wanted:
            unpacking.hand_over(number, _native_frame(read, packing, number))
        return
    frames = unpacking.frames(read)
    for number in wanted:
        unpacking.hand_over(number, _joined(read, frames[number]))


def _deflated(unpacking: _Unpacking) -> None:
    """A deflated data set is inflated from its beginning, no further than the pixels reach, and never held whole."""
    packing, digest, inflater = unpacking.packing, hashlib.sha256(), zlib.decompressobj(wbits=-15)
    waiting = sorted(set(unpacking.wanted), reverse=True)
    inflated, base, read = bytearray(), 0, 0  # `base`: where in the inflated data set `inflated` begins
    with unpacking.path.open("rb") as stream:
        while packed := stream.read(1 << 20):
            digest.update(packed)
            packed, read = packed[max(packing.deflated_from - read, 0) :], read + len(packed)
            while packed and waiting:
                inflated += inflater.decompress(packed, 1 << 20)
                packed = inflater.unconsumed_tail
                while waiting and base + len(inflated) >= _frame_at(packing, waiting[-1]) + packing.frame_bytes:
                    start = _frame_at(packing, waiting[-1]) - base
                    unpacking.hand_over(waiting.pop(), bytes(inflated[start : start + packing.frame_bytes]))
                passed = (_frame_at(packing, waiting[-1]) if waiting else base + len(inflated)) - base
                base += min(passed, len(inflated))
                del inflated[: max(passed, 0)]
    if waiting or read != packing.file_size:
        raise ValueError("it ends before its last frame")
    unpacking.hashes[unpacking.index] = digest.hexdigest()


def _frame_at(packing: Packing, number: int) -> int:
    return packing.pixels.offset + number * packing.frame_bytes


def _native_frame(read: Read, packing: Packing, number: int) -> memoryview:
    at, count = _frame_at(packing, number), packing.frame_bytes
    if not (packing.syntax == ExplicitVRBigEndian and packing.allocated == 8 and packing.pixels.vr == "OW"):
        return read(at, count)
    # single bytes kept as words of two: the first pixel is the lower byte, which in big endian comes second
    skipped = (at - packing.pixels.offset) % 2
    words = np.frombuffer(read(at - skipped, count + skipped + (count + skipped) % 2), ">u2").astype("<u2")
    return memoryview(words.tobytes())[skipped : skipped + count]


# encapsulated pixels: a table of offsets, then fragments, some to a frame (PS3.5 A.4)

FRAGMENTS_LIMIT = 1_000_000

Fragment = tuple[int, int]
"""Where its bytes begin in the file, and how many they are."""


def _frames(read: Read, packing: Packing) -> list[list[Fragment]]:
    """The fragments of every frame. Where tables and counts do not agree nothing is guessed."""
    table = _item(read, packing.pixels.offset, packing)
    if table is None:
        raise ValueError("no fragment")
    first = sum(table)
    fragments = list(_fragments(read, first, packing))
    starts = _starts(bytes(read(*table)), packing)
    if starts is not None:
        return _by_table(fragments, starts, first, packing)
    if len(fragments) == packing.frames:
        return [[fragment] for fragment in fragments]
    if packing.frames == 1 and fragments and packing.syntax in MANY_FRAGMENTS:
        return [fragments]
    if len(fragments) < packing.frames or packing.syntax not in MANY_FRAGMENTS:
        raise ValueError(f"{len(fragments)} fragments for {packing.frames} frame(s)")
    return _by_beginnings(read, fragments, packing)


def _item(read: Read, at: int, packing: Packing) -> Fragment | None:
    """The item there; None at the mark of the end."""
    head = read(at, 8)
    if len(head) < 8:
        raise ValueError("it ends without the mark of its end")
    group, number, length = struct.unpack("<HHL", head)
    tag = group << 16 | number
    if tag == SEQUENCE_END:
        return None
    if tag != ITEM or at + 8 + length > packing.file_size:
        raise ValueError("a fragment is cut short, or no fragment is where one should be")
    return at + 8, length


def _fragments(read: Read, at: int, packing: Packing) -> Iterator[Fragment]:
    for _ in range(FRAGMENTS_LIMIT):
        fragment = _item(read, at, packing)
        if fragment is None:
            return
        yield fragment
        at = sum(fragment)
    raise ValueError(f"more than {FRAGMENTS_LIMIT} fragments")


def _starts(table: bytes, packing: Packing) -> list[int] | None:
    """Where frames begin, counted from the first fragment; None where no table says it."""
    extended = packing.pixels.frame_offsets
    if not table and not extended:
        return None
    starts = np.frombuffer(extended, "<u8") if extended else np.frombuffer(table, "<u4")
    if (table and extended) or len(starts) != packing.frames or (np.diff(starts.astype(np.int64)) <= 0).any():
        raise ValueError(f"a table of {len(starts)} offsets that cannot be those of {packing.frames} frame(s)")
    return [int(start) for start in starts]


def _by_table(fragments: list[Fragment], starts: list[int], first: int, packing: Packing) -> list[list[Fragment]]:
    places = {at - 8 - first: place for place, (at, _) in enumerate(fragments)}
    if starts[0] != 0 or not all(start in places for start in starts):
        raise ValueError("its table of offsets points elsewhere than at fragments")
    ends = [*(places[start] for start in starts[1:]), len(fragments)]
    frames = [fragments[places[start] : end] for start, end in zip(starts, ends, strict=True)]
    if packing.syntax not in MANY_FRAGMENTS and len(fragments) != len(frames):
        raise ValueError(f"{len(fragments)} fragments for {packing.frames} frame(s)")
    return _trimmed(frames, packing)


def _trimmed(frames: list[list[Fragment]], packing: Packing) -> list[list[Fragment]]:
    """With the extended table, frames know their length without the byte that pads it."""
    if not packing.pixels.frame_lengths:
        return frames
    lengths = np.frombuffer(packing.pixels.frame_lengths, "<u8")
    if len(lengths) != len(frames) or any(
        len(frame) != 1 or frame[0][1] - int(length) not in (0, 1)
        for frame, length in zip(frames, lengths, strict=True)
    ):
        raise ValueError("its table of lengths is not that of its fragments")
    return [[(frame[0][0], int(length))] for frame, length in zip(frames, lengths, strict=True)]


def _by_beginnings(read: Read, fragments: list[Fragment], packing: Packing) -> list[list[Fragment]]:
    """Without a table, a frame begins where a code stream does, behind a fragment in which one ends."""
    mark = MANY_FRAGMENTS[packing.syntax]
    frames: list[list[Fragment]] = []
    has_ended = True
    for at, length in fragments:
        begins = bytes(read(at, len(mark))) == mark
        if begins != has_ended and (begins or not frames):
            raise ValueError("fragments that do not tell to which frame they belong")
        if begins and has_ended:
            frames.append([])
        frames[-1].append((at, length))
        has_ended = _ends(bytes(read(at + max(length - 64, 0), min(length, 64))))
    if len(frames) != packing.frames:
        raise ValueError(f"the beginnings of {len(frames)} frames instead of {packing.frames}")
    return frames


def _joined(read: Read, frame: list[Fragment]) -> memoryview:
    if len(frame) == 1:
        return read(*frame[0])
    return memoryview(b"".join(read(*fragment) for fragment in frame))


# one frame: from its bytes to its stored values

Plane = Integer[np.ndarray, "row column"]
Frame = bytes | memoryview
END = b"\xff\xd9"


def _ends(frame: bytes) -> bool:
    """Whether a code stream ends there; bytes that pad are 0, and some write 255."""
    return frame.rstrip(b"\0\xff").endswith(END)


def _native(frame: Frame, packing: Packing, mended: set[str]) -> Plane:
    order = ">" if packing.syntax == ExplicitVRBigEndian else "<"
    words = np.frombuffer(frame, f"{order}u{packing.allocated // 8}")
    if len(words) != packing.rows * packing.columns:
        raise ValueError(f"{len(frame)} bytes of a frame instead of {packing.frame_bytes}")
    return _extended(words.astype(words.dtype.newbyteorder("="), copy=False), packing).reshape(packing.rows, -1)


def _extended(words: Integer[np.ndarray, "..."], packing: Packing) -> Integer[np.ndarray, "..."]:
    """Of words as wide as BitsAllocated, what is above BitsStored replaced by the sign or by nothing (PS3.5 8.1.1)."""
    above = packing.allocated - packing.stored
    if above == 0:
        return words.view(packing.dtype)
    if packing.signed:
        return (words.view(packing.dtype) << above) >> above
    return words & words.dtype.type((1 << packing.stored) - 1)


def _deflated_frame(frame: Frame, packing: Packing, mended: set[str]) -> Plane:
    inflater = zlib.decompressobj(wbits=-15)
    inflated = inflater.decompress(frame, packing.frame_bytes + 2)
    if len(inflated) == packing.frame_bytes + packing.frame_bytes % 2:
        inflated = inflated[: packing.frame_bytes]  # frames of an odd number of bytes may be padded
    return _native(inflated, packing, mended)


def _run_lengths(frame: Frame, packing: Packing, mended: set[str]) -> Plane:
    """One segment per byte of a pixel, the highest first (PS3.5 G)."""
    width, pixels = packing.allocated // 8, packing.rows * packing.columns
    count, *offsets = struct.unpack("<16L", frame[:64])
    ends = [*offsets[1:count], len(frame)]
    if count != width or offsets[0] != 64 or any(a >= b for a, b in zip(offsets, ends, strict=False)):
        raise ValueError(f"{count} segments at {offsets[:width]} for pixels of {width} bytes")
    planes = np.empty((pixels, width), np.uint8)
    for place, (start, end) in enumerate(zip(offsets, ends, strict=False)):
        segment = imagecodecs.packbits_decode(bytes(frame[start:end]), out=pixels)
        if len(segment) != pixels:
            raise ValueError(f"a segment of {len(segment)} pixels instead of {pixels}")
        planes[:, width - 1 - place] = np.frombuffer(segment, np.uint8)
    words = planes.view(f"<u{width}").ravel()
    return _extended(words.astype(words.dtype.newbyteorder("="), copy=False), packing).reshape(packing.rows, -1)


def _jpeg(frame: Frame, packing: Packing, mended: set[str]) -> Plane:
    frame = bytes(frame)
    process, precision = _checked_jpeg(frame, packing)
    if packing.syntax in LOSSLESS_JPEG and process not in LOSSLESS_PROCESSES:
        raise _Contradiction("its transfer syntax says lossless, its frames are compressed with loss")
    return _of_unsigned(imagecodecs.jpeg8_decode(frame), precision, packing)


def _jpeg_ls(frame: Frame, packing: Packing, mended: set[str]) -> Plane:
    frame = bytes(frame)
    _, precision = _checked_jpeg(frame, packing)
    return _of_unsigned(imagecodecs.jpegls_decode(frame), precision, packing)


def _checked_jpeg(frame: bytes, packing: Packing) -> tuple[int, int]:
    """Process and precision of a JPEG or JPEG-LS stream that is whole and has the size that the header says.

    Decoders make pixels of a stream that was cut short too, grey or black where there is nothing.
    """
    if not _ends(frame[-64:]):
        raise ValueError("a JPEG stream without its end")
    process, precision, rows, columns, components = _start_of_frame(frame)
    _compare(rows, columns, components, precision, packing)
    if frame.count(b"\xff\xda") > SCANS_LIMIT:
        raise ValueError(f"a JPEG stream of more than {SCANS_LIMIT} scans")
    return process, precision


def _start_of_frame(frame: bytes) -> tuple[int, int, int, int, int]:
    """Process (the marker), precision, rows, columns, components (ISO 10918-1 B.2.2)."""
    if frame[:2] != b"\xff\xd8":
        raise ValueError("no JPEG stream")
    at = 2
    while at + 4 <= len(frame):
        if frame[at] != 0xFF:
            break
        marker = frame[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker in PROCESSES:
            precision, rows, columns, components = struct.unpack_from(">BHHB", frame, at + 4)
            return marker, precision, rows, columns, components
        at += 2 + int.from_bytes(frame[at + 2 : at + 4])
    raise ValueError("a JPEG stream that does not say how large it is")


LOSSLESS_PROCESSES = {0xC3, 0xC7, 0xCB, 0xCF}
PROCESSES = (set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}) | {0xF7}
"""Markers of a start of frame; F7 is JPEG-LS's."""


def _jpeg_2000(frame: Frame, packing: Packing, mended: set[str]) -> Plane:
    stream = _code_stream(bytes(frame))
    precision, is_signed = _checked_jpeg_2000(stream, packing)
    values = imagecodecs.jpeg2k_decode(stream, numthreads=1)  # htj2k_decode swallows errors and returns noise
    if is_signed == packing.signed:
        return _fitting(values, precision, packing)
    mended.add(
        f"The JPEG 2000 stream is {'signed' if is_signed else 'unsigned'} and the header says otherwise; its bits were "
        "taken as they are, their sign as the header says."
    )
    unsigned = (values.astype(np.int64) & ((1 << precision) - 1)).astype(np.uint32)
    return _of_unsigned(unsigned, precision, packing)


def _code_stream(frame: bytes) -> bytes:
    """Bare, as DICOM wants it; out of its boxes where somebody packed a whole JP2 file."""
    at = 0
    while frame[at : at + 4] != b"\xff\x4f\xff\x51":
        length = int.from_bytes(frame[at : at + 4])
        at += 8 if frame[at + 4 : at + 8] == b"jp2c" else length
        if length < 8 or at >= len(frame):
            raise ValueError("no JPEG 2000 stream")
    return frame[at:]


def _checked_jpeg_2000(stream: bytes, packing: Packing) -> tuple[int, bool]:
    """Precision and sign of a stream that is whole and has the size that the header says (ISO 15444-1 A.5.1)."""
    numbers = struct.unpack_from(">HHLLLLLLLLHBBB", stream, 4)
    _, _, right, bottom, left, top, tile_columns, tile_rows, _, _, components, depth, step_x, step_y = numbers
    precision, is_signed = (depth & 0x7F) + 1, bool(depth & 0x80)
    if (step_x, step_y) != (1, 1) or not tile_columns or not tile_rows:
        raise ValueError("a JPEG 2000 stream of an unusual grid")
    _compare(bottom - top, right - left, components, precision, packing)
    if -(-right // tile_columns) * -(-bottom // tile_rows) > TILES_LIMIT:
        raise ValueError(f"a JPEG 2000 stream of more than {TILES_LIMIT} tiles")
    _follow_tiles(stream, packing)
    return precision, is_signed


def _follow_tiles(stream: bytes, packing: Packing) -> None:
    """From marker to marker and from tile part to tile part to the end, which must be there."""
    at, parts = 2, 0
    while stream[at : at + 2] != END:
        marker = stream[at : at + 2]
        if marker == b"\xff\x90":
            (length,) = struct.unpack_from(">L", stream, at + 6)
            if length == 0:  # the last part, to the end
                length = len(stream.rstrip(b"\0")) - 2 - at
            parts += 1
        elif len(marker) == 2 and marker[0] == 0xFF and not parts:
            length = 2 + int.from_bytes(stream[at + 2 : at + 4])
        else:
            raise ValueError("a JPEG 2000 stream that is cut short or damaged")
        if marker == b"\xff\x52" and packing.syntax in LOSSLESS_JPEG_2000 and stream[at + 13] == 0:
            raise _Contradiction("its transfer syntax says lossless, its frames are compressed with loss")
        if length < 4 or parts > 4 * TILES_LIMIT:
            raise ValueError("a JPEG 2000 stream that is damaged")
        at += length
    if not parts:
        raise ValueError("a JPEG 2000 stream without a tile")


def _compare(rows: int, columns: int, components: int, precision: int, packing: Packing) -> None:
    """Before a decoder spends memory on what the stream says of itself."""
    if (rows, columns) != (packing.rows, packing.columns) or components != 1:
        raise _Contradiction(
            f"a frame is {rows} x {columns} pixels of {components} value(s) where the header says "
            f"{packing.rows} x {packing.columns} of 1"
        )
    if not 1 <= precision <= packing.allocated:
        raise _Contradiction(f"a frame has {precision} bits per value, more than the {packing.allocated} allocated")


def _of_unsigned(values: np.ndarray, precision: int, packing: Packing) -> Plane:
    """Of a stream that knows no sign: bits to be read as the header says."""
    if precision < packing.stored and packing.signed:
        raise _Contradiction(f"a frame has {precision} bits per signed value where the header says {packing.stored}")
    words = values.astype(f"u{packing.allocated // 8}", copy=False)
    if precision < packing.allocated and not packing.signed:
        return _fitting(words, precision, packing)
    return _extended(words, packing)


def _fitting(values: np.ndarray, precision: int, packing: Packing) -> Plane:
    """Values whose sign is settled; more bits than BitsStored must be empty, or as wide as native pixels' words are."""
    if precision <= packing.stored:
        return values.astype(packing.dtype, copy=False)
    if precision == packing.allocated:
        return _extended(values.astype(packing.dtype, copy=False).view(f"u{packing.allocated // 8}"), packing)
    least, most = packing.least_and_most
    if int(values.min()) < least or int(values.max()) > most:
        raise _Contradiction(f"values beyond the {packing.stored} bits that the header says are stored")
    return values.astype(packing.dtype, copy=False)


SPECTRAL, PROGRESSIVE, DEFLATED_FRAMES = "1.2.840.10008.1.2.4.53", "1.2.840.10008.1.2.4.55", "1.2.840.10008.1.2.8.1"

LOSSLESS_JPEG = {JPEGLossless, JPEGLosslessSV1}
JPEG = {JPEGBaseline8Bit, JPEGExtended12Bit, SPECTRAL, PROGRESSIVE} | LOSSLESS_JPEG
JPEG_LS = {JPEGLSLossless, JPEGLSNearLossless}
HIGH_THROUGHPUT = {HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2KAny}
JPEG_2000 = {JPEG2000Lossless, JPEG2000} | HIGH_THROUGHPUT
LOSSLESS_JPEG_2000 = {JPEG2000Lossless, HTJ2KLossless, HTJ2KLosslessRPCL}

LOSSY = {JPEGBaseline8Bit, JPEGExtended12Bit, SPECTRAL, PROGRESSIVE, JPEGLSNearLossless}
MAYBE_LOSSY = {JPEG2000, HTJ2KAny}
"""Either way is allowed; LossyImageCompression then says which it was."""

MANY_FRAGMENTS = {
    **dict.fromkeys(JPEG | JPEG_LS, b"\xff\xd8"),
    **dict.fromkeys(JPEG_2000, b"\xff\x4f\xff\x51"),
}
"""Where a frame may lie in several fragments, and how each frame begins."""

DECODERS: dict[str, Callable[[Frame, Packing, set[str]], Plane]] = {
    **dict.fromkeys(JPEG, _jpeg),
    **dict.fromkeys(JPEG_LS, _jpeg_ls),
    **dict.fromkeys(JPEG_2000, _jpeg_2000),
    RLELossless: _run_lengths,
    DEFLATED_FRAMES: _deflated_frame,
}
