"""A field of a slide is the same field whatever the file, the level, the resolution or the reader; or it is refused."""

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pydicom
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing.slide_phantoms import PhantomSlide, ruler, slide, write
from preprocessing.slides import (
    Slide,
    SlideError,
    TileShape,
    find_slides,
    find_tissue,
    lay_tiles,
    open_slide,
    parts,
    stated_resolutions,
)
from preprocessing.slides.scaling import resample
from preprocessing.slides.source import whole_factor
from preprocessing.slides.tiffs import TiffSource
from preprocessing.slides.vendors import VendorSource
from preprocessing.volume import REASONS
from tests.preprocessing.slide_files import aperio, broken_blocks, dicom, halved, leica

QUIET = settings(derandomize=True, max_examples=40, deadline=None, database=None)


@pytest.fixture(scope="module")
def phantom() -> PhantomSlide:
    return slide(1, size_um=(800.0, 600.0), lesions=1)


@pytest.fixture(scope="module")
def pyramid(phantom: PhantomSlide, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(phantom, tmp_path_factory.mktemp("slides") / "pyramid.tiff")


@pytest.fixture(scope="module")
def rulers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rulers")
    drawn = {
        "0.25": ruler(microns_per_pixel=0.25, size_um=(640.0, 420.0)),
        "0.2527": ruler(microns_per_pixel=0.2527, size_um=(640.0, 420.0)),
        "0.5": ruler(microns_per_pixel=0.5, size_um=(640.0, 420.0)),
        "uneven": ruler(microns_per_pixel=(0.25, 0.27), size_um=(640.0, 420.0)),
    }
    plain = {name: write(one, folder / f"{name}.tiff", compression="deflate") for name, one in drawn.items()}
    ome = {f"{name} ome": write(one, folder / f"{name}.ome.tiff", compression="deflate") for name, one in drawn.items()}
    vendors = {
        "uneven dicom": dicom(folder / "dicom", drawn["uneven"]),
        "0.5 aperio": aperio(folder / "a.svs", drawn["0.5"]),
    }
    return plain | ome | vendors


def lines_um(profile: np.ndarray, start_um: float, step_um: float) -> list[float]:
    """Where dark lines lie on a profile, by the centre of gravity of each; those at an end are left out."""
    dark = profile.max() - profile.astype(float)
    dark[dark < 0.02 * dark.max()] = 0
    places = start_um + (np.arange(len(profile)) + 0.5) * step_um
    pieces = np.split(np.arange(len(profile)), np.flatnonzero(np.diff((dark > 0).astype(int))) + 1)
    inside = [piece for piece in pieces if dark[piece[0]] > 0 and piece[0] > 0 and piece[-1] < len(profile) - 1]
    return [float((dark[piece] * places[piece]).sum() / dark[piece].sum()) for piece in inside]


@pytest.mark.parametrize("name", ["0.25", "0.2527", "0.5", "uneven", "0.25 ome", "0.2527 ome", "0.5 ome", "uneven ome"])
@pytest.mark.parametrize("step, part", [(0.3, 30), (0.5, 30), (0.7, 30), (1.0, 30), (2.1, 30), (4.0, 10)])
def test_a_ruler_lies_where_it_lies_at_every_resolution_to_a_fraction_of_a_pixel(
    rulers: dict[str, Path], name: str, step: float, part: int
) -> None:
    """Against lines drawn exactly on the pixels asked for: their centres of gravity, on pixels that cut them, waver
    too, and most where a line of 10 um is but two pixels wide."""
    exact = ruler(size_um=(640.0, 420.0))
    with open_slide(rulers[name]) as opened:
        for x, y in ((0.0, 0.0), (33.3, 17.77), (131.0, 60.13)):
            size = int(320 / step), int(320 / step)
            field = (x, y, size[0] * step, size[1] * step, size)
            found, drawn = opened.region(*field)[..., 1], exact.region(*field)[..., 1]
            row, column = int((160 - y % 100) / step), int((160 - x % 100) / step)
            coarse = max(step, *opened.microns_per_pixel)
            for profile, reference, start in ((found[row], drawn[row], x), (found[:, column], drawn[:, column], y)):
                ours, theirs = (np.array(lines_um(one, start, step)) for one in (profile, reference))
                assert len(ours) == len(theirs) >= 2
                assert np.abs(ours - theirs).max() < coarse / part
                assert np.abs(theirs - np.round(theirs / 100) * 100).max() < step / 15


@pytest.mark.parametrize("name", ["uneven dicom", "0.5 aperio", "0.2527"])
@pytest.mark.parametrize("step", [0.5, 0.83, 1.0, 2.1])
def test_no_other_place_looks_more_like_a_field_than_its_own(rulers: dict[str, Path], name: str, step: float) -> None:
    """What JPEG adds hides where single lines lie; a quarter of a pixel beside its place, the whole field fits less well."""
    exact = ruler(size_um=(640.0, 420.0))
    size = int(300 / step), int(250 / step)
    with open_slide(rulers[name]) as opened:
        found = opened.region(53.3, 61.7, size[0] * step, size[1] * step, size).astype(float)
    shift = max(step, 0.5) / 4

    def misfit(right: float, down: float) -> float:
        drawn = exact.region(53.3 + right * shift, 61.7 + down * shift, size[0] * step, size[1] * step, size)
        return float(((found - drawn) ** 2).mean())

    assert misfit(0, 0) < min(misfit(1, 0), misfit(-1, 0), misfit(0, 1), misfit(0, -1))


def test_one_tile_of_a_slide_at_a_quarter_and_at_half_a_micron_shows_the_same_field(rulers: dict[str, Path]) -> None:
    tiles = []
    for name in ("0.25", "0.5", "0.2527", "uneven", "0.25 ome", "uneven dicom", "0.5 aperio"):
        with open_slide(rulers[name]) as opened:
            tiles.append(opened.region(150.0, 150.0, 112.0, 112.0, (224, 224)).astype(int))
    for other in tiles[1:]:
        assert np.abs(other - tiles[0]).mean() < 1


@pytest.mark.parametrize("step", [0.5, 0.73, 1.0, 3.2])
def test_openslide_and_tifffile_show_the_same(rulers: dict[str, Path], pyramid: Path, step: float) -> None:
    for path, most in ((rulers["0.5"], 0), (rulers["0.2527"], 1), (pyramid, 1)):
        with Slide(path, VendorSource(path)) as slow, Slide(path, TiffSource(path)) as quick:
            for x, y in ((0.0, 0.0), (101.0, 33.21), (-20.0, 250.0)):
                one, other = (opened.region(x, y, 150 * step, 90 * step, (150, 90)) for opened in (slow, quick))
                assert np.abs(one.astype(int) - other.astype(int)).mean() <= most / 4
            assert slow.microns_per_pixel == pytest.approx(quick.microns_per_pixel)
            assert slow.levels[-1].size_px == quick.levels[-1].size_px


def test_pixels_at_their_own_resolution_are_those_openslide_reads(pyramid: Path) -> None:
    reference = openslide.OpenSlide(pyramid)
    with open_slide(pyramid) as opened:
        found = opened.region(50.0, 75.0, 100.0, 64.0, (200, 128))
    expected = np.asarray(reference.read_region((100, 150), 0, (200, 128)).convert("RGB"))
    assert np.abs(found.astype(int) - expected).max() <= 2


def test_the_coarsest_level_that_is_fine_enough_is_read(pyramid: Path) -> None:
    """The levels above it are destroyed, and the field is still there."""
    with open_slide(pyramid) as opened:
        assert [level.microns_per_pixel[0] for level in opened.levels] == [0.5, 1.0, 2.0, 4.0]
        whole = opened.overview(2.0)
    broken = Path(shutil.copy(pyramid, pyramid.with_name("coarse.tiff")))
    for page in (0, 1, 3):
        with tifffile.TiffFile(broken) as file:
            blocks = range(len(file.pages[page].dataoffsets))
        broken_blocks(broken, blocks, "zeros", page)
    with open_slide(broken) as opened:
        np.testing.assert_allclose(opened.overview(2.0), whole, atol=1)
        with pytest.raises(SlideError):
            opened.overview(1.0)


@pytest.mark.parametrize("name", ["blocks.tiff", "blocks.ome.tiff"])
def test_only_the_blocks_a_field_touches_are_decoded(phantom: PhantomSlide, tmp_path: Path, name: str) -> None:
    path = write(phantom, tmp_path / name)
    with open_slide(path) as opened:
        whole = opened.region(130.0, 130.0, 120.0, 120.0, (240, 240))
    with tifffile.TiffFile(path) as file:
        across = -(-file.pages[0].imagewidth // 256)
        blocks = [n for n in range(len(file.pages[0].dataoffsets)) if n != across + 1]
    with open_slide(broken_blocks(path, blocks, "zeros")) as opened:
        np.testing.assert_allclose(opened.region(130.0, 130.0, 120.0, 120.0, (240, 240)), whole, atol=1)
        with pytest.raises(SlideError, match=r"block|level") as refusal:
            opened.region(120.0, 130.0, 120.0, 120.0, (240, 240))
    assert refusal.value.reason == "damaged"


def test_beyond_the_edge_a_slide_is_white(pyramid: Path) -> None:
    with open_slide(pyramid) as opened:
        assert (opened.region(-500.0, 0.0, 400.0, 400.0, (40, 40)) == 255).all()
        half = opened.region(-50.0, 200.0, 100.0, 100.0, (200, 200))
        assert (half[:, :100] == 255).all()
        np.testing.assert_array_equal(half[:, 100:], opened.region(0.0, 200.0, 50.0, 100.0, (100, 200)))
        assert (opened.overview(7.0)[-1, -1] > 230).all()
        assert opened.overview(7.0).shape == (86, 115, 3)


def test_a_field_too_large_to_be_held_is_read_in_parts_and_is_the_same(
    pyramid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_slide(pyramid) as opened:
        whole = opened.region(3.3, 4.4, 700.0, 500.0, (311, 223))
        monkeypatch.setattr("preprocessing.slides.slide.PIXELS_AT_ONCE", 5_000)
        parts = opened.region(3.3, 4.4, 700.0, 500.0, (311, 223))
    np.testing.assert_allclose(parts.astype(int), whole, atol=1)


def test_threads_read_what_one_reads_alone(phantom: PhantomSlide, tmp_path: Path) -> None:
    path = broken_blocks(write(phantom, tmp_path / "one.tiff"), [3, 9], "zeros")
    places = [(float(x), float(y)) for x in range(0, 720, 45) for y in range(0, 520, 45)]
    for source in (VendorSource, TiffSource):
        with Slide(path, source(path)) as opened:

            def look(place: tuple[float, float], opened: Slide = opened) -> bytes | str:
                try:
                    return opened.region(*place, 56.0, 56.0, (112, 112)).tobytes()
                except SlideError as error:
                    return error.reason

            alone = [look(place) for place in places]
            with ThreadPoolExecutor(8) as pool:
                together = list(pool.map(look, places))
        assert together == alone
        assert 4 < alone.count("damaged") < len(places) / 2


@pytest.mark.parametrize("how", ["zeros", "noise", "half"])
@pytest.mark.parametrize("kind", ["tiff", "svs", "ome.tiff", "scn"])
def test_a_damaged_block_is_refused_and_every_other_place_can_still_be_read(
    phantom: PhantomSlide, tmp_path: Path, kind: str, how: str
) -> None:
    path = tmp_path / f"slide.{kind}"
    {"svs": aperio, "scn": lambda *args: leica(*args, (0.0, 0.0))}.get(
        kind, lambda path, phantom: write(phantom, path)
    )(path, phantom)
    with open_slide(path) as opened:
        good = opened.region(300.0, 300.0, 112.0, 112.0, (224, 224))
    with open_slide(broken_blocks(path, [0], how)) as opened:
        for _ in range(2):
            with pytest.raises(SlideError, match=r"Copy the slide again") as refusal:
                opened.region(0.0, 0.0, 112.0, 112.0, (224, 224))
            assert refusal.value.reason == "damaged"
            np.testing.assert_array_equal(opened.region(300.0, 300.0, 112.0, 112.0, (224, 224)), good)


@pytest.mark.parametrize("name", ["cut.tiff", "cut.ome.tiff", "cut.svs", "cut.scn"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.99])
def test_a_file_cut_short_is_refused_or_read_as_far_as_it_goes(
    phantom: PhantomSlide, tmp_path: Path, name: str, share: float
) -> None:
    path = tmp_path / name
    writers = {".svs": aperio, ".scn": lambda path, phantom: leica(path, phantom, (0.0, 0.0))}
    writers.get(path.suffix, lambda path, phantom: write(phantom, path))(path, phantom)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    reasons = []
    try:
        with open_slide(path) as opened:
            for x in range(0, 780, 112):
                for y in range(0, 580, 112):
                    try:
                        opened.region(float(x), float(y), 112.0, 112.0, (112, 112))
                    except SlideError as error:
                        reasons.append(error.reason)
            opened.overview(4.0)
    except SlideError as error:
        reasons.append(error.reason)
    assert (set(reasons) <= {"damaged", "resolution", "encoding"} and reasons) or share == 0.99


@pytest.mark.parametrize("name", ["giant.tiff", "giant.svs"])
def test_blocks_larger_than_any_machine_are_damage_and_do_not_end_the_process(
    phantom: PhantomSlide, tmp_path: Path, name: str
) -> None:
    path = (aperio if name.endswith(".svs") else lambda path, phantom: write(phantom, path))(tmp_path / name, phantom)
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags["TileLength"].overwrite(1_946_157_312)
    error = refusal(path)
    assert error.reason == "damaged" and "blocks of 256 × 1946157312" in str(error)


def test_the_same_of_dicom(shared: Path, tmp_path: Path) -> None:
    slide = pydicom.dcmread(shared / "data" / "zoo" / "wsi_dicom_panimg" / "full_no_bot" / "full_no_bot.dcm")
    slide.Rows = slide.Columns = 65535
    slide.save_as(tmp_path / "giant.dcm")
    assert "blocks of 65535 × 65535" in str(refusal(tmp_path / "giant.dcm", 0.5))


def test_a_slide_of_metres_has_another_resolution(pyramid: Path) -> None:
    assert refusal(pyramid, 500.0).reason == "resolution"
    assert "0.8 × 0.6 m" in str(refusal(pyramid, 500.0))


@pytest.mark.parametrize("seed", range(4))
def test_changed_bytes_are_refused_or_read_and_nothing_else(tmp_path: Path, seed: int) -> None:
    """A few bytes of a directory of images, or of what it points to, are something else."""
    small, folder = slide(1, size_um=(300.0, 200.0)), tmp_path
    kinds = [write(small, folder / "a.tiff"), write(small, folder / "b.ome.tiff"), aperio(folder / "c.svs", small)]
    rng = np.random.default_rng(seed)
    for number in range(24):
        kind = kinds[number % len(kinds)]
        content = bytearray(kind.read_bytes())
        with tifffile.TiffFile(kind) as file:
            directories = [page.offset for page in file.pages]
        for _ in range(rng.integers(1, 6)):
            place = (
                rng.choice(directories) + rng.integers(0, 260) if rng.random() < 0.7 else rng.integers(0, len(content))
            )
            content[min(place, len(content) - 1)] = rng.integers(0, 256)
        (folder / f"changed{''.join(kind.suffixes)}").write_bytes(content)
        assert outcome(folder / f"changed{''.join(kind.suffixes)}") in {"read", *REASONS}


@QUIET
@given(
    length=st.integers(3, 40),
    start=st.floats(0, 2),
    step=st.floats(0.2, 6),
    seed=st.integers(0, 99),
)
def test_every_new_pixel_is_the_mean_of_the_field_it_covers(length: int, start: float, step: float, seed: int) -> None:
    """Against the mean of a thousand points within each new pixel, of the pixels as they are or of a line through them."""
    count = int((length - 1 - start) / step)
    if count < 1:
        return
    row = np.random.default_rng(seed).integers(0, 256, length).astype(np.uint8)
    picture = np.repeat(np.repeat(row[None, :, None], 5, axis=0), 3, axis=2)
    found = resample(picture, (start, 0.0), (step, 1.0), (count, 5))[2, :, 1]
    points = start + step * (np.arange(count)[:, None] + (np.arange(1000) + 0.5) / 1000)
    if step >= 1:
        expected = row[np.clip(np.floor(points), 0, length - 1).astype(int)].mean(1)
    else:
        padded = np.concatenate([[0], row, [0]])
        expected = np.interp(points.mean(1), np.arange(-1, length + 1) + 0.5, padded)
    assert np.abs(found - expected).max() <= 0.5 + 255 * 2e-3


@QUIET
@given(width=st.integers(1, 30), height=st.integers(1, 30), level=st.integers(0, 255), parts=st.integers(1, 7))
def test_what_is_of_one_colour_stays_so_and_the_whole_keeps_its_mean(
    width: int, height: int, level: int, parts: int
) -> None:
    even = np.full((height, width, 3), level, np.uint8)
    assert (resample(even, (0, 0), (width / parts, height), (parts, 1)) == level).all() or width < parts
    noisy = np.random.default_rng(level).integers(0, 256, (height, width, 3)).astype(np.uint8)
    assert np.abs(resample(noisy, (0, 0), (width, height), (1, 1))[0, 0] - noisy.mean((0, 1))).max() <= 0.51


@pytest.mark.parametrize(
    "full, reduced, factor",
    [
        ((1000, 800), (500, 400), (2.0, 2.0)),
        ((1003, 807), (250, 201), (4.0, 4.0)),
        ((250, 300), (63, 75), (4.0, 4.0)),
        ((46000, 32914), (11500, 8228), (4.0, 4.0)),
        ((1000, 800), (300, 240), (1000 / 300, 800 / 240)),
        ((1000, 1000), (500, 250), (2.0, 4.0)),
        ((16, 16), (1, 1), (16.0, 16.0)),
    ],
)
def test_a_level_s_factor_is_the_whole_number_that_explains_both_sides(full, reduced, factor) -> None:
    assert whole_factor(full, reduced) == pytest.approx(factor)


def refusal(path: Path, stated: float | None = None) -> SlideError:
    with pytest.raises(SlideError) as caught:
        open_slide(path, stated)
    return caught.value


THREE_WAYS = r"(?s)--microns_per_pixel.*--resolutions.*resolution tag"


@pytest.mark.parametrize("name", ["silent.tiff", "silent.ome.tiff"])
def test_a_slide_without_resolution_is_refused_with_the_three_ways_to_give_it(
    phantom: PhantomSlide, tmp_path: Path, name: str
) -> None:
    path = write(phantom, tmp_path / name, with_resolution=False)
    error = refusal(path)
    assert error.reason == "resolution" and "says nothing of its resolution" in str(error)
    assert re.search(THREE_WAYS, str(error))
    with open_slide(path, 0.5) as opened:
        assert opened.microns_per_pixel == (0.5, 0.5) and opened.resolution_from == "stated" and not opened.notes


def test_a_magnification_is_no_resolution(phantom: PhantomSlide, tmp_path: Path) -> None:
    assert "objective of 20x, which is no resolution" in str(
        refusal(aperio(tmp_path / "a.svs", phantom, says_resolution=False))
    )


@pytest.mark.parametrize(
    "dots, words",
    [(72, "72 dots per inch"), (96, "96 dots per inch"), (300, "300 dots per inch"), (205, "an overview")],
)
def test_a_resolution_nobody_measured_is_not_believed(tmp_path: Path, dots: int, words: str) -> None:
    path = tmp_path / "picture.tif"
    picture = np.full((300, 300, 3), 200, np.uint8)
    tifffile.imwrite(
        path, picture, tile=(256, 256), photometric="rgb", metadata=None, resolution=(dots, dots), resolutionunit="INCH"
    )
    error = refusal(path)
    assert error.reason == "resolution" and words in str(error)
    with open_slide(path, 0.5) as opened:
        assert opened.size_um == (150.0, 150.0)


@pytest.mark.parametrize("stated", [0.0, -0.5, float("nan"), float("inf")])
def test_a_stated_resolution_must_be_one(pyramid: Path, stated: float) -> None:
    assert refusal(pyramid, stated).reason == "resolution"


def test_what_is_stated_is_taken_and_said_where_the_file_says_otherwise(pyramid: Path) -> None:
    with open_slide(pyramid, 0.25) as opened:
        assert opened.size_um == (400.0, 300.0)
        assert opened.notes == ("0.25 um/px was stated and taken; the file says 0.5 um/px.",)
    with open_slide(pyramid, 0.503) as opened:
        assert not opened.notes
    with open_slide(pyramid) as opened:
        assert opened.resolution_from == "file" and not opened.notes


def test_a_table_gives_resolutions_by_slide(tmp_path: Path) -> None:
    table = tmp_path / "resolutions.csv"
    table.write_text(
        "slide,microns_per_pixel,comment\na,0.25,\nb b,0.5,old scanner\na,0.25,again\n", encoding="utf-8-sig"
    )
    assert stated_resolutions(table) == {"a": 0.25, "b b": 0.5}


@pytest.mark.parametrize(
    "text",
    ["", "slide,mpp\na,0.25\n", "slide,microns_per_pixel\na,fast\n", "slide,microns_per_pixel\na,0.25\na,0.5\n",
     "slide,microns_per_pixel\na,-1\n", "slide,microns_per_pixel\na\n"],
)  # fmt: skip
def test_a_table_that_does_not_say_is_refused(tmp_path: Path, text: str) -> None:
    table = tmp_path / "resolutions.csv"
    table.write_text(text)
    with pytest.raises(SlideError):
        stated_resolutions(table)
    with pytest.raises(SlideError):
        stated_resolutions(tmp_path / "nowhere.csv")


def test_an_aperio_slide_is_read_at_its_own_resolution(phantom: PhantomSlide, tmp_path: Path) -> None:
    with open_slide(aperio(tmp_path / "a.svs", phantom)) as opened:
        assert opened.microns_per_pixel == (0.5, 0.5) and len(opened.levels) == 3 and "aperio" in opened.reader
        seen = opened.region(100.0, 100.0, 400.0, 300.0, (400, 300))
    assert np.abs(seen.astype(int) - phantom.region(100.0, 100.0, 400.0, 300.0, (400, 300))).mean() < 4


def test_a_slide_begins_where_its_scan_does_and_not_where_its_canvas_does(
    phantom: PhantomSlide, tmp_path: Path
) -> None:
    path = leica(tmp_path / "l.scn", phantom, offset_um=(300.0, 200.0))
    canvas = openslide.OpenSlide(path)
    assert canvas.dimensions[0] > 2 * phantom.size_px[0]
    with open_slide(path) as opened:
        assert opened.size_um == pytest.approx(phantom.size_um) and opened.origin_px == (600, 400)
        whole = opened.overview(4.0)
        tile = opened.region(112.0, 224.0, 112.0, 112.0, (224, 224))
        assert opened.level0_px(np.array([[112.0, 224.0]])).tolist() == [[600 + 224, 400 + 448]]
    assert np.abs(whole.astype(int) - phantom.region(0.0, 0.0, 800.0, 600.0, (200, 150))).mean() < 8
    there = canvas.read_region((600 + 224, 400 + 448), 0, (224, 224)).convert("RGB")
    np.testing.assert_allclose(tile.astype(int), np.asarray(there), atol=2)


def planes_one_by_one(path: Path, pixels: np.ndarray) -> None:
    """As bfconvert and libvips write colours: a page for each."""
    how = {"tile": (128, 128), "compression": "deflate", "photometric": "minisblack"}
    with tifffile.TiffWriter(path, ome=True) as file:
        about = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        levels = [np.ascontiguousarray(level.transpose(2, 0, 1)) for level in halved(pixels, 2)]
        file.write(levels[0], subifds=2, metadata=about, **how)
        for level in levels[1:]:
            file.write(level, subfiletype=1, **how)


def planes_in_one_page(path: Path, pixels: np.ndarray) -> None:
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    how = {"photometric": "rgb", "planarconfig": "separate", "tile": (128, 128), "compression": "lzw"}
    tifffile.imwrite(path, planes, resolution=(20_000, 20_000), resolutionunit="CENTIMETER", metadata=None, **how)


def strips(path: Path, pixels: np.ndarray) -> None:
    how = {"photometric": "rgb", "rowsperstrip": 17, "compression": "deflate"}
    tifffile.imwrite(path, pixels, resolution=(50_800, 50_800), resolutionunit="INCH", metadata=None, **how)


def colours_together(path: Path, pixels: np.ndarray) -> None:
    about = {
        "axes": "YXS",
        "PhysicalSizeX": 500,
        "PhysicalSizeY": 500,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeYUnit": "nm",
    }
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(
            np.full((64, 64, 3), 9, np.uint8), photometric="rgb", metadata={"axes": "YXS"}
        )  # a label comes first
        file.write(pixels, photometric="rgb", tile=(256, 256), compression="deflate", metadata=about)


@pytest.mark.parametrize(
    "name, how",
    [
        ("planes.ome.tif", planes_one_by_one),
        ("separate.tif", planes_in_one_page),
        ("strips.tif", strips),
        ("together.ome.tiff", colours_together),
    ],
)
def test_tiffs_of_other_programs_are_read_as_tifffile_reads_them_whole(
    phantom: PhantomSlide, tmp_path: Path, name, how
) -> None:
    pixels = phantom.pixels
    how(tmp_path / name, pixels)
    with open_slide(tmp_path / name) as opened:
        assert opened.microns_per_pixel == pytest.approx((0.5, 0.5)) and opened.size_px == phantom.size_px
        found = opened.region(101.0, 60.5, 200.0, 150.0, (400, 300))
        if len(opened.levels) > 1:
            np.testing.assert_array_equal(opened.overview(2.0), halved(pixels, 2)[2])
    np.testing.assert_array_equal(found, pixels[121:421, 202:602])


@pytest.mark.parametrize(
    "pixels, reason",
    [
        (np.zeros((300, 300), np.uint8), "encoding"),
        (np.zeros((300, 300, 3), np.uint16), "encoding"),
        (np.zeros((4, 300, 300), np.uint8), "encoding"),
    ],
)
def test_what_is_no_8_bit_colour_is_refused(tmp_path: Path, pixels: np.ndarray, reason: str) -> None:
    path = tmp_path / "other.ome.tif"
    tifffile.imwrite(path, pixels, ome=True, metadata={"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5})
    assert refusal(path).reason == reason


def test_a_slide_is_known_by_its_bytes(pyramid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def known(path: Path) -> str:
        with open_slide(path) as opened:
            return opened.identity

    copy = Path(shutil.copy(pyramid, tmp_path / "other name.tiff"))
    whole = known(pyramid)
    assert known(copy) == whole and len(whole) == 64
    with copy.open("r+b") as stream:
        stream.seek(-5, 2)
        stream.write(b"\x07")
    assert known(copy) != whole
    monkeypatch.setattr(parts, "WHOLE_BYTES", 1)
    monkeypatch.setattr(parts, "SAMPLE_BYTES", 64)
    assert known(pyramid).startswith("sampled-") and known(copy) != known(pyramid)


@pytest.fixture
def tree(pyramid: Path, tmp_path: Path, shared: Path) -> Iterator[Path]:
    folder = tmp_path / "tree"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(pyramid, folder / "one.tiff")
    shutil.copy(pyramid, folder / "deep" / "two.ome.tif")
    (folder / "notes.txt").write_text("hello")
    (folder / ".hidden.tiff").write_text("no")
    (folder / "three.mrxs").write_text("x")
    (folder / "three").mkdir()
    (folder / "three" / "Data0000.dat").write_text("x")
    (folder / "old" / "case").mkdir(parents=True)
    (folder / "old" / "case" / "report.json").write_text("{}")
    shutil.copy(pyramid, folder / "old" / "case" / "heatmap.tiff")
    (folder / "out").mkdir()
    shutil.copy(pyramid, folder / "out" / "result.tiff")
    shutil.copytree(shared / "data" / "zoo" / "wsi_dicom_panimg", folder / "dicom")
    yield folder


def test_slides_are_found_by_name_and_the_rest_is_left_alone_with_a_reason(tree: Path) -> None:
    finds = find_slides([tree], tree / "out")
    assert {slide.id for slide in finds.slides} == {
        *("one", "two", "three"),
        *("full_no_bot", "full_with_bot", "sparse_no_bot", "sparse_with_bot"),
    }
    reasons = {Path(path).name: reason for path, reason in finds.left_alone.items()}
    assert reasons == {
        "notes.txt": "no slide by its name, which ends in .txt",
        "case": "a result of hilum",
        "1.dcm": "DICOM, but no whole slide",
    }


def test_a_dicom_slide_is_one_whatever_the_number_of_its_files(tmp_path: Path) -> None:
    drawn = ruler(size_um=(500.0, 400.0))
    folder = dicom(tmp_path / "case_9", drawn)
    assert [one.id for one in find_slides([tmp_path]).slides] == ["case_9"]
    with open_slide(folder) as by_folder, open_slide(folder / "level_1.dcm") as by_file:
        assert by_folder.microns_per_pixel == (0.5, 0.5) and len(by_folder.levels) == len(by_file.levels) == 3
        assert by_folder.identity == by_file.identity
        np.testing.assert_array_equal(by_folder.overview(1.0), by_file.overview(1.0))
    (folder / "level_2.dcm").unlink()
    with open_slide(folder) as opened:
        assert opened.identity != by_folder.identity
    dicom(tmp_path / "other", slide(2, size_um=(300.0, 200.0)))
    for file in (tmp_path / "other").iterdir():
        shutil.move(file, folder / f"other_{file.name}")
    assert [one.id for one in find_slides([folder]).slides] == ["level_0", "other_level_0"]
    with pytest.raises(SlideError, match="exactly one DICOM slide"):
        open_slide(folder)


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.3, 0.99])
def test_dicom_cut_short_is_a_slide_that_is_refused_and_not_one_that_is_lost(
    shared: Path, tmp_path: Path, share: float
) -> None:
    whole = shared / "data" / "zoo" / "wsi_dicom_panimg" / "full_no_bot" / "full_no_bot.dcm"
    (tmp_path / "case_7").mkdir()
    (tmp_path / "case_7" / "level.dcm").write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    found = find_slides([tmp_path]).slides
    assert [one.id for one in found] == ["case_7"]
    with pytest.raises(SlideError) as refused:
        open_slide(found[0].path, 0.5)
    assert refused.value.reason == "damaged"


def test_two_slides_of_one_name_are_refused_and_one_named_twice_is_one(tree: Path) -> None:
    assert len(find_slides([tree / "one.tiff", tree / "one.tiff", tree / "deep"]).slides) == 2
    shutil.copy(tree / "one.tiff", tree / "deep" / "one.svs")
    with pytest.raises(SlideError, match="have one name, 'one'"):
        find_slides([tree])


def test_nothing_to_be_found_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(SlideError, match=r"(?s)no slide was found in .*a.txt: no slide by its name"):
        find_slides([tmp_path])
    with pytest.raises(SlideError, match="is not there"):
        find_slides([tmp_path / "nowhere"])
    with pytest.raises(SlideError, match="is not there"):
        open_slide(tmp_path / "nowhere.svs")


EXPECTED = {
    "wsi_aperio_cmu1_small": {"cmu_small_region": "read"},
    "wsi_openslide_tiny": {
        "boxes": "resolution",  # 72 dots per inch
        "boxes_0": "no_tissue",
        "small": "no_tissue",
        "unopenable": "encoding",
        "unreadable": "damaged",
    },
    "wsi_dicom_panimg": dict.fromkeys(
        ("full_no_bot", "full_with_bot", "sparse_no_bot", "sparse_with_bot"), "resolution"
    ),
}


def outcome(path: Path, stated: float | None = None) -> str:
    try:
        with open_slide(path, stated) as opened:
            tiles = lay_tiles(opened, find_tissue(opened), TileShape())
            for x, y in tiles.positions_um[:4].tolist():
                opened.region(x, y, 112.0, 112.0, (224, 224))
            return "read"
    except SlideError as error:
        return error.reason


@pytest.mark.parametrize("folder", EXPECTED)
def test_real_slides_are_read_or_refused_with_the_right_reason(shared: Path, folder: str) -> None:
    found = find_slides([shared / "data" / "zoo" / folder]).slides
    assert {one.id: outcome(one.path) for one in found} == EXPECTED[folder]


def test_a_real_slide_shows_what_openslide_shows(shared: Path) -> None:
    path = shared / "data" / "zoo" / "wsi_aperio_cmu1_small" / "cmu_small_region.svs"
    reference = openslide.OpenSlide(path)
    with open_slide(path) as opened:
        assert opened.microns_per_pixel == (0.499, 0.499) and opened.size_px == reference.dimensions
        found = opened.region(499.0, 998.0, 149.7, 99.8, (300, 200))
    expected = reference.read_region((1000, 2000), 0, (300, 200)).convert("RGB")
    np.testing.assert_allclose(found.astype(int), np.asarray(expected), atol=2)


def test_dicom_is_read_as_openslide_reads_it_once_its_resolution_is_stated(shared: Path) -> None:
    folder = shared / "data" / "zoo" / "wsi_dicom_panimg" / "full_no_bot"
    reference = openslide.OpenSlide(folder / "full_no_bot.dcm")
    with open_slide(folder, 0.5) as opened:
        width, height = opened.size_px
        found = opened.region(0.0, 0.0, *opened.size_um, (width, height))
        assert opened.id == "full_no_bot" and opened.identity == opened.identity.lower()
    np.testing.assert_array_equal(found, np.asarray(reference.read_region((0, 0), 0, (width, height)).convert("RGB")))
