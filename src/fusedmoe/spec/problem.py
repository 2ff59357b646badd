"""Everything that decides how a call is run, as one hashable value."""

from __future__ import annotations

from dataclasses import dataclass

from fusedmoe.spec.activation import Activation
from fusedmoe.spec.format import Format, Inputs
from fusedmoe.spec.layout import Fp32Precision, GateUpLayout, Matrix

#: Bytes per element of the types a layer can have; float32 first: the slowest and the most exact.
ITEMSIZE: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """What decides how adapters are run: their slots, the rank R that these are made for, and whether gate and up
    have one A (``parts`` 1) or one each (2).

    Attributes:
        steps: B x can be added as more steps of a sum over K: all of B is finite, and 16 bytes of it can be copied.
    """

    slots: int
    rank: int
    parts: int
    steps: bool = False


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """One of the two grouped GEMMs.

    Attributes:
        columns: output columns.
        inner: K, the size that is summed over.
        width: rows of weights to an output column: 2 where gate and up make one column, else 1.
        matrix: layout of its expert matrix.
        dtype: type of the layer.
        format: of a quantised expert matrix, else None.
        emulate: multiply codes in a wider type even where the device has theirs.
        rows_aligned: its rows are contiguous and start at multiples of 16 bytes.
        rank: R of the adapters that are added to it, 0 without.
        steps: columns of A x of all adapters, where B v may be added as more steps of a sum; else 0.
    """

    columns: int
    inner: int
    width: int
    matrix: Matrix
    dtype: str
    format: Format | None = None
    emulate: bool = False
    rows_aligned: bool = True
    rank: int = 0
    steps: int = 0

    @property
    def inputs(self) -> Inputs | None:
        """How its rows are quantised; None when they are not."""
        return None if self.format is None else self.format.inputs

    @property
    def grouped(self) -> bool:
        """Its rows are quantised by groups of columns, so that sums are scaled group by group."""
        return self.inputs is not None and self.inputs.mode == "group"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes (see the glossary in :mod:`fusedmoe.spec`), type, layout and options of one call."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int
    dtype: str
    activation: Activation
    w13_format: Format | None = None
    w2_format: Format | None = None
    inputs_dtype: str | None = None  # of hidden states that are codes already
    emulate: bool = False
    rows_aligned: bool = True  # rows of hidden states are contiguous and start at multiples of 16 bytes
    gate_up: GateUpLayout = "concatenated"
    w13: Matrix = Matrix("K", True)
    w2: Matrix = Matrix("K", True)
    w13_bias: bool = False
    w2_bias: bool = False
    weight_on_input: bool = False
    expert_map: bool = False
    known_experts: int = 0  # that ids may name, by way of the map; 0 without one
    sparse: bool = False  # rows of absent slots may hold anything: a backend may write rows where the output is
    fp32_precision: Fp32Precision = "ieee"
    alone: bool = False  # the first GEMM is the whole call: its rows, each at its slot, are the output
    batch_invariant: bool = False  # a row's bits depend on its token alone
    adapters: Adapters | None = None

    @property
    def slots(self) -> int:
        """S = T * top_k."""
        return self.tokens * self.top_k

    @property
    def mean_rows(self) -> float:
        """Rows of an expert when all that ids may name are chosen alike: those of other ranks get none here."""
        return self.slots / max(self.experts, self.known_experts)

    @property
    def w13_rows(self) -> int:
        """Rows of w13: 2I when gated, else I."""
        return self.intermediate * (2 if self.activation.gated else 1)

    @property
    def itemsize(self) -> int:
        """Bytes of an element of hidden states and intermediates."""
        return ITEMSIZE[self.dtype]

    @property
    def gate_up_gemm(self) -> Gemm:
        """The first GEMM, whose tiles hold gate and up rows of a gated layer."""
        width = 2 if self.activation.gated else 1
        return Gemm(
            columns=self.intermediate,
            inner=self.hidden,
            width=width,
            matrix=self.w13,
            dtype=self.dtype,
            format=self.w13_format,
            emulate=self.emulate,
            # Rows that the layer quantises itself lie in its workspace.
            rows_aligned=self.rows_aligned
            or (self.inputs_dtype is None and self.w13_format is not None and self.w13_format.inputs is not None),
            rank=0 if self.adapters is None else self.adapters.rank,
            steps=self._steps,
        )

    @property
    def down_gemm(self) -> Gemm:
        """The second GEMM."""
        return Gemm(
            columns=self.hidden,
            inner=self.intermediate,
            width=1,
            matrix=self.w2,
            dtype=self.dtype,
            format=self.w2_format,
            emulate=self.emulate,
            rank=0 if self.adapters is None else self.adapters.rank,
            steps=self._steps,
        )

    @property
    def _steps(self) -> int:
        held = self.adapters
        return held.slots * held.rank if held is not None and held.steps else 0

    @property
    def flops(self) -> int:
        """Floating-point operations of the two GEMMs, 2 per multiply-add."""
        return 2 * self.slots * self.hidden * (self.w13_rows + self.intermediate)

    @property
    def active_experts(self) -> float:
        """Expected number of distinct experts under uniform routing: E (1 - (1 - k/E)^T)."""
        miss = max(0.0, 1.0 - self.top_k / self.experts)
        return self.experts * (1.0 - miss**self.tokens)

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert's weights, with scales and zero points."""
        return sum(
            rows * columns * (self.itemsize if form is None else form.bits_per_weight() / 8)
            for rows, columns, form in (
                (self.w13_rows, self.hidden, self.w13_format),
                (self.hidden, self.intermediate, self.w2_format),
            )
        )

    @property
    def weight_bytes(self) -> float:
        """Expected bytes of the distinct experts' weights under uniform routing."""
        return self.active_experts * self.expert_bytes
