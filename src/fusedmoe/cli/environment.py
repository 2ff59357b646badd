"""What this process runs on: versions, devices, settings, backends."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import asdict
from typing import Any

import torch

import fusedmoe
from fusedmoe.bench import SHAPES, default_device, problem_of
from fusedmoe.plan.planner import support
from fusedmoe.settings import settings
from fusedmoe.target import installed, target_of

#: Fields of :class:`fusedmoe.settings.Settings`, and the variables that set them.
VARIABLES = {
    "backend": "FUSEDMOE_BACKEND",
    "shared_memory_cap": "FUSEDMOE_SHARED_MEMORY_CAP",
    "workspace_limit": "FUSEDMOE_WORKSPACE_LIMIT",
    "batch_invariant": "FUSEDMOE_BATCH_INVARIANT",
    "vllm": "FUSEDMOE_VLLM",
    "sglang": "FUSEDMOE_SGLANG",
    "tuned": "FUSEDMOE_TUNED",
    "interpret": "TRITON_INTERPRET",
}
PACKAGES = ("torch", "triton", "transformers", "safetensors", "typer", "rich")


def versions() -> dict[str, str | None]:
    """Versions of this package, of Python and of the packages it works with; None where one is missing."""
    found: dict[str, str | None] = {"fusedmoe": fusedmoe.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        # ROCm, XPU and Windows builds ship Triton under other names.
        found[package] = installed(package) or ("unknown" if importlib.util.find_spec(package) else None)
    return found


def name_of(device: torch.device) -> str:
    """The name that the maker gave a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return str(torch.xpu.get_device_name(device))
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Everything that ``fusedmoe env`` prints."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    devices += [torch.device("xpu", i) for i in range(torch.xpu.device_count())]
    target = target_of(default_device())
    return {
        "versions": versions(),
        "devices": [{"device": str(d), "name": name_of(d), **asdict(target_of(d))} for d in devices],
        "settings": {name: {"value": value, "variable": VARIABLES[name]} for name, value in asdict(settings()).items()},
        "backends": {
            name: {"available": not reasons, "reasons": list(reasons)}
            for name, reasons in support(problem_of(SHAPES["qwen3-30b-a3b"], 128, torch.bfloat16), target).items()
        },
    }
