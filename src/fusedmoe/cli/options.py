"""What several commands share: their options, and how values come in and go out."""

from __future__ import annotations

import json as json_module
import math
from typing import TYPE_CHECKING, Annotated

import typer

from fusedmoe.errors import OptionError, explain

if TYPE_CHECKING:
    import torch

    from fusedmoe.spec.layout import GateUpLayout

Device = Annotated[str | None, typer.Option(help="Where to run, as torch names it; the first GPU, else the CPU.")]
Backend = Annotated[str | None, typer.Option(help="auto, gluon_sm90, triton or torch; FUSEDMOE_BACKEND when left out.")]
Scheme = Annotated[str, typer.Option(help="Quantisation scheme of the experts; see README.md.")]
Activation = Annotated[str, typer.Option(help="Name of the activation.")]
Interleaved = Annotated[bool, typer.Option("--interleaved", help="Gate and up rows alternate.")]
Bias = Annotated[bool, typer.Option("--bias", help="Both matrices have biases.")]
DType = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]


def device_from(name: str | None) -> torch.device:
    """The device of ``--device``."""
    from fusedmoe.bench import default_device
    from fusedmoe.target import device_of

    return default_device() if name is None else device_of(name, "--device")


def layout_of(interleaved: bool) -> GateUpLayout:
    """The layout of ``--interleaved``."""
    return "interleaved" if interleaved else "concatenated"


def integers(option: str, text: str) -> list[int]:
    """The value of an option with positive integers.

    Raises:
        OptionError: it has others.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise OptionError(explain(option, got=repr(text), wanted="positive integers", do="Write for example 1,8,32."))
    return [int(part) for part in parts]


def as_json(value: object) -> str:
    """JSON knows no infinity: an error that is none becomes null."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json_module.dumps(plain(value), indent=2)
