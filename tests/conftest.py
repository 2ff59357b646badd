"""For every lane."""

import os

import pytest

#: Tests say themselves which files of ``fusedmoe tune`` the planner reads: not those of whoever runs them.
os.environ.setdefault("FUSEDMOE_TUNED", "none")
#: Before its first program Inductor compiles and loads six probes of the CPU's vector units (7 s), for the kernels that
#: it writes. This library's are inside an operator that it calls.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the planner reads files of measured tiles; the process reads its own again afterwards."""
    from fusedmoe.plan.planner import read_files_again
    from fusedmoe.settings import settings

    monkeypatch.setenv("FUSEDMOE_TUNED", str(tmp_path))
    settings.cache_clear()
    read_files_again()
    yield tmp_path
    monkeypatch.undo()
    settings.cache_clear()
    read_files_again()
