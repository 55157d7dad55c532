"""Every metric of `hilum evaluate` for two label maps of a CT, beside Dice alone and beside its peers; time and memory.

Two made-up maps: ellipsoids of every size with wavy surfaces and thin curved tubes, the second a little moved and grown.
`Dice alone` is numpy, label by label over the whole volume: two comparisons, the overlap, three counts (count_nonzero; with
`.sum()`, as most write it, it takes twice as long). `nnU-Net's Dice` are the masks and counts of its evaluation. MONAI (its
Dice, HD95, NSD, ASSD) and DeepMind's surface-distance (raw distances, NSD, HD95, averages) get whole volumes, a label at a
time; both cut their boxes themselves. hilum also counts lesions. Each way is a process of its own that has imported its
library before the clock starts; they take turns. `--peers PYTHON` names an interpreter with nnunetv2 and surface_distance.
The full size: `--shape 512 512 300 --labels 40`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import numpy as np

SPACING = (0.8, 0.8, 1.5)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--peers", default=sys.executable, help="the interpreter that has the other libraries")
    words.add_argument("--shape", type=int, nargs=3, default=(160, 160, 96))
    words.add_argument("--labels", type=int, default=12)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--skip", nargs="*", default=[], choices=list(WAYS), help="leave out what takes long")
    words.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    said = words.parse_args()
    if said.measure:
        print(json.dumps(measured(said.measure[0], Path(said.measure[1]), said.labels)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), tuple(said.shape), said.labels)
        report(said, folder)


def report(said: argparse.Namespace, folder: str) -> None:
    shape = " x ".join(map(str, said.shape))
    print(bench.heading())
    print(f"{shape} voxels of {SPACING} mm, {said.labels} labels; {said.rounds} rounds, medians")
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS if way not in said.skip}
    for _ in range(said.rounds):
        for way in list(found):
            python = said.peers if way in OF_PEERS else sys.executable
            answer = bench.child(python, __file__, "--measure", way, folder, "--labels", str(said.labels))
            if "error" in answer:
                print(f"{way:<34} left out: {answer['error']}")
                del found[way]
            else:
                found[way].append(answer)
    alone = statistics.median(answer["seconds"] for answer in found["Dice alone"])
    for way, answers in found.items():
        seconds = statistics.median(answer["seconds"] for answer in answers)
        memory = max(answer["memory"] for answer in answers) / 2**20
        version, dice = answers[0]["version"], answers[0]["dice"]
        print(
            f"{way + ' ' + version:<34} {seconds:8.2f} s  {seconds / alone:6.2f} x Dice alone  "
            f"{memory:7.0f} MiB above the maps  mean Dice {dice:.6f}"
        )


def make(folder: Path, shape: tuple[int, ...], labels: int) -> None:
    """Large labels first, so that small ones lie on top; every third is a tube."""
    for name, jitter in (("truth", 0.0), ("prediction", 1.0)):
        layout, wobble = np.random.default_rng(0), np.random.default_rng(1)
        voxels = np.zeros(shape, np.uint8)
        size = np.array(shape) / (512, 512, 300)
        for value in range(1, labels + 1):
            centre = layout.uniform(0.2, 0.8, 3) * shape + jitter * wobble.normal(0, 1, 3)
            radii = 100 * 0.1 ** (value / labels) * layout.uniform(0.6, 1.3, 3) * size  # voxels
            radii *= 1 + jitter * wobble.normal(0, 0.02, 3)
            if value % 3 == 0:
                paint_tube(voxels, value, centre, float(radii.max()))
            else:
                paint_ellipsoid(voxels, value, centre, radii * (1, 1, 0.6))
        np.save(folder / f"{name}.npy", voxels)


def paint_ellipsoid(voxels: np.ndarray, value: int, centre: np.ndarray, radii: np.ndarray) -> None:
    box = around(centre, 1.1 * radii + 2, voxels.shape)
    i, j, k = np.ogrid[box]
    away = sum(((x - c) / max(r, 1)) ** 2 for x, c, r in zip((i, j, k), centre, radii, strict=True))
    voxels[box][away + 0.1 * np.sin(0.3 * i + value) * np.cos(0.23 * j) * np.sin(0.31 * k) <= 1] = value


def paint_tube(voxels: np.ndarray, value: int, centre: np.ndarray, reach: float) -> None:
    """Half a turn of a screw, as a rib or a vessel: a large box with little in it."""
    for turn in np.linspace(0, np.pi, 120):
        at = centre + reach * np.array([np.cos(turn), np.sin(turn), 0.5 * turn / np.pi])
        thick = np.full(3, max(1.5, reach / 14))
        box = around(at, thick + 1, voxels.shape)
        away = sum(((x - c) / r) ** 2 for x, c, r in zip(np.ogrid[box], at, thick, strict=True))
        voxels[box][np.broadcast_to(away <= 1, voxels[box].shape)] = value


def around(centre: np.ndarray, radii: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(
        slice(min(max(0, int(c - r)), n - 1), max(1, min(n, int(c + r) + 2)))
        for c, r, n in zip(centre, radii, shape, strict=True)
    )


# one measurement, in a process of its own


def measured(way: str, folder: Path, labels: int) -> dict[str, Any]:
    measure, version = WAYS[way]()
    prediction, truth = (np.load(folder / f"{name}.npy") for name in ("prediction", "truth"))
    before = bench.peak()
    started = time.perf_counter()
    dice = measure(prediction, truth, range(1, labels + 1))
    seconds = time.perf_counter() - started
    known = [each for each in dice if each is not None and np.isfinite(each)]
    return {
        "seconds": seconds,
        "memory": bench.peak() - before,
        "version": version,
        "dice": float(np.mean(known)),
    }


Measure = Callable[[np.ndarray, np.ndarray, range], list[float | None]]


def with_hilum(surface: Any = "voxels", share: int = 1) -> tuple[Measure, str]:
    from pipeline import metrics
    from pipeline.report import hilum_version

    if surface == "surfels":
        metrics._areas(SPACING)  # imports MONAI

    def measure(prediction: np.ndarray, truth: np.ndarray, labels: range) -> list[float | None]:
        named = {str(value): (value,) for value in list(labels)[::share]}
        how = metrics.Measure(spacing=SPACING, tolerance_mm=1.0, surface=surface)
        return [one.dice for one in metrics.agreements(prediction, truth, named, how).values()]

    return measure, hilum_version()


def with_numpy(count: Callable[[np.ndarray], Any] = np.count_nonzero) -> tuple[Measure, str]:
    def measure(prediction: np.ndarray, truth: np.ndarray, labels: range) -> list[float | None]:
        found = []
        for value in labels:
            mask, reference = prediction == value, truth == value
            found.append(2 * int(count(mask & reference)) / max(1, int(count(mask)) + int(count(reference))))
        return found

    return measure, f"numpy {np.__version__}"


def with_nnunet() -> tuple[Measure, str]:
    from importlib.metadata import version

    from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask

    def measure(prediction: np.ndarray, truth: np.ndarray, labels: range) -> list[float | None]:
        found = []
        for value in labels:
            masks = (region_or_label_to_mask(each, value) for each in (truth, prediction))
            tp, fp, fn, _ = compute_tp_fp_fn_tn(*masks, None)
            found.append(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None)
        return found

    return measure, version("nnunetv2")


def with_monai() -> tuple[Measure, str]:
    import warnings

    import monai
    import torch
    from monai import metrics

    warnings.simplefilter("ignore")

    def measure(prediction: np.ndarray, truth: np.ndarray, labels: range) -> list[float | None]:
        found = []
        placed = {"include_background": True, "spacing": SPACING}
        for value in labels:
            one, other = (torch.from_numpy((each == value)[None, None]) for each in (prediction, truth))
            found.append(float(metrics.compute_dice(one, other)))
            metrics.compute_hausdorff_distance(one, other, percentile=95, **placed)
            metrics.compute_surface_dice(one, other, [1.0], **placed)
            metrics.compute_average_surface_distance(one, other, symmetric=True, **placed)
        return found

    return measure, monai.__version__


def with_deepmind() -> tuple[Measure, str]:
    from importlib.metadata import version

    import surface_distance

    def measure(prediction: np.ndarray, truth: np.ndarray, labels: range) -> list[float | None]:
        found = []
        for value in labels:
            mask, reference = prediction == value, truth == value
            found.append(float(surface_distance.compute_dice_coefficient(reference, mask)))
            raw = surface_distance.compute_surface_distances(reference, mask, SPACING)
            surface_distance.compute_surface_dice_at_tolerance(raw, 1.0)
            surface_distance.compute_robust_hausdorff(raw, 95)
            surface_distance.compute_average_surface_distance(raw)
        return found

    return measure, version("surface-distance-based-measures")


WAYS: dict[str, Callable[[], tuple[Measure, str]]] = {
    "Dice alone": with_numpy,
    "Dice alone by .sum()": lambda: with_numpy(np.sum),
    "nnU-Net's Dice": with_nnunet,
    "hilum, all": with_hilum,
    "hilum, all, a quarter of the labels": lambda: with_hilum(share=4),
    "hilum, all, by surfels": lambda: with_hilum("surfels"),
    "MONAI": with_monai,
    "DeepMind": with_deepmind,
}
OF_PEERS = ("nnU-Net's Dice", "DeepMind")


if __name__ == "__main__":
    main()
