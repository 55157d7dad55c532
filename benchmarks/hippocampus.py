"""Dice, NSD and HD95 after so many minutes on so many cores: each network of hilum, and nnU-Net v2, on one split.

`--data` is a labelled dataset (MSD's Task04 Hippocampus is meant, any other works); fold 0 of hilum's own folds is held out for
all. Each training is a process of its own that begins with nothing prepared, and its minutes count from there: preparing
the cases is part of them, and for hilum also its own scoring at the end. Segmenting the held-out scans is not. All label
maps, files of NIfTI, are scored by `hilum evaluate`. nnU-Net runs by its public commands for the interpreter `--peers`, in
three ways: as shipped, stopped when the minutes are over; with its learning rate reaching zero just then; and so with two
windows per step, nnU-Net's smallest batch.

Each finished training is a line of `--results`, and is not run again; the table is made of these lines, and printed alone by
`--table` or without `--data`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from peers import FIRST_STEP, HILUM, CommandFailed, NnUNet, confine, environment, lay_out, machine, our_versions, watch

import networks
from pipeline.config import Train
from pipeline.folds import fold_cases, split
from preprocessing.datasets import open_dataset, take_fingerprint

Record = dict[str, Any]
TOLERANCE_MM = 1.0
LATE = 1.02
"""Who takes a larger share of the minutes is named under the table."""
RESULTS = Path(__file__).parent / "results" / "hippocampus.jsonl"


def main() -> None:
    said = _words().parse_args()
    records = read(said.results)
    if said.data and not said.table:
        confine(said.cores)
        with tempfile.TemporaryDirectory(prefix="hippocampus-") as folder:
            run_all(said, Path(folder), records)
    shown = table(records)
    if records:
        said.results.with_suffix(".md").write_text(shown)
    print(shown)


def _words() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", type=Path, help="the dataset; without it only the table is printed")
    words.add_argument("--peers", type=Path, help="the interpreter that has nnU-Net v2; without it hilum runs alone")
    words.add_argument("--minutes", type=float, default=20.0)
    words.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    words.add_argument("--seed", type=int, help="this one alone")
    words.add_argument(
        "--only", help="beginnings of names, separated by commas: residual_unet, nnunet, nnunet_scheduled"
    )
    words.add_argument("--cores", type=int, default=2)
    words.add_argument("--cases", type=int, help="the first so many cases, to try the benchmark itself")
    words.add_argument("--results", type=Path, default=RESULTS)
    words.add_argument("--again", action="store_true", help="run what is there already; the table shows the newest")
    words.add_argument("--table", action="store_true", help="only print the table of what is there")
    return words


def run_all(said: argparse.Namespace, folder: Path, records: list[Record]) -> None:
    """What is missing, all entrants in turn for one seed after the other, so that a busy hour hits all alike."""
    task = set_task(said, folder)
    chosen = {name: run for name, run in entrants(said.peers).items() if _is_meant(name, said.only)}
    versions = {"hilum": our_versions()} | (
        {"nnU-Net": NnUNet(python=said.peers, folder=folder).versions()} if said.peers else {}
    )
    for seed in [said.seed] if said.seed is not None else range(said.seeds):
        for name, run in chosen.items():
            heading = {"entrant": name, "seed": seed, **task.facts}
            if not said.again and any(heading.items() <= record.items() for record in records):
                print(f"{name}, seed {seed}: there already", file=sys.stderr)
                continue
            print(f"{name}, seed {seed}: {task.minutes:g} minutes from {datetime.now():%H:%M}", file=sys.stderr)
            surroundings = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", **machine()}
            with tempfile.TemporaryDirectory(dir=folder) as workplace:
                try:
                    measured = run(task, seed, Path(workplace))
                except CommandFailed as reason:
                    print(f"{name}, seed {seed}: left out. {reason}", file=sys.stderr)
                    continue
            system = "nnU-Net" if name.startswith("nnunet") else "hilum"
            records.append(heading | measured | surroundings | {"versions": versions[system]})
            append(said.results, records[-1])


def _is_meant(name: str, only: str | None) -> bool:
    return only is None or any(name.startswith(word.strip()) for word in only.split(","))


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all are given."""

    dataset: Path
    """All cases, in the layout that both read."""
    held_out: Path
    """Those that are not trained on, as a dataset of their own."""
    splits: list[dict[str, list[str]]]
    """As nnU-Net's splits_final.json has it."""
    minutes: float
    facts: Record
    """By which a record is known to be of this task."""

    def begin(self) -> tuple[float, float]:
        """Now, and the end of the minutes, both in seconds since 1970."""
        return (now := time.time()), now + 60 * self.minutes


def set_task(said: argparse.Namespace, folder: Path) -> Task:
    opened = open_dataset(said.data)
    complete = [case for case in opened.cases if case.images and case.labels][: said.cases]
    dataset = lay_out(opened, complete, folder / "dataset")
    fingerprint = take_fingerprint(open_dataset(dataset))
    train, held_out = split(fold_cases(fingerprint), 0, 5)
    of_these = [case for case in complete if case.id in set(held_out)]
    return Task(
        dataset=dataset,
        held_out=lay_out(opened, of_these, folder / "held_out"),
        splits=[{"train": train, "val": held_out}],
        minutes=said.minutes,
        facts={
            "dataset": opened.name,
            "trained_on": len(train),
            "held_out": len(held_out),
            "minutes": said.minutes,
            "cores": said.cores,
        },
    )


# who runs


def entrants(peers: Path | None) -> dict[str, Callable[[Task, int, Path], Record]]:
    ours = {name: partial(run_hilum, name) for name in networks.available()}
    if not peers:
        return dict(ours)
    theirs = {
        "nnunet_shipped": partial(run_nnunet, peers, "AsShipped"),
        "nnunet_scheduled": partial(run_nnunet, peers, "Scheduled"),
        "nnunet_scheduled_2": partial(run_nnunet, peers, "ScheduledOf2"),
    }
    return ours | theirs


def run_hilum(network: str, task: Task, seed: int, folder: Path) -> Record:
    """`hilum train` from an empty home, `hilum segment` as it is: what a CPU trains, it trains without mirrors."""
    home, package = environment(HILUM_HOME=folder / "home"), folder / "package"
    words = ["--network", network, "--minutes", f"{task.minutes:g}", "--seed", str(seed), "--device", "cpu"]
    training = watch([*HILUM, "train", task.dataset, *words, "--out", package], folder, home)
    fold = json.loads((package / "package.json").read_text())["folds"]["0"]
    assert fold["cases_held_out"] == task.facts["held_out"]
    ways, seconds = {}, {}
    for way in ("default",):
        words = ["--package", package, "--out", folder / way, "--outputs", "labels", "--device", "cpu"]
        segmenting = watch([*HILUM, "segment", task.held_out / "imagesTr", *words], folder, home)
        seconds[way] = round(segmenting.seconds / task.facts["held_out"], 2)
        ways[way] = score(folder / way, task, folder)
    return {
        "steps": fold.get("steps"),
        "epochs": fold["epochs"],
        "seconds_to_first_step": rounded(training.first(FIRST_STEP)),
        "seconds": rounded(training.seconds),
        "seconds_per_scan": seconds,
        "scores": ways,
    }


def run_nnunet(peers: Path, trainer: str, task: Task, seed: int, folder: Path) -> Record:
    """`nnUNetv2_plan_and_preprocess` for the one configuration that is trained, with a process per core and a thread per
    process, which suits it best here; `nnUNetv2_train`; `nnUNetv2_predict` as it is, that is with mirroring."""
    nnunet = NnUNet(python=peers, folder=folder)
    nnunet.dataset.parent.mkdir(parents=True)
    nnunet.dataset.symlink_to(task.dataset)
    began, end = task.begin()
    processes = str(task.facts["cores"])
    words = ["-d", "1", "-c", "3d_fullres", "-npfp", processes, "-np", processes, "--no_pbar"]
    preparing = nnunet.run("nnUNetv2_plan_and_preprocess", *words, OMP_NUM_THREADS="1")
    (nnunet.preprocessed / "splits_final.json").write_text(json.dumps(task.splits))
    words = ["1", "3d_fullres", "0", "-tr", trainer, "-device", "cpu"]
    augmenting = {} if trainer == "AsShipped" else {"nnUNet_n_proc_DA": WORKERS}
    nnunet.run("nnUNetv2_train", *words, BENCHMARK_ENDS_AT=str(end), BENCHMARK_SEED=str(seed), **augmenting)
    facts = json.loads((nnunet.results(trainer) / "benchmark.json").read_text())
    words = ["-d", "1", "-c", "3d_fullres", "-tr", trainer, "-f", "0", "-npp", "0", "-nps", "0", "-device", "cpu"]
    images = task.held_out / "imagesTr"
    segmenting = nnunet.run("nnUNetv2_predict", "-i", images, "-o", folder / "found", *words, "--disable_progress_bar")
    return {
        "steps": facts["steps"],
        "epochs": facts["epochs"],
        "batch": facts["batch"],
        "seconds_preprocessing": rounded(preparing.seconds),
        "seconds_to_first_step": rounded(facts["first_step_at"] and facts["first_step_at"] - began),
        "seconds": rounded(facts["ended_at"] - began),
        "seconds_per_scan": {"default": round(segmenting.seconds / task.facts["held_out"], 2)},
        "scores": {"default": score(folder / "found", task, folder)},
    }


WORKERS = "1"
"""nnU-Net's augmenting processes: a batch costs them about one hundredth of a step, so that one is plenty."""


def score(found: Path, task: Task, folder: Path) -> dict[str, Record]:
    """Label to means over the held-out scans, by the same words for whoever made the label maps."""
    out = folder / f"{found.name}.json"
    words = ["--out", out, "--tolerance_mm", f"{TOLERANCE_MM:g}"]
    watch([*HILUM, "evaluate", found, task.held_out, *words], folder, environment(HILUM_HOME=folder / "home"))
    document = json.loads(out.read_text())
    if document["failed"] or document["unmatched_references"]:
        raise CommandFailed(
            f"{found.name} was to hold every held-out case; it lacks {document['unmatched_references']}."
        )
    return {
        label: {measure: rounded(one[measure]["mean"], 4) for measure in MEASURES} | {"missed": one["missed"]}
        for label, one in document["summary"].items()
    }


def rounded(value: float | None, digits: int = 1) -> float | None:
    return None if value is None else round(value, digits)


# what was found


def read(results: Path) -> list[Record]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def append(results: Path, record: Record) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as stream:
        stream.write(json.dumps(record) + "\n")


SAID = {
    "nnunet_shipped": "nnU-Net, as shipped",
    "nnunet_scheduled": "nnU-Net, scheduled for the minutes",
    "nnunet_scheduled_2": "nnU-Net, scheduled, 2 windows per step",
}
MEASURES = {"dice": ("Dice", 3), "nsd": ("NSD", 3), "hd95_mm": ("HD95 mm", 2)}


def table(records: Sequence[Record]) -> str:
    """Markdown: a part for each task, a row for each entrant and way of segmenting."""
    tasks: dict[str, list[Record]] = {}
    for record in records:
        names = ("dataset", "trained_on", "held_out", "minutes", "cores")
        tasks.setdefault(json.dumps({name: record[name] for name in names}), []).append(record)
    parts = [part(json.loads(facts), newest(of_task)) for facts, of_task in sorted(tasks.items())]
    return "\n".join(parts) or "Nothing was measured yet.\n"


def newest(records: Sequence[Record]) -> list[Record]:
    """Of each entrant and seed the last line."""
    return list({(record["entrant"], record["seed"]): record for record in records}.values())


@dataclass(frozen=True, kw_only=True)
class Row:
    """One entrant, segmenting in one way, over its seeds."""

    name: str
    of_hilum: bool
    dice: float
    """Mean over labels and seeds: what the rows are sorted by."""
    cells: list[str]


def part(facts: Record, records: Sequence[Record]) -> str:
    labels = list(next(iter(records[0]["scores"].values())))
    rows = sorted(rows_of(records, labels), key=lambda row: -row.dice)
    columns = ["", "seeds", "mean Dice", *(f"{said} {label}" for said, _ in MEASURES.values() for label in labels)]
    columns += ["steps", "s to first step", "s in all", "s per scan"]
    of = f"{facts['dataset']}, {facts['trained_on']} cases trained on, {facts['held_out']} held out"
    lines = [f"## {facts['minutes']:g} minutes on {facts['cores']} cores: {of}", ""]
    lines += [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *(row.cells for row in rows))]
    return "\n".join([*lines, "", *below(records), *difference(rows)])


def rows_of(records: Sequence[Record], labels: Sequence[str]) -> list[Row]:
    rows = []
    for entrant in dict.fromkeys(record["entrant"] for record in records):
        runs = [record for record in records if record["entrant"] == entrant]
        for way in runs[0]["scores"]:
            scores = [run["scores"][way] for run in runs]
            dice = [statistics.fmean(one[label]["dice"] or 0 for label in labels) for one in scores]
            cells = [name_of(entrant, way), str(len(runs)), spread(dice, 3)]
            for measure, (_, digits) in MEASURES.items():
                cells += [spread([one[label][measure] for one in scores], digits) for label in labels]
            cells += [spread([run[name] for run in runs], 0) for name in ("steps", "seconds_to_first_step", "seconds")]
            cells.append(spread([run["seconds_per_scan"][way] for run in runs], 1))
            ours = not entrant.startswith("nnunet")
            rows.append(Row(name=cells[0], of_hilum=ours, dice=statistics.fmean(dice), cells=cells))
    return rows


def name_of(entrant: str, way: str) -> str:
    return SAID.get(entrant, f"hilum {entrant}") + (f", {way}" if way != "default" else "")


def spread(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, least, most = (f"{value:.{digits}f}" for value in (statistics.fmean(known), min(known), max(known)))
    return mean if least == most else f"{mean} ({least}–{most})"


def below(records: Sequence[Record]) -> list[str]:
    """What is needed to read the table: the machine, the versions, and what a mean does not show."""
    machines = sorted({f"{one['chip']}, {one['cores']} cores, {one['platform']}" for one in records})
    versions = sorted({", ".join(f"{name} {v}" for name, v in one["versions"].items()) for one in records})
    dates = sorted(one["date"][:10] for one in records)
    lines = [
        f"Mean over seeds, in brackets the least and the most; NSD within {TOLERANCE_MM:g} mm. "
        "`s per scan` is outside the minutes.",
        f"Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))} on {'; '.join(machines)}.",
        f"Versions: {'; '.join(versions)}.",
    ]
    for one in records:
        if one["seconds"] > LATE * 60 * one["minutes"]:
            lines.append(f"LATE: {name_of(one['entrant'], 'default')}, seed {one['seed']} took {one['seconds']:g} s.")
        for way, scores in one["scores"].items():
            missed = [f"{score['missed']} of {label}" for label, score in scores.items() if score["missed"]]
            if missed:
                of = f"{name_of(one['entrant'], way)}, seed {one['seed']}"
                lines.append(f"{of}: scans in which nothing was found, and which HD95 leaves out: {', '.join(missed)}.")
    return [line for one in lines for line in (one, "")]


def difference(rows: Sequence[Row]) -> list[str]:
    """What `hilum train` and `hilum segment` make with nothing else said, and the best row of ours, against the best of
    theirs; `rows` begin with the best."""
    ours = [row for row in rows if row.of_hilum]
    theirs = next((row for row in rows if not row.of_hilum), None)
    if not (ours and theirs):
        return []
    unasked = [row for row in ours if row.name == name_of(Train().network, "default")]
    told = dict.fromkeys(
        f"{row.name}, minus {theirs.name}: {row.dice - theirs.dice:+.3f}" for row in (*unasked, ours[0])
    )
    return [line for each in told for line in (f"**{each} mean Dice.**", "")]


if __name__ == "__main__":
    main()
