"""What import-linter cannot see: names that only their own file and its table may say."""

import ast
import importlib
from pathlib import Path

import pytest

import fusedmoe
from fusedmoe.backends import BACKENDS
from fusedmoe.plan.planner import SUPPORTS
from fusedmoe.schemes import SCHEMES
from fusedmoe.spec.activation import TABLE, Activation

SOURCE = Path(fusedmoe.__file__).parent
#: The definition of an activation, in three languages, and the files that read other libraries' names for them.
SAYS_ACTIVATIONS = {
    "spec/activation.py",
    "kernels/activations.py",
    "reference/activations.py",
    "checkpoint/models.py",
}


def strings(path: Path) -> set[str]:
    """String literals of a file, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    }


#: The command line and its measurements name what they show; the library may not depend on them.
FILES = sorted(
    path
    for path in SOURCE.rglob("*.py")
    if path.relative_to(SOURCE).parts[0] not in ("cli", "cli.py", "bench.py", "selftest.py", "testing")
)


def test_a_scheme_is_named_by_its_own_file_and_its_table_only():
    # Problem.scheme has the unquantised scheme as its default: a plain tensor carries no scheme of its own.
    allowed = {SOURCE / "schemes" / f"{name}.py" for name in SCHEMES}
    allowed |= {SOURCE / "schemes" / "__init__.py", SOURCE / "spec" / "problem.py"}
    said = {path: strings(path) & set(SCHEMES) for path in FILES if path not in allowed}
    assert not {path: names for path, names in said.items() if names}


def test_no_file_but_the_definitions_names_an_activation():
    said = {str(path.relative_to(SOURCE)): strings(path) & (set(TABLE) - {"silu"}) for path in FILES}
    assert {path for path, names in said.items() if names} <= SAYS_ACTIVATIONS


def test_the_default_activation_is_named_in_signatures_only():
    said = {str(path.relative_to(SOURCE)) for path in FILES if "silu" in strings(path)}
    assert said <= SAYS_ACTIVATIONS | {"checks.py", "functional.py", "nn.py", "reference/experts.py"}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_has_all_that_the_protocol_asks(name):
    scheme = importlib.import_module(SCHEMES[name])
    assert name == scheme.NAME
    assert set(scheme.TOLERANCE) == set(scheme.DTYPES)
    assert callable(scheme.step.fn)
    assert callable(scheme.finish.fn)


@pytest.mark.parametrize("name", TABLE)
def test_an_activation_has_a_device_function_of_its_arity(name):
    activations = importlib.import_module("fusedmoe.kernels.activations")
    arity = TABLE[name][0]
    assert getattr(activations, name).arg_names == (["gate", "up", "p"] if arity == 2 else ["x", "p"])
    parameters = {"beta": 1.0} if name == "situ" else {}
    assert Activation(name, **parameters).gated == (arity == 2)


def test_a_backend_is_known_to_the_planner_and_to_the_loader():
    assert set(SUPPORTS) == set(BACKENDS)


@pytest.mark.parametrize("layer", ["kernels", "plan", "backends", "reference", "spec", "checks.py", "numerics.py"])
def test_schemes_are_named_in_their_table_alone(layer):
    """What runs a scheme works from its format: a new row of the table needs no change there."""
    root = Path(fusedmoe.__file__).parent / layer
    for path in [root] if root.is_file() else root.rglob("*.py"):
        text = path.read_text()
        assert [name for name in SCHEMES if f'"{name}"' in text or f"'{name}'" in text] == [], path
