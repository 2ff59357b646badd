"""Private or renamed symbols of torch and Triton, each with the version that retires the detour."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["teach_interpreter"]


def teach_interpreter() -> None:
    """Let Triton's interpreter compute as a device does, and without what takes most of its time."""
    from triton.runtime.interpreter import InterpreterBuilder

    if not getattr(InterpreterBuilder, "_fusedmoe", False):
        InterpreterBuilder._fusedmoe = True
        _correct_arithmetic()
        _shorten_detours()


def _correct_arithmetic() -> None:
    """bfloat16, float8, fused multiply-add and conditions.

    The interpreter (3.5 to 3.7) keeps bfloat16 as uint16 bit patterns; its ``tl.dot`` multiplies those, and its
    cast from float32 truncates. Here the dot widens them to float32 first, which is exact, and the cast rounds
    to nearest even. Its cast from float32 to float8_e4m3fn neither saturates nor keeps NaN and subnormals; here it
    does as ``cvt.rn.satfinite`` does. Its fused multiply-add rounds twice; here the product is exact. It gives what it
    compared the type of the operands, so that a condition which is broadcast becomes a number, and 3.9 takes none for a
    mask; here it is a condition. Retire when the interpreter does all.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast, float_cast, binary = (
        InterpreterBuilder.create_dot,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_fp_to_fp,
        InterpreterBuilder.binary_op,
    )
    comparisons = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}

    def widen(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar == tl.float8e4nv:
            codes = torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.float8_e4m3fn)
            return TensorHandle(codes.float().numpy(), tl.float32)
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, widen(a), widen(b), *rest)

    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data, np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40  # rounding must not turn a NaN into infinity
        return TensorHandle(np.where(np.isnan(src.data), quiet, rounded).astype(np.uint16), tl.bfloat16)

    def create_fp_to_fp(self: Any, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.float8e4nv):
            return float_cast(self, src, dst_type, rounding_mode)
        value = torch.from_numpy(np.ascontiguousarray(src.data, np.float32)).clamp(-448.0, 448.0)
        return TensorHandle(value.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), tl.float8e4nv)

    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        result = binary(self, lhs, rhs, op)
        return TensorHandle(result.data, tl.int1) if op in comparisons else result

    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fma = create_fma
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    # The casting methods look cast_impl up on the instance, so replacing it here reaches all of them.
    InterpreterBuilder.cast_impl = cast_impl


def _shorten_detours() -> None:
    """Three of the interpreter (3.5 to 3.9), which change no result. Retire when it takes none of them.

    For each call of a device function it searches all of the language for what is not replaced yet, although the
    kernel's launch did; for each operation it makes a table of types; and ``tl.sort`` exchanges by a reduction with
    xor, which it takes element by element.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch, type_of, reduce = interpreter._patch_lang, interpreter._get_np_dtype, interpreter.ReduceOps.apply_impl
    known: dict[str, Any] = {}
    patched: list[Any] = []

    def patch_lang(fn: Any) -> Any:
        if patched:
            return SimpleNamespace(restore=lambda: None)
        patched.append(patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core})))
        return SimpleNamespace(restore=lambda: patched.pop().restore())

    def get_np_dtype(tt_dtype: Any) -> Any:
        scalar = tt_dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = type_of(scalar)
        return known[scalar.name]

    def apply_impl(self: Any, values: Any) -> Any:
        if self.combine_fn is not tl.standard._xor_combine:
            return reduce(self, values)
        (value,) = values
        reduced = np.bitwise_xor.reduce(value.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(reduced, value.dtype)

    interpreter._patch_lang = patch_lang
    interpreter._get_np_dtype = get_np_dtype
    interpreter.ReduceOps.apply_impl = apply_impl
