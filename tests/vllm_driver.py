"""The script that drives vLLM's modular kernel, for tests of several files."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch


@contextmanager
def driver(device: str) -> Iterator[ModuleType]:
    """benchmarks/against_vllm.py, with what vLLM wants to be there."""
    path = Path(__file__).parents[1] / "benchmarks" / "against_vllm.py"
    spec = importlib.util.spec_from_file_location("against_vllm", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.no_grad(), module.configuration(torch.device(device)):
        yield module
