"""Transformers' experts through the Triton kernels, in Triton's interpreter."""

from __future__ import annotations

import pytest
from tiny_models import build, relative, run

from fusedmoe.integrations.transformers import NAME, interface
from fusedmoe.plan.planner import SUPPORTS
from fusedmoe.settings import settings

if not settings().interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

# Rows of a tile that are not live hold whatever lies in memory; numpy remarks on its NaNs and overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(autouse=True)
def _no_other_backend(monkeypatch):
    monkeypatch.delitem(SUPPORTS, "torch")


@pytest.mark.parametrize(
    "name",
    [
        "mixtral.MixtralExperts",
        "gpt_oss.GptOssExperts",  # interleaved, transposed, biased
        "openai_privacy_filter.OpenAIPrivacyFilterExperts",  # transposed, biased
        "nemotron_h.NemotronHExperts",  # not gated
        "deepseek_v4.DeepseekV4Experts",  # clamped
        "gemma4.Gemma4TextExperts",  # gelu_tanh
    ],
)
def test_logits(name):
    model = build(name)
    assert relative(run(model, NAME), run(model, "eager")) < 1e-5


def test_between_two_products(monkeypatch):
    model = build("mixtral.MixtralExperts")
    monkeypatch.setattr(interface, "gate_of", lambda experts: None)
    assert relative(run(model, NAME), run(model, "eager")) < 1e-5
