"""The features of one slide in one file: what was written is read, by anyone; what is damaged or foreign is refused."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pipeline.errors import is_users
from pipeline.slides import feature_file
from pipeline.slides.feature_file import DAMAGED, FILE_NAME, NOT_FINITE, FeatureFile, FeatureRecipe, UnreadableFeatures

RECIPE = FeatureRecipe(
    tile_um=112.0, tile_px=224, step_um=112.0, least_tissue=0.5, encoder="hilum_texture", encoder_sha256="ab" * 32,
    dimensions=16,
)  # fmt: skip


def words(tiles: int = 7, **other: Any) -> dict[str, Any]:
    """What `write` is told of a slide with so many tiles."""
    rng = np.random.default_rng(tiles)
    grid = np.stack([np.arange(tiles) * 2, np.arange(tiles) // 3], axis=1).astype(np.int64)
    return {
        "slide_id": "a slide",
        "slide_sha256": "cd" * 32,
        "slide_microns_per_pixel": (0.2527, 0.2528),
        "resolution_from": "file",
        "size_um": (4000.5, 3000.25),
        "recipe": RECIPE,
        "features": rng.normal(size=(tiles, 16)).astype(np.float16),
        "positions_um": grid * 112.0,
        "grid": grid,
        "tissue": rng.uniform(0.5, 1, tiles).astype(np.float32),
        **other,
    }


def test_what_was_written_is_read_and_the_same_slide_gives_the_same_bytes(tmp_path: Path) -> None:
    told = words(quarantined=[(DAMAGED, 112.0, 0.0), (NOT_FINITE, 0.0, 336.0), (DAMAGED, 224.0, 0.0)])
    feature_file.write(tmp_path / "one.h5", **told)
    feature_file.write(tmp_path / "two.h5", **told)
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()

    read = FeatureFile.read(tmp_path / "one.h5")
    for name in ("positions_um", "grid", "tissue"):
        np.testing.assert_array_equal(getattr(read, name), told[name])
    np.testing.assert_array_equal(read.features(), told["features"])
    assert read.recipe == RECIPE and read.slide_id == "a slide" and read.slide_microns_per_pixel == (0.2527, 0.2528)
    assert read.size_um == (4000.5, 3000.25) and read.quarantined == {DAMAGED: 2, NOT_FINITE: 1} and len(read) == 7
    assert {path.name for path in tmp_path.iterdir()} == {"one.h5", "two.h5"}, "nothing half-written stays"


def test_a_slide_whose_name_is_no_unicode_is_written_all_the_same(tmp_path: Path) -> None:
    file = feature_file.write(tmp_path / "one.h5", **words(slide_id="gr\udcf6\udcdfe"))
    assert file.slide_id == "gr\\udcf6\\udcdfe"


def test_other_features_are_known_by_their_hash(tmp_path: Path) -> None:
    told = words()
    one = feature_file.write(tmp_path / "one.h5", **told)
    changed = told["features"].copy()
    changed[3, 5] = np.nextafter(changed[3, 5], np.float16(9))
    two = feature_file.write(tmp_path / "two.h5", **told | {"features": changed})
    assert one.features_sha256 != two.features_sha256
    three = feature_file.write(tmp_path / "three.h5", **told | {"slide_id": "the same under another name"})
    assert one.features_sha256 == three.features_sha256


def test_tools_that_know_clam_find_features_and_pixels_of_level_0(tmp_path: Path) -> None:
    told = words(origin_px=(1000, 50))
    feature_file.write(tmp_path / "one.h5", **told)
    with h5py.File(tmp_path / "one.h5") as file:
        assert file["features"].shape == (7, 16) and file["features"].dtype == np.float16
        assert file["features"].chunks is None and file["features"].compression is None
        expected = [
            (round(1000 + x / 0.2527), round(50 + y / 0.2528)) for x, y in np.asarray(told["positions_um"]).tolist()
        ]
        assert file["coords"][()].tolist() == [list(pair) for pair in expected]
        assert file["coords"].dtype.kind == "i" and file["coords"].attrs["patch_size_level0"] == round(112 / 0.2527)


def test_features_are_mapped_and_torch_takes_them_without_a_copy(tmp_path: Path) -> None:
    file = feature_file.write(tmp_path / "one.h5", **words())
    before = (tmp_path / "one.h5").read_bytes()
    features = file.features()
    assert isinstance(features, np.memmap)
    tensor = torch.from_numpy(features)
    assert tensor.data_ptr() == features.ctypes.data and tensor.dtype == torch.float16
    tensor.zero_()
    assert (tmp_path / "one.h5").read_bytes() == before, "what is written into the map stays in memory"


def test_a_folder_of_features_is_known_by_its_slides(tmp_path: Path) -> None:
    for name in ("b", "a", ".c.partial"):
        (tmp_path / name).mkdir()
        feature_file.write(tmp_path / name / FILE_NAME, **words())
    (tmp_path / "failed").mkdir()
    (tmp_path / "summary.csv").write_text("slide\n")
    assert feature_file.files_in(tmp_path) == (tmp_path / "a" / FILE_NAME, tmp_path / "b" / FILE_NAME)
    assert FeatureFile.read(tmp_path / "a").slide_id == "a slide"


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_another_tool(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = np.zeros((3, 4), np.float32), np.zeros((3, 2), np.int64)


def of_tomorrow(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["format"] = "hilum slide features 2"


def without_positions(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["positions_um"]


def without_a_fact(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file.attrs["slide_sha256"]


def with_a_recipe_nobody_knows(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["recipe"] = '{"tile_um": 112.0}'


def with_too_few_positions(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        kept = file["positions_um"][:3]
        del file["positions_um"]
        file["positions_um"] = kept


def removed(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    "harm",
    [
        cut_short, emptied, of_another_tool, of_tomorrow, without_positions, without_a_fact, with_a_recipe_nobody_knows,
        with_too_few_positions, removed,
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_trusted_is_refused_with_the_remedy(tmp_path: Path, harm: Any) -> None:
    path = tmp_path / "one.h5"
    feature_file.write(path, **words())
    harm(path)
    with pytest.raises(UnreadableFeatures, match="run that command again") as refusal:
        FeatureFile.read(path)
    assert str(path) in str(refusal.value) and is_users(refusal.value)


def test_two_recipes_say_in_what_they_differ() -> None:
    other = FeatureRecipe(**vars(RECIPE) | {"tile_um": 224.0, "encoder_sha256": "ef" * 32})
    told = RECIPE.difference(other)
    assert "tile_um 112.0 and 224.0" in told and "encoder_sha256" in told and "tile_px" not in told
    assert RECIPE.difference(RECIPE) == ""
