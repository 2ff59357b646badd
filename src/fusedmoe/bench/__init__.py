"""Time the layer at the sizes of known models, beside the floor that the device sets and beside other libraries.

How: the whole call, from ids to output; weights, hidden states and routing random (each token's experts are distinct).
On a GPU a CUDA graph is replayed, with 256 MB written between replays so that the L2 cache is cold; the figure is the
median. Before it is timed a call is verified, ours with NaN in the output and the workspace beforehand: what is wrong
gets no figure. Weights of a scheme are random codes with random scales.
"""

from __future__ import annotations

from fusedmoe.bench.figures import Peer, read_peer
from fusedmoe.bench.layer import Layer, Row, bench, describe, draw_layer
from fusedmoe.bench.peers import PEERS, peers_of
from fusedmoe.bench.routing import ROUTINGS, routing_of
from fusedmoe.bench.shapes import (
    ACTIVATION,
    DTYPES,
    SHAPES,
    TOKENS,
    TOKENS_CPU,
    UNQUANTISED,
    Shape,
    default_device,
    dtype_of,
    format_for,
    problem_of,
    shape_of,
)
from fusedmoe.bench.timing import measure_ceilings, time_us

__all__ = [
    "ACTIVATION",
    "DTYPES",
    "PEERS",
    "ROUTINGS",
    "SHAPES",
    "TOKENS",
    "TOKENS_CPU",
    "UNQUANTISED",
    "Layer",
    "Peer",
    "Row",
    "Shape",
    "bench",
    "default_device",
    "describe",
    "draw_layer",
    "dtype_of",
    "format_for",
    "measure_ceilings",
    "peers_of",
    "problem_of",
    "read_peer",
    "routing_of",
    "shape_of",
    "time_us",
]
