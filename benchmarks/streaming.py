"""What a case takes of memory, beside what it was said to take: by length of the scan, classes, folds, flips, rules, engines.

Each run is a process of its own that has segmented something tiny before the count begins; the peak is the kernel's own
(VmHWM), over what the process had before its scan was there. A bound that is not kept ends the benchmark with 1.
`flat` is what a run took beside its scan, its prepared scan and its label maps: it must not grow with the length.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import bench

MEGA = 1e6


@dataclass(frozen=True, kw_only=True)
class Run:
    """One case."""

    shape: tuple[int, int, int] = (96, 96, 96)
    patch: tuple[int, int, int] = (32, 32, 32)
    classes: int = 3
    folds: int = 1
    flips: bool = False
    rules: bool = False
    maps: bool = False
    body: bool = False
    regions: bool = False
    batch: int = 1
    width: int = 4
    limit: int | None = None
    spacing: float = 1.0
    """Of the prepared scan; the scan's own is 1 mm."""


LENGTHS = [Run(shape=(96 * times, 96, 96), classes=14) for times in (1, 2, 4)]
MATRIX = [
    Run(classes=2),
    Run(classes=40, spacing=1.5),
    Run(classes=14, folds=3),
    Run(classes=5, flips=True, maps=True, folds=2),
    Run(classes=5, rules=True, body=True),
    Run(classes=8, regions=True, spacing=0.8),
    Run(classes=3, patch=(8, 64, 64), shape=(40, 160, 160)),
    Run(classes=3, patch=(1, 96, 96), shape=(60, 128, 128)),
    Run(classes=4, batch=4, width=16),
    Run(classes=30, patch=(64, 64, 64), shape=(128, 128, 128), limit=470_000_000),
    Run(classes=3, patch=(64, 64, 64), width=24),
    Run(classes=118, patch=(48, 48, 48), shape=(120, 120, 160), spacing=1.5),
]


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--quick", action="store_true", help="a few small runs")
    words.add_argument("--one", help=argparse.SUPPRESS)
    said = words.parse_args()
    if said.one:
        print(json.dumps(measured(Run(**json.loads(said.one)))))
        return
    print(bench.heading())
    lengths, matrix = (LENGTHS[:2], MATRIX[:3]) if said.quick else (LENGTHS, MATRIX)
    print("\nlength of the scan")
    kept = [told(run) for run in lengths]
    print("\nother cases")
    kept += [told(run) for run in matrix]
    sys.exit(0 if all(kept) else 1)


def told(run: Run) -> bool:
    """Whether the bound was kept."""
    found = bench.child(sys.executable, __file__, "--one", json.dumps(asdict(run)))
    usual = asdict(Run())
    name = ", ".join(f"{key} {value}" for key, value in asdict(run).items() if value != usual[key] or key == "shape")
    if "error" in found:
        print(f"{name}: {found['error']}")
        return False
    share = found["peak"] / found["stated"]
    print(
        f"peak {found['peak'] / MEGA:7.0f} MB of {found['stated'] / MEGA:7.0f} stated ({share:4.0%}), flat {found['flat'] / MEGA:6.0f} MB, "
        f"{found['seconds']:6.1f} s  {name}{'; ' if found['words'] else ''}{'; '.join(found['words'])}",
        flush=True,
    )
    return share <= 1


def measured(run: Run) -> dict[str, Any]:
    import time

    import torch

    torch.set_num_threads(int(bench.os.environ.get("OMP_NUM_THREADS", "1")))
    small = replace(run, shape=tuple(max(side, 16) for side in run.patch), limit=None)
    segmented(small, a_scan(small.shape))
    bench.forget_peak()
    before = bench.held()
    scan = a_scan(run.shape)
    started = time.perf_counter()
    found = segmented(run, scan)
    seconds = time.perf_counter() - started
    own = scan.voxels.nbytes + scan.voxels.size * (4 / run.spacing**3 + 1)
    peak = bench.peak() - before
    return {
        "peak": peak, "stated": found.memory.stated, "flat": peak - own, "seconds": seconds,
        "words": list(found.memory.words), "own": own,
    }  # fmt: skip


def a_scan(shape: Sequence[int]) -> Any:
    import numpy

    from preprocessing.volume import Geometry, Volume

    random = numpy.random.default_rng(0)
    voxels = numpy.empty((1, *shape), numpy.int16)
    for row in range(shape[0]):  # nothing else that is large
        voxels[0, row] = random.normal(0, 300, shape[1:])
    return Volume(voxels=voxels, geometry=Geometry(shape=tuple(shape), affine=numpy.eye(4)), channels=("mr",))


def segmented(run: Run, scan: Any) -> Any:
    import torch

    from networks import residual_unet
    from pipeline.postprocessing import Largest, NoHoles
    from pipeline.prediction import Asked, Inference, segment_volume
    from preprocessing.plan import Label, Plan
    from preprocessing.steps import Crop, Normalise, Orient, Pad, Resample, Scale

    count = run.classes - (not run.regions)
    labels = tuple(
        Label(value=value, name=f"organ {value}", colour=(1, 2, 3), parts=(value,) if run.regions else ())
        for value in range(1, count + 1)
    )
    plan = Plan(
        name="streamed", channels=("mr",), labels=labels, spacing_mm=(run.spacing,) * 3, patch=tuple(run.patch), batch=2,
        steps=(Orient(), Crop(), Resample(spacing_mm=(run.spacing,) * 3), Normalise(channels=(Scale(by="scan"),)),
               Pad(shape=tuple(run.patch))),
    )  # fmt: skip
    config = residual_unet.fit(
        residual_unet.Config(width=run.width), patch=tuple(run.patch), spacing=(run.spacing,) * 3
    )
    networks = []
    for fold in range(run.folds):
        torch.manual_seed(fold)
        networks.append(residual_unet.build(config, channels=1, classes=run.classes).eval())
    how = Inference(device="cpu", flips=run.flips, overlap=0.25, batch=run.batch, body=run.body, max_memory=run.limit)
    rules = (Largest(label="organ 1"), NoHoles(label="organ 1")) if run.rules else ()
    return segment_volume(
        scan, networks, plan, how, "benchmark", rules=rules, asked=Asked(probabilities=run.maps, uncertainty=run.maps)
    )


if __name__ == "__main__":
    main()
