"""The story of the layer. Everything else is a policy handed to it."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch

from fusedmoe import backends
from fusedmoe.backends.base import Backend
from fusedmoe.backends.launch import Tape, alike, call_for, keep_call, launching, tape_for
from fusedmoe.backends.workspace import Workspace, layout_bytes
from fusedmoe.call import Call
from fusedmoe.errors import OptionError, UnsupportedError, WorkspaceError, explain
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.plan.config import Plan
from fusedmoe.settings import settings
from fusedmoe.spec.problem import Problem


def again(arguments: tuple[object, ...], options: tuple[object, ...]) -> tuple[object, torch.Tensor | None]:
    """The result of a call that is like an earlier one in all that can be checked; None where there was none.

    Args:
        arguments: tensors and expert matrices in the order of :class:`Call`, or None.
        options: whatever else decides.

    Returns:
        What :func:`run` is to remember such calls by, and the result.
    """
    tensors: list[torch.Tensor] = []
    facts: list[object] = []
    try:
        if arguments[0].device.type == "cpu" or not launching():  # type: ignore[attr-defined]
            return None, None
        for value in arguments:
            if value is None:
                facts.append(None)
            elif isinstance(value, ExpertMatrix):
                parts = value.tensors()
                facts += value.format, value.parts, *parts
                tensors += parts.values()
            else:
                facts.append(True)
                tensors.append(value)  # type: ignore[arg-type]
        key = (options, *map(type, options), settings(), torch.is_grad_enabled(), *facts, *map(alike, tensors))
        found = call_for(key)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None, None  # what is wrong with it, the check will say
    if found is None:
        return key, None
    tape, dtype = found
    x = tensors[0]
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    tape.replay((*tensors, out, torch.empty(tape.n_bytes, dtype=torch.uint8, device=x.device)))
    return key, out


def run(call: Call, plan: Plan, workspace_limit: int | None = None, key: object = None) -> torch.Tensor:
    """Run a checked call the way ``plan`` says; returns ``call.out``, or a new tensor [T, H].

    With a key from :func:`again`, the next call of that key is made of the launches of this one.

    Under a limit (None: the process's setting) it runs chunk after chunk of its tokens, all with this plan, which was
    made for all of them: a row meets the same tiles in the same order, and gets the same bits.
    """
    out = call.out
    if out is None:
        x = call.hidden_states
        out = torch.empty(x.shape, dtype=getattr(torch, call.problem.dtype), device=x.device)
    if call.problem.tokens == 0 or out.device.type == "meta":
        return out  # nothing to compute, or shapes alone are wanted
    n_tokens = call.problem.tokens
    chunk = tokens_at_a_time(call.problem, plan, workspace_limit)
    if chunk == n_tokens:
        tape = _take(_layer, call, plan, out)
        if key is not None and tape is not None and tape.whole:
            keep_call(key, tape, out.dtype)
        return out
    if call.workspace is None:  # one for all chunks, the first of which is the largest
        need = bytes_for(replace(call.problem, tokens=chunk), plan)
        call = call._replace(workspace=torch.empty(need, dtype=torch.uint8, device=out.device))
    for start in range(0, n_tokens, chunk):
        part = call.tokens(start, min(start + chunk, n_tokens), out)
        assert part.out is not None, "rows of out"
        _take(_layer, part, plan, part.out)
    return out


def run_alone(call: Call, plan: Plan) -> torch.Tensor:
    """Run the first GEMM of a checked call; returns its rows [T, top_k, I], zeros where there is no expert."""
    problem, device = call.problem, call.hidden_states.device
    shape = (problem.tokens, problem.top_k, problem.intermediate)
    out = torch.zeros(shape, dtype=getattr(torch, problem.dtype), device=device)
    if problem.tokens and device.type != "meta":
        rows = out.view(problem.slots, problem.intermediate)
        _take(_first_gemm, call._replace(out=rows), plan, rows)
    return out


def _layer(backend: Backend, call: Call, plan: Plan, work: Workspace, out: torch.Tensor) -> None:
    call = call._replace(out=out)
    schedule = backend.route(call, plan, work)
    hidden = backend.gate_up(call, plan, schedule, work)
    rows = backend.down(call, plan, schedule, hidden, work)
    backend.combine(call, plan, schedule, rows, work, out)


def _first_gemm(backend: Backend, call: Call, plan: Plan, work: Workspace, out: torch.Tensor) -> None:
    backend.gate_up(call, plan, backend.route(call, plan, work), work)


def _take(steps: Callable[..., None], call: Call, plan: Plan, out: torch.Tensor) -> Tape | None:
    """Take the steps; or, of a call like an earlier one, launch again what they launched."""
    device, tensors = out.device, (*call.inputs(), out)
    tape = None
    if plan.triton is not None and device.type != "cpu" and launching():
        apart = () if call.lora is None else call.lora.distances
        tape = tape_for((steps, call.problem, plan, apart), (*tensors, *call.workspaces()))
    if tape is not None and tape.whole:
        tape.replay((*tensors, *(call.workspaces() or (torch.empty(tape.n_bytes, dtype=torch.uint8, device=device),))))
        return tape
    backend = backends.load(plan.backend)
    layout = backend.workspace_layout(call.problem, plan)
    work = Workspace(layout, device, call.workspace)
    with nullcontext() if tape is None else tape.record((*tensors, *work.buffers), layout_bytes(layout)):
        steps(backend, call, plan, work, out)
    return tape


def bytes_for(problem: Problem, plan: Plan) -> int:
    """Bytes of workspace that a call without a limit needs."""
    return layout_bytes(backends.load(plan.backend).workspace_layout(problem, plan))


def tokens_at_a_time(problem: Problem, plan: Plan, workspace_limit: int | None = None) -> int:
    """Tokens of a chunk under a limit in bytes, from shapes alone; chunks are as even as they can be.

    Raises:
        OptionError: the limit is no positive integer.
        WorkspaceError: one token needs more.
        UnsupportedError: all rows share a scale, which no chunk knows.
    """
    limit = settings().workspace_limit if workspace_limit is None else workspace_limit
    if limit is None:
        return problem.tokens
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        do = "Leave it out for no limit."
        raise OptionError(explain("workspace_limit", got=repr(limit), wanted="bytes, an integer above 0", do=do))
    return _tokens_within(problem, plan, limit)


@functools.lru_cache(maxsize=4096)
def _tokens_within(problem: Problem, plan: Plan, limit: int) -> int:
    def need(tokens: int) -> int:
        return bytes_for(replace(problem, tokens=tokens), plan)

    n_tokens = problem.tokens
    if need(n_tokens) <= limit:
        return n_tokens
    fit = bisect.bisect_right(range(1, n_tokens + 1), limit, key=need)
    if not fit:
        wanted = f"at least {need(1)} bytes, what one token needs"
        raise WorkspaceError(explain("workspace_limit", got=f"{limit} bytes", wanted=wanted, do="Raise the limit."))
    first, second = problem.gate_up_gemm.inputs, problem.down_gemm.inputs
    if any(one is not None and one.mode == "tensor" for one in (None if problem.inputs_dtype else first, second)):
        raise UnsupportedError(
            explain(
                f"workspace_limit of {limit} bytes",
                got=f"{n_tokens} tokens, which need {need(n_tokens)}, and a scheme with one scale for all rows",
                wanted="tokens that fit at once, for a chunk does not know the largest value of the others",
                do="Raise the limit, or choose a scale per row: ExpertMatrix(..., inputs='token').",
            )
        )
    return -(-n_tokens // -(-n_tokens // fit))
