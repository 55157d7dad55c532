"""What a map of where a network looked costs: beside segmenting the same scan, and beside grad-cam's own HiResCAM on one window.

The scan is noise with a bright organ and two lesions in it; the network is `residual_unet` with weights nobody trained, which
costs what a trained one does, and explained are the organ and the lesions as they were drawn, with all tests. Each row is a
process of its own, and its memory the most it ever held over what it held before. Seams are looked for in maps of their own: a
map that jumps where a window begins or ends is steeper there than in the planes beside. The table has the most by which the
mean step from one plane to the next exceeds that of the planes around it, in codes of int8, 127 of which are the map's peak:
for planes where no window ends, which is the noise, and for those where one does.

The goal is about `--shape 512 512 300 --window 96 --width 16`, which takes hours on two cores.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bench

RESULTS = Path(__file__).parent / "results" / "explanations.md"
Record = dict[str, Any]
GOAL = 1.2
"""Times the memory of segmenting."""


def main() -> None:
    said = _words().parse_args()
    if said.one:
        print(json.dumps(ONE[said.one](said)))
        return
    options = ["--shape", *map(str, said.shape), "--window", str(said.window), "--width", str(said.width)]
    options += ["--overlap", str(said.overlap), "--threads", str(said.threads)]
    surroundings = {"OMP_NUM_THREADS": str(said.threads)}
    found: dict[str, Record] = {}
    for name in said.only or ONE:
        found[name] = bench.child(sys.executable, __file__, "--one", name, *options, environment=surroundings)
        print(name, found[name], file=sys.stderr, flush=True)
    shown = report(found, said)
    if said.results:
        said.results.write_text(shown)
    print(shown)


def _words() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--shape", type=int, nargs=3, default=(96, 80, 64), help="voxels of the scan")
    words.add_argument("--window", type=int, default=32, help="voxels along each side of a window")
    words.add_argument("--width", type=int, default=8, help="channels of the network at full resolution")
    words.add_argument("--overlap", type=float, default=0.5)
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--only", nargs="+", choices=ONE, help="these alone")
    words.add_argument("--results", type=Path, help=f"where the table goes, as in {RESULTS.name}")
    words.add_argument("--one", help=argparse.SUPPRESS)
    return words


# the scan and the network


def scan_and_labels(shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """An organ as wide as a third of the scan, two lesions of a fiftieth in it."""
    import numpy

    from preprocessing.volume import Geometry, Volume

    random = numpy.random.default_rng(0)
    voxels, labels = numpy.empty((1, *shape), numpy.float32), numpy.zeros((1, *shape), numpy.uint8)
    ball = [(0.42, 0.45, 0.5, 1 / 6, 1), (0.36, 0.42, 0.5, 1 / 50, 2), (0.48, 0.5, 0.54, 1 / 60, 2)]
    middle = [numpy.arange(size) / size for size in shape]
    for row, i in enumerate(middle[0]):
        for ci, cj, ck, radius, value in ball:
            away = (i - ci) ** 2 + (middle[1][:, None] - cj) ** 2 + (middle[2][None, :] - ck) ** 2
            labels[0, row][away < radius**2] = value
        voxels[0, row] = random.normal(0, 0.3, shape[1:]) + labels[0, row]
    grid = Geometry(shape=shape, affine=numpy.eye(4))
    return Volume(voxels=voxels, geometry=grid, channels=("ct",)), Volume(
        voxels=labels, geometry=grid, channels=("labels",)
    )


def plan_for(window: int) -> Any:
    from preprocessing.plan import Label, Plan, Recipe

    return Plan(
        name="benchmark",
        channels=("ct",),
        labels=(
            Label(value=1, name="organ", colour=(230, 159, 0)),
            Label(value=2, name="lesion", colour=(86, 180, 233)),
        ),
        steps=(),
        spacing_mm=(1.0, 1.0, 1.0),
        patch=(window, window, window),
        batch=2,
        dataset="ab" * 32,
        recipe=Recipe(mirror=(True, True, True)),
    )


def network_for(said: argparse.Namespace) -> Any:
    import torch

    from networks import residual_unet

    torch.manual_seed(0)
    torch.set_num_threads(said.threads)
    config = residual_unet.fit(
        residual_unet.Config(width=said.width), patch=(said.window,) * 3, spacing=(1.0, 1.0, 1.0)
    )
    return residual_unet.build(config, channels=1, classes=3).eval()


def taken(work: Callable[[], Any]) -> Record:
    """Seconds, processor seconds and memory of that work."""
    bench.forget_peak()
    before, started, busy = bench.held(), time.perf_counter(), time.process_time()
    work()
    spent = {"seconds": time.perf_counter() - started, "busy": time.process_time() - busy}
    return {**spent, "memory": bench.peak() - before, "peak": bench.peak()}


# a whole scan


def segmenting(said: argparse.Namespace) -> Record:
    return _whole(said, explains=False)


def explaining(said: argparse.Namespace) -> Record:
    """Segmenting and then explaining, as `--outputs saliency` does."""
    return _whole(said, explains=True)


def _whole(said: argparse.Namespace, explains: bool) -> Record:
    from pipeline.explanation import Choice, explain
    from pipeline.prediction import Inference, segment_volume

    network, plan, how = network_for(said), plan_for(said.window), Inference(device="cpu", overlap=said.overlap)
    scan, labels = scan_and_labels(tuple(said.shape))
    told: Record = {}

    def work() -> None:
        started = time.perf_counter()
        segment_volume(scan, [network], plan, how, "benchmark")
        told["segmenting"], told["segmented"] = time.perf_counter() - started, bench.peak()
        if explains:
            maps = explain(scan, labels, [network], plan, how, Choice())
            told["maps"] = len(maps)

    return {**taken(work), **told}


# one window


def a_look_alone(said: argparse.Namespace) -> Record:
    """The forward pass, nothing kept."""
    import torch

    network, window, _ = _window(said)

    def work() -> None:
        with torch.inference_mode():
            network(window[None])

    return taken(work)


def our_hirescam(said: argparse.Namespace) -> Record:
    import pytorch_grad_cam  # noqa: F401  # its import brings 0.15 GB of others, and is counted for nobody

    from pipeline import attribution

    network, window, mask = _window(said)
    layer = _layer(said, network)

    def work() -> None:
        with attribution.undisturbed([network]):
            attribution.see(network, window, lambda logits: (logits[2] * mask).sum() / mask.sum(), "hirescam", layer)

    return {**taken(work), "layer": layer}


def stock_hirescam(said: argparse.Namespace) -> Record:
    """grad-cam as its own examples use it: every parameter asks for its gradient."""
    from pytorch_grad_cam import HiResCAM

    from pipeline import attribution

    network, window, mask = _window(said)
    layer = _layer(said, network)

    def work() -> None:
        with HiResCAM(model=network, target_layers=[attribution.layers(network)[layer]]) as cam:
            cam(input_tensor=window[None], targets=[lambda logits: (logits[2] * mask).sum() / mask.sum()])

    return {**taken(work), "layer": layer}


def _window(said: argparse.Namespace) -> tuple[Any, Any, Any]:
    import torch

    network, side = network_for(said), said.window
    window, mask = torch.randn(1, side, side, side), torch.zeros(side, side, side)
    mask[side // 3 : side // 2, side // 3 : side // 2, side // 3 : side // 2] = 1
    with torch.inference_mode():
        network(torch.randn(1, 1, *(2 * step for step in network.divisor)))  # what the first pass loads
    return network, window, mask


def _layer(said: argparse.Namespace, network: Any) -> str:
    from pipeline import attribution

    return attribution.chosen_layer(network, 1, (said.window,) * 3).name


# seams

SEAM_SHAPE, SEAM_WINDOW = (72, 64, 56), 32


def seams(said: argparse.Namespace) -> Record:
    """By layer, and in the scan itself."""
    import torch

    from pipeline.attribution import layers, undisturbed
    from pipeline.explanation import Scene, stitched
    from pipeline.lens import Lens
    from pipeline.prediction import Inference
    from pipeline.stream import Windows
    from preprocessing.steps import prepare

    network = network_for(argparse.Namespace(window=SEAM_WINDOW, width=8, threads=said.threads))
    plan, how = plan_for(SEAM_WINDOW), Inference(device="cpu")
    scan, labels = scan_and_labels(SEAM_SHAPE)
    prepared, trail = prepare(scan, plan.steps)
    windows = Windows.over(SEAM_SHAPE, plan.patch, how.overlap)
    scene = Scene(
        scan=prepared.to_tensor(), windows=windows, trail=trail, geometry=prepared.geometry, labels=labels, plan=plan
    )
    told: Record = {}
    for layer in (*layers(network), "input"):
        method = "gradient_x_input" if layer == "input" else "hirescam"
        with undisturbed([network]):
            lens = Lens.through([network], (), plan, how, method, "" if layer == "input" else layer)
            made = stitched(scene, lens, torch.from_numpy(labels.voxels[0] == 1), 1)
        starts = [{start[axis] - made.first[axis] for start in windows.starts} for axis in range(3)]
        told[layer] = _steeper(made.look.map.numpy(), starts)
    return told


def _steeper(shown: Any, starts: list[set[int]]) -> dict[str, float]:
    """The most by which a mean step from one plane to the next exceeds those around it, in codes."""
    import numpy

    found: dict[str, list[float]] = {"elsewhere": [], "at an end": []}
    code = numpy.abs(shown).max() / 127
    for axis, begins in enumerate(starts):
        steps = numpy.abs(numpy.diff(numpy.moveaxis(shown, axis, 0), axis=0)).mean(axis=(1, 2)) / code
        ends = {plane - 1 for start in begins for plane in (start, start + SEAM_WINDOW)}
        for plane, step in enumerate(steps):
            around = numpy.median(steps[max(0, plane - 8) : plane + 9])
            found["at an end" if plane in ends else "elsewhere"].append(float(step - around))
    return {where: max(excess) for where, excess in found.items()}


ONE: dict[str, Callable[[argparse.Namespace], Record]] = {
    each.__name__: each for each in (seams, a_look_alone, our_hirescam, stock_hirescam, segmenting, explaining)
}


# the table


def report(measured: dict[str, Record], said: argparse.Namespace) -> str:
    """Markdown."""
    found = {name: measured.get(name, {"error": "not measured"}) for name in ONE}
    lines = [
        f"## A scan of {' x '.join(map(str, said.shape))}, windows of {said.window}³ that overlap by {said.overlap:g}, "
        f"residual_unet of width {said.width}",
        "",
        "| | peak GB | GB over the start | s | processor s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, words in {"segmenting": "segmented", "explaining": "segmented and explained, with all tests"}.items():
        lines.append(f"| {words} | {_row(found[name], ('peak', 'memory'))} |")
    if "error" not in found["explaining"]:
        # the same process before it explains, where there is no other
        ratio = found["explaining"]["peak"] / found["segmenting"].get("peak", found["explaining"]["segmented"])
        lines += [
            "",
            f"{found['explaining']['maps']} maps for {ratio:.2f} times the memory of segmenting; the goal, {GOAL:g}, is "
            f"{'met' if ratio <= GOAL else 'MISSED'}. Segmenting took {found['explaining']['segmenting']:.0f} s of the second row.",
        ]
    lines += [
        "",
        f"## One window of {said.window}³",
        "",
        "| | GB over the start | s | processor s |",
        "| --- | --- | --- | --- |",
    ]
    rows = {
        "a_look_alone": "forward pass",
        "our_hirescam": "HiResCAM of hilum",
        "stock_hirescam": "HiResCAM of grad-cam",
    }
    for name, words in rows.items():
        layer = f", {found[name]['layer']}" if "layer" in found[name] else ""
        lines.append(f"| {words}{layer} | {_row(found[name], ('memory',))} |")
    lines += ["", f"## Seams: {' x '.join(map(str, SEAM_SHAPE))}, windows of {SEAM_WINDOW}³", ""]
    lines += ["| layer | codes steeper elsewhere | codes steeper at a window's end |", "| --- | --- | --- |"]
    for layer, excess in found["seams"].items():
        lines.append(f"| {layer} | {_told(excess)} |")
    names = ("hilum", "torch", "grad-cam", "numpy")
    lines += [
        "",
        f"Measured {datetime.now(UTC):%Y-%m-%d} on {bench.heading()}; {said.threads} threads.",
        "",
        f"Versions: {', '.join(f'{name} {version(name)}' for name in names)}.",
        "",
    ]
    return "\n".join(lines)


def _told(excess: Any) -> str:
    return " | ".join(f"{value:.2f}" for value in excess.values()) if isinstance(excess, dict) else f"{excess} | -"


def _row(record: Record, sizes: tuple[str, ...]) -> str:
    if "error" in record:
        return f"{record['error']} |" + " - |" * len(sizes) + " -"
    told = [f"{record[name] / 1e9:.2f}" for name in sizes] + [f"{record[name]:.1f}" for name in ("seconds", "busy")]
    return " | ".join(told)


if __name__ == "__main__":
    main()
