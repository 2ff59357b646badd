"""Find the experts of one layer among the tensors, by the namings of :mod:`fusedmoe.checkpoint`."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any, NamedTuple

import torch

from fusedmoe.checkpoint.files import CONVERT_AGAIN, Files, error, some
from fusedmoe.checkpoint.models import integer, quantised_error
from fusedmoe.errors import CheckpointError
from fusedmoe.spec.layout import WeightLayout


class _Piece(NamedTuple):
    """Where a tensor goes: ``result[role][expert][rows] = stored[name]`` (``stored[name][part]`` when fused)."""

    name: str
    role: str
    expert: int
    rows: slice = slice(None)
    part: int | None = None


class _Stored(NamedTuple):
    """Experts as they lie in the files, checked against each other by their headers."""

    shapes: dict[str, tuple[int, ...]]  # of the results w13, w2 and biases
    pieces: list[_Piece]
    dtype: torch.dtype
    gated: bool = True
    weight_layout: WeightLayout = "NK"


#: Names of gate, up and down of one expert. Without any gate_proj the second naming is not gated.
_SEPARATE = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))
#: Names of w13 and w2, then of their biases.
_FUSED = (
    ("experts.gate_up_proj", "experts.down_proj", "experts.gate_up_proj_bias", "experts.down_proj_bias"),
    ("input_linear.weight", "output_linear.weight"),
)
_SEPARATE_NAME = re.compile(r"(\d{1,6})\.(w[123]|(?:gate|up|down)_proj)\.weight")
_QUANTISED = re.compile(r"(scale|scale_inv|scales|blocks|packed|qweight|qzeros|g_idx|zero_point|zeros)$")


def stored_experts(files: Files, block: str) -> _Stored:
    """Find the experts of a block, and refuse what is quantised, inconsistent or not understood."""
    names = files.under(block + "experts.")
    if quantised := [name for name in names if _QUANTISED.search(name)]:
        raise quantised_error(some(quantised))
    fused = next((fused for fused in _FUSED if block + fused[0] in files.names), None)
    stored = _fused_experts(files, block, fused) if fused else _separate_experts(files, block, names)
    # Some models keep the correction bias of the router here; anything else would change the result.
    known = {piece.name for piece in stored.pieces} | {block + "experts.e_score_correction_bias"}
    if unknown := [name for name in names if name not in known]:
        raise error(
            f"tensors beside the experts of {block}",
            got=some(unknown),
            wanted=f"only {some(sorted(known), 2)} and the like",
            do="Their part in the computation is not known here: build FusedExperts from tensors yourself.",
        )
    return stored


def _separate_experts(files: Files, block: str, names: list[str]) -> _Stored:
    found: dict[int, dict[str, str]] = {}
    for name in names:
        if match := _SEPARATE_NAME.fullmatch(name, len(block + "experts.")):
            found.setdefault(int(match[1]), {})[match[2]] = name
    parts = next((parts for parts in _SEPARATE if any(parts[2] in expert for expert in found.values())), None)
    if parts is None:
        raise error(
            f"names of the experts of {block}",
            got=some(names),
            wanted="one of the namings listed in fusedmoe.checkpoint",
            do="Build FusedExperts from tensors yourself.",
        )
    experts = _count(files.config, block, max(found) + 1)
    if missing := list(islice((expert for expert in range(experts) if expert not in found), 5)):
        raise error(
            f"experts of {block}",
            got=f"none with number {some(missing)}",
            wanted=f"0-{experts - 1}",
            do=CONVERT_AGAIN,
        )
    gated = any(parts[0] in expert for expert in found.values())
    roles = parts if gated else parts[1:]
    absent = (f"{block}experts.{e}.{part}.weight" for e in range(experts) for part in roles if part not in found[e])
    if missing_names := list(islice(absent, 5)):
        raise error(f"experts of {block}", got=f"no {some(missing_names)}", wanted="all of them", do=CONVERT_AGAIN)

    first = found[0][roles[0]]
    shape, dtype = files.header(first)
    pieces = []
    for expert in range(experts):
        for row, part in enumerate(roles):
            name = found[expert][part]
            wanted = shape[::-1] if part == parts[2] else shape
            if len(shape) != 2 or 0 in shape or files.header(name) != (wanted, dtype):
                raise _inconsistent(files, name, first)
            if part == parts[2]:
                pieces.append(_Piece(name, "w2", expert))
            else:
                pieces.append(_Piece(name, "w13", expert, rows=slice(row * shape[0], (row + 1) * shape[0])))
    if dtype is None:
        raise quantised_error(f"{first} of a type that is not float")
    intermediate, hidden = shape
    shapes: dict[str, tuple[int, ...]] = {
        "w13": (experts, (len(roles) - 1) * intermediate, hidden),
        "w2": (experts, hidden, intermediate),
    }
    return _Stored(shapes, pieces, dtype, gated=gated)


def _fused_experts(files: Files, block: str, fused: tuple[str, ...]) -> _Stored:
    names = {role: block + name for role, name in zip(("w13", "w2", "w13_bias", "w2_bias"), fused, strict=False)}
    names = {role: name for role, name in names.items() if name in files.names}
    if "w2" not in names:
        raise error(
            f"experts of {block}", got=f"no {block}{fused[1]}", wanted="it beside the first matrix", do=CONVERT_AGAIN
        )
    headers = {role: files.header(name) for role, name in names.items()}
    (w13, dtype), (w2, _) = headers["w13"], headers["w2"]
    if len(w13) != 3 or len(w2) != 3 or 0 in w13 or w13[0] != w2[0]:
        raise _inconsistent(files, names["w2"], names["w13"])
    experts = _count(files.config, block, w13[0])
    if experts != w13[0]:
        raise error(f"experts of {block}", got=w13[0], wanted=f"{experts}, as config.json says", do=CONVERT_AGAIN)
    # Both at once would need I = 2I, so the shapes alone decide, square matrices included.
    if w13[1:] == (2 * w2[2], w2[1]):
        layout: WeightLayout = "NK"
        rows, hidden = w13[1:]
    elif w13[1:] == (w2[2], 2 * w2[1]):
        layout = "KN"
        hidden, rows = w13[1:]
    else:
        raise _inconsistent(files, names["w2"], names["w13"])
    shapes = {"w13": w13, "w2": w2, "w13_bias": (experts, rows), "w2_bias": (experts, hidden)}
    for role, header in headers.items():
        if header != (shapes[role], dtype):
            raise _inconsistent(files, names[role], names["w13"])
    if dtype is None:
        raise quantised_error(f"{names['w13']} of a type that is not float")
    pieces = [_Piece(name, role, e, part=e) for e in range(experts) for role, name in names.items()]
    return _Stored({role: shapes[role] for role in names}, pieces, dtype, weight_layout=layout)


def _count(config: dict[str, Any], block: str, found: int) -> int:
    """Number of experts, on which tensors and configuration must agree when it says one."""
    wanted = integer(config, ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"))
    if wanted is not None and found > wanted:
        raise error(f"experts of {block}", got=found, wanted=f"{wanted}, as config.json says", do=CONVERT_AGAIN)
    return found if wanted is None else wanted


def _inconsistent(files: Files, name: str, first: str) -> CheckpointError:
    (shape, dtype), (first_shape, first_dtype) = files.header(name), files.header(first)
    return error(
        f"shape or type of {name}",
        got=f"{shape} of {dtype or 'a type that is not float'}",
        wanted=f"what fits {first}, {first_shape} of {first_dtype or 'a type that is not float'}",
        do=CONVERT_AGAIN,
    )
