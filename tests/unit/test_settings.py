"""Settings come from the environment once, and a wrong one is an error that names it."""

import pytest

from fusedmoe.errors import OptionError
from fusedmoe.settings import Settings, settings

NAMES = (
    "FUSEDMOE_BACKEND",
    "FUSEDMOE_BATCH_INVARIANT",
    "FUSEDMOE_SHARED_MEMORY_CAP",
    "FUSEDMOE_TUNED",
    "FUSEDMOE_WORKSPACE_LIMIT",
    "TRITON_INTERPRET",
)


@pytest.fixture
def environment(monkeypatch):
    """Set variables for a first read; afterwards the process reads its own again."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    settings.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    settings.cache_clear()


def test_defaults(environment):
    want = Settings(
        backend="auto", shared_memory_cap=None, workspace_limit=None, batch_invariant=False, tuned=None, interpret=False
    )
    assert settings() == want


def test_all_variables(environment):
    environment.setenv("FUSEDMOE_BACKEND", "torch")
    environment.setenv("FUSEDMOE_SHARED_MEMORY_CAP", "49152")
    environment.setenv("FUSEDMOE_WORKSPACE_LIMIT", "1000000")
    environment.setenv("FUSEDMOE_BATCH_INVARIANT", "yes")
    environment.setenv("FUSEDMOE_TUNED", "/tuned")
    environment.setenv("TRITON_INTERPRET", "1")
    assert settings() == Settings(
        backend="torch",
        shared_memory_cap=49152,
        workspace_limit=1000000,
        batch_invariant=True,
        tuned="/tuned",
        interpret=True,
    )


def test_an_empty_variable_is_an_unset_one(environment):
    for name in NAMES:
        environment.setenv(name, "")
    assert settings() == Settings()


@pytest.mark.parametrize("text", ["1", "true", "True", "on", "yes"])
def test_words_that_turn_the_interpreter_on(environment, text):
    environment.setenv("TRITON_INTERPRET", text)
    assert settings().interpret


@pytest.mark.parametrize("text", ["0", "false", "off", "no"])
def test_words_that_leave_it_off(environment, text):
    environment.setenv("TRITON_INTERPRET", text)
    assert not settings().interpret


@pytest.mark.parametrize("text", ["0", "-1", "48k", "1e5", "0x10", " 7", "1.0"])
@pytest.mark.parametrize("name", ["FUSEDMOE_SHARED_MEMORY_CAP", "FUSEDMOE_WORKSPACE_LIMIT"])
def test_a_cap_that_is_no_positive_integer(environment, name, text):
    environment.setenv(name, text)
    with pytest.raises(OptionError) as error:
        settings()
    message = str(error.value)
    assert name in message
    assert repr(text) in message
    assert "positive integer" in message


def test_read_once(environment):
    before = settings()
    environment.setenv("FUSEDMOE_BACKEND", "torch")
    assert settings() is before


def test_an_unknown_backend_in_the_environment_is_named_by_the_call(environment):
    import torch

    import fusedmoe

    environment.setenv("FUSEDMOE_BACKEND", "tortch")
    x, w13, w2 = torch.ones(1, 8), torch.ones(2, 8, 8), torch.ones(2, 8, 4)
    with pytest.raises(OptionError, match="backend: got 'tortch'; wanted 'auto' or one of"):
        fusedmoe.fused_experts(x, w13, w2, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64))
