"""The documentation: every block of code runs, every link leads somewhere, the site builds.

A block is run with what its page calls the reader's own, a model, a checkpoint, tokens: those are small here.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from pages import CODE, PAGES, ROOT, WITH_PYTHON, blocks, names_of_a_reader, run_page

import fusedmoe
from fusedmoe.cli.sample import write_sample

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_sample(path)
    return path


@pytest.mark.filterwarnings("default:.*treespec:FutureWarning")  # of AOTInductor's own loader
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_every_block_of_code_runs(page, checkpoint, tmp_path, monkeypatch):
    with names_of_a_reader(checkpoint, tmp_path, monkeypatch, "cpu") as names:
        run_page(page, names, "cpu")


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
