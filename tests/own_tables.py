"""The package's own files of measured tiles, for tests of several lanes."""

from __future__ import annotations

import json
import shlex

from fusedmoe.bench import shape_of
from fusedmoe.plan.tables import PACKAGE

PATHS = sorted(PACKAGE.glob("*.json"))


def name(path):
    """Of a test."""
    return path.stem.replace(",", " ")


def told(path):
    """What a file says, and the shape and scheme that its command is about."""
    found = json.loads(path.read_text())
    words = shlex.split(found["command"])
    return found, shape_of(words[2]), words[words.index("--scheme") + 1] if "--scheme" in words else "none"
