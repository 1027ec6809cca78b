"""The two errors that fledge raises on purpose. Both carry a complete message; the command line prints it alone."""


class InputError(ValueError):
    """What the user gave is wrong. The message says what, where, what was expected and what to do. Exit code 2."""


class RunError(RuntimeError):
    """The run could not go on (a non-finite loss, a lost rank). Nothing written before is lost. Exit code 1."""
