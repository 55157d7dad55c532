"""Tiles per second from slides to features: hilum, and the usual way, with the same encoder on the same tiles.

The usual way is that of CLAM and TRIDENT: for each slide a DataLoader whose workers ask OpenSlide for one `read_region` per
coordinate, from the level `get_best_level_for_downsample` names, and bring it to size with PIL; the features are appended to
an HDF5 file batch by batch. It is given the coordinates for nothing: hilum's time counts opening the slides, hashing them,
finding the tissue and laying the tiles. Both call the very same encoder on batches of bytes, so that what differs is reading.

Slides are phantoms at 0.25 µm/px in an Aperio's layout (JPEG blocks of 240 pixels, levels 1, 4 and 16 times as coarse), each
mirrored several times to a size worth measuring; and copies of real ones, given by `--slides`. Each measurement is a process of
its own; the entrants take turns. Memory is the most that the process and its workers had together, shared pages counted once
(PSS, sampled four times a second). What has a line in `--results` is not measured again; `--table` prints what is there.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bench

Record = dict[str, Any]
RESULTS = Path(__file__).parent / "results" / "slides.jsonl"
ENCODERS = ("resnet18", "hilum_texture")
BATCH = 64
TILE_UM, TILE_PX = 112.0, 224
LEAST_ALIKE = 0.5
"""Share of the tiles whose features, of all that the other way found in that slide, must be nearest to those of the very same
tile. By chance one of sixteen is; not all are, for PIL and hilum bring pictures to size and to fractions of a pixel in ways of
their own, which the finest texture tells."""


def main() -> None:
    said = _words().parse_args()
    if said.measure:
        print(json.dumps(measured(json.loads(said.measure))))
        return
    records = read(said.results)
    if not said.table:
        run_all(said, records)
    shown = table(records)
    if records:
        said.results.with_suffix(".md").write_text(shown)
    print(shown)


def _words() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--slides", type=Path, nargs="*", default=[], help="real slides, measured as a set of their own")
    words.add_argument("--copies", type=int, default=8, help="of each real slide, so that there is enough to measure")
    words.add_argument("--phantoms", type=int, default=3)
    words.add_argument("--mirrored", type=int, default=3, help="how often along each axis a phantom is repeated")
    words.add_argument("--rounds", type=int, default=2)
    words.add_argument("--encoders", nargs="*", default=list(ENCODERS), choices=ENCODERS)
    words.add_argument("--workers", type=int, default=bench.cores())
    words.add_argument("--device", default="cpu")
    words.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hilum-benchmark-slides")
    words.add_argument("--results", type=Path, default=RESULTS)
    words.add_argument("--again", action="store_true", help="measure what is there already; the table takes the newest")
    words.add_argument("--table", action="store_true", help="only print the table of what is there")
    words.add_argument("--measure", help=argparse.SUPPRESS)
    return words


def run_all(said: argparse.Namespace, records: list[Record]) -> None:
    """What is missing, all entrants in turn, so that a busy minute hits all alike."""
    sets = {f"{said.phantoms} phantoms, mirrored {said.mirrored} x {said.mirrored}": made(said)}
    if said.slides:
        sets[f"{', '.join(one.name for one in said.slides)}, {said.copies} copies"] = copied(said)
    for around in range(said.rounds):
        for name, folder in sets.items():
            for encoder in said.encoders:
                for entrant in ENTRANTS:
                    heading = {
                        "slides": name, "encoder": encoder, "entrant": entrant, "round": around, "chip": bench.chip(),
                        "cores": bench.cores(), "workers": said.workers, "device": said.device,
                    }  # fmt: skip
                    if not said.again and any(heading.items() <= record.items() for record in records):
                        print(f"{entrant}, {encoder}, {name}, round {around}: there already", file=sys.stderr)
                        continue
                    print(f"{entrant}, {encoder}, {name}, round {around}", file=sys.stderr)
                    record = heading | surroundings() | once(said, folder, encoder, entrant)
                    records.append(record)
                    append(said.results, record)


def surroundings() -> Record:
    return {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "machine": bench.heading()}


def once(said: argparse.Namespace, slides: Path, encoder: str, entrant: str) -> Record:
    job = {
        "entrant": entrant, "slides": str(slides), "encoder": encoder, "weights": str(said.folder / "resnet18.safetensors"),
        "workers": said.workers, "device": said.device, "tiles": str(slides.with_suffix(".json")),
    }  # fmt: skip
    answer = bench.child(sys.executable, __file__, "--measure", json.dumps(job))
    if "error" in answer:
        sys.exit(f"{entrant}, {encoder}: {answer['error']}")
    return answer


# one measurement, in a process of its own


def measured(job: Record) -> Record:
    """Seconds from the slides, whose files were read before, to their features."""
    import torch

    from pipeline.slides.encoders import load_encoder

    names = {"resnet18": f"timm:resnet18@{job['weights']}", "hilum_texture": "hilum_texture"}
    job["name"] = names[job["encoder"]]
    encoder = load_encoder(job["name"], torch.device(job["device"]))
    warm_up(encoder, Path(job["slides"]))
    with tempfile.TemporaryDirectory() as out, Memory() as memory:
        began = time.perf_counter()
        facts = ENTRANTS[job["entrant"]](job, encoder, Path(out))
        seconds = time.perf_counter() - began
        prints = fingerprint(Path(out))
    return facts | {
        "seconds": round(seconds, 3),
        "tiles_per_second": round(facts["tiles"] / seconds, 2),
        "memory_mb": round(memory.most / 1e6),
        "prints": prints,
        "versions": versions(),
    }


def warm_up(encoder: Any, slides: Path) -> None:
    """Libraries loaded, files in the system's cache: for all entrants alike."""
    import numpy as np

    encoder.embed(np.zeros((BATCH, TILE_PX, TILE_PX, 3), np.uint8))
    for path in sorted(slides.iterdir()):
        path.read_bytes()


def hilum(job: Record, encoder: Any, out: Path) -> Record:
    """`hilum slides features` as it is."""
    from pipeline.config import SlideFeatures
    from pipeline.slides.features import extract

    how = SlideFeatures(
        encoder=job["name"], tile_um=TILE_UM, tile_px=TILE_PX, workers=job["workers"], batch=BATCH, device=job["device"]
    )
    made = extract([Path(job["slides"])], out, how)
    assert not made.failed, made.failed
    return {"tiles": made.pace.tiles, "waited_share": made.pace.waited_share}


def usual(job: Record, encoder: Any, out: Path) -> Record:
    """One `read_region` per coordinate in the workers of a DataLoader for each slide, resized with PIL."""
    import numpy as np
    from torch.utils.data import DataLoader

    tiles, waited, began = 0, 0.0, time.perf_counter()
    for name, places in json.loads(Path(job["tiles"]).read_text()).items():
        loader = DataLoader(Regions(Path(job["slides"]) / name, places), batch_size=BATCH, num_workers=job["workers"])
        batches = iter(loader)
        (out / name).mkdir()
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - asked
            if batch is None:
                break
            add(out / name / "features.h5", encoder.embed(batch.numpy()).astype(np.float16))
            tiles += len(batch)
    return {"tiles": tiles, "waited_share": round(waited / (time.perf_counter() - began), 4)}


class Regions:
    """The dataset of the usual way; each worker opens the slide for itself."""

    def __init__(self, path: Path, places: Sequence[Sequence[float]]) -> None:
        import openslide

        self.path, self.places, self.slide = path, places, None
        with openslide.OpenSlide(path) as slide:
            microns = float(slide.properties[openslide.PROPERTY_NAME_MPP_X])
            self.level = slide.get_best_level_for_downsample(TILE_UM / TILE_PX / microns + 1e-3)
            self.side = round(TILE_UM / microns / slide.level_downsamples[self.level])
            self.microns = microns

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Any:
        import numpy as np
        import openslide
        from PIL import Image

        if self.slide is None:
            self.slide = openslide.OpenSlide(self.path)
        corner = tuple(round(place / self.microns) for place in self.places[number])
        picture = self.slide.read_region(corner, self.level, (self.side, self.side)).convert("RGB")
        return np.asarray(picture.resize((TILE_PX, TILE_PX), Image.Resampling.BILINEAR)).copy()


def add(path: Path, features: Any) -> None:
    """As CLAM does: opened, grown and closed for each batch."""
    import h5py

    with h5py.File(path, "a") as file:
        if "features" not in file:
            file.create_dataset(
                "features", data=features, maxshape=(None, features.shape[1]), chunks=(1, features.shape[1])
            )
            return
        file["features"].resize(len(file["features"]) + len(features), axis=0)
        file["features"][-len(features) :] = features


ENTRANTS: dict[str, Callable[[Record, Any, Path], Record]] = {"hilum": hilum, "usual": usual}


def fingerprint(out: Path) -> list[list[list[float]]]:
    """A few features of a few tiles of each slide, by which two ways are seen to have looked at the same."""
    import h5py

    prints = []
    for path in sorted(out.glob("*/features.h5")):
        with h5py.File(path) as file:
            some = file["features"][:: max(1, len(file["features"]) // 16), :48]
            prints.append(some.astype(float).round(4).tolist())
    return prints


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("hilum", "openslide-python", "openslide-bin", "torch", "timm", "pillow")}


class Memory:
    """The most that this process and its children have had together."""

    def __enter__(self) -> "Memory":
        self.most, self._over = 0, threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()

    def _look(self) -> None:
        while not self._over.wait(0.25):
            self.most = max(self.most, sum(pss(number) for number in ["self", *children()]))


def children() -> Iterator[str]:
    for task in Path("/proc/self/task").iterdir():
        with_them = task / "children"
        yield from with_them.read_text().split() if with_them.exists() else []


def pss(number: str) -> int:
    """Bytes of a process, pages that several share counted in parts."""
    try:
        lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return int(next((line.split()[1] for line in lines if line.startswith("Pss:")), "0")) * 1024


# the slides, and where their tiles lie


def made(said: argparse.Namespace) -> Path:
    """A folder of phantoms as an Aperio writes slides; drawn once."""
    folder = said.folder / f"phantoms-{said.phantoms}-{said.mirrored}"
    weights(said.folder)
    if not folder.with_suffix(".json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for seed in range(said.phantoms):
            draw(seed, said.mirrored, folder / f"phantom{seed}.tiff")
        lay(folder)
    return folder


def copied(said: argparse.Namespace) -> Path:
    folder = said.folder / f"real-{len(said.slides)}-{said.copies}"
    if not folder.with_suffix(".json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in said.slides:
            for number in range(said.copies):
                shutil.copyfile(path, folder / f"{path.stem}-{number}{path.suffix}")
        lay(folder)
    return folder


def draw(seed: int, mirrored: int, path: Path) -> None:
    import numpy as np
    import tifffile

    from preprocessing import slide_phantoms

    once = slide_phantoms.slide(seed, microns_per_pixel=0.25, size_um=(1600.0, 1200.0), lesions=seed % 2).pixels
    row = np.concatenate([once[:, :: 1 if n % 2 == 0 else -1] for n in range(mirrored)], axis=1)
    pixels = np.concatenate([row[:: 1 if n % 2 == 0 else -1] for n in range(mirrored)])
    with tifffile.TiffWriter(path) as file:
        for level in range(3):
            per_cm = 40_000 / 4**level
            file.write(
                pixels, tile=(240, 240), compression="jpeg", photometric="rgb", compressionargs={"level": 80},
                resolution=(per_cm, per_cm), resolutionunit="CENTIMETER", subfiletype=int(level > 0), metadata=None,
            )  # fmt: skip
            height, width = (side // 4 for side in pixels.shape[:2])
            parts = pixels[: height * 4, : width * 4].reshape(height, 4, width, 4, 3)
            pixels = np.stack([(band.astype(np.uint16).sum((0, 2)) + 8) // 16 for band in parts]).astype(np.uint8)


def lay(folder: Path) -> None:
    """Where hilum lays tiles: file to corners in micrometres, which the usual way is given."""
    from preprocessing.slides import TileShape, find_tissue, lay_tiles, open_slide

    places = {}
    for path in sorted(folder.iterdir()):
        with open_slide(path) as slide:
            tiles = lay_tiles(slide, find_tissue(slide), TileShape(size_um=TILE_UM, size_px=TILE_PX))
            places[path.name] = tiles.positions_um.tolist()
    folder.with_suffix(".json").write_text(json.dumps(places))


def weights(folder: Path) -> None:
    """A residual network that nobody trained: it costs what a trained one does."""
    import timm
    import torch
    from safetensors.torch import save_file

    path = folder / "resnet18.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        save_file(timm.create_model("resnet18").state_dict(), path)


# what was found


def read(results: Path) -> list[Record]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def append(results: Path, record: Record) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as stream:
        stream.write(json.dumps(record) + "\n")


TASK = ("slides", "encoder", "device", "chip", "cores", "workers")


def table(records: Sequence[Record]) -> str:
    """Markdown: a row for each entrant of a task, the median of its rounds; and how they compare."""
    tasks: dict[str, list[Record]] = {}
    for record in records:
        tasks.setdefault(json.dumps([record[name] for name in TASK]), []).append(record)
    if not tasks:
        return "Nothing was measured yet.\n"
    lines = [
        "| slides | encoder | tiles | way | tiles/s | rounds | encoder waited | memory | against usual |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [line for of_task in tasks.values() for line in rows(of_task)]
    newest = records[-1]
    told = ", ".join(f"{name} {number}" for name, number in newest["versions"].items())
    return "\n".join([*lines, "", f"{newest['date']}; {newest['machine']}; {newest['workers']} workers; {told}.", ""])


def rows(of_task: Sequence[Record]) -> Iterator[str]:
    found = {name: newest_of(of_task, name) for name in ENTRANTS}
    found = {name: rounds for name, rounds in found.items() if rounds}
    speeds = {name: statistics.median(one["tiles_per_second"] for one in rounds) for name, rounds in found.items()}
    refuse_others(found)
    for name, rounds in found.items():
        spread = " ".join(f"{one['tiles_per_second']:.1f}" for one in rounds)
        ratio = f"{speeds[name] / speeds['usual']:.2f}" if "usual" in speeds else ""
        waited = statistics.median(one["waited_share"] for one in rounds)
        memory = max(one["memory_mb"] for one in rounds)
        first = rounds[0]
        yield (
            f"| {first['slides']} | {first['encoder']} ({first['device']}) | {first['tiles']} | {name} | {speeds[name]:.1f} | "
            f"{spread} | {waited:.0%} | {memory} MB | {ratio} |"
        )


def newest_of(records: Sequence[Record], entrant: str) -> list[Record]:
    return list({record["round"]: record for record in records if record["entrant"] == entrant}.values())


def refuse_others(found: dict[str, list[Record]]) -> None:
    """Two ways that looked at other tiles, or at none, are no comparison."""
    import numpy as np

    if set(found) != set(ENTRANTS):
        return
    ours, theirs = (found[name][-1] for name in ENTRANTS)
    if ours["tiles"] != theirs["tiles"]:
        sys.exit(
            f"hilum made features of {ours['tiles']} tiles, the usual way of {theirs['tiles']}: nothing is compared."
        )
    hits = []
    for pair in zip(ours["prints"], theirs["prints"], strict=True):
        one, other = (np.array(prints) for prints in pair)
        apart = np.linalg.norm(one[:, None] - other[None], axis=2)
        hits += (apart.argmin(axis=1) == np.arange(len(one))).tolist()
    if np.mean(hits) < LEAST_ALIKE:
        sys.exit(f"of {len(hits)} tiles only {sum(hits)} have like features by both ways: nothing is compared.")


if __name__ == "__main__":
    main()
