"""Fixtures for all tests."""

import pytest

from tests.forks import Forks


@pytest.fixture(scope="session")
def forks():
    """The server that forks ranks; it starts with the first test that needs one."""
    with Forks(hash_seed=1) as server:
        yield server
