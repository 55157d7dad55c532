"""OpenVINO on the processor: the package's exported file, in float32 or bfloat16, on as many threads as there are cores."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from preprocessing.cores import usable_cores

from ..errors import UsageError
from ..export import missing_extra
from ..prediction import refuse_slow_precision
from ._kept import checked, kept, refuse_other_devices

if TYPE_CHECKING:
    from ..package import ModelPackage
    from ..prediction import Inference

HINTS = {"float32": "f32", "bfloat16": "bf16"}
"""What OpenVINO calls a precision. Said always: by default it takes bfloat16 wherever the processor has it, unasked."""


def open(package: "ModelPackage", how: "Inference") -> "tuple[CompiledEngine, ...]":
    """A compiled network for every fold, compared with torch when the first of this kind is opened."""
    refuse_other_devices(how, "openvino")
    refuse_slow_precision(how.precision, torch.device("cpu"))
    version = _imported().__version__.split("-")[0]
    return checked(
        package, "openvino", version, how.precision, [compiled(path, how.precision) for path in kept(package)]
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class CompiledEngine:
    """A fold ready to answer, in memory."""

    request: Any
    words: str = ""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __call__(self, windows: Float[Tensor, "B C i j k"]) -> Float[Tensor, "B K i j k"]:
        given = windows.detach().cpu().float().contiguous().numpy()
        # a copy: the next windows write over what is shared
        (logits,) = self.request.infer([given], share_inputs=True, share_outputs=False).values()
        return torch.from_numpy(logits)


def compiled(path: Path, precision: str) -> CompiledEngine:
    """Of a file, in that precision."""
    openvino = _imported()
    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "INFERENCE_NUM_THREADS": usable_cores(),
        "PERFORMANCE_HINT": "LATENCY",  # one batch at a time, all cores on it
    }
    try:
        core = openvino.Core()
        model = core.compile_model(core.read_model(path), "CPU", settings)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-300:]  # it begins with its own call stack
        raise UsageError(
            f"openvino {openvino.__version__} cannot run the exported network ({reason}); it must know every operation. "
            "Use --engine onnxruntime or torch."
        ) from error
    return CompiledEngine(request=model.create_infer_request())


def _imported() -> Any:
    """Without the part of it that tells its maker of every import, over the network and with a number of this machine
    that it leaves in the home folder; where that part is absent, openvino does without by itself."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: it cannot be imported
    try:
        import openvino
    except ImportError as error:
        raise missing_extra(error, "engine openvino", "openvino") from None
    return openvino
