"""A reader's hour on a GPU: every block of code of the documentation runs there as it stands."""

from __future__ import annotations

import pytest
import torch
from pages import WITH_PYTHON, names_of_a_reader, run_page

from fusedmoe.cli.sample import write_sample

pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_every_block_of_code_runs(page, tmp_path, monkeypatch):
    write_sample(tmp_path / "checkpoint")
    with names_of_a_reader(tmp_path / "checkpoint", tmp_path, monkeypatch, "cuda") as names:
        run_page(page, names, "cuda")
