"""The torch backend: any device, one matrix product per expert that has rows.

It reads the number of rows of each expert on the host. On a GPU that is a synchronisation, and a call cannot be
captured in a CUDA graph; it is the default where there is no GPU, and elsewhere a second opinion.

Rounding: products accumulate in float32 and are stored in the dtype of the layer; bias, router weight and
activation are float32, the activated rows are stored in the dtype of the layer; the sum over the slots of a token
is float32 and rounded once. A row depends on its own token alone, so a NaN stays where it is.

A quantised matrix is dequantised one expert at a time: to the dtype of the layer where it meets rows as they are. Where
rows are quantised too, codes times scales of both are multiplied in float32, which rounds no more than a product of
the codes that is scaled afterwards would; activated rows are then quantised before they are rounded to anything.

A batch-invariant call multiplies and activates row by row: libraries choose by the number of rows how to add up, and
functions of several elements at once leave the last ones of a tensor to others that round differently.

What adapters add is computed in float32, one product per pair of adapter and expert that has rows, and added to their
rows alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fusedmoe.backends.workspace import Layout, Workspace
from fusedmoe.call import Call
from fusedmoe.errors import UnsupportedError, explain
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.numerics import input_scale, quantise_inputs, spread_input_scale
from fusedmoe.plan.config import Plan
from fusedmoe.reference.activations import activate
from fusedmoe.spec.layout import Fp32Precision, GateUpLayout
from fusedmoe.spec.problem import Problem

#: Elements of a float32 temporary. Fits the cache of a core, and bounds the memory needed beside the rows.
PIECE = 1 << 18
#: Held while the precision of float32 products is another one than the process asked for.
_PRECISION = threading.Lock()


class _Schedule(NamedTuple):
    """R live slots in groups of one expert each; a group keeps the order of its slots."""

    experts: list[int]  #      expert of each group
    counts: list[int]  #       rows of each group
    slot: Tensor  #            [R] slot of a row
    expert: Tensor  #          [R] expert of a row
    row: Tensor  #             [S] row of a slot; some row where the slot is absent
    absent: Tensor | None  #   [S, 1] slots without a row; None when there are none


def workspace_layout(problem: Problem, plan: Plan) -> Layout:
    """Nothing: the number of rows is known when the ids are, and torch's allocator keeps what it needs."""
    return {}


def route(call: Call, plan: Plan, work: Workspace) -> _Schedule:
    """Sort the live slots by expert.

    Raises:
        UnsupportedError: the current CUDA stream is being captured.
    """
    if call.hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            explain(
                "backend 'torch' in a CUDA graph",
                got="a stream that is being captured",
                wanted="no capture: it reads the number of rows of each expert on the host",
                do="Capture with backend='triton', or call outside of the capture.",
            )
        )
    n_experts = call.problem.experts
    local = _local_experts(call)
    if call.problem.tokens == 1 and max(experts := local.tolist()) < n_experts:
        # Nothing to gain from sorting the slots of one token, and without it a decode step is shorter.
        slot = torch.arange(len(experts), device=local.device)
        return _Schedule(experts, [1] * len(experts), slot, local, slot, None)
    expert, slot = local.sort(stable=True)
    groups = torch.unique_consecutive(expert, return_counts=True)
    experts, counts = torch.stack(groups).tolist()  # one transfer for both
    row = slot.argsort()
    if not experts or experts[-1] < n_experts:
        return _Schedule(experts, counts, slot, expert, row, None)
    n_rows = slot.numel() - counts[-1]
    absent = (local == n_experts).unsqueeze(1)
    return _Schedule(experts[:-1], counts[:-1], slot[:n_rows], expert[:n_rows], row.clamp(max=n_rows - 1), absent)


def gate_up(call: Call, plan: Plan, schedule: _Schedule, work: Workspace) -> Tensor:
    """Activated rows [R, I]; float32 where they are about to be quantised. Alone, each row goes to its slot of out."""
    problem, x = call.problem, _inputs(call, schedule)
    x = x.expand(schedule.slot.numel(), -1) if problem.tokens == 1 else x[schedule.slot // problem.top_k]
    products = _multiply(x, call.w13, schedule, problem)
    wide = _wide(products.dtype)
    dtype = wide if _quantises_rows(call.w2) else getattr(torch, problem.dtype)
    hidden = products.new_empty(products.shape[0], problem.intermediate, dtype=dtype)
    deltas = _deltas(call, schedule, call.hidden_states, of_tokens=True)
    for piece in _pieces(products.shape[0], PIECE if problem.batch_invariant else problem.w13_rows):
        h = products[piece].to(wide)
        if deltas is not None:
            h = _added(h, deltas, piece)
        if problem.weight_on_input:
            assert call.topk_weights is not None, "a whole layer has router weights"
            h = h * call.topk_weights.reshape(-1, 1)[schedule.slot[piece]].to(wide)
        if call.w13_bias is not None:
            h = h + call.w13_bias[schedule.expert[piece]].to(wide)
        hidden[piece] = activate(h, problem.activation, problem.gate_up)
    if problem.alone:
        assert call.out is not None, "made with the call"
        call.out[schedule.slot] = hidden
    return hidden


def down(call: Call, plan: Plan, schedule: _Schedule, hidden: Tensor, work: Workspace) -> Tensor:
    """Products [R, H]. Bias and router weight wait for :func:`combine`, which has the rows in cache."""
    assert call.w2 is not None, "a whole layer has a second matrix"
    rows = _multiply(_dequantised(hidden, call.w2), call.w2, schedule, call.problem)
    if (deltas := _deltas(call, schedule, hidden, of_tokens=False)) is not None:
        rows = _added(rows.to(_wide(rows.dtype)), deltas, slice(0, rows.shape[0]))
    return rows.to(getattr(torch, call.problem.dtype))


def combine(call: Call, plan: Plan, schedule: _Schedule, rows: Tensor, work: Workspace, out: Tensor) -> None:
    """Add the bias, weigh, and sum the slots of a token in their order."""
    problem = call.problem
    if rows.shape[0] == 0:
        out.zero_()
        return
    wide = _wide(rows.dtype)
    weights = None
    if not problem.weight_on_input:
        assert call.topk_weights is not None, "a whole layer has router weights"
        weights = call.topk_weights.to(wide).reshape(-1, 1)
    for tokens in _pieces(problem.tokens, problem.top_k * problem.hidden):
        slots = slice(tokens.start * problem.top_k, tokens.stop * problem.top_k)
        row = schedule.row[slots]
        y = rows.index_select(0, row).to(wide)
        if call.w2_bias is not None:
            y = y + call.w2_bias[schedule.expert[row]].to(wide)
        if weights is not None:
            y = y * weights[slots]
        if schedule.absent is not None:
            y = y.masked_fill(schedule.absent[slots], 0.0)
        y = y.view(-1, problem.top_k, problem.hidden)
        total = torch.zeros_like(y[:, 0])
        for y_j in y.unbind(1):
            total += y_j  # torch.sum adds in an order of its own
        out[tokens] = total


class _Deltas(NamedTuple):
    """What adapters add to some rows."""

    row: Tensor  #    [D] ascending
    value: Tensor  #  [D, N] float32 at least


def _added(h: Tensor, deltas: _Deltas, piece: slice) -> Tensor:
    """Rows ``piece`` with what is added to some of them; the others keep their bits."""
    mine = (deltas.row >= piece.start) & (deltas.row < piece.stop)
    return h.index_put((deltas.row[mine] - piece.start,), h[deltas.row[mine] - piece.start] + deltas.value[mine])


def _deltas(call: Call, schedule: _Schedule, x: Tensor, *, of_tokens: bool) -> _Deltas | None:
    """``scaling B A x`` of the rows that have an adapter, for w13 (rows ``of_tokens``) or w2; None without adapters."""
    lora, ids = call.lora, call.adapter_ids
    if lora is None or ids is None:
        return None
    interleaved = call.problem.gate_up == "interleaved"
    a, b = lora.w13(interleaved=interleaved) if of_tokens else (lora.w2_a, lora.w2_b)
    token = schedule.slot // call.problem.top_k
    held = lora.rank if lora.adapter_enabled is None else lora.rank * (lora.adapter_enabled != 0)
    adapter = _within(ids.long(), lora.slots)[token]
    row = torch.nonzero(functional.pad(held, (0, 1))[adapter] > 0).flatten()
    pair = adapter[row] * call.problem.experts + schedule.expert[row]
    wide = _wide(x.dtype)
    value = x.new_empty(row.numel(), b.shape[2], dtype=wide)
    up = _up_columns(b.shape[2], call.problem.gate_up) if of_tokens and lora.parts == 2 else None
    ranks = lora.rank.tolist()
    with _float32_products("ieee", x):
        for number in pair.unique().tolist():
            slot, expert = divmod(number, call.problem.experts)
            mine = torch.nonzero(pair == number).flatten()
            rows = x[token[row[mine]]] if of_tokens else x[row[mine]]
            left = a[slot, expert % a.shape[1]].unflatten(0, (-1, lora.max_rank))[:, : ranks[slot]].to(wide)
            right = b[slot, expert % b.shape[1], :, : ranks[slot]].to(wide).T
            shrunk = _product(rows.to(wide), left.flatten(0, 1).T).mul_(lora.scaling[slot])
            shrunk = shrunk.unflatten(1, (-1, ranks[slot]))
            found = _product(shrunk[:, 0], right)
            if up is not None:
                found[:, up] = _product(shrunk[:, 1], right[:, up])
            value[mine] = found
    return _Deltas(row, value)


def _up_columns(n_columns: int, gate_up: GateUpLayout) -> slice:
    return slice(1, None, 2) if gate_up == "interleaved" else slice(n_columns // 2, None)


def _local_experts(call: Call) -> Tensor:
    """Local expert of each slot [S] int64; E where there is none."""
    ids = _within(call.topk_ids.reshape(-1).long(), call.n_global)
    if call.expert_map is None:
        return ids
    return _within(functional.pad(call.expert_map.long(), (0, 1), value=-1)[ids], call.problem.experts)


def _within(ids: Tensor, count: int) -> Tensor:
    """Ids as they are in [0, count), and ``count`` for all others."""
    return ids.clamp(-1, count).remainder(count + 1)


def _pieces(n_rows: int, width: int) -> Iterator[slice]:
    """Runs of rows of ``width`` that together are about PIECE elements."""
    step = max(1, PIECE // width)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def _quantises_rows(w: Tensor | ExpertMatrix | None) -> bool:
    return isinstance(w, ExpertMatrix) and w.format.inputs is not None


def _inputs(call: Call, schedule: _Schedule) -> Tensor:
    """Rows [T, H] as w13 meets them."""
    problem, x = call.problem, call.hidden_states
    if call.hidden_states_scale is not None:
        assert problem.w13_format is not None and problem.w13_format.inputs is not None, "checked with the codes"
        scale = spread_input_scale(call.hidden_states_scale, problem.w13_format.inputs, problem.hidden)
        return x.to(torch.float32) * scale
    if not _quantises_rows(call.w13):
        return x
    live = torch.zeros(problem.tokens, dtype=torch.bool, device=x.device)
    live[schedule.slot // problem.top_k] = True
    return _dequantised(x, call.w13, live)


def _dequantised(x: Tensor, w: Tensor | ExpertMatrix, live: Tensor | None = None) -> Tensor:
    """Rows [R, K] as ``w`` meets them: as they are, or codes times scales in float32 at least."""
    if not isinstance(w, ExpertMatrix) or w.format.inputs is None:
        return x
    inputs, static = w.format.inputs, w.input_scale
    if inputs.mode == "tensor":
        static = input_scale(x, inputs, live)
    out = torch.empty_like(x, dtype=_wide(x.dtype), memory_format=torch.contiguous_format)
    for piece in _pieces(*x.shape):
        codes, scale = quantise_inputs(x[piece], inputs, static)
        out[piece] = codes * spread_input_scale(scale, inputs, x.shape[1])
    return out


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in their own type: written in place (``out=``), which autocast leaves alone as it does the kernels of
    other backends.
    """
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


def _multiply(x: Tensor, w: Tensor | ExpertMatrix, schedule: _Schedule, problem: Problem) -> Tensor:
    """``x[r] @ w[expert[r]].T`` [R, N], in the dtype of x.

    Measured on a CPU with AMX and AVX512-FP16, 1 to 512 rows: conversion to float32 first took 0.8 to 6.6 times as long
    in bfloat16 and 1.1 to 2.4 times in float16.
    """
    out = x.new_empty(x.shape[0], w.shape[1])
    if not x.is_cuda and x.element_size() == 2 and x.shape[1] % 32:
        # oneDNN multiplies 32 columns at a time on AMX, and may read past the end of a row, times 0: a NaN in the next
        # row, or in memory that is nobody's, was then this row's (bfloat16, K = 33, 257, 1025; torch 2.13).
        x = _room(x, x.shape[0]).copy_(x)
    alone = _room(x, 1)
    # split_with_sizes and one transpose for all: what the loop does per expert is a good part of a decode step.
    x_rows, out_rows = x.split_with_sizes(schedule.counts), out.split_with_sizes(schedule.counts)
    if isinstance(w, Tensor):
        w = w.transpose(1, 2)
    # tf32 would round what scales have multiplied; codes alone it would hold exactly.
    precision = "ieee" if _quantises_rows(w) else problem.fp32_precision
    with _float32_products(precision, x) if x.dtype == torch.float32 else contextlib.nullcontext():
        for expert, x_e, out_e in zip(schedule.experts, x_rows, out_rows, strict=True):
            w_e = w[expert] if isinstance(w, Tensor) else w.dequantize_expert(expert, x.dtype).T
            if not problem.batch_invariant:
                torch.mm(x_e, w_e, out=out_e)  # in place for the reason of _product too
                continue
            for row in range(x_e.shape[0]):  # from one place, as the address may decide too
                alone.copy_(x_e[row])
                out_e[row] = _product(alone, w_e)[0]
    return out


def _room(x: Tensor, n_rows: int) -> Tensor:
    """Memory for rows like those of x, each with zeros behind it up to a multiple of 32 columns."""
    return x.new_zeros(n_rows, -(-x.shape[1] // 32) * 32)[:, : x.shape[1]]


@contextlib.contextmanager
def _float32_products(precision: Fp32Precision, x: Tensor) -> Iterator[None]:
    """Multiply float32 as the problem says, whatever ``torch.set_float32_matmul_precision`` says."""
    backends = torch.backends
    library = backends.cuda.matmul if x.is_cuda else backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _PRECISION:  # is the process's: a thread that restored it would change it for another one
        before = library.fp32_precision
        library.fp32_precision = precision
        try:
            yield
        finally:
            library.fp32_precision = before


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
