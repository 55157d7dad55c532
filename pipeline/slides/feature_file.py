"""The features of one slide in one file: HDF5 with the names that CLAM and TRIDENT gave, and everything needed to trust it.

    features       float16  [tile feature]   one piece, uncompressed: mapped into memory, never copied
    coords         int64    [tile 2]         x, y of a tile's top left corner in pixels of level 0
    positions_um   float64  [tile 2]         the same in micrometres, not rounded: what hilum itself goes by
    grid           int64    [tile 2]         column, row in the lattice of tiles
    tissue         float32  [tile]           share of the tile that is tissue
    quarantined_um float64  [tile 2]         where tiles lay that could not be used; quarantined_why: of which kind each is

Facts are attributes of the file. The same slide, recipe and version of hilum give the same bytes.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int64

from preprocessing.records import BadRecord, decode

from ..report import UnreadableReport, hilum_version

if TYPE_CHECKING:
    import h5py

FILE_NAME = "features.h5"
"""In the folder of its slide."""

FORMAT = "hilum slide features 1"
"""Raised when a reader of yesterday would misread the file of today."""

DAMAGED, NOT_FINITE = "damaged", "not_finite"
WHY = {
    DAMAGED: "the slide's file is corrupt there",
    NOT_FINITE: "its features are NaN, infinite or beyond half precision",
}
"""Why a tile is left out; the file keeps the place of the word in this table, so new ones come last."""


class UnreadableFeatures(UnreadableReport):
    """A file holds no features of a slide, or not all of them."""


@dataclass(frozen=True, kw_only=True)
class FeatureRecipe:
    """How tiles were cut and what was made of them: features of two recipes never meet in one model."""

    tile_um: float
    """Side of a tile in micrometres; also after training, whatever the slide's own resolution."""
    tile_px: int
    """Side of the picture that the encoder was shown."""
    step_um: float
    """From one tile to the next; less than tile_um: they overlap."""
    least_tissue: float
    """Tiles with less tissue than this share were not looked at."""
    encoder: str
    """Its name, as --encoder takes it."""
    encoder_sha256: str
    """Of its weights and of how pictures are brought to it."""
    dimensions: int
    """Numbers per tile."""

    def difference(self, other: "FeatureRecipe") -> str:
        """'tile_um 112.0 and 224.0', of every field in which the two differ; empty where they are one recipe."""
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(f"{name} {mine[name]} and {theirs[name]}" for name in mine if mine[name] != theirs[name])


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureFile:
    """One slide as features of its tiles. The features themselves stay on the disk until `features` maps them."""

    path: Path
    slide_id: str
    slide_sha256: str
    slide_microns_per_pixel: tuple[float, float]
    """x, y of level 0."""
    resolution_from: str
    """Who said so: 'file' or 'stated'."""
    size_um: tuple[float, float]
    """Width, height of the whole slide."""
    recipe: FeatureRecipe
    positions_um: Float[np.ndarray, "tile 2"]
    """x, y of each tile's top left corner."""
    grid: Int64[np.ndarray, "tile 2"]
    """Column, row."""
    tissue: Float[np.ndarray, " tile"]
    quarantined: dict[str, int] = field(default_factory=dict)
    """How many tiles were left out, by the words of WHY."""
    features_sha256: str
    """Of features and positions: by it a data set's digest knows what was trained on."""
    hilum_version: str

    def __len__(self) -> int:
        return len(self.positions_um)

    @classmethod
    def read(cls, path: Path) -> "FeatureFile":
        """The file, or the one in this slide's folder; refused where it is damaged, foreign or of another version."""
        path = path / FILE_NAME if path.is_dir() else path
        with _opened(path) as file:
            found = cls(path=path, **_facts(path, file), **_arrays(path, file))
            if file["features"].shape != (len(found), found.recipe.dimensions):
                raise _unreadable(path, f"its features have the shape {file['features'].shape}")
        return found

    def features(self) -> Float[np.ndarray, "tile feature"]:
        """Mapped, not read: pages come from the disk when they are touched.

        The map is private: torch, which wants to be allowed to write, takes it as it is, and the file never changes.
        """
        with _opened(self.path) as file:
            stored = file["features"]
            offset, shape = stored.id.get_offset(), stored.shape
        return np.memmap(self.path, dtype="<f2", mode="c", offset=offset, shape=shape)


def write(
    path: Path,
    *,
    slide_id: str,
    slide_sha256: str,
    slide_microns_per_pixel: tuple[float, float],
    resolution_from: str,
    size_um: tuple[float, float],
    recipe: FeatureRecipe,
    features: Float[np.ndarray, "tile feature"],
    positions_um: Float[np.ndarray, "tile 2"],
    grid: Int64[np.ndarray, "tile 2"],
    tissue: Float[np.ndarray, " tile"],
    quarantined: Sequence[tuple[str, float, float]] = (),
    origin_px: tuple[int, int] = (0, 0),
) -> FeatureFile:
    """The file, whole or not at all. `quarantined` tells of each tile that was left out why, and its x and y; `origin_px`
    is where the slide's corner lies on a canvas that is larger than what was scanned."""
    arrays = {
        "features": np.ascontiguousarray(features, dtype="<f2"),
        "coords": np.rint(positions_um / np.array(slide_microns_per_pixel)).astype("<i8") + np.array(origin_px),
        "positions_um": positions_um.astype("<f8"),
        "grid": grid.astype("<i8"),
        "tissue": tissue.astype("<f4"),
        "quarantined_um": np.array([place for _, *place in quarantined], dtype="<f8").reshape(-1, 2),
        "quarantined_why": np.array([list(WHY).index(why) for why, *_ in quarantined], dtype="u1"),
    }
    digest = hashlib.sha256()
    for name in ("features", "positions_um"):
        digest.update(arrays[name].data)
    facts = {
        "format": FORMAT,
        "slide_id": slide_id.encode("utf-8", "backslashreplace").decode(),  # a file's name may be no Unicode
        "slide_sha256": slide_sha256,
        "slide_microns_per_pixel": list(slide_microns_per_pixel),
        "resolution_from": resolution_from,
        "size_um": list(size_um),
        "recipe": json.dumps(asdict(recipe)),
        "features_sha256": digest.hexdigest(),
        "hilum_version": hilum_version(),
    }
    _write_whole(path, facts, arrays, _as_clam_tells(recipe, slide_microns_per_pixel))
    return FeatureFile.read(path)


def files_in(folder: Path) -> tuple[Path, ...]:
    """Every file of features that `hilum slides features` left there, by the names of the slides' folders."""
    return tuple(sorted(folder.glob(f"[!.]*/{FILE_NAME}")))


def _write_whole(
    path: Path, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray], of_coords: Mapping[str, Any]
) -> None:
    import h5py

    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with h5py.File(part, "w", track_order=True) as file:  # attributes in our order; no times are kept
            file.attrs.update(facts)
            for name, values in arrays.items():
                file.create_dataset(name, data=values)
            file["coords"].attrs.update(of_coords)
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _as_clam_tells(recipe: FeatureRecipe, microns_per_pixel: tuple[float, float]) -> dict[str, int]:
    """The attributes of `coords` by which tools that know pixels alone draw a tile."""
    return {
        "patch_size": recipe.tile_px,
        "patch_size_level0": round(recipe.tile_um / microns_per_pixel[0]),
        "patch_level": 0,
    }


@contextmanager
def _opened(path: Path) -> "Iterator[h5py.File]":
    import h5py

    try:
        with h5py.File(path, "r") as file:
            yield file
    except FileNotFoundError:
        raise _unreadable(path, "it is not there") from None
    except PermissionError:
        raise
    except (OSError, KeyError) as error:  # h5py says OSError of what is no HDF5 or stops too early
        raise _unreadable(path, str(error).strip("'\"")) from error


def _facts(path: Path, file: "h5py.File") -> dict[str, Any]:
    """What the attributes say, each of the type it must have."""
    if file.attrs.get("format") != FORMAT:
        raise _unreadable(path, f"it calls itself {file.attrs.get('format', 'nothing')!r}, not {FORMAT!r}")
    words = ("slide_id", "slide_sha256", "resolution_from", "features_sha256", "hilum_version")
    try:
        recipe = decode(FeatureRecipe, json.loads(file.attrs["recipe"]), where="recipe")
        return {name: str(file.attrs[name]) for name in words} | {
            "slide_microns_per_pixel": _pair(file.attrs["slide_microns_per_pixel"]),
            "size_um": _pair(file.attrs["size_um"]),
            "recipe": recipe,
        }
    except (KeyError, TypeError, ValueError, BadRecord) as mistake:
        raise _unreadable(path, str(mistake)) from mistake


def _pair(values: Any) -> tuple[float, float]:
    x, y = (float(value) for value in values)
    return x, y


def _arrays(path: Path, file: "h5py.File") -> dict[str, Any]:
    found = {name: file[name][()] for name in ("positions_um", "grid", "tissue")}
    tiles = len(found["tissue"])
    if not tiles or found["positions_um"].shape != (tiles, 2) or found["grid"].shape != (tiles, 2):
        raise _unreadable(path, "its arrays do not fit each other")
    why = Counter(file["quarantined_why"][()].tolist())
    return found | {"quarantined": {word: why[number] for number, word in enumerate(WHY) if why[number]}}


def _unreadable(path: Path, met: str) -> UnreadableFeatures:
    return UnreadableFeatures(
        f"{path} is no file of features that can be used: {met}. One that `hilum slides features` of this version wrote is "
        "needed. Delete it and run that command again."
    )
