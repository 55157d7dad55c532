"""Engines that run an exported file: what torch answers they answer, and the file is made once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import tracking
from pipeline.engines import open_engines
from pipeline.engines._kept import folder_of, kept
from pipeline.errors import UsageError
from pipeline.export import BOUND
from pipeline.package import ModelPackage
from pipeline.prediction import Inference, segment_volume
from preprocessing.cores import usable_cores

pytestmark = pytest.mark.slow

ENGINES = ("onnxruntime", "openvino")
BOTH = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """hilum's home, shared by these tests: what one of them exports the next one finds."""
    folder, before = tmp_path_factory.mktemp("home"), os.environ.get("HILUM_HOME")
    os.environ["HILUM_HOME"] = str(folder)
    yield folder
    os.environ.pop("HILUM_HOME") if before is None else os.environ.__setitem__("HILUM_HOME", before)


@pytest.fixture(scope="module")
def package(home, make_package, tmp_path_factory) -> ModelPackage:
    """Of two folds."""
    folder = tmp_path_factory.mktemp("packages") / "two"
    make_package(folder, fold=0)
    return make_package(folder, fold=1)


@BOTH
def test_it_answers_as_torch_does_to_any_number_of_windows(engine, package) -> None:
    engines = open_engines(package, Inference(engine=engine))
    for count in (1, 2, 3):
        windows = torch.randn(count, 1, *package.plan.patch)
        for one, network in zip(engines, package.networks(), strict=True):
            with torch.no_grad():
                logits = one(windows)
                assert (logits - network(windows)).abs().max() < BOUND
            assert logits.dtype == torch.float32 and logits.device == one.device


@BOTH
def test_answers_given_stay_what_they_were(engine, package) -> None:
    one = open_engines(package, Inference(engine=engine))[0]
    windows = torch.randn(1, 1, *package.plan.patch)
    first = one(windows)
    kept_copy = first.clone()
    one(2 * windows)
    assert torch.equal(first, kept_copy)


@BOTH
def test_windows_in_any_layout_are_read_as_they_are_meant(engine, package) -> None:
    one = open_engines(package, Inference(engine=engine))[0]
    windows = torch.randn(2, 1, *package.plan.patch)
    turned = windows.permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2)
    assert not turned.is_contiguous()
    assert torch.equal(one(windows), one(turned))


@BOTH
def test_a_scan_has_the_labels_that_torch_gives_it(engine, package, make_scan) -> None:
    scan, how = make_scan(shape=(24, 26, 15)), Inference(engine=engine)
    ours = segment_volume(scan, open_engines(package, how), package.plan, how, package.id).labels.voxels
    torchs = segment_volume(
        scan, open_engines(package, Inference()), package.plan, Inference(), package.id
    ).labels.voxels
    assert len(set(torchs.ravel())) > 1
    assert (ours == torchs).mean() > 0.9999


@BOTH
def test_it_says_what_it_is_and_how_near_to_torch_it_came(engine, package) -> None:
    for one in open_engines(package, Inference(engine=engine)):
        assert one.words.startswith(f"{engine} ") and f"float32, {usable_cores()} threads" in one.words
        assert "largest difference of a logit" in one.words and "where 1.0e-03 is borne" in one.words


def test_the_file_is_made_once_and_measured_once_by_each_engine(package) -> None:
    files = kept(package)
    before = [path.stat() for path in files]
    for engine in ENGINES:
        open_engines(package, Inference(engine=engine))
        measured = [path for path in folder_of(package).glob(f"{engine}-*.json")]
        stamps = [path.stat().st_mtime_ns for path in measured]
        open_engines(package, Inference(engine=engine))
        assert len(measured) == len(set(stamps)) and [path.stat().st_mtime_ns for path in measured] == stamps
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in files] == [
        (one.st_ino, one.st_mtime_ns) for one in before
    ]
    assert folder_of(package).is_relative_to(tracking.home() / "exports")


def test_a_kept_file_that_changed_is_made_again(make_package, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HILUM_HOME", str(tmp_path / "home"))
    own = make_package(tmp_path / "own")
    (file,) = kept(own)
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] + b"x" * 100)
    windows = torch.randn(1, 1, *own.plan.patch)
    (one,), (network,) = open_engines(own, Inference(engine="onnxruntime")), own.networks()
    with torch.no_grad():
        assert (one(windows) - network(windows)).abs().max() < BOUND
    assert [path.name for path in file.parent.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_two_processes_that_need_it_at_once_both_have_it_whole(make_package, tmp_path) -> None:
    own = make_package(tmp_path / "own")
    asking = (
        "import sys, pathlib; from pipeline.package import ModelPackage; from pipeline.engines._kept import kept; "
        "print(*kept(ModelPackage.load(pathlib.Path(sys.argv[1]))))"
    )
    surroundings = os.environ | {"HILUM_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", asking, str(own.folder)]
    both = [subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, text=True) for _ in "12"]
    said = [process.communicate()[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0] and said[0] == said[1]
    (folder,) = (tmp_path / "home" / "exports").iterdir()  # one folder, nothing half made beside it
    assert {path.name for path in folder.iterdir()} == {"fold-0.onnx", "files.json"}


@BOTH
def test_a_device_it_does_not_run_on_is_refused(engine, package) -> None:
    with pytest.raises(UsageError, match=f"device 'cuda' .* engine {engine}, which runs on the processor"):
        open_engines(package, Inference(engine=engine, device="cuda"))


def test_onnxruntime_refuses_a_precision_it_cannot_compute_in(package) -> None:
    with pytest.raises(UsageError, match="bfloat16 was asked for with engine onnxruntime"):
        open_engines(package, Inference(engine="onnxruntime", precision="bfloat16"))


@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16"), reason="this processor does not compute in bfloat16"
)
def test_openvino_in_bfloat16_says_what_that_changes(package) -> None:
    one = open_engines(package, Inference(engine="openvino", precision="bfloat16"))[0]
    assert ", bfloat16, " in one.words and "of voxels with another label" in one.words
    (told,) = folder_of(package).glob("openvino-*-bfloat16.json")
    agreements = json.loads(told.read_text())
    assert len(agreements) == 2 and all(one["difference"] > 0 and one["differing"] < 0.05 for one in agreements)


@pytest.mark.parametrize(("engine", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_a_missing_library_is_told_with_the_extra_that_brings_it(engine, extra, package, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(UsageError, match=rf"not installed here. Install it: pip install hilum\[{extra}\]"):
        open_engines(package, Inference(engine=engine))


def test_openvino_tells_nobody_that_it_was_imported(tmp_path) -> None:
    asking = (
        "import sys; from pipeline.engines.openvino import _imported; _imported().Core(); "
        "print([name for name in sys.modules if name.startswith('openvino_telemetry.')])"
    )
    surroundings = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", asking], env=surroundings, capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
    assert [path.name for path in tmp_path.iterdir() if path.name == "intel"] == []
