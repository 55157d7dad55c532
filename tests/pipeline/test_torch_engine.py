"""The engine of torch answers as the network does, takes no old way through it, and keeps memory only while it answers."""

from pathlib import Path

import pytest
import torch
from monai.networks.nets import DynUNet
from torch import nn
from torch.profiler import ProfilerActivity, profile

from networks import residual_unet
from pipeline.engines import _memory, available, load, open_engines
from pipeline.engines.torch import TorchEngine, engine
from pipeline.errors import UsageError
from pipeline.package import ModelPackage
from pipeline.prediction import Inference, refuse_slow_precision

CPU = torch.device("cpu")


def a_network(**settings: object) -> nn.Module:
    config = residual_unet.fit(residual_unet.Config(width=8, **settings), patch=(24, 24, 24), spacing=(1.0, 1.0, 1.0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return residual_unet.build(config, channels=1, classes=3).eval()


def windows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", [{}, {"plain": True, "bias": True, "decoder": 2}], ids=["residual", "plain"])
@pytest.mark.parametrize("batch", [1, 2])
def test_an_engine_answers_as_its_network_does(settings: dict, batch: int) -> None:
    network, seen = a_network(**settings), windows(batch, 1, 24, 24, 24)
    with torch.inference_mode():
        expected = network(seen)
    answered = engine(network, CPU)(seen)
    assert answered.dtype == torch.float32 and answered.shape == expected.shape
    assert float((answered - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_a_network_of_monai_answers_the_same_with_our_norm_in_it() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 16]).eval()
        for module in network.modules():
            if isinstance(module, nn.InstanceNorm3d) and module.affine:
                nn.init.normal_(module.weight)
    seen = windows(1, 1, 16, 16, 16)
    with torch.inference_mode():
        expected = network(seen)
    made = engine(network, CPU)
    assert not any(isinstance(module, nn.InstanceNorm3d) for module in made.network.modules())
    assert float((made(seen) - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert any(isinstance(module, nn.InstanceNorm3d) for module in network.modules()), (
        "the network itself is left alone"
    )


@pytest.mark.parametrize("sides", [2, (1, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_means_of_blocks_are_torchs_whatever_is_left_over_at_the_border(sides: object, kind: torch.dtype) -> None:
    pooling, seen = nn.Sequential(nn.AvgPool3d(sides)), windows(2, 3, 7, 8, 9).to(kind)  # type: ignore[arg-type]
    made = engine(pooling, CPU).network
    assert not any(isinstance(module, nn.AvgPool3d) for module in made.modules())
    # torch pools no bfloat16 on a CPU
    torch.testing.assert_close(made(seen), pooling(seen.float()).to(kind), rtol=0, atol=1e-6)


def test_no_convolution_goes_the_old_way_nor_is_a_tensor_sorted_anew_for_one() -> None:
    network, seen = a_network(), windows(1, 1, 24, 24, 24)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as usual:
        network(seen)
    made = engine(network, CPU)
    with profile(activities=[ProfilerActivity.CPU]) as ours:
        made(seen)
    calls = [{one.key: one.count for one in each.key_averages()} for each in (usual, ours)]
    assert "aten::slow_conv3d_forward" in calls[0], "else there is nothing to gain"
    assert "aten::slow_conv3d_forward" not in calls[1] and "aten::avg_pool3d" not in calls[1]
    convolutions = sum(isinstance(module, nn.Conv3d) for module in network.modules())
    assert calls[1]["aten::mkldnn_convolution"] >= convolutions - 2, "all but the heads that training alone has"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bfloat16_is_its_own_precision_and_changes_few_labels() -> None:
    try:
        refuse_slow_precision("bfloat16", CPU)
    except UsageError:
        pytest.skip("this processor has no bfloat16")
    exact = engine(a_network(), CPU)
    lower, seen = exact.in_precision("bfloat16"), windows(1, 1, 24, 24, 24)
    answered, expected = lower(seen), exact(seen)
    assert answered.dtype == torch.float32 and not torch.equal(answered, expected)
    assert float((answered.argmax(1) == expected.argmax(1)).float().mean()) > 0.97
    assert "bfloat16" in lower.words and "float32" in exact.words


def test_an_engine_is_opened_for_every_fold_by_its_name(tiny: Path) -> None:
    engines = open_engines(ModelPackage.load(tiny), Inference(device="cpu"))
    assert [type(one) for one in engines] == [TorchEngine] and engines[0].device == CPU
    assert engines[0].words.startswith(f"torch {torch.__version__.split('+')[0]}, float32")
    assert "torch" in available() and not any(name.startswith("_") for name in available())
    with pytest.raises(UsageError, match=r"engine 'troch' was asked for.*torch"):
        load("troch")


def test_memory_is_kept_only_while_a_window_is_computed_whatever_becomes_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, ...]] = []

    class Library:
        def mallopt(self, *words: int) -> None:
            calls.append(words)

        def malloc_trim(self, much: int) -> None:
            calls.append((much,))

    monkeypatch.setattr(_memory, "_glibc", Library)
    with pytest.raises(ZeroDivisionError), _memory.kept():
        1 / 0  # noqa: B018
    assert calls == [(_memory.MMAP_MAX, 0), (_memory.MMAP_MAX, _memory.USUAL_PIECES)]
    monkeypatch.setattr(_memory, "_glibc", lambda: None)
    with _memory.kept():
        pass
    assert len(calls) == 2, "where the C library is another one nothing is done"
