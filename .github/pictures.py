"""Makes the pictures of the README: pages and indices of a night's scans and slides, as a browser shows them.

    python .github/pictures.py NIGHT --case CASE [--out FOLDER]
    python .github/pictures.py NIGHT --slide SLIDE [--out FOLDER]

NIGHT is what `hilum segment ... --out NIGHT --outputs labels,overlay,saliency,measurements,page` left, or
`hilum slides classify ... --out NIGHT`.
"""

import argparse
import io
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
PATIENCE_MS = 120_000


def make(night: Path, case: str, shots: dict[str, Any], out: Path) -> None:
    """Every one of these pictures, into `out`."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for name, (width, height, scheme, path, act) in shots.items():
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.set_default_timeout(PATIENCE_MS)
            page.goto((night / path.format(case=case)).resolve().as_uri())
            act(page)
            keep(page.screenshot(), out / f"{name}.png")
            page.close()
        browser.close()


def keep(shot: bytes, path: Path) -> None:
    # 256 colours do for a page, at half the bytes; k-means keeps the few pixels of a colour bar smooth
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(256, kmeans=2, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def at_the_smallest(page: Page) -> None:
    """The viewer, led to the last finding of the table, where lesions stand, with the map it has or another one."""
    page.wait_for_selector("body[data-viewer=ready]", state="attached")
    page.locator("tr[data-mm]").last.click()
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(1000)


def at_the_tables(page: Page) -> None:
    at_the_smallest(page)
    page.evaluate("document.querySelector('h2').scrollIntoView()")


def least_sure_on_top(page: Page) -> None:
    page.get_by_role("button", name="confidence").click()
    page.wait_for_timeout(1000)


def at_the_slide(page: Page) -> None:
    page.wait_for_selector("body[data-viewer=ready]", state="attached")
    page.wait_for_timeout(2000)


def at_a_top_tile(page: Page) -> None:
    """With the tile's surroundings, and what it adds."""
    at_the_slide(page)
    page.locator("figure[data-tile]").first.click()
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(2000)


def at_the_top_tiles(page: Page) -> None:
    at_the_slide(page)
    page.evaluate("document.querySelector('h2').scrollIntoView()")


def with_pictures(page: Page) -> None:
    """They are loaded where they are seen."""
    for picture in page.locator("td img").all():
        picture.scroll_into_view_if_needed()
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(1000)


SHOTS: dict[str, tuple[int, int, Any, str, Any]] = {
    "page": (1240, 800, "light", "{case}/page.html", at_the_smallest),
    "page-dark": (1240, 800, "dark", "{case}/page.html", at_the_smallest),
    "page-phone": (390, 844, "dark", "{case}/page.html", at_the_smallest),
    "page-tables": (1320, 880, "light", "{case}/page.html", at_the_tables),
    "index": (1320, 760, "light", "index.html", least_sure_on_top),
    "index-dark": (1320, 760, "dark", "index.html", least_sure_on_top),
}
"""Width, height, colours, the page, and what is done on it."""

SLIDE_SHOTS: dict[str, tuple[int, int, Any, str, Any]] = {
    "slide": (1240, 820, "light", "{case}/page.html", at_the_slide),
    "slide-tile": (1240, 820, "light", "{case}/page.html", at_a_top_tile),
    "slide-dark": (1240, 820, "dark", "{case}/page.html", at_the_slide),
    "slide-phone": (390, 844, "dark", "{case}/page.html", at_the_slide),
    "slide-tables": (1240, 880, "light", "{case}/page.html", at_the_top_tiles),
    "slides": (1320, 820, "light", "index.html", with_pictures),
}
"""The same of slides."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("night", type=Path)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--case", help="The patient whose page is shown.")
    which.add_argument("--slide", help="The slide whose page is shown.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    said = parser.parse_args()
    said.out.mkdir(parents=True, exist_ok=True)
    make(said.night, said.case or said.slide, SHOTS if said.case else SLIDE_SHOTS, said.out)


if __name__ == "__main__":
    main()
