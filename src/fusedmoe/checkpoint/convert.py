"""Quantise the experts of a checkpoint directory into another one, expert by expert."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedmoe.checkpoint.files import FLOATS, Files, beside, error, json_object, open_checkpoint
from fusedmoe.checkpoint.methods import PLAIN
from fusedmoe.checkpoint.progress import ticks
from fusedmoe.checkpoint.stored import Layer, Projection, find_layer
from fusedmoe.checkpoint.writer import Region, Writer
from fusedmoe.errors import OptionError, explain
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.quantization import quantize
from fusedmoe.schemes import format_of, granularity_of
from fusedmoe.spec.format import Format

#: Weights that other programs than safetensors readers load; a quantised directory must not offer them.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors", ".index.json")


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What quantisation did to a layer: |dequantised - weight| / |weight|, Frobenius norms.

    ``w13_max``, ``w2_max``: of the worst expert.
    """

    layer: int
    experts: int
    w13: float
    w13_max: float
    w2: float
    w2_max: float


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was written."""

    format: str
    method: str
    layers: tuple[LayerError, ...]
    files: tuple[str, ...]
    bytes_before: int
    bytes_after: int


class _Layout(NamedTuple):
    """``quantization_config`` but for the list of other modules, that list's key, and the tensors of a projection."""

    config: dict[str, Any]
    left_out: str
    encode: Callable[[ExpertMatrix], dict[str, Tensor]]


class _Job(NamedTuple):
    """Rows of projections that are quantised as one matrix, one part for each prefix of names to be written."""

    matrix: str  # w13 or w2
    sources: tuple[tuple[Projection, slice], ...]
    prefixes: tuple[Callable[[int], str], ...]

    def read(self, expert: int) -> tuple[Tensor, Tensor | None]:
        """Weights [N, K] and bias [N] of an expert."""
        weights, biases = [], []
        for source, part in self.sources:
            rows, columns = (range(size) for size in source.shape)
            span, keep = range(*part.indices(len(rows))), slice(None)
            if span.step != 1:  # every other row
                span, keep = rows, part
            weights.append(source.codes(expert, span, columns)[keep])
            biases += [source.bias(expert, span)[keep]] if "bias" in source.endings else []
        return torch.cat(weights), torch.cat(biases) if biases else None


#: Takes the beginning of the names, the expert's matrix and its bias.
_Store = Callable[[str, ExpertMatrix, "Tensor | None"], None]


def quantize_checkpoint(
    source: Path,
    target: Path,
    scheme: str,
    *,
    group: int | None = None,
    block: tuple[int, int] | None = None,
    zero: bool = False,
    shard_bytes: int = 5 * 10**9,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
) -> Conversion:
    """Write ``source`` to the new directory ``target`` with quantised experts; everything else is copied as it is.

    Rounds to nearest, no calibration. Memory: one expert's matrix. Written are, per projection of each expert
    (names of the source, or ``experts.<e>.gate_proj`` and so on where it has one tensor for all)::

        fp8_block                            quant_method fp8: weight, weight_scale_inv
        fp8_channel, fp8_tensor, fp8_w8a16   compressed-tensors float-quantized: weight, weight_scale
        int8_w8a8                            compressed-tensors int-quantized: weight, weight_scale
        int4_w4a16, int8_w8a16               compressed-tensors pack-quantized: weight_packed, weight_scale,
                                             weight_shape, with zero points weight_zero_point
        mxfp4 of fused interleaved experts   gpt-oss: gate_up_proj_blocks, _scales, _bias, down_proj_...
        others                               quant_method fusedmoe: weight (two 4-bit codes a byte), weight_scale,
                                             weight_tensor_scale; the configuration has the Format's words

    Args:
        source, target: directories; target must not exist.
        scheme, group, block, zero: see :func:`fusedmoe.schemes.format_of`.
        shard_bytes: limit of a file.
        device: where to compute.
        progress: as for :func:`fusedmoe.checkpoint.read_experts`.

    Raises:
        CheckpointError: the source is broken, has no experts, or is quantised already.
        OptionError: the scheme does not allow a choice; the target exists or cannot be written.
        ShapeError: a group does not divide the sizes of the experts.
    """
    element = "uint8" if scheme == "int8_w8a16" else None  # the packed format has unsigned codes only
    form = format_of(scheme, group=group, block=block, zero=zero, element=element)
    if target.exists():
        raise OptionError(
            explain("target", got=f"{target}, which exists", wanted="a new directory", do="Choose another name.")
        )
    with open_checkpoint(source) as files:
        _refuse_quantised(files)
        layers = _layers(files)
        form = _scales_as(form, (layer for _, layer in layers.values()))
        with _new_directory(target) as directory:
            return _convert(files, layers, directory, form, shard_bytes, device, progress)


def _refuse_quantised(files: Files) -> None:
    if said := files.config.get("quantization_config") or files.config.get("compression_config"):
        method = said.get("quant_method") if isinstance(said, dict) else said
        raise error(
            f"experts of {files.directory}",
            got=f"quantization_config with method {method!r} in config.json",
            wanted="an unquantised checkpoint",
            do="Take the original: quantising twice adds up the errors.",
        )


def _layers(files: Files) -> dict[str, tuple[int, Layer]]:
    """The layers with experts, by the prefix of their names."""
    blocks, _ = files.blocks()
    if not blocks:
        files.block(0)  # raises
    found = {block: (number, find_layer(files, block)) for number in sorted(blocks) for block in sorted(blocks[number])}
    for _, layer in found.values():
        layer.check(range(layer.experts))
        assert all(projection.method == PLAIN for projection in (*layer.w13, layer.w2))
    return found


@contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """A directory that gets its name when everything is in it, and is gone when something fails."""
    directory = target.with_name(f"{target.name}.incomplete")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir()
    except OSError as cause:
        got = cause.strerror or cause
        raise OptionError(
            explain(
                f"directory {directory}", got=got, wanted="one that can be made", do="Remove it, or choose another."
            )
        ) from cause
    try:
        yield directory
        directory.rename(target)
    except OSError as cause:
        do = "Make room, or choose another place."
        raise OptionError(explain(f"writing {target}", got=cause, wanted="files that can be written", do=do)) from cause
    finally:
        if directory.exists():
            shutil.rmtree(directory)


def _jobs(block: str, layer: Layer, *, fused: bool) -> list[_Job]:
    """w13 and w2 of each expert; gate and up are two parts, unless they are stored and written (``fused``) as one."""
    both, down, every = layer.w13[0], layer.w2, slice(None)
    if fused or down.tail is not None:
        sources = tuple((projection, every) for projection in layer.w13)
        prefixes = tuple(projection.prefix for projection in layer.w13)
        return [_Job("w13", sources, prefixes), _Job("w2", ((down, every),), (down.prefix,))]

    def named(name: str) -> Callable[[int], str]:
        return lambda expert: f"{block}experts.{expert}.{name}"

    size = layer.intermediate
    gate, up = (slice(0, None, 2), slice(1, None, 2)) if layer.interleaved else (slice(0, size), slice(size, None))
    return [
        _Job("w13", ((both, gate), (both, up)), (named("gate_proj"), named("up_proj"))),
        _Job("w2", ((down, every),), (named("down_proj"),)),
    ]


def _separate(writer: Writer, layout: _Layout) -> _Store:
    """Tensors of their own for each expert."""

    def store(prefix: str, made: ExpertMatrix, bias: Tensor | None) -> None:
        tensors = layout.encode(made) | ({} if bias is None else {".bias": bias})
        for ending, tensor in tensors.items():
            writer.add(prefix + ending, tensor)

    return store


def _gpt_oss(writer: Writer, jobs: list[_Job]) -> _Store:
    """One tensor for all experts, as gpt-oss has them; room for all of it is made first."""
    regions: dict[str, Region] = {}
    for job in jobs:
        source, head = job.sources[0][0], job.prefixes[0](0)
        shape = (source.experts, source.shape[0], source.shape[1] // 32)
        regions[head + "_blocks"] = writer.room(head + "_blocks", torch.uint8, (*shape, 16))
        regions[head + "_scales"] = writer.room(head + "_scales", torch.uint8, shape)
        if "bias" in source.endings:
            regions[head + "_bias"] = writer.room(head + "_bias", FLOATS[source.types["bias"]], shape[:2])

    def store(prefix: str, made: ExpertMatrix, bias: Tensor | None) -> None:
        regions[prefix + "_blocks"].fill(made.data)
        regions[prefix + "_scales"].fill(made.scale)
        if bias is not None:
            regions[prefix + "_bias"].fill(bias)

    return store


def _scales_as(form: Format, layers: Iterable[Layer]) -> Format:
    """The format with scales of the type of the weights, as packed checkpoints have them."""
    dtypes = {str(FLOATS[layer.w2.types["data"]]).removeprefix("torch.") for layer in layers}
    if form.element in ("int4", "uint8") and len(dtypes) == 1 and dtypes <= {"float16", "bfloat16"}:
        return replace(form, scale=dtypes.pop())
    return form


def _convert(
    files: Files,
    layers: dict[str, tuple[int, Layer]],
    directory: Path,
    form: Format,
    shard_bytes: int,
    device: torch.device | str,
    progress: bool | None,
) -> Conversion:
    consumed = {name for _, layer in layers.values() for name in layer.consumed}
    others = [name for name in files.names if name not in consumed]
    fused = form.scheme == "mxfp4" and all(layer.interleaved for _, layer in layers.values())
    layout = _Layout({"quant_method": "mxfp4"}, "modules_to_not_convert", _nothing) if fused else _layout(form)
    writer, reports = Writer(directory, shard_bytes), []
    with ticks(progress, len(others) + sum(layer.experts for _, layer in layers.values()), "quantise") as tick:
        for name in others:
            kind, shape, size, pieces = files.raw(name)
            writer.reserve(name, kind, shape, size).write(pieces)
            tick()
        for block, (number, layer) in layers.items():
            jobs = _jobs(block, layer, fused=fused)
            store = _gpt_oss(writer, jobs) if fused else _separate(writer, layout)
            reports.append(_layer(number, jobs, form, store, device, tick))
    left_out = [name.removesuffix(".weight") for name in others if len(files.header(name)[0]) > 1]
    names = writer.close()
    config = json_object(files.directory / "config.json")
    config["quantization_config"] = {**layout.config, layout.left_out: sorted(set(left_out))}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in sorted(files.directory.iterdir()):
        if path.is_dir() or path.name == "config.json" or path.name.endswith(_OTHER_WEIGHTS):
            continue
        if beside(files.directory, path.name):
            shutil.copyfile(path, directory / path.name)
    return Conversion(
        format=str(form),
        method=layout.config["quant_method"],
        layers=tuple(reports),
        files=tuple(names),
        bytes_before=files.nbytes(),
        bytes_after=sum((directory / name).stat().st_size for name in names),
    )


def _layer(
    number: int, jobs: list[_Job], form: Format, store: _Store, device: torch.device | str, tick: Callable[[], None]
) -> LayerError:
    """Quantise a layer, and report on it."""
    total = {"w13": torch.zeros(2, dtype=torch.float64), "w2": torch.zeros(2, dtype=torch.float64)}
    worst = dict.fromkeys(total, 0.0)
    experts = jobs[0].sources[0][0].experts
    for expert in range(experts):
        own = {name: torch.zeros_like(squares) for name, squares in total.items()}
        for job in jobs:
            weight, bias = job.read(expert)
            weight = weight.to(device)
            parts = len(job.prefixes)
            made = quantize(weight[None], form, parts=parts)
            difference = made.dequantize_expert(0) - weight
            norms = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in (difference, weight)]
            own[job.matrix] += torch.stack(norms).square().cpu()
            for i, prefix in enumerate(job.prefixes):
                store(prefix(expert), _part(made, i, parts), None if bias is None else bias.chunk(parts)[i])
        for name, squares in own.items():
            total[name] += squares
            worst[name] = max(worst[name], _error(squares))
        tick()
    return LayerError(
        layer=number,
        experts=experts,
        w13=_error(total["w13"]),
        w13_max=worst["w13"],
        w2=_error(total["w2"]),
        w2_max=worst["w2"],
    )


def _part(made: ExpertMatrix, i: int, parts: int) -> ExpertMatrix:
    """One of the parts that a matrix was quantised in."""
    rows = {name: tensor.chunk(parts, 1)[i] for name, tensor in made.tensors().items() if tensor.dim() == 3}
    return ExpertMatrix(made.format, rows["data"], rows["scale"], zero=rows.get("zero"), tensor_scale=made.tensor_scale)


def _error(squares: Tensor) -> float:
    """|difference| / |weight| from the squares of both; an expert of zeros has no error."""
    return float((squares[0] / squares[1]).sqrt()) if squares[1] else 0.0


# --- one function for each way to write ----------------------------------------------------------------------------


def _nothing(made: ExpertMatrix) -> dict[str, Tensor]:
    return {}


def _layout(form: Format) -> _Layout:
    if form.scheme == "fp8_block" and form.element == "e4m3":
        config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        config["weight_block_size"] = list(form.block)  # type: ignore[assignment]
        return _Layout(config, "modules_to_not_convert", partial(_tensors, scale=".weight_scale_inv"))
    if form.scheme in ("fp8_channel", "fp8_tensor", "fp8_w8a16"):
        return _Layout(_compressed_tensors(form, "float-quantized", "float", 8), "ignore", _tensors)
    if form.scheme == "int8_w8a8":
        return _Layout(_compressed_tensors(form, "int-quantized", "int", 8), "ignore", _tensors)
    if form.scheme in ("int4_w4a16", "int8_w8a16"):
        bits = 8 // form.per_byte
        return _Layout(_compressed_tensors(form, "pack-quantized", "int", bits), "ignore", _packed)
    own = {
        "quant_method": "fusedmoe",
        "scheme": form.scheme,
        "element": form.element,
        "block": list(form.block),
        "scale": form.scale,
        "zero": form.zero,
        "inputs": form.inputs.mode if form.inputs else None,
    }
    return _Layout(own, "ignore", _tensors)


def _compressed_tensors(form: Format, kind: str, code: str, bits: int) -> dict[str, Any]:
    strategy = granularity_of(form.block)
    common = {"num_bits": bits, "type": code, "symmetric": not form.zero, "actorder": None}
    weights = {
        **common,
        "strategy": strategy,
        "group_size": form.block[1] if strategy == "group" else None,
        "block_structure": list(form.block) if strategy == "block" else None,
        "dynamic": False,
    }
    inputs = None
    if form.inputs:
        size = form.inputs.group or None
        inputs = {**common, "strategy": form.inputs.mode, "group_size": size, "block_structure": None, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


def _tensors(made: ExpertMatrix, scale: str = ".weight_scale") -> dict[str, Tensor]:
    """Codes and scales as they are."""
    scales = made.scale[0]
    tensors = {".weight": made.data[0], scale: scales.flatten() if made.format.block == (0, 0) else scales}
    if made.tensor_scale is not None:
        tensors[".weight_tensor_scale"] = made.tensor_scale
    return tensors


def _packed(made: ExpertMatrix) -> dict[str, Tensor]:
    """Codes along K, zero points along N in words of 32 bits, low bits first."""
    tensors = {
        ".weight_packed": _words(made.data[0]),
        ".weight_scale": made.scale[0],
        ".weight_shape": torch.tensor(made.shape[1:]),
    }
    if made.zero is not None:
        # Two int4 zero points share a byte along N as two codes do along K: the bytes are packed alike.
        tensors[".weight_zero_point"] = _words(made.zero[0].T).T
    return tensors


def _words(codes: Tensor) -> Tensor:
    """Bytes [rows, bytes] as words, filled up with zeros."""
    lie = codes.new_zeros(codes.shape[0], -(-codes.shape[1] // 4) * 4)
    lie[:, : codes.shape[1]] = codes
    return lie.view(torch.int32)
