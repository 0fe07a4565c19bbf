"""SIGINT and SIGTERM during training: stop at the next safe point."""

import signal
from collections.abc import Callable
from types import FrameType

from handlers.errors import UserError


class Interrupted(UserError):
    """A signal stopped the run; the exit code is 128 and the signal's number."""

    def __init__(self, number: int, message: str = "Interrupted before the first epoch."):
        super().__init__(message)
        self.number = number
        self.exit_code = 128 + number


class Interruption:
    """After `watch`, the first SIGINT or SIGTERM raises Interrupted at the next `check`; a second one acts at once."""

    def __init__(self) -> None:
        self.number = 0  # of the signal received

    def watch(self) -> None:
        """Install the signal handlers."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def check(self, agree: Callable[[int], int] = int) -> None:
        """Raise Interrupted if a signal was received. `agree` turns this process's signal into that of all, 0: none."""
        self.number = agree(self.number)
        if self.number:
            raise Interrupted(self.number)
