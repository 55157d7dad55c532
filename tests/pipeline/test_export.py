"""What is exported says what torch says, says what it is, and is not written otherwise."""

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

import networks
from kernels import haar
from networks import residual_unet
from pipeline import cli
from pipeline.engines.openvino import compiled
from pipeline.errors import UsageError
from pipeline.export import (
    BOUND,
    Agreement,
    compared,
    export,
    in_plain_operations,
    named,
    onnx_of,
    refuse_unless_equal,
    torchscript_of,
)
from pipeline.package import ModelPackage
from preprocessing.plan import Plan
from preprocessing.records import decode

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")

STAGES = dict(width=4, strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)), kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)))
SMALL = dict.fromkeys(("residual_unet", "self_guided", "mpu_net", "mcads", "frequency_unet"), STAGES)
SMALL["segresnet"] = dict(width=4, blocks=(1, 1, 1))
QUICK = ("residual_unet",)
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in networks.available()]


NOT_IN_OPENVINO = ("frequency_unet",)
"""Its filters see a picture's far side beyond the border, and OpenVINO knows no padding that wraps around."""


def small(name: str) -> tuple[torch.nn.Module, tuple[int, int, int]]:
    module = networks.load(name)
    config = module.Config(**SMALL.get(name, {}))
    torch.manual_seed(0)
    i, j, k = (n * d for n, d in zip((2, 1, 2), module.divisor(config), strict=True))
    return module.build(config, channels=2, classes=3).eval(), (i, j, k)


def asked(name: str) -> tuple[torch.nn.Module, tuple[int, int, int], torch.Tensor, torch.Tensor]:
    """A small network, and what it answers to three windows: one more than an export is shown."""
    network, patch = small(name)
    windows = torch.randn(3, 2, *patch, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network, patch, windows, network(windows)


@pytest.mark.parametrize("name", EVERY)
def test_every_network_answers_in_onnxruntime_and_openvino_as_in_torch(name, tmp_path) -> None:
    network, patch, windows, expected = asked(name)
    file = tmp_path / "network.onnx"
    file.write_bytes(onnx_of(network, 2, patch, name, {}))
    onnx.checker.check_model(str(file), full_check=True)
    bound = BOUND * max(1, expected.abs().max() / 10)
    (there,) = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(
        None, {"windows": windows.numpy()}
    )
    assert (torch.from_numpy(there) - expected).abs().max() < bound
    if name in NOT_IN_OPENVINO:
        with pytest.raises(UsageError, match=r"cannot run the exported network .* Use --engine onnxruntime or torch"):
            compiled(file, "float32")
        return
    assert (compiled(file, "float32")(windows) - expected).abs().max() < bound


@pytest.mark.parametrize("name", EVERY)
def test_every_network_answers_as_torchscript_without_any_operation_of_ours(name, tmp_path) -> None:
    network, patch, windows, expected = asked(name)
    file = tmp_path / "network.ts"
    file.write_bytes(torchscript_of(network, 2, patch, name, {}))
    loaded = torch.jit.load(file)
    assert "hilum::" not in str(loaded.network.inlined_graph), "a folder of that name may stand in it"
    with torch.no_grad():
        assert (loaded(windows) - expected).abs().max() < BOUND * max(1, expected.abs().max() / 10)


def test_a_network_that_torch_cannot_follow_is_refused_in_words() -> None:
    config = residual_unet.Config(**STAGES, attention=("", "", "set_transformer"))
    network = residual_unet.build(config, channels=1, classes=2)
    with pytest.raises(UsageError, match=r"network residual_unet could not be turned into a graph .* --engine torch"):
        onnx_of(network, 1, (4, 8, 8), "residual_unet", {})


class Waves(torch.nn.Module):
    """A network with an operation of ours that nobody wrote a formula for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return haar.fused(x).mean(2)


def test_an_operation_without_a_formula_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"network waves uses hilum\.haar"):
        in_plain_operations(Waves(), 1, (4, 4, 4), "waves")


def test_a_file_says_what_it_is_and_a_fold_each_has_one(make_package, tmp_path, capsys) -> None:
    make_package(tmp_path / "package", fold=0)
    package = make_package(tmp_path / "package", fold=1)
    assert cli.main(["export", "onnx", str(package.folder), "--out", str(tmp_path / "out" / "model.onnx")]) == 0
    printed = capsys.readouterr()
    files = [tmp_path / "out" / f"model-fold{fold}.onnx" for fold in (0, 1)]
    assert printed.out.split() == [str(file) for file in files]  # files to stdout, and nothing else
    assert printed.err.count("largest difference of a logit") == 2
    for fold, file in enumerate(files):
        model = onnx.load(file)
        (note,) = (json.loads(one.value) for one in model.metadata_props if one.key == "hilum")
        assert note["package"] == package.id and note["fold"] == str(fold) and note["versions"]["torch"]
        assert decode(Plan, note["plan"], where="plan") == package.plan
        (axes,) = (
            [dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in model.graph.input
        )
        assert axes == ["batch", 1, *package.plan.patch]
    (of_torchscript,) = export(
        ModelPackage.load(_one_fold(make_package, tmp_path)), "torchscript", tmp_path / "model.ts"
    )
    extra = {"hilum": ""}
    torch.jit.load(of_torchscript.path, _extra_files=extra)
    assert json.loads(extra["hilum"])["fold"] == "0"


def _one_fold(make_package, folder: Path) -> Path:
    return make_package(folder / "single").folder


def test_names_follow_the_folds(tmp_path) -> None:
    out = tmp_path / "model.onnx"
    assert named(out, "0", 1) == out
    assert named(out, "0", 2).name == "model-fold0.onnx" and named(out, "all", 2).name == "model-all.onnx"


def test_an_answer_that_differs_is_found_and_refused(tiny) -> None:
    package = ModelPackage.load(tiny)
    (network,) = package.networks()
    assert compared(network, network, package).difference == 0
    for answer, words in (
        (lambda windows: network(windows) + 0.01, "1.0e-02"),
        (lambda windows: network(windows) * torch.nan, "nan"),
        (lambda windows: network(windows)[:1] if len(windows) > 1 else network(windows), "nan"),  # loses a window
    ):
        found = compared(network, answer, package)
        with pytest.raises(UsageError, match=f"differs from torch: largest difference of a logit {words}"):
            refuse_unless_equal(found, "it")


def test_the_bound_grows_with_the_logits_as_rounding_does() -> None:
    assert Agreement(difference=2e-3, largest=30.0).holds
    assert not Agreement(difference=2e-3, largest=5.0).holds
