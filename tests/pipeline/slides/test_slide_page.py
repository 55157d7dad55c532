"""A slide's page holds everything it shows and names nothing outside of itself."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.outputs._viewer.scripts import HERE, OPENSEADRAGON
from pipeline.slides import page, zoom
from tests.pipeline.slides.answered import a_result

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)

needs_openseadragon = pytest.mark.skipif(bool(OPENSEADRAGON.missing()), reason=OPENSEADRAGON.missing())


class Markup(HTMLParser):
    """Its words, the addresses in it, and the scripts that would run."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.words, self.links, self.running, self.blocks, self.policy = "", [], [], {}, ""
        self._block: str | None = None
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.links += [told[name] for name in ("src", "href", "action", "data") if told.get(name)]
        if told.get("http-equiv") == "Content-Security-Policy":
            self.policy = told["content"] or ""
        assert not [name for name in told if name.startswith("on") or name == "style"]
        self._block = (told.get("id") or "") if tag == "script" else "style" if tag == "style" else None

    def handle_endtag(self, tag: str) -> None:
        self._block = None

    def handle_data(self, data: str) -> None:
        if self._block is None:
            self.words += data
        elif self._block == "":
            self.running.append(data)
        else:
            self.blocks[self._block] = data


@needs_openseadragon
def test_the_page_needs_nothing_but_itself_and_runs_what_is_ours() -> None:
    markup = Markup(page.page(a_result(), PIXEL))
    assert all(link.startswith("data:image/") for link in markup.links)
    assert markup.running == [(HERE / "slide.js").read_text(encoding="utf-8")]
    assert markup.policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in markup.policy and "http" not in markup.policy
    assert "Redistribution and use" in markup.words and "OpenSeadragon 6.1.1" in markup.words


@needs_openseadragon
def test_it_says_what_was_found_by_what_and_how_far_to_trust_it() -> None:
    result = a_result(warnings=("3 of 742 tiles could not be used",), quarantined={"damaged": 3})
    words = Markup(page.page(result, PIXEL)).words
    for told in (
        "tumour, calibrated probability 0.96",
        "5.0 × 3.1 mm · 0.25 µm per pixel, as its file says · 739 tiles of 112 µm",
        "3 of 742 tiles could not be used",
        "+0.121 logits",
        "Passed: without the 74 tiles (of 739) that add most",
        "mil_acmil, 5 members",
        "hilum_texture",
        "macro AUROC 0.950 (0.881 to 0.990)",
        "cd" * 32,
        "ab" * 32,
        "not for diagnosis",
    ):
        assert told in words, told


@needs_openseadragon
def test_a_failed_test_is_shown_as_failed() -> None:
    clean = a_result()
    failed = replace(clean.deletion, fall=0.0)
    content = page.page(replace(clean, deletion=failed), PIXEL)
    assert '<p class="alarm" id="deletion">Failed: ' in content


@needs_openseadragon
def test_the_pyramid_in_the_page_is_the_slide() -> None:
    """Every level, put together again, shows the overview."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(60, 230, (20, 33, 3)).astype(np.uint8)).resize((1300, 777))
    picture = np.asarray(smooth)
    levels = zoom.pyramid(picture)
    assert [(level["width"], level["height"]) for level in levels] == [(325, 195), (650, 389), (1300, 777)]
    for level in levels:
        whole = Image.new("RGB", (level["width"], level["height"]))
        for place, content in level["pictures"].items():
            column, row = map(int, place.split("_"))
            part = Image.open(io.BytesIO(base64.b64decode(content)))
            whole.paste(part, (column * zoom.TILE, row * zoom.TILE))
        wanted = smooth.resize(whole.size, Image.Resampling.BOX)
        assert np.abs(np.asarray(whole, int) - np.asarray(wanted, int)).mean() < 3


def test_glass_is_left_out_of_the_pyramid_but_never_of_its_coarsest_level() -> None:
    glass = np.full((1024, 1024, 3), 250, np.uint8)
    glass[100:200, 100:200] = 90
    coarse, fine = zoom.pyramid(glass)
    assert list(coarse["pictures"]) == ["0_0"] and list(fine["pictures"]) == ["0_0"]
    assert list(zoom.pyramid(glass[300:, 300:])[0]["pictures"]) == ["0_0"]


@needs_openseadragon
def test_a_page_that_would_be_too_large_gets_a_coarser_copy() -> None:
    rng = np.random.default_rng(0)
    result = a_result(overview=rng.integers(0, 255, (1550, 2500, 3)).astype(np.uint8))
    free, tight = zoom.part(result), zoom.part(result, room=1_000_000)
    assert len(free.data) > 3_000_000 and len(tight.data) < 1_000_000 + 400_000  # and what else there is
    sizes = [
        json.loads(re.search('viewer-levels">(.*?)</script>', part.data)[1])[-1]["width"] for part in (free, tight)
    ]
    assert sizes[0] == 2500 and sizes[1] < 2500


@needs_openseadragon
def test_what_the_viewer_is_given_are_the_shares() -> None:
    result = a_result()
    packed = np.frombuffer(base64.b64decode(zoom._packed(result)), "<f4").reshape(-1, len(result.values))
    np.testing.assert_array_equal(packed[:2].T, result.positions_um)
    np.testing.assert_array_equal(packed[2:4].T, result.grid)
    np.testing.assert_allclose(packed[4], result.attention, rtol=1e-6)
    np.testing.assert_allclose(packed[5:].T, result.shares, rtol=1e-6)


def test_a_large_slide_is_shown_no_finer_than_a_page_can_bear_and_a_small_one_no_finer_than_it_was_looked_at() -> None:
    assert zoom.overview_size((2000.0, 1000.0), 0.5) == (4000, 2000)
    width, height = zoom.overview_size((50_000.0, 25_000.0), 0.5)
    assert width * height == pytest.approx(zoom.MOST_PIXELS, rel=1e-3) and width / height == pytest.approx(2, rel=1e-3)


def test_without_openseadragon_the_page_shows_the_picture_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(zoom, "OPENSEADRAGON", replace(OPENSEADRAGON, place=Path("/nowhere.js")))
    markup = Markup(page.page(a_result(), PIXEL))
    assert "built without its viewer" in markup.words and "openseadragon 6.1.1" in caplog.text
    assert not markup.running and markup.links[0].startswith("data:image/png")


@needs_openseadragon
def test_names_are_no_markup() -> None:
    evil = '"><script>alert(1)</script>'
    result = a_result(classes=("normal", evil), warnings=(evil,))
    result = replace(
        result, frame=replace(result.frame, slide_id=evil), origin=replace(result.origin, package_name=evil)
    )
    markup = Markup(page.page(result, PIXEL))
    assert len(markup.running) == 1 and markup.words.count("alert(1)") > 4


@needs_openseadragon
def test_the_same_result_gives_the_same_page() -> None:
    assert page.page(a_result(), PIXEL) == page.page(a_result(), PIXEL)
