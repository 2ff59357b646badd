"""Scales and zero points of a step, policy LOAD_SCALES ``f(w, expert, n, n0, inside, k0, PART, K, BLOCK_K) -> s, z``,
and the policy FINISH, which applies what waited for the end of the sum.

Both are float32. Steps past the last get the last one's, so that they can be loaded ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedmoe.kernels.decode import e4m3, power_of_two


@triton.jit
def _value(raw, KIND: tl.constexpr):
    if KIND == "e8m0":
        return power_of_two(raw)
    elif KIND == "e4m3":
        return e4m3(raw, 0.0)
    elif KIND == "e2m1 pair":
        # A byte of e8m0 as a pair of bfloat16, by which e2m1 is multiplied where it belongs there: 2^(raw - 127), times
        # 2^126, the difference of the biases. Less 2^32, which ``finish`` gives back: there is room for scales of up to
        # 2^33, and larger ones are infinite.
        return tl.minimum(raw.to(tl.uint32) + (126 - 32), 255) * 0x00800080
    else:
        return raw.to(tl.float32)


@triton.jit
def _block(s, expert, row, group):
    """Address of the scale in a row and column of scales."""
    base = s.ptr + expert.to(tl.int64) * s.stride_e * s.unit
    return base + row.to(tl.int64) * s.stride_n * s.unit + group.to(tl.int64) * s.stride_k


@triton.jit
def _of_columns(s, expert, n, n0, inside, group, PART: tl.constexpr):
    """Scales of columns n in one group of K: [BLOCK_N], or a scalar where they share it."""
    if s.block_n == 0:
        return _value(tl.load(_block(s, expert, expert * 0 + PART * s.up, group)), s.kind)
    elif s.uniform:
        return _value(tl.load(_block(s, expert, PART * s.up + (n0 + PART * s.phase) // s.block_n, group)), s.kind)
    else:
        row = PART * s.up + (n + PART * s.phase) // s.block_n
        return _value(tl.load(_block(s, expert, row, group), mask=inside, other=0), s.kind)


@triton.jit
def _zero_point(z, expert, n, inside, group, PART: tl.constexpr):
    row = n + PART * z.up
    address = z.ptr + expert.to(tl.int64) * z.stride_e + (row // z.per_byte).to(tl.int64) * z.stride_n
    byte = tl.load(address + group.to(tl.int64) * z.stride_k, mask=inside, other=0)
    if z.per_byte == 2:
        byte = (byte >> ((row % 2) * 4).to(tl.uint8)) & 15
    return byte.to(tl.float32)


# --- of a step -----------------------------------------------------------------------------------------


@triton.jit
def none(w, expert, n, n0, inside, k0, PART: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Nothing: the step needs none."""
    return 0.0, 0.0


@triton.jit
def zeros_alone(w, expert, n, n0, inside, k0, PART: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Zero points of whole rows."""
    return 0.0, _zero_point(w.zero, expert, n, inside, k0 * 0, PART)


@triton.jit
def of_step(w, expert, n, n0, inside, k0, PART: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The step lies in one group of K."""
    group = tl.minimum(k0, K - 1) // w.scale.block_k
    s = _of_columns(w.scale, expert, n, n0, inside, group, PART)
    if w.zero is None:
        return s, 0.0
    else:
        return s, _zero_point(w.zero, expert, n, inside, group, PART)


@triton.jit
def of_groups(w, expert, n, n0, inside, k0, PART: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, groups of the step], when rows have scales of their own.

    A step within one group has it twice: Triton would move the scale of each word of a single column through shared
    memory.
    """
    there = inside[:, None]
    if w.scale.block_k <= BLOCK_K // 4:
        index = tl.arange(0, BLOCK_K // w.scale.block_k)[None, :]
        group, there = groups_of_step(k0, index, there, w.scale.block_k, K, BLOCK_K)
    else:
        # Seen side by side, as below, Triton would take the layout of two, and move decoded weights through memory.
        group = (k0 + BLOCK_K // 2 * tl.arange(0, 2)) // w.scale.block_k
        group = tl.minimum(group, (K - 1) // w.scale.block_k)[None, :]
    s = of_places(w, expert, n[:, None], there, group, PART)
    if w.zero is None:
        return s, 0.0
    else:
        return s, _zero_point(w.zero, expert, n[:, None], there, group, PART)


@triton.jit
def groups_of_step(k0, index, there, GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Groups of the step at k0, ``index`` [1, number of groups] of them, and which of ``there`` [.., 1] have them.

    Those of a row lie side by side, and are loaded together: one by one a load would have 32 rows, a line of the cache
    each.
    """
    GROUPS: tl.constexpr = max(BLOCK_K // GROUP, 1)
    if GROUPS == 1:
        return tl.minimum(k0, K - 1) // GROUP + index, there
    first = tl.multiple_of(tl.minimum(k0, (K - 1) // BLOCK_K * BLOCK_K) // GROUP, GROUPS)
    if K % BLOCK_K != 0:
        there = there & (first + index < (K - 1) // GROUP + 1)  # a number of which Triton may see a divisor
    return first + index, there


@triton.jit
def of_places(w, expert, n, there, group, PART: tl.constexpr):
    """Scales, each row its own, of columns n [.., 1] in groups [1, ..]."""
    row = n + PART * (w.scale.up + w.scale.phase)
    return _value(tl.load(_block(w.scale, expert, row, group), mask=there, other=0), w.scale.kind)


# --- of CHUNK columns of K each, from k0 on, which lie in one group; of several experts [J] at once --------


@triton.jit
def _groups(k0, GROUP: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    return (tl.minimum(k0 + CHUNK * tl.arange(0, CHUNKS), K - 1) // GROUP)[None, None, :]


@triton.jit
def of_chunks(
    s, expert, n, n0, inside, k0, PART: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr
):
    """Scales ``s`` of weights: [J, BLOCK_N, CHUNKS], or [J, 1, CHUNKS] where columns n share them."""
    group, expert = _groups(k0, s.block_k, K, CHUNKS, CHUNK), expert[:, None, None]
    if s.block_n == 0:
        return _value(tl.load(_block(s, expert, expert * 0 + PART * s.up, group)), s.kind)
    elif s.uniform:
        return _value(tl.load(_block(s, expert, PART * s.up + (n0 + PART * s.phase) // s.block_n, group)), s.kind)
    else:
        row = (PART * s.up + (n + PART * s.phase) // s.block_n)[None, :, None]
        return _value(tl.load(_block(s, expert, row, group), mask=inside[None, :, None], other=0), s.kind)


@triton.jit
def zeros_of_chunks(
    w, expert, n, inside, k0, PART: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr
):
    """Zero points of weights, [J, BLOCK_N, CHUNKS]."""
    group = _groups(k0, w.scale.block_k, K, CHUNKS, CHUNK)
    return _zero_point(w.zero, expert[:, None, None], n[None, :, None], inside[None, :, None], group, PART)


@triton.jit
def rows_of_chunks(x, row, live, k0, GROUP: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Scales of rows [J]: [J, 1, CHUNKS]."""
    address = x.scale.ptr + row.to(tl.int64)[:, None, None] * x.scale.stride_row
    address += _groups(k0, GROUP, K, CHUNKS, CHUNK).to(tl.int64) * x.scale.stride_group
    return tl.load(address, mask=live[:, None, None], other=0.0)


@triton.jit
def row_of(x, row, slot):
    """The row of scales of each row: codes may have been copied into sorted rows, and their scales not."""
    if x.scale_at is None:  # noqa: SIM114 - there is no scale to ask then
        return row
    elif x.scale.per == 0:
        return row
    else:
        return slot // x.scale.per


@triton.jit
def of_rows(x, row, live, k0, GROUP: tl.constexpr):
    """Scales of the rows in a group of K; none where rows have none, or one for all of K."""
    if x.scale_at == "step":
        address = (
            x.scale.ptr + row.to(tl.int64) * x.scale.stride_row + (k0 // GROUP).to(tl.int64) * x.scale.stride_group
        )
        return tl.load(address, mask=live, other=0.0)
    else:
        return 0.0


# --- of the sum ----------------------------------------------------------------------------------------


@triton.jit
def of_whole_rows(x, row, live):
    """Scales of rows that have one for all of K; none where there is none."""
    if x.scale_at == "end":
        return tl.load(x.scale.ptr + row.to(tl.int64) * x.scale.stride_row, mask=live, other=0.0)
    else:
        return 0.0


@triton.jit
def nothing(acc, x, w, r, expert, n, n0, inside, PART: tl.constexpr):
    """There are no scales."""
    return acc


@triton.jit
def finish(acc, x, w, r, expert, n, n0, inside, PART: tl.constexpr):
    """float32, times the scales that hold for whole rows (r) and columns."""
    acc = acc.to(tl.float32)
    if x.scale_at == "end":
        acc = acc * r[:, None]
    if w.scale_at == "end":
        s = _of_columns(w.scale, expert, n, n0, inside, expert * 0, PART)
        if w.scale.uniform:
            acc = acc * s
        else:
            acc = acc * s[None, :]
    if w.scale.kind == "e2m1 pair":
        acc = acc * 4294967296.0  # 2^32
    if w.tensor_scale is not None:
        address = w.tensor_scale + expert.to(tl.int64) * w.tensor_scale_stride
        if w.tensor_scale_part is not None:
            address += PART * w.tensor_scale_part
        acc = acc * tl.load(address)
    return acc
