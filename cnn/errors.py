"""Errors that the command line reports in one line."""

USAGE = 2
FAILURE = 1


class UsageError(Exception):
    """Something that whoever started the program can put right; its text names what and where.

    ``code`` is the program's exit code: USAGE for arguments and the files they name, FAILURE for
    what went wrong later.
    """

    def __init__(self, text: str, code: int = USAGE):
        super().__init__(text)
        self.code = code


def missing(package: str, use: str, extra: str = "train") -> UsageError:
    """The problem that an optional package is not installed; ``extra`` brings it."""
    return UsageError(f"{use} needs {package}: pip install 'triton-cnn[{extra}]'")
