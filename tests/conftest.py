"""Fixtures for all tests."""

import signal

import pytest

from tests.forks import Forks

# A job in a shell's background ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def forks():
    """The server that forks ranks; it starts with the first test that needs one."""
    with Forks(hash_seed=1) as server:
        yield server
