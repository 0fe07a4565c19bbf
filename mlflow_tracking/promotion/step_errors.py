"""How a step can end without success. Each message is a sentence for people."""

from handlers.errors import UserError


class Refused(UserError):
    """The release itself is at fault; a retry would not help."""


class StepFailed(UserError):
    """The step failed, but a retry may succeed."""


class NotYet(UserError):
    """The step needs more time, or its release has lost its alias. Nothing is at fault."""
