"""One page and two tables over a night's work: every case in them, the failed ones on top, nothing in them runs."""

import csv
import importlib.util
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pipeline.index import Row, counts, write_index
from pipeline.report import Report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None


def report(
    case_id: str,
    volumes_ml: dict[str, float],
    warnings: tuple[str, ...] = (),
    confidence: dict[str, float] | None = None,
    explanations: dict[str, str] | None = None,
) -> Report:
    return Report(
        case_id=case_id,
        package_id="ab" * 32,
        package_name="demo",
        hilum_version="1",
        input_sha256="",
        sources=(),
        reader="",
        repairs=(),
        grid={},
        volumes_ml=volumes_ml,
        warnings=warnings,
        seconds={},
        files=("labels.nii.gz", "overlay.png", "page.html"),
        outputs=("labels", "overlay", "page"),
        confidence=confidence or {},
        explanations=explanations or {},
    )


FIRST = report(
    "first",
    {"liver": 1180.42, "lesion": 0.05},
    confidence={"liver": 0.98, "lesion": 0.412},
    explanations={"liver": "passed", "lesion-1": "failed: no better than chance"},
)


def rows() -> list[Row]:
    return [
        Row(case_id="first", status="done", report=FIRST, seconds=3.25),
        Row(
            case_id="second case #2",
            status="skipped as complete",
            report=report("second case #2", {"liver": 90.0, "lesion": 12.0}, ("look, again", "twice"), {"liver": 0.93}),
        ),
        Row(
            case_id="third",
            status="failed",
            error={
                "met": "third.nii ends early.",
                "needed": "4096 bytes are needed.",
                "do": "Copy it again.",
                "verdict": "refused",
                "reason": "damaged",
            },
            seconds=0.5,
        ),
    ]


def test_the_table_has_one_row_per_case_and_columns_that_do_not_move(tmp_path: Path) -> None:
    write_index(tmp_path, rows(), labels=("liver", "lesion"))
    content = (tmp_path / "summary.csv").read_text(encoding="utf-8")
    header, *lines = csv.reader(io.StringIO(content))
    assert header == [
        "case", "status", "verdict", "reason", "liver ml", "lesion ml", "confidence", "least sure of", "warnings",
        "failed maps", "repairs", "seconds", "message",
    ]  # fmt: skip
    failed = "map of lesion-1 failed: no better than chance"
    assert lines[0] == [
        "first",
        "done",
        "fine",
        "",
        "1180.4200",
        "0.0500",
        "0.4120",
        "lesion",
        "",
        failed,
        "",
        "3.25",
        "",
    ]
    assert lines[1][6:9] == ["0.9300", "liver", "look, again | twice"]
    assert lines[2] == [
        "third",
        "failed",
        "refused",
        "damaged",
        "",
        "",
        "",
        "",
        "",
        "",
        "",
        "0.50",
        "third.nii ends early. 4096 bytes are needed. Copy it again.",
    ]
    write_index(tmp_path, rows()[2:], labels=("liver", "lesion"))
    assert (tmp_path / "summary.csv").read_text(encoding="utf-8").splitlines()[0] == ",".join(header)


def test_a_cell_that_looks_like_a_formula_stays_text(tmp_path: Path) -> None:
    row = Row(case_id="=cmd|' /C calc'!A0", status="failed", error={"message": "@SUM(1)\nover two lines"})
    write_index(tmp_path, [row])
    _, line = csv.reader(io.StringIO((tmp_path / "summary.csv").read_text(encoding="utf-8")))
    assert line[0] == "'=cmd|' /C calc'!A0" and line[-1] == "'@SUM(1) over two lines"


def test_the_summary_says_everything_and_counts(tmp_path: Path) -> None:
    written = write_index(tmp_path, rows(), left_alone={"notes.txt": "no scan"}, package_name="demo")
    said = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert said["counts"] == {"done": 1, "failed": 1, "skipped as complete": 1} == counts(rows())
    assert [case["case"] for case in said["cases"]] == ["first", "second case #2", "third"]
    assert said["cases"][0]["volumes_ml"] == {"liver": 1180.42, "lesion": 0.05}
    assert said["cases"][2]["error"]["do"] == "Copy it again."
    assert [case["verdict"] for case in said["cases"]] == ["fine", "fine", "refused"]
    assert said["left_alone"] == {"notes.txt": "no scan"}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)


class Markup(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_has_failures_first_and_points_at_pictures_beside_it(tmp_path: Path) -> None:
    write_index(tmp_path, rows(), left_alone={"notes.txt": "no scan"}, package_name="demo")
    content = (tmp_path / "index.html").read_text(encoding="utf-8")
    markup = Markup(content)
    assert content.index("third.nii ends early.") < content.index(">first<") < content.index("second case #2")
    pictures = [attributes["src"] for tag, attributes in markup.tags if tag == "img"]
    assert pictures == ["first/overlay.png", "second%20case%20%232/overlay.png"]
    pages = [attributes["href"] for tag, attributes in markup.tags if tag == "a" and "page.html" in str(attributes)]
    assert pages == ["first/page.html", "second%20case%20%232/page.html"]
    assert "map of lesion-1 failed: no better than chance" in markup.words and "0.41" in markup.words
    for words in ("3 cases, demo", "1180", "0.0500", "notes.txt", "no scan", "look, again", "not for diagnosis"):
        assert words in markup.words
    assert "http://" not in content and "https://" not in content and "unsafe" not in content


def test_no_name_and_no_message_becomes_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"><img src=x onerror='alert(1)'>"
    bad = [
        Row(case_id=evil, status=evil, report=report(evil, {evil: 1.0}, (evil,))),
        Row(case_id="b", status="failed", error={"met": evil, "needed": evil, "do": evil}),
    ]
    write_index(tmp_path, bad, left_alone={evil: evil}, package_name=evil)
    tags = Markup((tmp_path / "index.html").read_text(encoding="utf-8")).tags
    assert [tag for tag, _ in tags].count("script") == 1 and [tag for tag, _ in tags].count("img") == 1
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]


def test_a_run_without_cases_still_has_its_page(tmp_path: Path) -> None:
    write_index(tmp_path, [])
    assert "0 cases" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)")
@pytest.mark.skipif(not HAS_PLAYWRIGHT, reason="playwright is not installed (pip install playwright)")
def test_a_heading_sorts_and_pictures_show_in_a_browser(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    write_index(tmp_path, rows())
    for case in ("first", "second case #2"):
        (tmp_path / case).mkdir()
        Image.new("RGB", (40, 30), "red").save(tmp_path / case / "overlay.png")
    complaints: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.goto((tmp_path / "index.html").as_uri())

        def cases() -> list[str]:
            return page.locator("td.case").all_inner_texts()

        assert cases()[0] == "third"
        page.get_by_role("button", name="liver ml").click()
        assert cases() == ["second case #2", "first", "third"]
        page.get_by_role("button", name="liver ml").click()
        assert cases() == ["first", "second case #2", "third"]
        page.get_by_role("button", name="confidence").click()
        page.get_by_role("button", name="confidence").click()
        assert cases() == ["second case #2", "first", "third"]
        page.get_by_role("button", name="confidence").click()
        assert cases() == ["first", "second case #2", "third"]
        page.get_by_role("button", name="case", exact=True).click()
        assert cases() == ["first", "second case #2", "third"]
        widths = page.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
        browser.close()
    assert widths == [40, 40] and complaints == []
