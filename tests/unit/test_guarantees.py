"""docs/guarantees.md names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")


def test_every_proof_exists():
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT))
    assert len(named) > 30
    for file, test in named:
        assert (ROOT / file).is_file(), file
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8") or not test, (file, test)


def test_every_promise_has_a_test_and_a_cost():
    for section in TEXT.split("\n## ")[1:]:
        assert "`tests/" in section, section.splitlines()[0]
        assert "Cost:" in section or section.startswith("Versions"), section.splitlines()[0]
