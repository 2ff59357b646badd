"""The Triton backend in the interpreter: nothing of a batch shows in a row but its own token."""

from __future__ import annotations

import pytest

from fusedmoe.schemes import SCHEMES, format_of
from fusedmoe.settings import settings
from fusedmoe.testing.cases import Case
from fusedmoe.testing.isolation import batch_variant_rows, couples_rows, disturbed_rows

if not settings().interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

# Rows of a tile that are not live hold whatever lies in memory; numpy remarks on its NaNs and overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

#: 80 slots are scheduled, 64 and fewer are not.
SIZES = (1, 3, 32, 40)
PLAIN = [
    Case.of((40, 2, 3, 33, 24), dtype=dtype, gate_up_layout=layout, ids=ids, bias=True, pad=3)
    for dtype, layout, ids in (
        ("float32", "concatenated", "invalid"),
        ("float16", "interleaved", "any"),
        ("bfloat16", "concatenated", "any"),
    )
]
FORMATS = map(format_of, SCHEMES)
QUANTISED = [Case.of((40, 2, 3, 64, 32), formats=(form, form), ids="any").fitted() for form in FORMATS]
CASES = [case for case in PLAIN + QUANTISED if not couples_rows(case)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.formats[0] or case.dtype}")
def test_batch_invariant(case):
    assert batch_variant_rows(case, SIZES, backend="triton") == dict.fromkeys(SIZES, 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.formats[0] or case.dtype}")
@pytest.mark.parametrize("tokens", [3, 40])
def test_a_nan_stays_in_its_row(case, tokens):
    case = Case.of((tokens, 2, 3, case.hidden, case.intermediate), dtype=case.dtype, formats=case.formats)
    assert disturbed_rows(case, backend="triton") == (0, True)
