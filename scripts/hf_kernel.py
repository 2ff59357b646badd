#!/usr/bin/env python3
"""Lays the library out as a kernel of Hugging Face ``kernels``: a directory to load locally or to upload.

    ./scripts/hf_kernel.py DIRECTORY [--version 1] [--repo OWNER/fusedmoe]

    >>> kernels.get_local_kernel(Path(DIRECTORY))

A kernel is loaded under a name of the loader's choosing, beside other versions of itself: imports become relative, and
the operators get a namespace of this build. Command line, benchmarks, integrations and testing tools stay behind; what
is left needs torch, and Triton on a GPU, alone.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "fusedmoe"
#: What is for people or for other libraries, and imported by nothing that is left.
LEFT_BEHIND = ("__main__.py", "bench", "cli", "integrations", "selftest.py", "testing", "tune")
#: Backends of torch where the kernels were compiled, or that the torch backend serves; a directory each.
BACKENDS = ("cpu", "cuda", "rocm")
#: How the package says its operators' namespace.
NAMESPACE = re.compile(r"(?<=torch\.ops\.)fusedmoe(?=\.)|(?<=Library\(\")fusedmoe(?=\")|(?<=\")fusedmoe(?=::)")
CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernels
---

# fusedmoe

The experts of a mixture-of-experts layer as fused Triton and Gluon kernels; on a CPU, as PyTorch's own.

```python
import torch
from kernels import get_kernel

fusedmoe = get_kernel("{repo}", version={version})
topk = fusedmoe.softmax_topk(router_logits, 8, renormalize=True)
out = fusedmoe.fused_experts(hidden_states, w13, w2, topk.weights, topk.ids)
```

Made from fusedmoe {release} by its `scripts/hf_kernel.py`, whose documentation says the rest.
"""


def relative(path: Path, text: str) -> str:
    """A module's text with imports of the package relative to where it lies."""
    depth = len(path.relative_to(SOURCE).parts)
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(name.name.split(".")[0] == "fusedmoe" for name in node.names):
            raise SystemExit(f"{path}:{node.lineno}: import fusedmoe cannot be made relative; import from it")
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == "fusedmoe":
            below = node.module.partition(".")[2]
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from {'.' * depth}{below} ", 1)
    return "".join(lines)


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--version", type=int, default=1, help="of the kernel, the branch v1 of its repository")
    parser.add_argument("--repo", default="OWNER/fusedmoe", help="its name in the card")
    options = parser.parse_args()
    if options.directory.exists() and any(options.directory.iterdir()):
        raise SystemExit(f"{options.directory} is not empty; name a new directory")

    modules = {path: path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}
    modules = {p: text for p, text in modules.items() if p.relative_to(SOURCE).parts[0] not in LEFT_BEHIND}
    # Two builds in one process are two operators, so their namespaces differ; one build has one wherever it is made.
    digest = hashlib.sha256("".join(modules.values()).encode()).hexdigest()[:12]
    tables = sorted(SOURCE.glob("plan/tables/*.json"))
    for backend in BACKENDS:
        identifier = f"_fusedmoe_{backend}_{digest}"
        build = options.directory / "build" / f"torch-{backend}"
        for path, text in modules.items():
            where = build / path.relative_to(SOURCE)
            where.parent.mkdir(parents=True, exist_ok=True)
            where.write_text(NAMESPACE.sub(identifier, relative(path, text)), encoding="utf-8")
        for table in tables:
            (build / table.relative_to(SOURCE)).write_bytes(table.read_bytes())
        metadata = {
            "name": "fusedmoe",
            "id": identifier,
            "version": options.version,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    release = re.search(r'__version__ = "(.*)"', modules[SOURCE / "__init__.py"]).group(1)
    card = CARD.format(repo=options.repo, version=options.version, release=release)
    (options.directory / "README.md").write_text(card, encoding="utf-8")
    (options.directory / "LICENSE").write_bytes((ROOT / "LICENSE").read_bytes())
    print(f"{options.directory}: {len(modules)} modules for {', '.join(BACKENDS)}, operators _fusedmoe_*_{digest}")


if __name__ == "__main__":
    main()
