"""A prepared case written, and windows read from it at random: Blosc2 as hilum uses it, Zarr 3, a plain numpy memmap.

Each measurement is a process of its own, the stores take turns, and each reads the very windows the others read. Zarr
has the chunks that suit hilum, and those of the size of hilum's blocks, the least that either unpacks; its codec and
level are the same. Zarr unpacks chunks on several cores at once; `processor` counts them all. `--peers PYTHON` names
an interpreter in which zarr is installed; without it, it is left out.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import bench

CASES = {
    "hippocampus": ("36x50x35", "40x56x40"),
    "head": ("181x217x181", "40x56x40"),
    "CT": ("512x512x300", "128x128x128"),
}
"""A scan's shape, and a window's."""
KINDS = ("float32", "float16", "int16")
"""Images as they are and halved, labels."""


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--peers", help="the interpreter that has zarr")
    words.add_argument("--cases", nargs="*", default=["hippocampus", "head"], choices=CASES)
    words.add_argument("--windows", type=int, default=40)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--measure", nargs=2, metavar=("STORE", "WORDS"), help=argparse.SUPPRESS)
    said = words.parse_args()
    if said.measure:
        print(json.dumps(measured(said.measure[0], json.loads(said.measure[1]))))
    else:
        compare(said)


def compare(said: argparse.Namespace) -> None:
    print(bench.heading())
    for name in said.cases:
        shape, patch = ([int(side) for side in sides.split("x")] for sides in CASES[name])
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), shape)
            for kind in KINDS:
                print(f"\n{name}: {CASES[name][0]}, {kind}; {said.windows} windows of {CASES[name][1]}")
                job = {"folder": folder, "kind": kind, "shape": shape, "patch": patch, "windows": said.windows}
                report(in_turn(job | layout(shape, patch), said.peers, said.rounds))


def layout(shape: list[int], patch: list[int]) -> dict[str, Any]:
    """The chunks and blocks that hilum takes."""
    from pipeline import cache

    chunk = cache._sides(shape, patch, cache.CHUNK_VOXELS)
    return {"chunk": chunk, "block": cache._sides(chunk, patch, cache.BLOCK_VOXELS)}


def in_turn(job: dict[str, Any], peers: str | None, rounds: int) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for store, (_, _, is_peer) in STORES.items():
            if (is_peer and not peers) or (store == "hilum" and job["kind"] == "float16"):
                continue
            python = peers if is_peer and peers else sys.executable
            answer = bench.child(python, __file__, "--measure", store, json.dumps(job))
            if "error" in answer:
                sys.exit(f"{store}: {answer['error']}")
            found.setdefault(store, []).append(answer)
    return found


def report(found: dict[str, list[dict[str, Any]]]) -> None:
    best = {
        store: {key: min(one[key] for one in answers) for key in answers[0] if key != "version"}
        for store, answers in found.items()
    }
    ours = best.get("hilum", best["blosc2"])
    print(f"{'':<26}{'import':>8}{'write':>12}{'size':>8}{'window':>12}{'ratio':>7}{'processor':>13}{'ratio':>7}")
    for store, one in best.items():
        print(
            f"{store + ' ' + found[store][0]['version']:<26}{one['import_s']:>6.2f} s{one['write_s']:>10.3f} s"
            f"{one['size']:>8.1%}{one['window_ms']:>9.2f} ms{one['window_ms'] / ours['window_ms']:>7.1f}"
            f"{one['busy_ms']:>10.2f} ms{one['busy_ms'] / ours['busy_ms']:>7.1f}"
        )


# one measurement, in a process of its own


def measured(store: str, job: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    voxels = np.load(Path(job["folder"]) / f"{job['kind']}.npy")
    library, of, _ = STORES[store]
    started = time.perf_counter()
    import_module(library)
    imported = time.perf_counter() - started
    version, write, opened = of(job)
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        started = time.perf_counter()
        write(voxels, Path(folder) / "store")
        written = time.perf_counter() - started
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        read, times = opened(Path(folder) / "store"), []
        for box in windows(job):
            started, busy = time.perf_counter(), time.process_time()
            window = np.asarray(read(box))
            times.append((time.perf_counter() - started, time.process_time() - busy))
            assert np.array_equal(window, voxels[box])
    return {
        "version": version,
        "import_s": imported,
        "write_s": written,
        "size": size / voxels.nbytes,
        "window_ms": statistics.median(wall for wall, _ in times) * 1e3,
        "busy_ms": statistics.median(busy for _, busy in times) * 1e3,
    }


def windows(job: dict[str, Any]) -> list[tuple[slice, ...]]:
    """Boxes inside the scan, each voxel of it as likely to be in one."""
    import numpy as np

    rng, boxes = np.random.default_rng(1), []
    for _ in range(job["windows"]):
        starts = [
            int(rng.integers(0, max(1, side - wide + 1))) for side, wide in zip(job["shape"], job["patch"], strict=True)
        ]
        boxes.append(
            (
                slice(0, 1),
                *(
                    slice(a, min(a + wide, side))
                    for a, wide, side in zip(starts, job["patch"], job["shape"], strict=True)
                ),
            )
        )
    return boxes


Store = tuple[str, Callable[[Any, Path], None], Callable[[Path], Callable[[tuple[slice, ...]], Any]]]
"""Its version; how it writes an array; how it opens what it wrote, to be asked for boxes."""


def hilum(job: dict[str, Any]) -> Store:
    """As training reads, checksums and all."""
    from importlib.metadata import version

    from pipeline import cache

    def write(voxels: Any, path: Path) -> None:
        one = cache._write_array(path.with_suffix(".b2nd"), voxels, tuple(job["patch"]))
        path.with_suffix(".json").write_text(json.dumps(one))

    def opened(path: Path) -> Callable[[tuple[slice, ...]], Any]:
        array = cache._Array(path.with_suffix(".b2nd"), json.loads(path.with_suffix(".json").read_text()))
        return lambda box: array.box([one.start for one in box[1:]], [one.stop for one in box[1:]])

    return version("hilum"), write, opened


def blosc2(job: dict[str, Any]) -> Store:
    import blosc2 as library

    packing = library.CParams(codec=library.Codec.ZSTD, clevel=1, filters=[library.Filter.SHUFFLE], nthreads=1)

    def write(voxels: Any, path: Path) -> None:
        library.asarray(
            voxels, urlpath=str(path), chunks=(1, *job["chunk"]), blocks=(1, *job["block"]), cparams=packing
        )

    def opened(path: Path) -> Callable[[tuple[slice, ...]], Any]:
        array = library.open(str(path), mode="r", mmap_mode="r", dparams=library.DParams(nthreads=1))
        return lambda box: array[box]

    return library.__version__, write, opened


def memmap(job: dict[str, Any]) -> Store:
    import numpy as np

    def write(voxels: Any, path: Path) -> None:
        np.save(path.with_suffix(".npy"), voxels)

    def opened(path: Path) -> Callable[[tuple[slice, ...]], Any]:
        array = np.load(path.with_suffix(".npy"), mmap_mode="r")
        return lambda box: array[box].copy()

    return np.__version__, write, opened


def zarr_of(sides: str) -> Callable[[dict[str, Any]], Store]:
    def store(job: dict[str, Any]) -> Store:
        import zarr
        from zarr.codecs import BloscCodec

        def write(voxels: Any, path: Path) -> None:
            array = zarr.create_array(
                store=str(path), shape=voxels.shape, dtype=voxels.dtype, chunks=(1, *job[sides]),
                compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="shuffle")],
            )  # fmt: skip
            array[:] = voxels

        def opened(path: Path) -> Callable[[tuple[slice, ...]], Any]:
            array = zarr.open_array(str(path), mode="r")
            return lambda box: array[box]

        return zarr.__version__, write, opened

    return store


STORES: dict[str, tuple[str, Callable[[dict[str, Any]], Store], bool]] = {
    "hilum": ("blosc2", hilum, False),
    "blosc2": ("blosc2", blosc2, False),
    "numpy memmap": ("numpy", memmap, False),
    "zarr": ("zarr", zarr_of("chunk"), True),
    "zarr, small": ("zarr", zarr_of("block"), True),
}
"""The library each adds to numpy, how it is measured, and whether it is a peer."""


# the case


def make(folder: Path, shape: list[int]) -> None:
    """A body of noise in air, its intensities normalised; and two organs."""
    import numpy as np

    rng = np.random.default_rng(0)
    i, j, k = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij", sparse=True)
    body = i**2 / 0.8 + j**2 / 0.7 + 0 * k < 1
    scan = np.where(body, rng.normal(300, 40, shape), rng.normal(5, 2, shape)).round().clip(0)
    image = ((scan - scan.mean()) / scan.std()).astype(np.float32)
    labels = np.zeros(shape, np.int16)
    labels[(i - 0.2) ** 2 + j**2 + k**2 < 0.1] = 1
    labels[(i + 0.4) ** 2 + j**2 + k**2 < 0.06] = 2
    for kind, voxels in (("float32", image), ("float16", image.astype(np.float16)), ("int16", labels)):
        np.save(folder / f"{kind}.npy", voxels[None])


if __name__ == "__main__":
    main()
