"""The machine that a call runs on: the only place that asks a driver."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fusedmoe.errors import DeviceError, OptionError, explain
from fusedmoe.settings import settings


@dataclass(frozen=True)
class Target:
    """Facts of a device that decide between kernels.

    Attributes:
        vendor: "nvidia", "amd", "intel", or "cpu".
        arch: "sm_90", "gfx942", ...; "" where there is none.
        capability: 10 * major + minor of an NVIDIA device, else 0.
        n_sm: multiprocessors, compute units or Xe cores.
        shared_bytes: shared memory that one program may use.
        interpret: Triton's interpreter stands in for a GPU.
        triton: the package triton is installed.
        gluon: and has the Gluon that the kernels of one architecture are written in.
        unfit: why the packages that are installed cannot run the Triton kernels; "" when they can.
    """

    vendor: str
    arch: str = ""
    capability: int = 0
    n_sm: int = 1
    shared_bytes: int = 1 << 20
    interpret: bool = False
    triton: bool = True
    gluon: bool = True
    unfit: str = ""


#: Devices that can be planned and compiled for without having one: a T4, A100, RTX A6000, L40S, H200, B200, MI300X.
KNOWN = {
    target.arch: target
    for target in (
        Target("nvidia", "sm_75", 75, 40, 65536),
        Target("nvidia", "sm_80", 80, 108, 166912),
        Target("nvidia", "sm_86", 86, 84, 101376),
        Target("nvidia", "sm_89", 89, 142, 101376),
        Target("nvidia", "sm_90", 90, 132, 232448),
        Target("nvidia", "sm_100", 100, 148, 232448),
        Target("amd", "gfx942", 0, 304, 65536),
    )
}


def _nvidia(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    # Older torch lacks the opt-in limit; then the limits of CUDA's programming guide stand in for it.
    by_arch = {75: 65536, 80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448}
    capability = 10 * properties.major + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", None) or by_arch.get(capability, 101376)
    return Target("nvidia", f"sm_{capability}", capability, properties.multi_processor_count, int(shared))


def _amd(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    arch = properties.gcnArchName.split(":")[0]
    shared = 163840 if arch.startswith("gfx95") else 65536
    return Target("amd", arch, 0, properties.multi_processor_count, shared)


def device_of(device: str | torch.device | int, what: str = "device") -> torch.device:
    """A device of this machine, with its index where it has one.

    Raises:
        DeviceError: it is none.
    """
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError) as cause:
        got = f"{device!r} ({(str(cause).splitlines() or [''])[0]})"
        raise DeviceError(explain(what, got=got, wanted="a device of this machine", do="See fusedmoe env.")) from cause


#: What the CPU stands for, in all threads.
_elsewhere: Target | None = None


@contextlib.contextmanager
def standing_for(target: Target) -> Iterator[None]:
    """Within, tensors on the CPU, in all threads, stand for tensors on a device that is not here."""
    global _elsewhere  # noqa: PLW0603 - as the environment has it, for the process
    before, _elsewhere = _elsewhere, target
    try:
        yield
    finally:
        _elsewhere = before


def is_elsewhere() -> bool:
    """Whether the CPU stands for a device that is not here, and that nothing can be loaded to."""
    return _elsewhere is not None


def target_of(device: torch.device) -> Target:
    """The target behind a torch device; cached, since a device does not change."""
    if _elsewhere is not None and device.type in ("cpu", "meta"):
        return _elsewhere
    return _found(device)


def known(arch: str) -> Target:
    """A device of an architecture, with the packages that are installed here.

    Raises:
        OptionError: it is none of :data:`KNOWN`.
    """
    if arch not in KNOWN:
        do = "Choose one of them."
        raise OptionError(explain("target", got=repr(arch), wanted=", ".join(KNOWN), do=do))
    return _with_packages(KNOWN[arch])


@functools.cache
def _found(device: torch.device) -> Target:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        found = _amd(index) if torch.version.hip else _nvidia(index)
    elif device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        found = Target("intel", "xpu", 0, max(1, properties.max_compute_units // 8), 131072)
    else:
        found = Target("cpu", interpret=settings().interpret)
    return _with_packages(found)


def _with_packages(found: Target) -> Target:
    cap = settings().shared_memory_cap or found.shared_bytes
    return replace(
        found,
        shared_bytes=min(cap, found.shared_bytes),
        triton=importlib.util.find_spec("triton") is not None,
        gluon=(version_of("triton") or (0,)) >= GLUON,
        unfit=_unfit(found.interpret),
    )


#: Oldest Triton, and the oldest whose Gluon is that of the kernels; CONTRIBUTING.md says what was tried.
TRITON, GLUON = (3, 5), (3, 6)
#: Its interpreter learnt about the numpy that came with this version in that of Triton.
NUMPY, LEARNT = (2, 4), (3, 7)


def installed(package: str) -> str | None:
    """Version of a distribution by its metadata, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_of(package: str) -> tuple[int, ...] | None:
    """Major and minor version by its metadata, as deciding imports no compiler; None where that does not say."""
    words = (installed(package) or "none").split(".")[:2]
    return tuple(int(word) for word in words) if all(word.isdecimal() for word in words) else None


def _unfit(interpret: bool) -> str:
    triton, numpy = version_of("triton"), version_of("numpy")
    if triton is None:  # not installed, or a build under another name, which may be any
        return ""
    said = ".".join(map(str, triton))
    if triton < TRITON:
        return f"triton {said} is older than {'.'.join(map(str, TRITON))}"
    if interpret and triton < LEARNT and numpy is not None and numpy >= NUMPY:
        return f"the interpreter of triton {said} needs numpy below {'.'.join(map(str, NUMPY))}"
    return ""
