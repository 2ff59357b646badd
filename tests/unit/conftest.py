"""Fixtures of the tests of integrations."""

from __future__ import annotations

import pytest


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
