"""The error of every study."""

from handlers.errors import UserError


class StudyError(UserError):
    """A study that these data or this model do not allow."""
