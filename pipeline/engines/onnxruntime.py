"""ONNX Runtime on the processor: the package's exported file, in float32, on as many threads as there are cores to use."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from preprocessing.cores import usable_cores

from ..errors import UsageError
from ..export import INPUT, missing_extra
from ._kept import checked, kept, refuse_other_devices

if TYPE_CHECKING:
    from ..package import ModelPackage
    from ..prediction import Inference


def open(package: "ModelPackage", how: "Inference") -> "tuple[RuntimeEngine, ...]":
    """A session for every fold, compared with torch when the first of this kind is opened."""
    refuse_other_devices(how, "onnxruntime")
    if how.precision != "float32":
        raise UsageError(
            f"precision {how.precision} was asked for with engine onnxruntime, which has no convolutions in it on a "
            "processor; float32 is needed. Use --engine openvino or torch for it, or leave --precision out."
        )
    version = _imported().__version__
    return checked(package, "onnxruntime", version, how.precision, [session(path) for path in kept(package)])


@dataclass(frozen=True, kw_only=True, eq=False)
class RuntimeEngine:
    """A fold ready to answer, in memory."""

    inner: Any
    words: str = ""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __call__(self, windows: Float[Tensor, "B C i j k"]) -> Float[Tensor, "B K i j k"]:
        (logits,) = self.inner.run(None, {INPUT: windows.detach().cpu().float().contiguous().numpy()})
        return torch.from_numpy(logits)


def session(model: Path | bytes) -> RuntimeEngine:
    """Of a file, or of its bytes."""
    runtime = _imported()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    # its threads would turn in circles between two windows, where the summing of windows needs the cores
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors; its warnings are of its own optimiser
    try:
        inner = runtime.InferenceSession(
            str(model) if isinstance(model, Path) else model, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # by types of its own, none of them public
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"onnxruntime {runtime.__version__} cannot run the exported network ({reason}); it must know every operation. "
            "Use --engine torch."
        ) from error
    return RuntimeEngine(inner=inner)


def _imported() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_extra(error, "engine onnxruntime and the check of ONNX files", "onnx") from None
    return onnxruntime
