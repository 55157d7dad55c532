"""What nnU-Net v2 trained, run by hilum and by nnU-Net: the same logits and labels, the time and memory of each.

Networks have random weights and the plans of seven made-up datasets (tests/golden/nnunet_plans.json), as nnU-Net's own
classes build and save them; `hilum import nnunet` reads the folder. `equal` compares, per plan, the logits of one window
and the labels of a whole scan of another spacing, nnU-Net made to keep logits in float32 (it keeps them in half precision,
which moves labels by itself). `speed` lets both segment six scans of 64 x 96 x 96, and one of 64 x 64 x 64, as commands
from nothing to files, in turn: wall seconds and the peak of memory of the command and all its children. nnU-Net runs with
its best settings for it, -npp 0 -nps 0; both mirror or neither does (--flips).

    python benchmarks/nnunet_packages.py equal --peers /path/to/nnunet/bin/python [--presets plain,resenc_m] [--quick]
    python benchmarks/nnunet_packages.py speed --peers /path/to/nnunet/bin/python [--flips] [--quick]
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench
import numpy as np
from peers import HILUM, environment
from peers.nnunet_results import specification

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = REPOSITORY / "tests" / "golden" / "nnunet_plans.json"
PEER = str(Path(__file__).with_name("peers") / "nnunet_results.py")
SEVEN = ("Hippo", "BraTS", "Liver", "Prostate", "ACDC", "TotalSeg", "Tiny")
QUICK = ("Hippo", "ACDC", "Tiny")
"""The plans whose scans are small."""
WIDTH, QUICK_WIDTH = 32, 4
"""Channels at full resolution: nnU-Net's, and what a smoke run bears."""


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("what", choices=("equal", "speed"))
    words.add_argument("--peers", type=Path, required=True, help="the interpreter that has nnunetv2")
    words.add_argument("--presets", default="plain", help="plain, resenc_m, resenc_l, resenc_xl")
    words.add_argument("--configurations", default="3d_fullres", help="3d_fullres, 3d_lowres, 2d")
    words.add_argument("--plans", default="", help=f"of {', '.join(SEVEN)}; by default all")
    words.add_argument("--flips", action="store_true", help="both mirror")
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--quick", action="store_true", help="narrow networks, few plans, one round")
    said = words.parse_args()
    print(bench.heading())
    with tempfile.TemporaryDirectory() as folder:
        compare(said, Path(folder)) if said.what == "equal" else race(said, Path(folder))


def peer(python: Path, *words: str | Path) -> None:
    answer = bench.child(python, PEER, *map(str, words))
    if "error" in answer:
        raise SystemExit(f"nnU-Net failed: {answer['error']}")


# equal


def compare(said: argparse.Namespace, folder: Path) -> None:
    names = said.plans.split(",") if said.plans else QUICK if said.quick else SEVEN
    entries = {entry["name"]: entry for entry in json.loads(GOLDEN.read_text())["datasets"]}
    print(
        f"\n{'plan':<34} {'window':>16} {'max |logit|':>12} {'max |dlogit|':>13} {'labels equal':>13} {'of voxels':>11}"
    )
    for name in names:
        for preset in said.presets.split(","):
            for configuration in said.configurations.split(","):
                if planned := entries[name]["plans"][preset].get(configuration):
                    place = folder / f"{name}-{preset}-{configuration}"
                    found = compared(said, place, entries[name], preset, configuration, planned)
                    told = f"{name}, {preset}, {configuration}"
                    print(
                        f"{told:<34} {'x'.join(map(str, planned['patch'])):>16} {found['largest']:>12.2f} "
                        f"{found['difference']:>13.2e} {found['equal']:>13.5%} {found['voxels']:>11}",
                        flush=True,
                    )
                    shutil.rmtree(place)


def compared(
    said: argparse.Namespace, place: Path, entry: dict[str, Any], preset: str, configuration: str, planned: dict[str, Any]
) -> dict[str, float]:  # fmt: skip
    """Of one plan: how far logits lie apart, and how many labels are the same."""
    axes = entry["plans"][preset]["axes"]
    known = specification(
        f"Dataset900_{entry['name']}", configuration, planned, channels=entry["channels"],
        labels={"background": 0, **{f"label_{n}": n for n in range(1, entry["classes"])}},
        residual=preset != "plain", width=QUICK_WIDTH if said.quick else WIDTH, axes=axes,
        mirror=range(len(planned["patch"])),
    )  # fmt: skip
    place.mkdir(parents=True)
    (place / "known.json").write_text(json.dumps(known))
    peer(said.peers, "make", place / "known.json", place / "results")
    window = np.random.default_rng(0).normal(size=(len(entry["channels"]), *planned["patch"])).astype(np.float32)
    np.save(place / "window.npy", window)
    peer(said.peers, "window", place / "results", place / "window.npy", place / "logits.npy")
    write_case(place / "cases", planned, axes, len(entry["channels"]))
    peer(
        said.peers,
        "answer",
        place / "results",
        place / "cases",
        place / "answers",
        *(["--flips"] if said.flips else []),
    )
    return held_against(place, window, axes, said.flips)


def write_case(folder: Path, planned: dict[str, Any], axes: Sequence[int], channels: int) -> None:
    """Noise of some smoothness in a grid a tenth finer than planned, a third longer than a window along one axis."""
    import nibabel
    from scipy import ndimage

    patch, spacing = list(planned["patch"]), list(planned["spacing"])
    if len(patch) == 2:
        patch, spacing = [3, *patch], [4.0, *spacing]
    longest = patch.index(max(patch))
    sides = [round(side * (1.5 if axis == longest else 1.05)) for axis, side in enumerate(patch)]
    order = [axes.index(2 - axis) for axis in range(3)]  # files tell axes from the last to the first
    shape, steps = [sides[n] for n in order], [0.9 * spacing[n] for n in order]
    random = np.random.default_rng(1)
    folder.mkdir()
    for channel in range(channels):
        scan = 30 + 150 * ndimage.gaussian_filter(random.normal(size=shape).astype(np.float32), 1.5)
        image = nibabel.Nifti1Image(scan.round().astype(np.int16), np.diag([*steps, 1.0]))
        nibabel.save(image, folder / f"case_{channel:04d}.nii.gz")


def held_against(place: Path, window: np.ndarray, axes: Sequence[int], flips: bool) -> dict[str, float]:
    import torch

    from pipeline.nnunet import import_nnunet
    from pipeline.prediction import Inference, segment_volume
    from preprocessing import files

    package = import_nnunet(place / "results", place / "package")
    plan, networks = package.plan, package.networks()
    theirs = np.load(place / "logits.npy")
    # along nnU-Net's axes; a slice has no first
    there = window if window.ndim == 4 else window[:, None]
    ours = [1 + axes.index(2 - axis) for axis in range(3)]
    with torch.inference_mode():
        logits = networks[0](torch.from_numpy(there.transpose(0, *ours).copy())[None])[0].numpy()
    logits = logits.transpose(0, *(1 + ours.index(1 + axis) for axis in range(3))).reshape(theirs.shape)
    scans = [files.read(path) for path in sorted((place / "cases").iterdir())]
    scan = scans[0].with_voxels(np.concatenate([one.voxels for one in scans]), channels=plan.channels)
    how = Inference(flips=flips, mirrors=plan.recipe.mirror, device="cpu")
    labels = segment_volume(scan, networks, plan, how, package.id).labels.voxels[0]
    wanted = np.load(place / "answers" / "case.npz")["labels"].transpose(2, 1, 0)
    return {
        "largest": float(np.abs(theirs).max()), "difference": float(np.abs(logits - theirs).max()),
        "equal": float((labels == wanted).mean()), "voxels": labels.size,
    }  # fmt: skip


# speed


def race(said: argparse.Namespace, folder: Path) -> None:
    """Six scans, then one small one, by each in turn."""
    planned = {
        "patch": [64, 64, 64], "spacing": [1.0, 1.0, 1.0], "strides": "111 222 222 222", "kernels": "333 333 333 333",
        "norm": "CT", "masked": "0", "widest": 256,
    }  # fmt: skip
    known = specification(
        "Dataset900_Race", "3d_fullres", planned, channels=["CT"], labels={"background": 0, **{f"l{n}": n for n in range(1, 5)}},
        residual=False, width=8, mirror=(0, 1, 2),
    )  # fmt: skip
    (folder / "known.json").write_text(json.dumps(known))
    results = folder / "results" / "Dataset900_Race" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    peer(said.peers, "make", folder / "known.json", results)
    run([*HILUM, "import", "nnunet", results, "--out", folder / "package"], folder)
    rounds = 1 if said.quick else said.rounds
    torch = statistics.median(run([sys.executable, "-c", "import torch"], folder)[0] for _ in range(rounds))
    print(f"{rounds} round(s) in turn, medians; import torch alone: {torch:.1f} s")
    for title, count, shape in (("six scans of 64x96x96", 6, (64, 96, 96)), ("one scan of 64x64x64", 1, (64, 64, 64))):
        cases = folder / title.replace(" ", "_")
        cases.mkdir()
        for number in range(count):
            write_scan(cases / f"case{number}_0000.nii.gz", shape, number)
        print(f"\n{title}, {'mirrored 8 ways' if said.flips else 'not mirrored'}")
        in_turn(said, folder, cases, rounds)


def write_scan(path: Path, shape: Sequence[int], seed: int) -> None:
    import nibabel
    from scipy import ndimage

    scan = 30 + 150 * ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    nibabel.save(nibabel.Nifti1Image(scan.round().astype(np.int16), np.diag([1.1, 0.9, 1.0, 1.0])), path)


def in_turn(said: argparse.Namespace, folder: Path, cases: Path, rounds: int) -> None:
    measured: dict[str, list[tuple[float, int]]] = {"nnU-Net": [], "hilum": []}
    for _ in range(rounds):
        for who in measured:
            out = folder / f"out of {who}"
            shutil.rmtree(out, ignore_errors=True)
            theirs = [
                said.peers.with_name("nnUNetv2_predict"), "-i", cases, "-o", out, "-d", "Dataset900_Race", "-c", "3d_fullres", "-f", "0",
                "-npp", "0", "-nps", "0", "-device", "cpu", "--disable_progress_bar", *([] if said.flips else ["--disable_tta"]),
            ]  # fmt: skip
            ours = [
                *HILUM, "segment", cases, "--package", folder / "package", "--out", out, "--outputs", "labels",
                *(["--flips"] if said.flips else []),
            ]  # fmt: skip
            measured[who].append(run(theirs if who == "nnU-Net" else ours, folder))
    for who, some in measured.items():
        seconds, memory = (statistics.median(one) for one in zip(*some, strict=True))
        print(f"{who:<8} {seconds:7.1f} s   {memory / 1e9:5.2f} GB at its peak, children included")
    print(f"labels equal (nnU-Net in half precision): {agreement(folder):.4%} of voxels")


def agreement(folder: Path) -> float:
    import nibabel

    pairs = [
        (
            nibabel.load(path),
            nibabel.load(folder / "out of hilum" / path.name.removesuffix(".nii.gz") / "labels.nii.gz"),
        )
        for path in sorted((folder / "out of nnU-Net").glob("*.nii.gz"))
    ]
    same = [np.asarray(one.dataobj) == np.asarray(other.dataobj) for one, other in pairs]
    return float(np.mean(np.concatenate([one.ravel() for one in same])))


def run(words: Sequence[str | Path], folder: Path) -> tuple[float, int]:
    """Seconds of a command, and the most memory it had with all its children (what they share counted once)."""
    places = {f"nnUNet_{place}": folder / place for place in ("raw", "preprocessed", "results")}
    started, highest = time.perf_counter(), 0
    with (folder / "said.txt").open("w") as said:
        child = subprocess.Popen(
            [str(word) for word in words], cwd=REPOSITORY, env=environment(**places, HILUM_HOME=folder / "home"), stdout=said,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        while child.poll() is None:
            highest = max(highest, taken(child.pid))
            time.sleep(0.05)
    if child.returncode:
        raise SystemExit(f"{words[0]} ended with {child.returncode}:\n{(folder / 'said.txt').read_text()[-2000:]}")
    return time.perf_counter() - started, highest


def taken(session: int) -> int:
    """Bytes of every process of a session, pages that several share divided among them."""
    total = 0
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, StopIteration):
            if os.getsid(int(place.name)) == session:
                lines = (place / "smaps_rollup").read_text().splitlines()
                total += int(next(line.split()[1] for line in lines if line.startswith("Pss:"))) * 1024
    return total


if __name__ == "__main__":
    main()
