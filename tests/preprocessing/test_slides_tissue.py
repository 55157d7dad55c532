"""Tissue is found where the phantom has it, whatever lies on the glass beside it; tiles lie on it in micrometres."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from preprocessing.slide_phantoms import PhantomSlide, Section, slide, write
from preprocessing.slides import Slide, SlideError, TileShape, Tissue, find_tissue, lay_tiles, open_slide
from preprocessing.slides.source import Layout, Patch, Source
from preprocessing.slides.tissue import tissue_in
from tests.preprocessing.slide_files import broken_blocks

QUIET = settings(derandomize=True, max_examples=30, deadline=None, database=None)
SIZE = (2400.0, 1800.0)  # many tiles, and lumens narrower than one
UM = 8.0


@pytest.fixture(scope="module")
def phantom() -> PhantomSlide:
    return slide(4, size_um=SIZE, lesions=1)


@pytest.fixture(scope="module")
def picture(phantom: PhantomSlide) -> np.ndarray:
    """As seen at 8 um, with the noise of a camera."""
    fine = phantom.region(0.0, 0.0, *SIZE, (1200, 900)).reshape(225, 4, 300, 4, 3).mean((1, 3))
    return np.clip(fine + np.random.default_rng(0).normal(0, 2.5, fine.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def truth(phantom: PhantomSlide) -> np.ndarray:
    """Where the phantom has tissue."""
    assert isinstance(phantom.subject, Section)
    return phantom.subject.depth_um(np.arange(UM / 2, SIZE[0], UM), np.arange(UM / 2, SIZE[1], UM)) > 0


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def test_tissue_is_found_where_it_is(picture: np.ndarray, truth: np.ndarray) -> None:
    assert overlap(tissue_in(picture, UM), truth) > 0.97


@pytest.mark.parametrize("glass", [(255, 255, 255), (243, 242, 245), (236, 228, 208), (205, 206, 212)])
def test_the_colour_of_the_glass_does_not_matter(
    picture: np.ndarray, truth: np.ndarray, glass: tuple[int, ...]
) -> None:
    light = picture.astype(float) / np.array([244, 243, 246]) * np.array(glass)
    assert overlap(tissue_in(np.clip(light, 0, 255).astype(np.uint8), UM), truth) > 0.96


@pytest.mark.parametrize("strength", [0.35, 0.6, 1.6])
def test_pale_and_dark_stains_are_tissue(picture: np.ndarray, truth: np.ndarray, strength: float) -> None:
    light = 245 * (picture.astype(float) / 245) ** strength
    assert overlap(tissue_in(np.clip(light, 0, 255).astype(np.uint8), UM), truth) > 0.94


INKS = {
    "blue": (30, 60, 190),
    "light blue": (120, 160, 215),
    "green": (40, 140, 80),
    "black": (25, 26, 31),
    "grey": (130, 128, 126),
    "red": (195, 25, 45),
}


@pytest.mark.parametrize("ink", INKS)
def test_a_pen_mark_is_no_tissue(picture: np.ndarray, truth: np.ndarray, ink: str) -> None:
    canvas = Image.fromarray(picture)
    stroke = [(8, 8), (60, 20), (290, 6), (292, 210), (150, 218)]
    ImageDraw.Draw(canvas).line(stroke, fill=INKS[ink], width=7)
    marked = Image.new("L", canvas.size)
    ImageDraw.Draw(marked).line(stroke, fill=255, width=7)
    under = np.asarray(marked) > 0
    found = tissue_in(np.asarray(canvas), UM)
    assert (found & under & ~truth).sum() < 0.02 * (under & ~truth).sum()
    assert overlap(found & ~under, truth & ~under) > 0.94


def test_the_dark_edge_of_a_holder_is_no_tissue(picture: np.ndarray, truth: np.ndarray) -> None:
    framed = picture.copy()
    framed[:, :12] = np.linspace([5, 6, 8], [240, 240, 242], 12)
    framed[-10:] = (52, 50, 49)
    beside = np.ones(truth.shape, bool)
    beside[:, :12] = beside[-10:] = False
    found = tissue_in(framed, UM)
    assert not (found & ~beside & ~truth).any() and overlap(found & beside, truth & beside) > 0.97


@pytest.mark.parametrize("light", [(255, 255, 255), (243, 242, 245), (240, 232, 210), (150, 150, 152), (4, 5, 5)])
def test_an_empty_slide_has_no_tissue(light: tuple[int, ...]) -> None:
    noise = np.random.default_rng(1).normal(0, 2.5, (225, 300, 3))
    shade = np.linspace(0.93, 1.0, 300)[None, :, None]
    assert not tissue_in(np.clip(np.array(light) * shade + noise, 0, 255).astype(np.uint8), UM).any()


def test_a_slide_full_of_tissue_is_tissue_all_over(phantom: PhantomSlide) -> None:
    lesion = phantom.lesions[0]
    side = lesion.radius_um
    inside = phantom.region(lesion.x_um - side / 2, lesion.y_um - side / 2, side, side, (64, 64))
    assert tissue_in(inside, side / 64).all()


def test_dust_is_left_out_and_a_lumen_belongs_to_its_tissue(picture: np.ndarray, truth: np.ndarray) -> None:
    dusty = picture.copy()
    dusty[5:8, 5:9] = dusty[210:215, 280:283] = (200, 90, 160)
    middle = tuple(np.argwhere(truth).mean(0).astype(int))
    dusty[middle[0] : middle[0] + 8, middle[1] : middle[1] + 9] = (244, 243, 246)
    found = tissue_in(dusty, UM)
    assert not found[:12, :12].any() and not found[205:220, 275:290].any()
    assert found[middle[0] : middle[0] + 8, middle[1] : middle[1] + 9].all()


@pytest.mark.parametrize("microns", [0.25, 0.5, 1.0])
def test_the_same_tissue_and_the_same_tiles_are_found_at_every_resolution(tmp_path: Path, microns: float) -> None:
    fine = slide(5, size_um=(900.0, 700.0), microns_per_pixel=microns)
    with open_slide(write(fine, tmp_path / "one.tiff")) as opened:
        tissue = find_tissue(opened)
        tiles = lay_tiles(opened, tissue, TileShape())
    assert isinstance(fine.subject, Section)
    truth = fine.subject.depth_um(np.arange(113) * 8 + 4.0, np.arange(88) * 8 + 4.0) > 0
    assert tissue.microns_per_pixel == 8 and overlap(tissue.mask, truth) > 0.95
    padded = np.pad(truth, ((0, 98 - 88), (0, 126 - 113)))  # whole tiles of 14 pixels, each 8 um
    shares = padded.reshape(7, 14, 9, 14).mean((1, 3))
    laid = np.zeros((7, 9), bool)
    laid[tiles.grid[:, 1], tiles.grid[:, 0]] = True
    assert laid[shares > 0.55].all() and not laid[shares < 0.45].any() and laid.sum() == 24


def test_a_slide_of_nothing_is_refused(tmp_path: Path) -> None:
    empty = slide(5, size_um=(600.0, 400.0))
    empty.__dict__["pixels"] = np.full((800, 1200, 3), 243, np.uint8)
    with (
        open_slide(write(empty, tmp_path / "empty.tiff")) as opened,
        pytest.raises(SlideError, match="no tissue") as refusal,
    ):
        find_tissue(opened)
    assert refusal.value.reason == "no_tissue"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(slide(5, size_um=(1300.0, 900.0)), tmp_path_factory.mktemp("written") / "whole.tiff")


def test_where_the_overview_is_damaged_finer_levels_are_looked_at(written: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(written, tmp_path))
    with open_slide(path) as opened:
        whole = find_tissue(opened).mask
        coarse = [level.microns_per_pixel[0] for level in opened.levels].index(8)
    broken_blocks(path, [0], "zeros", page=coarse)
    with open_slide(path) as opened:
        assert overlap(find_tissue(opened).mask, whole) > 0.99


def test_what_cannot_be_seen_counts_as_tissue_and_is_met_by_the_tiles(written: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(written, tmp_path))
    for page in range(5):
        broken_blocks(path, [0], "zeros", page=page)
    with open_slide(path) as opened:
        tissue = find_tissue(opened)
        assert tissue.mask[:16, :16].all()
        with pytest.raises(SlideError) as refusal:
            opened.region(0.0, 0.0, 112.0, 112.0, (224, 224))
    assert refusal.value.reason == "damaged"


def test_a_slide_of_which_nothing_can_be_seen_is_refused(shared: Path) -> None:
    with (
        open_slide(shared / "data" / "zoo" / "wsi_openslide_tiny" / "unreadable.svs") as opened,
        pytest.raises(SlideError, match="Bogus marker") as refusal,
    ):
        find_tissue(opened)
    assert refusal.value.reason == "damaged"


masks = st.integers(0, 10_000).map(lambda seed: np.random.default_rng(seed).random((17, 23)) < 0.4)


@QUIET
@given(mask=masks, x=st.floats(-60, 200), y=st.floats(-60, 160), width=st.floats(1, 150), height=st.floats(1, 150))
def test_a_share_is_the_area_of_tissue_in_a_field_over_that_of_the_field(mask, x, y, width, height) -> None:
    """Against each pixel's own overlap with the field."""
    tissue = Tissue(mask=mask, microns_per_pixel=8.0)
    across, down = (
        np.maximum(np.minimum(start + side, (np.arange(n) + 1) * 8) - np.maximum(start, np.arange(n) * 8.0), 0)
        for start, side, n in ((x, width, 23), (y, height, 17))
    )
    expected = float(down @ mask @ across) / (width * height)
    assert tissue.share(x, y, width, height) == pytest.approx(expected, abs=1e-9)


@QUIET
@given(
    size=st.floats(20, 400),
    overlap_share=st.floats(0.3, 2),
    least=st.floats(0, 1),
    width=st.floats(30, 3000),
    height=st.floats(30, 900),
)
def test_tiles_lie_on_a_lattice_from_the_corner_and_each_has_its_tissue(
    size, overlap_share, least, width, height
) -> None:
    shape = TileShape(size_um=size, size_px=64, step_um=size * overlap_share, least_tissue=least)
    mask = np.random.default_rng(int(size)).random((int(height // 8) + 1, int(width // 8) + 1)) < 0.6
    tissue = Tissue(mask=mask, microns_per_pixel=8.0)
    opened = _sized((width, height), 0.2)
    try:
        tiles = lay_tiles(opened, tissue, shape)
    except SlideError as error:
        assert error.reason == "no_tissue" and least > 0
        return
    assert len(tiles) == len(tiles.positions_um) == len(tiles.tissue) > 0
    np.testing.assert_allclose(tiles.positions_um, tiles.grid * shape.step)
    assert (tiles.positions_um >= 0).all() and (tiles.positions_um < opened.size_um).all()
    assert (tiles.tissue >= np.float32(least) - 1e-6).all()
    assert len({tuple(place) for place in tiles.grid.tolist()}) == len(tiles)
    first = tuple(tiles.positions_um[0].tolist())
    assert tiles.tissue[0] == pytest.approx(tissue.share(*first, size, size), abs=1e-6)


class _Blank(Source):
    """A file of a size, with nothing to be read in it."""

    def __init__(self, size_um: tuple[float, float], microns: float) -> None:
        width, height = (max(1, round(side / microns)) for side in size_um)
        self.path = Path("blank.tiff")
        self.layout = Layout(
            sizes=((width, height),),
            factors=((1.0, 1.0),),
            field_px=(0, 0, width, height),
            said=(microns, microns),
            said_where="says",
            reader="none",
        )

    def read(self, level: int, left: int, top: int, width: int, height: int) -> Patch:
        raise AssertionError("where tiles lie is known without a pixel")

    def close(self) -> None:
        pass


def _sized(size_um: tuple[float, float], microns: float) -> Slide:
    return Slide(Path("blank.tiff"), _Blank(size_um, microns), microns)


@pytest.mark.parametrize("microns, fits", [(0.5, True), (1.2, True), (1.3, False), (124.0, False)])
def test_a_slide_too_coarse_for_its_tiles_is_refused(microns: float, fits: bool) -> None:
    opened = _sized((4000.0, 4000.0), microns)
    tissue = Tissue(mask=np.ones((500, 500), bool), microns_per_pixel=8.0)
    if fits:
        assert len(lay_tiles(opened, tissue, TileShape())) == 36 * 36
    else:
        with pytest.raises(SlideError, match="Choose tiles of") as refusal:
            lay_tiles(opened, tissue, TileShape())
        assert refusal.value.reason == "resolution"


@pytest.mark.parametrize(
    "field, value",
    [("size_um", 0.0), ("size_um", float("nan")), ("size_px", 0), ("step_um", 0.0), ("step_um", float("inf")), ("least_tissue", 1.1)],
)  # fmt: skip
def test_a_tile_of_no_shape_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        TileShape(**{field: value})
