"""The layer under a cap on its workspace: chunks over tokens, with the bits of the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fusedmoe
from fusedmoe import experts
from fusedmoe.checks import check
from fusedmoe.errors import OptionError, UnsupportedError, WorkspaceError
from fusedmoe.plan.planner import choose
from fusedmoe.schemes import format_of
from fusedmoe.settings import settings
from fusedmoe.target import target_of
from fusedmoe.testing.cases import Case

if not settings().interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

CPU = torch.device("cpu")
#: tokens, top_k, experts, hidden, intermediate
SHAPE = (31, 3, 5, 48, 32)
CASES = [
    Case.of(SHAPE, ids="invalid", bias=True, pad=3),
    Case.of(SHAPE, dtype="bfloat16", mapped=True, on_input=True),
    Case.of((13, 3, 5, 48, 32), ids="uniform"),  # few slots: no schedule
    Case.of((34, 2, 4, 64, 64), formats=(format_of("fp8_channel"),) * 2, dtype="bfloat16", codes=True),
    Case.of((34, 2, 4, 64, 64), formats=(format_of("int8_w8a8", block=(32, 32)),) * 2, dtype="float16"),
    Case.of((34, 2, 4, 64, 64), formats=(format_of("fp8_channel", inputs="static"),) * 2, codes=True),
]


def whole_and_plan(arguments, options):
    call = check(*arguments, **options)
    plan = choose(call.problem, target_of(CPU), "triton")
    return call.problem, plan, experts.bytes_for(call.problem, plan)


@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("share", [2, 4])
def test_chunks_have_the_bits_of_the_whole(index, share):
    arguments, options = CASES[index].draw(seed=index)
    problem, plan, need = whole_and_plan(arguments, options)
    limit = need // share
    chunk = experts.tokens_at_a_time(problem, plan, limit)
    assert 0 < chunk < problem.tokens
    want = fusedmoe.fused_experts(*arguments, backend="triton", **options)
    size = fusedmoe.workspace_bytes(*arguments, backend="triton", workspace_limit=limit, **options)
    assert size <= limit
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8) if share == 2 else None
    out = torch.full_like(want, float("nan"))
    got = fusedmoe.fused_experts(
        *arguments, backend="triton", workspace=workspace, workspace_limit=limit, out=out, **options
    )
    assert got is out
    assert torch.equal(got, want)


def test_no_more_is_allocated_than_the_limit(monkeypatch):
    arguments, options = CASES[0].draw()
    _, _, need = whole_and_plan(arguments, options)
    sizes, empty = [], torch.empty

    def watched(*size, **how):
        tensor = empty(*size, **how)
        sizes.append(tensor.nbytes if tensor.dtype == torch.uint8 else 0)
        return tensor

    monkeypatch.setattr(torch, "empty", watched)
    out = torch.zeros_like(arguments[0])
    fusedmoe.fused_experts(*arguments, out=out, backend="triton", workspace_limit=need // 3, **options)
    assert 0 < sum(sizes) <= need // 3


def test_the_setting_bounds_calls_that_say_nothing(monkeypatch):
    arguments, options = CASES[0].draw()
    problem, plan, need = whole_and_plan(arguments, options)
    want = fusedmoe.fused_experts(*arguments, backend="triton", **options)
    with monkeypatch.context() as patch:
        patch.setenv("FUSEDMOE_WORKSPACE_LIMIT", str(need // 2))
        settings.cache_clear()
        assert experts.tokens_at_a_time(problem, plan) < problem.tokens
        assert experts.tokens_at_a_time(problem, plan, need) == problem.tokens, "a call's own limit comes first"
        assert fusedmoe.workspace_bytes(*arguments, backend="triton", **options) == need // 2
        assert torch.equal(fusedmoe.fused_experts(*arguments, backend="triton", **options), want)
    settings.cache_clear()


def test_a_compiled_call_takes_the_limit():
    (x, w13, w2, weights, ids), _ = Case.of(SHAPE).draw()
    _, _, need = whole_and_plan((x, w13, w2, weights, ids), {})

    def layer(x, limit):
        return fusedmoe.fused_experts(x, w13, w2, weights, ids, backend="triton", workspace_limit=limit)

    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, need // 2), layer(x, None))
        with pytest.raises(WorkspaceError, match="workspace_limit: got 64 bytes"):
            compiled(x, 64)


def test_chunks_are_even_and_come_from_shapes():
    first, plan, _ = whole_and_plan(*CASES[0].draw())
    second, _, _ = whole_and_plan(*CASES[0].draw(seed=5))
    problem, other = replace(first, tokens=1003), replace(second, tokens=1003)
    need = experts.bytes_for(problem, plan)
    for share in (2, 3, 5, 11):
        chunk = experts.tokens_at_a_time(problem, plan, need // share)
        assert experts.tokens_at_a_time(other, plan, need // share) == chunk
        n_chunks = -(-problem.tokens // chunk)
        assert (n_chunks - 1) * chunk < problem.tokens
        assert chunk == -(-problem.tokens // n_chunks)


def test_a_limit_below_one_token_says_what_one_needs():
    arguments, options = CASES[0].draw()
    _, plan, _ = whole_and_plan(arguments, options)
    one = experts.bytes_for(check(*(a[:1] if i in (0, 3, 4) else a for i, a in enumerate(arguments))).problem, plan)
    with pytest.raises(WorkspaceError, match=r"workspace_limit: got 100 bytes; wanted at least \d+ bytes.*Raise") as e:
        fusedmoe.fused_experts(*arguments, backend="triton", workspace_limit=100, **options)
    assert f"at least {one} bytes" in str(e.value)
    with pytest.raises(WorkspaceError, match="workspace_limit"):
        fusedmoe.workspace_bytes(*arguments, backend="triton", workspace_limit=100, **options)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "1G"])
def test_a_limit_is_a_positive_integer(limit):
    arguments, options = CASES[0].draw()
    with pytest.raises(OptionError, match="workspace_limit: got .*wanted bytes, an integer above 0"):
        fusedmoe.fused_experts(*arguments, backend="triton", workspace_limit=limit, **options)


def test_one_scale_for_all_rows_cannot_be_chunked():
    case = Case.of((34, 2, 4, 64, 64), formats=(format_of("fp8_channel", inputs="tensor"),) * 2, dtype="bfloat16")
    arguments, options = case.draw()
    _, _, need = whole_and_plan(arguments, options)
    with pytest.raises(UnsupportedError, match="one scale for all rows.*inputs='token'"):
        fusedmoe.fused_experts(*arguments, backend="triton", workspace_limit=need // 2, **options)
    fusedmoe.fused_experts(*arguments, backend="triton", workspace_limit=need, **options)


def test_the_torch_backend_has_no_workspace_to_bound():
    arguments, options = CASES[0].draw()
    want = fusedmoe.fused_experts(*arguments, backend="torch", **options)
    assert torch.equal(fusedmoe.fused_experts(*arguments, backend="torch", workspace_limit=1, **options), want)
