"""The command line: ``fusedmoe run | explain | check | bench | env``. Needs ``pip install "fusedmoe[cli]"``.

``fusedmoe env`` needs nothing but torch: without typer and rich it prints what ``fusedmoe env --json`` does.
"""

from __future__ import annotations

import importlib.util
import json
import sys

from fusedmoe.errors import FusedMoEError, explain


def main() -> int:
    """Run the command in ``sys.argv``. Exits with 0 (fine), 1 (a result was wrong) or 2 (usage, library error)."""
    for package in ("torch", "typer", "rich"):
        if importlib.util.find_spec(package) is None:
            if package != "torch" and sys.argv[1:] in (["env"], ["env", "--json"]):
                return _env()
            got, do = f"no package {package}", 'Run pip install "fusedmoe[cli]".'
            sys.stderr.write(f"error: {explain('the command line', got=got, wanted='torch, typer and rich', do=do)}\n")
            return 2
    from fusedmoe.cli.app import app

    app(prog_name="fusedmoe")
    return 0


def _env() -> int:
    from fusedmoe.cli.environment import environment

    try:
        sys.stdout.write(f"{json.dumps(environment(), indent=2)}\n")
    except FusedMoEError as error:  # a setting
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0
