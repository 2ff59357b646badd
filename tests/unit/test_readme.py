"""README.md says what the code says."""

import importlib.util
import json
import os
import re
from pathlib import Path

import fusedmoe
from fusedmoe.schemes import SCHEMES

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
    assert README.count("[start:performance] -->") == README.count("[end:performance] -->") == 1


def test_every_scheme_has_a_row_and_every_measured_one_a_table(monkeypatch, tmp_path):
    table = script()
    rows = [line for line in table.supported().splitlines() if line.split("`")[1:2] and line.split("`")[1] in SCHEMES]
    assert [line.split("`")[1] for line in rows] == list(SCHEMES)
    assert "NVIDIA sm_90 (`e4m3`)" in rows[list(SCHEMES).index("fp8_block")]
    data = json.loads((ROOT / "benchmarks" / "results" / "h200-bf16.json").read_text(encoding="utf-8"))
    assert {row["scheme"] for row in data["rows"]} == {None}
    few = [{**row, "scheme": "mxfp4", "us": 4321.0, "peer": None, "faster_than_peer": None} for row in data["rows"][:3]]
    wrong = {**few[0], "tokens": 99, "us": None}
    for name, one in (("a", {**data, "rows": [*few, wrong]}), ("b", data)):
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    shown = table.performance()
    assert shown.index("bfloat16: NVIDIA H200") < shown.index("`mxfp4`, bfloat16: NVIDIA H200") < shown.index("4321 (")
    assert "| wrong |" in shown and shown.count("TFLOP/s |") == 1


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
