"""How quantised checkpoints store a projection [N, K]: one function per quantisation method, and nothing else of it.

``quantization_config`` of config.json says which method and with what numbers. Each function below turns it into a
:class:`Method`: the scheme, and for every tensor beside a projection its names, how many weights one element of it
stands for, and what makes it canonical (:class:`fusedmoe.expert_matrix.ExpertMatrix`). A method that is added here is
found, checked, sliced and read without a change elsewhere.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedmoe.checkpoint.files import FLOATS, error
from fusedmoe.errors import CheckpointError, OptionError
from fusedmoe.numerics import pack
from fusedmoe.schemes import SCHEMES, format_of
from fusedmoe.spec.format import ELEMENTS, Format

#: Steps of a search for one pattern in one name: a second or so.
_STEPS = 10**7


def _same(tensor: Tensor) -> Tensor:
    return tensor


class Stored(NamedTuple):
    """One kind of tensor of a projection [N, K].

    Attributes:
        endings: its name after the projection's; the first that exists.
        types: safetensors types that it may have.
        unit: rows and columns of weights that one element covers; 0: all of them.
        transposed: columns come first.
        trailing: dimensions after rows and columns: the bytes of a block of mxfp4.
        decode: [rows, columns, ...] as stored, rows first, to canonical bytes; codes and zero points to as many rows
            as they are for.
        required: a projection without it is an error.
    """

    endings: tuple[str, ...]
    types: tuple[str, ...]
    unit: tuple[int, int] = (1, 1)
    transposed: bool = False
    trailing: tuple[int, ...] = ()
    decode: Callable[[Tensor], Tensor] = _same
    required: bool = True


_SCALES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E8M0": "e8m0", "U8": "e8m0", "F8_E4M3": "e4m3"}
_FLOAT_SCALES = ("F32", "F16", "BF16")
_FP8 = {"F8_E4M3": "e4m3", "F8_E4M3FNUZ": "e4m3fnuz"}
_BIAS = Stored((".bias", "_bias"), tuple(FLOATS), (1, 0), required=False)


@dataclass(frozen=True, kw_only=True)
class Method:
    """How one projection of every expert is stored.

    Attributes:
        name: for messages.
        parts: the stored tensors by what they hold: "data", "scale", "zero", "tensor_scale", "input_scale", "bias",
            and "order": the group of each column, which must be the natural one.
        choices: of the scheme, as :func:`fusedmoe.schemes.format_of` takes them; None: not quantised. Types of
            codes and scales are left to the files where they may be of several.
        ignored: endings of tensors that add nothing to what the others say.
        either_way: a tensor of all experts may be [E, K, N] as well, its scales alike.
    """

    name: str
    parts: Mapping[str, Stored]
    choices: Mapping[str, Any] | None = None
    ignored: tuple[str, ...] = field(default=())
    either_way: bool = False

    def form(self, types: Mapping[str, str], block: tuple[int, int] | None = None) -> Format | None:
        """The format, for tensors of these types, with other blocks if given."""
        if self.choices is None:
            return None
        choices = {"element": _FP8.get(types["data"]), "scale": _SCALES.get(types["scale"]), **self.choices}
        if block is not None:
            choices["block"] = block
        try:
            return format_of(**choices)
        except OptionError as cause:
            raise error(
                f"quantisation of the experts ({self.name})",
                got=cause,
                wanted="a scheme of fusedmoe.SCHEMES",
                do="Dequantise the checkpoint, or quantise the original again.",
            ) from cause


PLAIN = Method(
    name="not quantised",
    parts={"data": Stored((".weight", ""), tuple(FLOATS)), "bias": _BIAS},
    either_way=True,
)


# --- which method, for which module ------------------------------------------------------------------------------


def method_of(config: Mapping[str, Any], modules: Iterable[str]) -> tuple[Method, bool]:
    """The method of a projection that goes by any of these module names, and whether it must be quantised.

    Raises:
        CheckpointError: the configuration is not understood, or the method is not known here.
    """
    modules = tuple(modules)
    said = config.get("quantization_config") or config.get("compression_config")
    if not said:
        return PLAIN, False
    name = said.get("quant_method") if isinstance(said, dict) else said
    if not isinstance(name, str) or name not in METHODS:
        raise error(
            "quantisation of the experts",
            got=f"quantization_config with method {name!r} in config.json",
            wanted=f"one of {', '.join(METHODS)}",
            do="Take another checkpoint of the model, or dequantise it.",
        )
    try:
        left_out = [pattern for key in _LEFT_OUT for pattern in said.get(key) or ()]
        if any(_covers(pattern, module) for pattern in left_out for module in modules):
            return PLAIN, False
        # The only word of DeepSeek-V4 on its experts stands outside.
        method = METHODS[name]({"expert_dtype": config.get("expert_dtype"), **said}, modules)
    except CheckpointError:
        raise
    except (
        AttributeError,
        IndexError,
        KeyError,
        OverflowError,
        RecursionError,
        TypeError,
        ValueError,
        re.error,
    ) as cause:
        raise error(
            f"quantization_config of method {name!r} in config.json",
            got=f"{type(cause).__name__}: {cause}",
            wanted="the keys that this method writes",
            do="Download or convert the checkpoint again.",
        ) from cause
    return (PLAIN, False) if method is None else (method, True)


#: Keys of lists of modules that are not quantised, in the words of the several methods.
_LEFT_OUT = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")


def _covers(pattern: str, module: str) -> bool:
    """A pattern of an ignore or target list names the module or something that it is part of.

    "re:" starts a regular expression; else the pattern is a run of dotted parts of the name, with * as in file names.
    That ``gate`` names no ``gate_proj`` is the point of comparing whole parts.
    """
    if pattern.startswith("re:"):
        return _searched(pattern[3:], module, re.match)
    text = re.escape(pattern).replace(r"\*", ".*")
    return _searched(rf"(?:^|\.){text}(?:\.|$)", module, re.search)


def _searched(pattern: str, module: str, search: Callable[[str, str], object]) -> bool:
    """Whether a pattern of somebody else is found; one that could search for hours is refused.

    With q repetitions one after the other a search takes up to comb(n + q, q) steps on n characters; a repeated group
    can take 2^n.
    """
    plain = re.sub(r"\\.|\[\^?\]?[^]]*\]", "x", pattern)
    repeats = len(re.findall(r"[*+]|\{\d*,?\d*\}", plain))
    if re.search(r"\)[*+{]", plain) or math.comb(len(module) + repeats, repeats) > _STEPS:
        raise ValueError(f"the pattern {pattern[:80]!r} of a list of modules could take too long to search")
    return search(pattern, module) is not None


def _refuse(name: str, got: object, wanted: object, do: str = "Take another checkpoint of the model.") -> None:
    raise error(f"quantisation of the experts ({name})", got=got, wanted=wanted, do=do)


# --- codes that are packed in words ------------------------------------------------------------------------------


def _bytes(words: Tensor) -> Tensor:
    """Words [rows, columns] whose codes follow each other along K are canonical as they lie: low bits first."""
    # A copy: the slice of a file may have a stride of its own even where there is one column.
    lie = torch.empty(words.shape, dtype=words.dtype).copy_(words)
    return lie.view(torch.uint8)


def _flat(blocks: Tensor) -> Tensor:
    return blocks.flatten(1)


def _unsigned(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8) if codes.dtype == torch.int8 else codes


def _exponents(scale: Tensor) -> Tensor:
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale


def _down(bits: int, order: tuple[int, ...] | None = None, plus: int = 0) -> Callable[[Tensor], Tensor]:
    """Decoder of words [rows, columns] whose codes follow each other along N: code i is row ``order[i]``.

    ``plus`` is added within the bits of a code: the largest code becomes 0, as in the kernels of the format.
    """
    per = 32 // bits

    def decode(words: Tensor) -> Tensor:
        rows, columns = words.shape
        stored = _bytes(words).view(rows, columns, 4)
        codes = torch.empty(rows, per, columns, dtype=torch.uint8)
        for i in range(per):
            code = stored[..., i] if bits == 8 else stored[..., i // 2] >> (4 * (i % 2)) & 15
            codes[:, order[i] if order else i] = code + plus & (1 << bits) - 1 if plus else code
        return codes.flatten(0, 1)

    return decode


def _largest_group(scheme: str, group: int) -> int:
    """The group that the scheme has for this one, a part of it if need be: parts repeat its scale."""
    return next((size for size in SCHEMES[scheme].groups if group % size == 0), group)


def _integer_weights(bits: object, group: object, name: str) -> tuple[str, str, int, tuple[int, int]]:
    """Scheme, element, stored group (0: all) and block of weight-only integers."""
    if bits not in (4, 8):
        _refuse(name, f"{bits} bits", "4 or 8")
    if not isinstance(group, int) or group == 0 or group < -1:
        _refuse(name, f"group size {group!r}", "a positive number, or -1 for all columns")
    assert isinstance(group, int)
    scheme, element = ("int4_w4a16", "int4") if bits == 4 else ("int8_w8a16", "uint8")
    return scheme, element, max(group, 0), (1, 0 if group == -1 else _largest_group(scheme, group))


def _nvfp4(weight: str) -> dict[str, Stored]:
    return {
        "data": Stored((weight, ""), ("U8",), (1, 2)),
        "scale": Stored((".weight_scale", "_weight_scale"), ("F8_E4M3",), (1, 16)),
    }


def _mx(name: str, scheme: str, weight: str = ".weight", scales: tuple[str, ...] = (".weight_scale",)) -> Method:
    """Codes of mxfp4, two a byte, or mxfp8, and an exponent for each 32 of a row."""
    four = scheme == "mxfp4"
    return Method(
        name=name,
        choices={"scheme": scheme, "element": "e2m1" if four else "e4m3"},
        parts={
            "data": Stored((weight,), ("U8", "I8") if four else ("F8_E4M3",), (1, 2 if four else 1), decode=_unsigned),
            "scale": Stored(scales, ("U8", "F8_E8M0"), (1, 32), decode=_exponents),
            "bias": _BIAS,
        },
    )


# --- the methods -------------------------------------------------------------------------------------------------

_WEIGHT = Stored((".weight", ""), tuple(_FP8))
_SCALE_OF_FP8 = (".weight_scale_inv", ".weight_scale", "_scale_inv", "_scale", ".scale")


def _scalar(*endings: str, decode: Callable[[Tensor], Tensor] = _same) -> Stored:
    return Stored(endings, ("F32", "F16", "BF16"), (0, 0), decode=decode)


def _static(mode: str | None, *endings: str) -> dict[str, Stored]:
    return {"input_scale": _scalar(*endings)} if mode == "static" else {}


def _fp8(said: dict[str, Any], modules: tuple[str, ...]) -> Method:
    """DeepSeek-V3, Qwen3-FP8, Transformers: e4m3, ``weight_scale_inv`` per block, or one scale per projection.

    DeepSeek-V4 calls it ``scale``, and has experts of mxfp4 where ``expert_dtype`` says fp4.
    """
    if said["expert_dtype"] == "fp4":
        return _mx("fp8 with experts of fp4", "mxfp4", scales=_SCALE_OF_FP8)
    block = said.get("weight_block_size")
    scheme, inputs = ("fp8_block", "group") if block else ("fp8_tensor", "token")
    if said.get("activation_scheme", "dynamic") == "static":
        inputs = "static"
    if block and tuple(block) == (1, 32):
        scheme, inputs = "mxfp8", ""
    unit = (int(block[0]), int(block[1])) if block else (0, 0)
    return Method(
        name="fp8",
        choices={"scheme": scheme, "block": unit, "inputs": inputs or None},
        parts={
            "data": _WEIGHT,
            "scale": Stored(_SCALE_OF_FP8, (*_FLOAT_SCALES, "F8_E8M0", "U8"), unit, decode=_exponents),
            **_static(inputs, ".input_scale", ".activation_scale", "_activation_scale"),
            "bias": _BIAS,
        },
    )


def _compressed_tensors(said: dict[str, Any], modules: tuple[str, ...]) -> Method | None:
    """compressed-tensors: the group of ``config_groups`` whose targets name the projection, else "Linear"."""
    groups = [group for group in said["config_groups"].values() if group.get("weights")]
    named = [g for g in groups if any(_covers(t, m) for t in g["targets"] for m in modules if t != "Linear")]
    linear = [g for g in groups if "Linear" in g["targets"]]
    if not named and not linear:
        return None
    group = (named or linear)[0]
    kind = group.get("format") or said.get("format")
    name = f"compressed-tensors {kind}"
    w, x = group["weights"], group.get("input_activations")
    strategy, bits, code = w.get("strategy"), w.get("num_bits"), w.get("type")
    if w.get("actorder") in ("group", "dynamic", True):
        _refuse(name, f"actorder {w['actorder']!r}", "weights in their natural order", _ACTORDER)
    choices: dict[str, Any]
    if kind == "nvfp4-pack-quantized":  # inputs in 4 bits, if any, stay as they are here
        parts = {**_nvfp4(".weight_packed"), "tensor_scale": _scalar(".weight_global_scale", decode=torch.reciprocal)}
        choices = {"scheme": "nvfp4", "element": "e2m1"}
        return Method(name=name, choices=choices, parts=parts | {"bias": _BIAS}, ignored=(".input_global_scale",))
    if kind in ("mxfp4-pack-quantized", "mxfp8-quantized"):  # likewise
        return _mx(name, "mxfp8") if kind == "mxfp8-quantized" else _mx(name, "mxfp4", ".weight_packed")
    inputs = None
    if x:
        same_code = (x.get("num_bits", 8), x.get("type")) == (8, "float" if kind == "float-quantized" else code)
        if not same_code or not x.get("symmetric", True):
            _refuse(name, f"inputs {x}", "symmetric inputs of 8 bits and of the type of the weights, or none")
        inputs = {"token": "token", "group": "group", "tensor": "tensor" if x.get("dynamic") else "static"}.get(
            x.get("strategy")
        )
        if inputs is None or inputs in ("token", "group") and not x.get("dynamic"):
            _refuse(name, f"inputs {x}", "dynamic per token or group, or per tensor")
    parts = {**_static(inputs, ".input_scale"), "bias": _BIAS}
    if kind == "pack-quantized" and code == "int":
        if inputs:
            _refuse(name, f"inputs {x}", "none")
        size = -1 if strategy == "channel" else w.get("group_size")
        scheme, element, stored, block = _integer_weights(bits, size, name)
        per, zero = 32 // int(bits), not w.get("symmetric", True)
        parts["data"] = Stored((".weight_packed",), ("I32",), (1, per), decode=_bytes)
        parts["scale"] = Stored((".weight_scale",), _FLOAT_SCALES, (1, stored))
        parts["order"] = Stored((".weight_g_idx",), ("I32", "I64"), (0, 1), required=False)
        if zero:
            decode = _down(int(bits))
            parts["zero"] = Stored((".weight_zero_point",), ("I32",), (per, stored), decode=decode)
        choices = {"scheme": scheme, "element": element, "block": block, "zero": zero}
        return Method(name=name, choices=choices, parts=parts, ignored=(".weight_shape",))
    if kind in ("float-quantized", "int-quantized", "naive-quantized") and bits == 8 and code in ("float", "int"):
        if not w.get("symmetric", True):
            _refuse(name, "weights with zero points", "symmetric weights")
        blocks = {"tensor": (0, 0), "channel": (1, 0), "block": w.get("block_structure")}
        blocks["group"] = (1, w.get("group_size"))
        block_n, block_k = (int(side) for side in blocks[strategy])
        words = {"float": ("fp8_block", "fp8_channel", "fp8_tensor", "fp8_w8a16"), "int": ("int8_w8a8",) * 3}[code]
        by_strategy = {"block": words[0], "channel": words[1], "tensor": words[2]}
        only = "fp8_w8a16" if code == "float" else "int8_w8a16"
        if inputs == "group" and x["group_size"] != block_k:
            _refuse(name, f"inputs in groups of {x['group_size']}", f"groups of {block_k}, the columns of a block")
        types = tuple(_FP8) if code == "float" else ("I8",)
        parts["data"] = Stored((".weight",), types)
        parts["scale"] = Stored((".weight_scale",), _FLOAT_SCALES, (block_n, block_k))
        scheme = by_strategy.get(strategy, only) if inputs else only
        choices = {"scheme": scheme, "block": (block_n, block_k), "inputs": inputs}
        return Method(name=name, choices=choices | ({} if code == "float" else {"element": "int8"}), parts=parts)
    _refuse(name, f"{bits} bits, type {code!r}, strategy {strategy!r}, inputs {x}", "a format that is known here")
    return None


_ACTORDER = "Columns in the order of activations need a permutation of the inputs: requantise without it."


def _modelopt(said: dict[str, Any], modules: tuple[str, ...]) -> Method | None:
    """NVIDIA ModelOpt, by the algorithm of these modules; inputs in 4 bits and MXFP8 stay as they are here."""
    kind = str(said.get("quant_algo")).upper()
    if kind == "MIXED_PRECISION":
        layers = said["quantized_layers"].items()  # of tens of thousands of modules, by whole parts of their names
        own = [entry for name, entry in layers if any(f".{name}." in f".{module}." for module in modules)]
        if not own:
            return None
        kind = str(own[0]["quant_algo"]).upper()
    name = f"modelopt {kind}"
    choices: dict[str, Any]
    if kind in ("NVFP4", "W4A16_NVFP4"):
        parts = {**_nvfp4(".weight"), "tensor_scale": _scalar(".weight_scale_2", "_weight_scale_2"), "bias": _BIAS}
        choices = {"scheme": "nvfp4", "element": "e2m1"}
        ignored = (".input_scale", "_input_scale")
        return Method(name=name, choices=choices, parts=parts, ignored=ignored, either_way=True)
    if kind == "MXFP8":
        return _mx(name, "mxfp8")
    if kind not in _MODELOPT_FP8:
        _refuse("modelopt", f"quant_algo {kind!r}", f"NVFP4, W4A16_NVFP4, MXFP8, {', '.join(_MODELOPT_FP8)}")
    scheme, inputs, block = _MODELOPT_FP8[kind]
    parts = {
        "data": _WEIGHT,
        "scale": Stored((".weight_scale", "_weight_scale"), _FLOAT_SCALES, block),
        **_static(inputs, ".input_scale", "_input_scale"),
        "bias": _BIAS,
    }
    choices = {"scheme": scheme, "inputs": inputs, "block": block}
    return Method(name=name, choices=choices, parts=parts, either_way=True)


#: Scheme, inputs and block of ModelOpt's algorithms of fp8; those of blocks are of weights alone.
_MODELOPT_FP8: dict[str, tuple[str, str | None, tuple[int, int]]] = {
    "FP8": ("fp8_tensor", "static", (0, 0)),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8_channel", "token", (1, 0)),
    "FP8_PB_WO": ("fp8_w8a16", None, (128, 128)),
}


def _gptq(said: dict[str, Any], modules: tuple[str, ...]) -> Method | None:
    """GPTQ: codes along K in words, everything transposed; version 1 stores zero points less one."""
    for pattern, change in (said.get("dynamic") or {}).items():
        plain = pattern[2:] if pattern[:2] in ("-:", "+:") else pattern
        if any(_searched(plain, module, re.match) for module in modules):
            if pattern.startswith("-:"):
                return None
            said = {**said, **change}
            break  # the first that fits decides
    version = said.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        _refuse("gptq", f"checkpoint_format {version!r}", "'gptq' or 'gptq_v2'")
    scheme, element, stored, block = _integer_weights(said.get("bits"), said.get("group_size"), "gptq")
    bits = int(said["bits"])
    per = 32 // bits
    decode = _down(bits, plus=1 if version == "gptq" else 0)
    parts = {
        "data": Stored((".qweight",), ("I32",), (1, per), transposed=True, decode=_bytes),
        "scale": Stored((".scales",), _FLOAT_SCALES, (1, stored), transposed=True),
        "zero": Stored((".qzeros",), ("I32",), (per, stored), transposed=True, decode=decode),
        "order": Stored((".g_idx",), ("I32", "I64"), (0, 1), required=bool(said.get("desc_act"))),
        "bias": _BIAS,
    }
    choices = {"scheme": scheme, "element": element, "block": block, "zero": not said.get("sym", True)}
    return Method(name=version, choices=choices, parts=parts)


#: AWQ: nibble i of a word is row 8c + this.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _awq(said: dict[str, Any], modules: tuple[str, ...]) -> Method:
    """AWQ: codes along N in words with a nibble order of their own, everything transposed."""
    version, bits = said.get("version", "gemm"), said.get("bits", said.get("w_bit"))
    if str(version).lower() != "gemm" or bits != 4 or not said.get("zero_point", True):
        got = f"version {version!r}, {bits} bits, zero_point {said.get('zero_point')}"
        _refuse("awq", got, "version 'gemm' of 4 bits with zero points")
    group = said.get("group_size", said.get("q_group_size"))
    scheme, element, stored, block = _integer_weights(bits, group, "awq")
    decode = _down(4, _AWQ_ORDER)
    return Method(
        name="awq",
        choices={"scheme": scheme, "element": element, "block": block, "zero": True},
        parts={
            "data": Stored((".qweight",), ("I32",), (8, 1), transposed=True, decode=lambda words: pack(decode(words))),
            "scale": Stored((".scales",), _FLOAT_SCALES, (1, stored), transposed=True),
            "zero": Stored((".qzeros",), ("I32",), (8, stored), transposed=True, decode=decode),
            "bias": _BIAS,
        },
    )


def _auto_round(said: dict[str, Any], modules: tuple[str, ...]) -> Method | None:
    """AutoRound: codes packed as those of GPTQ, version 1, or AWQ; modules may differ, by name or pattern."""
    extra = said.get("extra_config") or {}
    patterns = (name for name in extra if re.search(r"[*+?^$()\[\]{}|\\]", name))
    named = (module for module in modules if module in extra)
    matched = (pattern for pattern in patterns if any(_searched(pattern, module, re.search) for module in modules))
    own = next(itertools.chain(named, matched), None)
    said = said if own is None else {**said, **extra[own]}
    if said.get("data_type", "int") == "float" or said.get("bits") == 16:
        return None
    kind = str(said.get("packing_format")).removeprefix("auto_round:")
    if kind == "auto_gptq":
        return _gptq(said, modules)
    if kind != "auto_awq":
        _refuse("auto-round", f"packing_format {said.get('packing_format')!r}", "auto_round:auto_gptq or :auto_awq")
    return _awq(said, modules)


def _mxfp4(said: dict[str, Any], modules: tuple[str, ...]) -> Method:
    """gpt-oss: [E, N, K / 32, 16] bytes of two codes, and an exponent per 32."""
    return Method(
        name="mxfp4",
        choices={"scheme": "mxfp4", "element": "e2m1"},
        parts={
            "data": Stored(("_blocks",), ("U8",), (1, 32), trailing=(16,), decode=_flat),
            "scale": Stored(("_scales",), ("U8",), (1, 32)),
            "bias": _BIAS,
        },
    )


def _fusedmoe(said: dict[str, Any], modules: tuple[str, ...]) -> Method:
    """What ``fusedmoe quantize`` writes where no other format fits: the canonical tensors of each projection."""
    keys = ("scheme", "inputs", "zero", "element", "scale")
    choices: dict[str, Any] = {key: said[key] for key in keys if said.get(key) is not None}
    choices["block"] = (int(said["block"][0]), int(said["block"][1]))
    form = format_of(**choices)
    kind = ELEMENTS[form.element]
    types = {"int8": "I8", **{element: kind for kind, element in _FP8.items()}}
    scale = next(kind for kind, scale in _SCALES.items() if scale == form.scale and kind != "F8_E8M0")
    parts = {
        "data": Stored((".weight",), (types.get(form.element, "U8"),), (1, kind.per_byte)),
        "scale": Stored((".weight_scale",), (scale,), form.block),
        **_static(form.inputs.mode if form.inputs else None, ".input_scale"),
        "bias": _BIAS,
    }
    if form.zero:
        parts["zero"] = Stored((".weight_zero_point",), ("U8",), form.block)
    if form.tensor_scale:
        parts["tensor_scale"] = _scalar(".weight_tensor_scale")
    return Method(name="fusedmoe", choices=choices, parts=parts)


METHODS: dict[str, Callable[[dict[str, Any], tuple[str, ...]], Method | None]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "fusedmoe": _fusedmoe,
}
