"""The documentation: every block of code runs, every link leads somewhere, the site builds.

A block is run with what its page calls the reader's own, a model, a checkpoint, tokens: those are small here.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedmoe
from fusedmoe.cli.sample import SIZES, write_sample

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
CODE = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: What a reader has and this machine has not, and what stands for it.
INSTEAD = {'"cuda"': '"cpu"', "layer=3": "layer=1", '"path/to/checkpoint"': "path"}


def blocks(page: Path, kind: str) -> list[str]:
    return [code for found, code in CODE.findall(page.read_text(encoding="utf-8")) if found == kind]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_sample(path)
    return path


@pytest.fixture
def names(checkpoint, monkeypatch, tmp_path):
    """The reader's own: a model by its name, a checkpoint, tokens with their experts, a process group."""
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(_name, device_map=None, **options):
        return load(checkpoint, **options)

    ids = torch.tensor([[1, 2, 3]])
    encoding = transformers.BatchEncoding({"input_ids": ids})
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _name: lambda _text, **_: encoding)
    monkeypatch.chdir(tmp_path)  # blocks write files
    weights, experts = fusedmoe.softmax_topk(torch.randn(6, SIZES["num_experts"]), 8, renormalize=True)
    hidden = torch.randn(6, SIZES["hidden_size"], dtype=torch.bfloat16)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield {
        "torch": torch,
        "path": checkpoint,
        "model": load(checkpoint, dtype="bfloat16"),
        "inputs": {"input_ids": ids},
        "input_ids": ids,
        "num_experts": SIZES["num_experts"],
        "hidden_states": hidden,
        "topk_weights": weights,
        "topk_ids": experts,
    }
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("default:.*treespec:FutureWarning")  # of AOTInductor's own loader
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_every_block_of_code_runs(page, names):
    for code in blocks(page, "python"):
        if "aoti" in code and shutil.which("g++") is None:
            continue
        for theirs, ours in INSTEAD.items():
            code = code.replace(theirs, ours)  # noqa: PLW2901
        exec(compile(code, f"{page.name}: {code.splitlines()[0]}", "exec"), names)


def test_every_command_that_only_reads_runs():
    lines = [line for page in PAGES for block in blocks(page, "console") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fusedmoe explain")]
    assert commands
    run = "from fusedmoe.cli import main; raise SystemExit(main())"
    for command in commands:
        subprocess.run([sys.executable, "-c", run, *command], check=True, capture_output=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)]*)?\)", text):
        if "://" in target or target.startswith("results/"):  # the site's own check knows those
            continue
        there = (page.parent / target) if target else page
        assert there.exists(), target
        if anchor and there.name != "api.md":
            headings = re.findall(r"^#+ (.*)", there.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor[1:] in slugs, f"{target}{anchor}"


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in fusedmoe.__all__:
        if not name.endswith("Error") and name != "__version__":
            assert re.search(rf"\bfusedmoe\.{name}\b", text), name
    assert "::: fusedmoe.errors" in text


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES:
        assert (tmp_path / "site" / ("index.html" if page.stem == "index" else f"{page.stem}/index.html")).exists()
