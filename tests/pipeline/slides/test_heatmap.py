"""Heatmaps hold the very shares, on the slide's own frame, and open in programs that nobody here wrote."""

import csv
import io
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from pipeline.outputs import _heat
from pipeline.slides import heatmap, picture
from pipeline.slides.result import ranked, table
from tests.pipeline.slides.answered import LESION_UM, a_result

OME = {"ome": "http://www.openmicroscopy.org/Schemas/OME/2016-06"}


def at(found: heatmap.HeatMap, x_um: float, y_um: float) -> float:
    return float(found.share[int(y_um / found.um), int(x_um / found.um)])


def test_every_tile_has_its_own_share_all_over_and_nothing_else_has_any() -> None:
    result = a_result()
    found = heatmap.heatmap(result)
    assert found.um == 14.0
    for inset in (1.0, 56.0, 111.0):
        drawn = [at(found, x + inset, y + inset) for x, y in result.positions_um]
        np.testing.assert_allclose(drawn, result.values, rtol=1e-6)
    covered = np.isfinite(found.share).sum() * found.um**2
    assert covered == pytest.approx(len(result.values) * result.tile_um**2)


def test_the_sum_over_the_map_is_the_logit() -> None:
    """The area under the map, in tiles, and the rest."""
    result = a_result()
    found = heatmap.heatmap(result)
    tiles = np.nansum(found.share.astype(np.float64)) * (found.um / result.tile_um) ** 2
    assert tiles + result.rest[1] == pytest.approx(result.logits[1], rel=1e-5)


def test_where_tiles_overlap_their_mean_is_shown() -> None:
    result = a_result(step_um=56.0)
    found = heatmap.heatmap(result)
    x, y = LESION_UM[0] + 3, LESION_UM[1] + 3
    over = ((result.positions_um <= (x, y)) & (result.positions_um + result.tile_um > (x, y))).all(axis=1)
    assert over.sum() == 4 and found.um == 7.0
    assert at(found, x, y) == pytest.approx(result.values[over].mean(), rel=1e-5)


def test_a_map_of_a_large_slide_becomes_coarser_not_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heatmap, "MOST_PIXELS", 20_000)
    found = heatmap.heatmap(a_result())
    assert found.um == 28.0 and found.share.size <= 20_000
    assert at(found, *LESION_UM[:2]) == pytest.approx(np.nanmax(found.share), rel=0.1)


def test_the_ome_tiff_says_where_its_pixels_lie_and_what_they_are(tmp_path: Path) -> None:
    result = a_result()
    found = heatmap.heatmap(result)
    path = heatmap.write_values(found, result, tmp_path / "h.ome.tiff")
    with tifffile.TiffFile(path) as file:
        (series,) = file.series
        assert series.axes == "CYX" and series.dtype == np.float32 and len(series.levels) == 2
        read, coarse = series.asarray(), series.levels[1].asarray()
        said = ElementTree.fromstring(file.ome_metadata or "")
    np.testing.assert_array_equal(read, [found.share, found.attention])
    pixels = said.find(".//ome:Pixels", OME)
    assert pixels is not None
    assert [pixels.get(f"PhysicalSize{axis}") for axis in "XY"] == ["14.0", "14.0"]
    assert pixels.get("PhysicalSizeXUnit") == "µm" and pixels.get("Type") == "float"
    names = [channel.get("Name") for channel in said.findall(".//ome:Channel", OME)]
    assert names == ["share of tumour (logits)", "attention"]
    assert np.nanmax(coarse[0]) <= np.nanmax(read[0]) and coarse.shape[1:] == (111, 179)


def test_coarser_levels_are_means_of_what_has_a_value() -> None:
    planes = np.array([[[1, 3, np.nan], [5, np.nan, np.nan], [7, 9, 2]]], np.float32)
    (whole, half) = heatmap._pyramid(np.pad(planes, ((0, 0), (0, 300), (0, 0)), constant_values=np.nan))
    np.testing.assert_array_equal(half[0, :2], [[3, np.nan], [8, 2]])
    assert half.shape == (1, 152, 2) and whole.shape == (1, 303, 3)


def test_openslide_opens_the_coloured_pyramid_at_its_resolution_with_the_lesion_where_it_lies(tmp_path: Path) -> None:
    result = a_result()
    path = heatmap.write_colours(heatmap.heatmap(result), result, tmp_path / "h.tiff")
    with openslide.OpenSlide(path) as slide:
        um = float(slide.properties[openslide.PROPERTY_NAME_MPP_X])
        assert um == pytest.approx(14.0) and slide.level_count == 2
        assert slide.dimensions == (358, 222)
        for level in range(slide.level_count):
            shown = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[..., :3].astype(int)
            orange = shown[..., 0] - shown[..., 2]  # red less blue: nothing grey has any
            y, x = np.argwhere(orange > 60).mean(axis=0) * um * slide.level_downsamples[level]
            assert abs(x - LESION_UM[0]) < 60 and abs(y - LESION_UM[1]) < 60


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    result = a_result()
    found = heatmap.heatmap(result)
    for write in (heatmap.write_values, heatmap.write_colours):
        one, other = (write(found, result, tmp_path / f"{n}.ome.tiff").read_bytes() for n in range(2))
        assert one == other


def test_orange_speaks_for_it_blue_against_and_the_strongest_is_the_darkest() -> None:
    levels = np.array([-1, -0.3, 0.3, 1])
    against, little_against, little, most = heatmap.colours(levels)
    assert tuple(np.rint(most)) == _heat.FOR[0] and tuple(np.rint(against)) == _heat.AGAINST[0]
    for weak, strong in ((little_against, against), (little, most)):
        assert weak.sum() > strong.sum()
    assert most[0] > most[2] + 100 and against[2] > against[0] + 100


def test_pictures_are_coloured_at_the_lesion_alone_and_true_elsewhere() -> None:
    result = a_result()
    shown = np.asarray(picture.picture(result, heatmap.heatmap(result))).astype(int)
    panel = shown[-700:]
    untouched, heated = panel[:, 24 : 24 + picture.COLUMN], panel[:, 24 + picture.COLUMN + 16 : -24]
    assert (np.abs(heated[..., 0] - heated[..., 2]) > 60).any()
    pink = (untouched[..., 0] > 200) & (untouched[..., 1] < 200)
    assert pink.mean() > 0.3 and ((heated[..., 0] > 200) & (heated[..., 1] < 150)).mean() < 0.01


@pytest.mark.parametrize("size", [(20_000.0, 400.0), (400.0, 20_000.0), (150.0, 150.0)])
def test_slides_of_any_shape_have_a_picture(size: tuple[float, float]) -> None:
    result = a_result(size, lesion_um=(60.0, 60.0, 30.0))
    assert picture.picture(result, heatmap.heatmap(result)).width == 1920


def test_a_slide_without_any_share_is_drawn_bare() -> None:
    clean = a_result()
    result = replace(clean, shares=clean.shares * 0, top=(), against=())
    found = heatmap.heatmap(result)
    grey = heatmap.grey(result.overview)
    np.testing.assert_array_equal(heatmap.shown_on(grey, found, result.full), grey)
    assert picture.picture(result, found).width == 1920


def test_shares_in_the_table_and_the_rest_are_the_logits() -> None:
    result = a_result()
    rows = list(csv.DictReader(io.StringIO(table(result))))
    assert len(rows) == len(result.values)
    for n, name in enumerate(result.classes):
        total = sum(float(row[f"share of {name}"]) for row in rows)
        assert total + result.rest[n] == pytest.approx(result.logits[n], abs=1e-6)
    best = next(row for row in rows if row["rank"] == "1")
    assert abs(float(best["x_um"]) + 56 - LESION_UM[0]) < 112 and abs(float(best["y_um"]) + 56 - LESION_UM[1]) < 112
    assert sum(float(row["attention"]) for row in rows) == pytest.approx(1, abs=1e-6)


def test_ranked_tiles_have_their_sign_and_are_worth_a_look() -> None:
    first, last = ranked(np.array([0.1, -0.2, 0.0, 0.3, -0.1, -0.002]), 4)
    assert first.tolist() == [3, 0] and last.tolist() == [1, 4]
