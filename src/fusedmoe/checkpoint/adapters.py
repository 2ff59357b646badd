"""Read the experts' part of a LoRA adapter that PEFT saved.

An adapter is a directory with ``adapter_config.json`` and ``adapter_model.safetensors``. Two forms are known, after any
prefix with ``layers.<n>.``; r is the rank, E the number of experts::

    experts.<e>.<name>.lora_A.weight, .lora_B.weight    [r, in], [out, r]      a module per expert and matrix
    experts[.base_layer].lora_A.weight, .lora_B.weight  [E r, in], [out, r E]  the experts' fused parameters
                                                                               (target_parameters)

with the names of :mod:`fusedmoe.checkpoint` for gate, up and down. In the second form PEFT orders rows of A by (expert,
rank) and columns of B by (rank, expert): experts are slowest in one and fastest in the other. Its wrapper of one
parameter holds that of the other as ``base_layer``. Which is which follows from the shapes, as does whether A and B
changed places, which they did for ``[E, out, in]`` parameters before PEFT 0.19; where sizes leave that open, from the
version that the adapter names.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any

import torch
from torch import Tensor

from fusedmoe.checkpoint.files import CONVERT_AGAIN, FLOATS, LAYER, Files, error, open_checkpoint, some
from fusedmoe.errors import DTypeError, ShapeError, explain
from fusedmoe.lora import Adapter

_NAMES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
_EACH = re.compile(r"experts\.(\d{1,4})\.(" + "|".join(_NAMES) + r")\.lora_([AB])\.(?:default\.)?weight")
_FUSED = re.compile(r"experts\.((?:base_layer\.)?)lora_([AB])\.(?:default\.)?weight")
_BLOCK = re.compile(r"\.(?=experts\.)")
#: A pattern that is a name.
_NAME = r"[\w.^]+"
#: From this version of PEFT on A meets the inputs of every parameter.
_TODAY = (0, 19, 1)


class _AdapterFiles(Files):
    CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_adapter(
    directory: str | os.PathLike[str],
    layer: int,
    *,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    gated: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Adapter | None:
    """The adapter of one layer's experts.

    What the adapter does not adapt, an expert or one of the matrices, is zeros; smaller ranks are filled up with zeros.

    Args:
        directory: as ``PeftModel.save_pretrained`` writes it.
        layer: number of the layer in the model.
        num_experts, hidden_size, intermediate_size: E, H and I of the layer.
        gated: w13 has gate and up rows.
        dtype: of the matrices; None: as stored.
        device: where they go.

    Returns:
        Matrices as :class:`fusedmoe.Adapter` has them, B's rows in the order of the model's own parameter (gate rows,
        then up rows, of experts that are modules of their own); None when the layer's experts have no adapter.

    Raises:
        CheckpointError: the directory, a file or a tensor is not as described, or the adapter is of a kind that is no
            sum of ``scaling B A`` (DoRA, biases).
        ShapeError, DTypeError: a size is no positive integer.
        MissingDependencyError: safetensors is not installed.
    """
    sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
    for name, value in {**sizes, "layer": layer}.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise DTypeError(explain(name, got=repr(value), wanted="an integer", do="Take it from the model's config."))
        if value < (name != "layer"):
            wanted = "0 or more" if name == "layer" else "1 or more"
            raise ShapeError(explain(name, got=value, wanted=wanted, do="Take it from the model's config."))
    with open_checkpoint(directory, _AdapterFiles) as files:
        _refuse(files)
        names = [name for name in files.names if _of_layer(name, layer)]
        if not names:
            return None
        factors = _Factors(files, num_experts, hidden_size, intermediate_size, gated=gated)
        for name in sorted(names):
            factors.take(name)
        return factors.adapter(dtype, device)


def _of_layer(name: str, layer: int) -> bool:
    found = LAYER.match(name)
    return found is not None and int(found[1]) == layer and _BLOCK.search(name, found.end() - 1) is not None


def _refuse(files: Files) -> None:
    """Kinds of adapters that are no sum of ``scaling B A``."""
    config = files.config
    kind = config.get("peft_type")
    if kind != "LORA":
        do = "Only LoRA adapters are read."
        raise error(f"peft_type of {files.directory / files.CONFIG}", got=repr(kind), wanted="'LORA'", do=do)
    for key, plain in (("use_dora", False), ("lora_bias", False), ("bias", "none"), ("fan_in_fan_out", False)):
        if config.get(key, plain) not in (plain, None):
            do = "Merge the adapter into the model, or train one without."
            raise error(f"{key} of the adapter", got=repr(config[key]), wanted=repr(plain), do=do)


def _check_rank(config: dict[str, Any], name: str, rank: int, parameter: str = "") -> None:
    """The rank that the configuration says: fused factors of another number of experts would be cut wrongly."""
    patterns = config.get("rank_pattern") or {}
    if not isinstance(patterns, dict) or not all(re.fullmatch(_NAME, pattern) for pattern in patterns):
        return  # regular expressions, which are not run
    said = _by_pattern(patterns, name, parameter, config.get("r"))
    if said is not None and said != rank:
        wanted = f"{said}, as adapter_config.json says"
        raise error(f"rank of {name}", got=rank, wanted=wanted, do="Give the number of experts of the adapted model.")


def _by_pattern(patterns: dict[str, Any], name: str, parameter: str, default: Any) -> Any:
    """What the first pattern says that names the module of a tensor, or its end, else the default."""
    module = re.sub(r"(\.base_layer)?\.lora_[AB]\..*", "", name) + parameter
    names = ((pattern.lstrip("^"), value) for pattern, value in patterns.items())
    return next((value for end, value in names if module.endswith(f".{end}") or module == end), default)


def _alpha(config: dict[str, Any], name: str, rank: int, parameter: str = "") -> float:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) where the adapter is rank-stabilised.

    ``parameter``: what a pattern may name beyond the module.
    """
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise error("alpha_pattern of the adapter", got=repr(patterns), wanted="an object", do=CONVERT_AGAIN)
    for pattern in patterns:
        # PEFT takes regular expressions here; those of somebody else's file are not run.
        if not re.fullmatch(_NAME, pattern):
            wanted = "the name of a module, or its end"
            do = "Save the adapter with names."
            raise error("alpha_pattern of the adapter", got=repr(pattern), wanted=wanted, do=do)
    alpha = _by_pattern(patterns, name, parameter, config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise error("lora_alpha of the adapter", got=repr(alpha), wanted="a number", do=CONVERT_AGAIN)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


class _Factors:
    """A and B of a layer as they are found: (part, expert or None for all) -> factor."""

    def __init__(self, files: Files, num_experts: int, hidden: int, intermediate: int, *, gated: bool) -> None:
        self.files, self.gated = files, gated
        self.experts, self.hidden, self.intermediate = num_experts, hidden, intermediate
        self.a: dict[tuple[str, int | None], Tensor] = {}
        self.b: dict[tuple[str, int | None], Tensor] = {}
        self.scale: dict[tuple[str, int | None], float] = {}
        self._pairs: dict[str, dict[str, str]] = {}

    def take(self, name: str) -> None:
        """Read a tensor whose name lies among those of the experts; a fused one in the end, by all of them."""
        tail = name[name.rindex("experts.") :] if "experts." in name else name
        if found := _EACH.fullmatch(tail):
            self._take_one(name, int(found[1]), _NAMES[found[2]], found[3])
        elif found := _FUSED.fullmatch(tail):
            self._pairs.setdefault(found[1], {})[found[2]] = name
        else:
            raise error(
                "tensor of the adapter",
                got=name,
                wanted="lora_A and lora_B of experts.<e>.<gate, up or down>, or of the experts' fused parameters",
                do="An adapter of something else in the experts cannot be left out: merge it into the model.",
            )

    def _read(self, name: str, shape: tuple[int | None, int | None]) -> Tensor:
        return self.files.tensor(name, shape, None, "cpu")

    def _take_one(self, name: str, expert: int, part: str, factor: str) -> None:
        if expert >= self.experts or part == "gate" and not self.gated:
            wanted = f"experts 0 to {self.experts - 1}" + ("" if self.gated else " without a gate")
            raise error("tensor of the adapter", got=name, wanted=wanted, do="Give the sizes of the adapted model.")
        rows, columns = (self.hidden, self.intermediate) if part == "down" else (self.intermediate, self.hidden)
        if factor == "A":
            self.a[part, expert] = a = self._read(name, (None, columns))
            _check_rank(self.files.config, name, a.shape[0])
            self.scale[part, expert] = _alpha(self.files.config, name, a.shape[0])
        else:
            self.b[part, expert] = self._read(name, (rows, None))

    def _take_fused(self) -> None:
        """[E r, in] and [out, r E]; or, of an older PEFT and a parameter [E, out, in], [E r, out] and [in, r E]."""
        fitting = {(pair["A"], pair["B"]): self._kinds(pair["A"], pair["B"]) for pair in self._pairs.values()}
        swapped = self._swapped([{swapped for _, swapped in kinds} for kinds in fitting.values()])
        for (name_a, name_b), kinds in fitting.items():
            part, *others = (part for part, order in kinds if order == swapped)
            if others:
                wanted, do = "sizes that tell: not gated, with H = I, those of w13 and w2 are one", "Merge the adapter."
                raise error(f"parameter of {name_a}", got="shapes that fit both", wanted=wanted, do=do)
            (rows, columns), (out, ranks) = self._matrix_shape(name_a), self._matrix_shape(name_b)
            rank = rows // self.experts
            _check_rank(self.files.config, name_a, rank, f".{part}_proj")
            a = self._read(name_a, (rows, columns)).reshape(self.experts, rank, columns)
            b = self._read(name_b, (out, ranks)).reshape(out, rank, self.experts).permute(2, 0, 1)
            if swapped:
                a, b = b.transpose(1, 2), a.transpose(1, 2)
            if (part, None) in self.a:
                got = f"two adapters of {part}"
                raise error(f"tensor {name_a}", got=got, wanted="one", do=CONVERT_AGAIN)
            self.a[part, None], self.b[part, None] = a, b
            self.scale[part, None] = _alpha(self.files.config, name_a, rank, f".{part}_proj")

    def _kinds(self, name_a: str, name_b: str) -> list[tuple[str, bool]]:
        """What a pair can be by its shapes: which parameter's, and whether A and B changed places."""
        (rows, columns), (out, ranks) = self._matrix_shape(name_a), self._matrix_shape(name_b)
        wide = self.intermediate * (2 if self.gated else 1)
        kinds = {
            ("gate_up", False): (self.hidden, wide),
            ("down", False): (self.intermediate, self.hidden),
            ("gate_up", True): (wide, self.hidden),
            ("down", True): (self.hidden, self.intermediate),
        }
        fitting = [kind for kind, shape in kinds.items() if shape == (columns, out)]
        if rows != ranks or rows % self.experts or not fitting:
            raise error(
                f"tensors {name_a} and lora_B",
                got=f"shapes {(rows, columns)} and {(out, ranks)}",
                wanted=f"[{self.experts} r, in] and [out, {self.experts} r], in and out of "
                f"{some(f'{a} and {b}' for a, b in list(kinds.values())[:2])}",
                do="Give the sizes of the adapted model.",
            )
        return fitting

    def _swapped(self, possible: list[set[bool]]) -> bool:
        """Whether A and B changed places, which they did in all pairs or in none."""
        orders = set[bool]({False, True}).intersection(*possible)
        if len(orders) == 1:
            return orders.pop()
        version = self.files.config.get("peft_version")
        number = re.match(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})", version) if isinstance(version, str) else None
        if orders and number and tuple(map(int, number.groups())) >= _TODAY:
            return False
        raise error(
            "order of the factors of the adapter",
            got=f"shapes that fit {'both orders' if orders else 'no one order'}, peft_version {version!r}",
            wanted=f"PEFT {'.'.join(map(str, _TODAY))} or newer, or sizes that tell",
            do="Where A meets the inputs of its parameter, write that version in adapter_config.json.",
        )

    def _matrix_shape(self, name: str) -> tuple[int, int]:
        shape, kind = self.files.header(name)
        if len(shape) != 2 or kind not in FLOATS or 0 in shape:
            got = f"shape {shape} of {kind}"
            raise error(f"tensor {name}", got=got, wanted="a matrix of floats", do=CONVERT_AGAIN)
        return shape[0], shape[1]

    def adapter(self, dtype: torch.dtype | None, device: str | torch.device) -> Adapter:
        """Everything that was found in four tensors; what is not there is zeros."""
        if self._pairs and all(len(pair) == 2 for pair in self._pairs.values()):
            self._take_fused()
        if self.a.keys() != self.b.keys() or any(len(pair) != 2 for pair in self._pairs.values()):
            odd = [pair for pair in self._pairs.values() if len(pair) != 2] or sorted(
                map(str, self.a.keys() ^ self.b.keys())
            )
            do = CONVERT_AGAIN
            raise error("factors of the adapter", got=f"one without the other: {some(odd)}", wanted="A and B", do=do)
        for key, a in self.a.items():
            if a.shape[-2] != self.b[key].shape[-1]:
                got = f"A of rank {a.shape[-2]}, B of rank {self.b[key].shape[-1]}"
                raise error(f"factors of {key}", got=got, wanted="one rank", do=CONVERT_AGAIN)
        rank = max(a.shape[-2] for a in self.a.values())
        dtype = next(iter(self.a.values())).dtype if dtype is None else dtype
        scaling = next(iter(self.scale.values()))
        apart = self.gated and any(part in ("gate", "up") for part, _ in self.a)
        if apart and ("gate_up", None) in self.a:
            got = "gate_up and gate or up"
            raise error("factors of the adapter", got=got, wanted="one of the two", do=CONVERT_AGAIN)

        def new(*shape: int) -> Tensor:
            return torch.zeros(self.experts, *shape, dtype=dtype, device=device)

        wide = self.intermediate * (2 if self.gated else 1)
        found = Adapter(
            w13_a=new(rank * (2 if apart else 1), self.hidden),
            w13_b=new(wide, rank),
            w2_a=new(rank, self.intermediate),
            w2_b=new(self.hidden, rank),
            scaling=scaling,
        )
        for (part, expert), a in self.a.items():
            b, own = self.b[part, expert], a.shape[-2]
            which: Any = slice(None) if expert is None else expert
            first_a, rows = self._place(part, rank, apart=apart)
            to_a, to_b = (found.w2_a, found.w2_b) if part == "down" else (found.w13_a, found.w13_b)
            to_a[which, ..., first_a : first_a + own, :] = a.to(to_a)
            # Where matrices differ in their scaling, B has the quotient.
            to_b[which, ..., rows, :own] = (b.double() * (self.scale[part, expert] / scaling)).to(to_b)
        return found

    def _place(self, part: str, rank: int, *, apart: bool) -> tuple[int, slice]:
        """First row of A, and rows of B."""
        if part == "up" and apart:
            return rank, slice(self.intermediate, None)
        return 0, slice(0, self.intermediate) if part == "gate" else slice(None)
