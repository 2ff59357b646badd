"""The torch backend against the reference, step by step as ``fusedmoe.experts.run`` calls it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional

from fusedmoe import reference
from fusedmoe.backends import torch as backend
from fusedmoe.backends.workspace import Workspace
from fusedmoe.call import Call
from fusedmoe.checks import check as checked
from fusedmoe.errors import UnsupportedError
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.plan.config import Plan
from fusedmoe.quantization import quantize
from fusedmoe.schemes import SCHEMES, format_of, formats_of
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.problem import Problem
from fusedmoe.testing.cases import ACTIVATIONS
from fusedmoe.testing.verify import tolerance

PLAN = Plan(backend="torch")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(
    tokens=17, top_k=3, experts=7, hidden=48, inner=40, dtype=torch.float32, *,
    activation="silu", gate_up="concatenated", kn=False, bias=False, on_input=False,
    ids=None, expert_map=None, precision="ieee", seed=0,
) -> Call:  # fmt: skip
    """A call whose output is of order one: weights have variance 1 / fan-in."""
    p = Activation.of(activation)
    g = torch.Generator().manual_seed(seed)
    rows = inner * (2 if p.gated else 1)

    def draw(*shape, fan_in=1.0):
        return (torch.randn(*shape, generator=g) / math.sqrt(fan_in)).to(dtype)

    def matrix(n, k):
        return draw(experts, k, n, fan_in=k).transpose(1, 2) if kn else draw(experts, n, k, fan_in=k)

    n_global = experts if expert_map is None else len(expert_map)
    if ids is None:
        ids = torch.rand(tokens, n_global, generator=g).argsort(1)[:, :top_k]
    problem = Problem(
        tokens=tokens, top_k=top_k, experts=experts, hidden=hidden, intermediate=inner,
        dtype=str(dtype).removeprefix("torch."), activation=p, gate_up=gate_up, w13_bias=bias, w2_bias=bias,
        weight_on_input=on_input, expert_map=expert_map is not None, fp32_precision=precision,
    )  # fmt: skip
    return Call(
        problem=problem,
        hidden_states=draw(tokens, hidden),
        w13=matrix(rows, hidden),
        w2=matrix(hidden, inner),
        topk_weights=torch.rand(tokens, top_k, generator=g) + 0.2,
        topk_ids=ids,
        w13_bias=draw(experts, rows) if bias else None,
        w2_bias=draw(experts, hidden) if bias else None,
        expert_map=None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32),
        hidden_states_scale=None,
        out=None,
        workspace=None,
    )


def run(call: Call) -> torch.Tensor:
    problem = call.problem
    out = torch.full(call.hidden_states.shape, math.nan, dtype=getattr(torch, problem.dtype))
    work = Workspace(backend.workspace_layout(problem, PLAN), out.device)
    schedule = backend.route(call, PLAN, work)
    hidden = backend.gate_up(call, PLAN, schedule, work)
    rows = backend.down(call, PLAN, schedule, hidden, work)
    backend.combine(call, PLAN, schedule, rows, work, out)
    return out


def exact(call: Call) -> torch.Tensor:
    p = call.problem
    return reference.fused_experts(
        call.hidden_states, call.w13, call.w2, call.topk_weights, call.topk_ids,
        hidden_states_scale=call.hidden_states_scale, activation=p.activation, gate_up_layout=p.gate_up,
        w13_bias=call.w13_bias, w2_bias=call.w2_bias,
        apply_router_weight_on_input=p.weight_on_input, expert_map=call.expert_map,
    )  # fmt: skip


def plain(call: Call) -> torch.Tensor:
    """What anyone would write in the dtype of the layer: a loop over slots, each operation rounded."""
    p, dtype = call.problem, call.hidden_states.dtype
    out = torch.zeros_like(call.hidden_states)
    for t, j in torch.cartesian_prod(torch.arange(p.tokens), torch.arange(p.top_k)).tolist():
        e = int(call.topk_ids[t, j])
        if 0 <= e < call.n_global and call.expert_map is not None:
            e = int(call.expert_map[e])
        elif e >= call.n_global:
            e = -1
        if not 0 <= e < p.experts:
            continue
        weight = call.topk_weights[t, j].to(dtype)
        h = functional.linear(call.hidden_states[t : t + 1], call.w13[e])
        h = h * weight if p.weight_on_input else h
        h = h + call.w13_bias[e] if call.w13_bias is not None else h
        y = functional.linear(reference.activate(h, p.activation, p.gate_up), call.w2[e])
        y = y + call.w2_bias[e] if call.w2_bias is not None else y
        out[t] += (y if p.weight_on_input else y * weight)[0]
    return out


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def good(got: torch.Tensor, call: Call) -> bool:
    wanted = exact(call)
    return bool(got.isfinite().all()) and error(got, wanted) <= 2 * error(plain(call), wanted) + 1e-6


def check(call: Call) -> None:
    got, wanted = run(call), exact(call)
    assert got.dtype == call.hidden_states.dtype
    assert good(got, call), f"error {error(got, wanted):.2e}, plain torch {error(plain(call), wanted):.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "gate_up"),
    [
        (Activation("silu"), "concatenated"),
        (Activation("silu", limit=0.7), "interleaved"),
        (Activation("gelu_tanh"), "concatenated"),
        (Activation("swigluoai"), "interleaved"),
        (Activation("situ", beta=2.0), "concatenated"),
        (Activation("relu2_no_mul"), "concatenated"),
    ],
    ids=str,
)
def test_options(activation, gate_up, bias, on_input, dtype):
    check(make(activation=activation, gate_up=gate_up, bias=bias, on_input=on_input, dtype=dtype, kn=bias))


SHAPES = {
    "one of each": (1, 1, 1, 1, 1),
    "one token": (1, 4, 8, 32, 16),
    "odd sizes": (5, 2, 3, 33, 7),
    "one expert": (9, 1, 1, 16, 24),
    "every expert": (6, 5, 5, 20, 12),
    "64 experts per token": (3, 64, 64, 16, 8),
    "4096 experts": (4, 8, 4096, 4, 4),
    "more rows than a piece": (140, 2, 4, 24, 24),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, dtype, monkeypatch):
    monkeypatch.setattr(backend, "PIECE", 1000)
    check(make(*shape, dtype=dtype, bias=True))


def test_no_tokens():
    call = make(tokens=0, top_k=2, ids=torch.empty(0, 2, dtype=torch.int64))
    assert run(call).shape == (0, 48)


STRANGE = [-1, -7, 7, 8, 2**31 - 1, -(2**31)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("id_dtype", "strange"), [(torch.int32, STRANGE), (torch.int64, [*STRANGE, 2**63 - 1, -(2**63)])]
)
@pytest.mark.parametrize("expert_map", [None, [6, -1, 0, 9, 3, -(2**31)]])
@pytest.mark.parametrize("tokens", [1, 18])
def test_absent_experts_add_exactly_zero(tokens, expert_map, id_dtype, strange, dtype):
    """Their router weights are NaN, too; token 0 has no expert at all, and gets +0."""
    pool = torch.tensor([*strange, 0, 2, 4], dtype=torch.int64)
    ids = pool[torch.randint(0, len(pool), (tokens, 3), generator=torch.Generator().manual_seed(5))]
    ids[0] = torch.tensor(strange[:3])
    call = make(tokens=tokens, ids=ids.to(id_dtype), dtype=dtype, bias=True, expert_map=expert_map)
    n_global = 7 if expert_map is None else 6
    known = (ids >= 0) & (ids < n_global)
    call.topk_weights[~known] = math.nan
    got = run(call)
    assert got[0].tolist() == [0.0] * 48
    assert not torch.signbit(got[0]).any()
    if tokens > 1:
        assert good(got, call)


@pytest.mark.parametrize("tokens", [1, 6])
def test_all_absent(tokens):
    got = run(make(tokens=tokens, ids=torch.full((tokens, 3), -1), bias=True))
    assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("tokens", [1, 11])
def test_duplicates_and_one_expert_for_all(tokens):
    check(make(tokens=tokens, ids=torch.full((tokens, 3), 4)))


def test_nan_stays_in_its_row():
    call = make(dtype=torch.bfloat16)
    clean = run(call)
    call.hidden_states[5] = math.nan
    got = run(call)
    assert got[5].isnan().all()
    rest = torch.arange(17) != 5
    assert torch.equal(got[rest], clean[rest])


@pytest.mark.parametrize("tokens", [1, 9])
def test_any_strides(tokens):
    call = make(tokens=tokens, dtype=torch.float32, bias=True)

    def spread(t: torch.Tensor) -> torch.Tensor:
        return torch.full((*t.shape, 2), math.nan).to(t.dtype)[..., 0].copy_(t)

    spreadable = ("hidden_states", "w13", "w2", "topk_weights", "w13_bias", "w2_bias")
    strided = call._replace(
        **{name: spread(getattr(call, name)) for name in spreadable},
        topk_ids=torch.stack([call.topk_ids, call.topk_ids + 1], -1)[..., 0],
    )
    assert not strided.w13.is_contiguous()
    check(strided)


def test_same_bits_twice_and_inputs_untouched():
    call = make(dtype=torch.bfloat16, bias=True)
    before = [t.clone() for t in call[1:8] if isinstance(t, torch.Tensor)]
    assert torch.equal(run(call), run(call))
    assert all(torch.equal(a, b) for a, b in zip(before, [t for t in call[1:8] if t is not None], strict=True))


def test_order_inside_a_token_is_slot_order():
    """float32 sums of very different sizes: only one order gives these bits."""
    call = make(tokens=4, top_k=7)
    call.topk_weights.copy_(torch.tensor([1e7, 1.0, -1e7, 3e3, 1e-3, -3e3, 0.5]).expand(4, 7))
    schedule = backend.route(call, PLAN, None)
    rows = backend.down(call, PLAN, schedule, backend.gate_up(call, PLAN, schedule, None), None)
    rows = (rows[schedule.row] * call.topk_weights.reshape(-1, 1)).view(4, 7, 48)
    wanted = torch.zeros(4, 48)
    for j in range(7):
        wanted += rows[:, j]
    assert torch.equal(run(call), wanted)


def test_rows_are_sorted_by_expert_stable_in_the_slot():
    call = make(ids=torch.tensor([[5, 0, 5], [-1, 0, 6], [9, 5, -7]]), tokens=3)
    schedule = backend.route(call, PLAN, None)
    assert schedule.experts == [0, 5, 6]
    assert schedule.counts == [2, 3, 1]
    assert schedule.slot.tolist() == [1, 4, 0, 2, 7, 5]
    present = ~schedule.absent.flatten()
    assert schedule.slot[schedule.row[present]].tolist() == [0, 1, 2, 4, 5, 7]


def test_float32_is_float32_whatever_the_global_says():
    call = make(hidden=256, inner=256)
    wanted = run(call)
    torch.set_float32_matmul_precision("medium")
    try:
        got = run(call)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(got, wanted)
    assert error(got, exact(call)) < 2e-6


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_autocast_changes_nothing(batch_invariant):
    call = make()
    call = call._replace(problem=dataclasses.replace(call.problem, batch_invariant=batch_invariant))
    wanted = run(call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(call)
    assert torch.equal(got, wanted)


def test_float64():
    call = make(dtype=torch.float64)
    assert error(run(call), exact(call)) < 1e-14


def test_capture_is_refused(monkeypatch):
    class Captured(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call = make()
    call = call._replace(hidden_states=call.hidden_states.as_subclass(Captured))
    with pytest.raises(UnsupportedError, match=r"captured; wanted .*host.*triton"):
        backend.route(call, PLAN, None)


def last_block_dropped(call: Call) -> Call:
    w2 = call.w2.clone()
    w2[:, :, -8:] = 0
    return call._replace(w2=w2)


FAULTS = {
    "zeros": lambda call: torch.zeros_like(call.hidden_states),
    "gate and up swapped": lambda call: run(call._replace(w13=call.w13.roll(call.problem.intermediate, 1))),
    "interleaved taken for concatenated": lambda call: run(
        call._replace(problem=dataclasses.replace(call.problem, gate_up="interleaved"))
    ),
    "weight squared": lambda call: run(call._replace(topk_weights=call.topk_weights.square())),
    "weight forgotten": lambda call: run(call._replace(topk_weights=torch.ones_like(call.topk_weights))),
    "expert off by one": lambda call: run(call._replace(topk_ids=(call.topk_ids + 1) % 7)),
    "one slot dropped": lambda call: run(call._replace(topk_ids=call.topk_ids.index_fill(1, torch.tensor([2]), -1))),
    "last block of K dropped": lambda call: run(last_block_dropped(call)),
    "bias forgotten": lambda call: run(call._replace(w2_bias=None)),
    "one token wrong": lambda call: run(call).index_fill(0, torch.tensor(3), 9.0),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_rejects_faults(dtype, fault):
    call = make(dtype=dtype, bias=True)
    assert 0.1 < float(exact(call).square().mean().sqrt()) < 10, "outputs are of order one"
    assert good(run(call), call)
    assert not good(fault(call).to(dtype), call)


# --- quantised ----------------------------------------------------------------------------------------------------

#: Blocks that divide neither the rows nor the columns.
FORMATS = [form for scheme in SCHEMES for form in formats_of(scheme, block=(24, 48))]
#: One format for each way to quantise rows.
MODES = list({(f.inputs.element, f.inputs.mode): f for f in reversed(FORMATS) if f.inputs}.values())
IDS = torch.tensor([[0, 1], [2, 0], [1, -1], [9, 4], [2, 2], [0, 3], [-7, 5], [1, 0], [2, 1]])


def quantised(
    form13, form2, dtype=torch.float32, *, turn=0, activation=None, ids=IDS, seed=0, spread=1.0, hidden=128, inner=128,
    **options,
) -> Call:  # fmt: skip
    """A checked call of 3 experts with options that change from turn to turn; None leaves a matrix as it is.

    ``spread``: ratio of the weights of one expert to those of the next.
    """
    p = activation or ACTIVATIONS[turn % len(ACTIVATIONS)]
    gate_up = "interleaved" if turn & 1 else "concatenated"
    g = torch.Generator().manual_seed(seed + turn)
    factor = spread ** torch.arange(3.0)[:, None, None]

    def matrix(form, n, k, static, parts=1):
        w = torch.randn(3, n, k, generator=g) / math.sqrt(k) * factor
        if form is None:
            return w.to(dtype)
        has_static = form.inputs is not None and form.inputs.mode == "static"
        return quantize(w, form, parts=parts, input_scale=static if has_static else None)

    rows = inner * (2 if p.gated else 1)
    options = {
        "hidden_states": torch.randn(len(ids), hidden, generator=g).to(dtype),
        "w13": matrix(form13, rows, hidden, 0.02, parts=2 if p.gated and gate_up == "concatenated" else 1),
        "w2": matrix(form2, hidden, inner, 0.01),
        "topk_weights": torch.rand(ids.shape, generator=g) + 0.2,
        "topk_ids": ids,
        "activation": p,
        "gate_up_layout": gate_up,
        "w13_bias": torch.randn(3, rows, generator=g).to(dtype) if turn & 2 else None,
        "w2_bias": torch.randn(3, hidden, generator=g) if turn & 2 else None,
        "apply_router_weight_on_input": bool(turn & 4),
        "expert_map": torch.tensor([1, 0, 2, -1, 3]) if turn & 8 else None,
        "emulate": bool(turn & 16),
        **options,
    }
    return checked(**options, dtype=dtype)


def off(got: torch.Tensor, call: Call) -> torch.Tensor:
    """Error of each token, relative to it, or to a typical one where it is small."""
    wanted = exact(call)
    size = wanted.norm(dim=1)
    return (got.double() - wanted).norm(dim=1) / size.clamp(min=float(size.square().mean().sqrt()) + 1e-30)


def sharp(got: torch.Tensor, call: Call) -> bool:
    """No more than the rounding of an unquantised layer, but where an activated value lies so near the middle between
    two codes that the reference, in float64, takes the other: one in 10^5 or so, hence two tokens at most, off by a
    code. Holds where weights are not rounded to a type below float32.
    """
    error = off(got, call)
    wrong = error > tolerance(got.dtype)
    return bool(error.isfinite().all()) and int(wrong.sum()) <= 2 and float(error.max()) < 0.3


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_every_format_in_float32(form):
    call = quantised(form, form, turn=FORMATS.index(form))
    got = run(call)
    assert sharp(got, call), off(got, call)
    assert float(exact(call).norm()) > 1e-2


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_every_format_in_half_precision(form):
    turn = FORMATS.index(form)
    call = quantised(form, form, (torch.float16, torch.bfloat16)[turn // 2 % 2], turn=turn)
    got = run(call)
    assert got.dtype == call.hidden_states.dtype
    assert sharp(got, call) if form.inputs else error(got, exact(call)) <= tolerance(got.dtype, form, form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schemes", [(None, "fp8_block"), ("int8_w8a8", None), ("mxfp4_fp8", "int4_w4a16")])
@pytest.mark.parametrize("turn", [0, 7, 13])
def test_each_matrix_has_a_format_of_its_own(turn, schemes, dtype):
    forms = [None if s is None else format_of(s) for s in schemes]
    call = quantised(*forms, dtype, turn=turn)
    got = run(call)
    assert got.dtype == dtype
    assert sharp(got, call) if dtype == torch.float32 else error(got, exact(call)) <= tolerance(dtype, *forms)


@pytest.mark.parametrize("form", MODES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (40, 2)])
def test_numbers_of_tokens(shape, form, monkeypatch):
    monkeypatch.setattr(backend, "PIECE", 500)
    ids = torch.randint(-1, 4, shape, generator=torch.Generator().manual_seed(2))
    call = quantised(form, form, ids=ids, turn=2)
    assert sharp(run(call), call)


@pytest.mark.parametrize("form", MODES, ids=str)
def test_no_rows(form):
    for ids in (torch.full((3, 2), -1), torch.empty(0, 2, dtype=torch.int64)):
        got = run(quantised(form, form, ids=ids, turn=2))
        assert got.shape == (len(ids), 128) and not got.any()


@pytest.mark.parametrize("form", [format_of(scheme) for scheme in SCHEMES], ids=str)
def test_an_expert_has_its_own_scales(form):
    """Weights, hence scales, differ tenfold between experts; each token has one expert, and is looked at alone."""
    ids = torch.tensor([[0], [1], [2], [1], [0], [2]])
    call = quantised(form, form, ids=ids, spread=10.0, activation=Activation("relu2_no_mul"))
    wanted = exact(call)
    error = (run(call).double() - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert int((error > 1e-6).sum()) <= 1 and float(error.max()) < 0.3
    assert float(wanted[2].norm()) > 100 * float(wanted[0].norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [f for f in MODES if f.inputs.mode != "static"], ids=str)
def test_hidden_states_may_be_codes(form, dtype):
    g = torch.Generator().manual_seed(4)
    code_type = quantize(torch.ones(1, 128, 128), form).data.dtype if form.per_byte == 1 else torch.float8_e4m3fn
    codes = torch.randint(-90, 90, (len(IDS), 128), generator=g).to(code_type)
    groups = 3 if form.inputs.mode == "group" else 1
    for rows in {len(IDS), len(IDS) if groups > 1 else 1}:
        scale = (torch.rand(rows, groups, generator=g) + 0.5) / 50
        call = quantised(form, form, dtype, hidden_states=codes, hidden_states_scale=scale)
        got = run(call)
        assert got.dtype == dtype
        assert sharp(got, call) if dtype == torch.float32 else error(got, exact(call)) <= tolerance(dtype, form, form)


@pytest.mark.parametrize("form", MODES, ids=str)
def test_tokens_do_not_meet(form):
    """NaN fills its token and no other; nought gives nought; a token without experts may hold anything."""
    call = quantised(form, form)
    call.hidden_states[1] = 0.0
    clean = run(call)
    assert not clean[1].any()
    call.hidden_states[8] = math.nan
    call.hidden_states[6] = 1e30
    call.hidden_states[3] = math.inf
    got = run(call)
    assert got[8].isnan().all()
    rest = [0, 1, 2, 3, 4, 5, 6, 7]
    if form.inputs.mode != "tensor":
        assert torch.equal(got[rest], clean[rest])
    else:  # The largest may have been in the row that is NaN now.
        assert sharp(got[rest], call._replace(**rows_of(call, rest)))


def rows_of(call: Call, rows: list[int]) -> dict:
    return {name: getattr(call, name)[rows] for name in ("hidden_states", "topk_weights", "topk_ids")}


def test_one_expert_is_dequantised_at_a_time_and_only_those_with_rows(monkeypatch):
    call = quantised(format_of("mxfp4"), format_of("fp8_block"), ids=torch.tensor([[0, 2], [2, -1], [2, 0]]))
    seen = []
    original = ExpertMatrix.dequantize_expert

    def spy(self, expert, dtype=torch.float32):
        seen.append((self.format.scheme, expert))
        return original(self, expert, dtype)

    monkeypatch.setattr(ExpertMatrix, "dequantize_expert", spy)
    monkeypatch.setattr(ExpertMatrix, "dequantize", None)
    run(call)
    assert seen == [("mxfp4", 0), ("mxfp4", 2), ("fp8_block", 0), ("fp8_block", 2)]


@pytest.mark.parametrize("form", [format_of(scheme) for scheme in SCHEMES], ids=str)
def test_quantised_calls_of_any_strides(form):
    call = quantised(form, form, turn=3)

    def spread(t: torch.Tensor) -> torch.Tensor:
        if t.dim() < 3:
            return t
        if form.per_byte == 2:
            return torch.cat([t, t], 2)[:, :, : t.shape[2]]
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    strided = call._replace(w13=call.w13.map(spread), w2=call.w2.map(spread))
    assert not strided.w2.data.is_contiguous()
    assert sharp(run(strided), call)


@pytest.mark.parametrize(("scheme", "used"), [("fp8_block", "ieee"), ("int8_w8a16", "tf32")])
def test_tf32_is_for_weights_that_are_decoded(scheme, used, monkeypatch):
    """Where rows are quantised it would round what scales have multiplied."""
    seen = []
    original = backend._float32_products
    monkeypatch.setattr(backend, "_float32_products", lambda *a: seen.append(a[0]) or original(*a))
    run(quantised(format_of(scheme), format_of(scheme), fp32_precision="tf32"))
    assert seen == [used, used]


@pytest.mark.parametrize("form", [format_of("fp8_block"), format_of("int8_w8a16")], ids=str)
def test_quantised_products_are_float32_whatever_the_process_says(form):
    call = quantised(form, form)
    wanted = run(call)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = run(call)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(got, wanted)


def changed(call: Call, **changes) -> Call:
    """With other tensors in w13."""
    tensors = call.w13.tensors() | changes
    return call._replace(w13=ExpertMatrix(call.w13.format, **tensors, parts=call.w13.parts))


def unquantised_rows(call: Call, name: str) -> Call:
    w = getattr(call, name)
    return call._replace(**{name: quantize(w.dequantize(), dataclasses.replace(w.format, inputs=None))})


QUANTISED_FAULTS = {
    "scales of another expert": ("fp8_tensor", lambda c: changed(c, scale=c.w13.scale.roll(1, 0))),
    "scales of another row": ("int8_w8a8", lambda c: changed(c, scale=c.w13.scale.roll(1, 1))),
    "scales of another group": ("mxfp4", lambda c: changed(c, scale=c.w13.scale.roll(1, 2))),
    "nibbles swapped": ("int4_w4a16", lambda c: changed(c, data=(c.w13.data << 4) | (c.w13.data >> 4))),
    "codes one off": ("int8_w8a8", lambda c: changed(c, data=c.w13.data.clamp(max=126) + 1)),
    "scale of scales forgotten": ("nvfp4", lambda c: changed(c, tensor_scale=torch.ones(3))),
    "the first quantisation forgotten": ("fp8_channel", lambda c: unquantised_rows(c, "w13")),
    "the second quantisation forgotten": ("fp8_channel", lambda c: unquantised_rows(c, "w2")),
    "a group for a token": (
        "fp8_block",
        lambda c: c._replace(w13=quantize(c.w13.dequantize(), format_of("fp8_block", block=(128, 64)))),
    ),
}


@pytest.mark.parametrize(("scheme", "fault"), QUANTISED_FAULTS.values(), ids=QUANTISED_FAULTS)
def test_the_bounds_reject_faults_of_scales(scheme, fault):
    call = quantised(format_of(scheme), format_of(scheme), turn=2)
    assert sharp(run(call), call)
    assert not sharp(run(fault(call)), call)
