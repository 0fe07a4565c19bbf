"""Run a command in this process as `python SCRIPT ARGS` runs it."""

import gc
import io
import os
import runpy
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from subprocess import CompletedProcess
from unittest.mock import patch

import pytest

from mlflow_tracking.command_line import run
from mlflow_tracking.stack_settings import ROOT


def invoke(main: Callable[..., None], *args: object) -> tuple[int, str]:
    """Return the exit code, and all that was printed on one line with single spaces."""
    output = io.StringIO()
    arguments = patch.object(sys, "argv", ["command", *map(str, args)])
    with arguments, redirect_stdout(output), redirect_stderr(output), pytest.raises(SystemExit) as ended:
        run(main)
    return int(ended.value.code or 0), " ".join(output.getvalue().split())


def call_script(name: str, *args: str, **env: str) -> CompletedProcess[str]:
    """`python scripts/NAME ARGS` in this process, which has imported already what takes a new one two seconds."""
    import mlflow

    output, complaints = io.StringIO(), io.StringIO()
    uri = mlflow.get_tracking_uri()  # a command sets its own
    with (
        warnings.catch_warnings(),
        patch.dict(os.environ, env),
        patch.object(sys, "argv", [name, *args]),
        redirect_stdout(output),
        redirect_stderr(complaints),
    ):
        warnings.simplefilter("ignore", ResourceWarning)  # a process that ends closes its sockets
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        code = int(ended.value.code or 0)
        del ended
        gc.collect()
    mlflow.set_tracking_uri(uri)
    return CompletedProcess([name, *args], code, output.getvalue(), complaints.getvalue())
