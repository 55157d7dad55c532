"""A package for slides is what was written, byte for byte, and answers as what was trained; other packages are told apart."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import seal
from pipeline.description import show
from pipeline.errors import DamagedPackage, PackageError
from pipeline.package import ModelPackage
from pipeline.slides.package import FORMAT, Member, SlidePackage, SlideRecord, build_network, card, save
from pipeline.slides.scores import ClassScores, Estimate, SlideScores
from preprocessing.records import BadRecord
from tests.pipeline.slides.planted import RECIPE

HALF, SURE = Estimate(value=0.5, interval=(0.25, 0.75)), Estimate(value=1.0, interval=(1.0, 1.0))
ONE = ClassScores(slides=6, patients=5, auroc=SURE, recall=HALF, precision=Estimate(value=None), f1=HALF)
SCORES = SlideScores(
    macro_auroc=SURE, macro_balanced_accuracy=HALF, macro_f1=HALF, per_class={"normal": ONE, "tumour": ONE},
    confusion=((3, 3), (3, 3)), ece_before=0.2, ece_after=0.1, nll_before=0.9, nll_after=0.6, slides=12, patients=10,
)  # fmt: skip
CONFIG = {"attention": "gated", "width": 4, "hidden": 3, "faithful": False}


def a_network(seed: int) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_network("mil_abmil", CONFIG, RECIPE.dimensions, 2)


def a_record() -> SlideRecord:
    members = tuple(
        Member(
            weights=f"weights-member{n}.safetensors", slides_trained=8, patients_trained=7, slides_held_out=4,
            patients_held_out=3, epochs=20, chosen_epoch=13, loss_trained=0.2, loss_held_out=0.3, seed=n,
        )
        for n in range(2)
    )  # fmt: skip
    return SlideRecord(
        format=FORMAT, kind="slides", hilum="0", name="lymph", created="2026-11-22", network="mil_abmil",
        network_config=CONFIG, classes=("normal", "tumour"), recipe=RECIPE, members=members, temperature=1.25,
        scores=SCORES, slides={"normal": 6, "tumour": 6}, patients={"normal": 5, "tumour": 5}, folds=5, inner_folds=2,
        temperatures=(1.0, 1.5), dataset="ab" * 32, training={"seed": 0}, versions={"torch": "2"}, run_id="run",
    )  # fmt: skip


@pytest.fixture
def made(tmp_path: Path) -> SlidePackage:
    def fill(folder: Path) -> None:
        for number in range(2):
            seal.write_weights(a_network(number), folder / f"weights-member{number}.safetensors")
        (folder / "splits.csv").write_text("slide\n")

    return save(tmp_path / "lymph", a_record(), fill)


def test_what_was_saved_is_loaded_and_its_members_answer_as_they_did(made):
    package = SlidePackage.load(made.folder)
    assert package == made and len(package.id) == 64 and package.name == "lymph"
    assert replace(package.record, files={}, id="") == a_record()
    assert set(package.record.files) == {"card.md", "splits.csv", *(member.weights for member in a_record().members)}
    for number, network in enumerate(package.networks()):
        assert not network.training
        for name, value in a_network(number).state_dict().items():
            assert torch.equal(value, network.state_dict()[name])


@pytest.mark.parametrize("name", ["package.json", "card.md", "splits.csv", "weights-member1.safetensors"])
def test_a_changed_or_missing_file_is_refused(made, name):
    path = made.folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    with pytest.raises(PackageError):
        SlidePackage.load(made.folder)
    path.unlink()
    with pytest.raises(PackageError, match=name):
        SlidePackage.load(made.folder)


def test_weights_of_another_network_under_the_right_seal_are_refused(made):
    other = made.folder / "weights-member0.safetensors"
    seal.write_weights(torch.nn.Linear(2, 2), other)
    record = replace(made.record, files=made.record.files | {other.name: seal.sha256_of(other)})
    (made.folder / seal.FILE_NAME).write_text(seal.rendered(replace(record, id=seal.sealed(record))))
    with pytest.raises(DamagedPackage, match="member0"):
        SlidePackage.load(made.folder).networks()


def test_weights_that_are_not_sealed_are_refused(made):
    files = {name: value for name, value in made.record.files.items() if "member1" not in name}
    record = replace(made.record, files=files)
    (made.folder / seal.FILE_NAME).write_text(seal.rendered(replace(record, id=seal.sealed(record))))
    with pytest.raises(DamagedPackage, match="does not seal"):
        SlidePackage.load(made.folder)


def test_a_package_for_slides_and_one_for_scans_are_told_apart_by_what_uses_them(made, tiny):
    with pytest.raises(PackageError, match="hilum slides classify"):
        ModelPackage.load(made.folder)
    with pytest.raises(PackageError, match="hilum segment"):
        SlidePackage.load(tiny)


def test_a_folder_without_a_package_says_which_command_makes_one(tmp_path):
    with pytest.raises(PackageError, match="hilum slides train"):
        SlidePackage.load(tmp_path)


def test_a_package_of_another_format_is_refused_before_it_is_read(made):
    record = replace(made.record, format=FORMAT + 1)
    (made.folder / seal.FILE_NAME).write_text(seal.rendered(replace(record, id=seal.sealed(record))))
    with pytest.raises(PackageError, match=f"reads format {FORMAT}"):
        SlidePackage.load(made.folder)


def test_an_older_package_stays_until_the_new_one_is_whole(made):
    def fails(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        save(made.folder, a_record(), fails)
    assert SlidePackage.load(made.folder) == made


def test_a_setting_that_nobody_knows_is_no_network(made):
    with pytest.raises(BadRecord, match="breadth"):
        build_network("mil_abmil", {"breadth": 3}, 12, 2)


def test_a_card_says_how_good_how_sure_what_it_takes_and_what_an_interval_of_no_width_means(made):
    written = (made.folder / "card.md").read_text()
    assert written == card(made.record)
    for words in (
        "Not for diagnosis", "| macro AUROC | 1.000 (1.000 to 1.000) |", "| macro recall (balanced accuracy) | 0.500",
        "| macro F1 |", "argmax", "without width", "from 0.200 to 0.100", "divided by 1.250,", "0.5 um per pixel",
        "epoch 13 of 20", "no patient was ever on both sides",
    ):  # fmt: skip
        assert words in written, words
    assert "no more than chance" not in written
    assert "no more than chance" in card(replace(made.record, temperature=20.0))


def test_show_prints_the_card_and_that_every_byte_is_as_it_was(made):
    for path in (made.folder, made.folder / "package.json"):
        said = show(path)
        assert card(made.record) in said and made.id in said and "as it was packed" in said


def test_show_of_a_damaged_package_says_so(made):
    (made.folder / "card.md").write_text("better")
    with pytest.raises(DamagedPackage, match=r"card\.md"):
        show(made.folder)
