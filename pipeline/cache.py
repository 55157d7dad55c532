"""Prepared cases on disk: chunked, compressed, read window by window from a memory map, known by what they are made of.

Blosc2 arrays: in `benchmarks/cache.py` a window of 40 x 56 x 40 takes a third of Zarr 3's processor time or less, from
files no larger. Blosc2 keeps no checksums, so we do: a damaged case is prepared anew and never trained on.
"""

import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import get_ident
from typing import Any, TypeVar
from zipfile import BadZipFile

import blosc2
import numpy as np
from jaxtyping import Float32, Int16, Shaped

from preprocessing.augment import IGNORED
from preprocessing.cores import usable_cores
from preprocessing.datasets import CaseFiles, Dataset, DatasetError
from preprocessing.dicom import is_dicom
from preprocessing.files import EXTENSIONS, sha256
from preprocessing.patches import Places, cut
from preprocessing.plan import Label, Plan
from preprocessing.records import encode
from preprocessing.steps import Trail, prepare
from preprocessing.volume import Case, ScanError

from .errors import CacheError, is_users
from .report import hilum_version
from .scan import beside, ours

logger = logging.getLogger(__name__)

Triple = tuple[int, int, int]
Found = TypeVar("Found")

FORMAT = 2
"""Raised when what lies in a cached case changes its meaning; older cases are then left alone."""


@dataclass(frozen=True, kw_only=True)
class PreparedCase:
    """One case as training sees it, read from the cache window by window."""

    id: str
    folder: Path
    annotated: tuple[bool, ...] = ()
    """For each label of the plan, whether it was looked for in this case."""
    patient: str = ""
    mend: Callable[[], None] | None = field(default=None, compare=False, repr=False)
    """Prepares it anew where its folder is damaged."""

    @property
    def shape(self) -> Triple:
        """Voxels along i, j, k."""
        return self._read(lambda store: store.shape)

    @property
    def channels(self) -> int:
        return self._read(lambda store: store.channels)

    def looked_for(self, label: Label, plan: Plan) -> bool:
        """Whether this label was looked for in this case."""
        return self.annotated[plan.labels.index(label)]

    def window(
        self, start: Sequence[int], size: Sequence[int]
    ) -> tuple[Float32[np.ndarray, "channel a b c"], Int16[np.ndarray, "1 a b c"]]:
        """Image and part numbers there; outside the scan 0 and IGNORED. Only the chunks it touches are read."""
        return self._read(lambda store: store.window(start, size))

    def image(self) -> Float32[np.ndarray, "channel i j k"]:
        return self._read(lambda store: store.image.box((0, 0, 0), store.shape))

    def labels(self) -> Int16[np.ndarray, "1 i j k"]:
        """Part numbers, not the values in the label files; IGNORED where nobody knows."""
        return self._read(lambda store: store.labels.box((0, 0, 0), store.shape))

    def places(self) -> Places:
        return self._read(lambda store: store.places)

    def _read(self, look: Callable[["_Store"], Found]) -> Found:
        try:
            return look(_opened(self.folder))
        except DAMAGE as error:
            if self.mend is None:
                raise CacheError(
                    f"the prepared copy of {self.id} in {self.folder} is damaged ({error}); every byte must be as it was "
                    "written. Start again: it is prepared anew."
                ) from error
            logger.warning("the prepared copy of %s is damaged (%s); it is prepared anew", self.id, error)
        self.mend()
        return look(_opened(self.folder))


# a dataset, case by case


def cached(
    dataset: Dataset, plan: Plan, cache: Path, progress: Callable[[int, int], None] = lambda done, of: None
) -> list[PreparedCase]:
    """Every labelled case of the dataset, in its order, prepared once for every run that shares the cache.

    A case is known by its bytes, the plan and how scans are read, so a dataset that was moved or copied is found again.
    All cases are tried; if any fails, the error names each of them.
    """
    complete = [files for files in dataset.cases if files.images and files.labels]
    failed: dict[str, Exception] = {}
    pool = ThreadPoolExecutor(usable_cores())
    try:
        futures = {pool.submit(_cached_case, dataset, files, plan, cache): files.id for files in complete}
        for done, future in enumerate(as_completed(futures), start=1):
            error = future.exception()
            if isinstance(error, CacheError) or (error and not isinstance(error, Exception)):
                raise error  # a full disk would fail every case that follows
            if isinstance(error, Exception):
                failed[futures[future]] = error
            progress(done, len(complete))
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        raise _refusal(dataset, failed)
    return [future.result() for future in futures]


def _refusal(dataset: Dataset, failed: dict[str, Exception]) -> Exception:
    kind = DatasetError if all(is_users(error) for error in failed.values()) else RuntimeError
    each = " ".join(f"{case}: {error if is_users(error) else ours(error)}" for case, error in sorted(failed.items()))
    return kind(
        f"{len(failed)} case(s) of {dataset.name} cannot be prepared; all must be. {each} "
        "Mend or remove them; what was prepared is kept."
    )


def _cached_case(dataset: Dataset, files: CaseFiles, plan: Plan, cache: Path) -> PreparedCase:
    folder = cache / plan.digest[:16] / _key(dataset, files, plan, cache)
    if _damage(folder):
        _prepare_alone(dataset, files, plan, folder, thorough=False)
    return PreparedCase(
        id=files.id,
        folder=folder,
        annotated=tuple(files.annotated is None or label.name in files.annotated for label in plan.labels),
        patient=files.patient,
        mend=partial(_prepare_alone, dataset, files, plan, folder, thorough=True),
    )


def _prepare_alone(dataset: Dataset, files: CaseFiles, plan: Plan, folder: Path, *, thorough: bool) -> None:
    """Prepared by one process while the others that need it wait; whoever comes second finds it made."""
    with _alone(folder):
        if _damage(folder, thorough=thorough):
            store(folder, *_prepared(dataset, files, plan, folder), plan.patch)


def _prepared(
    dataset: Dataset, files: CaseFiles, plan: Plan, folder: Path
) -> tuple[Shaped[np.ndarray, "channel i j k"], Int16[np.ndarray, "1 i j k"]]:
    case = dataset.read(files)
    assert case.labels is not None
    image, trail = prepare(case.image, plan.steps)
    numbered = truth(case, trail, plan)
    if _key(dataset, files, plan, folder.parent.parent) != folder.name:
        raise ScanError(
            f"{files.id} changed on disk since this run began; its files must stay as they are until it ends. "
            "Bring them back, or begin anew.",
            "contradiction",
        )
    return image.voxels, numbered


def truth(case: Case, trail: Trail, plan: Plan) -> Int16[np.ndarray, "1 i j k"]:
    """Numbers of parts on the prepared grid; IGNORED where nobody knows: under an ignored value, and beyond the scan."""
    assert case.labels is not None
    numbers = plan.numbered(trail.follow(case.labels).voxels)
    scanned = trail.follow(case.labels.with_voxels(np.ones_like(case.labels.voxels))).voxels
    return np.where(scanned == 0, np.int16(IGNORED), numbers)


@contextmanager
def _cache_named(root: Path) -> Iterator[None]:
    """What the system says when a cache cannot be written, in words for whoever must make room."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"the cache {root} cannot be written: {error.strerror or error}. Every case of the dataset needs its place "
            "there. Make room, or give another folder with --cache; what was prepared before is kept."
        ) from error


# by what a case is known


def _key(dataset: Dataset, files: CaseFiles, plan: Plan, cache: Path) -> str:
    """One word for everything that decides a prepared voxel; neither the case's name nor where it lies."""
    assert files.labels is not None
    contents = [_contents(path, cache) for path in (*files.images, files.labels)]
    names = {label.name: label.value for label in dataset.labels}  # DICOM labels are known by name
    said = [FORMAT, hilum_version(), plan.digest, encode(dataset.reading), names, contents]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def _contents(path: Path, cache: Path) -> list[str]:
    """Of a file with the voxels that lie beside it, of a folder with all its files, of a slice with its folder's."""
    if path.is_dir():
        return [_content(_files_in(path), cache)]
    own = _content([path, *beside(path)], cache)
    if path.name.lower().endswith(EXTENSIONS) or not is_dicom(path):
        return [own]
    return [own, _content(_files_in(path.parent), cache)]


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


SETTLED_S = 2.0
"""A file changed less than this ago may change again without another time: the coarsest clocks of file systems."""


def _content(paths: Sequence[Path], cache: Path) -> str:
    """sha256 of files, remembered: those of the same place, size, times and inode are not read again."""
    seen = {path: path.stat() for path in paths}
    stamps = [(str(path.absolute()), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in seen.items()]
    known = cache / "known" / hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    with suppress(OSError):
        content = known.read_text()
        if len(content) == 64:
            return content
    content = hashlib.sha256("".join(sha256([path]) for path in paths).encode()).hexdigest()
    if all(time.time() - max(one.st_mtime, one.st_ctime) > SETTLED_S for one in seen.values()):
        with suppress(OSError):  # then they are read again next time
            known.parent.mkdir(parents=True, exist_ok=True)
            known.write_text(content)
    return content


# one process at a time

PATIENCE_S = 900.0
"""How long another process is waited for; after that the case is prepared twice, and either copy is right."""


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Held by one process or thread for that folder; the system lets go of it when its holder is killed."""
    path = folder.with_name(f".{folder.name}.lock")
    give_up = time.monotonic() + PATIENCE_S
    while True:
        with _cache_named(folder.parent.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            stream = path.open("a")
        with stream:
            held = _held(stream.fileno(), give_up)
            if held and not _is_still(path, stream.fileno()):
                continue  # the one before us has removed it; others hold a new one
            try:
                yield
            finally:
                if held:
                    path.unlink(missing_ok=True)
            return


def _held(stream: int, give_up: float) -> bool:
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= give_up:
                return False
            time.sleep(0.02)
        except OSError:
            return False  # a file system without locks


def _is_still(path: Path, stream: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(stream))
    except FileNotFoundError:
        return False


# a case on disk: image.b2nd, labels.b2nd, places.npz, and case.json with the checksum of every part of them

CHUNK_VOXELS, BLOCK_VOXELS = 2**17, 2**14
"""A chunk is what is checked at once, a block what is unpacked at once: 512 and 64 KiB of float32 stay in a core's cache."""


def store(
    folder: Path, image: Shaped[np.ndarray, "channel i j k"], numbered: Int16[np.ndarray, "1 i j k"], patch: Triple
) -> None:
    """A whole case at that place, or nothing: made aside, then moved there in one stroke."""
    # the places depend on the labels alone, so that it does not matter who prepared them under which name
    numbered = np.ascontiguousarray(numbered)
    places = Places.of(numbered, np.random.default_rng(zlib.crc32(numbered.data)))
    with _cache_named(folder.parent.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{folder.name}-*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
            made = Path(aside) / "made"
            made.mkdir()
            said = {
                "image": _write_array(made / "image.b2nd", np.ascontiguousarray(image, dtype=np.float32), patch),
                "labels": _write_array(made / "labels.b2nd", numbered, patch),
                "places": _write_places(made / "places.npz", places),
            }
            words = json.dumps(said).encode()
            (made / "case.json").write_bytes(words + b"\n%08x\n" % zlib.crc32(words))
            _put(made, folder, Path(aside) / "before")


def _put(made: Path, folder: Path, before: Path) -> None:
    """In one stroke; what lay there stays readable for who has it open."""
    with suppress(FileNotFoundError):
        folder.rename(before)
    try:
        made.rename(folder)
    except OSError:
        if _damage(folder):  # else another process was faster, and made the same
            raise


def _write_array(path: Path, voxels: Shaped[np.ndarray, "channel i j k"], patch: Triple) -> dict[str, Any]:
    chunk = _sides(voxels.shape[1:], patch, CHUNK_VOXELS)
    block = _sides(chunk, patch, BLOCK_VOXELS)
    array = blosc2.asarray(
        voxels,
        chunks=(len(voxels), *chunk),
        blocks=(1, *block),
        cparams=blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=1, filters=[blosc2.Filter.SHUFFLE], nthreads=1),
    )
    frame = array.to_cframe()
    # README_CFRAME_FORMAT of C-Blosc2: a header, whose length and that of the chunks stand in it, the chunks, a trailer
    (head,), (packed,) = struct.unpack_from(">i", frame, 11), struct.unpack_from(">q", frame, 39)
    path.write_bytes(frame)  # by our own hand: a full disk is told as such
    chunks = blosc2.schunk_from_cframe(frame)  # as they will be read: a chunk of one value is no chunk in the frame
    return {
        "shape": list(voxels.shape),
        "size": len(frame),
        "frame": [head, head + packed, zlib.crc32(frame[head + packed :], zlib.crc32(frame[:head]))],
        "chunks": [zlib.crc32(chunks.get_chunk(n)) for n in range(chunks.nchunks)],
    }


def _sides(shape: Sequence[int], patch: Sequence[int], voxels: int) -> Triple:
    """The shape in equal parts of at most so many voxels, with the patch's proportions as far as halving goes."""
    sides = np.array(patch)
    while sides.prod() > voxels:
        longest = np.argmax(np.where(sides > 1, sides / np.array(patch), 0))
        sides[longest] = -(-sides[longest] // 2)
    i, j, k = (-(-side // -(-side // int(part))) for side, part in zip(shape, sides, strict=True))
    return i, j, k


def _write_places(path: Path, places: Places) -> dict[str, Any]:
    stream = io.BytesIO()
    np.savez(stream, **vars(places))
    path.write_bytes(stream.getvalue())
    return {"size": stream.tell(), "crc": zlib.crc32(stream.getvalue())}


class _Damaged(Exception):
    """Something in a cached case is not what was written."""


DAMAGE = (_Damaged, OSError, RuntimeError, ValueError, KeyError, BadZipFile)
"""What a damaged or missing file makes of those who read it."""


def _damage(folder: Path, *, thorough: bool = False) -> str:
    """What is wrong with a cached case: nothing, as far as sizes tell; thorough: as far as any byte tells."""
    try:
        said = _said(folder)
        for name, part in (("image.b2nd", "image"), ("labels.b2nd", "labels"), ("places.npz", "places")):
            if (size := (folder / name).stat().st_size) != said[part]["size"]:
                raise _Damaged(f"{name} has {size} bytes and not {said[part]['size']}")
        if thorough:
            whole = _Store(folder)
            whole.image.box((0, 0, 0), whole.shape)
            whole.labels.box((0, 0, 0), whole.shape)
    except DAMAGE as error:
        return str(error) or type(error).__name__
    return ""


def _said(folder: Path) -> dict[str, Any]:
    words, _, check = (folder / "case.json").read_bytes().partition(b"\n")
    if check != b"%08x\n" % zlib.crc32(words):
        raise _Damaged("case.json is not what was written")
    said: dict[str, Any] = json.loads(words)
    return said


def _opened(folder: Path) -> "_Store":
    """Opened once; again where the folder was replaced, and for each thread: Blosc2 arrays are not shared by threads."""
    seen = folder.stat()
    return _kept_open(folder, (seen.st_ino, seen.st_mtime_ns), get_ident())


@lru_cache(maxsize=64)  # each keeps two files open, and many systems allow a process 1024
def _kept_open(folder: Path, stamp: tuple[int, int], thread: int) -> "_Store":
    return _Store(folder)


class _Store:
    """One cached case, opened. Nothing is given out whose checksum is wrong."""

    def __init__(self, folder: Path):
        said = _said(folder)
        self.channels, *shape = said["image"]["shape"]
        self.shape: Triple = (shape[0], shape[1], shape[2])
        self.image = _Array(folder / "image.b2nd", said["image"])
        self.labels = _Array(folder / "labels.b2nd", said["labels"])
        self.places = _read_places(folder / "places.npz", said["places"])

    def window(self, start: Sequence[int], size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        low = [min(max(0, begin), side) for begin, side in zip(start, self.shape, strict=True)]
        high = [
            max(least, min(side, begin + wide))
            for least, begin, wide, side in zip(low, start, size, self.shape, strict=True)
        ]
        inside = [begin - least for begin, least in zip(start, low, strict=True)]
        image, labels = self.image.box(low, high), self.labels.box(low, high)
        return cut(image, inside, size, outside=0), cut(labels, inside, size, outside=IGNORED)


class _Array:
    """One array under a memory map. The parts that say how to read it are checked first, a chunk when it is first read."""

    def __init__(self, path: Path, said: dict[str, Any]):
        self.name, self.sums = path.name, said["chunks"]
        self.right: set[int] = set()
        head, tail, whole = said["frame"]
        with path.open("rb") as stream:
            first = zlib.crc32(stream.read(head))
            stream.seek(tail)
            if zlib.crc32(stream.read(), first) != whole:
                raise _Damaged(f"{path.name} is not what was written")
        # one thread: threads of Blosc2 do not outlive a fork, and a loader's process would wait for them for ever
        self.array = blosc2.open(str(path), mode="r", mmap_mode="r", dparams=blosc2.DParams(nthreads=1))

    def box(self, low: Sequence[int], high: Sequence[int]) -> np.ndarray:
        """All channels of that box, low included, high excluded."""
        for number in self._touched(low, high):
            if number not in self.right:
                if zlib.crc32(self.array.schunk.get_chunk(number)) != self.sums[number]:
                    raise _Damaged(f"chunk {number} of {self.name} is not what was written")
                self.right.add(number)
        if any(least >= most for least, most in zip(low, high, strict=True)):
            sides = [max(0, most - least) for least, most in zip(low, high, strict=True)]
            return np.empty((self.array.shape[0], *sides), self.array.dtype)
        box: np.ndarray = self.array[(slice(None), *map(slice, low, high))]
        return box

    def _touched(self, low: Sequence[int], high: Sequence[int]) -> Iterator[int]:
        _, *shape = self.array.shape
        _, *chunk = self.array.chunks
        counts = [-(-side // part) for side, part in zip(shape, chunk, strict=True)]
        spans = [range(a // part, -(-b // part)) for a, b, part in zip(low, high, chunk, strict=True)]
        for i, j, k in product(*spans):
            yield (i * counts[1] + j) * counts[2] + k


def _read_places(path: Path, said: dict[str, Any]) -> Places:
    content = path.read_bytes()
    if zlib.crc32(content) != said["crc"]:
        raise _Damaged(f"{path.name} is not what was written")
    with np.load(io.BytesIO(content)) as kept:
        return Places(**{name: kept[name] for name in kept.files})
