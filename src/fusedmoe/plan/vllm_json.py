"""Tuned tiles as vLLM has them: a JSON file for each layer and device, the same tile for both GEMMs.

``{"<tokens>": {"BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages"}}``, where
N counts rows of weights: gate and up of a column are two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace

from fusedmoe.errors import OptionError, explain
from fusedmoe.plan.config import KernelConfig
from fusedmoe.plan.heuristics import assemble, tiled_plan, tiles_of_height
from fusedmoe.plan.tables import Entry
from fusedmoe.plan.validity import why_not_plan
from fusedmoe.spec.problem import Problem
from fusedmoe.target import Target

#: Its names, and ours.
_FIELDS = {
    "BLOCK_SIZE_M": "block_m",
    "BLOCK_SIZE_N": "block_n",
    "BLOCK_SIZE_K": "block_k",
    "GROUP_SIZE_M": "group_m",
    "num_warps": "warps",
    "num_stages": "stages",
}

#: Its names of codes.
_ELEMENTS = {"e4m3": "fp8", "int8": "int8", "int4": "int4"}


def file_name(problem: Problem, device_name: str) -> str:
    """The name under which vLLM looks for the tiles of a layer.

    Args:
        device_name: as torch tells it.

    Raises:
        OptionError: its names have no word for the format.
    """
    form = problem.w13_format
    device = re.sub(r"[\s/]+", "_", device_name)
    if "H200" in device.split("_"):
        device = "NVIDIA_H200"
    kind = "float32" if problem.dtype == "float32" else None
    if form is not None:
        rows = None if form.inputs is None else form.inputs.element
        if form != problem.w2_format or form.element not in _ELEMENTS or rows not in (None, form.element):
            wanted = "fp8, int8 or int4 of both matrices, or none"
            raise OptionError(explain("scheme for vLLM's files", got=str(form), wanted=wanted, do="Leave --vllm out."))
        bits = 8 // form.per_byte
        kind = f"{_ELEMENTS[form.element]}_w{bits}a{16 if rows is None else bits}"
        if rows == "int8":  # which it forgot to name
            kind = None
    words = [f"E={problem.experts}", f"N={problem.intermediate}", f"device_name={device}"]
    words += [f"dtype={kind}"] if kind else []
    if form is not None and form.block[0] > 1 and form.block[1] > 0:
        words += [f"block_shape=[{form.block[0]},{form.block[1]}]"]
    return ",".join(words) + ".json"


def write(tiles: Mapping[int, KernelConfig], width: int, triton: str) -> str:
    """A file of the tiles of gate-up, by the number of tokens.

    Args:
        tiles: gate-up's: it has most of the work, and both GEMMs will get them.
        width: rows of weights to a column, see :class:`fusedmoe.spec.problem.Gemm`.
        triton: version that they were measured with.
    """
    rows: dict[str, object] = {"triton_version": triton}
    for tokens, tile in sorted(tiles.items()):
        row = {theirs: getattr(tile, ours) for theirs, ours in _FIELDS.items()}
        rows[str(tokens)] = {**row, "BLOCK_SIZE_N": tile.block_n * width}
    return json.dumps(rows, indent=4) + "\n"


def read(text: str, problem: Problem, target: Target) -> tuple[list[Entry], dict[int, list[str]]]:
    """Entries for the layer of a problem, and by tokens every reason against the tiles that cannot run here.

    Tiles keep of the planner's what vLLM's do not say, but load by pointer.

    Raises:
        OptionError: it is no such file.
    """
    entries: list[Entry] = []
    refused: dict[int, list[str]] = {}
    try:
        rows = {int(tokens): row for tokens, row in json.loads(text).items() if tokens != "triton_version"}
        tiles = {tokens: {ours: int(row[theirs]) for theirs, ours in _FIELDS.items()} for tokens, row in rows.items()}
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as cause:
        got = f"{type(cause).__name__}: {cause}"
        wanted = "an object of tiles by number of tokens, each with " + ", ".join(_FIELDS)
        raise OptionError(explain("tuned file of vLLM", got=got, wanted=wanted, do="Check the path.")) from cause
    calls = [replace(problem, tokens=tokens) for tokens in sorted(tiles) if 0 < tokens < 2**20]
    for call in calls:
        tile, few = tiles[call.tokens], tiled_plan(call, target).few
        gate_up, down = (
            replace(
                own,
                block_m=tile["block_m"],
                block_n=max(1, tile["block_n"] // gemm.width),
                block_k=tile["block_k"],
                group_m=tile["group_m"],
                warps=tile["warps"],
                stages=tile["stages"],
                maps="none",
                programs_per_sm=0,
                flatten=False,
            )
            for own, gemm in zip(
                tiles_of_height(call, target, max(16, tile["block_m"]), few=few),
                (call.gate_up_gemm, call.down_gemm),
                strict=True,
            )
        )
        plan = assemble(call, target, few=few, gate_up=gate_up, down=down)
        if reasons := why_not_plan(plan, call, target):
            refused[call.tokens] = reasons
            continue
        entries.append(Entry(slots=call.slots, backend="triton", few=few, gate_up=gate_up, down=down))
    return entries, refused
