"""classify with a package that names tiles: every tile its class, on the right place, in every file."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.config import SlideClassify
from pipeline.description import show
from pipeline.slides import features
from pipeline.slides.answering import bag_of
from pipeline.slides.classification import classify
from pipeline.slides.feature_file import FeatureFile
from pipeline.slides.package import SlidePackage
from pipeline.slides.tile_answering import answer_tiles
from tests.pipeline.slides.known import TEMPERATURE, TILES, a_package, a_slide, a_tile_package


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> SlidePackage:
    folder = tmp_path_factory.mktemp("known")
    return a_tile_package(folder / "tiles", a_package(folder))


@pytest.fixture(scope="module")
def named(package: SlidePackage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide with features, one that is cut off; the first one's features, made beforehand, are taken."""
    folder = tmp_path_factory.mktemp("named")
    whole, _ = a_slide(folder / "slides", 2)
    features.extract([whole], folder / "features", TILES)
    (folder / "slides" / "cut.tiff").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    settings = SlideClassify(features=folder / "features")
    assert classify([folder / "slides"], package.folder, folder / "out", settings).told() == "1 done, 1 failed"
    again = classify([folder / "slides"], package.folder, folder / "out", settings)
    assert again.told() == "0 done, 1 failed, 1 skipped as complete"
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_tile_has_what_the_networks_say_of_it(named: Path, package: SlidePackage) -> None:
    file = FeatureFile.read(named / "features" / "phantom_002")
    said = answer_tiles(package.networks(), TEMPERATURE, bag_of(file))
    table = rows(named / "out" / "phantom_002" / "tiles.csv")
    likely = [[float(row[f"probability of {name}"]) for name in package.record.classes] for row in table]
    np.testing.assert_allclose(likely, said.probabilities, atol=1e-6)
    assert [row["predicted"] for row in table] == [package.record.classes[c] for c in said.predicted]
    shown = tifffile.imread(named / "out" / "phantom_002" / "class-map.ome.tiff")
    middles = [(int((float(row["y_um"]) + 56) / 14), int((float(row["x_um"]) + 56) / 14)) for row in table]
    np.testing.assert_allclose([shown[:, y, x] for y, x in middles], said.probabilities, atol=1e-6)


def test_areas_are_the_tissue_of_each_class(named: Path) -> None:
    report = json.loads((named / "out" / "phantom_002" / "report.json").read_text())
    table = rows(named / "out" / "phantom_002" / "tiles.csv")
    for name, mm2 in report["areas_mm2"].items():
        tissue = sum(float(row["tissue"]) for row in table if row["predicted"] == name)
        assert mm2 == pytest.approx(tissue * 0.112**2, rel=1e-3)
    (done,) = (row for row in rows(named / "out" / "summary.csv") if row["status"] != "failed")
    assert float(done[f"{report['most']} mm2"]) == pytest.approx(report["areas_mm2"][report["most"]], abs=1e-6)


def test_show_tells_the_areas_of_a_map(named: Path) -> None:
    folder = named / "out" / "phantom_002"
    areas = json.loads((folder / "report.json").read_text())["areas_mm2"]
    told = show(folder)
    assert areas and all(f"{name:<16} {mm2:>10.3g} mm²" in told for name, mm2 in areas.items())


def test_objects_for_qupath_are_the_tiles_in_the_colours_of_the_picture(named: Path, package: SlidePackage) -> None:
    said = json.loads((named / "out" / "phantom_002" / "tiles.geojson").read_text())["features"]
    table = rows(named / "out" / "phantom_002" / "tiles.csv")
    assert [one["properties"]["classification"]["name"] for one in said] == [row["predicted"] for row in table]
    corner = np.array(said[0]["geometry"]["coordinates"][0][0]) * 0.5
    np.testing.assert_allclose(corner, [float(table[0]["x_um"]), float(table[0]["y_um"])])
    with Image.open(named / "out" / "phantom_002" / "class-map.png") as sheet:
        shown = np.asarray(sheet.convert("RGB")).astype(int)
    for colour in {tuple(one["properties"]["classification"]["color"]) for one in said}:
        assert (np.abs(shown - colour).max(axis=-1) == 0).sum() > 100  # its square in the legend


def test_a_slide_that_failed_is_in_the_index_with_its_reason(named: Path) -> None:
    page = (named / "out" / "index.html").read_text()
    assert "cut.tiff" in page and 'href="phantom_002/class-map.png"' in page
