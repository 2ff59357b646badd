"""Pictures of rows, as PNG and SVG: a roofline, and bars of multiples of the floor. A row is a mapping, as in JSON."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedmoe.atomic import replacing
from fusedmoe.errors import MissingDependencyError, OptionError, explain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

#: Colours that are told apart by all eyes (Okabe and Ito), in the order of appearance of what they stand for.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
MARKERS = "osD^vPX*"
#: Inches of a panel.
WIDTH, HEIGHT = 7.0, 3.8
#: What the bars show.
TIMES_FLOOR = "µs / floor"


def require_matplotlib() -> None:
    """Fail at once where nothing can be drawn.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError(
            explain("drawing", got="no package matplotlib", wanted="it", do='Run pip install "fusedmoe[bench]".')
        )


def plot(
    rows: Rows, ceilings: Mapping[str, Any], path: str | os.PathLike[str], *, title: str = ""
) -> tuple[Path, Path]:
    """Draw what :func:`fusedmoe.bench.bench` measured: of each shape, scheme and routing a roofline beside bars.

    Args:
        rows: the fields of its rows; those without a figure are left out.
        ceilings: the fields of :class:`fusedmoe.plan.floor.Ceilings`.
        path: of both files, less the suffix.
        title: over all.

    Returns:
        The files, PNG and SVG.

    Raises:
        OptionError: there is nothing to draw, or a file cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    panels = _panels(rows)
    figure, axes = _canvas(len(panels), 2, title)
    names = _names(rows)
    for (left, right), (head, group) in zip(axes, panels.items(), strict=True):
        _roofline(left, group, ceilings, names)
        left.set_title(head, loc="left")
        series = {name: _times(group, name) for name in names if any(row["backend"] == name for row in group)}
        _bars(right, series, names)
    return save(figure, path)


def plot_bars(rows: Rows, path: str | os.PathLike[str], *, title: str = "") -> tuple[Path, Path]:
    """Draw only bars, of the rows' backends together and of the peer whose figures stand beside them.

    Args:
        rows: shape, scheme, tokens, times_floor, floor_us, peer and peer_us of each are read.
        path, title: as in :func:`plot`.
    """
    panels = _panels(rows)
    figure, axes = _canvas(len(panels), 1, title)
    names = ["fusedmoe", *dict.fromkeys(row["peer"] for row in rows if row["peer"] is not None)]
    for (one,), (head, group) in zip(axes, panels.items(), strict=True):
        series = {"fusedmoe": {row["tokens"]: row["times_floor"] for row in group}}
        for name in names[1:]:
            series[name] = {row["tokens"]: row["peer_us"] / row["floor_us"] for row in group if row["peer"] == name}
        _bars(one, series, names)
        one.set_title(head, loc="left")
    return save(figure, path)


def save(figure: Figure, path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write a figure as PNG and as SVG, the same bytes for the same figure.

    Raises:
        OptionError: a file cannot be written.
    """
    import matplotlib as mpl

    stem = Path(path)
    stem = stem.with_suffix("") if stem.suffix.lower() in (".png", ".svg") else stem
    png, svg = (stem.with_name(stem.name + suffix) for suffix in (".png", ".svg"))
    try:
        with mpl.rc_context({"svg.hashsalt": "fusedmoe", "svg.fonttype": "none"}):
            with replacing(png) as new:
                figure.savefig(new, dpi=100, metadata={"Software": None})
            with replacing(svg) as new:
                figure.savefig(new, metadata={"Date": None, "Creator": None})
    except OSError as cause:
        wanted = "files that can be written"
        raise OptionError(
            explain(f"picture {stem}", got=cause.strerror, wanted=wanted, do="Choose another path.")
        ) from cause
    return png, svg


def _canvas(n_rows: int, n_columns: int, title: str) -> tuple[Figure, list[list[Axes]]]:
    if not n_rows:
        raise OptionError(explain("rows to draw", got="none", wanted="at least one", do="Measure something."))
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * n_columns, HEIGHT * n_rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False).tolist()


def _panels(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by shape, scheme and routing, under the words for them."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        routing = row.get("routing", "uniform")
        head = f"{row['shape']}, {row['scheme'] or row['dtype']}" + (f", {routing}" if routing != "uniform" else "")
        found.setdefault(head, []).append(row)
    return found


def _names(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["backend"] for row in rows))


def _times(rows: Rows, name: str) -> dict[int, float | None]:
    return {row["tokens"]: row["times_floor"] for row in rows if row["backend"] == name}


def _roofline(axes: Axes, rows: Rows, ceilings: Mapping[str, Any], names: Sequence[str]) -> None:
    """Rates over flops per byte of weights, below what copying and multiplying allow."""
    bandwidth = ceilings["bandwidth_gbps"] / 1e3
    kinds = dict.fromkeys(kind for row in rows for kind in row["multiplied_as"])
    rates = {kind: ceilings["tflops"][kind] for kind in kinds if kind in ceilings["tflops"]}
    intensities = [row["flops"] / row["weight_bytes"] for row in rows]
    low, high = min(intensities) / 2, max([*intensities, *(rate / bandwidth for rate in rates.values())]) * 2
    top = max(rates.values(), default=bandwidth * high)
    axes.plot(
        [low, top / bandwidth],
        [low * bandwidth, top],
        color="black",
        linewidth=1,
        label=f"weights at {ceilings['bandwidth_gbps']:.0f} GB/s",
    )
    for kind, rate in rates.items():
        label = f"{kind} product, {rate:.3g} TFLOP/s"
        axes.plot([rate / bandwidth, high], [rate, rate], color="black", linewidth=1, linestyle="--", label=label)
    for index, name in enumerate(names):
        points = [(x, row) for x, row in zip(intensities, rows, strict=True) if row["backend"] == name and row["us"]]
        if points:
            axes.scatter(
                [x for x, _ in points],
                [row["tflops"] for _, row in points],
                s=26,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                label=name,
                zorder=3,
            )
    lowest = _lowest(rows, intensities)
    for tokens, x, y in lowest:
        axes.annotate(f"T = {tokens}", (x, y), (0, -12), textcoords="offset points", ha="center", fontsize="x-small")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(min(axes.get_ylim()[0], *(y / 2 for _, _, y in lowest)) if lowest else None)
    axes.set_xlabel("flops per byte of the distinct experts' weights")
    axes.set_ylabel("TFLOP/s")
    axes.grid(visible=True, which="major", linewidth=0.3)
    axes.legend(fontsize="x-small", loc="lower right")


def _lowest(rows: Rows, intensities: Sequence[float]) -> list[tuple[int, float, float]]:
    """Below which point the number of tokens is written."""
    found: dict[int, tuple[float, float]] = {}
    for x, row in zip(intensities, rows, strict=True):
        if row["us"] and row["tflops"] < found.get(row["tokens"], (0.0, float("inf")))[1]:
            found[row["tokens"]] = x, row["tflops"]
    return [(tokens, x, y) for tokens, (x, y) in found.items()]


def _bars(axes: Axes, series: Mapping[str, Mapping[int, float | None]], names: Sequence[str]) -> None:
    """Multiples of the floor, by number of tokens; a missing one has no bar."""
    tokens = sorted({count for values in series.values() for count in values})
    drawn = [name for name, values in series.items() if any(height is not None for height in values.values())]
    if silent := [name for name in series if name not in drawn]:
        axes.set_title(f"no figure: {', '.join(silent)}", loc="right", fontsize="x-small")
    width = 0.8 / max(len(drawn), 1)
    for index, name in enumerate(drawn):
        left = [place - 0.4 + (index + 0.5) * width for place in range(len(tokens))]
        heights = [series[name].get(count) for count in tokens]
        shown = [(x, height) for x, height in zip(left, heights, strict=True) if height is not None]
        bars = axes.bar(
            [x for x, _ in shown],
            [height for _, height in shown],
            width,
            color=COLOURS[names.index(name) % len(COLOURS)],
            label=name,
        )
        labels = [f"{height:.2f}" if height < 10 else f"{height:.3g}" for _, height in shown]
        axes.bar_label(
            bars,
            labels,
            fontsize="xx-small",
            rotation=90 if len(drawn) > 2 else 0,
            padding=2,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
        )
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--", label="floor")
    axes.set_xlim(-0.5, len(tokens) - 0.5)
    axes.set_xticks(range(len(tokens)), [str(count) for count in tokens])
    axes.set_xlabel("T")
    axes.set_ylabel(TIMES_FLOOR)
    axes.margins(y=0.15)
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
