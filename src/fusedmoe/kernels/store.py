"""What is stored of a tile's result, as numbers or as codes: policies STORE ``f(result, out, dest, live, column,
COLUMNS, ...) -> value``, which store scales themselves; :func:`write` stores the value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedmoe.kernels import encode


@triton.jit
def write(value, out, dest, live, column, COLUMNS: tl.constexpr):
    address = out.ptr + dest.to(tl.int64)[:, None] * out.stride_row + column.to(tl.int64)[None, :] * out.stride_column
    tl.store(address, value, mask=live[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def keep(result, out, dest, live, column, COLUMNS: tl.constexpr):
    """Numbers beside what is stored, for who needs them as they are."""
    if out.beside is not None:
        address = out.beside + dest.to(tl.int64)[:, None] * out.stride_beside + column[None, :]
        tl.store(address, result.to(out.beside.dtype.element_ty), mask=live[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def numbers(
    result, out, dest, live, column, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ENCODE: tl.constexpr, LARGEST: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The one cast to the type of the layer."""
    return result.to(out.ptr.dtype.element_ty)


@triton.jit
def numbers_and_amax(
    result, out, dest, live, column, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ENCODE: tl.constexpr, LARGEST: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Numbers, and the largest magnitude of all live rows, as stored, in ``out.scale``; an order of atomic maxima
    changes nothing, and bits of floats that are not negative compare as integers do.
    """
    value = result.to(out.ptr.dtype.element_ty)
    counts = live[:, None] & (column < COLUMNS)[None, :]
    amax = tl.max(tl.max(tl.where(counts, encode.magnitude(value.to(tl.float32)), 0.0), 1), 0)
    tl.atomic_max(out.scale.to(tl.pointer_type(tl.int32)), amax.to(tl.int32, bitcast=True), sem="relaxed")
    return value


@triton.jit
def codes(
    result, out, dest, live, column, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ENCODE: tl.constexpr, LARGEST: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Codes by one scale, which was given."""
    return ENCODE(tl.div_rn(result, tl.load(out.scale)), out.ptr.dtype.element_ty)


@triton.jit
def codes_by_group(
    result, out, dest, live, column, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ENCODE: tl.constexpr, LARGEST: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Codes and their scales, one to a row and GROUP columns, which the tile has whole."""
    GROUPS: tl.constexpr = BLOCK_N // GROUP
    # Columns past the last are no part of their group.
    result = tl.where((column < COLUMNS)[None, :], result, 0.0)
    first = tl.min(column, 0) // GROUP
    if GROUPS == 1:  # creates no tensor, so that a warp-specialised kernel can call it
        scale = encode.scale_of(tl.max(encode.magnitude(result), 1), LARGEST)
        if encode.int8 == ENCODE:
            scale = tl.where(encode.broken(result, 1) != 0, float("nan"), scale)
        there = live & (first * GROUP < COLUMNS)
        tl.store(out.scale + dest.to(tl.int64) * out.stride_scale + first, scale, mask=there)
        return ENCODE(encode.quotient(result, scale[:, None]), out.ptr.dtype.element_ty)
    else:
        grouped = tl.reshape(result, (BLOCK_M, GROUPS, GROUP))
        scale = encode.scale_of(tl.max(encode.magnitude(grouped), 2), LARGEST)
        if encode.int8 == ENCODE:
            scale = tl.where(encode.broken(grouped, 2) != 0, float("nan"), scale)
        group = first + tl.arange(0, GROUPS)
        address = out.scale + dest.to(tl.int64)[:, None] * out.stride_scale + group[None, :]
        tl.store(address, scale, mask=live[:, None] & (group < (COLUMNS + GROUP - 1) // GROUP)[None, :])
        value = tl.reshape(encode.quotient(grouped, scale[:, :, None]), (BLOCK_M, BLOCK_N))
        return ENCODE(value, out.ptr.dtype.element_ty)
