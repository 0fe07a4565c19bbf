"""Errors that people read.

The message says in one or two whole sentences what is wrong and what to do. `exit_code` is the exit code of a command
that ends with the error. Standard library only: MLflow's image copies this module and files.py alone.
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


class ImageError(UserError):
    """A refused image. `status` is the HTTP status, `code` a stable word for programs."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class InvalidImage(ImageError):
    """A file that is damaged, or built in a way that is not supported; status 400."""

    def __init__(self, message: str) -> None:
        super().__init__(400, "invalid_image", message)
