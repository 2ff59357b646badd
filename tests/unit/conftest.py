"""What several files of tests need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fusedmoe
from fusedmoe.testing.ranks import Ranks

SOURCE = str(Path(fusedmoe.__file__).parents[1])


@pytest.fixture
def python():
    """Run code in a process of its own, and return what it printed."""

    def run(code: str) -> str:
        ours = ("FUSEDMOE_", "TRITON_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environment["PYTHONPATH"] = SOURCE
        command = [sys.executable, "-W", "error::DeprecationWarning:fusedmoe", "-c", code]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="module")
def pools():
    """Ranks by their number, started when first asked for."""
    started = {}

    def pool(n_ranks):
        if n_ranks not in started:
            started[n_ranks] = Ranks(n_ranks)
        return started[n_ranks]

    yield pool
    for one in started.values():
        one.close()


@pytest.fixture
def two(pools):
    return pools(2)


@pytest.fixture
def calls(monkeypatch):
    """Calls of the library that Transformers' modules made: (function name, arguments, options)."""
    from fusedmoe.integrations.transformers import interface

    made = []
    for name in ("fused_experts", "expert_linear"):
        function = getattr(interface, name)

        def spy(*arguments, name=name, function=function, **options):
            made.append((name, arguments, options))
            return function(*arguments, **options)

        monkeypatch.setattr(interface, name, spy)
    return made
