"""One case on disk: where it lies, the hash by which it is known again, and how it becomes a Volume."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from preprocessing import dicom, files
from preprocessing.reading import STRICT, Reading
from preprocessing.verdict import Verdict, reason_of
from preprocessing.volume import UnreadableScan, Volume, stack

from .errors import is_users


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Where one case lies: a file or series folder of all channels, or one per channel in the wanted order."""

    case_id: str
    paths: tuple[Path, ...]
    series: tuple[dicom.Series | None, ...] = ()
    """The DICOM series behind the paths, where they are DICOM."""
    refusal: str = ""
    """Why it cannot be read, where that was seen while looking for it: a damaged slice may be a missing slice."""

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Every file the case is read from."""
        if self.series:
            return tuple(file for one in self.series if one for file in one.paths)
        return tuple(file for path in self.paths for file in (path, *beside(path)))

    @property
    def parts(self) -> tuple[str, ...]:
        """What tells this case from others that lie in the very same files: an echo, a b-value, a moment."""
        return tuple(one.part for one in self.series if one and one.part)

    @property
    def modality(self) -> str:
        """CT, MR ..., as far as it was said without reading a voxel."""
        return "+".join(dict.fromkeys(one.modality for one in self.series if one and one.modality))

    @cached_property
    def identity(self) -> str:
        """One hash over the bytes of everything the case is read from, whatever the order the files were found in."""
        whole = files.sha256(sorted(self.files))
        return sha256(" ".join((whole, *self.parts)).encode()).hexdigest() if self.parts else whole


VOXELS_OF = {".hdr": (".img", ".img.gz"), ".hdr.gz": (".img.gz", ".img")}
"""Headers whose voxels lie in a file of the same name."""


def beside(header: Path) -> tuple[Path, ...]:
    """The files that hold a header's voxels; they are part of what is read."""
    name = header.name.lower()
    ending = next((ending for ending in VOXELS_OF if name.endswith(ending)), "")
    if not ending and not name.endswith((".mhd", ".nhdr")):
        return ()
    try:
        around = sorted(file for file in header.parent.iterdir() if file != header and file.is_file())
        if ending:
            wanted = [name.removesuffix(ending) + other for other in VOXELS_OF[ending]]
            return tuple(file for file in around if file.name.lower() in wanted)
        said = header.read_bytes()[:65536].decode("latin-1")
        return tuple(file for file in around if file.name in said)
    except OSError:
        return ()  # told when the case is read


def read_scan(scan: Scan, channels: Sequence[str] = (), reading: Reading = STRICT) -> Volume:
    """The scan on one grid, with these channels where any are named."""
    if scan.refusal:
        raise UnreadableScan(scan.refusal, reason="damaged")
    pieces = zip(scan.paths, scan.series or (None,) * len(scan.paths), strict=True)
    volumes = [dicom.read(series, reading) if series else files.read(path, reading) for path, series in pieces]
    if len(volumes) > 1:
        return stack(volumes, tuple(channels), reading.match)
    return volumes[0].with_channels(channels) if channels else volumes[0]


def verdict_on(scan: Scan, volume: Volume) -> Verdict:
    """What is said of a scan that was read. Copies of a slice that were not taken are its files, too."""
    return replace(Verdict.of(volume), files=tuple(map(str, scan.files)))


def refusal(scan: Scan, error: Exception) -> Verdict:
    """What is said of a scan that raised that; a fault of ours is told as ours."""
    message = str(error) if is_users(error) else ours(error)
    seen = Verdict(word="fine", modality=scan.modality, files=tuple(map(str, scan.files)))
    return seen.refused(message, reason_of(error))


def ours(error: Exception) -> str:
    """What a person is told when it was not their scan."""
    return f"hilum itself failed on this scan ({type(error).__name__}: {error}). Report it with this file."
