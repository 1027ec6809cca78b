"""A scheduler that wants its machines back says so by SIGTERM or SIGUSR2; the run saves, and exits with code 75.

Inside `fit` a signal only sets a flag, also in the middle of a save: at the next step boundary all ranks agree on it,
save and leave. Anywhere else (loading, evaluation, between stages) there is nothing to save and the run leaves at once;
what it was doing is done again from the last checkpoint. The same command goes on in both cases.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fledge.errors import Preempted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR2") if hasattr(signal, name))

_asked: str | None = None  # the signal that came first
_held = 0  # how many `held` blocks the main thread is in


def asked() -> str | None:
    """The name of the signal that asked this process to stop, if one did."""
    return _asked


@contextmanager
def listening() -> Iterator[None]:
    """Handle the signals in here; the flag is clear at the start. Outside the main thread this does nothing.

    Raises:
        Preempted: a signal came, and nobody was in `held`.
    """
    global _asked
    _asked = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(number: int, frame: Any) -> None:
        global _asked
        if os.getpid() != owner:  # a data worker, forked with this handler: its owner decides when it ends
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        first, _asked = _asked is None, _asked or signal.Signals(number).name
        if first and not _held:  # only once: what is being closed down now is not to be interrupted again
            raise Preempted(f"stopped by {_asked}")

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        if hasattr(signal, "pthread_sigmask"):  # `fledge launch` starts us with them blocked, so that none gets lost
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """In here a signal only sets the flag; one that is set at a normal end is acted upon then.

    Raises:
        Preempted: on leaving, a signal had come.
    """
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1
    leave_if_asked()


def leave_if_asked() -> None:
    """Raises: Preempted: a signal has come (also one whose exception somebody swallowed)."""
    if _asked is not None and not _held:
        raise Preempted(f"stopped by {_asked}")
