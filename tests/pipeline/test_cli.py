"""The command line: every verb is listed at once, typos are met with the nearest name, exit codes say whose it is."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pipeline
from pipeline import cli, tracking
from pipeline.bar import Bar
from pipeline.batch import segment
from pipeline.cli import main
from pipeline.config import Segment
from pipeline.report import hilum_version
from preprocessing.plan import Plan

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "numpy", "mlflow", "nibabel", "pydicom", "SimpleITK", "scipy", "monai", "lightning", "jsonargparse"}

Said = pytest.CaptureFixture[str]


def test_help_lists_every_verb_and_loads_nothing_heavy() -> None:
    code = "import sys; from pipeline.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for verb in ("demo", "check", "convert", "plan", "train", "segment", "evaluate", "ui", "show"):
        assert f"  hilum {verb}" in done.stdout
    assert not HEAVY & set(done.stderr.split())


def test_every_verb_is_a_function_of_the_same_name() -> None:
    names = [verb.replace(" ", "_") for verb in cli.VERBS if verb != "node"]  # a room of its own
    assert sorted(names) == sorted(pipeline.__all__)
    for name in names:
        assert callable(getattr(pipeline, name))
    with pytest.raises(AttributeError):
        _ = pipeline.segmnt


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_help_of_a_verb_explains_each_of_its_options(verb: str, capsys: Said) -> None:
    assert main([*verb.split(), "--help"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"usage: hilum {verb}") and not told.err


@pytest.mark.parametrize("verb", ["check", "convert", "segment", "train"])
def test_help_says_in_words_how_several_are_given(verb: str, capsys: Said) -> None:
    main([verb, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "words, separated by commas" in told and "<function" not in told and " at 0x" not in told


def test_help_of_an_option_is_the_sentence_under_its_field(capsys: Said) -> None:
    main(["segment", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "Average over mirrorings of the axes" in told and "Share of a window that its neighbour covers" in told


def test_a_group_of_verbs_explains_each_of_them(capsys: Said) -> None:
    assert main(["slides", "--help"]) == 0 and main(["slides"]) == 2
    told = capsys.readouterr().out
    assert all(told.count(f"hilum slides {word} ") == 2 for word in ("features", "train", "classify"))


def test_version_is_told(capsys: Said) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hilum {hilum_version()}\n"


def test_no_word_at_all_is_answered_with_the_overview_and_code_2(capsys: Said) -> None:
    assert main([]) == 2
    assert "hilum segment" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, nearest",
    [
        (["segmnt", "x"], "'segment'"),
        (["segment", "x", "--package", "p", "--out", "o", "--overlp", "0.3"], "'--overlap'"),
        (["train", "x", "--out", "o", "--step-per-epoch=3"], "'--steps_per_epoch'"),
        (["show", "x", "--fil"], "--help"),
        (["slides", "featureses", "x"], "'features'"),
    ],
)
def test_a_typo_is_met_with_the_nearest_name(words: list[str], nearest: str, capsys: Said) -> None:
    assert main(words) == 2
    told = capsys.readouterr()
    assert nearest in told.err and not told.out and "Traceback" not in told.err


@pytest.mark.parametrize(
    "words, part",
    [
        (["segment", "x", "--package", "p"], "out"),
        (["segment", "x", "--package", "p", "--out", "o", "--overlap", "half"], "overlap"),
        (["train", "x", "--out", "o", "--minutes", "1", "--epochs", "1"], "both minutes and epochs"),
        (["train", "x", "--out", "o", "--minutes", "-1"], "above 0"),
        (["show", "nowhere"], "does not exist"),
        (["check", "nowhere"], "nowhere"),
        (["segment", "x", "--package", "nowhere", "--out", "o"], "hilum train"),
        (["segment", "x", "--package", "p", "--out", "o", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_input_that_makes_no_sense_is_the_users_to_mend(words: list[str], part: str, capsys: Said) -> None:
    assert main(words) == 2
    told = capsys.readouterr()
    assert part in told.err and not told.out and "Traceback" not in told.err and "itself failed" not in told.err


def test_data_goes_to_stdout_and_words_to_stderr(
    tiny: Path, make_plan: Callable[..., Plan], scan_file: Callable[..., Path], tmp_path: Path, capsys: Said
) -> None:
    scan = scan_file(tmp_path / "scan.nii.gz")
    make_plan().write(tmp_path / "plan.yaml")
    segment([scan], tiny, tmp_path / "out", Segment(outputs=("labels",)))
    shown = {
        scan: "14×18×11", tmp_path / "plan.yaml": "resample", tiny: "Not a medical device",
        tmp_path / "out" / "scan": "scan: done",
    }  # fmt: skip
    for path, part in shown.items():
        assert main(["show", str(path)]) == 0
        told = capsys.readouterr()
        assert part in told.out and not told.err


def test_a_run_over_scans_says_what_came_of_it(
    tiny: Path, scan_file: Callable[..., Path], tmp_path: Path, capsys: Said
) -> None:
    scan, out = scan_file(tmp_path / "a.nii.gz"), tmp_path / "out"
    words = ["segment", str(scan), "--package", str(tiny), "--out", str(out), "--outputs", "labels,measurements"]
    assert main([*words, "--tracking-uri=sqlite:///unused.db"]) == 0
    told = capsys.readouterr()
    assert "1 done" in told.err and "index.html" in told.err and not told.out
    assert {path.name for path in (out / "a").iterdir()} == {"labels.nii.gz", "measurements.json", "report.json"}
    scan.write_bytes(b"no longer a scan")
    assert main(words) == 3
    assert "1 failed" in capsys.readouterr().err


def test_a_config_file_gives_options_and_later_words_win(
    tiny: Path, scan_file: Callable[..., Path], tmp_path: Path, capsys: Said
) -> None:
    scan = scan_file(tmp_path / "a.nii.gz")
    config = tmp_path / "night.yaml"
    config.write_text(
        "outputs: [labels, overlay]\noutput_options: {overlay: {fill: 0.5}}\noverlap: 0.25\nflips: false\n"
    )
    words = ["segment", str(scan), "--package", str(tiny), "--config", str(config)]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "a" / "overlay.png").exists()
    later = ["--outputs", "labels", "--output_options", "{}"]
    assert main([*words, *later, "--out", str(tmp_path / "two")]) == 0, capsys.readouterr().err
    assert not (tmp_path / "two" / "a" / "overlay.png").exists()


@pytest.mark.parametrize(
    "line, nearest",
    [
        ("overlp: 0.5", "'overlap'"),
        ("output_options: {overlay: {fil: 0.5}}", "'fill'"),
        ("outputs: [label]", "'labels'"),
    ],
)
def test_a_typo_in_a_config_file_is_met_with_the_nearest_name(
    tiny: Path, scan_file: Callable[..., Path], tmp_path: Path, capsys: Said, line: str, nearest: str
) -> None:
    (tmp_path / "c.yaml").write_text(f"{line}\n")
    words = ["segment", str(scan_file(tmp_path / "a.nii.gz")), "--package", str(tiny), "--out", str(tmp_path / "out")]
    assert main([*words, "--config", str(tmp_path / "c.yaml")]) == 2
    assert nearest in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_fault_of_ours_is_told_as_ours(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    def broken(*words: object) -> int:
        raise KeyError("surprise")

    monkeypatch.setattr(tracking, "serve", broken)
    monkeypatch.setattr(tracking, "newest_page", lambda uri: "experiments")
    monkeypatch.delenv("HILUM_DEBUG", raising=False)
    assert main(["ui"]) == 1
    assert "hilum itself failed (KeyError: 'surprise')" in capsys.readouterr().err
    monkeypatch.setenv("HILUM_DEBUG", "1")
    with pytest.raises(KeyError):
        main(["ui"])


def test_ctrl_c_is_no_fault(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    def stopped(*words: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(tracking, "serve", stopped)
    monkeypatch.setattr(tracking, "newest_page", lambda uri: "experiments")
    assert main(["ui"]) == 130
    assert "stopped" in capsys.readouterr().err


def test_a_short_piece_of_work_shows_no_bar_and_a_long_one_ends_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    clock = [100.0]
    monkeypatch.setattr("pipeline.bar.time.monotonic", lambda: clock[0])
    bar = Bar()
    bar("quick", 0, 2)
    bar("quick", 2, 2)
    assert not capsys.readouterr().err
    for done in range(5):
        bar("slow", done, 4, "so far")
        clock[0] += 20
    lines = capsys.readouterr().err.splitlines()
    assert "100%" in lines[-1] and "1:20 in all" in lines[-1] and " 50%" in lines[-3] and "0:40 left" in lines[-3]
