"""A small Qwen3-MoE checkpoint in the real format, for whoever has none at hand."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from fusedmoe.errors import MissingDependencyError, explain

#: One id per byte, so that text needs no tokenizer.
VOCABULARY = 256
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True, "max_position_embeddings": 512,
    # Routers with more to say than the usual 0.02 lets them.
    "initializer_range": 0.1,
}  # fmt: skip


def transformers(purpose: str) -> Any:
    """The package, quiet.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        package = importlib.import_module("transformers")
    except ImportError as cause:
        raise MissingDependencyError(
            explain(
                purpose, got="no package transformers", wanted="Transformers",
                do='Run pip install "fusedmoe[transformers]".',
            )
        ) from cause  # fmt: skip
    package.logging.set_verbosity_error()
    package.logging.disable_progress_bar()
    return package


def write_sample(directory: Path) -> None:
    """Write the checkpoint with Transformers' ``save_pretrained``: random weights, always the same, in bfloat16."""
    package = transformers("writing a small checkpoint, as none was given")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = package.Qwen3MoeForCausalLM(package.Qwen3MoeConfig(**SIZES))
    model.to(torch.bfloat16).save_pretrained(directory)
