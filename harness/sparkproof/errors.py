"""Errors that are the user's to cure: one sentence and a fix, never a traceback."""


class UserError(Exception):
    """Something outside the harness is wrong and a person can put it right.

    `fix` is what to do next, as a sentence or a command to copy. The command line prints
    both and exits with `exit_code`; `--debug` adds the traceback. `skip_class` (a ReasonClass value) says that a case which
    meets this error was not run for lack of a capability, rather than broken.
    """

    def __init__(self, message: str, fix: str = "", exit_code: int = 2, skip_class: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix
        self.exit_code = exit_code
        self.skip_class = skip_class

    def __str__(self) -> str:
        return f"{self.message} {self.fix}".strip()
