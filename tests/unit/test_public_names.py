"""The names a user imports: sorted, importable, known to type checkers, and no others."""

import ast
from pathlib import Path

import pytest

import fusedmoe


def typed_names() -> dict[str, str]:
    """Name -> module of what the TYPE_CHECKING block of the package imports."""
    tree = ast.parse(Path(fusedmoe.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    names = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        for alias in statement.names:
            assert alias.asname == alias.name, "without `as` a type checker takes the name as private"
            whole_module = statement.module == "fusedmoe"
            names[alias.name] = f"fusedmoe.{alias.name}" if whole_module else statement.module
    return names


def test_all_is_sorted_and_has_no_duplicates():
    assert fusedmoe.__all__ == sorted(set(fusedmoe.__all__))


def test_type_checkers_see_the_names_that_are_loaded():
    assert typed_names() == {name: f"fusedmoe{where}" for name, where in fusedmoe._WHERE.items()}
    assert sorted(fusedmoe._WHERE) == fusedmoe.__all__


@pytest.mark.parametrize("name", fusedmoe.__all__)
def test_every_name_can_be_imported(name):
    value = getattr(fusedmoe, name)
    assert getattr(value, "__name__", name).rpartition(".")[2] == name  # a table has no name of its own
    assert value.__doc__, "a public name says what it is"


def test_dir_lists_the_public_names():
    assert set(dir(fusedmoe)) == {*fusedmoe.__all__, "__version__"}


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    with pytest.raises(AttributeError, match="no attribute 'fused_expert'; it has .*fused_experts"):
        fusedmoe.fused_expert  # noqa: B018


def test_every_error_is_public_and_derives_from_the_base():
    public = {name for name in fusedmoe.__all__ if name.endswith("Error")}
    defined = {
        name
        for name, value in vars(fusedmoe.errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert public == defined
    assert all(issubclass(getattr(fusedmoe, name), fusedmoe.FusedMoEError) for name in public)


def test_the_package_says_that_it_is_typed():
    assert (Path(fusedmoe.__file__).parent / "py.typed").is_file()
