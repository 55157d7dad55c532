"""A person opens the MLflow UI and finds the run, its curves, its pictures and its package."""

import importlib.util
import io
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from pipeline.tracking import Tracker, newest_page, open_run, ui_url

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None
REPOSITORY = Path(__file__).parents[2]
PATIENCE_MS = 60_000

pytestmark = [
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
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    store = tmp_path_factory.mktemp("a store")
    uri = f"sqlite:///{store}/mlflow.db"
    run = a_training(uri, store)
    port = free_port()
    code = f"import sys; from pipeline.tracking import serve; sys.exit(serve({uri!r}, port={port}))"
    with (store / "server.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=log, stderr=log)
    try:
        wait_until_healthy(port, server, store / "server.log")
        yield Served(pid=server.pid, port=port, run=run)
    finally:
        stop(server)


@pytest.fixture
def visit() -> Iterator[Visit]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=["--no-sandbox", "--disable-background-networking"]
        )
        page = browser.new_page(viewport={"width": 1500, "height": 1800})
        visit = Visit(page=page)
        page.on("request", lambda request: visit.asked.append(request.url))
        # MLflow's assistant pane would take a quarter of the page
        page.add_init_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
        yield visit
        browser.close()


def a_training(uri: str, folder: Path) -> Tracker:
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
    run.text("patch: [64, 64, 32]\nspacing_mm: [1, 1, 2]\n", "plan.yaml")
    package = folder / "package"
    package.mkdir()
    (package / "package.json").write_text('{"network": "residual_unet"}\n')
    (package / "card.md").write_text("# phantoms\n")
    run.register(package, "phantoms-residual_unet", ("champion",), note="Mean Dice 0.87 on fold 0 of phantoms.")
    run.finish("FINISHED")
    return run


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_healthy(port: int, server: subprocess.Popen, log: Path) -> None:
    for _ in range(900):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    pytest.fail(log.read_text())


def stop(server: subprocess.Popen) -> None:
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


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


def test_the_server_is_two_processes_and_hides_the_store_from_the_list_of_processes(served: Served) -> None:
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    processes = [line.split(None, 2) for line in listed.splitlines()[1:]]
    children = [(pid, words) for pid, parent, words in processes if parent == str(served.pid)]
    assert len(children) == 1
    assert "mlflow.db" not in children[0][1]
    assert not [pid for pid, parent, _ in processes if parent == children[0][0]]
