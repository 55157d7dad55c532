"""What it costs to tell MLflow 100,000 points of curves, by itself and as a share of a training's time.

    python benchmarks/tracking.py [--points 100000] [--epochs 30] [--uri sqlite:///...]

The first row is the whole cost: points told as fast as they come, eight curves to a step, until the store has them all.
The others are one small training on a CPU (steps of a real network, forwards and backwards; ten points after every twenty
of them, as `hilum train` tells them), with a tracker and without, turn by turn. Times are wall and CPU seconds of the
process; the store is a sqlite file unless another is named. A share is what the training would spend on its points: its
number of points times the cost of one, over the time that it took without them.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import bench

HOUSE = Path(__file__).resolve().parents[1]
CURVES, STEPS, TOLD = 8, 20, 10
"""Curves told at once in the first row; steps of an epoch, and points after it, in the others."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--uri", default="", help="a store; by default a new sqlite file")
    parser.add_argument("--child", choices=("tell", "train", "train_telling"))
    said = parser.parse_args()
    if said.child:
        print(json.dumps(measured(said.child, said.points, said.epochs, said.uri)))
        return
    print(bench.heading())
    with tempfile.TemporaryDirectory() as folder:
        uri = said.uri or f"sqlite:///{folder}/mlflow.db"
        words = ["--points", str(said.points), "--epochs", str(said.epochs), "--uri", uri, "--child"]
        report(*(bench.child(sys.executable, __file__, *words, each) for each in ("tell", "train", "train_telling")))


def report(told: dict, plain: dict, telling: dict) -> None:
    for one in (told, plain, telling):
        if "error" in one:
            sys.exit(one["error"])
    print(f"{told['points']:,} points: {told['wall']:.1f} s wall, {told['cpu']:.1f} s CPU,", end=" ")
    print(f"{1000 * told['wall'] / told['points']:.3f} ms each, {told['stored']:,} stored")
    for name, one in (("without", plain), ("with", telling)):
        print(f"training of {one['steps']:,} steps {name} points: {one['wall']:.1f} s wall, {one['cpu']:.1f} s CPU")
    each = told["wall"] / told["points"]
    per_point = plain["wall"] / (plain["steps"] / STEPS * TOLD)
    print(f"share of the training's time: {100 * each / per_point:.2f} % (goal: under 2 %);", end=" ")
    print(f"a training with 100,000 points would take {100_000 * per_point / 3600:.1f} h or more")


def measured(kind: str, points: int, epochs: int, uri: str) -> dict:
    sys.path.insert(0, str(HOUSE))
    tracker = None if kind == "train" else opened(uri)
    began, began_cpu = time.perf_counter(), time.process_time()
    if kind == "tell":
        steps = points // CURVES
        for step in range(steps):
            tracker.metrics({f"train/curve {curve}": 1 / (step + curve + 1) for curve in range(CURVES)}, step)
    else:
        steps = train(epochs, tracker)
    if tracker is not None and not tracker.flush():
        sys.exit("the store went away")
    took = {"wall": time.perf_counter() - began, "cpu": time.process_time() - began_cpu, "steps": steps}
    if kind != "tell":
        return took
    history = tracker._client.get_metric_history(tracker.run_id, "train/curve 0")
    return took | {"points": steps * CURVES, "stored": CURVES * len({point.step for point in history})}


def opened(uri: str):
    from pipeline.tracking import open_run

    folder = Path(tempfile.mkdtemp())
    return open_run(
        uri=uri, experiment="benchmark", run_name="points", params={}, tags={}, journal=folder / "points.jsonl"
    )


def train(epochs: int, tracker) -> int:
    """Steps of the network that `hilum train` takes by default, at its narrowest, on windows of 32 voxels."""
    import torch

    from networks import residual_unet

    torch.set_num_threads(1)
    strides = ((1, 1, 1), (2, 2, 2), (2, 2, 2))
    config = residual_unet.Config(width=8, blocks=(1, 1), strides=strides, kernels=((3, 3, 3),) * 3)
    network = residual_unet.build(config, channels=1, classes=3)
    optimiser = torch.optim.AdamW(network.parameters())
    window = torch.randn(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    for step in range(epochs * STEPS):
        answer = network(window)
        loss = (answer if isinstance(answer, torch.Tensor) else answer[0]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if tracker is not None and (step + 1) % STEPS == 0:
            tracker.metrics({f"train/curve {curve}": float(loss) for curve in range(TOLD)}, step // STEPS)
            tracker.flush()
    return epochs * STEPS


if __name__ == "__main__":
    main()
