"""What is timed: shapes by name, by sizes or from a model's config.json; types, formats and problems."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedmoe.checkpoint.files import json_object
from fusedmoe.checkpoint.models import TOP_K, integer, model_type_of
from fusedmoe.checks import check
from fusedmoe.errors import CheckpointError, OptionError, explain
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.schemes import SCHEMES, format_of, granularity_of
from fusedmoe.spec.activation import TABLE, Activation
from fusedmoe.spec.format import Format
from fusedmoe.spec.layout import GateUpLayout, WeightLayout
from fusedmoe.spec.problem import Problem
from fusedmoe.testing.cases import storage_of

TOKENS: tuple[int, ...] = (1, 8, 32, 128, 512, 2048, 8192, 32768)
#: What a CPU can do in about as much time.
TOKENS_CPU: tuple[int, ...] = (1, 8, 32, 128)

#: What stands for no scheme.
UNQUANTISED = ("none", "bf16")

#: Keys of config.json, first come first served: models with dense layers besides name the experts' size apart.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
HIDDEN = ("hidden_size",)
INTERMEDIATE = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")

#: The activation of nearly all models, and the layer's own default: the first of the table.
ACTIVATION = next(iter(TABLE))

DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer."""

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int


#: dsv3-ep8 is one rank's share of the experts as a layer of its own, dsv3-tp8 one rank's share of each expert.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mixtral-8x7b", 8, 2, 4096, 14336),
        Shape("qwen3-30b-a3b", 128, 8, 2048, 768),
        Shape("dsv3-ep8", 32, 8, 7168, 2048),
        Shape("dsv3-tp8", 256, 8, 7168, 256),
        Shape("gpt-oss-120b", 128, 4, 2880, 2880),
    )
}


def shape_of(text: str) -> Shape:
    """A known shape by name, sizes as "E,top_k,H,I", or those of a model's config.json, by its path or its directory's.

    Raises:
        OptionError: none of these, or the file is of no model with experts.

    >>> shape_of("8,2,64,96")
    Shape(name='8,2,64,96', experts=8, top_k=2, hidden=64, intermediate=96)
    """
    if text in SHAPES:
        return SHAPES[text]
    sizes = text.split(",")
    if len(sizes) == 4 and all(size.strip().isdecimal() and int(size) for size in sizes):
        experts, top_k, hidden, intermediate = map(int, sizes)
        if top_k <= experts:
            return Shape(text, experts, top_k, hidden, intermediate)
    if text and Path(text).exists():
        return _shape_in(Path(text))
    raise OptionError(
        explain(
            "shape",
            got=repr(text),
            wanted=f"{', '.join(SHAPES)}, or E,top_k,H,I with top_k <= E, or the path of a model's config.json",
            do="Write for example 64,8,2048,1024.",
        )
    )


def _shape_in(path: Path) -> Shape:
    """Sizes of the routed experts of a model in the Hugging Face format; its name is that of the directory."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json_object(file)
    except CheckpointError as cause:
        raise OptionError(
            explain(f"shape {str(path)!r}", got=cause, wanted="a readable config.json", do="Check the path.")
        ) from cause
    nested = config.get("text_config")
    config = {**config, **nested} if isinstance(nested, dict) else config
    sizes = {keys: integer(config, keys) for keys in (EXPERTS, TOP_K, HIDDEN, INTERMEDIATE)}
    experts, top_k, hidden, intermediate = sizes.values()
    if experts is None or top_k is None or hidden is None or intermediate is None or top_k > experts:
        said = ", ".join(f"{keys[0]} {'missing' if size is None else size}" for keys, size in sizes.items())
        raise OptionError(
            explain(
                f"shape in {file}",
                got=f"model type {config.get('model_type')!r}: {said}",
                wanted="a model with routed experts, and no more of them per token than there are",
                do="Give the sizes as E,top_k,H,I.",
            )
        )
    directory = file.resolve().parent.name
    # In a hub's cache a snapshot lies in a directory named by its commit.
    hashed = not directory or re.fullmatch("[0-9a-f]{40}", directory)
    return Shape(model_type_of(config) if hashed else directory, experts, top_k, hidden, intermediate)


def dtype_of(text: str) -> torch.dtype:
    """A type of the layer by name.

    Raises:
        OptionError: no such type.
    """
    if text not in DTYPES:
        raise OptionError(explain("dtype", got=repr(text), wanted=" or ".join(DTYPES), do="Choose one of them."))
    return DTYPES[text]


def format_for(scheme: str, shape: Shape) -> Format | None:
    """The format of a scheme for a shape: its default, or with the largest group that divides H and I. None: "none".

    Raises:
        OptionError: no such scheme, or none of its groups divides both.
    """
    if scheme in UNQUANTISED:
        return None
    form = format_of(scheme)
    if granularity_of(form.block) == "group":
        groups = [n for n in SCHEMES[scheme].groups if shape.hidden % n == shape.intermediate % n == 0]
        if not groups:
            raise OptionError(
                explain(
                    f"scheme {scheme!r} for shape {shape.name}",
                    got=f"H {shape.hidden}, I {shape.intermediate}",
                    wanted=f"multiples of {' or '.join(map(str, SCHEMES[scheme].groups))}",
                    do="Choose another scheme.",
                )
            )
        form = format_of(scheme, group=max(groups))
    return form


def problem_of(
    shape: Shape,
    tokens: int,
    dtype: torch.dtype,
    *,
    activation: str = ACTIVATION,
    gate_up_layout: GateUpLayout = "concatenated",
    weight_layout: WeightLayout = "NK",
    form: Format | None = None,
    batch_invariant: bool = False,
) -> Problem:
    """The problem that a call of these sizes poses; its tensors exist in name only.

    Raises:
        OptionError: unknown activation or layout.
    """
    e, h, i = shape.experts, shape.hidden, shape.intermediate
    rows = i * (2 if Activation.of(activation).gated else 1)

    def tensor(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    def matrix(n: int, k: int, parts: int = 1) -> Tensor | ExpertMatrix:
        if form is None:
            return tensor(*((e, k, n) if weight_layout == "KN" else (e, n, k)))
        storage = storage_of(form, (e, n, k), parts)
        tensors: dict[str, Any] = {name: tensor(*sizes, dtype=kind) for name, (sizes, kind) in storage.items()}
        return ExpertMatrix(form, **tensors, parts=parts)

    return check(
        tensor(tokens, h),
        matrix(rows, h, parts=rows // i if gate_up_layout == "concatenated" else 1),
        matrix(h, i),
        tensor(tokens, shape.top_k, dtype=torch.float32),
        tensor(tokens, shape.top_k, dtype=torch.int32),
        activation=activation,
        gate_up_layout=gate_up_layout,
        weight_layout=weight_layout,
        batch_invariant=batch_invariant or None,  # as the process is set
    ).problem


def default_device() -> torch.device:
    """The first GPU of this machine, else its CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("xpu", torch.xpu.current_device()) if torch.xpu.is_available() else torch.device("cpu")
