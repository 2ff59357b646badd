#!/usr/bin/env python3
"""Pictures of the committed measurements: multiples of the floor, ours beside the peer's, as PNG and SVG.

python scripts/plot_results.py [FILE ...]    those of benchmarks/results when left out; written beside each file
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fusedmoe.bench.plot import plot_bars

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def draw(path: Path) -> tuple[Path, Path]:
    """The pictures of one file, beside it."""
    data = json.loads(path.read_text(encoding="utf-8"))
    versions = data["versions"]
    title = (
        f"{data['device']}, torch {versions['torch']}, Triton {versions['triton']}: time over floor, lower is better"
    )
    return plot_bars(data["rows"], path.with_suffix(""), title=title)


if __name__ == "__main__":
    for file in [Path(name) for name in sys.argv[1:]] or sorted(RESULTS.glob("*.json")):
        print(*draw(file))
