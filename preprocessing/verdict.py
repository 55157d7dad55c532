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
        said = [self.modality]
        if self.geometry is None:
            said.append(f"{len(self.files)} file{'' if len(self.files) == 1 else 's'}" if self.files else "")
        else:
            said += [f"{len(self.channels)} channels" if len(self.channels) > 1 else "", str(self.geometry)]
        return ", ".join(part for part in (*said, self.encoding) if part)


def reason_of(error: Exception) -> str:
    """The word from REASONS that fits an error best."""
    if isinstance(error, ScanError):
        return error.reason
    if isinstance(error, MemoryError):
        return "too_large"
    return "damaged" if isinstance(error, OSError) else "unsupported"
