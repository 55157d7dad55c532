"""The case page in headless Chromium, offline: drawn pixels, true values at true places, and nothing from outside."""

import importlib.util
import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.maps import MapWriter
from pipeline.outputs import _viewer, page
from pipeline.report import Explanation, Result
from preprocessing.plan import Label, Plan
from preprocessing.steps import Trail
from preprocessing.volume import Geometry, Volume

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None
PATIENCE_MS = 60_000
FLAGS = ["--no-sandbox", "--disable-background-networking"]
SOFTWARE_GL = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
EVIL = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='x",
    "</script><b>",
    "&lt;i&gt;${alert(1)}",
)
BLUE, ORANGE = (0, 114, 178), (230, 159, 0)
SHAPE = (15, 18, 12)

pytestmark = [
    pytest.mark.slow,  # a browser
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)"),
    pytest.mark.skipif(not HAS_PLAYWRIGHT, reason="playwright is not installed (pip install playwright)"),
    pytest.mark.skipif(bool(_viewer.missing()), reason=_viewer.missing()),
]

AFFINES = {
    "RAS": np.diag([2.0, 2.5, 3.0, 1.0]),
    "LPS": np.diag([-2.0, -2.5, 3.0, 1.0]),
    "permuted": np.array([[0, 0, 2.5, -9], [2.0, 0, 0, 4], [0, -3.0, 0, 30], [0, 0, 0, 1.0]]),
    "oblique": np.array([[1.9, -0.5, 0.3, 11], [0.6, 2.2, -0.7, -20], [-0.1, 0.8, 2.8, 5], [0, 0, 0, 1.0]]),
}


def a_result(affine: np.ndarray = AFFINES["RAS"]) -> Result:
    """Noise, two boxes of labels, and a signed map; every voxel has a value of its own to be told by."""
    rng = np.random.default_rng(5)
    grid = Geometry(shape=SHAPE, affine=affine)
    labels, codes = np.zeros((1, *SHAPE), np.uint8), np.zeros(SHAPE, np.int8)
    labels[0, 2:7, 3:9, 2:9], labels[0, 9:13, 10:16, 3:10] = 1, 2
    codes[1:9, 2:10, 1:9] = rng.integers(40, 128, (8, 8, 8))
    codes[9:12, 11:14, 5:8] = -100
    made = {"method": "hirescam", "layer": "up.2", "unit": "share of the score"}
    return Result(
        case_id="a case",
        scan=Volume(voxels=rng.integers(-900, 900, (1, *SHAPE), dtype=np.int16), geometry=grid, channels=("ct",)),
        labels=Volume(voxels=labels, geometry=grid, channels=("labels",)),
        label_table=(Label(value=1, name="liver", colour=BLUE), Label(value=2, name="lesion", colour=ORANGE)),
        package_id="ab" * 32,
        package_name="demo",
        explanations=(
            Explanation(label="liver", part=None, codes=codes, scale=2.3e-5, score=1.0, **made),
            Explanation(label="lesion", part=None, codes=codes * 0, scale=0, score=None, blank="no score", **made),
        ),
    )


@dataclass(kw_only=True)
class Visit:
    """A browser's page, what it asked for and what it complained of."""

    page: Any
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def open(self, result: Result, folder: Path, state: str = "ready") -> "Visit":
        (path,) = page.write(result, folder, page.Config())
        self.page.goto(path.as_uri())
        # wait_for_function would need unsafe-eval, which the page's policy forbids
        self.page.wait_for_selector(f"body[data-viewer={state}]", state="attached", timeout=PATIENCE_MS)
        return self

    def drawn(self) -> np.ndarray:
        shot = self.page.locator("#viewer-canvas").screenshot(timeout=PATIENCE_MS)
        return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)

    def share(self, colour: tuple[int, int, int]) -> float:
        return float((np.abs(self.drawn() - colour).max(axis=-1) < 12).mean())

    def place(self) -> str:
        return self.page.inner_text("#viewer-place")

    def is_alone(self) -> bool:
        """Whether it asked for nothing but itself."""
        return [url for url in self.asked if not url.startswith(("data:", "blob:"))] == [self.page.url]


@pytest.fixture(scope="module")
def play() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        yield play


@pytest.fixture(scope="module")
def browser(play: Any) -> Iterator[Any]:
    browser = play.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *SOFTWARE_GL])
    yield browser
    browser.close()


def visit_of(browser: Any) -> Visit:
    # small: software draws every pixel
    shown = browser.new_context(offline=True, viewport={"width": 900, "height": 500}).new_page()
    shown.set_default_timeout(PATIENCE_MS)
    visit = Visit(page=shown)
    shown.on("request", lambda request: visit.asked.append(request.url))
    shown.on("console", lambda message: visit.complaints.append(message.text))
    shown.on("pageerror", lambda error: visit.complaints.append(str(error)))
    shown.on("dialog", lambda dialog: visit.complaints.append(dialog.message))
    return visit


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    visit = visit_of(browser)
    yield visit
    visit.page.context.close()


LEAD = """points => points.map(mm => {
  const row = document.body.appendChild(Object.assign(document.createElement('i'), {hidden: true}));
  row.dataset.mm = mm.join(' ');
  row.click();
  return document.getElementById('viewer-place').textContent;
})"""


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_values_at_a_place_are_those_of_the_arrays(visit: Visit, tmp_path: Path, affine: np.ndarray) -> None:
    result = a_result(affine)
    rng = np.random.default_rng(1)
    voxels = np.stack([rng.integers(0, n, 20) for n in SHAPE], axis=1)
    # anywhere in a voxel, not only at its centre
    points = result.scan.geometry.to_world(voxels + rng.uniform(-0.4, 0.4, voxels.shape))
    told = visit.open(result, tmp_path).page.evaluate(LEAD, points.tolist())
    heat = result.explanations[0]
    for (i, j, k), point, words in zip(voxels, points, told, strict=True):
        sides = ", ".join(
            f"{names[int(mm < 0)]} {abs(mm):.1f}" for names, mm in zip(("RL", "AP", "SI"), point, strict=True)
        )
        place, grey, value, label = words.split(" · ")
        assert place == f"{sides} mm"
        assert (
            grey == f"ct {result.scan.voxels[0, i, j, k]}"
            and label == ("no label", "liver", "lesion")[int(result.labels.voxels[0, i, j, k])]
        )
        assert float(value.removeprefix("map ")) == pytest.approx(heat.codes[i, j, k] * heat.scale, rel=6e-3, abs=0)
    assert visit.is_alone() and visit.complaints == []


def test_each_control_changes_what_is_drawn(visit: Visit, tmp_path: Path) -> None:
    shown = visit.open(a_result(), tmp_path).page
    assert not shown.is_visible("#picture img")
    shown.locator("tr[data-mm]").nth(1).click()
    assert visit.share(BLUE) == 0  # while a map is shown its colours alone mean something
    shown.locator(".layers button[data-map]").click()
    assert visit.share(ORANGE) > 0.003
    shown.locator("tr[data-mm]").nth(0).click()
    assert visit.share(BLUE) > 0.004
    shown.locator(".layers button[data-map]").click()
    seen = [visit.drawn()]

    def changed() -> bool:
        seen.append(visit.drawn())
        return bool(np.abs(seen[-1] - seen[-2]).max() > 30)

    assert shown.locator(".layers button[disabled]").inner_text().startswith("lesion blank")
    assert not changed() and shown.is_visible("#viewer-bar.signed")
    shown.locator("#viewer-least").fill("0.9")
    assert changed()
    shown.keyboard.press("m")
    assert changed() and not shown.is_visible("#viewer-bar")
    shown.locator(".layers button[data-map]").click()
    shown.locator("#viewer-least").fill("0.25")
    assert changed() and np.array_equal(seen[-1], seen[0])
    shown.locator("#viewer-strength").fill("0")
    assert changed()
    shown.keyboard.press("m")
    assert changed()
    shown.keyboard.press("x")
    assert changed()
    shown.keyboard.press("o")
    assert changed() and visit.share(BLUE) == visit.share(ORANGE) == 0
    shown.locator("#viewer-fill").fill("1")
    assert changed() and visit.share(BLUE) > 0.01
    shown.locator("[data-label='1']").uncheck()
    assert changed() and visit.share(BLUE) == 0
    shown.locator("#viewer-width").fill("100")
    assert changed() and 90 < float(shown.inner_text("#viewer-window").split()[-1]) < 110
    shown.locator("#viewer-reset").click()
    assert changed()
    for key in "2345":
        shown.keyboard.press(key)
        assert changed(), key
    assert visit.is_alone() and visit.complaints == []


def an_unsure_result() -> Result:
    """Unsure of the liver's box, a little more with every voxel; of nothing else, and the networks agree."""
    clean = a_result()
    plan = Plan(
        name="x", channels=("ct",), labels=clean.label_table, steps=(), spacing_mm=(1, 1, 1), patch=(8, 8, 8), batch=1
    )  # fmt: skip
    unsure = torch.zeros(SHAPE)
    unsure[2:7, 3:9, 2:9] = torch.linspace(0.3, 0.8, 5 * 6 * 7).view(5, 6, 7)
    writer = MapWriter.create(None, plan, clean.scan.geometry, ("entropy", "folds"))
    writer.rows(0, None, {"entropy": unsure, "folds": unsure * 0})
    return replace(clean, maps=writer.finish(Trail(taken=())), explanations=clean.explanations[:1])


def test_uncertainty_is_drawn_when_switched_on_with_a_legend_that_says_what_it_means(
    visit: Visit, tmp_path: Path
) -> None:
    shown = visit.open(an_unsure_result(), tmp_path).page
    assert " · map " in visit.place()  # an explanation first, uncertainty when asked for
    with_map = visit.drawn()
    shown.get_by_role("button", name="unclear answer").click()
    shown.locator("tr[data-mm]").first.click()
    value = float(visit.place().split(" · ")[2].removeprefix("unclear answer "))
    assert 0.3 <= value <= 0.8 and np.abs(visit.drawn() - with_map).max() > 30
    assert visit.share((255, 255, 255)) > 0.002 and not shown.is_visible("#viewer-bar.signed")
    said = shown.inner_text("#viewer-legend")
    assert "0 sure of one label, 1 all equally likely" in said and "mean inside liver 0.55, lesion 0" in said
    assert shown.inner_text("#viewer-ends").split() == ["0", "0.8"]
    assert shown.get_by_role("button", name="networks at odds").is_disabled()
    shown.get_by_role("button", name="unclear answer").click()
    assert not shown.is_visible("#viewer-legend") and len(visit.place().split(" · ")) == 3
    assert visit.is_alone() and visit.complaints == []


def test_a_row_of_the_table_leads_to_its_place_and_keys_go_on_from_there(visit: Visit, tmp_path: Path) -> None:
    shown = visit.open(a_result(), tmp_path).page
    rows = shown.locator("tr[data-mm]")
    for number, name in enumerate(("liver", "lesion")):
        rows.nth(number).click()
        assert visit.place().endswith(name) and rows.nth(number).get_attribute("aria-current") == "true"
        told, led = rows.nth(number).locator("td").nth(5).inner_text(), visit.place().split(" · ")[0]
        assert [word[:2] for word in told.split()] == [word[:2] for word in led.split()]
    shown.keyboard.press("n")
    assert visit.place().endswith("liver")
    here = visit.place()
    shown.locator("#viewer-canvas").focus()
    shown.keyboard.press("ArrowRight")
    shown.keyboard.press("PageUp")
    assert visit.place() != here
    shown.keyboard.press("ArrowLeft")
    shown.keyboard.press("PageDown")
    assert visit.place().split(" · ")[1:] == here.split(" · ")[1:]
    assert " · map " in visit.place()
    rows.first.get_by_role("button", name="map").click()
    assert " · map " not in visit.place()


def test_names_that_would_run_do_not(visit: Visit, tmp_path: Path) -> None:
    clean = a_result()
    result = replace(
        clean,
        case_id=EVIL[0],
        package_name=EVIL[1],
        warnings=EVIL,
        scan=replace(clean.scan, channels=(EVIL[3],)),
        label_table=tuple(replace(label, name=name) for label, name in zip(clean.label_table, EVIL[1:3], strict=True)),
        explanations=(replace(clean.explanations[0], label=EVIL[1], unit=EVIL[4], warnings=EVIL),),
    )
    shown = visit.open(result, tmp_path).page
    shown.locator("tr[data-mm]").first.click()
    shown.locator(".layers button[data-map]").click()  # it is doubtful, and not shown before it is asked for
    shown.locator("#viewer-bar").wait_for()
    assert EVIL[1] in visit.place() and EVIL[3] in visit.place()
    assert all(words in shown.inner_text("#viewer-says") for words in EVIL)
    assert shown.locator("main img").count() == 1 and shown.locator("main script, main b").count() == 0
    assert visit.is_alone() and visit.complaints == []


def test_without_webgl_the_picture_is_seen_and_the_reason_told(play: Any, tmp_path: Path) -> None:
    browser = play.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, "--disable-3d-apis"])
    visit = visit_of(browser)
    shown = visit.open(a_result(), tmp_path, state="none").page
    assert "no WebGL2" in shown.inner_text("#viewer-sorry")
    assert shown.is_visible("#picture img") and not shown.is_visible("#viewer")
    assert visit.is_alone()
    browser.close()
