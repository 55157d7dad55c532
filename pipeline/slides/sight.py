"""A slide as answers are drawn on it: the whole of it in one picture, its frame, and what must be minded."""

import numpy as np
from jaxtyping import UInt8

from preprocessing.slides import Slide, SlideError

from . import zoom
from .encoders import BUILT_IN
from .feature_file import FeatureFile, FeatureRecipe
from .package import SlidePackage
from .result import Frame, Origin

BLOCK_PX = 512
"""Side of the parts that a slide's overview is read in: a damaged place costs no more of it."""
UNREADABLE = 200
"""Grey of such a part: neither tissue nor glass."""


def frame_of(slide: Slide, file: FeatureFile) -> Frame:
    """The slide itself."""
    return Frame(
        slide_id=file.slide_id, size_um=slide.size_um, size_px=slide.size_px, microns_per_pixel=slide.microns_per_pixel,
        resolution_from=slide.resolution_from, sha256=file.slide_sha256,
    )  # fmt: skip


def origin_of(package: SlidePackage) -> Origin:
    """What made the answer."""
    record = package.record
    return Origin(
        package_name=record.name,
        package_id=record.id,
        network=record.network,
        members=len(record.members),
        temperature=record.temperature,
        encoder=record.recipe.encoder,
        encoder_sha256=record.recipe.encoder_sha256,
        tile_px=record.recipe.tile_px,
        scores={name: estimate.said for name, estimate in record.scores.macros.items()},
    )


def overview_of(slide: Slide, recipe: FeatureRecipe) -> tuple[UInt8[np.ndarray, "h w 3"], int]:
    """The whole slide, edge to edge, and how many of its parts could not be read."""
    size = zoom.overview_size(slide.size_um, recipe.tile_um / recipe.tile_px)
    whole = np.full((size[1], size[0], 3), UNREADABLE, np.uint8)
    across, down = (extent / pixels for extent, pixels in zip(slide.size_um, size, strict=True))
    blank = 0
    for top in range(0, size[1], BLOCK_PX):
        for left in range(0, size[0], BLOCK_PX):
            part = whole[top : top + BLOCK_PX, left : left + BLOCK_PX]
            height, width = part.shape[:2]
            try:
                part[:] = slide.region(left * across, top * down, width * across, height * down, (width, height))
            except SlideError:
                blank += 1
    return whole, blank


def warnings_of(slide: Slide, file: FeatureFile, blank: int) -> tuple[str, ...]:
    """What is to be minded of the slide and its features, `blank` parts of the overview being unreadable."""
    said = list(slide.notes)
    if file.recipe.encoder == BUILT_IN:
        said.append(
            f"{BUILT_IN} knows colours and textures, not tissue: a package on its features is only for trying out"
        )
    if file.quarantined:
        gone = sum(file.quarantined.values())
        said.append(f"{gone} of {len(file) + gone} tiles could not be used")
    if blank:
        said.append(
            f"{blank} part{'s' * (blank > 1)} of the overview could not be read and {'are' if blank > 1 else 'is'} grey"
        )
    return tuple(said)
