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
    "integrations/transformers/gates.py",
    "integrations/vllm.py",
    "integrations/sglang.py",
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
    if path.relative_to(SOURCE).parts[0] not in ("cli", "bench", "selftest.py", "testing")
)


def test_schemes_are_named_in_their_table_alone():
    """What runs a scheme works from its format: a new row of the table needs no change there. Files of models have
    names of their own, which only their readers and writers translate, and so have the modules of other libraries."""
    said = {path.relative_to(SOURCE): strings(path) & set(SCHEMES) for path in FILES}
    told = {path for path, names in said.items() if names}
    assert {path for path in told if path.parts[0] not in ("checkpoint", "integrations")} == {Path("schemes.py")}


def test_no_file_but_the_definitions_names_an_activation():
    said = {str(path.relative_to(SOURCE)): strings(path) & (set(TABLE) - {"silu"}) for path in FILES}
    assert {path for path, names in said.items() if names} <= SAYS_ACTIVATIONS


def test_the_default_activation_is_named_in_signatures_only():
    said = {str(path.relative_to(SOURCE)) for path in FILES if "silu" in strings(path)}
    assert said <= SAYS_ACTIVATIONS | {"checks.py", "functional.py", "nn.py", "reference/experts.py"}


@pytest.mark.parametrize("name", TABLE)
def test_an_activation_has_a_device_function_of_its_arity(name):
    activations = importlib.import_module("fusedmoe.kernels.activations")
    arity = TABLE[name][0]
    assert getattr(activations, name).arg_names == (["gate", "up", "p"] if arity == 2 else ["x", "p"])
    parameters = {"beta": 1.0} if name == "situ" else {}
    assert Activation(name, **parameters).gated == (arity == 2)


def test_a_backend_is_known_to_the_planner_and_to_the_loader():
    assert set(SUPPORTS) == set(BACKENDS)
