"""A night of scans that is killed again and again: what comes of it is what an undisturbed night leaves, byte for byte, and
nothing that was complete is ever done a second time.

Small scans and a package that nobody trained; five of the scans are bad, each in its own way. The command is begun, killed
(SIGKILL) at a random moment, begun anew, and so on; then once to its end. `--cases 200 --kills 30`; `--quick`: 16 and 3.
Who checks is this script alone: it looks at files and at what `--progress lines` tells, and asks nothing of hilum.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import bench

BAD = 5
IN_HAND = 2
"""Cases that a kill may cost: one on the network, one being written."""

MAKE = """
import sys
from pathlib import Path
import nibabel
import numpy as np
import torch
from networks import residual_unet
from pipeline import package
from pipeline.package import Fold
from preprocessing import files
from preprocessing.plan import Label, Plan, Recipe
from preprocessing.records import encode
from preprocessing.steps import Normalise, Orient, Pad, Resample, Scale
from preprocessing.volume import Geometry, Volume
folder, cases, bad = Path(sys.argv[1]), int(sys.argv[2]), [int(number) for number in sys.argv[3].split(",")]
config = residual_unet.Config(width=4, blocks=(1,), strides=((1, 1, 1), (2, 2, 2)), kernels=((3, 3, 3), (3, 3, 3)))
spacing = (2.0, 2.0, 3.0)
steps = (Orient(), Resample(spacing_mm=spacing), Normalise(channels=(Scale(by="scan"),)), Pad(shape=(16, 16, 16)))
plan = Plan(
    name="night", channels=("mr",), labels=(Label(value=1, name="liver", colour=(230, 159, 0)),), steps=steps,
    spacing_mm=spacing, patch=(16, 16, 16), batch=2, dataset="ab" * 32, recipe=Recipe(mirror=(True, True, True)),
)
torch.manual_seed(0)
fold = Fold(weights="weights-fold0.safetensors", dice={}, cases_trained=4, cases_held_out=1, epochs=1, minutes=0.1, seed=0)
package.save(
    folder / "package", network=residual_unet.build(config, channels=1, classes=2), name="night",
    network_name="residual_unet", network_config=encode(config), plan=plan, fold_number=0, fold=fold,
)
affine = np.diag([1.9, 2.1, 3.2, 1.0])
for number in range(cases):
    rng = np.random.default_rng(number)
    shape = tuple(int(side) for side in rng.integers(14, 28, 3))
    voxels = rng.normal(100, 10, (1, *shape))
    voxels[:, 4:9, 4:9, 4:9] += 200
    scan = Volume(voxels=voxels.astype(np.int16), geometry=Geometry(shape=shape, affine=affine), channels=("0",))
    path = folder / "scans" / f"case{number:03d}.nii.gz"
    files.write(scan, path)
    if number not in bad:
        continue
    kind = bad.index(number)
    whole = path.read_bytes()
    if kind == 0:
        path.write_bytes(whole[: len(whole) // 2])  # cut off while it was copied
    elif kind == 1:
        path.write_bytes(rng.bytes(4000))  # no scan at all
    elif kind == 2:
        holes = voxels[0].astype(np.float32)
        holes[3, 3, 3] = np.nan
        nibabel.save(nibabel.Nifti1Image(holes, affine), path)
    elif kind == 3:
        sheared = affine.copy()
        sheared[0, 1] = 1.5
        nibabel.save(nibabel.Nifti1Image(voxels[0].astype(np.int16), sheared), path)
    else:
        two = np.stack([voxels[0], voxels[0]], axis=-1).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(two, affine), path)  # two channels, of which the package knows one
"""


def main() -> None:
    said = argparse.ArgumentParser(description=__doc__)
    said.add_argument("--cases", type=int, default=200)
    said.add_argument("--kills", type=int, default=30)
    said.add_argument("--quick", action="store_true", help="16 cases, 3 kills")
    said.add_argument("--seed", type=int, default=time.time_ns() % 10**6, help="of the moments of the kills")
    asked = said.parse_args()
    cases, kills = (16, 3) if asked.quick else (asked.cases, asked.kills)
    luck = random.Random(asked.seed)
    print(f"{bench.heading()}\n{cases} cases, {BAD} of them bad, {kills} kills, seed {asked.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(night(Path(folder), cases, kills, luck)))


def night(folder: Path, cases: int, kills: int, luck: random.Random) -> dict[str, Any]:
    """Both nights, and what they differ in."""
    bad = sorted(luck.sample(range(cases), BAD))
    subprocess.run([sys.executable, "-c", MAKE, str(folder), str(cases), ",".join(map(str, bad))], check=True)
    quiet = Run(folder, "quiet").until()
    print(f"undisturbed: {quiet.spent:.1f} s, {quiet.counts}", flush=True)
    assert quiet.counts == {"done": cases - BAD, "failed": BAD}, quiet.counts
    done: Counter[str] = Counter()
    lost: list[int] = []
    kept: dict[str, str] = {}
    for _ in range(kills):
        run = Run(folder, "killed")
        run.kill_after(luck.uniform(0, 2 * quiet.spent / kills))
        out = folder / "killed"
        lost.append(len(list(out.glob(".*.partial"))))
        now = prints(complete(out))
        assert kept.items() <= now.items(), (
            f"a complete case was touched: {sorted(set(kept.items()) - set(now.items()))}"
        )
        kept = now
        done.update(run.done)
    last = Run(folder, "killed").until()
    done.update(last.done)
    left = prints(complete(folder / "killed"))
    assert kept.items() <= left.items(), "a complete case was touched"
    twice = [case for case, times in done.items() if times > 1]
    assert not twice, f"done twice: {twice}"
    assert max(lost, default=0) <= IN_HAND, f"more than {IN_HAND} cases were in hand: {lost}"
    one, other = told(folder / "quiet"), told(folder / "killed")
    assert one == other, (
        f"these differ: {sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))}"
    )
    reasons = [error_in(folder / "killed" / f"case{number:03d}") for number in bad]
    assert len(set(reasons)) == BAD, reasons
    assert {path.name for path in (folder / "killed").glob(".*")} == {".lock"}
    return {
        "identical": len(left), "files": len(one), "failed": BAD, "reasons": [reason[:70] for reason in reasons],
        "in hand when killed": dict(sorted(Counter(lost).items())), "done twice": len(twice),
        "undisturbed_s": round(quiet.spent, 1),
    }  # fmt: skip


class Run:
    """The command in a process of its own, and what it tells line by line."""

    def __init__(self, folder: Path, out: str) -> None:
        words = ["segment", folder / "scans", "--package", folder / "package", "--out", folder / out]
        words += ["--device", "cpu", "--progress", "lines", "--outputs", "labels,measurements"]
        home = os.environ | {"HILUM_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *map(str, words)], cwd=Path(bench.HERE).parent, env=home,
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.events: list[dict[str, Any]] = []
        self.others: list[str] = []
        self.begun = threading.Event()
        self.listener = threading.Thread(target=self._listen)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            if not line.startswith("{"):
                self.others.append(line)
                continue
            with contextlib.suppress(json.JSONDecodeError):  # the last line before a kill
                self.events.append(json.loads(line))
            self.begun.set()

    def until(self) -> "Run":
        """To its end."""
        self.process.wait()
        self.listener.join()
        assert self.process.returncode == 3, f"{self.process.returncode}: {''.join(self.others)}"  # some cases are bad
        return self

    def kill_after(self, seconds: float) -> None:
        """So long after the first case could begin."""
        self.begun.wait(120)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.listener.join()

    @property
    def spent(self) -> float:
        return float(self.events[-1]["spent"])

    @property
    def counts(self) -> dict[str, int]:
        return dict(self.events[-1]["counts"])

    @property
    def done(self) -> list[str]:
        """Cases that it did, and did not find done."""
        return [event["case"] for event in self.events if event["event"] == "case" and event["status"] == "done"]


def complete(out: Path) -> list[Path]:
    return sorted(path.parent for path in out.glob("[!.]*/report.json"))


def prints(folders: list[Path]) -> dict[str, str]:
    """Of every file when it was written and what it holds."""
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    return {
        f"{file.parent.name}/{file.name}": f"{file.stat().st_mtime_ns} {digest(file.read_bytes())}" for file in files
    }


def told(out: Path) -> dict[str, str]:
    """What every file of every case holds, but for how long it took and what memory the process had."""
    said = {}
    for file in sorted(out.glob("[!.]*/*")):
        content = file.read_bytes()
        if file.name == "report.json":
            report = json.loads(content)
            report.pop("seconds")
            (report.get("memory") or {}).pop("peak", None)
            content = json.dumps(report).encode()
        said[f"{file.parent.name}/{file.name}"] = digest(content)
    return said


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def error_in(folder: Path) -> str:
    said = json.loads((folder / "error.json").read_text())
    return f"{said['error']}: {said.get('reason', '')}: {said['message']}".replace(folder.name, "it")


if __name__ == "__main__":
    main()
