"""How a launch meets its neighbours on the stream: policies WAIT and RELEASE of the kernels.

With programmatic dependent launch (sm_90+) the next launch may start once every program of this one has
released it, and must wait before it touches anything that this one, or an earlier launch of the layer, writes.
Rule: every kernel waits before it releases. So when a launch starts, all but its direct predecessor are done. The
exceptions release first; what follows them reads nothing of theirs, nor of what they wait for, before it has waited.
"""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  Triton looks for it in every module of device code
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def nothing():
    """The stream orders the launches."""


@triton.jit
def wait():
    """Block until the previous launch is complete and its writes are visible."""
    gdc_wait()


@triton.jit
def release():
    """Let the next launch start."""
    gdc_launch_dependents()


@triton.jit
def release_and_wait():
    """Let the next launch start, which needs nothing of the one before this, then wait for that."""
    gdc_launch_dependents()
    gdc_wait()
