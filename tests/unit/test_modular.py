"""Mistakes in the three steps, and the modules they take."""

from __future__ import annotations

import pytest
import torch

import fusedmoe
import fusedmoe.modular
from fusedmoe.errors import DTypeError, LayoutError, OptionError, ShapeError, WorkspaceError
from fusedmoe.modular import Batched, Experts, Standard, run
from fusedmoe.plan.planner import choose

T, K, E, H, I = 6, 2, 4, 32, 24


def layer(**options):
    return Experts(torch.randn(E, 2 * I, H), torch.randn(E, H, I), **options)


SLOTS = fusedmoe.LoRA.empty(2, num_experts=E, hidden_size=H, intermediate_size=I, max_rank=4)


def batched(**replace):
    a = {"output": torch.empty(E, T, H), "hidden_states": torch.randn(E, T, H), "counts": torch.zeros(E).int()}
    return {**a, **replace}


#: what is wrong -> (arguments of apply, error, words of its message)
MISTAKES = {
    "neither ids nor counts": (
        {"output": torch.empty(T, H), "hidden_states": torch.randn(T, H)},
        OptionError,
        ["experts of the rows", "ids or counts"],
    ),
    "counts and ids": (
        batched(topk_ids=torch.zeros(T, K).int(), topk_weights=torch.rand(T, K)),
        OptionError,
        ["batched rows", "counts alone", "finalize"],
    ),
    "rows of other experts": (
        batched(hidden_states=torch.randn(E + 1, T, H)),
        ShapeError,
        ["batched rows", f"({E + 1}, {T}, {H})", f"[{E}, T_max, {H}]"],
    ),
    "counts of floats": (batched(counts=torch.zeros(E)), DTypeError, ["counts", "float32", "int32 or int64"]),
    "counts no tensor": (batched(counts=[1] * E), DTypeError, ["counts", "list"]),
    "counts of other experts": (batched(counts=torch.zeros(E + 1).int()), ShapeError, ["counts", f"({E + 1},)"]),
    "output of other rows": (
        batched(output=torch.empty(E, T + 1, H)),
        ShapeError,
        ["output", f"({E}, {T + 1}, {H})", f"({E}, {T}, {H})"],
    ),
    "one workspace": (
        batched(workspace13=torch.empty(9)),
        OptionError,
        ["workspaces", "both or none", "workspace_shapes"],
    ),
    "a workspace with steps": (
        batched(workspace13=torch.empty(9)[::2], workspace2=torch.empty(9)),
        WorkspaceError,
        ["workspace13", "contiguous"],
    ),
    "a workspace that negates": (
        batched(workspace13=torch._neg_view(torch.empty(9)), workspace2=torch.empty(9)),
        WorkspaceError,
        ["workspace13", "contiguous"],
    ),
    "adapters of other rows": (
        batched(lora=SLOTS, adapter_ids=torch.zeros(T, E).int()),
        ShapeError,
        ["adapter_ids of batched rows", f"({T}, {E})", f"({E}, {T}), [E, T_max]"],
    ),
    "the output is the input": (
        {
            "output": (x := torch.randn(T, H)),
            "hidden_states": x,
            "topk_weights": torch.rand(T, K),
            "topk_ids": torch.zeros(T, K).int(),
        },
        LayoutError,
        ["out", "shared with hidden_states"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(mistake):
    replace, error, words = MISTAKES[mistake]
    with pytest.raises(error) as raised:
        layer().apply(**replace)
    for word in [*words, "got", "wanted"]:
        assert word in str(raised.value)


def test_batched_rows_cannot_have_weights_on_the_input():
    arguments = torch.randn(T, H), torch.rand(T, 1), torch.zeros(T, 1).int()
    with pytest.raises(OptionError, match="batched rows: got router weights on the input"):
        run(Batched(T), layer(apply_router_weight_on_input=True), *arguments)


def test_more_tokens_than_rows_of_an_expert():
    with pytest.raises(ShapeError, match=f"hidden_states: got {T} tokens; wanted at most max_tokens = {T - 1}"):
        run(Batched(T - 1), layer(), torch.randn(T, H), torch.rand(T, K), torch.zeros(T, K).int())


def test_a_token_without_a_row_is_nan_and_no_other_is():
    ids = torch.tensor([[0, 1], [2, 2], [2, 3]])
    out = run(Batched(2), layer(), torch.randn(2, H), torch.rand(2, K), ids[:2])
    assert out.isfinite().all()
    out = run(Batched(3), layer(), torch.randn(3, H), torch.rand(3, K), torch.tensor([[0, 1], [2, 2], [2, 2]]))
    assert out.isnan().any(1).tolist() == [False, False, True]


@pytest.mark.parametrize("rows", [0, -3, 2.5])
def test_expected_rows_are_a_number(rows):
    with pytest.raises(OptionError, match="expected_rows: got .*wanted an integer from 1"):
        layer().apply(**batched(), expected_rows=rows)


def test_tiles_are_chosen_for_the_expected_rows(monkeypatch):
    seen = []
    monkeypatch.setattr(
        fusedmoe.modular, "choose", lambda problem, *rest: seen.append(problem) or choose(problem, *rest)
    )
    layer().apply(**batched(), expected_rows=2)
    layer().apply(**batched())
    layer().workspace_shapes(T, 1, torch.float32, batched=True, expected_rows=2)
    assert [problem.mean_rows for problem in seen[:3]] == [2, T, 2]


def test_codes_of_experts_that_take_rows_as_they_are():
    with pytest.raises(OptionError, match="codes: got a w13 that takes rows as they are"):
        layer().workspace_shapes(T, K, torch.float32, codes=True)


@pytest.mark.parametrize("weight_layout", ["NK", "KN"])
def test_a_module_gives_its_tensors(weight_layout):
    module = fusedmoe.FusedExperts(
        E, H, I, bias=True, weight_layout=weight_layout, activation="gelu", expert_map=torch.tensor([3, 2, 1, 0, -1])
    )
    experts = Experts.of(module)
    assert (experts.num_experts, experts.hidden_size, experts.inputs) == (E, H, None)
    assert experts.w13 is module.w13
    assert Experts.of(experts) is experts
    arguments = torch.randn(T, H), torch.rand(T, K), torch.randint(5, (T, K))
    with torch.no_grad():
        assert torch.equal(run(Standard(), experts, *arguments), module(*arguments))
        assert run(Batched(0), experts, *(a[:0] for a in arguments)).shape == (0, H)


def test_a_quantised_module_gives_its_matrices():
    matrices = [fusedmoe.quantize(torch.randn(E, H, H), "fp8_channel") for _ in range(2)]
    module = fusedmoe.FusedExperts.of(*matrices, activation="relu2_no_mul")
    arguments = torch.randn(T, H), torch.rand(T, K), torch.randint(E, (T, K))
    assert torch.equal(run(Standard(), Experts.of(module), *arguments), module(*arguments))
    assert Experts.of(module).workspace_shapes(T, K, torch.float32, codes=True).output == (T, H)


def test_experts_of_a_module_keep_what_it_was_made_with():
    layer = fusedmoe.FusedExperts(4, 64, 48, batch_invariant=True)
    assert Experts.of(layer).options["batch_invariant"] is True
