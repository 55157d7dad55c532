"""What only looks needs no torch: show, check and plan start without it, and say the same as with it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import demand, planning
from pipeline.config import reading_of
from pipeline.conversion import convert
from pipeline.evaluation import evaluate, table
from pipeline.planning import Wishes
from pipeline.report import Memory, Report, WindowCount, as_json
from pipeline.slides.class_map_report import ClassMapReport
from pipeline.slides.deletion import Deletion
from pipeline.slides.report import SlideReport
from pipeline.slides.result import Origin
from preprocessing.plan import Plan, Recipe
from preprocessing.volume import Volume

pytestmark = pytest.mark.slow

HEAVY = {"torch", "lightning", "mlflow", "monai", "timm", "captum", "highdicom"}

TOLD = """
import json, sys
from pipeline.cli import main
code = main(sys.argv[1:])
status = open("/proc/self/status").read() if sys.platform == "linux" else "VmHWM: 0 kB"
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
tops = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"code": code, "peak": peak, "tops": tops, "modules": len(sys.modules)}), file=sys.stderr)
"""


def run(*words: object, code: str = TOLD, **surroundings: str) -> tuple[dict[str, Any], str]:
    """What a process of its own says of itself at the end, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True,
        env=os.environ | surroundings,
    )  # fmt: skip
    said: dict[str, Any] = json.loads(done.stderr.strip().splitlines()[-1])
    return said, done.stdout


def test_help_is_a_few_modules_and_a_few_megabytes() -> None:
    said, _ = run("--help")
    assert said["code"] == 0 and said["modules"] < 150  # Python's own are about 100
    assert not {"numpy", "yaml", "jsonargparse", *HEAVY} & set(said["tops"])
    assert said["peak"] < 80e6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, make_scan: Callable[..., Volume]) -> Path:
    """Five cases in images/ and labels/."""
    from preprocessing import files

    folder = tmp_path_factory.mktemp("dataset")
    for seed in range(5):
        scan = make_scan(seed)
        files.write(scan, folder / "images" / f"case{seed}.nii.gz")
        labels = scan.with_voxels((scan.voxels > 250).astype("uint8"))
        files.write(labels, folder / "labels" / f"case{seed}.nii.gz", is_labels=True)
    return folder


def a_slide(folder: Path, *, names_tiles: bool) -> Path:
    origin = Origin(
        package_name="demo", package_id="ab" * 32, network="acmil", members=1, temperature=1.0, encoder="x",
        encoder_sha256="cd", tile_px=224,
    )  # fmt: skip
    shared: dict[str, Any] = {
        "slide_id": "s1", "hilum_version": "1", "package_id": "ab" * 32, "origin": origin, "slide_sha256": "ef",
        "size_um": (900.0, 800.0), "microns_per_pixel": (0.5, 0.5), "resolution_from": "file", "tiles": 9,
        "tile_um": 112.0, "step_um": 112.0, "quarantined": {}, "features": "made", "warnings": (), "seconds": {},
        "files": (),
    }  # fmt: skip
    if names_tiles:
        report: Any = ClassMapReport(areas_mm2={"tumour": 1.5}, most="tumour", **shared)
    else:
        deletion = Deletion(
            tiles=9, removed=0, probability=0.5, probability_left=0.5, probability_random=0.5, fall=0.0,
            fall_random=0.0, fall_random_most=0.0, draws=0, seed=0,
        )  # fmt: skip
        report = SlideReport(
            package_name="demo", predicted="benign", probabilities={"benign": 0.7, "tumour": 0.3}, logits={}, rest={},
            attention_entropy=0.5, deletion=deletion, deletion_verdict=deletion.words, top_tiles=3, seed=0, **shared,
        )  # fmt: skip
    folder.mkdir()
    (folder / "report.json").write_text(as_json(asdict(report)))
    return folder


def a_report(folder: Path) -> Path:
    report = Report(
        case_id="a", package_id="ab" * 32, package_name="tiny", hilum_version="1", input_sha256="", sources=("a.nii",),
        reader="", repairs=(), grid={"shape": [2, 2, 2], "spacing_mm": [1, 1, 1], "orientation": "RAS"},
        volumes_ml={"liver": 1.0}, warnings=(), seconds={"read": 0.5}, files=("labels.nii.gz",), outputs=("labels",),
        uncertainty={"liver": {"entropy": 0.25, "folds": 0.0312}}, engine="torch 2, float32",
        memory=Memory(stated=2_000_000_000, peak=1_500_000_000, words=("the accumulators were put on the disk",)),
        windows=WindowCount(computed=8, skipped=2, repeated=3, body="HU below -500"), region="a box of 9 x 9 x 9 voxels",
    )  # fmt: skip
    folder.mkdir()
    report.write(folder)
    return folder


def test_the_report_of_how_the_networks_ran_is_read_back_and_told_line_by_line(tmp_path: Path) -> None:
    _, words = run("show", a_report(tmp_path / "a"))
    for line in (
        "unsure of liver: entropy 0.25, folds 0.0312",
        "engine  torch 2, float32",
        "looked at a box of 9 x 9 x 9 voxels",
        "windows 8 computed, 3 of one value throughout, their answer taken again, 2 without body (HU below -500) called background",
        "memory  took 1.5 GB, was said to take 2 GB at most; the accumulators were put on the disk",
    ):
        assert f"  {line}\n" in words


def test_a_report_of_before_says_nothing_of_how_the_networks_ran(tmp_path: Path) -> None:
    path = a_report(tmp_path / "a") / "report.json"
    said = json.loads(path.read_text())
    for name in ("uncertainty", "memory", "windows", "engine", "region"):
        del said[name]
    path.write_text(json.dumps(said))
    read = Report.read(path)
    assert (read.uncertainty, read.memory, read.windows, read.engine, read.region) == ({}, None, None, "", "")


@pytest.mark.parametrize("kind", ["scan", "plan", "package", "report", "verdict", "slide", "tiles"])
def test_show_needs_no_torch(
    kind: str, tmp_path: Path, tiny: Path, make_plan: Callable[..., Plan], scan_file: Callable[..., Path]
) -> None:
    path, word = tmp_path / kind, "tiny"
    if kind == "scan":
        path, word = scan_file(tmp_path / "scan.nii.gz"), "14×18×11 voxels"
    elif kind == "plan":
        make_plan().write(path := tmp_path / "plan.yaml")
    elif kind == "package":
        path = tiny
    elif kind == "report":
        a_report(path)
    elif kind == "verdict":
        convert([scan_file(tmp_path / "scan.nii.gz")], tmp_path / "out", reading_of((), ""))
        path, word = tmp_path / "out" / "scan", "scan: fine"
    else:
        a_slide(path, names_tiles=kind == "tiles")
        word = "tumour"
    said, printed = run("show", path)
    assert said["code"] == 0 and word in printed and not HEAVY & set(said["tops"])


def test_an_evaluation_is_told_as_it_was_printed_and_needs_no_torch(dataset: Path, tmp_path: Path) -> None:
    evaluation = evaluate(dataset / "labels", dataset / "labels", tmp_path / "scores.json")
    said, printed = run("show", tmp_path / "scores.json")
    assert said["code"] == 0 and not HEAVY & set(said["tops"])
    told = table(evaluation).splitlines()
    assert printed.splitlines()[: len(told) - 1] == told[:-1] and "mean Dice 1.000; NSD at 1 mm\n" in printed
    assert (tmp_path / "scores.html").as_uri() in printed


def test_check_needs_no_torch(dataset: Path, scan_file: Callable[..., Path], tmp_path: Path) -> None:
    scan_file(tmp_path / "scan.nii.gz")
    for place in (dataset, tmp_path):
        said, _ = run("check", place)
        assert said["code"] == 0 and not HEAVY & set(said["tops"])


def test_plan_loads_torch_in_another_process_and_only_for_what_nobody_has_asked(dataset: Path, tmp_path: Path) -> None:
    words = "plan", dataset, "--device", "cpu", "--memory_gb", "4", "--out"
    first, told = run(*words, tmp_path / "first.yaml")
    assert first["code"] == 0 and not HEAVY & set(first["tops"]) and "residual_unet" in told
    alone = TOLD.replace("code = main", "from pipeline import demand\ndel demand._begun\ncode = main")
    again, _ = run(*words, tmp_path / "again.yaml", code=alone)
    assert again["code"] == 0 and not HEAVY & set(again["tops"])
    assert (tmp_path / "again.yaml").read_bytes() == (tmp_path / "first.yaml").read_bytes()


@pytest.mark.parametrize("mode", ["hilum", "nnunet"])
def test_who_plans_without_torch_plans_what_who_has_it_plans(dataset: Path, mode: str, tmp_path: Path) -> None:
    run("plan", dataset, "--device", "cpu", "--memory_gb", "4", "--mode", mode, "--out", tmp_path / "apart.yaml")
    wishes = Wishes(device="cpu", memory_gb=4.0, mode=mode)  # type: ignore[arg-type]
    demand.home().joinpath("demands").rename(tmp_path / "demands")  # told anew
    made = planning.plan(dataset, tmp_path / "here.yaml", wishes)
    apart = Plan.read(tmp_path / "apart.yaml")
    reason = "memory_gb"  # says how much is free just now
    assert replace(made, reasons=made.reasons | {reason: ""}) == replace(apart, reasons=apart.reasons | {reason: ""})


def test_another_process_answers_and_refuses_as_this_one_does() -> None:
    questions = [
        {"ask": "knows", "network": "segresnet"},
        {"ask": "fit", "network": "residual_unet", "settings": {}, "patch": [32, 16, 48], "spacing": [1.0, 3.0, 1.0]},
        {"ask": "fit", "network": "residual_unet", "settings": {}, "patch": [4, 4, 4], "spacing": [1.0, 1.0, 1.0]},
        {"ask": "fit", "network": "residual_unet", "settings": {"widht": 8}, "patch": [32] * 3, "spacing": [1.0] * 3},
    ]
    with demand.Elsewhere() as elsewhere:
        answers = [elsewhere(question) for question in questions]
    assert answers == [demand.here(question) for question in questions]
    assert [answer.get("refused") for answer in answers] == [None, None, "ValueError", "BadRecord"]
    assert elsewhere.child and elsewhere.child.returncode == 0


def test_another_process_that_ends_is_no_answer() -> None:
    with demand.Elsewhere() as elsewhere:
        elsewhere({"ask": "knows", "network": "residual_unet"})
        assert elsewhere.child
        elsewhere.child.kill()
        elsewhere.child.wait()
        with pytest.raises(RuntimeError, match="without an answer"):
            elsewhere({"ask": "knows", "network": "segresnet"})


def test_an_answer_is_kept_with_its_refusal_and_found_once() -> None:
    asked: list[str] = []

    def find(question: dict[str, Any]) -> dict[str, Any]:
        asked.append(question["ask"])
        return demand.here(question)

    network = demand.Network(name="residual_unet", find=find)
    for _ in range(2):
        fitted = network.fit({"width": 8}, (16, 16, 16), (1.0, 1.0, 1.0))
        with pytest.raises(ValueError, match="Choose a larger patch"):
            network.fit({}, (4, 4, 4), (1.0, 1.0, 1.0))
        with pytest.raises(ValueError, match="widht"):
            network.fit({"widht": 8}, (16, 16, 16), (1.0, 1.0, 1.0))
        step = network.step(
            fitted, channels=1, classes=3, patch=(16, 16, 16), batch=2, recipe=Recipe(), precision="float32"
        )
    assert asked == ["fit", "fit", "fit", "step"] and step.peak > step.held > 0
    assert network.divisor(fitted) == (4, 4, 4)


def test_answers_are_of_the_code_that_gave_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def find(question: dict[str, Any]) -> dict[str, Any]:
        asked.append(question)
        return {"is": ["width"]}

    for version in ("one", "one", "two"):
        monkeypatch.setattr(demand, "_code", lambda version=version: version)
        assert demand.Network(name="residual_unet", find=find).knows() == {"width"}
    assert len(asked) == 2
    (demand.home() / "demands" / "two.json").write_text("half of a")
    assert demand.Network(name="residual_unet", find=find).knows() == {"width"} and len(asked) == 3
