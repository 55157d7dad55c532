"""A slide's page in headless Chromium, offline: drawn pixels, true places, and nothing from outside."""

import importlib.util
import io
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.outputs._drawing import png
from pipeline.outputs._viewer.scripts import OPENSEADRAGON
from pipeline.slides import page
from pipeline.slides.result import SlideResult
from tests.pipeline.slides.answered import LESION_UM, a_result

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None
PATIENCE_MS = 60_000
PICTURE = png(Image.new("RGB", (300, 200)))
EVIL = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onload='x", "</script><b>")

pytestmark = [
    pytest.mark.slow,  # a browser
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)"),
    pytest.mark.skipif(not HAS_PLAYWRIGHT, reason="playwright is not installed (pip install playwright)"),
    pytest.mark.skipif(bool(OPENSEADRAGON.missing()), reason=OPENSEADRAGON.missing()),
]


LOADED = """(() => {
  const images = Array.from({length: viewer.world.getItemCount()}, (_, n) => viewer.world.getItemAt(n));
  return images.length === 1 + document.querySelectorAll('[data-tile]').length && images.every(one => one.getFullyLoaded());
})()"""
"""Whether all that is in sight is drawn from its own pictures."""


@dataclass(kw_only=True)
class Visit:
    """A browser's page, what it asked for and what it complained of."""

    page: Any
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def open(self, result: SlideResult, folder: Path, state: str = "ready") -> "Visit":
        path = folder / page.FILE_NAME
        path.write_text(page.page(result, PICTURE), encoding="utf-8")
        self.page.goto(path.as_uri())
        self.page.wait_for_selector(f"body[data-viewer={state}]", state="attached", timeout=PATIENCE_MS)
        if state == "ready":
            self.rest()
        return self

    def rest(self) -> None:
        """Until every picture in sight is loaded and two shots are alike."""
        before = None
        for _ in range(60):
            self.page.wait_for_timeout(120)
            now = self.drawn().tobytes() if self.page.evaluate(LOADED) else None
            if now is not None and now == before:
                return
            before = now
        raise AssertionError("the viewer never came to rest")

    def drawn(self) -> np.ndarray:
        shot = self.page.locator("#viewer-screen").screenshot(timeout=PATIENCE_MS)
        return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)

    def pixel(self, x_um: float, y_um: float) -> tuple[float, float]:
        """Where a place of the slide is on the screen."""
        found = self.page.evaluate(f"(() => {{ const p = onScreen({x_um}, {y_um}); return [p.x, p.y]; }})()")
        return float(found[0]), float(found[1])

    def click(self, x_um: float, y_um: float) -> None:
        left, top = self.pixel(x_um, y_um)
        self.page.locator("#viewer-screen").click(position={"x": left, "y": top})
        self.rest()

    def place(self) -> str:
        return self.page.inner_text("#viewer-place")

    def is_alone(self) -> bool:
        """Whether it asked for nothing but itself."""
        return [url for url in self.asked if not url.startswith(("data:", "blob:"))] == [self.page.url]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    shown = browser.new_context(offline=True, viewport={"width": 1000, "height": 640}).new_page()
    shown.set_default_timeout(PATIENCE_MS)
    visit = Visit(page=shown)
    shown.on("request", lambda request: visit.asked.append(request.url))
    shown.on("console", lambda message: visit.complaints.append(message.text))
    shown.on("pageerror", lambda error: visit.complaints.append(str(error)))
    shown.on("dialog", lambda dialog: visit.complaints.append(dialog.message))
    yield visit
    shown.context.close()


def orange(shot: np.ndarray) -> np.ndarray:
    return (
        (shot[..., 0] > 150) & (shot[..., 0] - shot[..., 2] > 60) & (shot[..., 1] > 60) & (shot[..., 1] < shot[..., 0])
    )


def test_the_heat_lies_on_the_lesion_and_nothing_is_asked_of_anyone(visit: Visit, tmp_path: Path) -> None:
    shown = visit.open(a_result(), tmp_path).page
    shown.locator("#viewer-marks").uncheck()
    shot = visit.drawn()
    found = np.argwhere(orange(shot))
    middle, edge = visit.pixel(*LESION_UM[:2]), visit.pixel(LESION_UM[0] + LESION_UM[2], LESION_UM[1])
    assert np.abs(found.mean(axis=0)[::-1] - middle).max() < 3
    assert len(found) == pytest.approx(np.pi * (edge[0] - middle[0]) ** 2, rel=0.25)
    assert not shown.is_visible("#picture img")
    assert visit.is_alone() and visit.complaints == []


def test_each_control_changes_what_is_drawn(visit: Visit, tmp_path: Path) -> None:
    shown = visit.open(a_result(), tmp_path).page
    seen = [visit.drawn()]

    def changed() -> bool:
        visit.rest()
        seen.append(visit.drawn())
        return bool(np.abs(seen[-1] - seen[-2]).max() > 30)

    assert not changed()
    for key in ("t", "t", "g", "g", "h"):
        shown.keyboard.press(key)
        assert changed(), key
    assert orange(seen[-1]).mean() < 0.01  # the marks of the top tiles
    shown.keyboard.press("h")
    assert changed() and orange(seen[-1]).mean() > 0.01
    shown.locator("#viewer-strength").fill("0.1")
    assert changed()
    shown.locator("#viewer-strength").fill("1")
    assert changed()
    shown.locator("#viewer-least").fill("0.8")
    assert changed() and orange(seen[-1]).sum() < 0.8 * orange(seen[-2]).sum()
    shown.get_by_role("button", name="adds to normal").click()
    assert changed() and orange(seen[-1]).mean() < 0.01
    assert "logits that a tile adds to normal" in shown.inner_text("#viewer-unit")
    shown.get_by_role("button", name="attention").click()
    assert changed() and "sums to 1" in shown.inner_text("#viewer-unit")
    for key in "+-0":
        shown.keyboard.press(key)
        changed()
    assert visit.is_alone() and visit.complaints == []


def test_a_click_tells_the_place_in_micrometres_and_the_very_shares_of_its_tile(visit: Visit, tmp_path: Path) -> None:
    result = a_result()
    visit.open(result, tmp_path)
    for index in (0, len(result.values) // 3, int(result.values.argmax())):
        x, y = (float(each) for each in result.positions_um[index] + result.tile_um * np.array([0.3, 0.6]))
        visit.click(x, y)
        told = re.match(r"x (-?\d+), y (-?\d+) µm · (\S+) to normal · (\S+) to tumour · attention (\S+)", visit.place())
        assert told, visit.place()
        assert abs(int(told[1]) - x) < 8 and abs(int(told[2]) - y) < 8  # half a pixel of the screen
        for words, value in zip(told.groups()[2:], (*result.shares[index], result.attention[index]), strict=True):
            assert float(words.replace("−", "-")) == pytest.approx(value, rel=6e-3)
    visit.click(60.0, 60.0)
    assert visit.place().endswith("no tile")


@pytest.mark.parametrize("step_um", [112.0, 56.0])
def test_a_top_tile_leads_to_its_place_at_full_resolution(visit: Visit, tmp_path: Path, step_um: float) -> None:
    clean = a_result(step_um=step_um)
    green = np.zeros((224, 224, 3), np.uint8)
    green[..., 1] = 160
    result = replace(clean, top=(replace(clean.top[0], picture=green), *clean.top[1:]))
    shown = visit.open(result, tmp_path).page
    shown.locator("figure[data-tile]").first.click()
    visit.rest()
    x, y = result.middle_um[result.top[0].index]
    assert visit.place().startswith(f"x {x:.0f}, y {y:.0f} µm")
    shot = visit.drawn()
    middle = visit.pixel(x, y)
    assert np.abs(np.array(middle) - np.array(shot.shape[1::-1]) / 2).max() < 2
    for name in ("heat", "crosshair", "marks"):
        shown.locator(f"#viewer-{name}").uncheck()
    visit.rest()
    found = np.argwhere((visit.drawn()[..., 1] > 120) & (visit.drawn()[..., 0] < 40))
    side = visit.pixel(x + 112, y)[0] - middle[0]
    assert len(found) == pytest.approx(side**2, rel=0.05)
    assert np.abs(found.mean(axis=0)[::-1] - middle).max() < 2
    assert shown.locator("figure[aria-current]").count() == 1
    shown.keyboard.press("n")
    visit.rest()
    x, y = result.middle_um[result.top[1].index]
    assert visit.place().startswith(f"x {x:.0f}, y {y:.0f} µm")


def test_names_that_would_run_do_not(visit: Visit, tmp_path: Path) -> None:
    clean = a_result(classes=(EVIL[0], EVIL[1]), warnings=EVIL)
    result = replace(
        clean, frame=replace(clean.frame, slide_id=EVIL[3]), origin=replace(clean.origin, package_name=EVIL[2])
    )
    shown = visit.open(result, tmp_path).page
    visit.click(*LESION_UM[:2])
    assert EVIL[0] in visit.place() and EVIL[1] in visit.place()
    assert shown.locator("main script").count() == 0 and shown.locator("h1").inner_text() == EVIL[3]
    assert visit.is_alone() and visit.complaints == []


def test_where_the_viewer_cannot_run_the_picture_is_seen_and_the_reason_told(visit: Visit, tmp_path: Path) -> None:
    visit.page.add_init_script("delete window.DecompressionStream")
    shown = visit.open(a_result(), tmp_path, state="none").page
    assert "too old" in shown.inner_text("#viewer-sorry")
    assert shown.is_visible("#picture img") and not shown.is_visible("#viewer")
    assert visit.is_alone()


def test_without_script_the_picture_is_seen(browser: Any, tmp_path: Path) -> None:
    context = browser.new_context(offline=True, java_script_enabled=False)
    result = a_result()
    path = tmp_path / page.FILE_NAME
    path.write_text(page.page(result, PICTURE), encoding="utf-8")
    shown = context.new_page()
    shown.goto(path.as_uri())
    assert shown.is_visible("#picture img") and not shown.is_visible("#viewer")
    context.close()
