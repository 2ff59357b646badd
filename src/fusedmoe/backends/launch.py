"""Launches of kernels, and how those of a call are launched again.

To launch a kernel, the host finds out which variant the arguments need and passes them on one by one: 30 to 60 us
each. But which variants, with which grids and numbers, depends only on the shapes, strides, types and alignments of a
call, never on what its tensors hold. So the launches of a call are kept (:class:`Tape`), and a call that is like it in
all of these is made of the same ones with other addresses, which costs a few microseconds each.

What a tape cannot know, it refuses: it is spoilt, and calls like it go the long way, when an operator of torch other
than a view takes part, when a kernel reads from a tensor that is not the call's, or lies in two of them, or when there
is no compiled kernel, as in the interpreter.
"""

from __future__ import annotations

import copy
import functools
import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedmoe.errors import CaptureError, explain
from fusedmoe.target import is_elsewhere

#: Tapes that a thread keeps; the least recently used goes first.
KEPT = 256


_T = TypeVar("_T")


class _Local(threading.local):
    """Tapes of a thread. Of one alone, because a replay writes the addresses into the arguments of its launches."""

    def __init__(self) -> None:
        self.tapes: OrderedDict[Any, Tape] = OrderedDict()
        self.calls: OrderedDict[Any, tuple[Tape, torch.dtype]] = OrderedDict()
        self.recording: Tape | None = None
        self.variants: list[Any] | None = None  # met while launches are left out


_LOCAL = _Local()


class _Base:
    """Stands in a tensor map for a tensor."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def data_ptr(self) -> int:
        return self.value


class _UnknownError(Exception):
    """An argument that a tape cannot hold."""


class _Launch(NamedTuple):
    """A launch without its stream and its addresses."""

    kernel: Any  # compiled
    grid: tuple[int, int, int]
    constants: tuple[Any, ...]
    used: tuple[int, ...]  # of the tape's addresses
    # Each makes a tuple of constants, addresses and tuples that were made before it; the last one, all arguments.
    makers: tuple[Callable[[list[Any]], tuple[Any, ...]], ...]

    def arguments(self, addresses: list[int]) -> tuple[Any, ...]:
        """Addresses are numbers: anything else Triton's launcher asks for its address, and CUDA whether it is one."""
        values = [*self.constants, *[addresses[i] for i in self.used]]
        for make in self.makers:
            values.append(make(values))
        return values[-1]  # type: ignore[no-any-return]


class Tape:
    """The launches of a call.

    Attributes:
        whole: every launch of the call is here: it can be replayed.
        n_bytes: of the workspace that they expect.
    """

    def __init__(self) -> None:
        self.whole = False
        self.spoilt = False
        self.n_bytes = 0
        self._launches: list[_Launch] = []
        self._addresses: dict[tuple[int, int], int] = {}  # (source, offset) -> number
        self._bases: list[tuple[_Base, int]] = []  # of tensor maps, and which address each has
        self._spans: list[tuple[int, int]] = []

    def replay(self, sources: Sequence[torch.Tensor]) -> None:
        """Launch again, on tensors like those of the record, in the same order."""
        pointers = [source.data_ptr() for source in sources]
        addresses = [pointers[source] + offset for source, offset in self._addresses]
        for base, number in self._bases:
            base.value = addresses[number]
        device = sources[0].device
        with device_guard(device):
            if _is_watched():
                for launch in self._launches:
                    launch.kernel[launch.grid](*launch.arguments(addresses))
                return
            # As Triton's own launch, which asks for the stream each time, and makes metadata for hooks that are not.
            stream = _stream(device)
            for launch in self._launches:
                kernel, arguments = launch.kernel, launch.arguments(addresses)
                kernel.run(*launch.grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *arguments)

    @contextmanager
    def record(self, sources: Sequence[torch.Tensor], n_bytes: int) -> Iterator[None]:
        """Keep what is launched within. Every tensor that a kernel gets must lie in one of ``sources``."""
        if self.spoilt or _LOCAL.recording is not None:
            yield
            return
        self.n_bytes, self._launches, self._addresses, self._bases = n_bytes, [], {}, []
        self._spans = [_span(source) for source in sources]
        _LOCAL.recording = self
        try:
            with _Watch(self):
                yield
            self.whole = not self.spoilt
        finally:
            _LOCAL.recording = None
            if self.spoilt:
                self._launches, self._addresses, self._bases = [], {}, []

    def add(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: Sequence[Any], named: dict[str, Any]
    ) -> None:
        """Keep one launch."""
        if compiled is None:
            self.spoilt = True
            return
        bound = dict(zip(kernel.arg_names, args, strict=False)) | named
        x, y, z = (*grid, 1, 1)[:3]
        try:
            self._launches.append(_Launch(compiled, (x, y, z), *self._recipe([bound[n] for n in kernel.arg_names])))
        except _UnknownError:
            self.spoilt = True

    def _recipe(self, arguments: list[Any]) -> tuple[tuple[Any, ...], tuple[int, ...], tuple[Any, ...]]:
        """Constants, addresses and makers of a launch's arguments."""
        constants: list[Any] = []
        used: list[int] = []
        nested: list[tuple[tuple[str, int], ...]] = []

        def place(value: Any) -> tuple[str, int]:
            kind, held = "constant", constants
            if isinstance(value, torch.Tensor) and value.numel():
                kind, held, value = "address", used, self._number(value)
            elif isinstance(value, torch.Tensor):
                value = 0
            elif hasattr(value, "block_shape"):  # a tensor map, which its launch makes of the address
                value, base = copy.copy(value), _Base()
                self._bases.append((base, self._number(value.base)))
                value.base = base
            elif isinstance(value, tuple) and _holds_tensors(value):
                kind, held, value = "tuple", nested, tuple(map(place, value))
            held.append(value)
            return kind, len(held) - 1

        nested.append(tuple(map(place, arguments)))
        starts = {"constant": 0, "address": len(constants), "tuple": len(constants) + len(used)}
        makers = (_tuple_of([starts[kind] + i for kind, i in places]) for places in nested)
        return tuple(constants), tuple(used), tuple(makers)

    def _number(self, tensor: torch.Tensor) -> int:
        """Which of the tape's addresses a tensor has."""
        first, last = _span(tensor)
        holders = [i for i, (start, end) in enumerate(self._spans) if start < last and first < end]
        if len(holders) != 1 or first < self._spans[holders[0]][0] or last > self._spans[holders[0]][1]:
            raise _UnknownError
        key = holders[0], first - self._spans[holders[0]][0]
        return self._addresses.setdefault(key, len(self._addresses))


def _holds_tensors(value: object) -> bool:
    """Whether a tensor or a tensor map is in there."""
    if isinstance(value, tuple):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor) or hasattr(value, "block_shape")


def _tuple_of(places: list[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    """What picks these values of a list, as a tuple."""
    if len(places) == 1:
        return lambda values: (values[places[0]],)
    return itemgetter(*places) if places else lambda values: ()


@functools.cache
def _triton() -> tuple[Any, Any]:
    """Triton's drivers, and its settings of launches. By name: who launches has it, and this module does without."""
    return importlib.import_module("triton.runtime").driver, importlib.import_module("triton.knobs").runtime


def _is_watched() -> bool:
    """Whether somebody, such as Triton's profiler, has hooked itself into launches."""
    runtime = _triton()[1]
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _stream(device: torch.device) -> int:
    """Handle of the current stream."""
    return 0 if device.type == "cpu" else _triton()[0].active.get_current_stream(device.index)


class _Watch(TorchDispatchMode):
    """Spoil the tape when an operator does something."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = [result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns]
        self._tape.spoilt |= not (views and all(views))
        return func(*args, **(kwargs or {}))


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor, and the one behind its last; of an empty one, none."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def tape_for(key: object, sources: Sequence[torch.Tensor]) -> Tape:
    """The tape of calls like this: the same ``key``, and sources alike in all that decides a launch but the address.

    It is new, and not whole, when there was none.
    """
    key = key, tuple((t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15) for t in sources)
    tape = _kept(_LOCAL.tapes, key)
    return _keep(_LOCAL.tapes, key, Tape()) if tape is None else tape


def alike(tensor: torch.Tensor) -> tuple[object, ...]:
    """All that checks and launches can depend on but what the tensor holds, and where.

    Raises:
        RuntimeError, TypeError, AttributeError, NotImplementedError: it is no tensor, or none with strides.
    """
    return (
        type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() & 15,
        tensor.requires_grad, tensor.is_neg(),
    )  # fmt: skip


@contextmanager
def only_compiling() -> Iterator[list[Any]]:
    """Within, this thread compiles and loads what it would launch, and launches nothing; yields the kernels.

    Loads: unless that is for a device elsewhere.
    """
    before, _LOCAL.variants = _LOCAL.variants, []
    try:
        yield _LOCAL.variants
    finally:
        _LOCAL.variants = before


def launching() -> bool:
    """Whether launches are launched; see :func:`only_compiling`."""
    return _LOCAL.variants is None


def call_for(key: object) -> tuple[Tape, torch.dtype] | None:
    """Tape and type of the result of a call that was checked before, if it was."""
    return _kept(_LOCAL.calls, key)


def keep_call(key: object, tape: Tape, dtype: torch.dtype) -> None:
    """The next call of this key needs no check."""
    _keep(_LOCAL.calls, key, (tape, dtype))


def _kept(place: OrderedDict[Any, _T], key: object) -> _T | None:
    found = place.get(key)
    if found is not None and len(place) == KEPT:  # until one has to go, their order does not matter
        place.move_to_end(key)
    return found


def _keep(place: OrderedDict[Any, _T], key: object, value: _T) -> _T:
    place[key] = value
    if len(place) > KEPT:
        place.popitem(last=False)
    return value


_HERE: AbstractContextManager[None] = nullcontext()


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` current around a launch: Triton launches on the current device whatever the tensors say."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return _HERE


def launch(kernel: Any, grid: tuple[int, ...], /, *args: Any, **options: Any) -> None:
    """Launch a kernel on the current device and stream, as ``kernel[grid](*args, **options)`` does.

    Raises:
        CaptureError: the stream is being captured, and the kernel would have to be compiled, or loaded, first.
    """
    if _LOCAL.variants is not None:
        if (compiled := kernel.warmup(*args, grid=grid, **options)) is not None:
            if not is_elsewhere():
                compiled[(*grid, 1, 1)[:3]]  # loads it
            _LOCAL.variants.append(compiled)
        return
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        with _nothing_compiled(kernel):
            compiled = kernel[grid](*args, **options)
    else:
        compiled = kernel[grid](*args, **options)
    if _LOCAL.recording is not None:
        _LOCAL.recording.add(kernel, compiled, grid, args, options)


_COMPILING = threading.Lock()


@contextmanager
def _nothing_compiled(kernel: Any) -> Iterator[None]:
    """Refuse what this thread would compile: to load it would end a capture with an error that names nobody."""
    # Triton's own hook would have to write the constants as JSON, which functions among them are not.
    thread, compiles = threading.get_ident(), kernel._do_compile

    def refuse(*args: Any, **named: Any) -> Any:
        if threading.get_ident() != thread:
            return compiles(*args, **named)
        raise CaptureError(
            explain(
                f"kernel {kernel.__name__}",
                got="a stream that is being captured, and no compiled kernel for these shapes and types",
                wanted="every kernel of a captured call compiled and loaded before",
                do="Call fusedmoe.warmup, or run the layer once with as many tokens, before the capture.",
            )
        )

    with _COMPILING:
        kernel._do_compile = refuse
        try:
            yield
        finally:
            del kernel._do_compile
