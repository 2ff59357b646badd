"""expert_linear through the Triton kernels: with and without a schedule, absent experts, bias, storage, formats."""

from __future__ import annotations

import pytest
import torch

import fusedmoe
from fusedmoe.settings import settings

if not settings().interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

# Rows of a tile that are not live hold whatever lies in memory; numpy remarks on its NaNs and overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.mark.parametrize("tokens", [1, 5, 60], ids=["single", "few", "schedule"])
@pytest.mark.parametrize(
    ("scheme", "layout"), [(None, "NK"), (None, "KN"), ("fp8_w8a16", "NK"), ("fp8_channel", "NK"), ("int4_w4a16", "NK")]
)
def test_rows(tokens, scheme, layout):
    n_experts, top_k, n, k = 4, 3, 40, 64
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, k, generator=g)
    w, bias = torch.randn(n_experts, n, k, generator=g) / 8, torch.randn(n_experts, n, generator=g)
    ids = torch.randint(-1, n_experts + 1, (tokens, top_k), generator=g)
    w = w if scheme is None else fusedmoe.quantize(w, scheme, **({"group": 32} if scheme == "int4_w4a16" else {}))
    stored = w.transpose(1, 2).contiguous() if layout == "KN" else w
    out = fusedmoe.expert_linear(x, stored, ids, bias=bias, weight_layout=layout, backend="triton")
    # The torch backend is held against a float64 loop in the unit tests.
    want = fusedmoe.expert_linear(x, w, ids, bias=bias, backend="torch")
    assert out.shape == (tokens, top_k, n)
    torch.testing.assert_close(out, want, atol=2e-5, rtol=2e-5)
    assert (out[(ids < 0) | (ids >= n_experts)] == 0).all()
