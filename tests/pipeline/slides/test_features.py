"""features: every slide has an outcome, every file the same bytes however it came about, and tiles one size in micrometres."""

import csv
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from pipeline.config import SlideFeatures
from pipeline.results import Batch
from pipeline.slides.encoders import Encoder, load_encoder
from pipeline.slides.feature_file import DAMAGED, FILE_NAME, NOT_FINITE, FeatureFile
from pipeline.slides.features import Extractor, extract, features_of
from preprocessing import slide_phantoms
from preprocessing.slides import SlideError, SlideFile

REPOSITORY = Path(__file__).resolve().parents[3]
SMALL = SlideFeatures(tile_um=56.0, tile_px=56, batch=16, device="cpu", workers=2)
"""Tiles that are quickly read: at 1 um/px."""


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five slides, at 0.5 and 0.25 um/px. Nobody writes there."""
    folder = tmp_path_factory.mktemp("slides")
    for number in range(5):
        phantom = slide_phantoms.slide(number, size_um=(700.0, 560.0), microns_per_pixel=(0.5, 0.25)[number % 2])
        slide_phantoms.write(phantom, folder / f"slide{number}.tiff")
    return folder


def statuses(batch: Batch) -> dict[str, str]:
    return {row.case_id: row.status for row in batch.rows}


def files(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(out.glob(f"[!.]*/{FILE_NAME}"))}


def written(out: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in sorted(out.glob(f"[!.]*/{FILE_NAME}"))}


def table(out: Path) -> list[dict[str, str]]:
    with (out / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def damage(path: Path, block: int, to: Path) -> tuple[float, float, float, float]:
    """A copy whose one block of level 0 is zeros; left, top, right and bottom of the block in micrometres, at 0.5 um/px."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        offset, count = page.dataoffsets[block], page.databytecounts[block]
        across = -(-page.imagewidth // page.tilewidth)
        left, top = block % across * page.tilewidth / 2, block // across * page.tilelength / 2
    content = bytearray(path.read_bytes())
    content[offset : offset + count] = bytes(count)
    to.write_bytes(content)
    return left, top, left + page.tilewidth / 2, top + page.tilelength / 2


def test_the_number_of_workers_changes_not_a_byte(phantoms: Path, tmp_path: Path) -> None:
    found = []
    for workers in (1, 3):
        batch = extract([phantoms], tmp_path / str(workers), SlideFeatures(**vars(SMALL) | {"workers": workers}))
        assert set(statuses(batch).values()) == {"done"}
        found.append(files(tmp_path / str(workers)))
    assert len(found[0]) == 5 and found[0] == found[1]


def test_one_truncated_slide_of_five_gives_four_results_and_one_reason(phantoms: Path, tmp_path: Path) -> None:
    slides, out = shutil.copytree(phantoms, tmp_path / "slides"), tmp_path / "out"
    (slides / "notes.txt").write_text("call back on Monday")
    content = (slides / "slide2.tiff").read_bytes()
    (slides / "slide2.tiff").write_bytes(content[: len(content) // 2])
    batch = extract([slides], out, SMALL)
    (failed,) = batch.failed
    assert failed.case_id == "slide2" and "slide2.tiff" in failed.message and "hilum itself" not in failed.message
    assert sorted(files(out)) == ["slide0", "slide1", "slide3", "slide4"]
    assert [path.name for path in (out / "slide2").iterdir()] == ["error.json"]
    assert json.loads((out / "slide2" / "error.json").read_text())["reason"] == "damaged"

    told = {row["slide"]: row for row in table(out)}
    assert {name: row["status"] for name, row in told.items()} == {
        "slide0": "done", "slide1": "done", "slide2": "failed", "slide3": "done", "slide4": "done",
    }  # fmt: skip
    assert (
        told["slide2"]["message"]
        and not told["slide3"]["message"]
        and told["slide1"]["microns_per_pixel"] == "0.25 x 0.25"
    )
    summary = json.loads((out / "summary.json").read_text())
    assert [Path(name).name for name in summary["left_alone"]] == ["notes.txt"]
    assert summary["counts"] == {"done": 4, "failed": 1} and "only for trying out" in summary["caution"]

    before = written(out)
    (slides / "slide2.tiff").write_bytes(content)
    again = extract([slides], out, SMALL)
    assert statuses(again) == {f"slide{n}": "done" if n == 2 else "skipped as complete" for n in range(5)}
    assert before.items() <= written(out).items() and not (out / "slide2" / "error.json").exists()


def test_a_corrupt_block_costs_the_tiles_it_touches_and_no_other(phantoms: Path, tmp_path: Path) -> None:
    left, top, right, bottom = damage(phantoms / "slide0.tiff", 6, tmp_path / "slide0.tiff")
    settings = SlideFeatures(**vars(SMALL) | {"tile_um": 28.0, "tile_px": 56, "least_tissue": 0.0})
    (whole,) = extract([phantoms / "slide0.tiff"], tmp_path / "whole", settings).rows
    (row,) = extract([tmp_path / "slide0.tiff"], tmp_path / "out", settings).rows
    if row.status == "failed":
        pytest.fail(row.message)
    sound, harmed = FeatureFile.read(tmp_path / "whole" / "slide0"), FeatureFile.read(tmp_path / "out" / "slide0")
    x, y = sound.positions_um.T
    touched = (x < right) & (x + 28 > left) & (y < bottom) & (y + 28 > top)
    assert 0 < touched.sum() < 0.1 * len(sound)
    assert harmed.quarantined == {DAMAGED: int(touched.sum())} and whole.report.quarantined == {}
    np.testing.assert_array_equal(harmed.positions_um, sound.positions_um[~touched])
    np.testing.assert_array_equal(harmed.features(), sound.features()[~touched])
    told = table(tmp_path / "out")[0]
    assert told["quarantined"] == f"{touched.sum()} damaged" and told["tiles"] == str(len(harmed))


def test_a_slide_that_lost_more_than_a_tenth_fails_and_says_the_rule(phantoms: Path, tmp_path: Path) -> None:
    shutil.copy(phantoms / "slide0.tiff", tmp_path)
    for block in (8, 9, 14, 15):
        damage(tmp_path / "slide0.tiff", block, tmp_path / "slide0.tiff")
    fine = SlideFeatures(**vars(SMALL) | {"tile_px": 112})
    (row,) = extract([tmp_path / "slide0.tiff"], tmp_path / "out", fine).rows
    assert row.status == "failed" and "10% of its tiles" in row.message and "cannot be read" in row.message


def doubtful(bad: Callable[[torch.Tensor], torch.Tensor]) -> Encoder:
    """An encoder of two numbers, the mean of red and of green; `bad` says what it answers instead."""

    def run(tiles: torch.Tensor) -> torch.Tensor:
        return bad(tiles.float().mean((2, 3))[:, :2])

    return Encoder(
        id="doubtful", sha256="0" * 64, dimensions=2, size_px=None, caution="", device=torch.device("cpu"), run=run
    )


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1e5])
def test_a_tile_whose_numbers_are_none_is_left_out_and_counted(phantoms: Path, tmp_path: Path, odd: float) -> None:
    met: list[torch.Tensor] = []

    def fourth(means: torch.Tensor) -> torch.Tensor:
        met.append(means)
        return means if len(met) > 1 else torch.where(torch.arange(len(means))[:, None] == 3, odd, means)

    slide = SlideFile(path=phantoms / "slide0.tiff", id="slide0")
    sound = features_of(slide, doubtful(lambda means: means), SMALL, tmp_path)
    (tmp_path / "odd").mkdir()
    file = features_of(slide, doubtful(fourth), SMALL, tmp_path / "odd")
    assert file.quarantined == {NOT_FINITE: 1} and len(file) == len(sound) - 1
    assert np.isfinite(file.features()).all()


def test_an_encoder_that_answers_nothing_but_nan_fails_the_slide(phantoms: Path, tmp_path: Path) -> None:
    slide = SlideFile(path=phantoms / "slide0.tiff", id="slide0")
    with pytest.raises(SlideError, match=r"NaN.*\. Give --device cpu"):
        features_of(slide, doubtful(lambda means: means * torch.nan), SMALL, tmp_path)
    assert not list(tmp_path.iterdir())


def test_classification_gets_the_very_bytes_that_training_saw(phantoms: Path, tmp_path: Path) -> None:
    extract([phantoms / "slide1.tiff"], tmp_path / "out", SMALL)
    encoder = load_encoder("hilum_texture", torch.device("cpu"))
    file = features_of(SlideFile(path=phantoms / "slide1.tiff", id="slide1"), encoder, SMALL, tmp_path)
    assert file.path.read_bytes() == files(tmp_path / "out")["slide1"]


def test_two_resolutions_of_one_slide_give_the_same_tiles_and_nearly_the_same_features(tmp_path: Path) -> None:
    found = []
    for resolution in (0.25, 0.5):
        phantom = slide_phantoms.slide(7, size_um=(700.0, 560.0), microns_per_pixel=resolution)
        path = slide_phantoms.write(phantom, tmp_path / f"{resolution}.tiff", compression="deflate")
        settings = SlideFeatures(tile_um=112.0, tile_px=224, device="cpu")
        extract([path], tmp_path / "out", settings)
        found.append(FeatureFile.read(tmp_path / "out" / str(resolution)))
    fine, coarse = found
    assert fine.size_um == pytest.approx(coarse.size_um) and fine.recipe == coarse.recipe
    by_place = {tuple(place): row for place, row in zip(coarse.grid.tolist(), coarse.features(), strict=True)}
    shared = [tuple(place) in by_place for place in fine.grid.tolist()]
    assert np.mean(shared) > 0.9
    pairs = [
        (a, by_place[tuple(p)])
        for p, a in zip(fine.grid.tolist(), fine.features(), strict=True)
        if tuple(p) in by_place
    ]
    first, second = (np.array(side, np.float32) for side in zip(*pairs, strict=True))
    away = np.linalg.norm(first - second, axis=1)
    between = np.linalg.norm(first[:, None] - first[None], axis=2)[~np.eye(len(first), dtype=bool)]
    assert np.median(away) < 0.5 * np.median(between), (
        "the same place at another resolution is nearer than another place"
    )


def test_results_of_another_recipe_resolution_or_slide_are_never_written_over(phantoms: Path, tmp_path: Path) -> None:
    slide, out = shutil.copy(phantoms / "slide0.tiff", tmp_path / "slide.tiff"), tmp_path / "out"
    extract([Path(slide)], out, SMALL)
    before = files(out)
    for changed, told in (
        ({"tile_um": 112.0}, "tile_um 56.0 and 112.0"),
        ({"microns_per_pixel": 0.45}, "another resolution (0.5 um/px, file)"),
    ):
        (failed,) = extract([Path(slide)], out, SlideFeatures(**vars(SMALL) | changed)).failed
        assert told in failed.message
    shutil.copy(phantoms / "slide1.tiff", slide)
    (failed,) = extract([Path(slide)], out, SMALL).failed
    assert "another slide of the same name" in failed.message and files(out) == before


def test_a_slide_that_says_no_resolution_fails_and_any_of_the_ways_to_state_it_helps(tmp_path: Path) -> None:
    phantom = slide_phantoms.slide(3, size_um=(500.0, 400.0))
    path = slide_phantoms.write(phantom, tmp_path / "mute.tiff", with_resolution=False)
    (failed,) = extract([path], tmp_path / "none", SMALL).failed
    for way in ("--microns_per_pixel", "--resolutions", "tag"):
        assert way in failed.message
    (tmp_path / "table.csv").write_text("slide,microns_per_pixel\nmute,0.5\nother,0.25\n")
    stated = [{"microns_per_pixel": 0.5}, {"resolutions": tmp_path / "table.csv"}]
    for number, words in enumerate(stated):
        (row,) = extract([path], tmp_path / str(number), SlideFeatures(**vars(SMALL) | words)).rows
        assert row.status == "done" and row.report.resolution_from == "stated"
    assert files(tmp_path / "0") == files(tmp_path / "1")
    assert json.loads((tmp_path / "1" / "summary.json").read_text())["stated_of_nobody"] == ["other"]


def test_the_pace_is_told_in_the_log_and_the_summary_and_no_slide_is_named_in_the_log(
    phantoms: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    heard: list[tuple[str, float, float]] = []
    extract([phantoms], tmp_path, SMALL, lambda stage, done, of, note="": heard.append((stage, done, of)))
    assert "tiles/s, the encoder waited" in caplog.text and "only for trying out" in caplog.text
    assert "slide0" not in caplog.text
    pace = json.loads((tmp_path / "summary.json").read_text())["pace"]
    tiles = [int(row["tiles"]) for row in table(tmp_path)]
    assert pace["tiles"] == sum(tiles) and pace["tiles_per_second"] > 0 and 0 <= pace["waited_share"] <= 1
    assert pace["waited"] <= pace["seconds"]
    assert heard[-1] == ("features", 5, 5) and [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)
    assert any(done % 1 > 0 for _, done, _ in heard), "a slide takes minutes; the bar moves while it does"


def test_a_mistake_in_the_settings_is_told_before_any_slide_is_touched(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="32 or more"):
        extract([phantoms], tmp_path / "out", SlideFeatures(**vars(SMALL) | {"tile_px": 16}))
    for wrong in ({"tile_um": 0.0}, {"batch": 0}, {"least_tissue": 1.5}, {"step_um": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SlideFeatures(**wrong)
    assert not (tmp_path / "out").exists()


WORDS = {"tile_um": 28.0, "tile_px": 56, "step_um": 28.0, "batch": 16, "device": "cpu"}
BEGIN = f"""
import sys
from pathlib import Path
from pipeline.config import SlideFeatures
from pipeline.slides.features import extract
extract([Path(sys.argv[1])], Path(sys.argv[2]), SlideFeatures(**{WORDS}))
"""


def begin(slides: Path, out: Path) -> subprocess.Popen:
    surroundings = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", BEGIN, str(slides), str(out)]
    return subprocess.Popen(words, env=surroundings, stderr=subprocess.PIPE, text=True)


def test_killed_twice_it_redoes_at_most_the_slide_in_hand_and_the_files_are_the_same(
    phantoms: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    kept: dict[str, int] = {}
    for wanted in (1, 3):
        process = begin(phantoms, out)
        while len(written(out)) < wanted and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        now = written(out)
        assert kept.items() <= now.items(), "a complete slide was done again"
        kept = now
    assert 0 < len(kept) < 5, "the kills came while there was work to do"
    last = begin(phantoms, out)
    _, told = last.communicate(timeout=120)
    assert last.returncode == 0, told
    assert kept.items() <= written(out).items() and len(written(out)) == 5
    assert {path.name for path in out.glob(".*")} == {".lock"}
    extract([phantoms], tmp_path / "undisturbed", SlideFeatures(**WORDS))
    assert files(out) == files(tmp_path / "undisturbed")


def test_slides_to_come_are_read_while_the_encoder_runs(phantoms: Path, tmp_path: Path) -> None:
    """An encoder that takes its time waits for the first slide alone."""

    def slowly(means: torch.Tensor) -> torch.Tensor:
        time.sleep(0.15)
        return means

    slides = [SlideFile(path=phantoms / f"slide{n}.tiff", id=f"slide{n}") for n in range(3)]
    shares = []
    with Extractor(doubtful(slowly), SMALL) as extractor:
        for slide in slides:
            extractor.announce(slide)
        for slide in slides:
            (tmp_path / slide.id).mkdir()
            extractor.features_of(slide, tmp_path / slide.id)
            shares.append(extractor.last.waited_share)
    assert max(shares[1:]) < 0.2


def test_real_slides_of_an_aperio_scanner_and_of_dicom_become_features(shared: Path, tmp_path: Path) -> None:
    zoo = shared / "data" / "zoo"
    settings = SlideFeatures(device="cpu")
    (row,) = extract([zoo / "wsi_aperio_cmu1_small"], tmp_path / "svs", settings).rows
    assert row.status == "done", row.message
    file = FeatureFile.read(tmp_path / "svs" / "cmu_small_region")
    assert file.slide_microns_per_pixel == (0.499, 0.499) and file.resolution_from == "file"
    assert np.isfinite(file.features()).all() and 40 < len(file) <= 20 * 14
    batch = extract([zoo / "wsi_openslide_tiny", zoo / "wsi_dicom_panimg"], tmp_path / "others", settings)
    assert all(row.status == "done" or (row.message and "hilum itself" not in row.message) for row in batch.rows)
