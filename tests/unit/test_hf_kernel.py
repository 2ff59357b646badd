"""scripts/hf_kernel.py: a kernel that Hugging Face ``kernels`` loads, without this package and beside it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: What ``kernels.get_local_kernel`` does with a build, for where that library is not installed.
LOAD = """
import importlib.util, json, sys
from pathlib import Path
def load(directory):
    try:
        from kernels import get_local_kernel
        return get_local_kernel(Path(directory), backend="cpu")
    except ImportError:
        build = Path(directory) / "build" / "torch-cpu"
        name = json.loads((build / "metadata.json").read_text())["id"]
        spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
"""
USE = """
import torch
generator = torch.Generator().manual_seed(0)
x, w13, w2 = (torch.randn(*shape, generator=generator) for shape in ((5, 64), (8, 192, 64), (8, 64, 96)))
topk = kernel.softmax_topk(torch.randn(5, 8, generator=generator), 2, renormalize=True)
out = kernel.fused_experts(x, w13, w2, *topk)
torch.testing.assert_close(out.double(), kernel.reference.fused_experts(x, w13, w2, *topk), rtol=0, atol=1e-3)
layer = kernel.FusedExperts.of(kernel.quantize(w13, "fp8_channel", parts=2), kernel.quantize(w2, "fp8_channel"))
compiled = torch.compile(lambda x: layer(x, *topk) + 1, fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(x), layer(x, *topk) + 1)
try:
    kernel.fused_experts(x, w13[:, :3], w2, *topk)
    raise SystemExit("no error")
except kernel.ShapeError as error:
    assert "wanted" in str(error)
assert not [name for name in sys.modules if name.split(".")[0] == "fusedmoe"], "the package was imported"
"""
BESIDE = """
import fusedmoe, fusedmoe.torch_ops
assert torch.equal(fusedmoe.fused_experts(x, w13, w2, *topk), out)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kernel") / "fusedmoe"
    command = [sys.executable, str(ROOT / "scripts" / "hf_kernel.py"), str(directory)]
    subprocess.run(command, check=True, capture_output=True)
    return directory


def test_loaded_without_the_package_and_beside_it(built, python):
    python(f"{LOAD}\nkernel = load({str(built)!r})\n{USE}\n{BESIDE}")


def test_every_module_can_be_imported(built, python):
    walk = "import pkgutil\nfor m in pkgutil.walk_packages(kernel.__path__, kernel.__name__ + '.'): __import__(m.name)"
    code = f"{LOAD}\nkernel = load({str(built)!r})\n{walk}\nprint([m for m in sys.modules if m.startswith('fusedmoe')])"
    assert python(code).strip() == "[]"


def test_builds_have_what_the_hub_wants(built):
    """A build for each backend of torch, each with its own name and operators, and imports that are relative."""
    found = sorted((built / "build").iterdir())
    assert [build.name for build in found] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    names = set()
    for build in found:
        metadata = json.loads((build / "metadata.json").read_text(encoding="utf-8"))
        assert build.name == f"torch-{metadata['backend']['type']}"
        assert metadata["python-depends"] == []
        names.add(metadata["id"])
        text = "".join(path.read_text(encoding="utf-8") for path in build.rglob("*.py"))
        assert not re.search(
            r"^\s*(from|import) fusedmoe", re.sub(r'""".*?"""', "", text, flags=re.DOTALL), re.MULTILINE
        )
        assert set(re.findall(r"torch\.ops\.(\w+)\.\w+\(|\"(\w+)::", text)) == {
            (metadata["id"], ""),
            ("", metadata["id"]),
        }
    assert len(names) == len(found)


def test_a_directory_that_is_not_empty_is_left_alone(built):
    command = [sys.executable, str(ROOT / "scripts" / "hf_kernel.py"), str(built)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert "not empty" in done.stderr
