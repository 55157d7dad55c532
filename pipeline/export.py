"""A trained network as a file that other programs run: ONNX or TorchScript, with what it is written inside, and compared
with torch before it is written.

Both come from one graph in torch's own operations. `torch.export` follows a network and leaves our own operations
(kernels/) whole; each is then replaced by its formula. So torch's exporter to ONNX needs no translations of ours, and no
reader needs hilum. The older exporter, which traces, is of no use here: it knows no way to replace an operation, writes
down the number of windows it was shown, and is being retired by torch.
"""

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from kernels import channel_attention, fir_bank, position_attention
from preprocessing.records import encode

from . import seal
from .errors import UsageError
from .progress import Progress, silent
from .report import hilum_version, write_whole

if TYPE_CHECKING:
    import onnx
    from torch.export import ExportedProgram

    from .package import ModelPackage

logger = logging.getLogger(__name__)

Triple = tuple[int, int, int]
Answer = Callable[[Tensor], Tensor]
"""Windows [B, C, i, j, k] -> logits [B, K, i, j, k], whoever computes them."""

INPUT, OUTPUT, BATCH = "windows", "logits", "batch"
"""What the file calls what goes in, what comes out, and the only axis whose length is free."""

BOUND, USUAL = 1e-3, 10.0
"""How far a logit may lie from torch's: a probability moves by a quarter of that at most. Float32's rounding grows with the
logits, so where they are larger than usual a ten-thousandth of the largest is borne."""

NOTE = "hilum"
"""The key under which a file says what it is, in JSON."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How near another program's logits came to torch's, on windows of noise."""

    difference: float
    """The largest, of all classes and voxels."""
    largest: float
    """The largest logit of torch's, without its sign."""
    differing: float = 0.0
    """Share of the voxels that another label won, or that another region took."""

    @property
    def bound(self) -> float:
        """The difference that is borne."""
        return BOUND * max(1.0, self.largest / USUAL)

    @property
    def holds(self) -> bool:
        return self.difference <= self.bound  # of a NaN nothing holds

    @property
    def words(self) -> str:
        return f"largest difference of a logit {self.difference:.1e}, where {self.bound:.1e} is borne"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that was written."""

    path: Path
    fold: str
    agreement: Agreement


def export(package: "ModelPackage", kind: str, out: Path, progress: Progress = silent) -> tuple[Exported, ...]:
    """A file for every fold, of a kind of `KINDS`: `out` itself where there is one, else its name with the fold's behind it."""
    made = []
    for done, (fold, network) in enumerate(zip(package.record.folds, package.networks(), strict=True)):
        progress(f"export {kind}", done, len(package.record.folds))
        note = described(package, fold)
        content, agreement = KINDS[kind](network, package, note)
        path = named(out, fold, len(package.record.folds))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
        logger.info("%s: %s", path.name, agreement.words)
        made.append(Exported(path=path, fold=fold, agreement=agreement))
    progress(f"export {kind}", len(made), len(made))
    return tuple(made)


def export_onnx(package: "ModelPackage", out: Path, progress: Progress = silent) -> tuple[Exported, ...]:
    """For ONNX Runtime and its like."""
    return export(package, "onnx", out, progress)


def export_torchscript(package: "ModelPackage", out: Path, progress: Progress = silent) -> tuple[Exported, ...]:
    """For libtorch, which needs no hilum."""
    return export(package, "torchscript", out, progress)


def named(out: Path, fold: str, folds: int) -> Path:
    """model.onnx, or of several folds model-fold0.onnx."""
    whose = fold if fold == "all" else f"fold{fold}"
    return out if folds == 1 else out.with_name(f"{out.stem}-{whose}{out.suffix}")


def described(package: "ModelPackage", fold: str) -> dict[str, Any]:
    """What a file says of itself: enough to prepare a scan for it, and to find the package it came from."""
    return {
        "package": package.id,
        "name": package.name,
        "network": package.record.network,
        "fold": fold,
        "temperature": package.temperatures[fold],
        "plan": encode(package.plan),
        "hilum": hilum_version(),
        "versions": seal.versions_of(("torch", "numpy")),
        "trained_with": dict(package.record.versions),
    }


def _onnx(network: nn.Module, package: "ModelPackage", note: dict[str, Any]) -> tuple[bytes, Agreement]:
    from .engines.onnxruntime import session  # not at the top: it comes with hilum[onnx]

    content = onnx_of(network, len(package.plan.channels), package.plan.patch, package.record.network, note)
    agreement = compared(network, session(content), package)
    refuse_unless_equal(agreement, f"{package.record.network} as ONNX in onnxruntime")
    return content, agreement


def _torchscript(network: nn.Module, package: "ModelPackage", note: dict[str, Any]) -> tuple[bytes, Agreement]:
    content = torchscript_of(network, len(package.plan.channels), package.plan.patch, package.record.network, note)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch no longer develops TorchScript; it still loads it
        loaded = torch.jit.load(BytesIO(content))
    agreement = compared(network, loaded, package)
    refuse_unless_equal(agreement, f"{package.record.network} as TorchScript")
    return content, agreement


KINDS: dict[str, Callable[[nn.Module, "ModelPackage", dict[str, Any]], tuple[bytes, Agreement]]] = {
    "onnx": _onnx,
    "torchscript": _torchscript,
}


def onnx_of(network: nn.Module, channels: int, patch: Triple, name: str, note: dict[str, Any]) -> bytes:
    """The file's bytes, passed by ONNX's own checker. Any number of windows goes in, all of the plan's size."""
    onnx = _imported_onnx()
    graph = in_plain_operations(network, channels, patch, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own, of its own parts
            program = torch.onnx.export(
                graph, (), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
            )
        assert program is not None
        model = program.model_proto
        _name_the_batch(model)
        onnx.helper.set_model_props(model, {NOTE: json.dumps(note, ensure_ascii=False)})
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()
    except Exception as error:  # whatever the exporter fails with, by types of its own that change with its version
        raise _unexportable(name, "ONNX", error) from error


def torchscript_of(network: nn.Module, channels: int, patch: Triple, name: str, note: dict[str, Any]) -> bytes:
    """The file's bytes. A trace holds the number of windows it saw, which is one; so windows go through it one by one."""
    graph = in_plain_operations(network, channels, patch, name)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that TorchScript is no longer developed
            traced = torch.jit.trace(graph.module(), torch.zeros(1, channels, *patch), check_trace=False)
            shell = nn.Module()
            shell.network = traced
            whole = torch.jit.script(shell)
            whole.define(ONE_BY_ONE)
            content = BytesIO()
            torch.jit.save(whole.eval(), content, _extra_files={NOTE: json.dumps(note, ensure_ascii=False)})
    except Exception as error:
        raise _unexportable(name, "TorchScript", error) from error
    return content.getvalue()


ONE_BY_ONE = f"""
def forward(self, {INPUT}: Tensor) -> Tensor:
    answers: List[Tensor] = []
    for number in range({INPUT}.shape[0]):
        answers.append(self.network({INPUT}[number : number + 1]))
    return torch.cat(answers)
"""


def in_plain_operations(network: nn.Module, channels: int, patch: Triple, name: str) -> "ExportedProgram":
    """The network as a graph of torch's own operations, for any number of windows of that size."""
    windows = torch.zeros(2, channels, *patch)  # two: of one, torch would take it that there is always one
    try:
        with torch.no_grad():
            graph = torch.export.export(
                network.eval(), (windows,), dynamic_shapes=({0: torch.export.Dim(BATCH)},), strict=False
            ).run_decompositions(_formulas())
    except Exception as error:
        raise _unexportable(name, "a graph", error) from error
    if unknown := sorted({str(node.target) for node in graph.graph.nodes if str(node.target).startswith("hilum.")}):
        raise UsageError(
            f"network {name} uses {', '.join(unknown)}, which other programs do not know; a formula for each is needed in "
            "pipeline/export.py. Use --engine torch meanwhile."
        )
    return graph


def _normalised(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, slope: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    # a group for each channel: ONNX has a single operation for it, which every runtime is quick at
    y = functional.group_norm(x, x.shape[1], weight, bias, eps)
    y = y if residual is None else y + residual
    return y if slope == 1 else functional.leaky_relu(y, slope), *_unused(x)


def _filtered(x: Tensor, finest: bool) -> Tensor:
    return fir_bank.reference(x, finest)


def _by_position(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, x: Tensor | None, scale: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return position_attention.reference(q, k, v, gamma, x, scale), *_unused(q)


def _by_channel(x: Tensor, gamma: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return channel_attention.reference(x, gamma, scale), _unused(x)[0]


def _unused(x: Tensor) -> tuple[Tensor, Tensor]:
    """What backward alone would ask for."""
    return x.new_zeros(1), x.new_zeros(1)


FORMULAS: dict[str, Callable[..., Any]] = {
    "instance_norm": _normalised,
    "fir_bank": _filtered,
    "position_attention": _by_position,
    "channel_attention": _by_channel,
}
"""Our operations as torch's own."""


def _formulas() -> dict[Any, Callable[..., Any]]:
    """Of the operations that are there: one that no network has imported is not."""
    ours = torch.ops.hilum
    return {getattr(ours, name).default: formula for name, formula in FORMULAS.items() if hasattr(ours, name)}


def compared(network: nn.Module, answer: Answer, package: "ModelPackage") -> Agreement:
    """Logits of both on windows of noise, one and then two of them: the number of windows must be free."""
    random = torch.Generator().manual_seed(0)
    shape = (len(package.plan.channels), *package.plan.patch)
    difference = largest = differing = 0.0
    for count in (1, 2):
        windows = torch.randn(count, *shape, generator=random)
        with torch.inference_mode():
            expected = network(windows)
            answered = answer(windows)
        if answered.shape != expected.shape:
            return Agreement(difference=float("nan"), largest=largest, differing=1.0)
        # NaN, unlike max(), is carried along
        difference = float(torch.tensor([difference, (answered - expected).abs().max()]).max())
        largest = max(largest, float(expected.abs().max()))
        differing = max(differing, _differing(answered, expected, package.plan.has_regions))
    return Agreement(difference=difference, largest=largest, differing=differing)


def _differing(answered: Float[Tensor, "B K i j k"], expected: Float[Tensor, "B K i j k"], regions: bool) -> float:
    if regions:
        return float(((answered > 0) != (expected > 0)).any(dim=1).float().mean())
    return float((answered.argmax(dim=1) != expected.argmax(dim=1)).float().mean())


def refuse_unless_equal(agreement: Agreement, what: str) -> None:
    """A file that says something else is not written."""
    if not agreement.holds:
        raise UsageError(
            f"{what} differs from torch: {agreement.words}, for logits up to {agreement.largest:.3g}. Nothing was kept of "
            "it. Use --engine torch, and report it with the versions of both."
        )


def _name_the_batch(model: "onnx.ModelProto") -> None:
    """The exporter calls the free axis by a number of its own."""
    free = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    every: Sequence[Any] = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    for dim in (dim for value in every for dim in value.type.tensor_type.shape.dim):
        if dim.dim_param == free:
            dim.dim_param = BATCH


def _imported_onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter asks for it when it is too late for words)
    except ImportError as error:
        raise missing_extra(error, "ONNX files", "onnx") from None
    return onnx


def missing_extra(error: ImportError, what: str, extra: str) -> UsageError:
    """In place of an ImportError."""
    return UsageError(f"{what} need {error.name}, which is not installed here. Install it: pip install hilum[{extra}]")


def _unexportable(name: str, kind: str, error: Exception) -> UsageError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return UsageError(
        f"network {name} could not be turned into {kind} ({type(error).__name__}: {reason}); every operation of it must be "
        "one that torch can follow for any number of windows. Nothing was written. Use --engine torch."
    )
