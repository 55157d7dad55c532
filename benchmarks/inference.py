"""One large scan through one network on a CPU: `segment_volume` beside MONAI's SlidingWindowInferer, window for window.

The scan is 300 x 300 x 200 voxels like a CT: a body in air, three organs and their noise. The network is hilum's default, width
16, trained here for a moment on windows of other such scans, so that there are labels worth comparing. Both get the same
weights, windows of 96 voxels' side and, but where it is said, an overlap of a half and a Gaussian of an eighth; both start with
the scan in memory and end with a label map (MONAI: the argmax of what its inferer returns). MONAI is shown the network as
hilum builds it and, named `usual`, as most write it: torch's default layout and InstanceNorm3d.

Every measurement is a process of its own, the entrants take turns, seconds are medians. Memory is what the process had at its
peak beyond what it held when it began. `same` is the share of voxels whose label is that of the first row of the same
house, Dice is the mean over organs against the truth: where a scan is no multiple of a window's step, MONAI moves the last window
in and hilum spreads all of them evenly, so that they do not see quite the same.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench

Record = dict[str, Any]
ORGANS = ((0.35, 0.4, 0.5, 0.2, 60.0), (0.65, 0.45, 0.45, 0.13, 110.0), (0.5, 0.7, 0.6, 0.09, 150.0))
"""Where in the body each lies, how far it reaches (shares of the scan's sides), and how bright it is, in HU."""
AIR, FAT, NOISE = -1000.0, -20.0, 25.0
LOW, HIGH = -160.0, 240.0


@dataclass(frozen=True)
class Size:
    """Of everything."""

    scan: tuple[int, int, int]
    patch: int
    steps: int
    """Of the training."""


FULL = Size(scan=(300, 300, 200), patch=96, steps=150)
QUICK = Size(scan=(64, 60, 48), patch=32, steps=20)


def main() -> None:
    said = _words().parse_args()
    if said.measure:
        print(json.dumps(measured(json.loads(said.measure))))
        return
    size, rounds = (QUICK, 1) if said.quick else (FULL, said.rounds)
    with tempfile.TemporaryDirectory(prefix="inference-") as folder:
        job = {"folder": folder, "quick": said.quick, "threads": said.threads}
        print(bench.heading())
        words = (sys.executable, __file__, "--measure")
        made = bench.child(*words, json.dumps(job | {"entrant": "train"}))
        print(f"torch {made['torch']}, MONAI {made['monai']}, {said.threads} thread(s)")
        print(f"scan {size.scan}, windows of {size.patch}, network trained for {size.steps} steps; median of {rounds}")
        told: dict[str, list[Record]] = {}
        for _ in range(rounds):
            for name in ENTRANTS:
                if not said.only or name in said.only.split(","):
                    told.setdefault(name, []).append(bench.child(*words, json.dumps(job | {"entrant": name})))
    print(table(told))


def _words() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--quick", action="store_true", help="a small scan, once: to try the benchmark itself")
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--threads", type=int, default=bench.cores())
    words.add_argument("--only", default="", help="names, separated by commas; the others are compared with the first")
    words.add_argument("--measure", help=argparse.SUPPRESS)
    return words


def table(told: dict[str, list[Record]]) -> str:
    first = told.get(next(iter(ENTRANTS)), [{}])
    base = statistics.median(one["seconds"] for one in first) if "seconds" in first[0] else None
    lines = [f"{'':<34} {'s':>8} {'CPU s':>8} {'times':>6} {'GB':>6} {'same':>9} {'Dice':>7}  windows"]
    for name, some in told.items():
        if errors := [one["error"] for one in some if "error" in one]:
            lines.append(f"{name:<34} left out: {errors[0]}")
            continue
        seconds, cpu, memory = (statistics.median(one[key] for one in some) for key in ("seconds", "cpu", "bytes"))
        times = f"{base / seconds:6.2f}" if base else f"{'-':>6}"
        last = some[-1]
        lines.append(
            f"{name:<34} {seconds:8.2f} {cpu:8.2f} {times} {memory / 1e9:6.2f} {last['same']:9.5%} {last['dice']:7.4f}  "
            f"{last['windows']}"
        )
    return "\n".join(lines)


# in the child


def measured(job: Record) -> Record:
    import torch

    torch.set_num_threads(job["threads"])
    if job["entrant"] == "train":
        return trained(job)
    scan, truth = scene(_size(job).scan, seed=99)
    run = ENTRANTS[job["entrant"]](job, scan)
    held = bench.held()
    bench.forget_peak()
    spent, began = os.times(), time.perf_counter()
    labels, windows = run()
    seconds, after = time.perf_counter() - began, os.times()
    return {
        "seconds": seconds,
        "cpu": after.user + after.system - spent.user - spent.system,
        "bytes": bench.peak() - held,
        "windows": windows,
        **compared(labels, truth, Path(job["folder"]) / f"{job['entrant'].split()[0]}.npy"),
    }


def compared(labels: Any, truth: Any, first: Path) -> Record:
    import numpy as np

    if not first.exists():
        np.save(first, labels)
    dice = [
        2 * ((labels == n) & (truth == n)).sum() / ((labels == n).sum() + (truth == n).sum())
        for n in range(1, len(ORGANS) + 1)
    ]
    return {"same": float((labels == np.load(first)).mean()), "dice": float(np.mean(dice))}


def scene(shape: tuple[int, int, int], seed: int) -> tuple[Any, Any]:
    """A scan in HU and its labels."""
    import numpy as np

    random = np.random.default_rng(seed)
    sides = np.array(shape)[:, None, None, None]
    place = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij")) / sides
    # a body fills about half of a scan's field of view
    body = ((place[0] - 0.5) / 0.42) ** 2 + ((place[1] - 0.5) / 0.36) ** 2 < 1
    scan = np.where(body, np.float32(FAT), np.float32(AIR))
    labels = np.zeros(shape, np.uint8)
    for number, (*centre, reach, bright) in enumerate(ORGANS, start=1):
        moved = np.array(centre) + random.uniform(-0.04, 0.04, 3)
        inside = sum(((place[axis] - moved[axis]) / (reach * s)) ** 2 for axis, s in enumerate((1, 0.8, 1.2))) < 1
        labels[inside], scan[inside] = number, bright
    scan += random.normal(0, NOISE, shape).astype(np.float32)
    return scan, labels


def _size(job: Record) -> Size:
    return QUICK if job["quick"] else FULL


def normalised(scan: Any) -> Any:
    import numpy as np

    return ((np.clip(scan, LOW, HIGH) - 40) / 100).astype(np.float32)


def built(job: Record) -> Any:
    import torch

    import networks

    module, patch = networks.load("residual_unet"), (_size(job).patch,) * 3
    torch.manual_seed(0)
    config = module.fit(module.Config(width=16), patch=patch, spacing=(1.0, 1.0, 1.0))
    return module.build(config, channels=1, classes=len(ORGANS) + 1)


def loaded(job: Record) -> Any:
    from safetensors.torch import load_file

    network = built(job)
    network.load_state_dict(load_file(Path(job["folder"]) / "weights.safetensors"))
    return network.eval()


def trained(job: Record) -> Record:
    """On small windows, which take a moment each and have all that is to be learnt in them."""
    import monai
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from networks.parts.losses import DeepSupervision

    network, loss, random = built(job), DeepSupervision(), np.random.default_rng(0)
    side = min(_size(job).patch, 48)
    steps = _size(job).steps
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    scenes = [scene((120, 120, 88), seed) for seed in range(4)]
    for step in range(steps):
        scan, labels = scenes[step % len(scenes)]
        at = [int(random.integers(0, n - side + 1)) for n in scan.shape]
        cut = tuple(slice(start, start + side) for start in at)
        seen, target = torch.from_numpy(normalised(scan[cut])), torch.from_numpy(labels[cut].astype(np.int64))
        optimiser.zero_grad()
        loss(network(seen[None, None]), target[None]).backward()
        optimiser.step()
        rate.step()
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, Path(job["folder"]) / "weights.safetensors")
    return {"torch": torch.__version__, "monai": monai.__version__}


Run = Callable[[], tuple[Any, str]]


def monai_way(job: Record, scan: Any, usual: bool = False, overlap: float = 0.5) -> Run:
    import torch
    from monai.inferers import SlidingWindowInferer
    from network_layout import usual as as_usual

    network, size = loaded(job), (_size(job).patch,) * 3
    network = as_usual(network) if usual else network
    inferer = SlidingWindowInferer(size, sw_batch_size=1, overlap=overlap, mode="gaussian", sigma_scale=0.125)
    calls = []

    def counted(windows: Any) -> Any:
        calls.append(len(windows))
        return network(windows)

    def run() -> tuple[Any, str]:
        with torch.inference_mode():
            logits = inferer(torch.from_numpy(normalised(scan))[None, None], counted)
            labels = logits.argmax(dim=1)[0].to(torch.uint8).numpy()
        return labels, f"{sum(calls)} computed"

    return run


def our_way(
    job: Record, scan: Any, precision: str = "float32", overlap: float = 0.5, body: bool = False, suited: bool = True
) -> Run:
    import numpy as np
    import torch

    from pipeline.engines.torch import engine
    from pipeline.prediction import Inference, segment_volume
    from preprocessing.plan import Label, Plan
    from preprocessing.steps import Normalise, Orient, Pad, Scale
    from preprocessing.volume import Geometry, Provenance, Volume

    size = (_size(job).patch,) * 3
    scale = Scale(by="dataset", low=LOW, high=HIGH, mean=40.0, deviation=100.0)
    labels = tuple(Label(value=n, name=f"organ{n}", colour=(0, 0, 0)) for n in range(1, len(ORGANS) + 1))
    plan = Plan(
        name="benchmark", channels=("CT",), labels=labels, spacing_mm=(1.0, 1.0, 1.0), patch=size, batch=1,
        steps=(Orient(), Normalise(channels=(scale,)), Pad(shape=size)),
    )  # fmt: skip
    grid = Geometry(shape=scan.shape, affine=np.eye(4))
    volume = Volume(voxels=scan[None], geometry=grid, channels=("CT",), provenance=Provenance(modality="CT"))
    ready = engine(loaded(job), torch.device("cpu"), precision) if suited else loaded(job)
    how = Inference(overlap=overlap, device="cpu", precision=precision, body=body)

    def run() -> tuple[Any, str]:
        found = segment_volume(volume, [ready], plan, how, "")
        count = found.windows
        return found.labels.voxels[0], f"{count.computed} computed, {count.repeated} repeated, {count.skipped} skipped"

    return run


def _ours(**how: Any) -> Callable[[Record, Any], Run]:
    return lambda job, scan: our_way(job, scan, **how)


ENTRANTS: dict[str, Callable[[Record, Any], Run]] = {
    "MONAI": monai_way,
    "MONAI usual network": lambda job, scan: monai_way(job, scan, usual=True),
    "hilum network as it is": _ours(suited=False),
    "hilum": _ours(),
    "hilum bfloat16": _ours(precision="bfloat16"),
    "hilum bfloat16 no air": _ours(precision="bfloat16", body=True),
    "MONAI overlap 0.25": lambda job, scan: monai_way(job, scan, overlap=0.25),
    "hilum overlap 0.25": _ours(overlap=0.25),
    "hilum bfloat16 no air overlap 0.25": _ours(precision="bfloat16", body=True, overlap=0.25),
}

if __name__ == "__main__":
    main()
