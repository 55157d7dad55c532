"""A phantom slide's answer is known: its lesions lie where it says, at every resolution, in every file."""

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from preprocessing.slide_phantoms import HEMATOXYLIN, PhantomSlide, Section, ruler, slide, write

SIZE = (900.0, 700.0)


@pytest.fixture(scope="module")
def sick() -> PhantomSlide:
    return slide(3, size_um=SIZE, lesions=2)


@pytest.fixture(scope="module")
def healthy() -> PhantomSlide:
    return slide(3, size_um=SIZE)


def distances(phantom: PhantomSlide) -> np.ndarray:
    """From each pixel to the nearest lesion's rim; negative inside."""
    width, height = phantom.size_px
    x, y = (np.arange(width) + 0.5) * 0.5, (np.arange(height)[:, None] + 0.5) * 0.5
    return np.minimum.reduce([np.hypot(x - one.x_um, y - one.y_um) - one.radius_um for one in phantom.lesions])


def hematoxylin(pixels: np.ndarray) -> np.ndarray:
    """How much of it there is: red light is taken by it alone, or nearly."""
    return -np.log10((pixels[..., 0].astype(float) + 1) / 245) / HEMATOXYLIN[0]


def test_the_same_seed_gives_the_same_slide_and_another_one_another(sick: PhantomSlide) -> None:
    again, other = slide(3, size_um=SIZE, lesions=2), slide(4, size_um=SIZE, lesions=2)
    assert again.pixels.tobytes() == sick.pixels.tobytes() and again.lesions == sick.lesions
    assert other.lesions != sick.lesions and other.pixels.tobytes() != sick.pixels.tobytes()
    assert (sick.label, slide(3, size_um=SIZE).label, sick.id) == ("lesion", "healthy", "phantom_003")


def test_a_healthy_slide_is_the_same_section_but_for_the_lesions(sick: PhantomSlide, healthy: PhantomSlide) -> None:
    differs = (sick.pixels != healthy.pixels).any(2)
    away = distances(sick)
    assert not differs[away > 15].any() and differs[away < 0].mean() > 0.9
    assert not healthy.lesions


@pytest.mark.parametrize("seed", range(8))
def test_lesions_lie_apart_and_inside_the_tissue(seed: int) -> None:
    phantom = slide(seed, size_um=SIZE, lesions=2)
    assert isinstance(phantom.subject, Section) and len(phantom.lesions) == 2
    for number, one in enumerate(phantom.lesions):
        assert phantom.subject.depth_um(np.array([one.x_um]), np.array([one.y_um]))[0, 0] > one.radius_um
        assert one.x_um - one.radius_um > 0 and one.x_um + one.radius_um < SIZE[0]
        for other in phantom.lesions[:number]:
            assert np.hypot(one.x_um - other.x_um, one.y_um - other.y_um) > one.radius_um + other.radius_um


@pytest.mark.parametrize("seed", range(4))
def test_a_lesion_is_crowded_with_nuclei_and_differs_in_grain_as_much_as_in_colour(seed: int) -> None:
    phantom = slide(seed, size_um=SIZE, lesions=1)
    stain, away = hematoxylin(phantom.pixels), distances(phantom)
    tissue = phantom.pixels.min(2) < 215
    inside, outside = stain[away < -5], stain[(away > 20) & tissue]
    assert (inside > 0.5).mean() > 3 * (outside > 0.5).mean()
    assert inside.mean() > 1.5 * outside.mean() and inside.std() > 1.3 * outside.std()


def test_the_mean_colour_of_a_slide_does_not_tell_a_lesion(sick: PhantomSlide, healthy: PhantomSlide) -> None:
    """Slides differ in stain by more than what a lesion changes."""
    means = [slide(seed, size_um=SIZE, microns_per_pixel=4.0).pixels.mean() for seed in range(8)]
    assert np.ptp(means) > abs(healthy.pixels.mean() - sick.pixels.mean())


def test_a_phantom_shows_the_same_at_every_resolution(sick: PhantomSlide) -> None:
    fine = slide(3, size_um=SIZE, lesions=2, microns_per_pixel=0.25)
    assert fine.lesions == sick.lesions and fine.size_px == (3600, 2800)
    halved = fine.region(100.0, 200.0, 300.0, 250.0, (1200, 1000)).reshape(500, 2, 600, 2, 3).mean((1, 3))
    part = sick.pixels[400:900, 200:800]
    assert np.abs(halved - part).mean() < 2
    np.testing.assert_array_equal(sick.region(100.0, 200.0, 300.0, 250.0, (600, 500)), part)


@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
@pytest.mark.parametrize("ending", [".tiff", ".ome.tiff"])
def test_what_is_written_is_read_by_openslide_and_tifffile(
    sick: PhantomSlide, tmp_path: Path, ending: str, compression: str
) -> None:
    path = write(sick, tmp_path / f"slide{ending}", compression=compression)
    most = 0 if compression == "deflate" else 3
    with tifffile.TiffFile(path) as file:
        assert file.is_ome == (ending == ".ome.tiff") and len(file.series) == 1
        assert [level.shape[:2] for level in file.series[0].levels] == [
            (1400, 1800),
            (700, 900),
            (350, 450),
            (175, 225),
        ]
        assert np.abs(file.asarray(level=0).astype(int) - sick.pixels).mean() <= most
    with openslide.OpenSlide(path) as opened:
        assert opened.dimensions == (1800, 1400)
        seen = np.asarray(opened.read_region((300, 200), 0, (500, 400)).convert("RGB")).astype(int)
        assert np.abs(seen - sick.pixels[200:600, 300:800]).mean() <= most
        if ending == ".tiff":
            assert opened.level_count == 4
            assert float(opened.properties["openslide.mpp-x"]) == pytest.approx(0.5)


@pytest.mark.parametrize("microns", [(0.25, 0.25), (0.2527, 0.2527), (0.3, 0.41)])
def test_a_ruler_s_lines_hold_exactly_the_ink_they_should(microns: tuple[float, float]) -> None:
    """10 um in every 100: over whole hundreds the mean light is that of a tenth ink, however the pixels cut the lines."""
    drawn = ruler(microns_per_pixel=microns)
    for count in (37, 120, 400):
        field = drawn.region(0.0, 0.0, 300.0, 200.0, (3 * count, 2 * count)).astype(float)
        ground, ink = field[..., 1].max(), field[..., 1].min()
        covered = (ground - field[..., 1].mean()) / (ground - ink)
        assert covered == pytest.approx(1 - 0.9 * 0.9, abs=0.004)
    assert drawn.pixels.shape == (int(900 / microns[1]), int(1200 / microns[0]), 3)
