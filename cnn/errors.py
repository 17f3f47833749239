"""Errors that the command line reports in one line."""

USAGE = 2
FAILURE = 1


class UsageError(Exception):
    """An error that the user can fix; its text names what is wrong and where.

    ``code`` is the program's exit code: USAGE for arguments and the files they name, FAILURE for
    later errors.
    """

    def __init__(self, text: str, code: int = USAGE):
        super().__init__(text)
        self.code = code


def missing(package: str, use: str, extra: str = "train") -> UsageError:
    """The error for an optional package that is not installed; ``extra`` installs it."""
    return UsageError(f"{use} needs {package}: pip install 'triton-cnn[{extra}]'")
