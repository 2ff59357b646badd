"""fusedmoe inside Hugging Face Transformers: import this module, then choose ``"fusedmoe"`` for the experts.

    import fusedmoe.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="fusedmoe")   # or, of a loaded one,
    model.set_experts_implementation("fusedmoe")

Every experts class on Transformers' experts interface is served, in 16 and 32 bits and, as FP8Experts, in fp8.
``docs/transformers.md`` says what is fused and what is not.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fusedmoe.errors import MissingDependencyError, explain

try:
    _found = version("transformers")
except PackageNotFoundError:
    _found = "none"
if _found == "none" or tuple(map(int, _found.split(".")[:2])) < (5, 7):
    raise MissingDependencyError(
        explain(
            "transformers",
            got=f"version {_found}",
            wanted="5.7 or newer, where experts implementations can be registered",
            do="Install fusedmoe[transformers].",
        )
    )

from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

from fusedmoe.integrations.transformers.interface import experts_forward, fp8_experts_forward
from fusedmoe.integrations.transformers.patching import Report, TransformersExperts, patch

__all__ = ["NAME", "Report", "TransformersExperts", "experts_forward", "fp8_experts_forward", "patch"]

#: What to pass as ``experts_implementation``.
NAME = "fusedmoe"

# Both tables, for a name that one of them lacks is accepted and then fails in the first forward.
ExpertsInterface.register(NAME, experts_forward)
FP8ExpertsInterface.register(NAME, fp8_experts_forward)
