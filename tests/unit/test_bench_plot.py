"""Pictures of a benchmark's rows."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fusedmoe import bench as benchmark
from fusedmoe.bench.plot import plot, plot_bars, require_matplotlib
from fusedmoe.cli.app import app
from fusedmoe.errors import MissingDependencyError, OptionError
from fusedmoe.plan.floor import Ceilings

CEILINGS = {"bandwidth_gbps": 4000.0, "tflops": {"bfloat16": 800.0}, "launch_us": 4.0}
RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))


def row(tokens, backend, us, **fields):
    flops, weight_bytes, floor_us = tokens * 1e8, min(tokens, 8) * 1e7, 10.0 + tokens
    figures = {"us": us, "tflops": us and flops / us / 1e6, "times_floor": us and us / floor_us}
    facts = {"shape": "s", "scheme": None, "dtype": "bfloat16", "routing": "uniform", "multiplied_as": ["bfloat16"]}
    sizes = {"tokens": tokens, "backend": backend, "flops": flops, "weight_bytes": weight_bytes, "floor_us": floor_us}
    return {**facts, **sizes, **figures, **fields}


ROWS = [row(t, backend, us) for t, us in ((1, 20.0), (64, 90.0)) for backend in ("triton", "vllm")]
ROWS += [row(1, "torch", None), row(1, "triton", 30.0, routing="zipf"), row(1, "torch", None, scheme="mxfp4")]


def text_of(svg: Path) -> str:
    """All that is written in a picture; the file is well-formed."""
    root = ET.parse(svg).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return "|".join(root.itertext())


def is_png(path: Path) -> bool:
    data = path.read_bytes()
    return data.startswith(b"\x89PNG\r\n\x1a\n") and data[-8:-4] == b"IEND" and len(data) > 10000


@pytest.mark.parametrize("name", ["picture", "picture.png", "picture.SVG", "h200-1.5"])
def test_files(tmp_path, name):
    pytest.importorskip("matplotlib")
    png, svg = plot(ROWS, CEILINGS, tmp_path / name, title="H200")
    stem = name if name == "h200-1.5" else "picture"
    assert [png.name, svg.name] == [f"{stem}.png", f"{stem}.svg"] and sorted(tmp_path.iterdir()) == [png, svg]
    text = text_of(svg)
    assert is_png(png)
    for said in ("H200", "s, bfloat16, zipf", "s, mxfp4", "weights at 4000 GB/s", "triton", "vllm", "no figure: torch"):
        assert said in text
    if name == "picture":  # another time, the same bytes
        before = png.read_bytes(), svg.read_bytes()
        plot(ROWS, CEILINGS, tmp_path / name, title="H200")
        assert (png.read_bytes(), svg.read_bytes()) == before


def test_without_the_rate_of_a_type(tmp_path):
    pytest.importorskip("matplotlib")
    png, svg = plot(ROWS, {**CEILINGS, "tflops": {}}, tmp_path / "picture")
    assert is_png(png) and "|TFLOP/s|" in text_of(svg) and "bfloat16 product" not in text_of(svg)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_can_be_drawn(tmp_path, path):
    pytest.importorskip("matplotlib")
    found = json.loads(path.read_text(encoding="utf-8"))["rows"]
    png, svg = plot_bars(found, tmp_path / "picture", title="committed")
    text = text_of(svg)
    assert is_png(png) and "|fusedmoe|" in text and "dsv3-tp8" in text
    assert all(f"|{one['peer']}|" in text for one in found if one["peer"])


def test_nothing_to_draw_and_nowhere_to_write(tmp_path):
    with pytest.raises(OptionError, match="rows to draw: got none"):
        plot([], CEILINGS, tmp_path / "picture")
    pytest.importorskip("matplotlib")
    with pytest.raises(OptionError, match=r"picture .*nowhere.*No such file"):
        plot(ROWS, CEILINGS, tmp_path / "nowhere" / "picture")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"no package matplotlib.*pip install \"fusedmoe\[bench\]\""):
        require_matplotlib()
    result = CliRunner().invoke(app, ["bench", "--plot", "picture"])
    assert result.exit_code == 2 and "fusedmoe[bench]" in result.stderr


def test_the_command(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    ceilings = Ceilings(bandwidth_gbps=10.0, tflops={"bfloat16": 0.1}, launch_us=1.0)
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda device, types: ceilings)
    options = ["--device", "cpu", "--shape", "8,2,64,48", "--tokens", "2", "--backend", "torch", "--backend", "triton"]
    options += ["--peer", "torch._grouped_mm", "--routing", "uniform", "--routing", "zipf"]
    picture = ["--plot", str(tmp_path / "picture.png")]
    result = CliRunner().invoke(app, ["bench", *options, *picture, "--json", "-"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["rows"]
    assert [one["backend"] for one in found] == ["torch", "triton", "torch._grouped_mm"] * 2
    assert [one["routing"] for one in found] == ["uniform"] * 3 + ["zipf"] * 3
    assert "Triton has no CPU target" in found[1]["reason"] and found[0]["reason"] is None
    assert is_png(tmp_path / "picture.png") and "picture.svg" in result.stderr
    shown = CliRunner().invoke(app, ["bench", *options, *picture]).stdout
    assert "routing" in shown and "Triton has no CPU target" in shown and "WRONG" not in shown and "written:" in shown
