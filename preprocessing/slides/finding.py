"""Slides in any mix of files, DICOM folders and trees; each by one name, and what is no slide with the reason why."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..dicom.headers import DAMAGED, read_header
from .parts import dicom_slides, is_dicom, slide_id
from .source import SlideError

SUFFIXES = (
    *(".svs", ".svslide", ".ndpi", ".mrxs", ".vms", ".vmu", ".scn", ".bif", ".czi"),
    *(".tif", ".tiff", ".btf", ".tf8", ".qptiff"),
)
"""Of files that are taken for slides; whether they can be read shows when they are opened."""

RESULTS = ("report.json", "verdict.json", "package.json")
"""Files by which a folder is known as a result of ours; the pictures in it are no slides."""


@dataclass(frozen=True, kw_only=True)
class SlideFile:
    """Where a slide lies, and its name."""

    path: Path
    """A file, or the folder of a DICOM series."""
    id: str

    @property
    def case_id(self) -> str:
        """As a run over many calls it, and names its folder."""
        return self.id


@dataclass(frozen=True, kw_only=True)
class SlideFinds:
    """What lies in the files and folders that were named."""

    slides: tuple[SlideFile, ...]
    left_alone: dict[str, str]
    """Files that are no slides, and why."""


def find_slides(paths: Sequence[Path], out: Path | None = None) -> SlideFinds:
    """Every slide, by name; refused when there is none, or when two have one name."""
    left_alone: dict[str, str] = {}
    slides: dict[Path, SlideFile] = {}
    for path in paths:
        if not path.exists():
            raise SlideError(
                f"{path} is not there; a slide or a folder of slides is needed. Look at the spelling.", "no_scan"
            )
        files = [path] if path.is_file() else list(_files_in(path, out, left_alone))
        for slide in _slides_among(files, left_alone, alone=path.is_file()):
            slides.setdefault(slide.path.resolve(), slide)
    if not slides:
        reasons = "".join(f"\n  {file}: {reason}" for file, reason in list(left_alone.items())[:5])
        raise SlideError(
            f"no slide was found in {', '.join(map(str, paths))}; files ending in {', '.join(SUFFIXES)}, or DICOM "
            f"slides, are needed. Name the folder that holds them.{reasons}",
            "no_scan",
        )
    found = sorted(slides.values(), key=lambda slide: slide.id)
    for one, other in pairwise(found):
        if one.id == other.id:
            raise SlideError(
                f"{one.path} and {other.path} have one name, {one.id!r}; labels and results go by it, so each slide needs "
                "its own. Rename one, or name only one of them.",
                "contradiction",
            )
    return SlideFinds(slides=tuple(found), left_alone=left_alone)


def _slides_among(files: Sequence[Path], left_alone: dict[str, str], alone: bool) -> Iterator[SlideFile]:
    dicom = [file for file in files if is_dicom(file)]
    series = dicom_slides(dicom)
    others = set(dicom) - {file for one in series for file in one}
    for one in [*series, *_lost(others, {one[0].parent for one in series}, left_alone)]:
        folder = one[0].parent
        whole = not alone and {file for file in files if file.parent == folder} == set(one)
        place = folder if whole else one[0]
        yield SlideFile(path=one[0] if one[0] in others else place, id=slide_id(place))
    known = set(dicom)
    for file in (file for file in files if file not in known):
        if file.suffix.lower() in SUFFIXES:
            yield SlideFile(path=file, id=slide_id(file))
        else:
            left_alone[str(file)] = f"no slide by its name, which ends in {file.suffix or 'nothing'}"


def _lost(others: set[Path], of_slides: set[Path], left_alone: dict[str, str]) -> Iterator[list[Path]]:
    """DICOM of which nobody can say what it was: alone in its folder it counts as a slide, to be refused by name."""
    for file in sorted(others):
        header = read_header(file, ("SOPClassUID",))
        broken = isinstance(header, str) and DAMAGED in header
        if broken and file.parent not in of_slides:
            yield [file]
        else:
            beside = "damaged DICOM; it may have been part of the slide beside it"
            left_alone[str(file)] = beside if broken else "DICOM, but no whole slide"


def _files_in(folder: Path, out: Path | None, left_alone: dict[str, str]) -> Iterator[Path]:
    """Every file below, in order; not the pixels of a MIRAX slide, which belong to the file beside their folder."""
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        left_alone[str(folder)] = f"a folder that cannot be opened ({error.strerror})"
        return
    for path in inside:
        if path.name.startswith(".") or (out is not None and path.resolve() == out.resolve()):
            continue
        if path.is_dir():
            if path.with_suffix(".mrxs") in inside:
                continue
            if any((path / mark).exists() for mark in RESULTS):
                left_alone[str(path)] = "a result of hilum"
            else:
                yield from _files_in(path, out, left_alone)
        elif path.is_file():
            yield path
