"""The blocks of code of the documentation, and what a reader has and a test has not."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import fusedmoe
from fusedmoe.cli.sample import SIZES

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
CODE = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: What a reader has and this machine has not, and what stands for it.
INSTEAD = {"layer=3": "layer=1", '"path/to/checkpoint"': "path"}


def blocks(page: Path, kind: str) -> list[str]:
    return [code for found, code in CODE.findall(page.read_text(encoding="utf-8")) if found == kind]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@contextmanager
def names_of_a_reader(checkpoint: Path, folder: Path, monkeypatch: Any, device: str) -> Iterator[dict[str, Any]]:
    """The reader's own: a model by its name, a checkpoint, tokens with their experts, a process group."""
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(_name, device_map=None, **options):
        model = load(checkpoint, **options)
        return model if device_map is None else model.to(device)

    ids = torch.tensor([[1, 2, 3]], device=device)
    encoding = transformers.BatchEncoding({"input_ids": ids})
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _name: lambda _text, **_: encoding)
    monkeypatch.chdir(folder)  # blocks write files
    weights, experts = fusedmoe.softmax_topk(torch.randn(6, SIZES["num_experts"], device=device), 8, renormalize=True)
    hidden = torch.randn(6, SIZES["hidden_size"], dtype=torch.bfloat16, device=device)
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
    try:
        yield {
            "torch": torch,
            "path": checkpoint,
            "model": load(checkpoint, dtype="bfloat16").to(device),
            "inputs": {"input_ids": ids},
            "input_ids": ids,
            "num_experts": SIZES["num_experts"],
            "hidden_states": hidden,
            "topk_weights": weights,
            "topk_ids": experts,
        }
    finally:
        torch.distributed.destroy_process_group()


def run_page(page: Path, names: dict[str, Any], device: str) -> None:
    """Run a page's blocks of code one after the other."""
    for code in blocks(page, "python"):
        if "aoti" in code and (device == "cuda" or shutil.which("g++") is None):  # on a GPU torch 2.11 dies in it
            continue
        for theirs, ours in {**INSTEAD, '"cuda"': f'"{device}"'}.items():
            code = code.replace(theirs, ours)  # noqa: PLW2901
        exec(compile(code, f"{page.name}: {code.splitlines()[0]}", "exec"), names)
