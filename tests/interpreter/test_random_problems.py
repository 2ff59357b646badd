"""The fuzz of random problems in Triton's interpreter: for a bounded time, with a seed that is printed."""

from __future__ import annotations

import os
import random

import pytest
import torch

from fusedmoe.settings import settings
from fusedmoe.testing.fuzz import fuzz

if not settings().interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

# Rows of a tile that are not live hold whatever lies in memory; numpy remarks on its NaNs and overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def test_random_problems():
    seed = int(os.environ.get("FUSEDMOE_FUZZ_SEED") or random.SystemRandom().randrange(2**32))
    wrong = [outcome for outcome in fuzz(30, seed, torch.device("cpu"), small=True) if not outcome.ok]
    assert not wrong, (seed, wrong)
