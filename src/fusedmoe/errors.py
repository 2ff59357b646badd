"""The errors a caller can meet, and the one form of their messages.

Every message says what is wrong, what was got, what was wanted, and what to do.
Each class also derives from the built-in exception a Python user would expect.
"""

from __future__ import annotations


class FusedMoEError(Exception):
    """Base class of every error this library raises on purpose."""


class ShapeError(FusedMoEError, ValueError):
    """A tensor has the wrong number of dimensions, or a size that does not fit the others."""


class DTypeError(FusedMoEError, TypeError):
    """A tensor or an argument has a type that is not accepted here."""


class DeviceError(FusedMoEError, ValueError):
    """Tensors lie on different devices, or on one that the chosen backend cannot use."""


class LayoutError(FusedMoEError, ValueError):
    """Strides, storage order or aliasing of a tensor cannot be used."""


class OptionError(FusedMoEError, ValueError):
    """An option has an unknown value, or two options contradict each other."""


class WorkspaceError(FusedMoEError, ValueError):
    """The caller's workspace is too small, misaligned, or of the wrong type."""


class CaptureError(FusedMoEError, RuntimeError):
    """A CUDA graph is being captured, and a kernel of the layer is not compiled and loaded yet."""


class GradientError(FusedMoEError, RuntimeError):
    """A gradient was asked for; the layer computes none and refuses to detach silently."""


class UnsupportedError(FusedMoEError, NotImplementedError):
    """No backend can do this; the message names every backend with every reason."""


class CheckpointError(FusedMoEError, ValueError):
    """A checkpoint directory lacks a tensor, or holds one of an unexpected shape or name."""


class MissingDependencyError(FusedMoEError, ImportError):
    """An optional package is needed for this; the message names the extra that installs it."""


class ParallelError(FusedMoEError, RuntimeError):
    """A rank failed, or did not answer in time; raised on the ranks that wait for it."""


def explain(what: str, *, got: object, wanted: object, do: str) -> str:
    """Compose a message: ``what: got …; wanted …. do``."""
    return f"{what}: got {got}; wanted {wanted}. {do}"


def require_integer(what: str, value: object, least: int, largest: int, *, do: str) -> None:
    """Raise OptionError unless ``least <= value <= largest``, and no bool."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= largest:
        raise OptionError(explain(what, got=repr(value), wanted=f"an integer from {least} to {largest}", do=do))
