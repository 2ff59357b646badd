"""Tune the layer of a shape on this device, and write down what was found."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fusedmoe import experts
from fusedmoe.atomic import replacing
from fusedmoe.bench import ACTIVATION, ROUTINGS, Layer, Shape, draw_layer, format_for, problem_of, time_us
from fusedmoe.checks import check
from fusedmoe.errors import OptionError, UnsupportedError, explain
from fusedmoe.plan import tables, vllm_json
from fusedmoe.plan.config import Plan
from fusedmoe.plan.heuristics import tiled_plan
from fusedmoe.plan.planner import read_files_again, untuned
from fusedmoe.plan.tables import Entry, contents, name_of
from fusedmoe.settings import cache_folder
from fusedmoe.spec.layout import GateUpLayout
from fusedmoe.spec.problem import Problem
from fusedmoe.target import Target, target_of, version_of
from fusedmoe.testing.verify import Oracle
from fusedmoe.tune.compilers import Compilers, Work
from fusedmoe.tune.search import KEEP, Found, Measure, search
from fusedmoe.tune.space import Tiles

#: Numbers of tokens that are tuned: neighbours speak for all between.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
#: Seconds that a shape and scheme may take, compilers included: with the start of a process two minutes at most.
SECONDS = 100.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What is known of a number of tokens.

    Attributes:
        path: of the file.
        entry: for the file, in the end; None until then.
        tiles, us: the best so far; in the end tiles are None where they are the planner's.
        tried: candidates that were measured.
        resumed: the entry was in the file already.
    """

    tokens: int
    path: Path
    entry: Entry | None = None
    tiles: Tiles | None = None
    us: float | None = None
    tried: int = 0
    resumed: bool = False


class OnDevice:
    """Runs tiles on a device: compiled several at a time, verified each, timed as a replayed graph."""

    def __init__(self, layer: Layer, tokens: int, routing: str, compilers: Compilers | None) -> None:
        arguments = layer.call(tokens, routing)
        self._device, self._tokens, self._compilers = arguments[0].device, tokens, compilers
        self._out = torch.empty_like(arguments[0])
        self._call = check(*arguments, out=self._out, batch_invariant=False, **layer.options)
        self._target = target_of(self._device)
        self._workspace = torch.empty(0, dtype=torch.uint8, device=self._device)
        self._oracle = Oracle(arguments, layer.options, self._out.dtype)

    def _plan(self, tiles: Tiles) -> Plan:
        return Plan(backend=tiles.backend, triton=tiles.plan(self._call.problem, self._target))

    def _run(self, tiles: Tiles) -> None:
        """Launch them, in memory that is there before: a captured graph then needs none of its own."""
        plan = self._plan(tiles)
        need = experts.bytes_for(self._call.problem, plan)
        if self._workspace.numel() < need:
            self._workspace = torch.empty(need, dtype=torch.uint8, device=self._device)
        experts.run(self._call._replace(workspace=self._workspace), plan)

    def prepare(self, candidates: Sequence[Tiles]) -> None:
        """Compile; what cannot be compiled is found out by :meth:`time`."""
        if self._compilers is not None:
            self._compilers.compile(self._tokens, candidates)

    def time(self, tiles: Tiles, *, careful: bool) -> float | None:
        """Microseconds; None when the kernels fail or the result is wrong."""
        self._out.fill_(float("nan"))
        self._workspace.fill_(0xFF)
        try:
            self._run(tiles)
            if not self._oracle.verdict(self._out).ok:
                return None
            how = {} if careful else {"repeats": 7, "patience_us": 5e4, "warm_up_s": 0.0}
            return time_us(lambda: self._run(tiles), self._device, **how)  # type: ignore[arg-type]
        except Exception:  # noqa: BLE001 - a kernel that does not compile or fit is no candidate
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # a device that is lost is an error
            return None


def tune(
    shape: Shape,
    tokens: Sequence[int] = TOKENS,
    *,
    dtype: torch.dtype,
    device: torch.device,
    scheme: str = "none",
    activation: str = ACTIVATION,
    gate_up_layout: GateUpLayout = "concatenated",
    bias: bool = False,
    routing: str = ROUTINGS[0],
    folder: Path | None = None,
    command: str = "",
    keep: int | None = KEEP,
    seconds: float | None = SECONDS,
    jobs: int | None = None,
    again: bool = False,
    target: Target | None = None,
    measuring: Callable[[int], Measure] | None = None,
    note: Callable[[Progress], None] = lambda progress: None,
) -> Iterator[Progress]:
    """Tune a layer, and write the file after each number of tokens: what is in it already is not measured again.

    Args:
        shape, tokens, dtype, scheme: the layer and its calls.
        activation, gate_up_layout, bias: of the layer. A file speaks for every activation of as many arguments, with
            biases and without.
        device: where.
        routing: by which law the tokens' experts are drawn, of :data:`fusedmoe.bench.ROUTINGS`.
        folder: of the file; None: :func:`fusedmoe.settings.cache_folder`.
        command: that made the file, for its reader.
        keep: see :func:`fusedmoe.tune.search.search`.
        seconds: for all together; the search is cut short where its share is over. None: no limit.
        jobs: processes that compile at a time; None: as many as there are processors, 16 at most.
        again: measure also what is in the file.
        note: told of each new best on the way.
        target, measuring: in the place of the device: its facts, and what runs tiles of so many tokens.

    Raises:
        UnsupportedError: the layer has no kernels to choose there, or a layout without files.
        OptionError: no folder, or none that can be written.
    """
    target = target or target_of(device)
    form = format_for(scheme, shape)
    like: dict[str, Any] = {"activation": activation, "gate_up_layout": gate_up_layout}
    problems = [problem_of(shape, n, dtype, form=form, **like) for n in sorted(set(tokens))]
    path = _path(problems[0], target, folder)
    read_files_again()  # another process may have written it
    entries = {entry.slots: entry for entry in tables.read(path, target)}
    work = Work(shape, dtype, scheme, target, {**like, "bias": bias})
    here = nullcontext(measuring) if measuring else _on_device(work, device, routing, jobs)
    end = None if seconds is None else time.monotonic() + seconds
    left = [problem for problem in problems if again or problem.slots not in entries]
    with here as measure:
        for problem in problems:
            if problem not in left:
                yield Progress(tokens=problem.tokens, path=path, entry=entries[problem.slots], resumed=True)
                continue
            now = time.monotonic()
            stop = None if end is None else now + (end - now) / (len(left) - left.index(problem))
            planned = untuned(problem, target).triton
            assert planned is not None, "checked with the path"
            found = search(
                problem,
                target,
                Tiles.of(planned),
                measure(problem.tokens),
                keep=keep,
                more=lambda stop=stop: stop is None or time.monotonic() < stop,  # type: ignore[misc]
                note=lambda tiles, us, n=problem.tokens: note(Progress(tokens=n, path=path, tiles=tiles, us=us)),  # type: ignore[misc]
            )
            if found is None:
                continue
            entry = entries[problem.slots] = _entry(problem, found)
            _write(path, contents(list(entries.values()), target, command))
            yield Progress(
                tokens=problem.tokens, path=path, entry=entry, tiles=found.tiles, us=found.us, tried=found.tried
            )


@contextmanager
def _on_device(work: Work, device: torch.device, routing: str, jobs: int | None) -> Iterator[Callable[[int], Measure]]:
    """What runs tiles of so many tokens, with processes that compile for it where there is something to compile."""
    layer = draw_layer(work.shape, dtype=work.dtype, device=device, scheme=work.scheme, **work.options)
    with closing(Compilers(work, jobs)) if device.type == "cuda" else nullcontext() as compilers:
        yield lambda tokens: OnDevice(layer, tokens, routing, compilers)


def take_over(
    shape: Shape,
    text: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    scheme: str = "none",
    activation: str = ACTIVATION,
    gate_up_layout: GateUpLayout = "concatenated",
    folder: Path | None = None,
    command: str = "",
    target: Target | None = None,
) -> tuple[Path, dict[int, list[str]]]:
    """Write the tiles of a tuned file of vLLM, its ``text``, as a file of ours; arguments as those of :func:`tune`.

    Returns:
        The file, and by number of tokens every reason against the tiles that cannot run here.

    Raises:
        OptionError, UnsupportedError: it is none, or as :func:`tune`.
    """
    target = target or target_of(device)
    form = format_for(scheme, shape)
    problem = problem_of(shape, 1, dtype, form=form, activation=activation, gate_up_layout=gate_up_layout)
    path = _path(problem, target, folder)
    entries, refused = vllm_json.read(text, problem, target)
    _write(path, contents(entries, target, command))
    return path, refused


def export(
    shape: Shape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    scheme: str = "none",
    activation: str = ACTIVATION,
    gate_up_layout: GateUpLayout = "concatenated",
    folder: Path | None = None,
    target: Target | None = None,
    device_name: str | None = None,
) -> Path:
    """Write beside a file of ours the one that vLLM looks for; arguments as those of :func:`tune`.

    Raises:
        OptionError: vLLM has no name for the scheme, or there is no file of ours.
    """
    target = target or target_of(device)
    form = format_for(scheme, shape)
    problem = problem_of(shape, 1, dtype, form=form, activation=activation, gate_up_layout=gate_up_layout)
    path = _path(problem, target, folder)
    entries = tables.read(path, target)
    if not entries:
        raise OptionError(explain(f"file {path}", got="no entries", wanted="a tuned file", do="Tune the layer first."))
    plain = {}
    for entry in entries:
        call = replace(problem, tokens=max(1, entry.slots // problem.top_k))
        # A tile of the warp-specialised kernel, or of one row, is none that vLLM could run.
        tile = entry.gate_up
        if tile is None or tile.specialised or tile.block_m == 1:
            tile = tiled_plan(call, target).gate_up
        plain[call.tokens] = tile
    name = vllm_json.file_name(problem, device_name or torch.cuda.get_device_name(device))
    text = vllm_json.write(plain, problem.gate_up_gemm.width, ".".join(map(str, version_of("triton") or ())))
    _write(path.with_name(name), text)
    return path.with_name(name)


def _entry(problem: Problem, found: Found) -> Entry:
    us, planned_us = round(found.us, 2), round(found.planned_us, 2)
    today = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
    if found.tiles is None:
        return Entry(slots=problem.slots, us=us, planned_us=planned_us, date=today)
    few, gate_up, down = found.tiles
    return Entry(
        slots=problem.slots,
        backend=found.tiles.backend,
        few=few,
        gate_up=gate_up,
        down=down,
        us=us,
        planned_us=planned_us,
        date=today,
    )


def _path(problem: Problem, target: Target, folder: Path | None) -> Path:
    """The file, in a folder that is there."""
    name, plan = name_of(problem, target), untuned(problem, target)
    if name is None or plan.triton is None:
        reasons = "; ".join(reason for _, why in plan.refused for reason in why)
        raise UnsupportedError(
            explain(
                "tuning", got=reasons or "a layout without files", wanted="a GPU with Triton", do="See fusedmoe env."
            )
        )
    folder = folder or cache_folder()
    if folder is None:
        raise OptionError(explain("folder", got="none, and no home", wanted="a folder", do="Say --write FOLDER."))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise _refused(folder, cause) from cause
    return folder / name


def _write(path: Path, text: str) -> None:
    try:
        with replacing(path) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as cause:
        raise _refused(path, cause) from cause
    read_files_again()


def _refused(path: Path, cause: OSError) -> OptionError:
    wanted = "a place that can be written"
    return OptionError(explain(f"file {path}", got=cause.strerror, wanted=wanted, do="Choose another with --write."))
