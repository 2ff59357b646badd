"""What mkdocs shows beside docs/: the pictures of benchmarks/results, and files that pages link to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pictures as ``results/*.svg`` and the examples as ``examples/*``."""
    found = [*(ROOT / "benchmarks" / "results").glob("*.svg"), *(ROOT / "examples").glob("*.py")]
    for path in sorted(found):
        files.append(File.generated(config, f"{path.parent.name}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Examples lie beside docs/ in the repository, and inside of it on the site."""
    return markdown.replace("](../examples/", "](examples/")
