"""The morning's view of a night's work: index.html, summary.csv and summary.json over all cases of a folder."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .outputs._html import document, text
from .report import Report, as_json, hilum_version, inert, millilitres, write_whole
from .results import FAILED, Row, counts


def write_index(
    folder: Path,
    rows: Sequence[Row[Report]],
    *,
    left_alone: Mapping[str, str] | None = None,
    labels: Sequence[str] = (),
    package_name: str = "",
) -> list[Path]:
    """Writes all three, each in one piece: read at any moment, they are whole.

    `left_alone`: files that are no scans, and why. `labels`: the package's label names, so that the columns are the
    same even when no case has finished yet.
    """
    left_alone = dict(left_alone or {})
    names = _labels(rows, labels)
    written = {
        folder / "summary.csv": _csv(rows, names),
        folder / "summary.json": as_json(_summary(rows, left_alone, package_name)),
        folder / "index.html": _page(rows, names, left_alone, package_name),
    }
    for path, content in written.items():
        write_whole(path, content)
    return list(written)


def _labels(rows: Sequence[Row[Report]], labels: Sequence[str]) -> list[str]:
    names = dict.fromkeys(labels)
    for row in rows:
        names.update(dict.fromkeys(row.report.volumes_ml if row.report else ()))
    return list(names)


LAST = ("confidence", "least sure of", "warnings", "failed maps", "repairs", "seconds", "message")
"""The columns behind the millilitres."""


def _least_sure(row: Row[Report]) -> tuple[str, float] | None:
    """The label found with the least confidence; None where there is none, or nobody said."""
    sure = row.report.confidence if row.report else {}
    return min(sure.items(), key=lambda item: item[1], default=None)


def _failed_maps(row: Row[Report]) -> list[str]:
    """Maps of where the network looked that did not pass their tests, and why."""
    said = row.report.explanations if row.report else {}
    return [f"map of {name} {standing}" for name, standing in said.items() if standing.startswith("failed")]


def _verdict(row: Row[Report]) -> str:
    """Fine, repaired or refused; nothing where it was not the scan that failed."""
    return row.report.verdict if row.report else (row.error or {}).get("verdict", "")


def _csv(rows: Sequence[Row[Report]], labels: Sequence[str]) -> str:
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["case", "status", "verdict", "reason", *(inert(f"{label} ml") for label in labels), *LAST])
    for row in rows:
        volumes = row.report.volumes_ml if row.report else {}
        amounts = [f"{volumes[label]:.4f}" if label in volumes else "" for label in labels]
        label, least = _least_sure(row) or ("", None)
        warnings, repairs = (row.report.warnings, row.report.repairs) if row.report else ((), ())
        said = [inert(" | ".join(part)) for part in (warnings, _failed_maps(row), repairs)]
        sure = ("" if least is None else f"{least:.4f}", inert(label))
        last = (*sure, *said, f"{row.seconds:.2f}", inert(row.message))
        reason = (row.error or {}).get("reason", "")
        table.writerow([inert(row.case_id), row.status, _verdict(row), reason, *amounts, *last])
    return buffer.getvalue()


def _summary(rows: Sequence[Row[Report]], left_alone: dict[str, str], package_name: str) -> dict[str, Any]:
    return {
        "hilum_version": hilum_version(),
        "package_name": package_name,
        "counts": counts(rows),
        "cases": [
            {
                "case": row.case_id,
                "status": row.status,
                "verdict": _verdict(row),
                "repairs": list(row.report.repairs) if row.report else [],
                "notes": list(row.report.notes) if row.report else [],
                "volumes_ml": dict(row.report.volumes_ml) if row.report else None,
                "confidence": dict(row.report.confidence) if row.report else None,
                "warnings": list(row.report.warnings) if row.report else [],
                "explanations": dict(row.report.explanations) if row.report else {},
                "files": list(row.report.files) if row.report else [],
                "seconds": round(float(row.seconds), 3),
                "error": row.error,
            }
            for row in rows
        ],
        "left_alone": left_alone,
    }


STYLE = """
main { max-width: 1600px; }
.counts { display: flex; gap: 12px; flex-wrap: wrap; margin: 16px 0 24px; padding: 0; list-style: none; }
.counts li { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 8px 16px; }
.counts b { font-size: 22px; margin-right: 6px; }
.counts .failed { color: var(--bad); }
th button { all: unset; cursor: pointer; }
th button:hover, th button:focus-visible { color: var(--ink); text-decoration: underline; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
td img { width: 180px; height: 83px; max-width: none; object-fit: cover; object-position: top; }
tr.failed td { background: var(--bad-page); }
tr.failed .reason { color: var(--bad); }
.doubtful { color: var(--alarm); }
.reason { min-width: 240px; overflow-wrap: anywhere; }
.case { min-width: 140px; overflow-wrap: anywhere; font-weight: 600; }
"""

SCRIPT = """
for (const button of document.querySelectorAll('th button')) button.addEventListener('click', () => {
  const head = button.parentElement, body = head.closest('table').tBodies[0], column = head.cellIndex;
  const down = head.getAttribute('aria-sort') === 'ascending', way = down ? -1 : 1;
  for (const other of head.parentElement.cells) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const key = row => row.cells[column].dataset.key ?? row.cells[column].textContent;
  const order = (a, b) => a === '' || b === '' ? (a === '') - (b === '')
    : way * (head.dataset.number ? a - b : a.localeCompare(b, undefined, {numeric: true}));
  body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
});
"""


def _page(rows: Sequence[Row[Report]], labels: Sequence[str], left_alone: dict[str, str], package_name: str) -> str:
    failed_first = sorted(rows, key=lambda row: row.status != FAILED)
    title = f"{len(rows)} case{'' if len(rows) == 1 else 's'}" + (f", {package_name}" if package_name else "")
    body = "\n".join(
        [
            f"<h1>{text(title)}</h1>",
            '<p class="quiet">for research, not for diagnosis · <a href="summary.csv">summary.csv</a> · '
            '<a href="summary.json">summary.json</a></p>',
            counted(rows, left_alone),
            f'<div class="wide"><table>{_head(labels)}<tbody>'
            f"{''.join(_row(row, labels) for row in failed_first)}</tbody></table></div>",
            left_alone_table(left_alone),
            f"<footer>hilum {text(hilum_version())} · for research, not for diagnosis</footer>",
        ]
    )
    # pictures lie beside the page; 'self' alone is not enough for a page opened as a file
    return document(title, body, style=STYLE, script=SCRIPT, pictures="'self' file:")


def counted(rows: Sequence[Row], left_alone: dict[str, str]) -> str:
    found = counts(rows) | ({"left alone": len(left_alone)} if left_alone else {})
    items = (
        f'<li class="{_kind(status) if number else "none"}"><b>{number}</b>{text(status)}</li>'
        for status, number in found.items()
    )
    return f'<ul class="counts">{"".join(items)}</ul>'


def _kind(status: str) -> str:
    return "failed" if status == FAILED else "fine"


def _head(labels: Sequence[str]) -> str:
    plain = "".join(f"<th><button>{word}</button></th>" for word in ("case", "status", "scan", "reasons and warnings"))
    numbers = "".join(
        f'<th class="number" data-number="1"><button>{text(word)}</button></th>'
        for word in ("confidence", *(f"{label} ml" for label in labels), "seconds")
    )
    return f"<thead><tr><th>picture</th>{plain}{numbers}</tr></thead>"


def _row(row: Row[Report], labels: Sequence[str]) -> str:
    files = row.report.files if row.report else ()
    volumes = row.report.volumes_ml if row.report else {}
    home = quote(row.case_id)
    page = f"{home}/error.json" if row.status == FAILED else f"{home}/page.html" if "page.html" in files else f"{home}/"
    cells = [
        f"<td>{_thumbnail(row, home)}</td>",
        f'<td class="case" data-key="{text(row.case_id)}"><a href="{page}">{text(row.case_id)}</a></td>',
        f"<td>{text(row.status)}</td>",
        f"<td>{text(_verdict(row))}</td>",
        f'<td class="reason">{_reason(row)}</td>',
        _confidence(row),
        *(_number(volumes.get(label)) for label in labels),
        f'<td class="number" data-key="{float(row.seconds)}">{row.seconds:.1f}</td>',
    ]
    return f'<tr class="{_kind(row.status)}">{"".join(cells)}</tr>'


def _thumbnail(row: Row[Report], home: str) -> str:
    if row.report is None or "overlay.png" not in row.report.files:
        return ""
    picture = f"{home}/overlay.png"
    return f'<a href="{picture}"><img src="{picture}" loading="lazy" alt="overlay of {text(row.case_id)}"></a>'


def _confidence(row: Row[Report]) -> str:
    """Of the label that is least sure, and its name: a case is worth a look for the weakest thing in it."""
    found = _least_sure(row)
    if found is None:
        return '<td class="number" data-key=""></td>'
    label, least = found
    return (
        f'<td class="number" data-key="{float(least)}">{least:.2f}<br><small class="quiet">{text(label)}</small></td>'
    )


def _number(ml: float | None) -> str:
    if ml is None:
        return '<td class="number" data-key=""></td>'
    return f'<td class="number" data-key="{float(ml)}">{millilitres(ml).removesuffix(" ml")}</td>'


def _reason(row: Row[Report]) -> str:
    if row.error:
        parts = [row.error[part] for part in ("message", "met", "needed", "do") if row.error.get(part)]
        code = f"<b>{text(row.error['reason'])}</b><br>" if row.error.get("reason") else ""
        return code + "<br>".join(text(part) for part in parts)
    if row.report is None:
        return ""
    failed = [f'<span class="doubtful">{text(sentence)}</span>' for sentence in _failed_maps(row)]
    said = (*row.report.warnings, *(f"repaired: {repair}" for repair in row.report.repairs))
    return "<br>".join([*failed, *map(text, said)])


def left_alone_table(left_alone: dict[str, str]) -> str:
    if not left_alone:
        return ""
    rows = "".join(
        f'<tr><td class="word">{text(file)}</td><td>{text(reason)}</td></tr>' for file, reason in left_alone.items()
    )
    head = "<tr><th>file</th><th>why</th></tr>"
    return f'<h2>Left alone</h2><div class="wide"><table>{head}{rows}</table></div>'
