"""A Postgres server for one test."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from scripts.child_processes import free_ports


@pytest.fixture
def postgres() -> Iterator[str]:
    """The address of a Postgres server of this test's own, whose programs refuse to run as root."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("Postgres is not installed")
    [port] = free_ports(1)
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        shutil.chown(folder, 65534) if user else None
        data, server = f"{folder}/data", [*user, programs[-1] / "pg_ctl", "-D", f"{folder}/data", "-w"]
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
        run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL, env={"HOME": folder}, cwd=folder)
        run([*user, programs[-1] / "initdb", "-D", data, "-U", "mlflow", "-A", "trust", "-E", "UTF8"])
        run([*server, "-l", f"{folder}/log", "-o", options, "start"])
        try:
            yield f"postgresql://mlflow@127.0.0.1:{port}/postgres"
        finally:
            run([*server, "-m", "immediate", "stop"])
