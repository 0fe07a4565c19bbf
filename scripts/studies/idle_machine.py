"""Benchmarks refuse a busy machine."""

import os
from typing import Annotated

import typer

from handlers.errors import UserError

IDLE = 0.3  # load average per core; figures of a busier machine are worth little
BusyOption = Annotated[bool, typer.Option("--busy", help="Measure on a busy machine, too.")]


class BusyMachine(UserError):
    """The machine has other work, so its figures cannot be compared."""


def require_idle_machine(busy: bool) -> None:
    """Raise BusyMachine if the machine has other work, unless `busy` allows it."""
    load = os.getloadavg()[0]
    if load > IDLE * (os.cpu_count() or 1) and not busy:
        raise BusyMachine(f"The load average is {load:.1f}. Wait until the machine is idle, or use --busy.")
