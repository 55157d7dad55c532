"""The memory of a training step as `hilum plan` predicts it, beside what a fresh process then takes at its peak.

Each row is a process of its own that does two real steps (forward, loss, backward, optimiser) and reads the most it ever held
(VmHWM) from the system. What it held before its first step is measured, not predicted: Python and torch with what a first
tiny step loads; a training has Lightning and MLflow besides (pipeline/footprint.py, PROCESS_GB).
"""

import argparse
import json
import sys
from importlib.metadata import version
from typing import Any

import bench

SMALL = [
    ("residual_unet", {"width": 8}, (40, 56, 40), 2),
    ("residual_unet", {"width": 16}, (40, 56, 40), 2),
    ("residual_unet", {"width": 16}, (40, 56, 40), 4),
    ("residual_unet", {"width": 32}, (40, 56, 40), 2),
    ("residual_unet", {"width": 16}, (64, 64, 64), 2),
    ("residual_unet", {"width": 32, "plain": True, "blocks": [2], "decoder": 2, "bias": True}, (40, 56, 40), 2),
    ("segresnet", {"width": 16}, (40, 56, 40), 2),
    ("segresnet", {"width": 16}, (64, 64, 64), 2),
]
LARGE = [
    ("residual_unet", {"width": 16}, (96, 96, 96), 2),
    ("residual_unet", {"width": 32}, (96, 96, 96), 2),
    ("residual_unet", {"width": 16}, (40, 56, 40), 16),
    ("segresnet", {"width": 32}, (96, 96, 96), 2),
]


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--large", action="store_true", help="windows that take gigabytes, too")
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--step", help=argparse.SUPPRESS)
    said = words.parse_args()
    if said.step:
        print(json.dumps(measured(*json.loads(said.step))))
    else:
        compare(SMALL + LARGE * said.large, said.threads)


def compare(rows: list[Any], threads: int) -> None:
    print(f"{bench.heading()}; {threads} threads, torch {version('torch')}, float32, AdamW")
    print(f"{'network':<58} {'windows':>14}  {'before':>7} {'predicted':>9} {'measured':>9}  ratio")
    worst = 1.0
    for name, options, patch, batch in rows:
        found = child(name, options, patch, batch, threads)
        predicted, peak = found["before"] + found["predicted"], found["peak"]
        worst = max(worst, predicted / peak, peak / predicted)
        told = name + " " + " ".join(f"{key} {value}" for key, value in options.items())
        windows = f"{batch} x {'x'.join(map(str, patch))}"
        print(f"{told:<58} {windows:>14}  {found['before']:7.2f} {predicted:9.2f} {peak:9.2f}  {predicted / peak:5.2f}")
    print(f"gigabytes of the whole process; the worst prediction is off by {worst - 1:.0%}")


def child(name: str, options: dict[str, Any], patch: tuple[int, ...], batch: int, threads: int) -> dict[str, float]:
    step = json.dumps([name, options, patch, batch])
    return bench.child(sys.executable, __file__, "--step", step, environment={"OMP_NUM_THREADS": str(threads)})


def measured(name: str, options: dict[str, Any], patch: list[int], batch: int) -> dict[str, float]:
    import torch

    import networks
    from networks import residual_unet
    from networks.parts.losses import DeepSupervision
    from pipeline.footprint import footprint
    from preprocessing.records import decode

    module = networks.load(name)
    window = (patch[0], patch[1], patch[2])
    config = module.fit(decode(module.Config, options, where=name), patch=window, spacing=(1.0, 1.0, 1.0))
    tiny = residual_unet.fit(residual_unet.Config(width=2), patch=(16, 16, 16), spacing=(1.0, 1.0, 1.0))
    step_of(residual_unet.build(tiny, channels=1, classes=3), (16, 16, 16), 2)
    predicted = footprint(
        lambda: module.build(config, channels=1, classes=3), channels=1, patch=window, batch=batch
    ).gigabytes("cpu")  # fmt: skip
    before = bench.held() / 1e9
    network = module.build(config, channels=1, classes=3)
    loss = DeepSupervision()
    optimiser = torch.optim.AdamW(network.parameters())
    for _ in range(2):
        step_of(network, window, batch, optimiser, loss)
    return {"before": before, "predicted": predicted, "peak": bench.peak() / 1e9}


def step_of(network: Any, patch: tuple[int, int, int], batch: int, optimiser: Any = None, loss: Any = None) -> None:
    import torch

    from networks.parts.losses import DeepSupervision

    image, truth = torch.randn(batch, 1, *patch), torch.randint(0, 3, (batch, *patch))
    (loss or DeepSupervision())(network.train()(image), truth).backward()
    optimiser = optimiser or torch.optim.AdamW(network.parameters())
    optimiser.step()
    optimiser.zero_grad()


if __name__ == "__main__":
    main()
