"""Turn the arguments of a user into a checked :class:`~fusedmoe.call.Call`, or an error that helps.

Nothing here reads a tensor's elements: values of ids are the kernels' business (any id is harmless), and a
read would stall a GPU.
"""

from __future__ import annotations

import torch

from fusedmoe.call import Call
from fusedmoe.errors import DeviceError, DTypeError, GradientError, LayoutError, OptionError, ShapeError, explain
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.lora import LoRA
from fusedmoe.settings import settings
from fusedmoe.spec.activation import IDENTITY, Activation
from fusedmoe.spec.format import ELEMENTS
from fusedmoe.spec.layout import FP32_PRECISIONS, GATE_UP_LAYOUTS, WEIGHT_LAYOUTS, Matrix
from fusedmoe.spec.problem import Adapters, Problem

MAX_TOP_K = 64
MAX_EXPERTS = 4096
#: Slots T * top_k: kernels number them, and the tiles that they make, in int32.
MAX_SLOTS = 2**26

Experts = torch.Tensor | ExpertMatrix

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
    if type(value) is not torch.Tensor and hasattr(value, "to_local"):
        do = f"Pass {name}.to_local(), or gather it with {name}.full_tensor()."
        raise LayoutError(explain(name, got="a DTensor, spread over ranks", wanted="this rank's tensor", do=do))
    if value.layout != torch.strided or value.is_nested:
        got = "a nested tensor" if value.is_nested else value.layout
        raise LayoutError(explain(name, got=got, wanted="a dense tensor", do=f"Call {name}.to_dense()."))
    if value.dim() != dim:
        raise ShapeError(
            explain(
                name,
                got=f"{value.dim()} dimensions, shape {tuple(value.shape)}",
                wanted=f"{dim} dimensions, {shape}",
                do="Reshape it (flatten leading dimensions of hidden states to T).",
            )
        )
    if value.is_neg():  # its memory holds the negated numbers, and memory is what a kernel reads
        do = f"Call {name}.resolve_neg()."
        raise LayoutError(explain(name, got="a view that negates", wanted="numbers as they lie in memory", do=do))
    if value.dtype not in dtypes:
        quantised = value.dtype in (torch.int8, torch.uint8) or "float8" in str(value.dtype)
        do = (
            f"Quantised experts need their scales: pass fusedmoe.ExpertMatrix(scheme, {name}, scale)."
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
    if not isinstance(got, str) or got not in allowed:
        raise OptionError(
            explain(name, got=repr(got), wanted=" or ".join(map(repr, allowed)), do="Choose one of them.")
        )


def _flag(name: str, got: object) -> bool:
    if not isinstance(got, (bool, int)):
        raise OptionError(explain(name, got=type(got).__name__, wanted="True or False", do="Pass a bool."))
    return bool(got)


def _matrix(w: Experts) -> Matrix:
    """Layout facts of a matrix seen as [E, N, K]; of its codes when it is quantised."""
    if isinstance(w, ExpertMatrix):
        w = w.data
    n_experts, n, k = w.shape
    stride_e, stride_n, stride_k = w.stride()
    if stride_k == 1:
        contiguous, row, n_rows = "K", stride_n, n
    elif stride_n == 1:
        contiguous, row, n_rows = "N", stride_k, k
    else:
        return Matrix("none", tma=False, words=False)
    # The tensor map is two-dimensional: experts must start a whole number of rows apart, and not overlap.
    stacked = n_experts == 1 or (row > 0 and stride_e % row == 0 and stride_e // row >= n_rows)
    aligned = row > 0 and row * w.element_size() % 16 == 0 and w.data_ptr() % 16 == 0
    tma = stacked and aligned and n_experts * max(n_rows, stride_e // row) < 2**31
    lengths = (k, stride_n, stride_e if n_experts > 1 else 0)
    words = contiguous == "K" and not (w.data_ptr() % 4 or any(x * w.element_size() % 4 for x in lengths))
    return Matrix("K" if contiguous == "K" else "N", tma=tma, words=words)


def _aligned(x: torch.Tensor) -> bool:
    """Rows are contiguous and start at multiples of 16 bytes."""
    return x.stride(1) == 1 and not (x.stride(0) * x.element_size() % 16 or x.data_ptr() % 16)


#: Weight layout -> shapes of w13 and w2 as they are stored, and the advice when they fit the other layout.
_STORED = {
    "NK": (
        "[E, 2I, H] or, not gated, [E, I, H]",
        "[E, H, I]",
        "Set weight_layout='KN' if the experts are stored [E, in, out].",
    ),
    "KN": (
        "[E, H, 2I] or, not gated, [E, H, I]",
        "[E, I, H]",
        "Set weight_layout='NK' if the experts are stored [E, out, in].",
    ),
}


def _check_matrix(name: str, w: Experts, x: torch.Tensor, dtype: torch.dtype, weight_layout: str, shape: str) -> None:
    """Kind, type and device of the experts' matrices of one GEMM."""
    if isinstance(w, ExpertMatrix):
        if w.device != x.device:
            raise DeviceError(
                explain(
                    name,
                    got=f"an expert matrix on {w.device}",
                    wanted=f"{x.device}, where hidden_states lies",
                    do=f"Move it: {name}.to('{x.device}').",
                )
            )
        if weight_layout != "NK":
            raise OptionError(
                explain(
                    f"weight_layout of the quantised {name}",
                    got=repr(weight_layout),
                    wanted="'NK': an expert matrix is seen as [E, N, K] however it is stored",
                    do="Build it from transposed views of data, scale and zero points.",
                )
            )
        return
    _tensor(name, w, shape, 3, _FLOATS, x.device)
    if w.dtype != dtype:
        raise DTypeError(
            explain(
                name,
                got=w.dtype,
                wanted=f"{dtype}, the type of hidden_states",
                do=f"Cast hidden_states (under autocast they may be float32): hidden_states.to({w.dtype}).",
            )
        )


def _check_matrices(
    x: torch.Tensor, w13: Experts, w2: Experts, act: Activation, weight_layout: str, dtype: torch.dtype
) -> tuple[Experts, Experts, int]:
    """The expert matrices seen as [E, N, K], and I."""
    w13_shape, w2_shape, other_layout = _STORED[weight_layout]
    _check_matrix("w13", w13, x, dtype, weight_layout, w13_shape)
    _check_matrix("w2", w2, x, dtype, weight_layout, w2_shape)
    stored = tuple(w2.shape)
    if weight_layout == "KN" and isinstance(w13, torch.Tensor) and isinstance(w2, torch.Tensor):
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    n_experts, n_rows, n_inner = w13.shape
    n_hidden = x.shape[1]
    if not 1 <= n_experts <= MAX_EXPERTS:
        raise ShapeError(
            explain("w13", got=f"{n_experts} experts", wanted=f"1 to {MAX_EXPERTS}", do="Split the layer.")
        )
    if n_inner != n_hidden:
        wanted = f"{n_hidden}, the width of hidden_states"
        raise ShapeError(explain("w13", got=f"inner size {n_inner}", wanted=wanted, do=other_layout))
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
    sizes = (n_hidden, n_intermediate) if weight_layout == "NK" else (n_intermediate, n_hidden)
    advice = other_layout if w2.shape[0] == n_experts else "w13 and w2 must hold the same experts."
    _size("w2", stored, (n_experts, *sizes), w2_shape, advice)
    return w13, w2, n_intermediate


def _check_parts(name: str, w: Experts, *, two: bool) -> None:
    """What starts anew in the middle fits only a matrix of gate rows and then up rows."""
    if two or not isinstance(w, ExpertMatrix) or w.parts == 1:
        return
    if w.format.block[0] != 1 or w.tensor_scale is not None and w.tensor_scale.ndim == 2:
        raise OptionError(
            explain(
                f"parts of {name}",
                got="2: scales that start anew in the middle of the rows",
                wanted="1, but for a gated w13 with concatenated gate and up rows",
                do="Quantise it with parts=1.",
            )
        )


def _check_bias(name: str, bias: torch.Tensor | None, w: Experts, meaning: str) -> None:
    if bias is not None:
        _tensor(name, bias, meaning, 2, _FLOATS, w.device)
        _size(name, tuple(bias.shape), tuple(w.shape[:2]), meaning, "Give one row of biases to each expert.")


def _check_ids(x: torch.Tensor, topk_ids: torch.Tensor) -> None:
    _tensor("topk_ids", topk_ids, "[T, top_k]", 2, _INTEGERS, x.device)
    n_tokens, top_k = topk_ids.shape
    if n_tokens != x.shape[0]:
        wanted = f"{x.shape[0]}, one for each row of hidden_states"
        raise ShapeError(explain("topk_ids", got=f"{n_tokens} rows", wanted=wanted, do="Route the same tokens."))
    if not 1 <= top_k <= MAX_TOP_K:
        raise ShapeError(
            explain("topk_ids", got=f"top_k = {top_k}", wanted=f"1 to {MAX_TOP_K}", do="Check the router.")
        )
    if n_tokens * top_k > MAX_SLOTS:
        got, wanted = f"{n_tokens} tokens of {top_k} experts", f"at most {MAX_SLOTS} of both together"
        raise ShapeError(explain("topk_ids", got=got, wanted=wanted, do="Split the tokens into several calls."))


def _check_routing(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
    _check_ids(x, topk_ids)
    _tensor("topk_weights", topk_weights, "[T, top_k]", 2, _FLOATS, x.device)
    shapes = tuple(topk_weights.shape), tuple(topk_ids.shape)
    _size("topk_weights", *shapes, "the shape of topk_ids", "Pass both as the router returned them.")


def _no(got: object, count: int) -> bool:
    """It is not this number, or no number at all."""
    return not isinstance(got, int) or got != count


def _check_map(expert_map: torch.Tensor | None, global_num_experts: int | None, w13: Experts) -> None:
    if expert_map is None:
        if global_num_experts is not None and _no(global_num_experts, w13.shape[0]):
            raise OptionError(
                explain(
                    "global_num_experts",
                    got=global_num_experts,
                    wanted=f"{w13.shape[0]}, the experts in w13, when there is no expert_map",
                    do="Pass expert_map [E_global] with the local id or -1 of each expert.",
                )
            )
        return
    _tensor("expert_map", expert_map, "[E_global]", 1, _INTEGERS, w13.device)
    if not expert_map.is_contiguous():
        got, do = f"stride {expert_map.stride(0)}", "Call .contiguous() once, outside the forward pass."
        raise LayoutError(explain("expert_map", got=got, wanted="contiguous", do=do))
    if expert_map.shape[0] < 1:
        do = "Drop it when all experts are local."
        raise ShapeError(explain("expert_map", got="no entries", wanted="one per global expert", do=do))
    if global_num_experts is not None and _no(global_num_experts, expert_map.shape[0]):
        wanted = f"{expert_map.shape[0]}, the length of expert_map"
        raise OptionError(
            explain("global_num_experts", got=global_num_experts, wanted=wanted, do="Leave it out, or fix the map.")
        )


def _check_codes(x: torch.Tensor, scale: object, w13: Experts, dtype: torch.dtype | None) -> torch.Tensor:
    """Hidden states that are codes already: their scale [T or 1, groups], which the format of w13 must be made for."""
    inputs = w13.format.inputs if isinstance(w13, ExpertMatrix) else None
    if inputs is None:
        takes = "a w13 that takes rows as they are" if isinstance(w13, ExpertMatrix) else "a plain w13"
        raise OptionError(
            explain(
                "hidden_states_scale",
                got=f"a scale, and {takes}",
                wanted="a w13 whose scheme quantises its rows",
                do="Dequantise hidden_states, or leave hidden_states_scale out.",
            )
        )
    _tensor("hidden_states", x, "[T, H]", 2, (getattr(torch, ELEMENTS[inputs.element].dtype),), None)
    if dtype is not None and dtype not in _FLOATS:
        raise DTypeError(explain("dtype", got=dtype, wanted=_names(_FLOATS), do="It is the type of the output."))
    if not isinstance(scale, torch.Tensor) or scale.dim() not in (0, 1, 2):
        got = tuple(scale.shape) if isinstance(scale, torch.Tensor) else type(scale).__name__
        raise ShapeError(
            explain("hidden_states_scale", got=got, wanted="a tensor of at most 2 dimensions", do="See fused_experts.")
        )
    if scale.dim() < 2:
        scale = scale.reshape(-1, 1)
    _tensor("hidden_states_scale", scale, "[T, groups]", 2, (torch.float32,), x.device)
    n_tokens = x.shape[0]
    n_groups = -(-x.shape[1] // inputs.group) if inputs.mode == "group" else 1
    rows = (n_tokens,) if inputs.mode == "group" else (n_tokens, 1)
    if scale.shape[0] not in rows or scale.shape[1] != n_groups:
        raise ShapeError(
            explain(
                f"hidden_states_scale with inputs {inputs.mode!r}",
                got=tuple(scale.shape),
                wanted=" or ".join(str((r, n_groups)) for r in dict.fromkeys(rows)),
                do="Quantise the hidden states as the scheme of w13 says.",
            )
        )
    return scale


def _apart(tensor: torch.Tensor) -> bool:
    """No two elements share memory: every dimension steps over all that those with smaller steps reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def _check_out(out: torch.Tensor | None, x: torch.Tensor, dtype: torch.dtype) -> None:
    if out is None:
        return
    do = "Allocate torch.empty_like(hidden_states)."
    _tensor("out", out, "[T, H]", 2, (dtype,), x.device)
    _size("out", tuple(out.shape), tuple(x.shape), "the shape of hidden_states", do)
    shared = not x.is_meta and out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    if x.numel() and (shared or not _apart(out)):
        got = "memory that is shared with hidden_states or with itself"
        raise LayoutError(explain("out", got=got, wanted="memory of its own", do=do))


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor, and the first behind it."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size() if tensor.numel() else 0


def _check_workspace(workspace: torch.Tensor | None, **others: torch.Tensor | None) -> None:
    """No tensor of the call may lie in memory that the call scribbles on; what else it must be, its user says."""
    if isinstance(workspace, tuple):  # what fusedmoe.modular makes of its two, when it has checked them
        do = "Allocate torch.empty(fusedmoe.workspace_bytes(...), dtype=torch.uint8, device=...)."
        raise DTypeError(explain("workspace", got="tuple", wanted="one uint8 tensor", do=do))
    if not isinstance(workspace, torch.Tensor) or workspace.layout != torch.strided or workspace.is_meta:
        return
    start, stop = _span(workspace)
    for name, other in others.items():
        if other is not None and other.device == workspace.device and _span(other)[0] < stop > start < _span(other)[1]:
            got = f"memory that is shared with {name}"
            raise LayoutError(explain("workspace", got=got, wanted="memory of its own", do="Allocate it anew."))


def _check_uncoupled(**matrices: Experts | None) -> None:
    """A scale that is computed from all rows makes the bits of each depend on all."""
    for name, w in matrices.items():
        inputs = w.format.inputs if isinstance(w, ExpertMatrix) else None
        if inputs is not None and inputs.mode == "tensor":
            got = f"a {name} that quantises its rows with one dynamic scale for all of them"
            do = "Quantise rows per token or group or with a static scale, or leave batch_invariant out."
            raise OptionError(explain("batch_invariant", got=got, wanted="rows that share no scale", do=do))


def _check_lora(
    lora: LoRA, adapter_ids: torch.Tensor, x: torch.Tensor, w13: Experts, w2: Experts, dtype: torch.dtype, scale: object
) -> Adapters:
    """Adapters that fit the layer, and whose input is there."""
    if not isinstance(lora, LoRA):
        do = "Stack adapters with fusedmoe.LoRA.of."
        raise DTypeError(explain("lora", got=type(lora).__name__, wanted="a fusedmoe.LoRA", do=do))
    _tensor("adapter_ids", adapter_ids, "[T]", 1, _INTEGERS, x.device)
    do = "Give each token one, -1 where it has none."
    _size("adapter_ids", tuple(adapter_ids.shape), (x.shape[0],), "one for each row of hidden_states", do)
    _tensor("matrices of lora", lora.w13_a, "[slots, E, R, H]", 4, (dtype,), x.device)
    (n_experts, n_rows, n_hidden), n_intermediate = w13.shape, w2.shape[2]
    experts = {t.shape[1] for t in (lora.w13_a, lora.w13_b, lora.w2_a, lora.w2_b)} - {1}
    rows = lora.w13_b.shape[2] * (1 if lora.up_b is None else 2)
    got = (max(experts, default=n_experts), rows, lora.w13_a.shape[3], lora.w2_a.shape[3])
    wanted = (n_experts, n_rows, n_hidden, n_intermediate)
    _size("lora", got, wanted, "(E, rows of w13, H, I) of the layer", "Adapters must be of this layer and this shard.")
    if scale is not None:
        raise OptionError(
            explain(
                "lora with hidden_states_scale",
                got="hidden states that are codes",
                wanted="hidden states as they were before: adapters meet those",
                do="Leave quantising to the layer.",
            )
        )
    return Adapters(slots=lora.slots, rank=lora.max_rank, parts=lora.parts, steps=lora.finite and _by_steps(lora))


def _by_steps(lora: LoRA) -> bool:
    """16 bytes of B at a time have one adapter and one expert, and start at multiples of 16 bytes."""
    return lora.max_rank % 8 == 0 and all(
        b.element_size() == 2
        and b.stride(3) == 1
        and not any(b.stride(i) % 8 for i in range(3) if b.shape[i] > 1)
        and b.data_ptr() % 16 == 0
        for b in (lora.w13_b, lora.w13_b if lora.up_b is None else lora.up_b, lora.w2_b)
    )


def _check_no_gradient(**tensors: Experts | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, value in tensors.items():
        parts = value.tensors().values() if isinstance(value, ExpertMatrix) else (value,)
        if any(part is not None and part.requires_grad for part in parts):
            raise GradientError(
                explain(
                    f"{name} requires grad",
                    got="grad mode enabled",
                    wanted="inference: this layer computes no gradients",
                    do="Call it under torch.no_grad() or torch.inference_mode().",
                )
            )


def check(
    hidden_states: torch.Tensor,
    w13: Experts,
    w2: Experts,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    hidden_states_scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    emulate: bool = False,
    activation: str | Activation = "silu",
    gate_up_layout: str = "concatenated",
    weight_layout: str = "NK",
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    expert_map: torch.Tensor | None = None,
    global_num_experts: int | None = None,
    fp32_precision: str = "ieee",
    batch_invariant: bool | None = None,
    out: torch.Tensor | None = None,
    lora: LoRA | None = None,
    adapter_ids: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> Call:
    """Check every argument of :func:`fusedmoe.fused_experts`; raises what that function documents."""
    act = Activation.of(activation)
    _choice("gate_up_layout", gate_up_layout, GATE_UP_LAYOUTS)
    _choice("weight_layout", weight_layout, WEIGHT_LAYOUTS)
    _choice("fp32_precision", fp32_precision, FP32_PRECISIONS)
    codes_dtype = None
    if hidden_states_scale is None:
        _tensor("hidden_states", hidden_states, "[T, H]", 2, _FLOATS, None)
        if dtype is not None and dtype != hidden_states.dtype:
            raise OptionError(
                explain(
                    "dtype",
                    got=dtype,
                    wanted=f"{hidden_states.dtype}, the type of hidden_states",
                    do="Leave it out: it is for hidden states that are codes, which come with hidden_states_scale.",
                )
            )
        dtype = hidden_states.dtype
    else:
        hidden_states_scale = _check_codes(hidden_states, hidden_states_scale, w13, dtype)
        dtype = dtype or torch.bfloat16
        codes_dtype = str(hidden_states.dtype).removeprefix("torch.")
    w13, w2, n_intermediate = _check_matrices(hidden_states, w13, w2, act, weight_layout, dtype)
    _check_parts("w13", w13, two=act.gated and gate_up_layout == "concatenated")
    _check_parts("w2", w2, two=False)
    _check_bias("w13_bias", w13_bias, w13, "[E, rows of w13]")
    _check_bias("w2_bias", w2_bias, w2, "[E, H]")
    _check_routing(hidden_states, topk_weights, topk_ids)
    _check_map(expert_map, global_num_experts, w13)
    _check_out(out, hidden_states, dtype)
    _check_workspace(workspace, out=out, hidden_states=hidden_states, topk_weights=topk_weights, topk_ids=topk_ids)
    invariant = settings().batch_invariant if batch_invariant is None else _flag("batch_invariant", batch_invariant)
    if invariant:
        _check_uncoupled(w13=w13 if hidden_states_scale is None else None, w2=w2)
    _check_no_gradient(
        hidden_states=hidden_states,
        w13=w13,
        w2=w2,
        topk_weights=topk_weights,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        hidden_states_scale=hidden_states_scale,
    )
    adapters = None
    if lora is None or adapter_ids is None:
        lora = adapter_ids = None
    else:
        adapters = _check_lora(lora, adapter_ids, hidden_states, w13, w2, dtype, hidden_states_scale)
        if invariant:
            do = "Leave batch_invariant out where there are adapters."
            raise OptionError(explain("batch_invariant", got="adapters", wanted="a layer without", do=do))
        matrices = ("w13_a", "w13_b", "w2_a", "w2_b", "up_a", "up_b")
        _check_no_gradient(**{name: getattr(lora, name) for name in matrices})
    problem = Problem(
        tokens=hidden_states.shape[0],
        top_k=topk_ids.shape[1],
        experts=w13.shape[0],
        hidden=hidden_states.shape[1],
        intermediate=n_intermediate,
        dtype=str(dtype).removeprefix("torch."),
        activation=act,
        w13_format=w13.format if isinstance(w13, ExpertMatrix) else None,
        w2_format=w2.format if isinstance(w2, ExpertMatrix) else None,
        inputs_dtype=codes_dtype,
        emulate=_flag("emulate", emulate),
        rows_aligned=_aligned(hidden_states),
        gate_up="interleaved" if gate_up_layout == "interleaved" else "concatenated",
        w13=_matrix(w13),
        w2=_matrix(w2),
        w13_bias=w13_bias is not None,
        w2_bias=w2_bias is not None,
        weight_on_input=_flag("apply_router_weight_on_input", apply_router_weight_on_input),
        expert_map=expert_map is not None,
        known_experts=0 if expert_map is None else expert_map.shape[0],
        fp32_precision="tf32" if fp32_precision == "tf32" else "ieee",
        batch_invariant=invariant,
        adapters=adapters,
    )
    return Call(
        problem,
        hidden_states,
        w13,
        w2,
        topk_weights,
        topk_ids,
        w13_bias,
        w2_bias,
        expert_map,
        hidden_states_scale,
        out,
        workspace,
        lora,
        adapter_ids,
    )


def check_linear(
    hidden_states: torch.Tensor,
    w: Experts,
    topk_ids: torch.Tensor,
    *,
    emulate: bool = False,
    weight_layout: str = "NK",
    bias: torch.Tensor | None = None,
    fp32_precision: str = "ieee",
) -> Call:
    """Check every argument of :func:`fusedmoe.expert_linear`; raises what that function documents."""
    _choice("weight_layout", weight_layout, WEIGHT_LAYOUTS)
    _choice("fp32_precision", fp32_precision, FP32_PRECISIONS)
    _tensor("hidden_states", hidden_states, "[T, K]", 2, _FLOATS, None)
    dtype, stored = hidden_states.dtype, {"NK": "[E, N, K]", "KN": "[E, K, N]"}[weight_layout]
    _check_matrix("w", w, hidden_states, dtype, weight_layout, stored)
    if weight_layout == "KN" and isinstance(w, torch.Tensor):
        w = w.transpose(1, 2)
    n_experts, n_rows, n_inner = w.shape
    if not 1 <= n_experts <= MAX_EXPERTS or n_rows < 1 or n_inner < 1:
        wanted = f"{stored}, 1 to {MAX_EXPERTS} experts, N and K of at least 1"
        raise ShapeError(explain("w", got=f"[E, N, K] = {tuple(w.shape)}", wanted=wanted, do="Check the checkpoint."))
    if n_inner != hidden_states.shape[1]:
        wanted = f"{hidden_states.shape[1]}, the width of hidden_states"
        do = "Set weight_layout to the way the experts are stored."
        raise ShapeError(explain("w", got=f"inner size {n_inner}", wanted=wanted, do=do))
    _check_bias("bias", bias, w, "[E, N]")
    _check_ids(hidden_states, topk_ids)
    _check_no_gradient(hidden_states=hidden_states, w=w, bias=bias)
    problem = Problem(
        tokens=hidden_states.shape[0],
        top_k=topk_ids.shape[1],
        experts=n_experts,
        hidden=n_inner,
        intermediate=n_rows,
        dtype=str(dtype).removeprefix("torch."),
        activation=IDENTITY,
        w13_format=w.format if isinstance(w, ExpertMatrix) else None,
        emulate=bool(emulate),
        rows_aligned=_aligned(hidden_states),
        w13=_matrix(w),
        w13_bias=bias is not None,
        fp32_precision="tf32" if fp32_precision == "tf32" else "ieee",
        alone=True,
    )
    return Call(problem, hidden_states, w, None, None, topk_ids, bias, None, None, None, None, None)
