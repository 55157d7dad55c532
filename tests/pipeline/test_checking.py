"""`check` says of every scan what it is and one of three words; whatever is no scan is named and left alone."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from pipeline import check
from pipeline.cli import main
from pipeline.errors import UsageError
from pipeline.verdicts import left_alone, table, what_would_help, why_refused
from preprocessing import dicom, files
from preprocessing.reading import Reading
from preprocessing.verdict import Verdict
from preprocessing.volume import REASONS, Geometry, Volume

ScanFile = Callable[..., Path]
MakeScan = Callable[..., Volume]
Said = pytest.CaptureFixture[str]


def words(path: Path, **how: object) -> dict[str, str]:
    return {case: verdict.word for case, verdict in check(path, **how).verdicts.items()}


@pytest.fixture
def tree(scan_file: ScanFile, make_scan: MakeScan, tmp_path: Path) -> Path:
    """One sound file, one sound series, one with a slice twice, one without a slice, one damaged file, notes."""
    root = tmp_path / "tree"
    scan_file(root / "sound.nii.gz", 1)
    dicom.write_series(make_scan(2), root / "series", description="sound")
    paths = dicom.write_series(make_scan(3), root / "twice", description="a slice sent twice")
    shutil.copy(paths[4], root / "twice" / "again.dcm")
    dicom.write_series(make_scan(4), root / "gap", description="a slice lost")[5].unlink()
    cut = scan_file(root / "cut.nii.gz", 5)
    cut.write_bytes(cut.read_bytes()[:500])
    (root / "notes.txt").write_text("call back on Monday")
    (root / "series" / "thumbs.json").write_text("{}")
    return root


def test_each_case_gets_one_of_three_words_and_each_other_file_its_reason(tree: Path) -> None:
    found = check(tree)
    assert {case: v.word for case, v in found.verdicts.items()} == {
        "cut": "refused", "gap": "refused", "series": "fine", "sound": "fine", "twice": "repaired",
    }  # fmt: skip
    assert not found.fits
    assert found.verdicts["cut"].reason == "damaged" and found.verdicts["gap"].reason == "missing_slices"
    assert len(found.verdicts["twice"].repairs) == 1
    assert {Path(file).name for file in found.left_alone} == {"notes.txt", "thumbs.json"}


def test_what_a_scan_is_is_said_without_opening_it_again(tree: Path, make_scan: MakeScan) -> None:
    series = check(tree).verdicts["series"]
    assert series.modality == "MR" and "Explicit VR Little Endian" in series.encoding and len(series.files) == 11
    assert series.geometry is not None and series.geometry.matches(make_scan(2).geometry)
    assert "14×18×11 voxels" in series.what and "MR" in series.what


def test_the_command_prints_a_table_and_exits_with_2_while_anything_is_refused(tree: Path, capsys: Said) -> None:
    assert main(["check", str(tree)]) == 2
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert [line.split()[:2] for line in lines if not line.startswith(" ")][:5] == [
        ["fine", "series"], ["fine", "sound"], ["repaired", "twice"], ["refused", "cut"], ["refused", "gap"],
    ]  # fmt: skip
    assert max(map(len, lines)) <= 100
    assert "    missing_slices: " in told.out and "    repaired: " in told.out
    assert "left alone: 2 files" in told.out and "        notes.txt" in told.out
    assert told.err.splitlines() == [
        "5 cases: 2 fine, 1 repaired, 2 refused; 2 files left alone",
        "refused: 1 damaged, 1 missing_slices",
        "--allow gaps would repair some of them.",
    ]
    (tree / "notes.txt").unlink()
    for name in ("cut.nii.gz", "gap"):
        (shutil.rmtree if (tree / name).is_dir() else Path.unlink)(tree / name)
    assert main(["check", str(tree)]) == 0
    assert capsys.readouterr().err == "3 cases: 2 fine, 1 repaired, 0 refused; 1 file left alone\n"


def test_everything_stands_in_the_json(tree: Path, tmp_path: Path, capsys: Said) -> None:
    assert main(["check", str(tree), "--json", str(tmp_path / "found.json")]) == 2
    said = json.loads((tmp_path / "found.json").read_text())
    cases = {case["case"]: case for case in said["cases"]}
    assert set(cases) == {"cut", "gap", "series", "sound", "twice"} and len(said["left_alone"]) == 2
    for case in cases.values():
        assert set(case) == {
            "case", "word", "reason", "message", "repairs", "notes", "modality", "encoding", "channels", "slices",
            "shape", "spacing_mm", "orientation", "affine", "sources", "files",
        }  # fmt: skip
        assert (case["word"] == "refused") == (case["reason"] in REASONS) == bool(case["message"])
    assert cases["series"]["shape"] == [14, 18, 11] and cases["series"]["slices"] == 11
    assert np.array(cases["series"]["affine"]).shape == (4, 4) and cases["gap"]["affine"] is None
    assert len(cases["gap"]["files"]) == 10 and cases["gap"]["modality"] == "MR"


@pytest.mark.parametrize("name", ["sound.nii.gz", "series", "series/0003.dcm"])
def test_a_single_file_a_series_folder_or_one_of_its_slices_will_do(tree: Path, name: str) -> None:
    assert list(words(tree / name).values()) == ["fine"]


def test_a_tree_without_a_scan_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UsageError, match=r"no scan was found.*\n.*notes.txt"):
        check(tmp_path)
    with pytest.raises(UsageError, match=r"no scan was found.*\n.*notes.txt"):
        check(tmp_path / "notes.txt")
    with pytest.raises(UsageError, match="does not exist"):
        check(tmp_path / "nowhere")


def test_a_mistake_in_the_words_is_told_before_any_work(dataset: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names its own channels"):
        check(dataset(tmp_path / "data"), channels=("t1", "t2"))
    assert main(["check", str(tmp_path / "data"), "--json", str(tmp_path / "nowhere" / "found.json")]) == 2


def test_what_is_allowed_is_repaired_and_said(tree: Path, capsys: Said) -> None:
    assert words(tree / "gap", reading=Reading(allow=("gaps",))) == {"gap": "repaired"}
    assert main(["check", str(tree / "gap"), "--allow", "gaps,tilt"]) == 0
    assert "repaired: " in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["check", "convert", "plan", "train", "segment"])
def test_a_typo_in_allow_is_told_with_the_known_words(verb: str, tmp_path: Path, capsys: Said) -> None:
    more = {"check": [], "segment": ["--package", "p", "--out", "o"]}.get(verb, ["--out", str(tmp_path / "o")])
    assert main([verb, str(tmp_path), *more, "--allow", "tlit"]) == 2
    told = capsys.readouterr().err
    assert "'tlit'" in told and "tilt, uneven, gaps, few, nan, sform, qform" in told


def test_channels_bring_files_together_and_match_brings_them_onto_one_grid(
    make_scan: MakeScan, tmp_path: Path, capsys: Said
) -> None:
    scan = make_scan(1)
    moved = Geometry(shape=scan.geometry.shape, affine=scan.geometry.affine + np.eye(4, k=3) * 2.5)
    for name, geometry in (("t1", scan.geometry), ("t2", moved)):
        files.write(scan.with_voxels(scan.voxels, geometry), tmp_path / "tree" / "patient" / f"{name}.nii.gz")
    assert set(words(tmp_path / "tree")) == {"patient_t1", "patient_t2"}
    apart = check(tmp_path / "tree", channels=("t1", "t2")).verdicts
    assert apart["patient"].reason == "grids_differ"
    assert main(["check", str(tmp_path / "tree"), "--channels", "t1,t2", "--match", "t2"]) == 0
    assert "repaired" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "tree"), "--channels", "t1,t2", "--match", "t3"]) == 2
    assert "t1, t2" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "tree"), "--match", "t1"]) == 2
    assert "no channels are named; name them all with --channels" in capsys.readouterr().err


def test_a_patient_is_a_folder_of_links_named_as_channels_whatever_the_series_are_called(
    make_scan: MakeScan, tmp_path: Path
) -> None:
    (tmp_path / "tree" / "patient").mkdir(parents=True)
    for name, folder in (("t1", "11-T1post-80644"), ("t2", "37908-T2reg-21119")):
        dicom.write_series(make_scan(1), tmp_path / "study" / folder, description=name, study="one visit")
        (tmp_path / "tree" / "patient" / name).symlink_to(tmp_path / "study" / folder)
    found = check(tmp_path / "tree", channels=("t1", "t2")).verdicts
    assert list(found) == ["patient"] and found["patient"].channels == ("t1", "t2")
    apart = check(tmp_path / "study", channels=("t1", "t2")).verdicts
    assert len(apart) == 2 and {verdict.reason for verdict in apart.values()} == {"channels"}
    assert all("one file or series folder per channel" in verdict.message for verdict in apart.values())


def test_a_fault_of_ours_in_one_scan_is_said_of_that_scan(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    really = files.read

    def stumbles(path: Path, *how: object) -> Volume:
        if path.name == "sound.nii.gz":
            raise KeyError("surprise")
        return really(path, *how)

    monkeypatch.setattr(files, "read", stumbles)
    found = check(tree).verdicts
    assert found["sound"].word == "refused" and "hilum itself failed" in found["sound"].message
    assert found["series"].word == "fine"


def echoes(make_scan: MakeScan, folder: Path) -> Path:
    """Two echoes of one place in one series."""
    for echo, time in ((1, 10.0), (2, 90.0)):
        for path in dicom.write_series(make_scan(1), folder, description="two echoes"):
            slice_ = pydicom.dcmread(path)
            slice_.EchoTime, slice_.EchoNumbers = time, echo
            slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = f"{slice_.SOPInstanceUID}.{echo}"
            slice_.PixelData = bytes(np.frombuffer(slice_.PixelData, np.int16) + echo)
            slice_.save_as(folder / f"echo{echo}-{path.name}")
            path.unlink()
    return folder


def test_a_series_of_two_echoes_is_two_cases_whatever_the_order_of_its_files(
    make_scan: MakeScan, tmp_path: Path
) -> None:
    folder = echoes(make_scan, tmp_path / "one" / "mixed")
    found = check(folder).verdicts
    assert len(found) == 2 and all(case.startswith("mixed-echo") for case in found)
    assert {verdict.word for verdict in found.values()} == {"fine"}
    for number, path in enumerate(sorted(folder.iterdir(), reverse=True)):
        path.rename(path.with_name(f"{number:04d}.dcm"))
    assert set(words(folder)) == set(found)


def test_a_repaired_case_of_a_dataset_is_named_and_fine_ones_are_counted(
    dataset: Callable[..., Path], capsys: Said, tmp_path: Path
) -> None:
    root = dataset(tmp_path / "data")
    image = nibabel.load(root / "imagesTr" / "case_1.nii.gz")
    voxels = np.asarray(image.dataobj).astype(np.float32)
    voxels[0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), root / "imagesTr" / "case_1.nii.gz")
    assert main(["check", str(root)]) == 2
    told = capsys.readouterr()
    assert told.out.startswith("refused   case_1") and "not_numbers" in told.out and "case_0" not in told.out
    assert main(["check", str(root), "--allow", "nan"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("repaired  case_1") and "case_0" not in told.out
    assert "3 cases: 2 fine, 1 repaired, 0 refused" in told.err and "every case fits." in told.err
    assert main(["check", str(root), "--allow", "nan", "--all"]) == 0
    assert "fine      case_0" in capsys.readouterr().out


def test_what_is_unusual_about_a_dataset_is_said_in_a_line_each(
    dataset: Callable[..., Path], capsys: Said, tmp_path: Path
) -> None:
    root = dataset(tmp_path / "data")
    record = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "liver": 1},
        "annotated": {"case_2": ["liver"]},
        "patients": {"case_0": "Doe", "case_1": "Doe"},
    }
    (root / "dataset.json").write_text(json.dumps(record))
    assert main(["check", str(root), "--json", str(tmp_path / "found.json")]) == 0
    told = capsys.readouterr().err
    assert "3 cases are of 2 patients" in told and "in 1 of 3 cases only some labels were looked for" in told
    assert len(json.loads((tmp_path / "found.json").read_text())["notes"]) == 2 and "Doe" not in told


def test_plan_tells_how_many_cases_were_repaired(
    dataset: Callable[..., Path], capsys: Said, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    root = dataset(tmp_path / "data")
    image = nibabel.load(root / "imagesTr" / "case_1.nii.gz")
    voxels = np.asarray(image.dataobj).astype(np.float32)
    voxels[0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), root / "imagesTr" / "case_1.nii.gz")
    assert main(["plan", str(root), "--out", str(tmp_path / "plan.yaml"), "--device", "cpu"]) == 2
    assert "do not fit" in capsys.readouterr().err
    words = ["plan", str(root), "--out", str(tmp_path / "plan.yaml"), "--device", "cpu", "--allow", "nan"]
    assert main(words) == 0
    assert "1 of 3 cases were repaired" in caplog.text and "case_1" not in caplog.text


@pytest.fixture
def dataset(make_scan: MakeScan) -> Callable[[Path], Path]:
    """Three labelled cases in Decathlon's layout."""

    def made(root: Path) -> Path:
        for seed in range(3):
            scan = make_scan(seed)
            files.write(scan, root / "imagesTr" / f"case_{seed}.nii.gz")
            labels = scan.with_voxels((scan.voxels > 250).astype(np.uint8))
            files.write(labels, root / "labelsTr" / f"case_{seed}.nii.gz", is_labels=True)
        return root

    return made


def test_a_table_obeys_no_name_and_cuts_no_path() -> None:
    evil = "a\x1b[2Jb\udcff" + "c" * 200
    printed = table({evil: Verdict(word="fine", modality="\x1b]0;owned\x07")}, columns=80)
    assert "\x1b" not in printed and "\udcff" not in printed and "c" * 200 in printed
    assert printed.split()[0] == "fine"


def test_the_table_calls_encodings_as_people_do_and_keeps_to_its_width() -> None:
    long = "JPEG Lossless, Non-Hierarchical, First-Order Prediction (Process 14 [Selection Value 1]), 12 of 16 bits, unsigned"
    grid = Geometry(shape=(256, 256, 40), affine=np.diag([1, 1, 1.2, 1]))
    packed = Verdict(word="fine", modality="MR", geometry=grid, encoding=long)
    plain = replace(packed, encoding="Explicit VR Little Endian, 16 of 16 bits, signed")
    assert long in packed.what and packed.brief == "MR, 256×256×40 voxels of 1×1×1.2 mm, RAS, JPEG lossless"
    assert plain.brief == "MR, 256×256×40 voxels of 1×1×1.2 mm, RAS, explicit VR"
    assert replace(packed, encoding=f"{long}; {plain.encoding}").brief == f"{packed.brief}; explicit VR"
    assert table({"patient7": packed}).splitlines() == [f"fine      patient7  {packed.brief}"]
    assert table({"patient7": packed}, columns=70).splitlines() == ["fine      patient7", f"          {packed.brief}"]


def test_a_note_on_many_cases_is_told_once_and_of_each_on_request() -> None:
    many = {f"case_{n}": Verdict(word="fine", notes=(f"Instance numbers begin at {n}: look.",)) for n in range(2, 9)}
    told = table(many).splitlines()
    assert told[:7] == [f"fine      case_{n}" for n in range(2, 9)]
    assert told[7:] == [
        "", "notes on many cases", "     7  Instance numbers begin at …: look.",
        "        case_2", "        case_3", "        case_4", "        ... and 4 more",
    ]  # fmt: skip
    assert table(many, everything=True).count("note: Instance numbers begin at") == 7
    assert table(dict(list(many.items())[:3])).count("note: ") == 3


def test_a_series_over_several_folders_names_them() -> None:
    sources = ("/disc/a/1.dcm", "/disc/b/2.dcm")
    assert "from /disc/a, /disc/b" in table({"disc": Verdict(word="fine", channels=("0",), sources=sources)})


def test_why_scans_were_refused_is_counted_and_what_may_be_allowed_is_named() -> None:
    assert why_refused(["too_few_slices", "tilted", "", "too_few_slices"]) == "refused: 2 too_few_slices, 1 tilted"
    said = ["Resample it, or allow tilt to have it resampled.", "Look for the others."]
    assert what_would_help(said) == "--allow tilt would repair some of them."
    assert why_refused(["", ""]) == what_would_help(said[1:]) == ""


def test_a_label_that_no_case_has_is_told_before_anything_is_trained(
    dataset: Callable[..., Path], tmp_path: Path, capsys: Said, caplog: pytest.LogCaptureFixture
) -> None:
    root = dataset(tmp_path / "data")
    declared = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "liver": 1, "Livr tumour": 2}}
    (root / "dataset.json").write_text(json.dumps(declared))
    assert main(["check", str(root)]) == 0
    assert "no case has a voxel of Livr tumour;" in capsys.readouterr().err
    assert check(root).records()["absent_labels"] == ["Livr tumour"]
    assert main(["plan", str(root), "--out", str(tmp_path / "plan.yaml"), "--device", "cpu"]) == 0
    assert "no case has a voxel of Livr tumour" in caplog.text


def test_a_folder_in_place_of_the_json_is_told_before_any_work(tree: Path, capsys: Said) -> None:
    assert main(["check", str(tree), "--json", str(tree)]) == 2
    assert "--json needs the name of a file" in capsys.readouterr().err


def test_files_left_alone_are_told_by_reason_and_all_of_them_on_request() -> None:
    alone = {f"/data/{n}.txt": "not DICOM" for n in range(9)} | {"/data/DICOMDIR": "a table of contents"}
    told = left_alone(alone, Path("/data"))
    assert told.splitlines()[0] == "left alone: 10 files" and "... and 6 more" in told and "        0.txt" in told
    assert "8.txt" not in told and "8.txt" in left_alone(alone, Path("/data"), everything=True)


def test_every_case_of_the_zoo_gets_a_word(shared: Path) -> None:
    found = check(shared / "data" / "zoo")
    reasons = {verdict.reason for verdict in found.verdicts.values() if verdict.word == "refused"}
    assert reasons <= set(REASONS)
    assert not [verdict.message for verdict in found.verdicts.values() if "hilum itself" in verdict.message]
    read = {str(Path(file)) for verdict in found.verdicts.values() for file in verdict.files}
    every = {str(path) for path in (shared / "data" / "zoo").rglob("*") if path.is_file()}
    assert not every - read - set(found.left_alone), "a file is part of a case, or named as left alone"
