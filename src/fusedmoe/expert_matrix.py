"""Quantised expert matrices: codes, scales and their format as one value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedmoe.errors import DeviceError, DTypeError, LayoutError, OptionError, ShapeError, explain
from fusedmoe.numerics import decode, decode_scale, rows_of_scales, unpack
from fusedmoe.schemes import SCHEMES, format_of, granularity_of
from fusedmoe.spec.format import ELEMENTS, SCALES, Format

_TENSORS = ("data", "scale", "zero", "tensor_scale", "input_scale")
_BYTES = [getattr(torch, name) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, name)]


def _of(table: dict[str, str], dtype: torch.dtype, allowed: tuple[str, ...]) -> str | None:
    """The allowed key whose storage has this type."""
    return next((key for key in allowed if getattr(torch, table[key]) == dtype), None)


class ExpertMatrix:
    """Quantised matrices [E, N, K] of all experts; takes the place of a plain tensor in :func:`fusedmoe.fused_experts`.

    With blocks of bn rows and bk columns, all of them where the format says 0::

        w[e, n, k] = (data[e, n, k] - zero[e, n, k // bk]) * scale[e, n // bn, k // bk] * tensor_scale[e]

    (tensor_scale[e, n // (N / 2)] where gate and up have one each).

    Tensors are used where they lie, with any strides. A matrix stored [E, K, N] is a transposed view of itself
    (``data.transpose(1, 2)``), unless its codes are packed.

    Attributes:
        format: of the codes, and of the rows that they multiply.
        data: [E, N, K] codes, or [E, N, K / 2] uint8 with two codes in a byte, the even k in the low nibble.
        scale: [E, rows, columns]: rows N, ceil(N / bn) or 1, columns ceil(K / bk) or 1. In bfloat16 on an NVIDIA GPU
            those of mxfp4 are infinite above 2^33, and vanish below 2^-100.
        zero: [E, N, columns] uint8 zero points; of int4 [E, ceil(N / 2), columns], the even n in the low nibble.
            Without them unsigned codes are shifted by 128 (uint8) or 8 (int4).
        tensor_scale: [E] float32; or [E, 2], of gate and of up rows, with parts = 2.
        input_scale: one float32, the static scale of the rows that this matrix multiplies.
        parts: 2 when the matrix is gate rows and then up rows, each with blocks of its own: scale rows are then
            2 ceil(N / 2 / bn), or 2 of one scale each. Matters where blocks of rows do not divide N / 2, and where
            there are two tensor scales.

    >>> import torch, fusedmoe
    >>> w = fusedmoe.quantize(torch.randn(4, 32, 256), "fp8_block")
    >>> tuple(w.shape), tuple(w.scale.shape), str(w.format)
    ((4, 32, 256), (4, 1, 2), 'fp8_block 128x128 float32 e4m3/group')
    """

    __slots__ = ("data", "format", "input_scale", "parts", "scale", "tensor_scale", "zero")

    def __init__(
        self,
        scheme: str | Format,
        data: Tensor,
        scale: Tensor,
        *,
        zero: Tensor | None = None,
        tensor_scale: Tensor | None = None,
        input_scale: Tensor | None = None,
        parts: int | None = None,
        block: tuple[int, int] | None = None,
        group: int | None = None,
        inputs: str | None = None,
    ) -> None:
        """Put together the parts as a checkpoint has them.

        Args:
            scheme: a name (``fusedmoe.SCHEMES``), or a Format, which then says all that follows.
            data, scale, zero, tensor_scale, input_scale, parts: see the class. Types of torch's own for what is uint8
                there (float4_e2m1fn_x2, float8_e8m0fnu) are viewed as that. ``scale`` may leave out dimensions of
                size 1 at its end; ``parts`` None takes 1 where that fits, else 2.
            block, group, inputs: choices of the scheme, see :func:`fusedmoe.schemes.format_of`. None: what the
                tensors say (the number of columns of ``scale``, whether there is an ``input_scale``), or the default.

        Raises:
            OptionError: the scheme does not allow the choice.
            ShapeError, DTypeError, DeviceError, LayoutError: a tensor does not fit.
        """
        _tensor("data", data, "[E, N, K]")
        _tensor("scale", scale, "[E, rows, columns]")
        # Torch has types of its own for some codes and exponents, but no arithmetic: here they are bytes.
        data, scale = (t.view(torch.uint8) if t.dtype in _BYTES else t for t in (data, scale))
        if data.dim() != 3 or 0 in data.shape:
            raise ShapeError(
                explain("data of an expert matrix", got=tuple(data.shape), wanted="[E, N, K]", do="Stack the experts.")
            )
        if not isinstance(scheme, Format):
            scheme = _infer(scheme, data, scale, zero, input_scale, block, group, inputs)
        self.format = scheme
        self.data = data
        self.zero, self.tensor_scale, self.input_scale = zero, tensor_scale, input_scale
        self.scale = scale.reshape(*scale.shape, *(1,) * (3 - scale.dim())) if scale.dim() < 3 else scale
        self.parts = 1
        self._check(parts)

    # --- checks ---------------------------------------------------------------------------------------------------

    def _check(self, parts: int | None) -> None:
        form = self.format
        element = ELEMENTS[form.element]
        _dtype("data", self.data, getattr(torch, element.dtype), form)
        if element.per_byte == 2 and self.data.stride(2) != 1:
            raise LayoutError(
                explain(
                    f"data of scheme {form.scheme!r}",
                    got=f"strides {self.data.stride()}",
                    wanted="packed codes with stride 1 along K",
                    do="Pack along K: two codes of a row share a byte.",
                )
            )
        _dtype("scale", self.scale, getattr(torch, SCALES[form.scale]), form)
        self._device("scale", self.scale)
        n_experts, n_rows, n_columns = self.shape
        block_n, block_k = form.block
        if granularity_of(form.block) == "group" and n_columns % block_k:
            raise ShapeError(
                explain(
                    f"K of scheme {form.scheme!r}",
                    got=n_columns,
                    wanted=f"a multiple of its group, {block_k}",
                    do="Choose a group that divides K.",
                )
            )
        columns = -(-n_columns // block_k) if block_k else 1
        one = -(-n_rows // block_n) if block_n else 1
        two = 2 * -(-(n_rows // 2) // block_n) if block_n else 2
        allowed = {None: (one, two), 1: (one,), 2: (two, 1) if block_n == 0 else (two,)}
        if n_rows % 2:
            allowed = {None: (one,), 1: (one,)}
        if type(parts) not in (int, type(None)) or parts not in allowed:
            raise OptionError(explain("parts", got=parts, wanted="1, or 2 for an even N", do="See ExpertMatrix."))
        shapes = " or ".join(f"({n_experts}, {r}, {columns})" for r in dict.fromkeys(allowed[parts]))
        if tuple(self.scale.shape) not in [(n_experts, r, columns) for r in allowed[parts]]:
            raise ShapeError(
                explain(
                    f"scale of scheme {form.scheme!r} for a matrix {self.shape} in blocks {form.block}",
                    got=tuple(self.scale.shape),
                    wanted=shapes,
                    do="Check the block or group that the weights were quantised with.",
                )
            )
        halves = isinstance(self.tensor_scale, Tensor) and self.tensor_scale.ndim == 2 and two in allowed[parts]
        self.parts = parts or (2 if halves or self.scale.shape[1] != one else 1)
        per_byte = ELEMENTS[form.element].per_byte
        self._optional("zero", form.zero, (n_experts, -(-n_rows // per_byte), columns), torch.uint8)
        scales = (n_experts, 2) if halves and self.parts == 2 else (n_experts,)
        self._optional("tensor_scale", form.tensor_scale, scales, torch.float32)
        static = form.inputs is not None and form.inputs.mode == "static"
        if isinstance(self.input_scale, Tensor) and self.input_scale.numel() == 1:
            _tensor("input_scale", self.input_scale, "(1,)")
            self.input_scale = self.input_scale.reshape(1)
        self._optional("input_scale", static, (1,), torch.float32)

    def _optional(self, name: str, wanted: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        value = getattr(self, name)
        if value is None and not wanted:
            return
        what = f"{name} of scheme {self.format.scheme!r}"
        if value is None or not wanted:
            raise OptionError(
                explain(
                    what,
                    got="none" if value is None else "one",
                    wanted=f"{dtype} {shape}" if wanted else "none: it has no place for one",
                    do="Pass it as the checkpoint has it." if wanted else "Leave it out, or choose another scheme.",
                )
            )
        _tensor(name, value, str(shape))
        if tuple(value.shape) != shape:
            raise ShapeError(explain(what, got=tuple(value.shape), wanted=shape, do="See ExpertMatrix."))
        _dtype(name, value, dtype, self.format)
        self._device(name, value)

    def _device(self, name: str, value: Tensor) -> None:
        if value.device != self.device:
            raise DeviceError(
                explain(
                    f"{name} of scheme {self.format.scheme!r}",
                    got=value.device,
                    wanted=f"{self.device}, where data lies",
                    do="Move it there.",
                )
            )

    # --- a tensor's manners ---------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        n_experts, n_rows, columns = self.data.shape
        return n_experts, n_rows, columns * self.format.per_byte

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        return {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> ExpertMatrix:
        """A matrix whose tensors are ``function`` of these, which must keep shapes and types."""
        return self._with({name: function(tensor) for name, tensor in self.tensors().items()})

    def to(self, device: torch.device | str) -> ExpertMatrix:
        """On another device."""
        return self.map(lambda tensor: tensor.to(device))

    def experts(self, start: int, stop: int) -> ExpertMatrix:
        """Views of the experts ``start .. stop``."""
        return self._with(
            {name: tensor if name == "input_scale" else tensor[start:stop] for name, tensor in self.tensors().items()}
        )

    def _with(self, tensors: dict[str, Tensor]) -> ExpertMatrix:
        return ExpertMatrix(
            self.format,
            tensors["data"],
            tensors["scale"],
            zero=tensors.get("zero"),
            tensor_scale=tensors.get("tensor_scale"),
            input_scale=tensors.get("input_scale"),
            parts=self.parts,
        )

    def __repr__(self) -> str:
        return f"ExpertMatrix({self.shape}, {self.format}, device={str(self.device)!r})"

    # --- numbers --------------------------------------------------------------------------------------------------

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrices [E, N, K] as numbers; computed in float32, in float64 when that is asked for."""
        return torch.stack([self.dequantize_expert(e, dtype) for e in range(self.shape[0])])

    def dequantize_expert(self, expert: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """One matrix [N, K] as numbers."""
        form, (_, n_rows, n_columns) = self.format, self.shape
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        row = rows_of_scales(n_rows, form.block[0], self.parts, self.scale.shape[1]).to(self.device)
        column = torch.arange(n_columns, device=self.device) // (form.block[1] or n_columns)
        w = decode(self.data[expert], form.element, wide)
        if self.zero is not None:
            zero = self.zero[expert]
            if form.per_byte == 2:
                zero = unpack(zero.T).T[:n_rows]
            w = w - zero.to(wide)[:, column]
        elif shift := ELEMENTS[form.element].zero:
            w = w - shift
        w = w * decode_scale(self.scale[expert], form.scale, wide)[row][:, column]
        if self.tensor_scale is not None:
            of_parts = self.tensor_scale[expert].to(wide).reshape(-1, 1, 1)
            w = (w.reshape(len(of_parts), -1, n_columns) * of_parts).reshape(n_rows, n_columns)
        return w.to(dtype)


def _tensor(name: str, value: Any, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise DTypeError(
            explain(
                f"{name} of an expert matrix",
                got=type(value).__name__,
                wanted=f"a torch.Tensor {shape}",
                do="Pass one.",
            )
        )
    # A compiler knows of no view that negates; the operator that it makes of a layer looks again.
    negated = not torch.compiler.is_compiling() and value.is_neg()
    if value.layout != torch.strided or value.is_nested or negated:
        got = value.layout if value.layout != torch.strided else "a nested tensor, or a view that negates"
        do = "Make it dense: tensor.to_dense(), tensor.resolve_neg()."
        raise LayoutError(explain(f"{name} of an expert matrix", got=got, wanted="numbers as they lie", do=do))


def _dtype(name: str, value: Tensor, dtype: torch.dtype, form: Format) -> None:
    if value.dtype != dtype:
        raise DTypeError(
            explain(
                f"{name} of scheme {form.scheme!r}",
                got=value.dtype,
                wanted=dtype,
                do="View the bytes as that type if they are it (tensor.view(dtype)), or choose another scheme.",
            )
        )


def _infer(
    scheme: str,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    input_scale: Tensor | None,
    block: tuple[int, int] | None,
    group: int | None,
    inputs: str | None,
) -> Format:
    """The format that the tensors of a named scheme speak of."""
    if not isinstance(scheme, str) or scheme not in SCHEMES:
        return format_of(scheme)  # raises
    has = SCHEMES[scheme]
    element = next((e for e in has.elements if getattr(torch, ELEMENTS[e].dtype) == data.dtype), has.elements[0])
    if block is None and group is None:
        columns = scale.shape[2] if scale.dim() == 3 else 1
        n_columns = data.shape[2] * ELEMENTS[element].per_byte
        per_row = scale.dim() > 1 and scale.shape[1] == data.shape[1]
        if "group" in has.granularities:
            if columns and n_columns % columns == 0 and n_columns // columns in has.groups:
                group = n_columns // columns
            elif columns == 1 and "channel" in has.granularities:
                group = -1
        elif columns == 1 and "channel" in has.granularities and (per_row or "tensor" not in has.granularities):
            block = (1, 0)
        elif columns == 1 and "tensor" in has.granularities:
            block = (0, 0)
        elif "block" in has.granularities:
            block = (128, 128)
    return format_of(
        scheme,
        block=block,
        group=group,
        inputs=inputs or ("static" if input_scale is not None and "static" in has.inputs else None),
        zero=zero is not None and has.zero,
        element=None if element == "int8" and zero is not None else element,
        scale=_of(SCALES, scale.dtype, has.scales),
    )
