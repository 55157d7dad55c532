"""A person opens the MLflow UI and finds the run, its curves, its pictures and its package."""

import importlib.util
import io
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from pipeline.outputs import page
from pipeline.registry import register
from pipeline.report import Result
from pipeline.tracking import Tracker, newest_page, open_run, ui_url
from preprocessing.volume import Volume
from tests.pipeline.conftest import LABELS as TABLE
from tests.pipeline.servers import free_port, serving, stop

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None
PATIENCE_MS = 60_000
FLAGS = [
    "--no-sandbox", "--disable-background-networking",
    "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",  # WebGL 2 without a graphics card
]  # fmt: skip

pytestmark = [
    pytest.mark.slow,  # a browser
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)"),
    pytest.mark.skipif(not HAS_PLAYWRIGHT, reason="playwright is not installed (pip install playwright)"),
]


@dataclass(frozen=True, kw_only=True)
class Served:
    """A store with one finished run in it, and the UI on it."""

    pid: int
    port: int
    run: Tracker
    asked: Path
    """Every address that its processes connected to."""


@dataclass(kw_only=True)
class Visit:
    """A browser's page, and every address it asked for."""

    page: Any
    asked: list[str] = field(default_factory=list)

    def go(self, url: str) -> None:
        self.page.goto(url, wait_until="domcontentloaded", timeout=PATIENCE_MS)

    def see(self, text: str) -> None:
        self.page.get_by_text(text).filter(visible=True).first.wait_for(timeout=PATIENCE_MS)

    def strangers(self) -> set[str | None]:
        """Hosts that were asked for anything and are not this machine."""
        assert self.asked
        hosts = {urlsplit(url).hostname for url in self.asked if not url.startswith(("data:", "blob:"))}
        return hosts - {"127.0.0.1"}

    def keep(self, name: str) -> None:
        """A look for a person: with HILUM_SCREENSHOTS=FOLDER the pages are kept there."""
        if folder := os.environ.get("HILUM_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"mlflow-{name}.png")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, make_scan: Callable[..., Volume]) -> Iterator[Served]:
    store = tmp_path_factory.mktemp("a store")
    uri = f"sqlite:///{store}/mlflow.db"
    run = a_training(uri, store, a_case_page(make_scan(3), store))
    port = free_port()
    (store / "watch").mkdir()
    (store / "watch" / "sitecustomize.py").write_text(WATCH)
    environment = {"PYTHONPATH": str(store / "watch"), "WATCHED": str(store / "asked.txt")}
    with (store / "server.log").open("w") as log:
        server = serving(uri, port, log=log, environment=environment)
    try:
        yield Served(pid=server.pid, port=port, run=run, asked=store / "asked.txt")
    finally:
        stop(server)


WATCH = """
import os, sys

def heard(event, words):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        with open(os.environ["WATCHED"], "a") as asked:
            asked.write(f"{event} {words[1] if event != 'socket.getaddrinfo' else words[0]}\\n")

sys.addaudithook(heard)
with open(os.environ["WATCHED"], "a") as asked:
    asked.write("watched\\n")
"""
"""Python runs this in every process of the server: each address that any of them asks for is written down."""


@pytest.fixture
def visit() -> Iterator[Visit]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 1800})
        visit = Visit(page=page)
        page.on("request", lambda request: visit.asked.append(request.url))
        # MLflow's assistant pane would take a quarter of the page
        page.add_init_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
        yield visit
        browser.close()


def a_training(uri: str, folder: Path, case_page: str) -> Tracker:
    run = open_run(
        uri=uri,
        experiment="phantoms",
        run_name="residual_unet fold 0",
        params={"network": "residual_unet", "patch": "64x64x32", "spacing_mm": "1 x 1 x 2", "fold": 0},
        tags={"hilum.version": "0.1.0", "hilum.plan": "3f2a9c"},
        note="Segments **liver, spleen, lesion** in two channels.\n\nTrained on 12 phantoms, fold 0 of 5.",
    )
    run.dataset("phantoms", "9f" * 32, cases=12, context="training")
    for epoch in range(EPOCHS):
        run.metrics({"train/loss": 1.5 * math.exp(-epoch / 6)}, step=epoch)
        run.metrics({f"val/dice_{label}": 0.9 - math.exp(-epoch / 4 - i) for i, label in enumerate(LABELS)}, step=epoch)
        if epoch % 5 == 0:
            run.picture("validation/case 1", a_picture(epoch), step=epoch)
    run.text(case_page, "report/worst.html")
    run.text("patch: [64, 64, 32]\nspacing_mm: [1, 1, 2]\n", "plan.yaml")
    package = folder / "package"
    package.mkdir()
    (package / "package.json").write_text('{"network": "residual_unet"}\n')
    (package / "card.md").write_text("# phantoms\n")
    register(
        package, "phantoms-residual_unet", uri=run.uri, run_id=run.run_id, aliases=("champion",),
        note="Mean Dice 0.87 on fold 0 of phantoms.",
    )  # fmt: skip
    run.finish("FINISHED")
    return run


def a_case_page(scan: Volume, folder: Path) -> str:
    """The very page that `segment` writes of a case."""
    labels = scan.with_voxels((scan.voxels > 200).astype(np.uint8), channels=("labels",))
    told = {"package_id": "ab" * 32, "package_name": "tiny", "warnings": ("the worst of three",)}
    result = Result(case_id="3fa2c1d4e5b6", scan=scan, labels=labels, label_table=TABLE, **told)
    (written,) = page.write(result, folder, page.Config())
    return written.read_text()


EPOCHS = 20
LABELS = ("liver", "spleen", "lesion")


def a_picture(epoch: int) -> np.ndarray:
    """A grey body, and beside it the same with an orange organ that grows; its colour is looked for on the page."""
    across, down = np.mgrid[-1:1:512j, -1:1:512j]
    radius = np.hypot(across, down)
    picture = np.repeat(np.uint8(120 * (radius < 0.9))[..., None], 3, axis=2)
    picture[radius < 0.1 + epoch / 40] = ORANGE
    return np.concatenate([np.repeat(picture[..., :1], 3, axis=2), picture], axis=1)


ORANGE = (230, 159, 0)


def test_the_experiment_leads_to_the_run(served: Served, visit: Visit) -> None:
    visit.go(ui_url(port=served.port))
    visit.see("Trainings by hilum")
    visit.see("phantoms")
    visit.go(ui_url(port=served.port, page=newest_page(served.run.uri)))
    visit.see("phantoms (9f9f9f9f9f9f)")
    visit.keep("runs")
    visit.page.get_by_role("link", name="residual_unet fold 0").first.click()
    visit.see("Finished")
    visit.see("liver, spleen, lesion")
    visit.see("phantoms-residual_unet")
    visit.keep("run")
    assert visit.strangers() == set()


def test_the_curves_are_drawn_and_the_picture_follows_the_slider(served: Served, visit: Visit) -> None:
    visit.go(ui_url(port=served.port, page=served.run.page))
    charts = visit.page.locator(".js-plotly-plot").filter(has=visit.page.locator(".scatterlayer .point"))
    charts.nth(len(LABELS)).wait_for(timeout=PATIENCE_MS)
    for title in ("loss", *(f"dice_{label}" for label in LABELS)):
        visit.see(title)
    for chart in charts.all():
        assert chart.locator(".scatterlayer .point").count() == EPOCHS
        line = chart.locator(".scatterlayer path.js-line").first.bounding_box()
        assert line is not None
        assert min(line["width"], line["height"]) > 40
    visit.see("validation/case 1")
    picture = visit.page.locator("img[src*='validation~case']").first
    early = orange_share(picture)
    slider = visit.page.get_by_role("slider").first
    for _ in range(3):
        slider.press("ArrowRight")
    visit.page.locator("img[src*='step%2B15%2B']").first.wait_for(timeout=PATIENCE_MS)
    visit.keep("curves")
    assert 0 < early < orange_share(picture)
    assert visit.strangers() == set()


def orange_share(picture: Any) -> float:
    picture.wait_for(timeout=PATIENCE_MS)
    shown = np.asarray(Image.open(io.BytesIO(picture.screenshot())).convert("RGB")).astype(int)
    return float((np.abs(shown - ORANGE).max(axis=-1) < 30).mean())


def test_the_package_is_in_the_registry_with_its_alias(served: Served, visit: Visit) -> None:
    visit.go(ui_url(port=served.port, page="models/phantoms-residual_unet"))
    visit.see("Version 1")
    visit.see("champion")
    visit.see("Mean Dice 0.87")
    visit.see("hilum segment SCAN --package models:/phantoms-residual_unet@ALIAS")
    visit.keep("model")
    visit.go(ui_url(port=served.port, page=served.run.page.replace("model-metrics", "artifacts")))
    visit.page.get_by_text("plan.yaml").first.click()
    visit.see("spacing_mm")
    visit.keep("artifacts")
    assert visit.strangers() == set()


def test_the_page_of_a_case_opens_inside_the_artifacts_tab(served: Served, visit: Visit) -> None:
    where = served.run.page.replace("model-metrics", "artifacts/report/worst.html")
    visit.go(ui_url(port=served.port, page=where))
    frame = visit.page.frame_locator("iframe")
    frame.get_by_role("heading", name="3fa2c1d4e5b6").wait_for(timeout=PATIENCE_MS)
    frame.locator("body[data-viewer=ready]").wait_for(state="attached", timeout=PATIENCE_MS)
    assert frame.get_by_text("the worst of three").first.is_visible()
    visit.keep("case")
    assert visit.strangers() == set()


def test_the_server_asks_for_nothing_beyond_this_machine_and_sends_nobody_word(served: Served) -> None:
    told = served.asked.read_text().splitlines()
    assert told.count("watched") >= 2, "both processes are watched"
    near = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "/", "None")
    assert [line for line in told if line != "watched" and not any(place in line for place in near)] == []
    for pid in family(served.pid)[1:]:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert b"MLFLOW_DISABLE_TELEMETRY=true" in environment


def test_the_server_takes_less_than_600_megabytes(served: Served) -> None:
    """What both have of one library counts once: Pss shares it out among those who have it."""
    held = [Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() for pid in family(served.pid)]
    kilobytes = [int(line.split()[1]) for rollup in held for line in rollup if line.startswith("Pss:")]
    assert len(kilobytes) == 2 and sum(kilobytes) < 600 * 1000


def family(pid: int) -> list[int]:
    """A process and its children."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    pairs = [line.split() for line in listed.splitlines()[1:]]
    return [pid, *(int(child) for child, parent in pairs if parent == str(pid))]


def test_the_server_is_two_processes_and_hides_the_store_from_the_list_of_processes(served: Served) -> None:
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    processes = [line.split(None, 2) for line in listed.splitlines()[1:]]
    children = [(pid, words) for pid, parent, words in processes if parent == str(served.pid)]
    assert len(children) == 1
    assert "mlflow.db" not in children[0][1]
    assert not [pid for pid, parent, _ in processes if parent == children[0][0]]
