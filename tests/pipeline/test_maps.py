"""Maps of a scan come in as rows of some axis, lie on the scan's own grid, and are in memory one at a time, if at all."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy import special, stats

from pipeline.batch import segment
from pipeline.config import Segment
from pipeline.errors import UsageError
from pipeline.maps import Maps, MapWriter
from pipeline.outputs import probabilities, uncertainty
from pipeline.prediction import Asked, Found, Inference, segment_volume
from pipeline.report import Report, Result
from preprocessing.plan import Label, Plan
from preprocessing.steps import Crop, Orient, Pad, Trail, prepare
from preprocessing.volume import Geometry, Volume

TABLE = (
    Label(value=1, name="liver", colour=(0, 114, 178)),
    Label(value=2, name="kidney", colour=(230, 159, 0)),
    Label(value=300, name="lesion/left", colour=(0, 158, 115)),
)
SHAPE = (13, 10, 8)
AFFINE = np.array([[0, -2.1, 0.3, 40], [1.7, 0.1, 0, -12.3], [0, 0.2, -3.3, 7.7], [0, 0, 0, 1]])
KINDS = ("probabilities", "entropy", "folds")


@pytest.fixture
def plan() -> Plan:
    return Plan(
        name="tiny", channels=("mr",), labels=TABLE, steps=(), spacing_mm=(1, 1, 1), patch=(8, 8, 8), batch=1
    )  # fmt: skip


def a_scan() -> Volume:
    """Turned, oblique, and with an empty border that is cropped away."""
    voxels = np.zeros((1, *SHAPE), np.float32)
    voxels[0, 3:11, 2:9, 1:7] = np.random.default_rng(0).normal(5, 1, (8, 7, 6))
    return Volume(voxels=voxels, geometry=Geometry(shape=SHAPE, affine=AFFINE), channels=("mr",))


def likelihoods(shape: tuple[int, int, int], seed: int = 1) -> torch.Tensor:
    drawn = np.random.default_rng(seed).dirichlet([0.5] * (len(TABLE) + 1), shape)
    return torch.from_numpy(np.moveaxis(drawn, -1, 0).astype(np.float32).copy())


def streamed(
    plan: Plan, before: Trail, geometry: Geometry, likely: torch.Tensor, unsure: dict[str, torch.Tensor], *,
    axis: int = 0, exact: bool = False, folder: Path | None = None,
) -> Maps:  # fmt: skip
    """Rows of one axis, a few at a time."""
    writer = MapWriter.create(folder, plan, geometry, ("probabilities", *unsure), axis=axis, exact=exact)
    rows, done = likely.movedim(axis + 1, 1), 0
    moved = {kind: voxels.movedim(axis, 0) for kind, voxels in unsure.items()}
    for some in rows.split(3, dim=1):
        count = some.shape[1]
        writer.rows(done, some, {kind: voxels[done : done + count] for kind, voxels in moved.items()})
        done += count
    return writer.finish(before)


def on_the_scan(before: Trail, geometry: Geometry, voxels: torch.Tensor) -> np.ndarray:
    """The same, whole, by the trail itself."""
    there = Volume(voxels=voxels[None].numpy(), geometry=geometry, channels=("map",))
    return before.undo(there).voxels[0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_of_any_axis_become_maps_on_the_scans_own_grid(plan: Plan, axis: int) -> None:
    prepared, before = prepare(a_scan(), (Orient(), Crop(margin=1)))
    geometry = prepared.geometry
    assert geometry.shape != SHAPE
    likely, unsure = likelihoods(geometry.shape), torch.rand(geometry.shape)
    made = streamed(plan, before, geometry, likely, {"entropy": unsure}, axis=axis, exact=True)
    for number, label in enumerate(TABLE, start=1):
        found = made.probability(label.name)
        assert found.geometry.shape == SHAPE and found.geometry.affine.tobytes() == AFFINE.tobytes()
        np.testing.assert_array_equal(found.voxels[0], on_the_scan(before, geometry, likely[number]))
    np.testing.assert_array_equal(made.uncertainty("entropy").voxels[0], on_the_scan(before, geometry, unsure))


def test_bytes_are_off_by_no_more_than_half_a_step(plan: Plan) -> None:
    likely = likelihoods(SHAPE)
    made = streamed(plan, Trail(taken=()), a_scan().geometry, likely, {})
    found = made.probability("kidney").voxels[0]
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found * made.scale, likely[2].numpy(), atol=made.scale / 2 + 1e-7)


def test_of_regions_the_first_channel_is_the_first_label(plan: Plan) -> None:
    whole = replace(plan, labels=(replace(TABLE[0], parts=(1, 2)), TABLE[1]))
    likely = torch.rand(2, *SHAPE)
    made = streamed(whole, Trail(taken=()), a_scan().geometry, likely, {}, exact=True)
    np.testing.assert_array_equal(made.probability("liver").voxels[0], likely[0])


def result_with(made: Maps, labels: np.ndarray) -> Result:
    volume = a_scan()
    return Result(
        case_id="case", scan=volume, labels=volume.with_voxels(labels[None], channels=("labels",)), label_table=TABLE,
        package_id="ab" * 32, package_name="demo", maps=made,
    )  # fmt: skip


def some_result(plan: Plan, *, exact: bool = False) -> tuple[Result, torch.Tensor, dict[str, torch.Tensor]]:
    prepared, before = prepare(a_scan(), (Orient(),))
    turned = prepared.geometry.shape
    likely = likelihoods(turned)
    unsure = {"entropy": torch.rand(turned), "folds": torch.rand(turned) / 50}
    made = streamed(plan, before, prepared.geometry, likely, unsure, exact=exact)
    labels = np.random.default_rng(2).choice([0, 1, 300], SHAPE).astype(np.uint16)
    back = {kind: torch.from_numpy(on_the_scan(before, prepared.geometry, one).copy()) for kind, one in unsure.items()}
    scan_likely = [on_the_scan(before, prepared.geometry, one).copy() for one in likely]
    return result_with(made, labels), torch.from_numpy(np.stack(scan_likely)), back


@pytest.mark.parametrize(("exact", "kind", "off"), [(False, np.uint8, 0.5 / 255 + 1e-7), (True, np.float32, 0)])
def test_what_is_written_reads_as_the_numbers_on_the_labels_own_grid(
    plan: Plan, tmp_path: Path, exact: bool, kind: type, off: float
) -> None:
    result, likely, unsure = some_result(plan, exact=exact)
    written = probabilities.write(result, tmp_path, probabilities.Config(exact=exact))
    assert [path.name for path in written] == [
        "probability-1-liver.nii.gz", "probability-2-kidney.nii.gz", "probability-300-lesion_left.nii.gz",
    ]  # fmt: skip
    for path, expected in zip(written, likely[1:], strict=True):
        read = nibabel.load(path)
        assert read.get_data_dtype() == kind
        np.testing.assert_array_equal(read.affine, AFFINE.astype(np.float32))
        np.testing.assert_allclose(read.get_fdata(dtype=np.float32), expected, atol=off)
    for path in uncertainty.write(result, tmp_path, uncertainty.Config(exact=exact)):
        read = nibabel.load(path)
        assert read.get_data_dtype() == kind and read.shape == SHAPE
        expected = unsure[path.name.removesuffix(".nii.gz").partition("-")[2]]
        np.testing.assert_allclose(read.get_fdata(dtype=np.float32), expected, atol=off)


def test_the_report_tells_the_mean_of_each_kind_in_each_label_that_was_found(plan: Plan) -> None:
    result, _, unsure = some_result(plan)
    labels = result.labels.voxels[0]
    said = Report.of(result, [], []).uncertainty
    assert list(said) == ["liver", "lesion/left"]  # no voxel is kidney
    for name, value in (("liver", 1), ("lesion/left", 300)):
        for kind, voxels in unsure.items():
            assert said[name][kind] == pytest.approx(float(voxels.numpy()[labels == value].mean()), abs=6e-5)


def test_a_label_or_kind_that_there_is_not_is_refused_with_what_there_is(plan: Plan, tmp_path: Path) -> None:
    result, *_ = some_result(plan)
    with pytest.raises(UsageError, match=r"'livre'; did you mean 'liver'\?.*liver, kidney"):
        probabilities.write(result, tmp_path, probabilities.Config(labels=("livre",)))
    with pytest.raises(UsageError, match="needs --flips"):
        uncertainty.write(result, tmp_path, uncertainty.Config(kinds=("flips",)))
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_told_before_a_window_is_computed(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = Geometry(shape=(100_000, 100_000, 10_000), affine=np.eye(4))
    with pytest.raises(UsageError, match=r"GB left.*Make room"):
        MapWriter.create(tmp_path, plan, huge, KINDS)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_on_the_disk_whatever_ends_it(plan: Plan, tmp_path: Path) -> None:
    before = open_files()
    made = streamed(plan, Trail(taken=()), a_scan().geometry, likelihoods(SHAPE), {}, folder=tmp_path)
    assert made.probability("liver").voxels.any() and not list(tmp_path.iterdir())
    del made
    assert open_files() == before


def open_files() -> int:
    """Where the system tells."""
    told = Path("/proc/self/fd")
    return len(list(told.iterdir())) if told.exists() else 0


# through the stream


class Pointwise(torch.nn.Module):
    """Logits of three labels that follow from a voxel's value alone, so that every probability is known."""

    def __init__(self, slopes: tuple[float, float, float]) -> None:
        super().__init__()
        self.slopes = slopes

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        values = windows[:, :1]
        return torch.cat([0 * values, *(slope * (values - 4) for slope in self.slopes)], dim=1)


class Ramp(torch.nn.Module):
    """Looks at where a voxel lies in its window: the mirrored window has another answer."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        ramp = torch.linspace(-2, 2, windows.shape[2]).view(1, 1, -1, 1, 1).expand_as(windows[:, :1])
        return torch.cat([0 * ramp, ramp, -ramp, 0 * ramp], dim=1)


STEPS = (Orient(), Crop(margin=1), Pad(shape=(8, 8, 8)))


def looked_at(plan: Plan, networks: list[torch.nn.Module], *, flips: bool = False) -> tuple[Found, Maps]:
    how = Inference(device="cpu", flips=flips)
    asked = Asked(probabilities=True, uncertainty=True, exact=True)
    found = segment_volume(a_scan(), networks, replace(plan, steps=STEPS), how, "ab" * 32, asked=asked)
    assert found.maps is not None
    return found, found.maps


def known(networks: list[Pointwise]) -> np.ndarray:
    """Probabilities by numpy: of each fold, [fold class i j k], on the scan's own grid; outside the crop background."""
    values = a_scan().voxels[0].astype(np.float64)
    logits = np.stack([[0 * values, *(s * (values - 4) for s in network.slopes)] for network in networks])
    box = prepare(a_scan(), (Crop(margin=1),))[0].geometry
    start = np.rint(a_scan().geometry.to_voxel(box.affine[:3, 3])).astype(int)
    inside = np.zeros(SHAPE, bool)
    inside[tuple(slice(low, low + size) for low, size in zip(start, box.shape, strict=True))] = True
    logits = np.where(inside, logits, np.array([1e3, 0, 0, 0])[:, None, None, None])
    return special.softmax(logits, axis=1)


def test_probabilities_and_entropy_of_a_known_network_are_numpys(plan: Plan) -> None:
    networks = [Pointwise((1.0, -2.0, 0.5)), Pointwise((-1.0, 2.0, 0.1))]
    found, made = looked_at(plan, list(networks))
    folds = known(networks)
    mean = folds.mean(axis=0)
    for number, label in enumerate(TABLE, start=1):
        np.testing.assert_allclose(made.probability(label.name).voxels[0], mean[number], atol=3e-6)
    entropy = stats.entropy(mean, axis=0) / np.log(4)
    np.testing.assert_allclose(made.uncertainty("entropy").voxels[0], entropy, atol=3e-6)
    between = entropy - stats.entropy(folds, axis=1).mean(axis=0) / np.log(4)
    np.testing.assert_allclose(made.uncertainty("folds").voxels[0], between, atol=5e-6)
    assert made.kinds == ("entropy", "folds") and between.max() > 0.1
    values = np.array([0, *(label.value for label in TABLE)])
    labels = found.labels.voxels[0]
    assert (labels == values[mean.argmax(axis=0)]).mean() > 0.999
    # the confidence of a label is the mean of its own map inside it
    for label in TABLE:
        if (labels == label.value).any():
            own = made.probability(label.name).voxels[0][labels == label.value].mean()
            assert found.confidence[label.name] == pytest.approx(own, abs=1e-4)


def test_identical_folds_agree_and_a_voxels_value_alone_looks_the_same_mirrored(plan: Plan) -> None:
    _, made = looked_at(plan, [Pointwise((1.0, -2.0, 0.5))] * 2, flips=True)
    assert made.kinds == ("entropy", "folds", "flips")
    assert made.uncertainty("folds").voxels.max() < 1e-5 and made.uncertainty("flips").voxels.max() < 1e-5
    assert made.uncertainty("entropy").voxels.max() > 0.5


def test_a_network_that_sees_sides_contradicts_itself_when_it_is_mirrored(plan: Plan) -> None:
    _, made = looked_at(plan, [Ramp()], flips=True)
    assert made.kinds == ("entropy", "flips")
    assert made.uncertainty("flips").voxels.max() > 0.2


def test_one_command_writes_maps_that_fit_its_labels_and_its_report(
    tiny: Path, scan_file: Callable[..., Path], tmp_path: Path
) -> None:
    outputs = ("labels", "probabilities", "uncertainty", "page")
    segment([scan_file(tmp_path / "a.nii.gz")], tiny, tmp_path / "out", Segment(outputs=outputs, flips=True))
    case = tmp_path / "out" / "a"
    report = Report.read(case)
    labels = np.asarray(nibabel.load(case / "labels.nii.gz").dataobj)
    names = {"probability-1-liver.nii.gz", "probability-7-lesion.nii.gz"}
    names |= {"uncertainty-entropy.nii.gz", "uncertainty-flips.nii.gz"}
    assert names <= set(report.files) and all((case / name).is_file() for name in report.files)
    likely = {
        value: nibabel.load(case / f"probability-{value}-{name}.nii.gz")
        for value, name in ((1, "liver"), (7, "lesion"))
    }
    for value, name in ((1, "liver"), (7, "lesion")):
        assert (likely[value].affine == nibabel.load(case / "labels.nii.gz").affine).all()
        other = likely[8 - value].get_fdata()
        here = labels == value
        if here.any():
            won = likely[value].get_fdata()
            assert (won >= other - 0.004)[here].all()
            assert report.confidence[name] == pytest.approx(won[here].mean(), abs=0.002)
            for kind in ("entropy", "flips"):
                map_ = nibabel.load(case / f"uncertainty-{kind}.nii.gz").get_fdata()
                assert report.uncertainty[name][kind] == pytest.approx(map_[here].mean(), abs=0.002)
    assert "Where the model is unsure" in (case / "page.html").read_text(encoding="utf-8")
    assert report.windows and report.windows.computed > 0 and report.memory and report.memory.stated > 0
    assert not [path for path in case.rglob("*") if path.name not in report.files and path.name != "report.json"]


MEASURED = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from pipeline.maps import MapWriter
from pipeline.outputs import probabilities
from pipeline.report import Result
from preprocessing.plan import Label, Plan
from preprocessing.steps import Trail
from preprocessing.volume import Geometry, Volume
count, folder = int(sys.argv[1]), Path(sys.argv[2])
shape = (60, 200, 200)
table = tuple(Label(value=n, name=f"part {n}", colour=(0, 0, 0)) for n in range(1, count + 1))
plan = Plan(name="x", channels=("ct",), labels=table, steps=(), spacing_mm=(1, 1, 1), patch=(8, 8, 8), batch=1)
grid = Geometry(shape=shape, affine=np.eye(4))
zeros = np.zeros((1, *shape), np.uint8)
scan = Volume(voxels=zeros, geometry=grid, channels=("ct",))
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
probabilities.Config(), torch.rand(3).mul(2).round_()
start = peak()
writer = MapWriter.create(folder, plan, grid, ("probabilities",))
for row in range(0, 60, 4):
    writer.rows(row, torch.rand(count + 1, 4, 200, 200), {})
result = Result(case_id="x", scan=scan, labels=scan, label_table=table, package_id="", package_name="",
                maps=writer.finish(Trail(taken=())))
assert len(probabilities.write(result, folder, probabilities.Config())) == count
print(peak() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read where Linux tells them")
def test_writing_many_maps_takes_no_more_memory_than_one_and_its_rows(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", MEASURED, "24", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    one_map, rows = 60 * 200 * 200, 25 * 4 * 200 * 200 * 4
    # rows as they come and once more while the next are drawn, one map mapped, one plane as bytes, pages of imports
    assert int(said) < 2 * rows + 2 * one_map + 16e6 < 24 * one_map
