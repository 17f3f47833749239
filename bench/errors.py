"""The error that the commands report in one line."""


class UsageError(Exception):
    """The reason why a command cannot start."""
