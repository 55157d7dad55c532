"""A CT and its labels brought to another spacing: hilum beside scipy, scikit-image, nnU-Net, MONAI and SimpleITK.

0.8 x 0.8 x 3.0 mm to 1.5 mm, cubic splines for the scan, each label by itself for the labels; `--full` is 512 x 512 x 160.
Each call is a process of its own that has imported its library and resampled something small before the clock starts;
they take turns, so that a busy minute hits all alike. `processor` counts the seconds of all cores. Memory is what a call
added at its peak, over the size of its input; differences are from scipy, between the outermost centres (beyond,
everyone has a rule of their own).
`--peers PYTHON` names an interpreter that has nnunetv2 and scikit-image; without it they are looked for in this one.
OMP_NUM_THREADS says how many cores those use that use several.
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

Triple = tuple[int, int, int]
BEFORE_MM, AFTER_MM = (0.8, 0.8, 3.0), (1.5, 1.5, 1.5)
SMALL, FULL = (128, 128, 40), (512, 512, 160)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--peers", default=sys.executable, help="the interpreter that has the others")
    words.add_argument("--full", action="store_true", help="512 x 512 x 160")
    words.add_argument("--labels", type=int, default=8, help="how many labels there are")
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--one", nargs=3, metavar=("WHAT", "WAY", "FOLDER"), help=argparse.SUPPRESS)
    said = words.parse_args()
    shape = FULL if said.full else SMALL
    if said.one:
        what, way, folder = said.one
        print(json.dumps(measured(what, way, Path(folder), shape, said.labels)))
        return
    print(f"{bench.heading()}; {said.rounds} rounds")
    for what, title in (("scan", "float32, order 3"), ("labels", f"uint8, {said.labels} labels")):
        print(f"\n{' x '.join(map(str, shape))} -> {' x '.join(map(str, shape_after(shape)))}, {title}")
        compare(what, said)


def compare(what: str, said: argparse.Namespace) -> None:
    options = [*(["--full"] if said.full else []), "--labels", str(said.labels)]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS[what]}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(said.rounds):
            for way in list(found):
                python = said.peers if way in OTHERS_HOUSE else sys.executable
                answer = bench.child(python, __file__, "--one", what, way, folder, *options)
                if "error" in answer:
                    print(f"{way:<28} left out: {answer['error']}")
                    del found[way]
                else:
                    found[way].append(answer)
        medians = {
            way: {name: statistics.median(answer[name] for answer in answers) for name in ("seconds", "busy", "memory")}
            for way, answers in found.items()
        }
        for way, here in medians.items():
            ratio = here["seconds"] / medians["hilum"]["seconds"]
            busy = f"processor {here['busy']:7.3f} s  {here['busy'] / medians['hilum']['busy']:6.1f}"
            words = f"{way} {found[way][0]['version']}"
            print(f"{words:<32} {here['seconds']:7.3f} s  {ratio:6.1f} of hilum  {busy}", end="  ")
            print(f"memory {here['memory']:5.2f} x input  {difference(Path(folder), what, way)}")


def difference(folder: Path, what: str, way: str) -> str:
    import numpy

    wanted, found = (numpy.load(folder / f"{what}-{name}.npy") for name in ("scipy", way))
    if what == "labels":
        return f"{(wanted != found).mean():.4%} of voxels differ from scipy"
    return f"at most {numpy.abs(wanted - found).max():.4f} HU from scipy"


def shape_after(shape: Triple) -> Triple:
    i, j, k = (round(n * before / after) for n, before, after in zip(shape, BEFORE_MM, AFTER_MM, strict=True))
    return i, j, k


# one call, in a process of its own


def measured(what: str, way: str, folder: Path, shape: Triple, labels: int) -> dict[str, Any]:
    import numpy

    resample, version = WAYS[what][way]()
    voxels = MAKERS[what](shape, labels)
    resample(voxels[:24, :24, :12].copy(), (12, 13, 24))
    before, started, busy = bench.peak(), time.perf_counter(), time.process_time()
    there = resample(voxels, shape_after(shape))
    seconds, busy, memory = (
        time.perf_counter() - started,
        time.process_time() - busy,
        (bench.peak() - before) / voxels.nbytes,
    )
    assert there.shape == shape_after(shape), there.shape
    inner = tuple(slice(2, -2) for _ in range(3))
    numpy.save(folder / f"{what}-{way}.npy", numpy.asarray(there)[inner][::3, ::3, ::3])
    return {"seconds": seconds, "busy": busy, "memory": memory, "version": version}


def a_scan(shape: Triple, labels: int) -> Any:
    """Soft edges and noise, from air to bone."""
    import numpy

    random = numpy.random.default_rng(0)
    j, k = numpy.ogrid[: shape[1], : shape[2]]
    scan = numpy.empty(shape, numpy.float32)
    for row in range(shape[0]):  # nothing else that is large: the peak of memory is to be the call's
        wave = numpy.sin(row / 17.0) * numpy.cos(j / 13.0) * numpy.sin(k / 5.0 + 1)
        scan[row] = 1000 * numpy.tanh(3 * wave) + random.normal(0, 25, shape[1:])
    return scan


def some_labels(shape: Triple, labels: int) -> Any:
    """Ellipsoids of many sizes, anywhere."""
    import numpy

    random = numpy.random.default_rng(0)
    found = numpy.zeros(shape, numpy.uint8)
    for label in range(1, labels + 1):
        centre, radius = random.uniform(0.15, 0.85, 3) * shape, random.uniform(0.02, 0.1) * numpy.array(shape)
        box = tuple(slice(max(0, int(c - r)), int(c + r) + 2) for c, r in zip(centre, radius, strict=True))
        places = numpy.ogrid[box]
        away = sum(((p - c) / r) ** 2 for p, c, r in zip(places, centre, radius, strict=True))
        found[box][away[tuple(slice(n) for n in found[box].shape)] < 1] = label
    return found


MAKERS = {"scan": a_scan, "labels": some_labels}

Way = tuple[Callable[[Any, Triple], Any], str]
"""What brings an array to a shape, and its version. Only what is imported on the way is needed by it."""


def hilum() -> Way:
    from importlib.metadata import version

    from preprocessing.resampling import resample

    return lambda voxels, shape: resample(voxels[None], shape, order=3)[0], version("hilum")


def hilum_labels() -> Way:
    from importlib.metadata import version

    from preprocessing.resampling import resample_labels

    return lambda voxels, shape: resample_labels(voxels[None], shape)[0], version("hilum")


def scipy() -> Way:
    import scipy as library
    from scipy import ndimage

    def resample(voxels: Any, shape: Triple, order: int = 3) -> Any:
        factors = [after / before for before, after in zip(voxels.shape, shape, strict=True)]
        return ndimage.zoom(voxels, factors, order=order, mode="mirror", grid_mode=True)

    return resample, library.__version__


def scipy_labels() -> Way:
    import numpy

    zoom, version = scipy()

    def resample(voxels: Any, shape: Triple) -> Any:
        winner, strongest = numpy.zeros(shape, voxels.dtype), numpy.full(shape, -1, numpy.float32)
        for value in numpy.unique(voxels):
            share = zoom((voxels == value).astype(numpy.float32), shape, order=1)  # type: ignore[call-arg]
            stronger = share > strongest + 1e-6
            winner[stronger], strongest[stronger] = value, share[stronger]
        return winner

    return resample, version


def scikit_image() -> Way:
    import skimage
    from skimage.transform import resize

    return (
        lambda voxels, shape: resize(voxels, shape, order=3, mode="edge", anti_aliasing=False, preserve_range=True),
        skimage.__version__,
    )


def nnunet(separate: bool, labels: bool) -> Way:
    from importlib.metadata import version

    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    def resample(voxels: Any, shape: Triple) -> Any:
        turned, order = voxels.transpose(2, 1, 0)[None], 1 if labels else 3  # its arrays are k, j, i
        mm = BEFORE_MM[::-1], AFTER_MM[::-1]
        there = resample_data_or_seg_to_shape(
            turned,
            shape[::-1],
            *mm,
            is_seg=labels,
            order=order,
            order_z=0,
            force_separate_z=None if separate else False,
        )
        return there[0].transpose(2, 1, 0)

    return resample, version("nnunetv2")


def monai() -> Way:
    import monai as library
    import numpy
    import torch
    from monai.transforms import Spacing

    def resample(voxels: Any, shape: Triple) -> Any:
        before = numpy.diag([*(after / n for after, n in zip(shape, voxels.shape, strict=True)), 1.0])
        image = library.data.MetaTensor(torch.from_numpy(voxels)[None], affine=before)
        return Spacing(pixdim=(1.0, 1.0, 1.0), mode=3, padding_mode="mirror", scale_extent=True)(image)[0].numpy()

    return resample, library.__version__


def simpleitk() -> Way:
    import numpy
    import SimpleITK

    def resample(voxels: Any, shape: Triple) -> Any:
        image = SimpleITK.GetImageFromArray(voxels.transpose(2, 1, 0))
        step = [before / after for before, after in zip(voxels.shape, shape, strict=True)]
        filled = SimpleITK.ResampleImageFilter()
        filled.SetSize([int(n) for n in shape])
        filled.SetOutputSpacing(step)
        filled.SetOutputOrigin([(one - 1) / 2 for one in step])
        filled.SetInterpolator(SimpleITK.sitkBSpline)
        return numpy.asarray(SimpleITK.GetArrayFromImage(filled.Execute(image))).transpose(2, 1, 0)

    return resample, SimpleITK.Version.VersionString()


WAYS: dict[str, dict[str, Callable[[], Way]]] = {
    "scan": {
        "hilum": hilum,
        "scipy": scipy,
        "scikit-image": scikit_image,
        "nnU-Net": lambda: nnunet(separate=True, labels=False),
        "nnU-Net in 3-D": lambda: nnunet(separate=False, labels=False),
        "MONAI Spacing": monai,
        "SimpleITK B-spline": simpleitk,
    },
    "labels": {
        "hilum": hilum_labels,
        "scipy": scipy_labels,
        "nnU-Net": lambda: nnunet(separate=True, labels=True),
        "nnU-Net in 3-D": lambda: nnunet(separate=False, labels=True),
    },
}
OTHERS_HOUSE = {"scikit-image", "nnU-Net", "nnU-Net in 3-D"}


if __name__ == "__main__":
    main()
