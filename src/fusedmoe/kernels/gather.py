"""Copy each sorted row's token next to its neighbours: ``out[row] = x[slot[row] // top_k]``.

Worth its traffic (S H elements read and written) when the gate-up GEMM then loads its left operand by
tensor map, which cannot gather on sm_90. Grid: (S, blocks of H). Rows past the live ones are not written.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather(
    ids, schedule, x_ptr, x_stride_t, x_stride_h, out_ptr, out_stride_row,
    WAIT: tl.constexpr, RELEASE: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    WAIT()
    RELEASE()
    row = tl.program_id(0)
    if row < tl.load(schedule.offset + E):
        h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        token = (tl.load(schedule.slot + row) // ids.top_k).to(tl.int64)
        value = tl.load(x_ptr + token * x_stride_t + h.to(tl.int64) * x_stride_h, mask=h < H)
        tl.store(out_ptr + row.to(tl.int64) * out_stride_row + h, value, mask=h < H)
