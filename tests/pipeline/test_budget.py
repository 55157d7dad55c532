"""What a case takes is said before it starts, and kept; a limit is kept by giving up speed, never by giving up the answer."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from networks import residual_unet
from pipeline import budget
from pipeline.budget import Load, Way, activation, hollowed, largest, parse_memory, stated, within
from pipeline.engines import torch as torch_engine
from pipeline.errors import UsageError
from pipeline.prediction import Inference, segment_volume
from pipeline.stream import Bare, Windows
from preprocessing.plan import Label, Plan
from preprocessing.steps import Crop, Normalise, Orient, Pad, Resample, Scale, prepare
from preprocessing.volume import Geometry, ScanError, Volume

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "streaming.py"


@pytest.mark.parametrize(
    ("words", "size"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("64K", 64_000), ("7", 7)]
)
def test_memory_is_said_as_people_say_it(words: str, size: int) -> None:
    assert parse_memory(words) == size


@pytest.mark.parametrize("words", ["", "much", "0GB", "-2GB", "2 GB or so", "2PB"])
def test_a_memory_that_is_none_is_refused(words: str) -> None:
    with pytest.raises(UsageError, match="a number and its unit are needed"):
        parse_memory(words)


def a_load(plan: Plan, shape: tuple[int, int, int], engines: Sequence[nn.Module], **fields: object) -> Load:
    geometry = Geometry(shape=shape, affine=np.diag([2.0, 2.0, 3.0, 1.0]))
    prepared = largest(geometry, plan.steps)
    windows = Windows.over(prepared.shape, plan.patch, 0.5)
    return Load(
        geometry=geometry, scan_bytes=2 * int(np.prod(shape)), channels=1, plan=plan, windows=windows,
        prepared=prepared, engines=engines, **fields,
    )  # fmt: skip


@pytest.fixture
def engine() -> Bare:
    config = residual_unet.Config(width=4, blocks=(1,), strides=((1, 1, 1), (2, 2, 2)), kernels=((3, 3, 3), (3, 3, 3)))
    return Bare(residual_unet.build(config, channels=1, classes=3).eval(), torch.device("cpu"))


def test_what_is_stated_grows_with_the_scan_by_what_scan_and_labels_take(
    make_plan: Callable[..., Plan], engine: Bare
) -> None:
    plan = make_plan()
    sizes = [stated(a_load(plan, (60, 60, 100 * times), [engine]), Way(batch=1)).bytes for times in (10, 20, 40)]
    voxels = 60 * 60 * 1000
    # scan 2, made ready 4 + 4 + 28 bytes a voxel: nothing of it is multiplied by classes or folds
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.01)
    assert sizes[1] - sizes[0] < 48 * voxels


def test_every_fold_class_and_mirroring_counts(make_plan: Callable[..., Plan], engine: Bare) -> None:
    plan, shape = make_plan(), (60, 60, 80)

    def said(plan: Plan = plan, engines: Sequence[nn.Module] = (engine,), **fields: object) -> int:
        way = fields.pop("way", Way(batch=1))
        return sum(budget._looking(a_load(plan, shape, engines, **fields), way).values())

    many = replace(plan, labels=tuple(Label(value=n, name=str(n), colour=(0, 0, 0)) for n in range(1, 40)))
    slab = 60 * 60 * 16 * 4
    assert said(engines=[engine] * 3) - said() > 2 * 3 * slab
    assert said(plan=many) - said() > 36 * slab
    assert said(way=Way(batch=4)) > said() and said(has_rules=True) > said()
    assert said(passes=8, kinds=("flips",)) > said(passes=8) > said()


def test_a_network_is_counted_without_a_number_of_it(engine: Bare) -> None:
    """As many bytes as its largest tensors have at once, and no fewer than one input and one output of a convolution."""
    network = engine.network
    hollow = hollowed(network)
    assert all(weight.device.type == "meta" for weight in hollow.parameters())
    assert all(weight.device.type == "cpu" for weight in network.parameters())
    one, four = (activation(engine, 1, (16, 16, 16), batch) for batch in (1, 4))
    assert 2 * 4 * 16**3 * 4 < one < 40 * 4 * 16**3 * 4
    assert four == pytest.approx(4 * one, rel=0.02)


def test_what_a_package_takes_is_counted_once_on_a_machine(
    engine: Bare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines of one package, each in a process of its own, share one count; another package is counted anew."""
    monkeypatch.setenv("HILUM_HOME", str(tmp_path))
    counted: list[tuple[int, ...]] = []
    monkeypatch.setattr(budget, "_counted_of", lambda network, shape: counted.append(shape) or 12345)
    of = [torch_engine.engine(engine.network, torch.device("cpu"), built_by=name) for name in ("a", "a", "b", "")]
    assert {activation(one, 1, (16, 16, 16), 1) for one in of} == {12345}
    assert counted == [(1, 1, 16, 16, 16)] * 3, "one for a, one for b, one for what nobody knows the package of"


def test_an_engine_that_shows_no_network_is_asked_once_and_watched() -> None:
    class Opaque:
        asked = 0

        def __call__(self, windows: torch.Tensor) -> torch.Tensor:
            self.asked += 1
            return torch.zeros(len(windows), 3, *windows.shape[2:]) + windows.mean()

    opaque = Opaque()
    assert activation(opaque, 1, (16, 16, 16), 1) == activation(opaque, 1, (16, 16, 16), 1) >= 2 * 4 * 16**3
    assert opaque.asked == 1


def test_speed_is_given_up_before_a_case_is_refused(make_plan: Callable[..., Plan], engine: Bare) -> None:
    many = replace(make_plan(), labels=tuple(Label(value=n, name=str(n), colour=(0, 0, 0)) for n in range(1, 60)))
    load = a_load(many, (120, 120, 120), [engine])
    sizes = [stated(load, way).bytes for way in budget._ways(4)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    chosen = [within(load, 4, size).way for size in sizes]
    assert [(way.batch, way.keeps, way.on_disk) for way in chosen] == [
        (4, True, False), (1, True, False), (1, False, False), (1, False, True),
    ]  # fmt: skip
    assert [len(way.words) for way in chosen] == [0, 1, 2, 3]
    with pytest.raises(ScanError, match=r"needs .* MB at least .*; .* are --max-memory\. Allow it more") as refused:
        within(load, 4, sizes[-1] - 1)
    assert refused.value.reason == "too_large"


def test_a_limit_changes_no_label(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = replace(make_plan(), labels=tuple(Label(value=n, name=str(n), colour=(0, 0, 0)) for n in range(1, 60)))
    torch.manual_seed(0)
    network, how = nn.Conv3d(1, 60, 3, padding=1).requires_grad_(False), Inference(device="cpu", overlap=0.0)
    voxels = np.random.default_rng(0).normal(0, 99, (1, 80, 80, 84)).astype(np.int16)
    load = a_load(plan, (80, 80, 84), [Bare(network, torch.device("cpu"))])
    scan = Volume(voxels=voxels, geometry=load.geometry, channels=("mr",))
    free = segment_volume(scan, [network], plan, how, "")
    assert free.memory is not None and free.memory.words == ()
    least = stated(load, list(budget._ways(1))[-1]).bytes
    tight = segment_volume(scan, [network], plan, replace(how, max_memory=least), "", scratch=tmp_path)
    np.testing.assert_array_equal(tight.labels.voxels, free.labels.voxels)
    assert tight.memory is not None and "windows are summed in a file" in tight.memory.words[-1]
    assert tight.memory.stated <= least and not list(tmp_path.iterdir())
    with pytest.raises(ScanError, match="--max-memory"):
        segment_volume(scan, [network], plan, replace(how, max_memory=1_000_000), "")


def test_the_largest_grid_is_that_of_a_scan_of_which_nothing_is_cropped() -> None:
    steps = (Orient(), Crop(margin=0), Normalise(channels=(Scale(by="scan"),)), Resample(spacing_mm=(1.1, 1.0, 2.0)),
             Pad(shape=(16, 16, 16)))  # fmt: skip
    affine = np.zeros((4, 4))
    affine[0, 2], affine[1, 0], affine[2, 1], affine[3, 3] = -2.0, 1.5, 1.2, 1.0
    full = Volume(
        voxels=np.random.default_rng(0).normal(9, 1, (1, 9, 20, 30)), geometry=Geometry(shape=(9, 20, 30), affine=affine),
        channels=("mr",),
    )  # fmt: skip
    assert largest(full.geometry, steps).shape == prepare(full, steps)[0].geometry.shape


RUNS = [
    {"classes": 14, "shape": (192, 64, 64)},
    {"classes": 4, "folds": 2, "flips": True, "maps": True, "patch": (16, 16, 16)},
    {"classes": 3, "rules": True, "body": True, "spacing": 1.5},
    {"classes": 40, "shape": (64, 64, 64), "patch": (48, 48, 48), "limit": 355_000_000},
]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no process its peak")
@pytest.mark.parametrize("run", RUNS, ids=lambda run: ", ".join(map(str, run)))
def test_no_case_takes_more_than_was_said(run: dict[str, object]) -> None:
    """Measured by the kernel, in a process of its own; benchmarks/streaming.py has the long form."""
    said = json.dumps({"shape": (64, 64, 64), "width": 4, **run})
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--one", said],
        capture_output=True,
        text=True,
        check=True,
        cwd=BENCHMARK.parents[1],
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 < found["peak"] <= found["stated"]
    assert bool(found["words"]) == ("limit" in run)
