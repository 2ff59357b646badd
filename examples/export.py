"""A router and its experts, quantised, exported with any number of tokens and compiled ahead of time.

``python examples/export.py [DIRECTORY]`` (a C++ compiler is needed; ten seconds)

Whoever loads the files imports ``fusedmoe.torch_ops`` first.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import fusedmoe

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 128, 128


class Layer(torch.nn.Module):
    """A mixture-of-experts layer: hidden states [T, H] in, [T, H] out."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(HIDDEN, EXPERTS, bias=False)
        w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) / HIDDEN**0.5
        w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5
        self.experts = fusedmoe.FusedExperts.of(
            fusedmoe.quantize(w13, "fp8_channel", parts=2), fusedmoe.quantize(w2, "fp8_channel")
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Route, then the experts."""
        topk = fusedmoe.softmax_topk(self.router(hidden), TOP_K, renormalize=True)
        return self.experts(hidden, topk.weights, topk.ids)


@torch.inference_mode()
def main(directory: Path) -> None:
    """Export, save, load, compile, and compare with the layer itself."""
    torch.manual_seed(0)
    layer = Layer().to("cuda" if torch.cuda.is_available() else "cpu")
    device = layer.router.weight.device
    tokens = torch.export.Dim("tokens", min=1, max=65536)
    example = torch.randn(5, HIDDEN, device=device)
    exported = torch.export.export(layer, (example,), dynamic_shapes=({0: tokens},))
    torch.export.save(exported, directory / "layer.pt2")
    loaded = torch.export.load(directory / "layer.pt2")
    programs = {"exported": loaded.module()}
    if device.type == "cpu":  # on a GPU torch 2.11 dies when it loads a package, that of one linear layer, too
        package = torch._inductor.aoti_compile_and_package(loaded, package_path=str(directory / "compiled.pt2"))
        programs["compiled"] = torch._inductor.aoti_load_package(package)
    for count in (1, 5, 77):
        hidden = torch.randn(count, HIDDEN, device=device)
        for name, program in programs.items():
            torch.testing.assert_close(program(hidden), layer(hidden), msg=f"{name}, {count} tokens")
    print(f"{' and '.join(programs)} for any number of tokens on {device.type}: as the layer")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
