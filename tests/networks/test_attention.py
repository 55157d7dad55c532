"""Every block in networks/parts/attention keeps the same promises: it is tested the moment its file exists."""

import copy
import inspect
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from networks.parts.attention import UnknownAttention, _windows, additive_gate, available, cbam, load, spectral_gate
from networks.parts.attention._layers import Gate
from networks.parts.attentive import Attentive, attention_maps

torch.set_num_threads(min(2, torch.get_num_threads()))
EVERY = pytest.mark.parametrize("name", available())
BOTH = pytest.mark.parametrize("dims", [2, 3])
CHANNELS = 12
ODD = {2: (13, 9), 3: (5, 9, 6)}
LINEAR_FILTERS = {"spectral_gate"}


@EVERY
@BOTH
@pytest.mark.parametrize("batch", [1, 2])
def test_the_result_has_the_size_and_type_of_the_input(name, dims, batch) -> None:
    block = trained(name, dims)
    for space in (ODD[dims], (1,) * dims, (17, 2, 1)[:dims], (8,) * dims):
        x = torch.randn(batch, CHANNELS, *space)
        y = block(x)
        assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all(), space


@EVERY
@pytest.mark.parametrize("channels", [1, 3, 7, 48])
def test_any_number_of_channels_will_do(name, channels) -> None:
    x = torch.randn(1, channels, 6, 5)
    assert fresh(name, 2, channels)(x).shape == x.shape


@EVERY
@BOTH
def test_put_into_a_trained_network_it_leaves_what_that_has_learned(name, dims) -> None:
    x = torch.randn(2, CHANNELS, *ODD[dims])
    with torch.no_grad():
        y = fresh(name, dims)(x)
    assert torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0) > 0.99
    assert 0.7 < y.norm() / x.norm() < 1.01


@EVERY
@BOTH
def test_a_gradient_reaches_every_parameter(name, dims) -> None:
    block, x = trained(name, dims), torch.randn(2, CHANNELS, *ODD[dims], requires_grad=True)
    (block(x) * torch.randn(x.shape)).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
    for parameter_name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 1e-7, parameter_name


@EVERY
@BOTH
def test_it_learns_from_where_it_starts(name, dims) -> None:
    """A start at zero must not be a place that no gradient leaves: after a few steps every parameter has moved."""
    block, x = fresh(name, dims), torch.randn(2, CHANNELS, *ODD[dims])
    before, wanted = copy.deepcopy(block.state_dict()), x.roll(1, 2) + x.flip(1)
    optimiser = torch.optim.Adam(block.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        losses.append((block(x) - wanted).square().mean())
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    for key, value in block.state_dict().items():
        assert not torch.equal(value, before[key]), key


@EVERY
@BOTH
def test_the_attention_changes_when_the_input_changes(name, dims) -> None:
    block, x = trained(name, dims), torch.randn(2, CHANNELS, *ODD[dims])
    changed = x + 0.5 * torch.randn(x.shape)
    first, second = attention_maps(block, x), attention_maps(block, changed)
    assert first and first.keys() == second.keys()
    for key, map_ in first.items():
        assert map_.isfinite().all() and map_.min() >= 0 and map_.max() <= 1 + 1e-5, key
        assert len(map_) == 2 and map_[0].numel() > 1
        assert (map_ - second[key]).abs().max() > 1e-3, key
        assert (map_ - map_.flatten(1).mean(1).view(-1, *[1] * (map_.ndim - 1))).abs().max() > 1e-3, key
    assert not block.is_watched and block.seen is None


@EVERY
@BOTH
def test_what_it_does_to_one_place_depends_on_the_scan(name, dims) -> None:
    """A gate that is constant, or an attention over one key, makes the block a linear map of its input: half of what two
    scans become is then what half of both becomes."""
    if name in LINEAR_FILTERS:
        pytest.skip("a filter of waves, the same for every scan: only the MLP behind it is not linear")
    block = trained(name, dims)
    x, y = (2 * torch.randn(1, CHANNELS, *ODD[dims]) + torch.randn(1, CHANNELS, *[1] * dims) for _ in range(2))
    with torch.no_grad():
        between = block((x + y) / 2)
        assert ((block(x) + block(y)) / 2 - between).norm() > 2e-3 * between.norm()


@EVERY
@BOTH
def test_a_scan_does_not_change_its_neighbour_in_the_batch(name, dims) -> None:
    block, x = trained(name, dims).eval(), torch.randn(2, CHANNELS, *ODD[dims])
    with torch.no_grad():
        torch.testing.assert_close(block(x)[1:], block(x[1:]), rtol=1e-4, atol=1e-5)


@EVERY
@BOTH
def test_training_and_use_agree(name, dims) -> None:
    block, x = trained(name, dims), torch.randn(1, CHANNELS, *ODD[dims])
    with torch.no_grad():
        torch.testing.assert_close(block.train()(x), block.eval()(x))


@EVERY
@BOTH
def test_half_precision_agrees(name, dims) -> None:
    block, x = trained(name, dims).eval(), torch.randn(1, CHANNELS, *ODD[dims]).bfloat16()
    with torch.no_grad():
        expected = block(x.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(x)
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 3e-2 * expected.norm()


@EVERY
def test_weights_saved_and_loaded_give_the_same_answer(name, tmp_path) -> None:
    first, second = trained(name, 3, seed=1).eval(), trained(name, 3, seed=2).eval()
    x = torch.randn(1, CHANNELS, *ODD[3])
    save_file({key: value.contiguous() for key, value in first.state_dict().items()}, tmp_path / "weights.safetensors")
    with torch.no_grad():
        assert not torch.allclose(first(x), second(x))
        second.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        assert torch.equal(first(x), second(x))


@EVERY
@BOTH
def test_the_same_input_gives_the_same_bits_and_gradients(name, dims) -> None:
    block, x = trained(name, dims), torch.randn(2, CHANNELS, *ODD[dims])
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            block.zero_grad()
            y = block(x)
            y.square().sum().backward()
            results.append([y.detach(), *(parameter.grad.clone() for parameter in block.parameters())])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(mine, again) for mine, again in zip(*results, strict=True))


@EVERY
def test_channels_that_lie_last_stay_last(name) -> None:
    block, x = trained(name, 3), torch.randn(2, CHANNELS, *ODD[3]).contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        y = block(x)
    torch.testing.assert_close(y, block(x.contiguous()), rtol=1e-4, atol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.slow
def test_all_can_be_compiled() -> None:
    """In a process of its own: a compiler cannot see through the checks of shapes that the tests put around functions."""
    classes = [(load(name).__module__, load(name).__name__) for name in available()]
    outcome = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(classes)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=300,
    )
    assert outcome.returncode == 0, outcome.stderr


REPOSITORY = Path(__file__).resolve().parents[2]
COMPILE = """
import importlib, json, sys
import torch

for module, name in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    block = getattr(importlib.import_module(module), name)(8)
    for parameter in block.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(1, 8, 4, 5, 3)
    torch.compiler.reset()
    y = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, block(x), rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters()), name
"""


@EVERY
@BOTH
def test_it_can_be_exported(name, dims) -> None:
    block, x = trained(name, dims).eval(), torch.randn(1, CHANNELS, *ODD[dims])
    with torch.no_grad():
        exported = torch.export.export(block, (x,)).module()
        torch.testing.assert_close(exported(x), block(x), rtol=1e-4, atol=1e-5)


@EVERY
def test_its_memory_can_be_predicted_without_voxels(name) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        block, x = fresh(name, 3), torch.randn(1, CHANNELS, 8, 9, 10, requires_grad=True)
        block(x).sum().backward()
        assert x.grad.shape == x.shape


@EVERY
def test_what_is_kept_for_the_gradient_grows_with_the_places_alone(name) -> None:
    if name == "axial":
        pytest.skip("along a line every place is compared with every other: its file says so")
    block = trained(name, 3)
    few, many = (kept(block, torch.randn(1, CHANNELS, *[n] * 3, requires_grad=True)) / n**3 for n in (8, 16))
    assert many < 1.1 * few


def kept(block: Attentive, x: torch.Tensor) -> int:
    """Bytes that autograd holds between forward and backward, each storage once."""
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
    assert y.requires_grad
    return sum(held.values()) - sum(parameter.numel() * parameter.element_size() for parameter in block.parameters())


@EVERY
def test_a_class_says_what_it_shows_and_a_file_what_it_costs(name) -> None:
    module = inspect.getmodule(load(name))
    assert "memory" in module.__doc__.lower()
    assert issubclass(load(name), Attentive) and load(name).__doc__


@pytest.mark.parametrize("name", ["bi_level_routing", "max_vit"])
@BOTH
def test_padding_leaks_nothing(name, dims) -> None:
    """Windows of a size that does not divide: whatever stands in the padding, the answer is the same."""
    block, x = trained(name, dims).eval(), torch.randn(1, CHANNELS, *ODD[dims])
    cut = _windows.Windows.cut

    def cut_in_noise(windows, part):
        y = cut(windows, part)
        if windows.is_padded and part.shape[1] > 1:
            real = cut(windows, part.new_ones(1, 1, *windows.space)) > 0
            y = torch.where(real, y, 10 * torch.randn(y.shape))
        return y

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        before = block(x)
        patch.setattr(_windows.Windows, "cut", cut_in_noise)
        torch.testing.assert_close(block(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("space", [(1,), (9,), (13, 7), (5, 9, 6), (8, 8, 8), (2, 1, 17)])
def test_what_is_cut_into_windows_can_be_joined(space) -> None:
    x = torch.randn(2, 3, *space)
    for windows in (_windows.of_size(space, 4), _windows.of_size(space, 4, is_grid=True), _windows.of_count(space, 3)):
        cut = windows.cut(x)
        assert torch.equal(windows.join(cut), x)
        real = windows.real(x)
        assert real.any(1).all() and real.sum() == x[0, 0].numel()  # no window is padding alone
        assert max(windows.sizes) <= 4 or max(windows.counts) <= 3


def test_a_window_holds_neighbours_and_a_grid_strangers() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert _windows.of_size((4, 4), 2).cut(x)[0, 0, :, 0].tolist() == [0, 1, 4, 5]
    assert _windows.of_size((4, 4), 2, is_grid=True).cut(x)[0, 0, :, 0].tolist() == [0, 2, 8, 10]


def test_two_routes_to_all_regions_are_attention_over_everything() -> None:
    """Routing to every region is no routing: known from torch's own attention."""
    block = trained("bi_level_routing", 2, regions=2, routes=4)
    x = torch.randn(2, CHANNELS, 5, 7)
    q, k, v = block.project(block.norm(x)).chunk(3, dim=1)
    by_head = [part.flatten(2).unflatten(1, (block.heads, -1)).mT for part in (q, k, v)]
    found = nn.functional.scaled_dot_product_attention(*by_head).mT.flatten(1, 2).view(x.shape)
    expected = x + block.gamma * block.out(found + block.beside(v))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_offsets_of_zero_are_an_ordinary_convolution() -> None:
    for dims, convolve in ((2, nn.functional.conv2d), (3, nn.functional.conv3d)):
        block = fresh("deformable", dims)
        x = torch.randn(1, 4, *ODD[dims])
        offsets = torch.zeros(1, block.taps * dims, *ODD[dims])
        seen = block._look(x, offsets)
        kernel = torch.randn(5, 4, *[3] * dims)
        mine = (kernel.flatten(1) @ seen.flatten(2)).view(1, 5, *ODD[dims])
        torch.testing.assert_close(mine, convolve(x, kernel, padding=1), rtol=1e-4, atol=1e-4)


def test_an_offset_of_one_place_looks_one_place_on() -> None:
    block = fresh("deformable", 3)
    x = torch.randn(1, 4, 5, 6, 7)
    offsets = torch.zeros(1, block.taps, 3, 5, 6, 7)
    offsets[:, :, 1] = 1  # along the second axis
    moved = block._look(x, offsets.flatten(1, 2)).unflatten(1, (4, block.taps))[:, :, block.taps // 2]
    torch.testing.assert_close(moved[:, :, :, :-1], x[:, :, :, 1:], rtol=1e-4, atol=1e-4)
    assert moved[:, :, :, -1].abs().max() < 1e-4  # outside there is nothing


def test_axial_attention_is_attention_along_a_line_with_a_sense_of_distance() -> None:
    """One line, one query, one key at a time, as the formula says; places beyond `reach` are as far apart as that."""
    block = trained("axial", 2, reach=3)
    attend = block.axes[1]
    x = torch.randn(1, 6, 1, 5)
    d = 3 // attend.heads
    line = attend.project(x[0, :, 0].T)  # [L, 2C]
    q, k, v = line[:, :3].view(5, -1, d), line[:, 3:6].view(5, -1, d), line[:, 6:].view(5, -1, 2 * d)
    expected = torch.zeros(5, attend.heads, 2 * d)
    for head, o in itertools.product(range(attend.heads), range(5)):
        rows = [min(max(p - o, -2), 2) + 2 for p in range(5)]
        scores = torch.stack([
            q[o, head] @ k[p, head] + q[o, head] @ attend.of_query[row] + k[p, head] @ attend.of_key[row]
            for p, row in enumerate(rows)
        ])  # fmt: skip
        shares = torch.softmax(scores / d**0.5, dim=0)
        expected[o, head] = sum(shares[p] * (v[p, head] + attend.of_value[row]) for p, row in enumerate(rows))
    torch.testing.assert_close(attend(x)[0, :, 0].T, expected.flatten(1), rtol=1e-4, atol=1e-4)


def test_efficient_attention_is_the_product_of_its_two_softmaxes() -> None:
    block = trained("efficient", 2, faithful=True)
    x = torch.randn(2, CHANNELS, 5, 4)
    q, k, v = block.project(x).flatten(2).chunk(3, dim=1)
    shares = q.softmax(1).mT @ k.softmax(2)  # [B, N, N], which the block never makes
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 20))
    expected = x + block.gamma * block.out((shares @ v.mT).mT.view(x.shape))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_the_faithful_polarised_gate_is_stuck_at_a_half_and_ours_is_not() -> None:
    x = 3 * torch.randn(2, CHANNELS, 24, 24)
    stuck, ours = (trained("polarised", 2, faithful=faithful) for faithful in (True, False))
    stuck.place.open.data.zero_(), ours.place.open.data.zero_()
    assert (attention_maps(stuck, x)["place"] - 0.5).abs().median() < 1e-3
    assert attention_maps(ours, x)["place"].std() > 1e-2


@pytest.mark.parametrize("is_sequential", [False, True])
@pytest.mark.parametrize("faithful", [False, True])
def test_polarised_attention_has_both_orders(is_sequential, faithful) -> None:
    block = trained("polarised", 3, is_sequential=is_sequential, faithful=faithful)
    x = torch.randn(2, CHANNELS, *ODD[3])
    block(x).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


def test_the_faithful_gates_have_the_authors_batch_norm() -> None:
    for block in (cbam.CBAM(CHANNELS, dims=2, faithful=True), fresh("triplet", 2, faithful=True)):
        assert any(isinstance(module, nn.BatchNorm2d) and module.momentum == 0.01 for module in block.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fresh("cbam", 2).modules())


def test_a_kernel_may_be_as_flat_as_the_scan() -> None:
    x = torch.randn(1, CHANNELS, 4, 9, 9)
    assert cbam.CBAM(CHANNELS, kernel=(3, 7, 7))(x).shape == x.shape
    with pytest.raises(ValueError, match="odd size"):
        cbam.CBAM(CHANNELS, kernel=(3, 7))


def test_the_additive_gate_hears_a_signal_of_another_resolution() -> None:
    gate = additive_gate.AdditiveGate(CHANNELS, signal=20)
    x, signal = torch.randn(2, CHANNELS, 6, 9, 4), torch.randn(2, 20, 3, 5, 2)
    with torch.no_grad():
        assert not torch.allclose(gate(x, signal), gate(x, signal.flip(2)))


def test_the_spectral_gate_is_a_convolution_as_large_as_the_map() -> None:
    """Moved by one place on a circle, the scan becomes what it was, moved by one place."""
    gate = trained("spectral_gate", 2, margin=0)
    x = torch.randn(1, CHANNELS, 8, 9)
    torch.testing.assert_close(gate(x.roll(1, 3)), gate(x).roll(1, 3), rtol=1e-4, atol=1e-4)


def test_the_faithful_spectral_gate_is_tied_to_one_size() -> None:
    gate = spectral_gate.SpectralGate(CHANNELS, dims=2, faithful=True, size=(8, 9))
    assert gate(torch.randn(1, CHANNELS, 8, 9)).shape == (1, CHANNELS, 8, 9)
    with pytest.raises(ValueError, match="needs that size"):
        gate(torch.randn(1, CHANNELS, 9, 8))
    with pytest.raises(ValueError, match="size of the map"):
        spectral_gate.SpectralGate(CHANNELS, dims=3, faithful=True)


def test_a_block_is_found_by_the_name_of_its_file() -> None:
    assert {"cbam", "position", "channel", "max_vit"} <= set(available())
    assert load("cbam") is cbam.CBAM
    with pytest.raises(UnknownAttention, match="Did you mean 'max_vit'"):
        load("maxvit")


def test_gates_multiply_and_the_others_add() -> None:
    gates = {name for name in available() if issubclass(load(name), Gate)}
    for name in gates:
        x = torch.randn(1, CHANNELS, 5, 4)
        x[:, :, 2, 2] = 0
        assert trained(name, 2)(x)[:, :, 2, 2].abs().max() == 0, name
    for name in set(available()) - gates:
        block = trained(name, 2)
        block.gamma.data.zero_()
        assert torch.equal(block(x), x), name


def fresh(name: str, dims: int, channels: int = CHANNELS, seed: int = 0, **settings) -> Attentive:
    torch.manual_seed(seed)
    block = load(name)
    if "dims" in inspect.signature(block).parameters:
        settings["dims"] = dims
    return block(channels, **settings)


def trained(name: str, dims: int, seed: int = 0, **settings) -> Attentive:
    """As if it had learned something: nothing is at zero any more."""
    block = fresh(name, dims, seed=seed, **settings)
    with torch.no_grad():
        for key, parameter in block.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) + float(key.endswith("gamma")))
    return block
