"""What tests under random arguments draw, and how often.

Hypothesis draws; it prints the seed with a failure, and FUSEDMOE_FUZZ_SEED repeats a run. FUSEDMOE_FUZZ_EXAMPLES
multiplies the number of examples.
"""

from __future__ import annotations

import contextlib
import os
import random

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import fusedmoe
from fusedmoe.errors import FusedMoEError
from fusedmoe.schemes import format_of

SEED = int(os.environ.get("FUSEDMOE_FUZZ_SEED") or random.SystemRandom().randrange(2**32))
TIMES = float(os.environ.get("FUSEDMOE_FUZZ_EXAMPLES", "1"))


def fuzz(examples: int):
    """A test over drawn arguments, each run with another seed."""

    def decorate(test):
        limits = hypothesis.settings(
            max_examples=max(1, int(3 * examples * TIMES)),
            deadline=60_000,  # milliseconds: no hang, on a busy machine either
            database=None,
            print_blob=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        return hypothesis.seed(SEED)(limits(test))

    return decorate


@contextlib.contextmanager
def explained():
    """Only errors of the library, with what, got, wanted and what to do."""
    try:
        with torch.no_grad():
            yield
    except FusedMoEError as error:
        if ": got " not in str(error) or "; wanted " not in str(error):
            pytest.fail(f"does not explain itself: {error}")


# --- values -----------------------------------------------------------------------------------------------------------

T, K, E, H, I = 5, 2, 3, 64, 32
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.int8, torch.uint8,
    torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e4m3fnuz,
)  # fmt: skip
#: What is no tensor, no number and no name.
JUNK = st.sampled_from([None, "", "cuda", 3, -7, 0, 2**70, 1.5, float("nan"), [], [1], (), {}, object(), True, b"x"])


@st.composite
def tensors(draw):
    """A tensor of any shape, type, strides, device and layout."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 16, 32, 64]), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    tensor = torch.ones(shape, dtype=torch.float32).to(dtype)
    how = draw(st.sampled_from(["plain", "plain", "meta", "expanded", "sparse", "transposed", "negated", "grad"]))
    if how == "meta":
        return tensor.to("meta")
    if how == "expanded" and shape and shape[0]:
        return tensor[:1].expand(max(1, shape[0]), *shape[1:])
    if how == "transposed" and len(shape) > 1:
        return tensor.transpose(-1, -2)
    if how == "sparse" and dtype in (torch.float32, torch.int64):
        return tensor.to_sparse()
    if how == "negated":
        return torch.ones(shape, dtype=torch.complex64).conj().imag
    if how == "grad" and dtype.is_floating_point and tensor.element_size() > 1:
        return tensor.requires_grad_()
    return tensor


ANYTHING = st.one_of(tensors(), JUNK)
SCHEMES = st.one_of(st.sampled_from(tuple(fusedmoe.SCHEMES)), JUNK)
NUMBERS = st.one_of(st.integers(-3, 200), st.floats(), JUNK)
NAMES = {
    "activation": st.one_of(st.sampled_from(["silu", "gelu", "situ", "relu2_no_mul", "swigluoai"]), JUNK),
    "gate_up_layout": st.one_of(st.sampled_from(["concatenated", "interleaved"]), JUNK),
    "weight_layout": st.one_of(st.sampled_from(["NK", "KN"]), JUNK),
    "fp32_precision": st.one_of(st.sampled_from(["ieee", "tf32"]), JUNK),
    "backend": st.one_of(st.sampled_from(["auto", "torch", "triton", "gluon_sm90"]), JUNK),
    "apply_router_weight_on_input": st.one_of(st.booleans(), JUNK),
    "emulate": st.one_of(st.booleans(), JUNK),
    "batch_invariant": st.one_of(st.booleans(), JUNK),
    "workspace_limit": NUMBERS,
    "global_num_experts": NUMBERS,
    "dtype": st.one_of(st.sampled_from(DTYPES), JUNK),
}
POSITIONS = ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")
OPTIONAL = ("w13_bias", "w2_bias", "expert_map", "hidden_states_scale", "out", "workspace")


def layer(scheme=None):
    """Arguments that fit."""
    w13, w2 = torch.randn(E, 2 * I, H) / 8, torch.randn(E, H, I) / 6
    if scheme is not None:
        form = format_of(scheme, group=32) if 32 in fusedmoe.SCHEMES[scheme].groups else format_of(scheme)
        w13, w2 = fusedmoe.quantize(w13, form), fusedmoe.quantize(w2, form)
    return {
        "hidden_states": torch.randn(T, H),
        "w13": w13,
        "w2": w2,
        "topk_weights": torch.rand(T, K),
        "topk_ids": torch.randint(E, (T, K)),
    }
