"""What is said of a scan before anyone trusts it: fine, repaired or refused, why, and what it is."""

from dataclasses import dataclass, replace

from .volume import REASONS, Geometry, ScanError, Volume

WORDS = ("fine", "repaired", "refused")


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """One of three words for one scan, with everything a person needs to agree or to mend it."""

    word: str
    """One of WORDS."""
    reason: str = ""
    """Why it is refused: one of the keys of volume.REASONS."""
    message: str = ""
    """The same for a person: what was met, what was needed, what to do."""
    repairs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    modality: str = ""
    encoding: str = ""
    channels: tuple[str, ...] = ()
    geometry: Geometry | None = None
    """None where it could not be read so far."""
    sources: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.word in WORDS and (self.reason in REASONS or self.word != "refused"), (self.word, self.reason)

    @classmethod
    def of(cls, volume: Volume) -> "Verdict":
        """What is said of a scan that was read: fine, or repaired."""
        was = volume.provenance
        return cls(
            word=was.verdict, repairs=was.repairs, notes=was.notes, modality=was.modality, encoding=was.encoding,
            channels=volume.channels, geometry=volume.geometry, sources=was.sources, files=was.files,
        )  # fmt: skip

    def refused(self, message: str, reason: str) -> "Verdict":
        """The same scan, refused: what was seen of it stays."""
        return replace(self, word="refused", message=message, reason=reason)

    @property
    def what(self) -> str:
        """What it is, in one line: modality, channels, grid, encoding; of a scan that was not read, what is known."""
        return self._said(self.encoding)

    @property
    def brief(self) -> str:
        """The same with the encoding in a word or two."""
        packings = dict.fromkeys(_in_brief(one) for one in self.encoding.split("; "))
        return self._said("; ".join(filter(None, packings)))

    def _said(self, encoding: str) -> str:
        said = [self.modality]
        if self.geometry is None:
            said.append(f"{len(self.files)} file{'' if len(self.files) == 1 else 's'}" if self.files else "")
        else:
            said += [f"{len(self.channels)} channels" if len(self.channels) > 1 else "", str(self.geometry)]
        return ", ".join(part for part in (*said, encoding) if part)


BRIEFLY = {
    "Implicit VR": "implicit VR", "Explicit VR Little": "explicit VR", "Explicit VR Big": "explicit VR, big-endian",
    "Deflated Explicit VR": "deflated", "Encapsulated Uncompressed": "uncompressed",
    "JPEG Lossless": "JPEG lossless", "JPEG-LS Lossless": "JPEG-LS", "JPEG-LS Lossy": "JPEG-LS, lossy",
    "JPEG 2000": "JPEG 2000", "High-Throughput JPEG 2000": "HTJ2K", "JPEG ": "JPEG, lossy", "RLE": "RLE",
    "NIfTI": "NIfTI", "NRRD": "NRRD", "MetaImage": "MetaImage",
}  # fmt: skip
"""How the names of encodings begin, and what people call them: the standard has long ones for its transfer syntaxes."""


def _in_brief(encoding: str) -> str:
    """'JPEG lossless' for 'JPEG Lossless, Non-Hierarchical, First-Order Prediction (Process 14 [Selection Value 1]), 12 of
    16 bits, signed'; another encoding as it is."""
    return next((word for start, word in BRIEFLY.items() if encoding.startswith(start)), encoding)


def reason_of(error: Exception) -> str:
    """The word from REASONS that fits an error best."""
    if isinstance(error, ScanError):
        return error.reason
    if isinstance(error, MemoryError):
        return "too_large"
    return "damaged" if isinstance(error, OSError) else "unsupported"
