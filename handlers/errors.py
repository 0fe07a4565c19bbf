"""Errors that people read.

The message is one sentence that says what is wrong and what to do. `exit_code` is the exit code of a command that ends
with the error. Standard library only: MLflow's image copies this module and files.py alone.
"""


class UserError(Exception):
    """The base of every error that is shown to people without a traceback."""

    exit_code = 1


class UsageError(UserError):
    """A wrong option or setting on the command line."""

    exit_code = 2


class ServiceUnavailable(UserError, ConnectionError):
    """A server does not answer."""

    exit_code = 3
