"""Expert matrices as the grouped GEMM takes them: their operand, and the policies that understand their storage."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.kernels import decode, load, scales, step, words
from fusedmoe.kernels.operands import BlockScale, Weight, Zeros
from fusedmoe.plan.config import KernelConfig
from fusedmoe.spec.format import ELEMENTS

#: Types of a kernel's operands by the name that the plan has for them.
TRITON_TYPES = {
    "e4m3": tl.float8e4nv,
    "e4m3fnuz": tl.float8e4b8,
    "int8": tl.int8,
    "float16": tl.float16,
    "bfloat16": tl.bfloat16,
    "float32": tl.float32,
}


def cube(tensor: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """A tensor of three dimensions and its strides."""
    return tensor, tensor.stride(0), tensor.stride(1), tensor.stride(2)


def by_units(w: torch.Tensor) -> tuple[torch.Tensor, int, int, int, Any]:
    """A tensor [E, N, K], its strides, the first two of them in units, and the unit.

    Triton looks whether a stride is divisible by 16. One that is not, such as 360 words of 8 codes, may still be a
    multiple of 16 bytes, which is what wide loads need, and which multiplying by a constant shows.
    """
    tensor, stride_e, stride_n, stride_k = cube(w)
    seen = stride_e % 16 == stride_n % 16 == 0
    unit = 1 if seen or stride_k != 1 else math.gcd(stride_e, stride_n, 16 // w.element_size())
    return tensor, stride_e // unit, stride_n // unit, stride_k, tl.constexpr(unit)


def stacked_rows(w: torch.Tensor) -> tuple[int, int]:
    """Rows of [E, N, K] with contiguous rows seen as one matrix, and those from one expert to the next."""
    n_experts, n, _ = w.shape
    per = w.stride(0) // w.stride(1) if n_experts > 1 else n
    return (n_experts - 1) * per + n, per


def weight_map(w: torch.Tensor, config: KernelConfig, wide: int, per_item: int) -> tuple[TensorDescriptor, int, Any]:
    """Tensor map of [E, N, K] as a two-dimensional tensor, its rows per expert, and the load that uses it."""
    n_experts, n, k = w.shape
    stride_e, stride_n, stride_k = w.stride()
    if stride_k == 1:
        rows, per = stacked_rows(w)
        box = [wide, config.block_k // per_item]
        return TensorDescriptor(w, [rows, k], [stride_n, 1], box), per, load.weight_by_map_nk
    per = stride_e // stride_k if n_experts > 1 else k
    rows = (n_experts - 1) * per + k
    return TensorDescriptor(w, [rows, n], [stride_k, 1], [config.block_k, wide]), per, load.weight_by_map_kn


class Operand(NamedTuple):
    """An expert matrix as the kernel takes it, with the policies that understand it."""

    weight: Weight
    data: torch.Tensor
    policies: dict[str, Any]
    k_end: int


def operand(w: torch.Tensor | ExpertMatrix, multiply: str, up: int, wide: int, config: KernelConfig) -> Operand:
    """Choose what understands the storage of an expert matrix.

    Scales of whole rows wait for the sum. Scales of groups of K are applied to the product of a step that lies within
    a group; those of single rows, where groups are shorter than a step or the configuration says so, to the weights as
    they are decoded.
    """
    k = w.shape[2]
    policies: dict[str, Any] = {
        "LOAD_SCALES": scales.none,
        "MATH": TRITON_TYPES[multiply],
        "ACCUMULATE": tl.float32,
        "SHIFT": 0.0,
        "PER_ITEM": 1,
        "GROUP": k,
        "STRIDE": k,
    }
    if isinstance(w, torch.Tensor):
        policies |= {"STEP": step.dense, "DECODE": decode.as_they_are, "ELEMENT": None, "FINISH": scales.nothing}
        return Operand(Weight(*by_units(w), 0, up), w, policies, k)
    form = w.format
    block_n, block_k = form.block
    of_rows_too = form.inputs is not None and form.inputs.mode == "group"
    of_single_rows = block_k != 0 and block_n == 1 and not of_rows_too
    in_weights = of_single_rows and (config.block_k > block_k or config.scale_weights)
    in_step = block_k != 0 and not in_weights
    kind = words.kind_of_scale(form.element, multiply, form.scale) if config.words and in_weights else form.scale
    scale = _bytes(w.scale) if form.scale in ("e8m0", "e4m3") else w.scale
    phase = up if w.parts == 1 and block_n else 0
    steps = () if w.tensor_scale is None else w.tensor_scale.stride()
    if config.words:
        data = w.data.view(torch.int32)
    else:
        data = w.data if form.element in ("int8", multiply) else _bytes(w.data)
    weight = Weight(
        *by_units(data),
        0,
        up,
        scale=BlockScale(
            *by_units(scale),
            w.scale.shape[1] // 2 if w.parts == 2 and up else 0,
            phase,
            tl.constexpr(block_n),
            tl.constexpr(block_k or k),
            tl.constexpr(kind),
            tl.constexpr(block_n == 0 or block_n > 1 and block_n % wide == 0 and phase % wide == 0),
        ),
        scale_at=tl.constexpr("step" if block_k else "end"),
        tensor_scale=w.tensor_scale,
        tensor_scale_stride=steps[0] if steps else None,
        tensor_scale_part=steps[1] if len(steps) == 2 else None,
    )
    policies |= {
        "STEP": step.scaled_product if in_step else step.product_of_words if config.words else step.product,
        "FINISH": scales.finish,
        "ACCUMULATE": tl.int32 if multiply == "int8" and not in_step else tl.float32,
        "SHIFT": float(ELEMENTS[form.element].zero),
        "PER_ITEM": form.per_byte,
        "DECODE": decode.as_they_are,
        "ELEMENT": None,
    }
    if block_k:
        policies["LOAD_SCALES"] = scales.of_groups if in_weights else scales.of_step
    if w.zero is not None:
        weight = weight._replace(zero=Zeros(*cube(w.zero), up, tl.constexpr(form.per_byte)))
        policies["SHIFT"] = None
        if not block_k:
            policies["LOAD_SCALES"] = scales.zeros_alone
    if config.words:
        policies |= {
            "DECODE": words.decoded_and_scaled if in_weights else words.decoded,
            "ELEMENT": words.assembly(
                form.element,
                multiply,
                zero=None if w.zero is not None else ELEMENTS[form.element].zero,
                scale=kind if in_weights else None,
            ),
            "PER_ITEM": 4 * form.per_byte,
        }
    elif multiply != form.element:
        element = {"int8": decode.signed, "uint8": decode.unsigned, "int4": decode.unsigned}.get(form.element)
        policies |= {
            "DECODE": decode.decoded_and_scaled if in_weights else decode.decoded,
            "ELEMENT": element or getattr(decode, form.element),
        }
    if in_step:
        policies |= {"GROUP": block_k, "STRIDE": math.ceil(block_k / config.block_k) * config.block_k}
    k_end = k if policies["GROUP"] == policies["STRIDE"] else math.ceil(k / block_k) * policies["STRIDE"]
    return Operand(weight, data, policies, k_end)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)
