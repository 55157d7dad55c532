"""Logits to labels on the scan's own grid: hilum row by row beside nnU-Net's exporter and its torch resampler.

40 classes, 96 x 160 x 160 -> 144 x 320 x 320; `--many` is 118 classes, 240 x 240 x 240 -> 512 x 512 x 400, hilum alone:
nnU-Net would need 38 GB. Logits are organs with rough borders. hilum is handed rows as windows would finish them, and the
clock stands still while they are made; the others get all of them as float32 in memory, made before the clock starts.
Each call is a process of its own that has done something small first; they take turns. Memory is what a call added at its
peak: of the others also without the logits they were given.
`--peers PYTHON` names an interpreter that has nnunetv2. OMP_NUM_THREADS says how many cores are used.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Job:
    classes: int
    before: Triple
    after: Triple


JOBS = {
    "usual": Job(40, (96, 160, 160), (144, 320, 320)),
    "many": Job(118, (240, 240, 240), (512, 512, 400)),
    "quick": Job(8, (24, 40, 40), (36, 80, 80)),
}
WARM = Job(3, (8, 12, 12), (12, 20, 20))


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--peers", default=sys.executable, help="the interpreter that has nnunetv2")
    words.add_argument("--many", action="store_true", help="118 classes, hilum alone")
    words.add_argument("--quick", action="store_true", help="small, one round")
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--one", nargs=3, metavar=("WAY", "JOB", "FOLDER"), help=argparse.SUPPRESS)
    said = words.parse_args()
    if said.one:
        way, job, folder = said.one
        print(json.dumps(measured(way, JOBS[job], Path(folder))))
        return
    name = "many" if said.many else "quick" if said.quick else "usual"
    job, rounds = JOBS[name], 1 if said.many or said.quick else said.rounds
    shapes = " -> ".join(" x ".join(map(str, shape)) for shape in (job.before, job.after))
    print(f"{bench.heading()}; {rounds} round(s)\n{job.classes} classes, {shapes}")
    with tempfile.TemporaryDirectory() as folder:
        compare(name, ["hilum"] if said.many else list(WAYS), said.peers, rounds, Path(folder))


def compare(job: str, ways: list[str], peers: str, rounds: int, folder: Path) -> None:
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in list(found):
            python = sys.executable if way == "hilum" else peers
            answer = bench.child(python, __file__, "--one", way, job, str(folder))
            if "error" in answer:
                print(f"{way:<22} left out: {answer['error']}")
                del found[way]
            else:
                found[way].append(answer)
    for way, answers in found.items():
        seconds, busy, memory, bare = (
            statistics.median(answer[key] for answer in answers) for key in ("seconds", "busy", "memory", "bare")
        )
        print(
            f"{way + ' ' + answers[0]['version']:<28} {seconds:7.2f} s, processor {busy:7.2f} s, memory +{memory / 1e9:.2f} GB "
            f"(without logits given +{bare / 1e9:.2f})  {agreement(folder, way)}"
        )


def agreement(folder: Path, way: str) -> str:
    import numpy

    if way == "hilum" or not (folder / "hilum.npy").exists():
        return ""
    ours, theirs = (numpy.load(folder / f"{name}.npy") for name in ("hilum", way))
    return f"{(ours == theirs).mean():.4%} of labels as hilum's"


def measured(way: str, job: Job, folder: Path) -> dict[str, Any]:
    import numpy

    export, version = WAYS[way]()
    export(WARM)
    bench.forget_peak()
    labels, seconds, busy, given, before = export(job)
    peak = bench.peak() - before
    numpy.save(folder / f"{way}.npy", labels[::2, ::2, ::2])
    return {"seconds": seconds, "busy": busy, "memory": peak, "bare": peak - given, "version": version}


def logits(job: Job) -> Iterator[Any]:
    """Row after row [C, h, w]: the nearer to an organ's middle the higher, roughened by noise."""
    import numpy

    random = numpy.random.default_rng(0)
    middles = random.uniform(0, 1, (job.classes, 3)).astype(numpy.float32)
    sides = [((numpy.arange(n) + 0.5) / n).astype(numpy.float32) for n in job.before]
    i, j, k = ((side - middles[:, axis, None]) ** 2 for axis, side in enumerate(sides))
    across = j[:, :, None] + k[:, None, :]
    for row in range(job.before[0]):
        noise = 0.5 * random.standard_normal(job.before[1:], numpy.float32)
        yield (
            -100 * (across + i[:, row, None, None])
            + numpy.roll(noise, row) * (numpy.arange(job.classes) % 3)[:, None, None]
        )


Answer = tuple[Any, float, float, int, int]


def hilum() -> tuple[Callable[[Job], Answer], str]:
    import numpy
    import torch

    from pipeline.decision import Ground, Judge, decide
    from pipeline.stream import Rows
    from preprocessing.plan import Label, Plan
    from preprocessing.steps import Resample, Taken, Trail
    from preprocessing.volume import Geometry

    torch.set_num_threads(int(bench.os.environ.get("OMP_NUM_THREADS", "1")))

    def export(job: Job) -> Answer:
        labels = tuple(Label(value=n, name=f"organ {n}", colour=(1, 2, 3)) for n in range(1, job.classes))
        plan = Plan(
            name="export", channels=("ct",), labels=labels, steps=(), spacing_mm=(1.5,) * 3, patch=(8, 8, 8), batch=1
        )
        native = Geometry(shape=job.after, affine=numpy.eye(4))
        step = Resample(spacing_mm=(1.5,) * 3)
        affine = numpy.diag([*(a / b for a, b in zip(job.after, job.before, strict=True)), 1.0])
        affine[:3, 3] = (numpy.diag(affine)[:3] - 1) / 2
        prepared = Geometry(shape=job.before, affine=affine)
        trail = Trail(taken=(Taken(step=step, before=native, after=prepared),))
        ground = Ground.under(prepared, trail, 0, (0, 0, 0), job.before)
        judge = Judge(plan=plan, temperatures=(1.0,))
        idle = [0.0, 0.0]

        def rows() -> Iterator[Rows]:
            made, number = logits(job), 0
            while True:
                wall, busy = time.perf_counter(), time.process_time()
                row = next(made, None)
                idle[0] += time.perf_counter() - wall
                idle[1] += time.process_time() - busy
                if row is None:
                    return
                yield Rows(first=number, logits=[torch.from_numpy(row)[:, None]])
                number += 1

        before, wall, busy = bench.held(), time.perf_counter(), time.process_time()
        decision = decide(map(judge.weigh, rows()), ground, judge)
        return (
            decision.voxels, time.perf_counter() - wall - idle[0], time.process_time() - busy - idle[1], 0, before
        )  # fmt: skip

    return export, f"torch {torch.__version__}"


def theirs(name: str) -> tuple[Callable[[Job], Answer], str]:
    from importlib import metadata

    import numpy
    import torch
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
    from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

    torch.set_num_threads(int(bench.os.environ.get("OMP_NUM_THREADS", "1")))
    resample = {"nnU-Net": resample_data_or_seg_to_shape, "nnU-Net's torch": resample_torch_fornnunet}[name]

    def export(job: Job) -> Answer:
        before = bench.held()
        given = numpy.empty((job.classes, *job.before), numpy.float32)
        for number, row in enumerate(logits(job)):
            given[:, number] = row
        data = given if name == "nnU-Net" else torch.from_numpy(given)
        wall, busy = time.perf_counter(), time.process_time()
        spacing = [a / b for a, b in zip(job.after, job.before, strict=True)]
        there = resample(data, list(job.after), spacing, [1.0, 1.0, 1.0], is_seg=False)
        labels = torch.as_tensor(there).argmax(0).to(torch.uint8).numpy()
        return labels, time.perf_counter() - wall, time.process_time() - busy, given.nbytes, before

    return export, metadata.version("nnunetv2")


WAYS: dict[str, Callable[[], tuple[Callable[[Job], Answer], str]]] = {
    "hilum": hilum,
    "nnU-Net": lambda: theirs("nnU-Net"),
    "nnU-Net's torch": lambda: theirs("nnU-Net's torch"),
}


if __name__ == "__main__":
    main()
