"""The main job: the experts of a checkpoint's layer on hidden states, verified, timed, beside the floor."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedmoe.atomic import replacing
from fusedmoe.bench import describe, measure_ceilings, time_us
from fusedmoe.checkpoint import read_embedding, read_experts, read_router
from fusedmoe.checks import check
from fusedmoe.cli.sample import VOCABULARY, transformers, write_sample
from fusedmoe.errors import CheckpointError, OptionError, ShapeError, explain
from fusedmoe.functional import fused_experts
from fusedmoe.plan.floor import floor_of, types_of
from fusedmoe.plan.planner import choose
from fusedmoe.target import target_of
from fusedmoe.testing.verify import verify

#: What a tokenizer is stored in.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What ``fusedmoe run`` prints.

    Attributes:
        checkpoint, layer: what was read; ``checkpoint`` says so when it was made for this run.
        hidden_states: where they came from.
        formats: of w13 and w2.
        backend, why, refused, config: the plan.
        us, floor_us, floor_bound, times_floor: time of a call, its floor, what bounds that, and their quotient.
        error, tolerance, reference, rows: see :class:`fusedmoe.testing.verify.Verdict`.
        output: the file that was written, or None.
    """

    checkpoint: str
    layer: int
    hidden_states: str
    tokens: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    activation: str
    dtype: str
    formats: list[str]
    device: str
    backend: str
    why: str
    refused: dict[str, list[str]]
    config: str
    distinct: int
    us: float
    floor_us: float
    floor_bound: str
    times_floor: float
    error: float
    tolerance: float
    reference: str
    rows: int
    output: str | None

    @property
    def ok(self) -> bool:
        """The error keeps the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked for; hidden states come from the file ``hidden``, from ``text``, or are random."""

    layer: int
    hidden: Path | None
    text: str | None
    tokens: int
    dtype: torch.dtype | None
    device: torch.device
    backend: str | None
    output: Path | None


def run_layer(checkpoint: Path | None, job: Job) -> Report:
    """Do the job on a checkpoint, or on a small one that is written for it.

    Raises:
        CheckpointError, MissingDependencyError, and what :func:`fusedmoe.fused_experts` raises.
    """
    if checkpoint is not None:
        return _run(checkpoint, str(checkpoint), job)
    with tempfile.TemporaryDirectory(prefix="fusedmoe-") as directory:
        write_sample(Path(directory))
        name = "none given: a small Qwen3-MoE with random weights, written by Transformers, removed afterwards"
        return _run(Path(directory), name, job)


@torch.no_grad()
def _run(directory: Path, name: str, job: Job) -> Report:
    device, backend = job.device, job.backend
    experts = read_experts(directory, job.layer, dtype=job.dtype, device=device)
    router = read_router(directory, job.layer, dtype=job.dtype, device=device)
    x, source = _hidden_states(directory, router.weight.shape[1], job)
    # Quantised experts have no type of their own that rows could follow.
    plain = next((w.dtype for w in (experts.w13, experts.w2) if isinstance(w, Tensor)), None)
    x = x.to(device, plain or job.dtype or experts.dtype or torch.bfloat16)
    topk = router(x)
    arguments = (x, experts.w13, experts.w2, topk.weights, topk.ids)
    options: dict[str, Any] = {
        "activation": experts.activation,
        "gate_up_layout": experts.gate_up_layout,
        "weight_layout": experts.weight_layout,
        "w13_bias": experts.w13_bias,
        "w2_bias": experts.w2_bias,
        "apply_router_weight_on_input": experts.apply_router_weight_on_input,
    }
    problem = check(*arguments, **options).problem
    plan = choose(problem, target_of(device), backend)
    out = fused_experts(*arguments, backend=backend, out=torch.full_like(x, float("nan")), **options)
    verdict = verify(out, arguments, options)
    if job.output is not None:
        _save(job.output, {"output": out, "hidden_states": x, "topk_weights": topk.weights, "topk_ids": topk.ids})
    us = time_us(lambda: fused_experts(*arguments, backend=backend, **options), device, graph=plan.backend != "torch")
    distinct = int(topk.ids.unique().numel())
    target = target_of(device)
    floor = floor_of(problem, target, measure_ceilings(device, types_of(problem, target)), distinct=distinct)
    return Report(
        checkpoint=name,
        layer=job.layer,
        hidden_states=source,
        tokens=problem.tokens,
        experts=problem.experts,
        top_k=problem.top_k,
        hidden=problem.hidden,
        intermediate=problem.intermediate,
        activation=problem.activation.name,
        dtype=problem.dtype,
        formats=[str(form or "not quantised") for form in (problem.w13_format, problem.w2_format)],
        device=str(device),
        backend=plan.backend,
        why=plan.why,
        refused={name: list(reasons) for name, reasons in plan.refused},
        config=describe(plan),
        distinct=distinct,
        us=us,
        floor_us=floor.us,
        floor_bound=floor.bound,
        times_floor=us / floor.us,
        error=verdict.error,
        tolerance=verdict.tolerance,
        reference=verdict.reference,
        rows=verdict.rows,
        output=None if job.output is None else str(job.output),
    )


def _hidden_states(directory: Path, width: int, job: Job) -> tuple[Tensor, str]:
    """Hidden states [T, H], and where they came from."""
    if job.hidden is not None:
        return _from_file(job.hidden, width), str(job.hidden)
    if job.text is not None:
        return _from_text(directory, job.text)
    return torch.randn(job.tokens, width, generator=torch.Generator().manual_seed(0)), "random, normal"


def _from_file(path: Path, width: int) -> Tensor:
    """Tensor "hidden_states" [..., H] of a safetensors file, as [T, H]."""
    from safetensors import SafetensorError, safe_open

    wanted, do = 'a safetensors file with a tensor "hidden_states"', "Write it with safetensors.torch.save_file."
    if path.exists() and not path.is_file():  # a pipe would wait for ever
        raise OptionError(explain(f"--hidden {path}", got="no regular file", wanted=wanted, do=do))
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            x = file.get_tensor("hidden_states") if "hidden_states" in names else None
    except (OSError, SafetensorError) as cause:
        raise OptionError(explain(f"--hidden {path}", got=f"{cause}", wanted=wanted, do=do)) from cause
    if x is None:
        raise OptionError(explain(f"--hidden {path}", got=f"tensors {names[:5]}", wanted=wanted, do=do))
    if x.dim() < 1 or x.shape[-1] != width or x.numel() == 0 or not x.is_floating_point():
        raise ShapeError(
            explain(
                f"hidden_states in {path}",
                got=f"{x.dtype} {tuple(x.shape)}",
                wanted=f"floating point, (..., {width}) with at least one row",
                do="Take them from the model of this checkpoint.",
            )
        )
    return torch.as_tensor(x).reshape(-1, width)


def _from_text(directory: Path, text: str) -> tuple[Tensor, str]:
    """Embeddings of the text's tokens, each scaled to unit RMS, as the norm before the experts does."""
    embedding = read_embedding(directory)
    ids, how = _token_ids(directory, text, embedding.shape[0])
    if not ids:
        raise OptionError(explain("--text", got="no tokens", wanted="at least one", do="Give some text."))
    if not all(0 <= token < embedding.shape[0] for token in ids):
        raise CheckpointError(
            explain(
                f"tokens of {directory}",
                got=f"ids up to {max(ids)}",
                wanted=f"ids below {embedding.shape[0]}, the rows of the embedding",
                do="Use the tokenizer that belongs to the checkpoint.",
            )
        )
    rows = embedding[torch.tensor(ids)].float()
    rows = rows * torch.rsqrt(rows.square().mean(dim=1, keepdim=True) + 1e-12)
    return rows, f"embeddings of {len(ids)} tokens of the text ({how}), scaled to unit RMS"


def _token_ids(directory: Path, text: str, n_rows: int) -> tuple[list[int], str]:
    if any((directory / name).is_file() for name in TOKENIZER_FILES):
        package = transformers("text as hidden states")
        try:
            tokenizer = package.AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
            return [int(token) for token in tokenizer(text)["input_ids"]], "the checkpoint's tokenizer"
        except (OSError, ValueError, KeyError, ImportError) as cause:
            raise CheckpointError(
                explain(
                    f"tokenizer of {directory}",
                    got=f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}",
                    wanted="one that Transformers can load without running code of the checkpoint",
                    do="Pass hidden states with --hidden instead.",
                )
            ) from cause
    if n_rows != VOCABULARY:
        raise CheckpointError(
            explain(
                f"tokenizer of {directory}",
                got=f"none of {', '.join(TOKENIZER_FILES)}",
                wanted="the files of a tokenizer",
                do="Download them too, or pass hidden states with --hidden instead.",
            )
        )
    return list(text.encode()), "no tokenizer and 256 embeddings: its bytes are the ids"


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with replacing(path) as new:
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, new)
    except (OSError, SafetensorError) as cause:
        raise OptionError(
            explain(f"--output {path}", got=f"{cause}", wanted="a file that can be written", do="Choose another.")
        ) from cause
