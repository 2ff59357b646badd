"""Turn the arguments of a user into a checked :class:`~fusedmoe.spec.call.Call`, or an error that helps.

Nothing here reads a tensor's elements: values of ids are the kernels' business (any id is harmless), and a
read would stall a GPU.
"""

from __future__ import annotations

import torch

from fusedmoe.errors import DeviceError, DTypeError, GradientError, LayoutError, OptionError, ShapeError, explain
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.call import Call
from fusedmoe.spec.layout import FP32_PRECISIONS, GATE_UP_LAYOUTS, WEIGHT_LAYOUTS, Matrix
from fusedmoe.spec.problem import Problem

MAX_TOP_K = 64
MAX_EXPERTS = 4096

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int32, torch.int64)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def _tensor(
    name: str, value: object, shape: str, dim: int, dtypes: tuple[torch.dtype, ...], like: torch.device | None
) -> None:
    """Type, number of dimensions, dtype and device of one tensor."""
    if not isinstance(value, torch.Tensor):
        raise DTypeError(
            explain(
                name, got=type(value).__name__, wanted=f"a torch.Tensor {shape}", do="Convert it with torch.as_tensor."
            )
        )
    if value.dim() != dim:
        raise ShapeError(
            explain(
                name,
                got=f"{value.dim()} dimensions, shape {tuple(value.shape)}",
                wanted=f"{dim} dimensions, {shape}",
                do="Reshape it (flatten leading dimensions of hidden states to T).",
            )
        )
    if value.dtype not in dtypes:
        quantised = value.dtype in (torch.int8, torch.uint8) or "float8" in str(value.dtype)
        do = (
            "Quantised experts need their scales: plain tensors are taken as unquantised."
            if quantised and name in ("w13", "w2")
            else f"Cast it, for example {name}.to(torch.{str(dtypes[0]).removeprefix('torch.')})."
        )
        raise DTypeError(explain(name, got=value.dtype, wanted=_names(dtypes), do=do))
    if like is not None and value.device != like:
        raise DeviceError(
            explain(
                name,
                got=f"a tensor on {value.device}",
                wanted=f"{like}, where hidden_states lies",
                do=f"Move it: {name}.to('{like}').",
            )
        )


def _size(name: str, got: tuple[int, ...], wanted: tuple[int, ...], meaning: str, do: str) -> None:
    if got != wanted:
        raise ShapeError(explain(name, got=f"shape {got}", wanted=f"{wanted} = {meaning}", do=do))


def _choice(name: str, got: object, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise OptionError(
            explain(name, got=repr(got), wanted=" or ".join(map(repr, allowed)), do="Choose one of them.")
        )


def _matrix(w: torch.Tensor) -> Matrix:
    """Layout facts of a matrix seen as [E, N, K]."""
    stride_e, stride_n, stride_k = w.stride()
    n_experts, n, k = w.shape
    if stride_k == 1 or k == 1:
        contiguous, row = "K", stride_n
        rows_between = n
    elif stride_n == 1 or n == 1:
        contiguous, row = "N", stride_k
        rows_between = k
    else:
        return Matrix("none", False)
    unit = w.element_size()
    tma = (
        w.data_ptr() % 16 == 0
        and row * unit % 16 == 0
        and row > 0
        # The tensor map is two-dimensional: experts must start a whole number of rows apart, and not overlap.
        and (n_experts == 1 or (stride_e % row == 0 and stride_e // row >= rows_between))
        and n_experts * max(1, stride_e // row) < 2**31
    )
    # Length-1 dimensions may carry any stride; the kernels then never step along them.
    return Matrix("K" if contiguous == "K" else "N", tma and (stride_k == 1 or stride_n == 1))


def check(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str | Activation = "silu",
    gate_up_layout: str = "concatenated",
    weight_layout: str = "NK",
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    expert_map: torch.Tensor | None = None,
    global_num_experts: int | None = None,
    fp32_precision: str = "ieee",
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> Call:
    """Check every argument of :func:`fusedmoe.fused_experts`; raises what that function documents."""
    act = Activation.of(activation)
    _choice("gate_up_layout", gate_up_layout, GATE_UP_LAYOUTS)
    _choice("weight_layout", weight_layout, WEIGHT_LAYOUTS)
    _choice("fp32_precision", fp32_precision, FP32_PRECISIONS)

    _tensor("hidden_states", hidden_states, "[T, H]", 2, _FLOATS, None)
    device, dtype = hidden_states.device, hidden_states.dtype
    n_tokens, n_hidden = hidden_states.shape
    as_stored = {
        "NK": ("[E, 2I, H] or, not gated, [E, I, H]", "[E, H, I]"),
        "KN": ("[E, H, 2I] or, not gated, [E, H, I]", "[E, I, H]"),
    }[weight_layout]
    _tensor("w13", w13, as_stored[0], 3, _FLOATS, device)
    _tensor("w2", w2, as_stored[1], 3, _FLOATS, device)
    for name, w in (("w13", w13), ("w2", w2)):
        if w.dtype != dtype:
            raise DTypeError(
                explain(
                    name,
                    got=w.dtype,
                    wanted=f"{dtype}, the type of hidden_states",
                    do=f"Cast hidden_states (under autocast they may be float32): hidden_states.to({w.dtype}).",
                )
            )
    if weight_layout == "KN":
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    n_experts, n_rows, n_inner = w13.shape
    if n_experts < 1 or n_experts > MAX_EXPERTS:
        raise ShapeError(
            explain("w13", got=f"{n_experts} experts", wanted=f"1 to {MAX_EXPERTS}", do="Split the layer.")
        )
    other = (
        "Set weight_layout='KN' if the experts are stored [E, in, out]."
        if weight_layout == "NK"
        else "Set weight_layout='NK' if the experts are stored [E, out, in]."
    )
    if n_inner != n_hidden:
        raise ShapeError(
            explain("w13", got=f"inner size {n_inner}", wanted=f"{n_hidden}, the width of hidden_states", do=other)
        )
    if act.gated and n_rows % 2:
        raise ShapeError(
            explain(
                "w13",
                got=f"{n_rows} rows per expert",
                wanted=f"an even number, 2I: activation {act.name!r} is gated",
                do="For experts without a gate choose an activation ending in _no_mul.",
            )
        )
    n_intermediate = n_rows // 2 if act.gated else n_rows
    if n_intermediate < 1 or n_hidden < 1:
        raise ShapeError(
            explain("w13", got=f"shape {tuple(w13.shape)}", wanted="I and H of at least 1", do="Check the checkpoint.")
        )
    _size(
        "w2",
        tuple(w2.shape) if weight_layout == "NK" else (w2.shape[0], w2.shape[2], w2.shape[1]),
        (n_experts, n_hidden, n_intermediate) if weight_layout == "NK" else (n_experts, n_intermediate, n_hidden),
        as_stored[1],
        other if w2.shape[0] == n_experts else "w13 and w2 must hold the same experts.",
    )
    for name, bias, width, meaning in (
        ("w13_bias", w13_bias, n_rows, "[E, rows of w13]"),
        ("w2_bias", w2_bias, n_hidden, "[E, H]"),
    ):
        if bias is not None:
            _tensor(name, bias, meaning, 2, _FLOATS, device)
            _size(name, tuple(bias.shape), (n_experts, width), meaning, "Give one row of biases to each expert.")

    _tensor("topk_ids", topk_ids, "[T, top_k]", 2, _INTEGERS, device)
    _tensor("topk_weights", topk_weights, "[T, top_k]", 2, _FLOATS, device)
    top_k = topk_ids.shape[1]
    if topk_ids.shape[0] != n_tokens:
        raise ShapeError(
            explain(
                "topk_ids",
                got=f"{topk_ids.shape[0]} rows",
                wanted=f"{n_tokens}, one for each row of hidden_states",
                do="Route the same tokens.",
            )
        )
    if not 1 <= top_k <= MAX_TOP_K:
        raise ShapeError(
            explain("topk_ids", got=f"top_k = {top_k}", wanted=f"1 to {MAX_TOP_K}", do="Check the router.")
        )
    _size(
        "topk_weights",
        tuple(topk_weights.shape),
        (n_tokens, top_k),
        "the shape of topk_ids",
        "Pass both as the router returned them.",
    )

    if expert_map is not None:
        _tensor("expert_map", expert_map, "[E_global]", 1, _INTEGERS, device)
        if not expert_map.is_contiguous():
            raise LayoutError(
                explain(
                    "expert_map",
                    got=f"stride {expert_map.stride(0)}",
                    wanted="contiguous",
                    do="Call .contiguous() once, outside the forward pass.",
                )
            )
        if expert_map.shape[0] < 1:
            raise ShapeError(
                explain(
                    "expert_map",
                    got="no entries",
                    wanted="one per global expert",
                    do="Drop it when all experts are local.",
                )
            )
        if global_num_experts is not None and global_num_experts != expert_map.shape[0]:
            raise OptionError(
                explain(
                    "global_num_experts",
                    got=global_num_experts,
                    wanted=f"{expert_map.shape[0]}, the length of expert_map",
                    do="Leave it out, or fix the map.",
                )
            )
    elif global_num_experts is not None and global_num_experts != n_experts:
        raise OptionError(
            explain(
                "global_num_experts",
                got=global_num_experts,
                wanted=f"{n_experts}, the experts in w13, when there is no expert_map",
                do="Pass expert_map [E_global] with the local id or -1 of each expert.",
            )
        )
    if out is not None:
        _tensor("out", out, "[T, H]", 2, (dtype,), device)
        _size(
            "out",
            tuple(out.shape),
            (n_tokens, n_hidden),
            "the shape of hidden_states",
            "Allocate torch.empty_like(hidden_states).",
        )
        if n_tokens and (
            0 in out.stride()
            and n_tokens * n_hidden > 1
            or out.untyped_storage().data_ptr() == hidden_states.untyped_storage().data_ptr()
        ):
            raise LayoutError(
                explain(
                    "out",
                    got="memory that is shared with hidden_states or with itself",
                    wanted="memory of its own",
                    do="Allocate torch.empty_like(hidden_states).",
                )
            )
    if torch.is_grad_enabled():
        for name, t in (
            ("hidden_states", hidden_states),
            ("w13", w13),
            ("w2", w2),
            ("topk_weights", topk_weights),
            ("w13_bias", w13_bias),
            ("w2_bias", w2_bias),
        ):
            if t is not None and t.requires_grad:
                raise GradientError(
                    explain(
                        f"{name} requires grad",
                        got="grad mode enabled",
                        wanted="inference: this layer computes no gradients",
                        do="Call it under torch.no_grad() or torch.inference_mode().",
                    )
                )

    problem = Problem(
        tokens=n_tokens,
        top_k=top_k,
        experts=n_experts,
        hidden=n_hidden,
        intermediate=n_intermediate,
        dtype=str(dtype).removeprefix("torch."),
        activation=act,
        gate_up="interleaved" if gate_up_layout == "interleaved" else "concatenated",
        w13=_matrix(w13),
        w2=_matrix(w2),
        w13_bias=w13_bias is not None,
        w2_bias=w2_bias is not None,
        weight_on_input=bool(apply_router_weight_on_input),
        expert_map=expert_map is not None,
        fp32_precision="tf32" if fp32_precision == "tf32" else "ieee",
    )
    return Call(problem, hidden_states, w13, w2, topk_weights, topk_ids, w13_bias, w2_bias, expert_map, out, workspace)
