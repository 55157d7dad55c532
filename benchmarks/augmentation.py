"""Training windows cut from a scan in memory and augmented: hilum beside batchgeneratorsv2 and TorchIO, windows a second.

nnU-Net's list with its probabilities and ranges for all: hilum's `nnunet`, nnU-Net's own training transforms, and the
nearest that TorchIO has. hilum's `default` is another list and stands beside them for its cost alone. One process each,
which has made its scan and warmed up before the clock starts; they take turns, so that a busy minute hits all alike.
Every round takes about as many seconds of windows from each. `--peers PYTHON` names an interpreter in which the others are
installed; without it they are looked for in this one.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import bench

SIZES = {
    "40x56x40": (1, (40, 56, 40)),
    "128x128x128": (1, (128, 128, 128)),
    "4x128x128x128": (4, (128, 128, 128)),
}
SPACING_MM = (1.0, 1.0, 1.0)
ROUND_WINDOWS = 25
"""Windows between two looks at the clock."""

Size = tuple[int, int, int]


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--peers", default=sys.executable, help="the interpreter that has the others")
    words.add_argument("--seconds", type=float, default=5.0, help="of each, in each round")
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    words.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    words.add_argument("--measure", nargs=2, metavar=("WHO", "SIZE"), help=argparse.SUPPRESS)
    words.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    said = words.parse_args()
    if said.measure:
        print(json.dumps(measured(said.measure[0], *SIZES[said.measure[1]], said.seconds, said.seed)))
        return
    print(bench.heading())
    for threads in said.threads:
        for size in said.sizes:
            print(f"\n{size}, {threads} thread(s), {said.rounds} rounds of {said.seconds:g} s")
            report(in_turn(said.peers, size, threads, said.seconds, said.rounds))


def in_turn(peers: str, size: str, threads: int, seconds: float, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What was measured of each, round by round; what is not installed drops out and says why."""
    found: dict[str, list[dict[str, Any]]] = {who: [] for who in WHO}
    for seed in range(rounds):
        for who in list(found):
            python = sys.executable if who.startswith("hilum") else peers
            answer = child(python, threads, "--measure", who, size, "--seconds", str(seconds), "--seed", str(seed))
            if "error" in answer:
                print(f"{who:<20} left out: {answer['error']}")
                del found[who]
            else:
                found[who].append(answer)
    return found


def report(found: dict[str, list[dict[str, Any]]]) -> None:
    """Of a second on the clock, and of a second of processor time, which other programs on the machine disturb less."""
    speeds = {who: [median(answers, "seconds"), median(answers, "busy")] for who, answers in found.items()}
    print(f"{'':<34} {'windows/s':>10} {'of processor':>13}   hilum nnunet is so many times as fast")
    for who, answers in found.items():
        clock, busy = speeds[who]
        told = f"{who + ', ' + answers[0]['version']:<34} {clock:10.2f} {busy:13.2f}"
        if not who.startswith("hilum") and "hilum nnunet" in speeds:
            told += f"   {speeds['hilum nnunet'][0] / clock:.2f}, {speeds['hilum nnunet'][1] / busy:.2f} of processor"
        print(f"{told}   ({sum(answer['windows'] for answer in answers)} windows)")


def median(answers: list[dict[str, Any]], clock: str) -> float:
    return statistics.median(answer["windows"] / answer[clock] for answer in answers)


def child(python: str, threads: int, *words: str) -> dict[str, Any]:
    """What a fresh process says that has so many threads."""
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    limits["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(threads)
    return bench.child(python, __file__, *words, environment=limits)


# one measurement, in a process of its own


def measured(who: str, channels: int, patch: Size, seconds: float, seed: int) -> dict[str, Any]:
    windows, version = WHO[who](channels, patch, seed)
    for _ in range(ROUND_WINDOWS):
        next(windows)
    done, started, busy = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        for _ in range(ROUND_WINDOWS):
            next(windows)
        done += ROUND_WINDOWS
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    return {"windows": done, "seconds": seconds, "busy": busy, "version": version}


def scan(channels: int, patch: Size, margin: float) -> tuple[Any, Any]:
    """A smooth image and two labels, one in the other, as wide as `margin` times the window."""
    import numpy

    shape = tuple(round(margin * side) for side in patch)
    x, y, z = numpy.meshgrid(
        *(numpy.linspace(-1, 1, n, dtype=numpy.float32) for n in shape), indexing="ij", sparse=True
    )
    radius = numpy.sqrt(x * x + 1.3 * y * y + 0.8 * z * z)
    image = numpy.stack([numpy.cos(3 * radius + n) + 0.2 * numpy.sin(20 * x * y) for n in range(channels)])
    return image, ((radius < 0.6).astype(numpy.int16) + (radius < 0.3))[None]


def corner(shape: Size, size: Size, rng: Any) -> list[int]:
    return [int(rng.integers(0, max(0, n - side) + 1)) for n, side in zip(shape, size, strict=True)]


Maker = Callable[[int, Size, int], tuple[Iterator[Any], str]]
"""From channels, a window's size and a seed to windows without end, and the version of what makes them."""
MARGIN = 2
"""How much wider a scan is than a window: almost every turn stays inside, and no other library reaches further."""


def hilum(preset: str) -> Maker:
    def windows(channels: int, patch: Size, seed: int) -> tuple[Iterator[Any], str]:
        from importlib.metadata import version

        import numpy
        import torch

        from preprocessing.augment import AUGMENTATIONS, augment, draw_turn
        from preprocessing.patches import cut

        image, labels = scan(channels, patch, MARGIN)
        augmentation = AUGMENTATIONS[preset]

        def drawn(n: int) -> Any:
            rng = numpy.random.default_rng([seed, n])
            turn = draw_turn(rng, augmentation, SPACING_MM, patch, (True, True, True))
            size = turn.reach(patch, SPACING_MM)
            start = corner(image.shape[1:], size, rng)
            seen, truth = torch.from_numpy(cut(image, start, size, 0)), torch.from_numpy(cut(labels, start, size, -1))
            return augment(seen, truth, turn, patch, SPACING_MM, rng, augmentation)

        return map(drawn, count()), version("hilum")

    return windows


def batchgeneratorsv2(channels: int, patch: Size, seed: int) -> tuple[Iterator[Any], str]:
    """nnU-Net's trainer's own list, from windows as wide as its loader cuts them; without its label pyramids."""
    from importlib.metadata import version

    import numpy
    import torch
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    numpy.random.seed(seed)
    torch.manual_seed(seed)
    rng = numpy.random.default_rng(seed)
    angle = (-numpy.pi / 6, numpy.pi / 6)
    size = tuple(int(n) for n in get_patch_size(numpy.array(patch), angle, angle, angle, (0.85, 1.25)))
    transform = nnUNetTrainer.get_training_transforms(patch, angle, None, (0, 1, 2), False)
    image, labels = scan(channels, patch, MARGIN)

    def drawn(_: int) -> Any:
        i, j, k = corner(image.shape[1:], size, rng)
        inside = (slice(None), slice(i, i + size[0]), slice(j, j + size[1]), slice(k, k + size[2]))
        seen, truth = torch.from_numpy(image[inside].copy()), torch.from_numpy(labels[inside].copy())
        return transform(image=seen, segmentation=truth)

    return map(drawn, count()), version("batchgeneratorsv2")


def torchio(channels: int, patch: Size, seed: int) -> tuple[Iterator[Any], str]:
    """What it has of the list: no contrast, gamma without mean and deviation kept, one axis of low resolution."""
    import warnings
    from importlib.metadata import version

    warnings.simplefilter("ignore")
    import numpy
    import torch
    import torchio as tio

    torch.manual_seed(seed)
    rng = numpy.random.default_rng(seed)
    brightness = tio.Lambda(lambda voxels: voxels * (0.75 + 0.5 * torch.rand(1)), [tio.INTENSITY], p=0.15)
    transform = tio.Compose(
        [
            tio.RandomAffine(scales=0, degrees=30, default_pad_value=0, p=0.2),
            tio.RandomAffine(scales=(0.7, 1.4), degrees=0, isotropic=True, default_pad_value=0, p=0.2),
            tio.RandomNoise(std=(0, 0.1), p=0.1),
            tio.RandomBlur(std=(0.5, 1), p=0.1),
            brightness,
            tio.RandomAnisotropy(downsampling=(1, 2), p=0.125),
            tio.RandomGamma(log_gamma=(-0.36, 0.4), p=0.37),
            tio.RandomFlip(axes=(0, 1, 2), flip_probability=0.5),
        ]
    )
    image, labels = scan(channels, patch, MARGIN)

    def drawn(_: int) -> Any:
        i, j, k = corner(image.shape[1:], patch, rng)
        inside = (slice(None), slice(i, i + patch[0]), slice(j, j + patch[1]), slice(k, k + patch[2]))
        seen, truth = torch.from_numpy(image[inside].copy()), torch.from_numpy(labels[inside].copy())
        return transform(tio.Subject(image=tio.ScalarImage(tensor=seen), labels=tio.LabelMap(tensor=truth)))

    return map(drawn, count()), version("torchio")


WHO: dict[str, Maker] = {
    "hilum nnunet": hilum("nnunet"),
    "hilum default": hilum("default"),
    "batchgeneratorsv2": batchgeneratorsv2,
    "torchio": torchio,
}


if __name__ == "__main__":
    main()
