"""The one exception that means "the input is wrong", which the command line turns into a line and exit code 2."""


class InputError(ValueError):
    """What the user gave (a file, a tensor, a flag) is not what was expected.

    The message is one line that names the culprit and says what was expected. `details` are further lines (for
    instance one a tensor); the command line prints at most 20 of them.
    """

    def __init__(self, message: str, details: tuple[str, ...] = ()):
        super().__init__(message)
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return "\n  ".join((self.message, *self.details))
