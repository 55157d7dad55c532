"""How long what only looks takes to start, and how much memory: `hilum --help`, show, check and plan, beside an interpreter
that does nothing and one that imports torch. Medians of five, in turn; `--quick`: once.

`plan` is asked for what nobody has asked before (in a home of its own, new each time, so that torch is loaded by another
process, whose memory is not in its number), and then once more, for what is kept there.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench

PEAK = """
import json, runpy, sys
code = 0
try:
    {work}
except SystemExit as stop:
    code = stop.code or 0
lines = open("/proc/self/status").read().splitlines()
peak = int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
print(json.dumps(dict(peak=peak, torch="torch" in sys.modules, modules=len(sys.modules), code=code)), file=sys.stderr)
"""
HILUM = PEAK.format(work="from pipeline.cli import main; code = main(sys.argv[1:])")

MAKE = """
import sys
from pathlib import Path
import numpy as np
from networks import residual_unet
from pipeline import package
from pipeline.package import Fold
from preprocessing import files
from preprocessing.plan import Plan
from preprocessing.records import encode
from preprocessing.volume import Geometry, Volume
folder = Path(sys.argv[1])
rng = np.random.default_rng(0)
grid = Geometry(shape=(48, 48, 32), affine=np.diag([1.5, 1.5, 3.0, 1.0]))
for number in range(5):
    voxels = rng.normal(100, 10, (1, *grid.shape)).astype(np.int16)
    labels = np.zeros((1, *grid.shape), np.uint8)
    labels[0, 10:20, 10:20, 10:20] = 1
    voxels[labels > 0] += 100
    scan = Volume(voxels=voxels, geometry=grid, channels=("mr",))
    files.write(scan, folder / "data" / "images" / f"case{number}.nii.gz")
    files.write(scan.with_voxels(labels), folder / "data" / "labels" / f"case{number}.nii.gz", is_labels=True)
from pipeline.planning import Wishes, plan, planned
from preprocessing import datasets
made = plan(folder / "data", folder / "plan.yaml", Wishes(device="cpu", memory_gb=4.0))
config = residual_unet.fit(residual_unet.Config(), patch=made.patch, spacing=made.spacing_mm)
network = residual_unet.build(config, channels=1, classes=made.classes)
fold = Fold(weights="weights-fold0.safetensors", dice={}, cases_trained=4, cases_held_out=1, epochs=1, minutes=0.1, seed=0)
package.save(folder / "package", network=network, name="made", network_name="residual_unet", network_config=encode(config),
             plan=made, fold_number=0, fold=fold)
"""


def commands(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """What each is called, the code it runs, and its words."""
    data, plan = str(folder / "data"), [str(folder / "made.yaml"), "--device", "cpu", "--memory_gb", "4"]
    return {
        "python -c pass": (PEAK.format(work="pass"), []),
        "hilum --help": (HILUM, ["--help"]),
        "hilum train --help": (HILUM, ["train", "--help"]),
        "hilum show PLAN": (HILUM, ["show", str(folder / "plan.yaml")]),
        "hilum show PACKAGE": (HILUM, ["show", str(folder / "package")]),
        "hilum show SCAN": (HILUM, ["show", str(folder / "data" / "images" / "case0.nii.gz")]),
        "hilum check DATASET": (HILUM, ["check", data]),
        "hilum plan, asked anew": (HILUM, ["plan", data, "--out", *plan]),
        "hilum plan, asked before": (HILUM, ["plan", data, "--out", *plan]),
        "python -c 'import torch'": (PEAK.format(work="import torch"), []),
    }


def measured(code: str, words: list[str], home: Path) -> tuple[float, dict[str, int]]:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=os.environ | {"HILUM_HOME": str(home)}
    )
    seconds = time.perf_counter() - started
    said: dict[str, int] = json.loads(done.stderr.strip().splitlines()[-1])
    if said["code"]:
        raise SystemExit(f"{words} ended with {said['code']}: {done.stderr}")
    return seconds, said


def main() -> None:
    print(bench.heading())
    times = 1 if "--quick" in sys.argv else 5
    spent: dict[str, list[float]] = {}
    told: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-c", MAKE, name], check=True, env=os.environ | {"HILUM_HOME": f"{name}/made"})
        for number in range(times):
            for what, (code, words) in commands(folder).items():  # in turn, so that a busy minute hits all alike
                seconds, told[what] = measured(code, words, folder / f"home{number}")
                spent.setdefault(what, []).append(seconds)
    least = statistics.median(spent["python -c 'import torch'"])
    print(f"{'':<26} {'seconds':>8} {'of torch':>9} {'MB':>6} {'modules':>8}  torch")
    for what, seconds in spent.items():
        median, said = statistics.median(seconds), told[what]
        print(
            f"{what:<26} {median:8.2f} {median / least:9.2f} {said['peak'] / 1e6:6.0f} {said['modules']:8d}  "
            f"{'loaded' if said['torch'] else 'not loaded'}"
        )


if __name__ == "__main__":
    main()
