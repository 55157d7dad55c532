"""The pages in headless Chromium, over a whole node: dcmtk's storescu as the scanner, its storescp as the archives."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydicom
import pytest
import yaml

from pipeline.node.access import hashed
from pipeline.package import ModelPackage

from .hospital import Process, network_of_its_own
from .scanner import an_mr_study
from .test_service import metrics, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_MS = 60_000
PAGE = "http://127.0.0.1:18080"
PEERS = {"archive": 11401, "workstation": 11402}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="playwright is not installed (pip install playwright)"
    ),
    pytest.mark.skipif(shutil.which("storescp") is None, reason="dcmtk is not installed (apt install dcmtk)"),
]


@pytest.fixture(scope="module", autouse=True)
def network() -> Iterator[None]:
    """storescp listens on every address it has: so there is only loopback."""
    with network_of_its_own():
        yield


@dataclass
class Target:
    """dcmtk's storescp, which may be away."""

    name: str
    folder: Path
    process: subprocess.Popen | None = None

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        words = ["storescp", "--aetitle", self.name.upper(), "-od", str(self.folder), str(PEERS[self.name])]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop(self) -> None:
        if self.process:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def kinds(self) -> list[str]:
        return sorted(pydicom.dcmread(path, stop_before_pixels=True).Modality for path in self.folder.iterdir())


@dataclass
class Hospital:
    """A node whose archive is away, a workstation that is there, and a scanner."""

    node: Process
    archive: Target
    workstation: Target

    def send(self, study: Path) -> None:
        words = ["storescu", "-aet", "STORESCU", "-aec", "HILUM", "+sd", "127.0.0.1", "11112", str(study)]
        assert subprocess.run(words, capture_output=True).returncode == 0

    def wait(self, words: str, seconds: float = 120) -> None:
        until(lambda: re.search(words, metrics()), self.node, seconds)


@pytest.fixture(scope="module")
def hospital(
    tiny: Path, make_package: Callable[..., ModelPackage], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Hospital]:
    home = tmp_path_factory.mktemp("hospital")
    said = {
        "state": str(home / "state"),
        "receiving": {"aet": "HILUM", "port": 11112, "reserve_gb": 0.01},
        "peers": {
            "scanner": {"aet": "STORESCU"},
            **{name: {"aet": name.upper(), "host": "127.0.0.1", "port": port} for name, port in PEERS.items()},
        },
        "waiting": {"quiet_s": 0.5, "settled_s": 0.3, "cap_s": 60},
        "working": {"first_pause_s": 0.1, "attempts": 2, "target_attempts": 2},
        "routes": {"brain": {
            "package": str(tiny), "before": str(make_package(home / "before", fold=1).folder),
            "take": {"mr": {"modality": ["MR"]}}, "targets": ["archive"], "proof": "none",
            "outputs": ["dicom_seg", "secondary_capture", "overlay", "page"],
            "output_options": {"dicom_seg": {"kind": "binary"}},
        }},
        "showing": {"port": 18080, "users": {
            "ann": {"role": "operator", "password": hashed("right horse")}, "bob": {"password": hashed("battery")},
        }},
    }  # fmt: skip
    config = home / "node.yaml"
    config.write_text(yaml.safe_dump(said))
    node = Process(config)
    targets = {name: Target(name, home / name) for name in PEERS}
    targets["workstation"].start()
    node.start()
    try:
        until(metrics, node)
        yield Hospital(node=node, **targets)
    finally:
        node.stop()
        for one in targets.values():
            one.stop()


@dataclass
class Seen:
    """A browser's page, and what went wrong in it."""

    page: Any
    strange: list[str] = field(default_factory=list)

    def log_in(self, name: str, password: str) -> None:
        self.page.goto(PAGE)
        self.page.fill("[name=name]", name)
        self.page.fill("[name=password]", password)
        self.page.click("button")

    def has(self, words: str) -> None:
        self.page.get_by_text(words).first.wait_for(timeout=PATIENCE_MS)


@contextmanager
def browser(width: int = 1280, scheme: str = "light") -> Iterator[Seen]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"]
        )
        context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
        seen = Seen(context.new_page())
        seen.page.set_default_timeout(PATIENCE_MS)
        seen.page.on("pageerror", lambda error: seen.strange.append(str(error)))
        seen.page.on("console", lambda said: seen.strange.append(said.text) if said.type == "error" else None)
        seen.page.on("request", lambda one: None if one.url.startswith(PAGE) else seen.strange.append(one.url))
        yield seen
        chromium.close()


def test_a_study_that_died_is_found_read_sent_elsewhere_and_begun_anew(hospital: Hospital, tmp_path: Path) -> None:
    study = an_mr_study(tmp_path / "study")
    uid = str(pydicom.dcmread(next(study.iterdir()), stop_before_pixels=True).StudyInstanceUID)
    hospital.send(study)
    hospital.wait(r'hilum_stories\{state="dead",code="target_away"\} 1')
    with browser() as seen:
        page = seen.page
        seen.log_in("ann", "wrong horse")
        seen.has("No user has that name and password.")
        assert seen.strange.pop().endswith("403 (Forbidden)") and not seen.strange
        seen.log_in("ann", "right horse")
        page.fill("[name=uid]", uid)
        page.click("text=Find")
        page.click("table a")  # of its only story
        seen.has("archive cannot be reached")
        assert page.locator(".case img").evaluate("one => one.decode().then(() => one.naturalWidth)") > 100
        page.select_option("select[name=target]", "workstation")
        page.click("button:text('Send')")
        page.locator("h1 .state.done").wait_for()  # nobody reloads: what changed comes by itself
        assert hospital.workstation.kinds() == ["OT", "SEG"] and not hospital.archive.folder.exists()
        hospital.archive.start()
        page.click("text=Begin anew")
        page.locator("h1 .state.done").wait_for()
        page.locator("tr:has-text('archive') >> text=2").first.wait_for()
        assert hospital.archive.kinds() == ["OT", "SEG"]
        seen.has("begin anew")
        page.click("text=Leaf through it")
        assert page.evaluate("origin") == "null", "in its sandbox it is no part of this site"
        page.go_back()
        with page.expect_download() as loading:
            page.click("text=overlay.dcm")
        assert pydicom.dcmread(loading.value.path(), stop_before_pixels=True).StudyInstanceUID == uid
        assert not seen.strange
        assert uid not in hospital.node.log.read_text()


def test_a_viewer_sees_and_cannot_act(hospital: Hospital, tmp_path: Path) -> None:
    hospital.archive.stop()
    hospital.archive.start()
    hospital.send(an_mr_study(tmp_path / "study", seed=3))
    hospital.wait(r'state="done",code=""\} [1-9]')
    with browser(390, "dark") as seen:
        page = seen.page
        seen.log_in("bob", "battery")
        page.click("table a >> nth=0")
        seen.has("The way so far")
        assert page.locator("main form").count() == 1, "there is nothing to press but Log out"
        story = page.evaluate("location.pathname")
        for act in ("retry", "reroute", "give_up"):
            said = page.evaluate(
                "([place, act]) => fetch(`${place}/${act}`, {method: 'POST'}).then(a => a.status)", [story, act]
            )
            assert said == 403, act
        seen.strange.clear()  # those three
        for place in ("/", story, "/peers", "/node"):
            page.goto(PAGE + place)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{place} is wider than a phone"
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert sum(map(int, re.findall(r"\d+", colour)[:3])) < 100, "dark where a person wants it dark"
        page.goto(PAGE)
        page.context.set_offline(True)
        page.get_by_text("does not answer").wait_for()
        page.context.set_offline(False)
        page.get_by_text("does not answer").wait_for(state="hidden")
        page.goto(f"{PAGE}/audit")
        seen.has("this is for operators")
        page.click("text=Log out")
        assert page.url == f"{PAGE}/login"
        page.goto(PAGE + story)
        assert page.url == f"{PAGE}/login", "nothing is seen after that"


@pytest.mark.skipif(not os.environ.get("HILUM_LONG"), reason="takes more than a minute; HILUM_LONG=1 runs it")
def test_a_held_study_waits_while_others_go_by_and_goes_on_when_it_may(hospital: Hospital, tmp_path: Path) -> None:
    with browser() as seen:
        page = seen.page
        seen.log_in("ann", "right horse")
        page.wait_for_url(f"{PAGE}/")
        for seed in range(11, 19):  # the last of them waits for seconds: a person has time to press a button
            hospital.send(an_mr_study(tmp_path / f"study-{seed}", seed=seed))
        page.goto(f"{PAGE}/?group=queued")
        page.locator(".state.queued").first.wait_for()
        page.click("table a >> nth=0")
        held = page.evaluate("location.href")
        page.click("text=Hold")
        page.locator("h1 .state.held").wait_for()
        hospital.wait("hilum_queue_depth 1\n")
        assert page.locator("h1 .state.held").count() == 1, "others went by"
        page.evaluate("scrollTo(0, 80)")
        page.click("text=Go on")
        page.locator("h1 .state.done").wait_for()
        assert page.evaluate("location.href") == held and "held" in page.inner_text("main")
        assert not seen.strange


def test_an_operator_calls_a_peer_rolls_a_package_back_and_has_the_trail_read(hospital: Hospital) -> None:
    with browser() as seen:
        page = seen.page
        seen.log_in("ann", "right horse")
        page.click("text=Peers")
        card = page.locator(".card:has-text('workstation')")
        card.get_by_text("Call it").click()
        seen.has("it answers")
        hospital.workstation.stop()
        card.get_by_text("Call it").click()
        seen.has("workstation cannot be reached")
        hospital.workstation.start()
        page.click("nav >> text=Node")
        now = page.locator(".card dd").first.inner_text()
        page.locator("summary").click()
        with page.expect_response(f"{PAGE}/node"):  # what is new is put in its place, and must not close what is open
            pass
        page.click("button:text('Roll back')")
        page.locator("summary:has-text('Roll forward')").wait_for()
        assert page.locator(".card dd").first.inner_text() != now and "by ann" in page.inner_text(".card")
        page.locator("summary").click()
        page.click("button:text('Roll forward')")
        page.locator("summary:has-text('Roll back')").wait_for()
        page.click("nav >> text=Audit")
        page.click("text=Check the whole trail")
        seen.has("lines are as they were written")
        told = page.inner_text("table")
        assert all(what in told for what in ("echo", "rollback", "login")) and not seen.strange
