"""classify, from slides to pages: answers that add up, maps that lie right, and one bad slide that stops nothing."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.config import SlideClassify
from pipeline.description import show
from pipeline.errors import UsageError
from pipeline.results import Batch
from pipeline.slides import encoders, features, sight, supply
from pipeline.slides.answering import SlideAnswer
from pipeline.slides.classification import centred, classify
from pipeline.slides.package import SlidePackage
from pipeline.slides.result import probability
from pipeline.slides.scores import softmax
from preprocessing.slide_phantoms import PhantomSlide
from preprocessing.slides import Slide, SlideError, open_slide
from tests.pipeline.slides.known import TEMPERATURE, TILES, a_package, a_slide


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> SlidePackage:
    return a_package(tmp_path_factory.mktemp("known"))


@pytest.fixture(scope="module")
def answered(known: SlidePackage, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, PhantomSlide]]:
    """A slide of 0.25 and one of 0.5 um per pixel, with a lesion each, one without, one cut off in its middle."""
    folder = tmp_path_factory.mktemp("answered")
    made = [
        a_slide(folder / "slides", seed, um, lesions) for seed, um, lesions in ((1, 0.25, 1), (2, 0.5, 1), (3, 0.5, 0))
    ]
    whole, _ = a_slide(folder / "others", 4)
    (folder / "slides" / "cut.tiff").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    batch = classify([folder / "slides"], known.folder, folder / "out", SlideClassify(top_tiles=4))
    assert batch.told() == "3 done, 1 failed"
    return folder / "out", {drawn.id: drawn for _, drawn in made}


def report(out: Path, name: str) -> dict:
    return json.loads((out / name / "report.json").read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def off_the_lesion(drawn: PhantomSlide, x_um: float, y_um: float) -> float:
    """How far outside of it a place lies; negative: inside."""
    return min(np.hypot(x_um - one.x_um, y_um - one.y_um) - one.radius_um for one in drawn.lesions)


def test_the_shares_of_the_tiles_and_the_rest_are_the_reported_logits(answered: tuple) -> None:
    out, slides = answered
    for name in slides:
        said = report(out, name)
        for kind, logit in said["logits"].items():
            tiles = sum(float(row[f"share of {kind}"]) for row in rows(out / name / "tiles.csv"))
            assert tiles + said["rest"][kind] == pytest.approx(logit, abs=1e-5)
        likely = np.exp(np.array(list(said["logits"].values())) / TEMPERATURE)
        assert list(said["probabilities"].values()) == pytest.approx(likely / likely.sum(), abs=1e-6)


def test_show_tells_what_was_said_of_a_slide(answered: tuple) -> None:
    out, slides = answered
    for name in slides:
        said, told = report(out, name), show(out / name)
        assert told.startswith(f"{name}: done, by ") and told == show(out / name / "report.json")
        assert all(f"{kind:<16} {probability(value):>10}" in told for kind, value in said["probabilities"].items())
        assert said["deletion_verdict"] in told and (out / name / "page.html").as_uri() in told


def test_a_tile_that_adds_the_same_to_every_class_speaks_for_none() -> None:
    rng = np.random.default_rng(0)
    shares, rest = rng.normal(0, 1, (5, 3)), rng.normal(0, 1, 3)
    shares[2] = 7.0
    logits = shares.sum(axis=0) + rest
    said = SlideAnswer(
        logits=logits, probabilities=softmax(logits), attention=np.full(5, 0.2), shares=shares, rest=rest
    )
    told = centred(said)
    assert told.shares is not None and told.rest is not None
    assert np.abs(told.shares[2]).max() < 1e-12 and abs(told.logits.sum()) < 1e-12
    np.testing.assert_allclose(told.shares.sum(axis=0) + told.rest, told.logits)
    np.testing.assert_allclose(softmax(told.logits), told.probabilities)
    assert told.predicted == said.predicted


def test_lesions_are_found_where_they_were_planted_at_any_resolution(answered: tuple) -> None:
    out, slides = answered
    assert {drawn.microns_per_pixel[0] for drawn in slides.values() if drawn.lesions} == {0.25, 0.5}
    for name, drawn in slides.items():
        said = report(out, name)
        assert said["predicted"] == drawn.label
        if not drawn.lesions:
            continue
        best = next(row for row in rows(out / name / "tiles.csv") if row["rank"] == "1")
        assert off_the_lesion(drawn, float(best["x_um"]) + 56, float(best["y_um"]) + 56) < 0
        share = tifffile.imread(out / name / "heatmap.ome.tiff")[0]
        y, x = np.unravel_index(np.nanargmax(share), share.shape)
        assert off_the_lesion(drawn, (x + 4) * 14, (y + 4) * 14) < 0  # the middle of the tile whose first pixel it is
        assert np.nanmax(share) == pytest.approx(float(best["share of lesion"]))
        (feature, *_) = json.loads((out / name / "tiles.geojson").read_text())["features"]
        corners = np.array(feature["geometry"]["coordinates"][0]) * drawn.microns_per_pixel
        np.testing.assert_allclose(corners[0], [float(best["x_um"]), float(best["y_um"])], atol=1e-3)
        np.testing.assert_allclose(corners[2] - corners[0], 112)
        assert said["deletion_verdict"].startswith("passed")


def test_a_slide_cut_off_is_told_why_and_stops_nothing(answered: tuple) -> None:
    out, _ = answered
    assert json.loads((out / "cut" / "error.json").read_text())["verdict"] == "refused"
    summary = {row["slide"]: row for row in rows(out / "summary.csv")}
    assert summary["cut"]["status"] == "failed" and "cut.tiff" in summary["cut"]["message"]
    assert summary["phantom_001"]["deletion test"] == "passed" and summary["phantom_003"]["predicted"] == "healthy"
    page = (out / "index.html").read_text()
    assert "cut.tiff" in page and 'href="phantom_001/page.html"' in page
    said = json.loads((out / "summary.json").read_text())
    assert said["counts"] == {"done": 3, "failed": 1}
    assert [one["predicted"] for one in said["slides"] if not one["error"]] == ["lesion", "lesion", "healthy"]


def test_every_file_that_is_named_is_there_and_no_other(answered: tuple) -> None:
    out, slides = answered
    for name in slides:
        lying = {str(path.relative_to(out / name)) for path in (out / name).rglob("*") if path.is_file()}
        assert lying == {*report(out, name)["files"], "report.json"}


def test_top_tiles_are_what_the_encoder_saw(answered: tuple) -> None:
    out, _ = answered
    ranked = sorted(rows(out / "phantom_001" / "tiles.csv"), key=lambda row: int(row["rank"]))[:4]
    files = sorted((out / "phantom_001" / "top-tiles").glob("for-*.png"))
    assert 2 <= len(files) <= 4
    with open_slide(out.parent / "slides" / "phantom_001.tiff") as slide:
        for file, row in zip(files, ranked, strict=False):
            seen = slide.region(float(row["x_um"]), float(row["y_um"]), 112, 112, (112, 112))
            np.testing.assert_array_equal(np.asarray(Image.open(file)), seen)
            assert float(file.stem.split("_")[1]) == pytest.approx(float(row["share of lesion"]), abs=1e-4)


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return a_slide(tmp_path / "slides", 2)[0]


@pytest.fixture
def run(known: SlidePackage, one: Path, tmp_path: Path) -> Callable[..., Batch]:
    """classify of that slide."""

    def made(**settings: object) -> Batch:
        return classify([one], known.folder, tmp_path / "out", replace(SlideClassify(top_tiles=2), **settings))

    return made


def test_what_is_complete_is_not_done_again_and_what_is_not_is(run: Callable[..., Batch], tmp_path: Path) -> None:
    assert [row.status for row in run().rows] == ["done"]
    first = (tmp_path / "out" / "phantom_002" / "page.html").stat().st_mtime_ns
    assert [row.status for row in run().rows] == ["skipped as complete"]
    (tmp_path / "out" / "phantom_002" / "heatmap.ome.tiff").unlink()
    assert [row.status for row in run().rows] == ["done"]
    assert (tmp_path / "out" / "phantom_002" / "page.html").stat().st_mtime_ns > first
    assert [row.status for row in run(top_tiles=3).rows] == ["done"]


def test_features_that_lie_there_are_taken_and_give_the_same_answer(
    run: Callable[..., Batch], one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fresh,) = run().rows
    features.extract([one], tmp_path / "features", TILES)

    def never(*_: object) -> None:
        raise AssertionError("features are there: nothing is to be encoded")

    monkeypatch.setattr(supply, "load_encoder", never)
    (again,) = run(features=tmp_path / "features", top_tiles=3).rows
    assert fresh.report and again.report
    assert fresh.report.features == "made now" and again.report.features.startswith("taken from ")
    assert again.report.logits == fresh.report.logits


def test_features_by_another_recipe_are_not_taken(run: Callable[..., Batch], one: Path, tmp_path: Path) -> None:
    features.extract([one], tmp_path / "features", replace(TILES, tile_um=120.0))
    (row,) = run(features=tmp_path / "features").rows
    assert row.report and row.report.tile_um == 112
    assert "by another recipe (tile_um 120.0 and 112.0" in row.report.features


def test_features_of_another_slide_of_the_name_are_not_taken(
    run: Callable[..., Batch], one: Path, tmp_path: Path
) -> None:
    features.extract([one], tmp_path / "features", TILES)
    one.write_bytes(a_slide(tmp_path / "other", 5)[0].read_bytes())
    (row,) = run(features=tmp_path / "features").rows
    assert row.report and "of another slide of the same name" in row.report.features


def test_another_encoder_than_the_packages_is_refused_before_any_slide(
    run: Callable[..., Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = encoders.load_encoder
    monkeypatch.setattr(supply, "load_encoder", lambda *how: replace(real(*how), sha256="0" * 64))
    with pytest.raises(UsageError, match=r"encoder_sha256.*--encoder"):
        run()
    assert not (tmp_path / "out").exists()


def test_a_resolution_that_is_stated_moves_everything(run: Callable[..., Batch], tmp_path: Path) -> None:
    """Told to be twice as fine, the slide is half as large, and so are its tiles on it."""
    (row,) = run(microns_per_pixel=0.25).rows
    assert row.report and row.report.resolution_from == "stated"
    assert row.report.size_um == pytest.approx((500, 400))
    assert [again.status for again in run(microns_per_pixel=0.25).rows] == ["skipped as complete"]
    (other,) = run().rows
    assert other.status == "failed" and "at another resolution (0.25 um/px, stated)" in other.message


def test_a_part_of_the_overview_that_cannot_be_read_is_grey_and_told(
    one: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Batch], tmp_path: Path
) -> None:
    whole = Slide.region

    def torn(slide: Slide, x: float, y: float, width: float, height: float, size: tuple[int, int]) -> np.ndarray:
        if size == (sight.BLOCK_PX, sight.BLOCK_PX) and x == y == 0:
            raise SlideError("torn", reason="damaged")
        return whole(slide, x, y, width, height, size)

    monkeypatch.setattr(Slide, "region", torn)
    (row,) = run().rows
    assert row.report and "1 part of the overview could not be read and is grey" in row.report.warnings
    assert "could not be read and is grey" in (tmp_path / "out" / "phantom_002" / "page.html").read_text()
