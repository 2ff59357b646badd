"""What the warp-specialised kernels of Hopper are tested with, for tests of several files."""

from __future__ import annotations

import pytest
import torch

from fusedmoe.testing.cases import OPTIONS

needed = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
#: Options that these kernels take; what they do not, the planner refuses, which tests without a GPU show.
TAKEN = {**OPTIONS, "dtype": ("float16", "bfloat16"), "weight_layout": ("NK",), "pad": (0, 8)}
#: (tokens, top_k, experts, hidden, intermediate): halves of tiles without rows, columns past the last
SHAPES = [
    (300, 8, 128, 256, 192),
    (129, 2, 3, 96, 2880),
    (513, 4, 16, 1040, 320),
    (2048, 8, 64, 512, 768),
    (5000, 2, 8, 512, 384),
    (2100, 2, 8, 128, 4096),  # rows are copied into sorted order first
]
#: One short step.
SHORT = (1, 1, 1, 32, 16)
