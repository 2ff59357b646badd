"""Activations by name, with their parameters: the one table that names them all."""

from __future__ import annotations

from dataclasses import dataclass

from fusedmoe.errors import OptionError, explain

#: name -> (number of arguments of the function, parameters with their defaults).
#: Two arguments (gate, up) make an activation gated; a default of None means "off",
#: REQUIRED means that the caller must say.
REQUIRED = object()
#: Parameters are applied in float32.
FLOAT32_MAX = 3.4028234663852886e38
TABLE: dict[str, tuple[int, dict[str, object]]] = {
    "silu": (2, {"limit": None}),
    "gelu": (2, {}),
    "gelu_tanh": (2, {}),
    "relu2": (2, {}),
    "swigluoai": (2, {"alpha": 1.702, "beta": 1.0, "limit": 7.0}),
    "swiglustep": (2, {"limit": 7.0}),
    "situ": (2, {"beta": REQUIRED, "linear_beta": None}),
    "silu_no_mul": (1, {}),
    "gelu_no_mul": (1, {}),
    "gelu_tanh_no_mul": (1, {}),
    "relu2_no_mul": (1, {}),
    "identity_no_mul": (1, {}),
}


@dataclass(frozen=True)
class Activation:
    """An activation and its parameters.

    With ``s(z) = 1 / (1 + exp(-z))``, ``g`` the gate and ``u`` the up projection, all in float32:

    ==================  =========================================================================
    name                equation
    ==================  =========================================================================
    silu                g s(g) u; with ``limit`` L first g = min(g, L), u = clamp(u, -L, L)
    gelu                g/2 (1 + erf(g / sqrt 2)) u
    gelu_tanh           g/2 (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))) u
    relu2               max(g, 0)^2 u
    swigluoai           g = min(g, limit), u = clamp(u, -limit, limit); g s(alpha g) (u + beta)
    swiglustep          min(g s(g), limit) clamp(u, -limit, limit)
    situ                beta tanh(g / beta) s(g) v; v = u, or linear_beta tanh(u / linear_beta)
    silu_no_mul         g s(g)
    gelu_no_mul         g/2 (1 + erf(g / sqrt 2))
    gelu_tanh_no_mul    as gelu_tanh, without u
    relu2_no_mul        max(g, 0)^2
    identity_no_mul     g
    ==================  =========================================================================

    Whether gate and up rows are stored concatenated or interleaved is no part of the activation:
    see ``gate_up_layout`` of :func:`fusedmoe.fused_experts`. ``silu`` with a limit is what other
    libraries call ``gemm1_clamp_limit``.

    >>> Activation("swigluoai").limit
    7.0
    >>> Activation("silu", limit=10.0).gated
    True
    """

    name: str
    alpha: float | None = None
    beta: float | None = None
    limit: float | None = None
    linear_beta: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in TABLE:
            raise OptionError(
                explain(
                    "unknown activation",
                    got=repr(self.name),
                    wanted=f"one of {', '.join(TABLE)}",
                    do="Names ending in _no_mul are not gated.",
                )
            )
        allowed = TABLE[self.name][1]
        for parameter in ("alpha", "beta", "limit", "linear_beta"):
            value = getattr(self, parameter)
            if parameter not in allowed:
                if value is not None:
                    raise OptionError(
                        explain(
                            f"activation {self.name!r} has no parameter {parameter!r}",
                            got=value,
                            wanted=f"only {sorted(allowed) or 'no parameters'}",
                            do="Drop it, or choose the activation that has it.",
                        )
                    )
                continue
            if value is None:
                default = allowed[parameter]
                if default is REQUIRED:
                    raise OptionError(
                        explain(
                            f"activation {self.name!r} needs {parameter!r}",
                            got=None,
                            wanted="a positive number",
                            do=f"Write Activation({self.name!r}, {parameter}=...).",
                        )
                    )
                object.__setattr__(self, parameter, default)
            elif not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= FLOAT32_MAX:
                raise OptionError(
                    explain(
                        f"{parameter} of activation {self.name!r}",
                        got=repr(value),
                        wanted="a number that float32 holds",
                        do="Pass a float.",
                    )
                )
            elif parameter != "alpha" and parameter != "beta" and not value > 0:
                raise OptionError(
                    explain(
                        f"{parameter} of activation {self.name!r}",
                        got=value,
                        wanted="a number above 0",
                        do="Leave it out for the default.",
                    )
                )
        if self.name == "situ" and self.beta is not None and not self.beta > 0:
            raise OptionError(
                explain("beta of activation 'situ'", got=self.beta, wanted="a number above 0", do="See the equation.")
            )

    @property
    def gated(self) -> bool:
        """True when the function takes gate and up, so that w13 has 2I rows."""
        return TABLE[self.name][0] == 2

    @classmethod
    def of(cls, value: str | Activation) -> Activation:
        """Take a name or an Activation; a name gets its default parameters."""
        if isinstance(value, Activation):
            return value
        if not isinstance(value, str):
            raise OptionError(
                explain(
                    "activation",
                    got=type(value).__name__,
                    wanted="a name or a fusedmoe.Activation",
                    do=f"Names are {', '.join(TABLE)}.",
                )
            )
        return cls(value)


#: Of a matrix alone, which has none.
IDENTITY = Activation("identity_no_mul")
