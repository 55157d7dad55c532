"""Seconds from a command to its first training step done, with nothing prepared: hilum beside nnU-Net v2.

`hilum train DATA` against `nnUNetv2_plan_and_preprocess --verify_dataset_integrity` and `nnUNetv2_train` after it, and against
the same two at their quickest: no verification, the one configuration that is trained, a process per core. They take
turns; every turn is a process of its own in an empty folder with an empty home, ended by force after the step. The first
round, which warms the system's cache of files, is not counted, nor is bringing the dataset into nnU-Net's layout, which hilum
reads too. Without `--data` phantoms are made; without `--peers`, the interpreter that has nnU-Net, hilum runs alone.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from peers import FIRST_STEP, HILUM, NnUNet, confine, environment, lay_out, machine, our_versions, phantoms, watch

from preprocessing.datasets import open_dataset

GOAL = 5.0


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", type=Path, help="a dataset; without it phantoms")
    words.add_argument("--peers", type=Path, help="the interpreter that has nnU-Net v2")
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--cores", type=int, default=2)
    words.add_argument("--cases", type=int, help="the first so many cases; of phantoms 6 are made")
    words.add_argument("--results", type=Path, help="a file for the table, beside printing it")
    said = words.parse_args()
    confine(said.cores)
    with tempfile.TemporaryDirectory(prefix="first-step-") as folder:
        opened = open_dataset(said.data or phantoms(Path(folder) / "phantoms", said.cases or 6))
        cases = [case for case in opened.cases if case.images and case.labels][: said.cases]
        dataset = lay_out(opened, cases, Path(folder) / "dataset")
        found = in_turn(starts(said.peers, said.cores), dataset, said.rounds)
        versions = our_versions() | (NnUNet(python=said.peers, folder=dataset).versions() if said.peers else {})
    told = report(found, f"{opened.name}, {len(cases)} cases", versions)
    if said.results:
        said.results.write_text(told)
    print(told)


@dataclass(frozen=True, kw_only=True)
class Start:
    """One cold start: seconds to the first step, and those of them that went before the training command."""

    seconds: float
    preparing: float | None = None


Starter = Callable[[Path, Path], Start]
"""Starts a training on a dataset in an empty folder."""


def starts(peers: Path | None, cores: int) -> dict[str, Starter]:
    ours: dict[str, Starter] = {"hilum": start_hilum}
    if not peers:
        return ours
    quickest = ("-c", "3d_fullres", "-npfp", str(cores), "-np", str(cores))
    return ours | {
        "nnU-Net": partial(start_nnunet, peers, ("--verify_dataset_integrity",), {}),
        "nnU-Net at its quickest": partial(start_nnunet, peers, quickest, {"OMP_NUM_THREADS": "1"}),
    }


def start_hilum(dataset: Path, folder: Path) -> Start:
    words = ["train", dataset, "--out", folder / "package", "--device", "cpu"]
    return Start(seconds=watch([*HILUM, *words], folder, environment(HILUM_HOME=folder / "home"), FIRST_STEP).seconds)


def start_nnunet(peers: Path, words: tuple[str, ...], threads: dict[str, str], dataset: Path, folder: Path) -> Start:
    nnunet = NnUNet(python=peers, folder=folder)
    nnunet.dataset.parent.mkdir(parents=True)
    nnunet.dataset.symlink_to(dataset)
    preparing = nnunet.run("nnUNetv2_plan_and_preprocess", "-d", "1", *words, **threads)
    training = ("1", "3d_fullres", "0", "-tr", "FirstStep", "-device", "cpu")
    step = nnunet.run("nnUNetv2_train", *training, until=FIRST_STEP)
    return Start(seconds=preparing.seconds + step.seconds, preparing=preparing.seconds)


def in_turn(starters: dict[str, Starter], dataset: Path, rounds: int) -> dict[str, list[Start]]:
    found: dict[str, list[Start]] = {name: [] for name in starters}
    for number in range(rounds + 1):
        for name, start in starters.items():
            with tempfile.TemporaryDirectory(dir=dataset.parent) as folder:
                found[name].append(start(dataset, Path(folder)))
            counted = f"round {number}" if number else "not counted"
            print(f"{name}: {found[name][-1].seconds:.1f} s, {counted}", file=sys.stderr)
    return {name: seconds[1:] for name, seconds in found.items()}


def report(found: dict[str, list[Start]], data: str, versions: dict[str, str]) -> str:
    """Markdown: medians, in brackets the least and the most."""
    here = machine()
    lines = [
        f"## To the first training step: {data}",
        "",
        "| | s to the first step | of these s before the training command | times hilum's |",
        "| --- | --- | --- | --- |",
    ]
    hilum = statistics.median(start.seconds for start in found["hilum"])
    for name, rounds in found.items():
        seconds = [start.seconds for start in rounds]
        before = [start.preparing for start in rounds if start.preparing is not None]
        ratio = statistics.median(seconds) / hilum
        lines.append(f"| {name} | {spread(seconds)} | {spread(before) if before else '-'} | {ratio:.1f} |")
    lines += ["", f"Medians of {len(found['hilum'])} rounds, in brackets the least and the most.", ""]
    if "nnU-Net" in found:
        ratio = statistics.median(start.seconds for start in found["nnU-Net"]) / hilum
        lines += [f"The goal, {GOAL:g} times as soon as nnU-Net, is {'met' if ratio >= GOAL else 'MISSED'}.", ""]
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    lines += [
        f"Measured {day} on {here['chip']}, {here['cores']} cores, {here['platform']}, load {here['load']} at the end.",
        "",
    ]
    lines += [f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.", ""]
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


if __name__ == "__main__":
    main()
