"""What fledge raises on purpose. Each carries a complete message; the command line prints it alone."""


class InputError(ValueError):
    """What the user gave is wrong. The message says what, where, what was expected and what to do. Exit code 2."""


class RunError(RuntimeError):
    """The run could not go on (a non-finite loss, a lost rank). Nothing written before is lost. Exit code 1."""


class Preempted(SystemExit):
    """A signal asked the run to stop; it can go on from its last checkpoint. Exit code 75, whoever lets it pass."""

    CODE = 75  # EX_TEMPFAIL: try again later

    def __init__(self, message: str) -> None:
        super().__init__(self.CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message
