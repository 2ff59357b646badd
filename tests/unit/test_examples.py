"""Every script of examples/ runs on a CPU and finds its own outputs right; each compares them itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: What an example needs beyond torch and the library, and how it is launched if not by Python.
COMPILER = {"export.py"}
LAUNCHED = {"expert_parallel.py": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_runs(path):
    if path.name in COMPILER and shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *LAUNCHED.get(path.name, []), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_each_is_named_in_the_documentation():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    assert all(f"examples/{path.name}" in pages for path in EXAMPLES)
