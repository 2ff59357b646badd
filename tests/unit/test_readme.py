"""README.md says what the code says."""

import importlib.util
import os
import re
from pathlib import Path

import fusedmoe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def script():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "scripts" / "readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_what_is_supported_is_fresh():
    assert script().replaced(README) == README, "run scripts/readme_tables.py --write"


def test_a_stale_table_is_noticed():
    table = script()
    stale = README.replace("`bfloat16`", "`bfloat17`", 1)
    assert stale != README
    assert table.replaced(stale) == README


def test_markers_of_the_performance_table_are_there_once():
    assert README.count("<!-- performance:start -->") == README.count("<!-- performance:end -->") == 1


def test_links_and_commands_lead_somewhere():
    local = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert local
    for target in local:
        assert (ROOT / target).exists(), target
    commands = set(re.findall(r"\./scripts/\w+", README))
    assert commands == {"./scripts/fusedmoe", "./scripts/check"}
    for command in commands:
        assert os.access(ROOT / command, os.X_OK), command


def test_ci_runs_the_two_commands_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in re.findall(r"^(\./scripts/\S+(?: run)?)", README, flags=re.MULTILINE):
        assert re.search(rf"^{re.escape(command)}$", ci, flags=re.MULTILINE), command


def test_the_version_is_the_same_everywhere():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf'^version = "{re.escape(fusedmoe.__version__)}"$', pyproject, flags=re.MULTILINE)
