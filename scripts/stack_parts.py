"""The parts of the stack without containers. supervisord starts, restarts and stops them, and rotates their logs."""

import subprocess
import sys
import xmlrpc.client
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from supervisor.xmlrpc import SupervisorTransport

from mlflow_tracking.stack_settings import MODEL_NAME, ROOT
from scripts import child_processes

UNANSWERED = (OSError, HTTPException, xmlrpc.client.Error)  # by a supervisord that starts, stops or is busy


class Part(NamedTuple):
    """A program that runs as long as the stack."""

    name: str  # the setting NAME_PORT is its port, logs/NAME.log its log
    title: str
    command: str
    health: str  # a path that answers 200 when the part can work
    door: str = ""  # the path that people open


PARTS = (
    Part("mlflow", "MLflow", "bash mlflow_tracking/mlflow_server.sh", "/health"),
    Part("streamlit", "Page", "python -m streamlit_app.page_server", "/_stcore/health"),
    Part("torchserve", "TorchServe", "bash torchserve/start_torchserve.sh", "/ping", f"/predictions/{MODEL_NAME}"),
    Part("promoter", "Promoter", "python -m mlflow_tracking.promotion.service", "/healthz", "/status"),
    Part("monitor", "Monitor", "python -m monitoring.monitor_service", "/health", "/summary"),
)
HEAD = """\
[unix_http_server]
file = %(here)s/control.sock
chmod = 0600

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[supervisord]
nodaemon = true
silent = true
pidfile = %(here)s/supervisord.pid
logfile = %(ENV_STACK_STATE)s/logs/supervisord.log
logfile_maxbytes = 5MB

; One group, so that all parts are stopped at once.
[group:stack]
"""
PROGRAM = """
[program:{name}]
command = python -S -m scripts.child_processes {command}
startsecs = 3
autorestart = true
stopasgroup = true
killasgroup = true
redirect_stderr = true
stdout_logfile = %(ENV_STACK_STATE)s/logs/{name}.log
stdout_logfile_maxbytes = 5MB
"""


class Supervisord:
    """The supervisord of one stack. `run_dir` holds its configuration and its control socket."""

    process: subprocess.Popen[bytes]  # once started here

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def start(self, environment: Mapping[str, str]) -> None:
        """Start supervisord; its parts inherit the environment. All are killed when this process dies."""
        programs = [PROGRAM.format(name=part.name, command=part.command) for part in PARTS]
        text = f"{HEAD}programs = {','.join(part.name for part in PARTS)}\n{''.join(programs)}"
        (self.run_dir / "supervisord.conf").write_text(text)
        (self.run_dir / "control.sock").unlink(missing_ok=True)  # of a supervisord that was killed
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", f"{self.run_dir}/supervisord.conf"]
        self.process = child_processes.start(command, environment, cwd=ROOT)

    @property
    def _interface(self) -> Any:
        transport = SupervisorTransport(None, None, f"unix://{self.run_dir}/control.sock")
        return xmlrpc.client.ServerProxy("http://127.0.0.1", transport).supervisor

    def states(self) -> dict[str, dict[str, Any]]:
        """Return supervisord's view of each part by name; empty while it does not answer."""
        with suppress(*UNANSWERED):
            return {info["name"]: info for info in self._interface.getAllProcessInfo()}
        return {}

    def start_part(self, name: str) -> None:
        """Start a part that supervisord gave up on."""
        with suppress(*UNANSWERED):
            self._interface.startProcess(f"stack:{name}", False)

    def stop_part(self, name: str) -> None:
        """Stop a part, which then stays stopped."""
        with suppress(*UNANSWERED):
            self._interface.stopProcess(f"stack:{name}")

    def environment(self) -> dict[str, str]:
        """Return the environment of the running supervisord; empty if none runs."""
        with suppress(*UNANSWERED, psutil.Error):
            return psutil.Process(self._interface.getPID()).environ()
        return {}
