"""vLLM's own modular kernel with its Triton experts, and with this library's in their place: results and times.

``python benchmarks/against_vllm.py --shape qwen3-30b-a3b --scheme none --scheme fp8_block --json FILE``

Needs a vLLM that the plugin knows (0.22.1 to 0.33), and no engine: both classes are put into a ``FusedMoEKernel`` with
the prepare and finalize steps that vLLM chooses for one GPU, which quantise rows where the scheme does. Each result is
compared with the reference, and the two with each other; times are the median of a replayed graph, L2 emptied before
each. Where vLLM's class refuses a layer that its function ``fused_experts`` takes, that is timed. ``--eager`` adds what
the host takes without a graph. On a CPU vLLM's class cannot run, and ours is timed alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from fusedmoe.bench import Layer, default_device, draw_layer, shape_of, time_us
from fusedmoe.bench.timing import host_us
from fusedmoe.cli.environment import name_of
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.integrations.vllm import experts_class, kind_of
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.format import Format
from fusedmoe.testing.verify import relative_error, verify

#: Schemes of this library that vLLM's Triton experts have, and what vLLM calls the weights of those whose tensors have
#: another type.
SCHEMES = {
    "none": None, "fp8_block": None, "fp8_channel": None, "fp8_tensor": None, "int8_w8a8": None,
    "int8_w8a16": torch.int8, "int4_w4a16": "int4",
}  # fmt: skip


def _groups(form: Format) -> list[int] | None:
    """What vLLM calls the shape of a block: its weight-only kernel wants [0, columns of a group]."""
    if form.inputs is None:
        return [0, form.block[1]] if form.block[1] else None
    return list(form.block) if form.block[0] > 1 and form.inputs.mode == "group" else None


def as_vllm_has(w: torch.Tensor | ExpertMatrix) -> torch.Tensor | ExpertMatrix:
    """The same matrix: integers of weight-only layers are unsigned in vLLM, and shifted by 128 without zero points."""
    if not isinstance(w, ExpertMatrix) or w.format.scheme != "int8_w8a16" or w.data.dtype != torch.int8:
        return w
    return ExpertMatrix("int8_w8a16", w.data.view(torch.uint8) ^ 128, w.scale)


def configured(layer: Layer, tokens: int) -> tuple[Any, Any]:
    """VLLM's two configurations of a layer."""
    from vllm.model_executor.layers.fused_moe import config as theirs
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    shape, w13, w2 = layer.shape, layer.w13, layer.w2
    sizes = {"intermediate_size": shape.intermediate, "intermediate_size_per_partition": shape.intermediate}
    fields = {field.name for field in dataclasses.fields(theirs.FusedMoEConfig)}
    moe = theirs.FusedMoEConfig(
        num_experts=shape.experts,
        experts_per_token=shape.top_k,
        hidden_dim=shape.hidden,
        num_local_experts=shape.experts,
        num_logical_experts=shape.experts,
        activation=MoEActivation(layer.options["activation"]),
        device=layer.generator.device,
        routing_method=theirs.RoutingMethodType.Renormalize,
        moe_parallel_config=theirs.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=layer.dtype,
        max_num_tokens=max(tokens, 512),
        **{name: value for name, value in sizes.items() if name in fields},
    )
    biases = {"w1_bias": layer.options.get("w13_bias"), "w2_bias": layer.options.get("w2_bias")}
    if not isinstance(w13, ExpertMatrix) or not isinstance(w2, ExpertMatrix):
        return moe, theirs.FusedMoEQuantConfig.make(**biases)
    form = w13.format
    rows = None if form.inputs is None else w13.data.dtype
    flat = (lambda scale: scale.flatten()) if form.scheme == "fp8_tensor" else (lambda scale: scale)
    quant = theirs.FusedMoEQuantConfig.make(
        rows,
        weight_dtype=SCHEMES[form.scheme] or w13.data.dtype,
        block_shape=_groups(form),
        per_act_token_quant=form.inputs is not None and form.inputs.mode == "token",
        w1_scale=flat(w13.scale),
        w2_scale=flat(w2.scale),
        w1_zp=w13.zero,
        w2_zp=w2.zero,
        **biases,
    )
    assert kind_of(quant) is not None, quant
    return moe, quant


def kernel(base: Any, moe: Any, quant: Any) -> Any:
    """VLLM's kernel of one GPU with a class of experts."""
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize

    path = maybe_make_prepare_finalize(moe=moe, quant_config=quant, allow_new_interface=True)
    return modular_kernel.FusedMoEKernel(path, base(moe_config=moe, quant_config=quant))


def configuration(device: torch.device) -> AbstractContextManager[Any]:
    """What vLLM's layers look up when they are made and called, and memory for their intermediate results."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.v1.worker import workspace

    if not workspace.is_workspace_manager_initialized():
        workspace.init_workspace_manager(device)
    return set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device=device.type)))


def operands(layer: Layer, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
    """Arguments of a call of vLLM's experts."""
    codes = [w.data if isinstance(w, ExpertMatrix) else w for w in (layer.w13, layer.w2)]
    return {
        "hidden_states": x, "w1": codes[0], "w2": codes[1], "topk_weights": weights, "topk_ids": ids,
        "global_num_experts": layer.shape.experts, "expert_map": None,
        "apply_router_weight_on_input": layer.options.get("apply_router_weight_on_input", False),
    }  # fmt: skip


def measured(layer: Layer, tokens: int, *, eager: bool) -> dict[str, object]:
    """Errors and times of both classes."""
    from vllm.model_executor.layers import fused_moe
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    scheme = "none" if not isinstance(layer.w13, ExpertMatrix) else layer.w13.format.scheme
    base = triton_moe.TritonWNA16Experts if scheme.endswith("a16") else triton_moe.TritonExperts
    moe, quant = configured(layer, tokens)
    x, _, _, weights, ids = arguments = layer.call(tokens)
    row: dict[str, object] = {"shape": layer.shape.name, "scheme": scheme, "tokens": tokens}
    given = operands(layer, x, weights, ids)
    results = {}
    for name, one in (("vllm", base), ("fusedmoe", experts_class(base))):
        if name == "vllm" and x.device.type == "cpu":
            continue
        call = functools.partial(kernel(one, moe, quant).apply, activation=moe.activation, **given)
        try:
            results[name] = call().clone()  # it lies in vLLM's workspace
        except (AssertionError, TypeError):
            if name == "fusedmoe":
                raise
            # 0.22.1: rows of int8, weight-only matrices whose rows are one group, and few tokens of int4. Its function,
            # from before there were classes, takes the first.
            row["vllm_class_refuses"] = True
            call = functools.partial(fused_moe.fused_experts, quant_config=quant, **given)
            try:
                results[name] = call().clone()
            except (AssertionError, TypeError, NotImplementedError):
                continue
        verdict = verify(results[name], arguments, layer.options)
        row |= {f"{name}_error": verdict.error, "tolerance": verdict.tolerance, f"{name}_ok": verdict.ok}
        row[f"{name}_us"] = time_us(call, x.device)
        if eager and x.is_cuda:
            row[f"{name}_host_us"] = host_us(call, x.device)
    if len(results) == 2:
        row["apart"] = relative_error(results["fusedmoe"], results["vllm"])
        row["speedup"] = row["vllm_us"] / row["fusedmoe_us"]  # type: ignore[operator]
    return row


@torch.no_grad()
def main() -> None:
    """Print a line for each point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="of fusedmoe bench; repeatable; qwen3-30b-a3b")
    parser.add_argument("--scheme", action="append", choices=SCHEMES, help="repeatable; none")
    parser.add_argument("--tokens", default="1,8,32,128,512,2048,8192")
    parser.add_argument("--activation", default="silu")
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--weight-on-input", action="store_true", help="router weights multiply rows; top_k is 1")
    parser.add_argument("--eager", action="store_true", help="host time too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device, rows = default_device(), []
    with configuration(device):
        for shape in map(shape_of, options.shape or ("qwen3-30b-a3b",)):
            for scheme in options.scheme or ("none",):
                layer = draw_layer(
                    *(shape,), dtype=torch.bfloat16, device=device, scheme=scheme, bias=options.bias,
                    activation=Activation.of(options.activation).name,
                )  # fmt: skip
                layer = layer._replace(w13=as_vllm_has(layer.w13), w2=as_vllm_has(layer.w2))
                if options.weight_on_input:
                    layer = layer._replace(options={**layer.options, "apply_router_weight_on_input": True})
                if scheme == "fp8_tensor":  # vLLM has one scale for gate and up
                    w13 = layer.w13
                    layer = layer._replace(w13=ExpertMatrix(w13.format, w13.data, w13.scale[:, :1], parts=1))
                for tokens in map(int, options.tokens.split(",")):
                    row = measured(layer, tokens, eager=options.eager)
                    rows.append(row)
                    said = (f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float))
                    print(f"{shape.name:14} {scheme:12} T = {tokens:5}  {'  '.join(said)}", flush=True)
                del layer
    if options.json:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "vllm")}
        found = {"device": name_of(device), "versions": versions, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
