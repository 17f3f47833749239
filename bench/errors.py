"""The error that the commands tell in one line."""


class UsageError(Exception):
    """Why a command cannot start."""
