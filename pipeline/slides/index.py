"""The morning's view of a night's slides: index.html, summary.csv and summary.json over all slides of a folder."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .. import index
from ..outputs._html import document, text
from ..report import as_json, hilum_version, inert, write_whole
from ..results import FAILED, Row, counts
from . import deletion, page, picture
from .report import SlideReport
from .result import probability


def write_index(
    folder: Path,
    rows: Sequence[Row[SlideReport]],
    *,
    left_alone: Mapping[str, str],
    classes: Sequence[str],
    package_name: str,
) -> None:
    """Writes all three, each in one piece: read at any moment, they are whole."""
    written = {
        "summary.csv": _csv(rows, classes),
        "summary.json": as_json(_summary(rows, dict(left_alone), package_name)),
        "index.html": _page(rows, classes, dict(left_alone), package_name),
    }
    for name, content in written.items():
        write_whole(folder / name, content)


LAST = ("tiles", "left out", "deletion test", "warnings", "seconds", "message")
"""The columns behind the probabilities."""


def _csv(rows: Sequence[Row[SlideReport]], classes: Sequence[str]) -> str:
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    names = (inert(f"probability of {name}") for name in classes)
    table.writerow(["slide", "status", "reason", "predicted", *names, *LAST])
    for row in rows:
        table.writerow([inert(row.case_id), row.status, (row.error or {}).get("reason", ""), *_cells(row, classes)])
    return buffer.getvalue()


def _cells(row: Row[SlideReport], classes: Sequence[str]) -> list[Any]:
    said = row.report
    if said is None:
        return ["", *("" for _ in classes), "", "", "", "", f"{row.seconds:.2f}", inert(row.message)]
    # of a slide that another package answered, in an earlier run, other classes
    likely = (f"{said.probabilities[name]:.4f}" if name in said.probabilities else "" for name in classes)
    gone, warned = sum(said.quarantined.values()), inert(" | ".join(said.warnings))
    return [inert(said.predicted), *likely, said.tiles, gone, said.deletion.verdict, warned, f"{row.seconds:.2f}", ""]


def _summary(rows: Sequence[Row[SlideReport]], left_alone: dict[str, str], package_name: str) -> dict[str, Any]:
    return {
        "hilum_version": hilum_version(),
        "package_name": package_name,
        "counts": counts(rows),
        "slides": [_record(row) for row in rows],
        "left_alone": left_alone,
    }


def _record(row: Row[SlideReport]) -> dict[str, Any]:
    said = row.report
    whole = {"slide": row.case_id, "status": row.status, "seconds": round(float(row.seconds), 3), "error": row.error}
    if said is None:
        return whole
    return whole | {
        "predicted": said.predicted,
        "probabilities": said.probabilities,
        "tiles": said.tiles,
        "quarantined": said.quarantined,
        "deletion_test": said.deletion_verdict,
        "warnings": list(said.warnings),
        "features": said.features,
        "files": list(said.files),
    }


def _page(
    rows: Sequence[Row[SlideReport]], classes: Sequence[str], left_alone: dict[str, str], package_name: str
) -> str:
    failed_first = sorted(rows, key=lambda row: row.status != FAILED)
    title = f"{len(rows)} slide{'' if len(rows) == 1 else 's'}, {package_name}"
    body = "\n".join(
        [
            f"<h1>{text(title)}</h1>",
            '<p class="quiet">probabilities are calibrated · for research, not for diagnosis · '
            '<a href="summary.csv">summary.csv</a> · <a href="summary.json">summary.json</a></p>',
            index.counted(rows, left_alone),
            f'<div class="wide"><table>{_head(classes)}<tbody>'
            f"{''.join(_row(row, classes) for row in failed_first)}</tbody></table></div>",
            index.left_alone_table(left_alone),
            f"<footer>hilum {text(hilum_version())} · for research, not for diagnosis</footer>",
        ]
    )
    # pictures lie beside the page; 'self' alone is not enough for a page opened as a file
    return document(title, body, style=index.STYLE, script=index.SCRIPT, pictures="'self' file:")


def _head(classes: Sequence[str]) -> str:
    plain = "".join(f"<th><button>{word}</button></th>" for word in ("slide", "status", "predicted"))
    numbers = "".join(
        f'<th class="number" data-number="1"><button>{text(word)}</button></th>'
        for word in (*classes, "tiles", "seconds")
    )
    words = "<th><button>deletion test</button></th><th><button>reasons and warnings</button></th>"
    return f"<thead><tr><th>picture</th>{plain}{numbers}{words}</tr></thead>"


def _row(row: Row[SlideReport], classes: Sequence[str]) -> str:
    said, home = row.report, quote(row.case_id)
    target = f"{home}/error.json" if said is None else f"{home}/{page.FILE_NAME}"
    likely = [said.probabilities.get(name) if said else None for name in classes]
    cells = [
        f"<td>{_thumbnail(row, home)}</td>",
        f'<td class="case" data-key="{text(row.case_id)}"><a href="{target}">{text(row.case_id)}</a></td>',
        f"<td>{text(row.status)}</td>",
        f"<td><b>{text(said.predicted if said else '')}</b></td>",
        *(_number(value, probability(value) if value is not None else "") for value in likely),
        _number(said.tiles if said else None, f"{said.tiles:,}" if said else ""),
        _number(row.seconds, f"{row.seconds:.1f}"),
        f"<td>{_tested(said)}</td>",
        f'<td class="reason">{_reason(row)}</td>',
    ]
    return f'<tr class="{"failed" if row.status == FAILED else "fine"}">{"".join(cells)}</tr>'


def _thumbnail(row: Row[SlideReport], home: str) -> str:
    if row.report is None:
        return ""
    shown = f"{home}/{picture.PICTURE}"
    return f'<a href="{shown}"><img src="{shown}" loading="lazy" alt="heatmap of {text(row.case_id)}"></a>'


def _number(value: float | None, words: str) -> str:
    return f'<td class="number" data-key="{"" if value is None else float(value)}">{words}</td>'


def _tested(said: SlideReport | None) -> str:
    if said is None:
        return ""
    verdict = said.deletion.verdict
    return f'<span class="doubtful">{verdict}</span>' if verdict != deletion.PASSED else verdict


def _reason(row: Row[SlideReport]) -> str:
    if row.error:
        code = f"<b>{text(row.error['reason'])}</b><br>" if row.error.get("reason") else ""
        return code + text(row.message)
    return "<br>".join(map(text, row.report.warnings)) if row.report else ""
