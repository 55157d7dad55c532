"""A package is what was written, byte for byte, or it is refused; and nothing in it is ever run."""

import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from networks import UnknownNetwork
from pipeline import seal
from pipeline.calibration import Calibration
from pipeline.errors import DamagedPackage, PackageError
from pipeline.package import Fold, ModelPackage, build_network, card, temperatures, weights_file
from pipeline.postprocessing import Chosen, HeldOut, Largest
from pipeline.prediction import Asked, Inference, segment_volume
from preprocessing.plan import Plan
from preprocessing.records import BadRecord, decode, encode
from preprocessing.volume import Volume

MakePackage = Callable[..., ModelPackage]


@pytest.fixture
def own(tiny: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "own"))


def test_what_was_saved_is_loaded(tiny: Path, make_plan: Callable[..., Plan]) -> None:
    package = ModelPackage.load(tiny)
    assert package.plan == make_plan() and package.name == "tiny" and len(package.id) == 64
    assert {path.name for path in tiny.iterdir()} == {"package.json", "card.md", "weights-fold0.safetensors"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained = build_network(package.record.network, package.record.network_config, package.plan).eval()
    (loaded,) = package.networks()
    assert not loaded.training
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_a_card_says_what_it_finds_how_well_and_what_it_is_not(tiny: Path) -> None:
    text = card(ModelPackage.load(tiny).record)
    assert text == (tiny / "card.md").read_text()
    for words in ("Not a medical device", "| liver | 1 | 0.800 |", "| lesion | 7 | not present", "channel(s) mr"):
        assert words in text


@pytest.mark.parametrize("name", ["package.json", "card.md", "weights-fold0.safetensors"])
def test_a_changed_byte_is_refused_wherever_it_is(own: Path, name: str) -> None:
    path = own / name
    whole = path.read_bytes()
    luck = random.Random(7)
    blank = [place for place, byte in enumerate(whole) if byte in b" \n"]
    places = [0, len(whole) - 1, *luck.sample(range(len(whole)), 25), *luck.sample(blank, min(5, len(blank)))]
    for place in places:
        spoiled = bytearray(whole)
        spoiled[place] = ord("\t") if spoiled[place] in b" \n" else spoiled[place] ^ (1 << luck.randrange(8))
        path.write_bytes(spoiled)
        with pytest.raises(PackageError):  # Damaged, or of a format or with a key nobody knows
            ModelPackage.load(own)
    for other in (whole[:-1], whole + b"\n", b""):
        path.write_bytes(other)
        with pytest.raises(DamagedPackage):
            ModelPackage.load(own)
    path.write_bytes(whole)
    ModelPackage.load(own)


@pytest.mark.parametrize("name", ["card.md", "weights-fold0.safetensors"])
def test_a_missing_file_is_refused_by_name(own: Path, name: str) -> None:
    (own / name).unlink()
    with pytest.raises(DamagedPackage, match=name):
        ModelPackage.load(own)


def test_a_folder_without_a_package_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="hilum train"):
        ModelPackage.load(tmp_path)


def resealed(folder: Path, change: Callable[[dict[str, str]], dict[str, str]], weights: str | None = None) -> None:
    """A package whose writer lied: every seal is right."""
    record = ModelPackage.load(folder).record
    folds = {n: replace(fold, weights=weights or fold.weights) for n, fold in record.folds.items()}
    record = replace(record, files=change(dict(record.files)), folds=folds)
    record = replace(record, id=seal.sealed(record))
    (folder / "package.json").write_text(seal.rendered(record))


@pytest.mark.parametrize("path", ["../weights-fold0.safetensors", "{parent}/weights-fold0.safetensors"])
@pytest.mark.parametrize("is_listed", [True, False])
def test_a_package_reaches_for_no_file_outside_itself(own: Path, path: str, is_listed: bool) -> None:
    name = "weights-fold0.safetensors"
    shutil.copy(own / name, own.parent / name)
    path = path.format(parent=own.parent)
    reseal(own, {path: ModelPackage.load(own).record.files[name]} if is_listed else {}, weights=path)
    with pytest.raises(DamagedPackage):
        ModelPackage.load(own)


def reseal(folder: Path, listed: dict[str, str], weights: str = "weights-fold0.safetensors") -> None:
    """A package whose writer lied: every seal is right."""
    record = ModelPackage.load(folder).record
    folds = {number: replace(fold, weights=weights) for number, fold in record.folds.items()}
    record = replace(record, files=record.files | listed, folds=folds, id="")
    sealed = hashlib.sha256(json.dumps(encode(record), sort_keys=True).encode()).hexdigest()
    written = json.dumps(encode(replace(record, id=sealed)), indent=2, ensure_ascii=False) + "\n"
    (folder / "package.json").write_text(written)


class Bomb:
    """Whoever unpickles it makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.place),)


def pickled(bomb: Bomb, path: Path) -> None:
    path.write_bytes(pickle.dumps(bomb))


def saved_by_torch(bomb: Bomb, path: Path) -> None:
    torch.save({"weight": bomb}, path)


@pytest.mark.parametrize("write", [pickled, saved_by_torch])
def test_a_pickle_is_never_opened_even_under_the_right_seal(
    own: Path, tmp_path: Path, write: Callable[[Bomb, Path], None]
) -> None:
    write(Bomb(tmp_path / "boom"), tmp_path / "bomb")
    weights = own / "weights-fold0.safetensors"
    reseal(own, {weights.name: hashlib.sha256((tmp_path / "bomb").read_bytes()).hexdigest()})
    shutil.copy(tmp_path / "bomb", weights)
    package = ModelPackage.load(own)
    with pytest.raises(DamagedPackage, match="no weights"):
        package.networks()
    assert not (tmp_path / "boom").exists()


def test_another_fold_keeps_the_first_and_the_networks_are_averaged(
    make_package: MakePackage, make_scan: Callable[..., Volume], tmp_path: Path
) -> None:
    folder = tmp_path / "package"
    first = make_package(folder)
    weights = (folder / "weights-fold0.safetensors").read_bytes()
    both = make_package(folder, fold=1)
    assert list(both.record.folds) == ["0", "1"] and both.id != first.id
    assert (folder / "weights-fold0.safetensors").read_bytes() == weights
    assert "0.850" in (folder / "card.md").read_text(), "the mean over folds"
    assert [path.name for path in tmp_path.iterdir()] == ["package"], "nothing half-made is left"

    def livers(networks: Sequence[torch.nn.Module]) -> np.ndarray:
        how, asked = Inference(device="cpu"), Asked(probabilities=True, exact=True)
        maps = segment_volume(make_scan(), networks, both.plan, how, "", asked=asked).maps
        assert maps is not None
        return maps.probability("liver").voxels

    alone = [livers([network]) for network in both.networks()]
    np.testing.assert_allclose(livers(both.networks()), (alone[0] + alone[1]) / 2, atol=1e-6)
    assert np.abs(alone[0] - alone[1]).max() > 0.01


def test_a_card_has_the_mean_over_cases_as_compare_has_it(own: Path) -> None:
    record = ModelPackage.load(own).record
    fold = record.folds["0"]
    of = {"0": {"a": 0.9}, "1": {"b": 0.6, "c": 0.6}}
    folds = {
        number: replace(
            fold,
            dice={"liver": sum(cases.values()) / len(cases)},
            held_out=HeldOut(cases={case: {"liver": dice} for case, dice in cases.items()}),
        )
        for number, cases in of.items()
    }
    assert "| liver | 1 | 0.700 |" in card(replace(record, folds=folds))


def a_fold(temperature: float | None = None) -> Fold:
    return Fold(
        weights="w.safetensors", dice={}, cases_trained=1, cases_held_out=1, epochs=1, minutes=0.1, seed=0,
        temperature=temperature,
    )  # fmt: skip


def test_a_fold_that_held_nothing_out_takes_the_mean_temperature_of_the_others() -> None:
    assert temperatures({"0": a_fold(), "1": a_fold()}) == {"0": 1.0, "1": 1.0}
    mixed = temperatures({"0": a_fold(0.5), "1": a_fold(8.0), "all": a_fold()})
    assert mixed == {"0": 0.5, "1": 8.0, "all": pytest.approx(2.0)}


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_cannot_be_is_refused(temperature: float) -> None:
    with pytest.raises(BadRecord, match="above 0"):
        a_fold(temperature)


def test_weights_are_called_after_their_fold() -> None:
    assert weights_file(3) == "weights-fold3.safetensors" and weights_file("all") == "weights-all.safetensors"


def written(folder: Path, change: Callable[[dict], object]) -> None:
    """Whatever a person may have made of package.json, under the right seal."""
    said = json.loads((folder / "package.json").read_text())
    change(said)
    said["id"] = hashlib.sha256(json.dumps(said | {"id": ""}, sort_keys=True).encode()).hexdigest()
    (folder / "package.json").write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n")


def older(said: dict) -> None:
    """As hilum wrote it before there were temperatures."""
    said["format"] = 1
    del said["postprocessing"]
    for fold in said["folds"].values():
        for name in ("temperature", "calibration", "held_out"):
            del fold[name]


SINCE_THREE = ("curve", "coarse", "origin")


def test_a_package_of_the_format_before_is_read_as_it_was_meant(own: Path) -> None:
    def as_it_was(said: dict) -> None:
        said["format"] = 2
        for name in SINCE_THREE:
            said.pop(name, None)

    written(own, as_it_was)
    assert ModelPackage.load(own).record.format == 2


def test_a_package_of_another_format_is_refused_with_who_made_it_and_what_to_do(own: Path) -> None:
    written(own, older)
    with pytest.raises(PackageError, match=r"(?s)format 1 by hilum .*reads format 2 and 3.*train it again") as refused:
        ModelPackage.load(own)
    assert not isinstance(refused.value, DamagedPackage)


def test_a_format_of_tomorrow_is_refused_before_its_words_are_read(own: Path) -> None:
    written(own, lambda said: said.update(format=999, novelty=True))
    with pytest.raises(PackageError, match="format 999"):
        ModelPackage.load(own)


def set_fold(**values: object) -> Callable[[dict], object]:
    return lambda said: said["folds"]["0"].update(values)


CALIBRATION = {"cases": 1, "voxels": 9, "nll_before": 0.1, "nll_after": 0.1, "ece_before": 0.1, "ece_after": 0.1,
               "brier_before": 0.1, "brier_after": 0.1}  # fmt: skip
RULE = {"rule": {"kind": "largest", "label": "liver"}, "dice_before": {}, "dice_after": {}, "cases": 5, "better": 5,
        "worse": 0, "folds": ["0"]}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        set_fold(temperature=0.0),
        set_fold(temperature="1"),
        set_fold(temperature=float("nan")),
        set_fold(calibration=CALIBRATION | {"ece_after": float("inf")}),
        set_fold(calibration=CALIBRATION | {"voxels": 0}),
        set_fold(calibration={"cases": 1}),
        set_fold(held_out={"cases": {"a": {"liver": "good"}}, "trials": []}),
        set_fold(held_out={"cases": {}, "trials": [], "names": []}),
        set_fold(held_out={"cases": {}, "trials": [{"rule": {"kind": "run", "label": "rm"}, "dice": {}}]}),
        lambda said: said.update(
            postprocessing=[RULE | {"rule": {"kind": "no_smaller", "label": "liver", "ml": -1.0}}]
        ),
        lambda said: said.update(postprocessing=[RULE | {"rule": {"kind": "largest", "label": "spleen"}}]),
        lambda said: said.update(postprocessing=[RULE | {"why": "so"}]),
        lambda said: said.update(postprocessing="none"),
    ],
)
def test_values_nobody_can_mean_are_refused_even_under_the_right_seal(
    own: Path, change: Callable[[dict], object]
) -> None:
    written(own, change)
    with pytest.raises(DamagedPackage):
        ModelPackage.load(own)


def test_rules_are_read_back_in_order(own: Path) -> None:
    written(own, lambda said: said.update(postprocessing=[RULE]))
    assert ModelPackage.load(own).rules == (Largest(label="liver"),)
    assert decode(Chosen, RULE, where="") == ModelPackage.load(own).record.postprocessing[0]


def test_a_card_says_how_far_probabilities_can_be_believed_and_what_is_done_to_labels(own: Path) -> None:
    plain = card(ModelPackage.load(own).record)
    assert "the network's own" in plain and "Nothing." in plain
    calibration = CALIBRATION | {"ece_before": 0.1234, "ece_after": 0.0301}
    written(own, lambda said: (set_fold(temperature=1.5, calibration=calibration)(said), said.update(postprocessing=[
        RULE | {"dice_before": {"liver": 0.9}, "dice_after": {"liver": 0.95}}])))  # fmt: skip
    text = card(ModelPackage.load(own).record)
    assert decode(Calibration, calibration, where="").ece_after == 0.0301
    for words in ("| 0 | 1.500 | 0.1234 | 0.0301 |", "Only the largest part of liver is kept", "liver 0.900 to 0.950",
                  "5 case(s) better, 0 worse"):  # fmt: skip
        assert words in text


def test_others_may_read_what_was_packed(tiny: Path) -> None:
    for path in tiny.iterdir():
        assert path.stat().st_mode & 0o044 == 0o044, "whoever may look into the folder may read the package"


def test_a_network_is_built_by_name_and_settings_or_refused_with_the_nearest(make_plan: Callable[..., Plan]) -> None:
    with pytest.raises(UnknownNetwork, match="residual_unet"):
        build_network("residual_unett", {}, make_plan())
    with pytest.raises(BadRecord, match="'width'"):
        build_network("residual_unet", {"witdh": 4}, make_plan())


def test_folds_that_end_at_the_same_moment_are_all_there(make_package: MakePackage, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda fold: make_package(tmp_path / "both", fold=fold), range(4)))
    assert sorted(ModelPackage.load(tmp_path / "both").record.folds) == ["0", "1", "2", "3"]


def test_a_fold_of_another_plan_does_not_join(make_package: MakePackage, tmp_path: Path) -> None:
    made = make_package(tmp_path / "own", ("mr",))
    with pytest.raises(PackageError, match="another plan"):
        make_package(tmp_path / "own", ("t1", "t2"), fold=1)
    assert ModelPackage.load(tmp_path / "own").id == made.id
