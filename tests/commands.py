"""Run a command in this process as `python SCRIPT ARGS` runs it."""

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

import pytest

from mlflow_tracking.command_line import run


def invoke(main: Callable[..., None], *args: object) -> tuple[int, str]:
    """Return the exit code, and all that was printed on one line with single spaces."""
    output = io.StringIO()
    arguments = patch.object(sys, "argv", ["command", *map(str, args)])
    with arguments, redirect_stdout(output), redirect_stderr(output), pytest.raises(SystemExit) as ended:
        run(main)
    return int(ended.value.code or 0), " ".join(output.getvalue().split())
