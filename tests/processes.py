"""Other processes, to be killed."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def running(code: str, folder: Path, says: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `code` with the folder for an argument and has said `says`; killed in the end."""
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == f"{says}\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
