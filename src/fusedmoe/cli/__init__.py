"""The command line: ``fusedmoe run | explain | check | bench | env``. Needs ``pip install "fusedmoe[cli]"``."""

from __future__ import annotations

import importlib.util
import sys

from fusedmoe.errors import explain


def main() -> int:
    """Run the command in ``sys.argv``. Exits with 0 (fine), 1 (a result was wrong) or 2 (usage, library error)."""
    for package in ("typer", "rich"):
        if importlib.util.find_spec(package) is None:
            got, do = f"no package {package}", 'Run pip install "fusedmoe[cli]".'
            sys.stderr.write(f"error: {explain('the command line', got=got, wanted='typer and rich', do=do)}\n")
            return 2
    from fusedmoe.cli.app import app

    app(prog_name="fusedmoe")
    return 0
