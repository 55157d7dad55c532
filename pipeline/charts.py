"""Charts as SVG inside a page: every case a dot, every label a row, with its quartiles. No script, no picture file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .outputs._html import text

STYLE = """
svg.chart { width: 100%; height: auto; display: block; background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
.chart text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.chart .tick { fill: var(--quiet); }
.chart .grid { stroke: var(--line); }
.chart .zero { stroke: var(--quiet); }
.chart .box { fill: var(--link); fill-opacity: .16; stroke: var(--link); }
.chart .median { stroke: var(--link); stroke-width: 3; }
.chart .whisker { stroke: var(--link); }
.chart .dot { fill: var(--ink); fill-opacity: .45; }
.chart .dot:hover { fill: var(--bad); fill-opacity: 1; }
.chart .mean { fill: var(--link); }
.chart polyline { fill: none; stroke-width: 2; } .chart .ideal { stroke-dasharray: 4 4; }
.chart .before { stroke: var(--quiet); fill: var(--quiet); } .chart .after { stroke: var(--link); fill: var(--link); }
.chart .sure { stroke: var(--link); stroke-width: 2; }
"""

WIDTH, LEFT, RIGHT, ROW, HEAD = 640, 150, 22, 34, 34
MOST_DOTS = 4000
"""More make a page slow; then only those outside the whiskers are drawn."""


ALIKE = 1e-6
"""Values that lie no further apart are drawn as one: their ticks would read the same."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What is drawn along, from left to right."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Pixels from the left."""
        share = (value - self.low) / (self.high - self.low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)


def axis(values: Sequence[float], *, low: float | None = None, high: float | None = None) -> Axis:
    """Round numbers around the values; an end that is given stays."""
    first = low if low is not None else min(values, default=0.0)
    last = high if high is not None else max(values, default=1.0)
    if last - first < ALIKE:
        first, last = (first - 0.1 if low is None else first), (last + 0.1 if high is None else last)
        first = first - 0.1 if last - first < ALIKE else first
    step = _step((last - first) / 5)
    ticks = np.arange(np.floor(first / step + 1e-9), np.ceil(last / step - 1e-9) + 1) * step
    return Axis(low=float(ticks[0]), high=float(ticks[-1]), ticks=tuple(round(float(tick), 9) for tick in ticks))


def _step(rough: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50 ..."""
    power = 10.0 ** np.floor(np.log10(rough))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9)))


def strips(rows: Mapping[str, Mapping[str, float]], along: Axis, what: str) -> str:
    """A row for each label (label -> case -> value): a dot for each case, quartiles as a box, whiskers to 1.5 of its length."""
    height = HEAD + ROW * len(rows) + 8
    all_dots = sum(map(len, rows.values())) <= MOST_DOTS
    drawn = [_grid(along, height)]
    for number, (label, values) in enumerate(rows.items()):
        drawn.append(_row(label, values, along, HEAD + ROW * number + ROW / 2, all_dots))
    return _svg(drawn, height, f"{what}: {len(rows)} label(s), a dot for each case")


def whiskers(rows: Mapping[str, tuple[float, tuple[float, float] | None]], along: Axis, what: str) -> str:
    """A row for each name: a mean and the interval it lies in."""
    height = HEAD + ROW * len(rows) + 8
    drawn = [_grid(along, height)]
    for number, (name, (mean, interval)) in enumerate(rows.items()):
        y = HEAD + ROW * number + ROW / 2
        drawn.append(_name(name, y))
        if interval:
            ends = " ".join(f'x{n}="{along.at(end):.1f}"' for n, end in zip((1, 2), interval, strict=True))
            drawn.append(f'<line class="sure" {ends} y1="{y:.1f}" y2="{y:.1f}"/>')
        told = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
        drawn.append(
            f'<circle class="mean" cx="{along.at(mean):.1f}" cy="{y:.1f}" r="5">'
            f"<title>{text(name)}: {mean:.4f}{told}</title></circle>"
        )
    return _svg(drawn, height, what)


SQUARE = 300
CURVES = ("curve before", "curve after")


def reliability(curves: Mapping[str, Sequence[tuple[float, float]]], what: str) -> str:
    """How often right against how sure, both from 0 to 1: a calibrated network lies on the diagonal."""
    left, top = 48, 28
    beside = left + SQUARE + 36

    def place(sure: float, is_right: float) -> str:
        return f"{left + SQUARE * sure:.1f},{top + SQUARE * (1 - is_right):.1f}"

    drawn = [f'<polyline class="zero ideal" points="{place(0, 0)} {place(1, 1)}"/>']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        across, up = place(tick, 0).split(","), place(0, tick).split(",")
        drawn.append(f'<line class="grid" x1="{up[0]}" x2="{left + SQUARE}" y1="{up[1]}" y2="{up[1]}"/>')
        drawn.append(f'<text class="tick" x="{across[0]}" y="{top + SQUARE + 18}" text-anchor="middle">{tick:g}</text>')
        drawn.append(f'<text class="tick" x="{left - 8}" y="{float(up[1]) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for kind, (name, points), number in zip(CURVES, curves.items(), range(2), strict=False):
        line = " ".join(place(*point) for point in points)
        dots = "".join(
            f'<circle cx="{place(*point).split(",")[0]}" cy="{place(*point).split(",")[1]}" r="3">'
            f"<title>{point[0]:.3f} sure, {point[1]:.3f} right</title></circle>"
            for point in points
        )
        y = top + 40 + 26 * number
        key = f'<line x1="{beside}" x2="{beside + 24}" y1="{y}" y2="{y}" stroke-width="2"/>'
        drawn.append(f'<g class="{kind}"><polyline points="{line}"/>{dots}{key}</g>')
        drawn.append(f'<text x="{beside + 32}" y="{y + 4}">{text(name)}</text>')
    middle = left + SQUARE / 2
    drawn.append(f'<text class="tick" x="{middle:.0f}" y="{top + SQUARE + 36}" text-anchor="middle">how sure</text>')
    drawn.append(f'<text class="tick" x="{left}" y="{top - 12}">share that is right</text>')
    return _svg(drawn, top + SQUARE + 46, what)


def _svg(drawn: Sequence[str], height: float, what: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{text(what)}">'
        f"{''.join(drawn)}</svg>"
    )


def _grid(along: Axis, height: float) -> str:
    lines = []
    for tick in along.ticks:
        x, kind = along.at(tick), "zero" if tick == 0 and along.low < 0 else "grid"
        lines.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD - 8}" y2="{height - 6:.0f}"/>')
        lines.append(f'<text class="tick" x="{x:.1f}" y="18" text-anchor="middle">{tick:g}</text>')
    return "".join(lines)


def _name(name: str, y: float) -> str:
    short = name if len(name) <= 21 else f"{name[:19]}…"
    return f'<text x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{text(short)}<title>{text(name)}</title></text>'


def _row(label: str, values: Mapping[str, float], along: Axis, y: float, all_dots: bool) -> str:
    drawn = [_name(label, y)]
    if not values:
        return drawn[0]
    numbers = np.array(list(values.values()))
    low, median, high = np.percentile(numbers, [25, 50, 75])
    reach = 1.5 * (high - low)
    ends = numbers[(numbers >= low - reach) & (numbers <= high + reach)]
    left, right = along.at(float(ends.min())), along.at(float(ends.max()))
    box = along.at(float(low)), along.at(float(high))
    drawn += [
        f'<line class="whisker" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<rect class="box" x="{box[0]:.1f}" y="{y - 10:.1f}" width="{max(box[1] - box[0], 1):.1f}" height="20" rx="2"/>',
        f'<line class="median" x1="{along.at(float(median)):.1f}" x2="{along.at(float(median)):.1f}" y1="{y - 10:.1f}" y2="{y + 10:.1f}"/>',
    ]
    for number, (case, value) in enumerate(values.items()):
        if all_dots or not ends.min() <= value <= ends.max():
            aside = y + 7 * ((number * 0.618034) % 1 * 2 - 1)  # beside each other, the same way every time
            drawn.append(
                f'<circle class="dot" cx="{along.at(value):.1f}" cy="{aside:.1f}" r="2.6">'
                f"<title>{text(case)}: {value:.4g}</title></circle>"
            )
    return "".join(drawn)
