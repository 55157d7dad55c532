"""The Haar transform keeps lengths and comes back; the bank of filters is HFF-Net's, border by border."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import fir_bank, haar

SIZES = st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple)


def volume(size: tuple[int, ...], channels: int = 2) -> Tensor:
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(SIZES)
def test_what_was_analysed_comes_back(size) -> None:
    x = volume(size)
    torch.testing.assert_close(haar.fused(haar.fused(x), size), x)


@settings(max_examples=40, deadline=None)
@given(SIZES.map(lambda size: tuple(2 * n for n in size)))
def test_of_even_sizes_lengths_are_kept_and_the_way_back_is_the_transpose(size) -> None:
    x = volume(size).requires_grad_()
    bands = haar.fused(x)
    torch.testing.assert_close(bands.square().sum(), x.square().sum())
    slope = torch.randn_like(bands)
    (gradient,) = torch.autograd.grad(bands, x, slope)
    torch.testing.assert_close(gradient, haar.fused(slope, size))


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (2, 2, 4), (3, 1, 5)])
def test_the_gradient_is_the_slope_of_the_values(size) -> None:
    x = volume(size, 1).requires_grad_()
    assert torch.autograd.gradcheck(haar.fused, (x,))
    bands = haar.fused(x.detach()).requires_grad_()
    assert torch.autograd.gradcheck(lambda bands: haar.fused(bands, size), (bands,))


def test_an_even_volume_is_in_the_first_band_alone() -> None:
    bands = haar.fused(torch.full((1, 1, 3, 5, 7), 2.0))
    torch.testing.assert_close(bands[:, :, 0], torch.full((1, 1, 2, 3, 4), 2 * 8**0.5))
    assert not bands[:, :, 1:].any()


@pytest.mark.parametrize(("axis", "band"), [(4, 1), (3, 2), (2, 4)])
def test_an_edge_along_an_axis_is_in_the_band_of_that_axis(axis, band) -> None:
    x = torch.zeros(1, 1, 4, 4, 4)
    x.select(axis, 2).fill_(1)
    found = haar.fused(x)[0, 0].flatten(1).abs().sum(1)
    assert set(found.nonzero().flatten().tolist()) == {0, band}


def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x = volume((7, 10, 9), 5)
    whole = haar.fused(x)
    monkeypatch.setattr(haar, "TILE", 200)
    torch.testing.assert_close(haar.fused(x), whole)
    torch.testing.assert_close(haar.fused(whole, (7, 10, 9)), x)


def test_bands_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="Pass the size of what was analysed"):
        haar.fused(torch.zeros(1, 1, 8, 2, 2, 2), (4, 4, 5))


def test_words_are_refused_where_floats_are_needed() -> None:
    with pytest.raises(ValueError, match="needs floats"):
        haar.fused(torch.zeros(1, 1, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="Convert it"):
        fir_bank.fused(torch.zeros(4, 4))


@pytest.fixture(scope="module")
def contourlets(fixtures: Path):
    return np.load(fixtures / "fdd_nsct.npz")


@pytest.fixture(scope="module")
def wavelets(fixtures: Path):
    return np.load(fixtures / "fdd_dtcwt_lowpass.npz")


@pytest.fixture(scope="module")
def fixtures(shared: Path) -> Path:
    folder = shared / "fixtures" / "hff"
    if not folder.is_dir():
        pytest.skip("the authors' inputs and outputs (../shared/fixtures/hff) are not on this machine")
    return folder


@pytest.mark.parametrize("filters", [fir_bank.reference, fir_bank.fused], ids=lambda filters: filters.__name__)
@pytest.mark.parametrize("picture", ["rand", "phantom"])
@pytest.mark.parametrize(("finest", "level"), [(False, "y2"), (True, "y3")])
def test_directions_are_those_of_the_authors_toolbox(contourlets, filters, picture, finest, level) -> None:
    x = torch.tensor(contourlets[f"{picture}_x"], dtype=torch.float64)[None, None]
    known = np.stack([contourlets[f"{picture}_{level}_d{number}"] for number in (1, 2, 3, 4)])
    found = filters(x, finest)[0, 0, 1:].numpy()
    np.testing.assert_allclose(found, known, atol=2e-5)  # known in float32, of values up to 255


@pytest.mark.parametrize("picture", ["rand", "phantom", "odd"])
def test_low_frequencies_are_those_of_the_dual_tree_transform(wavelets, picture) -> None:
    x = torch.tensor(wavelets[f"{picture}_x"], dtype=torch.float64)[None, None]
    height, width = x.shape[2:]
    known = wavelets[f"{picture}_lowpass"][:height, :width]  # theirs keeps the row and column it repeated
    np.testing.assert_allclose(fir_bank.fused(x)[0, 0, 0].numpy(), known, atol=2e-5)


def test_filters_are_those_of_the_authors_toolbox(contourlets) -> None:
    for name, stencil, fan in (
        ("fan_k1", fir_bank.CROSS, fir_bank.PLAIN),
        ("fan_k2", fir_bank.CROSS, fir_bank.WIDE),
        ("pyr_h0", fir_bank.BINOMIAL, fir_bank.BELOW),
        ("pyr_h1", fir_bank.BINOMIAL, fir_bank.ABOVE),
    ):
        known = contourlets[name]
        found = np.zeros_like(known)
        for row, column, weight in fir_bank._polynomial(stencil, fan):
            found[row + len(known) // 2, column + len(known) // 2] = weight
        np.testing.assert_allclose(found, known, atol=1e-7)


def test_slices_are_filtered_each_on_its_own() -> None:
    x = volume((3, 12, 11))
    whole = fir_bank.fused(x)
    assert whole.shape == (1, 2, 5, 3, 12, 11)
    for depth in range(3):
        torch.testing.assert_close(fir_bank.fused(x[:, :, depth]), whole[:, :, :, depth])


def test_what_never_changes_has_no_direction() -> None:
    bands = fir_bank.fused(torch.full((1, 1, 9, 10), 3.0, dtype=torch.float64))
    torch.testing.assert_close(bands[:, :, 0], torch.full((1, 1, 9, 10), 3.0, dtype=torch.float64))
    assert bands[:, :, 1:].abs().max() < 1e-12


@pytest.mark.parametrize("size", [(1, 1), (5, 4)])
@pytest.mark.parametrize("finest", [False, True])
def test_the_gradient_of_the_bank_is_the_slope_of_its_values(size, finest) -> None:
    x = volume(size, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fir_bank.fused(x, finest), (x,))


def test_pictures_filtered_some_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = volume((5, 8, 6), 3)
    whole = fir_bank.fused(x)
    monkeypatch.setattr(fir_bank, "TILE", 100)
    torch.testing.assert_close(fir_bank.fused(x), whole)
