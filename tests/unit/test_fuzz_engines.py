"""The entries for engines and many ranks under random arguments, as tests/unit/test_fuzz.py does the rest."""

from __future__ import annotations

import pytest
import torch

import fusedmoe
from fusedmoe.modular import Experts
from fusedmoe.parallel import Placement, intermediate_slice

hypothesis = pytest.importorskip("hypothesis")
from fuzzing import ANYTHING, DTYPES, JUNK, NAMES, NUMBERS, E, H, I, K, T, explained, fuzz, layer  # noqa: E402

st = hypothesis.strategies


@fuzz(200)
@hypothesis.given(st.data())
def test_expert_linear(data):
    inputs = layer(data.draw(st.sampled_from([None, None, "fp8_channel", "mxfp4"])))
    arguments = {"hidden_states": inputs["hidden_states"], "w": inputs["w13"], "topk_ids": inputs["topk_ids"]}
    options = {name: NAMES[name] for name in ("weight_layout", "emulate", "fp32_precision", "backend")}
    options |= {**dict.fromkeys(arguments, ANYTHING), "bias": ANYTHING}
    for name in data.draw(st.sets(st.sampled_from(sorted(options)), max_size=2)):
        arguments[name] = data.draw(options[name])
    with explained():
        out = fusedmoe.expert_linear(**arguments)
        assert out.shape[:-1] == arguments["topk_ids"].shape


@fuzz(200)
@hypothesis.given(st.data())
def test_modular_experts(data):
    inputs = layer(data.draw(st.sampled_from([None, None, "fp8_channel"])))
    held = {"w13": inputs.pop("w13"), "w2": inputs.pop("w2")}
    held |= {name: data.draw(NAMES[name]) for name in data.draw(st.sets(st.sampled_from(sorted(NAMES)), max_size=1))}
    held.pop("dtype", None), held.pop("global_num_experts", None)
    call = {"output": torch.empty(T, H), **inputs}
    options = (*call, "workspace13", "workspace2", "hidden_states_scale", "counts", "expert_map")
    changes = dict.fromkeys(options, ANYTHING) | {"expected_rows": NUMBERS}
    for name in data.draw(st.sets(st.sampled_from(sorted(changes)), max_size=2)):
        call[name] = data.draw(changes[name])
    with explained():
        assert Experts(**held).apply(**call) is call["output"]


@fuzz(100)
@hypothesis.given(st.data())
def test_workspace_shapes(data):
    arguments = {"tokens": T, "top_k": K, "dtype": torch.float32}
    changes = {
        **dict.fromkeys(("tokens", "top_k", "global_num_experts", "expected_rows"), NUMBERS),
        "dtype": st.one_of(st.sampled_from(DTYPES), JUNK),
    }
    for name in data.draw(st.sets(st.sampled_from(sorted(changes)), max_size=2)):
        arguments[name] = data.draw(changes[name])
    inputs = layer()
    with explained():
        shapes = Experts(inputs["w13"], inputs["w2"]).workspace_shapes(**arguments)
        assert shapes.output == (arguments["tokens"], H)


@fuzz(200)
@hypothesis.given(st.data())
def test_placements(data):
    numbers = st.one_of(st.integers(-1, 6), JUNK)
    with explained():
        kind = data.draw(st.sampled_from(["contiguous", "counts", "table"]))
        if kind == "contiguous":
            placement = Placement.contiguous(data.draw(numbers), data.draw(numbers))
        elif kind == "counts":
            placement = Placement.of_counts(data.draw(st.one_of(st.lists(numbers, max_size=4), JUNK)))
        else:
            rank = st.one_of(st.lists(numbers, max_size=4), JUNK)
            placement = Placement(data.draw(st.one_of(st.lists(rank, max_size=3), JUNK)))
        assert sorted({e for rank in placement.experts for e in rank}) == list(range(placement.num_experts))


@fuzz(100)
@hypothesis.given(st.data())
def test_intermediate_slice(data):
    inputs = layer(data.draw(st.sampled_from([None, "fp8_channel"])))
    start, stop = (data.draw(st.one_of(st.integers(-3, I + 3), JUNK)) for _ in range(2))
    with explained():
        part = intermediate_slice(Experts(inputs["w13"], inputs["w2"]), start, stop)
        assert part.w2.shape == (E, H, stop - start)
