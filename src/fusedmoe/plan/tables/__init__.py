"""Tiles that were measured: files of ``fusedmoe tune``, looked up before :mod:`fusedmoe.plan.heuristics` is asked.

A file has the measurements of one layer on one kind of device, under a name made of both (:func:`name_of`): never of a
product's name, but of what decides between kernels. The first folder that has it counts: that of the setting
FUSEDMOE_TUNED, or else the user's cache; then the package's own.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from fusedmoe.plan.config import FEW, KernelConfig, Maps
from fusedmoe.settings import cache_folder, settings
from fusedmoe.spec.layout import Matrix
from fusedmoe.spec.problem import Problem
from fusedmoe.target import Target, version_of

#: Of the files; another one is not read.
SCHEMA = 1
#: A measurement speaks for calls of up to so many times its slots, or so many times fewer.
REACH = 2.0
#: Where the package's own files are.
PACKAGE = Path(__file__).parent

_LOG = logging.getLogger("fusedmoe")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What was found for one number of slots.

    Attributes:
        slots: S = T * top_k.
        backend: that runs it.
        few: see :class:`fusedmoe.plan.config.TritonPlan`.
        gate_up, down: tiles of the two GEMMs; None where nothing was faster than what is planned without a file.
        us, planned_us: time of the layer with them, and as it is planned without a file; None where neither was taken.
        date: of the measurement.
    """

    slots: int
    backend: str = ""
    few: bool = False
    gate_up: KernelConfig | None = None
    down: KernelConfig | None = None
    us: float | None = None
    planned_us: float | None = None
    date: str = ""


def name_of(problem: Problem, target: Target) -> str | None:
    """File name for a layer on a device; None for those that have none: one GEMM, codes for inputs, odd layouts."""
    plain = Matrix("K", tma=True), Matrix("N", tma=True)
    if not target.arch or problem.inputs_dtype or problem.emulate or problem.alone or not problem.rows_aligned:
        return None
    if any(Matrix(one.contiguous, one.tma) not in plain for one in (problem.w13, problem.w2)):
        return None
    words = [f"{target.arch}x{target.n_sm}", f"E={problem.experts}", f"H={problem.hidden}", f"I={problem.intermediate}"]
    words += [problem.dtype + (f"-{problem.fp32_precision}" if problem.dtype == "float32" else "")]
    formats = [
        str(form or "none").replace(" ", "_").replace("/", "-") for form in (problem.w13_format, problem.w2_format)
    ]
    words += dict.fromkeys(formats)
    if not problem.activation.gated:
        words += ["ungated"]
    elif problem.gate_up != "concatenated":
        words += [problem.gate_up]
    if (problem.w13.contiguous, problem.w2.contiguous) != ("K", "K"):
        words += [problem.w13.contiguous + problem.w2.contiguous]
    return ",".join(words) + ".json"


def folders() -> list[Path]:
    """Where files are looked for, the first first; none when the setting says "none"."""
    chosen = settings().tuned
    if chosen == "none":
        return []
    first = cache_folder() if chosen is None else Path(chosen)
    return [PACKAGE] if first is None else [first, PACKAGE]


def lookup(problem: Problem, target: Target) -> tuple[Entry, Path] | None:
    """The measurement that speaks for a call, and its file; None where there is none."""
    found = _entries(problem, target)
    if found is None:
        return None
    entries, path = found
    slots = _slots(problem)
    nearest = min(entries, key=lambda entry: abs(math.log(entry.slots / slots)))
    return (nearest, path) if 1 / REACH <= nearest.slots / slots <= REACH else None


def tokens_before_breaks(problem: Problem, target: Target) -> list[int]:
    """Token counts below the problem's up to which a measurement speaks for a call, and no longer above."""
    found = _entries(problem, target)
    if found is None:
        return []
    slots = sorted(entry.slots for entry in found[0])
    ends = [math.sqrt(a * b) for a, b in itertools.pairwise(slots)]
    ends += [end for one in slots for end in (one / REACH, one * REACH)] + [FEW]
    each = problem.top_k * _slots(problem) / problem.slots  # slots of a token here
    counts = {int(end / each) + more for end in ends for more in (-1, 0, 1)}  # whatever is rounded
    return sorted(tokens for tokens in counts if 0 < tokens < problem.tokens)


def _slots(problem: Problem) -> float:
    """Slots of the experts that are here, where ids may name others as well."""
    return problem.mean_rows * problem.experts


def _entries(problem: Problem, target: Target) -> tuple[Sequence[Entry], Path] | None:
    name = name_of(problem, target)
    if name is None or not problem.tokens:
        return None
    for folder in folders():
        if entries := read(folder / name, target):
            return entries, folder / name
    return None


@functools.lru_cache(maxsize=1024)
def read(path: Path, target: Target) -> tuple[Entry, ...]:
    """The entries of a file; none of one that is not there, and none, with a word in the log, of one that is no use.

    The package's own files are of one Triton, and whoever has another need not be warned of it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as cause:
        _LOG.warning("tuned file %s is ignored: %s", path, cause)
        return ()
    try:
        found = json.loads(text)
        why = _foreign(found, target)
        entries = () if why else tuple(_entry(row) for row in found["entries"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as cause:
        why, entries = f"it is none of fusedmoe tune ({type(cause).__name__}: {cause})", ()
    if why:
        _LOG.log(
            logging.DEBUG if path.parent == PACKAGE else logging.WARNING, "tuned file %s is ignored: %s", path, why
        )
    return entries


def _foreign(found: dict[str, Any], target: Target) -> str | None:
    """Why the measurements of a file say nothing here."""
    if found["schema"] != SCHEMA:
        return f"its schema is {found['schema']!r}, not {SCHEMA}"
    device = found["device"]
    if (device["arch"], device["n_sm"]) != (target.arch, target.n_sm):
        return f"it was measured on {device['arch']} with {device['n_sm']} multiprocessors"
    installed = version_of("triton")
    if installed and [int(word) for word in found["triton"].split(".")[:2]] != list(installed):
        return f"it was measured with triton {found['triton']}, {'.'.join(map(str, installed))} is installed"
    return None


def _entry(row: dict[str, Any]) -> Entry:
    known = {field.name: row[field.name] for field in fields(Entry) if field.name in row}
    for name in ("gate_up", "down"):
        if known.get(name) is not None:
            known[name] = KernelConfig(**known[name])
    entry = Entry(**known)
    if not isinstance(entry.backend, str) or type(entry.few) is not bool or not _number(entry.slots) or not entry.slots:
        raise ValueError("an entry has a backend, whether slots are few, and how many")
    if (entry.gate_up is None) != (entry.down is None):
        raise ValueError("an entry has the tiles of both GEMMs or of none")
    for tile in (entry.gate_up, entry.down):
        if tile is not None and not all(_fits(value, field.default) for field, value in _values(tile)):
            raise ValueError("a tile has numbers from 0, and what is not, true or false")
    return entry


def _values(tile: KernelConfig) -> list[tuple[Field[Any], Any]]:
    return [(field, getattr(tile, field.name)) for field in fields(tile)]


def _fits(value: object, default: object) -> bool:
    """A value of a tile is like the default; where there is none, a number."""
    if isinstance(default, str):
        return value in get_args(Maps)
    return type(value) is bool if isinstance(default, bool) else _number(value)


def _number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def contents(entries: Sequence[Entry], target: Target, command: str) -> str:
    """What a file of these entries says."""
    plain = KernelConfig(block_m=16, block_n=16, block_k=16)

    def tile(config: KernelConfig | None) -> dict[str, Any] | None:
        if config is None:
            return None
        always = ("block_m", "block_n", "block_k", "warps", "stages")
        return {k: v for k, v in asdict(config).items() if k in always or v != getattr(plain, k)}

    rows = [
        {**asdict(entry), "gate_up": tile(entry.gate_up), "down": tile(entry.down)}
        for entry in sorted(entries, key=lambda entry: entry.slots)
    ]
    version = version_of("triton")
    head = {
        "schema": SCHEMA,
        "command": command,
        "triton": None if version is None else ".".join(map(str, version)),
        "device": {"arch": target.arch, "n_sm": target.n_sm, "shared_bytes": target.shared_bytes},
    }
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    return json.dumps(head, indent=2)[:-2] + f',\n  "entries": [\n{lines}\n  ]\n}}\n'
