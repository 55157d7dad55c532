"""HFF-Net equals its authors' where it should, and differs where they erred."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from networks import frequency_unet
from networks.frequency_unet import (
    EPOCHS,
    PUBLISHED,
    PUBLISHED_SIDES,
    WARM,
    Branch,
    Config,
    LaplacianConvolution,
    laplacian,
)
from networks.parts.answer import Answer
from networks.parts.frequency import (
    Decomposition,
    PublishedChannelGate,
    PublishedDecomposition,
    PublishedSliceGate,
    PublishedSpectralAttention,
    SliceGate,
    SpectralAttention,
    bands,
    disagreement,
    drawn,
    pictures,
    smooth,
    stretched,
)

Module = TypeVar("Module", bound=nn.Module)
torch.set_num_threads(min(2, torch.get_num_threads()))
STAGES = {"strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2)), "kernels": ((3, 3, 3),) * 3}
REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = Config(width=4, **STAGES)
PUBLISHED_SMALL = Config(width=8, faithful=True, depth=8, **STAGES)

# ours on the left, the authors' on the right
CHANNELS = {"squeeze": "linear.0", "excite": "linear.2"}
SLICES = CHANNELS | {"mean": "mean", "logarithm": "log_diag", "factor": "factor"}
ATTENTION = {
    "by_channel": ("semantic_att.", CHANNELS),
    "by_frequency": ("positional_att.", {"convolve": "conv"}),
    "by_slice": ("slice_att.", SLICES),
}
BLOCK = {"first.0": "conv1", "second.0": "conv2", "shortcut.0": "downsample.0"}


@pytest.fixture
def hff(shared: Path):
    """A file of arrays made by the authors' code."""

    def load(name: str) -> dict[str, Tensor]:
        if not (shared / "fixtures/hff").is_dir():
            pytest.skip("the arrays of the authors' code (../shared/fixtures) are not on this machine")
        with np.load(shared / "fixtures/hff" / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays}

    return load


def with_weights(module: Module, arrays: dict[str, Tensor], names: dict[str, str]) -> Module:
    """The module with the authors' weights, by a table of names; every weight must be among them."""
    given = {}
    for key in module.state_dict():
        part, kind = key.rsplit(".", 1)
        given[key] = arrays[f"w_{names[part]}.{kind}"]
    module.load_state_dict(given)
    return module


def attention(arrays: dict[str, Tensor]) -> PublishedSpectralAttention:
    names = {
        f"{p}.{ours}": prefix + theirs for p, (prefix, table) in ATTENTION.items() for ours, theirs in table.items()
    }
    return with_weights(PublishedSpectralAttention(32, 8, uncertain=False), arrays, names)


# ---- what the authors computed ----------------------------------------------------------------------------------------


def test_the_full_faithful_network_has_as_many_weights_as_published() -> None:
    with torch.device("meta"):
        network = frequency_unet.build(Config(faithful=True), channels=4, classes=4)
    assert sum(weights.numel() for weights in network.parameters()) == 37_761_772
    assert network.sharpen.stencil.expand_as(network.sharpen.weight).numel() == 6_912  # theirs is stored whole


def test_spectral_attention_its_stages_and_its_gradient_are_the_authors(hff) -> None:
    arrays = hff("fdca_det")
    module, x = attention(arrays), arrays["x"].requires_grad_()
    y = module(x)
    torch.testing.assert_close(y, arrays["y"], rtol=1e-4, atol=1e-4 * float(arrays["y"].abs().max()))
    y.backward(arrays["cot"])
    scale = float(arrays["grad_x"].abs().max())
    torch.testing.assert_close(x.grad, arrays["grad_x"], rtol=1e-4, atol=1e-4 * scale)

    spectrum = torch.fft.fftn(arrays["x"].detach(), dim=(2, 3, 4), norm="ortho")
    with torch.no_grad():
        for number, gate in enumerate((module.by_channel, module.by_frequency, module.by_slice), 1):
            spectrum = spectrum * (spectrum.real * gate(spectrum.real))
            known = arrays[f"stage{number}_real"]
            torch.testing.assert_close(spectrum.real, known, rtol=1e-4, atol=1e-4 * float(known.abs().max()))
    known = arrays["stage3_imag"]
    torch.testing.assert_close(spectrum.imag, known, rtol=1e-4, atol=1e-4 * float(known.abs().max()))


@pytest.mark.parametrize("name", ["fdca_semantic", "fdca_semantic_b2"])
def test_the_published_channel_gate_is_the_authors(hff, name) -> None:
    arrays = hff(name)
    gate = with_weights(PublishedChannelGate(32), arrays, CHANNELS)
    torch.testing.assert_close(arrays["x"] * gate(arrays["x"]), arrays["y"], rtol=1e-5, atol=1e-6)


def test_the_published_slice_gate_is_the_authors(hff) -> None:
    arrays = hff("fdca_slice_det")
    gate = with_weights(PublishedSliceGate(8, uncertain=False), arrays, SLICES)
    torch.testing.assert_close(arrays["x"] * gate(arrays["x"]), arrays["y"], rtol=1e-5, atol=1e-6)


def test_the_published_slice_gate_draws_as_the_authors_do(hff) -> None:
    arrays = hff("fdca_slice_stoch")
    gate = with_weights(PublishedSliceGate(8, uncertain=True), arrays, SLICES)
    drawn_gate = gate(arrays["x"], noise=(arrays["eps_W"], arrays["eps_D"]))
    torch.testing.assert_close(arrays["x"] * drawn_gate, arrays["y"], rtol=1e-5, atol=1e-6)


def test_the_low_frequencies_are_those_of_the_dual_tree_wavelets(hff) -> None:
    arrays = hff("fdd_dtcwt_lowpass")
    for name in ("rand", "phantom"):
        low = bands(arrays[f"{name}_x"].double()[None, None, None], 0)[:, :, 0]
        torch.testing.assert_close(low[0, 0, 0].float(), arrays[f"{name}_lowpass"], rtol=1e-5, atol=1e-4)
        assert torch.equal(pictures(low, 0)[0, 0, 0], arrays[f"{name}_L_uint8"].double())
    odd, known = arrays["odd_x"], arrays["odd_lowpass"]  # theirs grows an odd picture by a row and a column
    low = bands(odd[None, None, None], 0)[0, 0, 0, 0]
    torch.testing.assert_close(low, known[:23, :21], rtol=1e-5, atol=1e-4)
    even = functional.pad(odd[None, None], (0, 1, 0, 1), mode="replicate")[:, :, None]
    torch.testing.assert_close(bands(even, 0)[0, 0, 0, 0], known, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(smooth(smooth(even, 1), 2)[0, 0, 0], known, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("stacked", [0, 1, 2])
@pytest.mark.parametrize(("finest", "level"), [(False, 2), (True, 3)])
def test_edges_are_those_of_the_contourlet_toolbox_in_any_orientation(hff, finest, level, stacked) -> None:
    arrays = hff("fdd_nsct")
    for name in ("rand", "phantom"):
        x = arrays[f"{name}_x"][None, None].unsqueeze(2 + stacked)
        found = bands(x, stacked, finest=finest).squeeze(3 + stacked)[0, 0]
        for direction in range(1, 5):
            known = arrays[f"{name}_y{level}_d{direction}"]
            torch.testing.assert_close(found[direction], known, rtol=1e-5, atol=1e-5 * float(known.abs().max()))
            if not finest:
                picture = arrays[f"{name}_H{direction}_imadjust"]
                torch.testing.assert_close(stretched(found[direction]), picture, rtol=1e-5, atol=2e-4)


def test_an_impulse_answers_with_the_toolbox_kernels(hff) -> None:
    arrays = hff("fdd_nsct")
    impulse = torch.zeros(1, 1, 1, 41, 41)
    impulse[..., 20, 20] = 1
    for finest, level in ((False, 2), (True, 3)):
        for direction in range(1, 5):
            kernel = arrays[f"kernel_y{level}_d{direction}"]
            reach = len(kernel) // 2
            found = bands(impulse, 0, finest=finest)[
                0, 0, direction, 0, 20 - reach : 21 + reach, 20 - reach : 21 + reach
            ]
            torch.testing.assert_close(found, kernel, rtol=1e-5, atol=1e-6)


def laplacian_convolution(channels: int = 16, **options) -> LaplacianConvolution:
    return LaplacianConvolution(channels, dataclasses.replace(PUBLISHED_SMALL, **options))


def test_the_laplacian_convolution_and_its_reset_are_the_authors(hff) -> None:
    arrays = hff("alc")
    module = laplacian_convolution()
    torch.testing.assert_close(module.stencil, arrays["laplacian"])
    module.start()
    torch.testing.assert_close(module(arrays["x"]), arrays["y_laplacian"], rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        module.weight.copy_(arrays["w_perturbed"])
    torch.testing.assert_close(module(arrays["x"]), arrays["y_perturbed"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(module.drift(), arrays["reg_loss_5e6"], rtol=1e-5, atol=0)

    module.fisher.copy_(arrays["fisher"])
    assert torch.equal(module.matters(), arrays["important"])
    module.steps.fill_(module.end - 1)
    (0 * module(arrays["x"]).sum()).backward()
    torch.testing.assert_close(module.weight, arrays["w_after_reset"])


@pytest.mark.parametrize(("name", "inputs"), [("res_block", 16), ("res_block_proj", 32)])
def test_the_published_residual_block_is_the_authors(hff, name, inputs) -> None:
    arrays = hff(name)
    block = with_weights(PUBLISHED.residual(inputs, 16, (3, 3, 3)), arrays, BLOCK)
    torch.testing.assert_close(block(arrays["x"]), arrays["y"], rtol=1e-5, atol=1e-5)


def test_the_published_way_up_is_the_authors(hff) -> None:
    arrays = hff("up_block")
    up = with_weights(PUBLISHED.enlarge(16, 8, (3, 3, 3), (2, 2, 2)), arrays, {"1": "up.1"})
    torch.testing.assert_close(up(arrays["x"]), arrays["y"], rtol=1e-5, atol=1e-5)


def test_the_published_side_answer_is_the_authors(hff) -> None:
    arrays = hff("side")
    side = with_weights(PUBLISHED.side(32, 4, (2, 2, 2)), arrays, {at: f"up.{at}" for at in ("1", "4", "7")})
    torch.testing.assert_close(side(arrays["x"]), arrays["y"], rtol=1e-5, atol=1e-5)
    two = PUBLISHED.side(32, 2, (2, 2, 2))
    two.load_state_dict(side.state_dict())
    torch.testing.assert_close(two(arrays["x"]), arrays["y"][:, :2], rtol=1e-5, atol=1e-5)


def test_the_agreement_is_the_authors_and_the_one_they_meant(hff) -> None:
    arrays = hff("losses")
    one, other = arrays["p1"], arrays["p2"]
    torch.testing.assert_close(disagreement(one, other, axes=(1, 2, 3)), arrays["ffl_code"], rtol=1e-5, atol=0)
    torch.testing.assert_close(disagreement(one, other), arrays["ffl_intended_dhw"], rtol=1e-5, atol=0)


def test_the_authors_dice_knows_squares_and_the_background(hff) -> None:
    """Not a loss of ours, as training brings its own: told here so that what the numbers of the paper rest on is known."""

    def dice(logits: Tensor, target: Tensor, classes: int) -> Tensor:
        found = logits.softmax(1)[:, :classes].flatten(2)
        true = functional.one_hot(target, classes).movedim(-1, 1).flatten(2)
        both, sizes = (found * true).sum((0, 2)), (found.square() + true).sum((0, 2))
        return (1 - (2 * both + 1) / (sizes + 1)).mean()

    arrays = hff("losses")
    torch.testing.assert_close(dice(arrays["p1"], arrays["target"], 4), arrays["dice_p1"], rtol=1e-5, atol=0)
    # of two labels, a softmax over four channels: what goes to the other two is lost to both
    assert arrays["side4"].shape[1] == PUBLISHED_SIDES
    known = arrays["dice_bin_side4"]
    torch.testing.assert_close(dice(arrays["side4"], arrays["target_bin"], 2), known, rtol=1e-5, atol=0)


def test_the_schedule_is_laid_as_the_authors_rate_is(hff) -> None:
    rate = hff("lr_schedule")["lr"]
    assert len(rate) == EPOCHS
    assert int(rate.argmax()) == WARM
    torch.testing.assert_close(rate[: WARM + 1], torch.linspace(0, 0.3, WARM + 1), rtol=1e-5, atol=1e-6)
    drops = torch.arange(EPOCHS).sub(WARM + 1).div(50, rounding_mode="floor").clamp_min(0)
    torch.testing.assert_close(rate[WARM:], (0.3 * 0.55**drops)[WARM:], rtol=1e-5, atol=0)


# ---- what was broken, and is not any more -----------------------------------------------------------------------------


def test_published_attention_leaves_little_but_the_mean_and_ours_leaves_the_map() -> None:
    torch.manual_seed(0)
    x = 1 + torch.randn(1, 16, 8, 8, 8)
    theirs = PublishedSpectralAttention(16, 8, uncertain=False)
    nn.init.zeros_(theirs.by_slice.excite.weight)  # it saturates: at random, even the mean may be gone
    nn.init.zeros_(theirs.by_channel.excite.weight)
    with torch.no_grad():
        published, ours = theirs(x), SpectralAttention(16)(x)
    assert published.sub(published.mean((2, 3, 4), keepdim=True)).square().sum() < 1e-4 * published.square().sum()
    assert torch.corrcoef(torch.stack([ours.flatten(), x.flatten()]))[0, 1] > 0.8
    assert 0.2 < ours.std() / x.std() < 5


@pytest.mark.parametrize("size", [(8, 8, 8), (5, 7, 3), (1, 4, 6), (4, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("stacked", [0, 1, 2])
def test_attention_fits_any_size_and_keeps_it(size, stacked) -> None:
    x = torch.randn(2, 8, *size, requires_grad=True)
    y = SpectralAttention(8, stacked=stacked)(x)
    y.square().sum().backward()
    assert y.shape == x.shape and y.isfinite().all() and x.grad.isfinite().all()


def test_attention_turned_is_attention_of_the_turned_map() -> None:
    x = torch.randn(1, 8, 4, 5, 6)
    first, last = SpectralAttention(8, stacked=0).eval(), SpectralAttention(8, stacked=2).eval()
    last.load_state_dict(first.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(last(x.movedim(2, 4)), first(x).movedim(2, 4), rtol=1e-4, atol=1e-5)


def test_published_slice_attention_never_learns_and_changes_in_use_and_ours_does_neither() -> None:
    x = torch.randn(1, 1, 8, 8, 8)
    network = frequency_unet.build(PUBLISHED_SMALL, channels=1, classes=2)
    total(network.train()(x)).backward()
    deaf = [name for name, weights in network.named_parameters() if weights.grad is None]
    assert len(deaf) == 4 * 10 and all("by_slice" in name for name in deaf)  # four attentions, ten each
    network.eval()
    for attention in (one for one in network.modules() if isinstance(one, PublishedSliceGate)):
        nn.init.normal_(attention.factor.weight)
    with torch.no_grad():
        gate, maps = network.low.look[1].by_slice, torch.randn(1, 16, 4, 4, 4)
        assert not torch.equal(gate(maps), gate(maps))

    network = frequency_unet.build(dataclasses.replace(SMALL, uncertain=True), channels=1, classes=2)
    total(network.train()(x)).backward()
    assert all(weights.grad.abs().max() > 0 for weights in network.parameters())
    with torch.no_grad():
        assert torch.equal(network.eval()(x), network(x))


def test_what_is_drawn_has_the_covariance_that_was_learned() -> None:
    torch.manual_seed(0)
    mean, variance, factor = torch.randn(1, 3), torch.rand(1, 3), torch.randn(1, 3, 5)
    many = 200_000
    noise = torch.randn(many, 5), torch.randn(many, 3)
    values = drawn(*(one.expand(many, *one.shape[1:]) for one in (mean, variance, factor)), noise)
    torch.testing.assert_close(values.mean(0), mean[0], rtol=0, atol=0.05)
    torch.testing.assert_close(values.T.cov(), factor[0] @ factor[0].T + variance.diag_embed()[0], rtol=0.05, atol=0.05)


def test_an_uncertain_gate_is_its_mean_in_use() -> None:
    gate, x = SliceGate(uncertain=True), torch.randn(2, 4, 6, 3, 3).abs()
    assert not torch.equal(gate.train()(x), gate(x))
    assert torch.equal(gate.eval()(x), gate(x))


def test_the_published_initialisation_takes_the_laplacian_away_and_ours_leaves_it() -> None:
    published = frequency_unet.build(PUBLISHED_SMALL, channels=1, classes=2).sharpen
    ours = frequency_unet.build(SMALL, channels=1, classes=2).sharpen
    assert not torch.allclose(published.weight, published.stencil)
    torch.testing.assert_close(ours.weight, laplacian((3, 3, 3)).expand_as(ours.weight))
    assert ours.drift().item() == 0 and published.drift().item() > 0


def test_ours_sharpens_each_band_by_itself() -> None:
    module = frequency_unet.build(SMALL, channels=1, classes=2).sharpen
    x = torch.zeros(1, 4, 5, 5, 5)
    x[0, 2] = torch.randn(5, 5, 5)
    with torch.no_grad():
        y = module(x)
    assert y[0, [0, 1, 3]].abs().max() == 0
    inside = (slice(1, -1),) * 3
    known = x[0, 2][inside] + torch.stack([x[0, 2].roll(s, a) for s in (1, -1) for a in range(3)]).sum(0)[inside]
    torch.testing.assert_close(y[0, 2][inside], known - 6 * x[0, 2][inside], rtol=1e-5, atol=1e-5)


def trained(module: LaplacianConvolution, steps: int) -> LaplacianConvolution:
    """Some steps of an optimiser that moves weights which have no gradient; some taps matter by far the most."""
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    channels = len(module.weight)
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(1, channels, 6, 6, 6, generator=random).cumsum(2)
        optimiser.zero_grad()
        (module(x) * x.roll(1, 3)).mean().backward()
        optimiser.step()
    return module


@pytest.mark.parametrize("faithful", [False, True])
def test_taps_that_matter_go_back_to_the_stencil_and_only_ours_stay(faithful) -> None:
    module = laplacian_convolution(4, faithful=faithful, steps=45)
    module.start()
    trained(module, module.end - 1)
    assert not module.held.any()
    trained(module, 6)
    assert 0 < int(module.held.sum()) < module.held.numel() / 2
    apart = (module.kernel - module.stencil).abs()
    stayed = bool(apart[module.held].max() == 0)
    assert stayed != faithful
    assert apart[~module.held].max() > 0


def test_steps_are_counted_where_it_is_trained_and_nowhere_else() -> None:
    network = frequency_unet.build(SMALL, channels=1, classes=2)
    x = torch.randn(1, 1, 8, 8, 8)
    network.eval()(x).sum().backward()
    with torch.no_grad():
        network.train()(x)
    assert int(network.sharpen.steps) == 0
    for copied in (network, copy.deepcopy(network)):
        total(copied.train()(x)).backward()
        total(copied(x)).backward()
        assert int(copied.sharpen.steps) == 2


def test_a_training_resumed_puts_the_same_taps_back() -> None:
    through = laplacian_convolution(4, faithful=False, steps=45)
    through.start()
    trained(through, 10)
    resumed = laplacian_convolution(4, faithful=False, steps=45)
    resumed.load_state_dict(through.state_dict())
    for module in (through, resumed):
        trained(module, 20)
    assert through.held.any() and torch.equal(through.held, resumed.held)
    assert torch.equal(through.kernel, resumed.kernel)


def test_two_passes_forward_may_be_followed_by_two_backward() -> None:
    module = laplacian_convolution(4, faithful=False, steps=1)
    module.start()
    module.steps.fill_(module.end - 1)
    x = torch.randn(1, 4, 5, 5, 5)
    first, second = module(x).square().sum(), module(x).sum()
    first.backward()
    second.backward()
    assert int(module.steps) == module.end + 1


def test_the_published_depth_is_fixed_and_says_so() -> None:
    network = frequency_unet.build(PUBLISHED_SMALL, channels=1, classes=2)
    with pytest.raises(ValueError, match="leave `faithful` out"):
        network(torch.randn(1, 1, 16, 8, 8))
    fitted = frequency_unet.fit(Config(faithful=True), patch=(90, 128, 128), spacing=(1.0, 1.0, 1.0))
    assert fitted.depth == 96 and frequency_unet.divisor(fitted) == (16, 16, 16)


def test_published_edges_are_almost_their_signs_and_ours_keep_their_sizes() -> None:
    scan = 60 * torch.rand(1, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    _, published = PublishedDecomposition((0,))(scan)
    assert ((published == -1) | (published == 1)).double().mean() > 0.9
    slow, ours = Decomposition((0,))(scan)
    assert len(ours.unique()) > 0.9 * ours.numel()
    torch.testing.assert_close(
        Decomposition((0,))(7 * scan)[1], ours, rtol=1e-3, atol=1e-3
    )  # whatever the scanner's unit
    torch.testing.assert_close(slow.mean(), scan.mean(), rtol=1e-2, atol=0)


def test_a_scan_of_one_value_has_no_edges() -> None:
    scan = torch.full((1, 2, 4, 8, 8), 3.0)
    for decompose in (Decomposition((0,)), Decomposition((0, 1, 2)), PublishedDecomposition((0,))):
        slow, edges = decompose(scan)
        assert slow.isfinite().all() and edges.isfinite().all()
    torch.testing.assert_close(Decomposition((0, 1, 2))(scan)[0], scan)


def test_the_way_edges_run_decides_their_band() -> None:
    stripes = torch.cos(torch.arange(32) * 1.2)
    upright, lying = stripes.expand(1, 1, 1, 32, 32), stripes[:, None].expand(1, 1, 1, 32, 32)
    first, second = (Decomposition((0,))(x)[1].square().mean((0, 2, 3, 4)) for x in (upright, lying))
    raw_first, raw_second = (bands(x, 0)[0, 0, 1:].square().mean((1, 2, 3)) for x in (upright, lying))
    assert set(raw_first.topk(2).indices.tolist()).isdisjoint(raw_second.topk(2).indices.tolist())
    assert first.isfinite().all() and second.isfinite().all()


@pytest.mark.parametrize(
    ("patch", "spacing", "stacked", "edges"),
    [
        ((32, 32, 32), (1.0, 1.0, 1.0), (0, 1, 2), 12),
        ((16, 96, 96), (5.0, 0.8, 0.8), (0,), 4),
        ((96, 96, 16), (0.5, 0.5, 2.0), (2,), 4),
        ((1, 64, 64), (9.0, 0.7, 0.7), (0,), 4),
        ((64, 64, 1), (0.7, 0.7, 0.1), (2,), 4),
    ],
)
def test_edges_are_looked_for_in_the_finest_planes(patch, spacing, stacked, edges) -> None:
    config = frequency_unet.fit(Config(width=4), patch=patch, spacing=spacing)
    assert config.stacked == stacked
    assert config.dims == (2 if 1 in patch else 3)
    network = frequency_unet.build(config, channels=1, classes=2)
    assert len(network.sharpen.weight) == edges
    assert all(size == 1 for kernel in config.kernels for size, n in zip(kernel, patch, strict=True) if n == 1)


@pytest.mark.parametrize("thin", [1, 2])
def test_a_plane_is_the_same_plane_whichever_axis_is_thin(thin) -> None:
    size = (16, 24)
    patches = [(*size[:axis], 1, *size[axis:]) for axis in (0, thin)]
    networks = []
    for patch in patches:
        config = frequency_unet.fit(Config(width=4), patch=patch, spacing=(1.0, 1.0, 1.0))
        networks.append(frequency_unet.build(config, channels=2, classes=3).eval())
    first, other = networks
    weights = first.state_dict()
    other.load_state_dict({key: weights[key].reshape(value.shape) for key, value in other.state_dict().items()})
    x = torch.randn(1, 2, 1, *size)
    with torch.no_grad():
        torch.testing.assert_close(other(x.movedim(2, 2 + thin)), first(x).movedim(2, 2 + thin), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="one axis of one"):
        first(torch.randn(1, 2, 16, 16, 16))


# ---- the whole --------------------------------------------------------------------------------------------------------


def total(answer: Answer) -> Tensor:
    random = torch.Generator().manual_seed(0)
    losses = [(logits * torch.randn(logits.shape, generator=random)).sum() for logits in answer.logits]
    return sum([*losses, *answer.losses.values()])


@pytest.mark.parametrize("config", [SMALL, PUBLISHED_SMALL], ids=["default", "faithful"])
def test_the_answer_is_one_branch_or_the_mean_of_both(config) -> None:
    network = frequency_unet.build(config, channels=2, classes=3)
    for gate in network.modules():
        if isinstance(gate, PublishedSliceGate):
            gate.uncertain = False
    x = torch.randn(1, 2, 8, 8, 8)
    answers = {}
    for name in ("mean", "low", "high"):
        network.config = dataclasses.replace(config, answer=name)
        with torch.no_grad():
            answers[name] = network.eval()(x)
            learned = network.train()(x)
        torch.testing.assert_close(learned.logits[0], answers[name], rtol=1e-4, atol=1e-4)
        assert len(learned.logits) == len(learned.weights) == (5 if name == "mean" else 4)
        assert all(logits.shape[:2] == (1, 3) for logits in learned.logits)
    torch.testing.assert_close(answers["mean"], (answers["low"] + answers["high"]) / 2, rtol=1e-4, atol=1e-4)


def test_side_answers_are_free_in_sign_and_stay_coarse() -> None:
    network = frequency_unet.build(SMALL, channels=1, classes=3).train()
    *_, low, high = network(torch.randn(1, 1, 8, 16, 8)).logits
    assert low.shape == high.shape == (1, 3, 4, 8, 4)
    assert low.min() < 0 and high.min() < 0


def test_the_branches_exchange_what_they_found() -> None:
    network = frequency_unet.build(dataclasses.replace(SMALL, answer="low"), channels=1, classes=2).eval()
    x = torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        before = network(x)
        nn.init.normal_(network.sharpen.weight)  # of the other branch
        assert not torch.allclose(network(x), before, atol=1e-3)


def test_agreement_counts_more_with_every_step_until_the_schedule_ends() -> None:
    network = frequency_unet.build(dataclasses.replace(SMALL, steps=900, agreement=15.0), channels=1, classes=2).train()
    shares = []
    for steps in (0, 449, 898, 5000):
        network.sharpen.steps.fill_(steps)
        shares.append(float(network.sharpen.share_done))
    assert shares == pytest.approx(
        [2 / 900, 451 / 900, 1.0, 1.0]
    )  # two steps are an epoch of theirs, the first counts 1
    x = torch.randn(1, 1, 8, 8, 8)
    late = network(x).losses["agreement"].item()
    network.sharpen.steps.zero_()
    assert 0 < network(x).losses["agreement"].item() == pytest.approx(late * 2 / 900, rel=1e-3)


def test_branches_that_agree_lose_nothing() -> None:
    one = torch.randn(2, 3, 4, 5, 6, requires_grad=True)
    loss = disagreement(one, one.detach().clone())
    loss.backward()
    assert loss.item() == 0 and one.grad.abs().max() == 0


@pytest.mark.parametrize("config", [SMALL, PUBLISHED_SMALL], ids=["default", "faithful"])
def test_its_attention_can_be_looked_at_and_follows_the_scan(config) -> None:
    network = frequency_unet.build(config, channels=1, classes=2).train()
    before = copy.deepcopy(network.state_dict())
    maps, others = (frequency_unet.attention_maps(network, torch.randn(2, 1, 8, 8, 8)) for _ in "12")
    assert len(maps) == 4 * 3  # two attentions in each branch, three gates each
    for name, seen in maps.items():
        assert seen.shape[0] == 2 and seen.min() >= 0 and seen.max() <= 1, name
        assert not seen.requires_grad
        assert config.faithful or not torch.allclose(seen, others[name], atol=1e-7), name
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_its_explained_layers_are_its_own_the_nearest_to_the_answer_first() -> None:
    network = frequency_unet.build(SMALL, channels=1, classes=2)
    layers = frequency_unet.explained(network)
    assert list(layers)[:2] == ["low.merge.0", "high.merge.0"]
    assert all(network.get_submodule(name) is layer for name, layer in layers.items())


def test_two_stages_are_enough() -> None:
    config = frequency_unet.fit(Config(width=4), patch=(8, 8, 8), spacing=(1.0, 1.0, 1.0))
    assert len(config.strides) == 2
    network = frequency_unet.build(config, channels=1, classes=2).train()
    answer = network(torch.randn(1, 1, 8, 8, 8))
    total(answer).backward()
    assert len(answer.logits) == 3  # no side
    assert all(weights.grad.abs().max() > 0 for weights in network.parameters())
    assert list(frequency_unet.explained(network))[:2] == ["low.join", "high.join"]


def test_its_steps_repeat_to_the_bit() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in "12":
            torch.manual_seed(0)
            network = frequency_unet.build(dataclasses.replace(SMALL, uncertain=True), channels=1, classes=2).train()
            optimiser = torch.optim.AdamW(network.parameters(), 1e-3)
            for _ in range(2):
                optimiser.zero_grad()
                total(network(torch.randn(1, 1, 8, 8, 8))).backward()
                optimiser.step()
            results.append(network.state_dict())
        assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    finally:
        torch.use_deterministic_algorithms(False)


def test_half_precision_agrees() -> None:
    torch.manual_seed(0)
    network = frequency_unet.build(SMALL, channels=1, classes=3).eval()
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        exact = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(x)
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.std()


COMPILED = """
import torch
from networks.frequency_unet import Config, build

torch.manual_seed(0)
stages = dict(strides=((1, 1, 1), (2, 2, 2)), kernels=((3, 3, 3),) * 2)
network = build(Config(width=4, stacked=(0, 1, 2), uncertain=True, **stages), channels=1, classes=2).train()
x = torch.randn(1, 1, 8, 8, 8)
answers = []
for run in (torch.compile(network, backend="aot_eager", fullgraph=True), network):
    torch.manual_seed(1)
    answers.append(run(x))
for mine, known in zip(answers[0].logits, answers[1].logits, strict=True):
    torch.testing.assert_close(mine, known, rtol=1e-4, atol=1e-5)
sum(logits.square().mean() for logits in answers[0].logits).backward()
assert network.sharpen.steps.item() == 1
assert all(weights.grad is not None for weights in network.parameters())
"""


@pytest.mark.slow
def test_it_compiles_whole_and_counts_its_steps_then_too() -> None:
    # in a process of its own: the checks of shapes that tests put around functions cannot be compiled
    subprocess.run([sys.executable, "-W", "error", "-c", COMPILED], cwd=REPOSITORY, check=True, timeout=300)


def test_it_is_exported() -> None:
    network = frequency_unet.build(SMALL, channels=1, classes=2).eval()
    x = torch.randn(1, 1, 8, 8, 8)
    exported = torch.export.export(network, (x,))
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(strides=((1, 1, 1), (2, 2, 2))), "one of each per stage"),
        (dict(width=0), "1 or more"),
        (dict(agreement=-1.0), "no negative weight"),
        (dict(stacked=(3,)), "axes among 0, 1 and 2"),
        (dict(stacked=()), "axes among 0, 1 and 2"),
        (dict(faithful=True, stacked=(2,)), "slices first"),
        (dict(faithful=True, dims=2), "of volumes"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, said) -> None:
    with pytest.raises(ValueError, match=said):
        Config(**wrong)


def test_more_classes_than_published_sides_have_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer labels"):
        Branch(PUBLISHED_SMALL, 1, PUBLISHED_SIDES + 1)
