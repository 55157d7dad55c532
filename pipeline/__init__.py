"""Scans in, reports out: the verbs, each one a function with the meaning of the command of its name.

A verb of two words is one with an underscore: `slides_train`. The functions live in the rooms of this floor and are
brought in when first used, so that importing the floor costs nothing: `from pipeline import segment` loads torch,
`hilum --help` does not. The node is a room of its own: `pipeline.node.service.serve`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import segment
    from .bundle_writing import export_monai
    from .bundles import import_monai
    from .checking import check
    from .contest import compare
    from .conversion import convert
    from .demonstration import demo
    from .description import show
    from .evaluation import evaluate
    from .export import export_onnx, export_torchscript
    from .nnunet import import_nnunet
    from .offline import bundle
    from .planning import plan
    from .signatures import sign
    from .slides.classification import classify as slides_classify
    from .slides.features import extract as slides_features
    from .slides.training import train_slides as slides_train
    from .tracking import serve as ui
    from .training import train
    from .tuning import tune

__all__ = [
    "bundle", "check", "compare", "convert", "demo", "evaluate", "export_monai", "export_onnx", "export_torchscript",
    "import_monai", "import_nnunet", "plan", "segment", "show", "sign", "slides_classify", "slides_features",
    "slides_train", "train", "tune", "ui",
]  # fmt: skip

_HOMES = {
    "bundle": ("offline", "bundle"),
    "check": ("checking", "check"),
    "compare": ("contest", "compare"),
    "convert": ("conversion", "convert"),
    "demo": ("demonstration", "demo"),
    "evaluate": ("evaluation", "evaluate"),
    "export_monai": ("bundle_writing", "export_monai"),
    "export_onnx": ("export", "export_onnx"),
    "export_torchscript": ("export", "export_torchscript"),
    "import_monai": ("bundles", "import_monai"),
    "import_nnunet": ("nnunet", "import_nnunet"),
    "plan": ("planning", "plan"),
    "segment": ("batch", "segment"),
    "show": ("description", "show"),
    "sign": ("signatures", "sign"),
    "slides_classify": ("slides.classification", "classify"),
    "slides_features": ("slides.features", "extract"),
    "slides_train": ("slides.training", "train_slides"),
    "train": ("training", "train"),
    "tune": ("tuning", "tune"),
    "ui": ("tracking", "serve"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    room, function = _HOMES[name]
    return getattr(import_module(f".{room}", __name__), function)
