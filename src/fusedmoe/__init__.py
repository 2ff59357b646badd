"""The experts of a mixture-of-experts layer as fused GPU kernels.

Public names are loaded when first used, so that ``import fusedmoe`` costs nothing and needs no GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusedmoe import reference as reference
    from fusedmoe.errors import (
        CaptureError as CaptureError,
        CheckpointError as CheckpointError,
        DeviceError as DeviceError,
        DTypeError as DTypeError,
        FusedMoEError as FusedMoEError,
        GradientError as GradientError,
        LayoutError as LayoutError,
        MissingDependencyError as MissingDependencyError,
        OptionError as OptionError,
        ParallelError as ParallelError,
        ShapeError as ShapeError,
        UnsupportedError as UnsupportedError,
        WorkspaceError as WorkspaceError,
    )
    from fusedmoe.expert_matrix import ExpertMatrix as ExpertMatrix
    from fusedmoe.functional import fused_experts as fused_experts, workspace_bytes as workspace_bytes
    from fusedmoe.linear import expert_linear as expert_linear
    from fusedmoe.lora import Adapter as Adapter, LoRA as LoRA
    from fusedmoe.nn import FusedExperts as FusedExperts
    from fusedmoe.quantization import quantize as quantize
    from fusedmoe.routers import (
        TopK as TopK,
        sigmoid_topk as sigmoid_topk,
        softmax_topk as softmax_topk,
        topk_softmax as topk_softmax,
    )
    from fusedmoe.schemes import SCHEMES as SCHEMES
    from fusedmoe.spec.activation import Activation as Activation
    from fusedmoe.warming import Warmup as Warmup, warmup as warmup

__version__ = "0.1.0.dev0"

#: public name -> module, relative to this package, which may be loaded by another name
_WHERE = {
    "Activation": ".spec.activation",
    "Adapter": ".lora",
    "CaptureError": ".errors",
    "CheckpointError": ".errors",
    "DTypeError": ".errors",
    "DeviceError": ".errors",
    "ExpertMatrix": ".expert_matrix",
    "FusedExperts": ".nn",
    "FusedMoEError": ".errors",
    "GradientError": ".errors",
    "LayoutError": ".errors",
    "LoRA": ".lora",
    "MissingDependencyError": ".errors",
    "OptionError": ".errors",
    "ParallelError": ".errors",
    "SCHEMES": ".schemes",
    "ShapeError": ".errors",
    "TopK": ".routers",
    "UnsupportedError": ".errors",
    "Warmup": ".warming",
    "WorkspaceError": ".errors",
    "expert_linear": ".linear",
    "fused_experts": ".functional",
    "quantize": ".quantization",
    "reference": ".reference",
    "sigmoid_topk": ".routers",
    "softmax_topk": ".routers",
    "topk_softmax": ".routers",
    "warmup": ".warming",
    "workspace_bytes": ".functional",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'fusedmoe' has no attribute {name!r}; it has {', '.join(__all__)}")
    module = importlib.import_module(_WHERE[name], __name__)
    return module if name == "reference" else getattr(module, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
