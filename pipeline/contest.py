"""compare: packages and evaluations beside each other, what differs between their scores, and between their settings."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.records import encode

from . import charts
from .errors import UsageError
from .outputs._html import document, text
from .package import ModelPackage
from .report import hilum_version, write_whole
from .scorecard import STYLE, difference_cell
from .scores import TESTED, WORDS, figure, less_is_better
from .significance import Difference, Spread, differences, interval_of_mean, spread

Table = dict[str, dict[str, float | None]]
"""Label, case, value."""

DEPENDS = {"nsd": ("tolerance_mm", "surface"), "hd95_mm": ("surface",), "assd_mm": ("surface",)}
"""By metric, how it may be measured in more than one way: two such numbers have no difference."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one package or evaluation says."""

    name: str
    scores: dict[str, Table]
    """By metric."""
    means: dict[str, float] = field(default_factory=dict)
    """Dice per label of a package that does not tell its cases."""
    settings: dict[str, str] = field(default_factory=dict)
    minutes: float | None = None
    """Spent on training, all folds together."""

    def cases(self, metric: str) -> set[str]:
        """Those that were measured at all."""
        return {case for of in self.scores.get(metric, {}).values() for case in of}

    @property
    def labels(self) -> set[str]:
        """Those that its mean Dice is of."""
        return set(self.scores.get("dice", self.means))

    def way(self, metric: str) -> tuple[str | None, ...]:
        """How that was measured."""
        return tuple(self.settings.get(name) for name in DEPENDS.get(metric, ()))


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One run by one metric."""

    run: str
    mean: float | None
    """Over labels of their means over cases."""
    interval: tuple[float, float] | None
    labels: dict[str, Spread]
    to_best: dict[str, Difference] | None
    """This run minus the best, per label, over the cases both have; None: it is the best, has no cases, or was measured in
    another way."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """All runs, by every metric that any of them has."""

    runs: tuple[Run, ...]
    standings: dict[str, tuple[Standing, ...]]
    """By metric, the best first."""

    @property
    def same_cases(self) -> bool:
        """Whether all runs were measured on the same cases: else their means are of different patients."""
        cases = [run.cases("dice") for run in self.runs]
        return all(these and these == cases[0] for these in cases)

    @property
    def cautions(self) -> tuple[str, ...]:
        """Why means that stand beside each other may not be compared, a sentence each."""
        return tuple(_cautions(self))

    @property
    def differing(self) -> dict[str, dict[str, str]]:
        """Settings that are not the same everywhere: setting, run, value."""
        names = dict.fromkeys(name for run in self.runs for name in run.settings)
        rows = {name: {run.name: run.settings.get(name, "-") for run in self.runs} for name in names}
        return {name: row for name, row in rows.items() if len(set(row.values())) > 1}


def compare(runs: Sequence[Path], out: Path | None = None) -> Contest:
    """Reads packages (folders) and evaluations (the JSON that `evaluate` wrote), in any mix; writes a page."""
    if len(runs) < 2:
        raise UsageError(
            f"{len(runs)} run was given; two or more are needed. Name packages and evaluations to compare."
        )
    read = tuple(_read(path, name) for path, name in zip(runs, _names(runs), strict=True))
    standings = {metric: found for metric in TESTED if (found := _standings(read, metric))}
    contest = Contest(runs=read, standings=standings)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, page(contest))
    return contest


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of a path; as many of those before it as tell one from another."""
    parts = [
        (*path.resolve().parts[:-1], path.resolve().stem if path.is_file() else path.resolve().name) for path in paths
    ]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError(f"{paths[0]} was given twice; each run is compared once. Name it once.")


def _read(path: Path, name: str) -> Run:
    if path.is_dir():
        return _of_package(ModelPackage.load(path), name)
    if not path.is_file():
        raise UsageError(f"{path} does not exist; a package or what `evaluate` wrote is needed. Look at the spelling.")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return _of_evaluation(said, name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is no evaluation ({type(error).__name__}: {error}); the JSON that `hilum evaluate` wrote is needed. "
            "Evaluate again."
        ) from None


def _of_evaluation(said: Mapping[str, Any], name: str) -> Run:
    scores: dict[str, Table] = {}
    for case, labels in said["cases"].items():
        for label, values in labels.items():
            for metric in TESTED:
                scores.setdefault(metric, {}).setdefault(label, {})[case] = values[metric]
    return Run(
        name=name,
        scores=scores,
        settings={"measured by": "evaluate", "tolerance_mm": f"{said['tolerance_mm']:g}", "surface": said["surface"]},
    )


def _of_package(package: ModelPackage, name: str) -> Run:
    record = package.record
    table: Table = {}
    for fold in record.folds.values():
        for case, labels in fold.held_out.cases.items():
            for label, value in labels.items():
                table.setdefault(label, {})[case] = value
    ordered = [label.name for label in record.plan.labels]
    dice = {label: [fold.dice[label] for fold in record.folds.values() if label in fold.dice] for label in ordered}
    return Run(
        name=name,
        scores={"dice": {label: table[label] for label in ordered if label in table}} if table else {},
        means={label: float(np.mean(values)) for label, values in dice.items() if values},
        settings=_settings(package),
        minutes=sum(fold.minutes for fold in record.folds.values()),
    )


def _settings(package: ModelPackage) -> dict[str, str]:
    """Everything a person or a rule decided, one line each."""
    record = package.record
    plan = {key: value for key, value in encode(record.plan).items() if key not in ("reasons", "labels", "name")}
    folds = record.folds.values()
    return {
        "measured by": "held-out cases",
        "network": record.network,
        **_flat("network", record.network_config),
        "folds": ", ".join(record.folds),
        "epochs": ", ".join(str(fold.epochs) for fold in folds),
        "seed": ", ".join(str(fold.seed) for fold in folds),
        "cases trained on": ", ".join(str(fold.cases_trained) for fold in folds),
        **_flat("plan", plan),
        "hilum": record.hilum,
        **_flat("version", record.versions),
    }


def _flat(name: str, value: Any) -> dict[str, str]:
    """Nested records as lines; lists of plain things on one line."""
    if isinstance(value, Mapping):
        return {key: said for part, inner in value.items() for key, said in _flat(f"{name}: {part}", inner).items()}
    if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        named = (
            (each.get("kind", str(n)) if isinstance(each, Mapping) else str(n), each) for n, each in enumerate(value, 1)
        )
        return {key: said for part, inner in named for key, said in _flat(f"{name}: {part}", inner).items()}
    if isinstance(value, list):
        return {name: ", ".join(_short(each) for each in value) or "none"}
    return {name: _short(value)}


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return value[:12]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _standings(runs: Sequence[Run], metric: str) -> tuple[Standing, ...]:
    sums = [_sum_up(run, metric) for run in runs if metric in run.scores or (metric == "dice" and run.means)]
    sign = 1 if less_is_better(metric) else -1
    ordered = sorted(sums, key=lambda one: (one.mean is None, sign * (one.mean or 0.0)))
    named = {run.name: run for run in runs}
    return (*ordered[:1], *(_beside(one, named[one.run], named[ordered[0].run], metric) for one in ordered[1:]))


def _sum_up(run: Run, metric: str) -> Standing:
    of = run.scores.get(metric)
    if of is None:  # a package that only tells its means
        labels = {label: Spread(cases=0, mean=mean, median=None, interval=None) for label, mean in run.means.items()}
    else:
        labels = {label: spread(list(values.values())) for label, values in of.items()}
    means = [one.mean for one in labels.values() if one.mean is not None]
    return Standing(
        run=run.name,
        mean=float(np.mean(means)) if means else None,
        interval=interval_of_mean(of) if of else None,
        labels=labels,
        to_best=None,
    )


def _beside(one: Standing, run: Run, best: Run, metric: str) -> Standing:
    own, of_best = run.scores.get(metric), best.scores.get(metric)
    alike = run.way(metric) == best.way(metric)
    return replace(one, to_best=differences(own, of_best) if own and of_best and alike else None)


def _cautions(contest: Contest) -> Iterator[str]:
    runs = contest.runs
    for metrics, name in (("NSD", "tolerance_mm"), ("NSD, HD95 and ASSD", "surface")):
        ways = {run.name: run.settings[name] for run in runs if name in run.settings}
        if len(set(ways.values())) > 1:
            yield (
                f"The runs were not measured with the same {name} ({_listed(ways)}), so their {metrics} cannot be compared, "
                "and no difference is given. Evaluate them alike."
            )
    if len({frozenset(run.labels) for run in runs}) > 1:
        labels = {run.name: f"{len(run.labels)}" for run in runs}
        yield (
            f"The runs were not measured by the same labels ({_listed(labels)}), so their means over labels, by which they are "
            "ranked, are of different labels: look at each label."
        )
    if not contest.same_cases:
        counts = {run.name: str(len(run.cases("dice")) or "none that it tells") for run in runs}
        yield (
            "The runs were not measured on the same cases, so their means are of different patients: look at the "
            f"differences, which are of cases that two runs share. Cases: {_listed(counts)}."
        )
    if len({run.settings["measured by"] for run in runs}) > 1:
        yield (
            "A package keeps no names of cases, only their hashes, and an evaluation has names: the two share no case, and no "
            "difference between them is given. Evaluate both on the same references for that."
        )


def _listed(by_run: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {said}" for name, said in by_run.items())


# what is written

RUNS_STYLE = """
.narrow { max-width: 720px; margin: 0 0 10px; }
tr.best td { font-weight: 600; } tr.best td .quiet { font-weight: 400; }
"""


def page(contest: Contest) -> str:
    """One file that needs no other."""
    body = [
        f"<h1>{len(contest.runs)} runs</h1>",
        '<p class="quiet">for research, not for diagnosis</p>',
        *(f'<div class="alarm">{text(caution)}</div>' for caution in contest.cautions),
        *(_section(metric, standings) for metric, standings in contest.standings.items()),
        _differing(contest),
        "<h2>How to read it</h2><p>Means over cases, below them their 95 % bootstrap intervals (over cases, 2000 resamples, seed "
        "0; none below 5 cases). Differences are run minus best, over the cases that both have: mean, interval, Wilcoxon's "
        "signed-rank test with Holm's correction over the labels, cases higher (↑) and lower (↓). The best run was found by "
        "these very numbers, which makes it look a little better than it is: decide on one table, confirm on other cases.</p>",
        f"<footer>hilum {text(hilum_version())} · for research, not for diagnosis</footer>",
    ]
    return document("Comparison of runs", "\n".join(body), style=STYLE + RUNS_STYLE)


def _section(metric: str, standings: Sequence[Standing]) -> str:
    labels = list(dict.fromkeys(label for one in standings for label in one.labels))
    digits = 2 if less_is_better(metric) else 3
    head = "".join(f'<th class="number">{text(word)}</th>' for word in ("mean over labels", *labels))
    scores = "".join(_row(one, labels, digits, place == 0) for place, one in enumerate(standings))
    known = {one.run: (one.mean, one.interval) for one in standings if one.mean is not None}
    ends = [end for mean, interval in known.values() for end in (interval or (mean,))]
    along = charts.axis(ends, low=0.0 if less_is_better(metric) else None)
    what = f"{WORDS[metric]}: mean over labels, with its 95 % interval"
    return (
        f'<h2>{text(WORDS[metric])}</h2><div class="narrow">{charts.whiskers(known, along, what)}</div>'
        f'<div class="wide"><table><tr><th>run</th>{head}</tr>{scores}</table></div>'
        + _differences(standings, labels, less_is_better(metric))
    )


def _row(one: Standing, labels: Sequence[str], digits: int, best: bool) -> str:
    cells = [_cell(one.mean, one.interval, digits)]
    for label in labels:
        found = one.labels.get(label)
        cells.append(_cell(found.mean, found.interval, digits) if found else _cell(None, None, digits))
    kind = ' class="best"' if best else ""
    return f'<tr{kind}><td class="case">{text(one.run)}</td>{"".join(cells)}</tr>'


def _cell(mean: float | None, interval: tuple[float, float] | None, digits: int) -> str:
    within = f'<span class="quiet">{interval[0]:.{digits}f} to {interval[1]:.{digits}f}</span>' if interval else ""
    return f'<td class="number">{figure(mean, digits)}{within}</td>'


def _differences(standings: Sequence[Standing], labels: Sequence[str], less: bool) -> str:
    if len(standings) < 2:
        return ""
    rows = []
    for one in standings[1:]:
        cells = "".join(difference_cell((one.to_best or {}).get(label), less) for label in labels)
        rows.append(f'<tr><td class="case">{text(one.run)}</td>{cells}</tr>')
    head = "".join(f'<th class="number">{text(label)}</th>' for label in labels)
    return (
        f"<h3>Difference to {text(standings[0].run)}</h3>"
        f'<div class="wide"><table><tr><th>run</th>{head}</tr>{"".join(rows)}</table></div>'
    )


def _differing(contest: Contest) -> str:
    def cell(value: str) -> str:
        return f'<td class="word">{text(value)}</td>'

    head = "".join(f"<th>{text(run.name)}</th>" for run in contest.runs)
    minutes = {run.name: "-" if run.minutes is None else f"{run.minutes:.1f}" for run in contest.runs}
    rows = "".join(
        f"<tr><th>{text(name)}</th>{''.join(cell(row[run.name]) for run in contest.runs)}</tr>"
        for name, row in ({"minutes of training": minutes} | contest.differing).items()
    )
    return f'<h2>What differs</h2><div class="wide"><table><tr><th>setting</th>{head}</tr>{rows}</table></div>'


def table(contest: Contest) -> str:
    """The standings as a person reads them."""
    return "\n".join(line for metric, standings in contest.standings.items() for line in _lines(metric, standings))


def _lines(metric: str, standings: Sequence[Standing]) -> list[str]:
    width = max(len(one.run) for one in standings)
    lines = [WORDS[metric]]
    for one in standings:
        sure = f" ({one.interval[0]:.3f} to {one.interval[1]:.3f})" if one.interval else ""
        told = "; ".join(f"{label}: {each.said}" for label, each in (one.to_best or {}).items())
        lines.append(
            f"  {one.run:<{width}}  {figure(one.mean, 3)}{sure}" + (f"  against the best: {told}" if told else "")
        )
    return lines
