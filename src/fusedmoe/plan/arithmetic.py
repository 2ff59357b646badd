"""In which type a GEMM multiplies on a device."""

from __future__ import annotations

from fusedmoe.spec.format import ELEMENTS
from fusedmoe.spec.problem import ITEMSIZE, Gemm
from fusedmoe.target import Target


def multiplies(target: Target, element: str) -> bool:
    """The device multiplies codes of this type, and its compiler lets it."""
    if target.vendor == "cpu":
        return element != "e4m3fnuz"
    if target.vendor == "nvidia":
        # Turing has int8 products, and Triton none for it.
        return target.capability >= {"e4m3": 89, "int8": 80}.get(element, 1000)
    if target.vendor == "amd":
        fp8 = "e4m3fnuz" if target.arch.startswith("gfx94") else "e4m3"
        return target.arch.startswith(("gfx94", "gfx95")) and element in (fp8, "int8")
    return False


def multiply_in(gemm: Gemm, target: Target) -> str:
    """Type of both operands of the products: one of the layer's types, or of codes ("e4m3", "e4m3fnuz", "int8").

    Codes meet codes of their own kind in their own type where the device has it, and in one in which they are exact
    where it does not: float16 holds every e4m3 and int8; e2m1 times a power of two needs the range of bfloat16.
    Weights that meet rows as they are, are decoded to the type of the layer.
    """
    form, inputs = gemm.format, gemm.inputs
    if form is None or inputs is None:
        return gemm.dtype
    if form.element == inputs.element:
        return form.element if not gemm.emulate and multiplies(target, form.element) else "float16"
    return "float16" if target.vendor == "nvidia" and target.capability < 80 else "bfloat16"


def decodes(gemm: Gemm, target: Target) -> bool:
    """Weights become numbers of a wider type on their way to the products."""
    return gemm.format is not None and bytes_of(multiply_in(gemm, target)) > 1


def bytes_of(math: str) -> int:
    """Bytes of an operand of this type."""
    return ITEMSIZE[math] if math in ITEMSIZE else ELEMENTS[math].per_byte
